"""What a database does for the bus: keep the log, the cursors over it, and the exceptions.

A subscription is a cursor over the log, or several, its *lanes*, each with a share of the events. What a cursor has
passed is settled or has a row among the exceptions; of what lies beyond it, `done` names the positions that are settled
already. A cursor belongs to one process at a time; its token grows with every change of owner, and every write for a
lane names the token it was made under. No such row, no commit: a worker that lost a lane can't move its cursor or
settle a delivery of it.
"""

from __future__ import annotations

import abc
import zlib
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, Final, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Connection, and_, delete, func, insert, or_, select, update
from sqlalchemy.engine import Engine
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from whereupon import schema
from whereupon.errors import DatabaseError, DatabaseUnavailableError, LeaseLost, SubscriptionConflictError
from whereupon.fingerprint import fingerprint_of
from whereupon.schema import action, exception, history, log, process, without_nul
from whereupon.schema import cursor as cursor_table
from whereupon.schema import definition as definition_table
from whereupon.schema import subscription as subscription_table
from whereupon.subscription import Start, Subscription

RUNNING, RETRYING, WAITING, PARKED, DEAD, SKIPPED = "running", "retrying", "waiting", "parked", "dead", "skipped"
LOOK: Final = 0.005
"""Seconds between two looks that the thread of a lease takes for SQLite's write lock."""
OPEN = (RUNNING, RETRYING, WAITING, PARKED)
"""States of an exception that is not settled."""
BLOCKING = (*OPEN, DEAD)
"""States in which an exception makes later deliveries of its key wait."""


class Record(NamedTuple):
    """An event on its way into the log."""

    event_id: UUID
    type: str
    version: int
    payload: bytes
    headers: str
    keys: str | None
    """The values of the fields that subscriptions order by, as a JSON object of texts."""
    ran: list[str] | None
    """The IN_TRANSACTION subscriptions that need no delivery from the log."""


class Row(msgspec.Struct, gc=False, frozen=True):
    """An event as the log, or a copy of it among the exceptions, holds it."""

    position: int
    event_id: UUID
    type: str
    version: int
    payload: bytes
    headers: str
    keys: str | None
    ran: str | None
    """The IN_TRANSACTION subscriptions that need no delivery from the log, as a JSON array."""
    recorded_at: datetime


class Due(NamedTuple):
    """An exception whose time has come."""

    row: Row
    attempt: int
    """The attempt that is to be made now; recorded already, unless it was interrupted."""
    interrupted: bool
    """Whether its last attempt was begun and never ended: the worker that ran it is gone."""
    alone: bool
    """Whether that attempt was the only one that ran in its process, so that it is to blame."""
    key: str | None


class Following(NamedTuple):
    """What comes of a key once a delivery of it is settled."""

    blocking: int
    """How many exceptions of the key make later deliveries of it wait."""
    released: bool
    """Whether the first of them was parked, and is not any more."""
    begun: Due | None
    """That one, where it is to be tried without further ado."""


def _due(row: Any) -> Due:
    """An exception as it was before its attempt was recorded."""
    return Due(
        Row(
            row.position, row.event_id, row.type, row.version, row.payload, row.headers, row.keys, None,
            row.recorded_at,
        ),
        row.attempts + (row.state != RUNNING or row.alone),
        row.state == RUNNING,
        bool(row.alone),
        row.key,
    )  # fmt: skip


class LaneKey(NamedTuple):
    subscription: str
    generation: int
    lane: int


class LaneState(NamedTuple):
    """A lane as all workers see it."""

    key: LaneKey
    token: int
    owner: UUID | None
    alive: bool
    """Whether the owner's lease has not run out."""
    in_flight: int | None
    """How many deliveries the owner may have had in flight, if its process is still known."""
    alone: bool
    """Whether it had nothing in flight but what is recorded as running alone."""
    paused: bool
    definition: str
    """Of its subscription, as the latest build has it."""
    registered_at: datetime
    """When its subscription was."""
    last: int | None
    """The last position of a replay; None for what goes on for ever."""
    rate: float | None
    """Deliveries of a replay a second, by all its lanes together."""


class Layout(NamedTuple):
    lanes: list[LaneState]
    workers: list[tuple[UUID, list[str]]]
    """The workers whose leases have not run out, with the subscriptions that they serve."""


class Pulse(NamedTuple):
    """What one look at the database tells."""

    grown: bool
    """Whether the log may have grown since the last one."""
    due: list[LaneKey]
    """Lanes of which the time of some exception has come."""
    restless: bool
    """Whether lanes are free, are to be given up, or workers came or went."""


