"""The store on PostgreSQL: a place in the log is a snapshot.

Ids are handed out before commit, so a cursor over ids steps over late commits for ever. What a snapshot sees is exact:
a cursor keeps the snapshot S1 in which everything is handled, and reads what is visible in the current one, S2, and was
not in S1: what transactions did that began after S1 (`tx_id >= xmax(S1)`) or were in progress in it (`xip(S1)`).
A window too large for one page is paged by position while S2 is kept as `target`. (The idea is that of Skytools' PgQ.)
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import Any, NamedTuple
from uuid import UUID

from sqlalchemy import BigInteger, Connection, Text, Uuid, bindparam, func, insert, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from whereupon.schema import log
from whereupon.store import Cursor, Page, Record, Row, Store, lost
from whereupon.subscription import Subscription


class Place(NamedTuple):
    snapshot: str
    """Everything visible in it is handled."""
    target: str | None = None
    """While a window is paged: the snapshot that it ends with."""
    page: int = 0
    """While a window is paged: the position up to which it is handled."""


_COLUMNS = "l.position, l.event_id, l.type, l.version, l.payload, l.headers, l.recorded_at"
_NEW = (
    "(l.tx_id >= pg_snapshot_xmax(CAST(CAST(:snapshot AS text) AS pg_snapshot))"
    " OR l.tx_id = ANY(ARRAY(SELECT pg_snapshot_xip(CAST(CAST(:snapshot AS text) AS pg_snapshot)))))"
)
_KEY = "subscription = :subscription AND lane = :lane AND token = :token"


class PostgresStore(Store):
    def __init__(self, engine: AsyncEngine) -> None:
        # a snapshot that outlives a statement (REPEATABLE READ) would hide what was committed since
        super().__init__(engine.execution_options(isolation_level="READ COMMITTED"))
        self.now = func.clock_timestamp()
        self.now_as_time = func.clock_timestamp()
        self.upsert = postgresql.insert
        self._seen: str | None = None
        # one statement sees one snapshot anyway: BEGIN and ROLLBACK around it would cost two more round trips
        self._autocommit = engine.execution_options(isolation_level="AUTOCOMMIT")
        if engine.driver == "asyncpg":
            import asyncpg

            # SQLAlchemy 2.0 lets through what the driver raises while it connects
            self.errors = (*self.errors, asyncpg.PostgresError, asyncpg.InterfaceError)

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        async with self._autocommit.connect() as connection:
            yield connection

    async def prepare(self, *, create: bool) -> None:
        await super().prepare(create=create)
        with self.reaching():
            await self._read_clock()

    async def _read_clock(self) -> None:
        async with self.reading() as connection:
            before = self.later(0) - self.clock_offset
            theirs = await connection.scalar(text("SELECT clock_timestamp()"))
            self.clock_offset = theirs - before

    async def register(self, subscriptions: Iterable[Subscription]) -> None:
        names = sorted(subscription.name for subscription in subscriptions)
        with self.reaching():
            async with self.writing() as connection:
                await self._register(connection, names)

    async def _register(self, connection: AsyncConnection, names: list[str]) -> None:
        await connection.execute(
            text(
                "INSERT INTO whereupon_cursor (subscription, lane, snapshot) "
                "SELECT name, 0, pg_current_snapshot() FROM unnest(CAST(:names AS text[])) AS name "
                "WHERE NOT EXISTS (SELECT 1 FROM whereupon_cursor c WHERE c.subscription = name) "
                "ON CONFLICT DO NOTHING"
            ),
            {"names": names},
        )

    def append(self, connection: Connection, records: Sequence[Record], *, positions: bool) -> dict[UUID, int]:
        values = [record._asdict() for record in records]
        if positions:
            rows = connection.execute(
                insert(log).returning(log.c.event_id, log.c.position, sort_by_parameter_order=True), values
            )
            return {row.event_id: row.position for row in rows}
        connection.execute(insert(log).inline(), values)
        return {}

    async def claim(self, names: Sequence[str], owner: UUID, lease: float) -> list[Cursor]:
        async with self.writing() as connection:
            rows = await connection.execute(
                text(
                    "UPDATE whereupon_cursor AS c SET owner = :owner, token = c.token + 1, "
                    "lease_until = clock_timestamp() + make_interval(secs => :lease) "
                    "FROM (SELECT subscription, lane FROM whereupon_cursor "
                    "WHERE subscription = ANY(:names) AND NOT paused "
                    "AND (owner IS NULL OR owner = :owner OR lease_until < clock_timestamp()) "
                    "FOR UPDATE SKIP LOCKED) AS free "
                    "WHERE c.subscription = free.subscription AND c.lane = free.lane "
                    "RETURNING c.subscription, c.lane, c.token, c.snapshot::text, c.target::text, c.page, c.done"
                ).bindparams(bindparam("owner", type_=Uuid()), bindparam("names", type_=ARRAY(Text()))),
                {"owner": owner, "names": list(names), "lease": float(lease)},
            )
            return [
                Cursor(row.subscription, row.lane, row.token, Place(row.snapshot, row.target, row.page), set(row.done))
                for row in rows
            ]

    async def renew(self, cursors: Sequence[Cursor], owner: UUID, lease: float) -> list[Cursor]:
        async with self.writing() as connection:
            rows = await connection.execute(
                text(
                    "UPDATE whereupon_cursor SET lease_until = clock_timestamp() + make_interval(secs => :lease) "
                    "WHERE owner = :owner AND subscription = ANY(:names) RETURNING subscription, lane, token"
                ).bindparams(bindparam("owner", type_=Uuid()), bindparam("names", type_=ARRAY(Text()))),
                {"owner": owner, "names": [cursor.subscription for cursor in cursors], "lease": float(lease)},
            )
            held = {tuple(row) for row in rows}
        return [cursor for cursor in cursors if (cursor.subscription, cursor.lane, cursor.token) not in held]

    async def release(self, owner: UUID) -> None:
        async with self.writing() as connection:
            await connection.execute(
                text("UPDATE whereupon_cursor SET owner = NULL, lease_until = NULL WHERE owner = :owner").bindparams(
                    bindparam("owner", type_=Uuid())
                ),
                {"owner": owner},
            )

    async def read(self, cursor: Cursor, types: Sequence[str] | None, skip_ran: bool, limit: int) -> Page:
        place: Place = cursor.place
        conditions = [
            _NEW,
            "NOT EXISTS (SELECT 1 FROM whereupon_exception x WHERE x.subscription = :subscription"
            " AND x.position = l.position)",
        ]
        parameters: dict[str, Any] = {"snapshot": place.snapshot, "subscription": cursor.subscription, "limit": limit}
        if types is not None:
            conditions.append("l.type = ANY(CAST(:types AS text[]))")
            parameters["types"] = list(types)
        if skip_ran:
            conditions.append("(l.ran IS NULL OR NOT jsonb_exists(l.ran, :subscription))")
        if place.target is not None:
            conditions.append("pg_visible_in_snapshot(l.tx_id, CAST(CAST(:target AS text) AS pg_snapshot))")
            conditions.append("l.position > :page")
            parameters |= {"target": place.target, "page": place.page}
        query = (
            "SELECT s.now, r.* FROM (SELECT pg_current_snapshot()::text AS now) s LEFT JOIN LATERAL "
            f"(SELECT {_COLUMNS} FROM whereupon_log l WHERE {' AND '.join(conditions)} "
            "ORDER BY l.position LIMIT :limit) r ON true ORDER BY r.position"
        )
        async with self.reading() as connection:
            found = (await connection.execute(text(query), parameters)).all()
        rows = [Row(*row[1:]) for row in found if row.position is not None]
        target = place.target or found[0].now
        ended = len(rows) < limit
        after = Place(target) if ended else Place(place.snapshot, target, rows[-1].position)
        # what was committed since a paged window was opened is not in it: the next read looks for that
        complete = ended and place.target is None
        return Page([row for row in rows if row.position not in cursor.done], after, complete)

    async def pulse(self) -> bool:
        if self._seen is None:
            query = text("SELECT pg_current_snapshot()::text AS now, true AS grown")
        else:
            query = text(
                "SELECT pg_current_snapshot()::text AS now, "
                f"EXISTS (SELECT 1 FROM whereupon_log l WHERE {_NEW}) AS grown"
            ).bindparams(snapshot=self._seen)
        async with self.reading() as connection:
            row = (await connection.execute(query)).one()
        self._seen = row.now
        return bool(row.grown)

    async def fence(self, connection: AsyncConnection, cursor: Cursor) -> None:
        held = await connection.execute(text(f"SELECT 1 FROM whereupon_cursor WHERE {_KEY} FOR UPDATE"), _key(cursor))
        if held.first() is None:
            raise lost(cursor)

    async def mark_done(self, connection: AsyncConnection, cursor: Cursor, positions: Sequence[int]) -> None:
        done = await connection.execute(
            text(f"UPDATE whereupon_cursor SET done = done || :positions WHERE {_KEY}").bindparams(
                bindparam("positions", type_=ARRAY(BigInteger()))
            ),
            {**_key(cursor), "positions": list(positions)},
        )
        if not done.rowcount:
            raise lost(cursor)

    async def move(self, connection: AsyncConnection, cursor: Cursor, place: Place, keep: Collection[int]) -> set[int]:
        snapshot, target = "CAST(CAST(:snapshot AS text) AS pg_snapshot)", "CAST(CAST(:target AS text) AS pg_snapshot)"
        beyond = (
            "EXISTS (SELECT 1 FROM whereupon_log l WHERE l.position = d"
            f" AND NOT pg_visible_in_snapshot(l.tx_id, {snapshot})"
            f" AND NOT coalesce(pg_visible_in_snapshot(l.tx_id, {target}) AND l.position <= :page, false))"
        )
        left = await connection.scalar(
            text(
                f"UPDATE whereupon_cursor SET snapshot = {snapshot}, target = {target}, page = :page, "
                f"done = ARRAY(SELECT d FROM unnest(done) AS d WHERE d = ANY(:keep) OR {beyond}) "
                f"WHERE {_KEY} RETURNING done"
            ).bindparams(bindparam("keep", type_=ARRAY(BigInteger()))),
            {**_key(cursor), **place._asdict(), "keep": list(keep)},
        )
        if left is None:
            raise lost(cursor)
        return set(left)

    async def done_now(self, connection: AsyncConnection, cursor: Cursor) -> set[int]:
        done = await connection.scalar(
            text("SELECT done FROM whereupon_cursor WHERE subscription = :subscription AND lane = :lane"),
            {"subscription": cursor.subscription, "lane": cursor.lane},
        )
        return set(done or ())

    async def passed(self, event_ids: Sequence[UUID]) -> list[tuple[UUID, str, int, list[str], str, bool, bool]]:
        query = text(
            "SELECT l.event_id, l.type, l.position, l.ran, c.subscription, "
            "pg_visible_in_snapshot(l.tx_id, c.snapshot) OR l.position = ANY(c.done) "
            "OR (c.target IS NOT NULL AND pg_visible_in_snapshot(l.tx_id, c.target) AND l.position <= c.page) AS past, "
            "l.recorded_at < c.created_at AS older "
            "FROM whereupon_log l CROSS JOIN whereupon_cursor c WHERE l.event_id = ANY(:ids) "
            "ORDER BY l.position, c.subscription"
        ).bindparams(bindparam("ids", type_=ARRAY(Uuid())))
        async with self.reading() as connection:
            rows = await connection.execute(query, {"ids": list(event_ids)})
            return [
                (row.event_id, row.type, row.position, _ran(row.ran), row.subscription, row.past, row.older)
                for row in rows
            ]


def _ran(value: Any) -> list[str]:
    if isinstance(value, str):  # a driver that leaves jsonb to its caller
        import json

        value = json.loads(value)
    return list(value or [])


def _key(cursor: Cursor) -> dict[str, Any]:
    return {"subscription": cursor.subscription, "lane": cursor.lane, "token": cursor.token}
