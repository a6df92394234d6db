"""Subscriptions: which handler hears which events, how it is served, and whether it can be at all."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import functools
import inspect
import json
import random
import re
import sys
import types
import typing
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, Concatenate, Final, Literal, TypeAlias, TypeVar

from whereupon.context import EventContext
from whereupon.errors import DuplicateSubscriptionError, SubscriptionError
from whereupon.event import DomainEvent, EventType, ensure_resolved, event_class

E = TypeVar("E", bound=DomainEvent)
Handler: TypeAlias = Callable[Concatenate[E, ...], Coroutine[Any, Any, None]]

DEFAULT_TIMEOUT: Final = 30.0
DEFAULT_LANES: Final = 4

_UNITS: Final = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}

Start: TypeAlias = Literal["now", "beginning"] | datetime


class Delivery(enum.StrEnum):
    """How a subscription is served; what each survives is in the README's table."""

    IN_TRANSACTION = "in_transaction"
    """Inside `publish`, in the publisher's transaction, in a savepoint of its own."""
    AFTER_COMMIT = "after_commit"
    """Right after the commit, in this process; nothing is stored, so a crash loses it."""
    DURABLE = "durable"
    """After the commit, on any worker, until it succeeds or is dead."""
    TRANSACTIONAL = "transactional"
    """As DURABLE, in a transaction that also records the delivery, so its writes happen once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Retry:
    """When a failed delivery is tried again: exponential backoff with full jitter.

    The wait before attempt n+1 is drawn evenly from 0 to `min(longest, first * factor ** (n - 1))` seconds
    (Marc Brooker, "Exponential Backoff and Jitter", AWS Architecture Blog, 2015). After `max_attempts`
    calls the delivery is a dead letter.
    """

    max_attempts: int = 10
    first: float = 1.0
    factor: float = 2.0
    longest: float = 3600.0

    def __post_init__(self) -> None:
        if type(self.max_attempts) is not int or self.max_attempts < 1:
            raise ValueError(
                f"Retry(max_attempts={self.max_attempts!r}): a delivery is tried once at least. "
                "Use a whole number from 1 up"
            )
        if not (0 <= self.first < float("inf") and 0 <= self.longest < float("inf")):
            raise ValueError(f"Retry(first={self.first}, longest={self.longest}): both are seconds, 0 or more")
        if not 1 <= self.factor < float("inf"):
            raise ValueError(f"Retry(factor={self.factor}): each wait is the last one times this, so 1 or more")

    def ceiling(self, attempt: int) -> float:
        """The longest wait, in seconds, after the failure of this attempt (1 for the first)."""
        try:
            return min(self.longest, self.first * float(self.factor) ** (attempt - 1))
        except OverflowError:
            return self.longest if self.first else 0.0

    def wait(self, attempt: int) -> float:
        return random.uniform(0, self.ceiling(attempt))


@dataclass(eq=False, slots=True)
class Subscription:
    """One named handler and the event types it hears. Made by `subscribe`; read it, don't build it."""

    name: str
    handler: Callable[..., Awaitable[None]]
    handler_name: str
    """What log records call the handler: the function's or method's own name."""
    event_types: set[type[DomainEvent]]
    delivery: Delivery
    retry: Retry
    timeout: float | None
    """Seconds that one call may take, or None."""
    concurrency: int
    required: bool
    context_parameter: str | None
    session_parameter: str | None
    ordered_by: str | None = None
    """The field whose equal values are delivered one at a time, in the order of publishing."""
    lanes: int = DEFAULT_LANES
    """Into how many shares the subscription is split when it is first registered, so that workers can share it."""
    batch: int = 1
    """How many deliveries may share one transaction."""
    rate: float | None = None
    """Deliveries a second, by all workers together, or None."""
    start: Start = "now"
    """Where in the log it begins when it is first registered: now, at the beginning, or at a time."""
    backfill_rate: float | None = None
    """As `rate`, for events that were published before it was registered."""
    within: float | None = None
    """Its promise: seconds from the publish of an event until it is settled, at the latest."""
    recorder: Any = field(default=None, repr=False)
    """An object that writes with the log instead of being called (see `Recorder`)."""

    def hears(self, event_type: type[DomainEvent]) -> bool:
        return event_type in self.event_types or DomainEvent in self.event_types

    def call(self, event: DomainEvent, context: EventContext | None, session: Any) -> Awaitable[None]:
        extra: dict[str, Any] = {}
        if self.context_parameter is not None:
            extra[self.context_parameter] = context
        if self.session_parameter is not None:
            extra[self.session_parameter] = session
        return self.handler(event, **extra)

    @property
    def owner(self) -> str:
        """What an error about the subscription calls it: the handler's class, if it has one."""
        return self.name.split(".")[0]

    @property
    def definition(self) -> str:
        """What two builds must agree on to serve it at once: which events, in which order, how."""
        names = ["*"] if DomainEvent in self.event_types else sorted(cls.__event__.name for cls in self.event_types)
        return json.dumps({"types": names, "ordered_by": self.ordered_by, "delivery": self.delivery.value})


