"""The durable bus: events are stored in the transaction they tell of, and delivered from there."""

from __future__ import annotations

import asyncio
import atexit
import contextlib
import os
import re
import tempfile
import weakref
from asyncio import AbstractEventLoop
from collections import deque
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence, Set
from contextlib import nullcontext
from contextvars import Context, copy_context
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Final, Protocol, Self
from uuid import UUID

import msgspec
from sqlalchemy import URL, Connection, Engine, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, NoSuchModuleError, OperationalError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool, StaticPool

from whereupon import _staging, cluster, schema
from whereupon._dispatch import Call, Runner
from whereupon._postgres import PostgresStore
from whereupon._sqlite import SQLiteStore, configure
from whereupon.action import Operator
from whereupon.attempt import Attempts, DurableAttempt
from whereupon.bell import Listener, Ringer, channel_of
from whereupon.bus import Subscribing
from whereupon.codec import Codec, JsonCodec
from whereupon.context import Metadata, encode_metadata, handling, metadata_for
from whereupon.doctor import Check, Doctor
from whereupon.errors import (
    BusStateError,
    Discard,
    EventDecodingError,
    ForeignSessionError,
    PublishError,
    RetryLater,
    SessionRequiredError,
    UnsupportedDatabaseError,
)
from whereupon.event import DomainEvent, event_class
from whereupon.lag import Lag, Lags
from whereupon.lane import key_of
from whereupon.logs import message_of, trace_of
from whereupon.memory import session_required
from whereupon.observer import FAILED, SUCCEEDED, Observer, Observing, Run
from whereupon.store import (
    DEAD,
    OPEN,
    RETRYING,
    SKIPPED,
    DeliveryState,
    Failure,
    LaneKey,
    Passed,
    Record,
    Row,
    Store,
    lane_of,
    sibling,
)
from whereupon.story import EventStory, Storyteller, TypeStory
from whereupon.subscription import Delivery, Subscription
from whereupon.worker import Worker
from whereupon.workflow import A, Attempt, P, S, Workflow, attempt_closed_by

_DRIVERS: Final = {
    "sqlite": ("sqlite+aiosqlite:///app.db", "whereupon[sqlite]"),
    "postgresql": ("postgresql+asyncpg://user@host/database", "whereupon[postgres]"),
}


@dataclass(eq=False, slots=True)
class _Staged:
    """An event in a transaction that has not ended."""

    event: DomainEvent
    metadata: Metadata
    payload: bytes
    headers: str
    context: Context
    ran: list[str] = field(default_factory=list)
    """The IN_TRANSACTION subscriptions that need no delivery from the log."""
    keys: dict[str, str] = field(default_factory=dict)
    """The values of the fields that subscriptions order by."""
    failures: list[tuple[Subscription, BaseException]] = field(default_factory=list)
    records: list[tuple[Recorder, Any]] = field(default_factory=list)
    """What is written together with the log."""
    runs: list[Run] = field(default_factory=list)
    """Calls in the transaction that observers are to be told of once it is committed."""


class Recorder(Protocol):
    """An IN_TRANSACTION handler that writes its records with the log, all those of a transaction at once."""

    delivery: Delivery

    def prepare(self, event: DomainEvent, metadata: Metadata, /) -> Any:
        """The record of an event that is being published, or None; what it raises, `publish` raises."""
        ...

    def record(self, connection: Connection, records: Sequence[Any], /) -> None:
        """Write records in the connection's transaction, just before its commit."""
        ...


class DurableReceipt:
    """What `publish` on an `EventBus` returns."""

    def __init__(self, bus: EventBus, events: tuple[DomainEvent, ...]) -> None:
        self._bus = bus
        self.events = events

    async def settled(self, timeout: float | None = 30.0) -> None:
        """Wait until every subscription has settled these events: succeeded, dead or skipped.

        Call it after the commit. It waits for this bus's AFTER_COMMIT handlers, too, and sees events that any process
        delivers. Raises `TimeoutError` after `timeout` seconds, naming what is still open.
        """
        await self._bus.wait_settled(self.events, timeout)


