"""How far each subscription is behind: the oldest event it has not settled, and whether that breaks its promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import select, text

from whereupon.event import DomainEvent
from whereupon.registry import Registered, registered
from whereupon.schema import exception
from whereupon.store import OPEN, Cursor, Page, Passed, Row, Store, ran_in
from whereupon.subscription import Subscriptions

FIRST_LOOK: Final = 20
"""Events that are looked at first, since the first that a lane owes is among them as a rule."""
READ_AHEAD: Final = 500
"""Events that one lane's cursor is followed through for the first that it owes."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Owed:
    """An event that a subscription has not settled."""

    event_id: UUID
    event_type: str
    position: int
    recorded_at: datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class Lag:
    subscription: str
    paused: bool
    oldest: Owed | None
    """The oldest event that it has not settled: unread, running, or to be tried again. Dead letters don't count, nor
    replays."""
    age: float
    """Seconds since that was published, by the database's clock; 0 where nothing is owed."""
    within: float | None
    """Its promise, in seconds, where this build declares it with one."""

    @property
    def late(self) -> bool:
        """Whether its promise is broken."""
        return self.within is not None and self.age > self.within


class Lags:
    def __init__(
        self,
        store: Store,
        subscriptions: Subscriptions,
        class_of: Callable[[str], type[DomainEvent] | None],
        key_inside: Callable[[Passed], str | None],
    ) -> None:
        self._store = store
        self._subscriptions = subscriptions
        self._class_of = class_of
        self._key_inside = key_inside

    async def measure(self) -> list[Lag]:
        """Of every subscription that the database knows, by name.

        However large the log is, each lane looks at 500 events beyond its cursor at most; lanes that stand at one place
        and hear the same look once, and those that nothing lies before, as many as they are, take a few statements.
        """
        async with self._store.reading() as connection:
            known = {one.name: one for one in await registered(connection)}
            owed = {row.subscription: [_owed(row)] for row in await connection.execute(_RETRIED)}
            standing = await self._store.standing(connection, list(known)) if known else []
        look = _Look(self._store)
        for cursor in standing:
            if cursor.key.generation > 0:
                continue
            one = known[cursor.key.subscription]
            if (unread := await self._unread(cursor, one, look)) is not None:
                owed.setdefault(one.name, []).append(unread)
        async with self._store.reading() as connection:
            now: datetime = (await connection.execute(select(self._store.now_as_time))).scalar_one()
        promised = {declared.name: declared.within for declared in self._subscriptions}
        found = []
        for name, one in known.items():
            first = min(owed.get(name, ()), key=lambda event: (event.recorded_at, event.position), default=None)
            found.append(
                Lag(
                    subscription=name,
                    paused=one.paused,
                    oldest=first,
                    age=0.0 if first is None else max(0.0, (now - first.recorded_at).total_seconds()),
                    within=promised.get(name),
                )
            )
        return found

    async def _unread(self, cursor: Cursor, one: Registered, look: _Look) -> Owed | None:
        """The first event of a lane that it has not passed, and of which there is no exception."""
        if not await look.finds_any(cursor.place):
            return None
        types = one.stored_names(self._class_of)
        place, looked_at, most = cursor.place, 0, FIRST_LOOK
        while looked_at < READ_AHEAD:
            page = await look.read(place, types, most)
            if (owed := await self._first_owed(page.rows, cursor, one)) is not None:
                return owed
            if page.complete:
                return None
            looked_at += max(1, len(page.rows))
            place, most = page.after, READ_AHEAD - looked_at
        return None

    async def _first_owed(self, found: Sequence[Row], cursor: Cursor, one: Registered) -> Owed | None:
        own = [
            row
            for row in found
            if row.position not in cursor.done and one.name not in ran_in(row.ran) and self._is_in(cursor, one, row)
        ]
        if not own:
            return None
        async with self._store.reading() as connection:
            failed = await self._store.kept(connection, cursor, [row.position for row in own])
        for row in own:
            if row.position not in failed:
                return _owed(row)
        return None

    def _is_in(self, cursor: Cursor, one: Registered, row: Row) -> bool:
        seen = Passed(
            row.event_id, row.type, row.position, row.keys, [], row.version, row.payload, one.name,
            cursor.key.lane, one.lanes, one.ordered_by, False, False,
        )  # fmt: skip
        return seen.own_lane(self._key_inside) in (None, cursor.key.lane)


class _Look:
    """Reads of the log, each made once for all lanes that stand at one place."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._pages: dict[tuple[Any, ...], Page] = {}

    async def finds_any(self, place: Any) -> bool:
        """Whether anything lies before a lane there, whatever it hears."""
        page = await self.read(place, None, 1)
        return bool(page.rows) or not page.complete

    async def read(self, place: Any, types: Sequence[str] | None, most: int) -> Page:
        key = (place, None if types is None else tuple(types), most)
        if key not in self._pages:
            self._pages[key] = await self._store.read(place, types, most)
        return self._pages[key]


_OPEN: Final = ", ".join(f"'{state}'" for state in OPEN)
# The oldest delivery of each subscription that is open among the exceptions. The states stand in the text, so that the
# index of open ones is seen to fit.
_RETRIED: Final = text(
    "SELECT x.subscription, x.event_id, x.type, x.position, x.recorded_at FROM whereupon_exception x "
    "WHERE x.id IN (SELECT (SELECT o.id FROM whereupon_exception o WHERE o.subscription = s.name "
    f"AND o.state IN ({_OPEN}) AND o.generation = 0 "
    "ORDER BY o.recorded_at LIMIT 1) FROM whereupon_subscription s)"
).columns(
    exception.c.subscription, exception.c.event_id, exception.c.type, exception.c.position, exception.c.recorded_at
)


def _owed(row: Any) -> Owed:
    return Owed(event_id=row.event_id, event_type=row.type, position=row.position, recorded_at=row.recorded_at)
