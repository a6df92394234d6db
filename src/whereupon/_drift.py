"""What differs between a catalogue that was kept and the events as they are now.

Compatible is what every build can live with while an older one still runs and older events are in the log: a new event,
a new field with a default, anything that a new version declares and `upcast` reads. What only the newer build could
read, such as one more member of a `Literal`, is breaking until the version is raised: the older build would take such
an event for a damaged one, and with another version it waits.
"""

from __future__ import annotations

import dataclasses
import enum
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from whereupon._asyncapi import EXTENSION
from whereupon._payload import Schema
from whereupon.codec import JsonCodec
from whereupon.errors import CatalogueError, EventDecodingError
from whereupon.subscription import Delivery

if TYPE_CHECKING:
    from whereupon.catalogue import Catalogue


class Level(enum.StrEnum):
    """What a change means for events that are stored, and for builds that run."""

    BREAKING = "breaking"
    COMPATIBLE = "compatible"
    WORDING = "wording"
    """Descriptions, examples, titles: nothing that a program reads."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One difference."""

    level: Level
    event: str | None
    """The event's name; None where it is about a subscription or the document."""
    field: str | None
    """The field of the event, `total.currency` for one within."""
    text: str
    """What is different, and what to do if it is breaking."""

    def __str__(self) -> str:
        where = ".".join(part for part in (self.event, self.field) if part)
        return f"{where}: {self.text}" if where else self.text


@dataclass(slots=True, kw_only=True)
class _Event:
    name: str
    schema: Schema
    declared: Mapping[str, Any]
    examples: Sequence[Any]

    @property
    def version(self) -> int:
        return int(self.declared.get("version", 1))

    @property
    def aliases(self) -> Sequence[str]:
        return tuple(self.declared.get("aliases", ()))


@dataclass(slots=True, kw_only=True)
class _Document:
    events: dict[str, _Event]
    handlers: dict[str, Mapping[str, Any]]
    """What each subscription declares; empty in a document that doesn't say."""
    hears: dict[str, set[str]]
    schemas: Mapping[str, Schema]
    """What references lead to, by the last part of them."""


def changes(before: Mapping[str, Any], catalogue: Catalogue) -> list[Change]:
    kept = _read(before)
    # what a document calls the application is its own affair
    named = dataclasses.replace(catalogue, title=_title(before), version=before.get("info", {}).get("version", ""))
    document = json.loads(json.dumps(named.asyncapi() if "asyncapi" in before else named.json_schema()))
    now = _read(document)
    found = [*_of_events(kept, now, catalogue), *_of_handlers(kept, now)]
    if not found and json.dumps(before) != json.dumps(document):
        where = next(_different(before, document, ""), "the order of its parts")
        found.append(_change(Level.WORDING, None, None, f"what is said is another at {where}"))
    order = list(Level)
    return sorted(found, key=lambda change: (order.index(change.level), change.event or "~", change.field or ""))


# --- reading documents ----------------------------------------------------------------------------------------------


def _read(document: Mapping[str, Any]) -> _Document:
    try:
        if str(document.get("asyncapi", "")).startswith("3."):
            return _read_asyncapi(document)
        if "2020-12" in str(document.get("$schema", "")) and isinstance(document.get("$defs"), Mapping):
            return _read_schema(document)
    except (KeyError, TypeError, AttributeError, ValueError, IndexError) as error:
        raise CatalogueError(
            f"the document was changed since `whereupon catalogue export` made it: {type(error).__name__} {error}"
        ) from error
    raise CatalogueError(
        "the document is no catalogue: make one with `whereupon catalogue export`, as asyncapi or json-schema"
    )


def _title(document: Mapping[str, Any]) -> str:
    return str(document.get("title") or document.get("info", {}).get("title", ""))


def _read_asyncapi(document: Mapping[str, Any]) -> _Document:
    parts = document["components"]
    schemas = parts.get("schemas", {})
    events = {
        message["name"]: _Event(
            name=message["name"],
            schema=schemas[_last(message["payload"])],
            declared=message[EXTENSION],
            examples=[one["payload"] for one in message.get("examples", ())],
        )
        for message in parts.get("messages", {}).values()
    }
    names = {key: message["name"] for key, message in parts.get("messages", {}).items()}
    handlers, hears = {}, {}
    for key, trait in parts.get("operationTraits", {}).items():
        handlers[trait["title"]] = trait[EXTENSION]
        hears[trait["title"]] = {
            names[_last(operation["channel"])]
            for operation in document.get("operations", {}).values()
            if any(_last(one) == key for one in operation.get("traits", ()))
        }
    return _Document(events=events, handlers=handlers, hears=hears, schemas=schemas)


