"""Traps that other outboxes fell into, as far as no other test is about them; docs/guarantees.md has the whole list."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from sqlalchemy import select, text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.log_records import Records
from whereupon import DomainEvent, EventBus, Retry
from whereupon.schema import process

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class TrapSprung(DomainEvent):
    number: int


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    bus = EventBus(database_url, create_tables=True, poll_interval=0.05, lease=1, logger=Records())
    await bus.create_tables()
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (number INTEGER NOT NULL)"))
    yield bus
    await bus.engine.dispose()


async def spring(bus: EventBus, *numbers: int) -> list[TrapSprung]:
    events = [TrapSprung(number=number) for number in numbers]
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)
    return events


async def effects(bus: EventBus) -> Counter[int]:
    async with bus.engine.connect() as connection:
        return Counter((await connection.scalars(text("SELECT number FROM effect"))).all())


async def test_a_bus_that_starts_again_is_another_worker(bus: EventBus) -> None:
    """Two processes of one host, or one that was restarted, must never be taken for each other."""

    async def handler(event: TrapSprung) -> None: ...

    bus.subscribe(TrapSprung, handler, name="traps")
    seen: list[set[object]] = []
    for _ in range(2):
        async with bus:
            await bus.drain(10)
            async with bus.engine.connect() as connection:
                seen.append(set(await connection.scalars(select(process.c.id))))
    assert [len(one) for one in seen] == [1, 1]
    assert seen[0].isdisjoint(seen[1])


async def test_a_lease_is_taken_though_its_thread_is_quicker_than_the_loop(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def handler(event: TrapSprung) -> None: ...

    bus.subscribe(TrapSprung, handler, name="traps")
    start = threading.Thread.start

    def start_and_wait(self: threading.Thread) -> None:
        start(self)
        if self.name == "whereupon-lease":
            time.sleep(1)  # as on a machine that is busy elsewhere

    monkeypatch.setattr(threading.Thread, "start", start_and_wait)
    async with bus:
        await bus.wait_settled(await spring(bus, 1), 20)


@pytest.mark.slow
async def test_a_handler_that_blocks_the_loop_for_longer_than_a_lease_loses_nothing(
    bus: EventBus, database_url: str
) -> None:
    """The lease is renewed from a thread: a rival finds nothing to take, and no effect is there twice."""
    rival = EventBus(database_url, poll_interval=0.05, lease=1)
    taken: list[int] = []

    @bus.subscribe(TrapSprung, name="traps", concurrency=1)
    async def blocks(event: TrapSprung, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": event.number})
        if event.number == 0 and not database_url.startswith("sqlite"):  # there it would hold the only write lock
            time.sleep(2.5)  # noqa: ASYNC251

    async def take(event: TrapSprung, session: AsyncSession) -> None:
        taken.append(event.number)

    rival.subscribe(TrapSprung, take, name="traps")

    def look() -> list[bool]:
        async def alive() -> list[bool]:
            watching = EventBus(database_url, deliver=False)
            lanes = (await watching._store.layout(["traps"])).lanes
            await watching.engine.dispose()
            return [lane.alive for lane in lanes if lane.owner is not None]

        time.sleep(2.0)
        return asyncio.run(alive())

    async with bus:
        await bus.drain(10)
        looking = asyncio.get_running_loop().run_in_executor(None, look)
        events = await spring(bus, *range(5))
        held = await looking
        await bus.wait_settled(events, 20)
    assert held, "the lanes were still somebody's after two leases"
    assert all(held)
    assert taken == []
    assert await effects(bus) == Counter(range(5))
    await rival.engine.dispose()


async def test_a_failing_event_of_a_page_repeats_none_of_its_neighbours(bus: EventBus) -> None:
    calls = Counter[int]()

    @bus.subscribe(TrapSprung, name="outside", retry=Retry(max_attempts=3, first=0), concurrency=50)
    async def outside(event: TrapSprung) -> None:
        calls[event.number] += 1
        if event.number == 20:
            raise RuntimeError("one bad event")

    @bus.subscribe(TrapSprung, name="inside", retry=Retry(max_attempts=3, first=0), concurrency=5)
    async def inside(event: TrapSprung, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": event.number})
        if event.number == 20:
            raise RuntimeError("one bad event")

    async with bus:
        await spring(bus, *range(50))
        await bus.drain(30)
    assert calls == Counter({number: 3 if number == 20 else 1 for number in range(50)})
    assert await effects(bus) == Counter(number for number in range(50) if number != 20)


async def test_positions_are_never_used_again(bus: EventBus) -> None:
    """Were they, a cursor that stands behind a log that was pruned would pass over what is new."""

    async def handler(event: TrapSprung) -> None: ...

    bus.subscribe(TrapSprung, handler, name="traps")
    await spring(bus, *range(3))
    async with bus.engine.begin() as connection:
        before = await connection.scalar(text("SELECT max(position) FROM whereupon_log"))
        await connection.execute(text("DELETE FROM whereupon_log"))
    await spring(bus, 3)
    async with bus.engine.connect() as connection:
        assert (await connection.scalar(text("SELECT min(position) FROM whereupon_log")) or 0) > (before or 0)


UNDISPOSED = """
import asyncio, os
from sqlalchemy.ext.asyncio import AsyncSession
from whereupon import DomainEvent, EventBus

