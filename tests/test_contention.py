"""Handlers, leases and settling share one database and one pool; none starves another."""

import asyncio
import contextlib
import gc
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.event import listens_for
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util import await_only

from tests.log_records import Records
from whereupon import Delivery, DomainEvent, EventBus, EventContext, Retry, RetryLater

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class SeatReserved(DomainEvent):
    number: int


async def test_a_transactional_handler_that_reads_and_then_waits_is_not_run_again_for_ever(database_url: str) -> None:
    """On SQLite its snapshot is stale by then: the worker itself has renewed a lease, another has committed."""
    bus = EventBus(database_url, create_tables=True, lease=1)
    sessions = async_sessionmaker(bus.engine)
    calls: Counter[int] = Counter()

    @bus.subscribe(SeatReserved)
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        calls[event.number] += 1
        await session.execute(text("SELECT count(*) FROM seats"))
        await asyncio.sleep(0.6)
        await session.execute(text("INSERT INTO seats VALUES (:number)"), {"number": event.number})

    async with sessions.begin() as session:
        await session.execute(text("CREATE TABLE seats (number INTEGER)"))
    async with bus:
        async with sessions.begin() as session:
            receipt = await bus.publish(*[SeatReserved(number=number) for number in range(4)], session=session)
        await receipt.settled(30)
        async with sessions() as session:
            assert sorted(await session.scalars(text("SELECT number FROM seats"))) == [0, 1, 2, 3]
        assert all(state.attempts == 1 for state in await bus.deliveries(*[e.event_id for e in receipt.events]))
    assert max(calls.values()) <= 2


async def reserved(bus: EventBus) -> list[int]:
    async with AsyncSession(bus.engine) as session:
        return sorted(await session.scalars(text("SELECT number FROM seats")))


INSERT = text("INSERT INTO seats VALUES (:number)")


async def settled(bus: EventBus, number: int) -> Counter[tuple[str, int]]:
    """What became of so many events, with the attempts it took, once nothing is left to be done."""
    async with AsyncSession(bus.engine) as session, session.begin():
        receipt = await bus.publish(*[SeatReserved(number=n) for n in range(number)], session=session)
    await receipt.settled(40)
    found = await bus.deliveries(*[event.event_id for event in receipt.events])
    return Counter((state.state, state.attempts) for state in found)


@pytest.fixture
async def theatre(sqlite_url: str) -> AsyncIterator[EventBus]:
    """A bus that is not entered yet, and its table of seats."""
    bus = EventBus(sqlite_url, create_tables=True, logger=Records())
    await bus.create_tables()
    await make_seats(bus)
    yield bus
    await bus.engine.dispose()


async def make_seats(bus: EventBus) -> None:
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE seats (number INTEGER)"))


class SeatPaid(DomainEvent):
    number: int


async def test_handlers_that_come_to_write_late_wait_for_nobody_who_waits_for_them(theatre: EventBus) -> None:
    """Each of these holds SQLite's lock, and writes once more, when its delivery is recorded."""

    @theatre.subscribe(SeatReserved, concurrency=5, timeout=5)
    async def publishes(event: SeatReserved, session: AsyncSession) -> None:
        await theatre.publish(SeatPaid(number=event.number), session=session)

    @theatre.subscribe(SeatReserved, concurrency=5, timeout=5, retry=Retry(max_attempts=2, first=0.01))
    async def retried(event: SeatReserved, session: AsyncSession, context: EventContext) -> None:
        if context.attempt == 1:
            raise RetryLater(timedelta(0))

    @theatre.subscribe(SeatReserved, concurrency=5, timeout=5)
    async def writes(event: SeatReserved, session: AsyncSession) -> None:
        await session.execute(INSERT, {"number": event.number})

    async with theatre:
        assert await settled(theatre, 40) == {("succeeded", 1): 80, ("succeeded", 2): 40}
        assert await reserved(theatre) == list(range(40))


@pytest.mark.parametrize("how", ["an error that is caught", "a temporary table"])
async def test_a_handler_that_has_written_nothing_after_all_holds_nobody_up(theatre: EventBus, how: str) -> None:
    @theatre.subscribe(SeatReserved, concurrency=8, lanes=1, timeout=5)
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        if event.number % 2:
            return
        if how == "a temporary table":
            await session.execute(text("CREATE TEMP TABLE IF NOT EXISTS mine (number INTEGER)"))
            await session.execute(text("INSERT INTO mine VALUES (1)"))
        else:
            with contextlib.suppress(DBAPIError):
                await session.execute(text("INSERT INTO nowhere VALUES (1)"))

    async with theatre:
        assert await settled(theatre, 60) == {("succeeded", 1): 60}


