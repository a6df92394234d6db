"""whereupon's tables: how they are made, once, by whom, and what is said where they are not as they should be."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, create_engine, inspect, make_url, text
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from tests.notebook import NoteWritten
from whereupon import EventBus, SchemaError, schema

pytestmark = pytest.mark.integration

TABLES = {
    f"whereupon_{name}"
    for name in (
        "meta",
        "log",
        "process",
        "subscription",
        "definition",
        "cursor",
        "exception",
        "action",
        "history",
        "workflow",
        "audit",
    )
}


async def on(url: str, work: Any) -> Any:
    """What `work(connection)` returns, in a committed transaction of its own."""
    engine = create_async_engine(url)
    try:
        async with engine.begin() as connection:
            return await connection.run_sync(work)
    finally:
        await engine.dispose()


async def tables(url: str) -> set[str]:
    """The tables that both databases have, without the partitions of the log."""

    def names(connection: Connection) -> set[str]:
        found = inspect(connection).get_table_names()
        return {
            name
            for name in found
            if not name.startswith(("sqlite_", "whereupon_log_", "whereupon_cluster", "whereupon_epoch"))
        }

    found: set[str] = await on(url, names)
    return found


async def execute(url: str, *statements: str) -> None:
    def run(connection: Connection) -> None:
        for statement in statements:
            connection.execute(text(statement))

    await on(url, run)


async def upgraded(url: str) -> None:
    engine = create_async_engine(url)
    try:
        await schema.upgrade(engine)
    finally:
        await engine.dispose()


async def started(url: str, **options: Any) -> None:
    """Start a bus and publish, so that it is known to work."""
    bus = EventBus(url, deliver=False, **options)
    async with bus, bus.engine.connect() as connection, AsyncSession(bind=connection) as session:
        await bus.publish(NoteWritten(text="x"), session=session)
        await session.commit()


@pytest.mark.parametrize(
    ("database_url", "driver"),
    [("sqlite", "sqlite+aiosqlite"), ("postgresql", "postgresql+asyncpg"), ("postgresql", "postgresql+psycopg")],
    indirect=["database_url"],
)
async def test_upgrading_twice_is_upgrading_once(database_url: str, driver: str) -> None:
    url = make_url(database_url).set(drivername=driver).render_as_string(hide_password=False)
    await upgraded(url)
    before = await tables(url)
    assert before == TABLES | {"whereupon_version"}
    ids = "SELECT value FROM whereupon_meta WHERE key = 'database_id'"
    database_id = await on(url, lambda connection: connection.scalar(text(ids)))
    await upgraded(url)
    assert await tables(url) == before
    assert await on(url, lambda connection: connection.scalar(text(ids))) == database_id
    await started(url)


async def test_each_database_has_an_id_of_its_own(tmp_path: Path) -> None:
    ids = set()
    for name in ("one", "two"):
        url = f"sqlite+aiosqlite:///{tmp_path}/{name}.db"
        await upgraded(url)
        query = "SELECT value FROM whereupon_meta WHERE key = 'database_id'"
        ids.add(await on(url, lambda connection: connection.scalar(text(query))))  # noqa: B023 — run at once
    assert len(ids) == 2


async def test_processes_that_upgrade_at_once_take_turns(database_url: str) -> None:
    program = (
        "import asyncio, sys\n"
        "from sqlalchemy.ext.asyncio import create_async_engine\n"
        "from whereupon import schema\n"
        "async def main():\n"
        "    engine = create_async_engine(sys.argv[1])\n"
        "    async with engine.connect():\n"
        "        print('ready', flush=True)\n"
        "        sys.stdin.readline()\n"
        "    await schema.upgrade(engine)\n"
        "    await engine.dispose()\n"
        "asyncio.run(main())\n"
    )
    processes = [
        subprocess.Popen(  # noqa: ASYNC220 — they wait for a line each
            [sys.executable, "-c", program, database_url],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(4)
    ]
    for process in processes:
        assert process.stdout is not None
        assert await asyncio.to_thread(process.stdout.readline) == "ready\n"
    for process in processes:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        _, errors = await asyncio.to_thread(process.communicate, timeout=60)
        assert process.returncode == 0, errors
    assert await tables(database_url) == TABLES | {"whereupon_version"}


async def test_on_sqlite_an_upgrade_waits_for_the_one_before_it(sqlite_url: str) -> None:
    first = create_engine(make_url(sqlite_url).set(drivername="sqlite"))
    with first.connect() as connection:
        schema.upgrade_on(connection)
        second = asyncio.create_task(upgraded(sqlite_url))
        await asyncio.sleep(0.3)
        assert not second.done()
        connection.commit()
    first.dispose()
    await second
    await started(sqlite_url)


async def test_buses_that_start_at_once_create_the_tables_once(database_url: str) -> None:
    buses = [EventBus(database_url, create_tables=True, deliver=False) for _ in range(5)]
    await asyncio.gather(*(bus.start() for bus in buses))
    await asyncio.gather(*(bus.close() for bus in buses))
    assert await tables(database_url) >= TABLES


# --- in an application's own history ----------------------------------------------------------------------------------


@pytest.fixture
def application(tmp_path: Path, database_url: str) -> Path:
    """The alembic.ini of an application with a history of its own, which whereupon's migrations are a branch of."""
    url = make_url(database_url)
    sync = url.set(drivername="sqlite" if url.get_backend_name() == "sqlite" else "postgresql+psycopg")
    folder = tmp_path / "application"
    (folder / "versions").mkdir(parents=True)
    (folder / "versions" / "notes.py").write_text(
        "from alembic import op\n"
        "import sqlalchemy as sa\n"
        "revision, down_revision, branch_labels, depends_on = 'notes', None, None, None\n"
        "def upgrade():\n"
        "    op.create_table('note', sa.Column('id', sa.Integer(), primary_key=True), "
        "sa.Column('text', sa.String(), nullable=False, unique=True))\n"
        "def downgrade():\n"
        "    op.drop_table('note')\n"
    )
    (folder / "env.py").write_text(
        "from alembic import context\n"
        "from sqlalchemy import create_engine\n"
        "from tests.notebook import Base\n"
        "from whereupon.schema import include_name\n"
        "engine = create_engine(context.config.get_main_option('sqlalchemy.url'))\n"
        "with engine.connect() as connection:\n"
        "    context.configure(connection=connection, target_metadata=Base.metadata, include_name=include_name)\n"
        "    with context.begin_transaction():\n"
        "        context.run_migrations()\n"
        "    connection.commit()\n"
        "engine.dispose()\n"
    )
    ini = folder / "alembic.ini"
    ini.write_text(
        "[alembic]\n"
        "script_location = %(here)s\n"
        "path_separator = space\n"
        "version_locations = %(here)s/versions whereupon:migrations/versions\n"
        f"sqlalchemy.url = {sync.render_as_string(hide_password=False)}\n"
    )
    return ini


