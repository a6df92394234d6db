"""`whereupon worker` as a real process: killed, told to stop, started before its database."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.proxy import Proxy
from whereupon import DomainEvent, EventBus

pytestmark = [pytest.mark.integration, pytest.mark.slow]

APP = """
import asyncio, os
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from whereupon import DomainEvent, EventBus, EventContext, Retry

bus = EventBus(
    os.environ["DATABASE"], lease=1, in_flight=10, poll_interval=0.05, drain_timeout=float(os.environ.get("DRAIN", 10)),
)

class TicketSold(DomainEvent):
    number: int

if os.environ["SERVE"] == "transactional":
    @bus.subscribe(TicketSold, name="tickets")
    async def tickets(event: TicketSold, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO effect VALUES (:number, '')"), {"number": event.number})
        await asyncio.sleep(0.005)
elif os.environ["SERVE"] == "durable":
    @bus.subscribe(TicketSold, name="tickets", concurrency=50)
    async def tickets(event: TicketSold, context: EventContext) -> None:
        async with bus.engine.begin() as connection:
            await connection.execute(
                text("INSERT INTO effect VALUES (:number, :key)"),
                {"number": event.number, "key": context.idempotency_key},
            )
        await asyncio.sleep(0.02)
elif os.environ["SERVE"] == "slow":
    @bus.subscribe(TicketSold, name="tickets")
    async def tickets(event: TicketSold, session: AsyncSession) -> None:
        print("started", flush=True)
        await asyncio.sleep(event.number)
        await session.execute(text("INSERT INTO effect VALUES (:number, '')"), {"number": event.number})
elif os.environ["SERVE"] == "deadly":
    @bus.subscribe(TicketSold, name="tickets", retry=Retry(max_attempts=3, first=0))
    async def tickets(event: TicketSold) -> None:
        await asyncio.sleep(1.6)
        os._exit(9)
"""


class TicketSold(DomainEvent):
    number: int


async def _nothing(event: TicketSold) -> None: ...


Starting = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    """The publisher's side: it delivers nothing itself."""
    bus = EventBus(database_url, create_tables=True, deliver=False)
    bus.subscribe(TicketSold, _nothing, name="tickets")
    await bus.create_tables()
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (number INTEGER NOT NULL, key TEXT NOT NULL)"))
    async with bus:
        yield bus


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starting]:
    """Start a worker process; what still runs at the end is killed."""
    (tmp_path / "shop.py").write_text(APP)
    running: list[subprocess.Popen[str]] = []

    def start(database: str, serve: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "whereupon.cli", "worker", "shop:bus"],
            cwd=tmp_path,
            env={**os.environ, "DATABASE": database, "SERVE": serve, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


async def sell(bus: EventBus, *numbers: int) -> list[TicketSold]:
    events = [TicketSold(number=number) for number in numbers]
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)
    return events


async def effects(bus: EventBus) -> Counter[tuple[int, str]]:
    async with bus.engine.connect() as connection:
        return Counter((row.number, row.key) for row in await connection.execute(text("SELECT * FROM effect")))


async def until(true: Callable[[], Awaitable[bool]], within: float) -> None:
    async with asyncio.timeout(within):
        while not await true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def at_least(bus: EventBus, number: int, within: float = 20) -> None:
    async def enough() -> bool:
        return (await effects(bus)).total() >= number

    await until(enough, within)


def ended(process: subprocess.Popen[str], within: float) -> tuple[int, str]:
    """The exit code and stderr."""
    _, errors = process.communicate(timeout=within)
    return process.returncode, errors


async def test_effects_of_transactional_handlers_happen_once_though_workers_are_killed(
    bus: EventBus, start: Starting
) -> None:
    events = await sell(bus, *range(100))
    for round_ in range(2):
        worker = start(bus.engine.url.render_as_string(hide_password=False), "transactional")
        await at_least(bus, 30 * (round_ + 1))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    start(bus.engine.url.render_as_string(hide_password=False), "transactional")
    await bus.wait_settled(events, 30)
    assert await effects(bus) == Counter((number, "") for number in range(100))


