"""The store on SQLite: writers take turns, so a place in the log is a position."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, LargeBinary, bindparam, cast, event, func, insert, select, text, update
from sqlalchemy.dialects import sqlite
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from whereupon.schema import UTCDateTime, exception, log
from whereupon.schema import cursor as cursor_table
from whereupon.store import Cursor, Page, Record, Row, Store, lost
from whereupon.subscription import Subscription

BUSY_SECONDS = 30.0


def configure(engine: AsyncEngine) -> None:
    """Make an engine of ours fit for several writers: WAL, waiting for locks, transactions that begin with BEGIN."""

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _: object) -> None:
        # The sqlite3 module begins transactions by itself, at the first write and never for SELECT or SAVEPOINT.
        connection.isolation_level = None
        cursor = connection.cursor()
        for pragma in (
            "journal_mode=WAL",
            "synchronous=NORMAL",
            "foreign_keys=ON",
            f"busy_timeout={BUSY_SECONDS * 1000:.0f}",
        ):
            cursor.execute(f"PRAGMA {pragma}")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.get_execution_options().get("whereupon_begins"):
            connection.exec_driver_sql("BEGIN")


class SQLiteStore(Store):
    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self.now = bindparam("now", callable_=lambda: datetime.now(UTC), type_=UTCDateTime(), unique=False)
        self.now_as_time = self.now
        self.upsert = sqlite.insert
        self._pulse: AsyncConnection | None = None
        self._version: int | None = None

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Takes the write lock at once: a transaction that reads first may find its snapshot stale when it writes."""
        async with self.locking_engine.connect() as connection, connection.begin():
            await self.take_lock(connection)
            yield connection

    @property
    def locking_engine(self) -> AsyncEngine:
        return self.engine.execution_options(whereupon_begins=True)

    async def take_lock(self, connection: AsyncConnection) -> None:
        raw = await connection.get_raw_connection()
        driver = raw.driver_connection
        if driver is None or not driver.in_transaction:
            await connection.exec_driver_sql("BEGIN IMMEDIATE")

    async def register(self, subscriptions: Iterable[Subscription]) -> None:
        wanted = sorted(subscription.name for subscription in subscriptions)
        with self.reaching():
            await self._register(wanted)

    async def _register(self, wanted: list[str]) -> None:
        async with self.reading() as connection:
            known = set((await connection.scalars(select(cursor_table.c.subscription))).all())
        missing = [name for name in wanted if name not in known]
        if not missing:
            return
        async with self.writing() as connection:
            for name in missing:
                await connection.execute(
                    text(
                        "INSERT INTO whereupon_cursor (subscription, lane, page) VALUES (:name, 0, "
                        "coalesce((SELECT seq FROM sqlite_sequence WHERE name = 'whereupon_log'), 0)) "
                        "ON CONFLICT DO NOTHING"
                    ),
                    {"name": name},
                )

    def append(self, connection: Connection, records: Sequence[Record], *, positions: bool) -> dict[UUID, int]:
        values = [{**record._asdict(), "recorded_at": datetime.now(UTC)} for record in records]
        if positions:
            rows = connection.execute(
                insert(log).returning(log.c.event_id, log.c.position, sort_by_parameter_order=True), values
            )
            return {row.event_id: row.position for row in rows}
        connection.execute(insert(log), values)
        return {}

    async def claim(self, names: Sequence[str], owner: UUID, lease: float) -> list[Cursor]:
        free = (
            cursor_table.c.owner.is_(None) | (cursor_table.c.owner == owner) | (cursor_table.c.lease_until < self.now)
        )
        async with self.reading() as connection:  # asking first spares the write lock when there is nothing to take
            found = await connection.scalars(
                select(cursor_table.c.subscription).where(
                    cursor_table.c.subscription.in_(names), ~cursor_table.c.paused, free
                )
            )
            if not found.all():
                return []
        async with self.writing() as connection:
            rows = await connection.execute(
                update(cursor_table)
                .where(cursor_table.c.subscription.in_(names), ~cursor_table.c.paused, free)
                .values(owner=owner, token=cursor_table.c.token + 1, lease_until=self.later(lease))
                .returning(
                    cursor_table.c.subscription,
                    cursor_table.c.lane,
                    cursor_table.c.token,
                    cursor_table.c.page,
                    text("done"),
                )
            )
            return [Cursor(row.subscription, row.lane, row.token, row.page, set(json.loads(row.done))) for row in rows]

    async def renew(self, cursors: Sequence[Cursor], owner: UUID, lease: float) -> list[Cursor]:
        async with self.writing() as connection:
            rows = await connection.execute(
                update(cursor_table)
                .where(
                    cursor_table.c.owner == owner, cursor_table.c.subscription.in_([c.subscription for c in cursors])
                )
                .values(lease_until=self.later(lease))
                .returning(cursor_table.c.subscription, cursor_table.c.lane, cursor_table.c.token)
            )
            renewed = {tuple(row) for row in rows}
        return [cursor for cursor in cursors if (cursor.subscription, cursor.lane, cursor.token) not in renewed]

    async def release(self, owner: UUID) -> None:
        async with self.writing() as connection:
            await connection.execute(
                update(cursor_table).where(cursor_table.c.owner == owner).values(owner=None, lease_until=None)
            )

    async def read(self, cursor: Cursor, types: Sequence[str] | None, skip_ran: bool, limit: int) -> Page:
        query = (
            select(
                log.c.position,
                log.c.event_id,
                log.c.type,
                log.c.version,
                # whoever repaired a row by hand may have left text, which the driver would not give as bytes
                cast(log.c.payload, LargeBinary),
                log.c.headers,
                log.c.recorded_at,
            )
            .where(
                log.c.position > cursor.place,
                ~select(exception.c.id)
                .where(exception.c.subscription == cursor.subscription, exception.c.position == log.c.position)
                .exists(),
            )
            .order_by(log.c.position)
            .limit(limit)
        )
        if types is not None:
            query = query.where(log.c.type.in_(types))
        if skip_ran:
            query = query.where(
                text("NOT EXISTS (SELECT 1 FROM json_each(whereupon_log.ran) WHERE value = :me)").bindparams(
                    me=cursor.subscription
                )
            )
        async with self.reading() as connection:
            last = await connection.scalar(select(func.max(log.c.position))) or cursor.place
            rows = [Row(*row) for row in await connection.execute(query)]
        complete = len(rows) < limit
        # an engine that reads outside transactions may have seen more rows than `last` says
        after = max(cursor.place, last, rows[-1].position if rows else 0) if complete else rows[-1].position
        return Page([row for row in rows if row.position not in cursor.done], after, complete)

    async def pulse(self) -> bool:
        if self._pulse is None:
            self._pulse = await self.engine.execution_options(whereupon_begins=True).connect()
        try:
            # tells of commits through any other connection, in this process or another
            version = (await self._pulse.exec_driver_sql("PRAGMA data_version")).scalar()
            await self._pulse.rollback()  # within one transaction the answer stays the same
        except BaseException:
            await self.close()
            raise
        changed = version != self._version
        self._version = version
        return changed

    async def close(self) -> None:
        pulse, self._pulse = self._pulse, None
        if pulse is not None:
            await pulse.close()

    async def fence(self, connection: AsyncConnection, cursor: Cursor) -> None:
        held = await connection.execute(update(cursor_table).where(*_mine(cursor)).values(token=cursor_table.c.token))
        if not held.rowcount:
            raise lost(cursor)

    async def mark_done(self, connection: AsyncConnection, cursor: Cursor, positions: Sequence[int]) -> None:
        done = await connection.execute(
            text(
                "UPDATE whereupon_cursor SET done = (SELECT json_group_array(d.value) FROM (SELECT value FROM "
                "json_each(whereupon_cursor.done) UNION SELECT value FROM json_each(:positions)) AS d) "
                "WHERE subscription = :subscription AND lane = :lane AND token = :token"
            ),
            {**_key(cursor), "positions": json.dumps(list(positions))},
        )
        if not done.rowcount:
            raise lost(cursor)

    async def move(self, connection: AsyncConnection, cursor: Cursor, place: int, keep: Collection[int]) -> set[int]:
        left = await connection.scalar(
            text(
                "UPDATE whereupon_cursor SET page = :page, done = (SELECT json_group_array(d.value) "
                "FROM json_each(whereupon_cursor.done) AS d WHERE d.value > :page OR d.value IN :keep) "
                "WHERE subscription = :subscription AND lane = :lane AND token = :token RETURNING done"
            ).bindparams(bindparam("keep", expanding=True)),
            {**_key(cursor), "page": place, "keep": list(keep)},
        )
        if left is None:
            raise lost(cursor)
        return set(json.loads(left))

    async def done_now(self, connection: AsyncConnection, cursor: Cursor) -> set[int]:
        done = await connection.scalar(
            text("SELECT done FROM whereupon_cursor WHERE subscription = :subscription AND lane = :lane"),
            {"subscription": cursor.subscription, "lane": cursor.lane},
        )
        return set(json.loads(done or "[]"))

    async def passed(self, event_ids: Sequence[UUID]) -> list[tuple[UUID, str, int, list[str], str, bool, bool]]:
        query = text(
            "SELECT l.event_id, l.type, l.position, l.ran, c.subscription, "
            "l.position <= c.page OR EXISTS (SELECT 1 FROM json_each(c.done) d WHERE d.value = l.position) AS past, "
            "l.recorded_at < c.created_at AS older "
            "FROM whereupon_log l CROSS JOIN whereupon_cursor c WHERE l.event_id IN :ids "
            "ORDER BY l.position, c.subscription"
        ).bindparams(bindparam("ids", expanding=True))
        async with self.reading() as connection:
            rows = await connection.execute(query, {"ids": [event_id.hex for event_id in event_ids]})
            return [
                (
                    UUID(row.event_id),
                    row.type,
                    row.position,
                    json.loads(row.ran or "[]"),
                    row.subscription,
                    bool(row.past),
                    bool(row.older),
                )
                for row in rows
            ]


def _mine(cursor: Cursor) -> tuple[Any, ...]:
    return (
        cursor_table.c.subscription == cursor.subscription,
        cursor_table.c.lane == cursor.lane,
        cursor_table.c.token == cursor.token,
    )


def _key(cursor: Cursor) -> dict[str, Any]:
    return {"subscription": cursor.subscription, "lane": cursor.lane, "token": cursor.token}