async def alembic(ini: Path, *arguments: str) -> None:
    from alembic.config import CommandLine

    await asyncio.to_thread(CommandLine().main, ["--config", str(ini), *arguments])


async def test_an_application_has_the_tables_in_its_own_history(application: Path, database_url: str) -> None:
    await alembic(application, "upgrade", "heads")
    assert await tables(database_url) == TABLES | {"note", "alembic_version"}
    await started(database_url, create_tables=True)
    await upgraded(database_url)  # they are as this build needs them: nothing to do, and no second history begun
    assert await tables(database_url) == TABLES | {"note", "alembic_version"}
    await alembic(application, "downgrade", "whereupon@base")
    assert await tables(database_url) == {"note", "alembic_version"}
    await alembic(application, "upgrade", "heads")
    await started(database_url, create_tables=False)


async def test_autogenerate_leaves_the_tables_alone(application: Path) -> None:
    await alembic(application, "upgrade", "heads")
    await alembic(application, "check")  # ends with an error where it would change something


@pytest.mark.filterwarnings("ignore:Did not recognize type:sqlalchemy.exc.SAWarning")
async def test_autogenerate_would_drop_the_tables_if_it_were_not_told(application: Path) -> None:
    """The counterpart of the test above: it must be `include_name` that keeps them."""
    env = application.parent / "env.py"
    env.write_text(env.read_text().replace(", include_name=include_name", ""))
    await alembic(application, "upgrade", "heads")
    with pytest.raises(SystemExit):
        await alembic(application, "check")


