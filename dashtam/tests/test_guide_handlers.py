"""The guide's blocks on handlers: how they are written, subscribed and kept apart."""

import io
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from guide import block, run
from guide.aftermath import audit_trail
from served import MailServer, mail_server
from sqlalchemy import insert

from dashtam.application.mail import Mail, MailRefused
from dashtam.bootstrap import forget, get_application
from dashtam.domain.events import AccountCreated, ProviderConnectionSucceeded, UserRegistrationSucceeded
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.logs import make_logger
from dashtam.infrastructure.mail import SmtpMailer
from whereupon import (
    AuditEventHandler,
    DomainEvent,
    EventBus,
    InMemoryEventBus,
    LoggingEventHandler,
    Retry,
    SubscriptionError,
)
from whereupon.audit import audit_log
from whereupon.testing import own_transactions

pytestmark = pytest.mark.integration

ADA = "ada@example.com"


class Logged:
    """A bus on a database of its own whose log, one JSON object a line, can be read."""

    def __init__(self, database_url: str) -> None:
        self._output = io.StringIO()
        self.logger = make_logger("json", stream=self._output)
        self.bus = EventBus(database_url, logger=self.logger, create_tables=True)
        self.database = Database(self.bus.engine)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[EventBus]:
        """While it runs, an event may be published without a session."""
        async with self.bus:
            with own_transactions(self.bus):
                yield self.bus

    def records(self, event: str) -> list[dict[str, Any]]:
        records = (json.loads(line) for line in self._output.getvalue().splitlines())
        return [record for record in records if record["event"] == event]


def account_created() -> AccountCreated:
    return AccountCreated(
        user_id=uuid4(),
        provider_id=uuid4(),
        account_id=uuid4(),
        account_type="checking",
        balance=Decimal("1000.00"),
        currency="EUR",
    )


def user_registered() -> UserRegistrationSucceeded:
    return UserRegistrationSucceeded(user_id=uuid4(), email=ADA)


class Hearing:
    def __init__(self) -> None:
        self.heard: list[DomainEvent] = []


async def test_the_guide_s_handler_class_logs_a_notification_once_the_account_is_committed(database_url: str) -> None:
    handler_class = (await block("09-handler-class").run())["NotificationEventHandler"]
    logged = Logged(database_url)
    logged.bus.register(handler_class(logger=logged.logger))
    event = account_created()
    async with logged.bus:
        async with logged.database.get_session() as session:
            receipt = await logged.bus.publish(event, session=session)
            await logged.bus.drain(10)
            assert logged.records("notification_would_be_sent") == []
        await receipt.settled(20)

    (record,) = logged.records("notification_would_be_sent")
    assert (
        record.items()
        >= {
            "level": "info",
            "notification_type": "account_created",
            "user_id": str(event.user_id),
            "account_id": str(event.account_id),
            "account_type": "checking",
            "message": "Your checking account has been created!",
        }.items()
    )


