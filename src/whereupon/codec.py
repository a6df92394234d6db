"""How events become bytes and come back: JSON by msgspec, behind a protocol of two methods."""

from __future__ import annotations

import dataclasses
import math
from datetime import UTC, datetime, time
from decimal import Decimal
from typing import Any, Final, Protocol, TypeVar

import msgspec

from whereupon.errors import EventDecodingError, EventEncodingError, UnknownEventError
from whereupon.event import DomainEvent, ensure_resolved

E = TypeVar("E", bound=DomainEvent)


class Codec(Protocol):
    """Turns events into bytes and back; both directions must agree across processes and builds."""

    def encode(self, event: DomainEvent, /) -> bytes:
        """Raises `EventEncodingError` for a value that `decode` would not give back equal."""
        ...

    def decode(self, cls: type[E], version: int, data: bytes, /) -> E:
        """Raises `EventDecodingError` for bytes that are no event of this class and stored version.

        `UnknownEventError`, which is one, for a version that only a later build knows: that is no damage.
        """
        ...


class JsonCodec:
    """JSON, strict: what is written is read back once before it counts as written."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder(decimal_format="string")
        self._decoders: dict[type[DomainEvent], msgspec.json.Decoder[Any]] = {}

    def encode(self, event: DomainEvent, /) -> bytes:
        cls = type(event)
        definition = ensure_resolved(cls)
        try:
            problem = _problem_of(event, definition.checking)
            data = self._encoder.encode(event)
            copy = None if problem else self._decoder(cls).decode(data)
            alike = copy == event or (copy is not None and _alike(copy, event))
        except _FAILURES as error:
            raise EventEncodingError(self._blamed(event, f"{error}")) from error
        if problem:
            raise EventEncodingError(f"{cls.__name__}.{problem}")
        if not alike:
            raise EventEncodingError(self._blamed(event, "it would not come back from the log as it is"))
        return data

    def decode(self, cls: type[E], version: int, data: bytes, /) -> E:
        definition = ensure_resolved(cls)
        if version > definition.version:
            raise UnknownEventError(
                f"{definition.name} is stored in version {version}, and {_place(cls)} of this build is version "
                f"{definition.version}: a later build wrote it, and only such a one can read it"
            )
        if version != definition.version:
            data = self._upcast(cls, version, data)
        try:
            event: E = self._decoder(cls).decode(data)
        except Exception as error:  # whatever a __post_init__ raises, too: the log holds what an older one allowed
            raise EventDecodingError(_misfit(cls, version, _shown(error))) from error
        if problem := _problem_of(event, definition.checking):
            raise EventDecodingError(_misfit(cls, version, problem))
        return event

    def _upcast(self, cls: type[DomainEvent], version: int, data: bytes) -> bytes:
        """The stored fields as this version has them, as JSON: so that one decoder, strict, reads every version."""
        try:
            fields = msgspec.json.decode(data, type=dict[str, Any])
        except Exception as error:
            raise EventDecodingError(_misfit(cls, version, _shown(error))) from error
        try:
            return self._encoder.encode(cls.upcast(version, fields))
        except Exception as error:
            raise EventDecodingError(
                f"{_place(cls)}.upcast of version {version} raised {type(error).__name__}: {error}"
            ) from error

    def _decoder(self, cls: type[DomainEvent]) -> msgspec.json.Decoder[Any]:
        decoder = self._decoders.get(cls)
        if decoder is None:
            ensure_resolved(cls)
            decoder = self._decoders[cls] = msgspec.json.Decoder(cls)
        return decoder

    def _blamed(self, event: DomainEvent, reason: str) -> str:
        """The message for an event that can't be stored, naming the fields to blame where they can be told."""
        cls = type(event)
        blamed = []
        for name, hint in cls.__event__.types.items():
            value = getattr(event, name)
            try:
                copy = msgspec.json.decode(self._encoder.encode(value), type=hint)
                if copy == value or _alike(copy, value):
                    continue
            except Exception as error:
                reason = f"{error}"
            expected = getattr(hint, "__name__", None) if isinstance(hint, type) else str(hint).replace("typing.", "")
            blamed.append(f"{name} ({_excerpt(value)}, where {expected} is expected)")
        where = f"{cls.__name__}: {', '.join(blamed)}" if blamed else cls.__name__
        return f"{where} can't be stored: {reason}"


