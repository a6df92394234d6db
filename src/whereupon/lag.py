"""How far each subscription is behind: the oldest event it has not settled, and whether that breaks its promise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.event import DomainEvent
from whereupon.registry import Registered, registered
from whereupon.schema import exception
from whereupon.store import OPEN, Cursor, Passed, Row, Store, ran_in
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

        A few statements for each lane, whatever the size of the log: each looks at 500 events beyond its cursor.
        """
        found = []
        async with self._store.reading() as connection:
            known = await registered(connection)
            standing = {one.name: await self._store.standing(connection, one.name) for one in known}
            retried = {one.name: await self._retried(connection, one.name) for one in known}
        oldest: dict[str, Owed | None] = {}
        for one in known:
            owed = [] if (open_ := retried[one.name]) is None else [open_]
            for cursor in standing[one.name]:
                if cursor.key.generation == 0 and (unread := await self._unread(cursor, one)) is not None:
                    owed.append(unread)
            oldest[one.name] = min(owed, key=lambda event: (event.recorded_at, event.position), default=None)
        async with self._store.reading() as connection:
            now: datetime = (await connection.execute(select(self._store.now_as_time))).scalar_one()
        promised = {declared.name: declared.within for declared in self._subscriptions}
        for one in known:
            first = oldest[one.name]
            found.append(
                Lag(
                    subscription=one.name,
                    paused=one.paused,
                    oldest=first,
                    age=0.0 if first is None else max(0.0, (now - first.recorded_at).total_seconds()),
                    within=promised.get(one.name),
                )
            )
        return found

    async def _retried(self, connection: AsyncConnection, name: str) -> Owed | None:
        """The oldest of its deliveries that are open among the exceptions."""
        row = (
            await connection.execute(
                select(exception.c.event_id, exception.c.type, exception.c.position, exception.c.recorded_at)
                .where(exception.c.subscription == name, exception.c.state.in_(OPEN), exception.c.generation == 0)
                .order_by(exception.c.recorded_at)
                .limit(1)
            )
        ).first()
        return None if row is None else _owed(row)

    async def _unread(self, cursor: Cursor, one: Registered) -> Owed | None:
        """The first event of a lane that it has not passed, and of which there is no exception."""
        for most in (FIRST_LOOK, READ_AHEAD):
            page = await self._store.read(cursor.place, one.stored_names(self._class_of), most)
            if (owed := await self._first_owed(page.rows, cursor, one)) is not None or len(page.rows) < most:
                return owed
        return None

    async def _first_owed(self, found: Sequence[Row], cursor: Cursor, one: Registered) -> Owed | None:
        rows = [row for row in found if row.position not in cursor.done]
        async with self._store.reading() as connection:
            failed = await self._store.kept(connection, cursor, [row.position for row in rows])
        for row in rows:
            if row.position in failed or one.name in ran_in(row.ran):
                continue
            seen = Passed(
                row.event_id, row.type, row.position, row.keys, [], row.version, row.payload, one.name,
                cursor.key.lane, one.lanes, one.ordered_by, False, False,
            )  # fmt: skip
            if seen.own_lane(self._key_inside) in (None, cursor.key.lane):
                return Owed(
                    event_id=row.event_id, event_type=row.type, position=row.position, recorded_at=row.recorded_at
                )
        return None


def _owed(row: Any) -> Owed:
    return Owed(event_id=row.event_id, event_type=row.type, position=row.position, recorded_at=row.recorded_at)
