"""Which handlers can be subscribed, under which name, and what is refused before anything runs."""

from __future__ import annotations

import functools
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any, Optional, TypeVar
from unittest.mock import AsyncMock, MagicMock

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.ext import asyncio as sa
from sqlalchemy.orm import Session

from whereupon import (
    Delivery,
    DomainEvent,
    DuplicateSubscriptionError,
    EventContext,
    InMemoryEventBus,
    Retry,
    Subscription,
    SubscriptionError,
)

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession

pytestmark = pytest.mark.unit


class DoorOpened(DomainEvent):
    door: int = 0


class DoorClosed(DomainEvent):
    door: int = 0


class AboutDoors(DomainEvent, abstract=True):
    door: int = 0


E = TypeVar("E", bound=DomainEvent)


@pytest.fixture
def bus() -> InMemoryEventBus:
    return InMemoryEventBus()


def subscribed(handler: Any, event_type: Any = DoorOpened, **options: Any) -> Subscription:
    bus = InMemoryEventBus()
    bus.subscribe(event_type, handler, **options)
    (subscription,) = bus.subscriptions
    return subscription


async def on_opened(event: DoorOpened) -> None: ...


async def on_either(event: DoorOpened | DoorClosed) -> None: ...


async def on_any(event: DomainEvent) -> None: ...


class Porter:
    def __init__(self) -> None:
        self.heard: list[DomainEvent] = []

    async def handle(self, event: DoorOpened) -> None:
        self.heard.append(event)

    async def handle_closed(self, event: DoorClosed, context: EventContext) -> None:
        self.heard.append(event)

    async def greet(self, event: DoorOpened, greeting: str = "hello") -> None: ...

    @classmethod
    async def of_class(cls, event: DoorOpened) -> None: ...

    @staticmethod
    async def without_object(event: DoorOpened) -> None: ...


class Callable_:
    async def __call__(self, event: DoorOpened) -> None: ...


