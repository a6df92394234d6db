"""Lists for people: each looks at a bounded part of its table, however long that is, and says where to go on."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Final, Generic, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy import and_, func, literal_column, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.action import Action
from whereupon.context import NO_METADATA, Metadata, decode_metadata
from whereupon.event import DomainEvent
from whereupon.registry import Registered, registered
from whereupon.schema import action as action_table
from whereupon.schema import audit_log, log, process, workflow
from whereupon.schema import cursor as cursor_table
from whereupon.store import PARKED, RETRYING, RUNNING, WAITING, Store
from whereupon.story import AttemptStory, AuditEntry, attempt_story
from whereupon.workflow import State

T = TypeVar("T")

LOOKED_AT: Final = 20_000
"""Rows that one page looks through for what was asked for."""
PAGE: Final = 50
MOST_OPEN: Final = 1_000
"""Attempts that are open, of which the oldest are shown."""
COUNTED: Final = 1_000
"""Deliveries of one state in one lane, from which on they are counted no further."""

ENDS: Final = select(
    select(func.min(log.c.position)).scalar_subquery().label("first"),
    select(func.max(log.c.position)).scalar_subquery().label("last"),
)
"""The first and the last position of the log; asked together SQLite would walk through all of it for them."""


@dataclass(frozen=True, slots=True)
class Stretch(Generic[T]):
    """What one look has found."""

    found: Sequence[T]
    go_on: str | None
    """Where the next look begins; None where there is nothing further."""
    looked_at: int | None
    """How many were looked through, where that ended the look and not a full page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedEvent:
    """An event without its payload, which may be long."""

    position: int
    event_id: UUID
    event_type: str
    recorded_at: datetime
    metadata: Metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """A subscription as the database knows it, without a count of its dead letters."""

    name: str
    paused: bool
    paused_because: str | None
    types: frozenset[str] | None
    """None: it hears everything."""
    ordered_by: str | None
    lanes: int
    held: int
    """Lanes that a live worker owns."""
    replays: Sequence[int]
    """Generations that are being replayed."""
    open: dict[str, int]
    """How many deliveries are running, retrying, waiting and parked; counted up to 1,000 a lane."""
    more: bool
    """Whether there are more than were counted."""