async def test_a_lock_that_is_held_elsewhere_for_long_costs_a_batch_no_attempt(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whereupon._sqlite.BUSY_SECONDS", 0.2)
    bus = EventBus(sqlite_url, create_tables=True, logger=Records())
    await bus.create_tables()
    await make_seats(bus)
    assert bus.engine.url.database is not None
    stranger = sqlite3.connect(bus.engine.url.database, isolation_level=None)
    raced = False

    @bus.subscribe(SeatReserved, batch=5, lanes=1, retry=Retry(max_attempts=1))
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        nonlocal raced
        if not raced:  # it is to be run again, with the lock, and the stranger has that until then
            raced = True
            await session.execute(text("SELECT count(*) FROM seats"))
            stranger.execute("BEGIN IMMEDIATE")
            stranger.execute("INSERT INTO seats VALUES (100)")
            asyncio.get_running_loop().call_later(1, stranger.execute, "COMMIT")
        await session.execute(INSERT, {"number": event.number})

    with closing(stranger):
        async with bus:
            assert await settled(bus, 5) == {("succeeded", 1): 5}
            assert await reserved(bus) == [*range(5), 100]


@pytest.mark.parametrize("size", [2, 3])
async def test_a_worker_leaves_something_of_a_small_pool_to_itself(sqlite_url: str, size: int) -> None:
    engine = create_async_engine(sqlite_url, pool_size=size, max_overflow=0, pool_timeout=3)
    bus = EventBus(engine, create_tables=True, logger=Records(), lease=3)

    @bus.subscribe(SeatReserved, retry=Retry(first=0.01))
    async def reserve(event: SeatReserved, context: EventContext) -> None:
        if event.number % 7 == 0 and context.attempt == 1:
            raise ValueError

    async with bus:
        for _ in range(2):
            assert await settled(bus, 50) == {("succeeded", 1): 42, ("succeeded", 2): 8}
    await engine.dispose()


async def test_a_lost_race_does_not_make_others_lock_out_their_own_second_session(theatre: EventBus) -> None:
    raced = False

    @theatre.subscribe(SeatReserved, concurrency=1, lanes=1, timeout=5)
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        nonlocal raced
        if event.number == 0:
            await session.execute(text("SELECT count(*) FROM seats"))
        if event.number or not raced:
            raced = True
            async with AsyncSession(theatre.engine) as own, own.begin():
                await own.execute(INSERT, {"number": 100 + event.number})
        await session.execute(INSERT, {"number": event.number})

    async with theatre:
        assert await settled(theatre, 4) == {("succeeded", 1): 4}
        assert await reserved(theatre) == [*range(4), *range(100, 104)]


async def test_handlers_that_only_read_do_so_at_once(theatre: EventBus) -> None:
    running, most = 0, 0

    @theatre.subscribe(SeatReserved, concurrency=5)
    async def read(event: SeatReserved, session: AsyncSession) -> None:
        nonlocal running, most
        await session.execute(text("WITH all_of_them AS (SELECT * FROM seats) SELECT count(*) FROM all_of_them"))
        running += 1
        most = max(most, running)
        await asyncio.sleep(0.1)
        running -= 1

    async with theatre:
        await settled(theatre, 10)
    assert most > 1


class Pep249(sqlite3.Connection):
    """As Python 3.12 makes them with autocommit=False: always in a transaction."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **{**options, "isolation_level": None})
        self.execute("BEGIN")

    def commit(self) -> None:
        super().commit()
        self.execute("BEGIN")

    def rollback(self) -> None:
        super().rollback()
        self.execute("BEGIN")


async def test_a_driver_that_is_always_in_a_transaction_settles_all_the_same(theatre: EventBus) -> None:
    engine = create_async_engine(theatre.engine.url, connect_args={"timeout": 30, "factory": Pep249})
    bus = EventBus(engine, logger=Records())
    calls: Counter[int] = Counter()

    @bus.subscribe(SeatReserved)
    async def reserve(event: SeatReserved) -> None:
        calls[event.number] += 1

    for round_ in range(1, 3):
        async with bus:
            assert await settled(bus, 20) == {("succeeded", 1): 20}
        assert calls == dict.fromkeys(range(20), round_)
    await engine.dispose()


ENDED_AMID_A_STATEMENT = """
import asyncio, sys
from sqlalchemy import text
from whereupon import EventBus

async def main(seconds, turns):
    bus = EventBus(sys.argv[1], create_tables=True)
    async def ask():
        async with bus.engine.connect() as connection:
            await connection.execute(text(sys.argv[2]))
    task = asyncio.create_task(ask())
    await asyncio.sleep(seconds)
    task.cancel()
    for _ in range(turns):
        await asyncio.sleep(0)

for seconds in (0.0005, 0.001, 0.003, 0.006, 0.02):  # while the connection is made, and amid the statement
    for turns in range(12):
        asyncio.run(main(seconds, turns))
print("ended")
"""
LONG = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 400000) SELECT count(*) FROM c"


async def test_an_event_loop_ends_though_a_statement_was_cancelled_just_before(sqlite_url: str) -> None:
    """SQLAlchemy and aiosqlite both stop the driver's thread then, and the loop waited for it to obey twice.

    So also if the connection was still being made.
    """
    program = [sys.executable, "-c", ENDED_AMID_A_STATEMENT, sqlite_url, LONG]
    done = await asyncio.to_thread(subprocess.run, program, capture_output=True, text=True, timeout=60)
    assert done.stdout == "ended\n", done.stderr


async def test_handlers_that_hold_connections_longer_than_a_lease_cost_no_lease(postgres_url: str) -> None:
    records = Records()
    bus = EventBus(postgres_url, create_tables=True, lease=1, logger=records)
    rival = EventBus(postgres_url, lease=1, logger=records)  # takes whatever lease runs out
    sessions = async_sessionmaker(bus.engine)
    calls: Counter[int] = Counter()

    async def hold(event: SeatReserved, session: AsyncSession) -> None:
        calls[event.number] += 1
        await session.execute(text("SELECT 1"))
        await asyncio.sleep(1.5)

    for name in ("first", "second", "third"):
        bus.subscribe(SeatReserved, hold, name=name)
        rival.subscribe(SeatReserved, hold, name=name)
    async with bus, rival:
        async with sessions.begin() as session:
            receipt = await bus.publish(*[SeatReserved(number=number) for number in range(20)], session=session)
        await receipt.settled(60)
    assert set(calls.values()) == {3}
    assert not [record for record in records.all if "lease_lost" in str(record)]


async def test_a_subscription_added_later_is_not_said_to_have_delivered_what_it_never_heard(database_url: str) -> None:
    async def early(event: SeatReserved) -> None: ...

    async def late(event: SeatReserved) -> None: ...

    bus = EventBus(database_url, create_tables=True)
    bus.subscribe(SeatReserved, early)
    async with bus:
        async with async_sessionmaker(bus.engine).begin() as session:
            receipt = await bus.publish(SeatReserved(number=1), session=session)
        await receipt.settled(20)
    newer = EventBus(database_url)
    newer.subscribe(SeatReserved, early)
    newer.subscribe(SeatReserved, late)
    async with newer:
        found = await newer.deliveries(receipt.events[0].event_id)
    assert [state.subscription for state in found if state.subscription.endswith("early")]
    assert not [state.subscription for state in found if state.subscription.endswith("late")]


async def test_an_exception_that_can_not_be_shown_costs_the_publisher_nothing(database_url: str) -> None:
    class Unspeakable(Exception):
        def __str__(self) -> str:
            raise RuntimeError("no words")

    bus = EventBus(database_url, create_tables=True, logger=Records())
    sessions = async_sessionmaker(bus.engine)

    @bus.subscribe(SeatReserved, delivery=Delivery.IN_TRANSACTION)
    async def index(event: SeatReserved) -> None:
        raise Unspeakable

    async with sessions.begin() as session:
        await session.execute(text("CREATE TABLE seats (number INTEGER)"))
    async with bus:
        async with sessions.begin() as session:
            await session.execute(text("INSERT INTO seats VALUES (1)"))
            receipt = await bus.publish(SeatReserved(number=1), session=session)
        async with sessions() as session:
            assert list(await session.scalars(text("SELECT number FROM seats"))) == [1]
        [state] = await bus.deliveries(receipt.events[0].event_id)
    assert state.error is not None
    assert "can't be shown" in state.error


async def test_a_bus_entered_again_finds_a_database_that_was_emptied_meanwhile(database_url: str) -> None:
    heard: list[int] = []
    bus = EventBus(database_url, create_tables=True)

    @bus.subscribe(SeatReserved)
    async def hear(event: SeatReserved) -> None:
        heard.append(event.number)

    for number in (1, 2):
        async with bus:
            async with async_sessionmaker(bus.engine).begin() as session:
                receipt = await bus.publish(SeatReserved(number=number), session=session)
            await receipt.settled(20)
            async with async_sessionmaker(bus.engine).begin() as session:
                for table in ("log", "cursor", "subscription", "exception", "history"):
                    await session.execute(text(f"DELETE FROM whereupon_{table}"))
    assert heard == [1, 2]


async def test_buses_of_two_new_databases_start_at_once_in_one_process(database_url: str, sqlite_url: str) -> None:
    other = sqlite_url.replace("app.db", "other.db")
    first, second = EventBus(database_url, create_tables=True), EventBus(other)
    async with asyncio.TaskGroup() as group:
        group.create_task(first.start())
        group.create_task(second.start())
    await first.close()
    await second.close()


@pytest.mark.parametrize(
    "wrong", [{"poll_interval": 0}, {"drain_timeout": -1}, {"in_flight": 0}, {"lease": float("inf")}]
)
def test_a_number_that_can_not_be_is_named(wrong: dict[str, float], sqlite_url: str) -> None:
    [(name, value)] = wrong.items()
    with pytest.raises(ValueError, match=rf"{name}={value}.*at least"):
        EventBus(sqlite_url, **wrong)  # type: ignore[arg-type]


async def test_a_session_of_another_engine_is_recognised_without_beginning_a_snapshot(sqlite_url: str) -> None:
    """Read first, and the write at commit finds the snapshot stale as soon as anybody has committed since."""
    bus, other = EventBus(sqlite_url, deliver=False), EventBus(sqlite_url, deliver=False)
    async with bus, other:
        async with async_sessionmaker(other.engine).begin() as session:
            await bus.publish(SeatReserved(number=1), session=session)
            async with async_sessionmaker(bus.engine).begin() as meanwhile:
                await bus.publish(SeatReserved(number=2), session=meanwhile)
        async with async_sessionmaker(bus.engine)() as session:
            assert await session.scalar(text("SELECT count(*) FROM whereupon_log")) == 2


async def test_a_handler_cancelled_while_it_waits_for_sqlites_lock_does_not_keep_that_for_ever(
    sqlite_url: str,
) -> None:
    """Its statement goes on in the driver's thread, gets the lock, and has rows to return that nobody fetches."""
    bus = EventBus(sqlite_url, create_tables=True)
    sessions = async_sessionmaker(bus.engine)
    called, locked = asyncio.Event(), asyncio.Event()

    @bus.subscribe(SeatReserved, retry=Retry(max_attempts=1))
    async def count(event: SeatReserved, session: AsyncSession) -> None:
        called.set()
        await locked.wait()
        async with asyncio.timeout(0.3):
            await session.execute(text("UPDATE seats SET number = number + 1 RETURNING number"))

    async with sessions.begin() as session:
        await session.execute(text("CREATE TABLE seats (number INTEGER)"))
        await session.execute(text("INSERT INTO seats VALUES (0)"))
    gc.collect()
    gc.disable()  # it would let go of the lock, by and by
    try:
        async with bus:
            async with sessions.begin() as session:
                receipt = await bus.publish(SeatReserved(number=1), session=session)
            await called.wait()
            async with sessions.begin() as session:
                await session.execute(text("UPDATE seats SET number = 10"))
                locked.set()
                await asyncio.sleep(1)
            with closing(sqlite3.connect(bus.engine.url.database or "", timeout=5, check_same_thread=False)) as other:
                await asyncio.to_thread(other.execute, "UPDATE seats SET number = 20")
                other.commit()
            await receipt.settled(10)
            assert [state.state for state in await bus.deliveries(receipt.events[0].event_id)] == ["dead"]
    finally:
        gc.enable()


class SeatSearchAttempted(DomainEvent):
    number: int


async def test_a_transaction_that_another_task_begins_is_not_taken_for_the_one_this_task_has_ended(
    sqlite_url: str,
) -> None:
    """Both are of one pooled connection, and its driver says it is in a transaction before its owner is known."""
    begun, published = asyncio.Event(), asyncio.Event()
    engine = create_async_engine(sqlite_url, pool_size=1, max_overflow=1)

    @listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        connection.exec_driver_sql("BEGIN")
        if (task := asyncio.current_task()) is not None and task.get_name() == "reader":
            begun.set()
            await_only(published.wait())

    async def read() -> None:
        async with engine.begin() as connection:
            await connection.execute(text("SELECT count(*) FROM seats"))

    bus = EventBus(engine, create_tables=True)
    try:
        await bus.publish(SeatSearchAttempted(number=1))  # makes the tables
        async with engine.begin() as connection:
            await connection.execute(text("CREATE TABLE seats (number INTEGER)"))
            await connection.execute(text("INSERT INTO seats VALUES (1)"))
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(read(), name="reader")
            await begun.wait()
            await bus.publish(SeatSearchAttempted(number=2))
            published.set()
    finally:
        await bus.close()
        await engine.dispose()
