"""IN_TRANSACTION handlers: in the publisher's transaction, a savepoint each, and never at the publisher's expense."""

# ruff: noqa: PT012, SIM117 — what fails is often the end of a block

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from typing import Any

import pytest
from sqlalchemy import func, select, text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.notebook import Note, Notebook, NoteWritten, Records, SharingAttempted, notebook
from whereupon import (
    Delivery,
    Discard,
    EventBus,
    EventContext,
    HandlerSessionError,
    HandlerTimeout,
    InMemoryEventBus,
    Retry,
    RetryLater,
)

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

INSIDE: dict[str, Any] = {"delivery": Delivery.IN_TRANSACTION}


class Broken(Exception):
    """What handlers raise in these tests."""


@pytest.fixture
def opened(database_url: str) -> Callable[..., AbstractAsyncContextManager[Notebook]]:
    """Opens a notebook with what the test subscribes."""

    def open_(subscribed: Callable[[EventBus], None], **options: Any) -> AbstractAsyncContextManager[Notebook]:
        return notebook(database_url, subscribed=subscribed, **options)

    return open_


Open = Callable[..., AbstractAsyncContextManager[Notebook]]


async def test_it_runs_inside_publish_and_commits_with_the_change(opened: Open) -> None:
    ran: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession, context: EventContext) -> None:
            ran.append(context.subscription)
            session.add(Note(text=f"index of {event.text}"))

    async with opened(subscribed) as notes:
        async with notes.sessions() as session:
            await notes.write(session, "a")
            assert ran == ["index"]
            await session.rollback()
        assert await notes.texts() == []
        async with notes.sessions.begin() as session:
            await notes.write(session, "b")
        assert await notes.texts() == ["b", "index of b"]


async def test_what_ran_inside_is_not_delivered_again(opened: Open) -> None:
    calls: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def inside(event: NoteWritten) -> None:
            calls.append(event.text)

        @bus.subscribe(NoteWritten)
        async def after(event: NoteWritten) -> None: ...

    async with opened(subscribed, deliver=True) as notes:
        async with notes.sessions.begin() as session:
            receipt = await notes.bus.publish(NoteWritten(text="a"), session=session)
        await receipt.settled(10)
        await notes.bus.drain(10)
        assert calls == ["a"]
        states = {state.subscription: state for state in await notes.bus.deliveries(receipt.events[0].event_id)}
        assert states["inside"].state == "succeeded"


@pytest.mark.parametrize("takes_session", [True, False])
async def test_a_failure_takes_back_its_own_writes_only_and_is_logged(opened: Open, takes_session: bool) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, name="first", **INSIDE)
        async def first(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="by the first"))

        if takes_session:

            @bus.subscribe(NoteWritten, name="second", **INSIDE)
            async def second(event: NoteWritten, session: AsyncSession) -> None:
                session.add(Note(text="by the second"))
                await session.flush()
                raise Broken("no reason")
        else:

            @bus.subscribe(NoteWritten, name="second", **INSIDE)
            async def second_without(event: NoteWritten) -> None:
                raise Broken("no reason")

        @bus.subscribe(NoteWritten, name="third", **INSIDE)
        async def third(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="by the third"))

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        assert await notes.texts() == ["a", "by the first", "by the third"]
        (record,) = notes.logger.of("event_handler_failed")
        assert (record["event_type"], record["error_type"], record["error_message"]) == (
            "NoteWritten",
            "Broken",
            "no reason",
        )
        assert record["subscription"] == "second"


async def test_a_failure_is_delivered_again_from_the_log_after_the_commit(opened: Open) -> None:
    attempts: list[int] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, retry=Retry(first=0.01), **INSIDE)
        async def index(event: NoteWritten, context: EventContext, session: AsyncSession) -> None:
            attempts.append(context.attempt)
            session.add(Note(text=f"attempt {context.attempt}"))
            await session.flush()
            if len(attempts) < 3:
                raise Broken

    async with opened(subscribed, deliver=True) as notes:
        async with notes.sessions() as session:
            receipt = await notes.bus.publish(NoteWritten(text="a"), session=session)
            await asyncio.sleep(0.1)
            assert attempts == [1]  # nothing of it before the commit
            await session.commit()
        await receipt.settled(10)
        assert attempts == [1, 2, 3]
        assert await notes.texts() == ["attempt 3"]


