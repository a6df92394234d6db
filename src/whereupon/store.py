"""What a database does for the bus: keep the log, the cursors over it, and the exceptions.

A subscription is a cursor over the log. What a cursor has passed is settled or has a row among the exceptions; of what
lies beyond it, `done` names the positions that are settled already. A cursor belongs to one worker at a time, by a
lease; its token grows with every change of owner, and every write for a subscription names the token it was made under.
No such row, no commit: a worker that lost its lease can't move a cursor or settle a delivery.
"""

from __future__ import annotations

import abc
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any, NamedTuple
from uuid import UUID

import msgspec
from sqlalchemy import Connection, delete, func, insert, or_, select, update
from sqlalchemy.exc import DataError, IntegrityError, ProgrammingError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from whereupon import schema
from whereupon.errors import DatabaseError, DatabaseUnavailableError, LeaseLost
from whereupon.schema import exception, history, without_nul
from whereupon.subscription import Subscription

RUNNING, RETRYING, WAITING, DEAD, SKIPPED = "running", "retrying", "waiting", "dead", "skipped"
OPEN = (RUNNING, RETRYING, WAITING)
"""States of an exception that is not settled."""


class Record(NamedTuple):
    """An event on its way into the log."""

    event_id: UUID
    type: str
    version: int
    payload: bytes
    headers: str
    ran: list[str] | None
    """The IN_TRANSACTION subscriptions that need no delivery from the log."""


class Row(NamedTuple):
    """An event as the log, or a copy of it among the exceptions, holds it."""

    position: int
    event_id: UUID
    type: str
    version: int
    payload: bytes
    headers: str
    recorded_at: datetime


class Due(NamedTuple):
    """An exception whose time has come, its next attempt counted."""

    row: Row
    attempt: int
    interrupted: bool
    """Whether its last attempt was begun and never ended: the worker that ran it is gone."""


@dataclass(slots=True)
class Cursor:
    """A subscription's place in the log, held by this worker under `token`."""

    subscription: str
    lane: int
    token: int
    place: Any
    """How far it is settled: a position, or a snapshot with a page; the store's own."""
    done: set[int] = field(default_factory=set)
    """Positions beyond `place` that are settled."""


class Page(NamedTuple):
    rows: list[Row]
    after: Any
    """The cursor's place once all these are settled."""
    complete: bool
    """Whether nothing more was visible."""


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


class Entry(NamedTuple):
    """One call of a handler, for the history."""

    position: int
    event_id: UUID
    started_at: datetime
    seconds: float
    attempt: int
    outcome: str


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