def logged(function: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
    @functools.wraps(function)
    async def wrapper(*args: Any, **kwargs: Any) -> None:
        await function(*args, **kwargs)

    return wrapper


def hurried(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return wrapper


@logged
async def decorated(event: DoorOpened, context: EventContext) -> None: ...


async def mail(event: DoorOpened, sender: str, context: EventContext) -> None: ...


# Names


@pytest.mark.parametrize(
    ("handler", "name", "handler_name"),
    [
        (on_opened, "on_opened", "on_opened"),
        (decorated, "decorated", "decorated"),
        (Porter().handle, "Porter", "handle"),
        (Porter().greet, "Porter.greet", "greet"),
        (Porter.of_class, "Porter.of_class", "of_class"),
        (Porter().of_class, "Porter.of_class", "of_class"),
        (Porter.without_object, "Porter.without_object", "without_object"),
        (Porter().without_object, "Porter.without_object", "without_object"),
        (Callable_(), "Callable_", "Callable_"),
        (functools.partial(mail, sender="x"), "mail", "mail"),
        (functools.partial(functools.partial(mail, sender="x"), sender="y"), "mail", "mail"),
        (functools.partial(Porter().greet, greeting="x"), "Porter.greet", "greet"),
        (functools.partial(Porter.greet, Porter()), "Porter.greet", "greet"),
        (AsyncMock(), "AsyncMock", "AsyncMock"),
        (AsyncMock(spec=on_opened), "AsyncMock", "AsyncMock"),
    ],
)
def test_a_handler_has_a_sensible_name(handler: Any, name: str, handler_name: str) -> None:
    subscription = subscribed(handler)
    assert (subscription.name, subscription.handler_name) == (name, handler_name)


def test_a_function_within_a_function_is_called_by_its_own_name() -> None:
    async def inner(event: DoorOpened) -> None: ...

    assert subscribed(inner).name == "inner"


def test_a_name_that_is_given_counts() -> None:
    subscription = subscribed(on_opened, name="porter.opens")
    assert (subscription.name, subscription.handler_name) == ("porter.opens", "on_opened")


def test_what_is_subscribed_by_default_is_durable_with_a_timeout_and_retries() -> None:
    subscription = subscribed(on_opened)
    assert (subscription.delivery, subscription.timeout, subscription.retry) == (Delivery.DURABLE, 30, Retry())
    assert not subscription.required


def test_the_decorator_returns_the_function_as_it_is(bus: InMemoryEventBus) -> None:
    async def handler(event: DoorOpened) -> None: ...

    assert bus.subscribe(DoorOpened, name="other")(handler) is handler
    assert [subscription.name for subscription in bus.subscriptions] == ["other"]


# What a handler may take


async def ctx_by_name(event: DoorOpened, *, context: EventContext) -> None: ...
async def ctx_optional(event: DoorOpened, context: EventContext | None = None) -> None: ...
async def session_checker_only(event: DoorOpened, db: AsyncSession) -> None: ...
async def session_or_none(event: DoorOpened, db: AsyncSession | None = None) -> None: ...
async def session_optional(event: DoorOpened, db: Optional[AsyncSession] = None) -> None: ...  # noqa: UP045
async def session_annotated(event: DoorOpened, db: Annotated[AsyncSession, "x"]) -> None: ...
async def session_imported(event: DoorOpened, db: sa.AsyncSession) -> None: ...
async def session_as_text(event: DoorOpened, db: "sa.AsyncSession | None") -> None: ...  # noqa: UP037
async def all_of_it(*args: Any, **kwargs: Any) -> None: ...


class OwnSession(sa.AsyncSession): ...


async def session_subclass(event: DoorOpened, db: OwnSession) -> None: ...


@pytest.mark.parametrize(
    ("handler", "context", "session"),
    [
        (on_opened, None, None),
        (ctx_by_name, "context", None),
        (ctx_optional, "context", None),
        (decorated, "context", None),
        (functools.partial(mail, sender="x"), "context", None),
        (functools.partial(ctx_optional, context=None), None, None),
        (session_checker_only, None, "db"),
        (session_or_none, None, "db"),
        (session_optional, None, "db"),
        (session_annotated, None, "db"),
        (session_imported, None, "db"),
        (session_as_text, None, "db"),
        (session_subclass, None, "db"),
        (all_of_it, None, None),
        (AsyncMock(), None, None),
    ],
)
def test_context_and_session_are_recognised_by_annotation(
    handler: Any, context: str | None, session: str | None
) -> None:
    subscription = subscribed(handler)
    assert (subscription.context_parameter, subscription.session_parameter) == (context, session)
    assert subscription.delivery is (Delivery.TRANSACTIONAL if session else Delivery.DURABLE)


async def untyped(event): ...  # type: ignore[no-untyped-def] # noqa: ANN001, ANN201, RUF100
async def for_object(event: object) -> None: ...
async def for_anything(event: Any) -> None: ...
async def for_none_too(event: DoorOpened | None) -> None: ...
async def generic(event: E) -> None: ...  # pyright: ignore[reportInvalidTypeVarUse]
async def for_unknown(event: Unknown) -> None: ...  # type: ignore[name-defined]  # noqa: F821


@pytest.mark.parametrize(
    "handler", [untyped, for_object, for_anything, for_none_too, generic, for_unknown, on_either, on_any]
)
def test_a_handler_of_more_than_the_event_is_taken(handler: Any) -> None:
    assert subscribed(handler).event_types == {DoorOpened}


def test_local_events_are_found_in_annotations_written_as_text() -> None:
    class LatchLifted(DomainEvent): ...

    class LatchDropped(DomainEvent): ...

    async def on_lifted(event: LatchLifted, context: Unknown = 5) -> None: ...  # type: ignore[name-defined]  # noqa: F821

    assert subscribed(on_lifted, LatchLifted).event_types == {LatchLifted}
    with pytest.raises(SubscriptionError, match="on_lifted is for LatchLifted, but subscribed to LatchDropped"):
        subscribed(on_lifted, LatchDropped)


def test_domain_event_hears_everything(bus: InMemoryEventBus) -> None:
    bus.subscribe(DomainEvent, on_any)
    bus.subscribe(DoorClosed, on_either)
    assert [s.name for s in bus.subscriptions.hearing(DoorOpened)] == ["on_any"]
    assert [s.name for s in bus.subscriptions.hearing(DoorClosed)] == ["on_any", "on_either"]


def test_matching_is_by_exact_type(bus: InMemoryEventBus) -> None:
    class DoorForced(DoorOpened): ...

    bus.subscribe(DoorOpened, on_opened)
    assert bus.subscriptions.hearing(DoorForced) == ()


def test_a_subscription_made_later_is_heard_though_the_event_was_looked_up_before(bus: InMemoryEventBus) -> None:
    assert bus.subscriptions.hearing(DoorOpened) == ()
    bus.subscribe(DoorOpened, on_opened)
    assert [s.name for s in bus.subscriptions.hearing(DoorOpened)] == ["on_opened"]


# What is refused


def sync(event: DoorOpened) -> None: ...


@hurried
async def wrapped_sync(event: DoorOpened) -> None: ...


async def streaming(event: DoorOpened) -> AsyncIterator[int]:
    yield 1


async def without_event() -> None: ...
async def event_by_name(*, event: DoorOpened) -> None: ...
async def only_keywords(**kwargs: Any) -> None: ...
async def unknown_parameter(event: DoorOpened, mailer: str) -> None: ...
async def untyped_session(event: DoorOpened, session) -> None: ...  # type: ignore[no-untyped-def]
async def sync_session(event: DoorOpened, session: Session) -> None: ...
async def context_by_position(event: DoorOpened, context: EventContext, /) -> None: ...
async def two_contexts(event: DoorOpened, a: EventContext, b: EventContext) -> None: ...
async def two_sessions(event: DoorOpened, a: sa.AsyncSession, b: sa.AsyncSession) -> None: ...
async def on_closed(event: DoorClosed) -> None: ...
async def on_text(event: str) -> None: ...


class SyncCallable:
    def __call__(self, event: DoorOpened) -> None: ...


@pytest.mark.parametrize(
    ("handler", "told"),
    [
        (sync, r"sync is not async, .*Write `async def sync\(…\)`"),
        (wrapped_sync, r"wrapped_sync is not async.*a decorator around it must be async as well"),
        (lambda event: None, r"not async.*Write `async def handler\(…\)`"),
        (functools.partial(sync), "sync is not async"),
        (streaming, "streaming is not async"),
        (SyncCallable(), "SyncCallable is not async"),
        (MagicMock(), "MagicMock is not async"),
        (print, "print is not async"),
        (None, "subscribe takes a handler, an async function, not None"),
        (5, "subscribe takes a handler, an async function, not 5"),
        ("on_opened", "not 'on_opened'"),
        (Porter, r"Porter is a class: .*bus\.register\(Porter\(…\)\)"),
        (Porter.handle_closed, r"Porter\.handle_closed is a method without its object: .*Porter\(…\)\.handle_closed"),
        (without_event, r"takes no event: write `async def without_event\(event: DoorOpened\)`"),
        (event_by_name, "event_by_name takes no event"),
        (only_keywords, "only_keywords takes no event"),
        (unknown_parameter, "takes 'mailer', and nobody would pass it.*functools.partial"),
        (untyped_session, "takes 'session', and nobody would pass it.*AsyncSession. Annotate it so"),
        (sync_session, "takes a Session as 'session', but handlers are async: annotate it AsyncSession"),
        (context_by_position, "takes 'context' by position only, but it is passed by name: drop the `/`"),
        (two_contexts, "takes 'a' and 'b', and there is one context"),
        (two_sessions, "takes 'a' and 'b', and there is one session"),
        (on_closed, "on_closed is for DoorClosed, but subscribed to DoorOpened.*Subscribe it to DoorClosed"),
        (on_text, "on_text is for str, but subscribed to DoorOpened"),
    ],
)  # fmt: skip
def test_a_handler_that_could_not_be_called_is_refused_with_the_way_out(handler: Any, told: str) -> None:
    bus = InMemoryEventBus()
    with pytest.raises(SubscriptionError, match=told):
        bus.subscribe(DoorOpened, handler)
    assert not list(bus.subscriptions)


@pytest.mark.parametrize(
    ("event_type", "told"),
    [
        (DoorOpened(), r"takes an event class first, not .*DoorOpened\(.*bus\.subscribe\(OrderPlaced, handler\)"),
        ("DoorOpened", "takes an event class first, not 'DoorOpened'"),
        (None, "takes an event class first, not None"),
        (int, "takes an event class first"),
        (AboutDoors, "AboutDoors is abstract, .*Subscribe to the classes made from it, or to DomainEvent"),
    ],
)
def test_what_is_no_event_class_is_refused(event_type: Any, told: str) -> None:
    with pytest.raises(SubscriptionError, match=told):
        subscribed(on_any, event_type)


def test_a_handler_of_one_event_can_not_hear_everything() -> None:
    with pytest.raises(SubscriptionError, match="on_opened is for DoorOpened, but subscribed to DomainEvent"):
        subscribed(on_opened, DomainEvent)


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"timeout": 0}, "timeout=0: it is seconds, more than 0, or None"),
        ({"timeout": -1}, "timeout=-1"),
        ({"timeout": float("nan")}, "timeout=nan"),
        ({"timeout": float("inf")}, "timeout=inf"),
        ({"timeout": "5"}, "timeout='5'"),
        ({"timeout": True}, "timeout=True"),
        ({"concurrency": 0}, "concurrency=0: it is how many run at once, 1 or more"),
        ({"concurrency": 1.5}, r"concurrency=1\.5"),
        ({"concurrency": True}, "concurrency=True"),
        ({"retry": 5}, r"retry=5: write retry=Retry\(max_attempts=…\)"),
        ({"delivery": "soon"}, r"delivery='soon': it is one of Delivery\.IN_TRANSACTION"),
        ({"required": True}, r"on_opened is required, but runs durable.*Say delivery=Delivery\.IN_TRANSACTION"),
        (
            {"delivery": Delivery.TRANSACTIONAL},
            "TRANSACTIONAL, but takes no session.*Add a parameter annotated AsyncSes",
        ),
        ({"name": ""}, "named by printable text of 1 to 200 characters, not ''"),
        ({"name": " "}, "named by printable text"),
        ({"name": 5}, "not 5"),
        ({"name": "x" * 201}, "1 to 200 characters"),
        ({"name": "a\0b"}, "printable"),
        ({"retries": 5, "prioritiy": 1}, "with retries, prioritiy, and there is no such option: use name, delivery"),
    ],
)
def test_an_option_that_means_nothing_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(SubscriptionError, match=told):
        subscribed(on_opened, **options)