class Subscriptions:
    """The subscriptions of one bus."""

    def __init__(self) -> None:
        self._by_name: dict[str, Subscription] = {}
        self._hearing: dict[type[DomainEvent], tuple[Subscription, ...]] = {}

    def __iter__(self) -> Iterator[Subscription]:
        return iter(self._by_name.values())

    def __len__(self) -> int:
        return len(self._by_name)

    def __contains__(self, name: object) -> bool:
        return name in self._by_name

    def __getitem__(self, name: str) -> Subscription:
        return self._by_name[name]

    def snapshot(self) -> dict[str, tuple[Subscription, set[type[DomainEvent]]]]:
        return {name: (subscription, set(subscription.event_types)) for name, subscription in self._by_name.items()}

    def restore(self, snapshot: dict[str, tuple[Subscription, set[type[DomainEvent]]]]) -> None:
        """Be as at the time of that `snapshot`."""
        for subscription, event_types in snapshot.values():
            subscription.event_types = event_types
        self._by_name = {name: subscription for name, (subscription, _) in snapshot.items()}
        self._hearing.clear()

    def hearing(self, event_type: type[DomainEvent]) -> tuple[Subscription, ...]:
        found = self._hearing.get(event_type)
        if found is None:
            found = tuple(s for s in self._by_name.values() if s.hears(event_type))
            self._hearing[event_type] = found
        return found

    def add(
        self,
        event_type: type[DomainEvent],
        handler: Callable[..., Any],
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
        **unknown: object,
    ) -> Subscription:
        """Check everything that can be checked of a subscription, and keep it. Raises `SubscriptionError`."""
        if not isinstance(event_type, EventType):
            raise SubscriptionError(
                f"subscribe takes an event class first, not {event_type!r}: bus.subscribe(OrderPlaced, handler)"
            )
        definition = ensure_resolved(event_type)
        if definition.abstract and event_type is not DomainEvent:
            raise SubscriptionError(
                f"{event_type.__name__} is abstract, and matching is by exact type, so its handler would hear nothing. "
                "Subscribe to the classes made from it, or to DomainEvent, which hears everything"
            )
        handler_name, default_name = _names(handler)
        name = default_name if name is None else name
        if unknown:
            raise SubscriptionError(
                f"{name} is subscribed with {', '.join(unknown)}, and there is no such option: "
                "use name, delivery, retry, timeout, concurrency, required, ordered_by, lanes, batch, rate, start, "
                "backfill_rate or within"
            )
        context_parameter, session_parameter = _inspect(handler, name, event_type)
        recorder = _recorder_of(handler)
        delivery = _delivery(name, delivery, handler, session_parameter)
        retry = Retry() if retry is None else retry
        _check_options(name, delivery, retry, timeout, concurrency, required, session_parameter)
        _check_sharing(name, delivery, ordered_by, lanes, batch, rate)
        _check_start(name, delivery, start, backfill_rate)
        promise = _promise(name, delivery, within)
        if ordered_by is not None:
            _check_order(name, event_type, ordered_by)
        made = Subscription(
            name=name,
            handler=handler,
            handler_name=handler_name,
            event_types={event_type},
            delivery=delivery,
            retry=retry,
            timeout=timeout,
            concurrency=concurrency,
            required=required,
            context_parameter=context_parameter,
            session_parameter=session_parameter,
            ordered_by=ordered_by,
            lanes=lanes,
            batch=batch,
            rate=rate,
            start=start,
            backfill_rate=backfill_rate,
            within=promise,
            recorder=recorder if delivery is Delivery.IN_TRANSACTION else None,
        )
        known = self._by_name.get(name)
        if known is None:
            self._by_name[name] = known = made
        elif _same(known, made) and event_type not in known.event_types:
            known.event_types.add(event_type)
        else:
            raise DuplicateSubscriptionError(_duplicate(known, made, event_type))
        self._hearing.clear()
        return known


