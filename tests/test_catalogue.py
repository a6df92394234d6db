"""The catalogue: AsyncAPI as its official schema has it, and schemas that what is stored fits and garbage doesn't."""

from __future__ import annotations

import enum
import functools
import json
import re
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, make_dataclass
from datetime import date, datetime, time, timedelta, timezone
from decimal import Decimal
from pathlib import Path
from types import new_class
from typing import Annotated, Any, Literal
from uuid import UUID

import jsonschema
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import (
    AuditEventHandler,
    Delivery,
    DomainEvent,
    EventBus,
    InMemoryEventBus,
    JsonCodec,
    LoggingEventHandler,
    Metadata,
    NotSecret,
    Retry,
    Workflow,
)
from whereupon.catalogue import Catalogue, type_name
from whereupon.context import encode_metadata
from whereupon.schema import log

pytestmark = pytest.mark.unit

OFFICIAL = json.loads((Path(__file__).parent / "asyncapi" / "3.0.0.json").read_text(encoding="utf-8"))


class FerryEvent(DomainEvent, abstract=True, category="ferry", resource="ferry"):
    """Something happened to a ferry."""


class Tide(enum.Enum):
    HIGH = "high"
    LOW = "low"


class Deck(enum.IntEnum):
    """Where on a ferry."""

    UPPER = 2
    LOWER = 1


@dataclass(frozen=True)
class Fare:
    """What one pays."""

    amount: Decimal
    """In units of the currency."""
    currency: str = "EUR"


class Inland:
    @dataclass(frozen=True)
    class Fare:
        price: int


@dataclass(frozen=True)
class Leg:
    """A part of a journey, and what comes after it."""

    to: str
    then: Leg | None = None


class FerryDocked(FerryEvent, audit="FERRY_DOCKED", version=3, aliases=("FerryLanded", "BoatLanded")):
    """A ferry is at its pier.

    Passengers may leave it.
    """

    ferry_id: UUID
    format: str
    """Named as a word of JSON Schema is."""
    at: datetime
    day: date = date(2025, 11, 18)
    clock: time = time(7, 30)
    late_by: timedelta = timedelta()
    toll: Decimal = Decimal("2.50")
    photo: bytes = b""
    speed: float = 0.0
    tide: Tide = Tide.HIGH
    deck: Deck = Deck.LOWER
    side: Literal["port", 7, None] = None
    fare: Fare | None = None
    passes: frozenset[str] = frozenset({"day", "month", "year"})
    position: tuple[float, float] = (0.0, 0.0)
    nothing: tuple[()] = ()
    depths: tuple[int, ...] = ()
    fares: dict[Deck, Fare] = field(default_factory=dict)
    seen: dict[UUID, list[datetime]] = field(default_factory=dict)
    counts: dict[int, float] = field(default_factory=dict)
    route: Leg | None = None
    crew: Annotated[int, msgspec.Meta(ge=2, description="How many work on it.")] = 2
    door_pin: Annotated[str | None, NotSecret("it is painted on the door")] = None

    @classmethod
    def upcast(cls, version: int, fields: dict[str, Any]) -> dict[str, Any]:
        return {"format": "", **fields}


class FerryCrossingAttempted(FerryEvent):
    ferry_id: UUID


class FerryCrossingSucceeded(FerryEvent):
    ferry_id: UUID


class FerryCrossingFailed(FerryEvent):
    ferry_id: UUID
    reason: str


class FerryStranded(DomainEvent, name="ferries/ferry.stranded (by the tide)"):
    email: str


class FerryRenamed(DomainEvent):
    name: str

    def __post_init__(self) -> None:
        if not self.name.startswith("MS "):
            raise ValueError("a ferry's name begins with MS")


FerryCrossing = Workflow(FerryCrossingAttempted, FerryCrossingSucceeded, FerryCrossingFailed)


async def open_gate(event: FerryDocked) -> None:
    """Lets people out."""


async def count_passengers(event: FerryDocked, session: AsyncSession) -> None: ...


def wired(bus: EventBus | InMemoryEventBus) -> None:
    bus.register(AuditEventHandler())
    bus.register(LoggingEventHandler())
    bus.subscribe(
        FerryDocked,
        open_gate,
        ordered_by="ferry_id",
        timeout=60,
        retry=Retry(max_attempts=4, first=2),
        rate=5,
        within="2m",
    )
    bus.subscribe(FerryDocked, count_passengers, delivery=Delivery.IN_TRANSACTION, required=True)


