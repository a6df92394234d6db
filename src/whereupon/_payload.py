"""What a stored event looks like: its JSON Schema, an example, and what its source says of each field.

`msgspec.json.schema` describes what msgspec would take. `JsonCodec` writes less than that, and this is about what it
writes: datetimes have an offset, numbers in text are finite, ids and times are never left out.
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import enum
import functools
import hashlib
import inspect
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any, Final, TypeAlias
from uuid import UUID

import msgspec
from msgspec import inspect as shape

from whereupon.context import Metadata
from whereupon.event import DomainEvent, ensure_resolved

Schema: TypeAlias = dict[str, Any]

OF_ALL: Final = ("event_id", "occurred_at")
"""Fields that every stored event has, though one that is made need not be given them."""

_ZONE: Final = r"(Z|[+-][0-9]{2}:[0-9]{2})"
_CLOCK: Final = r"[0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,6})?"
_DAY: Final = r"[0-9]{4}-[0-9]{2}-[0-9]{2}"
# In what regular expressions of Python and of JavaScript have in common.
_TEXTS: Final[Mapping[type[shape.Type], Schema]] = {
    shape.UUIDType: {"format": "uuid", "pattern": "^[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}$"},
    shape.DateTimeType: {"format": "date-time", "pattern": f"^{_DAY}T{_CLOCK}{_ZONE}$"},
    shape.DateType: {"format": "date", "pattern": f"^{_DAY}$"},
    # no format: RFC 3339's time has an offset always, its duration no sign and no fraction of a second
    shape.TimeType: {"pattern": f"^{_CLOCK}{_ZONE}?$"},
    shape.TimeDeltaType: {"pattern": r"^-?P([0-9]+D)?(T[0-9]+(\.[0-9]{1,6})?S)?$"},
    shape.DecimalType: {"format": "decimal", "pattern": r"^-?[0-9]+(\.[0-9]+)?(E[+-][0-9]+)?$"},
    shape.BytesType: {
        "contentEncoding": "base64",
        "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}[A-Za-z0-9+/=]=)?$",
    },
}
_INTEGER: Final = "^-?[0-9]+$"
_NUMBER: Final = r"^-?[0-9]+(\.[0-9]+)?([eE][+-]?[0-9]+)?$"
_LIMITS: Final = {
    "ge": "minimum", "gt": "exclusiveMinimum", "le": "maximum", "lt": "exclusiveMaximum", "multiple_of": "multipleOf",
}  # fmt: skip
_PLAIN: Final = re.compile(r"[^A-Za-z0-9_.-]+")


def schema_key(name: str) -> str:
    """`name` as a key that fits wherever one is asked for: in a URL, a file's name, AsyncAPI's components.

    It stays as it is if it fits; else it is told apart from others by a digest, however alike they look.
    """
    plain = _PLAIN.sub("_", name)
    if plain == name and not name.startswith("."):
        return name
    return f"{plain.strip('._') or 'name'}-{hashlib.sha256(name.encode('utf-8', 'replace')).hexdigest()[:8]}"


def stored_as_json(value: Any) -> Any:
    """What `JsonCodec` would store of a field's value, sets in an order that doesn't change from run to run."""
    return json.loads(_encoder.encode(value))


_encoder: Final = msgspec.json.Encoder(decimal_format="string", order="deterministic")


class Documentation:
    """What classes and their source say of themselves."""

    def __init__(self) -> None:
        self._modules: dict[str, Mapping[str, Mapping[str, str]]] = {}

    @staticmethod
    def of_class(described: type) -> str:
        """The docstring, or that of the nearest abstract event above; "" where there is only what Python makes up."""
        for base in described.__mro__:
            if base is DomainEvent or not (
                base is described or (issubclass(base, DomainEvent) and base.__event__.abstract)
            ):
                continue
            written = base.__dict__.get("__doc__")
            # dataclass makes one of the signature, Enum one of its own where there is none
            if written and not written.startswith(f"{base.__name__}(") and written != "An enumeration.":
                return inspect.cleandoc(written)
        return ""

    def of_fields(self, cls: type) -> dict[str, str]:
        """The text that stands beneath each field, as beneath those of `DomainEvent`."""
        found: dict[str, str] = {}
        for base in reversed(cls.__mro__):
            found |= self._read(base.__module__).get(base.__qualname__, {})
        return found

    def _read(self, module: str) -> Mapping[str, Mapping[str, str]]:
        if module not in self._modules:
            self._modules[module] = {}
            loaded = sys.modules.get(module)
            if loaded is not None and module not in sys.stdlib_module_names:
                # without its source, as in a notebook or a frozen program, its fields are described without this
                with contextlib.suppress(OSError, TypeError, SyntaxError, ValueError):
                    self._modules[module] = _documented(inspect.getsource(loaded))
        return self._modules[module]


@functools.lru_cache(maxsize=32)
def _documented(source: str) -> dict[str, dict[str, str]]:
    return dict(_fields_in(ast.parse(source), ""))


def _fields_in(tree: ast.AST, place: str) -> Iterator[tuple[str, dict[str, str]]]:
    """The documented fields of every class within, by the class's qualified name."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.ClassDef):
            texts: dict[str, str] = {}
            for field, text in zip(node.body, node.body[1:], strict=False):
                if (
                    isinstance(field, ast.AnnAssign)
                    and isinstance(field.target, ast.Name)
                    and isinstance(text, ast.Expr)
                    and isinstance(text.value, ast.Constant)
                    and isinstance(text.value.value, str)
                ):
                    texts[field.target.id] = inspect.cleandoc(text.value.value)
            yield f"{place}{node.name}", texts
            yield from _fields_in(node, f"{place}{node.name}.")
        elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            yield from _fields_in(node, f"{place}{node.name}.<locals>.")
        else:
            yield from _fields_in(node, place)