def _recorder_of(handler: Any) -> Any:
    """The object that a handler belongs to, where that can write its records with the log itself."""
    owner = getattr(handler, "__self__", handler)
    cls = type(owner)  # asked of the class: a mock has every attribute
    return owner if callable(getattr(cls, "record", None)) and hasattr(cls, "delivery") else None


def _delivery(name: str, given: Any, handler: Any, session_parameter: str | None) -> Delivery:
    """How it is served: as given, else as the handler's class says, else by whether it takes a session."""
    if given is None:
        given = getattr(type(getattr(handler, "__self__", handler)), "delivery", None)
    if given is None:
        return Delivery.TRANSACTIONAL if session_parameter else Delivery.DURABLE
    try:
        return Delivery(given)
    except ValueError:
        kinds = ", ".join(f"Delivery.{kind.name}" for kind in Delivery)
        raise SubscriptionError(f"{name} has delivery={given!r}: it is one of {kinds}") from None


def _same(known: Subscription, made: Subscription) -> bool:
    return known.handler == made.handler and all(
        getattr(known, option) == getattr(made, option)
        for option in (
            "delivery",
            "retry",
            "timeout",
            "concurrency",
            "required",
            "ordered_by",
            "lanes",
            "batch",
            "rate",
            "start",
            "backfill_rate",
            "within",
        )
    )


def _duplicate(known: Subscription, made: Subscription, event_type: type[DomainEvent]) -> str:
    if known.handler == made.handler and event_type in known.event_types:
        return f"{made.name} is subscribed to {event_type.__name__} already. Remove one of the two"
    if known.handler == made.handler:
        return (
            f"{made.name} is subscribed with other options already, and a subscription has one set of them. "
            f'Give this one a name of its own: subscribe({event_type.__name__}, …, name="…")'
        )
    return (
        f"two handlers would be subscribed as {made.name!r}: {_described(known.handler)} and "
        f"{_described(made.handler)}. The name is what progress is stored under. Give one a name of its own: "
        f'subscribe({event_type.__name__}, …, name="…")'
    )


def _described(handler: Callable[..., Any]) -> str:
    inner = _innermost(handler)
    return f"{getattr(inner, '__module__', '?')}.{getattr(inner, '__qualname__', type(inner).__qualname__)}"


def _check_options(
    name: Any,
    delivery: Delivery,
    retry: Any,
    timeout: Any,
    concurrency: Any,
    required: bool,
    session_parameter: str | None,
) -> None:
    if not isinstance(name, str) or not name.strip() or len(name) > 200 or not name.isprintable():
        raise SubscriptionError(f"a subscription is named by printable text of 1 to 200 characters, not {name!r}")
    if not isinstance(retry, Retry):
        raise SubscriptionError(f"{name} has retry={retry!r}: write retry=Retry(max_attempts=…)")
    if timeout is not None and not (type(timeout) in (int, float) and 0 < timeout < float("inf")):
        raise SubscriptionError(f"{name} has timeout={timeout!r}: it is seconds, more than 0, or None for no limit")
    if type(concurrency) is not int or concurrency < 1:
        raise SubscriptionError(f"{name} has concurrency={concurrency!r}: it is how many run at once, 1 or more")
    if required and delivery is not Delivery.IN_TRANSACTION:
        raise SubscriptionError(
            f"{name} is required, but runs {delivery}: only a handler that runs IN_TRANSACTION can make publish fail. "
            "Say delivery=Delivery.IN_TRANSACTION, or leave required out"
        )
    if delivery is Delivery.TRANSACTIONAL and session_parameter is None:
        raise SubscriptionError(
            f"{name} is TRANSACTIONAL, but takes no session, so nothing would be in that transaction. "
            "Add a parameter annotated AsyncSession, or say delivery=Delivery.DURABLE"
        )
    if delivery is Delivery.DURABLE and session_parameter is not None:
        raise SubscriptionError(
            f"{name} takes a session, but is DURABLE: its writes and its progress would commit apart. "
            "Leave delivery out (TRANSACTIONAL is the default for it), or open a session of your own in the handler"
        )


