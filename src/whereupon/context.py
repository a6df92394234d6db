"""What a handler knows beside the event, and what a request leaves for the events it publishes."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import msgspec

from whereupon.errors import BusStateError, PublishError
from whereupon.event import FrozenDict

_ids: Final = ("correlation_id", "causation_id")
_texts: Final = ("actor", "ip_address", "user_agent", "trace_id")


@dataclass(frozen=True, slots=True, kw_only=True)
class Metadata:
    """Who and what caused an event: stored beside it, handed to every handler, never changed."""

    correlation_id: UUID | None = None
    """Equal for all events that go back to the same one; that one's id unless a request says otherwise."""
    causation_id: UUID | None = None
    """The event whose handler published this one."""
    actor: str | None = None
    ip_address: str | None = None
    user_agent: str | None = None
    trace_id: str | None = None
    extra: Mapping[str, str] = FrozenDict()

    def __post_init__(self) -> None:
        if type(self.extra) is not FrozenDict:
            object.__setattr__(self, "extra", FrozenDict(self.extra))

    @classmethod
    def of(cls, values: Metadata | Mapping[str, Any] | None) -> Metadata:
        """Metadata from a mapping; keys that are no field go to `extra`. Raises `PublishError` for other types."""
        if isinstance(values, Metadata):
            return values
        if values is not None and not isinstance(values, Mapping):
            raise PublishError(f"metadata is a mapping or a Metadata, not {values!r}: metadata={{'ip_address': …}}")
        known: dict[str, Any] = {}
        extra: dict[str, str] = {}
        for key, value in (values or {}).items():
            if value is None:
                continue
            if key in _ids:
                known[key] = value if isinstance(value, UUID) else _uuid(key, value)
            elif key in _texts:
                known[key] = str(value)
            elif key == "extra" and isinstance(value, Mapping):
                extra.update({str(name): str(item) for name, item in value.items()})
            else:
                extra[str(key)] = str(value)
        return cls(**known, extra=extra)


def _uuid(key: str, value: Any) -> UUID:
    try:
        return UUID(str(value))
    except ValueError:
        raise PublishError(f"metadata has {key}={value!r}: it is the id of an event or request, a UUID") from None


NO_METADATA: Final = Metadata()


class _Block:
    """A block of `request_metadata`: one object for all threads and tasks in it, whose contexts are copies."""

    __slots__ = ("ask_actor", "cause", "metadata")

    def __init__(self, metadata: Metadata, cause: tuple[UUID, Metadata] | None, outer: _Block | None) -> None:
        self.metadata = metadata
        self.cause = cause
        """The event that was being handled when the block was entered."""
        self.ask_actor: Callable[[], object] | None = None
        if outer is not None and outer.cause is cause:
            self.metadata = _filled(metadata, outer.metadata)
            self.ask_actor = outer.ask_actor

    def now(self) -> Metadata:
        if self.metadata.actor is None and self.ask_actor is not None:
            actor = _actor(self.ask_actor())
            return self.metadata if actor is None else dataclasses.replace(self.metadata, actor=actor)
        return self.metadata


_request: ContextVar[_Block | None] = ContextVar("whereupon_request", default=None)
handling: ContextVar[tuple[UUID, Metadata] | None] = ContextVar("whereupon_handling", default=None)
"""The event whose handler runs now, and its metadata: what a handler publishes inherits from it."""


@contextlib.contextmanager
def request_metadata(metadata: Metadata | Mapping[str, Any]) -> Iterator[None]:
    """Events published in this block, by this task and tasks it starts, carry `metadata`.

    A block within a block adds to it: the middleware sets the IP address, and the `actor` follows once it is known.
    """
    with request_block(metadata):
        yield


@contextlib.contextmanager
def request_block(
    metadata: Metadata | Mapping[str, Any], ask_actor: Callable[[], object] | None = None
) -> Iterator[None]:
    """`request_metadata`, where `ask_actor` is asked whenever an event is published that has no actor yet."""
    block = _Block(Metadata.of(metadata), handling.get(), _request.get())
    if ask_actor is not None:
        block.ask_actor = ask_actor
    token = _request.set(block)
    try:
        yield
    finally:
        _request.reset(token)


def acting_as(actor: str | int | UUID | None) -> None:
    """Events published from here on in this request, or block of `request_metadata`, carry `actor`.

    For where it turns out who is asking: a dependency (async or not), a middleware, the message of a WebSocket that
    logs in. It holds in tasks and threads of the request, and in background tasks after it. None takes it back. Raises
    `BusStateError` where no request is served.
    """
    block = _request.get()
    if block is None or block.cause is not handling.get():
        raise BusStateError(
            f"acting_as({actor!r}) is for a request, and none is served here. In an application: install(app, bus) of "
            "whereupon.fastapi, or whereupon.asgi.RequestContextMiddleware around whatever says who is asking. "
            'Elsewhere: with request_metadata({"actor": …}):'
        )
    block.metadata = dataclasses.replace(block.metadata, actor=_actor(actor))


