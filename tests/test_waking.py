"""Workers hear of what other processes have committed; whoever does not hear it finds it by polling."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine, create_engine, text
from sqlalchemy import event as sqlalchemy_events
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.util import await_only

from tests.log_records import Records
from whereupon import DomainEvent, EventBus, Retry
from whereupon.bell import payload_of, types_in

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class BellRung(DomainEvent):
    number: int


class GateOpened(DomainEvent):
    number: int


async def until(true: Callable[[], object], within: float = 20.0) -> None:
    async with asyncio.timeout(within):
        while not true():  # noqa: ASYNC110
            await asyncio.sleep(0.01)


async def publish(bus: EventBus, *events: DomainEvent) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)


def hears(bus: EventBus) -> bool:
    return bus._listener is not None and bus._listener.hears


async def _nothing(event: BellRung) -> None: ...


@pytest.fixture(params=["asyncpg", "psycopg"])
def url(request: pytest.FixtureRequest, postgres_url: str) -> str:
    shown = make_url(postgres_url).set(drivername=f"postgresql+{request.param}")
    return shown.render_as_string(hide_password=False)


@pytest.fixture
async def publisher(url: str) -> AsyncIterator[EventBus]:
    """A bus as in a web process: it is not entered, and delivers nothing."""
    bus = EventBus(url, create_tables=True, deliver=False)
    bus.subscribe(BellRung, _nothing, name="bells")
    await bus.create_tables()
    yield bus
    await bus.close()


def deaf_for_long(url: str, **options: Any) -> EventBus:
    """A worker that would poll once in ten minutes: what it delivers before, it was woken for."""
    return EventBus(url, poll_interval=600, **options)


async def test_a_worker_hears_of_what_another_bus_has_committed(url: str, publisher: EventBus) -> None:
    worker = deaf_for_long(url)
    called: list[int] = []

    @worker.subscribe(BellRung, name="bells")
    async def handler(event: BellRung) -> None:
        called.append(event.number)

    async with worker:
        await until(lambda: hears(worker))
        for number in range(30):
            await publish(publisher, BellRung(number=number))
        await until(lambda: len(called) == 30)
    assert sorted(called) == list(range(30))


async def test_what_was_committed_while_nobody_listened_is_found_once_somebody_does(
    url: str, publisher: EventBus
) -> None:
    worker = deaf_for_long(url)
    called: list[int] = []

    @worker.subscribe(BellRung, name="bells")
    async def handler(event: BellRung) -> None:
        called.append(event.number)

    async with worker:
        await until(lambda: hears(worker))
        publisher._ringer = None  # as of a process that ended right after its commit
        await publish(publisher, BellRung(number=1))
        await terminate_listeners(publisher)
        await until(lambda: called == [1])


async def test_commits_in_quick_succession_are_told_of_together(url: str, publisher: EventBus) -> None:
    told: list[frozenset[str] | None] = []
    worker = deaf_for_long(url)
    worker.subscribe(BellRung, _nothing, name="bells")
    await publish(publisher, BellRung(number=1))
    ringer = publisher._ringer
    assert ringer is not None
    async with worker:
        await until(lambda: hears(worker))
        listener = worker._listener
        assert listener is not None
        listener._on_ring = told.append
        for number in range(20):
            ringer.ring({"BellRung", f"Bell{number}"})
        await until(lambda: told)
        for number in range(20, 40):
            ringer.ring({f"Bell{number}"})
        await until(lambda: len(told) == 2)
        await asyncio.sleep(0.1)
    assert told == [
        frozenset({"BellRung", *(f"Bell{number}" for number in range(20))}),
        frozenset(f"Bell{number}" for number in range(20, 40)),
    ]


async def test_closing_a_bus_sends_what_it_has_not_told_yet(url: str, publisher: EventBus) -> None:
    worker = deaf_for_long(url)
    called: list[int] = []

    @worker.subscribe(BellRung, name="bells")
    async def handler(event: BellRung) -> None:
        called.append(event.number)

    async with worker:
        await until(lambda: hears(worker))
        await publish(publisher, BellRung(number=1))
        await publish(publisher, BellRung(number=2))
        await publisher.close()
        await until(lambda: len(called) == 2)


async def test_a_worker_is_not_woken_for_types_that_it_does_not_hear(url: str, publisher: EventBus) -> None:
    worker = deaf_for_long(url)
    worker.subscribe(BellRung, _nothing, name="bells")
    publisher.subscribe(GateOpened, _door, name="doors")
    told: list[frozenset[str] | None] = []
    async with worker:
        await until(lambda: hears(worker))
        await worker.drain(20)
        await asyncio.sleep(0.2)  # for lanes that come together, and look then
        listener = worker._listener
        assert listener is not None
        assert worker._worker is not None
        wake, looks = listener._on_ring, worker._worker._looks

        def on_ring(types: frozenset[str] | None) -> None:
            told.append(types)
            wake(types)

        listener._on_ring = on_ring
        await publish(publisher, GateOpened(number=1))
        await until(lambda: told == [frozenset({"GateOpened"})])
        assert worker._worker._looks == looks
        await publish(publisher, BellRung(number=1))
        await until(lambda: len(told) == 2)
        assert worker._worker._looks > looks


async def _door(event: GateOpened) -> None: ...


async def test_a_lone_worker_that_publishes_itself_notifies_nobody(url: str, publisher: EventBus) -> None:
    """Whoever would hear it is woken directly; with a second worker there is somebody to be told."""
    first, second = deaf_for_long(url), deaf_for_long(url)
    called: Counter[int] = Counter()
    for bus in (first, second):

        @bus.subscribe(BellRung, name="bells", lanes=4)
        async def handler(event: BellRung) -> None:
            called[event.number] += 1

    async with first:
        await until(lambda: hears(first))
        worker = first._worker
        assert worker is not None
        await until(lambda: len(worker.lanes) == 4)
        await publish(first, BellRung(number=1))
        await until(lambda: called[1])
        assert first._ringer is not None
        assert first._ringer._task is None
        async with second:
            other = second._worker
            assert other is not None
            worker._tend_now.set()  # it polls once in ten minutes
            await until(lambda: worker.others_wait({"BellRung"}))
            await until(lambda: hears(second) and len(other.lanes) == 2)
            for number in range(2, 40):
                await publish(first, BellRung(number=number))
            await until(lambda: len(called) == 39)
    assert set(called.values()) == {1}


@pytest.mark.parametrize("case", ["gone", "refused"])
async def test_a_notification_that_fails_fails_no_publish(
    url: str, publisher: EventBus, case: str, caplog: pytest.LogCaptureFixture
) -> None:
    await publish(publisher, BellRung(number=1))
    ringer = publisher._ringer
    assert ringer is not None
    await ringer.flush()
    if case == "refused":
        ringer.channel = 'no"channel'
    else:
        async with AsyncSession(publisher.engine) as session, session.begin():
            await publisher.publish(BellRung(number=2), session=session)
            await session.flush()
        await terminate_others(publisher)
    with caplog.at_level("DEBUG", logger="whereupon"):
        await publish(publisher, BellRung(number=3)) if case == "refused" else None
        ringer.ring({"BellRung"})
        await ringer.flush()
    assert not [record for record in caplog.records if record.levelname in ("WARNING", "ERROR")]
    assert ("no worker was notified" in caplog.text) == (case == "refused")
    async with AsyncSession(publisher.engine) as session:
        logged = await session.scalar(text("SELECT count(*) FROM whereupon_log"))
    assert logged == 2


async def terminate_listeners(bus: EventBus) -> int:
    return await _terminate(bus, "query LIKE 'LISTEN%'")


async def terminate_others(bus: EventBus) -> int:
    return await _terminate(bus, "true")


async def _terminate(bus: EventBus, which: str) -> int:
    """End sessions of this database, through a connection that is none of them."""
    url = make_url(str(bus.engine.url.render_as_string(hide_password=False))).set(drivername="postgresql+psycopg")

    def end() -> int:
        engine = create_engine(url)
        with engine.connect() as connection:
            ended = connection.scalar(
                text(
                    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
                    f"WHERE datname = current_database() AND pid <> pg_backend_pid() AND {which}"
                )
            )
        engine.dispose()
        return int(ended or 0)

    return await asyncio.to_thread(end)


@pytest.mark.slow
async def test_a_listener_that_is_cut_off_under_load_comes_back_and_nothing_is_lost(
    url: str, publisher: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    logs = Records()
    worker = EventBus(url, logger=logs, poll_interval=0.2)
    called: Counter[int] = Counter()

    @worker.subscribe(BellRung, name="bells")
    async def handler(event: BellRung) -> None:
        called[event.number] += 1

    cut = 0
    async with worker:
        await until(lambda: hears(worker))
        for number in range(300):
            await publish(publisher, BellRung(number=number))
            if number % 75 == 50:
                cut += await terminate_listeners(publisher)
                await until(lambda: not hears(worker))
                if number > 100:
                    await until(lambda: hears(worker))
        await until(lambda: len(called) == 300)
        await until(lambda: hears(worker))
        worker._poll_interval = 600
    assert cut >= 3
    assert called == Counter(range(300))
    lost, back = logs.named("listener_lost"), logs.named("listener_back")
    assert 1 <= len(back) <= len(lost) <= cut


async def test_a_listener_that_no_longer_hears_is_made_anew(
    url: str, publisher: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is up and answers; but nothing comes through it, as after a router has forgotten it."""
    monkeypatch.setattr("whereupon.bell.SILENCE", 0.3)
    monkeypatch.setattr("whereupon.bell.PATIENCE", 0.5)
    logs = Records()
    worker = deaf_for_long(url, logger=logs)
    called: list[int] = []

    @worker.subscribe(BellRung, name="bells")
    async def handler(event: BellRung) -> None:
        called.append(event.number)

    async with worker:
        await until(lambda: hears(worker))
        await publish(publisher, BellRung(number=1))
        await until(lambda: called == [1])
        assert worker._ringer is not None
        assert publisher._ringer is not None
        worker._ringer.channel = publisher._ringer.channel = "whereupon_elsewhere"  # what it listens to stays silent
        await until(lambda: not hears(worker))
        await until(lambda: hears(worker))
        await publish(publisher, BellRung(number=2))
        await until(lambda: called == [1, 2])
    assert len(logs.named("listener_lost")) == len(logs.named("listener_back")) == 1


