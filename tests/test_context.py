"""Who and what caused an event: given, taken from the request, inherited from the event being handled."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import logging
from ipaddress import IPv4Address
from types import MappingProxyType
from typing import Any
from uuid import UUID, uuid4

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from structlog.testing import CapturingLogger

from whereupon import (
    BusStateError,
    DomainEvent,
    EventContext,
    InMemoryEventBus,
    Metadata,
    PublishError,
    acting_as,
    request_metadata,
)
from whereupon.context import NO_METADATA, decode_metadata, encode_metadata, handling, metadata_for

pytestmark = pytest.mark.unit


class OrderCalledOff(DomainEvent):
    number: int = 0


class ParcelHandedOver(DomainEvent):
    number: int = 0


def metadata_of(**values: Any) -> Metadata:
    return Metadata.of(values)


# Metadata itself


def test_a_mapping_becomes_metadata_and_unknown_keys_are_kept() -> None:
    correlation_id = uuid4()
    metadata = metadata_of(
        correlation_id=str(correlation_id), actor=UUID(int=5), ip_address=IPv4Address("10.0.0.1"), tenant=7,
        nothing=None,
        extra={"region": "eu"},
    )  # fmt: skip
    assert metadata.correlation_id == correlation_id
    assert metadata.actor == str(UUID(int=5))
    assert metadata.ip_address == "10.0.0.1"
    assert metadata.extra == {"tenant": "7", "region": "eu"}
    assert Metadata.of(metadata) is metadata
    assert Metadata.of(None) == NO_METADATA == Metadata.of(MappingProxyType({}))


@pytest.mark.parametrize("values", ["text", 5, [("actor", "x")], object()])
def test_what_is_no_mapping_is_refused(values: Any) -> None:
    with pytest.raises(PublishError, match=r"metadata is a mapping or a Metadata, not .*metadata=\{"):
        Metadata.of(values)


@pytest.mark.parametrize("key", ["correlation_id", "causation_id"])
def test_an_id_that_is_no_uuid_is_refused_by_name(key: str) -> None:
    with pytest.raises(PublishError, match=f"metadata has {key}='order-5': it is the id of .* a UUID"):
        Metadata.of({key: "order-5"})


def test_metadata_never_changes() -> None:
    theirs = {"tenant": "a"}
    metadata = Metadata(extra=theirs)
    theirs["tenant"] = "b"
    assert metadata.extra == {"tenant": "a"}
    for target in (metadata, NO_METADATA, Metadata()):
        with pytest.raises(TypeError, match="never changes"):
            target.extra["tenant"] = "c"  # type: ignore[index] # pyright: ignore[reportIndexIssue]
    with pytest.raises(dataclasses.FrozenInstanceError):
        metadata.actor = "x"  # type: ignore[misc]
    assert hash(metadata) == hash(Metadata(extra={"tenant": "a"}))


texts = st.none() | st.text()
metadatas = st.builds(
    Metadata,
    correlation_id=st.none() | st.uuids(),
    causation_id=st.none() | st.uuids(),
    actor=texts,
    ip_address=texts,
    user_agent=texts,
    trace_id=texts,
    extra=st.dictionaries(st.text(), st.text(), max_size=2),
)


@given(metadatas)
def test_metadata_comes_back_as_it_was_stored(metadata: Metadata) -> None:
    assert decode_metadata(encode_metadata(metadata)) == metadata


@given(st.binary() | st.text().map(str.encode))
def test_damaged_headers_raise_what_is_documented(data: bytes) -> None:
    with contextlib.suppress(msgspec.DecodeError, UnicodeDecodeError):
        assert isinstance(decode_metadata(data), Metadata)


def test_only_what_is_known_is_stored() -> None:
    assert json.loads(encode_metadata(Metadata(actor="x"))) == {"actor": "x"}
    assert encode_metadata(NO_METADATA) == "{}"


def test_text_that_is_no_unicode_costs_no_event() -> None:
    metadata = Metadata(user_agent="a\ud800b", actor="x", extra={"k\udfff": "\ud800"})
    assert decode_metadata(encode_metadata(metadata)) == Metadata(user_agent="a?b", actor="x", extra={"k?": "?"})


# What applies to an event


def test_without_anything_there_is_none() -> None:
    assert metadata_for(None) == NO_METADATA


def test_the_requests_metadata_applies_within_its_block_only() -> None:
    with request_metadata({"ip_address": "10.0.0.1"}):
        assert metadata_for(None).ip_address == "10.0.0.1"
    assert metadata_for(None) == NO_METADATA
    with pytest.raises(LookupError), request_metadata({"ip_address": "10.0.0.1"}):
        raise LookupError
    assert metadata_for(None) == NO_METADATA


def test_a_block_within_a_block_adds_to_it() -> None:
    with request_metadata({"ip_address": "10.0.0.1", "actor": "nobody", "tenant": "a"}):
        with request_metadata({"actor": "somebody", "plan": "free"}):
            inner = metadata_for(None)
        outer = metadata_for(None)
    assert (inner.ip_address, inner.actor, inner.extra) == ("10.0.0.1", "somebody", {"tenant": "a", "plan": "free"})
    assert (outer.actor, outer.extra) == ("nobody", {"tenant": "a"})


def test_what_is_given_comes_first_and_the_request_fills_the_rest() -> None:
    with request_metadata({"ip_address": "10.0.0.1", "user_agent": "x"}):
        metadata = metadata_for({"ip_address": "10.0.0.2"})
    assert (metadata.ip_address, metadata.user_agent) == ("10.0.0.2", "x")


def test_an_event_published_while_another_is_handled_inherits_from_it() -> None:
    event_id = uuid4()
    token = handling.set((event_id, metadata_of(ip_address="10.0.0.1", actor="x", tenant="a")))
    try:
        metadata = metadata_for({"actor": "y", "plan": "free"})
        with request_metadata({"user_agent": "job"}):
            within = metadata_for(None)
    finally:
        handling.reset(token)
    assert (metadata.causation_id, metadata.correlation_id) == (event_id, event_id)
    assert (metadata.ip_address, metadata.actor) == ("10.0.0.1", "y")
    assert metadata.extra == {"tenant": "a", "plan": "free"}
    assert (within.user_agent, within.ip_address, within.causation_id) == ("job", "10.0.0.1", event_id)


async def test_a_chain_of_events_has_one_correlation_id_and_each_its_cause() -> None:
    bus, seen = InMemoryEventBus(), dict[str, EventContext]()

    class InvoiceWritten(DomainEvent): ...

    @bus.subscribe(OrderCalledOff)
    async def send(event: OrderCalledOff, context: EventContext) -> None:
        seen["placed"] = context
        await bus.publish(ParcelHandedOver())

    @bus.subscribe(ParcelHandedOver)
    async def invoice(event: ParcelHandedOver, context: EventContext) -> None:
        seen["sent"] = context
        await asyncio.sleep(0)
        await asyncio.create_task(bus.publish(InvoiceWritten()))

    @bus.subscribe(InvoiceWritten)
    async def file(event: InvoiceWritten, context: EventContext) -> None:
        seen["written"] = context

    with request_metadata({"ip_address": "10.0.0.1"}):
        await bus.publish(first := OrderCalledOff())
    assert {context.correlation_id for context in seen.values()} == {first.event_id}
    assert [seen[name].causation_id for name in ("placed", "sent", "written")] == [
        None, first.event_id, seen["sent"].event_id,
    ]  # fmt: skip
    assert {context.ip_address for context in seen.values()} == {"10.0.0.1"}


async def test_what_a_publisher_gives_outlives_its_request_in_the_events_that_follow() -> None:
    bus, seen = InMemoryEventBus(), list[EventContext]()

    @bus.subscribe(OrderCalledOff)
    async def send(event: OrderCalledOff) -> None:
        await bus.publish(ParcelHandedOver())

    @bus.subscribe(ParcelHandedOver)
    async def note(event: ParcelHandedOver, context: EventContext) -> None:
        seen.append(context)

    with request_metadata({"actor": "the request's", "correlation_id": uuid4()}):
        await bus.publish(OrderCalledOff(), metadata={"actor": "the publisher's", "correlation_id": (own := uuid4())})
    assert [(context.actor, context.correlation_id) for context in seen] == [("the publisher's", own)]


async def test_a_hundred_concurrent_requests_never_see_each_others_metadata() -> None:
    bus, seen = InMemoryEventBus(), list[tuple[int, str | None, str | None]]()

    @bus.subscribe(OrderCalledOff)
    async def send(event: OrderCalledOff, context: EventContext) -> None:
        await asyncio.sleep(0.001 * (event.number % 7))
        await bus.publish(ParcelHandedOver(number=event.number))

    @bus.subscribe(ParcelHandedOver)
    async def note(event: ParcelHandedOver, context: EventContext) -> None:
        await asyncio.sleep(0.001 * (event.number % 3))
        seen.append((event.number, context.ip_address, context.actor))

    async def request(number: int) -> None:
        with request_metadata({"ip_address": f"10.0.0.{number}"}):
            await asyncio.sleep(0.001 * (number % 5))
            await bus.publish(OrderCalledOff(number=number), metadata={"actor": f"user {number}"})

    async with asyncio.TaskGroup() as group:
        for number in range(100):
            group.create_task(request(number))
    assert sorted(seen) == [(n, f"10.0.0.{n}", f"user {n}") for n in range(100)]
    assert metadata_for(None) == NO_METADATA


# Who is acting


def test_an_actor_that_turns_out_later_holds_to_the_end_of_the_block() -> None:
    with request_metadata({"ip_address": "10.0.0.1"}):
        with request_metadata({"tenant": "a"}):
            acting_as(UUID(int=5))
            assert metadata_for(None) == metadata_of(ip_address="10.0.0.1", tenant="a", actor=UUID(int=5))
        assert metadata_for(None).actor is None
        acting_as("somebody")
        acting_as("somebody else")
        assert metadata_for(None).actor == "somebody else"
        assert metadata_for({"actor": "cron"}).actor == "cron"
        acting_as(None)
        assert metadata_for(None) == metadata_of(ip_address="10.0.0.1")
    assert metadata_for(None) == NO_METADATA


def test_an_actor_is_refused_where_there_is_no_request() -> None:
    with pytest.raises(BusStateError, match=r"acting_as\('x'\) is for a request.*install\(app, bus\)"):
        acting_as("x")


async def test_a_handler_can_t_say_who_the_request_acts_as() -> None:
    bus, refused = InMemoryEventBus(), list[Exception]()

    @bus.subscribe(OrderCalledOff)
    async def interfere(event: OrderCalledOff) -> None:
        with request_metadata({}):
            acting_as("the handler")
            assert metadata_for(None).actor == "the handler"
        try:
            acting_as("the handler")
        except BusStateError as error:
            refused.append(error)

    with request_metadata({"actor": "x"}):
        await bus.publish(OrderCalledOff())
        assert metadata_for(None).actor == "x"
    assert len(refused) == 1


@pytest.mark.parametrize("value", [object(), b"x", 1.5, Metadata()])
def test_an_actor_that_is_no_id_is_refused(value: Any) -> None:
    with request_metadata({"actor": "x"}):
        with pytest.raises(PublishError, match=f"an actor is a str, an int or a UUID, not {type(value).__name__}"):
            acting_as(value)
        assert metadata_for(None).actor == "x"


# What a handler sees


def test_the_idempotency_key_is_equal_on_every_attempt_and_differs_between_subscriptions() -> None:
    event_id = uuid4()
    keys = [
        EventContext(event_id=event_id, event_type="X", subscription=name, attempt=attempt).idempotency_key
        for name, attempt in (("mail", 1), ("mail", 2), ("audit", 1))
    ]
    assert keys[0] == keys[1] != keys[2]
    assert str(event_id) in keys[0]


def test_a_context_reads_its_metadata() -> None:
    metadata = metadata_of(actor="a", ip_address="i", user_agent="u", trace_id="t")
    context = EventContext(event_id=uuid4(), event_type="X", subscription="s", metadata=metadata)
    assert (context.actor, context.ip_address, context.user_agent, context.trace_id) == ("a", "i", "u", "t")
    assert context.correlation_id == context.event_id
    assert context.causation_id is None
    with pytest.raises(dataclasses.FrozenInstanceError):
        context.attempt = 2  # type: ignore[misc]


def test_the_logger_of_a_context_says_which_delivery_it_is() -> None:
    import structlog

    output = CapturingLogger()
    logger = structlog.wrap_logger(output, processors=[])
    context = EventContext(event_id=uuid4(), event_type="X", subscription="mail", attempt=3, log=logger)
    context.logger.info("sent", to="x")
    ((_, _, details),) = output.calls
    assert details == {
        "event": "sent", "to": "x", "event_id": str(context.event_id), "subscription": "mail", "attempt": 3,
    }  # fmt: skip
    traced = dataclasses.replace(context, metadata=metadata_of(trace_id="ab" * 16))
    traced.logger.info("sent")
    assert output.calls[1].kwargs["trace_id"] == "ab" * 16


def test_a_logger_of_the_standard_library_says_it_in_its_records(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    adapter = logging.LoggerAdapter(logging.getLogger("shop"), {"shop": 5})
    metadata = metadata_of(trace_id="ab" * 16)
    for log in (logging.getLogger("shop"), adapter, None):
        context = EventContext(
            event_id=uuid4(), event_type="X", subscription="mail", attempt=3, log=log, metadata=metadata
        )
        context.logger.info("sent to %s", "x", extra={"to": "x"})
        said = vars(caplog.records[-1])
        assert (said["event_id"], said["subscription"], said["attempt"]) == (str(context.event_id), "mail", 3)
        assert (said["trace_id"], said["to"]) == ("ab" * 16, "x")
        assert said["name"] == ("whereupon" if log is None else "shop")
        assert said.get("shop") == (5 if log is adapter else None)


def test_a_logger_that_binds_nothing_is_handed_on_as_it_is() -> None:
    class Own(logging.LoggerAdapter[logging.Logger]):
        pass

    for own in (Own(logging.getLogger("shop"), {}), object()):
        assert EventContext(event_id=uuid4(), event_type="X", subscription="s", log=own).logger is own