async def test_the_last_attempt_inside_leaves_a_dead_letter_with_its_traceback(opened: Open) -> None:
    from whereupon.schema import exception

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, retry=Retry(max_attempts=1), **INSIDE)
        async def index(event: NoteWritten) -> None:
            raise Broken("for good")

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
            await notes.write(session, "b")
        async with notes.sessions() as session:
            rows = (await session.execute(select(exception).order_by(exception.c.position))).all()
        assert [(row.subscription, row.state, row.attempts) for row in rows] == [("index", "dead", 1)] * 2
        assert len({row.position for row in rows}) == 2
        assert rows[0].error_message == "for good"
        assert "raise Broken" in rows[0].traceback


async def test_a_failure_in_a_transaction_that_rolls_back_leaves_nothing(opened: Open) -> None:
    from whereupon.schema import exception

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten) -> None:
            raise Broken

    async with opened(subscribed) as notes:
        async with notes.sessions() as session:
            await notes.write(session, "a")
            await session.rollback()
            assert await session.scalar(select(func.count()).select_from(exception)) == 0


@pytest.mark.parametrize(("raised", "state"), [(Discard("not for us"), "skipped"), (RetryLater(3600), "retrying")])
async def test_a_handler_says_inside_what_should_follow(opened: Open, raised: Exception, state: str) -> None:
    from whereupon.schema import exception

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, required=isinstance(raised, Discard), **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="taken back"))
            raise raised

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        async with notes.sessions() as session:
            row = (await session.execute(select(exception))).one()
        assert row.state == state
        assert row.error_message == str(raised)
        if state == "retrying":
            assert (row.next_at - row.updated_at).total_seconds() == pytest.approx(3600, abs=60)
        assert await notes.texts() == ["a"]
        assert len(notes.logger.of("event_handler_failed")) == (state == "retrying")


# --- required ---------------------------------------------------------------------------------------------------------


async def test_a_required_handler_raises_to_the_publisher(opened: Open) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, required=True, **INSIDE)
        async def check(event: NoteWritten, session: AsyncSession) -> None:
            raise Broken("refused")

    async with opened(subscribed) as notes:
        with pytest.raises(Broken, match="refused"):
            async with notes.sessions.begin() as session:
                await notes.write(session, "a")
        assert await notes.texts() == await notes.logged() == []
        assert notes.logger.of("event_handler_failed") == []


async def test_a_publisher_that_goes_on_after_a_required_handler_finds_all_of_that_publish_undone(
    opened: Open,
) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text=f"index of {event.text}"))

        @bus.subscribe(NoteWritten, required=True, **INSIDE)
        async def check(event: NoteWritten, session: AsyncSession) -> None:
            if event.text == "bad":
                raise Broken

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "kept")
            with pytest.raises(Broken):
                await notes.bus.publish(NoteWritten(text="good"), NoteWritten(text="bad"), session=session)
        assert await notes.logged() == ["kept"]
        assert await notes.texts() == ["index of kept", "kept"]


# --- the publisher's own errors ---------------------------------------------------------------------------------------


async def test_a_pending_duplicate_of_the_publisher_is_the_publishers_error(opened: Open) -> None:
    """A savepoint flushes: the duplicate would surface inside the handler's, and be logged away as its failure."""
    ran: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            ran.append(event.text)

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            session.add(Note(text="taken"))
        with pytest.raises(IntegrityError):
            async with notes.sessions.begin() as session:
                session.add(Note(text="taken"))
                await notes.bus.publish(NoteWritten(text="duplicate"), session=session)
        assert ran == []
        assert notes.logger.of("event_handler_failed") == []
        assert await notes.logged() == []


async def test_a_duplicate_of_the_handler_is_the_handlers_error(opened: Open) -> None:
    """Also where it surfaces only when its savepoint is released; the publisher's session stays usable."""

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="taken"))

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            session.add(Note(text="taken"))
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
            await notes.write(session, "b")
        assert await notes.texts() == ["a", "b", "taken"]
        assert await notes.logged() == ["a", "b"]
        assert [r["error_type"] for r in notes.logger.of("event_handler_failed")] == ["IntegrityError"] * 2


async def test_objects_of_the_publisher_survive_a_handlers_failure(opened: Open) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            await session.execute(text("SELECT * FROM no_such_table"))

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            note = Note(text="a")
            session.add(note)
            await notes.bus.publish(NoteWritten(text="a"), session=session)
            await session.refresh(note)
            note.text = "changed after the failure"
        assert await notes.texts() == ["changed after the failure"]
        assert await notes.logged() == ["a"]


# --- sessions ---------------------------------------------------------------------------------------------------------