class Lookback:
    """What dashboards read of a bus's database, beside what `Storyteller` and `Operator` do."""

    def __init__(self, store: Store, class_of: Callable[[str], type[DomainEvent] | None]) -> None:
        self._store = store
        self._class_of = class_of

    def names_of(self, name: str) -> list[str]:
        """The names that events of a type may be stored under."""
        cls = self._class_of(name)
        return [name] if cls is None else sorted({name, cls.__event__.name, *cls.__event__.aliases})

    async def events(
        self,
        *,
        event_type: str | None = None,
        correlation_id: UUID | None = None,
        actor: str | None = None,
        before: int | None = None,
        limit: int = PAGE,
    ) -> Stretch[ListedEvent]:
        """The newest events, of those before a position."""
        with self._store.reaching():
            async with self._store.reading() as connection:
                first, last = (await connection.execute(ENDS)).one()
                if last is None or (before is not None and before <= first):
                    return Stretch([], None, None)
                end = last if before is None else min(last, before - 1)
                start = max(first - 1, end - LOOKED_AT)
                query = (
                    select(log.c.position, log.c.event_id, log.c.type, log.c.recorded_at, log.c.headers)
                    .where(log.c.position > start, log.c.position <= end)
                    .order_by(log.c.position.desc())
                    .limit(limit + 1)
                )
                if event_type is not None:
                    query = query.where(log.c.type.in_(self.names_of(event_type)))
                if correlation_id is not None:
                    named = log.c.headers.contains(f'"correlation_id":"{correlation_id}"', autoescape=True)
                    query = query.where(or_(named, log.c.event_id == correlation_id))
                if actor is not None:
                    written = msgspec.json.encode(actor).decode()
                    query = query.where(log.c.headers.contains(f'"actor":{written}', autoescape=True))
                found = [listed(row) for row in await connection.execute(query)]
        if len(found) > limit:
            return Stretch(found[:limit], str(found[limit - 1].position), None)
        return Stretch(found, str(start + 1) if start >= first else None, end - start)

    async def audit(
        self,
        *,
        user_id: UUID | None = None,
        action: str | None = None,
        event_id: UUID | None = None,
        resource: tuple[str, str] | None = None,
        ip_address: str | None = None,
        correlation_id: UUID | None = None,
        until: datetime | None = None,
        before: str | None = None,
        limit: int = PAGE,
    ) -> Stretch[AuditEntry]:
        """The newest records of the audit trail; of a user or an action by its index, else by their time."""
        table = audit_log.c
        indexed = [
            column == wanted
            for column, wanted in ((table.event_id, event_id), (table.user_id, user_id), (table.action, action))
            if wanted is not None
        ][:1]
        place = None if before is None else place_in(before)
        if place is None and until is not None:
            place = (until, _first_id_of(until))
        window = select(audit_log).where(*indexed).limit(LOOKED_AT)
        if indexed:
            window = window.order_by(table.occurred_at.desc(), table.id.desc())
            if place is not None:
                same = and_(table.occurred_at == place[0], table.id < place[1])
                window = window.where(table.occurred_at <= place[0], or_(table.occurred_at < place[0], same))
        else:
            window = window.order_by(table.id.desc())  # they are UUIDv7: in the order of time
            if place is not None:
                window = window.where(table.id < place[1])
        newest = window.subquery()
        seen = newest.c
        query = select(newest).limit(limit + 1)
        query = query.order_by(seen.occurred_at.desc(), seen.id.desc()) if indexed else query.order_by(seen.id.desc())
        for column, wanted in (
            (seen.user_id, user_id),
            (seen.action, action),
            (seen.ip_address, ip_address),
            (seen.correlation_id, correlation_id),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        if resource is not None:
            query = query.where(seen.resource_type == resource[0], seen.resource_id == resource[1])
        with self._store.reaching():
            async with self._store.reading() as connection:
                rows = (await connection.execute(query)).all()
                found = [
                    AuditEntry(**{name: row._mapping[name] for name in AuditEntry.__dataclass_fields__}) for row in rows
                ]
                if len(found) > limit:
                    last = found[limit - 1]
                    return Stretch(found[:limit], _place_of(last.occurred_at, last.id), None)
                ended = await self._end_of(connection, window.with_only_columns(table.occurred_at, table.id))
        if ended is None:
            return Stretch(found, None, None)
        return Stretch(found, _place_of(ended.occurred_at, ended.id), LOOKED_AT)

    async def _end_of(self, connection: AsyncConnection, window: Any) -> Any:
        """The last row of a window that is full, or None."""
        return (await connection.execute(window.offset(LOOKED_AT - 1).limit(1))).first()

    async def attempts(
        self,
        *,
        state: State | None = None,
        name: str | None = None,
        before: UUID | None = None,
        limit: int = PAGE,
    ) -> Stretch[AttemptStory]:
        """Attempts at workflows, the newest first; of those that are open the oldest first, which are in question."""
        table = workflow.c
        if state is State.OPEN:
            # the state as text, so that the index of open attempts is seen to fit
            some = select(workflow).where(table.state == literal_column("'open'")).limit(MOST_OPEN).subquery()
            open_ = some.c
            query = select(some).order_by(open_.id).limit(limit + 1)
            if before is not None:
                query = query.where(open_.id > before)
            if name is not None:
                query = query.where(open_.name == name)
            with self._store.reaching():
                async with self._store.reading() as connection:
                    found = [attempt_story(row) for row in await connection.execute(query)]
            more = len(found) > limit
            return Stretch(found[:limit], str(found[limit - 1].attempted_id) if more else None, None)
        window = select(workflow).order_by(table.id.desc()).limit(LOOKED_AT)
        if before is not None:
            window = window.where(table.id < before)
        newest = window.subquery()
        seen = newest.c
        query = select(newest).order_by(seen.id.desc()).limit(limit + 1)
        if state is not None:
            query = query.where(seen.state == state.value)
        if name is not None:
            query = query.where(seen.name == name)
        with self._store.reaching():
            async with self._store.reading() as connection:
                found = [attempt_story(row) for row in await connection.execute(query)]
                if len(found) > limit:
                    return Stretch(found[:limit], str(found[limit - 1].attempted_id), None)
                ended = await self._end_of(connection, window.with_only_columns(table.id))
        return Stretch(found, None if ended is None else str(ended.id), None if ended is None else LOOKED_AT)

    async def actions(
        self, *, subscription: str | None = None, before: int | None = None, limit: int = PAGE
    ) -> Stretch[Action]:
        """What operators did, the newest first."""
        query = select(action_table).order_by(action_table.c.id.desc()).limit(limit + 1)
        if subscription is not None:
            query = query.where(action_table.c.subscription == subscription)
        if before is not None:
            query = query.where(action_table.c.id < before)
        with self._store.reaching():
            async with self._store.reading() as connection:
                found = [Action(**row._mapping) for row in await connection.execute(query)]
        return Stretch(found[:limit], str(found[limit - 1].id) if len(found) > limit else None, None)

    # --- subscriptions ----------------------------------------------------------------------------------------------

    async def served(self) -> list[Served]:
        """All subscriptions, by name."""
        owned = (
            select(cursor_table.c.subscription, func.count().label("held"))
            .join(process, (process.c.id == cursor_table.c.owner) & (process.c.lease_until > self._store.now))
            .group_by(cursor_table.c.subscription)
        )
        replays = select(cursor_table.c.subscription, cursor_table.c.generation).where(
            cursor_table.c.generation > 0, cursor_table.c.last.is_not(None)
        )
        with self._store.reaching():
            async with self._store.reading() as connection:
                known = await registered(connection)
                held = {row.subscription: row.held for row in await connection.execute(owned)}
                replayed: dict[str, set[int]] = {}
                for row in await connection.execute(replays.distinct()):
                    replayed.setdefault(row.subscription, set()).add(row.generation)
                counts: dict[str, dict[str, int]] = {}
                more: set[str] = set()
                for row in await connection.execute(text(_OPEN), {"most": COUNTED + 1}):
                    if row.number:
                        of = counts.setdefault(row.subscription, {})
                        of[row.state] = of.get(row.state, 0) + min(row.number, COUNTED)
                    if row.number > COUNTED:
                        more.add(row.subscription)
                why = {one.name: await self._why_paused(connection, one) for one in known if one.paused}
        return [
            Served(
                name=one.name,
                paused=one.paused,
                paused_because=why.get(one.name),
                types=one.types,
                ordered_by=one.ordered_by,
                lanes=one.lanes,
                held=held.get(one.name, 0),
                replays=sorted(replayed.get(one.name, ())),
                open=counts.get(one.name, {}),
                more=one.name in more,
            )
            for one in known
        ]

    async def _why_paused(self, connection: AsyncConnection, one: Registered) -> str | None:
        latest = (
            select(action_table.c.reason)
            .where(action_table.c.subscription == one.name, action_table.c.action == "pause")
            .order_by(action_table.c.id.desc())
            .limit(1)
        )
        why: str | None = await connection.scalar(latest)
        return why


# Each count ends at its limit, and each is a walk through the index of lanes, in whose order it asks for them.
_OPEN: Final = f"""
SELECT c.subscription, s.state, (SELECT count(*) FROM (
    SELECT 1 FROM whereupon_exception x WHERE x.subscription = c.subscription AND x.generation = c.generation
    AND x.lane = c.lane AND x.state = s.state ORDER BY x.next_at LIMIT :most) AS counted) AS number
FROM whereupon_cursor c CROSS JOIN (
    {" UNION ALL ".join(f"SELECT '{state}' AS state" for state in (RUNNING, RETRYING, WAITING, PARKED))}) AS s
"""


def listed(row: Any) -> ListedEvent:
    try:
        metadata = decode_metadata(row.headers)
    except msgspec.MsgspecError:
        metadata = NO_METADATA  # somebody wrote into the table by hand
    return ListedEvent(
        position=row.position,
        event_id=row.event_id,
        event_type=row.type,
        recorded_at=row.recorded_at,
        metadata=metadata,
    )


def _place_of(moment: datetime, id_: UUID) -> str:
    return f"{moment.astimezone(UTC):%Y%m%dT%H%M%S.%f}-{id_.hex}"


def place_in(place: str) -> tuple[datetime, UUID]:
    """Raises `ValueError` for what was none."""
    moment, _, id_ = place.partition("-")
    return datetime.strptime(moment, "%Y%m%dT%H%M%S.%f").replace(tzinfo=UTC), UUID(id_)


def _first_id_of(moment: datetime) -> UUID:
    """No UUIDv7 that was made at this moment or later is less (RFC 9562: milliseconds since 1970 come first)."""
    return UUID(int=max(0, int(moment.timestamp() * 1000)) << 80)