@dataclass(slots=True)
class Cursor:
    """A lane's place in the log, held by this worker under `token`."""

    key: LaneKey
    token: int
    place: Any
    """How far it is settled: a position, or a snapshot with a page; the store's own."""
    done: set[int] = field(default_factory=set)
    """Positions beyond `place` that are settled."""
    exceptions: set[int] = field(default_factory=set)
    """Positions beyond `place` that are among the exceptions."""
    crashes: int = 0
    """How many of its owners, one after the other, have died with it."""
    blocked: dict[str, int] = field(default_factory=dict)
    """How many exceptions each key has that make later deliveries of it wait."""
    row: str | None = None
    """Where the store last found the cursor's row, as a hint of its own."""
    left: bool = True
    """Whether earlier owners may have left exceptions that wait for their time, or were running."""

    @property
    def subscription(self) -> str:
        return self.key.subscription


class Page(NamedTuple):
    """What was read of the log at once."""

    rows: list[Row]
    window: Any
    """What it is a part of, for `Store.within`."""
    after: Any
    """A cursor's place once all these are settled."""
    complete: bool
    """Whether nothing more was visible."""


class Move(NamedTuple):
    """How a cursor is to change."""

    cursor: Cursor
    place: Any
    add: list[int]
    """Positions beyond the place that are settled now."""
    drop: list[int]
    """Positions in `done` that the place has passed."""


class Failure(NamedTuple):
    """A delivery that did not succeed, and what becomes of it."""

    row: Row
    state: str
    attempts: int
    next_in: float | None
    """Seconds until it is tried again."""
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    key: str | None = None
    alone: bool = False


class Entry(msgspec.Struct, gc=False, frozen=True, array_like=True):
    """One call of a handler, for the history."""

    position: int
    started_at: int
    """Microseconds since 1970, UTC."""
    microseconds: int
    attempt: int
    outcome: str


HISTORY_SPAN: Final = 10_000
"""Positions apart that calls may be which one row of the history keeps: a look for one position passes over no more."""


class Remembered(NamedTuple):
    """Calls of one subscription's handler, to be kept in a row of the history, or a few."""

    subscription: str
    generation: int
    entries: list[Entry]


