"""The bus without a database: handlers run in this process, nothing is stored."""

from __future__ import annotations

import asyncio
import dataclasses
from asyncio import AbstractEventLoop, Future
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import nullcontext
from contextvars import Context, copy_context
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

from whereupon._dispatch import Call, Runner, Seat
from whereupon.bus import Subscribing
from whereupon.context import NO_METADATA, Metadata, handling, metadata_for, request_metadata
from whereupon.errors import BusStateError, Discard, SessionRequiredError, WorkflowClosedError
from whereupon.event import DomainEvent
from whereupon.logs import message_of
from whereupon.observer import FAILED, Observing, Run
from whereupon.subscription import Delivery, Subscription
from whereupon.workflow import A, Attempt, P, S, State, Workflow, attempt_closed_by, outside_attempts


class _Receipt:
    __slots__ = ("_bus", "events")

    def __init__(self, bus: InMemoryEventBus, events: tuple[DomainEvent, ...]) -> None:
        self._bus = bus
        self.events = events

    async def settled(self, timeout: float | None = 30.0) -> None:
        await self._bus.drain(timeout)


class _Staged(NamedTuple):
    event: DomainEvent
    metadata: Metadata
    context: Context
    subscriptions: tuple[Subscription, ...]
    engine: Any
    loop: AbstractEventLoop
    runs: Sequence[Run] = ()
    """Calls in the transaction that observers are to be told of once it is committed."""


class _Group:
    """The handlers that one `publish` waits for."""

    __slots__ = ("_bus", "_left", "_waiter")

    def __init__(self, bus: InMemoryEventBus, seats: Sequence[Seat]) -> None:
        self._bus = bus
        self._left = len(seats)
        self._waiter: Future[None] = asyncio.get_running_loop().create_future()
        for seat in seats:
            seat.ended = self._ended

    def _ended(self, seat: Seat, error: BaseException | None) -> None:
        self._left -= 1
        if not self._left and not self._waiter.done() and not seat.loop.is_closed():
            self._waiter.set_result(None)
        self._bus._ended(seat, error)

    async def wait(self) -> None:
        """Wait for them. A publisher that is cancelled meanwhile leaves them running, owned by the bus."""
        await self._waiter