async def test_the_guide_s_container_makes_one_bus_that_has_its_handler(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("DASHTAM_DATABASE_URL", sqlite_url)
    forget()
    try:
        get_event_bus = (await block("10-container").run())["get_event_bus"]
        bus = get_event_bus()
        assert isinstance(bus, InMemoryEventBus)
        assert get_event_bus() is bus
        event = account_created()
        async with bus:
            await bus.publish(event)

        (record,) = (json.loads(line) for line in capsys.readouterr().out.splitlines())
        assert record["account_id"] == str(event.account_id)
        assert record["message"] == "Your checking account has been created!"
    finally:
        await get_application().database.engine.dispose()
        forget()


async def test_a_subscribed_handler_is_executed(database_url: str) -> None:
    class Handler(Hearing):
        async def handle_my_event(self, event: ProviderConnectionSucceeded) -> None:
            self.heard.append(event)

    logged, handler = Logged(database_url), Handler()
    await block("15-check-subscription").run(event_bus=logged.bus, MyEvent=ProviderConnectionSucceeded, handler=handler)
    event = ProviderConnectionSucceeded(user_id=uuid4(), provider_id=uuid4(), provider_name="schwab")
    async with logged.running() as bus:
        await (await bus.publish(event)).settled(20)
    assert handler.heard == [event]


async def test_a_handler_of_another_event_type_is_refused_and_of_the_exact_type_executed(database_url: str) -> None:
    class UserRegistered(DomainEvent, name="guide.UserRegistered"):
        user_id: UUID

    class Handler(Hearing):
        async def handle(self, event: UserRegistrationSucceeded) -> None:
            self.heard.append(event)

    printed = block("16-check-event-type")
    logged, handler = Logged(database_url), Handler()
    names = printed.namespace(event_bus=logged.bus, UserRegistered=UserRegistered, handler=handler)
    wrong, right = printed.statements()
    with pytest.raises(
        SubscriptionError,
        match=r"^Handler is for UserRegistrationSucceeded, but subscribed to UserRegistered.*"
        r"Subscribe it to UserRegistrationSucceeded",
    ):
        await run([wrong], names)
    await run([right], names)

    event = user_registered()
    async with logged.running() as bus:
        await (await bus.publish(event)).settled(20)
    assert handler.heard == [event]


def test_signatures_without_a_body_are_no_python() -> None:
    with pytest.raises(IndentationError, match="expected an indented block after function definition"):
        block("17-check-signature").statements()


async def test_a_handler_that_is_not_async_is_refused_and_the_async_one_executed(database_url: str) -> None:
    printed = block("17-check-signature")
    filled = printed.filled_in(lambda source: re.sub(r"# [❌✅]\n", r"\g<0>    self.heard.append(event)\n", source))
    names = printed.namespace(MyEvent=UserRegistrationSucceeded)
    wrong, right = filled.statements()
    logged = Logged(database_url)

    await run([wrong], names)
    not_async: Any = type("Handler", (Hearing,), {"handle_event": names["handle_event"]})()
    with pytest.raises(SubscriptionError, match=r"handle_event is not async.*Write `async def handle_event\("):
        logged.bus.subscribe(UserRegistrationSucceeded, not_async.handle_event)

    await run([right], names)
    handler: Any = type("Handler", (Hearing,), {"handle_event": names["handle_event"]})()
    logged.bus.subscribe(UserRegistrationSucceeded, handler.handle_event)
    event = user_registered()
    async with logged.running() as bus:
        await (await bus.publish(event)).settled(20)
    assert handler.heard == [event]


class FailingMail:
    async def handle_user_registration_succeeded(self, event: UserRegistrationSucceeded) -> None:
        raise ValueError("Invalid email format")


async def test_a_handler_that_fails_is_logged_as_the_guide_shows_and_the_others_run(database_url: str) -> None:
    logged = Logged(database_url)
    logged.bus.register(AuditEventHandler())
    logged.bus.register(FailingMail(), retry=Retry(max_attempts=1))
    logged.bus.register(LoggingEventHandler(logged.logger))
    event = user_registered()
    async with logged.running() as bus:
        await (await bus.publish(event)).settled(20)

        (record,) = logged.records("event_handler_failed")
        assert record.items() >= block("18-failed-handler").record.items()
        assert record["event_id"] == str(event.event_id)
        assert [record["email"] for record in logged.records("user_registration_succeeded")] == [ADA]
        assert [record.event_id for record in await audit_trail(logged.database)] == [event.event_id]


async def test_on_the_guide_s_bus_a_handler_that_fails_is_logged_in_the_same_form() -> None:
    output = io.StringIO()
    logger = make_logger("json", stream=output)
    bus = InMemoryEventBus(logger=logger)
    bus.register(FailingMail())
    bus.register(LoggingEventHandler(logger))
    await bus.publish(user_registered())

    failed, succeeded = (json.loads(line) for line in output.getvalue().splitlines())
    assert failed.items() >= block("18-failed-handler").record.items()
    assert succeeded["event"] == "user_registration_succeeded"


class Concerns:
    """What the guide's pattern of two concerns leaves to its surroundings: mail over SMTP, records in the database."""

    def __init__(self, mail: MailServer, database: Database) -> None:
        self._mailer = SmtpMailer(host="127.0.0.1", port=mail.port, sender="hello@dashtam.example")
        self._database = database

    async def send_welcome_email(self, email: str) -> None:
        await self._mailer.send(Mail(template="verified", to=email, subject="Welcome", key=email))

    async def create_audit_record(self, user_id: UUID) -> None:
        now = datetime.now(UTC)
        async with self._database.get_session() as session:
            await session.execute(
                insert(audit_log).values(
                    id=uuid4(),
                    event_id=uuid4(),
                    event_type="UserRegistrationSucceeded",
                    action="WRITTEN_BY_HAND",
                    outcome="succeeded",
                    user_id=user_id,
                    context={},
                    occurred_at=now,
                    recorded_at=now,
                )
            )


@asynccontextmanager
async def refused_mail(database_url: str, name: str) -> AsyncIterator[tuple[Logged, EventBus]]:
    """A bus with the handlers of the block `name`, whose mail is refused."""
    async with mail_server() as mail:
        mail.refusals.append("550 no such mailbox")
        logged = Logged(database_url)
        handlers = {key: value for key, value in (await block(name).run()).items() if key.startswith("handle_")}
        handler_class = type("Handlers", (Concerns,), handlers)
        logged.bus.register(handler_class(mail, logged.database), retry=Retry(max_attempts=1))
        async with logged.running() as bus:
            yield logged, bus
        assert mail.refused == 1


async def test_two_concerns_in_one_handler_share_the_failure_of_the_first(database_url: str) -> None:
    async with refused_mail(database_url, "22-dependent-handlers") as (logged, bus):
        await (await bus.publish(user_registered())).settled(20)

        (failed,) = logged.records("event_handler_failed")
        assert failed["error_type"] == MailRefused.__name__
        assert await audit_trail(logged.database) == []


async def test_a_concern_with_a_handler_of_its_own_does_not_share_the_failure_of_another(database_url: str) -> None:
    async with refused_mail(database_url, "23-independent-handlers") as (logged, bus):
        event = user_registered()
        await (await bus.publish(event)).settled(20)

        (failed,) = logged.records("event_handler_failed")
        assert (failed["handler_name"], failed["error_type"]) == ("handle_user_registered", MailRefused.__name__)
        assert [record.user_id for record in await audit_trail(logged.database)] == [event.user_id]
