"""Behind a pooler in transaction mode each transaction may be on another session of the server: nothing may be left in
one, and nothing expected of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from uuid import uuid4

import pytest
from sqlalchemy import NullPool, text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from tests.log_records import Records
from tests.pgbouncer import pooler
from whereupon import DomainEvent, EventBus, Retry

pytestmark = [pytest.mark.integration, pytest.mark.slow]

EVENTS = 300


class TicketStamped(DomainEvent):
    number: int


@pytest.fixture
def pooled_url(postgres_url: str, tmp_path: Path) -> Iterator[str]:
    """The test's database through a PgBouncer in transaction mode, with fewer sessions than there are clients."""
    with pooler(postgres_url, tmp_path) as url:
        yield url


def as_sqlalchemy_advises(url: str) -> AsyncEngine:
    return create_async_engine(
        url,
        poolclass=NullPool,
        connect_args={
            "statement_cache_size": 0,
            "prepared_statement_cache_size": 0,
            "prepared_statement_name_func": lambda: f"__asyncpg_{uuid4()}__",
        },
    )


async def tables(url: str) -> None:
    """Whereupon's own, and one that handlers write into; made past the pooler."""
    bus = EventBus(url, create_tables=True, deliver=False)
    bus.subscribe(TicketStamped, _nothing, name="calls")
    bus.subscribe(TicketStamped, _nothing, name="effects")
    async with bus, bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (number INTEGER NOT NULL)"))


async def _nothing(event: TicketStamped) -> None: ...


async def deliver_all(workers: list[EventBus], publishers: list[EventBus], direct: str) -> Counter[int]:
    """Publish under load, deliver by several workers; the calls of the handler without a session, by number."""
    calls: Counter[int] = Counter()
    tries: Counter[int] = Counter()
    for bus in workers:

        @bus.subscribe(TicketStamped, name="calls", concurrency=20)
        async def call(event: TicketStamped) -> None:
            calls[event.number] += 1

        @bus.subscribe(TicketStamped, name="effects", concurrency=4, retry=Retry(first=0, max_attempts=50))
        async def effect(event: TicketStamped, session: AsyncSession) -> None:
            await session.execute(text("INSERT INTO effect VALUES (:number)"), {"number": event.number})
            tries[event.number] += 1
            if event.number % 10 == 0 and tries[event.number] < 3:
                raise ValueError("not yet")

    for bus in publishers:
        bus.subscribe(TicketStamped, _nothing, name="calls")
        bus.subscribe(TicketStamped, _nothing, name="effects")
    reference = create_async_engine(direct)

    async def publish(bus: EventBus, numbers: range) -> None:
        for number in numbers:
            async with AsyncSession(bus.engine) as session, session.begin():
                await bus.publish(TicketStamped(number=number), session=session)

    try:
        async with AsyncExitStack() as stack:
            for bus in (*workers, *publishers):
                await stack.enter_async_context(bus)
            share = EVENTS // len(publishers)
            await asyncio.gather(*(publish(bus, range(i * share, (i + 1) * share)) for i, bus in enumerate(publishers)))
            async with asyncio.timeout(60):
                while True:
                    async with reference.connect() as connection:
                        effects = Counter((await connection.scalars(text("SELECT number FROM effect"))).all())
                    if effects.total() >= EVENTS and calls.total() >= EVENTS:
                        break
                    await asyncio.sleep(0.05)
            for bus in workers:
                await bus.drain(30)
        async with reference.connect() as connection:
            effects = Counter((await connection.scalars(text("SELECT number FROM effect"))).all())
            left = await connection.scalar(text("SELECT count(*) FROM whereupon_exception"))
    finally:
        await reference.dispose()
        for bus in (*workers, *publishers):
            await bus.engine.dispose()
    assert effects == Counter(range(EVENTS))
    assert left == 0
    return calls


def own_engine(pooled: str, direct: str, logger: Records, deliver: bool) -> EventBus:
    return EventBus(pooled, listen_url=direct, logger=logger, deliver=deliver)


def with_psycopg(pooled: str, direct: str, logger: Records, deliver: bool) -> EventBus:
    url = make_url(pooled).set(drivername="postgresql+psycopg")
    return EventBus(url, listen_url=direct, logger=logger, deliver=deliver)


def advised_engine(pooled: str, direct: str, logger: Records, deliver: bool) -> EventBus:
    return EventBus(as_sqlalchemy_advises(pooled), listen_url=direct, logger=logger, deliver=deliver)


def advised_engine_that_polls(pooled: str, direct: str, logger: Records, deliver: bool) -> EventBus:
    return EventBus(as_sqlalchemy_advises(pooled), logger=logger, deliver=deliver, poll_interval=0.05)


