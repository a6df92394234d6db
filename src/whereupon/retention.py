"""How long the log is kept: pruning by age, and on PostgreSQL the partitions that make it cheap.

Nothing goes that a cursor has not passed, whoever it belongs to: a row of the log is kept until every lane of every
generation of every subscription is done with it. Exceptions hold a copy of their event, so a dead letter keeps nothing
in the log. The audit trail is never pruned.

On PostgreSQL a partition goes as a whole. Positions are handed out before commit, so one that looks finished may still
get a row: it is dropped under a lock that nobody who has written into it can be beside, once it was seen that nothing
was added since it was judged. Whoever draws a position before that and writes after it ends in the default partition.
Publishing waits for that lock for LOCK_MS at most; then it is tried again, a little later. What can't go as a whole
goes row by row, in batches: of the default partition, of one that is partly younger, or that a cursor stands in.
"""

from __future__ import annotations

import asyncio
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final, NamedTuple, Protocol, TypeGuard

import msgspec
from sqlalchemy import Column, DateTime, bindparam, delete, func, select, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon._postgres import PostgresStore
from whereupon.cluster import place
from whereupon.logs import message_of
from whereupon.pace import Pace
from whereupon.schema import cursor as cursor_table
from whereupon.schema import history, log, meta, process, workflow
from whereupon.schema import subscription as subscription_table
from whereupon.store import Store

SIZE: Final = 1_000_000
"""Positions in one partition of PostgreSQL's log."""
AHEAD: Final = 2
"""Whole partitions that are made ahead of the sequence."""
BATCH: Final = 5_000
"""Rows deleted in one transaction."""
HISTORY: Final = timedelta(days=7)
"""How long the history of calls and the attempts that are closed are kept."""
PATIENCE: Final = timedelta(days=1)
"""For how long workers leave old rows of a partition to be dropped with it, before they delete them one by one."""
MINUTE: Final = 60.0
"""Seconds between two looks of a worker at the partitions."""
HOUR: Final = 3600.0
"""Seconds between two prunings by workers, by all of them together."""
LOCK_MS: Final = 100
"""Milliseconds for which the lock of the log is waited for, and publishers behind that, before it is tried again."""
TRIES: Final = 10
BREATH: Final = 0.02
"""Seconds between two batches, for others to have SQLite's write lock."""

FINE: Final = 10
"""How many of the latest marks are kept; of those before, one for each partition."""
MARKS: Final = 1000
"""How many marks are kept in all."""

_BUSY: Final = ("55P03", "57014", "40P01")
"""SQLSTATEs of a lock that was not to be had in time: timeout, cancelled, deadlock."""
_OVERLAP: Final = "23514"
"""SQLSTATE where the default partition holds rows of the range that was to be attached."""


@dataclass(frozen=True)
class Holder:
    """A lane that has not passed events which are old enough to go."""

    subscription: str
    generation: int
    lane: int
    since: datetime
    """When the oldest of them that was looked at was recorded."""
    why: str
    """paused, unserved (no living worker has the lane) or behind."""

    def __str__(self) -> str:
        generation = f", generation {self.generation}" if self.generation else ""
        return f"{self.subscription} (lane {self.lane}{generation}: {self.why}, since {self.since:%Y-%m-%d %H:%M} UTC)"


@dataclass(frozen=True)
class Dropped:
    """A partition that went as a whole."""

    name: str
    first: int
    """The least position that belongs into it."""
    last: int


@dataclass(frozen=True)
class Kept:
    """Where events stay though they are old enough to go, or some of them are."""

    where: str
    why: str
    """held (by a cursor), young (a part of it is) or busy (a transaction held the log whenever it was tried)."""
    holders: list[Holder] = field(default_factory=list)


