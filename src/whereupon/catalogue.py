"""The catalogue of a bus: its events, what they look like where they are stored, and who hears them.

    catalogue = Catalogue.of(bus, title="Cards")
    catalogue.asyncapi()                         # AsyncAPI 3.0, as JSON has it
    catalogue.json_schema()                      # JSON Schema, draft 2020-12
    catalogue.mermaid()                          # a map, as text
    catalogue.write_site("site")                 # pages to read without a server
    catalogue.changes_since(json.loads(before))  # what would break, and what would not

It is made of what classes and subscriptions declare: no database is asked. Equal declarations make equal text, without
a time or a path in it, so it can be committed.
"""

from __future__ import annotations

import functools
import inspect
import json
import re
import typing
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from whereupon import _asyncapi, _drift, _mermaid, _site
from whereupon._drift import Change, Level
from whereupon._payload import Documentation, Schema, SchemaWriter, example_of, stored_as_json
from whereupon.bus import Subscribing
from whereupon.codec import JsonCodec
from whereupon.errors import CatalogueError
from whereupon.event import DomainEvent, NotSecret, ensure_resolved, event_classes
from whereupon.subscription import Delivery, Retry, Subscription
from whereupon.workflow import Workflow, workflows

__all__ = [
    "Catalogue", "CatalogueError", "Change", "EventEntry", "FieldEntry", "HandlerEntry", "Level", "WorkflowEntry",
    "as_text",
]  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class FieldEntry:
    """A field of an event."""

    name: str
    type: str
    """As one would write it in Python."""
    description: str
    required: bool
    """Whether an event can't be made without it."""
    default: str | None
    """As JSON; None for a field that is required, or computed when the event is made."""
    not_secret: str | None
    """Why a field that looks like a secret is none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EventEntry:
    """A type of events."""

    name: str
    """The name it is stored under."""
    event_type: type[DomainEvent] = field(repr=False)
    description: str
    version: int
    aliases: tuple[str, ...]
    upcasts: bool
    """Whether the class says how older versions are read."""
    category: str | None
    outcome: str
    audit: str | None
    resource: str | None
    resource_id: str | None
    stands_alone: bool
    workflows: tuple[str, ...]
    """The workflows whose attempt or outcome it is."""
    fields: tuple[FieldEntry, ...]
    handlers: tuple[str, ...]
    """The subscriptions that hear it, those that hear everything included."""
    example: Mapping[str, Any] | None
    """A stored one; None where the class refuses values that are made up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HandlerEntry:
    """A subscription."""

    name: str
    description: str
    delivery: str
    required: bool
    hears_everything: bool
    hears: tuple[str, ...]
    """Events by name; empty for one that hears everything."""
    ordered_by: str | None
    retry: Retry | None
    """None where nothing is tried again."""
    timeout: float | None
    """Seconds that one call may take."""
    within: float | None
    """Seconds after its publish until an event is settled, where the subscription promises that."""
    batch: int
    rate: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkflowEntry:
    """A workflow; its events by name."""

    name: str
    attempted: str
    succeeded: str
    failed: str
    interrupted: str

    @property
    def events(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((self.attempted, self.succeeded, self.failed, self.interrupted)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Catalogue:
    """What is known of a bus's events; made by `Catalogue.of`."""

    title: str
    version: str
    """The application's, or its catalogue's: AsyncAPI asks for one."""
    events: tuple[EventEntry, ...]
    handlers: tuple[HandlerEntry, ...]
    workflows: tuple[WorkflowEntry, ...]
    documentation: Documentation = field(repr=False, compare=False)

    @classmethod
    def of(
        cls,
        bus: Subscribing,
        *,
        title: str = "Domain events",
        version: str = "1",
        packages: Collection[str] | None = None,
        only: Collection[type[DomainEvent]] | None = None,
    ) -> Catalogue:
        """The catalogue of the events that a bus hears, and of all others that this process has imported.

        With `packages` only of those others that are defined in them: in a test, where the modules of other tests are
        imported, too. With `only` of these events and no others. Raises `EventDefinitionError` for an event whose
        annotations can't be resolved.
        """
        documentation = Documentation()
        heard = {one for subscription in bus.subscriptions for one in subscription.event_types} - {DomainEvent}
        taken = {known.__event__.name for known in heard}
        imported = (known for known in event_classes() if known.__event__.name not in taken)
        classes = {known for known in imported if _within(known, packages)} | heard if only is None else set(only)
        entries = [
            WorkflowEntry(
                name=one.name,
                attempted=one.attempted.__event__.name,
                succeeded=one.succeeded.__event__.name,
                failed=one.failed.__event__.name,
                interrupted=one.interrupted.__event__.name,
            )
            for one in workflows()
            if (_classes_of(one) <= classes if only is None else _classes_of(one) & classes)
        ]
        subscriptions = sorted(bus.subscriptions, key=lambda one: one.name)
        found = tuple(dict.fromkeys(entries))
        return cls(
            title=title,
            version=version,
            events=tuple(
                _event(known, subscriptions, found, documentation)
                for known in sorted(
                    classes, key=lambda known: (known.__event__.name, known.__module__, known.__qualname__)
                )
            ),
            handlers=tuple(_handler(one) for one in subscriptions),
            workflows=found,
            documentation=documentation,
        )

    def event(self, name: str) -> EventEntry:
        """The event stored under that name. Raises `KeyError`."""
        for one in self.events:
            if one.name == name:
                return one
        raise KeyError(name)

    def hearing(self, event: EventEntry) -> list[HandlerEntry]:
        return [one for one in self.handlers if one.name in event.handlers]

    def schemas(self, prefix: str, *, taken: Iterable[str] = (), draft_7: bool = False) -> SchemaWriter:
        """What writes the schemas of these events, with references that begin with `prefix`."""
        classes = [one.event_type for one in self.events]
        return SchemaWriter(classes, prefix, taken=taken, draft_7=draft_7, documentation=self.documentation)

    def json_schema(self, event: str | None = None) -> Schema:
        """JSON Schema (draft 2020-12) of the payloads as they are stored: the `$defs` of one document, by event.

        With the name of an `event` the document is the schema of that one. Raises `KeyError` if there is none.
        """
        writer = self.schemas("#/$defs/", taken=[one.name for one in self.events])
        definitions = {one.name: _asyncapi.with_extension(writer.event(one.event_type), one) for one in self.events}
        definitions |= writer.definitions()
        document: Schema = {"$schema": "https://json-schema.org/draft/2020-12/schema"}
        if event is None:
            document["title"] = self.title
        else:
            chosen = definitions.pop(self.event(event).name)
            document |= chosen
            definitions = writer.definitions()
        return {**document, "$defs": definitions}

    def asyncapi(self) -> dict[str, Any]:
        """AsyncAPI 3.0: a channel and a message for each event, `send` for publishing, `receive` for each handler."""
        return _asyncapi.document(self)

    def mermaid(self) -> str:
        """A Mermaid flowchart of events and of who hears them, grouped by workflow and category."""
        return _mermaid.flowchart(self)

    def site(self) -> dict[str, str]:
        """HTML pages by the name of their file: `index.html`, `map.html`, one for each event. Each stands alone."""
        return _site.pages(self)

    def write_site(self, folder: str | Path) -> list[Path]:
        """Write the pages into a folder, and take away those of events that are gone; return the files written.

        Raises `CatalogueError` for one that holds what this did not write.
        """
        return _site.write(self.site(), Path(folder))

    def changes_since(self, before: Mapping[str, Any]) -> list[Change]:
        """How these events differ from those of an earlier document, `asyncapi()` or `json_schema()`.

        Raises `CatalogueError` for a document that is neither.
        """
        return _drift.changes(before, self)


def as_text(document: Mapping[str, Any]) -> str:
    """The document as the text that is committed."""
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _within(cls: type[DomainEvent], packages: Collection[str] | None) -> bool:
    if packages is None:
        return not f"{cls.__module__}.".startswith("whereupon.")  # the suite for stores has some
    return any(f"{cls.__module__}.".startswith(f"{package}.") for package in packages)


def _classes_of(workflow: Workflow[Any, Any, Any]) -> set[type[DomainEvent]]:
    return {workflow.attempted, workflow.succeeded, workflow.failed, workflow.interrupted}


def _event(
    cls: type[DomainEvent],
    subscriptions: Sequence[Subscription],
    found: Sequence[WorkflowEntry],
    documentation: Documentation,
) -> EventEntry:
    definition = ensure_resolved(cls)
    texts = documentation.of_fields(cls)
    codec = JsonCodec()
    return EventEntry(
        name=definition.name,
        event_type=cls,
        description=documentation.of_class(cls),
        version=definition.version,
        aliases=tuple(sorted(definition.aliases)),
        upcasts=cls.upcast.__func__ is not DomainEvent.upcast.__func__,  # type: ignore[attr-defined]
        category=definition.category,
        outcome=definition.outcome.value,
        audit=definition.audit,
        resource=definition.resource,
        resource_id=definition.resource_id,
        stands_alone=definition.stands_alone,
        workflows=tuple(one.name for one in found if definition.name in one.events),
        fields=tuple(
            FieldEntry(
                name=part.name,
                type=type_name(definition.types[part.name]),
                description=texts.get(part.name) or _meant(definition.types[part.name]),
                required=part.default is MISSING and part.default_factory is MISSING,
                default=None if part.default is MISSING else json.dumps(stored_as_json(part.default)),
                not_secret=_not_secret(definition.types[part.name]),
            )
            for part in fields(cls)
        ),
        handlers=tuple(one.name for one in subscriptions if one.hears(cls)),
        example=example_of(cls, lambda data: codec.decode(cls, definition.version, data)),
    )


def _handler(subscription: Subscription) -> HandlerEntry:
    everything = DomainEvent in subscription.event_types
    tried_again = subscription.delivery is not Delivery.AFTER_COMMIT and subscription.recorder is None
    return HandlerEntry(
        name=subscription.name,
        description=_description(subscription.handler),
        delivery=subscription.delivery.value,
        required=subscription.required,
        hears_everything=everything,
        hears=() if everything else tuple(sorted(cls.__event__.name for cls in subscription.event_types)),
        ordered_by=subscription.ordered_by,
        retry=subscription.retry if tried_again else None,
        timeout=subscription.timeout,
        within=subscription.within,
        batch=subscription.batch,
        rate=subscription.rate,
    )


def _description(handler: Callable[..., Any]) -> str:
    while isinstance(handler, functools.partial):
        handler = handler.func
    text = inspect.getdoc(handler if inspect.isroutine(handler) else type(handler))
    if text is None and getattr(handler, "__name__", "") == "handle":
        text = inspect.getdoc(type(getattr(handler, "__self__", None)))
    return text or ""


_PLAIN: Final[Mapping[Any, str]] = {type(None): "None", UUID: "UUID", Ellipsis: "…"}


def type_name(hint: Any) -> str:
    """The type as one would write it, less what an `Annotated` adds and where it is imported from."""
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is Annotated:
        return type_name(arguments[0])
    if origin in (typing.Union, UnionType):
        return " | ".join(map(type_name, arguments))
    if origin is Literal:
        return f"Literal[{', '.join(map(repr, arguments))}]"
    if origin is not None:
        inside = ", ".join(map(type_name, arguments)) or "()"
        return f"{type_name(origin)}[{inside}]"
    if hint in _PLAIN:
        return _PLAIN[hint]
    name = getattr(hint, "__name__", None)
    return name if isinstance(name, str) else re.sub(r"\btyping\.", "", str(hint))


def _annotations(hint: Any) -> tuple[Any, ...]:
    return typing.get_args(hint)[1:] if typing.get_origin(hint) is Annotated else ()


def _not_secret(hint: Any) -> str | None:
    return next((extra.reason for extra in _annotations(hint) if isinstance(extra, NotSecret)), None)


def _meant(hint: Any) -> str:
    """What an annotation like `msgspec.Meta(description=…)` says."""
    found = (getattr(extra, "description", None) for extra in _annotations(hint))
    return next((text for text in found if isinstance(text, str)), "")
