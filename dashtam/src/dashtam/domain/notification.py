"""Short messages that tell users about their accounts."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Notification:
    user_id: UUID
    kind: str
    """What happened, in snake case: `account_created`."""
    message: str
    key: str
    """Equal for notifications that are the same one sent again."""
    created_at: datetime = field(default_factory=lambda: datetime.now(UTC))


class Notifier(Protocol):
    async def notify(self, notification: Notification) -> bool:
        """Bring it to its user; False if it was brought before (by its key), or the user wants none."""
        ...


class NotificationInbox(Protocol):
    """The notifications a user got."""

    async def of_user(self, user_id: UUID, limit: int) -> list[Notification]:
        """The newest first."""
        ...