def test_a_handler_with_a_session_can_not_be_durable() -> None:
    with pytest.raises(SubscriptionError, match=r"takes a session, but is DURABLE: .*Leave delivery out"):
        subscribed(session_imported, delivery=Delivery.DURABLE)
    assert subscribed(session_imported, delivery=Delivery.IN_TRANSACTION, required=True).required


def test_one_handler_twice_on_one_event_is_refused(bus: InMemoryEventBus) -> None:
    bus.subscribe(DoorOpened, on_opened)
    with pytest.raises(DuplicateSubscriptionError, match=r"on_opened is subscribed to DoorOpened already. Remove one"):
        bus.subscribe(DoorOpened, on_opened)


def test_one_handler_on_two_events_is_one_subscription(bus: InMemoryEventBus) -> None:
    bus.subscribe(DoorOpened, on_either, timeout=5)
    bus.subscribe(DoorClosed, on_either, timeout=5)
    (subscription,) = bus.subscriptions
    assert subscription.event_types == {DoorOpened, DoorClosed}


def test_one_handler_with_two_sets_of_options_needs_two_names(bus: InMemoryEventBus) -> None:
    bus.subscribe(DoorOpened, on_either)
    with pytest.raises(
        DuplicateSubscriptionError, match=r"other options already.*subscribe\(DoorClosed, …, name=\"…\"\)"
    ):
        bus.subscribe(DoorClosed, on_either, timeout=5)
    bus.subscribe(DoorClosed, on_either, timeout=5, name="slow")
    assert [subscription.name for subscription in bus.subscriptions] == ["on_either", "slow"]


