"""The story of one event: who published it, what caused it, what it caused, and what became of each delivery.

For people who ask why something did not happen. It reads what delivery leaves behind, among it the history of calls,
which is kept for 7 days; nothing here changes anything.
"""

from __future__ import annotations

import asyncio
import difflib
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import msgspec
from sqlalchemy import String, cast, func, or_, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.action import Action
from whereupon.audit import AuditEventHandler
from whereupon.context import NO_METADATA, Metadata, decode_metadata
from whereupon.errors import ActionRefused
from whereupon.event import DomainEvent
from whereupon.registry import Registered, registered
from whereupon.schema import action as action_table
from whereupon.schema import audit_log, exception, history, log, process, workflow
from whereupon.schema import cursor as cursor_table
from whereupon.store import BLOCKING, PARKED, RETRYING, WAITING, Entry, Passed, Store, in_history, ran_in
from whereupon.subscription import Delivery, Retry, Subscription, Subscriptions
from whereupon.workflow import State

SEARCHED: Final = 100_000
"""Events of the log, from an event on, among which those that it caused are looked for."""
AROUND: Final = timedelta(hours=1)
"""How far apart two times of one transaction may be."""
PAGE: Final = 500
OF_ALL: Final = ("event_id", "occurred_at")
"""Fields that every event has."""
NEAREST: Final = 3
"""Subscriptions that are named although they do not hear an event."""
ALIKE: Final = 0.6
"""From which ratio on (`difflib`, Ratcliff and Obershelp 1988) two names of events are alike."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Mentioned:
    """An event that another one's story mentions."""

    event_id: UUID
    event_type: str | None
    """None if it is not in the log (any more)."""
    recorded_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class CallStory:
    """One call of a handler that has ended."""

    attempt: int
    started_at: datetime
    seconds: float
    outcome: str
    worker: str
    """`host:pid`, or the worker's id once its process is gone."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeliveryStory:
    """What became of an event for one subscription."""

    subscription: str
    generation: int
    """0, or the number of the replay."""
    state: str
    """succeeded, waiting, running, retrying, parked, dead, skipped; or `not owed`, `in publish`, `after commit`."""
    why: str
    """What that means here, in a sentence, with the way out where there is one."""
    attempts: int
    calls: Sequence[CallStory] = ()
    next_at: datetime | None = None
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    key: str | None = None
    """What it is ordered by has this value, where it is known."""
    behind: Mentioned | None = None
    """The first of its key, which it waits for."""
    actions: Sequence[Action] = ()
    """What operators did to this delivery."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NearMiss:
    """A subscription that does not hear an event, and one that it does hear."""

    subscription: str
    hears: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptStory:
    """The attempt that an event belongs to."""

    workflow: str
    state: str
    attempted_id: UUID
    outcome_id: UUID | None
    reason: str | None
    opened_at: datetime
    closed_at: datetime | None