async def test_a_kill_repeats_no_more_than_what_was_in_flight_under_the_same_key(
    bus: EventBus, start: Starting
) -> None:
    events = await sell(bus, *range(150))
    kills = 2
    for round_ in range(kills):
        worker = start(bus.engine.url.render_as_string(hide_password=False), "durable")
        await at_least(bus, 60 * (round_ + 1))
        await asyncio.sleep(random.uniform(0, 0.05))
        worker.send_signal(signal.SIGKILL)
        worker.wait()
    start(bus.engine.url.render_as_string(hide_password=False), "durable")
    await bus.wait_settled(events, 30)
    found = await effects(bus)
    assert found.keys() == {(event.number, f"{event.event_id}:tickets") for event in events}
    assert found.total() - len(events) <= kills * 10  # in_flight of the worker


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)  # on SQLite it may stand still with the lock
async def test_a_worker_that_stood_still_repeats_no_more_than_what_it_had_in_flight(
    bus: EventBus, start: Starting
) -> None:
    url = bus.engine.url.render_as_string(hide_password=False)
    events = await sell(bus, *range(400))
    still = start(url, "durable")
    await at_least(bus, 40)
    still.send_signal(signal.SIGSTOP)
    start(url, "durable")
    await bus.wait_settled(events, 60)
    still.send_signal(signal.SIGCONT)
    await asyncio.sleep(2)
    found = await effects(bus)
    assert len(found) == len(events)
    assert found.total() - len(events) <= 10  # in_flight of the worker


async def test_of_two_processes_one_takes_over_when_the_other_is_killed(bus: EventBus, start: Starting) -> None:
    url = bus.engine.url.render_as_string(hide_password=False)
    events = await sell(bus, *range(20))
    pair = [start(url, "transactional") for _ in range(2)]
    await bus.wait_settled(events, 20)
    for victim in pair:
        # whichever of the two holds the lease: both are killed, one after the other
        victim.send_signal(signal.SIGKILL)
        victim.wait()
        if victim is pair[0]:
            began = time.monotonic()
            await bus.wait_settled(await sell(bus, 100), 10)
            assert time.monotonic() - began < 1 + 2  # the lease, and room for a slow machine
    assert set((await effects(bus)).values()) == {1}


async def test_sigterm_lets_handlers_end_and_exits_with_0(bus: EventBus, start: Starting) -> None:
    worker = start(bus.engine.url.render_as_string(hide_password=False), "slow")
    await sell(bus, 1)
    assert worker.stdout is not None
    await asyncio.to_thread(worker.stdout.readline)
    worker.terminate()
    code, errors = await asyncio.to_thread(ended, worker, 10)
    assert (code, await effects(bus)) == (0, Counter({(1, ""): 1})), errors
    assert "stopping" in errors
    assert "Traceback" not in errors


async def test_sigterm_cuts_short_what_does_not_end_within_the_drain_timeout(bus: EventBus, start: Starting) -> None:
    worker = start(bus.engine.url.render_as_string(hide_password=False), "slow", DRAIN="0.5")
    [event] = await sell(bus, 600)
    assert worker.stdout is not None
    await asyncio.to_thread(worker.stdout.readline)

    async def runs_long() -> bool:
        return [state.state for state in await bus.deliveries(event.event_id)] == ["running"]

    await until(runs_long, 10)
    worker.terminate()
    began = time.monotonic()
    code, errors = await asyncio.to_thread(ended, worker, 15)
    assert code == 0, errors
    assert time.monotonic() - began < 5
    [state] = await bus.deliveries(event.event_id)
    assert (state.state, state.attempts) == ("retrying", 0)