class EventBus(Subscribing):
    """Publishes events in the transaction of the change they tell of, and delivers them until each is settled.

    `database` is the URL of the application's database (`sqlite+aiosqlite:///app.db`, `postgresql+asyncpg://…`) or its
    `AsyncEngine`. `async with bus` creates SQLite's tables, registers the subscriptions and, unless `deliver` is False,
    runs a worker in this process. `in_flight` caps the calls that a crash could repeat; a dead worker's deliveries are
    free after `lease` seconds; `poll_interval` is how long an event of another process may go unnoticed, in seconds;
    `drain_timeout` how long leaving the block waits for handlers. `create_tables` None means: on SQLite only. With
    `retain` workers prune the log by themselves, about hourly, of events older than that which every subscription has
    passed; None (the default) leaves that to `prune`, so the log grows until somebody calls it.

    Workers on PostgreSQL hear of other processes' events by LISTEN. Where `database` leads through a pooler in
    transaction mode (PgBouncer), which can't pass that on, `listen_url` is a URL of the same database that goes
    straight to the server. With it the bus prepares no statements on the connections it makes to `database`.

    A bus belongs to the event loop that it is entered on. An engine given to it stays the caller's to dispose of.
    """

    def __init__(
        self,
        database: str | URL | AsyncEngine,
        *,
        logger: Any = None,
        codec: Codec | None = None,
        listen_url: str | URL | None = None,
        deliver: bool = True,
        in_flight: int = 100,
        lease: float = 30.0,
        poll_interval: float | None = None,
        drain_timeout: float = 10.0,
        create_tables: bool | None = None,
        retain: timedelta | None = None,
    ) -> None:
        super().__init__(logger)
        self.engine, self._owns_engine = _engine_of(database, through_pooler=listen_url is not None)
        sqlite = self.engine.dialect.name == "sqlite"
        self._listen_url = None if listen_url is None else _listen_url(self.engine, listen_url)
        self._store: Store
        self._ringer: Ringer | None = None
        if sqlite:
            self._store = SQLiteStore(self.engine)
        else:
            self._store = store = PostgresStore(self.engine)
            self._ringer = Ringer(store)
        self._listener: Listener | None = None
        self._codec: Codec = codec if codec is not None else JsonCodec()
        self._deliver = deliver
        poll = poll_interval if poll_interval is not None else 0.1 if sqlite else 0.5
        for name, value, least in (
            ("in_flight", in_flight, 1),
            ("lease", lease, 1),
            ("drain_timeout", drain_timeout, 0),
            ("poll_interval", poll, 0.001),
        ):
            if not least <= value < float("inf"):
                raise ValueError(f"EventBus({name}={value}): it is at least {least}")
        if retain is not None and retain <= timedelta(0):
            raise ValueError(f"EventBus(retain={retain}): it is an age, such as timedelta(days=30)")
        self._retain = retain
        self._in_flight = in_flight
        self._lease = self._store.lease = lease
        self._poll_interval = poll
        self._drain_timeout = drain_timeout
        self._create_tables = sqlite if create_tables is None else create_tables
        self._registered: set[str] = set()
        self._lanes: dict[str, int] = {}
        """How many lanes each registered subscription has."""
        self._prepared = False
        self._reached = False
        self._preparing: asyncio.Lock | None = None
        self._loop: AbstractEventLoop | None = None
        self._worker: Worker | None = None
        self._attempts = Attempts(self)
        self._runner = Runner()
        self._due: deque[tuple[set[str], set[str], list[tuple[_Staged, list[Call]]]]] = deque()
        """Committed: the types to wake the worker for, the subscriptions that failed inside the transaction, and the
        handlers to run with the next turn of the loop."""
        self._entered = False
        self._own_transactions = False
        self._known_engines: weakref.WeakKeyDictionary[Engine, str] = weakref.WeakKeyDictionary()
        self.operator = Operator(self._store, self.subscriptions, self._codec, self.class_of, self._reachable)
        """What operators do: pause, resume, settle dead letters, retire, change lanes."""
        looks = (self._store, self.subscriptions, self.class_of, self._key_inside)
        self.stories = Storyteller(*looks, self._reachable)
        """What became of events and attempts, for people: an event's story, lists of events, the audit trail."""
        self._lags = Lags(*looks)
        self._doctor = Doctor(self._store, self.subscriptions, self.class_of, self._lags)
        _staging.watch(self.engine.sync_engine)

    def __repr__(self) -> str:
        return f"<EventBus {self._store.shown_url} with {len(self.subscriptions)} subscriptions>"

    @property
    def is_running(self) -> bool:
        """Whether it was entered, and not left yet."""
        return self._entered

    # --- publishing -------------------------------------------------------------------------------------------------

    async def publish(
        self,
        *events: DomainEvent,
        session: Any = None,
        metadata: Metadata | Mapping[str, Any] | None = None,
    ) -> DurableReceipt:
        """Stage events in the transaction of `session`: they exist if it commits, and handlers run after that.

        Without a session only events that stand alone (*Attempted*, *Failed*) are published, in a transaction of their
        own that is committed on return. Raises `SessionRequiredError`, `EventEncodingError` or another `PublishError`
        before anything is staged or run. What a required IN_TRANSACTION handler raises passes through, and all that
        this call has staged, and its handlers have written, is undone.
        """
        self._check_events(events)
        if (attempt := attempt_closed_by(events)) is not None:
            receipt: DurableReceipt = await attempt.publish_outcome(events, session, metadata)
            return receipt
        for event in events:
            self._know(type(event))
        if session is None:
            self._check_alone(events)
            self._check_loop()
            self._refuse_deadlock()
            try:
                async with AsyncSession(self.engine, expire_on_commit=False) as own, own.begin():
                    return await self._stage_async(events, own, metadata)
            except OperationalError as error:
                if "database is locked" in str(error.orig) and self._transaction_is_open():
                    raise PublishError(_DEADLOCK) from error
                raise
        owner = _staging.async_session(session)
        self._check_loop()
        return await self._stage_async(events, owner, metadata)

    def stage(self, *events: DomainEvent, session: Any, metadata: Metadata | Mapping[str, Any] | None = None) -> None:
        """The sync form of `publish`, for a `Session`: no handler runs in the transaction, all are served from the log.

        The bus must have been entered, or have published, before: this can't register subscriptions. Raises
        `PublishError` if an IN_TRANSACTION handler is required.
        """
        self._check_events(events)
        if attempt_closed_by(events) is not None:
            raise PublishError(
                "stage can't await the outcome of the attempt under way: await attempt.succeeded(…, session=session)"
            )
        owner = _staging.sync_session(session)
        if not self._is_ready():
            raise BusStateError("stage needs a bus that has been started: enter it once with `async with bus`")
        if self._observing is None:
            self._stage_sync(events, owner, [metadata_for(metadata) for _ in events])
            return
        publications = self._observing.publishing(events, metadata_for(metadata))
        try:
            self._stage_sync(events, owner, [publication.metadata for publication in publications])
        except BaseException as error:
            self._observing.staged(publications, error)
            raise
        self._observing.staged(publications)

    def _stage_sync(self, events: tuple[DomainEvent, ...], owner: Session, given: Sequence[Metadata]) -> None:
        staged = []
        for event, metadata in zip(events, given, strict=True):
            self._know(type(event))
            hearing = self.subscriptions.hearing(type(event))
            for subscription in hearing:
                if subscription.required and subscription.recorder is None:
                    raise PublishError(
                        f"{subscription.name} is required in the transaction of {type(event).__name__}, but async, and "
                        "stage can't await it: publish on an AsyncSession"
                    )
            if self._loop is None and any(s.delivery is Delivery.AFTER_COMMIT for s in hearing):
                raise BusStateError("AFTER_COMMIT handlers run on the loop of a bus that is entered: enter it first")
            staged.append(self._staged(event, metadata))
        _refuse_twins(events)
        connection = _staging.connection_of(owner)
        self._check_database(connection)
        _staging.stage(owner, connection, self, staged)

    def workflow(self, workflow: Workflow[P, A, S], /, *args: P.args, **fields: P.kwargs) -> Attempt[A, S]:
        """One attempt: `async with bus.workflow(UserRegistration, email=…) as attempt`.

        `fields` are those of *Attempted*, which is committed before the block begins. In the block, await
        `attempt.succeeded(…, session=session)` in the transaction of the work, or publish *Succeeded* on this bus,
        which is the same. A block that is left without that, or with an exception, has failed: *Failed* says so, with
        a reason, and the exception is raised again. If this process dies, a worker publishes what closes the attempt.
        An outcome has the correlation and causation ids of its attempt. Raises what `publish` raises.
        """
        return DurableAttempt(self._attempts, workflow, workflow.attempt_with(*args, **fields))

    def _check_alone(self, events: tuple[DomainEvent, ...]) -> None:
        for event in events:
            if type(event).__event__.stands_alone or self._own_transactions:
                continue
            hearing = self.subscriptions.hearing(type(event))
            first = next((s for s in hearing if s.delivery is Delivery.IN_TRANSACTION), None)
            first = first or next((s for s in hearing if s.session_parameter is not None), None)
            if first is None:
                name = type(event).__name__
                raise SessionRequiredError(
                    f"EventBus requires a database session: publish {name} with the session of the change it tells of, "
                    f"`await bus.publish({name}(…), session=session)`, so that both commit or neither does. An event "
                    f"that tells of no change may stand alone: class {name}(DomainEvent, stands_alone=True)"
                )
            raise SessionRequiredError(session_required(first, event))

    def _check_loop(self) -> None:
        loop = asyncio.get_running_loop()
        if self._loop is None or (self._loop.is_closed() and not self._entered):
            if self._loop is not None:
                if self._owns_engine:
                    # connections of a closed loop can't be used, nor closed: they are left to the garbage collector
                    self.engine.sync_engine.dispose(close=False)
                if self._ringer is not None:
                    self._ringer.forget()
                self._lose_due(BusStateError("its event loop was closed"))
            self._loop, self._preparing = loop, asyncio.Lock()
        elif self._loop is not loop:
            raise BusStateError(
                "this bus is used on another event loop than it belongs to, and so are its connections: make one bus "
                "per loop, or leave `async with bus` (or await bus.close()) before the first loop ends"
            )

    def _refuse_deadlock(self) -> None:
        if self._transaction_is_open(writing=True):
            raise PublishError(_DEADLOCK)

    def _transaction_is_open(self, *, writing: bool = False) -> bool:
        """Whether this task has a transaction open on the bus's SQLite database, or one that holds the write lock."""
        return self.engine.dialect.name == "sqlite" and _staging.task_has_transaction(
            self.engine.sync_engine, writing=writing
        )

    def _is_ready(self) -> bool:
        return self._prepared and all(s.name in self._registered for s in self.subscriptions)

    async def _ready(self) -> None:
        """Tables and subscriptions exist, committed, before the first event does."""
        if self._is_ready():
            return
        assert self._preparing is not None
        async with self._preparing:
            if self._is_ready():
                return
            registering = [s for s in self.subscriptions if s.delivery is not Delivery.AFTER_COMMIT]
            if self._transaction_is_open() and await self._must_write({s.name for s in registering}):
                raise BusStateError(
                    "the bus must register its subscriptions first, but this task has a transaction open, and SQLite "
                    "has one writer at a time. Start the bus at the start of the program: `async with bus` (with "
                    "EventBus(…, deliver=False) it only publishes)"
                )
            if not self._prepared:
                await self._store.prepare(create=self._create_tables)
                self._database_id = await self._store.database_id()
                if self._ringer is not None:
                    self._ringer.channel = channel_of(self._database_id)
                self._prepared = True
            if any(s.name not in self._registered for s in registering):
                self._lanes = await self._store.register(registering)
            self._registered = {s.name for s in self.subscriptions}

    async def _reachable(self) -> None:
        """Tables are there; nothing is registered, so that whoever only looks leaves no trace."""
        self._check_loop()
        if not self._prepared and not self._reached:
            await self._store.prepare(create=False)
            self._reached = True

    async def _must_write(self, names: set[str]) -> bool:
        if await self._store.revision() != schema.REVISION:
            return True
        async with self._store.reading() as connection:
            return not names <= set(await connection.scalars(select(schema.subscription.c.name)))

    def _staged(self, event: DomainEvent, metadata: Metadata) -> _Staged:
        context = copy_context()
        context.run(handling.set, (event.event_id, metadata))
        staged = _Staged(event, metadata, self._codec.encode(event), encode_metadata(metadata), context)
        for subscription in self.subscriptions.hearing(type(event)):
            if subscription.ordered_by is not None:
                staged.keys[subscription.ordered_by] = key_of(event, subscription.ordered_by)
            if subscription.recorder is not None:
                staged.ran.append(subscription.name)
                record = subscription.recorder.prepare(event, metadata)
                if record is not None:
                    staged.records.append((subscription.recorder, record))
        return staged

    async def _stage_async(
        self, events: tuple[DomainEvent, ...], session: AsyncSession, metadata: Metadata | Mapping[str, Any] | None
    ) -> DurableReceipt:
        given = metadata_for(metadata)
        _refuse_twins(events)
        if self._observing is None:
            return await self._stage_with(events, session, [given] * len(events))
        publications = self._observing.publishing(events, given)
        try:
            receipt = await self._stage_with(events, session, [publication.metadata for publication in publications])
        except BaseException as error:
            self._observing.staged(publications, error)
            raise
        self._observing.staged(publications)
        return receipt

    async def _stage_with(
        self, events: tuple[DomainEvent, ...], session: AsyncSession, given: Sequence[Metadata]
    ) -> DurableReceipt:
        staged = [self._staged(event, metadata) for event, metadata in zip(events, given, strict=True)]
        await self._ready()
        inside = [[s for s in self.subscriptions.hearing(type(item.event)) if _runs_inside(s)] for item in staged]
        if not any(inside):
            await session.run_sync(self._connect_and_stage, staged)
            return DurableReceipt(self, events)
        connection = await session.run_sync(self._connect)
        await session.flush()  # an error of the publisher's own must not pass for a handler's
        # what a required handler refuses is undone as a whole, whether or not the publisher commits after that
        required = any(s.required for subscriptions in inside for s in subscriptions)
        async with session.begin_nested() if required else nullcontext():
            for item, subscriptions in zip(staged, inside, strict=True):
                for subscription in subscriptions:
                    await self._run_inside(session, subscription, item)
                # staged one by one: what a handler of the next event publishes comes after this one
                await session.run_sync(_staging.stage, connection, self, [item])
        return DurableReceipt(self, events)

    async def _run_inside(self, session: AsyncSession, subscription: Subscription, item: _Staged) -> None:
        context = self._context(subscription, item.event, item.metadata)
        call = partial(subscription.call, item.event, context, session)
        handled = (item.event.event_id, item.metadata)
        if self._observing is None:
            error = await _staging.run_inside(session, subscription, call, handled)
        else:
            run = self._run(subscription, item)
            with self._observing.calling(run):
                error = await _staging.run_inside(session, subscription, call, handled)
                if error is not None:
                    run.failed(error, FAILED if subscription.required else _state_after(subscription, error))
            item.runs.append(run)
        if error is None:
            item.ran.append(subscription.name)
            return
        if not isinstance(error, Discard):
            if subscription.required:
                raise error
            self._failed(subscription, item.event, error)
        item.failures.append((subscription, error))
        item.ran.append(subscription.name)  # what becomes of it is an exception's matter

    def _connect_and_stage(self, session: Session, staged: list[_Staged]) -> None:
        _staging.stage(session, self._connect(session), self, staged)

    def _connect(self, session: Session) -> Connection:
        connection = _staging.connection_of(session)
        self._check_database(connection)
        return connection

    def _check_database(self, connection: Connection) -> None:
        """Refuse a session on another database than the bus's, where the event would never be found."""
        engine = _staging.root_of(connection.engine)
        if engine is _staging.root_of(self.engine.sync_engine):
            return
        # on SQLite a look into the database would begin a snapshot, which may be stale by the time of the first write
        if connection.dialect.name == self.engine.dialect.name == "sqlite" and _same_file(engine.url, self.engine.url):
            return
        theirs = self._known_engines.get(engine)
        if theirs is None:
            theirs = "none"
            if connection.dialect.name == self.engine.dialect.name and inspect(connection).has_table("whereupon_meta"):
                statement = select(schema.meta.c.value).where(schema.meta.c.key == "database_id")
                theirs = str(connection.scalar(statement))
            self._known_engines[engine] = theirs
        if theirs != self._database_id:
            raise ForeignSessionError(
                f"the session is on {engine.url.render_as_string(hide_password=True)}, and the bus on "
                f"{self._store.shown_url}: they can't commit together. Publish on a session of the bus's database, or "
                "make a bus for that one"
            )

    _database_id = ""

    def write_staged(self, connection: Connection, staged: list[_Staged]) -> None:
        """Write what was staged into the log, with the records that go with it; called just before COMMIT."""
        records = [
            Record(
                item.event.event_id,
                type(item.event).__event__.name,
                type(item.event).__event__.version,
                item.payload,
                item.headers,
                msgspec.json.encode(item.keys).decode() if item.keys else None,
                item.ran or None,
            )
            for item in staged
        ]
        failed = any(item.failures for item in staged)
        positions = self._store.append(connection, records, positions=failed)
        recorded: dict[int, tuple[Recorder, list[Any]]] = {}
        for item in staged:
            for recorder, record in item.records:
                recorded.setdefault(id(recorder), (recorder, []))[1].append(record)
        for recorder, of_it in recorded.values():
            recorder.record(connection, of_it)
        if failed:
            now = self._store.later(0)
            failures = []
            for item, record, position in zip(staged, records, positions, strict=True):
                row = Row(position, *record[:6], None, now)
                for subscription, error in item.failures:
                    lane = lane_of(None, position, self._lanes[subscription.name])
                    key = LaneKey(subscription.name, 0, lane)
                    failures.append((key, self._failure(row, subscription, error)))
            self._store.append_failures(connection, failures)

    @staticmethod
    def _failure(row: Row, subscription: Subscription, error: BaseException) -> Failure:
        wait: float | None = error.delay if isinstance(error, RetryLater) else subscription.retry.wait(1)
        if (state := _state_after(subscription, error)) != RETRYING:
            wait = None
        return Failure(row, state, 1, wait, type(error).__name__, message_of(error)[:4000], trace_of(error))

    def committed(self, staged: list[_Staged], *, certain: bool) -> None:
        """The transaction is over: wake the workers, and run what was to run right after the commit."""
        types = {type(item.event).__event__.name for item in staged}
        failed = {subscription.name for item in staged for subscription, _ in item.failures}
        for item in staged if not certain else ():
            if self._after_commit(item):
                self.logger.warning(
                    "event_outcome_unknown",
                    event_type=type(item.event).__name__,
                    event_id=str(item.event.event_id),
                    error_message="the commit was interrupted, so AFTER_COMMIT handlers do not run",
                )
        if certain and self._observing is not None:
            self._tell_committed(self._observing, staged)
        after = [(item, calls) for item in staged if certain and (calls := self._after_commit(item))]
        self._due.append((types, failed, after))
        try:
            if self._loop is None:
                raise RuntimeError("the bus was closed")
            if asyncio._get_running_loop() is self._loop:
                self._loop.call_soon(self._run_due)
            else:  # a sync session of another thread; waking the loop up from there costs a system call
                self._loop.call_soon_threadsafe(self._run_due)
        except RuntimeError as error:
            self._lose_due(error)

    def _run(self, subscription: Subscription, item: _Staged, *, called: bool = True) -> Run:
        event = item.event
        name = type(event).__event__.name
        return Run(subscription, event.event_id, name, item.metadata, called=called)

    def _tell_committed(self, observing: Observing, staged: list[_Staged]) -> None:
        observing.published([item.event for item in staged])
        runs = []
        for item in staged:
            runs += item.runs
            recorded = [s for s in self.subscriptions.hearing(type(item.event)) if s.recorder is not None]
            for subscription in recorded:
                run = self._run(subscription, item, called=False)
                run.outcome = SUCCEEDED
                runs.append(run)
        observing.settle(runs)

    def _after_commit(self, item: _Staged) -> list[Call]:
        return [
            (
                partial(self._call_after_commit, s, item.metadata)
                if self._observing is None
                else partial(self._watch_after_commit, self._observing, self._run(s, item)),
                s.timeout,
                s,
            )
            for s in self.subscriptions.hearing(type(item.event))
            if s.delivery is Delivery.AFTER_COMMIT
        ]

    def _run_due(self) -> None:
        if not self._due:  # the bus was closed meanwhile
            return
        types, failed, after = self._due.popleft()
        if self._worker is not None:
            self._worker.wake(types, failed)
        self._ring(types)
        for item, calls in after:
            self._runner.start(calls, item.event, item.context, self._failed, self._ended)

    def _ring(self, types: Set[str]) -> None:
        """Notify the workers of other processes, unless all that hears of these events is served here."""
        if self._ringer is not None and (self._worker is None or self._worker.others_wait(types)):
            self._ringer.ring(types)

    def _lose_due(self, reason: Exception) -> None:
        while self._due:
            for item, calls in self._due.popleft()[2]:
                for _, _, subscription in calls:
                    self._failed(subscription, item.event, BusStateError(f"{reason} before it could run"))

    async def _watch_after_commit(self, observing: Observing, run: Run, event: DomainEvent) -> None:
        try:
            with observing.calling(run):
                await self._call_after_commit(run.subscription, run.metadata, event)
        finally:
            observing.settle([run])

    async def _call_after_commit(self, subscription: Subscription, metadata: Metadata, event: DomainEvent) -> None:
        context = self._context(subscription, event, metadata)
        if subscription.session_parameter is None:
            await subscription.call(event, context, None)
            return
        async with AsyncSession(self.engine, expire_on_commit=False) as session, session.begin():
            with _staging.handed_out(session, subscription.name):
                await subscription.call(event, context, session)

    # --- delivering -------------------------------------------------------------------------------------------------

    def _refuse_late(self, observer: Observer) -> None:
        if self._entered:
            raise BusStateError(
                f"{type(observer).__name__} is to observe a bus that runs already: what has begun would end without "
                "it. Call bus.observe before `async with bus`"
            )

    def _subscribed(self, subscription: Subscription) -> None:
        if self._worker is not None:
            raise BusStateError(
                f"{subscription.name} is subscribed while the bus delivers: its share of the log would depend on when. "
                "Subscribe everything before `async with bus`"
            )

    def class_of(self, stored_name: str) -> type[DomainEvent] | None:
        """The class of events stored under this name or alias, or None if this process knows none."""
        return self._classes.get(stored_name) or event_class(stored_name)

    def make_worker(self) -> Worker:
        """A worker for this bus's subscriptions, not started; the bus must be ready."""
        return Worker(
            self._store,
            [s for s in self.subscriptions if s.delivery is not Delivery.AFTER_COMMIT],
            lanes=self._lanes,
            codec=self._codec,
            class_of=self.class_of,
            logger=self.logger,
            handler_logger=self._raw_logger,
            in_flight=self._in_flight,
            lease=self._lease,
            poll_interval=self._poll_interval,
            retain=self._retain,
            observing=self._observing,
        )

    async def start(self, *, deliver: bool | None = None) -> None:
        """What `async with bus` does on entry; end it with `close`. Raises `DatabaseError` if the database won't do."""
        if self._entered:
            raise BusStateError("the bus is running already: one `async with bus` is enough")
        self._check_loop()
        try:
            await self._ready()
            if self._deliver if deliver is None else deliver:
                await cluster.check(self._store)
                worker = self.make_worker()
                with self._store.reaching():
                    await worker.start()
                self._worker = worker
                self._listen(worker)
                self._attempts.start_sweeping()
        except BaseException:
            await self._let_go()
            raise
        self._entered = True

    def _listen(self, worker: Worker) -> None:
        if self._ringer is None:
            return
        if self._listen_url is None:
            engine = sibling(self.engine)
        else:
            engine = create_async_engine(self._listen_url, hide_parameters=True, poolclass=NullPool)
        self._listener = Listener(
            engine, self._ringer, on_ring=worker.wake, log=worker.log, poll_interval=self._poll_interval
        )
        self._listener.start()

    async def close(self, *, drain: bool = True) -> None:
        """Deliver what is due, at most `drain_timeout` seconds, stop, and give connections back.

        What is not delivered by then stays in the log, for the next start or another worker.
        """
        loop = asyncio.get_running_loop()
        deadline = loop.time() + self._drain_timeout
        try:
            await self._attempts.finish(self._drain_timeout)
            if drain:
                await self.drain(max(0.0, deadline - loop.time()))
        except TimeoutError:
            self.logger.warning("bus_drain_timed_out", seconds=self._drain_timeout)
        finally:
            if self._listener is not None:
                listener, self._listener = self._listener, None
                await listener.stop()
            if self._worker is not None:
                worker, self._worker = self._worker, None
                await worker.stop(max(0.0, deadline - loop.time()))
            if self._ringer is not None:
                for types, _, _ in self._due:
                    self._ring(types)
                await self._ringer.flush()
            why = f"it still ran {self._drain_timeout:g} s after the bus began to close, and was cancelled"
            if abandoned := self._runner.stop(why):
                await asyncio.wait(abandoned, timeout=max(1.0, self._drain_timeout))
            self._runner.abandon(why)
            self._runner.close()
            self._entered = False
            await self._attempts.stop()
            await self._let_go()
            self._lose_due(BusStateError("the bus was closed"))

    async def _let_go(self) -> None:
        """Give connections back; those that are left to an event loop that ends could not be closed any more."""
        self._loop = self._preparing = None
        # the next start looks again: tests empty databases, operators restore them
        self._prepared = False
        self._registered.clear()
        self._known_engines.clear()
        await self._store.close()
        if self._owns_engine:
            await self.engine.dispose()

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        await self.close()

    async def drain(self, timeout: float | None = None) -> None:
        """Wait until what is committed so far was delivered here, but for retries that are due later.

        Raises `TimeoutError` after `timeout` seconds.
        """
        async with asyncio.timeout(timeout):
            while True:
                await self._after_commit_handlers()
                if self._worker is not None:
                    await self._worker.drain()
                if not self._due and not self._after_commit_tasks():
                    return

    async def _after_commit_handlers(self, event_ids: Set[UUID] | None = None) -> None:
        """Wait for AFTER_COMMIT handlers of these events (None: all) that are due or run."""
        while True:
            due = {item.event.event_id for _, _, after in self._due for item, _ in after}
            if self._due if event_ids is None else due & event_ids:
                await asyncio.sleep(0)
            elif tasks := self._after_commit_tasks(event_ids):
                await asyncio.wait(tasks)
            else:
                return

    def _after_commit_tasks(self, event_ids: Set[UUID] | None = None) -> set[asyncio.Task[None]]:
        current = asyncio.current_task()
        return {
            seat.task
            for seat in self._runner.running
            if seat.task is not current and (event_ids is None or seat.argument.event_id in event_ids)
        }

    def in_flight(self) -> dict[str, int]:
        """How many deliveries of each subscription are begun here and not settled. May be called on any thread."""
        found = {s.name: 0 for s in self.subscriptions if s.delivery is not Delivery.AFTER_COMMIT}
        worker = self._worker
        for lane in [] if worker is None else list(worker.lanes.values()):
            found[lane.name] = found.get(lane.name, 0) + len(lane.active)
        return found

    # --- its database -----------------------------------------------------------------------------------------------

    @property
    def database(self) -> str:
        """The URL of the bus's database, its password hidden."""
        return self._store.shown_url

    async def revision(self) -> int | None:
        """The revision of whereupon's tables, None where there are none. Raises `DatabaseUnavailableError`."""
        return await self._store.revision()

    async def create_tables(self) -> None:
        """Create or upgrade whereupon's tables. Raises `DatabaseUnavailableError` or `SchemaError`."""
        await self._store.create_tables()

    # --- what became of events --------------------------------------------------------------------------------------

    async def deliveries(self, *event_ids: UUID) -> list[DeliveryState]:
        """What became of these events, for each subscription of this bus that hears them, in the order of the log."""
        self._check_loop()
        await self._ready()
        return await self._store.deliveries(event_ids, self._heard(), key_inside=self._key_inside)

    async def explain(self, event_id: UUID) -> EventStory:
        """An event's whole story, for whoever asks why something did (not) happen.

        Raises `ActionRefused` for an event that there is no trace of; it says what the id tells.
        """
        return await self.stories.of_event(event_id)

    def explain_type(self, name: str) -> TypeStory:
        """How this bus serves a type of events, by its stored name. Raises `ActionRefused` for one it does not know."""
        return self.stories.of_type(name)

    def examine(self) -> AsyncIterator[Check]:
        """What is wrong with this bus and its database, check by check; see `Check`. Nothing is changed."""
        self._check_loop()
        return self._doctor.examine()

    async def lags(self) -> list[Lag]:
        """How far each subscription that the database knows is behind, measured now."""
        self._check_loop()
        await self._reachable()
        with self._store.reaching():
            return await self._lags.measure()

    def _heard(self) -> Mapping[str, Sequence[str]]:
        return _Heard(self)

    def _key_inside(self, passed: Passed) -> str | None:
        cls = self.class_of(passed.type)
        if cls is None or passed.ordered_by is None:
            return None
        try:
            return key_of(self._codec.decode(cls, passed.version, passed.payload), passed.ordered_by)
        except (EventDecodingError, AttributeError):
            return None  # such an event is in the first lane, as a dead letter

    async def wait_settled(self, events: Sequence[DomainEvent], timeout: float | None) -> None:
        """Wait until these events are settled for every subscription; see `DurableReceipt.settled`."""
        expected = {
            event.event_id
            for event in events
            if any(s.delivery is not Delivery.AFTER_COMMIT for s in self.subscriptions.hearing(type(event)))
        }
        waiting = "AFTER_COMMIT handlers still run"
        limit = asyncio.timeout(timeout)
        try:
            async with limit:
                await self._after_commit_handlers({event.event_id for event in events})
                self._check_loop()
                await self._ready()
                pause = 0.02
                while True:
                    found = await self._store.deliveries(
                        list(expected), self._heard(), key_inside=self._key_inside, calls_too=False
                    )
                    open_ = [f"{s.subscription} ({s.state})" for s in found if s.state in OPEN]
                    if not open_ and expected == {state.event_id for state in found}:
                        return
                    waiting = ", ".join(open_) or "the events are not in the log (not committed, or pruned?)"
                    await self._something_settled(pause)
                    pause = min(pause * 1.5, 0.2)  # the worker may be another process, which wakes nobody here
        except TimeoutError:
            if not limit.expired():
                raise
            raise TimeoutError(f"not settled after {timeout:g} s: {waiting}") from None

    async def _something_settled(self, at_most: float) -> None:
        if self._worker is None:
            await asyncio.sleep(at_most)
            return
        self._worker.settled.clear()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._worker.settled.wait(), at_most)


