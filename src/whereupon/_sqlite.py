"""The store on SQLite: writers take turns, so a place in the log is a position."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import inspect
import json
import operator
import sqlite3
import time
from asyncio import CancelledError
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import (
    Connection,
    bindparam,
    case,
    event,
    func,
    insert,
    select,
    text,
    tuple_,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.pool import NullPool, QueuePool
from sqlalchemy.util import await_only

from whereupon.schema import UTCDateTime, exception, log, process
from whereupon.schema import cursor as cursor_table
from whereupon.store import (
    LOOK,
    Cursor,
    LaneKey,
    LaneState,
    Move,
    Page,
    Passed,
    Pulse,
    Record,
    Remembered,
    Row,
    Store,
    lost,
    ran_in,
)

BUSY_SECONDS = 30.0
_AT_ONCE: Final = 1000
"""Lanes claimed by one statement; SQLite takes 32,766 parameters."""
_KEPT: Final = 3
"""Connections that a worker keeps for what it asks most often: to read, to settle, and to read for those that lag."""


def configure(engine: AsyncEngine) -> None:
    """Make an engine of ours fit for several writers: WAL, waiting for locks, transactions that begin with BEGIN."""

    @event.listens_for(engine.sync_engine, "connect")
    def connect(connection: Any, _: object) -> None:
        # The sqlite3 module begins transactions by itself, at the first write and never for SELECT or SAVEPOINT.
        connection.isolation_level = None
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={BUSY_SECONDS * 1000:.0f}")
        _use_wal(cursor)
        cursor.execute("PRAGMA synchronous=NORMAL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()

    @event.listens_for(engine.sync_engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.get_execution_options().get("whereupon_begins"):
            connection.exec_driver_sql("BEGIN")


def _use_wal(cursor: Any) -> None:
    """Where several make a new file one with WAL at once, SQLite refuses all but one without waiting."""
    gives_up = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode=WAL")
            return
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > gives_up:
                raise
        await_only(asyncio.sleep(0.02))


def _have_it_stop_once(connection: Any, *_: object) -> None:
    """Let all that stop the thread of a connection wait for the same answer.

    Where an event loop ends just after a statement, or the making of a connection, was cancelled, SQLAlchemy and
    aiosqlite both stop the driver's thread. It obeys once, and the loop would wait for ever for its second answer.
    """
    driver: Any = getattr(connection, "driver_connection", None)
    if (stop := getattr(driver, "stop", None)) is not None and not hasattr(stop, "cache_info"):
        driver.stop = functools.cache(stop)


def _let_go_of_locks(connection: Any, *_: object) -> None:
    """A statement was cancelled, and its connection is about to be closed: end the transaction first.

    The thread goes on with the statement. If that has rows to return, SQLite puts the closing off until the cursor is
    gone, which only the garbage collector sees to; until then it would hold the lock of all writers.
    """
    _have_it_stop_once(connection)  # it may have been made before the pool was listened to
    rollback = getattr(getattr(connection, "driver_connection", None), "rollback", None)
    if rollback is None or not inspect.iscoroutinefunction(rollback):
        return
    with contextlib.suppress(RuntimeError):  # no loop runs: an engine is disposed of after its end
        task = asyncio.get_running_loop().create_task(_quietly(rollback))
        _rolling_back.add(task)
        task.add_done_callback(_rolling_back.discard)


async def _quietly(rollback: Callable[[], Awaitable[None]]) -> None:
    with contextlib.suppress(sqlite3.Error, ValueError):  # it is closed already
        await rollback()


_rolling_back: Final[set[asyncio.Task[None]]] = set()
"""The event loop itself keeps no task alive."""


class SQLiteStore(Store):
    errors = (*Store.errors, sqlite3.Error)

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        pool = engine.sync_engine.pool
        if not event.contains(pool, "invalidate", _let_go_of_locks):
            event.listen(pool, "invalidate", _let_go_of_locks)
            # before whatever else is done with a new connection: amid that, it is closed without being invalidated
            event.listen(pool, "connect", _have_it_stop_once, insert=True)
        self.now = bindparam("now", callable_=lambda: datetime.now(UTC), type_=UTCDateTime(), unique=False)
        self.now_as_time = self.now
        self.upsert = sqlite.insert
        self._pulse: AsyncConnection | None = None
        self._version: int | None = None
        self._next_at: dict[LaneKey, datetime] = {}
        self._at_hand: list[AsyncConnection] = []
        """Connections that are kept for the next who asks the driver."""

    def use(self, engine: AsyncEngine) -> None:
        self.own = engine.execution_options(whereupon_begins=True)  # else its BEGIN would come before ours

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """Takes the write lock at once: a transaction that reads first may find its snapshot stale when it writes."""
        async with self.own.connect() as connection, connection.begin():
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

    # --- publishing -------------------------------------------------------------------------------------------------

    async def before(self, connection: AsyncConnection, position: int | None) -> int:
        return 0 if position is None else position - 1

    @property
    def finished(self) -> int:
        return 2**62

    def reaches(self, place: int, last: int) -> bool:
        return place >= last

    def append(self, connection: Connection, records: Sequence[Record], *, positions: bool) -> list[int]:
        values = [{**record._asdict(), "recorded_at": datetime.now(UTC)} for record in records]
        if positions:
            rows = connection.execute(insert(log).returning(log.c.position, sort_by_parameter_order=True), values)
            return list(rows.scalars())
        connection.execute(insert(log), values)
        return []

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def claim(self, lanes: Sequence[LaneState], owner: UUID) -> list[Cursor]:
        if any(lane.owner not in (None, owner) for lane in lanes):
            # whoever held the lock until now may have kept owners from renewing their leases: they look for it often
            async with self.writing():
                pass
            await asyncio.sleep(10 * LOOK)
        free = cursor_table.c.owner.is_(None) | (cursor_table.c.owner == owner)
        its_owner = process.c.id == cursor_table.c.owner
        alive = select(process.c.id).where(its_owner, process.c.lease_until > self.now).exists()
        alone = select(process.c.id).where(its_owner, process.c.alone).exists()
        seen = tuple_(cursor_table.c.subscription, cursor_table.c.generation, cursor_table.c.lane, cursor_table.c.token)
        claiming = (
            update(cursor_table)
            .where(seen.in_(bindparam("seen", expanding=True)), free | ~alive)
            .values(
                owner=owner,
                token=cursor_table.c.token + 1,
                crashes=case(
                    (free, cursor_table.c.crashes), (alone, 0), else_=func.min(cursor_table.c.crashes + 1, 10)
                ),
            )
            .returning(
                cursor_table.c.subscription, cursor_table.c.generation, cursor_table.c.lane,
                cursor_table.c.token, cursor_table.c.page, text("done"), cursor_table.c.crashes,
            )
        )  # fmt: skip
        cursors = []
        async with self.writing() as connection:
            for first in range(0, len(lanes), _AT_ONCE):
                some = [(*lane.key, lane.token) for lane in lanes[first : first + _AT_ONCE]]
                cursors += [
                    Cursor(
                        LaneKey(row.subscription, row.generation, row.lane),
                        row.token,
                        row.page,
                        set(json.loads(row.done)),
                        crashes=row.crashes,
                    )
                    for row in await connection.execute(claiming, {"seen": some})
                ]
            await self.load_exceptions(connection, cursors)
        return cursors

    async def _exceptions_beyond(self, connection: AsyncConnection, names: Sequence[str]) -> list[tuple[Any, ...]]:
        rows = await connection.execute(
            select(exception.c.subscription, exception.c.generation, exception.c.lane, exception.c.position)
            .join(
                cursor_table,
                (cursor_table.c.subscription == exception.c.subscription)
                & (cursor_table.c.generation == exception.c.generation)
                & (cursor_table.c.lane == exception.c.lane),
            )
            .where(exception.c.subscription.in_(names), exception.c.position > cursor_table.c.page)
        )
        return [tuple(row) for row in rows]

    async def end(self, connection: AsyncConnection) -> int:
        last = await connection.scalar(text("SELECT seq FROM sqlite_sequence WHERE name = 'whereupon_log'"))
        return int(last or 0)

    async def standing(self, connection: AsyncConnection, names: Sequence[str]) -> list[Cursor]:
        key = (cursor_table.c.subscription, cursor_table.c.generation, cursor_table.c.lane)
        rows = await connection.execute(
            select(*key, cursor_table.c.token, cursor_table.c.page, text("done"))
            .where(cursor_table.c.subscription.in_(names))
            .order_by(*key)
        )
        return [
            Cursor(LaneKey(row.subscription, row.generation, row.lane), row.token, row.page, set(json.loads(row.done)))
            for row in rows
        ]

    async def lay(self, connection: AsyncConnection, keys: Sequence[LaneKey], place: int, token: int) -> None:
        await connection.execute(
            insert(cursor_table), [{**key._asdict(), "page": place, "token": token} for key in keys]
        )

    # --- reading ----------------------------------------------------------------------------------------------------

    async def _ask(self, connection: AsyncConnection, statement: str, parameters: Sequence[Any] = ()) -> list[Any]:
        """Ask the driver for what deliveries wait for.

        aiosqlite has a thread for each connection. For SQLAlchemy it makes a cursor, executes, fetches and closes the
        cursor, and each of these is two hops between threads: most of what a small statement costs. So a worker asks
        the driver itself. Without a worker nobody waits, and statements go the usual way.
        """
        if self._sibling is None:
            result = await connection.exec_driver_sql(statement, tuple(parameters))
            return list(result) if result.returns_rows else []
        driver = await _driver_of(connection)
        try:
            return list(await driver.execute_fetchall(statement, parameters))
        except sqlite3.Error as error:
            raise DBAPIError.instance(
                statement, parameters, error, sqlite3.Error, hide_parameters=True, dialect=self.engine.dialect
            ) from error
        except CancelledError:
            await connection.invalidate()  # it may be running still, and wait for a lock
            raise

    @asynccontextmanager
    async def _at_once(self) -> AsyncIterator[AsyncConnection]:
        """A connection for `_ask`, not in a transaction until there is a BEGIN; kept for the next who wants one."""
        connection = self._at_hand.pop() if self._at_hand else await self.own.connect()
        try:
            yield connection
        except BaseException:
            await connection.invalidate()  # it may be in a transaction
            await connection.close()
            raise
        driver = await _driver_of(connection)
        # one that is opened with autocommit=False (of Python 3.12) begins again by itself
        if len(self._at_hand) < self._may_keep() and not driver.in_transaction:
            self._at_hand.append(connection)
        else:
            await connection.close()

    def _may_keep(self) -> int:
        """How many connections are kept: as many as leave some of a small pool to others."""
        if self._sibling is None:
            return 0
        pool = self._sibling.pool
        if isinstance(pool, QueuePool):
            return min(_KEPT, pool.size() - 2)
        return _KEPT if isinstance(pool, NullPool) else 0

    async def read(self, place: int, types: Sequence[str] | None, limit: int, toward: int | None = None) -> Page:
        heard = "" if types is None else f" AND type IN ({', '.join('?' * len(types))})"
        end = "" if toward is None else " AND position <= ?"
        parameters = [place, *(types or ()), *(() if toward is None else (toward,)), limit]
        async with self._at_once() as connection:
            found = await self._ask(connection, _PAGE.format(heard=heard, end=end), parameters)
        rows = [
            Row(
                position, UUID(event_id), type_, version, payload, headers, keys, ran,
                _time(recorded_at),
            )
            for _, position, event_id, type_, version, payload, headers, keys, ran, recorded_at in found
            if position is not None
        ]  # fmt: skip
        rows.sort(key=_position_of)
        if len(rows) == limit:
            return Page(rows, None, rows[-1].position, False)
        last = (found[0][0] or place) if toward is None else toward
        return Page(rows, None, max(place, last), toward is None)

    def within(self, window: None, position: int) -> int:
        return position

    def is_later(self, place: int, other: int) -> bool:
        return place > other

    async def pulse(self, owner: UUID, names: Sequence[str]) -> Pulse:
        if self._pulse is None:
            self._pulse = await self.own.connect()
        try:
            # tells of commits through any other connection, in this process or another; asked of the driver, since
            # SQLAlchemy would begin a transaction, within which the answer stays the same, and end it again
            driver: Any = (await self._pulse.get_raw_connection()).driver_connection
            [(version,)] = await driver.execute_fetchall("PRAGMA data_version")
        except BaseException:
            await self._end_pulse()
            raise
        changed = version != self._version
        self._version = version
        if changed:
            lane = (exception.c.subscription, exception.c.generation, exception.c.lane)
            async with self.reading() as connection:
                found = await connection.execute(
                    select(*lane, func.min(exception.c.next_at))
                    .where(exception.c.subscription.in_(names), exception.c.next_at.is_not(None))
                    .group_by(*lane)
                )
                self._next_at = {LaneKey(*key): at for *key, at in found}
        now = datetime.now(UTC)
        return Pulse(changed, [key for key, at in self._next_at.items() if at <= now], changed)

    async def _end_pulse(self) -> None:
        pulse, self._pulse = self._pulse, None
        if pulse is not None:
            await pulse.close()

    async def close(self) -> None:
        kept, self._at_hand = self._at_hand, []
        try:
            await self._end_pulse()
            for connection in kept:
                await connection.close()
        finally:
            await super().close()

    # --- settling ---------------------------------------------------------------------------------------------------

    async def settle(self, moves: Sequence[Move], worker: UUID, remembered: Sequence[Remembered]) -> set[LaneKey]:
        async with self._at_once() as connection:
            if not (await _driver_of(connection)).in_transaction:
                await self._ask(connection, "BEGIN IMMEDIATE")
            held = await self._move(connection, moves)
            await self.remember(connection, worker, remembered)
            await self._ask(connection, "COMMIT")
        return held

    async def _move(self, connection: AsyncConnection, moves: Sequence[Move]) -> set[LaneKey]:
        changes = [[*m.cursor.key, m.cursor.token, m.place, json.dumps(m.add), json.dumps(m.drop)] for m in moves]
        return {LaneKey(*key) for key in await self._ask(connection, _MOVE, (json.dumps(changes),))}

    async def remember(self, connection: AsyncConnection, worker: UUID, remembered: Sequence[Remembered]) -> None:
        pages = [_stored(page) for page in self._pages(worker, remembered)]
        for first in range(0, len(pages), _AT_ONCE):
            some = pages[first : first + _AT_ONCE]
            values = ", ".join(["(?, ?, ?, ?, ?, ?, ?)"] * len(some))
            await self._ask(connection, f"{_REMEMBER} {values}", [value for page in some for value in page])

    async def fence(self, connection: AsyncConnection, cursor: Cursor) -> None:
        if not await self._ask(connection, _FENCE, (*cursor.key, cursor.token)):
            raise lost(cursor)

    async def take_turn(self, connection: AsyncConnection, cursor: Cursor) -> None:
        await self.fence(connection, cursor)

    async def move(
        self, connection: AsyncConnection, move: Move, worker: UUID, remembered: Sequence[Remembered] = ()
    ) -> None:
        if not await self._move(connection, [move]):
            raise lost(move.cursor)
        await self.remember(connection, worker, remembered)

    async def done_now(self, connection: AsyncConnection, cursor: Cursor) -> set[int]:
        done = await connection.scalar(
            text(
                "SELECT done FROM whereupon_cursor "
                "WHERE subscription = :subscription AND generation = :generation AND lane = :lane"
            ),
            cursor.key._asdict(),
        )
        return set(json.loads(done or "[]"))

    # --- what became of events --------------------------------------------------------------------------------------

    async def passed(self, event_ids: Sequence[UUID]) -> list[Passed]:
        query = text(
            "SELECT l.event_id, l.type, l.position, l.keys, CAST(l.ran AS text) AS ran, l.version, "
            "CAST(l.payload AS BLOB) AS payload, "
            "c.subscription, c.lane, s.lanes, s.ordered_by, "
            "l.position <= c.page OR EXISTS (SELECT 1 FROM json_each(c.done) d WHERE d.value = l.position) AS past, "
            "l.recorded_at < s.created_at AS older "
            "FROM whereupon_log l CROSS JOIN whereupon_cursor c "
            "JOIN whereupon_subscription s ON s.name = c.subscription "
            "WHERE l.event_id IN :ids AND c.generation = 0 ORDER BY l.position, c.subscription, c.lane"
        ).bindparams(bindparam("ids", expanding=True))
        async with self.reading() as connection:
            rows = await connection.execute(query, {"ids": [event_id.hex for event_id in event_ids]})
            return [
                Passed(
                    UUID(row.event_id), row.type, row.position, row.keys,
                    ran_in(row.ran),
                    row.version, row.payload, row.subscription, row.lane, row.lanes, row.ordered_by, bool(row.past),
                    bool(row.older),
                )
                for row in rows
            ]  # fmt: skip


_FENCE: Final = (
    "UPDATE whereupon_cursor SET token = token WHERE subscription = ? AND generation = ? AND lane = ? AND token = ? "
    "RETURNING token"
)
# In one statement with the page, since a transaction for both would be a step of the thread more.
_PAGE: Final = (
    "SELECT newest.position, page.* FROM (SELECT max(position) AS position FROM whereupon_log) AS newest LEFT JOIN ("
    # whoever repaired a row by hand may have left text, which the driver would not give as bytes
    "SELECT position, event_id, type, version, CAST(payload AS BLOB), headers, keys, CAST(ran AS TEXT), recorded_at "
    "FROM whereupon_log WHERE position > ?{heard}{end} ORDER BY position LIMIT ?) AS page"
)
_MOVE: Final = """
UPDATE whereupon_cursor SET page = move.page, done = CASE WHEN move.added = '[]' AND move.dropped = '[]'
    THEN whereupon_cursor.done ELSE (
        SELECT json_group_array(d.value) FROM (
            SELECT value FROM json_each(whereupon_cursor.done) UNION SELECT value FROM json_each(move.added)) AS d
        WHERE d.value NOT IN (SELECT value FROM json_each(move.dropped))) END