def test_two_handlers_of_one_name_are_refused_and_both_named(bus: InMemoryEventBus) -> None:
    bus.subscribe(DoorOpened, Porter().handle)
    with pytest.raises(
        DuplicateSubscriptionError, match=r"subscribed as 'Porter': .*test_subscription\.Porter\.handle and"
    ):
        bus.subscribe(DoorOpened, Porter().handle)
    bus.subscribe(DoorOpened, Porter().handle, name="second porter")
    assert len(bus.subscriptions) == 2


# register


class Doorman(Porter):
    reads = 0

    async def handle_either(self, event: DoorOpened | DoorClosed) -> None: ...

    @property
    def handle_of_the_door(self) -> str:
        type(self).reads += 1
        raise AssertionError("nobody reads this")

    @functools.cached_property
    def handle_of_the_window(self) -> str:
        type(self).reads += 1
        raise AssertionError("nobody reads this")

    handle_size = 5

    def opens(self) -> None: ...


def test_register_subscribes_every_handler_by_its_annotation(bus: InMemoryEventBus) -> None:
    bus.register(Doorman(), timeout=3)
    assert {s.name: s.event_types for s in bus.subscriptions} == {
        "Doorman": {DoorOpened},
        "Doorman.handle_closed": {DoorClosed},
        "Doorman.handle_either": {DoorOpened, DoorClosed},
    }
    assert {s.timeout for s in bus.subscriptions} == {3}
    assert Doorman.reads == 0, "a property may do anything when it is read"