async def test_the_migrations_can_be_written_out_as_sql(application: Path, capsys: pytest.CaptureFixture[str]) -> None:
    env = application.parent / "env.py"
    env.write_text(
        "from alembic import context\n"
        "context.configure(url=context.config.get_main_option('sqlalchemy.url'), literal_binds=True)\n"
        "with context.begin_transaction():\n"
        "    context.run_migrations()\n"
    )
    await alembic(application, "upgrade", "whereupon@head", "--sql")
    assert "CREATE TABLE whereupon_log" in capsys.readouterr().out


async def test_tables_of_an_applications_history_that_are_too_old_are_left_to_that_history(
    application: Path, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await alembic(application, "upgrade", "heads")
    monkeypatch.setattr(schema, "REVISION", schema.REVISION + 1)
    with pytest.raises(SchemaError, match="alembic upgrade heads"):
        await upgraded(database_url)


def test_version_location_is_a_folder_with_the_migrations() -> None:
    assert list(Path(schema.version_location()).glob("whereupon_0001_*.py"))


# --- tables that are not as this build needs them ---------------------------------------------------------------------


async def test_postgresql_without_tables_names_the_command(postgres_url: str) -> None:
    with pytest.raises(SchemaError, match="whereupon db upgrade"):
        await started(postgres_url)
    assert await tables(postgres_url) == set()


async def test_sqlite_has_its_tables_after_the_start(sqlite_url: str) -> None:
    await started(sqlite_url)
    assert await tables(sqlite_url) >= TABLES


async def test_sqlite_leaves_them_to_the_application_if_told(sqlite_url: str) -> None:
    with pytest.raises(SchemaError, match="whereupon db upgrade"):
        await started(sqlite_url, create_tables=False)


async def test_tables_of_a_newer_build_are_refused_by_all(database_url: str) -> None:
    await upgraded(database_url)
    await execute(
        database_url,
        "UPDATE whereupon_meta SET value = '99' WHERE key = 'revision'",
        "UPDATE whereupon_version SET version_num = 'whereupon_0099'",
    )
    for refused in (started(database_url), started(database_url, create_tables=True), upgraded(database_url)):
        with pytest.raises(SchemaError, match=r"revision 99.*Install the newer whereupon"):
            await refused


async def test_tables_of_an_older_build_are_refused_where_the_bus_may_not_upgrade_them(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    await upgraded(database_url)
    monkeypatch.setattr(schema, "REVISION", schema.REVISION + 1)
    with pytest.raises(SchemaError, match=r"whereupon db upgrade"):
        await started(database_url, create_tables=False)


async def test_downgrading_leaves_nothing_behind(database_url: str) -> None:
    await upgraded(database_url)

    def down(connection: Connection) -> None:
        from alembic import command
        from alembic.config import Config

        config = Config()
        config.set_main_option("script_location", "whereupon:migrations")
        config.attributes["connection"] = connection
        config.attributes["version_table"] = "whereupon_version"
        command.downgrade(config, "base")

    await on(database_url, down)
    assert await tables(database_url) == {"whereupon_version"}
    await upgraded(database_url)
    await started(database_url)


@pytest.mark.filterwarnings("ignore:Did not recognize type:sqlalchemy.exc.SAWarning")
async def test_the_description_of_the_tables_fits_what_the_migrations_make(database_url: str) -> None:
    await upgraded(database_url)

    def differences(connection: Connection) -> list[str]:
        found = []
        for table in schema.metadata.tables.values():
            made = {column["name"]: column for column in inspect(connection).get_columns(table.name)}
            for column in table.columns:
                if column.name not in made:
                    found.append(f"{table.name}.{column.name} is missing")
                elif bool(made[column.name]["nullable"]) != bool(column.nullable) and not column.primary_key:
                    found.append(f"{table.name}.{column.name} differs in NULL")
        return found

    assert await on(database_url, differences) == []


def test_the_sync_engine_of_an_application_can_read_the_description(tmp_path: Path) -> None:
    engine: Any = create_engine(f"sqlite:///{tmp_path}/x.db")
    with engine.begin() as connection:
        schema.upgrade_on(connection)
    with engine.connect() as connection:
        assert connection.execute(schema.log.select()).all() == []
    engine.dispose()