def _read_schema(document: Mapping[str, Any]) -> _Document:
    events = {
        schema[EXTENSION]["event"]: _Event(
            name=schema[EXTENSION]["event"],
            schema=schema,
            declared=schema[EXTENSION],
            examples=schema.get("examples", ()),
        )
        for schema in document["$defs"].values()
        if EXTENSION in schema
    }
    return _Document(events=events, handlers={}, hears={}, schemas=document["$defs"])


def _last(reference: Mapping[str, str]) -> str:
    return reference["$ref"].rpartition("/")[2]


# --- events ---------------------------------------------------------------------------------------------------------


def _change(level: Level, event: str | None, field: str | None, text: str) -> Change:
    return Change(level=level, event=event, field=field, text=text)


def _of_events(kept: _Document, now: _Document, catalogue: Catalogue) -> Iterator[Change]:
    renamed = {alias: event for event in now.events.values() for alias in event.aliases}
    met = set()
    for name, before in kept.events.items():
        after = now.events.get(name) or renamed.get(name)
        if after is None:
            yield _change(
                Level.BREAKING,
                name,
                None,
                "the event is gone, and stored ones can't be read. If it was renamed, keep the name: "
                f"class …(DomainEvent, aliases=({name!r},))",
            )
            continue
        met.add(after.name)
        if after.name != name:
            yield _change(Level.COMPATIBLE, name, None, f"it is {after.name} now, and keeps this name as an alias")
        for alias in sorted({*before.aliases} - {*after.aliases, after.name}):
            yield _change(
                Level.BREAKING, name, None, f"its alias {alias!r} is gone, and what is stored so can't be read. Keep it"
            )
        yield from _of_event(name, before, after, kept, now, catalogue)
    for name in now.events.keys() - met:
        yield _change(Level.COMPATIBLE, name, None, "a new event")


def _of_event(
    name: str, before: _Event, after: _Event, kept: _Document, now: _Document, catalogue: Catalogue
) -> Iterator[Change]:
    raised = after.version > before.version
    upcast = raised and bool(after.declared.get("upcasts"))
    if after.version < before.version:
        yield _change(
            Level.BREAKING,
            name,
            None,
            f"its version went back from {before.version} to {after.version}: stored ones count as from the future",
        )
    found = list(_of_fields("", before.schema, after.schema, _Pair(kept.schemas, now.schemas)))
    for difference in found:
        if difference.level is Level.BREAKING and upcast:
            text = f"{difference.what}: version {after.version}, and upcast reads the older"
            yield _change(Level.COMPATIBLE, name, difference.field, text)
        elif difference.level is Level.BREAKING and raised and difference.gone:
            text = f"{difference.what}: version {after.version}, and what is stored of it is passed over"
            yield _change(Level.COMPATIBLE, name, difference.field, text)
        elif difference.level is Level.BREAKING:
            missing = "no upcast reads the older ones" if raised else f"the version is still {after.version}"
            way_out = "Write upcast" if raised else "Raise version= and write upcast"
            way_out += ", or give it a default" if difference.new else ""
            yield _change(Level.BREAKING, name, difference.field, f"{difference.what}, and {missing}. {way_out}")
        else:
            yield _change(difference.level, name, difference.field, difference.what)
    if raised and not any(difference.level is Level.BREAKING for difference in found):
        yield _change(Level.COMPATIBLE, name, None, f"version {after.version} (before: {before.version})")
    if not any(difference.level is Level.BREAKING for difference in found) or upcast:
        yield from _unreadable(name, before, catalogue.event(after.name).event_type)
    for key in ("category", "outcome", "audit", "resource", "resource_id", "stands_alone", "workflows"):
        one, other = before.declared.get(key), after.declared.get(key)
        if one != other:
            yield _change(Level.COMPATIBLE, name, None, f"its {key} is {_shown(other)} (before: {_shown(one)})")
    if before.schema.get("description") != after.schema.get("description"):
        yield _change(Level.WORDING, name, None, "its description is another")


