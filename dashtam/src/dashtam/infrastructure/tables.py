"""Dashtam's tables, and the audit table of whereupon as one of its models."""

from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    DateTime,
    Dialect,
    ForeignKey,
    Index,
    MetaData,
    Numeric,
    Text,
    TypeDecorator,
    UniqueConstraint,
    Uuid,
)
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
    email_verified_at: Mapped[datetime | None]
    is_admin: Mapped[bool] = mapped_column(default=False)


class UserSettingsModel(Model):
    __tablename__ = "user_settings"

    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"), primary_key=True)
    currency: Mapped[str]
    language: Mapped[str]
    notifications: Mapped[bool]


class SessionModel(Model):
    __tablename__ = "sessions"
    __table_args__ = (Index("ix_sessions_user_id", "user_id"), Index("ix_sessions_expires_at", "expires_at"))

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    opened_at: Mapped[datetime]
    last_used_at: Mapped[datetime]
    expires_at: Mapped[datetime]
    ip_address: Mapped[str | None]
    user_agent: Mapped[str | None]
    salt: Mapped[str]
    generation: Mapped[int]
    """The number of the refresh token that is good now."""
    renewed_at: Mapped[datetime | None]
    closed_at: Mapped[datetime | None]
    closed_because: Mapped[str | None]


class OneTimeTokenModel(Model):
    __tablename__ = "one_time_tokens"
    __table_args__ = (
        Index("ix_one_time_tokens_user_id", "user_id"),
        Index("ix_one_time_tokens_expires_at", "expires_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    purpose: Mapped[str]
    token_hash: Mapped[str]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class RateLimitModel(Model):
    __tablename__ = "rate_limits"
    __table_args__ = (Index("ix_rate_limits_ends_at", "ends_at"),)

    key: Mapped[str] = mapped_column(primary_key=True)
    window: Mapped[int] = mapped_column(BigInteger, primary_key=True)
    count: Mapped[int]
    ends_at: Mapped[int] = mapped_column(BigInteger)
    """Seconds since 1970."""


class NotificationModel(Model):
    __tablename__ = "notifications"
    __table_args__ = (Index("ix_notifications_user_id_created_at", "user_id", "created_at"),)

    key: Mapped[str] = mapped_column(primary_key=True)
    user_id: Mapped[UUID]
    kind: Mapped[str]
    message: Mapped[str]
    created_at: Mapped[datetime]
    pushed_at: Mapped[datetime | None]
    """When it was brought over the channels beside the inbox."""


class AuditLogModel(Model):
    """Written by whereupon alone; the database refuses to change or delete a row."""

    __table__ = audit_log


# Connections to banks, accounts, transactions


class Amount(TypeDecorator[Decimal]):
    """A Decimal as it is, every digit of it. SQLite would make a binary fraction of it, so there it is text."""

    impl = Numeric
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> Any:
        return dialect.type_descriptor(Text()) if dialect.name == "sqlite" else dialect.type_descriptor(Numeric())

    def process_bind_param(self, value: Decimal | None, dialect: Dialect) -> Any:
        return str(value) if value is not None and dialect.name == "sqlite" else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Decimal | None:
        return None if value is None else Decimal(value)


class AuthorizationRequestModel(Model):
    __tablename__ = "authorization_requests"
    __table_args__ = (Index("ix_authorization_requests_expires_at", "expires_at"),)

    state_hash: Mapped[str] = mapped_column(primary_key=True)
    id: Mapped[UUID]
    """What the sealed verifier is bound to."""
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    provider_name: Mapped[str]
    sealed_verifier: Mapped[str]
    expires_at: Mapped[datetime]
    used_at: Mapped[datetime | None]


class ConnectionModel(Model):
    __tablename__ = "provider_connections"
    __table_args__ = (
        UniqueConstraint("user_id", "provider_id", name="uq_provider_connections_user_id_provider_id"),
        Index("ix_provider_connections_access_expires_at", "access_expires_at"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    provider_id: Mapped[UUID]
    provider_name: Mapped[str]
    status: Mapped[str]
    connected_at: Mapped[datetime]
    access_expires_at: Mapped[datetime | None]
    sealed_tokens: Mapped[str | None]
    token_version: Mapped[int]
    refreshing_until: Mapped[datetime | None]
    """Until then somebody refreshes the tokens, and nobody else does."""
    sync_version: Mapped[int]
    synced_at: Mapped[datetime | None]


class RevocationModel(Model):
    """Tokens of connections that ended, until the bank knows."""

    __tablename__ = "token_revocations"
    __table_args__ = (Index("ix_token_revocations_connection_id", "connection_id"),)

    id: Mapped[UUID] = mapped_column(primary_key=True)
    connection_id: Mapped[UUID] = mapped_column(ForeignKey("provider_connections.id", ondelete="CASCADE"))
    sealed_tokens: Mapped[str]


class AccountModel(Model):
    __tablename__ = "accounts"
    __table_args__ = (
        UniqueConstraint("connection_id", "provider_account_id", name="uq_accounts_connection_id_provider_account_id"),
        Index("ix_accounts_user_id", "user_id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    user_id: Mapped[UUID] = mapped_column(ForeignKey("users.id", ondelete="CASCADE"))
    connection_id: Mapped[UUID] = mapped_column(ForeignKey("provider_connections.id", ondelete="CASCADE"))
    provider_id: Mapped[UUID]
    provider_account_id: Mapped[str]
    name: Mapped[str]
    type: Mapped[str]
    status: Mapped[str]
    balance: Mapped[Decimal] = mapped_column(Amount)
    currency: Mapped[str]
    updated_at: Mapped[datetime]
    cursor: Mapped[str | None]
    complete: Mapped[bool]


class TransactionModel(Model):
    __tablename__ = "transactions"
    __table_args__ = (
        UniqueConstraint(
            "account_id", "provider_transaction_id", name="uq_transactions_account_id_provider_transaction_id"
        ),
        Index("ix_transactions_account_id_booked_at_id", "account_id", "booked_at", "id"),
    )

    id: Mapped[UUID] = mapped_column(primary_key=True)
    account_id: Mapped[UUID] = mapped_column(ForeignKey("accounts.id", ondelete="CASCADE"))
    provider_transaction_id: Mapped[str]
    booked_at: Mapped[datetime]
    amount: Mapped[Decimal] = mapped_column(Amount)
    currency: Mapped[str]
    description: Mapped[str]
    counterparty: Mapped[str]
