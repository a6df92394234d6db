"""How many statements an operation takes: what is promised of it is counted here."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.log_records import Records
from tests.statements import Statement, statements
from whereupon import Delivery, DomainEvent, EventBus, Retry
from whereupon.contract import claim, publish, register
from whereupon.store import Entry, Move, Remembered

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class LetterPosted(DomainEvent):
    number: int


class ParcelStamped(DomainEvent):
    number: int


@asynccontextmanager
async def letters(url: str, **options: Any) -> AsyncIterator[EventBus]:
    """A bus that is not entered, and a table for what its handlers write."""
    bus = EventBus(url, create_tables=True, logger=Records(), **options)
    await bus.create_tables()
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (number INTEGER NOT NULL)"))
    try:
        yield bus
    finally:
        await bus.close()
        await bus.engine.dispose()


async def post(bus: EventBus, number: int) -> list[LetterPosted]:
    events = [LetterPosted(number=n) for n in range(number)]
    async with AsyncSession(bus.engine) as session, session.begin():
        await session.execute(text("SELECT 1"))
        for event in events:
            await bus.publish(event, session=session)
    return events


async def write(session: AsyncSession, event: LetterPosted) -> None:
    await session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": event.number})


@pytest.mark.parametrize("handlers", [1, 5, 20])
@pytest.mark.parametrize("events", [1, 5, 20])
async def test_publishing_adds_one_statement_whatever_the_number_of_handlers_and_events(
    database_url: str, handlers: int, events: int
) -> None:
    async with letters(database_url, deliver=False) as bus:
        for number in range(handlers):

            async def durable(event: LetterPosted) -> None: ...

            async def transactional(event: LetterPosted, session: AsyncSession) -> None: ...

            bus.subscribe(LetterPosted, durable, name=f"durable-{number}")
            bus.subscribe(LetterPosted, transactional, name=f"transactional-{number}", ordered_by="number")
        async with bus:
            await post(bus, 1)
            with statements() as seen:
                await post(bus, events)
        first, *added = [statement.sql for statement in seen]
        assert first == "SELECT 1"
        assert len(added) == 1
        assert added[0].startswith("INSERT INTO whereupon_log")


async def test_the_first_publish_registers_once_and_no_later_one_asks_again(database_url: str) -> None:
    async with letters(database_url, deliver=False) as bus:

        async def handler(event: LetterPosted) -> None: ...

        bus.subscribe(LetterPosted, handler, name="letters")
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(LetterPosted(number=0), session=session)
        with statements() as seen:
            for _ in range(3):
                await post(bus, 1)
        assert len(seen) == 3 * 2


@pytest.mark.parametrize("number", [1, 100, 500])
async def test_settling_a_page_takes_the_same_statements_whatever_is_in_it(database_url: str, number: int) -> None:
    async with letters(database_url) as bus:
        store = bus._store
        await store.prepare(create=False)
        await register(store, "one", "two")
        await publish(store, *"A" * number)
        cursors = [await claim(store, name=name) for name in ("one", "two")]
        page = await store.read(cursors[0].place, None, 1000)
        calls = [Entry(row.position, 0, 1, 1, "succeeded") for row in page.rows]
        kept = [Remembered(name, 0, calls) for name in ("one", "two")]
        with statements() as seen:
            held = await store.settle([Move(cursor, page.after, [], []) for cursor in cursors], uuid4(), kept)
        assert len(held) == 2
        assert len(seen) == (1 if bus.engine.dialect.name == "postgresql" else 2)


async def test_a_worker_settles_many_events_of_many_handlers_with_few_statements(database_url: str) -> None:
    heard: list[int] = []
    async with letters(database_url, in_flight=2000, poll_interval=30) as bus:
        for number in range(4):

            async def handler(event: LetterPosted) -> None:
                heard.append(event.number)

            bus.subscribe(LetterPosted, handler, name=f"letters-{number}", concurrency=500)
        async with bus:
            await bus.drain(10)
            with statements() as seen:
                await post(bus, 400)
                await bus.drain(20)
        assert len(heard) == 1600
        # the lease is renewed and lanes are looked at meanwhile, on a slow machine more often
        assert len([one for one in seen if one.writes]) <= 60


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_transactional_delivery_adds_one_statement_on_postgresql_and_three_on_sqlite(
    database_url: str, ordered: bool
) -> None:
    """On SQLite taking the write lock, moving the cursor and keeping the history are statements of their own."""
    added = 3 if database_url.startswith("sqlite") else 1
    async with letters(database_url) as bus:

        @bus.subscribe(LetterPosted, name="letters", concurrency=1, ordered_by="number" if ordered else None)
        async def handler(event: LetterPosted, session: AsyncSession) -> None:
            await write(session, event)

        async with bus:
            for number in (1, 2, 10):
                with in_transactions(bus) as seen:
                    events = await post(bus, number)
                    await bus.drain(20)
                assert len(events) == number
                of_handlers = [
                    one.sql for one in seen if not one.sql.startswith(("SELECT 1", "INSERT INTO whereupon_log"))
                ]
                assert len([sql for sql in of_handlers if sql.startswith("INSERT INTO effect")]) == number
                assert len(of_handlers) == number * (1 + added), of_handlers


async def test_a_worker_begins_and_ends_with_the_same_statements_however_many_lanes_it_serves(
    database_url: str,
) -> None:
    async def of_a_life(subscriptions: int, lanes: int) -> int:
        async with parcels(database_url, subscriptions, lanes) as bus:
            with statements() as seen:
                async with bus:
                    await bus.drain(10)
                    await post(bus, 1)  # which none of them hears: all cursors pass it
                    await bus.drain(10)
            async with bus.engine.connect() as connection:
                held = "SELECT count(*) FROM whereupon_cursor WHERE owner IS NOT NULL"
                assert await connection.scalar(text(held)) == 0
        # the log's upkeep begins at some time of its own, and has nothing to do with lanes
        tables = ("whereupon_cursor", "whereupon_subscription", "whereupon_exception", "whereupon_process")
        return len([one for one in seen if any(table in one.sql for table in tables)])

    few = await of_a_life(1, 1)
    assert await of_a_life(20, 8) <= few + 10  # what looks now and then does so more often on a slow machine


async def test_publishing_asks_for_no_retries_of_handlers_that_succeeded_inside_the_transaction(
    database_url: str,
) -> None:
    calls: list[int] = []
    again = asyncio.Event()
    async with letters(database_url, poll_interval=30) as bus:

        @bus.subscribe(LetterPosted, name="letters", delivery=Delivery.IN_TRANSACTION, retry=Retry(first=0))
        async def handler(event: LetterPosted, session: AsyncSession) -> None:
            calls.append(event.number)
            if len(calls) == 2:
                raise OSError("the pen is empty")
            if len(calls) == 3:
                again.set()

        async with bus:
            await bus.drain(10)
            with statements() as seen:
                await post(bus, 1)
                await bus.drain(10)
            assert calls == [0]
            looked = [
                one.sql for one in seen if "SET token=whereupon_cursor.token" in one.sql or "FOR UPDATE" in one.sql
            ]
            assert looked == []
            await post(bus, 1)
            async with asyncio.timeout(20):  # which is less than until the next look of itself
                await again.wait()


@asynccontextmanager
async def parcels(url: str, subscriptions: int, lanes: int) -> AsyncIterator[EventBus]:
    bus = EventBus(url, create_tables=True, logger=Records(), poll_interval=30)
    await bus.create_tables()
    for number in range(subscriptions):

        async def handler(event: ParcelStamped) -> None: ...

        bus.subscribe(ParcelStamped, handler, name=f"{number} of {subscriptions}", lanes=lanes)
    try:
        yield bus
    finally:
        await bus.close()
        await bus.engine.dispose()


@contextmanager
def in_transactions(bus: EventBus) -> Iterator[list[Statement]]:
    """What goes through the application's pool; the worker's own statements have another."""
    with statements(bus.engine.sync_engine) as seen:
        yield seen


async def test_deliveries_that_share_a_transaction_share_its_statements(database_url: str) -> None:
    async with letters(database_url) as bus:
        go_on = asyncio.Event()

        @bus.subscribe(LetterPosted, name="letters", batch=50, concurrency=50, lanes=1)
        async def handler(event: LetterPosted, session: AsyncSession) -> None:
            await go_on.wait()
            await write(session, event)

        async with bus:
            await bus.drain(10)
            with in_transactions(bus) as seen:
                await post(bus, 50)
                go_on.set()
                await bus.drain(20)
        bookkeeping = [one for one in seen if "whereupon_cursor" in one.sql or "whereupon_history" in one.sql]
        assert len(bookkeeping) <= 6, "one transaction for all, or few"


async def test_who_waits_for_what_another_process_delivers_asks_ever_more_seldom(database_url: str) -> None:
    async with letters(database_url, deliver=False) as bus:

        async def read(event: LetterPosted) -> None: ...

        bus.subscribe(LetterPosted, read)
        async with bus:
            async with AsyncSession(bus.engine) as session, session.begin():
                receipt = await bus.publish(LetterPosted(number=1), session=session)
            with statements(bus.engine.sync_engine) as seen, pytest.raises(TimeoutError):
                await receipt.settled(2)
    asked = [s for s in seen if s.sql.startswith("SELECT l.event_id")]
    assert 1 <= len(asked) <= 20
