"""One attempt, one outcome: whatever is cut, killed or rolled back in between."""

# ruff: noqa: PT012 — what fails is often the end of a block

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from sqlalchemy import event, make_url, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from tests.notebook import Records, until
from tests.proxy import Proxy, Side, cancelled, forward
from whereupon import (
    Delivery,
    DomainEvent,
    EventBus,
    EventContext,
    EventDefinitionError,
    InMemoryEventBus,
    Outcome,
    PublishError,
    SessionRequiredError,
    Workflow,
    WorkflowClosedError,
    request_metadata,
)
from whereupon.schema import log
from whereupon.schema import workflow as workflow_table

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class SignupAttempted(DomainEvent):
    email: str


class SignupSucceeded(DomainEvent):
    user_id: UUID
    email: str


class SignupFailed(DomainEvent):
    email: str
    reason: str


class SignupInterrupted(DomainEvent, outcome=Outcome.FAILED):
    email: str


Signup = Workflow(SignupAttempted, SignupSucceeded, SignupFailed)
ADA = "ada@example.com"
SUCCEEDED, FAILED = [("SignupAttempted", None), ("SignupSucceeded", None)], "SignupFailed"


def failed(reason: str) -> list[tuple[str, str | None]]:
    return [("SignupAttempted", None), ("SignupFailed", reason)]


class Site:
    """A bus, a table of users, and what the log says of sign-ups."""

    def __init__(self, bus: EventBus, logger: Records) -> None:
        self.bus = bus
        self.logger = logger
        self.sessions = async_sessionmaker(bus.engine, expire_on_commit=False)

    async def add_user(self, session: AsyncSession, email: str = ADA) -> UUID:
        user_id = uuid4()
        await session.execute(text("INSERT INTO users VALUES (:email)"), {"email": email})
        return user_id

    async def users(self) -> list[str]:
        async with self.sessions() as session:
            return list(await session.scalars(text("SELECT email FROM users ORDER BY email")))

    async def logged(self, email: str = ADA) -> list[tuple[str, str | None]]:
        """The types, and reasons, of the events of one person's sign-up, in the order of the log."""
        async with self.sessions() as session:
            rows = (await session.execute(select(log.c.type, log.c.payload).order_by(log.c.position))).all()
        found = [(row.type, msgspec.json.decode(row.payload)) for row in rows]
        return [(type_, fields.get("reason")) for type_, fields in found if fields.get("email") == email]

    async def states(self) -> list[str]:
        async with self.sessions() as session:
            return list(await session.scalars(select(workflow_table.c.state).order_by(workflow_table.c.opened_at)))

    async def sign_up(self, email: str = ADA) -> None:
        async with self.bus.workflow(Signup, email=email) as attempt, self.sessions.begin() as session:
            await attempt.succeeded(user_id=await self.add_user(session, email), session=session)


@asynccontextmanager
async def site(
    url: str, *, subscribed: Callable[[EventBus], None] | None = None, **options: Any
) -> AsyncIterator[Site]:
    logger = Records()
    bus = EventBus(url, create_tables=True, logger=logger, **{"deliver": False, **options})
    if subscribed is not None:
        subscribed(bus)
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE IF NOT EXISTS users (email VARCHAR(100) PRIMARY KEY)"))
    async with bus:
        yield Site(bus, logger)
    await bus.engine.dispose()


@pytest.fixture
async def here(database_url: str) -> AsyncIterator[Site]:
    async with site(database_url) as here:
        yield here


async def eventually(condition: Callable[[], Awaitable[object]], within: float = 60) -> None:
    async with asyncio.timeout(within):
        while not await condition():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


# --- outcomes ---------------------------------------------------------------------------------------------------------


