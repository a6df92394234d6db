"""Dashtam's tables, and the audit table of whereupon as one of its models."""

from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import DateTime, Dialect, ForeignKey, Index, MetaData, Text, TypeDecorator, UniqueConstraint, Uuid
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from whereupon.audit import audit_log


class UtcDateTime(TypeDecorator[datetime]):
    """An aware datetime in UTC; SQLite stores none by itself."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError(f"{value!r} has no time zone: use datetime.now(UTC)")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class Model(DeclarativeBase):
    metadata = MetaData()
    type_annotation_map = {str: Text(), UUID: Uuid(), datetime: UtcDateTime()}  # noqa: RUF012 (SQLAlchemy's own form)


class UserModel(Model):
    __tablename__ = "users"
    __table_args__ = (UniqueConstraint("email_key", name="uq_users_email_key"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    email: Mapped[str]
    """As it was typed: the part before the @ may tell upper from lower case."""
    email_key: Mapped[str]
    """In lower case: two users never differ in that alone."""
    password_hash: Mapped[str | None]
    registered_at: Mapped[datetime]


class UserSettingsModel(Model):
    __tablename__ = "user_settings"

    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    currency: Mapped[str]
    language: Mapped[str]
    notifications: Mapped[bool]


class NotificationModel(Model):
    __tablename__ = "notifications"
    __table_args__ = (Index("ix_notifications_user_id_created_at", "user_id", "created_at"),)

    key: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    kind: Mapped[str]
    message: Mapped[str]
    created_at: Mapped[datetime]


class AuditLogModel(Model):
    """Written by whereupon alone; the database refuses to change or delete a row."""

    __table__ = audit_log