@dataclass
class Pruned:
    """What `prune` did; with `dry_run` what it would have done."""

    before: datetime
    """Events recorded before that were old enough."""
    dry_run: bool
    dropped: list[Dropped] = field(default_factory=list)
    deleted: int = 0
    """Events that went row by row."""
    history: int = 0
    """Rows of the history of calls that went."""
    attempts: int = 0
    """Closed attempts of workflows that went."""
    kept: list[Kept] = field(default_factory=list)

    @property
    def holders(self) -> list[Holder]:
        """The lanes that hold something back, each once."""
        found: dict[tuple[str, int, int], Holder] = {}
        for kept in self.kept:
            for holder in kept.holders:
                key = (holder.subscription, holder.generation, holder.lane)
                if key not in found or holder.since < found[key].since:
                    found[key] = holder
        return [found[key] for key in sorted(found)]


Progress = Callable[[str], None]


async def prune(
    store: Store,
    older_than: timedelta,
    *,
    patience: timedelta = timedelta(0),
    dry_run: bool = False,
    rate: float | None = None,
    on_progress: Progress = lambda line: None,
) -> Pruned:
    """Delete events that were recorded longer ago than that and that every cursor has passed; tell what stays and why.

    A partition of PostgreSQL that is partly younger loses its old events row by row, but only those that have outlived
    the age by `patience` more. What goes row by row goes `rate` a second, at most. Raises `ValueError` for a negative
    age, and what the database raises.
    """
    check_age(older_than)
    now = await _now(store)
    pace = Pace("prune", None if dry_run else rate, BATCH)
    report = Pruned(now - older_than, dry_run)
    pruning = _prune_postgres if _on_postgres(store) else _prune_sqlite
    await pruning(store, report, patience, pace, on_progress)
    report.history, report.attempts = await _forget(store, now - HISTORY, dry_run, pace, report.deleted)
    return report


def check_age(age: timedelta) -> None:
    """Raises `ValueError` for one that lies in the future, or before all time."""
    if age < timedelta(0):
        raise ValueError(f"prune(older_than={age}): an age is not negative")
    try:
        _ = datetime.now(UTC) - timedelta(days=1) - age
    except OverflowError:
        raise ValueError(f"prune(older_than={age}): longer than anything was kept") from None


def _on_postgres(store: Store) -> TypeGuard[PostgresStore]:
    return isinstance(store, PostgresStore)


async def _now(store: Store) -> datetime:
    """The time by the database's clock."""
    if not _on_postgres(store):
        return datetime.now(UTC)
    async with store.reading() as connection:
        found: datetime = (await connection.execute(select(func.clock_timestamp()))).scalar_one()
        return found


async def _forget(store: Store, before: datetime, dry_run: bool, pace: Pace, done: int) -> tuple[int, int]:
    """Delete what is only looked back at: calls and closed attempts that ended before; how many these were."""
    calls = await _delete_before(store, history.c.id, history.c.recorded_at, before, dry_run, pace, done)
    done += calls
    return calls, await _delete_before(store, workflow.c.id, workflow.c.closed_at, before, dry_run, pace, done)


async def _delete_before(
    store: Store, key: Column[Any], at: Column[Any], before: datetime, dry_run: bool, pace: Pace, done: int
) -> int:
    if dry_run:
        async with store.reading() as connection:
            return int(await connection.scalar(select(func.count()).where(at < before)) or 0)
    gone = 0
    while True:
        await pace.keep(done + gone)
        async with store.writing() as connection:
            batch = select(key).where(at < before).order_by(at).limit(pace.at_once)
            found = await connection.execute(delete(key.table).where(key.in_(batch)))
        gone += found.rowcount
        if found.rowcount < pace.at_once:
            return gone
        await asyncio.sleep(BREATH)


# --- SQLite -----------------------------------------------------------------------------------------------------------