async def test_the_attempt_is_committed_before_the_work_starts(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt:
        assert await here.logged() == [("SignupAttempted", None)]
        assert await here.states() == ["open"]
        await attempt.failed("changed_their_mind")


async def test_success_commits_with_the_work(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt:
        async with here.sessions.begin() as session:
            await attempt.succeeded(user_id=await here.add_user(session), session=session)
            assert await here.logged() == [("SignupAttempted", None)]
        assert await here.logged() == SUCCEEDED
    assert await here.logged() == SUCCEEDED
    assert (await here.states(), await here.users()) == (["succeeded"], [ADA])


async def test_success_can_be_given_as_an_event(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
        await attempt.succeeded(SignupSucceeded(user_id=uuid4(), email=ADA), session=session)
    assert await here.logged() == SUCCEEDED


async def test_publishing_the_success_on_the_bus_is_the_outcome_too(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA), here.sessions.begin() as session:
        await here.bus.publish(SignupSucceeded(user_id=await here.add_user(session), email=ADA), session=session)
    assert await here.logged() == SUCCEEDED
    assert await here.states() == ["succeeded"]


async def test_outside_of_a_block_the_events_are_published_as_any_other(here: Site) -> None:
    async with here.sessions.begin() as session:
        await here.bus.publish(SignupSucceeded(user_id=uuid4(), email=ADA), session=session)
    await here.bus.publish(SignupFailed(email=ADA, reason="x"))
    assert await here.states() == []
    assert await here.logged() == [("SignupSucceeded", None), ("SignupFailed", "x")]


class EmailTaken(Exception):
    reason = "email_taken"


async def test_an_exception_fails_the_attempt_with_its_reason_and_is_raised_again(here: Site) -> None:
    with pytest.raises(EmailTaken):
        async with here.bus.workflow(Signup, email=ADA):
            raise EmailTaken("ada has it")
    assert await here.logged() == failed("email_taken")
    assert await here.states() == ["failed"]


@pytest.mark.parametrize(
    "error",
    [OSError("disk full, password=correct horse 7"), UnicodeDecodeError("utf-8", b"secret", 0, 1, "secret")],
)
async def test_nothing_of_an_exception_but_its_type_is_stored(here: Site, error: Exception) -> None:
    with pytest.raises(type(error)):
        async with here.bus.workflow(Signup, email=ADA):
            raise error
    assert await here.logged() == failed(type(error).__name__)


async def test_a_workflow_may_have_one_word_for_what_nobody_foresaw(here: Site) -> None:
    workflow = Workflow(SignupAttempted, SignupSucceeded, SignupFailed, unforeseen="internal_error")
    with pytest.raises(OSError, match="disk full"):
        async with here.bus.workflow(workflow, email=ADA):
            raise OSError("disk full")
    assert await here.logged() == failed("internal_error")


async def test_a_block_left_without_an_outcome_has_failed(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA):
        pass
    assert await here.logged() == failed("not_completed")


async def test_a_failure_that_is_told_commits_at_once(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt:
        await attempt.failed("email_taken")
        assert await here.logged() == failed("email_taken")
    assert await here.logged() == failed("email_taken")


async def test_a_failure_may_commit_with_what_is_recorded_of_it(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
        await here.add_user(session, "failures@example.com")
        await attempt.failed("email_taken", session=session)
        assert await here.logged() == [("SignupAttempted", None)]
    assert await here.logged() == failed("email_taken")
    assert await here.users() == ["failures@example.com"]


async def test_a_failure_whose_transaction_is_rolled_back_is_published_with_its_reason(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions() as session:
        await attempt.failed("email_taken", session=session)
        await session.rollback()
    assert await here.logged() == failed("email_taken")


async def test_a_rollback_after_success_was_told_is_a_failure(here: Site) -> None:
    with pytest.raises(EmailTaken):
        async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
            await attempt.succeeded(user_id=await here.add_user(session), session=session)
            raise EmailTaken
    assert await here.logged() == failed("email_taken")
    assert await here.users() == []


async def test_a_quiet_rollback_after_success_was_told_is_a_failure(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions() as session:
        await attempt.succeeded(user_id=uuid4(), session=session)
        await session.rollback()
    assert await here.logged() == failed("not_completed")


async def test_a_success_rolled_back_to_a_savepoint_may_be_told_again(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
        savepoint = await session.begin_nested()
        await attempt.succeeded(user_id=uuid4(), session=session)
        await savepoint.rollback()
        await attempt.succeeded(user_id=await here.add_user(session), session=session)
    assert await here.logged() == SUCCEEDED


async def test_a_success_only_in_a_savepoint_that_is_rolled_back_is_none(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
        savepoint = await session.begin_nested()
        await attempt.succeeded(user_id=uuid4(), session=session)
        await savepoint.rollback()
        await here.add_user(session)
    assert await here.logged() == failed("not_completed")


async def test_work_that_is_done_again_after_a_rollback_succeeds_once(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt:
        for round_ in range(3):
            async with here.sessions() as session:
                await attempt.succeeded(user_id=await here.add_user(session), session=session)
                if round_ < 2:
                    await session.rollback()
                else:
                    await session.commit()
    assert await here.logged() == SUCCEEDED


async def test_an_exception_after_the_commit_leaves_the_success(here: Site) -> None:
    with pytest.raises(EmailTaken):
        async with here.bus.workflow(Signup, email=ADA) as attempt:
            async with here.sessions.begin() as session:
                await attempt.succeeded(user_id=uuid4(), session=session)
            raise EmailTaken
    assert await here.logged() == SUCCEEDED


async def test_a_block_inside_of_its_transaction_waits_for_what_becomes_of_that(here: Site) -> None:
    for email, commits in ((ADA, True), ("bob@example.com", False)):
        async with here.sessions() as session:
            async with here.bus.workflow(Signup, email=email) as attempt:
                await attempt.succeeded(user_id=await here.add_user(session, email), session=session)
            assert await here.logged(email) == [("SignupAttempted", None)]
            await (session.commit() if commits else session.rollback())
        await here.bus._attempts.finish(10)
    assert await here.logged() == SUCCEEDED
    assert await here.logged("bob@example.com") == [("SignupAttempted", None), ("SignupFailed", "not_completed")]


async def test_success_told_twice_in_a_transaction_rolls_it_back(here: Site) -> None:
    with pytest.raises(WorkflowClosedError, match="has succeeded already"):
        async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
            await attempt.succeeded(user_id=await here.add_user(session), session=session)
            await attempt.succeeded(user_id=uuid4(), session=session)
    assert await here.logged() == failed("WorkflowClosedError")
    assert await here.users() == []


async def test_success_told_after_the_commit_rolls_the_second_transaction_back(here: Site) -> None:
    with pytest.raises(WorkflowClosedError, match="has succeeded already"):
        async with here.bus.workflow(Signup, email=ADA) as attempt:
            async with here.sessions.begin() as session:
                await attempt.succeeded(user_id=await here.add_user(session), session=session)
            async with here.sessions.begin() as session:
                await here.add_user(session, "twice@example.com")
                await attempt.succeeded(user_id=uuid4(), session=session)
    assert await here.logged() == SUCCEEDED
    assert await here.users() == [ADA]


async def test_whoever_ignores_that_an_attempt_is_closed_can_t_commit(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as attempt:
        await attempt.failed("email_taken")
        async with here.sessions() as session:
            await here.add_user(session)
            with pytest.raises(WorkflowClosedError, match="has failed already"):
                await attempt.succeeded(user_id=uuid4(), session=session)
            with pytest.raises(WorkflowClosedError, match="could not be published in this transaction"):
                await session.commit()
    assert await here.logged() == failed("email_taken")
    assert await here.users() == []


async def test_a_second_transaction_does_not_wait_for_the_first_for_ever(postgres_url: str) -> None:
    async with site(postgres_url) as here, here.bus.workflow(Signup, email=ADA) as attempt:
        async with here.sessions.begin() as session:
            await attempt.succeeded(user_id=uuid4(), session=session)
            async with here.sessions() as other:
                with pytest.raises(WorkflowClosedError, match="in a transaction that has not ended"):
                    await attempt.succeeded(user_id=uuid4(), session=other)
            with pytest.raises(WorkflowClosedError, match="in a transaction that has not ended"):
                await attempt.failed("x")
        assert await here.logged() == SUCCEEDED


async def test_an_attempt_is_entered_once(here: Site) -> None:
    attempt = here.bus.workflow(Signup, email=ADA)
    async with attempt:
        await attempt.failed("x")
    with pytest.raises(RuntimeError, match="was entered before"):
        async with attempt:
            pytest.fail("the block ran")
    assert await here.logged() == failed("x")


async def test_an_outcome_needs_the_block(here: Site) -> None:
    attempt = here.bus.workflow(Signup, email=ADA)
    async with here.sessions() as session:
        with pytest.raises(WorkflowClosedError, match="is not open"):
            await attempt.succeeded(user_id=uuid4(), session=session)


async def test_success_needs_the_session_of_the_work(here: Site) -> None:
    with pytest.raises(SessionRequiredError, match="SignupSucceeded"):
        async with here.bus.workflow(Signup, email=ADA) as attempt:
            await attempt.succeeded(user_id=uuid4())
    assert await here.logged() == failed("SessionRequiredError")


async def test_what_is_missing_in_a_success_fails_the_attempt(here: Site) -> None:
    with pytest.raises(TypeError, match="user_id"):
        async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
            await attempt.succeeded(session=session)
    with pytest.raises(PublishError, match="takes one SignupSucceeded"):
        async with here.bus.workflow(Signup, email="bob@example.com") as attempt, here.sessions.begin() as session:
            await attempt.succeeded(SignupFailed(email="x", reason="y"), session=session)  # type: ignore[call-overload] # pyright: ignore
    assert await here.logged() == failed("TypeError")
    assert await here.logged("bob@example.com") == [("SignupAttempted", None), ("SignupFailed", "PublishError")]


async def test_attempts_within_attempts_have_an_outcome_each(here: Site) -> None:
    async with here.bus.workflow(Signup, email=ADA) as outer:
        async with here.bus.workflow(Signup, email="bob@example.com"):
            await here.bus.publish(SignupFailed(email="bob@example.com", reason="inner"))
        async with here.sessions.begin() as session:
            await outer.succeeded(user_id=uuid4(), session=session)
    assert await here.logged() == SUCCEEDED
    assert await here.logged("bob@example.com") == [("SignupAttempted", None), ("SignupFailed", "inner")]


async def test_an_outcome_shares_the_correlation_of_its_attempt(database_url: str) -> None:
    heard: list[tuple[str, EventContext]] = []

    def subscribed(bus: EventBus) -> None:
        for cls in (SignupAttempted, SignupSucceeded, SignupFailed):

            async def hear(event: DomainEvent, context: EventContext) -> None:
                heard.append((type(event).__name__, context))

            bus.subscribe(cls, hear, name=f"hear_{cls.__name__}")

    async with site(database_url, subscribed=subscribed, deliver=True) as here:
        await here.sign_up()
        request = uuid4()
        with request_metadata({"correlation_id": request, "actor": "ada"}):
            attempt = here.bus.workflow(Signup, email=ADA)
            async with attempt:
                pass
    assert len(heard) == 4
    first = next(context for name, context in heard if name == "SignupAttempted" and context.actor is None)
    by_correlation = Counter((name, context.correlation_id, context.actor) for name, context in heard)
    assert by_correlation == {
        ("SignupAttempted", first.event_id, None): 1,
        ("SignupSucceeded", first.event_id, None): 1,
        ("SignupAttempted", request, "ada"): 1,
        ("SignupFailed", request, "ada"): 1,
    }


async def test_an_attempt_in_the_midst_of_a_write_on_sqlite_is_refused(sqlite_url: str) -> None:
    async with site(sqlite_url) as here:
        with pytest.raises(PublishError, match="only write lock"):
            async with here.sessions.begin() as session:
                await here.add_user(session)
                async with here.bus.workflow(Signup, email=ADA):
                    pytest.fail("the block ran")
        assert (await here.logged(), await here.states()) == ([], [])


async def test_a_failure_that_can_t_be_made_is_closed_as_interrupted(database_url: str) -> None:
    async def refuse(event: SignupFailed) -> None:
        if event.reason == "email_taken":
            raise ValueError("not in this house")

    def subscribed(bus: EventBus) -> None:
        bus.subscribe(SignupFailed, refuse, delivery=Delivery.IN_TRANSACTION, required=True)

    async with site(database_url, subscribed=subscribed) as here:
        with pytest.raises(EmailTaken):
            async with here.bus.workflow(Signup, email=ADA):
                raise EmailTaken
        assert await here.logged() == failed("interrupted")
        assert await here.states() == ["interrupted"]
        [record] = here.logger.of("workflow_failure_refused")
        assert "not in this house" in record["error_message"]


# --- cancellation -----------------------------------------------------------------------------------------------------


async def test_a_caller_cancelled_at_any_point_leaves_one_outcome(here: Site) -> None:
    """The same work again and again, cancelled one step of the event loop later each time, until it gets through."""
    number, got_through = 0, 0
    while got_through < 3:
        email = f"{number}@example.com"
        task = asyncio.create_task(here.sign_up(email))
        for _ in range(number):
            await asyncio.sleep(0)
            if task.done():
                break
        else:
            # steps alone don't get a database to answer
            await asyncio.sleep(0.0002 * number)
        got_through += task.done()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        number += 1
        assert number < 500
    await here.bus._attempts.finish(30)
    users = await here.users()
    for n in range(number):
        found = [type_ for type_, _ in await here.logged(f"{n}@example.com")]
        outcome = "SignupSucceeded" if f"{n}@example.com" in users else "SignupFailed"
        assert found in ([], ["SignupAttempted", outcome]), f"cancelled at step {n}"
    assert "open" not in await here.states()
    assert "succeeded" in await here.states()
    assert "failed" in await here.states()


async def test_leaving_the_bus_waits_for_outcomes_that_are_still_to_be_written(database_url: str) -> None:
    async with site(database_url) as here:
        entered = asyncio.Event()

        async def work() -> None:
            async with here.bus.workflow(Signup, email=ADA):
                entered.set()
                await asyncio.Event().wait()

        task = asyncio.create_task(work())
        await entered.wait()
        task.cancel()
        await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
    async with site(database_url) as here:
        assert await here.logged() == failed("CancelledError")


# --- connections that break -------------------------------------------------------------------------------------------


class Cut(Proxy):
    """A proxy to PostgreSQL that can cut a connection at its COMMIT, before the server hears of it or after."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.at: str | None = None
        """`before` or `after` the COMMIT: whether the server hears of it."""
        self.cuts = 0

    async def relay(self, client: Side, server: Side) -> None:
        answering = asyncio.ensure_future(forward(server, client))
        answering.add_done_callback(lambda it: None if it.cancelled() else client.writer.close())  # the server ended it
        try:
            while data := await client.reader.read(65536):
                if self.at is not None and b"COMMIT" in data and b"COMMITTED" not in data:
                    at, self.at = self.at, None
                    self.cuts += 1
                    await cancelled(answering)
                    if at == "after":
                        server.writer.write(data)
                        await server.reader.read(65536)  # it is committed, and the client will never know
                    break
                server.writer.write(data)
        finally:
            await cancelled(answering)


@pytest.mark.parametrize("driver", ["asyncpg", "psycopg"])
@pytest.mark.parametrize(("at", "outcome"), [("before", "SignupFailed"), ("after", "SignupSucceeded")])
async def test_a_connection_lost_during_the_commit_of_the_work_leaves_the_outcome_that_the_database_has(
    postgres_url: str, at: str, outcome: str, driver: str
) -> None:
    url = make_url(postgres_url).set(drivername=f"postgresql+{driver}").render_as_string(hide_password=False)
    async with Cut(url) as cut, site(cut.url) as here:
        with pytest.raises((DBAPIError, OSError)):
            async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
                await attempt.succeeded(user_id=await here.add_user(session), session=session)
                cut.at = at
        assert cut.cuts == 1
        assert [type_ for type_, _ in await here.logged()] == ["SignupAttempted", outcome]
        assert await here.users() == ([ADA] if outcome == "SignupSucceeded" else [])


@pytest.mark.parametrize(("at", "logged"), [("before", []), ("after", ["SignupAttempted", "SignupFailed"])])
async def test_a_connection_lost_during_the_commit_of_the_attempt_leaves_none_open(
    postgres_url: str, at: str, logged: list[str]
) -> None:
    async with Cut(postgres_url) as cut, site(cut.url) as here:
        await here.sign_up("first@example.com")
        cut.at = at
        with pytest.raises((DBAPIError, OSError)):
            async with here.bus.workflow(Signup, email=ADA):
                pytest.fail("the block ran")
        await here.bus._attempts.finish(10)
        assert [type_ for type_, _ in await here.logged()] == logged
        assert "open" not in await here.states()


async def test_a_connection_lost_during_the_commit_of_the_failure_leaves_one_failure(postgres_url: str) -> None:
    for at in ("before", "after"):
        async with Cut(postgres_url) as cut, site(cut.url) as here:
            async with here.bus.workflow(Signup, email=at):
                cut.at = at
            await here.bus._attempts.finish(10)
            assert cut.cuts == 1
            assert await here.logged(at) == [("SignupAttempted", None), ("SignupFailed", "not_completed")]


async def test_the_failure_waits_for_a_commit_in_doubt(postgres_url: str) -> None:
    """The client's side of the transaction is gone, the server's goes on for a while, and commits."""
    async with site(postgres_url) as here:
        release, connection = asyncio.Event(), await here.bus.engine.connect()
        attempt = here.bus.workflow(Signup, email=ADA)

        async def commit_later() -> None:
            await release.wait()
            await session.commit()

        async with attempt:
            session = AsyncSession(bind=connection)
            await attempt.succeeded(user_id=await here.add_user(session), session=session)
            committing = asyncio.create_task(commit_later())
            attempt._pending = None  # type: ignore[attr-defined]  # as this side has lost sight of it
            leaving = asyncio.create_task(attempt._leave("ConnectionError"))
            _, waits = await asyncio.wait([leaving], timeout=0.3)
            assert waits
            release.set()
            await leaving
            await committing
            await session.close()
        await connection.close()
        assert await here.logged() == SUCCEEDED


@pytest.mark.parametrize("when", ["before_commit", "in_the_work"])
async def test_a_connection_that_the_server_ends_leaves_a_failure(postgres_url: str, when: str) -> None:
    async with site(postgres_url) as here, here.bus.engine.connect() as killer:
        with pytest.raises((DBAPIError, OSError)):
            async with here.bus.workflow(Signup, email=ADA) as attempt, here.sessions.begin() as session:
                backend = await session.scalar(text("SELECT pg_backend_pid()"))
                await attempt.succeeded(user_id=await here.add_user(session), session=session)
                await killer.execute(text("SELECT pg_terminate_backend(:pid, 5000)"), {"pid": backend})
                if when == "in_the_work":
                    await session.execute(text("SELECT 1"))
        [(_, _), (outcome, _)] = await here.logged()
        assert outcome == "SignupFailed"
        assert await here.users() == []


async def test_a_failure_is_written_once_the_database_is_back(postgres_url: str) -> None:
    async with Cut(postgres_url) as cut, site(cut.url) as here:
        await here.sign_up("first@example.com")
        engine = here.bus.engine.sync_engine
        away = True

        @event.listens_for(engine, "begin")
        def begin(connection: Any) -> None:
            if away:
                raise OSError("the network is unreachable")

        away = False
        with pytest.raises(EmailTaken):
            async with here.bus.workflow(Signup, email=ADA):
                away = True
                raise EmailTaken
        [record] = here.logger.of("workflow_outcome_delayed")
        assert "network is unreachable" in record["error_message"]
        away = False
        await here.bus._attempts.finish(10)
        assert await here.logged() == failed("email_taken")


# --- processes that die -----------------------------------------------------------------------------------------------

APP = """
import asyncio, os, sys, time
from uuid import uuid4
from sqlalchemy import text
from sqlalchemy.ext.asyncio import async_sessionmaker
from tests.test_workflow import Signup
from whereupon import EventBus

bus = EventBus(os.environ["DATABASE"], lease=1, deliver=False, create_tables=True)
sessions = async_sessionmaker(bus.engine)

def say(word):
    print(word, flush=True)

async def main(stop_at):
    async with bus:
        async with bus.workflow(Signup, email="ada@example.com") as attempt:
            say("attempted")
            if stop_at == "work":
                await asyncio.to_thread(sys.stdin.readline)
            async with sessions.begin() as session:
                await session.execute(text("INSERT INTO users VALUES ('ada@example.com')"))
                await attempt.succeeded(user_id=uuid4(), session=session)
                say("told")
                if stop_at == "told":
                    await asyncio.to_thread(sys.stdin.readline)
            say("committed")
            if stop_at == "committed":
                await asyncio.to_thread(sys.stdin.readline)

try:
    asyncio.run(main(sys.argv[1]))
except Exception as error:
    say(type(error).__name__)
"""
WORKER = """
import os
import tests.test_workflow
from whereupon import EventBus

bus = EventBus(os.environ["DATABASE"], lease=1, create_tables=True)
"""

Starting = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Starting]:
    """Start the application, or a worker; what still runs at the end is killed."""
    (tmp_path / "signup.py").write_text(APP)
    (tmp_path / "serving.py").write_text(WORKER)
    running: list[subprocess.Popen[str]] = []

    def start(database: str, *arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments],
            cwd=tmp_path,
            env={**os.environ, "DATABASE": database, "PYTHONPATH": str(Path(__file__).parent.parent)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )
        running.append(process)
        return process

    yield start
    for process in running:
        process.kill()
        process.communicate()


async def says(process: subprocess.Popen[str], word: str) -> None:
    assert process.stdout is not None
    async with asyncio.timeout(60):
        while (line := await asyncio.to_thread(process.stdout.readline)) != f"{word}\n":
            assert line, f"it ended without saying {word!r}"


@pytest.mark.slow
@pytest.mark.parametrize("stop_at", ["work", "told", "committed"])
async def test_of_a_process_that_is_killed_the_workers_close_the_attempt_once(
    here: Site, start: Starting, stop_at: str
) -> None:
    url = here.bus.engine.url.render_as_string(hide_password=False)
    for _ in range(2):
        start(url, "-m", "whereupon.cli", "worker", "serving:bus")
    app = start(url, "signup.py", stop_at)
    await says(app, {"work": "attempted"}.get(stop_at, stop_at))
    assert await here.states() == ["succeeded" if stop_at == "committed" else "open"]
    await asyncio.sleep(1.5)  # it lives, so its attempt is nobody's business
    assert await here.states() == ["succeeded" if stop_at == "committed" else "open"]
    app.send_signal(signal.SIGKILL)
    app.wait()
    await eventually(lambda: _closed(here))
    await asyncio.sleep(1.5)
    if stop_at == "committed":
        assert (await here.logged(), await here.users()) == (SUCCEEDED, [ADA])
    else:
        assert (await here.logged(), await here.users()) == (failed("interrupted"), [])
        assert await here.states() == ["interrupted"]


async def _closed(here: Site) -> bool:
    return "open" not in await here.states()


@pytest.mark.slow
async def test_a_process_that_stood_still_past_its_lease_can_t_commit_its_work(here: Site, start: Starting) -> None:
    url = here.bus.engine.url.render_as_string(hide_password=False)
    app = start(url, "signup.py", "work")
    await says(app, "attempted")
    app.send_signal(signal.SIGSTOP)
    start(url, "-m", "whereupon.cli", "worker", "serving:bus")
    await eventually(lambda: _closed(here))
    app.send_signal(signal.SIGCONT)
    assert app.stdin is not None
    app.stdin.write("\n")
    app.stdin.flush()
    await says(app, "WorkflowClosedError")
    assert await here.logged() == failed("interrupted")
    assert await here.users() == []


@pytest.mark.slow
async def test_a_process_that_stood_still_with_its_work_told_keeps_its_success(
    postgres_url: str, start: Starting
) -> None:
    async with site(postgres_url) as here:
        app = start(postgres_url, "signup.py", "told")
        await says(app, "told")
        app.send_signal(signal.SIGSTOP)
        start(postgres_url, "-m", "whereupon.cli", "worker", "serving:bus")
        await asyncio.sleep(3)
        assert await here.states() == ["open"]  # its row is locked: how the transaction ends is not known yet
        app.send_signal(signal.SIGCONT)
        assert app.stdin is not None
        app.stdin.write("\n")
        app.stdin.flush()
        await says(app, "committed")
        await eventually(lambda: _closed(here))
        assert await here.logged() == SUCCEEDED
        assert await here.users() == [ADA]


# --- what sweeping makes of it ----------------------------------------------------------------------------------------


async def orphan(here: Site) -> None:
    """Have all attempts be those of a process that is gone."""
    async with here.bus.engine.begin() as connection:
        await connection.execute(workflow_table.update().values(process=uuid4()))


async def test_sweepers_at_once_close_each_attempt_once(database_url: str) -> None:
    emails = [f"{n}@example.com" for n in range(20)]
    async with site(database_url) as here, site(database_url) as there:
        attempts = [here.bus.workflow(Signup, email=email) for email in emails]
        for attempt in attempts:
            await attempt._open()
        assert await there.bus._attempts.sweep() == 0
        await orphan(here)
        await asyncio.gather(*(one.bus._attempts.sweep() for one in (here, there, here, there)))
        for email in emails:
            assert await here.logged(email) == [("SignupAttempted", None), ("SignupFailed", "interrupted")]
        for attempt in attempts:
            await attempt._leave("too_late")
        assert len(here.logger.of("workflow_was_interrupted")) == 20
        for email in emails:
            assert await here.logged(email) == [("SignupAttempted", None), ("SignupFailed", "interrupted")]


async def test_an_interruption_may_have_a_class_of_its_own_that_hears_of_it(database_url: str) -> None:
    heard: list[tuple[SignupInterrupted, EventContext]] = []
    inside: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(SignupInterrupted)
        async def hear(event: SignupInterrupted, context: EventContext) -> None:
            heard.append((event, context))

        @bus.subscribe(SignupInterrupted, delivery=Delivery.IN_TRANSACTION)
        async def hear_inside(event: SignupInterrupted) -> None:
            inside.append(event.email)

    own = Workflow(SignupAttempted, SignupSucceeded, SignupFailed, interrupted=SignupInterrupted)
    async with site(database_url, subscribed=subscribed, deliver=True) as here:
        attempt = here.bus.workflow(own, email=ADA)
        with request_metadata({"actor": "ada"}):
            await attempt._open()
        await orphan(here)
        await here.bus._attempts.sweep()
        await until(lambda: bool(heard))
        [(event, context)] = heard
        assert (event.email, context.actor, context.correlation_id) == (ADA, "ada", attempt.id)
        assert event.occurred_at > attempt.attempted.occurred_at
        assert inside == [ADA]
        assert await here.states() == ["interrupted"]


async def test_a_worker_that_does_not_know_the_class_closes_the_attempt_all_the_same(
    database_url: str, start: Starting
) -> None:
    heard: list[SignupFailed] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(SignupFailed)
        async def hear(event: SignupFailed) -> None:
            heard.append(event)

    async with site(database_url, subscribed=subscribed, deliver=True) as here:
        attempt = here.bus.workflow(Signup, email=ADA)
        await attempt._open()
        await orphan(here)
        sweeps = "import asyncio, os\nfrom whereupon import EventBus\nbus = EventBus(os.environ['DATABASE'])\n"
        sweeps += "async def main():\n    async with bus:\n        await bus._attempts.sweep()\nasyncio.run(main())"
        assert await asyncio.to_thread(start(database_url, "-c", sweeps).wait, 30) == 0
        await until(lambda: bool(heard))
        assert heard[0].reason == "interrupted"
        assert heard[0].occurred_at > attempt.attempted.occurred_at
        assert await here.logged() == failed("interrupted")


async def test_a_worker_leaves_what_is_open_to_others_when_its_bus_closes(database_url: str) -> None:
    async with site(database_url) as here:
        attempt = here.bus.workflow(Signup, email=ADA)
        await attempt._open()
    async with site(database_url, deliver=True, lease=1) as here:
        await eventually(lambda: _closed(here))
        assert await here.logged() == failed("interrupted")


# --- definitions ------------------------------------------------------------------------------------------------------


class LoginAttempted(DomainEvent):
    email: str


class LoginFailed(DomainEvent):
    email: str
    reason: str


class OrderPaid(DomainEvent):
    order_id: UUID


def test_events_of_two_workflows_make_none() -> None:
    with pytest.raises(EventDefinitionError, match="LoginAttempted and SignupSucceeded are of two workflows"):
        Workflow(LoginAttempted, SignupSucceeded, LoginFailed)
    with pytest.raises(EventDefinitionError, match="SignupAttempted and LoginFailed are of two workflows"):
        Workflow(SignupAttempted, SignupSucceeded, LoginFailed)


def test_each_event_of_a_workflow_stands_for_what_its_place_says() -> None:
    with pytest.raises(EventDefinitionError, match=r"SignupFailed \(second\) stands for failed, .* succeeded"):
        Workflow(SignupAttempted, SignupFailed, SignupSucceeded)
    with pytest.raises(EventDefinitionError, match="takes classes of events"):
        Workflow(SignupAttempted, SignupSucceeded, "SignupFailed")  # type: ignore[arg-type] # pyright: ignore[reportArgumentType]
    assert Workflow(SignupAttempted, OrderPaid, SignupFailed).name == "Signup"


def test_a_failure_needs_a_reason_that_may_be_any_text() -> None:
    class TripAttempted(DomainEvent):
        to: str

    class TripSucceeded(DomainEvent):
        to: str

    class TripFailed(DomainEvent):
        to: str

    with pytest.raises(EventDefinitionError, match="TripFailed needs a field `reason: str`"):
        Workflow(TripAttempted, TripSucceeded, TripFailed)


def test_what_a_failure_says_is_known_when_the_attempt_begins() -> None:
    class MoveAttempted(DomainEvent):
        to: str

    class MoveSucceeded(DomainEvent):
        to: str

    class MoveFailed(DomainEvent):
        to: int
        reason: str

    with pytest.raises(EventDefinitionError, match=r"MoveFailed\.to can't be taken from MoveAttempted"):
        Workflow(MoveAttempted, MoveSucceeded, MoveFailed)

    class WalkAttempted(DomainEvent, stands_alone=False):
        to: str

    with pytest.raises(EventDefinitionError, match="stands_alone=False"):
        Workflow(WalkAttempted, MoveSucceeded, MoveFailed)


# --- in memory --------------------------------------------------------------------------------------------------------


class InMemory:
    def __init__(self) -> None:
        self.bus = InMemoryEventBus(logger=Records())
        self.heard: list[tuple[str, str | None]] = []
        self.correlated: set[UUID] = set()
        self.bus.subscribe(DomainEvent, self.hear)

    async def hear(self, event: DomainEvent, context: EventContext) -> None:
        self.heard.append((type(event).__name__, getattr(event, "reason", None)))
        self.correlated.add(context.correlation_id)


async def test_in_memory_each_attempt_has_one_outcome_too() -> None:
    one = InMemory()
    async with one.bus.workflow(Signup, email=ADA) as attempt:
        assert one.heard == [("SignupAttempted", None)]
        await attempt.succeeded(user_id=uuid4())
        with pytest.raises(WorkflowClosedError):
            await attempt.failed("x")
    assert one.heard == SUCCEEDED
    assert one.correlated == {attempt.id}
    one = InMemory()
    with pytest.raises(EmailTaken):
        async with one.bus.workflow(Signup, email=ADA):
            raise EmailTaken
    async with one.bus.workflow(Signup, email=ADA):
        pass
    async with one.bus.workflow(Signup, email=ADA):
        await one.bus.publish(SignupSucceeded(user_id=uuid4(), email=ADA))
    assert one.heard == failed("email_taken") + failed("not_completed") + SUCCEEDED


async def test_in_memory_a_rollback_after_success_was_told_is_a_failure(here: Site) -> None:
    one = InMemory()
    for commits in (True, False):
        async with one.bus.workflow(Signup, email=ADA) as attempt, here.sessions() as session:
            await attempt.succeeded(user_id=uuid4(), session=session)
            await (session.commit() if commits else session.rollback())
        await one.bus.drain()
    assert one.heard == SUCCEEDED + failed("not_completed")