def _check_sharing(name: str, delivery: Delivery, ordered_by: Any, lanes: Any, batch: Any, rate: Any) -> None:
    if type(lanes) is not int or not 1 <= lanes <= 1024:
        raise SubscriptionError(f"{name} has lanes={lanes!r}: it is into how many shares it is split, 1 to 1024")
    if type(batch) is not int or batch < 1:
        raise SubscriptionError(f"{name} has batch={batch!r}: it is how many deliveries share a transaction, 1 or more")
    if batch > 1 and delivery is not Delivery.TRANSACTIONAL:
        raise SubscriptionError(
            f"{name} has batch={batch}, but runs {delivery}: only deliveries in transactions can share one. Take a "
            "session in the handler, or leave batch out"
        )
    if batch > 1 and ordered_by is not None:
        raise SubscriptionError(
            f"{name} has batch={batch} and ordered_by={ordered_by!r}: a key's deliveries run one at a time. Drop one"
        )
    if rate is not None and not (type(rate) in (int, float) and 0 < rate < float("inf")):
        raise SubscriptionError(f"{name} has rate={rate!r}: it is deliveries a second, more than 0, or None")
    if delivery in (Delivery.IN_TRANSACTION, Delivery.AFTER_COMMIT) and (ordered_by is not None or rate is not None):
        raise SubscriptionError(
            f"{name} runs {delivery}, where it can't wait: ordered_by and rate are for DURABLE and TRANSACTIONAL"
        )


def _check_start(name: str, delivery: Delivery, start: Any, backfill_rate: Any) -> None:
    if isinstance(start, datetime):
        if start.tzinfo is None:
            raise SubscriptionError(f"{name} has start={start!r}, in no time zone: write datetime(…, tzinfo=UTC)")
    elif start not in ("now", "beginning"):
        raise SubscriptionError(f'{name} has start={start!r}: it is "now", "beginning" or a datetime with a time zone')
    if start != "now" and delivery in (Delivery.IN_TRANSACTION, Delivery.AFTER_COMMIT):
        raise SubscriptionError(
            f"{name} runs {delivery}, so it can't hear of what was published before it: start is for DURABLE and "
            "TRANSACTIONAL"
        )
    if backfill_rate is not None and not (type(backfill_rate) in (int, float) and 0 < backfill_rate < float("inf")):
        raise SubscriptionError(
            f"{name} has backfill_rate={backfill_rate!r}: it is deliveries a second, more than 0, or None"
        )
    if backfill_rate is not None and start == "now":
        raise SubscriptionError(
            f'{name} has a backfill_rate, but starts now, so there is nothing to catch up on: say start="beginning" or '
            "drop it"
        )


def _promise(name: str, delivery: Delivery, within: Any) -> float | None:
    if within is None:
        return None
    if delivery in (Delivery.IN_TRANSACTION, Delivery.AFTER_COMMIT):
        raise SubscriptionError(
            f"{name} runs {delivery}, in the publisher's process and at once: within is for DURABLE and TRANSACTIONAL"
        )
    seconds: float | None = None
    if isinstance(within, timedelta):
        seconds = within.total_seconds()
    elif isinstance(within, str):
        found = re.fullmatch(r"(\d+(?:\.\d+)?) *(ms|s|m|h|d)", within.strip())
        seconds = float(found[1]) * _UNITS[found[2]] if found else None
    elif type(within) in (int, float):
        seconds = float(within)
    if seconds is None or not 0 < seconds < float("inf"):
        raise SubscriptionError(
            f"{name} has within={within!r}: it is how long after its publish an event is settled at the latest, in "
            'seconds, as a timedelta or as text with ms, s, m, h or d: within="30s"'
        )
    return seconds


def _check_order(name: str, event_type: type[DomainEvent], field: Any) -> None:
    if event_type is DomainEvent:
        raise SubscriptionError(
            f"{name} hears everything, and not every event has a field {field!r}: subscribe it to the events that do"
        )
    if not isinstance(field, str) or field not in {part.name for part in dataclasses.fields(event_type)}:
        known = ", ".join(part.name for part in dataclasses.fields(event_type))
        raise SubscriptionError(
            f"{name} is ordered by {field!r}, and {event_type.__name__} has no such field: it has {known}"
        )


def _innermost(handler: Any) -> Any:
    while isinstance(handler, (functools.partial, functools.partialmethod)):
        handler = handler.func
    return handler