_FAILURES: Final = (msgspec.MsgspecError, TypeError, ValueError, OverflowError, RecursionError, AttributeError)


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _shown(error: Exception) -> str:
    known = isinstance(error, (msgspec.MsgspecError, UnicodeError))
    return f"{error}" if known else f"{type(error).__name__}: {error}"


def _excerpt(value: object) -> str:
    shown = repr(value)
    return shown if len(shown) <= 80 else f"{shown[:79]}…"


def _misfit(cls: type[DomainEvent], version: int, reason: str) -> str:
    definition = cls.__event__
    return (
        f"the stored {definition.name} (version {version}) does not fit {_place(cls)} "
        f"(version {definition.version}): {reason}"
    )


def _alike(one: Any, other: Any) -> bool:
    """Equal, where datetimes of two zones are equal if they are the same moment.

    Python calls two such datetimes different whenever one of them lies in an hour that its zone's clocks show twice.
    """
    if isinstance(one, datetime) and isinstance(other, datetime):
        try:
            return one.astimezone(UTC) == other.astimezone(UTC)
        except OverflowError:
            return False
    if dataclasses.is_dataclass(one) and type(one) is type(other):
        return all(_alike(getattr(one, f.name), getattr(other, f.name)) for f in dataclasses.fields(one) if f.compare)
    if (isinstance(one, list) and isinstance(other, list)) or (isinstance(one, tuple) and isinstance(other, tuple)):
        return len(one) == len(other) and all(map(_alike, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return len(one) == len(other) and all(map(_alike, _sorted(one), _sorted(other)))
    if isinstance(one, frozenset) and isinstance(other, frozenset):
        return len(one) == len(other) and all(any(_alike(item, twin) for twin in other) for item in one)
    return bool(one == other)


def _sorted(items: dict[Any, Any]) -> list[tuple[Any, Any]]:
    """Pairs in an order that two dicts of alike keys share."""
    if all(isinstance(key, datetime) for key in items):
        return sorted((key.astimezone(UTC), value) for key, value in items.items())
    return sorted(items.items(), key=lambda pair: repr(pair[0]))


def _problem_of(event: DomainEvent, names: tuple[str, ...]) -> str | None:
    for name in names:
        value = getattr(event, name)
        if type(value) is datetime and value.tzinfo is UTC:  # as every one that was read from the log
            continue
        problem = _problem(value)
        if problem is not None:
            return f"{name} is {problem}"
    return None


def _problem(value: Any) -> str | None:
    """What msgspec would let pass, in words, or None."""
    if isinstance(value, datetime):
        if value.utcoffset() is None:
            return f"naive ({value!r}): nobody could say when that was. Give it a time zone, as in datetime.now(UTC)"
    elif isinstance(value, time):
        if value.tzinfo is not None and value.utcoffset() is None:
            return f"{value!r}: its zone has no offset without a date. Use a time without a zone, or a datetime"
    elif isinstance(value, (float, Decimal)):
        if not (math.isfinite(value) if isinstance(value, float) else value.is_finite()):
            return f"{value!r}: a number must be finite. Leave the field out, or make it Optional and say None"
    elif isinstance(value, (list, tuple, frozenset)):
        return next(filter(None, map(_problem, value)), None)
    elif isinstance(value, dict):
        return next(filter(None, map(_problem, [*value.keys(), *value.values()])), None)
    elif dataclasses.is_dataclass(value):
        return next(filter(None, (_problem(getattr(value, part.name)) for part in dataclasses.fields(value))), None)
    return None