def _shape_of(cls: type) -> shape.DataclassType:
    if issubclass(cls, DomainEvent):
        ensure_resolved(cls)
    found = shape.type_info(cls)
    assert isinstance(found, shape.DataclassType)
    return found


def _fields(cls: type) -> list[tuple[shape.Field, dataclasses.Field[Any]]]:
    """In the order that they are stored in."""
    known = {field.name: field for field in _shape_of(cls).fields}
    return [(known[field.name], field) for field in dataclasses.fields(cls) if field.name in known]


def value_classes(events: Iterable[type[DomainEvent]]) -> list[type]:
    """The dataclasses and enums that fields of these events hold, at any depth."""
    found: dict[type, None] = {}

    def look(at: shape.Type) -> None:
        for part in _parts(at):
            if isinstance(part, shape.EnumType):
                found.setdefault(part.cls)
            elif isinstance(part, shape.DataclassType):
                if part.cls in found:
                    continue
                found.setdefault(part.cls)
                for field in _shape_of(part.cls).fields:
                    look(field.type)
            else:
                look(part)

    for cls in events:
        for field in _shape_of(cls).fields:
            look(shape.ListType(field.type))
    return sorted(found, key=lambda cls: (cls.__name__, cls.__module__, cls.__qualname__))


def _parts(at: shape.Type) -> Sequence[shape.Type]:
    if isinstance(at, shape.Metadata):
        return (at.type,)
    if isinstance(at, shape.UnionType):
        return at.types
    if isinstance(at, shape.TupleType):
        return at.item_types
    if isinstance(at, shape.CollectionType):
        return (at.item_type,)
    if isinstance(at, shape.DictType):
        return (at.key_type, at.value_type)
    return ()


