"""whereupon's tables, and how they come into a database.

`whereupon db upgrade` runs the migrations in a history of their own (table `whereupon_version`). An application with an
Alembic history can have them in its own instead. In its alembic.ini:

    path_separator = space
    version_locations = %(here)s/versions whereupon:migrations/versions

and in its env.py `context.configure(…, include_name=whereupon.schema.include_name)`; then `alembic upgrade heads`. Both
leave the same tables and the same number in `whereupon_meta`.
"""

from __future__ import annotations

import asyncio
import importlib.resources
import weakref
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    Connection,
    DateTime,
    Float,
    Integer,
    LargeBinary,
    MetaData,
    SmallInteger,
    String,
    Table,
    Text,
    Uuid,
    false,
    inspect,
    select,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.engine import Dialect
from sqlalchemy.ext.asyncio import AsyncEngine
from sqlalchemy.types import TypeDecorator

from whereupon.errors import SchemaError

REVISION: Final = 1
"""The number that this build's migrations leave in `whereupon_meta`."""

_VERSION_TABLE: Final = "whereupon_version"

metadata: Final = MetaData()
"""Describes the tables for queries; migrations make them, and know more columns and indexes than this does."""


class UTCDateTime(TypeDecorator[datetime]):
    """Aware UTC times on every database; SQLite, which has no time zones, keeps them as UTC text."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        value = value.astimezone(UTC)
        return value.replace(tzinfo=None) if dialect.name == "sqlite" else value

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


_Json = JSON(none_as_null=True).with_variant(JSONB(none_as_null=True), "postgresql")
_Big = BigInteger().with_variant(Integer, "sqlite")

meta = Table(
    "whereupon_meta", metadata, Column("key", String(50), primary_key=True), Column("value", Text, nullable=False)
)

log = Table(
    "whereupon_log",
    metadata,
    Column("position", _Big, primary_key=True),
    Column("event_id", Uuid, nullable=False),
    Column("type", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("headers", Text, nullable=False),
    Column("keys", Text),
    Column("ran", _Json),
    Column("recorded_at", UTCDateTime, nullable=False),
)

process = Table(
    "whereupon_process",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("lease_until", UTCDateTime, nullable=False),
    Column("in_flight", Integer, nullable=False),
    Column("alone", Boolean, nullable=False, server_default=false()),
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("serves", Text, nullable=False, server_default="[]"),
    Column("started_at", UTCDateTime, nullable=False),
)

subscription = Table(
    "whereupon_subscription",
    metadata,
    Column("name", Text, primary_key=True),
    Column("lanes", SmallInteger, nullable=False),
    Column("ordered_by", Text),
    Column("definition", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("paused", Boolean, nullable=False),
    Column("created_at", UTCDateTime, nullable=False),
)

definition = Table(
    "whereupon_definition",
    metadata,
    Column("subscription", Text, primary_key=True),
    Column("definition", Text, primary_key=True),
    Column("revision", Integer, nullable=False),
)

cursor = Table(
    "whereupon_cursor",
    metadata,
    Column("subscription", Text, primary_key=True),
    Column("generation", Integer, primary_key=True),
    Column("lane", SmallInteger, primary_key=True),
    Column("page", _Big, nullable=False),
    Column("last", _Big),
    Column("rate", Float),
    Column("crashes", SmallInteger, nullable=False),
    Column("owner", Uuid),
    Column("token", _Big, nullable=False),
)

exception = Table(
    "whereupon_exception",
    metadata,
    Column("id", _Big, primary_key=True),
    Column("subscription", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("lane", SmallInteger, nullable=False),
    Column("position", _Big, nullable=False),
    Column("event_id", Uuid, nullable=False),
    Column("type", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("payload", LargeBinary, nullable=False),
    Column("headers", Text, nullable=False),
    Column("keys", Text),
    Column("key", Text),
    Column("state", String(20), nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("alone", Boolean, nullable=False),
    Column("next_at", UTCDateTime),
    Column("error_type", Text),
    Column("error_message", Text),
    Column("traceback", Text),
    Column("fingerprint", Text),
    Column("recorded_at", UTCDateTime, nullable=False),
    Column("updated_at", UTCDateTime, nullable=False),
)

history = Table(
    "whereupon_history",
    metadata,
    Column("id", _Big, primary_key=True),
    Column("subscription", Text, nullable=False),
    Column("generation", Integer, nullable=False),
    Column("worker", Uuid, nullable=False),
    Column("first_position", _Big, nullable=False),
    Column("last_position", _Big, nullable=False),
    Column("entries", Text, nullable=False),
    Column("recorded_at", UTCDateTime, nullable=False),
)

action = Table(
    "whereupon_action",
    metadata,
    Column("id", _Big, primary_key=True),
    Column("at", UTCDateTime, nullable=False),
    Column("author", Text, nullable=False),
    Column("action", String(20), nullable=False),
    Column("subscription", Text, nullable=False),
    Column("generation", Integer),
    Column("position", _Big),
    Column("event_id", Uuid),
    Column("reason", Text, nullable=False),
    Column("details", _Json, nullable=False),
)

workflow = Table(
    "whereupon_workflow",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False),
    Column("state", String(20), nullable=False),
    Column("process", Uuid, nullable=False),
    Column("type", Text, nullable=False),
    Column("version", Integer, nullable=False),
    Column("payload", LargeBinary),
    Column("headers", Text, nullable=False),
    Column("reason", Text),
    Column("outcome_id", Uuid),
    Column("opened_at", UTCDateTime, nullable=False),
    Column("closed_at", UTCDateTime),
)
"""One row an attempt, `id` that of its *Attempted*. Type, version, payload and headers are those of the event that
closes it if its process dies; the payload goes with the outcome."""

audit_log = Table(
    "whereupon_audit",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("event_id", Uuid, nullable=False),
    Column("event_type", Text, nullable=False),
    Column("action", Text, nullable=False),
    Column("category", Text),
    Column("outcome", Text, nullable=False),
    Column("user_id", Uuid),
    Column("resource_type", Text),
    Column("resource_id", Text),
    Column("context", JSON, nullable=False),
    Column("actor", Text),
    Column("ip_address", Text),
    Column("user_agent", Text),
    Column("correlation_id", Uuid),
    Column("occurred_at", UTCDateTime, nullable=False),
    Column("recorded_at", UTCDateTime, nullable=False),
)


def version_location() -> str:
    """The folder of the migrations, for `version_locations` of an Alembic configuration (branch label `whereupon`)."""
    return str(importlib.resources.files("whereupon") / "migrations" / "versions")


def include_name(name: str | None, type_: str, parent_names: Any) -> bool:
    """For Alembic's `context.configure(include_name=…)`: has autogenerate leave whereupon's tables alone."""
    return not (type_ == "table" and name is not None and name.startswith("whereupon_"))


_turns: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Lock] = weakref.WeakKeyDictionary()


def taking_turns() -> asyncio.Lock:
    """To be held while migrations run: Alembic keeps the one that runs in a global of the process."""
    return _turns.setdefault(asyncio.get_running_loop(), asyncio.Lock())


async def upgrade(engine: AsyncEngine) -> None:
    """Create the tables, or bring them up to this build; nothing happens if they are. Raises `SchemaError`.

    Processes that do so at once take turns.
    """
    # for SQLite: our own engines do not begin then, and what begins without the write lock can't get it after a read
    async with taking_turns(), engine.execution_options(whereupon_begins=True).begin() as connection:
        await connection.run_sync(upgrade_on)


def upgrade_on(connection: Connection) -> None:
    """As `upgrade`, in the caller's transaction."""
    from alembic import command
    from alembic.config import Config

    _take_turns(connection)
    revision = revision_of(connection)
    if revision is not None and revision >= REVISION:
        check_revision(revision, connection.engine.url.render_as_string(hide_password=True))
        return
    if revision is not None and not inspect(connection).has_table(_VERSION_TABLE):
        raise SchemaError(
            f"whereupon's tables are of revision {revision}, and this build needs {REVISION}. They were made by the "
            "Alembic history of an application, so that one has to upgrade them: run `alembic upgrade heads` there"
        )
    config = Config()
    config.set_main_option("script_location", str(importlib.resources.files("whereupon") / "migrations"))
    config.set_main_option("path_separator", "os")
    config.attributes["connection"] = connection
    config.attributes["version_table"] = _VERSION_TABLE
    command.upgrade(config, "head")