@functools.cache
def the_catalogue() -> Catalogue:
    bus = InMemoryEventBus()
    wired(bus)
    return Catalogue.of(bus, title="Ferries", version="2.1", packages=[__name__])


def faults(document: Any) -> list[str]:
    return [
        f"{error.json_path}: {error.message}" for error in jsonschema.Draft7Validator(OFFICIAL).iter_errors(document)
    ]


@functools.cache
def validator(name: str) -> Any:
    schema = the_catalogue().json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())


@functools.cache
def headers() -> Any:
    schema = the_catalogue().asyncapi()["components"]["messageTraits"]["stored"]["headers"]
    jsonschema.Draft7Validator.check_schema(schema)
    return jsonschema.Draft7Validator(schema)


# --- AsyncAPI -------------------------------------------------------------------------------------------------------


def test_the_official_schema_has_nothing_to_say_against_the_document() -> None:
    assert faults(the_catalogue().asyncapi()) == []


@pytest.mark.parametrize(
    "spoil",
    [
        lambda document: document["operations"]["send.FerryDocked"].update(action="publish"),
        lambda document: document["components"]["schemas"]["FerryDocked"].update(type="thing"),
        lambda document: document["components"]["messages"]["FerryDocked"].update(version=3),
        lambda document: document["info"].pop("version"),
    ],
)
def test_the_official_schema_would_tell_of_what_is_wrong(spoil: Any) -> None:
    document = the_catalogue().asyncapi()
    spoil(document)
    assert faults(document)


def test_every_reference_of_the_document_leads_somewhere() -> None:
    document = the_catalogue().asyncapi()
    references = re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document))
    assert len(references) > 30
    for reference in references:
        found: Any = document
        for part in reference.split("/"):
            found = found[part]


def test_publishing_is_an_operation_and_so_is_each_handler_with_what_it_declares() -> None:
    document = the_catalogue().asyncapi()
    operations = {name for name in document["operations"] if ".FerryDocked" in name}
    assert operations == {
        "send.FerryDocked",
        "receive.FerryDocked.AuditEventHandler",
        "receive.FerryDocked.LoggingEventHandler",
        "receive.FerryDocked.count_passengers",
        "receive.FerryDocked.open_gate",
    }
    assert document["components"]["operationTraits"]["open_gate"] == {
        "title": "open_gate",
        "description": "Lets people out.",
        "x-whereupon": {
            "subscription": "open_gate",
            "delivery": "durable",
            "ordered_by": "ferry_id",
            "retry": {"max_attempts": 4, "first": 2, "factor": 2, "longest": 3600},
            "timeout": 60,
            "within": 120,
            "rate": 5,
        },
    }
    assert document["components"]["operationTraits"]["count_passengers"]["x-whereupon"]["required"] is True


def test_a_message_says_what_its_event_declares() -> None:
    message = the_catalogue().asyncapi()["components"]["messages"]["FerryDocked"]
    assert message["description"] == "A ferry is at its pier.\n\nPassengers may leave it."
    assert message["x-whereupon"] == {
        "version": 3,
        "aliases": ["BoatLanded", "FerryLanded"],
        "upcasts": True,
        "category": "ferry",
        "outcome": "succeeded",
        "audit": "FERRY_DOCKED",
        "resource": "ferry",
        "resource_id": "ferry_id",
        "not_secret": {"door_pin": "it is painted on the door"},
    }
    attempted = the_catalogue().asyncapi()["components"]["messages"]["FerryCrossingAttempted"]
    assert attempted["x-whereupon"]["workflows"] == ["FerryCrossing"]
    assert attempted["x-whereupon"]["stands_alone"] is True
    assert {"name": "FerryCrossing"} in attempted["tags"]


def test_a_name_that_fits_no_key_is_the_address_of_a_channel_whose_key_fits() -> None:
    channels = the_catalogue().asyncapi()["channels"]
    [key] = [key for key, channel in channels.items() if channel["address"] == FerryStranded.__event__.name]
    assert re.fullmatch(r"[A-Za-z0-9._-]+", key)


@given(
    st.builds(
        Metadata,
        correlation_id=st.none() | st.uuids(),
        causation_id=st.none() | st.uuids(),
        actor=st.none() | st.text(),
        ip_address=st.none() | st.text(),
        extra=st.dictionaries(st.text(), st.text()),
    )
)
@settings(max_examples=50, deadline=None)
def test_what_is_stored_beside_an_event_fits_the_headers(metadata: Metadata) -> None:
    assert headers().is_valid(json.loads(encode_metadata(metadata)))


