"""Users are told what happens to their accounts."""

from uuid import UUID

from dashtam.application.logger import LoggerProtocol
from dashtam.domain.connection import InvalidGrant
from dashtam.domain.events import (
    AccountBalanceUpdated,
    AccountClosed,
    AccountCreated,
    AccountUpdated,
    TokenRefreshFailed,
)
from dashtam.domain.notification import Notification, Notifier
from whereupon import DomainEvent, EventContext


class NotificationEventHandler:
    """Tells users about their accounts, by way of the notifier; without one only the log says what happened."""

    def __init__(self, logger: LoggerProtocol, notifier: Notifier | None = None) -> None:
        self._logger = logger
        self._notifier = notifier

    async def handle_account_created(self, event: AccountCreated, context: EventContext) -> None:
        await self._tell(
            event.user_id,
            "account_created",
            f"Your {event.account_type} account has been created!",
            event,
            context,
            account_id=str(event.account_id),
            account_type=event.account_type,
        )

    async def handle_account_updated(self, event: AccountUpdated, context: EventContext) -> None:
        await self._tell(
            event.user_id,
            "account_updated",
            f"Your bank has changed your {event.account_type} account.",
            event,
            context,
            account_id=str(event.account_id),
            account_type=event.account_type,
        )

    async def handle_account_closed(self, event: AccountClosed, context: EventContext) -> None:
        message = "One of your accounts has been closed."
        await self._tell(event.user_id, "account_closed", message, event, context, account_id=str(event.account_id))

    async def handle_account_balance_updated(self, event: AccountBalanceUpdated, context: EventContext) -> None:
        message = f"A balance has changed from {event.previous_balance} to {event.new_balance} {event.currency}."
        await self._tell(
            event.user_id, "account_balance_updated", message, event, context, account_id=str(event.account_id)
        )

    async def handle_token_refresh_failed(self, event: TokenRefreshFailed, context: EventContext) -> None:
        if event.reason != InvalidGrant.reason:
            return  # a bank that does not answer for a while alarms nobody
        message = f"Your bank ({event.provider_name}) needs your permission again: connect it once more."
        await self._tell(
            event.user_id, "token_refresh_failed", message, event, context, connection_id=str(event.connection_id)
        )

    async def _tell(
        self, user_id: UUID, kind: str, message: str, event: DomainEvent, context: EventContext, **details: str
    ) -> None:
        if self._notifier is not None and not await self._notifier.notify(
            Notification(
                user_id=user_id,
                kind=kind,
                message=message,
                key=context.idempotency_key,
                created_at=event.occurred_at,
            )
        ):
            return
        self._logger.info(
            "user_notified",
            channel=None if self._notifier is None else "inbox",
            notification_type=kind,
            user_id=str(user_id),
            message=message,
            **details,
        )
