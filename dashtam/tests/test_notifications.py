"""Users are told of new accounts, in their inbox and in the log."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
import uvicorn
from pydantic import SecretStr
from served import Person, Served, eventually, served
from sqlalchemy import text
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from dashtam.domain.events import AccountCreated
from dashtam.domain.notification import Notification
from dashtam.domain.settings import UserSettings
from dashtam.infrastructure.notifications import AppriseNotifier, NotDelivered
from dashtam.infrastructure.users import SqlUserSettingsRepository, StoredNotifications

pytestmark = [
    pytest.mark.integration,
    pytest.mark.tables_ready,
    # Apprise imports it, and comes with its own for the Pythons that have it no more
    pytest.mark.filterwarnings("ignore:'imghdr' is deprecated:DeprecationWarning"),
]


async def signed_up(dashtam: Served) -> Person:
    ada = await dashtam.sign_up("ada@example.com")
    await eventually(lambda: ada.answers("/users/me/settings"))
    return ada


async def create_account(dashtam: Served, user_id: UUID) -> AccountCreated:
    event = AccountCreated(
        user_id=user_id,
        provider_id=uuid4(),
        account_id=uuid4(),
        account_type="checking",
        balance=Decimal("1000.00"),
        currency="EUR",
    )
    async with dashtam.application.database.get_session() as session:
        await dashtam.bus.publish(event, session=session)
    return event


async def inbox(ada: Person) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = await ada.get("/users/me/notifications")
    return found


async def test_a_user_is_told_of_a_new_account_and_the_log_says_so(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await signed_up(dashtam)
        event = await create_account(dashtam, ada.user_id)

        (record,) = await dashtam.logged("user_notified")
        assert record["account_id"] == str(event.account_id)
        assert record["channel"] == "inbox"
        (notification,) = await inbox(ada)
        assert notification["kind"] == "account_created"
        assert notification["message"] == "Your checking account has been created!"


async def test_a_notification_is_brought_once_however_often_it_is_sent(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await signed_up(dashtam)
        notifier = StoredNotifications(dashtam.application.database)
        for key in ("1:inbox", "1:inbox", "2:inbox"):
            await notifier.notify(Notification(user_id=ada.user_id, kind="greeting", message=f"Hello, {key}", key=key))
        assert {shown["message"] for shown in await inbox(ada)} == {"Hello, 1:inbox", "Hello, 2:inbox"}


@dataclass
class Channel:
    """A webhook that keeps what it gets; `refusals` are its next answers, instead of 200."""

    url: str = ""
    messages: list[str] = field(default_factory=list)
    refusals: list[int] = field(default_factory=list)

    async def __call__(self, request: Request) -> Response:
        if self.refusals:
            return Response(status_code=self.refusals.pop(0))
        self.messages.append((await request.json())["message"])
        return Response()


@asynccontextmanager
async def channel() -> AsyncIterator[Channel]:
    """A real server, as Apprise speaks HTTP by itself, in a thread."""
    keeps = Channel()
    door = socket.socket()
    door.bind(("127.0.0.1", 0))
    door.listen()
    keeps.url = f"json://127.0.0.1:{door.getsockname()[1]}/hook"
    app = Starlette(routes=[Route("/hook", keeps.__call__, methods=["POST"])])
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="off"))
    serving = asyncio.create_task(server.serve([door]))
    try:
        yield keeps
    finally:
        server.should_exit = True
        await serving


async def test_a_notification_goes_over_the_channels_that_are_set_and_into_the_inbox(database_url: str) -> None:
    async with channel() as hook, served(database_url, notification_urls=(hook.url,)) as dashtam:
        ada = await signed_up(dashtam)
        await create_account(dashtam, ada.user_id)
        await dashtam.logged("user_notified")
        assert hook.messages == ["Your checking account has been created!"]
        assert len(await inbox(ada)) == 1


async def test_a_channel_that_refuses_at_first_gets_it_once_and_the_inbox_does_not_wait(database_url: str) -> None:
    async with channel() as hook, served(database_url, notification_urls=(hook.url,)) as dashtam:
        ada = await signed_up(dashtam)
        hook.refusals += [500, 503]
        await create_account(dashtam, ada.user_id)
        await dashtam.logged("event_handler_failed")
        assert len(await inbox(ada)) == 1
        await dashtam.logged("user_notified")
        assert hook.messages == ["Your checking account has been created!"]
        assert len(await inbox(ada)) == 1


async def test_what_a_channel_was_brought_is_not_brought_again(sqlite_url: str) -> None:
    async with channel() as hook, served(sqlite_url) as dashtam:
        ada = await signed_up(dashtam)
        notifier = AppriseNotifier(StoredNotifications(dashtam.application.database), [SecretStr(hook.url)])
        greeting = Notification(user_id=ada.user_id, kind="greeting", message="Hello", key="1:inbox")
        assert await notifier.notify(greeting)
        assert not await notifier.notify(greeting)
        assert hook.messages == ["Hello"]


async def test_over_a_channel_too_who_wants_no_notifications_gets_none(sqlite_url: str) -> None:
    async with channel() as hook, served(sqlite_url) as dashtam:
        ada = await signed_up(dashtam)
        database = dashtam.application.database
        async with database.get_session():
            await SqlUserSettingsRepository(database).save(UserSettings(user_id=ada.user_id, notifications=False))
        notifier = AppriseNotifier(StoredNotifications(database), [SecretStr(hook.url)])
        assert not await notifier.notify(
            Notification(user_id=ada.user_id, kind="greeting", message="Hello", key="1:inbox")
        )
        assert hook.messages == []


async def test_an_address_that_is_no_channel_is_said_to_be_so_and_not_shown(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await signed_up(dashtam)
        notifier = AppriseNotifier(StoredNotifications(dashtam.application.database), [SecretStr("tr0ub4dor")])
        with pytest.raises(NotDelivered, match="address 1 of DASHTAM_NOTIFICATION_URLS") as refused:
            await notifier.notify(Notification(user_id=ada.user_id, kind="greeting", message="Hello", key="1:inbox"))
        assert "tr0ub4dor" not in str(refused.value)


async def test_who_wants_no_notifications_gets_none(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await signed_up(dashtam)
        database = dashtam.application.database
        async with database.get_session():
            await SqlUserSettingsRepository(database).save(UserSettings(user_id=ada.user_id, notifications=False))
        notifier = StoredNotifications(database)
        await notifier.notify(Notification(user_id=ada.user_id, kind="greeting", message="Hello", key="1:inbox"))
        assert await inbox(ada) == []


async def test_the_audit_trail_keeps_an_account_s_money_exactly(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await signed_up(dashtam)
        event = await create_account(dashtam, ada.user_id)
        trail = await ada.get("/users/me/audit")
        record = trail[0]
        assert (record["action"], record["resource_id"]) == ("ACCOUNT_CREATED", str(event.account_id))
        assert (record["context"]["balance"], record["context"]["currency"]) == ("1000.00", "EUR")


async def test_the_audit_trail_can_t_be_rewritten(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await signed_up(dashtam)
        before = await ada.get("/users/me/audit")
        for rewriting in ("UPDATE whereupon_audit SET action = 'NOTHING'", "DELETE FROM whereupon_audit"):
            with pytest.raises(Exception, match="whereupon_audit"):
                async with dashtam.application.database.get_session() as session:
                    await session.execute(text(rewriting))
        assert await ada.get("/users/me/audit") == before