@pytest.mark.parametrize(
    "garbage", [{"correlation_id": "the first"}, {"actor": None}, {"extra": {"a": 1}}, {"who": "ada"}]
)
def test_what_is_never_stored_beside_an_event_does_not_fit_the_headers(garbage: dict[str, Any]) -> None:
    assert not headers().is_valid(garbage)


# --- JSON Schema ----------------------------------------------------------------------------------------------------

moments = st.datetimes(
    timezones=st.integers(-14 * 60, 14 * 60).map(lambda minutes: timezone(timedelta(minutes=minutes))),
    min_value=datetime(2, 1, 1),  # noqa: DTZ001 (Hypothesis adds the zone)
    max_value=datetime(9998, 1, 1),  # noqa: DTZ001
)
decimals = st.decimals(allow_nan=False, allow_infinity=False)
floats = st.floats(allow_nan=False, allow_infinity=False)
words = st.text(st.characters(exclude_categories=["Cs"]))
fares = st.builds(Fare, amount=decimals, currency=words)
legs = st.recursive(st.none(), lambda then: st.builds(Leg, to=words, then=then), max_leaves=3)
dockings = st.builds(
    FerryDocked,
    ferry_id=st.uuids(),
    format=words,
    at=moments,
    day=st.dates(),
    clock=st.times(),
    late_by=st.timedeltas(),
    toll=decimals,
    photo=st.binary(),
    speed=floats,
    tide=st.sampled_from(Tide),
    deck=st.sampled_from(Deck),
    side=st.sampled_from(["port", 7, None]),
    fare=st.none() | fares,
    passes=st.frozensets(words),
    position=st.tuples(floats, floats),
    depths=st.lists(st.integers(-(2**63), 2**63 - 1)).map(tuple),
    fares=st.dictionaries(st.sampled_from(Deck), fares),
    seen=st.dictionaries(st.uuids(), st.lists(moments)),
    counts=st.dictionaries(st.integers(-(2**63), 2**63 - 1), floats),
    route=legs,
    crew=st.integers(2, 99),
    door_pin=st.none() | words,
)


@given(dockings)
@settings(max_examples=60, deadline=None)
def test_whatever_is_stored_fits_the_schema(event: FerryDocked) -> None:
    validator("FerryDocked").validate(json.loads(JsonCodec().encode(event)))


GARBAGE: Mapping[str, Any] = {
    "event_id": "the first",
    "occurred_at": "2025-11-18T15:00:00",
    "ferry_id": 7,
    "format": None,
    "at": "yesterday",
    "day": "2025-11-18T15:00:00Z",
    "clock": "half past seven",
    "late_by": "90 s",
    "toll": "NaN",
    "photo": "no base64",
    "speed": "fast",
    "tide": "HIGH",
    "deck": 3,
    "side": "starboard",
    "fare": {"currency": "EUR"},
    "passes": ["day", "day"],
    "position": [1.0, "here"],
    "nothing": [0],
    "depths": ["deep"],
    "fares": {"3": {"amount": "1"}},
    "seen": {"somebody": []},
    "counts": {"many": 1.0},
    "route": {"to": "here", "then": {"to": 1}},
    "crew": 1,
    "door_pin": 1234,
}


@pytest.mark.parametrize("name", GARBAGE)
def test_what_is_no_value_of_a_field_does_not_fit(name: str) -> None:
    example = the_catalogue().event("FerryDocked").example
    assert example is not None
    assert validator("FerryDocked").is_valid(example)
    assert not validator("FerryDocked").is_valid({**example, name: GARBAGE[name]})


def test_garbage_was_tried_on_every_field() -> None:
    assert GARBAGE.keys() == set(FerryDocked.__event__.fields)


@pytest.mark.parametrize("name", ["event_id", "occurred_at", "ferry_id", "format", "at"])
def test_a_field_without_a_default_can_not_be_missing_nor_can_the_id_and_the_time(name: str) -> None:
    example = dict(the_catalogue().event("FerryDocked").example or {})
    del example[name]
    assert not validator("FerryDocked").is_valid(example)


def test_what_was_stored_before_a_field_with_a_default_was_added_fits() -> None:
    example = dict(the_catalogue().event("FerryDocked").example or {})
    del example["toll"]
    assert validator("FerryDocked").is_valid(example)


@pytest.mark.parametrize("other", [[], "text", None, 1])
def test_what_is_no_object_is_no_event(other: object) -> None:
    assert not validator("FerryDocked").is_valid(other)