async def _prune_sqlite(store: Store, report: Pruned, patience: timedelta, pace: Pace, on_progress: Progress) -> None:
    """Writers take turns here, so what every cursor has passed is what no page of theirs has still before it."""
    async with store.reading() as connection:
        # positions follow time: nothing beyond the first that is young is looked at
        young = await connection.scalar(select(func.min(log.c.position)).where(log.c.recorded_at >= report.before))
    mark = select(func.coalesce(func.min(cursor_table.c.page), _ENDLESS)).scalar_subquery()
    old = (log.c.position <= mark) & (log.c.position < (_ENDLESS if young is None else young))
    if report.dry_run:
        async with store.reading() as connection:
            report.deleted = int(await connection.scalar(select(func.count()).select_from(log).where(old)) or 0)
            report.kept = await _held_on_sqlite(connection, report)
        return
    while True:
        await pace.keep(report.deleted)
        async with store.writing() as connection:
            await store.exclusively(connection, "retention")
            batch = select(log.c.position).where(old).order_by(log.c.position).limit(pace.at_once)
            gone = (await connection.execute(delete(log).where(log.c.position.in_(batch)))).rowcount
        report.deleted += gone
        if gone < pace.at_once:
            break
        on_progress(f"{report.deleted} events deleted")
        await asyncio.sleep(BREATH)
    async with store.reading() as connection:
        report.kept = await _held_on_sqlite(connection, report)
        if not report.deleted or await connection.scalar(text("PRAGMA auto_vacuum")) != 2:
            return  # the file keeps its size, and what comes next has the room
        free = int(await connection.scalar(text("PRAGMA freelist_count")) or 0)
    async with store.reading() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        for _ in range(0, free, BATCH):
            await driver.executescript(f"PRAGMA incremental_vacuum({BATCH})")  # `execute` would free a single page
            await asyncio.sleep(BREATH)


_ENDLESS: Final = 2**62


async def _held_on_sqlite(connection: AsyncConnection, report: Pruned) -> list[Kept]:
    oldest = (
        select(func.min(log.c.position))
        .where(log.c.position > cursor_table.c.page, log.c.recorded_at < report.before)
        .scalar_subquery()
    )
    alive = (process.c.id == cursor_table.c.owner) & (process.c.lease_until > datetime.now(UTC))
    held = (
        select(
            cursor_table.c.subscription,
            cursor_table.c.generation,
            cursor_table.c.lane,
            subscription_table.c.paused,
            process.c.id.is_not(None).label("served"),
            oldest.label("position"),
        )
        .select_from(cursor_table)
        .outerjoin(subscription_table, subscription_table.c.name == cursor_table.c.subscription)
        .outerjoin(process, alive)
        .subquery()
    )
    rows = await connection.execute(
        select(held, log.c.recorded_at).join(log, log.c.position == held.c.position).order_by(*list(held.c)[:3])
    )
    holders = [_holder(row, row.recorded_at) for row in rows]
    return [Kept("whereupon_log", "held", holders)] if holders else []


def _holder(row: Any, since: datetime) -> Holder:
    why = "paused" if row.paused else "behind" if row.served else "unserved"
    return Holder(row.subscription, row.generation, row.lane, since, why)


# --- PostgreSQL -------------------------------------------------------------------------------------------------------


class Partition(NamedTuple):
    name: str
    """Quoted, with its schema."""
    first: int
    end: int
    """The first position that does not belong into it."""
    default: bool = False


class _Busy(Exception):
    """A transaction is in the way; later it may not be."""


async def _prune_postgres(store: Store, report: Pruned, patience: timedelta, pace: Pace, on_progress: Progress) -> None:
    if not report.dry_run:
        await make_partitions(store)
    async with store.reading() as connection:
        partitions = await partitions_of(connection)
        last = await _last_position(connection)
    for partition in partitions:
        if partition.end <= last and await _drop(store, partition, report, on_progress):
            continue
        own_patience = timedelta(0) if partition.default else patience
        await _delete_rows(store, partition, report, own_patience, pace, on_progress)