def _by_stretch(entries: list[Entry]) -> Iterable[list[Entry]]:
    """As they are, or, where their positions lie far apart, those that lie near each other."""
    positions = [entry.position for entry in entries]
    if max(positions) - min(positions) < HISTORY_SPAN:
        return (entries,)
    stretches: dict[int, list[Entry]] = {}
    for entry in entries:
        stretches.setdefault(entry.position // HISTORY_SPAN, []).append(entry)
    return stretches.values()


def in_history(first: int, last: int) -> tuple[Any, ...]:
    """Which rows of the history may tell of calls for these positions: by the index of a subscription's."""
    return (
        history.c.first_position > first - HISTORY_SPAN,
        history.c.first_position <= last,
        history.c.last_position >= first,
    )


def lane_of(key: str | None, position: int, lanes: int) -> int:
    """Which lane of a subscription has this event: equal keys share one. CRC-32, for its being the same everywhere."""
    return (position if key is None else zlib.crc32(key.encode("utf-8", "surrogatepass"))) % lanes


class DeliveryState(NamedTuple):
    """What became of one event for one subscription."""

    event_id: UUID
    event_type: str
    subscription: str
    state: str
    """succeeded, waiting, retrying, running, dead or skipped."""
    attempts: int
    started_at: datetime | None
    seconds: float | None
    error: str | None


class Passed(NamedTuple):
    """What is known of one event on one lane of one subscription."""

    event_id: UUID
    type: str
    position: int
    keys: str | None
    ran: list[str]
    version: int
    payload: bytes
    subscription: str
    lane: int
    lanes: int
    ordered_by: str | None
    past: bool
    """Whether the lane's cursor is past it, or has it among what is done."""
    older: bool
    """Whether the event was written before the subscription was registered."""

    def own_lane(self, key_inside: Callable[[Passed], str | None]) -> int | None:
        """The lane that the event belongs to, or None if its key was not stored, nor can be found inside it."""
        if self.ordered_by is None:
            return lane_of(None, self.position, self.lanes)
        key = key_in(self.keys, self.ordered_by)
        if key is None:
            key = key_inside(self)
        return None if key is None else lane_of(key, self.position, self.lanes)


def key_in(keys: str | None, ordered_by: str) -> str | None:
    """The stored value of the field that a subscription orders by, or None if there is none that can be read."""
    try:
        return None if keys is None else msgspec.json.decode(keys, type=dict[str, str]).get(ordered_by)
    except msgspec.MsgspecError:
        return None  # the event itself tells, if that can be read


def ran_in(ran: str | None) -> list[str]:
    """The subscriptions that a row of the log names as run; none if it can't be read: rather twice than never."""
    try:
        return [] if ran is None else msgspec.json.decode(ran, type=list[str])
    except msgspec.MsgspecError:
        return []


class Store(abc.ABC):
    """One database. Statements that both databases share are here; how a place in the log works is the subclass's."""

    now: Any
    """The database's clock, in SQL: leases and retries are judged by it alone."""
    upsert: Callable[..., Any]
    """The dialect's INSERT, which knows ON CONFLICT."""
    hears_of_deaths = False
    """Whether a pulse tells that the lease of another worker has run out."""
    may_autocommit = False
    """Whether statements may run outside transactions, which saves BEGIN and ROLLBACK around a single one."""
    errors: tuple[type[Exception], ...] = (SQLAlchemyError, OSError)
    """What is raised where the database does not answer, or not as asked."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.lease = 30.0
        """Seconds that a worker's lease holds; told by the bus."""
        self._sibling: AsyncEngine | None = None
        self.use(engine)
        self.shown_url = engine.url.render_as_string(hide_password=True)

    def use(self, engine: AsyncEngine) -> None:
        """Take connections for the bus's own statements from this engine."""
        self.own = engine

    def separate(self) -> None:
        """Have a pool apart until `close`: handlers that hold every connection of the application's stop no worker."""
        if self._sibling is None:
            self._sibling = sibling(self.engine)
            self.use(self._sibling)

    # --- connecting -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        async with self.own.connect() as connection:
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction of the worker's own; committed at the end of the block."""
        async with self.own.begin() as connection:
            yield connection

    async def prepare(self, *, create: bool) -> None:
        """Check that the tables are there and of this build; create them if asked to.

        Raises `DatabaseUnavailableError` or `SchemaError`.
        """
        revision = await self.revision()
        if create and (revision is None or revision < schema.REVISION):
            await self.create_tables()
        else:
            schema.check_revision(revision, self.shown_url)

    async def revision(self) -> int | None:
        """The revision of the tables, or None where there are none."""
        with self.reaching():
            async with self.reading() as connection:
                return await connection.run_sync(schema.revision_of)

    async def close(self) -> None:
        """Give back the connections that the store has for itself."""
        apart, self._sibling = self._sibling, None
        if apart is not None:
            self.use(self.engine)
            await apart.dispose()

    async def create_tables(self) -> None:
        with self.reaching():
            async with schema.taking_turns(), self.writing() as connection:
                await connection.run_sync(schema.upgrade_on)

    @contextmanager
    def reaching(self) -> Iterator[None]:
        """What the database raises in this block becomes a `DatabaseUnavailableError` that says what to look at."""
        try:
            yield
        except (ProgrammingError, IntegrityError, DataError) as error:
            raise DatabaseError(
                f"the database {self.shown_url} refuses: {error.orig}. Check that its user may use whereupon's tables, "
                "and `whereupon db status`"
            ) from error
        except self.errors as error:
            raise DatabaseUnavailableError(self._unavailable(error)) from error

    def _unavailable(self, error: BaseException) -> str:
        reason = str(getattr(error, "orig", None) or error).strip() or type(error).__name__
        return f"can't use the database {self.shown_url}: {reason}. Check that it runs, and that the URL names it"

    @property
    def locking_engine(self) -> AsyncEngine:
        """The engine for a transaction that begins with `take_lock`."""
        return self.engine

    async def take_lock(self, connection: AsyncConnection) -> None:  # noqa: B027
        """Where writers take turns: wait for ours before anything is read."""

    async def exclusively(self, connection: AsyncConnection, name: str, *, wait: bool = True) -> bool:
        """Until the connection's transaction ends, be the only one of all processes that does what has this name.

        What is read after it is seen as those before us have left it. "retention": pruning, and whatever begins to read
        from the past (backfill, replay). False if another has it and `wait` is not wanted.
        """
        await self.take_lock(connection)
        return True

    @property
    def connections_for_handlers(self) -> int:
        """How many of the pool's connections handlers may hold at once."""
        size = getattr(self.engine.pool, "size", None)
        return max(1, size()) if size is not None else 10

    async def database_id(self, connection: AsyncConnection | None = None) -> str:
        statement = select(schema.meta.c.value).where(schema.meta.c.key == "database_id")
        if connection is not None:
            return str(await connection.scalar(statement))
        with self.reaching():
            async with self.reading() as own:
                return str(await own.scalar(statement))

    # --- publishing -------------------------------------------------------------------------------------------------

    async def register(self, subscriptions: Iterable[Subscription], *, adopt: bool = False) -> dict[str, int]:
        """Make the lanes of each subscription that has none, where it starts, in a committed transaction of its own.

        One that was defined otherwise before is redefined, and its workers are fenced off: two builds never serve one
        name with two definitions. A definition that was replaced since is known as the older one, and left alone unless
        told to `adopt` it. Returns how many lanes each of them has. Raises `SubscriptionConflictError`.
        """
        wanted = sorted(subscriptions, key=lambda subscription: subscription.name)
        with self.reaching():
            known = await self._known([subscription.name for subscription in wanted])
            changed = [s for s in wanted if s.name not in known or known[s.name].definition != s.definition]
            if changed:
                async with self.writing() as connection:
                    await self.exclusively(connection, "registering")
                    if any(subscription.start != "now" for subscription in changed):
                        await self.exclusively(connection, "retention")  # what is to be read may not go meanwhile
                    found = await connection.execute(
                        select(subscription_table)
                        .where(subscription_table.c.name.in_([subscription.name for subscription in changed]))
                        .order_by(subscription_table.c.name)
                        .with_for_update()
                    )
                    there = {row.name: row for row in found}
                    await self._make(
                        connection, [subscription for subscription in changed if subscription.name not in there]
                    )
                    for subscription in changed:
                        if (row := there.get(subscription.name)) is not None:
                            await self._redefine(connection, subscription, row, adopt)
                known = await self._known([subscription.name for subscription in wanted])
        return {name: row.lanes for name, row in known.items()}

    async def _known(self, names: Sequence[str]) -> dict[str, Any]:
        async with self.reading() as connection:
            rows = await connection.execute(
                select(subscription_table.c.name, subscription_table.c.lanes, subscription_table.c.definition).where(
                    subscription_table.c.name.in_(names)
                )
            )
            return {row.name: row for row in rows}

    async def _make(self, connection: AsyncConnection, subscriptions: Sequence[Subscription]) -> None:
        """New ones, with few statements, however many they are."""
        if not subscriptions:
            return
        await connection.execute(
            insert(subscription_table).values(created_at=self.now, revision=1, paused=False),
            [
                {"name": s.name, "lanes": s.lanes, "ordered_by": s.ordered_by, "definition": s.definition}
                for s in subscriptions
            ],
        )
        starts: list[Start] = [subscription.start for subscription in subscriptions]
        for start in dict.fromkeys(starts):
            place = await self.place_of(connection, start)
            keys = [LaneKey(s.name, 0, lane) for s in subscriptions if s.start == start for lane in range(s.lanes)]
            await self.lay(connection, keys, place, 0)
        await self._note_definitions(connection, {s.name: s.definition for s in subscriptions}, 1)

    async def _redefine(self, connection: AsyncConnection, subscription: Subscription, row: Any, adopt: bool) -> None:
        name, definition = subscription.name, subscription.definition
        if row.definition == definition:
            return
        if row.ordered_by != subscription.ordered_by:
            raise SubscriptionConflictError(
                f"{name} is ordered by {row.ordered_by or 'nothing'} in {self.shown_url}, and by "
                f"{subscription.ordered_by or 'nothing'} here. That can't change, since it says in which lane an event "
                "waits: give the new one a name of its own (name=…, start=…), and retire the old one with "
                f"`whereupon handlers retire {name}`"
            )
        superseded = await connection.scalar(
            select(definition_table.c.revision).where(
                definition_table.c.subscription == name, definition_table.c.definition == definition
            )
        )
        if superseded is not None and not adopt:
            return
        await connection.execute(
            update(subscription_table)
            .where(subscription_table.c.name == name)
            .values(definition=definition, revision=row.revision + 1)
        )
        await self._note_definitions(connection, {name: definition}, row.revision + 1)
        await connection.execute(
            update(cursor_table)
            .where(cursor_table.c.subscription == name)
            .values(owner=None, token=cursor_table.c.token + 1)
        )

    async def _note_definitions(
        self, connection: AsyncConnection, definitions: Mapping[str, str], revision: int
    ) -> None:
        await connection.execute(
            self.upsert(definition_table).on_conflict_do_update(
                index_elements=["subscription", "definition"], set_={"revision": revision}
            ),
            [
                {"subscription": name, "definition": definition, "revision": revision}
                for name, definition in definitions.items()
            ],
        )

    async def place_of(self, connection: AsyncConnection, start: Start) -> Any:
        """Where a subscription that starts now, at the beginning or at a time is to read from."""
        if start == "now":
            return await self.end(connection)
        if start == "beginning":
            return await self.before(connection, None)
        first = await connection.scalar(
            select(log.c.position).where(log.c.recorded_at >= start).order_by(log.c.position).limit(1)
        )
        return await self.end(connection) if first is None else await self.before(connection, first)

    @abc.abstractmethod
    async def before(self, connection: AsyncConnection, position: int | None) -> Any:
        """The place just before the event at a position, or before all there are (None)."""

    @property
    @abc.abstractmethod
    def finished(self) -> Any:
        """The place that has everything behind it, for ever: of a replay that is over."""

    @abc.abstractmethod
    def reaches(self, place: Any, last: int) -> bool:
        """Whether a replay that has come there has passed the position that is its last."""

    @abc.abstractmethod
    def append(self, connection: Connection, records: Sequence[Record], *, positions: bool) -> list[int]:
        """Write events into the log, in order, with one statement; return their positions if asked for."""

    def append_failures(self, connection: Connection, failures: Sequence[tuple[LaneKey, Failure]]) -> None:
        """Make exceptions of deliveries that failed inside the publisher's transaction, in the lanes that are now."""
        names = {key.subscription for key, _ in failures}
        found = connection.execute(
            select(subscription_table.c.name, subscription_table.c.lanes)
            .where(subscription_table.c.name.in_(names))
            .order_by(subscription_table.c.name)
            .with_for_update(read=True, key_share=True)  # their number stays until the publisher commits
        )
        lanes = {row.name: row.lanes for row in found}
        connection.execute(
            insert(exception),
            [
                self._exception(
                    key._replace(lane=lane_of(None, failure.row.position, lanes[key.subscription]))
                    if key.subscription in lanes
                    else key,
                    failure,
                )
                for key, failure in failures
            ],
        )

    def _exception(self, key: LaneKey, failure: Failure) -> dict[str, Any]:
        row = failure.row
        return {
            "subscription": key.subscription,
            "generation": key.generation,
            "lane": key.lane,
            "position": row.position,
            "event_id": row.event_id,
            "type": row.type,
            "version": row.version,
            "payload": row.payload,
            "headers": row.headers,
            "keys": row.keys,
            "key": failure.key,
            "recorded_at": row.recorded_at,
            **self._changes(failure),
        }

    def _changes(self, failure: Failure) -> dict[str, Any]:
        return {
            "state": failure.state,
            "attempts": failure.attempts,
            "alone": failure.alone,
            "next_at": None if failure.next_in is None else self.later(failure.next_in),
            "error_type": without_nul(failure.error_type),
            "error_message": without_nul(failure.error_message),
            "traceback": without_nul(failure.traceback),
            "fingerprint": fingerprint_of(failure.error_type or "", failure.error_message, failure.traceback)
            if failure.error_type is not None or failure.state == DEAD
            else None,
            "updated_at": self.later(0),
        }

    def later(self, seconds: float) -> datetime:
        """This many seconds from now, by the database's clock as far as it is known here."""
        return datetime.now(UTC) + timedelta(seconds=seconds)

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def layout(self, names: Collection[str]) -> Layout:
        """The lanes of these subscriptions, and the workers that there are."""
        alive = and_(process.c.id == cursor_table.c.owner, process.c.lease_until > self.now)
        async with self.reading() as connection:
            lanes = await connection.execute(
                select(
                    cursor_table.c.subscription,
                    cursor_table.c.generation,
                    cursor_table.c.lane,
                    cursor_table.c.token,
                    cursor_table.c.owner,
                    alive.label("alive"),
                    process.c.in_flight,
                    process.c.alone,
                    subscription_table.c.paused,
                    subscription_table.c.definition,
                    subscription_table.c.created_at,
                    cursor_table.c.last,
                    cursor_table.c.rate,
                )
                .select_from(
                    cursor_table.join(
                        subscription_table, subscription_table.c.name == cursor_table.c.subscription
                    ).outerjoin(process, process.c.id == cursor_table.c.owner)
                )
                .where(cursor_table.c.subscription.in_(names))
                .order_by(cursor_table.c.subscription, cursor_table.c.generation, cursor_table.c.lane)
            )
            workers = await connection.execute(
                select(process.c.id, process.c.serves)
                .where(process.c.in_flight > 0, process.c.lease_until > self.now)
                .order_by(process.c.id)
            )
            return Layout(
                [
                    LaneState(
                        LaneKey(*row[:3]), row.token, row.owner, bool(row.alive), row.in_flight, bool(row.alone),
                        bool(row.paused), row.definition, row.created_at, row.last, row.rate,
                    )
                    for row in lanes
                ],
                [(row.id, msgspec.json.decode(row.serves, type=list[str])) for row in workers],
            )  # fmt: skip

    @abc.abstractmethod
    async def claim(self, lanes: Sequence[LaneState], owner: UUID) -> list[Cursor]:
        """Take those of these lanes that are still as they were seen, and nobody's; tell where they stand."""

    @abc.abstractmethod
    async def end(self, connection: AsyncConnection) -> Any:
        """The place that has everything behind it that is committed now."""

    @abc.abstractmethod
    async def standing(self, connection: AsyncConnection, names: Sequence[str]) -> list[Cursor]:
        """The cursors of subscriptions, with what is done beyond their places, and no exceptions."""

    async def mark_alone(self, connection: AsyncConnection, owner: UUID, alone: bool) -> None:
        """Tell who takes over from this worker whether only what is recorded as running alone is in flight."""
        await connection.execute(update(process).where(process.c.id == owner).values(alone=alone))

    async def halt(self, name: str, row: Row, reason: str) -> bool:
        """Pause a subscription in front of an event; False if it was before, and somebody had it go on since."""
        async with self.writing() as connection:
            paused = await connection.scalar(
                select(subscription_table.c.paused).where(subscription_table.c.name == name).with_for_update()
            )
            known = select(action.c.id).where(
                action.c.subscription == name, action.c.event_id == row.event_id, action.c.action == "pause"
            )
            if await connection.scalar(known.limit(1)) is not None:
                return bool(paused)
            await connection.execute(
                update(subscription_table).where(subscription_table.c.name == name).values(paused=True)
            )
            await connection.execute(
                insert(action).values(
                    at=self.later(0), author="whereupon", action="pause", subscription=name, generation=0,
                    position=row.position, event_id=row.event_id, reason=without_nul(reason), details={},
                )
            )  # fmt: skip
            return True

    @abc.abstractmethod
    async def lay(self, connection: AsyncConnection, keys: Sequence[LaneKey], place: Any, token: int) -> None:
        """Make these lanes anew, nobody's, all at one place."""

    async def release(self, owner: UUID, lanes: Sequence[LaneKey] | None = None) -> None:
        """Give lanes of a worker (None: all) back, so that another need not wait for its lease to run out."""
        async with self.writing() as connection:
            mine = cursor_table.c.owner == owner
            for key in [None] if lanes is None else lanes:
                await connection.execute(
                    update(cursor_table)
                    .where(mine if key is None else mine & _at(cursor_table, key))
                    .values(owner=None)
                )

    async def serve(self, owner: UUID, names: Sequence[str]) -> None:
        """Tell the other workers which subscriptions this one serves."""
        async with self.writing() as connection:
            await connection.execute(
                update(process).where(process.c.id == owner).values(serves=msgspec.json.encode(sorted(names)).decode())
            )

    # --- reading ----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def read(self, place: Any, types: Sequence[str] | None, limit: int, toward: Any = None) -> Page:
        """The next events of these types (None: all) after a place, in order; none beyond the place `toward`."""

    @abc.abstractmethod
    def within(self, window: Any, position: int) -> Any:
        """The place in the midst of a window at which everything up to this position is settled."""

    @abc.abstractmethod
    def is_later(self, place: Any, other: Any) -> bool:
        """Whether a place is further than another, in whole windows."""

    @abc.abstractmethod
    async def pulse(self, owner: UUID, names: Sequence[str]) -> Pulse:
        """What has changed since the last pulse, for a worker that serves these; one cheap statement."""

    async def calm(self, cursor: Cursor) -> None:
        """Note that a lane's owner has lived for a while."""
        async with self.writing() as connection:
            await connection.execute(
                update(cursor_table)
                .where(_at(cursor_table, cursor.key), cursor_table.c.token == cursor.token)
                .values(crashes=0)
            )

    async def due(self, connection: AsyncConnection, cursor: Cursor, active: Collection[int], limit: int) -> list[Due]:
        """Exceptions to be tried now; the attempt is recorded before it starts, under the cursor's token.

        One that is marked as running, but at none of the positions that are `active` here, was interrupted: for that
        nothing is recorded yet.
        """
        await self.fence(connection, cursor)
        found = await connection.execute(
            select(exception)
            .where(
                _at(exception, cursor.key),
                exception.c.position.not_in(active),
                exception.c.state.in_([RETRYING, WAITING, RUNNING]),  # for the index: dead ones may be many
                or_(
                    exception.c.state.in_([RETRYING, WAITING]) & (exception.c.next_at <= self.now),
                    exception.c.state == RUNNING,
                ),
            )
            .order_by(exception.c.next_at, exception.c.id)
            .limit(limit)
        )
        rows = found.all()
        begun = [row.id for row in rows if row.state != RUNNING]
        if begun:
            await connection.execute(
                update(exception)
                .where(exception.c.id.in_(begun))
                .values(
                    state=RUNNING, attempts=exception.c.attempts + 1, alone=False, next_at=None, updated_at=self.now
                )
            )
        return [_due(row) for row in rows]

    async def next_due(self, cursors: Sequence[Cursor]) -> float | None:
        """Seconds until the first exception of these lanes is due, or None if none will be."""
        names = {cursor.subscription for cursor in cursors}
        held = {cursor.key for cursor in cursors}
        async with self.reading() as connection:
            found = await connection.execute(
                select(
                    exception.c.subscription,
                    exception.c.generation,
                    exception.c.lane,
                    func.min(exception.c.next_at),
                    self.now_as_time,
                )
                .where(exception.c.subscription.in_(names), exception.c.state.in_([RETRYING, WAITING]))
                .group_by(exception.c.subscription, exception.c.generation, exception.c.lane)
            )
            waits = [(at - now).total_seconds() for *key, at, now in found if LaneKey(*key) in held and at is not None]
        return max(0.0, min(waits)) if waits else None

    now_as_time: Any

    async def load_exceptions(self, connection: AsyncConnection, cursors: Sequence[Cursor]) -> None:
        """Fill in, for lanes just claimed, which keys are blocked and which exceptions lie beyond their places."""
        if not cursors:
            return
        by_key = {cursor.key: cursor for cursor in cursors}
        names = sorted({cursor.subscription for cursor in cursors})
        found = await connection.execute(
            select(exception.c.subscription, exception.c.generation, exception.c.lane, exception.c.key, func.count())
            .where(exception.c.subscription.in_(names), exception.c.key.is_not(None), exception.c.state.in_(BLOCKING))
            .group_by(exception.c.subscription, exception.c.generation, exception.c.lane, exception.c.key)
        )
        for *lane, key, number in found:
            if (cursor := by_key.get(LaneKey(*lane))) is not None:
                cursor.blocked[key] = number
        for *lane, position in await self._exceptions_beyond(connection, names):
            if (cursor := by_key.get(LaneKey(*lane))) is not None:
                cursor.exceptions.add(position)
        left = await connection.execute(
            select(cursor_table.c.subscription, cursor_table.c.generation, cursor_table.c.lane).where(
                cursor_table.c.subscription.in_(names),
                select(exception.c.id)
                .where(
                    exception.c.subscription == cursor_table.c.subscription,
                    exception.c.generation == cursor_table.c.generation,
                    exception.c.lane == cursor_table.c.lane,
                    exception.c.state.in_([RETRYING, WAITING, RUNNING]),
                )
                .exists(),
            )
        )
        lanes_left = {LaneKey(*lane) for lane in left}
        for cursor in cursors:
            cursor.left = cursor.key in lanes_left

    @abc.abstractmethod
    async def _exceptions_beyond(self, connection: AsyncConnection, names: Sequence[str]) -> list[tuple[Any, ...]]:
        """Subscription, generation, lane and position of the exceptions that lie beyond their cursors."""

    # --- settling ---------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def settle(self, moves: Sequence[Move], worker: UUID, remembered: Sequence[Remembered]) -> set[LaneKey]:
        """Move cursors and keep the history of it, in one transaction; return those that were still held."""

    @abc.abstractmethod
    async def fence(self, connection: AsyncConnection, cursor: Cursor) -> None:
        """Lock the cursor's row for this transaction, under its token. Raises `LeaseLost`."""

    async def take_turn(self, connection: AsyncConnection, cursor: Cursor) -> None:  # noqa: B027
        """Before a handler's transaction is settled: wait for the database's lock, where all writers share one."""

    @abc.abstractmethod
    async def move(
        self, connection: AsyncConnection, move: Move, worker: UUID, remembered: Sequence[Remembered] = ()
    ) -> None:
        """Move a cursor, under its token, and keep the history of that. Raises `LeaseLost`.

        On PostgreSQL a session that then idles in the transaction, with the row locked, is ended by the server.
        """

    @abc.abstractmethod
    async def done_now(self, connection: AsyncConnection, cursor: Cursor) -> set[int]:
        """The positions recorded as settled, as of now; after `fence`, in its transaction."""

    async def keep_failures(self, connection: AsyncConnection, cursor: Cursor, failures: Sequence[Failure]) -> None:
        """Make or change the exceptions of these deliveries, after `fence`; doing it twice is doing it once."""
        if not failures:
            return
        statement = self.upsert(exception)
        changed = {name: statement.excluded[name] for name in self._changes(failures[0])}
        await connection.execute(
            statement.on_conflict_do_update(index_elements=["subscription", "generation", "position"], set_=changed),
            [self._exception(cursor.key, failure) for failure in failures],
        )

    async def kept(self, connection: AsyncConnection, cursor: Cursor, positions: Sequence[int]) -> set[int]:
        """Which of these have an exception."""
        found = await connection.scalars(
            select(exception.c.position).where(_at(exception, cursor.key), exception.c.position.in_(positions))
        )
        return set(found)

    async def forget(self, connection: AsyncConnection, cursor: Cursor, positions: Sequence[int]) -> int:
        """Drop the exceptions of deliveries that have succeeded since; return how many there were."""
        if not positions:
            return 0
        gone = await connection.execute(
            delete(exception).where(_at(exception, cursor.key), exception.c.position.in_(positions))
        )
        return gone.rowcount

    async def unpark(self, connection: AsyncConnection, cursor: Cursor, keys: Collection[str]) -> int:
        """Make the first parked delivery of each of these keys due, unless another of the key is still open."""
        return sum([(await self.follow(connection, cursor, key)).released for key in keys])

    async def follow(self, connection: AsyncConnection, cursor: Cursor, key: str, *, begin: bool = False) -> Following:
        """Make the first parked delivery of a key due, unless another of the key is still open.

        With `begin` its attempt is recorded as `due` would do it, and it is to be made once this is committed.
        """
        of_key = (_at(exception, cursor.key), exception.c.key == key, exception.c.state.in_(BLOCKING))
        number = select(func.count()).where(*of_key).scalar_subquery()
        first = (
            await connection.execute(
                select(exception, number.label("blocking")).where(*of_key).order_by(exception.c.id).limit(1)
            )
        ).first()
        if first is None:
            return Following(0, False, None)
        if first.state != PARKED:
            return Following(first.blocking, False, None)
        changes: dict[str, Any] = {"state": RETRYING, "next_at": self.later(0)}
        if begin:
            changes = {"state": RUNNING, "attempts": first.attempts + 1, "alone": False}
        changed = await connection.execute(
            update(exception)
            .where(exception.c.id == first.id, exception.c.state == PARKED)
            .values(updated_at=self.later(0), **changes)
        )
        released = changed.rowcount == 1
        return Following(first.blocking, released, _due(first) if begin and released else None)

    async def remember(self, connection: AsyncConnection, worker: UUID, remembered: Sequence[Remembered]) -> None:
        """Append what was done to the history; for people, never for delivery."""
        if remembered:
            await connection.execute(insert(history), list(self._pages(worker, remembered)))

    def _pages(self, worker: UUID, remembered: Sequence[Remembered]) -> Iterator[dict[str, Any]]:
        """The rows of the history for what was done."""
        for one in remembered:
            for entries in _by_stretch(one.entries):
                positions = [entry.position for entry in entries]
                yield {
                    "subscription": one.subscription,
                    "generation": one.generation,
                    "worker": worker,
                    "first_position": min(positions),
                    "last_position": max(positions),
                    "entries": msgspec.json.encode(entries).decode(),
                    "recorded_at": self.later(0),
                }

    # --- what became of events --------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def passed(self, event_ids: Sequence[UUID]) -> list[Passed]:
        """For each event and lane: what is known of the event there."""

    async def deliveries(
        self,
        event_ids: Sequence[UUID],
        heard: Mapping[str, Sequence[str]],
        *,
        key_inside: Callable[[Passed], str | None] = lambda _: None,
        calls_too: bool = True,
    ) -> list[DeliveryState]:
        """The state of each delivery of these events to the subscriptions in `heard` under the event's stored type.

        A subscription that was registered after the event was never owed it, and is left out. Without `calls_too` the
        history is left alone: that is not told then, nor when and how long. `key_inside` finds, by decoding it, the key
        of an event whose publisher did not know that somebody orders by it. Of an event that was pruned only exceptions
        are left to tell, such as a dead letter.
        """
        facts: dict[tuple[UUID, str], Passed] = {}
        for passed in await self.passed(event_ids):
            if passed.subscription not in heard.get(passed.type, ()):
                continue
            lane = passed.own_lane(key_inside)
            known = facts.get((passed.event_id, passed.subscription))
            if lane is None and known is not None:
                passed = passed._replace(past=passed.past and known.past)
            if lane is None or lane == passed.lane:
                facts[passed.event_id, passed.subscription] = passed
        positions = sorted({fact.position for fact in facts.values()})
        async with self.reading() as connection:
            found = await connection.execute(
                select(exception).where(exception.c.event_id.in_(list(event_ids)), exception.c.generation == 0)
            )
            exceptions = {(row.subscription, row.position): row for row in found}
            calls: dict[tuple[str, int], Entry] = {}
            pages = (
                ()
                if not calls_too or not positions
                else await connection.execute(
                    select(history.c.subscription, history.c.entries)
                    .where(
                        history.c.subscription.in_({fact.subscription for fact in facts.values()}),
                        history.c.generation == 0,
                        *in_history(positions[0], positions[-1]),
                    )
                    .order_by(history.c.id + 0)  # SQLite would walk through all of it in this order, else
                )
            )
            for subscription, entries in pages:
                for entry in msgspec.json.decode(entries, type=list[Entry]):
                    calls[subscription, entry.position] = entry
        states = [
            DeliveryState(row.event_id, row.type, row.subscription, row.state, row.attempts, None, None, _error_of(row))
            for row in sorted(exceptions.values(), key=lambda row: row.position)
            if (row.event_id, row.subscription) not in facts and row.subscription in heard.get(row.type, ())
        ]
        for fact in facts.values():
            row = exceptions.get((fact.subscription, fact.position))
            call = calls.get((fact.subscription, fact.position))
            inside = fact.subscription in fact.ran
            if calls_too and fact.past and fact.older and row is None and call is None and not inside:
                continue
            state = row.state if row is not None else "succeeded" if fact.past or inside else "waiting"
            attempts = row.attempts if row is not None else call.attempt if call else int(state == "succeeded")
            states.append(
                DeliveryState(
                    event_id=fact.event_id,
                    event_type=fact.type,
                    subscription=fact.subscription,
                    state=state,
                    attempts=attempts,
                    started_at=datetime.fromtimestamp(call.started_at / 1e6, UTC) if call else None,
                    seconds=call.microseconds / 1e6 if call else None,
                    error=_error_of(row),
                )
            )
        return states


def _error_of(row: Any) -> str | None:
    return f"{row.error_type}: {row.error_message}" if row is not None and row.error_type else None


def _at(table: Any, key: LaneKey) -> Any:
    return and_(
        table.c.subscription == key.subscription, table.c.generation == key.generation, table.c.lane == key.lane
    )


def sibling(engine: AsyncEngine) -> AsyncEngine:
    """An engine with a pool of its own that connects as that one does. What listens on the engine is not taken over."""
    sync = engine.sync_engine
    return AsyncEngine(Engine(sync.pool.recreate(), sync.dialect, sync.url, hide_parameters=True))


def lost(cursor: Cursor) -> LeaseLost:
    return LeaseLost(
        f"lane {cursor.key.lane} of {cursor.subscription} (token {cursor.token}) went to another worker: this worker "
        "was away for longer than its lease. What it had not committed is rolled back, and delivered by the other"
    )