ENDINGS: dict[str, Callable[[AsyncSession], Any]] = {
    "commit": lambda session: session.commit(),
    "rollback": lambda session: session.rollback(),
    "close": lambda session: session.close(),
    "reset": lambda session: session.reset(),
    "invalidate": lambda session: session.invalidate(),
    "sync commit": lambda session: session.run_sync(lambda sync: sync.commit()),
    "sync rollback": lambda session: session.run_sync(lambda sync: sync.rollback()),
    "async with": lambda session: session.__aexit__(None, None, None),
    "begin": lambda session: session.begin().__aenter__(),
}


@pytest.mark.parametrize("verb", ENDINGS)
async def test_a_handler_can_not_end_the_transaction_of_the_publisher(opened: Open, verb: str) -> None:
    caught: list[type[BaseException]] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def end(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="by the handler"))
            await session.flush()
            try:
                await ENDINGS[verb](session)
            except BaseException as error:
                caught.append(type(error))
                raise

    async with opened(subscribed) as notes:
        async with notes.sessions() as session:
            await notes.write(session, "a")
            assert caught == [HandlerSessionError]
            assert await notes.texts() == []
            await session.rollback()  # the publisher may, once the handler is done
            await notes.write(session, "b")
            await session.commit()
        assert await notes.texts() == await notes.logged() == ["b"]


async def test_a_handler_may_use_savepoints_of_its_own(opened: Open) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            async with session.begin_nested():
                session.add(Note(text="kept"))
            savepoint = await session.begin_nested()
            session.add(Note(text="dropped"))
            await session.flush()
            await savepoint.rollback()

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        assert await notes.texts() == ["a", "kept"]
        assert notes.logger.of("event_handler_failed") == []


async def test_a_handler_publishes_in_the_same_transaction(opened: Open) -> None:
    causes: list[Any] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def share(event: NoteWritten, session: AsyncSession, context: EventContext) -> None:
            await bus.publish(SharingAttempted(text=f"of {event.text}"), session=session)
            if event.text == "bad":
                raise Broken

        @bus.subscribe(SharingAttempted, **INSIDE)
        async def note(event: SharingAttempted, session: AsyncSession, context: EventContext) -> None:
            causes.append(context.causation_id)
            session.add(Note(text=f"sharing {event.text}"))

    async with opened(subscribed) as notes:
        good, bad = NoteWritten(text="good"), NoteWritten(text="bad")
        async with notes.sessions.begin() as session:
            await notes.bus.publish(good, bad, session=session)
        # what a handler published stands before the event that it handles, and falls with its savepoint
        assert await notes.logged() == ["of good", "good", "bad"]
        assert await notes.texts() == ["sharing of good"]
        assert causes == [good.event_id, bad.event_id]


async def test_a_handler_that_has_published_still_can_not_commit(opened: Open) -> None:
    """The guard of the inner handler ends with it; that of the outer one must not end as well."""

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def outer(event: NoteWritten, session: AsyncSession) -> None:
            await bus.publish(SharingAttempted(text="x"), session=session)
            await session.commit()

        @bus.subscribe(SharingAttempted, **INSIDE)
        async def inner(event: SharingAttempted, session: AsyncSession) -> None: ...

    async with opened(subscribed) as notes:
        async with notes.sessions() as session:
            await notes.write(session, "a")
            assert await notes.texts() == await notes.logged() == []
            (record,) = notes.logger.of("event_handler_failed")
            assert record["error_type"] == "HandlerSessionError"
            await session.rollback()


# --- time and cancellation --------------------------------------------------------------------------------------------


async def test_a_handler_that_takes_too_long_is_cancelled_and_the_publisher_goes_on(opened: Open) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, timeout=0.05, **INSIDE)
        async def slow(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="by the handler"))
            await session.flush()
            await asyncio.sleep(60)

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        assert await notes.texts() == await notes.logged() == ["a"]
        (record,) = notes.logger.of("event_handler_failed")
        assert record["error_type"] == "HandlerTimeout"
        assert "0.05 s" in record["error_message"]


async def test_a_timeout_that_a_handler_raises_itself_is_not_taken_for_its_own(opened: Open) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, timeout=60, **INSIDE)
        async def ask(event: NoteWritten) -> None:
            raise TimeoutError("the bank does not answer")

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        (record,) = notes.logger.of("event_handler_failed")
        assert (record["error_type"], record["error_message"]) == ("TimeoutError", "the bank does not answer")


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
async def test_a_handler_cut_off_in_the_midst_of_a_statement_takes_the_transaction_along_and_says_so(
    postgres_url: str, driver: str
) -> None:
    """The connection is of no more use then: the publisher must learn why, and nothing may be committed."""

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, timeout=0.1, **INSIDE)
        async def slow(event: NoteWritten, session: AsyncSession) -> None:
            await session.execute(text("SELECT pg_sleep(60)"))

    async with notebook(postgres_url.replace("asyncpg", driver), subscribed=subscribed) as notes:
        async with notes.sessions() as session:
            with pytest.raises(HandlerTimeout, match=r"slow .* 0\.1 s"):
                await notes.write(session, "a")
            await session.rollback()
        assert await notes.texts() == await notes.logged() == []