def _unreadable(name: str, before: _Event, cls: type[Any]) -> Iterator[Change]:
    """Whether the stored example can still be read: it may be `upcast` or `__post_init__` that can't."""
    for example in before.examples:
        if before.version > cls.__event__.version:
            return
        try:
            JsonCodec().decode(cls, before.version, msgspec.json.encode(example))
        except EventDecodingError as error:
            yield _change(
                Level.BREAKING,
                name,
                None,
                f"one as it was stored in version {before.version} can't be read: {error}",
            )


def _shown(value: Any) -> str:
    return "not declared" if value in (None, False, []) else json.dumps(value, ensure_ascii=False)


@dataclass(frozen=True, slots=True)
class _Difference:
    level: Level
    field: str
    what: str
    gone: bool = False
    new: bool = False


@dataclass(frozen=True, slots=True)
class _Pair:
    """Where references of the older and of the newer document lead."""

    kept: Mapping[str, Schema]
    now: Mapping[str, Schema]
    within: frozenset[tuple[str, str]] = frozenset()
    """Pairs of types that are being compared: what refers to itself is met there again."""


_SAYING: Final = frozenset({"description", "title", "examples", "default", EXTENSION})


def _of_fields(path: str, one: Schema, other: Schema, pair: _Pair) -> Iterator[_Difference]:
    before, after = one.get("properties", {}), other.get("properties", {})
    needed, needs = set(one.get("required", ())), set(other.get("required", ()))
    for name in before:
        where = f"{path}{name}"
        if name not in after:
            yield _Difference(Level.BREAKING, where, "the field is gone", gone=True)
            continue
        yield from _of_type(where, before[name], after[name], pair)
        if name in needs and name not in needed:
            what = "it has no default any more, so stored events without it can't be read"
            yield _Difference(Level.BREAKING, where, what, new=True)
        elif name in needed and name not in needs:
            yield _Difference(Level.COMPATIBLE, where, "it has a default now")
        elif before[name].get("default") != after[name].get("default"):
            was, is_ = before[name].get("default"), after[name].get("default")
            what = f"its default is {json.dumps(is_)} (before: {json.dumps(was)}), for stored events without it, too"
            yield _Difference(Level.COMPATIBLE, where, what)
        if any(before[name].get(word) != after[name].get(word) for word in ("description", "title", "examples")):
            yield _Difference(Level.WORDING, where, "its description is another")
    for name in after:
        if name in before:
            continue
        if name in needs:
            yield _Difference(Level.BREAKING, f"{path}{name}", "a new field without a default", new=True)
        else:
            yield _Difference(Level.COMPATIBLE, f"{path}{name}", "a new field, with a default")


def _of_type(where: str, one: Schema, other: Schema, pair: _Pair) -> Iterator[_Difference]:
    one, other = _bare(one), _bare(other)
    keys = one.get("$ref", "").rpartition("/")[2], other.get("$ref", "").rpartition("/")[2]
    if all(keys):
        if keys in pair.within:
            return
        pair = dataclasses.replace(pair, within=pair.within | {keys})
    one, other = _bare(pair.kept[keys[0]] if keys[0] else one), _bare(pair.now[keys[1]] if keys[1] else other)
    options, others = _without_null(one), _without_null(other)
    if "properties" in one and "properties" in other:
        yield from _of_fields(f"{where}.", one, other, pair)
    elif options is not None and others is not None:
        yield from _of_type(where, options, others, pair)
    elif isinstance(one.get("items"), dict) and isinstance(other.get("items"), dict) and _frame(one) == _frame(other):
        yield from _of_type(f"{where}[]", one["items"], other["items"], pair)
    elif _whole(one, pair.kept) != _whole(other, pair.now):
        was, is_ = told(one, pair.kept), told(other, pair.now)
        what = f"its type is {is_} (before: {was})" if was != is_ else f"what it takes is another, of {is_}"
        yield _Difference(Level.BREAKING, where, what)


def _bare(schema: Schema) -> Schema:
    """Less what only says something, and out of the `allOf` that a reference with such words is in."""
    bare = {word: value for word, value in schema.items() if word not in _SAYING}
    inside = bare.get("allOf", [])
    return _bare(inside[0]) if len(inside) == 1 and len(bare) == 1 else bare


