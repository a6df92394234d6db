"""What every bus offers: subscribing, and the shape of publishing."""

from __future__ import annotations

import enum
import logging
from asyncio import CancelledError
from collections.abc import Callable, Coroutine, Iterable, Mapping
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, Protocol, TypeVar, overload

from whereupon.context import EventContext, Metadata
from whereupon.errors import EventDefinitionError, PublishError
from whereupon.event import DomainEvent, EventType, event_class
from whereupon.logs import Logger, logger_of
from whereupon.observer import Observer, Observing
from whereupon.subscription import (
    DEFAULT_LANES,
    DEFAULT_TIMEOUT,
    Delivery,
    Handler,
    Retry,
    Start,
    Subscription,
    Subscriptions,
    handlers_of,
)

if TYPE_CHECKING:
    from typing import Self

    from whereupon._dispatch import Seat
    from whereupon.workflow import Attempt, Workflow

A = TypeVar("A", bound=DomainEvent)
S = TypeVar("S", bound=DomainEvent)
E = TypeVar("E", bound=DomainEvent)
Heard = TypeVar("Heard", bound=DomainEvent)
P = ParamSpec("P")


class _Missing(enum.Enum):
    """Tells `subscribe(X)`, the decorator, from `subscribe(X, None)`, a mistake."""

    HANDLER = enum.auto()


class Subscriber(Protocol[Heard]):
    """`@bus.subscribe(X)`: gives back the function that it is put on."""

    def __call__(
        self, handler: Callable[Concatenate[Heard, P], Coroutine[Any, Any, None]], /
    ) -> Callable[Concatenate[Heard, P], Coroutine[Any, Any, None]]: ...


class Receipt(Protocol):
    """What `publish` returns."""

    @property
    def events(self) -> tuple[DomainEvent, ...]: ...

    async def settled(self, timeout: float | None = 30.0) -> None:
        """Wait until every handler has settled these events: succeeded, dead or skipped.

        Only after the commit: before it this would wait for ever, and raises `TimeoutError` after `timeout` seconds.
        """
        ...


class EventBusProtocol(Protocol):
    """What an application needs of a bus; both buses are one."""

    @property
    def is_running(self) -> bool: ...

    @overload
    def subscribe(
        self,
        event_type: type[E],
        handler: Handler[E],
        /,
        *,
        name: str | None = None,
        delivery: Delivery | None = None,
        retry: Retry | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        concurrency: int = 10,
        required: bool = False,
        ordered_by: str | None = None,
        lanes: int = DEFAULT_LANES,
        batch: int = 1,
        rate: float | None = None,
        start: Start = "now",
        backfill_rate: float | None = None,
        within: float | str | timedelta | None = None,
    ) -> None: ...

    @overload
    def subscribe(
        self,
        event_type: type[E],
        /,
        *,
        name: str | None = None,
        delivery: Delivery | None = None,
        retry: Retry | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        concurrency: int = 10,
        required: bool = False,
        ordered_by: str | None = None,
        lanes: int = DEFAULT_LANES,
        batch: int = 1,
        rate: float | None = None,
        start: Start = "now",
        backfill_rate: float | None = None,
        within: float | str | timedelta | None = None,
    ) -> Subscriber[E]: ...

    def register(self, handlers: object, /, **options: Any) -> None: ...

    async def publish(
        self, *events: DomainEvent, session: Any = None, metadata: Metadata | Mapping[str, Any] | None = None
    ) -> Receipt: ...

    def workflow(self, workflow: Workflow[P, A, S], /, *args: P.args, **fields: P.kwargs) -> Attempt[A, S]: ...

    async def drain(self, timeout: float | None = None) -> None: ...

    async def __aenter__(self) -> Self: ...

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None: ...