_DEADLOCK: Final = (
    "this task has a transaction open that holds SQLite's only write lock: publishing without its session would wait "
    "for that for ever. Pass session=session, or publish before or after the transaction"
)


def _state_after(subscription: Subscription, error: BaseException) -> str:
    """What becomes of a delivery that failed inside the publisher's transaction."""
    if isinstance(error, Discard):
        return SKIPPED
    return DEAD if subscription.retry.max_attempts == 1 else RETRYING


def _runs_inside(subscription: Subscription) -> bool:
    return subscription.delivery is Delivery.IN_TRANSACTION and subscription.recorder is None


def _refuse_twins(events: Sequence[DomainEvent]) -> None:
    if len({event.event_id for event in events}) < len(events):
        raise PublishError("the same event is published twice in one call: a fact is published once")


class _Heard(Mapping[str, Sequence[str]]):
    """The subscriptions that hear events stored under a name."""

    def __init__(self, bus: EventBus) -> None:
        self._bus = bus

    def __getitem__(self, stored_name: str) -> Sequence[str]:
        cls = self._bus.class_of(stored_name)
        hearing = self._bus.subscriptions.hearing(cls) if cls is not None else ()
        return [s.name for s in hearing if s.delivery is not Delivery.AFTER_COMMIT]

    def __iter__(self) -> Iterator[str]:
        return iter(self._bus._classes)

    def __len__(self) -> int:
        return len(self._bus._classes)