def _names(handler: Any) -> tuple[str, str]:
    """The handler's own name, and the one its subscription gets unless told otherwise."""
    inner = _innermost(handler)
    own, qualname = getattr(inner, "__name__", None), getattr(inner, "__qualname__", None)
    if not isinstance(own, str) or not isinstance(qualname, str):  # an object with __call__, or a mock
        own = type(inner).__name__
        return own, own
    owner = getattr(inner, "__self__", None)
    if owner is not None and not isinstance(owner, types.ModuleType):
        cls = owner if isinstance(owner, type) else type(owner)
        return own, cls.__name__ if own == "handle" else f"{cls.__name__}.{own}"
    return own, qualname.rpartition("<locals>.")[2]


def _inspect(handler: Any, name: str, event_type: type[DomainEvent]) -> tuple[str | None, str | None]:
    """Check the signature; return the names of the parameters for the context and for the session."""
    if not callable(handler):
        raise SubscriptionError(f"subscribe takes a handler, an async function, not {handler!r}")
    if isinstance(handler, type):
        raise SubscriptionError(
            f"{handler.__name__} is a class: subscribe a method of an instance, or bus.register({handler.__name__}(…))"
        )
    inner = _innermost(handler)
    function = inner if inspect.isroutine(inner) else type(inner).__call__
    written = f"async def {_names(handler)[0].replace('<lambda>', 'handler')}"
    if not _is_async(inner) and not _is_async(function):
        raise SubscriptionError(
            f"{name} is not async, so nobody could await it. Write `{written}(…)`; a decorator around it must be async "
            "as well"
        )
    try:
        signature = inspect.signature(handler)
    except (TypeError, ValueError) as error:
        raise SubscriptionError(f"{name} has no signature to read: {error}") from error
    hints = _hints(inspect.unwrap(function))
    parameters = list(signature.parameters.values())
    if not parameters or parameters[0].kind in (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD):
        raise SubscriptionError(f"{name} takes no event: write `{written}(event: {event_type.__name__})`")
    first, *rest = parameters
    if first.name == "self" and inspect.isfunction(inner) and len(parameters) > 1:
        raise SubscriptionError(
            f"{name} is a method without its object: subscribe that of an instance, "
            f"{inner.__qualname__.rpartition('.')[0].rpartition('.')[2] or 'object'}(…).{inner.__name__}"
        )
    if first.kind is not inspect.Parameter.VAR_POSITIONAL:
        _check_event_annotation(name, hints.get(first.name, first.annotation), event_type)
    bound = _bound(handler)
    found: dict[str, str] = {}
    for parameter in rest:
        if parameter.kind in (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD):
            continue
        if parameter.name in bound:
            continue
        meaning = _meaning(hints.get(parameter.name, parameter.annotation))
        if meaning in ("context", "session") and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            if meaning in found:
                raise SubscriptionError(
                    f"{name} takes {found[meaning]!r} and {parameter.name!r}, and there is one {meaning}. Drop one"
                )
            found[meaning] = parameter.name
        elif parameter.default is inspect.Parameter.empty:
            raise SubscriptionError(_unknown_parameter(name, parameter, meaning))
    return found.get("context"), found.get("session")


def _bound(handler: Any) -> set[str]:
    """The parameters that `functools.partial` has given a value already."""
    names: set[str] = set()
    while isinstance(handler, functools.partial):
        names |= handler.keywords.keys()
        handler = handler.func
    return names


def _unknown_parameter(name: str, parameter: inspect.Parameter, meaning: str | None) -> str:
    if meaning == "sync session":
        return f"{name} takes a Session as {parameter.name!r}, but handlers are async: annotate it AsyncSession"
    if meaning is not None:
        return f"{name} takes {parameter.name!r} by position only, but it is passed by name: drop the `/`"
    return (
        f"{name} takes {parameter.name!r}, and nobody would pass it: a handler takes the event and, by annotation, "
        "EventContext and AsyncSession. Annotate it so, give it a default, or bind it with functools.partial"
    )


def _is_async(function: Any) -> bool:
    if inspect.iscoroutinefunction(function):
        return True
    if sys.version_info >= (3, 12):
        return False
    # a marker that mocks and asyncio's legacy coroutines carry; inspect knows it from 3.12 on
    import asyncio

    return asyncio.iscoroutinefunction(function)  # type: ignore[deprecated]


def _hints(function: Any) -> dict[str, Any]:
    """Annotations, resolved where they can be; a name known to type checkers only stays text."""
    try:
        return typing.get_type_hints(function)
    except (NameError, TypeError, AttributeError, SyntaxError):
        pass
    names = dict(getattr(function, "__globals__", {}))
    if inspect.isfunction(function):
        with contextlib.suppress(ValueError):  # a name of the function around it that has no value yet
            names.update(inspect.getclosurevars(function).nonlocals)
    resolved = {}
    for key, annotation in _annotations(function).items():
        resolved[key] = annotation
        if isinstance(annotation, str):
            try:
                resolved[key] = eval(annotation, names)
            except Exception:
                continue
    return resolved


