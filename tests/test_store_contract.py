"""Every store passes the one suite, on every driver."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from datetime import UTC, datetime, timedelta, tzinfo

import pytest
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import empty_database, start_postgres
from whereupon import schema
from whereupon._postgres import PostgresStore
from whereupon._sqlite import SQLiteStore, configure
from whereupon.store import RETRYING, Failure, Store
from whereupon.testing import ConcurrentStoreContract, StoreContract

# what the suite is written with; below its import, which has pytest rewrite the assertions
from whereupon.contract import append, claim, due, failing, keep, lanes_of, publish, read_all, register  # isort: skip

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class TestSQLiteStore(StoreContract):
    @pytest.fixture
    async def store(self, sqlite_url: str) -> AsyncIterator[Store]:
        engine = create_async_engine(sqlite_url)
        configure(engine)
        store = SQLiteStore(engine)
        await store.prepare(create=True)
        yield store
        await store.close()
        await engine.dispose()


@pytest.fixture(scope="module")
def shared_database(postgres_server: str) -> Iterator[str]:
    """A database for all tests of this module: making one for each would take longer than they do."""
    with empty_database(postgres_server) as url:
        yield url


@pytest.fixture
async def emptied(shared_database: str) -> str:
    """That database with nothing in whereupon's tables."""
    engine = create_async_engine(shared_database)
    await schema.upgrade(engine)
    tables = [table.name for table in schema.metadata.sorted_tables if table.name not in _KEPT]
    async with engine.begin() as connection:
        await connection.execute(text(f"TRUNCATE {', '.join(tables)}"))
    await engine.dispose()
    return shared_database


_KEPT = {"whereupon_meta", "whereupon_audit"}  # the id of the database; what nobody may take away


class TestPostgresStore(ConcurrentStoreContract):
    driver = "asyncpg"

    @pytest.fixture
    async def store(self, emptied: str) -> AsyncIterator[Store]:
        engine = create_async_engine(make_url(emptied).set(drivername=f"postgresql+{self.driver}"))
        store = PostgresStore(engine)
        await store.prepare(create=True)
        yield store
        await store.close()
        await engine.dispose()


class TestPostgresStoreOnPsycopg(TestPostgresStore):
    driver = "psycopg"


@pytest.fixture(scope="module")
def two_phase_server() -> Iterator[str]:
    server = start_postgres(settings={"max_prepared_transactions": "10"})
    yield server.url
    server.stop()


@pytest.fixture
async def two_phase_store(two_phase_server: str) -> AsyncIterator[Store]:
    with empty_database(two_phase_server) as url:
        engine = create_async_engine(url)
        store = PostgresStore(engine)
        await store.prepare(create=True)
        yield store
        await store.close()
        await engine.dispose()


async def finish(store: Store, statement: str) -> None:
    """COMMIT PREPARED and ROLLBACK PREPARED run outside transactions."""
    async with store.reading() as connection:
        await connection.execute(text(statement))


async def test_a_transaction_in_two_phases_is_read_once_it_is_committed_and_stalls_nobody_before(
    two_phase_store: Store,
) -> None:
    """Between its phases it belongs to no connection, and may stay so for days."""
    store = two_phase_store
    await register(store)
    place = (await claim(store)).place
    async with store.engine.connect() as connection:
        prepared = await append(store, connection, "A", "B")
        await connection.execute(text("PREPARE TRANSACTION 'kept'"))
    async with store.engine.connect() as connection:
        await append(store, connection, "A")
        await connection.execute(text("PREPARE TRANSACTION 'undone'"))
    meanwhile = await publish(store, *"AAA")
    rows, place = await read_all(store, place, 2)
    assert [row.event_id for row in rows] == meanwhile
    await finish(store, "ROLLBACK PREPARED 'undone'")
    page = await store.read(place, None, 10)
    assert page.rows == []
    await finish(store, "COMMIT PREPARED 'kept'")
    rows, place = await read_all(store, page.after, 1)
    assert [row.event_id for row in rows] == prepared
    assert (await store.read(place, None, 10)).rows == []


@pytest.mark.parametrize("at_work", [False, True], ids=["all along", "set at work"])
async def test_a_worker_whose_clock_is_an_hour_off_judges_by_the_databases(
    emptied: str, monkeypatch: pytest.MonkeyPatch, at_work: bool
) -> None:
    class Behind(datetime):
        @classmethod
        def now(cls, tz: tzinfo | None = None) -> Behind:
            return cls.fromtimestamp(time.time() - 3600, tz)

    engine = create_async_engine(emptied)
    store = PostgresStore(engine)
    if at_work:
        await store.prepare(create=False)
    for module in ("store", "_postgres"):
        monkeypatch.setattr(f"whereupon.{module}.datetime", Behind)
    if not at_work:
        await store.prepare(create=False)
    assert abs(store.later(3600) - Behind.now(UTC) - timedelta(hours=2)) < timedelta(minutes=1)
    cursor, [now, later] = await failing(store, 2)
    assert [lane.alive for lane in await lanes_of(store)] == [True]
    await keep(store, cursor, Failure(now, RETRYING, 1, -1.0), Failure(later, RETRYING, 1, 60.0))
    assert [one.row.position for one in await due(store, cursor)] == [now.position]
    wait = await store.next_due([cursor])
    assert wait is not None
    assert 30 < wait <= 60
    await engine.dispose()


def test_the_testing_module_needs_no_pytest_until_the_suite_is_asked_for() -> None:
    asked = (
        "import sys; sys.modules['pytest'] = None; import whereupon.testing as testing; testing.own_transactions\n"
        "try: testing.StoreContract\nexcept ImportError as error: print(error)\n"
        "try: testing.StoreContrakt\nexcept AttributeError as error: print(error)"
    )
    ran = subprocess.run([sys.executable, "-c", asked], capture_output=True, text=True, timeout=60, check=True)
    first, second = ran.stdout.splitlines()
    assert "pytest" in first
    assert second == "module 'whereupon.testing' has no attribute 'StoreContrakt'"