async def partitions_of(connection: AsyncConnection) -> list[Partition]:
    """The log's partitions from the oldest on, the default one last."""
    rows = await connection.execute(
        text(
            "SELECT format('%I.%I', n.nspname, c.relname) AS name, pg_get_expr(c.relpartbound, c.oid) AS bounds "
            "FROM pg_inherits i JOIN pg_class c ON c.oid = i.inhrelid JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE i.inhparent = CAST('whereupon_log' AS regclass)"
        )
    )
    found = []
    for name, bounds in rows:
        numbers = re.findall(r"-?\d+", bounds)
        if len(numbers) == 2:
            found.append(Partition(name, int(numbers[0]), int(numbers[1])))
        else:
            found.append(Partition(name, _ENDLESS, _ENDLESS, default=True))
    return sorted(found, key=lambda partition: partition.first)


async def _last_position(connection: AsyncConnection) -> int:
    """The greatest position that was handed out, committed or not."""
    row = (await connection.execute(text("SELECT last_value, is_called FROM whereupon_log_position"))).one()
    return int(row.last_value) if row.is_called else int(row.last_value) - 1


# What a cursor has not passed of `l`: what its snapshot does not see, but for the handled part of the window it is in.
# Whatever places cursors may come to have, this is where pruning learns of them.
_AHEAD_IN_WINDOW: Final = (
    "NOT (c.target IS NOT NULL AND l.position <= c.page AND pg_visible_in_snapshot(l.tx_id, c.target))"
)
_UNPASSED: Final = f"NOT pg_visible_in_snapshot(l.tx_id, c.snapshot) AND {_AHEAD_IN_WINDOW}"


def _holders(partition: str) -> Any:
    """The cursors that have not passed some old event of a partition, found by the index of what snapshots see."""
    wanted = f"l.recorded_at < :before AND {_AHEAD_IN_WINDOW} ORDER BY l.tx_id, l.position LIMIT 1"
    return text(
        "SELECT c.subscription, c.generation, c.lane, s.paused, p.id IS NOT NULL AS served, h.since "
        "FROM whereupon_cursor c LEFT JOIN whereupon_subscription s ON s.name = c.subscription "
        "LEFT JOIN whereupon_process p ON p.id = c.owner AND p.lease_until > clock_timestamp() "
        "CROSS JOIN LATERAL (SELECT least("
        f"(SELECT l.recorded_at FROM {partition} l WHERE l.tx_id >= pg_snapshot_xmax(c.snapshot) AND {wanted}), "
        "(SELECT min(x.recorded_at) FROM (SELECT pg_snapshot_xip(c.snapshot) AS tx_id) AS late CROSS JOIN LATERAL "
        f"(SELECT l.recorded_at FROM {partition} l WHERE l.tx_id = late.tx_id AND {wanted}) AS x)) AS since) AS h "
        "WHERE h.since IS NOT NULL ORDER BY c.subscription, c.generation, c.lane"
    ).bindparams(bindparam("before", type_=DateTime(timezone=True)))


async def _held_by(connection: AsyncConnection, partition: Partition, before: datetime) -> list[Holder]:
    rows = await connection.execute(_holders(partition.name), {"before": before})
    return [_holder(row, row.since) for row in rows]


async def _drop(store: Store, partition: Partition, report: Pruned, on_progress: Progress) -> bool:
    """Drop a partition that the sequence has passed, or say that it is busy; False if its rows must be looked at."""
    for number in range(TRIES):
        try:
            return await _try_to_drop(store, partition, report, on_progress)
        except _Busy:
            await asyncio.sleep(random.uniform(0.5, 1) * min(1.0, 0.1 * 2**number))
    report.kept.append(Kept(partition.name, "busy"))
    return True