async def test_a_cancelled_error_raised_by_a_handler_is_its_failure(opened: Open) -> None:
    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, name="raises", **INSIDE)
        async def raises(event: NoteWritten) -> None:
            raise asyncio.CancelledError("a library's own")

        @bus.subscribe(NoteWritten, name="next", **INSIDE)
        async def after(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="by the next"))

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        assert await notes.texts() == ["a", "by the next"]
        (record,) = notes.logger.of("event_handler_failed")
        assert record["error_type"] == "CancelledError"


async def test_cancelling_the_publisher_while_a_handler_runs_cancels_both(opened: Open) -> None:
    running = asyncio.Event()

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, **INSIDE)
        async def slow(event: NoteWritten) -> None:
            running.set()
            await asyncio.sleep(60)

    async with opened(subscribed) as notes:

        async def publish() -> None:
            async with notes.sessions.begin() as session:
                await notes.write(session, "a")

        publisher = asyncio.create_task(publish())
        await running.wait()
        publisher.cancel()
        with pytest.raises(asyncio.CancelledError):
            await publisher
        assert await notes.texts() == await notes.logged() == []
        assert notes.logger.of("event_handler_failed") == []


async def test_a_logger_that_raises_does_not_reach_the_publisher(
    opened: Open, caplog: pytest.LogCaptureFixture
) -> None:
    class BrokenRecords(Records):
        def warning(self, event: str, /, **details: Any) -> None:
            raise Broken("no disk")

    def subscribed(bus: EventBus) -> None:
        bus.logger = BrokenRecords()

        @bus.subscribe(NoteWritten, **INSIDE)
        async def fail(event: NoteWritten) -> None:
            raise Broken

    async with opened(subscribed) as notes:
        async with notes.sessions.begin() as session:
            await notes.write(session, "a")
        assert await notes.texts() == await notes.logged() == ["a"]
        assert "could not be logged" in caplog.text


# --- without a log ----------------------------------------------------------------------------------------------------


@pytest.fixture
async def sessions(database_url: str) -> AsyncIterator[async_sessionmaker[AsyncSession]]:
    async with notebook(database_url) as notes:
        yield notes.sessions


async def test_the_bus_in_memory_runs_handlers_in_the_transaction_as_well(
    sessions: async_sessionmaker[AsyncSession],
) -> None:
    logger = Records()
    after: list[str] = []
    async with InMemoryEventBus(logger=logger) as bus:

        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text=f"index of {event.text}"))

        @bus.subscribe(NoteWritten, **INSIDE)
        async def fail(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text="by the one that fails"))
            await session.flush()
            raise Broken

        @bus.subscribe(NoteWritten)
        async def hear(event: NoteWritten) -> None:
            after.append(event.text)

        for outcome in ("rollback", "commit"):
            async with sessions() as session:
                session.add(Note(text=outcome))
                await bus.publish(NoteWritten(text=outcome), session=session)
                assert after == []
                await getattr(session, outcome)()
        await bus.drain(5)
    assert after == ["commit"]
    async with sessions() as session:
        assert sorted(await session.scalars(select(Note.text))) == ["commit", "index of commit"]
    assert [record["handler_name"] for record in logger.of("event_handler_failed")] == ["fail", "fail"]


async def test_the_bus_in_memory_undoes_a_publish_that_a_required_handler_refuses(
    sessions: async_sessionmaker[AsyncSession],
) -> None:
    after: list[str] = []
    async with InMemoryEventBus() as bus:

        @bus.subscribe(NoteWritten, **INSIDE)
        async def index(event: NoteWritten, session: AsyncSession) -> None:
            session.add(Note(text=f"index of {event.text}"))

        @bus.subscribe(NoteWritten, **INSIDE, required=True)
        async def refuse_b(event: NoteWritten, session: AsyncSession) -> None:
            if event.text == "b":
                raise Broken

        @bus.subscribe(NoteWritten)
        async def hear(event: NoteWritten) -> None:
            after.append(event.text)

        async with sessions.begin() as session:
            session.add(Note(text="the change"))
            with pytest.raises(Broken):
                await bus.publish(NoteWritten(text="a"), NoteWritten(text="b"), session=session)
        await bus.drain(5)
    assert after == []
    async with sessions() as session:
        assert list(await session.scalars(select(Note.text))) == ["the change"]