class InMemoryEventBus(Subscribing):
    """Runs handlers in this process, concurrently and apart from each other; a crash loses what has not run.

    `publish` without a session returns when the handlers are done. With a session it stages: handlers run once that
    session's transaction commits, IN_TRANSACTION ones at once. A handler that fails is logged as
    `event_handler_failed` and is not tried again: that, and surviving a crash, is what `EventBus` adds.
    """

    def __init__(self, *, logger: Any = None, drain_timeout: float | None = 30.0) -> None:
        super().__init__(logger)
        self._drain_timeout = drain_timeout
        self._runner = Runner()
        self._calls: dict[type[DomainEvent], list[Call]] = {}
        """How to call the handlers of an event without a session, where each takes the event alone."""
        self._due: list[list[_Staged]] = []
        """Committed, and to be delivered with the next turn of the loop."""
        self._entered = self._closed = False

    @property
    def is_running(self) -> bool:
        """Whether it was entered, and not left yet; it publishes before, too, but then nobody waits for handlers."""
        return self._entered

    def _subscribed(self, subscription: Subscription) -> None:
        self._calls.clear()

    async def publish(
        self,
        *events: DomainEvent,
        session: Any = None,
        metadata: Metadata | Mapping[str, Any] | None = None,
    ) -> _Receipt:
        """Run the handlers of these events now or, with a session, once its transaction commits.

        Raises `SessionRequiredError`, before anything runs, if a handler needs a session and none is given.
        """
        if self._closed:
            raise BusStateError("the bus is closed: publish inside `async with bus`, or make a new bus")
        if (attempt := attempt_closed_by(events)) is not None:
            receipt: _Receipt = await attempt.publish_outcome(events, session, metadata)
            return receipt
        given = metadata_for(metadata)
        if session is not None:
            return await self._stage(events, session, given)
        if self._observing is not None:
            suspended = self._run_observed(self._observing, events, given)
        elif len(events) == 1:
            event = events[0]
            calls = self._calls.get(type(event))
            if calls is None:
                calls = self._calls_for(event, given)
            suspended = self._run(event, calls, given)
        else:
            self._check_events(events)
            plans = [(event, self._calls_for(event, given)) for event in events]
            suspended = [seat for event, calls in plans for seat in self._run(event, calls, given)]
        if suspended:
            await _Group(self, suspended).wait()
        return _Receipt(self, events)

    def workflow(self, workflow: Workflow[P, A, S], /, *args: P.args, **fields: P.kwargs) -> Attempt[A, S]:
        """One attempt, as on `EventBus`; but nothing is stored, and nobody speaks for a process that dies."""
        return _MemoryAttempt(self, workflow, workflow.attempt_with(*args, **fields))

    def _run(self, event: DomainEvent, calls: list[Call], metadata: Metadata) -> Sequence[Seat]:
        context = copy_context()
        context.run(handling.set, (event.event_id, metadata))
        return self._runner.start(calls, event, context, self._failed, self._ended)

    def _run_observed(
        self, observing: Observing, events: tuple[DomainEvent, ...], metadata: Metadata
    ) -> Sequence[Seat]:
        self._check_events(events)
        publications = observing.publishing(events, metadata)
        try:
            plans = [(p, self._calls_for(p.event, p.metadata)) for p in publications]
            observing.published(events)
            suspended = [seat for p, calls in plans for seat in self._run(p.event, calls, p.metadata)]
        except BaseException as error:
            observing.staged(publications, error)
            raise
        observing.staged(publications)
        return suspended

    def _subscriptions_of(self, event: DomainEvent) -> tuple[Subscription, ...]:
        self._check_events((event,))
        self._know(type(event))
        return self.subscriptions.hearing(type(event))

    def _calls_for(self, event: DomainEvent, metadata: Metadata) -> list[Call]:
        subscriptions = self._subscriptions_of(event)
        for subscription in subscriptions:
            if subscription.session_parameter is not None:
                raise SessionRequiredError(session_required(subscription, event))
        calls = [self._call(subscription, event, metadata) for subscription in subscriptions]
        if self._observing is None and all(s.context_parameter is None for s in subscriptions):
            self._calls[type(event)] = calls
        return calls

    def _call(self, subscription: Subscription, event: DomainEvent, metadata: Metadata) -> Call:
        handler = subscription.handler
        if subscription.context_parameter is not None:
            handler = partial(handler, **{subscription.context_parameter: self._context(subscription, event, metadata)})
        if self._observing is not None:
            run = _run_of(subscription, event, metadata)
            handler = partial(_watch, self._observing, run, handler)
        return handler, subscription.timeout, subscription

    async def _stage(self, events: tuple[DomainEvent, ...], session: Any, metadata: Metadata) -> _Receipt:
        if self._observing is None:
            return await self._stage_with(events, session, [metadata] * len(events))
        self._check_events(events)
        publications = self._observing.publishing(events, metadata)
        try:
            receipt = await self._stage_with(events, session, [publication.metadata for publication in publications])
        except BaseException as error:
            self._observing.staged(publications, error)
            raise
        self._observing.staged(publications)
        return receipt

    async def _stage_with(self, events: tuple[DomainEvent, ...], session: Any, given: Sequence[Metadata]) -> _Receipt:
        from whereupon import _staging

        self._check_events(events)
        heard = [(event, self._subscriptions_of(event)) for event in events]
        owner = _staging.async_session(session)
        connection = await owner.run_sync(_staging.connection_of)
        inside = [[s for s in subscriptions if s.delivery is Delivery.IN_TRANSACTION] for _, subscriptions in heard]
        if any(inside):
            await owner.flush()  # an error of the publisher's own must not pass for a handler's
        # what a required handler refuses is undone as a whole, whether or not the publisher commits after that
        required = any(s.required for subscriptions in inside for s in subscriptions)
        async with owner.begin_nested() if required else nullcontext():
            for (event, subscriptions), now, metadata in zip(heard, inside, given, strict=True):
                runs: list[Run] = []
                for subscription in now:
                    call = partial(subscription.call, event, self._context(subscription, event, metadata), owner)
                    if self._observing is None:
                        error = await _staging.run_inside(owner, subscription, call, (event.event_id, metadata))
                    else:
                        run = _run_of(subscription, event, metadata)
                        with self._observing.calling(run):
                            error = await _staging.run_inside(owner, subscription, call, (event.event_id, metadata))
                            if error is not None:
                                run.failed(error, "skipped" if isinstance(error, Discard) else FAILED)
                        runs.append(run)
                    if error is not None and subscription.required:
                        raise error
                    if error is not None:
                        self._failed(subscription, event, error)
                later = tuple(s for s in subscriptions if s not in now)
                base = copy_context()
                base.run(handling.set, (event.event_id, metadata))
                staged = _Staged(event, metadata, base, later, connection.engine, asyncio.get_running_loop(), runs)
                await owner.run_sync(_staging.stage, connection, self, [staged])
        return _Receipt(self, events)

    def write_staged(self, connection: Any, staged: list[_Staged]) -> None:
        """Nothing is stored: what was staged waits in this process."""

    def committed(self, staged: list[_Staged], *, certain: bool) -> None:
        if not certain:
            for item in staged:
                self.logger.warning(
                    "event_outcome_unknown",
                    event_type=type(item.event).__name__,
                    event_id=str(item.event.event_id),
                    error_message="the commit was interrupted, so its handlers do not run",
                )
            return
        if self._observing is not None:
            self._observing.published([item.event for item in staged])
            self._observing.settle([run for item in staged for run in item.runs])
        try:
            staged[0].loop.call_soon_threadsafe(self._deliver, staged)
        except RuntimeError:  # the loop was closed
            self._lost(staged)
        else:
            self._due.append(staged)

    def _deliver(self, staged: list[_Staged]) -> None:
        self._due = [due for due in self._due if due is not staged]
        for item in staged:
            calls = [
                self._call(s, item.event, item.metadata)
                if s.session_parameter is None
                else (self._call_to(s, item), s.timeout, s)
                for s in item.subscriptions
            ]
            self._runner.start(calls, item.event, item.context, self._failed, self._ended)

    def _call_to(self, subscription: Subscription, item: _Staged) -> Callable[[Any], Awaitable[None]]:
        call = partial(self._deliver_to, subscription, item)
        if self._observing is None:
            return call
        return partial(_watch, self._observing, _run_of(subscription, item.event, item.metadata), call)

    async def _deliver_to(self, subscription: Subscription, item: _Staged, event: DomainEvent) -> None:
        from whereupon import _staging

        context = self._context(subscription, event, item.metadata)
        async with _staging.own_session(item.engine) as session, session.begin():
            with _staging.handed_out(session, subscription.name):
                await subscription.call(event, context, session)

    def _lost(self, staged: list[_Staged]) -> None:
        error = BusStateError("its event loop was closed before it could run")
        for item in staged:
            for subscription in item.subscriptions:
                self._failed(subscription, item.event, error)

    async def drain(self, timeout: float | None = None) -> None:
        """Wait for handlers that run or are due; raises `TimeoutError` if some still run after `timeout` seconds.

        A handler that drains does not wait for itself, but two that do so wait for each other.
        """
        loop = asyncio.get_running_loop()
        self._runner.move_to(loop)
        lost = [due for due in self._due if due[0].loop.is_closed()]
        self._due = [due for due in self._due if not due[0].loop.is_closed()]
        for staged in lost:
            self._lost(staged)
        async with asyncio.timeout(timeout):
            while True:
                if any(due[0].loop is loop for due in self._due):
                    await asyncio.sleep(0)
                elif others := self._others():
                    await asyncio.wait(others)
                else:
                    return

    def _others(self) -> set[asyncio.Task[None]]:
        """Tasks of handlers, less the one that asks."""
        asking = asyncio.current_task()
        return {seat.task for seat in self._runner.running if seat.task is not asking}

    async def __aenter__(self) -> Self:
        self._closed, self._entered = False, True
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Wait for handlers, at most `drain_timeout` seconds; those that still run are cancelled, and logged so."""
        try:
            await self.drain(self._drain_timeout)
        except TimeoutError:
            why = f"it still ran {self._drain_timeout:g} s after the bus began to close, and was cancelled"
            if abandoned := self._runner.stop(why):
                await asyncio.wait(abandoned, timeout=self._drain_timeout)
            self._runner.abandon(why)
        finally:
            self._closed, self._entered = True, False
            self._runner.close()


class _MemoryAttempt(Attempt[A, S]):
    def __init__(self, bus: InMemoryEventBus, workflow: Workflow[Any, A, S], attempted: A) -> None:
        super().__init__(workflow, attempted)
        self._bus = bus
        self._observing = bus._observing
        self._metadata = NO_METADATA
        self._state = State.OPEN
        self._pending: tuple[Any, Any] | None = None
        """The connection and the transaction that an outcome was staged in."""

    async def _open(self) -> None:
        if self._metadata is not NO_METADATA:
            raise BusStateError(f"{self!r} was entered before: an attempt is made once. Call bus.workflow(…) for each")
        given = metadata_for(None)
        self._metadata = dataclasses.replace(given, correlation_id=given.correlation_id or self.id)
        await self._bus.publish(self.attempted, metadata=given)
        if self._observing is not None:
            self._observing.opened(self.workflow.name)

    async def publish_outcome(self, events: tuple[DomainEvent, ...], session: Any, metadata: Any) -> _Receipt:
        outcome = self.outcome_among(events)
        assert outcome is not None
        if self._state is not State.OPEN or self._in_transaction():
            raise WorkflowClosedError(f"{self!r} has an outcome already. An attempt has one outcome")
        if session is None:
            self._state = outcome[1]
        try:
            with outside_attempts(), request_metadata(self._metadata):
                receipt = await self._bus.publish(*events, session=session, metadata=metadata)
            if session is not None:
                await self._follow(session, outcome[1])
            elif self._observing is not None:
                self._observing.closed(self.workflow.name, outcome[1])
        except Exception:  # what is raised here was raised before any handler ran, but for a required one
            self._state = State.OPEN
            raise
        return receipt

    async def _follow(self, session: Any, state: State) -> None:
        from whereupon import _staging

        owner = _staging.async_session(session)
        connection = await owner.run_sync(_staging.connection_of)
        self._pending = connection, connection.get_transaction()
        await owner.run_sync(_staging.stage, connection, self, [state])

    def _in_transaction(self) -> bool:
        if self._pending is None:
            return False
        from whereupon import _staging

        return _staging.goes_on(*self._pending)

    def write_staged(self, connection: Any, staged: list[State]) -> None:
        """Nothing is stored."""

    def committed(self, staged: list[State], *, certain: bool) -> None:
        if certain:
            self._state = staged[0]
            if self._observing is not None:
                self._observing.closed(self.workflow.name, staged[0])

    async def _leave(self, reason: str) -> None:
        if self._state is not State.OPEN or self._in_transaction():
            return
        try:
            event = self.workflow.failure(self.attempted, reason)
            await self.publish_outcome((event,), None, None)
        except Exception as error:
            # the exception that leaves the block is the one to be seen
            self._bus.logger.error(
                "workflow_failure_refused",
                workflow=self.workflow.name,
                workflow_id=str(self.id),
                error_type=type(error).__name__,
                error_message=message_of(error),
                exc_info=error,
            )


def _run_of(subscription: Subscription, event: DomainEvent, metadata: Metadata) -> Run:
    return Run(subscription, event.event_id, type(event).__event__.name, metadata)


async def _watch(observing: Observing, run: Run, call: Callable[[Any], Awaitable[None]], event: DomainEvent) -> None:
    try:
        with observing.calling(run):
            await call(event)
    finally:
        observing.settle([run])


def session_required(subscription: Subscription, event: DomainEvent) -> str:
    name = type(event).__name__
    return (
        f"{subscription.owner} requires a database session: publish {name} with the session of the change it tells of, "
        f"`await bus.publish({name}(…), session=session)`. Nothing was published, and no handler ran"
    )