@dataclass(frozen=True, slots=True, kw_only=True)
class EventStory:
    event_id: UUID
    event_type: str
    version: int
    position: int | None
    """None for an event that was pruned, of which a copy among the exceptions is left."""
    made_at: datetime | None
    """When the event was made, as its id says (UUIDv7)."""
    recorded_at: datetime
    """When it was written into the log, by the database's clock."""
    committed_at: datetime | None
    """Where the server keeps it: PostgreSQL with `track_commit_timestamp = on`."""
    metadata: Metadata
    payload: str
    attempt: AttemptStory | None
    cause: Mentioned | None
    caused: Sequence[Mentioned]
    searched: int
    """How many later events were looked at for that."""
    searched_all: bool
    """Whether that was all of them."""
    deliveries: Sequence[DeliveryStory]
    near_misses: Sequence[NearMiss]
    """Subscriptions that do not hear it, and hear something with a name like its."""
    deaf: int
    """How many subscriptions do not hear it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Try:
    """One attempt of a delivery that keeps failing."""

    attempt: int
    after: float
    """Seconds from the first failure until it begins, at the latest: each wait is drawn from 0 up to its longest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerStory:
    """How one subscription of this build serves an event type."""

    subscription: str
    delivery: str
    required: bool
    hears_everything: bool
    ordered_by: str | None
    timeout: float | None
    tries: Sequence[Try]
    """Empty where nothing is tried again."""
    concurrency: int
    batch: int
    rate: float | None
    within: float | None
    """Its promise, in seconds: how long after a publish it has settled the event at the latest."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TypeStory:
    event_type: str
    version: int
    aliases: Sequence[str]
    defined_in: str
    fields: Mapping[str, str]
    audit: str | None
    stands_alone: bool
    handlers: Sequence[HandlerStory]
    near_misses: Sequence[NearMiss]
    statements: int
    """SQL statements of whereupon's that one publish in a session takes, before what its handlers execute."""
    statements_why: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoggedEvent:
    """An event as the log holds it."""

    position: int
    event_id: UUID
    event_type: str
    version: int
    recorded_at: datetime
    metadata: Metadata
    payload: str
    """The stored fields, as text."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditEntry:
    """A row of the audit trail."""

    id: UUID
    occurred_at: datetime
    event_id: UUID
    event_type: str
    action: str
    outcome: str
    category: str | None
    user_id: UUID | None
    resource_type: str | None
    resource_id: str | None
    actor: str | None
    ip_address: str | None
    user_agent: str | None
    correlation_id: UUID | None
    context: Mapping[str, Any]


class Storyteller:
    def __init__(
        self,
        store: Store,
        subscriptions: Subscriptions,
        class_of: Callable[[str], type[DomainEvent] | None],
        key_inside: Callable[[Passed], str | None],
        ready: Callable[[], Awaitable[None]],
    ) -> None:
        self._store = store
        self._subscriptions = subscriptions
        self._class_of = class_of
        self._key_inside = key_inside
        self._ready = ready

    # --- of an event ------------------------------------------------------------------------------------------------

    async def of_event(self, event_id: UUID, *, searched: int = SEARCHED) -> EventStory:
        """`searched` is among how many later events those are looked for that it caused.

        Raises `ActionRefused` for an event that there is no trace of, saying what its id tells.
        """
        await self._ready()
        with self._store.reaching():
            async with self._store.reading() as connection:
                row = (await connection.execute(self._logged(log.c.event_id == event_id))).first()
                copies = await self._copies(connection, event_id)
                if row is None and not copies:
                    raise ActionRefused(await self._no_trace(connection, event_id))
                source: Any = row if row is not None else copies[0]
                metadata = _metadata(source.headers)
                caused, looked_at, all_ = await self._caused(connection, event_id, source.position, searched)
                known = {one.name: one for one in await registered(connection)}
                committed = None if row is None else await self._committed(connection, row.position)
                attempt = await self._attempt(connection, event_id, source.recorded_at)
                cause = await self._mentioned(connection, metadata.causation_id)
            stories = await self._deliveries(source, row is not None, known)
        deaf = {k.name: k.types for k in known.values() if not k.hears(source.type, self._class_of)}
        return EventStory(
            event_id=event_id,
            event_type=source.type,
            version=source.version,
            position=None if row is None else row.position,
            made_at=made_at(event_id),
            recorded_at=source.recorded_at,
            committed_at=committed,
            metadata=metadata,
            payload=source.payload.decode("utf-8", "backslashreplace"),
            attempt=attempt,
            cause=cause,
            caused=caused,
            searched=looked_at,
            searched_all=all_,
            deliveries=stories,
            near_misses=near_misses(source.type, {name: types or () for name, types in deaf.items()}),
            deaf=len(deaf),
        )

    def _logged(self, which: Any) -> Any:
        columns = [column for column in log.c if column.name not in ("keys", "ran")]
        return select(*columns, cast(log.c.ran, String).label("ran")).where(which)

    async def _no_trace(self, connection: AsyncConnection, event_id: UUID) -> str:
        here = self._store.shown_url
        said = f"there is no event {event_id} in {here}"
        if (
            found := (
                await connection.execute(
                    select(audit_log.c.event_type, audit_log.c.occurred_at)
                    .where(audit_log.c.event_id == event_id)
                    .limit(1)
                )
            ).first()
        ) is not None:
            return (
                f"{said} any more: the audit trail knows it as {found.event_type} of {_shown(found.occurred_at)}, and "
                "the log was pruned since"
            )
        first = (await connection.execute(select(log.c.recorded_at).order_by(log.c.position).limit(1))).first()
        made = made_at(event_id)
        if first is None:
            return f"{said}: its log is empty. Is this the database that it was published in?"
        if made is None:
            return f"{said}: is it the id of an event (event_id), and of one that was published here?"
        if made < first.recorded_at:
            return (
                f"{said}: by its id it was made at {_shown(made)}, and the log begins with what was recorded at "
                f"{_shown(first.recorded_at)}. If it was published here, it was pruned"
            )
        return (
            f"{said}: by its id it was made at {_shown(made)}, and the log reaches back to "
            f"{_shown(first.recorded_at)}. So the transaction that it was published in was rolled back, or is still "
            "open, or it was published in another database"
        )

    async def _caused(
        self, connection: AsyncConnection, event_id: UUID, position: int, searched: int
    ) -> tuple[list[Mentioned], int, bool]:
        """What names it as its cause among the events after it, how many were looked at, and whether it was all."""
        last = await connection.scalar(select(func.max(log.c.position))) or position
        end = min(last, position + searched)
        found = await connection.execute(
            select(log.c.event_id, log.c.type, log.c.recorded_at)
            .where(
                log.c.position > position,
                log.c.position <= end,
                log.c.headers.like(f'%"causation_id":"{event_id}"%'),
            )
            .order_by(log.c.position)
        )
        return (
            [Mentioned(event_id=row.event_id, event_type=row.type, recorded_at=row.recorded_at) for row in found],
            end - position,
            end == last,
        )

    async def _committed(self, connection: AsyncConnection, position: int) -> datetime | None:
        if self._store.engine.dialect.name != "postgresql":
            return None
        if (await connection.scalar(text("SELECT current_setting('track_commit_timestamp')"))) != "on":
            return None
        at: datetime | None = await connection.scalar(
            text("SELECT pg_xact_commit_timestamp(xmin) FROM whereupon_log WHERE position = :position"),
            {"position": position},
        )
        return at

    async def _attempt(self, connection: AsyncConnection, event_id: UUID, recorded_at: datetime) -> AttemptStory | None:
        row = (await connection.execute(select(workflow).where(workflow.c.id == event_id))).first()
        if row is None:  # then it may be an outcome, which is recorded in the transaction that closes its attempt
            row = (
                await connection.execute(
                    select(workflow).where(
                        workflow.c.outcome_id == event_id,
                        workflow.c.closed_at.between(recorded_at - AROUND, recorded_at + AROUND),
                    )
                )
            ).first()
        return None if row is None else attempt_story(row)

    async def _mentioned(self, connection: AsyncConnection, event_id: UUID | None) -> Mentioned | None:
        if event_id is None:
            return None
        row = (
            await connection.execute(select(log.c.type, log.c.recorded_at).where(log.c.event_id == event_id).limit(1))
        ).first()
        if row is None:
            return Mentioned(event_id=event_id, event_type=None, recorded_at=None)
        return Mentioned(event_id=event_id, event_type=row.type, recorded_at=row.recorded_at)

    # --- its deliveries ---------------------------------------------------------------------------------------------

    async def _copies(self, connection: AsyncConnection, event_id: UUID) -> Sequence[Any]:
        found = await connection.execute(
            select(exception).where(exception.c.event_id == event_id).order_by(exception.c.id)
        )
        return found.all()

    async def _deliveries(self, source: Any, logged: bool, known: Mapping[str, Registered]) -> list[DeliveryStory]:
        hearing = sorted(name for name, one in known.items() if one.hears(source.type, self._class_of))
        # A delivery may fail or succeed while this is read: in this order what is read later explains what was before.
        states = {
            state.subscription: state
            for state in await self._store.deliveries(
                [source.event_id], {source.type: hearing}, key_inside=self._key_inside
            )
        }
        lanes: dict[str, int | None] = {}
        for passed in await self._store.passed([source.event_id]):
            lanes[passed.subscription] = passed.own_lane(self._key_inside)
        ran = ran_in(source.ran) if logged else []
        async with self._store.reading() as connection:
            rows = {(row.subscription, row.generation): row for row in await self._copies(connection, source.event_id)}
            calls = await self._calls(connection, source.position, known)
            actions = await self._actions(connection, source.event_id)
            stories = []
            for subscription, generation in sorted(
                {*((name, 0) for name in hearing), *rows, *calls}, key=lambda pair: (pair[0], pair[1])
            ):
                if subscription not in known:
                    continue  # retired since
                key = (subscription, generation)
                state = states.get(subscription) if generation == 0 else None
                stories.append(
                    await self._delivery(
                        connection,
                        known[subscription],
                        generation,
                        state=state.state if state is not None else None,
                        attempts=state.attempts if state is not None else 0,
                        row=rows.get(key),
                        lane=lanes.get(subscription),
                        calls=calls.get(key, []),
                        actions=actions.get(key, []),
                        inside=subscription in ran,
                    )
                )
        cls = self._class_of(source.type)
        for declared in self._subscriptions.hearing(cls) if cls is not None else ():
            if declared.name not in known:
                stories.append(self._undocumented(declared))
        return sorted(stories, key=lambda story: (story.subscription, story.generation))

    def _undocumented(self, declared: Subscription) -> DeliveryStory:
        if declared.delivery is Delivery.AFTER_COMMIT:
            return DeliveryStory(
                subscription=declared.name,
                generation=0,
                state="after commit",
                why="It runs right after the commit in the process that published, and nothing is stored of it: a "
                "failure is in that process's log.",
                attempts=0,
            )
        return DeliveryStory(
            subscription=declared.name,
            generation=0,
            state="not owed",
            why="This build declares it, and no process that does has ever started on this database: from its start on "
            'it gets what is published then; start="beginning" gives it the past, too.',
            attempts=0,
        )

    async def _delivery(
        self,
        connection: AsyncConnection,
        known: Registered,
        generation: int,
        *,
        state: str | None,
        attempts: int,
        row: Any,
        lane: int | None,
        calls: Sequence[CallStory],
        actions: Sequence[Action],
        inside: bool,
    ) -> DeliveryStory:
        if row is not None:
            return await self._exceptional(connection, row, calls, actions)
        if state is None and calls:
            state, attempts = calls[-1].outcome, calls[-1].attempt
        if state is None:
            why = (
                f"It was registered at {_shown(known.created_at)}, after this event was published, and began with what "
                f"came later. `whereupon handlers replay {known.name}` delivers the past."
                if generation == 0
                else "That replay has not come to it."
            )
            return DeliveryStory(
                subscription=known.name,
                generation=generation,
                state="not owed" if generation == 0 else WAITING,
                why=why,
                attempts=0,
                actions=actions,
            )
        if state == WAITING:
            why = await self._waits_for(connection, known, lane)
        elif inside:
            state, why = "in publish", "It ran inside publish, in the publisher's transaction, which has committed."
        elif not calls:
            why = "Its cursor has passed it; the history of calls, kept for 7 days, has nothing of it (any more)."
        else:
            why = ""
        return DeliveryStory(
            subscription=known.name,
            generation=generation,
            state=state,
            why=why,
            attempts=attempts,
            calls=calls,
            actions=actions,
        )

    async def _waits_for(self, connection: AsyncConnection, known: Registered, lane: int | None) -> str:
        if known.paused:
            said = await connection.scalar(
                select(action_table.c.reason)
                .where(action_table.c.subscription == known.name, action_table.c.action == "pause")
                .order_by(action_table.c.id.desc())
                .limit(1)
            )
            because = f" ({said})" if said else ""
            return f"{known.name} is paused{because}: `whereupon handlers resume {known.name}`."
        mine = [cursor_table.c.subscription == known.name, cursor_table.c.generation == 0]
        if lane is not None:
            mine.append(cursor_table.c.lane == lane)
        alive = (process.c.id == cursor_table.c.owner) & (process.c.lease_until > self._store.now)
        owner = (
            await connection.execute(
                select(process.c.host, process.c.pid).select_from(cursor_table.join(process, alive)).where(*mine)
            )
        ).first()
        if owner is not None:
            return f"The worker {owner.host}:{owner.pid} has its lane, and has yet to come to it, or runs it right now."
        serving = [
            row.serves
            for row in await connection.execute(
                select(process.c.serves).where(process.c.in_flight > 0, process.c.lease_until > self._store.now)
            )
        ]
        if not serving:
            return "No worker runs on this database: start one, `whereupon worker module:bus`."
        if not any(known.name in msgspec.json.decode(serves, type=list[str]) for serves in serving):
            return (
                f"{_counted(len(serving), 'worker runs', 'workers run')}, and none of them knows {known.name}: start "
                "one of a build that declares it."
            )
        return "A worker that serves it has yet to take its lane: after a crash that is one lease, 30 s by default."

    async def _exceptional(
        self, connection: AsyncConnection, row: Any, calls: Sequence[CallStory], actions: Sequence[Action]
    ) -> DeliveryStory:
        behind = await self._first_of_key(connection, row) if row.state in (PARKED, WAITING) else None
        known_here = row.subscription in self._subscriptions
        of = f" of {self._subscriptions[row.subscription].retry.max_attempts}" if known_here else ""
        show = f"`whereupon dead show {row.subscription} {row.event_id}`"
        match row.state:
            case "running":
                why = f"Attempt {row.attempts}{of} began at {_shown(row.updated_at)} and has not ended."
            case "retrying" if row.next_at is not None:
                why = f"Attempt {row.attempts}{of} failed; the next begins at {_shown(row.next_at)}."
            case "dead":
                why = f"It used up its attempts ({row.attempts}). {show} tells more; `whereupon dead retry` or `skip`."
            case "skipped":
                skip = next((act for act in reversed(actions) if act.action == "skip"), None)
                why = (
                    f"{skip.author} skipped it: {skip.reason}"
                    if skip is not None
                    else "Its handler discarded it (Discard)."
                )
            case _ if behind is not None:
                why = f"It waits behind {behind.event_id}, an earlier one of its key."
            case _:
                why = "It waits for its turn."
        return DeliveryStory(
            subscription=row.subscription,
            generation=row.generation,
            state=row.state,
            why=why,
            attempts=row.attempts,
            calls=calls,
            next_at=row.next_at if row.state in (RETRYING, WAITING) else None,
            error_type=row.error_type,
            error_message=row.error_message,
            traceback=row.traceback,
            key=row.key,
            behind=behind,
            actions=actions,
        )

    async def _first_of_key(self, connection: AsyncConnection, row: Any) -> Mentioned | None:
        if row.key is None:
            return None
        first = (
            await connection.execute(
                select(exception.c.event_id, exception.c.type, exception.c.recorded_at)
                .where(
                    exception.c.subscription == row.subscription,
                    exception.c.generation == row.generation,
                    exception.c.lane == row.lane,
                    exception.c.key == row.key,
                    exception.c.id < row.id,
                    exception.c.state.in_(BLOCKING),
                )
                .order_by(exception.c.id)
                .limit(1)
            )
        ).first()
        if first is None:
            return None
        return Mentioned(event_id=first.event_id, event_type=first.type, recorded_at=first.recorded_at)

    async def _calls(
        self, connection: AsyncConnection, position: int, names: Iterable[str]
    ) -> dict[tuple[str, int], list[CallStory]]:
        pages = (
            await connection.execute(
                select(history)
                .where(
                    history.c.subscription.in_(sorted(names)),  # the index begins with it
                    *in_history(position, position),
                )
                .order_by(history.c.id + 0)  # SQLite would walk through all of it in this order, else
            )
        ).all()
        processes = {
            row.id: f"{row.host}:{row.pid}"
            for row in await connection.execute(
                select(process.c.id, process.c.host, process.c.pid).where(
                    process.c.id.in_({page.worker for page in pages})
                )
            )
        }
        calls: dict[tuple[str, int], list[CallStory]] = {}
        for page in pages:
            for entry in msgspec.json.decode(page.entries, type=list[Entry]):
                if entry.position == position:
                    calls.setdefault((page.subscription, page.generation), []).append(
                        CallStory(
                            attempt=entry.attempt,
                            started_at=datetime.fromtimestamp(entry.started_at / 1e6, UTC),
                            seconds=entry.microseconds / 1e6,
                            outcome=entry.outcome,
                            worker=processes.get(page.worker, str(page.worker)),
                        )
                    )
        return calls

    async def _actions(self, connection: AsyncConnection, event_id: UUID) -> dict[tuple[str, int], list[Action]]:
        rows = await connection.execute(
            select(action_table).where(action_table.c.event_id == event_id).order_by(action_table.c.id)
        )
        found: dict[tuple[str, int], list[Action]] = {}
        for row in rows:
            found.setdefault((row.subscription, row.generation or 0), []).append(Action(**row._mapping))
        return found

    # --- of many ----------------------------------------------------------------------------------------------------

    async def events(
        self,
        *,
        types: Sequence[str] = (),
        since: datetime | None = None,
        until: datetime | None = None,
        related_to: UUID | None = None,
        before: int | None = None,
        limit: int = 100,
    ) -> list[LoggedEvent]:
        """Events of the log, the newest first: `before` is the position of the last one that was seen.

        `related_to` is an event: itself, and what goes back to the same one (an equal correlation id); for that all of
        the log that the other conditions leave is looked through.
        """
        await self._ready()
        query = self._logged(log.c.position < before) if before is not None else self._logged(text("1 = 1"))
        if types:
            query = query.where(log.c.type.in_(self._names(types)))
        if since is not None:
            query = query.where(log.c.recorded_at >= since)
        if until is not None:
            query = query.where(log.c.recorded_at < until)
        with self._store.reaching():
            async with self._store.reading() as connection:
                if related_to is not None:
                    root = await self._correlation_of(connection, related_to)
                    query = query.where(
                        or_(log.c.headers.like(f'%"correlation_id":"{root}"%'), log.c.event_id.in_({root, related_to}))
                    )
                rows = await connection.execute(query.order_by(log.c.position.desc()).limit(limit))
                return [_event(row) for row in rows]

    def _names(self, names: Sequence[str]) -> list[str]:
        """Stored names, with those that their classes had before."""
        found = set(names)
        for name in names:
            if (cls := self._class_of(name)) is not None:
                found.update((cls.__event__.name, *cls.__event__.aliases))
        return sorted(found)

    async def _correlation_of(self, connection: AsyncConnection, event_id: UUID) -> UUID:
        headers = await connection.scalar(select(log.c.headers).where(log.c.event_id == event_id).limit(1))
        return event_id if headers is None else _metadata(headers).correlation_id or event_id

    async def follow(
        self, types: Sequence[str] = (), *, last: int = 0, every: float = 0.5
    ) -> AsyncGenerator[LoggedEvent, None]:
        """The `last` events that are there, and others as they are committed, until the caller stops asking.

        None is left out, however late its transaction commits. The database is asked each `every` seconds.
        """
        await self._ready()
        names = self._names(types) if types else None
        async with self._store.reading() as connection:
            place = await self._store.end(connection)
        seen = set()
        for event in reversed(await self.events(types=types, limit=last) if last > 0 else []):
            seen.add(event.event_id)
            yield event
        while True:
            page = await self._store.read(place, names, PAGE)
            for row in page.rows:
                if row.event_id not in seen:  # committed between the two looks
                    yield _event(row)
            place = page.after
            if page.complete:
                await asyncio.sleep(every)

    async def attempts(
        self,
        *,
        state: State | None = None,
        name: str | None = None,
        opened_before: datetime | None = None,
        limit: int = 100,
    ) -> list[AttemptStory]:
        """Attempts at workflows, the newest first. Closed ones are kept for 7 days."""
        await self._ready()
        query = select(workflow).order_by(workflow.c.opened_at.desc(), workflow.c.id.desc()).limit(limit)
        if state is not None:
            query = query.where(workflow.c.state == state.value)
        if name is not None:
            query = query.where(workflow.c.name == name)
        if opened_before is not None:
            query = query.where(workflow.c.opened_at < opened_before)
        with self._store.reaching():
            async with self._store.reading() as connection:
                return [attempt_story(row) for row in await connection.execute(query)]

    async def audit(
        self,
        *,
        user_id: UUID | None = None,
        action: str | None = None,
        event_id: UUID | None = None,
        resource: tuple[str, str] | None = None,
        ip_address: str | None = None,
        correlation_id: UUID | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        limit: int = 100,
    ) -> list[AuditEntry]:
        """The audit trail, the newest first. `resource` is a type and an id; `until` goes on after a page."""
        await self._ready()
        table = audit_log.c
        query = select(audit_log).order_by(table.occurred_at.desc(), table.id.desc()).limit(limit)
        for column, wanted in (
            (table.user_id, user_id),
            (table.action, action),
            (table.event_id, event_id),
            (table.ip_address, ip_address),
            (table.correlation_id, correlation_id),
        ):
            if wanted is not None:
                query = query.where(column == wanted)
        if resource is not None:
            query = query.where(table.resource_type == resource[0], table.resource_id == resource[1])
        if since is not None:
            query = query.where(table.occurred_at >= since)
        if until is not None:
            query = query.where(table.occurred_at < until)
        with self._store.reaching():
            async with self._store.reading() as connection:
                return [
                    AuditEntry(**{name: row._mapping[name] for name in AuditEntry.__dataclass_fields__})
                    for row in await connection.execute(query)
                ]

    # --- of a type --------------------------------------------------------------------------------------------------

    def of_type(self, name: str) -> TypeStory:
        """How this build serves an event type, by its stored name or its class's. Raises `ActionRefused`."""
        cls = self._class_of(name)
        if cls is None:
            names = sorted({known.__event__.name for s in self._subscriptions for known in s.event_types})
            like = difflib.get_close_matches(name, names, n=NEAREST, cutoff=ALIKE)
            raise ActionRefused(
                f"this build knows no event {name!r}"
                + (f": is it {' or '.join(like)}?" if like else ". Is the module imported that defines it?")
            )
        event = cls.__event__
        hearing = self._subscriptions.hearing(cls)
        others = {
            s.name: {known.__event__.name for known in s.event_types} for s in self._subscriptions if s not in hearing
        }
        why = ["1 that writes it into the log"]
        statements = 1
        if any(s.required and s.recorder is None for s in hearing):
            statements += 2
            why.append("2 around all that follows: SAVEPOINT and RELEASE, since a handler is required")
        for subscription in hearing:
            if isinstance(subscription.recorder, AuditEventHandler) and event.audit is None:
                continue
            if subscription.recorder is not None:
                statements += 1
                why.append(f"1 that writes for {subscription.name}, with the log")
            elif subscription.delivery is Delivery.IN_TRANSACTION:
                statements += 2
                why.append(f"2 around {subscription.name}: SAVEPOINT and RELEASE")
        return TypeStory(
            event_type=event.name,
            version=event.version,
            aliases=event.aliases,
            defined_in=f"{cls.__module__}.{cls.__qualname__}",
            fields={f: _type_name(event.types[f]) for f in event.fields if f not in OF_ALL},
            audit=event.audit,
            stands_alone=event.stands_alone,
            handlers=[_handler(subscription) for subscription in sorted(hearing, key=lambda s: s.name)],
            near_misses=near_misses(event.name, others),
            statements=statements,
            statements_why=why,
        )


