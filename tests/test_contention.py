"""Handlers, leases and settling share one database and one pool; none starves another."""

import asyncio
import gc
import sqlite3
from collections import Counter
from contextlib import closing

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.event import listens_for
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.util import await_only

from tests.log_records import Records
from whereupon import Delivery, DomainEvent, EventBus, Retry

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


async def reserve_seats(bus: EventBus, number: int) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await session.execute(text("CREATE TABLE IF NOT EXISTS seats (number INTEGER)"))
        await bus.publish(*[SeatReserved(number=n) for n in range(number)], session=session)


async def reserved(bus: EventBus) -> list[int]:
    async with AsyncSession(bus.engine) as session:
        return sorted(await session.scalars(text("SELECT number FROM seats")))


INSERT = text("INSERT INTO seats VALUES (:number)")


async def test_on_sqlite_no_handler_sends_what_it_writes_before_the_one_that_writes_has_committed(
    sqlite_url: str,
) -> None:
    """There it would sleep, and look for the lock now and then, while nobody writes."""
    bus = EventBus(sqlite_url, create_tables=True)
    writing, most = 0, 0

    @bus.subscribe(SeatReserved, concurrency=5)
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        await asyncio.sleep(0.01)
        await session.execute(INSERT, {"number": event.number})
        await asyncio.sleep(0.002)

    async with bus:

        @listens_for(bus.engine.sync_engine, "before_cursor_execute")
        def sent(_connection: object, _cursor: object, statement: str, *_: object) -> None:
            nonlocal writing, most
            if statement.startswith("INSERT INTO seats"):
                writing += 1
                most = max(most, writing)

        @listens_for(bus.engine.sync_engine, "commit")
        def committed(_: object) -> None:
            nonlocal writing
            writing -= writing > 0

        await reserve_seats(bus, 40)
        await bus.drain(30)
        assert await reserved(bus) == list(range(40))
    assert most == 1


async def test_on_sqlite_a_handler_that_reads_first_is_seldom_called_again_for_having_lost_a_race(
    sqlite_url: str,
) -> None:
    bus = EventBus(sqlite_url, create_tables=True)
    calls = 0

    @bus.subscribe(SeatReserved, concurrency=5)
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        nonlocal calls
        calls += 1
        await session.execute(text("SELECT count(*) FROM seats"))
        await asyncio.sleep(0.002)
        await session.execute(INSERT, {"number": event.number})

    async with bus:
        await reserve_seats(bus, 60)
        await bus.drain(30)
        assert await reserved(bus) == list(range(60))
    assert calls <= 60 + 3 * 5


async def test_on_sqlite_the_turn_of_a_handler_that_ends_in_any_way_goes_to_the_next(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url, create_tables=True, logger=Records())

    @bus.subscribe(SeatReserved, concurrency=5, timeout=0.3, retry=Retry(max_attempts=1))
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        await session.execute(INSERT, {"number": event.number})
        if event.number == 0:
            await asyncio.sleep(30)  # too long
        elif event.number % 3 == 0:
            raise ValueError(event.number)
        elif event.number % 3 == 1:
            await session.execute(text("INSERT INTO nowhere VALUES (1)"))

    async with bus:
        await reserve_seats(bus, 1)
        await bus.drain(30)
        assert await reserved(bus) == []
        for _ in range(2):
            async with AsyncSession(bus.engine) as session, session.begin():
                await bus.publish(*[SeatReserved(number=number) for number in range(1, 12)], session=session)
            await bus.drain(30)
        assert await reserved(bus) == [2, 2, 5, 5, 8, 8, 11, 11]


async def test_on_sqlite_who_else_writes_finds_the_lock_free_between_handlers_that_hold_it_for_long(
    sqlite_url: str,
) -> None:
    bus = EventBus(sqlite_url, create_tables=True)
    stranger = create_async_engine(sqlite_url, connect_args={"timeout": 30})

    @bus.subscribe(SeatReserved, concurrency=5)
    async def reserve(event: SeatReserved, session: AsyncSession) -> None:
        await session.execute(INSERT, {"number": event.number})
        await asyncio.sleep(0.2)

    async with bus:
        await reserve_seats(bus, 40)
        for number in range(100, 104):
            async with stranger.begin() as connection:
                await connection.execute(INSERT, {"number": number})
        mine = [number for number in await reserved(bus) if number < 100]
        await bus.drain(60)
        assert await reserved(bus) == [*range(40), *range(100, 104)]
    await stranger.dispose()
    assert len(mine) <= 20, "it waited for most of them"


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