def _actor(value: object) -> str | None:
    if value is not None and not isinstance(value, (str, int, UUID)):  # whole users would end up in the audit trail
        raise PublishError(
            f"an actor is a str, an int or a UUID, not {type(value).__name__}: name the user by an id. What has to be "
            "awaited is not for actor=: await it in a dependency, and call acting_as(…) there"
        )
    return None if value is None else str(value)


def current_metadata() -> Metadata:
    """What an event published here and now would carry: the request's IP address, say, for a row beside the event."""
    return metadata_for(None)


def metadata_for(explicit: Metadata | Mapping[str, Any] | None) -> Metadata:
    """The metadata of an event published now: what is given, filled up from the request's and the handled event's."""
    request, cause = _request.get(), handling.get()
    metadata = NO_METADATA if explicit is None else Metadata.of(explicit)
    if request is not None and request.cause is cause:  # else it is the publisher's request, and in the event already
        metadata = _filled(metadata, request.now())
    if cause is None:
        return metadata
    event_id, inherited = cause
    correlation_id = inherited.correlation_id or event_id
    return _filled(metadata, dataclasses.replace(inherited, causation_id=event_id, correlation_id=correlation_id))


def _filled(metadata: Metadata, below: Metadata) -> Metadata:
    """`metadata` with what it leaves open taken from `below`."""
    if metadata is NO_METADATA or below is NO_METADATA:
        return below if metadata is NO_METADATA else metadata
    return Metadata(
        correlation_id=metadata.correlation_id or below.correlation_id,
        causation_id=metadata.causation_id or below.causation_id,
        actor=metadata.actor or below.actor,
        ip_address=metadata.ip_address or below.ip_address,
        user_agent=metadata.user_agent or below.user_agent,
        trace_id=metadata.trace_id or below.trace_id,
        extra=FrozenDict({**below.extra, **metadata.extra})
        if below.extra and metadata.extra
        else metadata.extra or below.extra,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class EventContext:
    """One delivery, as its handler sees it. Take it as a parameter: `context: EventContext`."""

    event_id: UUID
    event_type: str
    """The name the event is stored under."""
    subscription: str
    attempt: int = 1
    """1 for the first call, counted before the handler runs."""
    generation: int = 0
    """0, or the number of the replay that this delivery belongs to."""
    metadata: Metadata = NO_METADATA
    log: Any = field(default=None, repr=False, compare=False)

    @property
    def idempotency_key(self) -> str:
        """Equal on every attempt of this delivery, and for no other: hand it to whatever must not do things twice."""
        key = f"{self.event_id}:{self.subscription}"
        return f"{key}:{self.generation}" if self.generation else key

    @property
    def correlation_id(self) -> UUID:
        return self.metadata.correlation_id or self.event_id

    @property
    def causation_id(self) -> UUID | None:
        return self.metadata.causation_id

    @property
    def actor(self) -> str | None:
        return self.metadata.actor

    @property
    def ip_address(self) -> str | None:
        return self.metadata.ip_address

    @property
    def user_agent(self) -> str | None:
        return self.metadata.user_agent

    @property
    def trace_id(self) -> str | None:
        return self.metadata.trace_id

    @property
    def logger(self) -> Any:
        """The bus's logger with event, subscription, attempt and the publisher's trace bound.

        A logger of structlog has them as keys, one of the standard library as attributes of its records. What can
        neither bind nor is one of those is handed on as it is.
        """
        logger = self.log if self.log is not None else logging.getLogger("whereupon")
        said: dict[str, Any] = {
            "event_id": str(self.event_id), "subscription": self.subscription, "attempt": self.attempt,
        }  # fmt: skip
        if self.trace_id is not None:
            said["trace_id"] = self.trace_id
        if (bind := getattr(logger, "bind", None)) is not None:
            return bind(**said)
        if isinstance(logger, logging.Logger):
            return _Bound(logger, said)
        if type(logger) is logging.LoggerAdapter:
            return _Bound(logger.logger, {**(logger.extra or {}), **said})
        return logger


class _Bound(logging.LoggerAdapter[logging.Logger]):
    """A logger whose records have these attributes beside those that a call gives."""

    def process(self, msg: Any, kwargs: MutableMapping[str, Any]) -> tuple[Any, MutableMapping[str, Any]]:
        kwargs["extra"] = {**(self.extra or {}), **(kwargs.get("extra") or {})}
        return msg, kwargs


_FIELDS: Final = tuple(f.name for f in dataclasses.fields(Metadata))


def encode_metadata(metadata: Metadata) -> str:
    """JSON; of text that is no Unicode the offending characters are replaced: they must not cost an event."""
    values = {name: value for name in _FIELDS if (value := getattr(metadata, name)) not in (None, {})}
    try:
        return msgspec.json.encode(values, enc_hook=str).decode()
    except UnicodeEncodeError:
        return msgspec.json.encode(_clean(values), enc_hook=str).decode()


def _clean(value: Any) -> Any:
    if isinstance(value, dict):
        return {_clean(key): _clean(item) for key, item in value.items()}
    return value.encode("utf-8", "replace").decode() if isinstance(value, str) else value


def decode_metadata(text: str | bytes) -> Metadata:
    """Raises `msgspec.ValidationError` or `msgspec.DecodeError` for text that `encode_metadata` did not write."""
    return msgspec.json.decode(text, type=Metadata)