def test_the_asyncapi_document_has_the_same_payload_in_words_of_draft_7() -> None:
    document = the_catalogue().asyncapi()
    schema = {"$ref": "#/components/schemas/FerryDocked", **document}
    jsonschema.Draft7Validator.check_schema(document["components"]["schemas"]["FerryDocked"])
    draft_7 = jsonschema.Draft7Validator(schema)
    example = the_catalogue().event("FerryDocked").example
    assert example is not None
    draft_7.validate(example)
    for name, value in GARBAGE.items():
        assert not draft_7.is_valid({**example, name: value}), name


async def test_what_the_log_holds_fits(database_url: str) -> None:
    bus = EventBus(database_url, create_tables=True)
    wired(bus)
    catalogue = Catalogue.of(bus, packages=[__name__])
    examples = {one.name: one for one in catalogue.events if one.example is not None}
    async with bus:
        async with AsyncSession(bus.engine) as session, session.begin():
            for one in examples.values():
                event = JsonCodec().decode(one.event_type, one.version, msgspec.json.encode(one.example))
                await bus.publish(event, session=session)
        async with bus.engine.connect() as connection:
            rows = (await connection.execute(select(log.c.type, log.c.payload, log.c.headers))).all()
    assert {row.type for row in rows} == examples.keys()
    for row in rows:
        validator(row.type).validate(json.loads(row.payload))
        headers().validate(json.loads(row.headers))


def test_one_document_defines_all_events_by_name() -> None:
    document = the_catalogue().json_schema()
    jsonschema.Draft202012Validator.check_schema(document)
    assert {one.name for one in the_catalogue().events} <= document["$defs"].keys()
    assert document["$defs"]["Fare"]["properties"]["amount"]["description"] == "In units of the currency."


def test_two_classes_of_one_name_are_told_apart() -> None:
    class FerryTaxed(DomainEvent):
        old: Fare
        new: Inland.Fare

    async def collect(event: FerryTaxed) -> None: ...

    bus = InMemoryEventBus()
    bus.subscribe(FerryTaxed, collect)
    schema = Catalogue.of(bus, packages=[]).json_schema("FerryTaxed")
    payload = {"event_id": "019a977a-d180-7000-8000-000000000000", "occurred_at": "2025-11-18T15:00:00Z"}
    ends = {"old": {"amount": "1"}, "new": {"price": 1}}
    jsonschema.Draft202012Validator(schema).validate(payload | ends)
    assert not jsonschema.Draft202012Validator(schema).is_valid(payload | {"old": ends["new"], "new": ends["old"]})
    assert {f"{__name__}.Fare", f"{__name__}.Inland.Fare"} <= schema["$defs"].keys()


def test_an_event_may_be_called_as_a_class_that_it_holds_and_two_of_one_place_are_two() -> None:
    def within(kind: type) -> type:
        return make_dataclass("Fare", [("price", kind)], frozen=True, namespace={"__module__": __name__})

    cheap, dear = within(int), within(str)

    class FarePaid(DomainEvent, name="Fare"):
        first: cheap  # type: ignore[valid-type]
        then: dear  # type: ignore[valid-type]

    async def collect(event: FarePaid) -> None: ...

    bus = InMemoryEventBus()
    bus.subscribe(FarePaid, collect)
    catalogue = Catalogue.of(bus, packages=[])
    example = catalogue.event("Fare").example
    assert example is not None
    assert isinstance(example["first"]["price"], int)
    assert isinstance(example["then"]["price"], str)
    document = catalogue.json_schema()
    check = jsonschema.Draft202012Validator({"$ref": "#/$defs/Fare", "$defs": document["$defs"]})
    check.validate(example)
    assert not check.is_valid({**example, "first": example["then"]})
    assert not check.is_valid({**example, "then": example["first"]})


# --- what is known of events ----------------------------------------------------------------------------------------


def test_an_event_without_a_docstring_has_that_of_its_abstract_class() -> None:
    assert the_catalogue().event("FerryCrossingFailed").description == "Something happened to a ferry."
    assert the_catalogue().event(FerryStranded.__event__.name).description == ""


def test_a_field_is_described_by_the_text_beneath_it_or_by_its_annotation() -> None:
    fields = {part.name: part for part in the_catalogue().event("FerryDocked").fields}
    assert fields["format"].description == "Named as a word of JSON Schema is."
    assert fields["crew"].description == "How many work on it."
    assert fields["event_id"].description == "A UUIDv7, made with the event."
    assert fields["door_pin"].not_secret == "it is painted on the door"
    assert (fields["toll"].default, fields["ferry_id"].required, fields["event_id"].required) == ('"2.50"', True, False)