def _without_null(schema: Schema) -> Schema | None:
    """The one type beside null, where a field is optional."""
    options = schema.get("anyOf", [])
    kept = [option for option in options if option != {"type": "null"}]
    return kept[0] if len(kept) == 1 and len(options) == 2 else None


def _frame(schema: Schema) -> Schema:
    return {word: value for word, value in schema.items() if word != "items"}


def _whole(schema: Any, schemas: Mapping[str, Schema], within: tuple[str, ...] = ()) -> Any:
    """With what it refers to in place, so that a document's names don't matter."""
    if isinstance(schema, list):
        return [_whole(part, schemas, within) for part in schema]
    if not isinstance(schema, dict):
        return schema
    schema = _bare(schema)
    key = schema.get("$ref", "").rpartition("/")[2]
    if key:
        return f"again {within.index(key)}" if key in within else _whole(schemas[key], schemas, (*within, key))
    found: Schema = {}
    for word, value in schema.items():
        if word == "properties":  # names of fields, which may be words of JSON Schema
            found[word] = {name: _whole(part, schemas, within) for name, part in value.items()}
        elif word in ("required", "enum"):
            found[word] = sorted(value, key=repr)
        else:
            found[word] = _whole(value, schemas, within)
    return found


def told(schema: Schema, schemas: Mapping[str, Schema]) -> str:
    """The type in a few words."""
    schema = _bare(schema)
    if "$ref" in schema:
        key = schema["$ref"].rpartition("/")[2]
        return str(schemas[key].get("title", key))
    if "enum" in schema:
        return " | ".join(json.dumps(value, ensure_ascii=False) for value in schema["enum"])
    if "anyOf" in schema:
        return " | ".join(told(option, schemas) for option in schema["anyOf"])
    kind = schema.get("type", "anything")
    if kind == "string":
        return str(schema.get("format") or schema.get("contentEncoding") or "text")
    if kind == "array":
        return f"list of {told(schema['items'], schemas)}" if isinstance(schema.get("items"), dict) else "tuple"
    if kind == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"mapping to {told(schema['additionalProperties'], schemas)}"
    return str(kind)


# --- subscriptions --------------------------------------------------------------------------------------------------

_KEPT: Final = {Delivery.DURABLE.value, Delivery.TRANSACTIONAL.value}
"""Kinds of delivery that have a place in the log."""


def _of_handlers(kept: _Document, now: _Document) -> Iterator[Change]:
    for name, before in kept.handlers.items():
        after = now.handlers.get(name)
        if after is None:
            owed = before.get("delivery") in _KEPT
            text = f"subscription {name} is gone"
            if owed:
                text += ", and what it is owed is not delivered. If a function was renamed, give name= the old one"
            yield _change(Level.BREAKING if owed else Level.COMPATIBLE, None, None, text)
            continue
        for key in sorted((before.keys() | after.keys()) - {"subscription"}):
            one, other = before.get(key), after.get(key)
            if one == other:
                continue
            text = f"subscription {name}: {key} is {_shown(other)} (before: {_shown(one)})"
            if key == "ordered_by":
                text += ". The database refuses another order under one name: give it a name= of its own"
            yield _change(Level.BREAKING if key == "ordered_by" else Level.COMPATIBLE, None, None, text)
        for event in sorted(kept.hears[name] - now.hears[name]):
            if event in now.events:
                yield _change(Level.COMPATIBLE, event, None, f"{name} does not hear it any more")
        for event in sorted(now.hears[name] - kept.hears[name]):
            if event in kept.events:
                yield _change(Level.COMPATIBLE, event, None, f"{name} hears it, too")
    for name in sorted(now.handlers.keys() - kept.handlers.keys() if kept.handlers else ()):
        yield _change(Level.COMPATIBLE, None, None, f"subscription {name} is new")


def _different(one: Any, other: Any, path: str) -> Iterator[str]:
    """The places where two documents differ."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        for key in (*one, *(key for key in other if key not in one)):
            if key not in one or key not in other:
                yield f"{path}/{key}"
            else:
                yield from _different(one[key], other[key], f"{path}/{key}")
    elif one != other:
        yield path or "/"
