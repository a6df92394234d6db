"""The catalogue as AsyncAPI 3.0: https://www.asyncapi.com/docs/reference/specification/v3.0.0"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any, Final

from whereupon._payload import Schema, schema_key

if TYPE_CHECKING:
    from whereupon.catalogue import Catalogue, EventEntry, HandlerEntry

EXTENSION: Final = "x-whereupon"


def document(catalogue: Catalogue) -> dict[str, Any]:
    keys = {one.name: schema_key(one.name) for one in catalogue.events}
    writer = catalogue.schemas("#/components/schemas/", taken=keys.values(), draft_7=True)
    return {
        "asyncapi": "3.0.0",
        "info": {"title": catalogue.title, "version": catalogue.version},
        "defaultContentType": "application/json",
        "channels": {
            keys[one.name]: {
                "address": one.name,
                "messages": {keys[one.name]: {"$ref": f"#/components/messages/{keys[one.name]}"}},
            }
            for one in catalogue.events
        },
        "operations": _operations(catalogue, keys),
        "components": {
            "messages": {keys[one.name]: _message(one, keys[one.name]) for one in catalogue.events},
            "messageTraits": {
                "stored": {
                    "contentType": "application/json",
                    "headers": writer.metadata(),
                    "correlationId": {"location": "$message.header#/correlation_id"},
                }
            },
            "operationTraits": {schema_key(one.name): _trait(one) for one in catalogue.handlers},
            "schemas": {keys[one.name]: writer.event(one.event_type) for one in catalogue.events}
            | writer.definitions(),
        },
        "x-whereupon-workflows": {
            one.name: {
                "attempted": one.attempted,
                "succeeded": one.succeeded,
                "failed": one.failed,
                "interrupted": one.interrupted,
            }
            for one in catalogue.workflows
        },
    }


def _operations(catalogue: Catalogue, keys: dict[str, str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for one in catalogue.events:
        key = keys[one.name]
        where = {
            "channel": {"$ref": f"#/channels/{key}"},
            "messages": [{"$ref": f"#/channels/{key}/messages/{key}"}],
        }
        found[f"send.{key}"] = {"action": "send", **where}
        for handler in map(schema_key, one.handlers):
            trait = {"$ref": f"#/components/operationTraits/{handler}"}
            found[f"receive.{key}.{handler}"] = {"action": "receive", **where, "traits": [trait]}
    return found


def _message(one: EventEntry, key: str) -> dict[str, Any]:
    tags = [{"name": tag} for tag in dict.fromkeys((one.category, *one.workflows, one.outcome)) if tag]
    return {
        "name": one.name,
        **_described(one.description),
        "tags": tags,
        "payload": {"$ref": f"#/components/schemas/{key}"},
        **({} if one.example is None else {"examples": [{"payload": one.example}]}),
        "traits": [{"$ref": "#/components/messageTraits/stored"}],
        EXTENSION: declared(one),
    }


def declared(one: EventEntry) -> dict[str, Any]:
    """What an event declares beside its fields."""
    said = {
        "version": one.version,
        "aliases": list(one.aliases),
        "upcasts": one.upcasts,
        "category": one.category,
        "outcome": one.outcome,
        "audit": one.audit,
        "resource": one.resource,
        "resource_id": one.resource_id,
        "stands_alone": one.stands_alone,
        "workflows": list(one.workflows),
        "not_secret": {part.name: part.not_secret for part in one.fields if part.not_secret},
    }
    return {name: value for name, value in said.items() if value not in (None, [], {}, False)}


def with_extension(schema: Schema, one: EventEntry) -> Schema:
    """The schema of an event with what it declares, and an example."""
    examples: Schema = {} if one.example is None else {"examples": [one.example]}
    return {**schema, **examples, EXTENSION: {"event": one.name, **declared(one)}}


def _trait(one: HandlerEntry) -> dict[str, Any]:
    said = {
        "subscription": one.name,
        "delivery": one.delivery,
        "required": one.required,
        "ordered_by": one.ordered_by,
        "retry": None if one.retry is None else _numbers(dataclasses.asdict(one.retry)),
        "timeout": _number(one.timeout),
        "within": _number(one.within),
        "batch": one.batch if one.batch > 1 else None,
        "rate": _number(one.rate),
    }
    known = {name: value for name, value in said.items() if value not in (None, False)}
    return {"title": one.name, **_described(one.description), EXTENSION: known}


def _numbers(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _number(value) for name, value in values.items()}


def _number(value: Any) -> Any:
    """60 and 60.0 are one number, and should be one text."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _described(text: str) -> dict[str, str]:
    return {"description": text} if text else {}
