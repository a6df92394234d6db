"""The log is read exactly once: nothing that commits late is skipped, nobody's long transaction stalls the rest."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession, AsyncTransaction

from tests.servers import empty_database
from whereupon import DomainEvent, EventBus
from whereupon.store import Cursor, Move, Page, Record, Store

pytestmark = pytest.mark.integration

SUBSCRIPTION = "reader"
OWNER = uuid4()


class StockCounted(DomainEvent):
    number: int


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    bus = EventBus(database_url, create_tables=True, poll_interval=0.02)
    yield bus
    await bus.engine.dispose()


def records(*types: str) -> list[Record]:
    return [Record(uuid4(), type_, 1, b"{}", "{}", None, None) for type_ in types]


async def append(store: Store, connection: AsyncConnection, *types: str) -> list[UUID]:
    made = records(*types)
    await connection.run_sync(store.append, made, positions=False)
    return [record.event_id for record in made]


async def registered(bus: EventBus) -> tuple[Store, Cursor]:
    """The store of this bus with a cursor from now."""

    async def reader(event: StockCounted) -> None: ...

    if SUBSCRIPTION not in bus.subscriptions:
        bus.subscribe(StockCounted, reader, name=SUBSCRIPTION, lanes=1)
    store = bus._store
    await store.prepare(create=True)
    await store.register(bus.subscriptions)
    return store, await claim(store)


async def claim(store: Store) -> Cursor:
    [cursor] = await store.claim((await store.layout([SUBSCRIPTION])).lanes, OWNER)
    return cursor


async def settle(store: Store, cursor: Cursor, page: Page) -> list[UUID]:
    """Move the cursor past a page; return what was not settled of it before."""
    passed = [row.position for row in page.rows if row.position in cursor.done]
    async with store.writing() as connection:
        await store.move(connection, Move(cursor, page.after, [], passed), OWNER)
    new = [row.event_id for row in page.rows if row.position not in cursor.done]
    cursor.place = page.after
    cursor.done.difference_update(passed)
    return new


async def read_all(store: Store, cursor: Cursor, limit: int, types: list[str] | None = None) -> list[list[UUID]]:
    """Read and settle page after page until nothing more is visible; the ids of each page."""
    pages = []
    while True:
        page = await store.read(cursor.place, types, limit)
        new = await settle(store, cursor, page)
        assert len(page.rows) <= limit
        assert [row.position for row in page.rows] == sorted(row.position for row in page.rows)
        if new:
            pages.append(new)
        if page.complete:
            return pages


def flat(pages: list[list[UUID]]) -> list[UUID]:
    return [event_id for page in pages for event_id in page]


async def test_a_late_commit_is_not_skipped_and_an_open_transaction_stalls_nobody(postgres_url: str) -> None:
    bus = EventBus(postgres_url, create_tables=True)
    store, cursor = await registered(bus)
    async with bus.engine.connect() as slow, bus.engine.connect() as quick:
        late = await append(store, slow, "A")  # takes its position, and commits last
        early = await append(store, quick, "A")
        await quick.commit()
        assert flat(await read_all(store, cursor, 10)) == early
        assert flat(await read_all(store, cursor, 10)) == []
        await slow.commit()
        assert flat(await read_all(store, cursor, 10)) == late
        assert flat(await read_all(store, cursor, 10)) == []
    await bus.engine.dispose()


async def test_a_commit_in_the_middle_of_a_paged_window_waits_for_the_next_one(postgres_url: str) -> None:
    bus = EventBus(postgres_url, create_tables=True)
    store, cursor = await registered(bus)
    async with bus.engine.connect() as slow, bus.engine.connect() as quick:
        late = await append(store, slow, "A")  # the lowest position of all
        early = await append(store, quick, *"AAAAA")
        await quick.commit()
        page = await store.read(cursor.place, None, 2)
        assert [row.event_id for row in page.rows] == early[:2]
        assert not page.complete
        cursor.place = page.after
        await slow.commit()
        assert flat(await read_all(store, cursor, 2)) == [*early[2:], *late]
    await bus.engine.dispose()


async def test_savepoints_write_under_their_transaction(postgres_url: str) -> None:
    """A subtransaction has an id of its own; the log must hold that of the transaction, or it is never visible."""
    bus = EventBus(postgres_url, create_tables=True)
    store, cursor = await registered(bus)
    async with bus.engine.connect() as connection, connection.begin():
        await connection.execute(text("SELECT 1"))
        async with connection.begin_nested():
            released = await append(store, connection, "A")
        savepoint = await connection.begin_nested()
        await append(store, connection, "A")
        await savepoint.rollback()
    assert flat(await read_all(store, cursor, 10)) == released
    await bus.engine.dispose()


async def test_a_window_is_read_in_the_order_of_positions(postgres_url: str) -> None:
    """A transaction that has its id early but publishes late, after a lock that it waited for, comes later."""
    bus = EventBus(postgres_url, create_tables=True)
    store, cursor = await registered(bus)
    async with bus.engine.connect() as first_id, bus.engine.connect() as second_id:
        await first_id.execute(text("SELECT pg_current_xact_id()"))
        earlier = await append(store, second_id, "A")
        await second_id.commit()
        later = await append(store, first_id, "A")
        await first_id.commit()
    assert flat(await read_all(store, cursor, 10)) == [*earlier, *later]
    await bus.engine.dispose()


async def test_a_cursor_over_some_types_passes_the_others(bus: EventBus) -> None:
    store, cursor = await registered(bus)
    async with store.writing() as connection:
        ids = await append(store, connection, *"ABABAB")
    assert flat(await read_all(store, cursor, 2, ["A"])) == ids[::2]
    assert flat(await read_all(store, cursor, 2)) == []


class Log(RuleBasedStateMachine):
    """Transactions begin, publish, save, roll back and commit in any order, while a reader takes small pages."""

    server: str

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.database = empty_database(self.server)
        self.bus = EventBus(self.database.__enter__(), create_tables=True)
        self.store, self.cursor = self.runner.run(registered(self.bus))
        self.writers: dict[int, tuple[AsyncConnection, AsyncTransaction, list[UUID]]] = {}
        self.committed: list[UUID] = []
        self.delivered: list[UUID] = []

    @precondition(lambda self: len(self.writers) < 4)
    @rule()
    def begin(self) -> None:
        async def begin() -> None:
            connection = await self.bus.engine.connect()
            self.writers[max(self.writers, default=0) + 1] = (connection, await connection.begin(), [])

        self.runner.run(begin())

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), number=st.integers(1, 4))
    def publish(self, data: st.DataObject, number: int) -> None:
        connection, _, events = self.writers[data.draw(st.sampled_from(sorted(self.writers)))]
        events += self.runner.run(append(self.store, connection, *"A" * number))

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), number=st.integers(1, 2), keep=st.booleans())
    def publish_in_a_savepoint(self, data: st.DataObject, number: int, keep: bool) -> None:
        connection, _, events = self.writers[data.draw(st.sampled_from(sorted(self.writers)))]

        async def publish() -> None:
            savepoint = await connection.begin_nested()
            added = await append(self.store, connection, *"A" * number)
            await (savepoint.commit() if keep else savepoint.rollback())
            events.extend(added if keep else [])

        self.runner.run(publish())

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), commits=st.sampled_from([True, True, True, False]))
    def end(self, data: st.DataObject, commits: bool) -> None:
        connection, transaction, events = self.writers.pop(data.draw(st.sampled_from(sorted(self.writers))))

        async def end() -> None:
            await (transaction.commit() if commits else transaction.rollback())
            await connection.close()

        self.runner.run(end())
        self.committed += events if commits else []

    @rule(limit=st.integers(1, 3), settles=st.sampled_from([True, True, False]))
    def read_a_page(self, limit: int, settles: bool) -> None:
        async def read() -> None:
            page = await self.store.read(self.cursor.place, None, limit)
            assert [row.position for row in page.rows] == sorted(row.position for row in page.rows)
            if settles:  # or the worker ended before it did
                self.delivered += await settle(self.store, self.cursor, page)
            self.cursor = await claim(self.store)

        self.runner.run(read())

    @rule()
    def settle_the_next_out_of_order(self) -> None:
        async def settle_one() -> None:
            page = await self.store.read(self.cursor.place, None, 3)
            left = [row for row in page.rows if row.position not in self.cursor.done]
            if left:
                async with self.store.writing() as connection:
                    await self.store.move(
                        connection, Move(self.cursor, self.cursor.place, [left[-1].position], []), OWNER
                    )
                self.delivered.append(left[-1].event_id)
            self.cursor = await claim(self.store)

        self.runner.run(settle_one())

    @rule()
    def read_everything(self) -> None:
        self.delivered += flat(self.runner.run(read_all(self.store, self.cursor, 3)))
        assert Counter(self.delivered) == Counter(self.committed)

    @invariant()
    def nothing_is_twice_and_nothing_is_invented(self) -> None:
        assert Counter(self.delivered) <= Counter(self.committed)
        assert len(set(self.delivered)) == len(self.delivered)

    def teardown(self) -> None:
        async def close() -> None:
            for connection, transaction, _ in self.writers.values():
                await transaction.rollback()
                await connection.close()

        try:
            self.runner.run(close())
            self.read_everything()
        finally:
            self.runner.run(self.bus.engine.dispose())
            self.runner.close()
            self.database.__exit__(None, None, None)


@pytest.mark.slow
def test_every_order_of_transactions_and_reads_delivers_exactly_what_was_committed(postgres_server: str) -> None:
    class OnThisServer(Log):
        server = postgres_server

    run_state_machine_as_test(
        OnThisServer,
        settings=settings(
            max_examples=8, stateful_step_count=30, deadline=None, suppress_health_check=[HealthCheck.too_slow]
        ),
    )


@pytest.mark.slow
async def test_many_writers_lose_nothing_and_double_nothing(bus: EventBus) -> None:
    """Delays inside transactions, rollbacks, savepoints, and on PostgreSQL one transaction that stays open."""
    sqlite = bus.engine.dialect.name == "sqlite"
    delivered = Counter[int]()
    committed: list[int] = []
    numbers = iter(range(1_000_000))

    @bus.subscribe(StockCounted, name="counting", concurrency=100)
    async def counting(event: StockCounted) -> None:
        delivered[event.number] += 1

    async def write(chance: random.Random, transactions: int) -> None:
        for _ in range(transactions):
            made = [next(numbers) for _ in range(chance.randint(1, 4))]
            undone = next(numbers)
            async with AsyncSession(bus.engine) as session:
                if not sqlite:  # a writer that waits would hold SQLite's only write lock
                    await session.execute(text("SELECT pg_current_xact_id()"))
                    await asyncio.sleep(chance.expovariate(300))
                await bus.publish(*(StockCounted(number=number) for number in made), session=session)
                savepoint = await session.begin_nested()
                await bus.publish(StockCounted(number=undone), session=session)
                await savepoint.rollback()
                if chance.random() < 0.1:
                    await session.rollback()
                    continue
                await session.commit()
            committed.extend(made)

    async with bus:
        open_one = AsyncSession(bus.engine)
        if not sqlite:
            await bus.publish(StockCounted(number=-1), session=open_one)
            await open_one.execute(text("SELECT pg_current_xact_id()"))
        await asyncio.gather(*(write(random.Random(seed), 25) for seed in range(4 if sqlite else 8)))
        await bus.drain(30)
        assert delivered == Counter(committed)  # though one is still open
        if not sqlite:
            await open_one.commit()
            committed.append(-1)
        await open_one.close()
        await bus.drain(30)
    assert delivered == Counter(committed)


async def test_what_is_published_after_registering_is_delivered_however_late_a_worker_comes(bus: EventBus) -> None:
    heard: list[int] = []

    @bus.subscribe(StockCounted, name="late")
    async def late(event: StockCounted) -> None:
        heard.append(event.number)

    async with AsyncSession(bus.engine) as session, session.begin():  # not entered: this publish registers
        await bus.publish(StockCounted(number=1), session=session)
    async with bus:
        await bus.drain(10)
    assert heard == [1]


async def test_a_new_subscription_hears_what_commits_from_now_on(bus: EventBus) -> None:
    heard: dict[str, list[int]] = {"old": [], "new": []}

    async def publish(bus: EventBus, number: int) -> None:
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(StockCounted(number=number), session=session)

    def listen(bus: EventBus, name: str) -> None:
        async def handler(event: StockCounted) -> None:
            heard[name].append(event.number)

        bus.subscribe(StockCounted, handler, name=name)

    listen(bus, "old")
    async with bus:
        await publish(bus, 1)
        await bus.drain(10)
    grown = EventBus(bus.engine)
    listen(grown, "old")
    listen(grown, "new")
    async with grown:
        await publish(grown, 2)
        await grown.drain(10)
    assert heard == {"old": [1, 2], "new": [2]}


async def test_a_clean_stop_saves_a_cursor_that_passed_only_foreign_events(bus: EventBus) -> None:
    async def listening(event: StockCounted) -> None: ...

    bus.subscribe(StockCounted, listening, name="idle")
    await registered_places(bus)
    async with bus:
        await bus.drain(10)
        before = await registered_places(bus)
        async with bus._store.writing() as connection:
            await append(bus._store, connection, *["SomethingElse"] * 5)
        await bus.drain(10)
        assert await registered_places(bus) == before  # an idle look writes nothing
    after = await registered_places(bus)
    assert after != before


async def registered_places(bus: EventBus) -> list[Any]:
    place = "page" if bus.engine.dialect.name == "sqlite" else "snapshot::text"
    await bus.deliveries()
    async with bus.engine.connect() as connection:
        return list((await connection.execute(text(f"SELECT {place} FROM whereupon_cursor"))).all())
