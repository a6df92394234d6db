"""What operators do: pause and resume, settle dead letters, retire a subscription, change its lanes, prune the log.

Whoever changes a delivery by hand locks the cursor's row of its lane first, as the lane's owner does for everything it
settles: so one of them sees what the other has committed, and no delivery is left parked behind nobody. The owner need
not be told. It reads an exception's row before each attempt, hears of what is due from the database, and where its
memory still takes a key for blocked, the next event of the key is parked and, in that transaction, found to be free.
Each change is a row in `whereupon_action`, in the transaction that makes it.
"""

from __future__ import annotations

import asyncio
import base64
import getpass
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Collection, Iterable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Final, NamedTuple, TypeVar
from uuid import UUID

import msgspec
from sqlalchemy import delete, func, insert, literal_column, select, update
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon import cluster, retention
from whereupon.causes import DeadGroup, Outcomes, dead_groups, outcomes
from whereupon.cluster import Rebase
from whereupon.codec import Codec
from whereupon.context import decode_metadata
from whereupon.errors import ActionRefused, EventDecodingError, EventEncodingError
from whereupon.event import DomainEvent
from whereupon.lane import key_of, lost_a_race
from whereupon.pace import Pace, check_rate
from whereupon.retention import Pruned
from whereupon.schema import action as action_table
from whereupon.schema import cursor as cursor_table
from whereupon.schema import exception, log, process, without_nul
from whereupon.schema import subscription as subscription_table
from whereupon.store import (
    DEAD,
    PARKED,
    RETRYING,
    SKIPPED,
    WAITING,
    Cursor,
    Failure,
    LaneKey,
    Row,
    Store,
    key_in,
    lane_of,
)
from whereupon.subscription import Subscription, Subscriptions

T = TypeVar("T")

CHUNK: Final = 500
"""Deliveries that are changed in one transaction."""
CARRIED: Final = 10_000
"""Undelivered events that a change of lanes makes exceptions of, at most; with more it waits for workers."""
CANARY_AT_ONCE: Final = 1000
"""Dead letters that one step of a canary delivers again, at most."""
PAGE: Final = 500
LOOK: Final = 0.1
"""Seconds between two looks at whether lanes are given up."""
RERUNS: Final = 10

FAILED: Final = (DEAD, RETRYING, WAITING)
"""States of a delivery whose last attempt has ended, if there was one since it was retried."""
RETRIABLE: Final = (DEAD, RETRYING)
SKIPPABLE: Final = (DEAD, RETRYING, WAITING, PARKED)
"""States that no handler runs in: the owner has them in the database alone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """What somebody did, when and why."""

    id: int
    at: datetime
    author: str
    action: str
    """pause, resume, retry, edit, skip, retire, lanes, adopt, replay, backfill, prune or rebase."""
    subscription: str
    """Empty for a prune or a rebase, which are of the whole database."""
    generation: int | None
    position: int | None
    event_id: UUID | None
    reason: str
    details: Mapping[str, Any]
    """What it was like before, as far as the action has changed it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A delivery that used up its attempts, or, asked for by its id, any that is among the exceptions."""

    id: int
    """Grows with time: a page of a list goes on `after` the last id of the one before."""
    subscription: str
    generation: int
    lane: int
    position: int
    event_id: UUID
    event_type: str
    version: int
    key: str | None
    state: str
    attempts: int
    error_type: str | None
    error_message: str | None
    fingerprint: str | None
    """Equal for dead letters of one cause."""
    recorded_at: datetime
    """When the event was published."""
    updated_at: datetime
    payload: bytes | None = None
    """The stored event; None in lists, as are the next two."""
    headers: str | None = None
    traceback: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerState:
    """A subscription as the database knows it."""

    name: str
    lanes: int
    ordered_by: str | None
    paused: bool
    paused_because: str | None
    """What was said when it was paused, by an operator or by a worker."""
    created_at: datetime
    held: int
    """How many of its lanes a live worker owns."""
    exceptions: Mapping[str, int] = field(default_factory=dict)
    """How many deliveries are retrying, parked, dead and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CanaryStep:
    """Some dead letters that were delivered again before others of their cause, and what became of them."""

    retried: int
    total: int
    """With those of the steps before."""
    outcomes: Outcomes
    going_on: bool
    """Whether others follow: none has failed, none is left untried, and there are more."""
    failure: DeadLetter | None
    """One that failed again."""
    returned: bool
    """Whether that failed of the same cause as before."""


class Span(NamedTuple):
    """A part of the log."""

    first: int
    """The position of the first event in it that is heard, and of the last one."""
    last: int

    @property
    def most(self) -> int:
        """As many events it has at most."""
        return self.last - self.first + 1