FROM (
    SELECT json_extract(value, '$[0]') AS subscription, json_extract(value, '$[1]') AS generation,
        json_extract(value, '$[2]') AS lane, json_extract(value, '$[3]') AS token,
        json_extract(value, '$[4]') AS page, json_extract(value, '$[5]') AS added,
        json_extract(value, '$[6]') AS dropped
    FROM json_each(?)) AS move
WHERE whereupon_cursor.subscription = move.subscription AND whereupon_cursor.generation = move.generation
    AND whereupon_cursor.lane = move.lane AND whereupon_cursor.token = move.token
RETURNING subscription, generation, lane
"""
_REMEMBER: Final = (
    "INSERT INTO whereupon_history (subscription, generation, worker, first_position, last_position, entries, "
    "recorded_at) VALUES"
)
_position_of: Final = operator.attrgetter("position")


def _time(stored: str) -> datetime:
    at = datetime.fromisoformat(stored)
    return at.replace(tzinfo=UTC) if at.tzinfo is None else at.astimezone(UTC)


async def _driver_of(connection: AsyncConnection) -> Any:
    sync = connection.sync_connection
    if sync is None or sync.invalidated:
        return (await connection.get_raw_connection()).driver_connection
    return sync.connection.driver_connection  # the same, without a greenlet for it


def _stored(page: dict[str, Any]) -> tuple[Any, ...]:
    """A row of the history, as its columns' types would have it stored."""
    at = page["recorded_at"].replace(tzinfo=None).isoformat(" ", "microseconds")
    return (*(page | {"worker": page["worker"].hex, "recorded_at": at}).values(),)
