"""How events become bytes and come back: JSON by msgspec, behind a protocol of two methods."""

from __future__ import annotations

import dataclasses
import math
from datetime import datetime, time
from decimal import Decimal
from typing import Any, Protocol, TypeVar

import msgspec

from whereupon.errors import EventDecodingError, EventEncodingError
from whereupon.event import DomainEvent, ensure_resolved

E = TypeVar("E", bound=DomainEvent)


class Codec(Protocol):
    """Turns events into bytes and back; both directions must agree across processes and builds."""

    def encode(self, event: DomainEvent, /) -> bytes:
        """Raises `EventEncodingError` for a value that `decode` would not give back equal."""
        ...

    def decode(self, cls: type[E], version: int, data: bytes, /) -> E:
        """Raises `EventDecodingError` for bytes that are no event of this class and stored version."""
        ...


class JsonCodec:
    """JSON, strict: what is written is read back once before it counts as written."""

    def __init__(self) -> None:
        self._encoder = msgspec.json.Encoder(decimal_format="string")
        self._decoders: dict[type[DomainEvent], msgspec.json.Decoder[Any]] = {}

    def encode(self, event: DomainEvent, /) -> bytes:
        cls = type(event)
        definition = ensure_resolved(cls)
        for name in definition.checking:
            problem = _problem(getattr(event, name))
            if problem is not None:
                raise EventEncodingError(f"{cls.__name__}.{name} is {problem}")
        try:
            data = self._encoder.encode(event)
            copy = self._decoder(cls).decode(data)
        except (msgspec.ValidationError, TypeError, OverflowError, UnicodeError, RecursionError, ValueError) as error:
            raise EventEncodingError(_culprit(event, self, f"{error}")) from error
        if copy != event:
            raise EventEncodingError(_culprit(event, self, "it would not come back from the log as it is"))
        return data

    def decode(self, cls: type[E], version: int, data: bytes, /) -> E:
        definition = ensure_resolved(cls)
        try:
            if version != definition.version:
                fields = msgspec.json.decode(data, type=dict[str, Any])
                return msgspec.convert(cls.upcast(version, fields), cls, strict=False)
            event: E = self._decoder(cls).decode(data)
        except (msgspec.MsgspecError, UnicodeError, RecursionError) as error:
            raise EventDecodingError(
                f"the stored {definition.name} (version {version}) does not fit {cls.__module__}.{cls.__qualname__} "
                f"(version {definition.version}): {error}"
            ) from error
        except Exception as error:
            raise EventDecodingError(
                f"{cls.__qualname__}.upcast of version {version} raised {type(error).__name__}: {error}"
            ) from error
        return event

    def _decoder(self, cls: type[DomainEvent]) -> msgspec.json.Decoder[Any]:
        decoder = self._decoders.get(cls)
        if decoder is None:
            decoder = self._decoders[cls] = msgspec.json.Decoder(cls)
        return decoder


def _problem(value: Any) -> str | None:
    """What msgspec would let pass, in words, or None."""
    if isinstance(value, datetime) or type(value) is time:
        if value.tzinfo is None:
            return f"naive ({value!r}): nobody could say when that was. Give it a time zone, as in datetime.now(UTC)"
    elif isinstance(value, float):
        if not math.isfinite(value):
            return f"{value!r}: a number must be finite. Leave the field out, or make it Optional and say None"
    elif isinstance(value, Decimal):
        if not value.is_finite():
            return f"{value!r}: a number must be finite. Leave the field out, or make it Optional and say None"
    elif isinstance(value, (list, tuple, frozenset)):
        return next(filter(None, map(_problem, value)), None)
    elif isinstance(value, dict):
        return next(filter(None, map(_problem, [*value.keys(), *value.values()])), None)
    elif dataclasses.is_dataclass(value):
        return next(filter(None, (_problem(getattr(value, part.name)) for part in dataclasses.fields(value))), None)
    return None


def _culprit(event: DomainEvent, codec: JsonCodec, reason: str) -> str:
    """The message for an event that can't be stored, naming the fields to blame where they can be told."""
    cls = type(event)
    blamed = []
    for part in dataclasses.fields(event):
        value = getattr(event, part.name)
        hint = cls.__annotations__.get(part.name) or next(
            (
                base.__annotations__[part.name]
                for base in cls.__mro__
                if part.name in base.__dict__.get("__annotations__", {})
            ),
            None,
        )
        try:
            if msgspec.json.decode(codec._encoder.encode(value), type=hint) != value:
                blamed.append(f"{part.name}={value!r}")
        except Exception:
            blamed.append(f"{part.name}={value!r}")
    where = f"{cls.__name__}: {', '.join(blamed)}" if blamed else cls.__name__
    return f"{where} can't be stored: {reason}"
