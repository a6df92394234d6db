"""A bus from its URL to its end: what is refused, what is waited for, what is left behind."""

# ruff: noqa: SIM117 — what fails is often the end of a block

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import create_engine, make_url, select, text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine
from sqlalchemy.pool import StaticPool

from tests.notebook import Note, NoteWritten, Records, SharingAttempted, notebook, until
from whereupon import (
    AuditEventHandler,
    BusStateError,
    DatabaseUnavailableError,
    Delivery,
    EventBus,
    HandlerSessionError,
    InMemoryEventBus,
    SchemaError,
    UnsupportedDatabaseError,
)
from whereupon.schema import cursor

# --- what a bus is made from ------------------------------------------------------------------------------------------


@pytest.mark.unit
@pytest.mark.parametrize(
    ("database", "said"),
    [
        ("nonsense", r"neither an AsyncEngine nor a database URL.*sqlite\+aiosqlite:///app\.db"),
        ("", r"neither an AsyncEngine nor a database URL"),
        (None, r"None.* neither an AsyncEngine nor a database URL"),
        ("mysql+aiomysql://user@host/db", r"PostgreSQL or SQLite, not in mysql"),
        ("sqlite:///app.db", r"can't be awaited.*sqlite\+aiosqlite"),
        ("postgresql+psycopg2://host/db", r"can't be awaited.*postgresql\+asyncpg"),
        ("postgresql+nonsense://host/db", r"no driver that is installed: pip install 'whereupon\[postgres\]'"),
        ("sqlite+nonsense:///app.db", r"pip install 'whereupon\[sqlite\]'"),
    ],
)
def test_a_database_that_can_not_be_used_is_refused_with_the_way_out(database: Any, said: str) -> None:
    with pytest.raises(UnsupportedDatabaseError, match=said):
        EventBus(database)


@pytest.mark.unit
@pytest.mark.parametrize("database", ["postgresql//user:s3cret@host/db", "postgresql+psycopg2://user:s3cret@host/db"])
def test_a_refusal_does_not_show_the_password(database: str) -> None:
    with pytest.raises(UnsupportedDatabaseError) as caught:
        EventBus(database)
    assert "host/db" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    assert "s3cret" not in repr(EventBus("postgresql+asyncpg://user:s3cret@host/db"))


