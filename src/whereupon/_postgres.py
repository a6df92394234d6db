"""The store on PostgreSQL: a place in the log is a snapshot.

Ids are handed out before commit, so a cursor over ids steps over late commits for ever. What a snapshot sees is exact:
a cursor keeps the snapshot S1 in which everything is handled, and reads what is visible in the current one, S2, and was
not in S1: what transactions did that began after S1 (`tx_id >= xmax(S1)`) or were in progress in it (`xip(S1)`).
A window too large for one page is paged by position while S2 is kept as `target`. (The idea is that of Skytools' PgQ.)
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import (
    BigInteger,
    BindParameter,
    Connection,
    DateTime,
    Integer,
    LargeBinary,
    Text,
    TextClause,
    Uuid,
    bindparam,
    func,
    text,
)
from sqlalchemy.dialects import postgresql
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from whereupon.errors import PlaceLost
from whereupon.store import (
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


class Place(NamedTuple):
    snapshot: str
    """Everything visible in it is handled."""
    target: str | None = None
    """While a window is paged: the snapshot that it ends with."""
    page: int = 0
    """While a window is paged: the position up to which it is handled."""
    epoch: str | None = None
    """Of what was read since a cursor was claimed: between which crashes of the server. None is good for ever.

    What reached the disk with a cursor is behind all transaction ids that a server hands out after a crash. What was
    only read is not: an id that was rolled back, and of which nothing had reached the disk, comes again.
    """


NOTHING: Final = "1:1:"
"""The snapshot that sees no transaction, and the one that sees all there will ever be."""
EVERYTHING: Final = f"{2**62 - 1}:{2**62 - 1}:"

CLOCK_READ_EVERY: Final = 60.0
"""Seconds between two looks at the server's clock: in between, this machine's may have been asleep."""
STRETCH: Final = 100_000
"""Positions that are searched at once for the next page of a window."""

_COLUMNS = (
    "l.position, l.event_id, l.type, l.version, l.payload, l.headers, l.keys, CAST(l.ran AS text) AS ran, l.recorded_at"
)
_KEY = "subscription = :subscription AND generation = :generation AND lane = :lane AND token = :token"
_STALLED = "set_config('idle_in_transaction_session_timeout', CAST(:stalled AS text), true)"
"""Has the server end a session that then idles in this transaction, with rows locked, for longer than `stalled_ms`."""


_EPOCH = "(SELECT CAST(id AS text) FROM whereupon_epoch)"
"""Which time between two crashes this is; NULL from a crash until the next claim. A crash empties unlogged tables."""

# To ask which cluster this is costs more than to write an event. A server that was not started again since it was asked
# is in the same one, whatever pooler stands before it.
_AT_HOME = "pg_postmaster_start_time() = CAST(:home AS timestamptz)"
_NOW = f"CASE WHEN {_AT_HOME} THEN pg_current_snapshot() ELSE whereupon_snapshot() END"
_XACT_ID = f"CASE WHEN {_AT_HOME} THEN pg_current_xact_id() ELSE whereupon_xact_id() END"
_HOME: BindParameter[Any] = bindparam("home", type_=DateTime(timezone=True))


def _snapshot(name: str) -> str:
    """A parameter as a snapshot; in a subquery of its own it is parsed once, and not for each row."""
    return f"(SELECT CAST(CAST(:{name} AS text) AS pg_snapshot))"


# What transactions did that S1 did not see, in two parts: each has an index, while an OR of them may be a scan. The
# planner must see the ids themselves: of what a subquery computes it assumes a third of the log, and reads all of it.
# Nothing that S1 did not see is at or below the floor: partitions that lie there are left alone.
_SINCE = "l.position > :floor AND l.tx_id >= CAST(CAST(:since AS text) AS xid8)"
_LATE = "l.position > :floor AND l.tx_id = ANY(CAST(CAST(:late AS text) AS xid8[]))"
_BY_ID = "ORDER BY l.tx_id, l.position"  # as the index has it, whatever the planner thinks of the numbers


def _unseen_by(snapshot: str) -> dict[str, str]:
    """The parameters of `_SINCE` and `_LATE`, but for the floor."""
    _, xmax, in_progress = snapshot.split(":")
    return {"since": xmax, "late": f"{{{in_progress}}}"}


_Query = Callable[[TextClause, dict[str, Any]], Awaitable[Sequence[Any]]]


class PostgresStore(Store):
    hears_of_deaths = True

    def __init__(self, engine: AsyncEngine) -> None:
        super().__init__(engine)
        self.engine = engine.execution_options(isolation_level="READ COMMITTED")
        # the time of the statement: an index can be asked for it, while clock_timestamp() is asked anew for each row
        self.now = func.statement_timestamp()
        self.now_as_time = func.statement_timestamp()
        self.upsert = postgresql.insert
        self._home: datetime | None = None
        """When the server was started, if the database was never in another cluster: see `_AT_HOME`."""
        self._clock: tuple[datetime, float] | None = None
        """The server's clock when it was last read, and `time.monotonic` of that moment."""
        self._at_hand: AsyncConnection | None = None
        """The connection of the last read, while a worker runs."""
        self._compiled: dict[TextClause, tuple[str, list[str]]] | None = None
        """Queries as asyncpg takes them, and which parameter is which; None with another driver."""
        self._seen: str | None = None
        self._seen_in: str | None = None
        self._workers: str | None = None
        self.marks: list[tuple[int, int]] = []
        """Positions, each with a transaction id that is higher than that of any row up to there; see `retention`."""
        if engine.driver == "asyncpg":
            import asyncpg

            # SQLAlchemy 2.0 lets through what the driver raises while it connects, and `_reader` all of it
            self.errors = (
                *self.errors,
                asyncpg.PostgresError,
                asyncpg.InterfaceError,
                asyncpg.InternalClientError,  # a connection that the server ends between two statements
            )
            self._compiled = {}

    def use(self, engine: AsyncEngine) -> None:
        # one statement sees one snapshot anyway: BEGIN and ROLLBACK around it would cost two more round trips
        self.autocommit = AsyncEngine(engine.sync_engine.execution_options(isolation_level="AUTOCOMMIT"))
        # a snapshot that outlives a statement (REPEATABLE READ) would hide what was committed since
        self.own = engine.execution_options(isolation_level="READ COMMITTED")

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        """For one statement, which may write, or several that need not see the same."""
        async with self.autocommit.connect() if self.may_autocommit else self.own.begin() as connection:
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A worker that is stopped in the midst of it holds no row for longer than its lease."""
        async with self.own.begin() as connection:
            await connection.execute(text(f"SELECT {_STALLED}"), {"stalled": self._stalled})
            yield connection

    @property
    def stalled_ms(self) -> int:
        """Milliseconds for which a worker's session may idle in a transaction before the server ends it.

        A lease is renewed at each third, so that two thirds are left to a worker that stops: nobody may claim its lanes
        before that, and nothing is locked any more then.
        """
        return max(1, int(self.lease * 1000 * 2 / 3))

    @property
    def _stalled(self) -> str:
        return str(self.stalled_ms)

    async def prepare(self, *, create: bool) -> None:
        await super().prepare(create=create)
        with self.reaching():
            async with self.own.connect() as connection:
                self.may_autocommit = not await connection.run_sync(_names_statements)
            await self._read_clock()
            async with self.reading() as connection:
                await self.load_marks(connection)

    async def load_marks(self, connection: AsyncConnection) -> None:
        marks = await connection.scalar(text("SELECT value FROM whereupon_meta WHERE key = 'marks'"))
        self.marks = [] if marks is None else msgspec.json.decode(marks, type=list[tuple[int, int]])

    def floor(self, snapshot: str) -> int:
        """A position up to which there is nothing, nor ever will be, that this snapshot does not see."""
        oldest = int(snapshot.split(":", 1)[0])
        return max((position for position, tx_id in self.marks if tx_id <= oldest), default=0)

    async def exclusively(self, connection: AsyncConnection, name: str, *, wait: bool = True) -> bool:
        key = {"name": f"whereupon {name}"}
        if wait:
            await connection.execute(text("SELECT pg_advisory_xact_lock(hashtext(:name))"), key)
            return True
        return bool(await connection.scalar(text("SELECT pg_try_advisory_xact_lock(hashtext(:name))"), key))

    async def _read_clock(self) -> None:
        """The shortest of a few questions tells best: what it took is as much as the answer may be off by."""
        shortest = float("inf")
        async with self.reading() as connection:
            for _ in range(3):
                before = time.monotonic()
                theirs = await connection.scalar(text("SELECT clock_timestamp()"))
                took = time.monotonic() - before
                if took < shortest:
                    shortest, self._clock = took, (theirs, before + took / 2)
            started, shift = (
                await connection.execute(text("SELECT pg_postmaster_start_time(), whereupon_shift()"))
            ).one()
            self._home = started if shift == 0 else None

    def later(self, seconds: float) -> datetime:
        """By the server's clock, as it was when last read, and no clock of this machine's that somebody may set."""
        if self._clock is None:
            return super().later(seconds)
        theirs, read_at = self._clock
        return theirs + timedelta(seconds=time.monotonic() - read_at + seconds)

    # --- publishing -------------------------------------------------------------------------------------------------

    async def before(self, connection: AsyncConnection, position: int | None) -> Place:
        if position is None:
            return Place(NOTHING)
        return Place(NOTHING, (await self.end(connection)).snapshot, position - 1)

    @property
    def finished(self) -> Place:
        return Place(EVERYTHING)

    def reaches(self, place: Place, last: int) -> bool:
        return place.target is None or place.page >= last

    def append(self, connection: Connection, records: Sequence[Record], *, positions: bool) -> list[int]:
        values = [
            {
                **record._asdict(),
                "ran": None if record.ran is None else msgspec.json.encode(record.ran).decode(),
            }
            for record in records
        ]
        if len(values) == 1:
            rows = connection.execute(_APPEND_ONE[positions], {**values[0], "home": self._home})
        else:
            columns: dict[str, Any] = {name: [value[name] for value in values] for name in Record._fields}
            rows = connection.execute(_APPEND[positions], {**columns, "home": self._home})
        return list(rows.scalars()) if positions else []

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def claim(self, lanes: Sequence[LaneState], owner: UUID) -> list[Cursor]:
        async with self.writing() as connection:
            await connection.execute(_BEGIN_EPOCH)
            rows = await connection.execute(
                _CLAIM,
                {
                    "owner": owner,
                    "names": [lane.key.subscription for lane in lanes],
                    "generations": [lane.key.generation for lane in lanes],
                    "lanes": [lane.key.lane for lane in lanes],
                    "tokens": [lane.token for lane in lanes],
                },
            )
            cursors = [
                Cursor(
                    LaneKey(row.subscription, row.generation, row.lane),
                    row.token,
                    Place(row.snapshot, row.target, row.page, row.epoch),
                    set(row.done),
                    crashes=row.crashes,
                    row=row.found,
                )
                for row in rows
            ]
            await self.load_exceptions(connection, cursors)
        return cursors

    async def end(self, connection: AsyncConnection) -> Place:
        return Place(str(await connection.scalar(text("SELECT CAST(whereupon_snapshot() AS text)"))))

    async def standing(self, connection: AsyncConnection, names: Sequence[str]) -> list[Cursor]:
        rows = await connection.execute(
            text(
                "SELECT subscription, generation, lane, token, CAST(snapshot AS text) AS snapshot, "
                "CAST(target AS text) AS target, page, done FROM whereupon_cursor "
                "WHERE subscription = ANY(:names) ORDER BY subscription, generation, lane"
            ),
            {"names": list(names)},
        )
        return [
            Cursor(
                LaneKey(row.subscription, row.generation, row.lane),
                row.token,
                Place(row.snapshot, row.target, row.page),
                set(row.done),
            )
            for row in rows
        ]

    async def lay(self, connection: AsyncConnection, keys: Sequence[LaneKey], place: Place, token: int) -> None:
        await connection.execute(
            text(
                "INSERT INTO whereupon_cursor (subscription, generation, lane, snapshot, target, page, token) VALUES "
                "(:subscription, :generation, :lane, CAST(CAST(:snapshot AS text) AS pg_snapshot), "
                "CAST(CAST(:target AS text) AS pg_snapshot), :page, :token)"
            ),
            [
                {
                    **key._asdict(),
                    "snapshot": place.snapshot,
                    "target": place.target,
                    "page": place.page,
                    "token": token,
                }
                for key in keys
            ],
        )

    async def _exceptions_beyond(self, connection: AsyncConnection, names: Sequence[str]) -> list[tuple[Any, ...]]:
        rows = await connection.execute(
            text(
                "SELECT x.subscription, x.generation, x.lane, x.position FROM whereupon_exception x "
                "JOIN whereupon_cursor c ON c.subscription = x.subscription AND c.generation = x.generation "
                # of each the row of the log by its key (OFFSET 0: never a join that reads the whole log); what is not
                # there any more was passed by all
                "AND c.lane = x.lane CROSS JOIN LATERAL (SELECT o.tx_id, o.position FROM whereupon_log o "
                "WHERE o.position = x.position OFFSET 0) AS l "
                "WHERE x.subscription = ANY(:names) AND NOT pg_visible_in_snapshot(l.tx_id, c.snapshot) "
                "AND NOT (c.target IS NOT NULL AND pg_visible_in_snapshot(l.tx_id, c.target) AND l.position <= c.page)"
            ).bindparams(bindparam("names", type_=ARRAY(Text()))),
            {"names": list(names)},
        )
        return [tuple(row) for row in rows]

    # --- reading ----------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _reader(self) -> AsyncIterator[_Query]:
        """Runs the queries that a handler waits for, without what SQLAlchemy adds: twice the time of the query itself.

        Its connection is kept for the next. Without a worker nobody waits, and the queries go the usual way.
        """
        if self._compiled is None or self._sibling is None:
            async with self.reading() as connection:

                async def slowly(statement: TextClause, parameters: dict[str, Any]) -> Sequence[Any]:
                    return (await connection.execute(statement, parameters)).all()

                yield slowly
            return
        compiled = self._compiled
        kept, self._at_hand = self._at_hand, None
        connection = kept if kept is not None else await self.autocommit.connect()
        try:
            driver: Any = (await connection.get_raw_connection()).driver_connection

            async def query(statement: TextClause, parameters: dict[str, Any]) -> Sequence[Any]:
                if statement not in compiled:
                    form = statement.compile(dialect=self.engine.dialect)
                    compiled[statement] = str(form), list(form.positiontup or ())
                text, names = compiled[statement]
                rows: Sequence[Any] = await driver.fetch(text, *[parameters[name] for name in names])
                return rows

            yield query
        except BaseException:
            await connection.invalidate()
            await connection.close()
            raise
        await self._put_aside(connection)

    async def _put_aside(self, connection: AsyncConnection) -> None:
        if self._at_hand is None and self._sibling is not None:
            self._at_hand = connection
        else:
            await connection.close()

    async def close(self) -> None:
        kept, self._at_hand = self._at_hand, None
        if kept is not None:
            await kept.close()
        await super().close()

    async def read(self, place: Place, types: Sequence[str] | None, limit: int, toward: Place | None = None) -> Page:
        async with self._reader() as query:
            if place.target is None:
                floor = self.floor(place.snapshot)
                parameters = {
                    **_unseen_by(place.snapshot),
                    "floor": floor,
                    "limit": limit + 1,
                    **({"home": self._home} if toward is None else {"toward": toward.snapshot}),
                    "types": None if types is None else list(types),
                }
                found = await query(_WINDOW[toward is None, types is None], parameters)
                now: str = found[0][0]
                epoch: str | None = found[0][1]
                for seen in (place, toward):
                    if seen is not None and seen.epoch not in (None, epoch):
                        raise PlaceLost(_CRASHED)
                if place.epoch is None:
                    epoch = None
                rows = [Row(*row[2:]) for row in found if row[2] is not None]
                if len(rows) <= limit:
                    rows.sort(key=lambda row: row.position)
                    return Page(rows, (place.snapshot, now, epoch), Place(now, epoch=epoch), toward is None)
                # more than a page: from its least position on, which a late commit may have put far back
                first: int = (await query(_FIRST, {**_unseen_by(place.snapshot), "target": now, "floor": floor}))[0][0]
                place = Place(place.snapshot, now, first - 1, epoch)
            rows = await self._next_of(query, place, types, limit)
        assert place.target is not None
        ended = len(rows) < limit
        after = Place(place.target, epoch=place.epoch) if ended else place._replace(page=rows[-1].position)
        # what was committed since the window was opened is not in it: the next read looks for that
        return Page(rows, (place.snapshot, place.target, place.epoch), after, False)

    async def _next_of(self, query: _Query, place: Place, types: Sequence[str] | None, limit: int) -> list[Row]:
        """The next `limit` rows of a paged window, or what is left of it.

        Looked for in stretches: with no upper bound each partition beyond would be searched for its first one.
        """
        rows: list[Row] = []
        after, stretch, last = place.page, STRETCH, None
        while True:
            page = await query(
                _PAGE[types is None],
                {
                    "snapshot": place.snapshot,
                    "target": place.target,
                    "page": after,
                    "end": after + stretch,
                    "limit": limit - len(rows),
                    "types": None if types is None else list(types),
                },
            )
            rows += [Row(*row) for row in page]
            after, stretch = after + stretch, 2 * stretch
            if len(rows) == limit:
                return rows
            if last is None:  # later than the window: whatever it holds has a position by now
                last = (await query(_LAST, {}))[0][0]
            if after >= last:
                return rows

    def within(self, window: tuple[str, str, str | None], position: int) -> Place:
        snapshot, target, epoch = window
        return Place(snapshot, target, position, epoch)

    def is_later(self, place: Place, other: Place) -> bool:
        return _age(place.snapshot) > _age(other.snapshot)

    async def pulse(self, owner: UUID, names: Sequence[str]) -> Pulse:
        if self._clock is None or time.monotonic() - self._clock[1] > CLOCK_READ_EVERY:
            await self._read_clock()
        async with self.reading() as connection:
            row = (
                await connection.execute(
                    _PULSE,
                    {
                        **_unseen_by(self._seen or NOTHING),
                        "floor": 0 if self._seen is None else self.floor(self._seen),
                        "home": self._home,
                        "owner": owner,
                        "names": list(names),
                    },
                )
            ).one()
        grown = self._seen is None or row.grown or row.epoch != self._seen_in
        changed = row.workers != self._workers
        self._seen, self._seen_in, self._workers = row.now, row.epoch, row.workers
        due = [] if row.due is None else msgspec.json.decode(row.due, type=list[LaneKey])
        return Pulse(grown, due, changed or row.restless)

    # --- settling ---------------------------------------------------------------------------------------------------

    async def settle(self, moves: Sequence[Move], worker: UUID, remembered: Sequence[Remembered]) -> set[LaneKey]:
        held = await self._settle(_SETTLE_ROWS, moves, worker, remembered)
        if len(held) < len(moves):  # their rows are somewhere else, or the lanes somebody else's
            rest = [move for move in moves if move.cursor.key not in held]
            held |= await self._settle(_SETTLE, rest, worker, [])
        return held

    async def _settle(
        self, statement: TextClause, moves: Sequence[Move], worker: UUID, remembered: Sequence[Remembered]
    ) -> set[LaneKey]:
        async with self.reading() as connection:  # one statement, and so a transaction by itself
            rows = await connection.execute(
                statement,
                {
                    "names": [move.cursor.key.subscription for move in moves],
                    "generations": [move.cursor.key.generation for move in moves],
                    "lanes": [move.cursor.key.lane for move in moves],
                    "tokens": [move.cursor.token for move in moves],
                    "snapshots": [move.place.snapshot for move in moves],
                    "targets": [move.place.target for move in moves],
                    "pages": [move.place.page for move in moves],
                    "adds": [_array(move.add) for move in moves],
                    "drops": [_array(move.drop) for move in moves],
                    "rows": [move.cursor.row for move in moves],
                    "epochs": [move.place.epoch for move in moves],
                    "count": len(moves),
                    **self._kept(worker, remembered),
                },
            )
            found = {LaneKey(*key): row for *key, row in rows}
        for move in moves:
            move.cursor.row = found.get(move.cursor.key, move.cursor.row)
        return set(found)

    async def fence(self, connection: AsyncConnection, cursor: Cursor) -> None:
        held = await connection.execute(
            text(f"SELECT {_STALLED} FROM whereupon_cursor WHERE {_KEY} FOR UPDATE"),
            {**_key(cursor), "stalled": self._stalled},
        )
        if held.first() is None:
            raise lost(cursor)

    async def move(
        self, connection: AsyncConnection, move: Move, worker: UUID, remembered: Sequence[Remembered] = ()
    ) -> None:
        moved = None
        for statement in (_MOVE_ROW, _MOVE):
            moved = (
                await connection.execute(
                    statement,
                    {
                        **_key(move.cursor),
                        **move.place._asdict(),
                        "add": _array(move.add),
                        "drop": _array(move.drop),
                        "row": move.cursor.row,
                        "stalled": self._stalled,
                        **self._kept(worker, remembered),
                    },
                )
            ).first()
            if moved is not None:
                move.cursor.row = moved.found
                return
            remembered = ()  # the first statement has kept it
        raise lost(move.cursor)

    def _kept(self, worker: UUID, remembered: Sequence[Remembered]) -> dict[str, Any]:
        kept = list(self._pages(worker, remembered))
        return {
            "worker": worker,
            "kept_names": [one["subscription"] for one in kept],
            "kept_generations": [one["generation"] for one in kept],
            "firsts": [one["first_position"] for one in kept],
            "lasts": [one["last_position"] for one in kept],
            "entries": [one["entries"] for one in kept],
        }

    async def done_now(self, connection: AsyncConnection, cursor: Cursor) -> set[int]:
        done = await connection.scalar(
            text(
                "SELECT done FROM whereupon_cursor "
                "WHERE subscription = :subscription AND generation = :generation AND lane = :lane"
            ),
            cursor.key._asdict(),
        )
        return set(done or ())

    # --- what became of events --------------------------------------------------------------------------------------

    async def passed(self, event_ids: Sequence[UUID]) -> list[Passed]:
        query = text(
            "SELECT l.event_id, l.type, l.position, l.keys, CAST(l.ran AS text) AS ran, l.version, l.payload, "
            "c.subscription, c.lane, s.lanes, s.ordered_by, "
            "pg_visible_in_snapshot(l.tx_id, c.snapshot) OR l.position = ANY(c.done) "
            "OR (c.target IS NOT NULL AND pg_visible_in_snapshot(l.tx_id, c.target) AND l.position <= c.page) AS past, "
            "l.recorded_at < s.created_at AS older "
            "FROM whereupon_log l CROSS JOIN whereupon_cursor c "
            "JOIN whereupon_subscription s ON s.name = c.subscription "
            "WHERE l.event_id = ANY(:ids) AND c.generation = 0 ORDER BY l.position, c.subscription, c.lane"
        ).bindparams(bindparam("ids", type_=ARRAY(Uuid())))
        async with self.reading() as connection:
            rows = await connection.execute(query, {"ids": list(event_ids)})
            return [Passed(**{**row._mapping, "ran": ran_in(row.ran)}) for row in rows]


def _names_statements(connection: Connection) -> bool:
    """Whether each statement is prepared under a name of its own, in a trip before the one that runs it.

    So SQLAlchemy advises for asyncpg behind a pooler in transaction mode. Outside a transaction these two trips may
    come to two servers.
    """
    adapter = connection.connection.dbapi_connection
    if getattr(adapter, "_prepared_statement_cache", True) is not None:
        return False
    name = getattr(adapter, "_prepared_statement_name_func", None)
    return name is None or name() != ""


def _age(snapshot: str) -> tuple[int, int]:
    """Orders snapshots of one server by when they were taken: transactions begin, and those in progress end."""
    _, xmax, in_progress = snapshot.split(":")
    return int(xmax), -len(in_progress.split(",")) if in_progress else 0


def _array(positions: Sequence[int]) -> str:
    """An array in PostgreSQL's text form, since arrays of arrays of different lengths can't be passed."""
    return f"{{{','.join(map(str, positions))}}}"


def _key(cursor: Cursor) -> dict[str, Any]:
    return {**cursor.key._asdict(), "token": cursor.token}


def _window(now_is_target: bool, all_types: bool) -> TextClause:
    """What a window holds, in no order; at most `limit` of it, so that a large one can be told from a small."""
    # CASE hides from the planner what it knows of types: whoever guesses that few rows are wanted reads all of the log
    wanted = "" if all_types else " AND CASE WHEN l.type = ANY(:types) THEN true END"
    if not now_is_target:
        wanted += f" AND pg_visible_in_snapshot(l.tx_id, {_snapshot('toward')})"
    target = _NOW if now_is_target else _snapshot("toward")
    query = text(
        f"SELECT s.now, s.epoch, r.* FROM (SELECT CAST({target} AS text) AS now, {_EPOCH} AS epoch) s "
        "LEFT JOIN LATERAL ("
        f"(SELECT {_COLUMNS} FROM whereupon_log l WHERE {_SINCE}{wanted} {_BY_ID} LIMIT :limit) UNION ALL "
        f"(SELECT {_COLUMNS} FROM whereupon_log l WHERE {_LATE}{wanted} {_BY_ID} LIMIT :limit) LIMIT :limit) r ON true"
    ).bindparams(bindparam("floor", type_=BigInteger()), *([_HOME] if now_is_target else []))
    return query if all_types else query.bindparams(bindparam("types", type_=ARRAY(Text())))


def _page(all_types: bool) -> TextClause:
    """The next of a paged window. Its conditions but for the position fit no index: it is the primary key's to read.

    CASE hides them from the planner: whoever guesses that few rows fulfil them sorts all that is left, for each page.
    """
    query = text(
        f"SELECT {_COLUMNS} FROM whereupon_log l WHERE l.position > :page AND l.position <= :end "
        f"AND CASE WHEN NOT pg_visible_in_snapshot(l.tx_id, {_snapshot('snapshot')}) "
        f"AND pg_visible_in_snapshot(l.tx_id, {_snapshot('target')})"
        f"{'' if all_types else ' AND l.type = ANY(:types)'} THEN true END ORDER BY l.position LIMIT :limit"
    ).bindparams(bindparam("page", type_=BigInteger()), bindparam("end", type_=BigInteger()))
    return query if all_types else query.bindparams(bindparam("types", type_=ARRAY(Text())))


_WINDOW: Final = {(now, every): _window(now, every) for now in (True, False) for every in (True, False)}
_PAGE: Final = {every: _page(every) for every in (True, False)}
# OFFSET 0: else the least position would be looked for from the beginning of the log on
_LAST: Final = text("SELECT last_value FROM whereupon_log_position")
_FIRST: Final = text(
    f"SELECT least((SELECT min(n.position) FROM (SELECT l.position FROM whereupon_log l WHERE {_SINCE} "
    f"AND pg_visible_in_snapshot(l.tx_id, {_snapshot('target')}) {_BY_ID} OFFSET 0) n), "
    f"(SELECT min(n.position) FROM (SELECT l.position FROM whereupon_log l WHERE {_LATE} {_BY_ID} OFFSET 0) n))"
).bindparams(bindparam("floor", type_=BigInteger()))

# The array of one costs as much again as the row.
_APPEND_ONE: Final = {
    positions: text(
        "INSERT INTO whereupon_log (tx_id, event_id, type, version, payload, headers, keys, ran) "
        f"VALUES ({_XACT_ID}, :event_id, :type, :version, :payload, :headers, :keys, CAST(:ran AS jsonb))"
        f"{' RETURNING position' if positions else ''}"
    ).bindparams(
        _HOME,
        bindparam("event_id", type_=Uuid()),
        bindparam("version", type_=Integer()),
        bindparam("payload", type_=LargeBinary()),
        *(bindparam(name, type_=Text()) for name in ("type", "headers", "keys", "ran")),
    )
    for positions in (False, True)
}

# One statement whatever their number; the transaction's id is worked out once, and before the first position is drawn.
_APPEND: Final = {
    positions: text(
        "INSERT INTO whereupon_log (tx_id, event_id, type, version, payload, headers, keys, ran) "
        f"SELECT (SELECT {_XACT_ID}), e.event_id, e.type, e.version, e.payload, e.headers, e.keys, "
        "CAST(e.ran AS jsonb) FROM unnest(:event_id, :type, :version, :payload, :headers, :keys, :ran) "
        f"AS e (event_id, type, version, payload, headers, keys, ran){' RETURNING position' if positions else ''}"
    ).bindparams(
        _HOME,
        bindparam("event_id", type_=ARRAY(Uuid())),
        bindparam("version", type_=ARRAY(Integer())),
        bindparam("payload", type_=ARRAY(LargeBinary())),
        *(bindparam(name, type_=ARRAY(Text())) for name in ("type", "headers", "keys", "ran")),
    )
    for positions in (False, True)
}

_CRASHED: Final = (
    "the server crashed since this was read, and hands out transaction ids again that had been rolled back by then: "
    "the lanes are taken anew, and read from where they are settled"
)
_BEGIN_EPOCH: Final = text("INSERT INTO whereupon_epoch DEFAULT VALUES ON CONFLICT DO NOTHING")

_CLAIM: Final = text(
    "UPDATE whereupon_cursor AS c SET owner = :owner, token = c.token + 1, "
    "crashes = CASE WHEN c.owner IS NULL OR c.owner = :owner THEN c.crashes "
    "WHEN EXISTS (SELECT 1 FROM whereupon_process p WHERE p.id = c.owner AND p.alone) THEN 0 "
    "ELSE least(c.crashes + 1, 10) END FROM ("
    "SELECT k.subscription, k.generation, k.lane FROM whereupon_cursor k "
    "JOIN unnest(:names, :generations, :lanes, :tokens) AS w (subscription, generation, lane, token) "
    "USING (subscription, generation, lane, token) "
    "WHERE k.owner IS NULL OR k.owner = :owner OR NOT EXISTS (SELECT 1 FROM whereupon_process p "
    "WHERE p.id = k.owner AND p.lease_until > statement_timestamp()) FOR UPDATE OF k SKIP LOCKED) AS free "
    "WHERE c.subscription = free.subscription AND c.generation = free.generation AND c.lane = free.lane "
    "RETURNING c.subscription, c.generation, c.lane, c.token, CAST(c.snapshot AS text), CAST(c.target AS text), "
    "c.page, c.done, c.crashes, CAST(c.ctid AS text) AS found, "
    f"{_EPOCH} AS epoch"
).bindparams(
    bindparam("owner", type_=Uuid()),
    bindparam("names", type_=ARRAY(Text())),
    bindparam("generations", type_=ARRAY(Integer())),
    bindparam("lanes", type_=ARRAY(Integer())),
    bindparam("tokens", type_=ARRAY(BigInteger())),
)

_PULSE: Final = text(
    f"SELECT CAST({_NOW} AS text) AS now, {_EPOCH} AS epoch, "
    f"(SELECT true FROM whereupon_log l WHERE {_SINCE} {_BY_ID} LIMIT 1) IS NOT NULL "  # EXISTS would lose the order
    f"OR (SELECT true FROM whereupon_log l WHERE {_LATE} {_BY_ID} LIMIT 1) IS NOT NULL AS grown, "
    "(SELECT CAST(json_agg(DISTINCT jsonb_build_array(x.subscription, x.generation, x.lane)) AS text) "
    "FROM whereupon_exception x WHERE x.next_at <= statement_timestamp()) AS due, "
    "EXISTS (SELECT 1 FROM whereupon_cursor c JOIN whereupon_subscription s ON s.name = c.subscription "
    "LEFT JOIN whereupon_process p ON p.id = c.owner AND p.lease_until > statement_timestamp() "
    "WHERE c.subscription = ANY(:names) AND CASE WHEN s.paused THEN c.owner = :owner ELSE p.id IS NULL END) "
    "AS restless, (SELECT string_agg(CAST(p.id AS text) || p.serves, ' ' ORDER BY p.id) FROM whereupon_process p "
    "WHERE p.in_flight > 0 AND p.lease_until > statement_timestamp()) AS workers"
).bindparams(
    _HOME,
    bindparam("owner", type_=Uuid()),
    bindparam("names", type_=ARRAY(Text())),
    bindparam("floor", type_=BigInteger()),
)

_DONE = (
    "CASE WHEN {add} = '{{}}' AND {drop} = '{{}}' THEN c.done ELSE ARRAY("
    "SELECT unnest(c.done || CAST({add} AS bigint[])) EXCEPT SELECT unnest(CAST({drop} AS bigint[]))) END"
)

_KEPT = (
    "kept AS (INSERT INTO whereupon_history "
    "(subscription, generation, worker, first_position, last_position, entries) "
    "SELECT h.name, h.generation, :worker, h.first, h.last, h.entries "
    "FROM unnest(:kept_names, :kept_generations, :firsts, :lasts, :entries) "
    "AS h (name, generation, first, last, entries))"
)
_KEPT_TYPES: Final[tuple[BindParameter[Any], ...]] = (
    bindparam("worker", type_=Uuid()),
    *(bindparam(name, type_=ARRAY(Text())) for name in ("kept_names", "entries")),
    bindparam("kept_generations", type_=ARRAY(Integer())),
    *(bindparam(name, type_=ARRAY(BigInteger())) for name in ("firsts", "lasts")),
)


# A row's versions are all there as long as somebody holds a snapshot, and whoever looks for it by its key looks at each
# of them: so a worker that moves its cursors hundreds of times a second is told where the last version is, and finds it
# there (ctid) unless somebody else has changed the row since. LIMIT, for the planner's guess: of an array it can't see
# it assumes so many rows that it would rather read the whole table.
_TEXTS: Final = ("names", "snapshots", "targets", "adds", "drops", "rows", "epochs")


def _settle(by_row: bool) -> TextClause:
    return text(
        "WITH moved AS (UPDATE whereupon_cursor AS c SET snapshot = CAST(v.snapshot AS pg_snapshot), "
        "target = CAST(v.target AS pg_snapshot), page = v.page, "
        f"done = {_DONE.format(add='v.add', drop='v.drop')} "
        "FROM (SELECT * FROM unnest(:names, :generations, :lanes, :tokens, :snapshots, :targets, :pages, :adds, "
        ":drops, :rows, :epochs) AS u "
        "(subscription, generation, lane, token, snapshot, target, page, add, drop, found, epoch) "
        "LIMIT :count) AS v "
        f"WHERE {'c.ctid = CAST(v.found AS tid) AND ' if by_row else ''}"
        "c.subscription = v.subscription AND c.generation = v.generation AND c.lane = v.lane AND c.token = v.token "
        f"AND (v.epoch IS NULL OR v.epoch = {_EPOCH}) "
        "RETURNING c.subscription, c.generation, c.lane, CAST(c.ctid AS text) AS found), "
        f"{_KEPT} SELECT subscription, generation, lane, found FROM moved"
    ).bindparams(
        *_KEPT_TYPES,
        *(bindparam(name, type_=ARRAY(Text())) for name in _TEXTS),
        *(bindparam(name, type_=ARRAY(Integer())) for name in ("generations", "lanes")),
        *(bindparam(name, type_=ARRAY(BigInteger())) for name in ("tokens", "pages")),
        bindparam("count", type_=BigInteger()),
    )


def _move(by_row: bool) -> TextClause:
    return text(
        "WITH moved AS (UPDATE whereupon_cursor AS c SET snapshot = CAST(CAST(:snapshot AS text) AS pg_snapshot), "
        "target = CAST(CAST(:target AS text) AS pg_snapshot), page = :page, "
        f"done = {_DONE.format(add='CAST(:add AS text)', drop='CAST(:drop AS text)')} "
        f"WHERE {'ctid = CAST(CAST(:row AS text) AS tid) AND ' if by_row else ''}{_KEY} "
        f"AND (CAST(:epoch AS text) IS NULL OR CAST(:epoch AS text) = {_EPOCH}) "
        f"RETURNING CAST(ctid AS text) AS found), {_KEPT} SELECT found, {_STALLED} FROM moved"
    ).bindparams(*_KEPT_TYPES)


_SETTLE_ROWS, _SETTLE = _settle(True), _settle(False)
_MOVE_ROW, _MOVE = _move(True), _move(False)