class SchemaWriter:
    """Writes JSON Schema: of draft 2020-12, or in the words that it shares with draft 7, as AsyncAPI has it.

    `events` decide which other classes are defined, and what those are called: by their name, or where two have one
    by their module, too. `taken` are keys that no such class may have. References begin with `prefix`.
    """

    def __init__(
        self,
        events: Sequence[type[DomainEvent]],
        prefix: str,
        *,
        taken: Iterable[str] = (),
        draft_7: bool = False,
        documentation: Documentation | None = None,
    ) -> None:
        self._prefix = prefix
        self._draft_7 = draft_7
        self._documentation = documentation or Documentation()
        classes = value_classes(events)
        names = [cls.__name__ for cls in classes]
        unusable = {*taken, *(name for name in names if names.count(name) > 1)}
        self._keys: dict[type, str] = {}
        for cls in classes:
            key = schema_key(cls.__name__)
            if cls.__name__ in unusable or key in unusable:
                key = schema_key(f"{cls.__module__}.{cls.__qualname__}")
            while key in unusable or key in self._keys.values():
                key += "_"
            self._keys[cls] = key

    def definitions(self) -> dict[str, Schema]:
        """The schemas that those of events refer to."""
        return {key: self._definition(cls) for cls, key in sorted(self._keys.items(), key=lambda pair: pair[1])}

    def event(self, cls: type[DomainEvent]) -> Schema:
        """The schema of an event of this class, as `JsonCodec` stores it in its present version."""
        return {
            "title": cls.__event__.name,
            **_described(self._documentation.of_class(cls)),
            **self._object(cls, always=OF_ALL),
        }

    def metadata(self) -> Schema:
        """The schema of what is stored beside an event: who and what caused it. What is unknown is left out."""
        properties = {}
        for field, _ in _fields(Metadata):
            known = [part for part in _parts(field.type) if not isinstance(part, shape.NoneType)]
            properties[field.name] = self._of(known[0] if isinstance(field.type, shape.UnionType) else field.type)
        for name, text in self._documentation.of_fields(Metadata).items():
            properties[name]["description"] = text
        return {"type": "object", "properties": properties, "additionalProperties": False}

    def _definition(self, cls: type) -> Schema:
        described = {"title": cls.__name__, **_described(self._documentation.of_class(cls))}
        if issubclass(cls, enum.Enum):
            return {**described, "enum": [member.value for member in cls]}
        return {**described, **self._object(cls)}

    def _object(self, cls: type, always: Sequence[str] = ()) -> Schema:
        texts = self._documentation.of_fields(cls)
        properties, required = {}, []
        for field, declared in _fields(cls):
            extra: Schema = _described(texts.get(field.name, ""))
            if declared.default is not dataclasses.MISSING:
                extra["default"] = stored_as_json(declared.default)
            properties[field.name] = _with(self._of(field.type), extra)
            if field.required or field.name in always:
                required.append(field.name)
        return {"type": "object", "properties": properties, **({"required": required} if required else {})}

    def _of(self, at: shape.Type) -> Schema:
        if isinstance(at, shape.Metadata):
            return _with(self._of(at.type), dict(at.extra_json_schema or {}), over=True)
        if isinstance(at, (shape.DataclassType, shape.EnumType)):
            return {"$ref": self._prefix + self._keys[at.cls]}
        if isinstance(at, shape.UnionType):
            return {"anyOf": [self._of(part) for part in sorted(at.types, key=_none_last)]}
        if isinstance(at, shape.LiteralType):
            return {"enum": sorted(at.values, key=lambda value: (type(value).__name__, 0 if value is None else value))}
        if isinstance(at, shape.NoneType):
            return {"type": "null"}
        if isinstance(at, shape.BoolType):
            return {"type": "boolean"}
        if isinstance(at, (shape.IntType, shape.FloatType)):
            limits = {word: getattr(at, name) for name, word in _LIMITS.items() if getattr(at, name) is not None}
            return {"type": "integer" if isinstance(at, shape.IntType) else "number", **limits}
        if isinstance(at, shape.StrType):
            return {"type": "string", **_lengths(at, "Length"), **({"pattern": at.pattern} if at.pattern else {})}
        if type(at) in _TEXTS:
            return {"type": "string", **_TEXTS[type(at)]}
        if isinstance(at, shape.TupleType):
            return self._tuple([self._of(part) for part in at.item_types])
        if isinstance(at, shape.CollectionType):
            unique = {"uniqueItems": True} if isinstance(at, shape.FrozenSetType) else {}
            return {"type": "array", "items": self._of(at.item_type), **unique, **_lengths(at, "Items")}
        if isinstance(at, shape.DictType):
            names = self._key(at.key_type)
            named = {"propertyNames": names} if names else {}
            return {
                "type": "object", **named, "additionalProperties": self._of(at.value_type),
                **_lengths(at, "Properties"),
            }  # fmt: skip
        raise TypeError(f"{at} is no type that an event can hold")

    def _tuple(self, items: list[Schema]) -> Schema:
        if not items:
            return {"type": "array", "maxItems": 0}
        exactly = {"minItems": len(items), "maxItems": len(items)}
        if self._draft_7:
            return {"type": "array", "items": items, "additionalItems": False, **exactly}
        return {"type": "array", "prefixItems": items, "items": False, **exactly}

    def _key(self, at: shape.Type) -> Schema:
        """The schema of a key of an object, which is text whatever it was."""
        if isinstance(at, shape.Metadata):
            return self._key(at.type)
        if isinstance(at, shape.EnumType):
            return {"enum": [str(member.value) for member in at.cls]}
        if isinstance(at, shape.LiteralType):
            return {"enum": sorted(map(str, at.values))}
        if isinstance(at, shape.IntType):
            return {"pattern": _INTEGER}
        if isinstance(at, shape.FloatType):
            return {"pattern": _NUMBER}
        found = self._of(at)
        del found["type"]
        return found


def _described(text: str) -> Schema:
    return {"description": text} if text else {}