@pytest.mark.unit
def test_a_driver_that_is_not_installed_is_named() -> None:
    program = (
        "import sys; sys.modules['asyncpg'] = None\n"
        "from whereupon import EventBus\n"
        "EventBus('postgresql+asyncpg://host/db')"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert "the driver of postgresql+asyncpg is not installed: pip install 'whereupon[postgres]'" in ran.stderr


@pytest.mark.unit
def test_an_engine_is_taken_only_if_it_can_be_awaited_and_each_has_a_connection_of_its_own(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedDatabaseError, match="neither an AsyncEngine"):
        EventBus(create_engine("sqlite://"))  # type: ignore[arg-type]
    with pytest.raises(UnsupportedDatabaseError, match="StaticPool"):
        EventBus(create_async_engine("sqlite+aiosqlite://"))
    with pytest.raises(UnsupportedDatabaseError, match="StaticPool"):
        EventBus(create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/x.db", poolclass=StaticPool))


@pytest.mark.unit
@pytest.mark.parametrize("option", [{"in_flight": 0}, {"lease": 0}, {"drain_timeout": -1}])
def test_an_option_out_of_range_is_refused_by_name(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        EventBus("sqlite+aiosqlite:///:memory:", **option)


@pytest.mark.integration
@pytest.mark.parametrize("url", ["sqlite+aiosqlite://", "sqlite+aiosqlite:///:memory:"])
async def test_a_database_in_memory_is_a_private_one_with_transactions_of_their_own(url: str) -> None:
    async with notebook(url) as one, notebook(url) as other:
        async with one.sessions() as reader, one.sessions() as writer:
            await one.write(writer, "a")
            await writer.flush()
            assert list(await reader.scalars(select(Note.text))) == []
            await writer.commit()
        assert await one.texts() == ["a"]
        assert await other.texts() == []


def test_the_file_of_a_database_in_memory_is_gone_with_the_process() -> None:
    program = (
        "import asyncio\n"
        "from whereupon import EventBus\n"
        "async def main():\n"
        "    bus = EventBus('sqlite+aiosqlite:///:memory:')\n"
        "    async with bus: print(bus.engine.url.database)\n"
        "asyncio.run(main())"
    )
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True, timeout=60)
    path = Path(ran.stdout.strip())
    assert path.name == "memory.db"
    assert not path.parent.exists()


# --- starting ---------------------------------------------------------------------------------------------------------


@pytest.mark.integration
@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_database_that_is_down_at_start_is_an_error_that_names_it_without_the_password(driver: str) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bus = EventBus(f"postgresql+{driver}://user:s3cret@127.0.0.1:{port}/app")
    with pytest.raises(DatabaseUnavailableError) as caught:
        await bus.start()
    assert f"127.0.0.1:{port}/app" in str(caught.value)
    assert "Check that it runs" in str(caught.value)
    assert "s3cret" not in str(caught.value)
    with pytest.raises(DatabaseUnavailableError):
        await bus.publish(SharingAttempted(text="x"))
    await bus.close()


@pytest.mark.integration
async def test_a_bus_that_could_not_start_starts_once_the_database_is_as_it_should_be(postgres_url: str) -> None:
    bus = EventBus(postgres_url)
    with pytest.raises(SchemaError):
        await bus.start()
    await bus.create_tables()
    async with bus:
        await bus.publish(SharingAttempted(text="x"))


@pytest.mark.integration
async def test_a_file_that_can_not_be_opened_is_an_error_that_names_it(tmp_path: Path) -> None:
    bus = EventBus(f"sqlite+aiosqlite:///{tmp_path}/no such folder/app.db")
    with pytest.raises(DatabaseUnavailableError, match="no such folder"):
        await bus.start()
    await asyncio.sleep(0.2)  # aiosqlite's thread ends by itself after a failed connect, and tells this loop so


@pytest.mark.integration
async def test_entering_twice_is_refused_and_entering_again_after_the_end_is_not(database_url: str) -> None:
    heard: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten)
        async def hear(event: NoteWritten) -> None:
            heard.append(event.text)

    async with notebook(database_url, subscribed=subscribed, deliver=True) as notes:
        with pytest.raises(BusStateError, match="running already"):
            async with notes.bus:
                pass
        async with notes.sessions.begin() as session:
            await notes.write(session, "first")
        await notes.bus.close()
        async with notes.bus:
            async with notes.sessions.begin() as session:
                await notes.write(session, "second")
            await notes.bus.drain(10)
    assert heard == ["first", "second"]


@pytest.mark.integration
async def test_a_bus_that_is_never_entered_publishes_and_a_worker_delivers(database_url: str) -> None:
    heard: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten)
        async def hear(event: NoteWritten) -> None:
            heard.append(event.text)

    async with notebook(database_url):
        pass  # the application's tables
    publisher = EventBus(database_url)
    subscribed(publisher)
    sessions = async_sessionmaker(publisher.engine)
    other = create_async_engine(database_url)
    async with sessions.begin() as session:
        await publisher.publish(NoteWritten(text="before there was a worker"), session=session)
    async with AsyncSession(other) as session:  # a publisher knows its database without having been entered
        await publisher.publish(NoteWritten(text="by another engine"), session=session)
        await session.commit()
    await other.dispose()
    await publisher.close()
    async with notebook(database_url, subscribed=subscribed, deliver=True) as notes:
        await notes.bus.drain(10)
    assert heard == ["before there was a worker", "by another engine"]


