"""How much happens: events and calls by the minute, what waits, what is dead. Kept in memory, read a little at a time.

Nothing is counted that grows with the database. How many events a minute had is told by positions: the first position
of each minute is found by bisection, and their differences are the counts. (On PostgreSQL a rolled back transaction
leaves a gap in the positions, which is counted too.) Calls are counted as the history of calls grows; of what is there
already only the newest part is read, and `since` says from when on the counts are whole.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final

from sqlalchemy import ARRAY, BigInteger, Integer, Text, bindparam, func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.causes import DeadGroup
from whereupon.lag import Lag
from whereupon.lookback import ENDS, Lookback, Served
from whereupon.schema import UTCDateTime, history, log, process
from whereupon.store import Store

MINUTES: Final = 60
"""For so many minutes there is a count each."""
FRESH: Final = 2.0
"""Seconds for which a reading is good enough for everybody."""
STALE: Final = 30.0
"""Seconds from which on a reading is worth waiting for a newer one."""
PATIENCE: Final = 0.15
"""Seconds that a page waits for a reading, where there is none or a stale one, before it comes without."""
NEWEST: Final = 10_000
"""Events of which is counted how many there are of each type."""
GROUPS: Final = 100
"""Groups of dead letters that are known."""
CHUNK: Final = 200
"""Rows of the history of calls that are read at once."""
CHARACTERS: Final = 4_000_000
"""Of the history that one reading reads; a row has one for each 45 or so calls in a thousand characters."""


@dataclass(slots=True)
class Calls:
    """Of one subscription's handler in one minute."""

    succeeded: int = 0
    failed: int = 0
    """Those that are tried again, or died."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    at: datetime
    """By the clock of this machine, as are the minutes."""
    published: Sequence[int]
    """Events in each of the last minutes; the last one is the minute that is under way."""
    calls: Mapping[str, Sequence[Calls]]
    """Of each subscription, for the same minutes."""
    since: datetime | None
    """From then on calls are counted; None where nothing was left out."""
    types: Mapping[str, int]
    """How many of the newest events there are of each type."""
    newest: int
    """How many those are together."""
    served: Sequence[Served]
    lags: Mapping[str, Lag]
    dead: Sequence[DeadGroup]
    workers: int
    """Workers whose lease has not run out."""

    def dead_of(self, subscription: str) -> int:
        return sum(group.number for group in self.dead if group.subscription == subscription)

    @property
    def more_dead(self) -> bool:
        """Whether there are more dead letters than were counted."""
        return len(self.dead) >= GROUPS or any(group.more for group in self.dead)

    @property
    def late(self) -> list[Lag]:
        return [lag for lag in self.lags.values() if lag.late and not lag.paused]

    @property
    def oldest(self) -> Lag | None:
        """Of those that are not paused, the one that waits longest."""
        waiting = [lag for lag in self.lags.values() if lag.oldest is not None and not lag.paused]
        return max(waiting, key=lambda lag: lag.age, default=None)


@dataclass(slots=True)
class _History:
    """What was read of the history of calls."""

    last: int | None = None
    since: datetime | None = None
    minutes: dict[str, dict[int, Calls]] = field(default_factory=dict)

    def add(self, subscription: str, minute: int, entries: str) -> None:
        succeeded = entries.count('"succeeded"]')
        calls = self.minutes.setdefault(subscription, {}).setdefault(minute, Calls())
        calls.succeeded += succeeded
        calls.failed += entries.count('"retrying"]') + entries.count('"dead"]')

    def forget_before(self, minute: int) -> None:
        for subscription, minutes in list(self.minutes.items()):
            for old in [one for one in minutes if one < minute]:
                del minutes[old]
            if not minutes:
                del self.minutes[subscription]


class Gauges:
    """Reads at most every two seconds, whoever asks, and only while somebody does."""

    def __init__(
        self,
        store: Store,
        lookback: Lookback,
        lags: Callable[[], Awaitable[list[Lag]]],
        groups: Callable[[], Awaitable[list[DeadGroup]]],
    ) -> None:
        self._store = store
        self._lookback = lookback
        self._lags = lags
        self._groups = groups
        self._reading: Reading | None = None
        self._read_at = 0.0
        self._task: asyncio.Task[None] | None = None
        self._failure: Exception | None = None
        self._marks: dict[int, int] = {}
        """The first position of each minute."""
        self._history = _History()

    async def read(self) -> Reading | None:
        """What is known, not older than half a minute; None if that takes longer than `PATIENCE` to find out.

        Raises what kept it from being found out, a `DatabaseError` as a rule.
        """
        if self._task is None or self._task.done():
            if (failure := self._failure) is not None:
                self._failure = None
                self._reading = None
                raise failure
            if self._age() > FRESH:
                self._task = asyncio.create_task(self._measure())
        if self._reading is None or self._age() > STALE:
            assert self._task is not None
            await asyncio.wait({self._task}, timeout=PATIENCE)
            if self._task.done() and (failure := self._failure) is not None:
                self._failure = None
                raise failure
        return None if self._age() > STALE else self._reading

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    def _age(self) -> float:
        return time.monotonic() - self._read_at if self._reading is not None else float("inf")

    async def _measure(self) -> None:
        try:
            self._reading = await self._measured()
            self._read_at = time.monotonic()
        except Exception as error:  # told to whoever asks next
            self._failure = error

    async def _measured(self) -> Reading:
        now = datetime.now(UTC)
        with self._store.reaching():
            async with self._store.reading() as connection:
                published = await self._published(connection, now)
                types = await self._types(connection)
                alive = select(func.count()).where(process.c.in_flight > 0, process.c.lease_until > self._store.now)
                workers = int(await connection.scalar(alive) or 0)
                await self._follow(connection, now)
        served = await self._lookback.served()
        lags = {lag.subscription: lag for lag in await self._lags()}
        dead = await self._groups()
        first = _minute(now) - MINUTES + 1
        self._history.forget_before(first)
        return Reading(
            at=now,
            published=published,
            calls={
                name: [minutes.get(first + number, Calls()) for number in range(MINUTES)]
                for name, minutes in self._history.minutes.items()
            },
            since=self._history.since if self._history.since and _minute(self._history.since) >= first else None,
            types=types,
            newest=sum(types.values()),
            served=served,
            lags=lags,
            dead=dead,
            workers=workers,
        )

    # --- events -----------------------------------------------------------------------------------------------------

    async def _published(self, connection: AsyncConnection, now: datetime) -> list[int]:
        first, last = (await connection.execute(ENDS)).one()
        if last is None:
            self._marks.clear()
            return [0] * MINUTES
        end = int(last) + 1
        this = _minute(now)
        minutes = range(this - MINUTES + 1, this + 1)
        self._marks = {minute: mark for minute, mark in self._marks.items() if minute in minutes}
        # what a transaction recorded before the minute and committed after it moves its mark: look at the last two anew
        for minute in (this, this - 1):
            self._marks.pop(minute, None)
        missing = [minute for minute in minutes if minute not in self._marks]
        low = max((mark for minute, mark in self._marks.items() if minute < missing[0]), default=int(first))
        moments = [_moment(minute) for minute in missing]
        for minute, mark in zip(missing, await self.first_of(connection, moments, low, end), strict=True):
            self._marks[minute] = mark
        marks = [*(self._marks[minute] for minute in minutes), end]
        return [max(0, after - before) for before, after in itertools.pairwise(marks)]

    async def first_of(self, connection: AsyncConnection, moments: Sequence[datetime], low: int, end: int) -> list[int]:
        """The first position, from `low` on, of what was recorded at each moment or later; `end` if nothing was."""
        lows, highs = [low] * len(moments), [end] * len(moments)
        dialect = self._store.engine.dialect.name
        while open_ := [n for n in range(len(moments)) if lows[n] < highs[n]]:
            middles = {n: (lows[n] + highs[n]) // 2 for n in open_}
            found = await connection.execute(
                _RECORDED[dialect], {"places": _array(dialect, sorted(set(middles.values())))}
            )
            recorded = {row.place: row.recorded_at for row in found}
            for n, middle in middles.items():
                at = recorded.get(middle)
                if at is None or at >= moments[n]:
                    highs[n] = middle
                else:
                    lows[n] = middle + 1
        return lows

    async def _types(self, connection: AsyncConnection) -> dict[str, int]:
        last = await connection.scalar(select(func.max(log.c.position)))
        if last is None:
            return {}
        newest = (
            select(log.c.type)
            .where(log.c.position > last - NEWEST)
            .order_by(log.c.position.desc())
            .limit(NEWEST)
            .subquery()
        )
        rows = await connection.execute(select(newest.c.type, func.count().label("number")).group_by(newest.c.type))
        return {row.type: row.number for row in rows}

    async def between(self, since: datetime | None, until: datetime | None) -> int:
        """How many positions of the log lie between two moments: as many events as were published, or a few more."""
        with self._store.reaching():
            async with self._store.reading() as connection:
                first, last = (await connection.execute(ENDS)).one()
                if last is None:
                    return 0
                moments = [moment for moment in (since, until) if moment is not None]
                marks = await self.first_of(connection, moments, int(first), int(last) + 1)
        begin = marks[0] if since is not None else int(first)
        end = marks[-1] if until is not None else int(last) + 1
        return max(0, end - begin)

    # --- calls ------------------------------------------------------------------------------------------------------

    async def _follow(self, connection: AsyncConnection, now: datetime) -> None:
        """Count the calls that were added to the history; of more than can be read at once, the newest."""
        seen = self._history
        last = int(await connection.scalar(select(func.max(history.c.id))) or 0)
        if seen.last is not None and last < seen.last:  # another database in the place of the first
            self._history = seen = _History()
        lowest = seen.last or 0
        oldest = _moment(_minute(now) - MINUTES + 1)
        before, left, reached = last + 1, CHARACTERS, seen.last is not None
        counted: list[Any] = []
        while before > lowest + 1 and left > 0:
            rows = (
                await connection.execute(
                    select(history.c.id, history.c.subscription, history.c.recorded_at, history.c.entries)
                    .where(history.c.id < before, history.c.id > lowest)
                    .order_by(history.c.id.desc())
                    .limit(CHUNK)
                )
            ).all()
            if not rows:
                break
            counted += [row for row in rows if row.recorded_at >= oldest]
            before = rows[-1].id
            left -= sum(len(row.entries) for row in rows)
            if rows[-1].recorded_at < oldest:
                before = lowest + 1  # the rest is older still
        whole = before <= lowest + 1 or left > 0
        if not whole:
            # a part is missing: what was counted before it would look like a lull
            seen.minutes.clear()
            seen.since = min(row.recorded_at for row in counted) if counted else now
        elif not reached:
            seen.since = None
        for row in counted:
            seen.add(row.subscription, _minute(row.recorded_at), row.entries)
        seen.last = last


def _minute(moment: datetime) -> int:
    return int(moment.timestamp()) // 60


def _moment(minute: int) -> datetime:
    return datetime.fromtimestamp(minute * 60, UTC)


def _array(dialect: str, places: Sequence[int]) -> Any:
    return list(places) if dialect == "postgresql" else f"[{','.join(map(str, places))}]"


_FIRST: Final = (
    "(SELECT l.recorded_at FROM whereupon_log l WHERE l.position >= {} ORDER BY l.position LIMIT 1) AS recorded_at"
)
_RECORDED: Final = {
    "postgresql": text(f"SELECT p.place, {_FIRST.format('p.place')} FROM unnest(CAST(:places AS bigint[])) AS p(place)")
    .bindparams(bindparam("places", type_=ARRAY(BigInteger())))
    .columns(place=BigInteger(), recorded_at=UTCDateTime()),
    "sqlite": text(f"SELECT p.value AS place, {_FIRST.format('p.value')} FROM json_each(:places) AS p")
    .bindparams(bindparam("places", type_=Text()))
    .columns(place=Integer(), recorded_at=UTCDateTime()),
}
"""When the first event was recorded that has one of these positions or a later one."""
