"""Users are told what happens to their accounts."""

from dashtam.application.logger import LoggerProtocol
from dashtam.domain.events import AccountCreated
from dashtam.domain.notification import Notification, Notifier
from whereupon import EventContext


class NotificationEventHandler:
    """Tells users about their accounts, by way of the notifier; without one only the log says what happened."""

    def __init__(self, logger: LoggerProtocol, notifier: Notifier | None = None) -> None:
        self._logger = logger
        self._notifier = notifier

    async def handle_account_created(self, event: AccountCreated, context: EventContext) -> None:
        message = f"Your {event.account_type} account has been created!"
        if self._notifier is not None and not await self._notifier.notify(
            Notification(
                user_id=event.user_id,
                kind="account_created",
                message=message,
                key=context.idempotency_key,
                created_at=event.occurred_at,
            )
        ):
            return
        self._logger.info(
            "user_notified",
            channel=None if self._notifier is None else "inbox",
            notification_type="account_created",
            user_id=str(event.user_id),
            account_id=str(event.account_id),
            account_type=event.account_type,
            message=message,
        )