class Store(abc.ABC):
    """One database. Statements that both databases share are here; how a place in the log works is the subclass's."""

    now: Any
    """The database's clock, in SQL: leases and retries are judged by it alone."""
    upsert: Callable[..., Any]
    """The dialect's INSERT, which knows ON CONFLICT."""
    errors: tuple[type[Exception], ...] = (SQLAlchemyError, OSError)
    """What is raised where the database does not answer, or not as asked."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        self.shown_url = engine.url.render_as_string(hide_password=True)

    # --- connecting -------------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def reading(self) -> AsyncIterator[AsyncConnection]:
        async with self.engine.connect() as connection:
            yield connection

    @asynccontextmanager
    async def writing(self) -> AsyncIterator[AsyncConnection]:
        """A transaction of the worker's own; committed at the end of the block."""
        async with self.engine.begin() as connection:
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

    async def close(self) -> None:  # noqa: B027
        """Give back connections that the store keeps for itself."""

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

    @property
    def connections_for_handlers(self) -> int:
        """How many of the pool's connections handlers may hold at once; two are left to the worker itself."""
        size = getattr(self.engine.pool, "size", None)
        return max(1, size() - 2) if size is not None else 10

    async def database_id(self, connection: AsyncConnection | None = None) -> str:
        statement = select(schema.meta.c.value).where(schema.meta.c.key == "database_id")
        if connection is not None:
            return str(await connection.scalar(statement))
        with self.reaching():
            async with self.reading() as own:
                return str(await own.scalar(statement))

    # --- publishing -------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def register(self, subscriptions: Iterable[Subscription]) -> None:
        """Make a cursor, from now, for each subscription that has none, in a committed transaction of its own."""

    @abc.abstractmethod
    def append(self, connection: Connection, records: Sequence[Record], *, positions: bool) -> dict[UUID, int]:
        """Write events into the log, in order, with one statement; return their positions if asked for."""

    def append_failures(self, connection: Connection, failures: Sequence[tuple[str, Failure]]) -> None:
        connection.execute(insert(exception), [self._exception(name, 0, failure) for name, failure in failures])

    def _exception(self, subscription: str, lane: int, failure: Failure) -> dict[str, Any]:
        row = failure.row
        return {
            "subscription": subscription,
            "lane": lane,
            "position": row.position,
            "event_id": row.event_id,
            "type": row.type,
            "version": row.version,
            "payload": row.payload,
            "headers": row.headers,
            "recorded_at": row.recorded_at,
            **self._changes(failure),
        }

    def _changes(self, failure: Failure) -> dict[str, Any]:
        return {
            "state": failure.state,
            "attempts": failure.attempts,
            "next_at": None if failure.next_in is None else self.later(failure.next_in),
            "error_type": without_nul(failure.error_type),
            "error_message": without_nul(failure.error_message),
            "traceback": without_nul(failure.traceback),
            "updated_at": self.later(0),
        }

    def later(self, seconds: float) -> datetime:
        """This many seconds from now, by the database's clock as far as it is known here."""
        return datetime.now(UTC) + timedelta(seconds=seconds) + self.clock_offset

    clock_offset: timedelta = timedelta(0)
    """How far the database's clock is ahead of this machine's."""

    # --- leases -----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def claim(self, names: Sequence[str], owner: UUID, lease: float) -> list[Cursor]:
        """Take, for `lease` seconds, the cursors of these subscriptions that nobody else holds."""

    @abc.abstractmethod
    async def renew(self, cursors: Sequence[Cursor], owner: UUID, lease: float) -> list[Cursor]:
        """Extend leases; return the cursors that are no longer this worker's."""

    @abc.abstractmethod
    async def release(self, owner: UUID) -> None:
        """Give all leases of a worker back, so that another need not wait for them to run out."""

    # --- reading ----------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def read(self, cursor: Cursor, types: Sequence[str] | None, skip_ran: bool, limit: int) -> Page:
        """The next events of these types (None: all) that are neither settled nor among the exceptions, in order."""

    @abc.abstractmethod
    async def pulse(self) -> bool:
        """Whether the log may have grown since the last pulse; one cheap statement."""

    async def due(self, cursor: Cursor, running: Collection[int], limit: int) -> list[Due]:
        """Exceptions to be tried now; the attempt is recorded before it starts, under the cursor's token.

        One that is marked as running, but at none of the positions that the caller runs, was interrupted.
        """
        async with self.writing() as connection:
            await self.fence(connection, cursor)
            found = await connection.execute(
                select(exception)
                .where(
                    exception.c.subscription == cursor.subscription,
                    exception.c.lane == cursor.lane,
                    exception.c.position.not_in(running),
                    or_(
                        exception.c.state.in_([RETRYING, WAITING]) & (exception.c.next_at <= self.now),
                        exception.c.state == RUNNING,
                    ),
                )
                .order_by(exception.c.next_at, exception.c.id)
                .limit(limit)
            )
            rows = found.all()
            if rows:
                await connection.execute(
                    update(exception)
                    .where(exception.c.id.in_([row.id for row in rows]))
                    .values(state=RUNNING, attempts=exception.c.attempts + 1, next_at=None, updated_at=self.now)
                )
        return [
            Due(
                Row(row.position, row.event_id, row.type, row.version, row.payload, row.headers, row.recorded_at),
                row.attempts + 1,
                row.state == RUNNING,
            )
            for row in rows
        ]

    async def next_due(self, cursor: Cursor) -> float | None:
        """Seconds until the first exception is due, or None if none will be."""
        async with self.reading() as connection:
            at, now = (
                await connection.execute(
                    select(
                        select(func.min(exception.c.next_at))
                        .where(
                            exception.c.subscription == cursor.subscription,
                            exception.c.lane == cursor.lane,
                            exception.c.state.in_([RETRYING, WAITING]),
                        )
                        .scalar_subquery(),
                        self.now_as_time,
                    )
                )
            ).one()
        return None if at is None else max(0.0, (at - now).total_seconds())

    now_as_time: Any

    # --- settling ---------------------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def fence(self, connection: AsyncConnection, cursor: Cursor) -> None:
        """Lock the cursor's row for this transaction, under its token. Raises `LeaseLost`."""

    @abc.abstractmethod
    async def mark_done(self, connection: AsyncConnection, cursor: Cursor, positions: Sequence[int]) -> None:
        """Record positions as settled, under the token. Raises `LeaseLost`."""

    @abc.abstractmethod
    async def move(self, connection: AsyncConnection, cursor: Cursor, place: Any, keep: Collection[int]) -> set[int]:
        """Move the cursor, under the token, and return what is left of `done`. Raises `LeaseLost`.

        Positions that the cursor has passed leave `done`, but for those in `keep`.
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
            statement.on_conflict_do_update(index_elements=["subscription", "position"], set_=changed),
            [self._exception(cursor.subscription, cursor.lane, failure) for failure in failures],
        )

    async def forget(self, connection: AsyncConnection, cursor: Cursor, positions: Sequence[int]) -> None:
        """Drop the exceptions of deliveries that have succeeded since."""
        if positions:
            await connection.execute(
                delete(exception).where(
                    exception.c.subscription == cursor.subscription, exception.c.position.in_(positions)
                )
            )

    async def remember(
        self, connection: AsyncConnection, cursor: Cursor, worker: UUID, entries: Sequence[Entry]
    ) -> None:
        """Append what was done to the history; for people, never for delivery."""
        if not entries:
            return
        await connection.execute(
            insert(history).values(
                subscription=cursor.subscription,
                worker=worker,
                first_position=min(entry.position for entry in entries),
                last_position=max(entry.position for entry in entries),
                entries=msgspec.json.encode(entries).decode(),
                recorded_at=self.later(0),
            )
        )

    # --- what became of events --------------------------------------------------------------------------------------

    @abc.abstractmethod
    async def passed(self, event_ids: Sequence[UUID]) -> list[tuple[UUID, str, int, list[str], str, bool, bool]]:
        """For each event and cursor: event id, type, position, what ran inside, subscription, whether it is past it.

        And whether the event was written before the subscription was registered.
        """

    async def deliveries(
        self, event_ids: Sequence[UUID], heard: Mapping[str, Sequence[str]], *, calls_too: bool = True
    ) -> list[DeliveryState]:
        """The state of each delivery of these events to the subscriptions in `heard` under the event's stored type.

        A subscription that was registered after the event was never owed it, and is left out. Without `calls_too` the
        history is left alone: that is not told then, nor when and how long.
        """
        facts = [fact for fact in await self.passed(event_ids) if fact[4] in heard.get(fact[1], ())]
        positions = sorted({fact[2] for fact in facts})
        if not positions:
            return []
        async with self.reading() as connection:
            found = await connection.execute(select(exception).where(exception.c.event_id.in_(list(event_ids))))
            exceptions = {(row.subscription, row.position): row for row in found}
            calls: dict[tuple[str, int], Entry] = {}
            pages = (
                ()
                if not calls_too
                else await connection.execute(
                    select(history.c.subscription, history.c.entries)
                    .where(
                        history.c.subscription.in_({fact[4] for fact in facts}),
                        history.c.first_position <= positions[-1],
                        history.c.last_position >= positions[0],
                    )
                    .order_by(history.c.id)
                )
            )
            for subscription, entries in pages:
                for entry in msgspec.json.decode(entries, type=list[Entry]):
                    calls[subscription, entry.position] = entry
        states = []
        for event_id, event_type, position, ran, subscription, is_past, is_older in facts:
            row = exceptions.get((subscription, position))
            call = calls.get((subscription, position))
            if calls_too and is_past and is_older and row is None and call is None and subscription not in ran:
                continue
            state = row.state if row is not None else "succeeded" if is_past or subscription in ran else "waiting"
            attempts = row.attempts if row is not None else call.attempt if call else int(state == "succeeded")
            states.append(
                DeliveryState(
                    event_id=event_id,
                    event_type=event_type,
                    subscription=subscription,
                    state=state,
                    attempts=attempts,
                    started_at=call.started_at if call else None,
                    seconds=call.seconds if call else None,
                    error=f"{row.error_type}: {row.error_message}" if row is not None and row.error_type else None,
                )
            )
        return states


def lost(cursor: Cursor) -> LeaseLost:
    return LeaseLost(
        f"the lease of {cursor.subscription} (token {cursor.token}) went to another worker: this worker was away for "
        "longer than its lease. What it had not committed is rolled back, and delivered by the other"
    )