async def test_a_second_signal_ends_it_at_once(bus: EventBus, start: Starting) -> None:
    worker = start(bus.engine.url.render_as_string(hide_password=False), "slow", DRAIN="600")
    await sell(bus, 600)
    assert worker.stdout is not None
    assert worker.stderr is not None
    await asyncio.to_thread(worker.stdout.readline)
    worker.terminate()
    while "stopping" not in await asyncio.to_thread(worker.stderr.readline):
        pass
    worker.terminate()
    code, _ = await asyncio.to_thread(ended, worker, 5)
    assert code == 128 + signal.SIGTERM


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_handler_that_always_kills_its_process_ends_as_a_dead_letter(bus: EventBus, start: Starting) -> None:
    url = bus.engine.url.render_as_string(hide_password=False)
    [event] = await sell(bus, 1)
    for _ in range(4):  # the first of them is blamed on nobody: others may have run beside it
        code, errors = await asyncio.to_thread(ended, start(url, "deadly"), 20)
        assert code == 9, errors
    start(url, "deadly")
    await bus.wait_settled([event], 15)
    [state] = await bus.deliveries(event.event_id)
    assert (state.state, state.attempts) == ("dead", 3)
    assert "crash loop" in str(state.error)


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_worker_waits_for_its_database_and_survives_an_outage(bus: EventBus, start: Starting) -> None:
    proxy = Proxy(bus.engine.url.render_as_string(hide_password=False))
    worker = start(proxy.url, "transactional")
    assert worker.stderr is not None
    said = await asyncio.to_thread(worker.stderr.readline)
    assert "can't use the database" in said
    assert "Trying again in 0.5 s" in said
    await proxy.open()
    await bus.wait_settled(await sell(bus, *range(30)), 20)
    await proxy.close()
    events = await sell(bus, *range(30, 60))
    await asyncio.sleep(1)
    await proxy.open()
    await bus.wait_settled(events, 20)
    assert await effects(bus) == Counter((number, "") for number in range(60))
    worker.terminate()
    code, errors = await asyncio.to_thread(ended, worker, 15)
    assert code == 0, errors
    assert "worker_database_unavailable" in errors
    await proxy.close()


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
async def test_a_worker_that_waits_for_its_database_can_be_stopped(bus: EventBus, start: Starting) -> None:
    with closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        nowhere = f"postgresql+asyncpg://postgres@127.0.0.1:{unused.getsockname()[1]}/nowhere"
        worker = start(nowhere, "transactional")
        assert worker.stderr is not None
        assert "nowhere" in await asyncio.to_thread(worker.stderr.readline)
        worker.terminate()
        code, errors = await asyncio.to_thread(ended, worker, 10)
    assert code == 0, errors
    assert "Traceback" not in errors


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
async def test_a_worker_outlasts_another_process_that_locks_the_file(bus: EventBus, start: Starting) -> None:
    start(bus.engine.url.render_as_string(hide_password=False), "transactional")
    events = await sell(bus, *range(40))
    path, release = bus.engine.url.database or "", threading.Event()

    def lock() -> None:
        with closing(sqlite3.connect(path, isolation_level=None, timeout=20)) as connection:
            connection.execute("BEGIN IMMEDIATE")
            release.wait(1.5)
            connection.execute("ROLLBACK")

    await asyncio.to_thread(lock)
    await bus.wait_settled(events, 20)
    assert await effects(bus) == Counter((number, "") for number in range(40))


STUCK = """
import os, time
import whereupon.lease
from whereupon import DomainEvent, EventBus

whereupon.lease.GRACE = 1.0
bus = EventBus(os.environ["DATABASE"], lease=1, poll_interval=0.05)

class TicketSold(DomainEvent):
    number: int

@bus.subscribe(TicketSold, name="tickets", timeout=0.5)
async def tickets(event: TicketSold) -> None:
    if os.environ.get("STICK"):
        while True:
            time.sleep(1)
    async with bus.engine.begin() as connection:
        await connection.exec_driver_sql(f"INSERT INTO effect VALUES ({event.number}, '')")
"""


async def test_a_process_that_is_stuck_for_longer_than_any_handler_may_take_ends_itself(
    bus: EventBus, database_url: str, tmp_path: Path
) -> None:
    """Interleaving 5: the thread that renews its lease would keep it alive for ever."""
    (tmp_path / "stuck.py").write_text(STUCK)

    def start(**environment: str) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-m", "whereupon.cli", "worker", "stuck:bus"],
            cwd=tmp_path,
            env={**os.environ, "DATABASE": database_url, **environment},
            stderr=subprocess.PIPE,
            text=True,
        )

    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(TicketSold(number=7), session=session)
    stuck = start(STICK="1")
    try:
        _, said = await asyncio.to_thread(stuck.communicate, timeout=60)
    finally:
        stuck.kill()
    assert stuck.returncode == 70
    assert "the event loop has not moved" in said
    assert 'stuck.py", line' in said, "it writes down where it was"
    other = start()
    try:
        async with asyncio.timeout(60):
            while True:
                async with bus.engine.connect() as connection:
                    if list(await connection.scalars(text("SELECT number FROM effect"))) == [7]:
                        break
                await asyncio.sleep(0.05)
    finally:
        other.terminate()
        await asyncio.to_thread(other.communicate, timeout=30)