@pytest.mark.integration
async def test_subscriptions_are_registered_before_the_first_event_in_a_transaction_of_their_own(
    database_url: str,
) -> None:
    async with notebook(database_url):
        pass
    bus = EventBus(database_url)

    @bus.subscribe(NoteWritten)
    async def hear(event: NoteWritten) -> None: ...

    @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
    async def forget(event: NoteWritten) -> None: ...

    sessions = async_sessionmaker(bus.engine)
    async with sessions() as session:
        await bus.publish(NoteWritten(text="rolled back"), session=session)
        await session.rollback()
        assert set(await session.scalars(select(cursor.c.subscription))) == {hear.__name__}
    await bus.close()


@pytest.mark.integration
@pytest.mark.parametrize("begun_by", ["a read", "a write"])
async def test_a_first_publish_inside_a_transaction_on_sqlite_says_to_start_the_bus_before(
    sqlite_url: str, begun_by: str
) -> None:
    """Registering would wait for this task's own write, or make what it has read too old to write after."""
    async with notebook(sqlite_url):
        pass
    bus = EventBus(sqlite_url)

    @bus.subscribe(NoteWritten)
    async def hear(event: NoteWritten) -> None: ...

    sessions = async_sessionmaker(bus.engine)
    begin = text("SELECT * FROM note" if begun_by == "a read" else "INSERT INTO note (text) VALUES ('a')")
    async with asyncio.timeout(5):  # the busy timeout is 30 s
        async with sessions() as session:
            await session.execute(begin)
            with pytest.raises(BusStateError, match="Start the bus at the start"):
                await bus.publish(NoteWritten(text="x"), session=session)
        await bus.start(deliver=False)
        await bus.close()
        again = EventBus(sqlite_url)  # where there is nothing to register, nothing is in the way
        again.subscribe(NoteWritten, hear)
        async with async_sessionmaker(again.engine).begin() as session:
            await session.execute(begin)
            await again.publish(NoteWritten(text="x"), session=session)
        await again.close()


@pytest.mark.integration
async def test_subscribing_while_the_bus_delivers_is_refused_and_changes_nothing(database_url: str) -> None:
    async with notebook(database_url, deliver=True) as notes:

        async def late(event: NoteWritten) -> None: ...

        with pytest.raises(BusStateError, match=r"late is subscribed while the bus delivers.*before `async with bus`"):
            notes.bus.subscribe(NoteWritten, late)
        with pytest.raises(BusStateError, match="AuditEventHandler"):
            notes.bus.register(AuditEventHandler())
        assert len(notes.bus.subscriptions) == 0


# --- loops ------------------------------------------------------------------------------------------------------------


@pytest.mark.integration
def test_a_bus_is_refused_on_a_second_loop_while_the_first_has_it(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url, deliver=False)

    async def elsewhere() -> None:
        with pytest.raises(BusStateError, match="another event loop"):
            await bus.publish(SharingAttempted(text="x"))

    async def main() -> None:
        async with bus:
            await asyncio.to_thread(asyncio.run, elsewhere())

    asyncio.run(main())


@pytest.mark.integration
@pytest.mark.parametrize("closed", [True, False])
def test_a_bus_serves_one_loop_after_the_other(database_url: str, closed: bool) -> None:
    """Also where a script forgot to close it: connections of a loop that is over are not used again."""
    program = (
        "import asyncio, sys\n"
        "from sqlalchemy import text\n"
        "from tests.notebook import SharingAttempted\n"
        "from whereupon import EventBus\n"
        "bus = EventBus(sys.argv[1], deliver=False, create_tables=True)\n"
        "async def publish(word):\n"
        "    await bus.publish(SharingAttempted(text=word))\n"
        "    async with bus.engine.connect() as connection:\n"
        "        print(await connection.scalar(text('SELECT count(*) FROM whereupon_log')))\n"
        "    if sys.argv[2] == 'True':\n"
        "        await bus.close()\n"
        "for word in ('one', 'two', 'three'):\n"
        "    asyncio.run(publish(word))\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", program, database_url, str(closed)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (ran.returncode, ran.stdout.split()) == (0, ["1", "2", "3"]), ran.stderr
    if closed:
        assert ran.stderr == ""


# --- ending -----------------------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_leaving_delivers_what_is_due(database_url: str) -> None:
    heard: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten)
        async def first(event: NoteWritten) -> None:
            await asyncio.sleep(0.05)
            heard.append("durable")
            await bus.publish(SharingAttempted(text="by a handler"))

        @bus.subscribe(SharingAttempted, delivery=Delivery.AFTER_COMMIT)
        async def second(event: SharingAttempted) -> None:
            await asyncio.sleep(0.05)
            heard.append("after commit")

    async with notebook(database_url, subscribed=subscribed, deliver=True) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
    assert heard == ["durable", "after commit"]