def _same_file(one: URL, other: URL) -> bool:
    return bool(one.database and other.database) and os.path.realpath(str(one.database)) == os.path.realpath(
        str(other.database)
    )


def _extra(url: URL) -> str:
    """What to install for a URL's driver."""
    return "whereupon[psycopg]" if url.drivername == "postgresql+psycopg" else _DRIVERS[url.get_backend_name()][1]


_UNPREPARED: Final[Mapping[str, Mapping[str, Any]]] = {
    # an unnamed statement is parsed in the trip that runs it, and leaves nothing on a server that others use next
    "asyncpg": {
        "statement_cache_size": 0,
        "prepared_statement_cache_size": 0,
        "prepared_statement_name_func": str,
    },
    "psycopg": {"prepare_threshold": None},
}
"""What drivers are told for connections through a pooler in transaction mode."""


def _listen_url(engine: AsyncEngine, listen_url: str | URL) -> URL:
    try:
        url = make_url(listen_url)
    except (ArgumentError, ValueError):
        url = None
    if engine.dialect.name != "postgresql" or url is None or url.get_backend_name() != "postgresql":
        raise UnsupportedDatabaseError(
            "listen_url is a PostgreSQL URL of the bus's database, for the one connection that listens: "
            'EventBus("postgresql+asyncpg://…pooler…", listen_url="postgresql+asyncpg://…server…")'
        )
    _check_driver(url)
    return url