class TrapSprung(DomainEvent):
    number: int

bus = EventBus(os.environ["DATABASE"])

@bus.subscribe(TrapSprung)
async def handler(event: TrapSprung) -> None: ...

async def main():
    async with bus:
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(TrapSprung(number=1), session=session)
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(TrapSprung(number=2), session=session)

asyncio.run(main())
print("ended")
"""


def test_an_engine_that_nobody_disposed_of_keeps_no_process_alive(sqlite_url: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", UNDISPOSED], env={**os.environ, "DATABASE": sqlite_url},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (ran.returncode, ran.stdout.strip()) == (0, "ended"), ran.stderr


DEADLY = """
import os
from whereupon import DomainEvent, EventBus, Retry

bus = EventBus(os.environ["DATABASE"], lease=1, poll_interval=0.05)

class TrapSprung(DomainEvent):
    number: int

@bus.subscribe(TrapSprung, name="traps", retry=Retry(max_attempts=2, first=0))
async def traps(event: TrapSprung) -> None:
    if event.number == 3:
        os._exit(9)
"""


@pytest.mark.slow
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_of_a_page_only_the_one_that_kills_its_process_is_blamed(
    bus: EventBus, database_url: str, tmp_path: Path
) -> None:
    """What ran beside it is redone one at a time, and only an attempt that ran alone counts against it."""

    async def handler(event: TrapSprung) -> None: ...

    bus.subscribe(TrapSprung, handler, name="traps")
    events = await spring(bus, *range(8))
    (tmp_path / "deadly.py").write_text(DEADLY)
    environment = {**os.environ, "DATABASE": database_url}
    deaths = 0
    for _ in range(8):
        worker = started(tmp_path, environment)
        try:
            while worker.poll() is None and not await over(bus, events):  # noqa: ASYNC110
                await asyncio.sleep(0.1)
        finally:
            if worker.poll() is None:
                worker.terminate()
            _, errors = await asyncio.to_thread(worker.communicate, timeout=60)
        if worker.returncode == 0:
            break
        assert worker.returncode == 9, errors
        deaths += 1
    states = {state.event_id: state for state in await bus.deliveries(*(event.event_id for event in events))}
    assert [states[event.event_id].state for event in events] == ["succeeded"] * 3 + ["dead"] + ["succeeded"] * 4
    assert "crash loop" in str(states[events[3].event_id].error)
    assert deaths == 3, "once beside others, and twice alone"


def started(folder: Path, environment: dict[str, str]) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "whereupon.cli", "worker", "deadly:bus"]
    return subprocess.Popen(
        command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


async def over(bus: EventBus, events: list[TrapSprung]) -> bool:
    found = await bus.deliveries(*(event.event_id for event in events))
    return len(found) == len(events) and {state.state for state in found} <= {"succeeded", "dead"}