async def test_a_worker_that_does_not_listen_finds_events_by_polling(database_url: str) -> None:
    publisher = EventBus(database_url, create_tables=True, deliver=False)
    worker = EventBus(database_url, create_tables=True, poll_interval=0.05)
    called: list[int] = []
    publisher.subscribe(BellRung, _nothing, name="bells")

    @worker.subscribe(BellRung, name="bells")
    async def handler(event: BellRung) -> None:
        called.append(event.number)

    worker._ringer = None
    async with publisher, worker:
        assert worker._listener is None
        for number in range(5):
            await publish(publisher, BellRung(number=number))
            await until(lambda number=number: called == list(range(number + 1)))  # type: ignore[misc]


@contextmanager
def statements() -> Iterator[list[str]]:
    """What SQLAlchemy sends from now on, through any engine."""
    sent: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        sent.append(statement)

    sqlalchemy_events.listen(Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sqlalchemy_events.remove(Engine, "before_cursor_execute", note)


@pytest.mark.parametrize("workers", [1, 2])
async def test_an_idle_worker_sends_at_most_one_statement_per_poll(database_url: str, workers: int) -> None:
    """On SQLite that is a PRAGMA, past SQLAlchemy; and where there are several, a look each second who is alive."""
    sqlite = database_url.startswith("sqlite")
    buses = [EventBus(database_url, create_tables=True, poll_interval=0.05, lease=60) for _ in range(workers)]
    polls, looks = Counter[int](), Counter[int]()
    for bus in buses:
        bus.subscribe(BellRung, _nothing, name="bells")
        await bus.start()
    try:
        await publish(buses[0], BellRung(number=1))
        await asyncio.sleep(1.5)  # until lanes are dealt out and cursors are where they stay
        for number, bus in enumerate(buses):
            pulse = bus._store.pulse

            async def counted(*arguments: Any, number: int = number, pulse: Any = pulse) -> Any:
                polls[number] += 1
                return await pulse(*arguments)

            bus._store.pulse = counted  # type: ignore[method-assign, assignment]
            assert bus._worker is not None
            looks[number] = bus._worker._looks
        with statements() as sent:
            polled = 0 if sqlite else 1
            await until(lambda: len(polls) == workers and min(polls.values()) >= 20)
        if sqlite and workers > 1:
            sent = [statement for statement in sent if "whereupon_process" not in statement]
        for number, bus in enumerate(buses):
            assert bus._worker is not None
            assert bus._worker._looks == looks[number], "it read the log for nothing"
        assert len(sent) <= polled * polls.total(), sent
    finally:
        for bus in buses:
            await bus.close()


def test_a_payload_says_which_types_were_committed_or_nothing_where_that_would_not_fit() -> None:
    told = frozenset({"UserRegistered", "bank.account-closed:2"})
    assert types_in(payload_of(told)) == told
    assert types_in(payload_of(None)) is None
    assert payload_of({"it's"}) == payload_of({"a,b"}) == payload_of({"Größe"}) == ""
    assert payload_of({f"Event{number}" for number in range(2000)}) == ""
    assert len(payload_of({f"Event{number}" for number in range(700)})) < 8000


STOPPING = """
import asyncio, os, signal
from sqlalchemy import event, text
from sqlalchemy.ext.asyncio import AsyncSession
from whereupon import DomainEvent, EventBus

bus = EventBus(os.environ["DATABASE"], lease=2, poll_interval=0.05)
handled = asyncio.Event()

class BellRung(DomainEvent):
    number: int

@bus.subscribe(BellRung, name="bells", lanes=1)
async def bells(happened: BellRung, session: AsyncSession) -> None:
    values = {"number": happened.number, "pid": os.getpid()}
    await session.execute(text("INSERT INTO effect VALUES (:number, :pid)"), values)
    handled.set()

if os.environ.get("STOP"):
    @event.listens_for(bus.engine.sync_engine, "commit")
    def before_commit(connection):
        if handled.is_set():
            handled.clear()
            os.kill(os.getpid(), signal.SIGSTOP)
"""


@pytest.mark.slow
async def test_a_worker_stopped_between_its_fenced_update_and_its_commit_does_not_keep_the_lane(
    postgres_url: str, tmp_path: Path
) -> None:
    (tmp_path / "tower.py").write_text(STOPPING)
    publisher = EventBus(postgres_url, create_tables=True, deliver=False, lease=2)
    publisher.subscribe(BellRung, _nothing, name="bells", lanes=1)
    running: list[subprocess.Popen[bytes]] = []

    def start(**environment: str) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-m", "whereupon.cli", "worker", "tower:bus"],
            cwd=tmp_path,
            env={**os.environ, "DATABASE": postgres_url, **environment},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        running.append(process)
        return process

    async def scalar(statement: str) -> Any:
        async with publisher.engine.begin() as connection:
            return await connection.scalar(text(statement))

    async def becomes(statement: str, value: Any, within: float = 40) -> None:
        async with asyncio.timeout(within):
            while await scalar(statement) != value:  # noqa: ASYNC110
                await asyncio.sleep(0.05)

    free = "SELECT count(*) FROM (SELECT 1 FROM whereupon_cursor FOR UPDATE SKIP LOCKED) c"
    try:
        async with publisher:
            async with publisher.engine.begin() as connection:
                await connection.execute(text("CREATE TABLE effect (number INTEGER NOT NULL, pid INTEGER NOT NULL)"))
            stopped = start(STOP="1")
            await becomes("SELECT count(*) FROM whereupon_cursor WHERE owner IS NOT NULL", 1)
            await publish(publisher, BellRung(number=1))
            await until(lambda: Path(f"/proc/{stopped.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T", 40)
            assert await scalar(free) == 0, "it was to be stopped while it held the cursor's row"
            other = start()
            await becomes("SELECT count(*) FROM effect", 1)  # a second or two after the lease; else hours
            assert await scalar("SELECT pid FROM effect") == other.pid
            token = await scalar("SELECT token FROM whereupon_cursor")
            stopped.send_signal(signal.SIGCONT)
            await publish(publisher, *(BellRung(number=number) for number in range(2, 12)))
            await becomes("SELECT count(*) FROM effect", 11)
            await becomes("SELECT count(*) FROM whereupon_exception", 0)
            async with publisher.engine.connect() as connection:
                assert Counter((await connection.scalars(text("SELECT number FROM effect"))).all()) == Counter(
                    range(1, 12)
                )
            assert await scalar("SELECT token FROM whereupon_cursor") >= token
    finally:
        for process in running:
            process.kill()
            process.wait()


async def test_every_transaction_of_a_worker_may_idle_for_less_than_its_lease(postgres_url: str) -> None:
    bus = EventBus(postgres_url, create_tables=True, lease=9)
    bus.subscribe(BellRung, _nothing, name="bells", retry=Retry(first=0))
    async with bus:
        async with bus._store.writing() as connection:
            limit = await connection.scalar(
                text("SELECT setting FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'")
            )
            assert limit == "6000"
        async with bus._store.reading() as connection:
            limit = await connection.scalar(
                text("SELECT setting FROM pg_settings WHERE name = 'idle_in_transaction_session_timeout'")
            )
            assert limit == "0"


class LampLit(DomainEvent):
    number: int


async def test_a_notification_leaves_no_connection_of_an_engine_disposed_of_while_it_connects(
    postgres_url: str,
) -> None:
    bus = EventBus(postgres_url, create_tables=True)
    armed = False

    @sqlalchemy_events.listens_for(bus.engine.sync_engine, "connect")
    def dispose(*_: object) -> None:
        nonlocal armed
        if armed:
            armed = False
            await_only(bus.engine.dispose())

    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(LampLit(number=1), session=session)
    await bus.close()
    await bus.engine.dispose()
    assert bus._ringer is not None
    armed = True
    await bus._ringer.prove()
    assert not armed
    other = create_async_engine(postgres_url)
    async with other.connect() as connection:
        others = "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid()"

        async def nobody() -> bool:
            return bool(await connection.scalar(text(others)) == 0)

        async with asyncio.timeout(5):
            while not await nobody():  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    await other.dispose()
