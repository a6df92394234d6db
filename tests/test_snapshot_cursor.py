"""A bus reads the log exactly once; for the store alone see `StoreContract` and the model of the log."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import DomainEvent, EventBus
from whereupon.contract import append

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class StockCounted(DomainEvent):
    number: int


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    bus = EventBus(database_url, create_tables=True, poll_interval=0.02)
    yield bus
    await bus.engine.dispose()


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
