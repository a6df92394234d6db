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
    user_id: UUID | None
    context: Mapping[str, object]
    ip_address: str | None
    user_agent: str | None
    correlation_id: UUID | None
    occurred_at: datetime


class AuditTrail(Protocol):
    async def of_user(self, user_id: UUID, limit: int) -> list[AuditRecord]:
        """The newest first."""
        ...

    async def newest(self, limit: int) -> list[AuditRecord]: ...

    async def newest_ids(self, user_id: UUID | None, limit: int) -> list[UUID]:
        """Of the events that these would be of; None: of everybody."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangeSettings:
    user_id: UUID
    currency: str
    language: str
    notifications: bool


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

    async def change_settings(self, cmd: ChangeSettings) -> UserSettings:
        """A simple write that nothing follows from: no event."""
        async with self._database.get_session():
            if await self._users.find_by_id(cmd.user_id, for_update=True) is None:
                raise UserNotFound
            settings = UserSettings(
                user_id=cmd.user_id, currency=cmd.currency, language=cmd.language, notifications=cmd.notifications
            )
            await self._settings.save(settings)
            return settings

    async def newest_users(self, *, limit: int) -> list[User]:
        async with self._database.get_session():
            return await self._users.newest(limit)

    async def newest_audit(self, *, limit: int) -> list[AuditRecord]:
        """Of everybody, and of nobody in particular."""
        async with self._database.get_session():
            return await self._audit.newest(limit)

    async def audit(self, user_id: UUID, *, limit: int) -> list[AuditRecord]:
        async with self._database.get_session():
            await self._find(user_id)
            return await self._audit.of_user(user_id, limit)

    async def notifications(self, user_id: UUID, *, limit: int) -> list[Notification]:
        async with self._database.get_session():
            await self._find(user_id)
            return await self._notifications.of_user(user_id, limit)

    async def _find(self, user_id: UUID) -> User:
        user = await self._users.find_by_id(user_id, for_update=False)
        if user is None:
            raise UserNotFound
        return user
