"""One worker at a time serves a lane; who lost its lease changes nothing any more."""

from __future__ import annotations

import asyncio
import sys
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import DomainEvent, EventBus, EventContext, Retry
from whereupon.errors import LeaseLost
from whereupon.lane import Delivery, Lane
from whereupon.schema import process
from whereupon.store import RUNNING, Failure, Move

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class ParcelSent(DomainEvent):
    number: int


@pytest.fixture
async def buses(database_url: str) -> AsyncIterator[tuple[EventBus, EventBus]]:
    """Two processes' worth of buses on one database, neither entered, with a table that handlers write into."""
    pair = tuple(EventBus(database_url, create_tables=True, poll_interval=0.05, lease=1) for _ in range(2))
    await pair[0].create_tables()
    async with pair[0].engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (number INTEGER NOT NULL, bus INTEGER NOT NULL)"))
    yield pair[0], pair[1]
    for bus in pair:
        await bus.engine.dispose()


async def send(bus: EventBus, *numbers: int) -> list[ParcelSent]:
    events = [ParcelSent(number=number) for number in numbers]
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)
    return events


async def effects_of(bus: EventBus) -> Counter[int]:
    async with bus.engine.connect() as connection:
        return Counter((await connection.scalars(text("SELECT number FROM effect"))).all())


async def change(bus: EventBus, statement: str) -> None:
    async with bus.engine.begin() as connection:
        await connection.execute(text(statement))


async def reached(bus: EventBus, number: int, within: float = 10.0) -> None:
    async with asyncio.timeout(within):
        while sum((await effects_of(bus)).values()) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def write(session: AsyncSession, number: int, bus: int = 0) -> None:
    await session.execute(text("INSERT INTO effect VALUES (:number, :bus)"), {"number": number, "bus": bus})


async def test_two_workers_share_no_delivery(buses: tuple[EventBus, EventBus]) -> None:
    called = Counter[tuple[str, int]]()
    for bus in buses:
        for name in "abcd":

            async def handler(event: ParcelSent, name: str = name) -> None:
                called[name, event.number] += 1

            bus.subscribe(ParcelSent, handler, name=name)
    first, second = buses
    async with first, second:
        receipts = [await send(bus, *range(start, start + 25)) for start, bus in ((0, first), (25, second))]
        for events in receipts:
            await first.wait_settled(events, 20)
    assert called == Counter({(name, number): 1 for name in "abcd" for number in range(50)})


async def test_when_one_stops_cleanly_another_takes_over_at_once(buses: tuple[EventBus, EventBus]) -> None:
    served: list[int] = []
    for place, bus in enumerate(buses):

        async def handler(event: ParcelSent, place: int = place) -> None:
            served.append(place)

        bus.subscribe(ParcelSent, handler, name="parcels")
        bus._lease = 60
    first, second = buses
    async with second:
        await second.drain(5)
        async with first:
            await send(first, 1)
            await second.wait_settled(await send(second, 2), 5)
            await second.close()
            began = time.monotonic()
            [event] = await send(first, 3)
            await first.wait_settled([event], 10)
            assert time.monotonic() - began < 3
    assert len(served) == 3
    assert served[2] == 0


async def test_a_worker_whose_lease_was_stolen_while_a_handler_runs_has_its_work_rolled_back(
    buses: tuple[EventBus, EventBus],
) -> None:
    first, second = buses
    started, go_on = asyncio.Event(), asyncio.Event()

    @first.subscribe(ParcelSent, name="parcels")
    async def stalled(event: ParcelSent, session: AsyncSession) -> None:
        started.set()
        await go_on.wait()
        await write(session, event.number, 1)

    @second.subscribe(ParcelSent, name="parcels")
    async def other(event: ParcelSent, session: AsyncSession) -> None:
        await write(session, event.number, 2)

    first._lease = 60
    async with first:
        [event] = await send(first, 1)
        await started.wait()
        await change(first, "DELETE FROM whereupon_process")  # as if it had been away for long
        async with second:
            await reached(second, 1)
            go_on.set()
            await second.wait_settled([event], 10)
            await asyncio.sleep(0.3)
            assert await effects_of(second) == {1: 1}
            async with second.engine.connect() as connection:
                assert await connection.scalar(text("SELECT bus FROM effect")) == 2