def _take_turns(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execute(text("SELECT pg_advisory_xact_lock(hashtext('whereupon db upgrade'))"))
    elif connection.dialect.name == "sqlite":
        driver: Any = connection.connection.driver_connection
        if not driver.in_transaction:
            connection.exec_driver_sql("BEGIN IMMEDIATE")


def revision_of(connection: Connection) -> int | None:
    """The revision of the tables in this database, or None where there are none."""
    if not inspect(connection).has_table("whereupon_meta"):
        return None
    value = connection.execute(select(meta.c.value).where(meta.c.key == "revision")).scalar()
    return int(value) if value is not None else None


def check_revision(revision: int | None, shown_url: str) -> None:
    """Raises `SchemaError` with the command to run unless the tables are of this build's revision."""
    if revision is None:
        raise SchemaError(
            f"{shown_url} has no whereupon tables. Run `whereupon db upgrade --url …` (or module:bus) once"
        )
    if revision < REVISION:
        raise SchemaError(
            f"{shown_url} has whereupon tables of revision {revision}, and this build needs {REVISION}. "
            "Run `whereupon db upgrade`"
        )
    if revision > REVISION:
        raise SchemaError(
            f"{shown_url} has whereupon tables of revision {revision}, and this build knows {REVISION}: it is older "
            "than they are. Install the newer whereupon here"
        )


def without_nul(value: Any) -> Any:
    """Text as both databases keep it: NUL characters, and those that are no Unicode, replaced."""
    if isinstance(value, str):
        return value.replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    if isinstance(value, dict):
        return {without_nul(key): without_nul(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_nul(item) for item in value]
    return value
