"""The databases that other tests are given are real, empty and gone afterwards."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import asyncpg
import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests import servers
from whereupon import schema

pytestmark = pytest.mark.integration

STARTS_ONE_AND_DIES = """
import os, signal
from tests.servers import start_postgres
print(start_postgres().url, flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def dsn(url: str) -> str:
    """What asyncpg takes, for SQLAlchemy's `url`."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


async def ask(url: str, question: str) -> object:
    connection = await asyncpg.connect(dsn(url))
    try:
        return await connection.fetchval(question)
    finally:
        await connection.close()


async def databases(server: str) -> set[str]:
    names = await ask(f"{server}/postgres", "SELECT array_agg(datname::text) FROM pg_database")
    assert isinstance(names, list)
    return set(names)


async def test_a_server_of_our_own_answers_durably_and_is_gone_after_stop() -> None:
    server = servers.start_postgres()
    try:
        assert await ask(f"{server.url}/postgres", "SELECT 1") == 1
        assert await ask(f"{server.url}/postgres", "SHOW fsync") == "on"
        assert await ask(f"{server.url}/postgres", "SHOW synchronous_commit") == "on"
        folder = Path(str(await ask(f"{server.url}/postgres", "SHOW data_directory"))).parent
        with servers.empty_database(server.url) as url:
            assert await ask(url, "SELECT current_database()") == make_url(url).database
    finally:
        server.stop()
    with pytest.raises(ConnectionRefusedError):
        await ask(f"{server.url}/postgres", "SELECT 1")
    assert not folder.exists()
    server.stop()


async def test_a_server_ends_with_the_process_that_started_it_even_when_that_is_killed() -> None:
    ran = await asyncio.to_thread(
        subprocess.run,
        [sys.executable, "-c", STARTS_ONE_AND_DIES],
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
        cwd=Path(__file__).parent.parent,  # for `tests` to be importable
    )
    assert ran.returncode == -signal.SIGKILL, ran.stderr
    url = ran.stdout.strip()
    give_up = time.monotonic() + 30
    while True:
        try:
            await ask(f"{url}/postgres", "SELECT 1")
        except ConnectionRefusedError:
            break
        except (OSError, asyncpg.PostgresError, asyncpg.InterfaceError, asyncpg.InternalClientError):
            await asyncio.sleep(0.05)  # it is ending, and says so in as many ways as there are places to be cut off at
        assert time.monotonic() < give_up, f"{url} still answers"


@pytest.mark.parametrize(
    ("fails", "complaint"),
    [
        ("initdb", "initdb failed: no room on this disk"),
        ("postgres", "ended right after its start; it said: no room on this disk"),
    ],
)
def test_binaries_that_fail_are_reported_with_what_they_said(tmp_path: Path, fails: str, complaint: str) -> None:
    for name in ("initdb", "postgres"):
        script = "echo 'no room on this disk' >&2; exit 1" if name == fails else "exit 0"
        (tmp_path / name).write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / name).chmod(0o755)
    with pytest.raises(servers.PostgresUnavailable, match=complaint):
        servers.start_postgres(binaries=[tmp_path])


def test_a_named_server_that_does_not_answer_is_not_replaced_by_another(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(servers.POSTGRES_VARIABLE, "postgresql://someone:secret@127.0.0.1:1")
    with pytest.raises(servers.PostgresUnavailable, match=servers.POSTGRES_VARIABLE) as caught:
        servers.provide_postgres()
    assert "secret" not in str(caught.value)


def test_a_named_server_keeps_its_credentials(postgres_server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(servers.POSTGRES_VARIABLE, dsn(postgres_server))
    assert servers.provide_postgres().url == postgres_server


def test_test_processes_use_the_server_their_controller_provides(
    postgres_server: str, pytestconfig: pytest.Config
) -> None:
    told: dict[str, str] | None = getattr(pytestconfig, "workerinput", None)
    if told is None:
        pytest.skip("pytest runs in one process: start it with -n 2")
    assert told["whereupon_postgres_url"] == postgres_server


async def test_each_test_has_an_empty_database_of_its_own(postgres_url: str, postgres_server: str) -> None:
    tables = "SELECT count(*) FROM pg_class WHERE relnamespace = 'public'::regnamespace"
    assert await ask(postgres_url, tables) == 0
    with servers.empty_database(postgres_server) as other:
        assert make_url(other).database != make_url(postgres_url).database


async def test_a_database_is_dropped_although_somebody_is_connected(postgres_server: str) -> None:
    with servers.empty_database(postgres_server) as url:
        connection = await asyncpg.connect(dsn(url))
    connection.terminate()
    assert make_url(url).database not in await databases(postgres_server)


async def test_leftovers_go_after_an_hour_and_not_before(postgres_server: str) -> None:
    old = servers.database_name(made_at=time.time() - 3700)
    young = servers.database_name(made_at=time.time() - 3500)
    connection = await asyncpg.connect(dsn(f"{postgres_server}/postgres"))
    try:
        await connection.execute(f"CREATE DATABASE {old} TEMPLATE template0")
        await connection.execute(f"CREATE DATABASE {young} TEMPLATE template0")
        assert old in servers.drop_leftovers(postgres_server)
        left = await databases(postgres_server)
    finally:
        await connection.execute(f"DROP DATABASE IF EXISTS {young}")
        await connection.execute(f"DROP DATABASE IF EXISTS {old}")
        await connection.close()
    assert old not in left
    assert young in left


def test_the_sqlite_url_needs_nothing_else_to_connect(sqlite_url: str) -> None:
    file = make_url(sqlite_url).database
    assert file is not None
    assert Path(file).is_absolute()
    assert not Path(file).exists()


async def test_a_test_on_every_database_runs_on_each(database_url: str, request: pytest.FixtureRequest) -> None:
    assert make_url(database_url).get_backend_name() == request.node.callspec.id


@pytest.mark.parametrize("immediate", [False, True], ids=["fast", "immediate"])
async def test_a_server_of_our_own_can_be_halted_and_resumed_and_keeps_what_was_committed(immediate: bool) -> None:
    server = servers.start_postgres()
    try:
        await ask(f"{server.url}/postgres", "CREATE TABLE kept AS SELECT 7 AS number")
        for _ in range(2):
            server.halt(immediate=immediate)
            with pytest.raises(ConnectionRefusedError):
                await ask(f"{server.url}/postgres", "SELECT 1")
            server.resume()
            assert await ask(f"{server.url}/postgres", "SELECT number FROM kept") == 7
        server.halt(immediate=immediate)
    finally:
        server.stop()
    assert server.folder is not None
    assert not server.folder.exists()


@pytest.mark.tables_ready
async def test_a_database_that_has_its_tables_is_as_one_whose_tables_were_just_made(
    postgres_url: str, postgres_server: str
) -> None:
    with servers.empty_database(postgres_server) as fresh:
        engine = create_async_engine(fresh)
        try:
            await schema.upgrade(engine)
        finally:
            await engine.dispose()
        made, copied = await everything_in(fresh), await everything_in(postgres_url)
        theirs, ours = await database_id(fresh), await database_id(postgres_url)
    assert "whereupon_log" in made
    assert copied.replace(ours, theirs) == made
    assert ours != theirs


async def database_id(url: str) -> str:
    return str(await ask(url, "SELECT value FROM whereupon_meta WHERE key = 'database_id'"))


async def everything_in(url: str) -> str:
    """Definitions, rows, and what sequences have come to."""
    connection = await asyncpg.connect(dsn(url))
    try:
        tables = "pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace WHERE n.nspname = 'public'"
        found = [
            await connection.fetch(question)
            for question in (
                f"SELECT c.relname, c.relkind, c.relpersistence, c.reloptions, c.reltuples, "
                f"pg_get_expr(c.relpartbound, c.oid) FROM {tables} ORDER BY 1",
                "SELECT a.attrelid::regclass::text, a.attname, format_type(a.atttypid, a.atttypmod), a.attnotnull, "
                "pg_get_expr(d.adbin, d.adrelid) FROM pg_attribute a LEFT JOIN pg_attrdef d "
                "ON d.adrelid = a.attrelid AND d.adnum = a.attnum WHERE a.attnum > 0 AND a.attrelid IN "
                f"(SELECT c.oid FROM {tables}) ORDER BY a.attrelid::regclass::text, a.attnum",
                f"SELECT pg_get_indexdef(c.oid) FROM {tables} AND c.relkind IN ('i', 'I') ORDER BY 1",
                "SELECT conname, pg_get_constraintdef(oid) FROM pg_constraint "
                "WHERE connamespace = 'public'::regnamespace ORDER BY 1, 2",
                "SELECT pg_get_triggerdef(oid), tgenabled FROM pg_trigger WHERE NOT tgisinternal ORDER BY 1",
                "SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = 'public'::regnamespace ORDER BY 1",
                "SELECT * FROM pg_sequences WHERE schemaname = 'public' ORDER BY sequencename",
            )
        ]
        for [table] in await connection.fetch(f"SELECT c.relname FROM {tables} AND c.relkind IN ('r', 'p') ORDER BY 1"):
            found.append(await connection.fetch(f'SELECT t::text FROM "{table}" t ORDER BY 1'))
        told = "\n".join(str(list(map(tuple, rows))) for rows in found)
        return re.sub(r"\d{4}-\d\d-\d\d [\d:.+]+", "then", told)
    finally:
        await connection.close()
