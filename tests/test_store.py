"""The store against a database that is full, damaged or away; and what its statements cost."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import event as sqlalchemy_events
from sqlalchemy import text
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.log_records import Records
from whereupon import DomainEvent, EventBus, Retry
from whereupon.errors import DatabaseUnavailableError

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class MeterReadingNoted(DomainEvent):
    number: int
    text: str = ""


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    bus = EventBus(database_url, logger=Records(), create_tables=True, poll_interval=0.05)
    yield bus
    await bus.engine.dispose()


async def note(bus: EventBus, *events: MeterReadingNoted) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)


async def count(bus: EventBus, table: str) -> Any:
    async with bus.engine.connect() as connection:
        return await connection.scalar(text(f"SELECT count(*) FROM {table}"))


class Disk:
    """How much room the pages of an SQLite file have, from the next connection's use on."""

    def __init__(self, bus: EventBus) -> None:
        self.pages = 1_000_000
        sqlalchemy_events.listen(bus.engine.sync_engine, "checkout", self._limit)

    def _limit(self, connection: Any, record: object, proxy: object) -> None:
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA max_page_count = {self.pages}")
        cursor.close()


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_publishing_on_a_full_disk_raises_and_leaves_nothing(bus: EventBus) -> None:
    async def ignore(event: MeterReadingNoted) -> None: ...

    bus.subscribe(MeterReadingNoted, ignore, name="notes")
    await note(bus, MeterReadingNoted(number=1))
    disk = Disk(bus)
    disk.pages = 1  # SQLite takes what the file has already
    with pytest.raises(OperationalError, match="full"):
        await note(bus, *(MeterReadingNoted(number=number, text="x" * 4000) for number in range(50)))
    assert await count(bus, "whereupon_log") == 1
    disk.pages = 1_000_000
    await note(bus, MeterReadingNoted(number=2))
    assert await count(bus, "whereupon_log") == 2


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_worker_on_a_full_disk_goes_on_when_there_is_room(bus: EventBus) -> None:
    calls = Counter[int]()
    disk = Disk(bus)

    @bus.subscribe(MeterReadingNoted, name="notes", retry=Retry(max_attempts=1))
    async def handler(event: MeterReadingNoted) -> None:
        disk.pages = 1
        calls[event.number] += 1
        if event.number % 2:
            raise RuntimeError("x" * 4000)  # its dead letter takes a page at least

    events = [MeterReadingNoted(number=number, text="y" * 3000) for number in range(10)]
    async with bus:
        await note(bus, *events)
        logger: Any = bus._raw_logger
        async with asyncio.timeout(10):
            while not logger.named("worker_database_unavailable"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert "full" in logger.named("worker_database_unavailable")[0]["error_message"]
        disk.pages = 1_000_000
        await bus.wait_settled(events, 20)
        states = {state.event_id: state.state for state in await bus.deliveries(*(e.event_id for e in events))}
    assert calls == dict.fromkeys(range(10), 1)
    assert [states[event.event_id] for event in events] == ["succeeded", "dead"] * 5


async def test_a_missing_table_is_named_as_such_and_waited_for(bus: EventBus) -> None:
    heard: list[int] = []

    @bus.subscribe(MeterReadingNoted, name="notes")
    async def handler(event: MeterReadingNoted) -> None:
        heard.append(event.number)

    logger: Any = bus._raw_logger
    async with bus:
        await bus.drain(10)
        async with bus.engine.begin() as connection:
            await connection.execute(text("ALTER TABLE whereupon_history RENAME TO away"))
        events = [MeterReadingNoted(number=1)]
        await note(bus, *events)
        async with asyncio.timeout(10):
            while not logger.named("worker_database_refused"):  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with bus.engine.begin() as connection:
            await connection.execute(text("ALTER TABLE away RENAME TO whereupon_history"))
        await bus.wait_settled(events, 20)
    [said, *_] = logger.named("worker_database_refused")
    assert "whereupon_history" in said["error_message"]
    assert "whereupon db status" in said["error_message"]
    assert heard == [1]


async def test_a_database_that_is_away_at_the_start_is_named_without_its_password() -> None:
    bus = EventBus("postgresql+asyncpg://postgres:secret@127.0.0.1:1/app")
    with pytest.raises(
        DatabaseUnavailableError, match=r"can't use the database .*postgres:\*\*\*@127.0.0.1:1/app"
    ) as caught:
        await bus.start()
    assert "secret" not in str(caught.value)
    await bus.engine.dispose()


async def test_many_deliveries_can_be_settled_at_once(bus: EventBus) -> None:
    """More than a statement of the database takes as separate arguments."""
    go_on = asyncio.Event()
    heard = Counter[int]()

    @bus.subscribe(MeterReadingNoted, name="notes", concurrency=100)
    async def handler(event: MeterReadingNoted) -> None:
        await go_on.wait()
        heard[event.number] += 1

    events = [MeterReadingNoted(number=number) for number in range(100)]
    async with bus:
        await note(bus, *events)
        async with asyncio.timeout(10):
            while len(_running(bus)) < 100:  # noqa: ASYNC110
                await asyncio.sleep(0.01)
        go_on.set()
        await bus.wait_settled(events, 5)
    assert heard == Counter(range(100))


async def test_an_event_of_another_process_is_noticed_within_a_poll(database_url: str, bus: EventBus) -> None:
    heard = asyncio.Event()

    @bus.subscribe(MeterReadingNoted, name="notes")
    async def handler(event: MeterReadingNoted) -> None:
        heard.set()

    other = EventBus(database_url, deliver=False)
    async with bus, other:
        await bus.drain(10)
        await asyncio.sleep(0.2)
        await note(other, MeterReadingNoted(number=1))
        await asyncio.wait_for(heard.wait(), 2)


async def test_a_time_that_somebody_wrote_with_its_zone_is_read_as_that(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url, create_tables=True, deliver=False)
    async with bus:
        await note(bus, *[MeterReadingNoted(number=number) for number in range(2)])
        async with bus.engine.begin() as connection:
            await connection.execute(
                text("UPDATE whereupon_log SET recorded_at = '2024-01-01 00:00:00+02:00' WHERE position = 1")
            )
            await connection.execute(
                text("UPDATE whereupon_log SET recorded_at = '2024-01-01 00:00:00' WHERE position = 2")
            )
        page = await bus._store.read(0, None, 10)
    await bus.engine.dispose()
    assert [row.recorded_at for row in page.rows] == [
        datetime(2023, 12, 31, 22, tzinfo=UTC),
        datetime(2024, 1, 1, tzinfo=UTC),
    ]


async def test_a_worker_of_which_a_statement_is_refused_tells_no_values(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url, create_tables=True)
    async with bus, bus._store.reading() as connection:
        with pytest.raises(OperationalError) as refused:
            await bus._store._ask(connection, "SELECT ? FROM nowhere", ("something secret",))  # type: ignore[attr-defined]
    await bus.engine.dispose()
    assert "SELECT ? FROM nowhere" in str(refused.value)
    assert "something secret" not in str(refused.value)


def _running(bus: EventBus) -> Any:
    lanes = bus._worker.lanes.values() if bus._worker is not None else ()
    return [delivery for lane in lanes for delivery in lane.active]