def _engine_of(database: str | URL | AsyncEngine, *, through_pooler: bool) -> tuple[AsyncEngine, bool]:
    """The engine to use, and whether it is the bus's own."""
    if isinstance(database, AsyncEngine):
        _check_driver(database.url)
        if database.dialect.name == "sqlite" and isinstance(database.pool, StaticPool):
            raise UnsupportedDatabaseError(
                "this engine shares one SQLite connection among all, so the worker's COMMIT would commit half of "
                "somebody's transaction. Make it without StaticPool, on a file, or use "
                'EventBus("sqlite+aiosqlite:///:memory:")'
            )
        return database, False
    try:
        url = make_url(database)
    except (ArgumentError, ValueError):
        shown = re.sub(r":[^:@/]+@", ":***@", database) if isinstance(database, str) else repr(database)
        raise UnsupportedDatabaseError(
            f"{shown!r} is neither an AsyncEngine nor a database URL. Use one like "
            f"{' or '.join(example for example, _ in _DRIVERS.values())}"
        ) from None
    _check_driver(url)
    sqlite = url.get_backend_name() == "sqlite"
    if sqlite and url.database in (None, "", ":memory:"):
        url = url.set(database=_private_file())
    try:
        # what people typed stays out of error messages
        engine = create_async_engine(
            url,
            hide_parameters=True,
            pool_size=12,
            max_overflow=12,
            connect_args=dict(_UNPREPARED.get(url.get_driver_name(), {})) if through_pooler else {},
        )
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise UnsupportedDatabaseError(
            f"the driver of {url.drivername} is not installed: pip install '{_extra(url)}'"
        ) from error
    if sqlite:
        configure(engine)
    return engine, True


def _check_driver(url: URL) -> None:
    backend = url.get_backend_name()
    if backend not in _DRIVERS:
        raise UnsupportedDatabaseError(
            f"whereupon keeps its log in PostgreSQL or SQLite, not in {backend}: use a URL like "
            f"{' or '.join(example for example, _ in _DRIVERS.values())}"
        )
    try:
        is_async = url.get_dialect().is_async
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise UnsupportedDatabaseError(
            f"{url.drivername} is no driver that is installed: pip install '{_extra(url)}'"
        ) from error
    if not is_async and not (backend == "postgresql" and url.get_driver_name() == "psycopg"):
        example, _ = _DRIVERS[backend]
        raise UnsupportedDatabaseError(
            f"{url.render_as_string(hide_password=True)} names a driver that can't be awaited. Use one like {example}"
        )


def _private_file() -> str:
    """A file for a `:memory:` database, gone with the process.

    In memory all would share one connection, and so one transaction.
    """
    folder = Path(tempfile.mkdtemp(prefix="whereupon-"))

    def remove(pid: int = os.getpid()) -> None:
        if pid == os.getpid():
            import shutil

            shutil.rmtree(folder, ignore_errors=True)

    atexit.register(remove)
    return str(folder / "memory.db")
