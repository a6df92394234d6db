"""The bus without a database: handlers run in this process, nothing is stored."""

from __future__ import annotations

import asyncio
from asyncio import AbstractEventLoop, Future
from collections.abc import Callable, Mapping
from contextvars import Context, copy_context
from functools import partial
from types import TracebackType
from typing import Any, NamedTuple, Self

from whereupon._dispatch import Call, Runner, Seat
from whereupon.bus import Subscribing
from whereupon.context import EventContext, Metadata, handling, metadata_for
from whereupon.errors import BusStateError, SessionRequiredError
from whereupon.event import DomainEvent
from whereupon.subscription import Delivery, Subscription


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


class _Plan(NamedTuple):
    """How events of one type are published without a session."""

    subscriptions: tuple[Subscription, ...]
    calls: list[Call] | None
    """How to call the handlers, where each takes the event alone."""
    needs_session: Subscription | None


class _Group:
    """The handlers that one `publish` waits for."""

    __slots__ = ("bus", "left", "waiter")

    def __init__(self, bus: InMemoryEventBus) -> None:
        self.bus = bus
        self.left = 0
        self.waiter: Future[None] | None = None

    def ended(self, seat: Seat, error: BaseException | None) -> None:
        if error is not None:
            self.bus._report(seat.label, seat.argument, error)
        self.left -= 1
        if not self.left and self.waiter is not None and not self.waiter.done():
            self.waiter.set_result(None)

    async def wait(self) -> None:
        """Wait for them. A publisher that is cancelled meanwhile leaves them running, owned by the bus."""
        self.waiter = asyncio.get_running_loop().create_future()
        await self.waiter


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
        self._plans: dict[type[DomainEvent], _Plan] = {}
        self._scheduled = 0
        self._closed = False

    def _subscribed(self, subscription: Subscription) -> None:
        self._plans.clear()

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
        try:
            plans = [self._plans[type(event)] for event in events]
        except KeyError:
            plans = [self._plan(event) for event in events]
        if not events:
            self._check_events(events)
        given = metadata_for(metadata)
        if session is not None:
            return await self._stage(events, plans, session, given)
        for event, plan in zip(events, plans, strict=True):
            if plan.needs_session is not None:
                raise SessionRequiredError(session_required(plan.needs_session, event))
        group = _Group(self)
        for event, (subscriptions, calls, _) in zip(events, plans, strict=True):
            context = copy_context()
            context.run(handling.set, (event.event_id, given))
            if calls is None:
                calls = [(self._call(s, event, given), s.timeout, s) for s in subscriptions]
            group.left += self._runner.start(calls, event, context, self._failed, group.ended)
        if group.left:
            await group.wait()
        return _Receipt(self, events)

    def _plan(self, event: DomainEvent) -> _Plan:
        self._check_events((event,))
        self._know(type(event))
        subscriptions = self.subscriptions.hearing(type(event))
        plan = self._plans[type(event)] = _Plan(
            subscriptions=subscriptions,
            calls=[(s.handler, s.timeout, s) for s in subscriptions]
            if all(s.context_parameter is None and s.session_parameter is None for s in subscriptions)
            else None,
            needs_session=next((s for s in subscriptions if s.session_parameter is not None), None),
        )
        return plan

    def _call(self, subscription: Subscription, event: DomainEvent, metadata: Metadata) -> Callable[[Any], Any]:
        context = self._context(subscription, event, metadata)
        return lambda event: subscription.call(event, context, None)

    def _context(self, subscription: Subscription, event: DomainEvent, metadata: Metadata) -> EventContext:
        return EventContext(
            event_id=event.event_id,
            event_type=type(event).__event__.name,
            subscription=subscription.name,
            metadata=metadata,
            log=self._raw_logger,
        )

    def _failed(self, subscription: Subscription, event: DomainEvent, error: BaseException) -> None:
        self._report(subscription, event, error)

    def _ended(self, seat: Seat, error: BaseException | None) -> None:
        if error is not None:
            self._report(seat.label, seat.argument, error)

    async def _stage(
        self, events: tuple[DomainEvent, ...], plans: list[_Plan], session: Any, metadata: Metadata
    ) -> _Receipt:
        from whereupon import _staging

        owner = _staging.async_session(session)
        connection = await owner.run_sync(_staging.connection_of)
        for event, plan in zip(events, plans, strict=True):
            inside = [s for s in plan.subscriptions if s.delivery is Delivery.IN_TRANSACTION]
            if inside:
                await owner.flush()
            for subscription in inside:
                call = partial(subscription.call, event, self._context(subscription, event, metadata), owner)
                error = await _staging.run_inside(owner, subscription, call, (event.event_id, metadata))
                if error is not None:
                    if subscription.required:
                        raise error
                    self._report(subscription, event, error)
            later = tuple(s for s in plan.subscriptions if s.delivery is not Delivery.IN_TRANSACTION)
            base = copy_context()
            base.run(handling.set, (event.event_id, metadata))
            staged = _Staged(event, metadata, base, later, connection.engine, asyncio.get_running_loop())
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
        self._scheduled += 1
        staged[0].loop.call_soon_threadsafe(self._deliver, staged)

    def _deliver(self, staged: list[_Staged]) -> None:
        self._scheduled -= 1
        for item in staged:
            calls: list[Call] = [(partial(self._deliver_to, s, item), None, s) for s in item.subscriptions]
            self._runner.start(calls, item.event, item.context, self._failed, self._ended)

    async def _deliver_to(self, subscription: Subscription, item: _Staged, event: DomainEvent) -> None:
        context = self._context(subscription, event, item.metadata)
        async with asyncio.timeout(subscription.timeout):
            if subscription.session_parameter is None:
                await subscription.call(event, context, None)
                return
            from whereupon import _staging

            async with _staging.own_session(item.engine) as session, session.begin():
                with _staging.handed_out(session, subscription.name):
                    await subscription.call(event, context, session)

    async def drain(self, timeout: float | None = None) -> None:
        """Wait for handlers that run or are due; raises `TimeoutError` if some still run after `timeout` seconds."""
        async with asyncio.timeout(timeout):
            while self._scheduled or self._others():
                await asyncio.sleep(0)
                if others := self._others():
                    await asyncio.wait(others, return_when=asyncio.FIRST_COMPLETED)

    def _others(self) -> set[asyncio.Task[None]]:
        """Tasks of handlers, less the one that asks."""
        return {seat.task for seat in self._runner.running} - {asyncio.current_task()}

    async def __aenter__(self) -> Self:
        self._closed = False
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        """Wait for handlers, at most `drain_timeout` seconds; those that still run are cancelled, and logged so."""
        try:
            await self.drain(self._drain_timeout)
        except TimeoutError:
            if abandoned := self._runner.cancel():
                await asyncio.wait(abandoned)
        finally:
            self._closed = True
            self._runner.close()


def session_required(subscription: Subscription, event: DomainEvent) -> str:
    name = type(event).__name__
    return (
        f"{subscription.owner} requires a database session: publish {name} with the session of the change it tells of, "
        f"`await bus.publish({name}(…), session=session)`. Nothing was published, and no handler ran"
    )