async def _try_to_drop(store: Store, partition: Partition, report: Pruned, on_progress: Progress) -> bool:
    name = partition.name
    async with _patient(store) as connection:
        await store.exclusively(connection, "retention")
        judged = await connection.scalar(text("SELECT CAST(whereupon_snapshot() AS text)"))
        # its end first, which an index tells: most partitions are younger, and few are read as a whole
        if await _is_young(connection, f"SELECT recorded_at FROM {name} ORDER BY position DESC LIMIT 1", report):
            return False
        if await _held_by(connection, partition, report.before):
            return False
        if await _is_young(connection, f"SELECT max(recorded_at) FROM {name}", report):
            return False
        if not report.dry_run:
            await _lock_timeout(connection)
            # the log first, then the partition, as DROP itself does, and as publishers do
            await connection.execute(text("LOCK TABLE ONLY whereupon_log IN ACCESS EXCLUSIVE MODE"))
            await connection.execute(text(f"LOCK TABLE {name} IN ACCESS EXCLUSIVE MODE"))
            # whoever has written into it has ended, and nobody begins: what came since is all that could have come
            came = await connection.scalar(
                text(
                    "WITH judged AS MATERIALIZED (SELECT CAST(CAST(:judged AS text) AS pg_snapshot) AS snapshot) "
                    f"SELECT (SELECT l.position FROM {name} l WHERE l.tx_id >= (SELECT pg_snapshot_xmax(snapshot) "
                    "FROM judged) ORDER BY l.tx_id, l.position LIMIT 1) IS NOT NULL OR (SELECT of_it.position "
                    "FROM (SELECT pg_snapshot_xip(snapshot) AS tx_id FROM judged) AS late CROSS JOIN LATERAL "
                    f"(SELECT l.position FROM {name} l WHERE l.tx_id = late.tx_id ORDER BY l.tx_id, l.position "
                    "LIMIT 1) AS of_it LIMIT 1) IS NOT NULL"
                ),
                {"judged": judged},
            )
            if came:
                raise _Busy
            await connection.execute(text(f"DROP TABLE {name}"))
    report.dropped.append(Dropped(name, partition.first, partition.end - 1))
    on_progress(f"{name} dropped")
    return True


async def _is_young(connection: AsyncConnection, youngest: str, report: Pruned) -> bool:
    recorded_at = await connection.scalar(text(youngest))
    return recorded_at is not None and recorded_at >= report.before


@asynccontextmanager
async def _patient(store: Store) -> AsyncIterator[AsyncConnection]:
    """A transaction that raises `_Busy` where a lock is not to be had in time."""
    try:
        async with store.writing() as connection:
            yield connection
    except DBAPIError as error:
        if _state(error) in _BUSY:
            raise _Busy from error
        raise


async def _lock_timeout(connection: AsyncConnection) -> None:
    await connection.execute(
        text("SELECT set_config('lock_timeout', :limit, true), set_config('statement_timeout', '5s', true)"),
        {"limit": f"{LOCK_MS}ms"},
    )


def _state(error: DBAPIError) -> str | None:
    state: str | None = getattr(error.orig, "sqlstate", None)
    return state


async def _delete_rows(
    store: Store, partition: Partition, report: Pruned, patience: timedelta, pace: Pace, on_progress: Progress
) -> None:
    """Delete what is old and passed by all, in the order of positions, as far as there is any in a batch."""
    before = report.before - patience
    async with store.reading() as connection:
        first = await connection.scalar(text(f"SELECT recorded_at FROM {partition.name} ORDER BY position LIMIT 1"))
    if first is None or first >= report.before:
        return
    deleted = after = 0
    while first < before:
        await pace.keep(report.deleted + deleted)
        async with store.writing() as connection:
            await store.exclusively(connection, "retention")
            values = {"before": before, "after": after, "limit": BATCH, "most": pace.at_once}
            row = (await connection.execute(_batch(partition.name, report.dry_run), values)).one()
        deleted += row.gone
        if row.gone < pace.at_once and (not row.gone or row.seen < BATCH):
            break  # behind a batch in which nothing may go little will
        after = row.last if row.gone < pace.at_once else row.last_gone
        on_progress(f"{deleted} events of {partition.name} deleted")
        await asyncio.sleep(BREATH)
    report.deleted += deleted
    async with store.reading() as connection:
        holders = await _held_by(connection, partition, report.before)
        left = await connection.scalar(text(f"SELECT recorded_at FROM {partition.name} ORDER BY position LIMIT 1"))
    if holders:
        report.kept.append(Kept(partition.name, "held", holders))
    elif left is not None and left < report.before and not report.dry_run:
        report.kept.append(Kept(partition.name, "young"))