@pytest.mark.parametrize("make", [own_engine, with_psycopg, advised_engine, advised_engine_that_polls])
async def test_nothing_is_lost_or_doubled_through_a_pooler_in_transaction_mode(
    postgres_url: str, pooled_url: str, make: Callable[[str, str, Records, bool], EventBus]
) -> None:
    await tables(postgres_url)
    logs = Records()
    workers = [make(pooled_url, postgres_url, logs, True) for _ in range(3)]
    publishers = [make(pooled_url, postgres_url, logs, False) for _ in range(3)]
    calls = await deliver_all(workers, publishers, postgres_url)
    assert calls == Counter(range(EVENTS))
    told = {name for level, name, _ in logs.all if level in ("warning", "error")}
    assert told <= {"event_handler_failed", "listener_deaf"}
    assert ("listener_deaf" in told) <= (make is advised_engine_that_polls)


async def test_a_bus_with_a_url_to_listen_at_leaves_nothing_in_the_sessions_of_a_pooler(
    postgres_url: str, tmp_path: Path
) -> None:
    await tables(postgres_url)
    with pooler(postgres_url, tmp_path, sessions=1) as pooled:
        bus = EventBus(pooled, listen_url=postgres_url)
        delivered = asyncio.Event()

        @bus.subscribe(TicketStamped, name="calls")
        async def call(event: TicketStamped) -> None:
            delivered.set()

        async with bus:
            async with AsyncSession(bus.engine) as session, session.begin():
                await bus.publish(TicketStamped(number=1), session=session)
            async with asyncio.timeout(10):
                await delivered.wait()
        async with bus.engine.connect() as connection:  # the only session there is
            for left in (
                "SELECT count(*) FROM pg_prepared_statements WHERE name <> ''",
                "SELECT count(*) FROM pg_listening_channels()",
                "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'",
                "SELECT count(*) FROM pg_settings WHERE source = 'session' AND name LIKE '%timeout'",
            ):
                assert await connection.scalar(text(left)) == 0, left
        await bus.engine.dispose()


async def test_a_listener_behind_a_pooler_says_once_that_it_is_deaf_and_how_to_help_it(
    postgres_url: str, pooled_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("whereupon.bell.PATIENCE", 0.2)
    monkeypatch.setattr("whereupon.bell.LONGEST_PAUSE", 0.4)
    await tables(postgres_url)
    logs = Records()
    bus = EventBus(as_sqlalchemy_advises(pooled_url), logger=logs, poll_interval=0.05)
    heard: list[int] = []

    @bus.subscribe(TicketStamped, name="calls")
    async def call(event: TicketStamped) -> None:
        heard.append(event.number)

    async with bus:
        async with asyncio.timeout(20):
            while not logs.named("listener_deaf"):  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        await asyncio.sleep(1)  # for more tries
        other = EventBus(postgres_url, deliver=False)
        async with AsyncSession(other.engine) as session, session.begin():
            await other.publish(TicketStamped(number=7), session=session)
        async with asyncio.timeout(10):
            while heard != [7]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await other.close()
    [warning] = logs.named("listener_deaf")
    assert "listen_url=" in warning["error_message"]
    assert "0.05 s" in warning["error_message"]
    await bus.engine.dispose()


async def test_a_listener_behind_a_pooler_in_session_mode_hears(postgres_url: str, tmp_path: Path) -> None:
    await tables(postgres_url)
    logs = Records()
    with pooler(postgres_url, tmp_path, sessions=40, mode="session") as pooled:
        bus = EventBus(pooled, logger=logs, poll_interval=600)
        heard = asyncio.Event()

        @bus.subscribe(TicketStamped, name="calls")
        async def call(event: TicketStamped) -> None:
            heard.set()

        async with bus:
            async with asyncio.timeout(20):
                while bus._listener is None or not bus._listener.hears:  # noqa: ASYNC110
                    await asyncio.sleep(0.02)
                other = EventBus(postgres_url, deliver=False)
                async with AsyncSession(other.engine) as session, session.begin():
                    await other.publish(TicketStamped(number=7), session=session)
                await heard.wait()
            await other.close()
        assert not [name for level, name, _ in logs.all if level != "info"]
        await bus.engine.dispose()


def test_a_url_to_listen_at_that_is_none_of_postgresql_is_refused(sqlite_url: str) -> None:
    for database, listen in ((sqlite_url, "postgresql+asyncpg://x/y"), ("postgresql+asyncpg://x/y", sqlite_url)):
        with pytest.raises(Exception, match="listen_url is a PostgreSQL URL"):
            EventBus(database, listen_url=listen)