@pytest.mark.parametrize(
    ("hint", "shown"),
    [
        (UUID | None, "UUID | None"),
        (Annotated[str, NotSecret("why")], "str"),
        (Literal["port", 7], "Literal['port', 7]"),
        (dict[str, list[Fare]], "dict[str, list[Fare]]"),
        (tuple[int, ...], "tuple[int, …]"),
        (tuple[()], "tuple[()]"),
        (Annotated[int, msgspec.Meta(examples=[1])], "int"),
    ],
)
def test_a_type_is_shown_as_one_would_write_it(hint: Any, shown: str) -> None:
    assert type_name(hint) == shown


def test_the_example_is_an_event_of_its_class_and_there_is_none_where_the_class_refuses_made_up_values() -> None:
    for one in the_catalogue().events:
        if one.event_type is FerryRenamed:
            assert one.example is None
        else:
            JsonCodec().decode(one.event_type, one.version, msgspec.json.encode(one.example))
    assert (the_catalogue().event(FerryStranded.__event__.name).example or {})["email"] == "ada@example.com"


def test_events_that_nobody_hears_are_there_and_those_of_other_packages_are_not() -> None:
    names = {one.name for one in the_catalogue().events}
    assert "FerryCrossingFailed" in names
    assert names == {
        "FerryDocked", "FerryCrossingAttempted", "FerryCrossingSucceeded", "FerryCrossingFailed", "FerryRenamed",
        FerryStranded.__event__.name,
    }  # fmt: skip
    everything = {one.name for one in Catalogue.of(InMemoryEventBus()).events}
    assert names <= everything
    assert not any(
        one.event_type.__module__.startswith("whereupon.") for one in Catalogue.of(InMemoryEventBus()).events
    )


def test_the_catalogue_needs_no_database_and_no_web_framework() -> None:
    listing = (
        "import json, sys; before = set(sys.modules); import whereupon.catalogue; "
        "print(json.dumps(sorted({name.partition('.')[0] for name in set(sys.modules) - before})))"
    )
    ran = subprocess.run([sys.executable, "-c", listing], capture_output=True, text=True, check=True, timeout=60)
    loaded = set(json.loads(ran.stdout))
    assert loaded - sys.stdlib_module_names <= {"whereupon", "msgspec", "uuid_utils", "typing_extensions"}


# --- Mermaid --------------------------------------------------------------------------------------------------------

NODE = re.compile(r'^\s*(?:subgraph )?(\w+)(?:\[|\(\[|\[/|\{\{|\(\()"([^"]*)"', re.MULTILINE)


def test_the_map_leads_from_events_to_their_handlers_and_draws_who_hears_everything_once() -> None:
    text = the_catalogue().mermaid()
    assert text.splitlines()[1] == "flowchart LR"
    assert "  e_FerryDocked --> h_open_gate\n" in text
    assert "  e_FerryDocked ==> h_count_passengers\n" in text
    assert text.count("h_LoggingEventHandler") == 1
    assert 'subgraph w_FerryCrossing["FerryCrossing"]' in text


def sighted(called: str, stored_as: str) -> type[DomainEvent]:
    body = {"__qualname__": f"sighted.<locals>.{called}", "__module__": __name__}
    return new_class(called, (DomainEvent,), {"name": stored_as}, lambda namespace: namespace.update(body))


@given(st.lists(st.text(st.characters(codec="utf-8"), min_size=1, max_size=20), min_size=2, max_size=8, unique=True))
@settings(max_examples=15, deadline=None)
def test_whatever_events_are_called_each_is_a_node_of_its_own_and_breaks_no_line(names: list[str]) -> None:
    names = [name for name in names if name.strip() and name.isprintable()]

    async def hear(event: DomainEvent) -> None: ...

    bus = InMemoryEventBus()
    for at, name in enumerate(names):
        bus.subscribe(sighted(f"Ferry{chr(65 + at)}Sighted", name), hear, name=f"hear {name}"[:200])
    text = Catalogue.of(bus, packages=[]).mermaid()
    nodes = NODE.findall(text)
    assert len({node for node, _ in nodes}) == len(nodes) == 2 * len(names)
    assert len(text.splitlines()) == 2 + 3 * len(names)
    assert all(re.fullmatch(r"[\w .,:/()#;<>-]*", label) for _, label in nodes)
    assert not re.search(r"<(?!br/>)", text)