@pytest.mark.integration
@pytest.mark.parametrize("stubborn", [False, True])
async def test_leaving_does_not_wait_for_ever_for_a_handler_that_hangs(database_url: str, stubborn: bool) -> None:
    started = asyncio.Event()
    release = asyncio.Event()

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT, timeout=None)
        async def hang(event: NoteWritten) -> None:
            started.set()
            while True:
                try:
                    await release.wait()
                    return
                except asyncio.CancelledError:
                    if not stubborn:
                        raise

    async with asyncio.timeout(20):
        async with notebook(database_url, subscribed=subscribed, drain_timeout=0.2) as notes:
            async with notes.sessions.begin() as session:
                await notes.write(session, "a")
            await started.wait()
    assert [record["handler_name"] for record in notes.logger.of("event_handler_failed")] == ["hang"]
    assert len(notes.logger.of("bus_drain_timed_out")) == 1
    release.set()


@pytest.mark.integration
async def test_drain_says_when_it_took_too_long(database_url: str) -> None:
    release = asyncio.Event()

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def slow(event: NoteWritten) -> None:
            await release.wait()

    async with notebook(database_url, subscribed=subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        with pytest.raises(TimeoutError):
            await notes.bus.drain(0.05)
        release.set()
        await notes.bus.drain(5)


@pytest.mark.integration
async def test_an_after_commit_handler_of_a_bus_that_was_closed_meanwhile_is_reported(database_url: str) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def hear(event: NoteWritten) -> None: ...

    engine = create_async_engine(database_url)
    try:
        async with notebook(database_url, subscribed=subscribed) as notes:
            session = AsyncSession(engine)
            await notes.write(session, "a")
        await session.commit()
        await session.close()
    finally:
        await engine.dispose()
    (record,) = notes.logger.of("event_handler_failed")
    assert "closed" in record["error_message"]


@pytest.mark.integration
async def test_an_engine_that_was_given_stays_the_callers(database_url: str) -> None:
    engine = create_async_engine(database_url)
    try:
        async with engine.connect() as connection:
            async with EventBus(engine, create_tables=True, deliver=False) as bus:
                await bus.publish(SharingAttempted(text="x"))
            assert await connection.scalar(text("SELECT count(*) FROM whereupon_log")) == 1
    finally:
        await engine.dispose()


# --- after-commit handlers --------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_an_after_commit_handler_has_a_session_of_its_own_that_commits_by_itself(database_url: str) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def add(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text=f"after {event.text}"))

        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def fail(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="dropped"))
            await session.flush()
            await session.commit()

        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT, timeout=0.05)
        async def slow(event: NoteWritten) -> None:
            await asyncio.sleep(60)

    async with notebook(database_url, subscribed=subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        await notes.bus.drain(10)
        assert await notes.texts() == ["a", "after a"]
        failed = {record["handler_name"]: record["error_type"] for record in notes.logger.of("event_handler_failed")}
        assert failed == {"fail": HandlerSessionError.__name__, "slow": "HandlerTimeout"}


# --- receipts ---------------------------------------------------------------------------------------------------------


@pytest.mark.integration
async def test_a_receipt_waits_for_every_handler_of_its_events(database_url: str) -> None:
    ended: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten)
        async def durable(event: NoteWritten) -> None:
            await asyncio.sleep(0.05)
            ended.append("durable")

        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def after(event: NoteWritten) -> None:
            await asyncio.sleep(0.05)
            ended.append("after commit")

    async with notebook(database_url, subscribed=subscribed, deliver=True) as notes:
        async with notes.sessions.begin() as session:
            receipt = await notes.bus.publish(
                NoteWritten(text="a"), SharingAttempted(text="nobody hears it"), session=session
            )
        await receipt.settled(10)
        assert sorted(ended) == ["after commit", "durable"]