def test_register_knows_an_event_that_is_only_named_for_type_checkers(bus: InMemoryEventBus) -> None:
    class Waiter:
        async def handle_opened(self, event: DoorOpened, db: AsyncSession) -> None: ...

    bus.register(Waiter())
    (subscription,) = bus.subscriptions
    assert (subscription.event_types, subscription.session_parameter) == ({DoorOpened}, "db")


def test_register_takes_a_handler_of_everything(bus: InMemoryEventBus) -> None:
    class Everything:
        async def handle(self, event: DomainEvent) -> None: ...

    bus.register(Everything())
    assert [s.name for s in bus.subscriptions.hearing(DoorClosed)] == ["Everything"]


async def test_what_is_registered_is_called(bus: InMemoryEventBus) -> None:
    porter = Porter()
    bus.register(porter)
    events = DoorOpened(door=1), DoorClosed(door=1)
    await bus.publish(*events)
    assert porter.heard == list(events)


class Untold:
    async def handle_a(self, event: DoorOpened) -> None: ...

    async def handle_b(self, event) -> None: ...  # type: ignore[no-untyped-def]


class Nobody:
    def helps(self) -> None: ...


class Sync:
    async def handle_a(self, event: DoorOpened) -> None: ...

    def handle_b(self, event: DoorOpened) -> None: ...


class NoParameter:
    async def handle_a(self) -> None: ...


class AbstractOnly:
    async def handle_a(self, event: DoorOpened) -> None: ...

    async def handle_b(self, event: AboutDoors) -> None: ...


@pytest.mark.parametrize(
    ("handlers", "told"),
    [
        (Porter, r"register takes an instance: bus\.register\(Porter\(…\)\)"),
        (Untold(), r"Untold\.handle_b does not say which event it hears: .*rename it if it is no handler"),
        (NoParameter(), r"NoParameter\.handle_a does not say which event"),
        (Nobody(), r"Nobody has no handler: register looks for async methods named handle_… \(or handle\)"),
        (Sync(), r"Sync\.handle_b is not async"),
        (AbstractOnly(), "AboutDoors is abstract"),
        (5, "int has no handler"),
    ],
)
def test_what_can_not_be_registered_subscribes_nothing(bus: InMemoryEventBus, handlers: Any, told: str) -> None:
    with pytest.raises(SubscriptionError, match=told):
        bus.register(handlers)
    assert not list(bus.subscriptions)


