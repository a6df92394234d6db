import os
import subprocess
import sys
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.runtime.migration import MigrationContext
from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import create_async_engine

from dashtam.infrastructure import schema
from dashtam.infrastructure.secret_keys import make_key
from dashtam.infrastructure.tables import Model

pytestmark = pytest.mark.integration


def differences(connection: Connection) -> list[object]:
    # whereupon looks after its own tables
    options = {"include_name": lambda name, kind, _: kind != "table" or name in Model.metadata.tables}
    return list(compare_metadata(MigrationContext.configure(connection, opts=options), Model.metadata))


async def test_the_migrations_make_the_tables_that_the_models_describe(database_url: str) -> None:
    engine = create_async_engine(database_url)
    try:
        await schema.upgrade(engine)
        await schema.upgrade(engine)  # does nothing
        async with engine.connect() as connection:
            assert await connection.run_sync(differences) == []
        await schema.check(engine)
    finally:
        await engine.dispose()


async def test_an_empty_database_is_named_as_such_with_the_command_to_run(database_url: str) -> None:
    engine = create_async_engine(database_url)
    try:
        with pytest.raises(schema.SchemaOutdated, match=r"no version at all.*`python -m dashtam upgrade`"):
            await schema.check(engine)
    finally:
        await engine.dispose()


KEYS = {"DASHTAM_SECRET_KEYS": f'["{make_key()}"]'}


def dashtam(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "dashtam", *arguments]
    return subprocess.run(command, env=os.environ | KEYS | environment, capture_output=True, text=True, timeout=60)


def test_upgrade_makes_the_tables_in_any_database(database_url: str) -> None:
    for _ in range(2):
        done = dashtam("upgrade", DASHTAM_DATABASE_URL=database_url)
        assert done.returncode == 0, done.stderr
        assert "is up to date" in done.stdout


def test_serving_a_postgresql_database_without_tables_says_what_to_run(postgres_url: str) -> None:
    refused = dashtam("serve", "--port", "0", DASHTAM_DATABASE_URL=postgres_url)
    assert refused.returncode == 1
    assert "python -m dashtam upgrade" in refused.stderr
    assert "Traceback" not in refused.stderr + refused.stdout


def test_a_setting_that_makes_no_sense_is_named(tmp_path: Path) -> None:
    refused = dashtam("serve", DASHTAM_SMTP_PORT="mail", DASHTAM_DATABASE_URL=f"sqlite+aiosqlite:///{tmp_path}/x.db")
    assert refused.returncode == 2
    assert refused.stderr.startswith("DASHTAM_SMTP_PORT: ")


def test_a_database_that_does_not_answer_is_named(unused_tcp_port: int) -> None:
    url = f"postgresql+asyncpg://nobody:tr0ub4dor@127.0.0.1:{unused_tcp_port}/dashtam"
    for command in ("serve", "upgrade"):
        refused = dashtam(command, DASHTAM_DATABASE_URL=url)
        assert refused.returncode == 1
        assert f"127.0.0.1:{unused_tcp_port}" in refused.stderr
        assert "tr0ub4dor" not in refused.stderr
        assert "Traceback" not in refused.stderr + refused.stdout