def _batch(partition: str, dry_run: bool) -> Any:
    chosen = (
        f"SELECT l.position FROM batch l WHERE l.recorded_at < :before AND NOT EXISTS (SELECT 1 FROM place c "
        f"WHERE {_UNPASSED}) ORDER BY l.position LIMIT :most"
    )
    gone = chosen if dry_run else f"DELETE FROM {partition} WHERE position IN ({chosen}) RETURNING position"
    return text(
        # lanes of a subscription mostly stand at one place: each is asked once
        "WITH place AS MATERIALIZED (SELECT CAST(d.snapshot AS pg_snapshot) AS snapshot, CAST(d.target AS pg_snapshot) "
        "AS target, d.page FROM (SELECT DISTINCT CAST(snapshot AS text) AS snapshot, CAST(target AS text) AS target, "
        "page FROM whereupon_cursor) AS d), "
        f"batch AS MATERIALIZED (SELECT position, tx_id, recorded_at FROM {partition} WHERE position > :after "
        f"ORDER BY position LIMIT :limit), gone AS ({gone}) "
        "SELECT (SELECT count(*) FROM batch) AS seen, (SELECT max(position) FROM batch) AS last, "
        "(SELECT count(*) FROM gone) AS gone, (SELECT max(position) FROM gone) AS last_gone"
    ).bindparams(bindparam("before", type_=DateTime(timezone=True)))


# --- partitions, ahead of the sequence --------------------------------------------------------------------------------


