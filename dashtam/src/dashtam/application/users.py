"""What can be read of a user. Reading changes nothing, so no event tells of it."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Protocol
from uuid import UUID

from dashtam.application.database import DatabaseProtocol
from dashtam.domain.notification import Notification, NotificationInbox
from dashtam.domain.settings import SettingsPending, UserSettings, UserSettingsRepository
from dashtam.domain.user import User, UserNotFound, UserRepository


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditRecord:
    event_id: UUID
    action: str
    category: str | None
    outcome: str
    resource_type: str | None
    resource_id: str | None
    context: Mapping[str, object]
    ip_address: str | None
    user_agent: str | None
    correlation_id: UUID | None
    occurred_at: datetime


class AuditTrail(Protocol):
    async def of_user(self, user_id: UUID, limit: int) -> list[AuditRecord]:
        """The newest first."""
        ...


class UserQueries:
    """Each raises `UserNotFound` for an id that nobody has."""

    def __init__(
        self,
        database: DatabaseProtocol,
        users: UserRepository,
        settings: UserSettingsRepository,
        audit: AuditTrail,
        notifications: NotificationInbox,
    ) -> None:
        self._database = database
        self._users = users
        self._settings = settings
        self._audit = audit
        self._notifications = notifications

    async def user(self, user_id: UUID) -> User:
        async with self._database.get_session():
            return await self._find(user_id)

    async def settings(self, user_id: UUID) -> UserSettings:
        """Raises `SettingsPending` for a moment after the registration, until they were initialised."""
        async with self._database.get_session():
            await self._find(user_id)
            settings = await self._settings.find_by_user(user_id)
            if settings is None:
                raise SettingsPending
            return settings

    async def audit(self, user_id: UUID, *, limit: int) -> list[AuditRecord]:
        async with self._database.get_session():
            await self._find(user_id)
            return await self._audit.of_user(user_id, limit)

    async def notifications(self, user_id: UUID, *, limit: int) -> list[Notification]:
        async with self._database.get_session():
            await self._find(user_id)
            return await self._notifications.of_user(user_id, limit)

    async def _find(self, user_id: UUID) -> User:
        user = await self._users.find_by_id(user_id)
        if user is None:
            raise UserNotFound
        return user