def _handler(subscription: Subscription) -> HandlerStory:
    retried = subscription.delivery is not Delivery.AFTER_COMMIT
    return HandlerStory(
        subscription=subscription.name,
        delivery=subscription.delivery.value,
        required=subscription.required,
        hears_everything=DomainEvent in subscription.event_types,
        ordered_by=subscription.ordered_by,
        timeout=subscription.timeout,
        tries=tries_of(subscription.retry) if retried and subscription.recorder is None else (),
        concurrency=subscription.concurrency,
        batch=subscription.batch,
        rate=subscription.rate,
        within=subscription.within,
    )


def tries_of(retry: Retry) -> list[Try]:
    after, found = 0.0, []
    for attempt in range(1, retry.max_attempts + 1):
        found.append(Try(attempt=attempt, after=after))
        after += retry.ceiling(attempt)
    return found


def near_misses(name: str, others: Mapping[str, Sequence[str] | set[str] | frozenset[str]]) -> list[NearMiss]:
    """Subscriptions that hear something with a name like this one, the likest first."""
    likeness: list[tuple[float, NearMiss]] = []
    for subscription, heard in others.items():
        best = max(((difflib.SequenceMatcher(None, name, one).ratio(), one) for one in heard), default=None)
        if best is not None and best[0] >= ALIKE:
            likeness.append((best[0], NearMiss(subscription=subscription, hears=best[1])))
    likeness.sort(key=lambda pair: (-pair[0], pair[1].subscription))
    return [miss for _, miss in likeness[:NEAREST]]