@pytest.mark.integration
async def test_a_receipt_does_not_wait_for_handlers_of_other_events(database_url: str) -> None:
    release = asyncio.Event()

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def hear(event: NoteWritten) -> None:
            if event.text == "slow":
                await release.wait()

    async with notebook(database_url, subscribed=subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "slow")
        async with notes.sessions.begin() as session:
            receipt = await notes.bus.publish(NoteWritten(text="quick"), session=session)
        await receipt.settled(5)
        release.set()


@pytest.mark.integration
async def test_a_receipt_names_what_it_still_waits_for(database_url: str) -> None:
    release = asyncio.Event()

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, timeout=None)
        async def slow(event: NoteWritten) -> None:
            await release.wait()

    async with notebook(database_url, subscribed=subscribed, deliver=True, drain_timeout=1) as notes:
        async with notes.sessions() as session:
            receipt = await notes.bus.publish(NoteWritten(text="a"), session=session)
            with pytest.raises(TimeoutError, match=r"not settled after 0\.2 s: .*not committed"):
                await receipt.settled(0.2)
            await session.commit()
        with pytest.raises(TimeoutError, match=r"slow \((waiting|running)\)"):
            await receipt.settled(0.3)
        release.set()
        await receipt.settled(10)


@pytest.mark.integration
async def test_a_receipt_sees_what_another_process_delivers(database_url: str) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten)
        async def hear(event: NoteWritten) -> None: ...

    async with notebook(database_url, subscribed=subscribed) as notes:
        other = EventBus(database_url, logger=Records(), poll_interval=0.05)
        subscribed(other)
        async with other:
            async with notes.sessions.begin() as session:
                receipt = await notes.bus.publish(NoteWritten(text="a"), session=session)
            await receipt.settled(10)


@pytest.mark.integration
async def test_a_worker_goes_on_once_a_database_that_was_cut_off_answers_again(postgres_url: str) -> None:
    heard: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten)
        async def hear(event: NoteWritten) -> None:
            heard.append(event.text)

    async with notebook(postgres_url, subscribed=subscribed, deliver=True, poll_interval=0.05) as notes:
        admin = create_async_engine(make_url(postgres_url), isolation_level="AUTOCOMMIT")
        async with admin.connect() as connection:
            await connection.execute(
                text(
                    "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                    "WHERE datname = current_database() AND pid <> pg_backend_pid()"
                )
            )
        await admin.dispose()
        with contextlib.suppress(Exception):  # the pool may hand out what was cut off once
            async with notes.sessions.begin() as session:
                await session.execute(text("SELECT 1"))
        async with notes.sessions.begin() as session:
            await notes.bus.publish(NoteWritten(text="a"), session=session)
        await until(lambda: heard, 20)
    assert heard == ["a"]


@pytest.mark.integration
@pytest.mark.parametrize("deliver", [True, False])
async def test_a_bus_says_whether_it_was_entered(sqlite_url: str, deliver: bool) -> None:
    for bus in (EventBus(sqlite_url, deliver=deliver), InMemoryEventBus()):
        assert not bus.is_running
        async with bus:
            assert bus.is_running
        assert not bus.is_running
    broken = EventBus("postgresql+asyncpg://nobody@127.0.0.1:1/none")
    with pytest.raises(DatabaseUnavailableError):
        await broken.start()
    assert not broken.is_running
