"""An event exists if and only if the transaction commits that it was published in."""

# ruff: noqa: ASYNC110, PT012, SIM117 — what fails is often the end of a block, and the database can only be polled

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Iterator
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import Engine, create_engine, event, make_url, select, text
from sqlalchemy.exc import DBAPIError, IntegrityError
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_scoped_session,
    create_async_engine,
)
from sqlalchemy.orm import Session

from tests.notebook import (
    Note,
    Notebook,
    NoteShared,
    NoteWritten,
    SharingAttempted,
    SharingFailed,
    notebook,
    until,
)
from tests.proxy import Proxy, Side, cancelled
from tests.statements import statements
from whereupon import (
    AuditEventHandler,
    BusStateError,
    Delivery,
    EventBus,
    EventContext,
    EventEncodingError,
    ForeignSessionError,
    PublishError,
    SessionRequiredError,
    request_metadata,
)
from whereupon.testing import own_transactions

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class Refused(Exception):
    """What the application raises in these tests."""


@pytest.fixture
async def notes(database_url: str) -> AsyncIterator[Notebook]:
    async with notebook(database_url) as notes:
        yield notes


def after_commit(bus: EventBus, heard: list[str]) -> None:
    @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
    async def hear(event: NoteWritten) -> None:
        heard.append(event.text)


@pytest.fixture
async def heard(database_url: str) -> AsyncIterator[tuple[Notebook, list[str]]]:
    """A notebook, and the texts that its AFTER_COMMIT handler heard."""
    texts: list[str] = []
    async with notebook(database_url, subscribed=lambda bus: after_commit(bus, texts)) as notes:
        yield notes, texts


async def committed(notes: Notebook) -> list[str]:
    """The texts of which both the change and the event are committed; fails where there is one without the other."""
    texts = await notes.texts()
    assert sorted(await notes.logged()) == texts
    return texts


# --- one transaction --------------------------------------------------------------------------------------------------


async def test_an_event_exists_once_its_transaction_commits_and_not_before(notes: Notebook) -> None:
    async with notes.sessions() as session:
        await notes.write(session, "kept")
        assert await committed(notes) == []
        await session.commit()
        assert await committed(notes) == ["kept"]