def made_at(event_id: UUID) -> datetime | None:
    """When a UUIDv7 was made (RFC 9562: its first 48 bits are milliseconds since 1970); None for other ids."""
    if event_id.version != 7:
        return None
    return datetime(1970, 1, 1, tzinfo=UTC) + timedelta(milliseconds=event_id.int >> 80)


def attempt_story(row: Any) -> AttemptStory:
    return AttemptStory(
        workflow=row.name,
        state=row.state,
        attempted_id=row.id,
        outcome_id=row.outcome_id,
        reason=row.reason,
        opened_at=row.opened_at,
        closed_at=row.closed_at,
    )


def _event(row: Any) -> LoggedEvent:
    return LoggedEvent(
        position=row.position,
        event_id=row.event_id,
        event_type=row.type,
        version=row.version,
        recorded_at=row.recorded_at,
        metadata=_metadata(row.headers),
        payload=row.payload.decode("utf-8", "backslashreplace"),
    )


def _metadata(headers: str) -> Metadata:
    try:
        return decode_metadata(headers)
    except msgspec.MsgspecError:
        return NO_METADATA  # somebody wrote into the table by hand; the rest of the story stands


def _type_name(hint: Any) -> str:
    return hint.__name__ if isinstance(hint, type) else str(hint).replace("typing.", "")


def _shown(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"


def _counted(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"