class Subscribing:
    """The part that the buses share: subscriptions, checks of what is published, the record of a failure."""

    def __init__(self, logger: Any) -> None:
        self.logger: Logger = logger_of(logger)
        self._raw_logger = logger
        self.subscriptions = Subscriptions()
        self._classes: dict[str, type[DomainEvent]] = {}
        self._observing: Observing | None = None

    def observe(self, observer: Observer) -> None:
        """Tell `observer` what is published, what handlers do and what becomes of deliveries; before the bus starts.

        What it raises is logged once for each kind of error, and ignored. Raises `BusStateError` on a bus that runs,
        `TypeError` for what is no `whereupon.observer.Observer`.
        """
        self._refuse_late(observer)
        if self._observing is None:
            observing = Observing(self.logger)
            observing.add(observer)
            self._observing = observing
        else:
            self._observing.add(observer)

    def _refuse_late(self, observer: Observer) -> None:
        """Raises `BusStateError` where it would see half of what happens."""

    @overload
    def subscribe(
        self,
        event_type: type[E],
        handler: Handler[E],
        /,
        *,
        name: str | None = None,
        delivery: Delivery | None = None,
        retry: Retry | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        concurrency: int = 10,
        required: bool = False,
        ordered_by: str | None = None,
        lanes: int = DEFAULT_LANES,
        batch: int = 1,
        rate: float | None = None,
        start: Start = "now",
        backfill_rate: float | None = None,
        within: float | str | timedelta | None = None,
    ) -> None: ...

    @overload
    def subscribe(
        self,
        event_type: type[E],
        /,
        *,
        name: str | None = None,
        delivery: Delivery | None = None,
        retry: Retry | None = None,
        timeout: float | None = DEFAULT_TIMEOUT,
        concurrency: int = 10,
        required: bool = False,
        ordered_by: str | None = None,
        lanes: int = DEFAULT_LANES,
        batch: int = 1,
        rate: float | None = None,
        start: Start = "now",
        backfill_rate: float | None = None,
        within: float | str | timedelta | None = None,
    ) -> Subscriber[E]: ...

    def subscribe(
        self, event_type: type[E], handler: Handler[E] | _Missing = _Missing.HANDLER, /, **options: Any
    ) -> Subscriber[E] | None:
        """Have `handler` hear events of exactly this type; `DomainEvent` hears all of them.

        Without a handler it is a decorator. `name` is what progress is stored under (default: the handler's own name),
        `delivery` how it is served, `retry` when a failure is tried again, `timeout` the seconds one call may take,
        `concurrency` how many calls run at once in one process; `required` makes a failure IN_TRANSACTION raise to the
        publisher. `ordered_by` names a field: events with equal values are delivered one at a time, in the order of
        publishing. `lanes` is into how many shares the subscription is split when it is first registered, so how many
        workers can share its load; `batch` how many deliveries may share one transaction, to be called again where one
        of them fails (a quarter of `in_flight` at most); `rate` how many there are a second, by all
        workers together. `start` is where in the log it begins when it is first registered: "now", at the "beginning"
        or at a time; `backfill_rate` is its `rate` until it has caught up. `within` is its promise: how long after an
        event was published it is settled at the latest, as seconds, a timedelta or text ("30s", "5m"); nothing enforces
        it, but `whereupon doctor`, the dashboard and alerts measure by it. Raises `SubscriptionError` for a handler
        that could not be called.
        """
        if handler is _Missing.HANDLER:

            def decorate(
                handler: Callable[Concatenate[E, P], Coroutine[Any, Any, None]], /
            ) -> Callable[Concatenate[E, P], Coroutine[Any, Any, None]]:
                self._subscribe([(event_type, handler)], options)
                return handler

            return decorate
        self._subscribe([(event_type, handler)], options)
        return None

    def register(self, handlers: object, /, **options: Any) -> None:
        """Subscribe every `handle_…` method of an object to the events that its first parameter is annotated with.

        `options` are those of `subscribe`, for each of them. Raises `SubscriptionError`, and then subscribes none.
        """
        self._subscribe(handlers_of(handlers), options)

    def _subscribe(
        self, found: Iterable[tuple[type[DomainEvent], Callable[..., Any]]], options: dict[str, Any]
    ) -> None:
        """All of them or, where one is refused, none."""
        before = self.subscriptions.snapshot()
        try:
            for event_type, handler in found:
                subscription = self.subscriptions.add(event_type, handler, **options)
                if event_type is not DomainEvent:
                    self._know(event_type)
                self._subscribed(subscription)
        except BaseException:
            self.subscriptions.restore(before)
            raise

    def _subscribed(self, subscription: Subscription) -> None:
        """Called for each subscription as it is made or extended."""

    def _know(self, cls: type[DomainEvent]) -> None:
        definition = cls.__event__
        for stored in (definition.name, *definition.aliases):
            known = self._classes.setdefault(stored, cls)
            if known is not cls and event_class(stored) is not cls:
                raise EventDefinitionError(
                    f"this bus knows {known.__module__}.{known.__qualname__} as {stored!r}, and "
                    f"{cls.__module__}.{cls.__qualname__} would be stored under the same name. "
                    "Give one a name= of its own"
                )
            self._classes[stored] = cls

    def _check_events(self, events: tuple[DomainEvent, ...]) -> None:
        if not events:
            raise PublishError("publish takes one event or more: bus.publish(OrderPlaced(…), session=session)")
        for event in events:
            cls = type(event)
            if not isinstance(cls, EventType):
                hint = (
                    f"{event.__name__}(…)" if isinstance(event, EventType) else "an instance of a DomainEvent subclass"
                )
                raise PublishError(f"publish takes events, not {event!r}: pass {hint}")
            if cls.__event__.abstract:
                raise PublishError(f"{cls.__name__} is abstract: publish an event of a class made from it")

    def _context(self, subscription: Subscription, event: DomainEvent, metadata: Metadata) -> EventContext:
        return EventContext(
            event_id=event.event_id,
            event_type=type(event).__event__.name,
            subscription=subscription.name,
            metadata=metadata,
            log=self._raw_logger,
        )

    def _failed(self, subscription: Subscription, event: DomainEvent, error: BaseException) -> None:
        try:
            self.logger.warning(
                "event_handler_failed",
                event_type=type(event).__name__,
                event_id=str(event.event_id),
                handler_name=subscription.handler_name,
                error_type=type(error).__name__,
                error_message=str(error),
                subscription=subscription.name,
                exc_info=None if isinstance(error, CancelledError) else error,
            )
        except Exception:
            # a logger that raises, or an error that can't be shown, must not reach the publisher or another handler
            logging.getLogger("whereupon").exception(
                "event_handler_failed, and could not be logged: %s of %s",
                subscription.handler_name,
                type(event).__name__,
            )

    def _ended(self, seat: Seat, error: BaseException | None) -> None:
        """A handler that had to wait is over."""
        if error is not None:
            self._failed(seat.label, seat.argument, error)