async def test_who_lost_its_lease_can_neither_move_nor_settle_nor_record(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses

    async def handler(event: ParcelSent) -> None: ...

    bus.subscribe(ParcelSent, handler, name="parcels", lanes=1)
    await send(bus, 1)
    store, owner, thief = bus._store, uuid4(), uuid4()
    await live(bus, owner)
    await live(bus, thief)
    lanes = (await store.layout(["parcels"])).lanes
    [cursor] = await store.claim(lanes, owner)
    page = await store.read(cursor.place, None, 10)
    assert await store.claim(lanes, thief) == []  # what was seen is not so any more
    lanes = (await store.layout(["parcels"])).lanes
    assert await store.claim(lanes, thief) == []  # its owner lives
    await change(bus, "UPDATE whereupon_process SET lease_until = started_at")
    [stolen] = await store.claim(lanes, thief)
    assert stolen.token > cursor.token
    move = Move(cursor, page.after, [], [])
    failure = Failure(page.rows[0], RUNNING, 1, None)
    async with store.engine.connect() as connection:
        for attempt in (
            store.fence(connection, cursor),
            store.move(connection, move, owner),
            store.due(connection, cursor, [], 10),
        ):
            with pytest.raises(LeaseLost, match="lane 0 of parcels"):
                await attempt
    assert await store.settle([move], owner, []) == set()
    assert await store.settle([move._replace(cursor=stolen)], thief, []) == {stolen.key}
    await store.release(owner)  # takes nothing from the new one
    [lane] = (await store.layout(["parcels"])).lanes
    assert (lane.owner, lane.token) == (thief, stolen.token)
    async with store.writing() as connection:
        await store.keep_failures(connection, stolen, [failure, failure])  # doing it twice is doing it once
    async with bus.engine.connect() as connection:
        assert await connection.scalar(text("SELECT count(*) FROM whereupon_exception")) == 1


async def live(bus: EventBus, owner: UUID) -> None:
    """A process with a lease of an hour."""
    async with bus.engine.begin() as connection:
        now = datetime.now(UTC)
        await connection.execute(
            process.insert().values(
                id=owner, lease_until=now + timedelta(hours=1), in_flight=1, host="", pid=1, started_at=now
            )
        )


async def test_a_lease_is_renewed_while_a_worker_waits_for_its_last_handlers(
    buses: tuple[EventBus, EventBus],
) -> None:
    calls: list[int] = []
    for place, bus in enumerate(buses):

        async def handler(event: ParcelSent, place: int = place) -> None:
            calls.append(place)
            await asyncio.sleep(2.5)

        bus.subscribe(ParcelSent, handler, name="parcels")
    first, second = buses
    async with first:
        [event] = await send(first, 1)
        async with asyncio.timeout(5):
            while not calls:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        async with second:
            await first.close(drain=False)  # longer than the lease of 1 s
            await second.wait_settled([event], 5)
    assert calls == [0]


async def test_an_interrupted_delivery_is_tried_again_and_its_attempt_counts(
    buses: tuple[EventBus, EventBus],
) -> None:
    bus, _ = buses
    attempts = Counter[int]()

    @bus.subscribe(ParcelSent, name="parcels", retry=Retry(max_attempts=3), lanes=1)
    async def handler(event: ParcelSent, context: EventContext) -> None:
        attempts[context.attempt] += 1

    once, used_up = await send(bus, 1, 2)
    store = bus._store
    [cursor] = await store.claim((await store.layout(["parcels"])).lanes, uuid4())
    page = await store.read(cursor.place, None, 10)
    async with store.writing() as connection:  # what a worker leaves that was killed with these two running long
        await store.keep_failures(
            connection,
            cursor,
            [Failure(row, RUNNING, tries, None, alone=True) for row, tries in zip(page.rows, (1, 3), strict=True)],
        )
        await store.move(connection, Move(cursor, page.after, [], []), uuid4())
    async with bus:
        await bus.drain(10)
        states = {state.event_id: state for state in await bus.deliveries(once.event_id, used_up.event_id)}
    assert states[once.event_id].state == "succeeded"
    assert attempts == {2: 1}
    assert states[used_up.event_id].state == "dead"
    assert states[used_up.event_id].attempts == 3
    assert "crash loop" in str(states[used_up.event_id].error)


async def test_interrupted_deliveries_wait_their_turn_and_run_once(buses: tuple[EventBus, EventBus]) -> None:
    """They run one at a time, and however often somebody asks what is due meanwhile, none is begun twice."""
    bus, _ = buses
    calls = Counter[int]()
    running = 0

    @bus.subscribe(ParcelSent, name="parcels", lanes=1)
    async def handler(event: ParcelSent) -> None:
        nonlocal running
        running += 1
        assert running == 1
        await asyncio.sleep(0.1)
        calls[event.number] += 1
        running -= 1

    await send(bus, *range(5))
    store = bus._store
    [cursor] = await store.claim((await store.layout(["parcels"])).lanes, uuid4())
    page = await store.read(cursor.place, None, 10)
    async with store.writing() as connection:
        await store.keep_failures(connection, cursor, [Failure(row, RUNNING, 1, None) for row in page.rows])
        await store.move(connection, Move(cursor, page.after, [], []), uuid4())
    async with bus:
        worker = bus._worker
        assert worker is not None
        drained = asyncio.create_task(bus.drain(20))
        while not drained.done():
            for lane in worker.lanes.values():
                lane.due = True
            worker.pump()
            await asyncio.sleep(0.01)
        await drained
    assert calls == Counter(range(5))


async def test_what_settled_out_of_order_is_not_repeated_after_a_crash(buses: tuple[EventBus, EventBus]) -> None:
    """A slow head, a neighbour that fails and succeeds when retried, then the end of the process."""
    first, second = buses
    calls = Counter[int]()
    forever = asyncio.Event()
    for bus in buses:

        @bus.subscribe(ParcelSent, name="parcels", retry=Retry(first=0))
        async def handler(event: ParcelSent, context: EventContext) -> None:
            calls[event.number] += 1
            if event.number == 1 and calls[1] == 1:
                await forever.wait()
            if event.number == 3 and context.attempt == 1:
                raise RuntimeError

    await first.start()
    events = await send(first, 1, 2, 3, 4)
    async with asyncio.timeout(5):
        while calls != {1: 1, 2: 1, 3: 2, 4: 1} or await _open_exceptions(first):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await _kill(first)
    async with second:
        await second.wait_settled(events, 10)
    assert calls == {1: 2, 2: 1, 3: 2, 4: 1}


async def _open_exceptions(bus: EventBus) -> int:
    async with bus.engine.connect() as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM whereupon_exception WHERE position > 1")) or 0)


async def _kill(bus: EventBus) -> None:
    """What SIGKILL leaves of a worker: nothing is written any more, its lease runs out."""
    worker = bus._worker
    assert worker is not None
    bus._worker = None
    for lane in worker.lanes.values():
        lane.lost = True
    for task in list(worker._tasks):
        task.cancel()
    await asyncio.wait(worker._tasks)
    worker.runner.stop("the process was killed")
    await worker.lease.stop()
    await bus.close()


@pytest.mark.parametrize("retried", [False, True])
async def test_a_commit_whose_answer_was_lost_is_not_repeated(buses: tuple[EventBus, EventBus], retried: bool) -> None:
    bus, _ = buses
    armed = asyncio.Event()
    calls = Counter[int]()

    @bus.subscribe(ParcelSent, name="parcels", retry=Retry(first=0))
    async def handler(event: ParcelSent, session: AsyncSession, context: EventContext) -> None:
        calls[context.attempt] += 1
        if retried and context.attempt == 1:
            raise RuntimeError
        await write(session, event.number)
        armed.set()

    commit = AsyncSession.commit

    async def commit_and_lose_the_answer(self: AsyncSession) -> None:
        await commit(self)
        if armed.is_set():
            armed.clear()
            raise DBAPIError("COMMIT", None, ConnectionResetError("the server is gone"))

    async with bus:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(AsyncSession, "commit", commit_and_lose_the_answer)
            [event] = await send(bus, 1)
            await bus.wait_settled([event], 10)
            await bus.drain(10)
        [state] = await bus.deliveries(event.event_id)
    assert state.state == "succeeded"
    assert calls == ({1: 1, 2: 1} if retried else {1: 1})
    assert await effects_of(bus) == {1: 1}


async def test_a_transaction_that_lost_a_race_is_run_again_without_using_an_attempt(postgres_url: str) -> None:
    bus = EventBus(postgres_url, create_tables=True)
    await bus.create_tables()
    await change(bus, "CREATE TABLE account (id INTEGER PRIMARY KEY, balance INTEGER NOT NULL)")
    await change(bus, "INSERT INTO account VALUES (1, 0), (2, 0)")
    attempts: list[int] = []

    @bus.subscribe(ParcelSent, name="parcels", concurrency=8, retry=Retry(max_attempts=1))
    async def transfer(event: ParcelSent, session: AsyncSession, context: EventContext) -> None:
        attempts.append(context.attempt)
        order = (1, 2) if event.number % 2 else (2, 1)
        for account in order:  # half of them the other way round: deadlocks
            await session.execute(text("UPDATE account SET balance = balance + 1 WHERE id = :id"), {"id": account})
            await asyncio.sleep(0.02)

    async with bus:
        events = await send(bus, *range(4))
        await bus.wait_settled(events, 30)
        assert {state.state for state in await bus.deliveries(*(event.event_id for event in events))} == {"succeeded"}
    async with bus.engine.connect() as connection:
        assert list(await connection.scalars(text("SELECT balance FROM account"))) == [4, 4]
    assert len(attempts) > 4, "no deadlock came about, so this showed nothing"
    assert set(attempts) == {1}
    await bus.engine.dispose()


async def test_a_stale_snapshot_of_sqlite_is_run_again_without_using_an_attempt(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url)
    await bus.create_tables()
    await change(bus, "CREATE TABLE account (balance INTEGER NOT NULL)")
    await change(bus, "INSERT INTO account VALUES (0)")
    attempts: list[int] = []

    @bus.subscribe(ParcelSent, name="parcels", concurrency=5, retry=Retry(max_attempts=1))
    async def deposit(event: ParcelSent, session: AsyncSession, context: EventContext) -> None:
        attempts.append(context.attempt)
        balance = await session.scalar(text("SELECT balance FROM account"))
        await asyncio.sleep(0.01)
        await session.execute(text("UPDATE account SET balance = :balance"), {"balance": (balance or 0) + 1})

    async with bus:
        await bus.wait_settled(await send(bus, *range(10)), 30)
    async with bus.engine.connect() as connection:
        assert await connection.scalar(text("SELECT balance FROM account")) == 10
    assert len(attempts) > 10, "nobody lost a race, so this showed nothing"
    assert set(attempts) == {1}
    await bus.engine.dispose()


@pytest.mark.slow
async def test_a_server_that_ends_every_connection_under_load_doubles_no_effect(postgres_url: str) -> None:
    bus = EventBus(postgres_url, create_tables=True, poll_interval=0.05, lease=2)
    await bus.create_tables()
    await change(bus, "CREATE TABLE effect (number INTEGER NOT NULL, bus INTEGER NOT NULL)")

    @bus.subscribe(ParcelSent, name="parcels", retry=Retry(first=0.01, max_attempts=50), concurrency=20)
    async def handler(event: ParcelSent, session: AsyncSession) -> None:
        await write(session, event.number)

    killer = EventBus(postgres_url)
    async with bus:
        await send(bus, *range(150))
        for _ in range(4):
            await asyncio.sleep(0.1)
            async with killer.engine.connect() as connection:
                await connection.execute(
                    text(
                        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                        "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                    )
                )
        async with asyncio.timeout(30):
            while sum((await effects_of(killer)).values()) < 150:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await bus.drain(20)
    assert await effects_of(killer) == Counter(range(150))
    await killer.engine.dispose()
    await bus.engine.dispose()


async def test_a_lane_lost_just_as_its_handlers_were_to_begin_costs_no_place_among_those_that_may_run(
    buses: tuple[EventBus, EventBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Their tasks are cancelled before their first step, and so never get to give their places back."""
    bus, _ = buses
    begin, lost = Lane.begin_transaction, list[int]()

    def begin_and_lose(self: Lane, first: Delivery) -> int:
        number = begin(self, first)
        if len(lost) < 3:
            lost.append(first.position)
            self.worker.lose(self)
        return number

    monkeypatch.setattr(Lane, "begin_transaction", begin_and_lose)

    @bus.subscribe(ParcelSent, name="parcels", concurrency=1, lanes=1)
    async def deliver(event: ParcelSent, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:number, 0)"), {"number": event.number})

    async with bus:
        await bus.wait_settled(await send(bus, *range(5)), 20)
    assert len(lost) == 3
    assert await effects_of(bus) == Counter(range(5))


HOG = """
import sqlite3, sys, time
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=60)
print("here", flush=True)
until = time.monotonic() + 8
while time.monotonic() < until:
    connection.execute("BEGIN IMMEDIATE")
    time.sleep(0.3)
    connection.execute("COMMIT")
    time.sleep(0.02)
"""
"""Leaves SQLite's write lock to others for a fiftieth of a second at a time: SQLite itself looks for it every tenth."""


async def test_a_lease_is_kept_beside_a_writer_that_hardly_ever_lets_go_of_the_lock(
    sqlite_url: str, tmp_path: Path
) -> None:
    bus = EventBus(sqlite_url, create_tables=True, lease=3)

    @bus.subscribe(ParcelSent, name="parcels")
    async def deliver(event: ParcelSent) -> None: ...

    margins: list[timedelta] = []
    async with bus:
        await bus.drain(10)
        hog = await asyncio.create_subprocess_exec(
            sys.executable, "-c", HOG, str(tmp_path / "app.db"), stdout=asyncio.subprocess.PIPE
        )
        try:
            assert hog.stdout is not None
            await hog.stdout.readline()
            while hog.returncode is None:
                async with bus.engine.connect() as connection:
                    until = (await connection.scalars(select(process.c.lease_until))).one()
                margins.append(until - datetime.now(UTC))
                await asyncio.sleep(0.05)
        finally:
            if hog.returncode is None:
                hog.kill()
            await hog.wait()
    assert len(margins) > 20
    assert min(margins) > timedelta(0)