def test_register_is_all_or_nothing_when_a_name_is_taken(bus: InMemoryEventBus) -> None:
    bus.subscribe(DoorClosed, on_closed, name="Porter.handle_closed")
    with pytest.raises(DuplicateSubscriptionError, match=r"Porter\.handle_closed"):
        bus.register(Porter())
    assert [s.name for s in bus.subscriptions] == ["Porter.handle_closed"]
    assert bus.subscriptions.hearing(DoorOpened) == ()


def test_a_refused_registration_leaves_a_subscription_that_it_would_have_extended(bus: InMemoryEventBus) -> None:
    class Watchman:
        async def handle(self, event: DoorOpened | DoorClosed) -> None: ...

    watchman = Watchman()
    bus.subscribe(DoorClosed, watchman.handle)
    with pytest.raises(DuplicateSubscriptionError, match="Watchman is subscribed to DoorClosed already"):
        bus.register(watchman)
    assert [s.event_types for s in bus.subscriptions] == [{DoorClosed}]
    assert bus.subscriptions.hearing(DoorOpened) == ()


# The guide's troubleshooting


def test_the_guides_wrong_handlers_are_refused_with_a_helpful_message(bus: InMemoryEventBus) -> None:
    class UserRegistered(DomainEvent): ...

    class UserRegistrationSucceeded(DomainEvent): ...

    class Handlers:
        async def handle(self, event: UserRegistrationSucceeded) -> None: ...

        def handle_event(self, event: UserRegistrationSucceeded) -> None: ...

    handlers: Any = Handlers()
    with pytest.raises(SubscriptionError, match="is for UserRegistrationSucceeded, but subscribed to UserRegistered"):
        bus.subscribe(UserRegistered, handlers.handle)
    with pytest.raises(SubscriptionError, match=r"Handlers\.handle_event is not async, so nobody could await it"):
        bus.subscribe(UserRegistrationSucceeded, handlers.handle_event)
    bus.subscribe(UserRegistrationSucceeded, handlers.handle)


# Retry


@given(
    first=st.floats(0, 1e6),
    factor=st.floats(1, 1e3),
    longest=st.floats(0, 1e7),
    attempt=st.integers(1, 10**9),
)
def test_a_wait_is_never_longer_than_its_ceiling(first: float, factor: float, longest: float, attempt: int) -> None:
    retry = Retry(first=first, factor=factor, longest=longest)
    assert 0 <= retry.wait(attempt) <= retry.ceiling(attempt) <= longest
    assert retry.ceiling(attempt) <= retry.ceiling(attempt + 1)
    if not first:
        assert retry.ceiling(attempt) == 0


def test_the_ceiling_doubles_up_to_the_longest() -> None:
    assert [Retry(first=1, longest=10).ceiling(n) for n in range(1, 7)] == [1, 2, 4, 8, 10, 10]


def test_waits_are_spread_over_the_whole_range() -> None:
    waits = [Retry(first=8).wait(1) for _ in range(2000)]
    assert min(waits) < 1
    assert max(waits) > 7
    assert 3.5 < sum(waits) / len(waits) < 4.5


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"max_attempts": 0}, r"max_attempts=0\): a delivery is tried once at least"),
        ({"max_attempts": 2.5}, r"whole number from 1 up"),
        ({"max_attempts": True}, r"max_attempts=True"),
        ({"first": -1}, r"first=-1.*both are seconds, 0 or more"),
        ({"first": float("nan")}, "first=nan"),
        ({"longest": float("inf")}, "longest=inf"),
        ({"factor": 0.5}, r"factor=0\.5.*so 1 or more"),
        ({"factor": float("nan")}, "factor=nan"),
    ],
)
def test_a_retry_that_means_nothing_is_refused(options: dict[str, Any], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        Retry(**options)