def _with(schema: Schema, extra: Schema, *, over: bool = False) -> Schema:
    """`schema` with `extra`; what stands beside a reference is ignored by draft 7, so a reference goes one deeper."""
    if not extra:
        return schema
    if "$ref" in schema:
        schema = {"allOf": [schema]}
    return {**schema, **extra} if over else {**extra, **schema}


def _none_last(at: shape.Type) -> bool:
    return isinstance(at, shape.NoneType)


def _lengths(at: Any, what: str) -> Schema:
    found = {f"min{what}": at.min_length, f"max{what}": at.max_length}
    return {word: value for word, value in found.items() if value is not None}


# --- an example -----------------------------------------------------------------------------------------------------

_MADE_AT: Final = datetime(2025, 11, 18, 15, tzinfo=UTC)
_EVENT_ID: Final = UUID(int=(int(_MADE_AT.timestamp() * 1000) << 80) | (7 << 76) | (2 << 62))
_DEEP: Final = 3
"""Values within values that an example shows; what refers to itself has to end somewhere."""
_LIKELY: Final = {
    "email": "ada@example.com",
    "currency": "EUR",
    "ip_address": "192.0.2.7",
    "url": "https://example.com",
}
_VALUES: Final[Mapping[type[shape.Type], Any]] = {
    shape.NoneType: None,
    shape.BoolType: True,
    shape.DateTimeType: "2025-11-18T15:00:00Z",
    shape.DateType: "2025-11-18",
    shape.TimeType: "15:00:00",
    shape.TimeDeltaType: "PT90S",
    shape.DecimalType: "12.50",
    shape.BytesType: "d2hlcmV1cG9u",
}


def example_of(cls: type[DomainEvent], decode: Callable[[bytes], object]) -> dict[str, Any] | None:
    """A stored event of this class, equal on every run; None where values that are made up are refused by `decode`."""
    made: dict[str, Any] = {}
    for field, declared in _fields(cls):
        if declared.default is not dataclasses.MISSING and declared.default is not None:
            made[field.name] = stored_as_json(declared.default)
        else:
            made[field.name] = str(_EVENT_ID) if field.name == "event_id" else _value(field.type, field.name, 0)
    try:
        decode(msgspec.json.encode(made))
    except Exception:  # whatever a __post_init__ raises, too
        return None
    return made


def _value(at: shape.Type, name: str, depth: int) -> Any:
    if isinstance(at, shape.Metadata):
        examples = (at.extra_json_schema or {}).get("examples")
        return stored_as_json(examples[0]) if examples else _value(at.type, name, depth)
    if isinstance(at, shape.UUIDType):
        return str(UUID(bytes=hashlib.sha256(name.encode()).digest()[:16], version=4))
    if isinstance(at, shape.UnionType):
        return None if depth >= _DEEP else _value(sorted(at.types, key=_none_last)[0], name, depth)
    if isinstance(at, shape.LiteralType):
        return at.values[-1]
    if isinstance(at, shape.EnumType):
        return next(iter(at.cls)).value
    if isinstance(at, (shape.IntType, shape.FloatType)):
        return _number(at)
    if isinstance(at, shape.StrType):
        likely = next((text for word, text in _LIKELY.items() if word in name), name.replace("_", " "))
        return likely.ljust(at.min_length or 0, "x")[: at.max_length]
    if type(at) in _VALUES:
        return _VALUES[type(at)]
    if isinstance(at, shape.TupleType):
        return [_value(part, name, depth + 1) for part in at.item_types]
    if isinstance(at, shape.CollectionType):
        return [_value(at.item_type, name, depth + 1)] if depth < _DEEP else []
    if isinstance(at, shape.DictType):
        if depth >= _DEEP:
            return {}
        return {_as_key(_value(at.key_type, name, depth + 1)): _value(at.value_type, name, depth + 1)}
    if isinstance(at, shape.DataclassType):
        return {field.name: _value(field.type, field.name, depth + 1) for field, _ in _fields(at.cls)}
    raise TypeError(f"{at} is no type that an event can hold")


def _as_key(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _number(at: shape.IntType | shape.FloatType) -> float:
    step = at.multiple_of or 1
    for candidate in (
        3 * step,
        at.ge,
        at.le,
        None if at.gt is None else at.gt + step,
        None if at.lt is None else at.lt - step,
    ):
        if candidate is not None and (
            (at.ge is None or candidate >= at.ge)
            and (at.gt is None or candidate > at.gt)
            and (at.le is None or candidate <= at.le)
            and (at.lt is None or candidate < at.lt)
        ):
            return candidate
    return 0
