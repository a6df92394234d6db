"""What is asked often is answered by an index, and looks at few rows, however long the log is.

The statements are those that the store really executes; they are explained with their own values, on PostgreSQL both
with a plan for these values and with the generic one that a prepared statement may get. What counts is how many rows
and blocks were looked at: so the tests hold for a log in one table as for one in partitions.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.sql import Literal
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from tests.servers import empty_database
from tests.statements import Statement, statements
from whereupon._postgres import PostgresStore
from whereupon._sqlite import SQLiteStore, configure
from whereupon.contract import append, due, keep, lanes_of, publish, read_all, register, take_over, worker
from whereupon.store import DEAD, RETRYING, Cursor, Entry, Failure, Move, Remembered, Store

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EVENTS = 50_000
FEW = 300
"""Rows of a table, or blocks of all, that one statement may look at."""
NAMES = ["one", "two"]


async def fill(store: Store) -> None:
    """A long log, long settled; many dead letters of one subscription; lanes of many others."""
    sqlite = isinstance(store, SQLiteStore)
    n = "value" if sqlite else "n"
    series = (
        "WITH RECURSIVE s (value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM s "
        f"WHERE value < {EVENTS}) SELECT {{}} FROM s"
        if sqlite
        else f"SELECT {{}} FROM generate_series(1, {EVENTS}) AS n"
    )
    new_id = "lower(hex(randomblob(16)))" if sqlite else "gen_random_uuid()"
    now = "'2026-01-01 00:00:00.000000'" if sqlite else "now()"
    payload = "x'7b7d'" if sqlite else "'{}'::bytea"
    async with store.writing() as connection:
        # as if many transactions had written it, each some of it
        tx_id, early = (
            ("", "")
            if sqlite
            else (", tx_id", f", (3 + n * (pg_current_xact_id()::text::bigint - 3) / {EVENTS + 1})::text::xid8")
        )
        await connection.execute(
            text(
                f"INSERT INTO whereupon_log (event_id, type, version, payload, headers, recorded_at{tx_id}) "
                + series.format(
                    f"{new_id}, CASE WHEN {n} % 10 = 0 THEN 'A' ELSE 'B' END, 1, {payload}, '{{}}', {now}{early}"
                )
            )
        )
        columns = (
            "subscription, lane, position, event_id, type, version, payload, headers, key, state, attempts, next_at"
        )
        await connection.execute(
            text(
                f"INSERT INTO whereupon_exception ({columns}, recorded_at, updated_at) "
                + series.format(
                    f"CASE WHEN {n} % 2 = 0 THEN 'one' ELSE 'other-1' END, 0, {n}, {new_id}, 'A', 1, {payload}, "
                    f"'{{}}', 'key-' || ({n} % 1000), 'dead', 8, NULL, {now}, {now}"
                )
                + (f" WHERE {n} <= 20000")
            )
        )
        await connection.execute(
            text(
                "INSERT INTO whereupon_history "
                "(subscription, worker, first_position, last_position, entries, recorded_at) "
                + series.format(f"'one', {new_id}, {n}, {n}, '[]', {now}")
                + f" WHERE {n} <= 20000"
            )
        )
    await register(store, *NAMES, *(f"other-{number}" for number in range(200)))


async def analyze(store: Store) -> None:
    async with store.reading() as connection:  # in no transaction: what it finds would be undone with that
        await connection.execute(text("ANALYZE"))


@dataclass
class Looked:
    """What a plan looked at."""

    rows: dict[str, int] = field(default_factory=dict)
    scanned: dict[str, int] = field(default_factory=dict)
    """By sequential scans alone."""
    blocks: int = 0


def add_up(plan: dict[str, Any], looked: Looked) -> Looked:
    if "Relation Name" in plan and "Scan" in plan["Node Type"]:
        table = whole_table(plan["Relation Name"])
        touched = plan["Actual Loops"] * (
            plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0) + plan.get("Rows Removed by Index Recheck", 0)
        )
        looked.rows[table] = looked.rows.get(table, 0) + int(touched)
        if plan["Node Type"] == "Seq Scan":
            looked.scanned[table] = looked.scanned.get(table, 0) + int(touched)
    for part in plan.get("Plans", ()):
        add_up(part, looked)
    return looked


def whole_table(relation: str) -> str:
    """The table that a partition belongs to."""
    return "whereupon_log" if relation.startswith("whereupon_log") else relation


def explain(url: str, statement: Statement, generic: bool) -> Iterator[tuple[str, Looked]]:
    """What it looks at, with a plan of each kind. It is executed, and rolled back."""
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection:
        arguments = ", ".join(Literal(value).as_string(connection) for value in statement.parameters)
        connection.execute(f"PREPARE hot AS {statement.sql}".encode())
        call = f"EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE hot{f' ({arguments})' if arguments else ''}"
        # the first, whose plan is not judged, fills the caches of the session
        for mode in ("auto", "force_custom_plan", "force_generic_plan")[: 3 if generic else 2]:
            with connection.transaction(force_rollback=True):
                connection.execute(f"SET LOCAL plan_cache_mode = {mode}".encode())
                row = connection.execute(call.encode()).fetchone()
            if mode == "auto":
                continue
            assert row is not None
            plan = row[0][0]["Plan"]
            looked = add_up(plan, Looked())
            looked.blocks = plan["Shared Hit Blocks"] + plan["Shared Read Blocks"]
            yield f"{mode}\n{statement.sql}\n{json.dumps(plan, indent=1)}", looked


class Explained:
    """A store on a database with a long log, and how to have its statements explained."""

    def __init__(self, store: Store, url: str, analyzed: bool) -> None:
        self.store = store
        self.url = url
        self.analyzed = analyzed

    @contextmanager
    def cheap(
        self, *tables: str, rows: int = FEW, blocks: int = FEW, generic: bool = True
    ) -> Iterator[list[Statement]]:
        """What is executed in this block looks at few rows of the log, and of these tables, and at few blocks.

        Without `generic` that is asked of plans for the very values: the server takes them where they are cheaper.
        """
        with statements() as seen:
            yield seen
        # where a large window begins is asked once for each, and only a planner that knows log and values finds it
        hot = [one for one in seen if self.analyzed or not one.sql.startswith("SELECT least(")]
        assert hot
        for statement in hot:
            first = statement.sql.startswith("SELECT least(")
            for told, looked in explain(self.url, statement, generic and not first):
                for table in ("whereupon_log", *tables):
                    assert looked.scanned.get(table, 0) == 0, f"reads all of {table}\n{told}"
                    assert looked.rows.get(table, 0) <= rows, f"looks at {looked.rows[table]} rows of {table}\n{told}"
                assert looked.blocks <= blocks, f"looks at {looked.blocks} blocks\n{told}"


@pytest.fixture(scope="module", params=[True, False], ids=["analyzed", "not analyzed yet"])
def long_database(postgres_server: str, request: pytest.FixtureRequest) -> Iterator[tuple[str, bool]]:
    """A database that takes a while to fill; each test leaves a few rows more in it."""

    async def prepare(url: str) -> None:
        store = PostgresStore(create_async_engine(url))
        await store.prepare(create=True)
        await fill(store)
        # the planner's knowledge of exceptions comes soon by itself; that of the log always lags behind its end
        for table in (EXCEPTION, "whereupon_cursor", "whereupon_history", "whereupon_subscription"):
            async with store.reading() as connection:
                await connection.execute(text(f"ANALYZE {table}"))
        if request.param:
            await analyze(store)
        await store.engine.dispose()

    with empty_database(postgres_server) as url:
        asyncio.run(prepare(url))
        yield url, request.param


@pytest.fixture
async def long(long_database: tuple[str, bool]) -> AsyncIterator[Explained]:
    url, analyzed = long_database
    engine = create_async_engine(url)
    yield Explained(PostgresStore(engine), url, analyzed)
    await engine.dispose()


EXCEPTION = "whereupon_exception"

analyzed_only = pytest.mark.parametrize("long_database", [True], indirect=True, ids=["analyzed"])


async def now(store: Store, name: str = "one") -> Cursor:
    """A cursor that stands at the end of the log."""
    cursor = await take_over(store, name)
    _, place = await read_all(store, cursor.place, 5000)
    await store.settle([Move(cursor, place, [], [])], uuid4(), [])
    return await take_over(store, name)


@pytest.mark.parametrize("types", [None, ["A"], ["None"]])
async def test_a_read_looks_at_what_is_new(long: Explained, types: list[str] | None) -> None:
    if types is not None and not long.analyzed:
        pytest.skip("of some types, in a log that was never analyzed, the planner reads the partition")
    cursor = await now(long.store)
    with long.cheap():
        await long.store.read(cursor.place, types, 500)
    await publish(long.store, *"AB" * 20)
    with long.cheap():
        page = await long.store.read(cursor.place, types, 500)
    assert len(page.rows) == (40 if types is None else 20 if types == ["A"] else 0)


async def test_a_read_past_an_old_transaction_looks_at_what_is_new(long: Explained) -> None:
    """While it is open it is in every snapshot: nothing is read again and again from its id on."""
    async with long.store.engine.connect() as old:
        late = await append(long.store, old, "A")
        await publish(long.store, *"B" * 2000)
        cursor = await now(long.store)
        await publish(long.store, "A")
        with long.cheap():
            page = await long.store.read(cursor.place, None, 500)
        assert len(page.rows) == 1
        with long.cheap():
            await long.store.pulse(uuid4(), NAMES)
        await old.commit()
    with long.cheap():
        page = await long.store.read(page.after, None, 500)
    assert [row.event_id for row in page.rows] == late


@analyzed_only
@pytest.mark.parametrize("types", [None, ["A", "B"]])
async def test_a_page_of_a_large_window_looks_at_a_page(long: Explained, types: list[str] | None) -> None:
    cursor = await now(long.store)
    await publish(long.store, *"AB" * 1500)
    with long.cheap(rows=3000 + FEW):  # where it begins costs a look at all of it, once
        page = await long.store.read(cursor.place, types, 100)
    place = page.after
    for _ in range(3):
        with long.cheap():
            page = await long.store.read(place, types, 100)
        assert len(page.rows) == 100
        place = page.after


@analyzed_only
async def test_a_lane_that_catches_up_looks_at_what_it_missed(long: Explained) -> None:
    behind, ahead = await now(long.store, "one"), await now(long.store, "two")
    await publish(long.store, *"A" * 50)
    page = await long.store.read(ahead.place, None, 500)
    await publish(long.store, *"A" * 2000)
    with long.cheap(rows=2000 + FEW):  # what was committed since may be looked at, and nothing older
        found = await long.store.read(behind.place, None, 500, toward=page.after)
    assert len(found.rows) == 50


async def test_a_pulse_looks_at_nearly_nothing(long: Explained) -> None:
    owner = await worker(long.store)
    await long.store.pulse(owner, NAMES)
    with long.cheap(EXCEPTION):
        await long.store.pulse(owner, NAMES)
    await publish(long.store, *"A" * 2000)
    with long.cheap(EXCEPTION):
        assert (await long.store.pulse(owner, NAMES)).grown


async def test_settling_finds_its_cursors_by_their_key(long: Explained) -> None:
    cursors = [await now(long.store, name) for name in NAMES]
    moves = [Move(cursor, cursor.place, [50_001], []) for cursor in cursors]
    kept = [Remembered("one", 0, [Entry(1, 1, 1, 1, "succeeded")])]
    with long.cheap("whereupon_history"):
        assert len(await long.store.settle(moves, uuid4(), kept)) == 2
    with long.cheap("whereupon_history"):
        async with long.store.writing() as connection:
            await long.store.fence(connection, cursors[0])
            await long.store.move(connection, moves[0], uuid4(), kept)


async def test_settling_looks_at_one_version_of_a_row_though_a_snapshot_keeps_them_all(long: Explained) -> None:
    """Found by its key, a row costs a look at each of its versions: a report that runs for an hour would slow all."""
    cursors = [await now(long.store, name) for name in NAMES]
    moves = [Move(cursor, cursor.place, [], []) for cursor in cursors]
    async with long.store.engine.connect() as plain:
        old = await plain.execution_options(isolation_level="REPEATABLE READ")
        await old.execute(text("SELECT count(*) FROM whereupon_cursor"))
        for _ in range(FEW * 2):
            assert len(await long.store.settle(moves, uuid4(), [])) == 2
        with long.cheap("whereupon_cursor", rows=2, blocks=25) as seen:
            await long.store.settle(moves, uuid4(), [])
        assert len(seen) == 1
        with long.cheap("whereupon_cursor", rows=2, blocks=25):
            async with long.store.own.begin() as connection:
                await long.store.move(connection, moves[0], uuid4())


async def test_a_row_that_somebody_else_has_changed_is_found_by_its_key(long: Explained) -> None:
    cursors = [await now(long.store, name) for name in NAMES]
    moves = [Move(cursor, cursor.place, [], []) for cursor in cursors]
    await long.store.calm(cursors[0])
    with statements() as seen:
        assert len(await long.store.settle(moves, uuid4(), [])) == 2
        assert len(await long.store.settle(moves, uuid4(), [])) == 2
    assert len(seen) == 3
    await long.store.calm(cursors[0])
    async with long.store.writing() as connection:
        await long.store.move(connection, moves[0], uuid4())
        await connection.rollback()
    assert len(await long.store.settle(moves, uuid4(), [])) == 2


@analyzed_only
async def test_claiming_looks_at_exceptions_of_that_subscription_only(long: Explained) -> None:
    cursor = await now(long.store, "two")
    async with long.store.writing() as connection:
        await connection.execute(text("DELETE FROM whereupon_process"))
    owner = await worker(long.store)
    lanes = await lanes_of(long.store, "two")
    assert lanes[0].token == cursor.token
    with long.cheap(EXCEPTION, generic=False):
        assert len(await long.store.claim(lanes, owner)) == 1


@analyzed_only
async def test_what_is_due_is_found_among_many_dead_letters(long: Explained) -> None:
    cursor = await now(long.store)
    await publish(long.store, *"AAA")
    rows = (await long.store.read(cursor.place, None, 10)).rows
    await keep(long.store, cursor, *(Failure(row, RETRYING, 1, -1.0) for row in rows))
    with long.cheap(EXCEPTION, generic=False):
        assert len(await due(long.store, cursor)) == 3
    await keep(long.store, cursor, *(Failure(row, RETRYING, 1, 60.0) for row in rows))
    with long.cheap(EXCEPTION, generic=False):
        assert await long.store.next_due([cursor]) is not None
    with long.cheap(EXCEPTION, generic=False):
        async with long.store.writing() as connection:
            assert await long.store.follow(connection, cursor, "key-2") == (20, False, None)
            assert await long.store.kept(connection, cursor, [rows[0].position]) == {rows[0].position}
            assert await long.store.forget(connection, cursor, [rows[0].position]) == 1
            await long.store.keep_failures(connection, cursor, [Failure(rows[1], DEAD, 1, None)])


@analyzed_only
async def test_what_became_of_an_event_is_found_by_its_id(long: Explained) -> None:
    [event_id] = await publish(long.store, "A")
    with long.cheap(EXCEPTION, blocks=1500):  # each lane is asked, and there are many
        [state] = await long.store.deliveries([event_id], {"A": ["two"]}, calls_too=False)
    assert state.state == "waiting"


async def test_publishing_looks_at_nothing_but_its_own_pages(long: Explained) -> None:
    with long.cheap(blocks=60):
        async with long.store.engine.begin() as connection:
            await append(long.store, connection, "A")


async def test_on_sqlite_nothing_reads_all_of_the_log(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    configure(engine)
    store = SQLiteStore(engine)
    await store.prepare(create=True)
    await fill(store)
    owner = await worker(store)
    with statements() as seen:
        lanes = await lanes_of(store, "two")
        [cursor] = await store.claim(lanes, owner)
        [event_id, *_] = await publish(store, *"AAA")
        page = await store.read(cursor.place, None, 10)
        await store.read(cursor.place, ["A"], 10)
        page = await store.read(cursor.place, None, 10, toward=cursor.place + 10)
        await store.settle([Move(cursor, page.after, [], [])], owner, [])
        await keep(store, cursor, *(Failure(row, RETRYING, 1, -1.0, key="k") for row in page.rows))
        assert len(await due(store, cursor)) == 3
        await store.pulse(owner, NAMES)
        await store.next_due([cursor])
        await store.deliveries([event_id], {"A": ["two"]}, calls_too=False)
        async with store.writing() as connection:
            await store.move(connection, Move(cursor, page.after, [], []), owner)
            await store.follow(connection, cursor, "k")
            await store.kept(connection, cursor, [1])
            await store.forget(connection, cursor, [1])
    explained = 0
    async with engine.connect() as connection:
        for sql, parameters in seen:
            if sql.startswith(("PRAGMA", "SELECT 1")):
                continue
            explained += 1
            plan = await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {sql}", parameters)
            for *_, detail in plan:
                for table in ("whereupon_log", "whereupon_cursor", EXCEPTION, " l", " x"):
                    assert not f"{detail} ".startswith(f"SCAN {table.strip()} "), f"{detail}\n{sql}"
    assert explained > 15
    await store.close()
    await engine.dispose()