def _annotations(function: Any) -> dict[str, Any]:
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(function, format=annotationlib.Format.FORWARDREF)
    return getattr(function, "__annotations__", None) or {}


def _members(hint: Any) -> list[Any]:
    """The types that a hint allows, less None; names where it is text that can't be resolved."""
    if typing.get_origin(hint) is typing.Annotated:
        return _members(hint.__origin__)
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return [part for member in typing.get_args(hint) for part in _members(member) if part is not type(None)]
    if isinstance(hint, typing.ForwardRef):
        hint = hint.__forward_arg__
    if isinstance(hint, str):
        return _names_in(hint)
    return [hint]


def _names_in(annotation: str) -> list[str]:
    generic, _, inside = annotation.strip().removesuffix("]").partition("[")
    if generic.rpartition(".")[2] in ("Optional", "Union", "Annotated") and inside:
        parts = inside.split(",")
        return [name for part in parts[: 1 if generic.endswith("Annotated") else None] for name in _names_in(part)]
    parts = [part.strip().strip("\"'") for part in annotation.split("|")]
    return [part.partition("[")[0].rpartition(".")[2] for part in parts if part not in ("None", "")]


def _meaning(hint: Any) -> str | None:
    for member in _members(hint):
        if member is EventContext or member == "EventContext":
            return "context"
        names = (
            {member}
            if isinstance(member, str)
            else {c.__name__ for c in getattr(member, "__mro__", ()) if _sqlalchemy(c)}
        )
        if names & {"AsyncSession", "async_scoped_session"}:
            return "session"
        if "Session" in names and not isinstance(member, str):
            return "sync session"
    return None


def _sqlalchemy(cls: type) -> bool:
    return cls.__module__.partition(".")[0] in ("sqlalchemy", "sqlmodel")


def _check_event_annotation(name: str, hint: Any, event_type: type[DomainEvent]) -> None:
    if hint is inspect.Parameter.empty or hint is Any:
        return
    members = _members(hint)
    for member in members:
        if isinstance(member, TypeVar):
            return
        if isinstance(member, str):
            if member == event_type.__name__ or event_class(member) is None:
                return
        elif isinstance(member, type) and issubclass(event_type, member):
            return
    shown = " | ".join(getattr(member, "__name__", str(member)) for member in members)
    raise SubscriptionError(
        f"{name} is for {shown}, but subscribed to {event_type.__name__}: it would get what it does not expect. "
        f"Subscribe it to {shown}, or change its annotation"
    )


def handlers_of(handlers: object) -> list[tuple[type[DomainEvent], Callable[..., Any]]]:
    """Each `handle` and `handle_…` method of an object with the event types of its annotation.

    Raises `SubscriptionError` where there is none, or one does not say what it hears.
    """
    if isinstance(handlers, type):
        raise SubscriptionError(f"register takes an instance: bus.register({handlers.__name__}(…))")
    found: list[tuple[type[DomainEvent], Callable[..., Any]]] = []
    for name in dir(type(handlers)):
        if name != "handle" and not name.startswith("handle_"):
            continue
        if isinstance(inspect.getattr_static(type(handlers), name), (property, functools.cached_property)):
            continue  # reading it could do anything
        method = getattr(handlers, name)
        if not callable(method):
            continue
        parameters = list(inspect.signature(method).parameters.values())
        function = inspect.unwrap(getattr(method, "__func__", method))
        hint = _hints(function).get(parameters[0].name) if parameters else None
        types_heard = [
            resolved
            for member in _members(hint)
            if isinstance(resolved := event_class(member, function) if isinstance(member, str) else member, EventType)
        ]
        if not types_heard:
            raise SubscriptionError(
                f"{type(handlers).__name__}.{name} does not say which event it hears: annotate its first parameter, "
                f"`async def {name}(self, event: OrderPlaced)`; rename it if it is no handler"
            )
        found.extend((typing.cast("type[DomainEvent]", heard), method) for heard in types_heard)
    if not found:
        raise SubscriptionError(
            f"{type(handlers).__name__} has no handler: register looks for async methods named handle_… (or handle)"
        )
    return found
