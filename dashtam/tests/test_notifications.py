"""Users are told of new accounts, in their inbox and in the log."""

from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from served import Served, eventually, served
from sqlalchemy import text

from dashtam.domain.events import AccountCreated
from dashtam.domain.notification import Notification
from dashtam.domain.settings import UserSettings
from dashtam.infrastructure.users import SqlUserSettingsRepository, StoredNotifications

pytestmark = pytest.mark.integration


async def registered(dashtam: Served) -> UUID:
    user_id = UUID((await dashtam.register("ada@example.com")).json()["user_id"])

    async def initialised() -> bool:
        return (await dashtam.http.get(f"/users/{user_id}/settings")).status_code == 200

    await eventually(initialised)
    return user_id


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


async def inbox(dashtam: Served, user_id: UUID) -> list[dict[str, Any]]:
    response = await dashtam.http.get(f"/users/{user_id}/notifications")
    assert response.status_code == 200
    found: list[dict[str, Any]] = response.json()
    return found


async def test_a_user_is_told_of_a_new_account_and_the_log_says_so(database_url: str) -> None:
    async with served(database_url) as dashtam:
        user_id = await registered(dashtam)
        event = await create_account(dashtam, user_id)

        (record,) = await dashtam.logged("user_notified")
        assert record["account_id"] == str(event.account_id)
        assert record["channel"] == "inbox"
        (notification,) = await inbox(dashtam, user_id)
        assert notification["kind"] == "account_created"
        assert notification["message"] == "Your checking account has been created!"


async def test_a_notification_is_brought_once_however_often_it_is_sent(database_url: str) -> None:
    async with served(database_url) as dashtam:
        user_id = await registered(dashtam)
        notifier = StoredNotifications(dashtam.application.database)
        for key in ("1:inbox", "1:inbox", "2:inbox"):
            await notifier.notify(Notification(user_id=user_id, kind="greeting", message=f"Hello, {key}", key=key))
        assert {shown["message"] for shown in await inbox(dashtam, user_id)} == {"Hello, 1:inbox", "Hello, 2:inbox"}


async def test_who_wants_no_notifications_gets_none(database_url: str) -> None:
    async with served(database_url) as dashtam:
        user_id = await registered(dashtam)
        database = dashtam.application.database
        async with database.get_session():
            await SqlUserSettingsRepository(database).save(UserSettings(user_id=user_id, notifications=False))
        notifier = StoredNotifications(database)
        await notifier.notify(Notification(user_id=user_id, kind="greeting", message="Hello", key="1:inbox"))
        assert await inbox(dashtam, user_id) == []


async def test_the_audit_trail_keeps_an_account_s_money_exactly(database_url: str) -> None:
    async with served(database_url) as dashtam:
        user_id = await registered(dashtam)
        event = await create_account(dashtam, user_id)
        trail = (await dashtam.http.get(f"/users/{user_id}/audit")).json()
        record = trail[0]
        assert (record["action"], record["resource_id"]) == ("ACCOUNT_CREATED", str(event.account_id))
        assert (record["context"]["balance"], record["context"]["currency"]) == ("1000.00", "EUR")


async def test_the_audit_trail_can_t_be_rewritten(database_url: str) -> None:
    async with served(database_url) as dashtam:
        user_id = await registered(dashtam)
        for rewriting in ("UPDATE whereupon_audit SET action = 'NOTHING'", "DELETE FROM whereupon_audit"):
            with pytest.raises(Exception, match="whereupon_audit"):
                async with dashtam.application.database.get_session() as session:
                    await session.execute(text(rewriting))
        assert len((await dashtam.http.get(f"/users/{user_id}/audit")).json()) == 1
