"""Users, their settings, notifications and audit records in the database."""

import re
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import ColumnElement, exists, literal, select, update
from sqlalchemy.exc import IntegrityError

from dashtam.application.users import AuditRecord
from dashtam.domain.notification import Notification
from dashtam.domain.settings import UserSettings
from dashtam.domain.user import EmailTaken, User, email_key
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.passwords import PasswordHasher
from dashtam.infrastructure.rows import insert
from dashtam.infrastructure.tables import AuditLogModel, NotificationModel, UserModel, UserSettingsModel

_EMAIL_TAKEN = re.compile(r"users[._]email_key")  # as SQLite and as PostgreSQL name what was violated


class SqlUserRepository:
    def __init__(self, database: Database, hasher: PasswordHasher) -> None:
        self._database = database
        self._hasher = hasher

    async def save(self, user: User) -> None:
        session = self._database.current("UserRepository.save")
        await self.hash_password(user)
        changing = {
            "email": user.email,
            "email_key": email_key(user.email),
            "password_hash": user.password_hash,
            "email_verified_at": user.email_verified_at,
            "is_admin": user.is_admin,
        }
        statement = insert(session, UserModel).values(id=user.id, registered_at=user.registered_at, **changing)
        try:
            await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changing))
        except IntegrityError as error:
            if _EMAIL_TAKEN.search(str(error.orig)):
                raise EmailTaken from None  # the error quotes the statement, and with it the hash
            raise

    async def hash_password(self, user: User) -> None:
        if user.new_password is not None:
            user.password_hash = await self._hasher.hash(user.new_password)
            user.new_password = None

    async def find_by_id(self, user_id: UUID, *, for_update: bool = True) -> User | None:
        return await self._find("UserRepository.find_by_id", UserModel.id == user_id, for_update)

    async def newest(self, limit: int) -> list[User]:
        session = self._database.current("UserRepository.newest")
        newest = select(UserModel).order_by(UserModel.id.desc()).limit(limit)  # ids are in order of time
        return [user for row in await session.scalars(newest) if (user := _user(row)) is not None]

    async def find_by_email(self, email: str, *, for_update: bool = False) -> User | None:
        if "\0" in email:  # PostgreSQL takes no text with a NUL in it, so nobody has such an address
            return None
        return await self._find("UserRepository.find_by_email", UserModel.email_key == email_key(email), for_update)

    async def _find(self, caller: str, which: ColumnElement[bool], for_update: bool) -> User | None:
        session = self._database.current(caller)
        found = select(UserModel).where(which).execution_options(populate_existing=True)
        if for_update and session.get_bind().dialect.name == "sqlite":
            # SQLite has no row locks. A transaction that reads first may find, when it writes, that somebody else has
            # written, and is refused; one that writes first, if only nothing, has the database to itself from then on.
            await session.execute(update(UserModel).where(which).values(id=UserModel.id))
        elif for_update:
            found = found.with_for_update()
        return _user(await session.scalar(found))


def _user(row: UserModel | None) -> User | None:
    if row is None:
        return None
    return User(
        id=row.id,
        email=row.email,
        registered_at=row.registered_at,
        email_verified_at=row.email_verified_at,
        is_admin=row.is_admin,
        password_hash=row.password_hash,
    )


class SqlUserSettingsRepository:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, settings: UserSettings) -> None:
        session = self._database.current("UserSettingsRepository.save")
        chosen = {
            "currency": settings.currency,
            "language": settings.language,
            "notifications": settings.notifications,
        }
        statement = insert(session, UserSettingsModel).values(user_id=settings.user_id, **chosen)
        await session.execute(statement.on_conflict_do_update(index_elements=["user_id"], set_=chosen))

    async def find_by_user(self, user_id: UUID) -> UserSettings | None:
        session = self._database.current("UserSettingsRepository.find_by_user")
        row = await session.get(UserSettingsModel, user_id, populate_existing=True)
        if row is None:
            return None
        return UserSettings(
            user_id=row.user_id,
            currency=row.currency,
            language=row.language,
            notifications=row.notifications,
        )


class StoredNotifications:
    """A notifier whose channel is the user's inbox: a table. Users who want no notifications get none."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def notify(self, notification: Notification) -> bool:
        async with self._database.get_session() as session:
            values = {
                "key": notification.key,
                "user_id": notification.user_id,
                "kind": notification.kind,
                "message": notification.message,
                "created_at": notification.created_at,
            }
            unwanted = exists().where(
                UserSettingsModel.user_id == notification.user_id, UserSettingsModel.notifications.is_(False)
            )
            columns = NotificationModel.__table__.c
            wanted = select(*(literal(value, columns[name].type) for name, value in values.items())).where(~unwanted)
            statement = insert(session, NotificationModel).from_select(list(values), wanted)
            statement = statement.on_conflict_do_nothing(index_elements=["key"]).returning(columns.key)
            return await session.scalar(statement) is not None

    async def to_push(self, key: str) -> bool:
        async with self._database.get_session() as session:
            row = await session.get(NotificationModel, key)
            return row is not None and row.pushed_at is None

    async def pushed(self, key: str) -> None:
        async with self._database.get_session() as session:
            await session.execute(
                update(NotificationModel).where(NotificationModel.key == key).values(pushed_at=datetime.now(UTC))
            )

    async def of_user(self, user_id: UUID, limit: int) -> list[Notification]:
        session = self._database.current("NotificationInbox.of_user")
        newest = (
            select(NotificationModel)
            .where(NotificationModel.user_id == user_id)
            .order_by(NotificationModel.created_at.desc(), NotificationModel.key)
            .limit(limit)
        )
        return [
            Notification(
                user_id=row.user_id,
                kind=row.kind,
                message=row.message,
                key=row.key,
                created_at=row.created_at,
            )
            for row in await session.scalars(newest)
        ]


class SqlAuditTrail:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def of_user(self, user_id: UUID, limit: int) -> list[AuditRecord]:
        table = AuditLogModel.__table__.c
        return await self._newest("AuditTrail.of_user", limit, table.user_id == user_id)

    async def newest(self, limit: int) -> list[AuditRecord]:
        return await self._newest("AuditTrail.newest", limit)

    async def newest_ids(self, user_id: UUID | None, limit: int) -> list[UUID]:
        session = self._database.current("AuditTrail.newest_ids")
        table = AuditLogModel.__table__.c
        newest = select(table.event_id).order_by(table.occurred_at.desc(), table.id.desc()).limit(limit)
        return list(await session.scalars(newest if user_id is None else newest.where(table.user_id == user_id)))

    async def _newest(self, caller: str, limit: int, *which: ColumnElement[bool]) -> list[AuditRecord]:
        session = self._database.current(caller)
        table = AuditLogModel.__table__.c
        newest = (
            select(AuditLogModel.__table__)
            .where(*which)
            .order_by(table.occurred_at.desc(), table.id.desc())
            .limit(limit)
        )
        return [
            AuditRecord(
                event_id=row.event_id,
                action=row.action,
                category=row.category,
                outcome=row.outcome,
                resource_type=row.resource_type,
                resource_id=row.resource_id,
                user_id=row.user_id,
                context=row.context,
                ip_address=row.ip_address,
                user_agent=row.user_agent,
                correlation_id=row.correlation_id,
                occurred_at=row.occurred_at,
            )
            for row in await session.execute(newest)
        ]