async def test_a_rollback_leaves_no_event(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    async with notes.sessions() as session:
        await notes.write(session, "dropped")
        await session.rollback()
        await notes.write(session, "kept")
        await session.commit()
    await notes.bus.drain(5)
    assert await committed(notes) == ["kept"]
    assert texts == ["kept"]


async def test_an_exception_in_the_transaction_leaves_no_event(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    with pytest.raises(Refused):
        async with notes.sessions.begin() as session:
            await notes.write(session, "dropped")
            await session.flush()
            raise Refused
    await notes.bus.drain(5)
    assert await committed(notes) == []
    assert texts == []


async def test_a_session_that_is_closed_without_a_commit_leaves_no_event(notes: Notebook) -> None:
    async with notes.sessions() as session:
        await notes.write(session, "dropped")
    async with notes.sessions.begin() as session:
        await notes.write(session, "kept")
    assert await committed(notes) == ["kept"]


async def test_one_session_serves_one_transaction_after_the_other(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    async with notes.sessions() as session:
        for word in ("one", "two", "three", "four"):
            await notes.write(session, word)
            await (session.rollback() if word == "three" else session.commit())
    await notes.bus.drain(5)
    assert await notes.logged() == ["one", "two", "four"]
    assert texts == ["one", "two", "four"]


async def test_events_of_a_transaction_keep_the_order_of_publishing(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        await notes.bus.publish(NoteWritten(text="a"), NoteWritten(text="b"), session=session)
        await notes.bus.publish(NoteWritten(text="c"), session=session)
        session.add(Note(text="flushed in between"))
        await session.flush()
        await notes.bus.publish(NoteWritten(text="d"), session=session)
    assert await notes.logged() == ["a", "b", "c", "d"]


async def test_two_sessions_publish_at_once_and_one_rolls_back(notes: Notebook) -> None:
    async with notes.sessions() as kept, notes.sessions() as dropped:
        await notes.bus.publish(NoteWritten(text="dropped"), session=dropped)
        await notes.write(kept, "kept")
        await kept.commit()
        await dropped.rollback()
    assert await committed(notes) == ["kept"]


async def test_a_scoped_session_is_published_on(notes: Notebook) -> None:
    scoped = async_scoped_session(notes.sessions, scopefunc=asyncio.current_task)
    await notes.bus.publish(NoteWritten(text="dropped"), session=scoped)
    await scoped.rollback()
    scoped.add(Note(text="kept"))
    await notes.bus.publish(NoteWritten(text="kept"), session=scoped)
    await scoped.commit()
    await scoped.remove()
    assert await committed(notes) == ["kept"]


async def test_a_rolled_back_savepoint_takes_its_events_with_it(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    async with notes.sessions.begin() as session:
        await notes.write(session, "before")
        savepoint = await session.begin_nested()
        await notes.write(session, "inside")
        await savepoint.rollback()
        await notes.write(session, "after")
    await notes.bus.drain(5)
    assert await committed(notes) == ["after", "before"]
    assert texts == ["before", "after"]


# --- bound connections ------------------------------------------------------------------------------------------------


MODES = ["conditional_savepoint", "rollback_only", "control_fully", "create_savepoint"]


@pytest.mark.parametrize("mode", MODES)
async def test_on_a_bound_connection_after_commit_is_the_commit_of_the_connection(
    heard: tuple[Notebook, list[str]], mode: Any
) -> None:
    notes, texts = heard
    async with notes.bus.engine.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(bind=connection, join_transaction_mode=mode) as session:
            await notes.write(session, "kept")
            await session.commit()
        owns = mode == "control_fully"
        await notes.bus.drain(5)
        assert texts == (["kept"] if owns else [])
        assert await committed(notes) == (["kept"] if owns else [])
        if not owns:
            await transaction.commit()
    await notes.bus.drain(5)
    assert await committed(notes) == ["kept"]
    assert texts == ["kept"]


@pytest.mark.parametrize("mode", MODES)
async def test_on_a_bound_connection_its_rollback_drops_what_the_session_committed(
    heard: tuple[Notebook, list[str]], mode: Any
) -> None:
    notes, texts = heard
    async with notes.bus.engine.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(bind=connection, join_transaction_mode=mode) as session:
            await notes.write(session, "dropped")
            await (session.flush() if mode == "control_fully" else session.commit())
            await transaction.rollback()
        async with connection.begin():
            await connection.execute(text("SELECT 1"))
    await notes.bus.drain(5)
    assert await committed(notes) == []
    assert texts == []


@pytest.mark.parametrize("mode", MODES)
async def test_on_a_bound_connection_a_rollback_of_the_session_drops_its_events(notes: Notebook, mode: Any) -> None:
    async with notes.bus.engine.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(bind=connection, join_transaction_mode=mode) as session:
            await notes.write(session, "dropped")
            await session.rollback()
        if transaction.is_active:
            await transaction.commit()
    assert await committed(notes) == []


async def test_a_connection_that_stays_in_use_tells_of_its_commit(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    async with notes.bus.engine.connect() as connection:
        async with connection.begin(), AsyncSession(bind=connection) as session:
            await notes.write(session, "kept")
            await session.commit()
        await until(lambda: texts)
    assert texts == ["kept"]


async def test_two_sessions_on_one_connection_share_its_fate(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    for outcome in ("rollback", "commit"):
        async with notes.bus.engine.connect() as connection:
            transaction = await connection.begin()
            for word in ("one", "two"):
                async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint") as session:
                    await notes.write(session, word)
                    await session.commit()
            async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint") as session:
                await notes.write(session, "three")
                await session.rollback()
            await getattr(transaction, outcome)()
    await notes.bus.drain(5)
    assert await notes.logged() == ["one", "two"]
    assert texts == ["one", "two"]


async def test_after_commit_handlers_run_once_when_a_connection_is_used_again(
    heard: tuple[Notebook, list[str]],
) -> None:
    notes, texts = heard
    async with notes.bus.engine.connect() as connection:
        for word in ("one", "two", "three"):
            async with connection.begin(), AsyncSession(bind=connection) as session:
                await notes.write(session, word)
    await notes.bus.drain(5)
    await asyncio.sleep(0.05)
    assert texts == ["one", "two", "three"]


# --- commits that fail ------------------------------------------------------------------------------------------------


async def test_a_unique_violation_at_commit_leaves_no_event(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    async with notes.sessions.begin() as session:
        await notes.write(session, "kept")
    with pytest.raises(IntegrityError):
        async with notes.sessions.begin() as session:
            await notes.bus.publish(NoteWritten(text="never"), session=session)
            session.add(Note(text="kept"))
    await notes.bus.drain(5)
    assert await committed(notes) == ["kept"]
    assert texts == ["kept"]


async def test_a_deferred_constraint_that_fails_the_commit_leaves_no_event(postgres_url: str) -> None:
    texts: list[str] = []
    async with notebook(postgres_url, subscribed=lambda bus: after_commit(bus, texts)) as notes:
        async with notes.bus.engine.begin() as connection:
            await connection.execute(
                text("CREATE TABLE pair (id int PRIMARY KEY, other int REFERENCES pair DEFERRABLE INITIALLY DEFERRED)")
            )
        with pytest.raises(IntegrityError):
            async with notes.sessions.begin() as session:
                await notes.write(session, "dropped")
                await session.execute(text("INSERT INTO pair VALUES (1, 2)"))
        await notes.bus.drain(5)
        assert await committed(notes) == []
        assert texts == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("when", ["before", "during"])
async def test_a_connection_killed_around_the_commit_leaves_no_event(postgres_url: str, driver: str, when: str) -> None:
    url = postgres_url.replace("+asyncpg", f"+{driver}")
    texts: list[str] = []
    async with notebook(url, subscribed=lambda bus: after_commit(bus, texts)) as notes:
        await slow_commits(notes)
        async with notes.sessions() as session:
            await notes.write(session, "slow")
            pid = await session.scalar(text("SELECT pg_backend_pid()"))
            if when == "before":
                await kill(notes, pid)
                killing = None
            else:
                killing = asyncio.create_task(kill(notes, pid, once_waiting=True))
            with pytest.raises(DBAPIError):
                await session.commit()
            if killing is not None:
                await killing
        await notes.bus.drain(5)
        assert await committed(notes) == []
        assert texts == []


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize("savepoints", [0, 2])
async def test_a_session_goes_on_after_its_connection_was_killed_and_it_was_rolled_back(
    postgres_url: str, driver: str, savepoints: int
) -> None:
    async with notebook(postgres_url.replace("asyncpg", driver)) as notes:
        async with notes.sessions() as session:
            await notes.write(session, "dropped")
            for _ in range(savepoints):
                await session.begin_nested()
            await notes.bus.publish(NoteWritten(text="dropped, too"), session=session)
            await kill(notes, await session.scalar(text("SELECT pg_backend_pid()")))
            with pytest.raises(DBAPIError):
                await session.execute(text("SELECT 1"))
            for _ in range(savepoints + 1):
                await session.rollback()
            await notes.write(session, "kept")
            await session.commit()
        assert await committed(notes) == ["kept"]


async def slow_commits(notes: Notebook) -> None:
    """Have the COMMIT of a transaction that writes the note "slow" take half a second; PostgreSQL."""
    async with notes.bus.engine.begin() as connection:
        for statement in (
            "CREATE FUNCTION slowly() RETURNS trigger LANGUAGE plpgsql AS "
            "$$ BEGIN IF NEW.text = 'slow' THEN PERFORM pg_sleep(0.5); END IF; RETURN NULL; END $$",
            "CREATE CONSTRAINT TRIGGER slowly AFTER INSERT ON note DEFERRABLE INITIALLY DEFERRED "
            "FOR EACH ROW EXECUTE FUNCTION slowly()",
        ):
            await connection.execute(text(statement))


async def kill(notes: Notebook, pid: Any, *, once_waiting: bool = False) -> None:
    async with notes.bus.engine.connect() as connection:
        while once_waiting and not await connection.scalar(
            text("SELECT wait_event = 'PgSleep' FROM pg_stat_activity WHERE pid = :pid"), {"pid": pid}
        ):
            await asyncio.sleep(0.01)
        await connection.execute(text("SELECT pg_terminate_backend(:pid)"), {"pid": pid})


async def test_cancelling_the_publisher_during_its_commit_leaves_both_or_neither(postgres_url: str) -> None:
    async with notebook(postgres_url) as notes:
        await slow_commits(notes)

        async def publish() -> None:
            async with notes.sessions.begin() as session:
                await notes.write(session, "slow")

        for wait in (0.0, 0.02, 0.2, 0.5):
            publisher = asyncio.create_task(publish())
            await asyncio.sleep(wait)
            publisher.cancel()
            with contextlib.suppress(asyncio.CancelledError, IntegrityError):
                await publisher
        await committed(notes)


class Losing(Proxy):
    """A PostgreSQL server whose answer to a COMMIT can get lost."""

    losing = False

    async def relay(self, client: Side, server: Side) -> None:
        lost = False

        async def answer() -> None:
            while (data := await server.reader.read(65536)) and not lost:
                client.writer.write(data)

        answering = asyncio.ensure_future(answer())
        try:
            while data := await client.reader.read(65536):
                lost = lost or (self.losing and b"COMMIT" in data)
                server.writer.write(data)
                if lost:
                    await answering
                    break
        finally:
            await cancelled(answering)


async def test_an_event_whose_commit_got_no_answer_is_delivered(postgres_url: str) -> None:
    delivered: list[str] = []
    texts: list[str] = []

    def subscribed(bus: EventBus) -> None:
        after_commit(bus, texts)

        @bus.subscribe(NoteWritten)
        async def deliver(event: NoteWritten) -> None:
            delivered.append(event.text)

    async with (
        notebook(postgres_url, subscribed=subscribed, deliver=True, poll_interval=0.05) as notes,
        Losing(postgres_url) as proxy,
    ):
        engine = create_async_engine(proxy.url)
        try:
            async with AsyncSession(engine) as session:
                await notes.write(session, "in doubt")
                await session.flush()
                proxy.losing = True
                with pytest.raises(DBAPIError):
                    await session.commit()
            await until(lambda: delivered)
        finally:
            await engine.dispose()
        assert await committed(notes) == ["in doubt"]
        assert delivered == ["in doubt"]
        assert texts == []  # nobody could say that it was committed


async def test_a_log_that_can_not_be_written_fails_the_commit_and_takes_the_change_with_it(notes: Notebook) -> None:
    async with notes.bus.engine.connect() as connection:
        transaction = await connection.begin()
        async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint") as session:
            await notes.write(session, "dropped")
            await session.commit()
        await connection.execute(text("ALTER TABLE whereupon_log RENAME TO elsewhere"))
        with pytest.raises(DBAPIError):
            await transaction.commit()
        await connection.rollback()
        # the same connection goes on: nothing of the failed transaction may be left in it
        async with connection.begin(), AsyncSession(bind=connection) as session:
            await notes.write(session, "kept")
            await session.commit()
    assert await committed(notes) == ["kept"]


# --- hooks, sync sessions, two phases, other engines ------------------------------------------------------------------


async def test_an_event_staged_in_a_before_commit_hook_belongs_to_that_transaction(notes: Notebook) -> None:
    async with notes.sessions() as session:

        @event.listens_for(session.sync_session, "before_commit")
        def hook(sync: Session) -> None:
            if not sync.in_nested_transaction():
                notes.bus.stage(NoteWritten(text="staged by a hook"), session=sync)

        session.add(Note(text="a note"))
        await session.commit()
        session.add(Note(text="a note"))
        with pytest.raises(IntegrityError):
            await session.commit()
    assert await notes.logged() == ["staged by a hook"]


@pytest.fixture
def sync_engine(database_url: str) -> Iterator[Engine]:
    """An engine on the test's database with a driver that is not async."""
    url = make_url(database_url)
    engine = create_engine(url.set(drivername="sqlite" if url.get_backend_name() == "sqlite" else "postgresql+psycopg"))
    yield engine
    engine.dispose()


async def test_a_sync_session_stages_its_events(heard: tuple[Notebook, list[str]], sync_engine: Engine) -> None:
    notes, texts = heard

    def publish() -> None:
        with Session(sync_engine) as session:
            session.add(Note(text="kept"))
            notes.bus.stage(NoteWritten(text="kept"), session=session)
            session.commit()
            session.add(Note(text="dropped"))
            notes.bus.stage(NoteWritten(text="dropped"), session=session)
            session.rollback()
            with session.begin_nested() as savepoint:
                notes.bus.stage(NoteWritten(text="dropped"), session=session)
                savepoint.rollback()
            session.commit()

    await asyncio.to_thread(publish)
    await until(lambda: texts)
    assert await committed(notes) == ["kept"]
    assert texts == ["kept"]


async def test_a_sync_session_stages_on_the_thread_of_the_loop_as_well(
    heard: tuple[Notebook, list[str]], sync_engine: Engine
) -> None:
    notes, texts = heard
    with Session(sync_engine) as session:
        for word in ("one", "two"):
            session.add(Note(text=word))
            notes.bus.stage(NoteWritten(text=word), session=session)
            session.commit()
    await notes.bus.drain(5)
    assert await committed(notes) == ["one", "two"]
    assert texts == ["one", "two"]


async def test_a_savepoint_before_the_first_write_is_not_the_outermost_transaction(
    notes: Notebook, sync_engine: Engine
) -> None:
    """The sqlite3 module begins a transaction at the first write only; a SAVEPOINT before that would be it."""

    def publish() -> None:
        with Session(sync_engine) as session:
            notes.bus.stage(NoteWritten(text="x"), session=session)
            session.rollback()  # the engine is known to the bus from here on
            with session.begin_nested():
                session.add(Note(text="released"))
            notes.bus.stage(NoteWritten(text="released"), session=session)
            session.rollback()

    await asyncio.to_thread(publish)
    assert await committed(notes) == []


async def test_stage_refuses_an_async_session_and_publish_a_sync_one(notes: Notebook, sync_engine: Engine) -> None:
    async with notes.sessions() as session:
        with pytest.raises(PublishError, match=r"await bus\.publish"):
            notes.bus.stage(NoteWritten(text="x"), session=session)
    with Session(sync_engine) as sync, pytest.raises(PublishError, match=r"bus\.stage"):
        await notes.bus.publish(NoteWritten(text="x"), session=sync)
    with pytest.raises(PublishError, match="not int"):
        await notes.bus.publish(NoteWritten(text="x"), session=1)
    assert await notes.logged() == []


async def test_stage_before_the_bus_was_started_says_how_to_start_it(database_url: str, sync_engine: Engine) -> None:
    bus = EventBus(database_url)
    with Session(sync_engine) as session, pytest.raises(BusStateError, match="async with bus"):
        bus.stage(NoteWritten(text="x"), session=session)


async def test_stage_refuses_an_event_with_a_required_handler(database_url: str, sync_engine: Engine) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.IN_TRANSACTION, required=True)
        async def check(event: NoteWritten, session: AsyncSession) -> None: ...

    async with notebook(database_url, subscribed=subscribed) as notes:
        with Session(sync_engine) as session:
            with pytest.raises(PublishError, match=r"check is required .* AsyncSession"):
                notes.bus.stage(NoteWritten(text="x"), session=session)
            session.commit()
        assert await notes.logged() == []


@pytest.mark.parametrize("outcome", ["commit", "rollback", "rollback after prepare"])
async def test_a_transaction_in_two_phases_writes_its_events_when_it_is_prepared(
    two_phase_postgres: str, outcome: str
) -> None:
    texts: list[str] = []
    async with notebook(two_phase_postgres, subscribed=lambda bus: after_commit(bus, texts)) as notes:
        engine = create_engine(make_url(two_phase_postgres).set(drivername="postgresql+psycopg"))

        def publish() -> None:
            with Session(engine, twophase=True) as session:
                session.add(Note(text="kept"))
                notes.bus.stage(NoteWritten(text="kept"), session=session)
                if outcome == "rollback after prepare":
                    session.prepare()
                if outcome == "commit":
                    session.commit()
                else:
                    session.rollback()

        await asyncio.to_thread(publish)
        await asyncio.sleep(0.05)
        await notes.bus.drain(5)
        expected = ["kept"] if outcome == "commit" else []
        assert await committed(notes) == expected
        assert texts == expected
        engine.dispose()


@pytest.fixture(scope="module")
def two_phase_server() -> Iterator[str]:
    from tests.servers import PostgresUnavailable, start_postgres

    try:
        server = start_postgres(settings={"max_prepared_transactions": "10"})
    except PostgresUnavailable as error:
        pytest.skip(f"needs a server with max_prepared_transactions, and none could be started: {error}")
    yield server.url
    server.stop()


@pytest.fixture
def two_phase_postgres(two_phase_server: str) -> Iterator[str]:
    from tests.servers import empty_database

    with empty_database(two_phase_server) as url:
        yield url


async def test_an_engine_made_by_execution_options_is_the_same_database(heard: tuple[Notebook, list[str]]) -> None:
    notes, texts = heard
    clone = notes.bus.engine.execution_options(schema_translate_map={"nowhere": None})
    async with AsyncSession(clone.execution_options(compiled_cache=None)) as session:
        await notes.write(session, "kept")
        await session.commit()
        await notes.write(session, "dropped")
        await session.rollback()
    await notes.bus.drain(5)
    assert await committed(notes) == ["kept"]
    assert texts == ["kept"]


async def test_a_session_of_another_engine_on_the_same_database_is_published_on(
    heard: tuple[Notebook, list[str]], database_url: str
) -> None:
    notes, texts = heard
    other = create_async_engine(database_url)
    try:
        for outcome in ("commit", "rollback"):
            async with AsyncSession(other) as session:
                await session.execute(select(Note))  # the transaction is older than the bus's knowledge of the engine
                await notes.write(session, outcome)
                await getattr(session, outcome)()
    finally:
        await other.dispose()
    await notes.bus.drain(5)
    assert await committed(notes) == ["commit"]
    assert texts == ["commit"]


async def test_a_savepoint_older_than_the_first_publish_is_honoured(notes: Notebook, database_url: str) -> None:
    other = create_async_engine(database_url)
    try:
        async with AsyncSession(other) as session:
            session.add(Note(text="kept"))
            await session.flush()
            savepoint = await session.begin_nested()
            await notes.write(session, "dropped")
            await savepoint.rollback()
            await notes.bus.publish(NoteWritten(text="kept"), session=session)
            await session.commit()
    finally:
        await other.dispose()
    assert await committed(notes) == ["kept"]


@pytest.mark.parametrize("where", ["engine", "create_engine", "connection"])
async def test_autocommit_is_refused(notes: Notebook, database_url: str, where: str) -> None:
    engine = notes.bus.engine
    made: list[AsyncEngine] = []
    options: dict[str, Any] = {}
    if where == "engine":
        engine = engine.execution_options(isolation_level="AUTOCOMMIT")
    elif where == "create_engine":
        engine = create_async_engine(database_url, isolation_level="AUTOCOMMIT")
        made.append(engine)
    else:
        options = {"execution_options": {"isolation_level": "AUTOCOMMIT"}}
    try:
        async with AsyncSession(engine) as session:
            await session.connection(**options)
            with pytest.raises(PublishError, match="AUTOCOMMIT"):
                await notes.bus.publish(NoteWritten(text="x"), session=session)
    finally:
        for engine in made:
            await engine.dispose()
    assert await notes.logged() == []


async def test_a_session_on_another_database_is_refused(notes: Notebook, tmp_path: Any) -> None:
    without_tables = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/other.db")
    try:
        async with AsyncSession(without_tables) as session:
            with pytest.raises(ForeignSessionError, match=r"other\.db"):
                await notes.bus.publish(NoteWritten(text="x"), session=session)
    finally:
        await without_tables.dispose()
    async with notebook(f"sqlite+aiosqlite:///{tmp_path}/twin.db") as other, other.sessions() as session:
        with pytest.raises(ForeignSessionError, match=r"twin\.db"):
            await notes.bus.publish(NoteWritten(text="x"), session=session)
        await session.commit()
        assert await other.logged() == []
    assert await notes.logged() == []


async def test_two_buses_in_one_transaction_each_write_their_own(notes: Notebook) -> None:
    texts: list[str] = []
    other = EventBus(notes.bus.engine, deliver=False)
    after_commit(other, texts)
    async with other:
        async with notes.sessions.begin() as session:
            await notes.bus.publish(NoteWritten(text="one"), session=session)
            await other.publish(NoteWritten(text="two"), session=session)
        await other.drain(5)
    assert sorted(await notes.logged()) == ["one", "two"]
    assert texts == ["two"]


# --- one INSERT -----------------------------------------------------------------------------------------------------


async def test_the_audit_trail_is_one_insert_more(database_url: str) -> None:
    async with notebook(database_url, subscribed=lambda bus: bus.register(AuditEventHandler())) as notes:
        with statements(notes.bus.engine.sync_engine) as seen:
            async with notes.sessions.begin() as session:
                for number in range(5):
                    await notes.bus.publish(NoteShared(note_id=number, user_id=uuid4()), session=session)
        inserts = [one.sql.split()[2] for one in seen if one.sql.startswith("INSERT")]
        assert inserts == ["whereupon_log", "whereupon_audit"]
        assert len(await notes.audited()) == 5


# --- checked at publish -----------------------------------------------------------------------------------------------


async def test_an_event_that_can_not_be_stored_is_refused_at_publish_and_stages_nothing(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        with pytest.raises(EventEncodingError, match="text"):
            await notes.bus.publish(NoteWritten(text="fine"), NoteWritten(text=1), session=session)  # type: ignore[arg-type]
        with pytest.raises(PublishError, match="metadata"):
            await notes.bus.publish(NoteWritten(text="x"), session=session, metadata={"correlation_id": "no id"})
    assert await notes.logged() == []


async def test_the_same_event_twice_in_one_call_is_refused(notes: Notebook) -> None:
    event = NoteWritten(text="once")
    async with notes.sessions.begin() as session:
        with pytest.raises(PublishError, match="published twice"):
            await notes.bus.publish(event, event, session=session)
    assert await notes.logged() == []


# --- without a session ------------------------------------------------------------------------------------------------


async def test_a_forgotten_session_is_an_error_before_anything_runs(database_url: str) -> None:
    ran: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteShared, delivery=Delivery.IN_TRANSACTION)
        async def inside(event: NoteShared) -> None:
            ran.append("inside")

        @bus.subscribe(NoteShared, delivery=Delivery.AFTER_COMMIT)
        async def after(event: NoteShared) -> None:
            ran.append("after")

    def audited(bus: EventBus) -> None:
        bus.register(AuditEventHandler())
        subscribed(bus)

    async with notebook(database_url, subscribed=audited) as notes:
        with pytest.raises(RuntimeError, match=r"^AuditEventHandler requires a database session") as caught:
            await notes.bus.publish(NoteShared(note_id=1, user_id=uuid4()))
        assert isinstance(caught.value, SessionRequiredError)
        assert "session=session" in str(caught.value)
        with pytest.raises(SessionRequiredError):
            # one that stands alone does not let the others through
            await notes.bus.publish(SharingAttempted(text="a"), NoteShared(note_id=1, user_id=uuid4()))
        await notes.bus.drain(5)
        assert await notes.logged_types() == []
        assert ran == []


async def test_an_event_that_stands_alone_survives_the_rollback_of_the_business_transaction(notes: Notebook) -> None:
    await notes.bus.publish(SharingAttempted(text="attempted"))
    assert await notes.logged_types() == ["SharingAttempted"]
    with pytest.raises(Refused):
        async with notes.sessions.begin() as session:
            await notes.write(session, "dropped")
            raise Refused
    await notes.bus.publish(SharingFailed(text="failed", reason="refused"))
    assert await notes.logged_types() == ["SharingAttempted", "SharingFailed"]


async def test_publishing_alone_while_this_task_holds_the_write_lock_of_sqlite_raises_at_once(sqlite_url: str) -> None:
    async with notebook(sqlite_url) as notes:
        async with asyncio.timeout(5):  # the busy timeout is 30 s
            async with notes.sessions.begin() as session:
                session.add(Note(text="kept"))
                await session.flush()
                with statements(notes.bus.engine.sync_engine) as seen:
                    with pytest.raises(PublishError, match=r"Pass session=session"):
                        await notes.bus.publish(SharingAttempted(text="a"))
                assert seen == []
            # neither a transaction that is over, nor one of another task, nor one that only reads is in the way
            await notes.bus.publish(SharingAttempted(text="after"))
            async with notes.sessions.begin() as session:
                await session.execute(select(Note))
                await notes.bus.publish(SharingAttempted(text="reading"))
            writing, done = asyncio.Event(), asyncio.Event()

            async def write() -> None:
                async with notes.sessions.begin() as session:
                    session.add(Note(text="another task's"))
                    await session.flush()
                    writing.set()
                    await done.wait()

            writer = asyncio.create_task(write())
            await writing.wait()
            publishing = asyncio.create_task(notes.bus.publish(SharingAttempted(text="waited")))
            await asyncio.sleep(0.05)
            done.set()
            await publishing
            await writer
        assert await notes.logged() == ["after", "reading", "waited"]


async def test_own_transactions_let_a_test_publish_without_a_session(database_url: str) -> None:
    async with notebook(database_url, subscribed=lambda bus: bus.register(AuditEventHandler())) as notes:
        with own_transactions(notes.bus):
            await notes.bus.publish(NoteShared(note_id=1, user_id=uuid4()))
        with pytest.raises(SessionRequiredError):
            await notes.bus.publish(NoteShared(note_id=2, user_id=uuid4()))
        assert await notes.logged_types() == ["NoteShared"]
        assert len(await notes.audited()) == 1


# --- many at once -----------------------------------------------------------------------------------------------------


async def test_a_hundred_publishes_at_once_never_mix_sessions_or_metadata(database_url: str) -> None:
    contexts: dict[str, set[str | None]] = {"inside": set(), "after": set()}
    wrong: list[str] = []

    def subscribed(bus: EventBus) -> None:
        bus.register(AuditEventHandler())

        async def check(where: str, event: NoteShared, context: EventContext) -> None:
            await asyncio.sleep(0)
            contexts[where].add(context.ip_address)
            if context.ip_address != f"10.0.0.{event.note_id}":
                wrong.append(f"{where}: {event.note_id} got {context.ip_address}")

        @bus.subscribe(NoteShared, delivery=Delivery.IN_TRANSACTION)
        async def inside(event: NoteShared, context: EventContext, session: AsyncSession) -> None:
            await check("inside", event, context)
            session.add(Note(text=f"{event.note_id} {context.ip_address} {id(session)}"))

        @bus.subscribe(NoteShared, delivery=Delivery.AFTER_COMMIT)
        async def after(event: NoteShared, context: EventContext) -> None:
            await check("after", event, context)

    async with notebook(database_url, subscribed=subscribed) as notes:
        sessions: dict[int, int] = {}
        # on SQLite a transaction that has read before it writes may be told to begin anew
        begun = asyncio.Semaphore(1 if database_url.startswith("sqlite") else 10)

        async def request(number: int) -> None:
            metadata = {"ip_address": f"10.0.0.{number}", "user_agent": f"agent {number}"}
            async with begun, notes.sessions.begin() as session:
                sessions[number] = id(session)
                if number % 2:
                    with request_metadata(metadata):
                        await asyncio.sleep(0)
                        await notes.bus.publish(NoteShared(note_id=number, user_id=UUID(int=number)), session=session)
                else:
                    shared = NoteShared(note_id=number, user_id=UUID(int=number))
                    await notes.bus.publish(shared, session=session, metadata=metadata)

        await asyncio.gather(*(request(number) for number in range(100)))
        await notes.bus.drain(10)
        everybody = {f"10.0.0.{number}" for number in range(100)}
        assert wrong == []
        assert contexts == {"inside": everybody, "after": everybody}
        assert set(await notes.texts()) == {f"{n} 10.0.0.{n} {sessions[n]}" for n in range(100)}
        rows = await notes.audited()
        assert {(row.resource_id, row.user_id, row.ip_address, row.user_agent) for row in rows} == {
            (f"{n}", UUID(int=n), f"10.0.0.{n}", f"agent {n}") for n in range(100)
        }


async def test_cancelling_the_publisher_after_the_commit_does_not_stop_the_handlers(database_url: str) -> None:
    started, finish = asyncio.Event(), asyncio.Event()
    ended: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def slow(event: NoteWritten) -> None:
            started.set()
            await finish.wait()
            ended.append(event.text)

    async with notebook(database_url, subscribed=subscribed) as notes:

        async def request() -> None:
            async with notes.sessions.begin() as session:
                await notes.write(session, "kept")
            await asyncio.sleep(60)

        publisher = asyncio.create_task(request())
        await started.wait()
        publisher.cancel()
        await asyncio.wait([publisher])
        finish.set()
        await notes.bus.drain(5)
    assert ended == ["kept"]