class Operator:
    """The hands of whoever operates a bus; `EventBus.operator` is one.

    `reason` says why, for those who come later, and may not be empty; `author` is the operating system's user unless
    given. What can't be done as asked raises `ActionRefused`, and nothing is changed then.
    """

    def __init__(
        self,
        store: Store,
        subscriptions: Subscriptions,
        codec: Codec,
        class_of: Callable[[str], type[DomainEvent] | None],
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._subscriptions = subscriptions
        self._codec = codec
        self._class_of = class_of
        self._ready = ready

    # --- looking ----------------------------------------------------------------------------------------------------

    async def handlers(self) -> list[HandlerState]:
        """All subscriptions that the database knows, by name."""
        owned = (
            select(cursor_table.c.subscription, func.count().label("held"))
            .join(process, (process.c.id == cursor_table.c.owner) & (process.c.lease_until > self._store.now))
            .group_by(cursor_table.c.subscription)
        )
        async with self._reading() as connection:
            found = (await connection.execute(select(subscription_table).order_by(subscription_table.c.name))).all()
            held = {row.subscription: row.held for row in await connection.execute(owned)}
            counts: dict[str, dict[str, int]] = {}
            for name, state, number in await connection.execute(
                select(exception.c.subscription, exception.c.state, func.count()).group_by(
                    exception.c.subscription, exception.c.state
                )
            ):
                counts.setdefault(name, {})[state] = number
            latest = select(func.max(action_table.c.id)).where(action_table.c.action == "pause")
            said = select(action_table.c.subscription, action_table.c.reason).where(
                action_table.c.id.in_(latest.group_by(action_table.c.subscription))
            )
            reasons = {row.subscription: row.reason for row in await connection.execute(said)}
        return [
            HandlerState(
                name=row.name,
                lanes=row.lanes,
                ordered_by=row.ordered_by,
                paused=bool(row.paused),
                paused_because=reasons.get(row.name) if row.paused else None,
                created_at=row.created_at,
                held=held.get(row.name, 0),
                exceptions=counts.get(row.name, {}),
            )
            for row in found
        ]

    async def dead(
        self,
        subscription: str | None = None,
        *,
        error_type: str | None = None,
        fingerprint: str | None = None,
        after: int = 0,
        limit: int = 100,
    ) -> list[DeadLetter]:
        """Dead letters, oldest first; `after` is the id of the last one that was seen."""
        columns = [column for column in exception.c if column.name not in ("payload", "headers", "traceback")]
        query = self._dead(select(*columns), _Which(subscription, error_type, fingerprint), limit, after)
        async with self._reading() as connection:
            return [_letter(row) for row in await connection.execute(query)]

    async def groups(self, subscription: str | None = None, *, limit: int = 100) -> list[DeadGroup]:
        """Dead letters by their cause, those of one subscription after those of another."""
        if limit < 1:
            raise ActionRefused(f"limit={limit}: it is 1 or more")
        async with self._reading() as connection:
            return await dead_groups(connection, subscription, limit)

    async def delivery(self, subscription: str, event_id: UUID, *, generation: int = 0) -> DeadLetter:
        """One delivery that is among the exceptions, dead or not, with its event."""
        async with self._reading() as connection:
            row = (await connection.execute(self._one(subscription, event_id, generation))).first()
        if row is None:
            raise self._no_exception(subscription, event_id, generation)
        return _letter(row)

    async def actions(self, subscription: str | None = None, *, after: int = 0, limit: int = 100) -> list[Action]:
        """What was done, oldest first."""
        query = select(action_table).where(action_table.c.id > after).order_by(action_table.c.id).limit(limit)
        if subscription is not None:
            query = query.where(action_table.c.subscription == subscription)
        async with self._reading() as connection:
            return [Action(**row._mapping) for row in await connection.execute(query)]

    # --- pausing ----------------------------------------------------------------------------------------------------

    async def pause(self, subscription: str, reason: str, *, author: str | None = None) -> bool:
        """Have no worker begin a delivery of it, from one poll interval on; what runs ends. False if it was paused.

        Events gather in the log meanwhile. A handler IN_TRANSACTION still runs inside `publish`.
        """
        return await self._set_paused(subscription, True, reason, author)

    async def resume(self, subscription: str, reason: str, *, author: str | None = None) -> bool:
        """Have workers deliver again where they stopped. False if it was not paused."""
        return await self._set_paused(subscription, False, reason, author)

    async def _set_paused(self, name: str, paused: bool, reason: str, author: str | None) -> bool:
        by = _by(reason, author)

        async def change(connection: AsyncConnection) -> bool:
            row = await self._subscription(connection, name, lock=True)
            if bool(row.paused) == paused:
                return False
            await _pause(connection, name, paused)
            await self._record(connection, by, "pause" if paused else "resume", name)
            return True

        return await self._changing(change)

    # --- dead letters -----------------------------------------------------------------------------------------------

    async def retry(
        self,
        subscription: str | None = None,
        event_id: UUID | None = None,
        *,
        reason: str,
        generation: int = 0,
        error_type: str | None = None,
        fingerprint: str | None = None,
        limit: int = 1000,
        rate: float | None = None,
        author: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Deliver dead letters again, with all attempts of their `Retry`: one of an event, or many; return how many.

        Of many, the oldest come first, at most `limit`, and no more than `rate` a second; `progress` hears how many
        have been changed. One that is not the first of its key waits for that.
        """
        which = _Which(subscription, error_type, fingerprint)
        if event_id is not None:
            return await self._settle_one("retry", which, event_id, generation, _by(reason, author))
        return await self._settle_chosen("retry", which, limit, _by(reason, author), rate, progress)

    async def skip(
        self,
        subscription: str | None = None,
        event_id: UUID | None = None,
        *,
        reason: str,
        generation: int = 0,
        error_type: str | None = None,
        fingerprint: str | None = None,
        limit: int = 1000,
        rate: float | None = None,
        author: str | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Settle dead letters without a delivery, so that what waits behind them goes on; return how many.

        Of many, the oldest come first, at most `limit`, and no more than `rate` a second; `progress` hears how many
        have been changed. Named by its event, one that is retrying, waiting or parked can be skipped as well.
        """
        which = _Which(subscription, error_type, fingerprint)
        if event_id is not None:
            return await self._settle_one("skip", which, event_id, generation, _by(reason, author))
        return await self._settle_chosen("skip", which, limit, _by(reason, author), rate, progress)

    async def edit(
        self,
        subscription: str,
        event_id: UUID,
        replacement: DomainEvent | Mapping[str, Any] | bytes,
        *,
        reason: str,
        generation: int = 0,
        author: str | None = None,
    ) -> None:
        """Give one dead letter another event, and deliver it again; the log keeps what was published.

        The replacement is an event, or its fields as JSON has them. It must be of the stored type, and decode by this
        bus's codec; the id of the event stays, and so does the value that the subscription orders by. What the letter
        held before is in the action's details.
        """
        by = _by(reason, author)

        async def change(connection: AsyncConnection) -> None:
            row = await self._locked_one(connection, subscription, event_id, generation)
            self._check_state("edit", row, RETRIABLE)
            event, payload = self._replacement(row, replacement)
            ordered_by = await connection.scalar(
                select(subscription_table.c.ordered_by).where(subscription_table.c.name == subscription)
            )
            if row.key is not None and ordered_by is not None and key_of(event, ordered_by) != row.key:
                raise ActionRefused(
                    f"{subscription} is ordered by {ordered_by}, and this delivery has its place behind others of "
                    f"{row.key!r}: keep that value. To deliver it under another, skip this one and publish a new event"
                )
            values: dict[str, Any] = {"payload": payload, "version": type(event).__event__.version}
            details = {**_before(row), "version": row.version, **_shown(row.payload)}
            try:
                decode_metadata(row.headers)
            except (msgspec.MsgspecError, UnicodeError):
                values["headers"] = "{}"  # it could never be delivered with these
                details["headers"] = row.headers
            await connection.execute(update(exception).where(exception.c.id == row.id).values(**values))
            await self._apply(connection, "edit", [row], by, [details])

        await self._changing(change)

    async def canary(
        self,
        subscription: str,
        *,
        reason: str,
        fingerprint: str | None = None,
        error_type: str | None = None,
        rate: float | None = None,
        patience: float = 60.0,
        author: str | None = None,
    ) -> AsyncIterator[CanaryStep]:
        """Deliver dead letters again, the oldest first: 1, then 10, then 100, then 1,000 at a time, as it goes well.

        Each step waits for what becomes of it. Where one of its deliveries fails, or nothing has happened to any for
        `patience` seconds, that was the last step; the others are dead letters still. `rate` is how many are delivered
        again a second, at most.
        """
        by, which = _by(reason, author), _Which(subscription, error_type, fingerprint)
        size, total, after = 1, 0, 0
        while True:
            async with self._reading() as connection:
                columns = (exception.c.id, exception.c.fingerprint)
                chosen = (await connection.execute(self._dead(_lanes(*columns), which, size + 1, after))).all()
            more, chosen = len(chosen) > size, chosen[:size]
            if not chosen:
                return
            await self._settle_rows("retry", chosen, by, rate, None)
            after, total, size = chosen[-1].id, total + len(chosen), min(size * 10, CANARY_AT_ONCE)
            found = await self._outcomes([row.id for row in chosen], patience)
            failure = await self._failed_of([row.id for row in chosen]) if found.failed else None
            step = CanaryStep(
                retried=len(chosen),
                total=total,
                outcomes=found,
                going_on=more and not found.failed and not found.open,
                failure=failure,
                returned=failure is not None and failure.fingerprint in {row.fingerprint for row in chosen},
            )
            yield step
            if not step.going_on:
                return

    async def _outcomes(self, ids: Sequence[int], patience: float) -> Outcomes:
        """What became of retried ones, once none is open, or one has failed, or nothing has moved for a while."""
        before, moved = Outcomes(open=len(ids)), time.monotonic()
        while True:
            async with self._reading() as connection:
                found = await outcomes(connection, ids)
            if found.failed or not found.open:
                return found
            if found != before:
                before, moved = found, time.monotonic()
            elif time.monotonic() > moved + patience:
                return found
            await asyncio.sleep(LOOK)

    async def _failed_of(self, ids: Sequence[int]) -> DeadLetter | None:
        async with self._reading() as connection:
            row = (
                await connection.execute(
                    select(exception)
                    .where(exception.c.id.in_(ids), exception.c.state.in_(FAILED), exception.c.attempts > 0)
                    .order_by(exception.c.updated_at)
                    .limit(1)
                )
            ).first()
        return None if row is None else _letter(row)

    async def _settle_one(self, what: str, which: _Which, event_id: UUID, generation: int, by: tuple[str, str]) -> int:
        subscription = which.subscription
        if subscription is None or which.error_type is not None or which.fingerprint is not None:
            raise ActionRefused(f"{what} of one event takes its subscription and its id, and nothing else")

        async def change_one(connection: AsyncConnection) -> int:
            row = await self._locked_one(connection, subscription, event_id, generation)
            self._check_state(what, row, RETRIABLE if what == "retry" else SKIPPABLE)
            return await self._apply(connection, what, [row], by)

        return await self._changing(change_one)

    async def _settle_chosen(
        self,
        what: str,
        which: _Which,
        limit: int,
        by: tuple[str, str],
        rate: float | None,
        progress: Callable[[int], None] | None,
    ) -> int:
        if which == _Which(None, None, None):
            raise ActionRefused(
                f"{what} of many takes a subscription, a fingerprint or the type of an error: say which dead letters"
            )
        async with self._reading() as connection:
            chosen = (await connection.execute(self._dead(_lanes(exception.c.id), which, limit))).all()
        return await self._settle_rows(what, chosen, by, rate, progress)

    async def _settle_rows(
        self,
        what: str,
        chosen: Sequence[Any],
        by: tuple[str, str],
        rate: float | None,
        progress: Callable[[int], None] | None,
    ) -> int:
        pace = Pace(what, rate, CHUNK)
        changed = 0
        by_lane: dict[LaneKey, list[int]] = {}
        for row in chosen:
            by_lane.setdefault(_lane(row), []).append(row.id)
        for lane, ids in by_lane.items():  # one lane at a time: a worker may lock several, in an order of its own
            for start in range(0, len(ids), pace.at_once):
                await pace.keep(changed)
                changed += await self._settle_some(what, lane, ids[start : start + pace.at_once], by)
                if progress is not None:
                    progress(changed)
        return changed

    async def _settle_some(self, what: str, lane: LaneKey, ids: Sequence[int], by: tuple[str, str]) -> int:
        async def change(connection: AsyncConnection) -> int:
            if not await self._lock(connection, lane):
                return 0
            found = await connection.execute(
                select(exception).where(exception.c.id.in_(ids), exception.c.state == DEAD).order_by(exception.c.id)
            )
            return await self._apply(connection, what, [row for row in found if _lane(row) == lane], by)

        return await self._changing(change)

    async def _apply(
        self,
        connection: AsyncConnection,
        what: str,
        rows: Sequence[Any],
        by: tuple[str, str],
        details: Sequence[Mapping[str, Any]] | None = None,
    ) -> int:
        """Retry or skip these, whose lanes are locked, and let go on what waits behind them."""
        author, reason = by
        now = self._store.later(0)
        for row in rows:
            values: dict[str, Any] = {"updated_at": now, "next_at": None}
            if what == "skip":
                values |= {
                    "state": SKIPPED,
                    "error_type": "Skipped",
                    "error_message": without_nul(f"{reason} (by {author})"),
                }
            else:
                values |= {"state": PARKED, "attempts": 0, "alone": False}  # if it is the first of its key: see below
                if row.key is None:
                    values |= {"state": RETRYING, "next_at": now}
            await connection.execute(update(exception).where(exception.c.id == row.id).values(**values))
        for lane, key in dict.fromkeys((_lane(row), row.key) for row in rows if row.key is not None):
            await self._store.unpark(connection, Cursor(lane, 0, None), [key])
        for number, row in enumerate(rows):
            await self._record(
                connection, by, what, row.subscription, row, details[number] if details else _before(row)
            )
        return len(rows)

    def _replacement(self, row: Any, given: DomainEvent | Mapping[str, Any] | bytes) -> tuple[DomainEvent, bytes]:
        """The event that is to be delivered, and its stored form. Raises `ActionRefused` with the reason."""
        cls = self._class_of(row.type)
        if cls is None:
            raise ActionRefused(
                f"no event class of this process is stored as {row.type!r}: import its module where the bus is made, "
                "and name that bus"
            )
        try:
            if isinstance(given, DomainEvent):
                event = given
                if type(event) is not cls:
                    raise ActionRefused(f"the delivery is of a {cls.__name__}, not of a {type(event).__name__}")
            else:
                data = self._complete(row, cls, given) if isinstance(given, Mapping) else given
                event = self._codec.decode(cls, cls.__event__.version, data)
            if event.event_id != row.event_id:
                raise ActionRefused(
                    f"the delivery is of event {row.event_id}, the replacement is {event.event_id}: an edited event "
                    f"keeps its id, since handlers know it by that. Make it with event_id=UUID('{row.event_id}')"
                )
            payload = self._codec.encode(event)
            return self._codec.decode(cls, cls.__event__.version, payload), payload
        except (EventDecodingError, EventEncodingError) as error:
            raise ActionRefused(f"the replacement could not be delivered either: {error}") from error

    def _complete(self, row: Any, cls: type[DomainEvent], given: Mapping[str, Any]) -> bytes:
        """Fields as JSON, with the id of the stored event and, where it can be read, its time."""
        fields = cls.__event__.types
        if unknown := sorted(set(given) - set(fields)):
            raise ActionRefused(f"{cls.__name__} has no field {', '.join(unknown)}: it has {', '.join(sorted(fields))}")
        try:
            stored = msgspec.json.decode(row.payload, type=dict[str, Any])
        except (msgspec.MsgspecError, UnicodeError):
            stored = {}
        kept = {"event_id": str(row.event_id)}
        if "occurred_at" in fields:
            kept["occurred_at"] = stored.get("occurred_at") or row.recorded_at.isoformat()
        try:
            return msgspec.json.encode({**kept, **given})
        except (TypeError, ValueError, msgspec.MsgspecError) as error:
            raise ActionRefused(f"the replacement can't be written as JSON: {error}") from error

    @staticmethod
    def _check_state(what: str, row: Any, allowed: Collection[str]) -> None:
        if row.state not in allowed:
            raise ActionRefused(
                f"the delivery of {row.event_id} to {row.subscription} is {row.state}, and {what} is for one that is "
                f"{' or '.join(allowed)}"
            )

    # --- subscriptions ----------------------------------------------------------------------------------------------

    async def retire(
        self, subscription: str, reason: str, *, author: str | None = None, force: bool = False
    ) -> Mapping[str, int]:
        """Forget a subscription that nothing declares any more: its place in the log and its exceptions are deleted.

        Returns how many deliveries of each state that were. Refused while a live worker serves it, unless forced. A bus
        that declares it makes it anew, from then on.
        """
        by = _by(reason, author)

        async def change(connection: AsyncConnection) -> Mapping[str, int]:
            row = await self._subscription(connection, subscription, lock=True)
            await self._lock_all(connection, subscription)
            serving = [
                f"{one.host} (process {one.pid})"
                for one in await connection.execute(
                    select(process.c.host, process.c.pid, process.c.serves)
                    .where(process.c.in_flight > 0, process.c.lease_until > self._store.now)
                    .order_by(process.c.started_at)
                )
                if subscription in msgspec.json.decode(one.serves, type=list[str])
            ]
            if serving and not force:
                raise ActionRefused(
                    f"{subscription} is served by {', '.join(serving)}: stop these workers, or deploy a build without "
                    "it; force retires it nevertheless"
                )
            counts = await connection.execute(
                select(exception.c.state, func.count())
                .where(exception.c.subscription == subscription)
                .group_by(exception.c.state)
            )
            lost: dict[str, int] = {row[0]: row[1] for row in counts}
            for table in (exception, cursor_table):
                await connection.execute(delete(table).where(table.c.subscription == subscription))
            await connection.execute(delete(subscription_table).where(subscription_table.c.name == subscription))
            details = {"exceptions": lost, "lanes": row.lanes, "ordered_by": row.ordered_by, "served_by": serving}
            await self._record(connection, by, "retire", subscription, details=details)
            return lost

        return await self._changing(change)

    async def adopt(self, subscription: str, reason: str, *, author: str | None = None) -> bool:
        """Go on with a subscription as this build declares it, though another has been served since; whether it was.

        For a rollback: workers leave a subscription alone that a newer build has defined otherwise (other events, or
        another kind of delivery). Events that only the newer definition hears are passed over from now on.
        """
        by = _by(reason, author)
        declared = self._declared(subscription)
        async with self._store.reading() as connection:
            before = await connection.scalar(
                select(subscription_table.c.definition).where(subscription_table.c.name == subscription)
            )
        if before == declared.definition:
            return False
        await self._store.register([declared], adopt=True)

        async def change(connection: AsyncConnection) -> bool:
            details = {"before": before, "now": declared.definition}
            await self._record(connection, by, "adopt", subscription, details=details)
            return True

        return await self._changing(change)

    async def replay(
        self,
        subscription: str,
        reason: str,
        *,
        since: datetime | None = None,
        until: datetime | None = None,
        rate: float | None = None,
        author: str | None = None,
    ) -> int:
        """Deliver a range of the log again, beside what is new; return the number of this generation of deliveries.

        From the first event recorded at `since` or later to the last one recorded before `until`, in the order of the
        log, and none that commits later; None is the beginning, or now. `rate` is deliveries a second. Handlers see a
        new idempotency key and `EventContext.generation`. Events that were pruned are gone. Order by key holds within
        a generation, not between this one and others.
        """
        return await self._deliver_again("replay", subscription, _by(reason, author), since, until, rate)

    async def backfill(
        self,
        subscription: str,
        reason: str,
        *,
        since: datetime | None = None,
        rate: float | None = None,
        author: str | None = None,
    ) -> int:
        """Give a subscription that started from now what was published before; return the number of this generation.

        A replay up to the time at which it was registered. What a transaction published that was open at that moment
        comes twice, in this generation and in the first one, with two idempotency keys. Refused where it was done.
        """
        return await self._deliver_again("backfill", subscription, _by(reason, author), since, None, rate)

    async def replayable(
        self, subscription: str, *, since: datetime | None = None, until: datetime | None = None
    ) -> Span | None:
        """Which part of the log `replay` would deliver again; None where there is nothing in it that is heard."""
        _check_zone(since=since, until=until)
        wanted = _wanted(self._declared(subscription), since, until)
        async with self._reading() as connection:
            await self._subscription(connection, subscription)
            ends = await _ends_of(connection, wanted)
        return None if ends is None else Span(*ends)

    async def _deliver_again(
        self,
        what: str,
        subscription: str,
        by: tuple[str, str],
        since: datetime | None,
        until: datetime | None,
        rate: float | None,
    ) -> int:
        check_rate(what, rate)
        _check_zone(since=since, until=until)
        declared = self._declared(subscription)
        async with self._reading() as connection:
            row = await self._subscription(connection, subscription)
            end = until if what == "replay" else row.created_at
            wanted = _wanted(declared, since, end)
            # a search through the log may take a while: nobody waits for it
            span = await _ends_of(connection, wanted)

        async def change(connection: AsyncConnection) -> int:
            await self._store.exclusively(connection, "retention")  # what is to be read may not go meanwhile
            row = await self._subscription(connection, subscription, lock=True)
            if what == "backfill":
                await self._check_not_filled(connection, subscription)
            ends = span and await _ends_of(connection, [*wanted, log.c.position.between(*span)])  # some may have gone
            if ends is None:
                raise ActionRefused(f"there is nothing in the log that {subscription} hears in that time")
            first, last = ends
            known = await connection.scalar(
                select(func.max(cursor_table.c.generation)).where(cursor_table.c.subscription == subscription)
            )
            generation = int(known or 0) + 1
            keys = [LaneKey(subscription, generation, lane) for lane in range(row.lanes)]
            await self._store.lay(connection, keys, await self._store.before(connection, first), 0)
            await connection.execute(
                update(cursor_table)
                .where(cursor_table.c.subscription == subscription, cursor_table.c.generation == generation)
                .values(last=last, rate=rate)
            )
            details = {
                "generation": generation,
                "first": first,
                "last": last,
                "since": None if since is None else since.isoformat(),
                "until": None if end is None else end.isoformat(),
                "rate": rate,
            }
            await self._record(connection, by, what, subscription, details=details)
            return generation

        return await self._changing(change)

    async def _check_not_filled(self, connection: AsyncConnection, subscription: str) -> None:
        done = (
            await connection.execute(
                select(action_table.c.at, action_table.c.author)
                .where(action_table.c.subscription == subscription, action_table.c.action == "backfill")
                .limit(1)
            )
        ).first()
        if done is not None:
            raise ActionRefused(
                f"{subscription} was given the past at {done.at:%Y-%m-%d %H:%M} UTC by {done.author}; replay delivers "
                "a range again"
            )

    def _declared(self, subscription: str) -> Subscription:
        if subscription not in self._subscriptions:
            raise ActionRefused(
                f"{subscription} is not declared by this bus, so which events it hears is not known here: name a bus "
                "that declares it"
            )
        return self._subscriptions[subscription]

    async def lanes(
        self,
        subscription: str,
        number: int,
        reason: str,
        *,
        author: str | None = None,
        timeout: float = 60.0,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Split a subscription into another number of lanes; return into how many it was split.

        It is paused, its workers give the lanes up when what runs has ended, and the lanes are made anew in one
        transaction; then it goes on, unless it was paused before. `progress` hears how many lanes are held still.
        Events that were not delivered by then become exceptions, due at once. Refused, and resumed, if lanes are held
        after `timeout` seconds, if a worker that died has left one, or if more than 10,000 events are not delivered.
        """
        by = _by(reason, author)
        if not 1 <= number <= 1024:
            raise ActionRefused(f"{subscription} can't have {number} lanes: 1 to 1024")
        declared = self._declared(subscription)
        paused_here = await self._set_paused(subscription, True, f"to change its lanes: {reason}", author)
        try:
            return await self._relay(declared, number, by, timeout, progress, resume=paused_here)
        except BaseException:
            if paused_here:
                await self._set_paused(subscription, False, "its lanes were not changed", author)
            raise

    async def _relay(
        self,
        declared: Subscription,
        number: int,
        by: tuple[str, str],
        timeout: float,
        progress: Callable[[int], None] | None,
        *,
        resume: bool,
    ) -> int:
        deadline = time.monotonic() + timeout
        while True:
            await self._given_up(declared.name, deadline, progress)
            async with self._reading() as connection:
                standing = await self._store.standing(connection, [declared.name])
                end = await self._store.end(connection)
            if any(cursor.key.generation for cursor in standing):
                raise ActionRefused(f"{declared.name} is being replayed: change its lanes when that has ended")
            left = await self._left(declared, standing, end)

            async def change(
                connection: AsyncConnection,
                standing: list[Cursor] = standing,
                left: list[tuple[str | None, Row]] = left,
                end: Any = end,
            ) -> int | None:
                row = await self._subscription(connection, declared.name, lock=True)
                held = await self._lock_all(connection, declared.name)
                if not row.paused:
                    raise ActionRefused(f"{declared.name} was resumed by somebody while its lanes were to be changed")
                if held != {cursor.key: (cursor.token, None) for cursor in standing}:
                    return None  # a worker that had not seen the pause took one meanwhile
                await self._lay(connection, declared, number, max(c.token for c in standing) + 1, left, end)
                details = {"lanes": row.lanes, "new_lanes": number, "carried": len(left)}
                await self._record(connection, by, "lanes", declared.name, details=details)
                if resume:
                    await _pause(connection, declared.name, False)
                    await self._record(connection, by, "resume", declared.name)
                return int(row.lanes)

            before = await self._changing(change)
            if before is not None:
                return before

    async def _given_up(self, name: str, deadline: float, progress: Callable[[int], None] | None) -> None:
        """Wait until no lane has an owner."""
        said: int | None = None
        while True:
            lanes = (await self._store.layout([name])).lanes
            held = [lane for lane in lanes if lane.owner is not None]
            if any(not lane.alive for lane in held):
                raise ActionRefused(
                    f"{name}: the worker that held lane {next(lane for lane in held if not lane.alive).key.lane} has "
                    "died, and what it had in flight must be delivered with care. Let a worker take it over (one "
                    "lease), and try again"
                )
            if progress is not None and len(held) != said:
                progress(said := len(held))
            if not held:
                return
            if time.monotonic() > deadline:
                raise ActionRefused(
                    f"{name}: {len(held)} of {len(lanes)} lanes are held still, by handlers that have not ended. "
                    "Give it a longer timeout, or look at what they do"
                )
            await asyncio.sleep(LOOK)

    async def _left(self, declared: Subscription, standing: list[Cursor], end: Any) -> list[tuple[str | None, Row]]:
        """What lies between the places of the lanes and `end`, and is neither settled nor an exception, by arrival."""
        types = _heard(declared)
        left: list[tuple[str | None, Row]] = []
        for cursor in standing:
            place = cursor.place
            while place != end:
                page = await self._store.read(place, types, PAGE, toward=end)
                place = page.after
                mine = []
                for row in page.rows:
                    key, lane = self._key_and_lane(declared, row, len(standing))
                    inside = row.ran is not None and declared.name in msgspec.json.decode(row.ran, type=list[str])
                    if lane == cursor.key.lane and row.position not in cursor.done and not inside:
                        mine.append((key, row))
                async with self._reading() as connection:
                    kept = await self._store.kept(connection, cursor, [row.position for _, row in mine])
                left += [(key, row) for key, row in mine if row.position not in kept]
                if len(left) > CARRIED:
                    raise ActionRefused(
                        f"{declared.name} has more than {CARRIED} events to deliver yet: let its workers catch up, "
                        "and try again"
                    )
        return left

    def _key_and_lane(self, declared: Subscription, row: Row, lanes: int) -> tuple[str | None, int]:
        """As workers find them; see `Share.key_of`."""
        if declared.ordered_by is None:
            return None, lane_of(None, row.position, lanes)
        key = key_in(row.keys, declared.ordered_by)
        if key is None:
            cls = self._class_of(row.type)
            if cls is None:
                return None, 0
            try:
                key = key_of(self._codec.decode(cls, row.version, row.payload), declared.ordered_by)
            except EventDecodingError:
                return None, 0
        return key, lane_of(key, row.position, lanes)

    async def _lay(
        self,
        connection: AsyncConnection,
        declared: Subscription,
        number: int,
        token: int,
        left: Iterable[tuple[str | None, Row]],
        end: Any,
    ) -> None:
        name = declared.name
        ordered = declared.ordered_by is not None

        def lane_for(key: str | None, position: int) -> int:
            return 0 if ordered and key is None else lane_of(key, position, number)

        last = 0
        while True:
            rows = (
                await connection.execute(
                    select(exception.c.id, exception.c.key, exception.c.position)
                    .where(exception.c.subscription == name, exception.c.generation == 0, exception.c.id > last)
                    .order_by(exception.c.id)
                    .limit(PAGE)
                )
            ).all()
            if not rows:
                break
            last = rows[-1].id
            lanes: dict[int, list[int]] = {}
            for row in rows:
                lanes.setdefault(lane_for(row.key, row.position), []).append(row.id)
            for lane, ids in lanes.items():
                await connection.execute(update(exception).where(exception.c.id.in_(ids)).values(lane=lane))
        await connection.execute(delete(cursor_table).where(cursor_table.c.subscription == name))
        await self._store.lay(connection, [LaneKey(name, 0, lane) for lane in range(number)], end, token)
        await connection.execute(
            update(subscription_table).where(subscription_table.c.name == name).values(lanes=number)
        )
        keys: dict[str, None] = {}
        for key, event in left:
            state, next_in = (RETRYING, 0.0) if key is None else (PARKED, None)
            cursor = Cursor(LaneKey(name, 0, lane_for(key, event.position)), token, end)
            await self._store.keep_failures(connection, cursor, [Failure(event, state, 0, next_in, key=key)])
            if key is not None:
                keys[key] = None
        for key in keys:
            await self._store.unpark(connection, Cursor(LaneKey(name, 0, lane_for(key, 0)), token, end), [key])

    # --- the database -----------------------------------------------------------------------------------------------

    async def prunable(self, *, older_than: timedelta) -> Pruned:
        """What `prune` would delete, and what holds back the rest."""
        await self._ready()
        with self._store.reaching():
            return await retention.prune(self._store, older_than, dry_run=True)

    async def prune(
        self,
        reason: str,
        *,
        older_than: timedelta,
        rate: float | None = None,
        author: str | None = None,
        progress: Callable[[str], None] = lambda line: None,
    ) -> Pruned:
        """Delete events recorded longer ago than that which every subscription has passed; tell what stays, and why.

        Whatever a cursor has not passed is kept, however old: one of a subscription that is paused, or that no worker
        serves any more, too. Dead letters hold a copy of their event and keep nothing. On PostgreSQL whole partitions
        are dropped, by a user who owns the tables; what goes row by row goes `rate` a second, at most. Raises
        `ActionRefused` without a reason and for a rate that is none, `ValueError` for an age that is none,
        `DatabaseError` and `SchemaError`; what went until then is gone.
        """
        by = _by(reason, author)
        details: dict[str, Any] = {"older_than": older_than.total_seconds(), "rate": rate}

        async def begin(connection: AsyncConnection) -> int:
            return await self._record(connection, by, "prune", "", details={**details, "finished": False})

        retention.check_age(older_than)
        check_rate("prune", rate)
        recorded = await self._changing(begin)  # by now it is known who began, should it be interrupted
        with self._store.reaching():
            report = await retention.prune(self._store, older_than, rate=rate, on_progress=progress)
        details |= {
            "finished": True,
            "dropped": [dropped.name for dropped in report.dropped],
            "deleted": report.deleted,
            "history": report.history,
            "attempts": report.attempts,
        }

        async def end(connection: AsyncConnection) -> None:
            await connection.execute(
                update(action_table).where(action_table.c.id == recorded).values(details=without_nul(details))
            )

        await self._changing(end)
        return report

    async def rebasable(self) -> Rebase:
        """What `rebase` would do."""
        async with self._reading() as connection:
            return await cluster.plan(connection)

    async def rebase(self, reason: str, *, author: str | None = None) -> Rebase:
        """Go on in the PostgreSQL cluster that the database was restored or replicated into; see `cluster`.

        Safe to repeat. Publishers wait for it, and it waits for those that have written and not committed.
        """
        by = _by(reason, author)

        async def change(connection: AsyncConnection) -> Rebase:
            done = await cluster.rebase(connection)
            if done.needed or done.placed:
                details = {"cluster": done.number, "placed": done.placed}
                await self._record(connection, by, "rebase", "", details=details)
            return done

        return await self._changing(change)

    # --- in the database --------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def _reading(self) -> AsyncIterator[AsyncConnection]:
        await self._ready()
        with self._store.reaching():
            async with self._store.reading() as connection:
                yield connection

    async def _changing(self, change: Callable[[AsyncConnection], Awaitable[T]]) -> T:
        """What `change` returns, in a committed transaction; one that lost a race is run again."""
        await self._ready()
        with self._store.reaching():
            for rerun in range(RERUNS + 1):
                try:
                    async with self._store.writing() as connection:
                        return await change(connection)
                except DBAPIError as error:
                    if rerun == RERUNS or not lost_a_race(error):
                        raise
        raise AssertionError("unreachable")

    async def _subscription(self, connection: AsyncConnection, name: str, *, lock: bool = False) -> Any:
        query = select(subscription_table).where(subscription_table.c.name == name)
        row = (await connection.execute(query.with_for_update() if lock else query)).first()
        if row is None:
            names = list(
                await connection.scalars(select(subscription_table.c.name).order_by(subscription_table.c.name))
            )
            raise ActionRefused(
                f"there is no subscription {name!r} in {self._store.shown_url}: there is {', '.join(names) or 'none'}"
            )
        return row

    async def _lock(self, connection: AsyncConnection, lane: LaneKey) -> bool:
        """Lock the cursor's row of a lane until the transaction ends; False if there is none."""
        found = await connection.execute(
            select(cursor_table.c.token)
            .where(
                cursor_table.c.subscription == lane.subscription,
                cursor_table.c.generation == lane.generation,
                cursor_table.c.lane == lane.lane,
            )
            .with_for_update()
        )
        return found.first() is not None

    async def _lock_all(self, connection: AsyncConnection, name: str) -> dict[LaneKey, tuple[int, UUID | None]]:
        """Lock all cursors of a subscription; return their tokens and owners."""
        found = await connection.execute(
            select(cursor_table)
            .where(cursor_table.c.subscription == name)
            .order_by(cursor_table.c.generation, cursor_table.c.lane)
            .with_for_update()
        )
        return {LaneKey(name, row.generation, row.lane): (row.token, row.owner) for row in found}

    def _one(self, subscription: str, event_id: UUID, generation: int) -> Any:
        return select(exception).where(
            exception.c.event_id == event_id,
            exception.c.subscription == subscription,
            exception.c.generation == generation,
        )

    async def _locked_one(self, connection: AsyncConnection, subscription: str, event_id: UUID, generation: int) -> Any:
        """An exception's row, read after its lane was locked."""
        query = self._one(subscription, event_id, generation)
        row = (await connection.execute(query)).first()
        while row is not None:
            if not await self._lock(connection, lane := _lane(row)):
                raise ActionRefused(f"{subscription} was retired: nobody delivers what it has left")
            row = (await connection.execute(query)).first()
            if row is not None and _lane(row) == lane:
                return row
        raise self._no_exception(subscription, event_id, generation)

    def _no_exception(self, subscription: str, event_id: UUID, generation: int) -> ActionRefused:
        which = f" (generation {generation})" if generation else ""
        return ActionRefused(
            f"event {event_id} has no exception of {subscription}{which} in {self._store.shown_url}: its delivery has "
            "succeeded, or was not begun, or one of the names is wrong"
        )

    def _dead(self, query: Any, which: _Which, limit: int, after: int = 0) -> Any:
        if limit < 1:
            raise ActionRefused(f"limit={limit}: it is 1 or more")
        # in the query's text, so that the index of dead letters is seen to fit
        query = query.where(exception.c.state == literal_column(f"'{DEAD}'"), exception.c.id > after)
        for column, value in (
            (exception.c.subscription, which.subscription),
            (exception.c.error_type, which.error_type),
            (exception.c.fingerprint, which.fingerprint),
        ):
            if value is not None:
                query = query.where(column == value)
        return query.order_by(exception.c.id).limit(limit)

    async def _record(
        self,
        connection: AsyncConnection,
        by: tuple[str, str],
        what: str,
        subscription: str,
        row: Any = None,
        details: Mapping[str, Any] | None = None,
    ) -> int:
        """Keep what is done with who does it and why; return the row's id."""
        author, reason = by
        recorded = await connection.scalar(
            insert(action_table)
            .values(
                at=self._store.later(0),
                author=author,
                action=what,
                subscription=subscription,
                generation=None if row is None else row.generation,
                position=None if row is None else row.position,
                event_id=None if row is None else row.event_id,
                reason=reason,
                details=without_nul(dict(details or {})),
            )
            .returning(action_table.c.id)
        )
        return int(recorded or 0)


async def _pause(connection: AsyncConnection, name: str, paused: bool) -> None:
    await connection.execute(update(subscription_table).where(subscription_table.c.name == name).values(paused=paused))


def _by(reason: str, author: str | None) -> tuple[str, str]:
    """Author and reason, checked."""
    if not reason.strip():
        raise ActionRefused("say why: the reason is kept with what was done, for those who come later")
    if author is None:
        try:
            author = getpass.getuser()
        except (OSError, KeyError):  # a container's user may have no name
            author = f"uid {os.getuid()}"
    return without_nul(author), without_nul(reason.strip())


class _Which(NamedTuple):
    """Dead letters of all these; None: whatever it is."""

    subscription: str | None
    error_type: str | None
    fingerprint: str | None


def _lanes(*columns: Any) -> Any:
    """A query for these columns of exceptions, and for their lanes."""
    return select(*columns, exception.c.subscription, exception.c.generation, exception.c.lane)


def _lane(row: Any) -> LaneKey:
    return LaneKey(row.subscription, row.generation, row.lane)


def _letter(row: Any) -> DeadLetter:
    found = row._mapping
    values = {name: found.get(name) for name in DeadLetter.__dataclass_fields__ if name != "event_type"}
    return DeadLetter(**values, event_type=row.type)


def _before(row: Any) -> dict[str, Any]:
    """What an exception was before it was changed."""
    error = None if row.error_type is None else f"{row.error_type}: {row.error_message}"
    return {"state": row.state, "attempts": row.attempts, "error": error}


def _shown(payload: bytes) -> dict[str, str]:
    """A payload in JSON: as the text that it is, or else in base64."""
    try:
        text = payload.decode()
    except UnicodeDecodeError:
        return {"payload_base64": base64.b64encode(payload).decode()}
    return {"payload": text} if "\x00" not in text else {"payload_base64": base64.b64encode(payload).decode()}


def _check_zone(**moments: datetime | None) -> None:
    for name, moment in moments.items():
        if moment is not None and moment.tzinfo is None:
            raise ActionRefused(f"{name}={moment} is in no time zone: write datetime(…, tzinfo=UTC)")


def _wanted(declared: Subscription, since: datetime | None, until: datetime | None) -> list[Any]:
    """The condition that an event of the log is heard, and was recorded in that time."""
    types = _heard(declared)
    wanted: list[Any] = [] if types is None else [log.c.type.in_(types)]
    if since is not None:
        wanted.append(log.c.recorded_at >= since)
    if until is not None:
        wanted.append(log.c.recorded_at < until)
    return wanted


async def _ends_of(connection: AsyncConnection, wanted: Sequence[Any]) -> tuple[int, int] | None:
    """The first and the last position of the log that are wanted."""
    query = select(log.c.position).where(*wanted).limit(1)
    first = await connection.scalar(query.order_by(log.c.position))
    if first is None:
        return None
    last = await connection.scalar(query.order_by(log.c.position.desc()))
    return first, first if last is None else last


def _heard(declared: Subscription) -> list[str] | None:
    """The stored types that a subscription hears; None for all."""
    if DomainEvent in declared.event_types:
        return None
    names = (name for cls in declared.event_types for name in (cls.__event__.name, *cls.__event__.aliases))
    return sorted(set(names))