async def mark(store: PostgresStore) -> None:
    """Note how far the log has come, and which transactions may still write up to there.

    Whoever draws a position has its transaction's id by then (the log's columns are in that order): once a position was
    handed out, the next transaction to begin has a higher id than any that writes up to there. Reads by a snapshot that
    sees all lower ones leave the partitions below alone.
    """
    async with store.writing() as connection:
        if not await store.exclusively(connection, "marks", wait=False):
            return
        position = await _last_position(connection)
        known = await connection.scalar(select(meta.c.value).where(meta.c.key == "marks"))
        marks = [] if known is None else msgspec.json.decode(known, type=list[tuple[int, int]])
        if position <= max((mark[0] for mark in marks), default=0):
            return
        tx_id = await connection.scalar(text("SELECT CAST(whereupon_xact_id() AS text)"))
        kept: dict[int, tuple[int, int]] = {}
        for one in marks[:-FINE]:
            kept[one[0] // SIZE] = one  # the last of each partition
        marks = [*kept.values(), *marks[-FINE:], (position, int(tx_id))][-MARKS:]
        value = msgspec.json.encode(marks).decode()
        await connection.execute(
            store.upsert(meta)
            .values(key="marks", value=value)
            .on_conflict_do_update(index_elements=["key"], set_={"value": value})
        )


async def make_partitions(store: Store, *, size: int | None = None) -> list[str]:
    """Make the partitions that the sequence will come to soon; return their names. Publishing waits for none of it.

    Raises what the database raises, as where its user may not create tables: then events go into the default partition.
    """
    size = SIZE if size is None else size
    made: list[str] = []
    first = least = 0
    for _ in range(TRIES):
        try:
            async with _patient(store) as connection:
                if not await store.exclusively(connection, "partitions", wait=False):
                    return made
                last = await _last_position(connection)
                end = max((p.end for p in await partitions_of(connection) if not p.default), default=0)
                if end > last + AHEAD * size:
                    return made
                # what was handed out without a partition is in the default one: begin beyond that
                first = max(least, end if end > last else -(-last // size) * size + 1)
                name = await _attach(connection, first, size)
            made.append(name)
        except _Busy:
            await asyncio.sleep(random.uniform(0.1, 0.3))
        except DBAPIError as error:
            if _state(error) != _OVERLAP:
                raise
            least = first + size
    return made


async def _attach(connection: AsyncConnection, first: int, size: int) -> str:
    # Made apart and then attached, which locks the log for other DDL only; the default partition is locked while it is
    # searched for rows of the range, which is short as long as it is all but empty.
    await _lock_timeout(connection)
    schema = await connection.scalar(
        text(
            "SELECT format('%I', n.nspname) FROM pg_class c JOIN pg_namespace n ON n.oid = c.relnamespace "
            "WHERE c.oid = CAST('whereupon_log' AS regclass)"
        )
    )
    name = f"{schema}.whereupon_log_{first}"
    await connection.execute(
        text(f"CREATE TABLE {name} (LIKE whereupon_log INCLUDING ALL EXCLUDING INDEXES EXCLUDING STATISTICS)")
    )
    await connection.execute(
        text(f"ALTER TABLE whereupon_log ATTACH PARTITION {name} FOR VALUES FROM ({first}) TO ({first + size})")
    )
    return name


# --- what workers do by themselves ------------------------------------------------------------------------------------


class _Log(Protocol):
    def __call__(self, level: str, name: str, **details: Any) -> None: ...


class Upkeep:
    """What a worker does for the tables beside delivering: partitions ahead, and pruning, of the log if told to."""

    def __init__(self, store: Store, *, retain: timedelta | None, log: _Log) -> None:
        self._store = store
        self._retain = retain
        self._log = log
        self._prune_at = time.monotonic() + random.uniform(0, 60)
        self._said: set[str] = set()

    async def turn(self) -> None:
        """Do what is due; to be called about once a minute. What the database refuses is logged, and no more."""
        if _on_postgres(self._store):
            await self._try("log_marks_not_kept", partial(self._mark, self._store))
            await self._try("log_partitions_not_made", self._make_partitions)
            await self._try("log_events_not_placed", self._place)
        if time.monotonic() >= self._prune_at:
            self._prune_at = time.monotonic() + random.uniform(0.9, 1.1) * HOUR
            await self._try("log_not_pruned", self._prune)

    async def _try(self, name: str, what: Callable[[], Awaitable[None]]) -> None:
        try:
            await what()
        except self._store.errors as error:
            if name not in self._said:
                self._said.add(name)
                self._log(
                    "warning",
                    name,
                    database=self._store.shown_url,
                    error_type=type(error).__name__,
                    error_message=message_of(getattr(error, "orig", None) or error)
                    + ". Nothing is lost by that, and it is tried again; `whereupon db prune` does it, too, run by the "
                    "user who owns the tables",
                )
        else:
            self._said.discard(name)

    @staticmethod
    async def _mark(store: PostgresStore) -> None:
        await mark(store)
        async with store.reading() as connection:
            await store.load_marks(connection)

    async def _make_partitions(self) -> None:
        await make_partitions(self._store)

    async def _place(self) -> None:
        """What a publisher wrote after a rebase, in a transaction that has seen the database as it was before."""
        async with self._store.writing() as connection:
            await place(connection)

    async def _prune(self) -> None:
        if not await self._my_turn():
            return
        if self._retain is None:
            await _forget(self._store, await _now(self._store) - HISTORY, False, Pace("prune", None, BATCH), 0)
            return
        report = await prune(self._store, self._retain, patience=PATIENCE)
        self._log(
            "info",
            "log_pruned",
            dropped=[dropped.name for dropped in report.dropped],
            deleted=report.deleted,
            held_by=[str(holder) for holder in report.holders],
        )

    async def _my_turn(self) -> bool:
        """Whether no worker has pruned in the last hour; then it is this one's turn."""
        now = await _now(self._store)
        async with self._store.writing() as connection:
            await self._store.exclusively(connection, "pruning")
            last = await connection.scalar(select(meta.c.value).where(meta.c.key == "pruned_at"))
            if last is not None and now < datetime.fromisoformat(last) + timedelta(seconds=HOUR / 2):
                return False
            await connection.execute(
                self._store.upsert(meta)
                .values(key="pruned_at", value=now.isoformat())
                .on_conflict_do_update(index_elements=["key"], set_={"value": now.isoformat()})
            )
            return True
