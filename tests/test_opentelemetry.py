"""Spans of a bus: what they are called, what they are linked to, and how failures look in them."""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Final

import pytest
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.sdk.trace.sampling import ALWAYS_OFF
from opentelemetry.semconv._incubating.attributes import messaging_attributes
from opentelemetry.semconv.attributes import error_attributes, exception_attributes
from opentelemetry.semconv.schemas import Schemas
from opentelemetry.trace import SpanKind, StatusCode
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.log_records import Records
from whereupon import (
    Delivery,
    Discard,
    DomainEvent,
    EventBus,
    EventContext,
    InMemoryEventBus,
    Retry,
    Workflow,
    request_metadata,
)
from whereupon.opentelemetry import CONVENTIONS, Tracing, carried_in

pytestmark = pytest.mark.integration

AT_ONCE: Final = Retry(max_attempts=3, first=0)


class BookBorrowed(DomainEvent):
    number: int


class BookReturned(DomainEvent):
    number: int


class LoanAttempted(DomainEvent):
    number: int


class LoanSucceeded(DomainEvent):
    number: int


class LoanFailed(DomainEvent):
    number: int
    reason: str


Loan = Workflow(LoanAttempted, LoanSucceeded, LoanFailed)


class Library:
    """A bus whose spans are kept."""

    def __init__(self, bus: EventBus, exporter: InMemorySpanExporter, provider: TracerProvider) -> None:
        self.bus = bus
        self.provider = provider
        self.tracer = provider.get_tracer("test")
        self._exporter = exporter

    async def lend(self, *numbers: int) -> list[BookBorrowed]:
        events = [BookBorrowed(number=number) for number in numbers]
        async with AsyncSession(self.bus.engine) as session, session.begin():
            await self.bus.publish(*events, session=session)
        return events

    def spans(self, name: str | None = None) -> list[ReadableSpan]:
        found = sorted(self._exporter.get_finished_spans(), key=lambda span: span.start_time or 0)
        return [span for span in found if name is None or span.name == name]

    def span(self, name: str) -> ReadableSpan:
        [span] = self.spans(name)
        return span


def provider_for(exporter: InMemorySpanExporter, **options: Any) -> TracerProvider:
    provider = TracerProvider(**options)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    return provider


@asynccontextmanager
async def library(url: str, *, same_trace: float = 600.0, **options: Any) -> AsyncIterator[Library]:
    """Not entered: subscribe first."""
    exporter = InMemorySpanExporter()
    provider = provider_for(exporter)
    bus = EventBus(url, logger=Records(), create_tables=True, poll_interval=0.05, **options)
    bus.observe(Tracing(provider, same_trace=same_trace))
    yield Library(bus, exporter, provider)
    await bus.engine.dispose()
    provider.shutdown()


def id_of(span: ReadableSpan) -> tuple[int, int]:
    context = span.get_span_context()
    assert context is not None
    return context.trace_id, context.span_id


def parent_of(span: ReadableSpan) -> tuple[int, int] | None:
    return None if span.parent is None else (span.parent.trace_id, span.parent.span_id)


def links_of(span: ReadableSpan) -> list[tuple[int, int]]:
    return [(link.context.trace_id, link.context.span_id) for link in span.links]


def attributes_of(span: ReadableSpan) -> dict[str, Any]:
    return dict(span.attributes or {})


async def test_a_call_is_linked_to_what_published_its_event_and_in_the_trace_of_the_request(database_url: str) -> None:
    async with library(database_url) as here:
        found: list[tuple[str | None, str | None]] = []

        @here.bus.subscribe(BookBorrowed, name="shelf")
        async def shelf(event: BookBorrowed, context: EventContext) -> None:
            await asyncio.sleep(0)
            found.append((context.trace_id, context.metadata.extra.get("traceparent")))
            with here.tracer.start_as_current_span("look at the shelf"):
                pass

        async with here.bus:
            with here.tracer.start_as_current_span("POST /loans") as request:
                [event] = await here.lend(1)
            await here.bus.drain(20)
        published, process = here.span("publish BookBorrowed"), here.span("process BookBorrowed")
        assert published.kind is SpanKind.PRODUCER
        assert process.kind is SpanKind.CONSUMER
        assert parent_of(published) == (request.get_span_context().trace_id, request.get_span_context().span_id)
        assert parent_of(process) == id_of(published)
        assert links_of(process) == [id_of(published)]
        assert parent_of(here.span("look at the shelf")) == id_of(process)
        assert attributes_of(published) == {
            "messaging.system": "whereupon",
            "messaging.operation.name": "publish",
            "messaging.operation.type": "send",
            "messaging.destination.name": "BookBorrowed",
            "messaging.message.id": str(event.event_id),
        }
        assert attributes_of(process) == {
            "messaging.system": "whereupon",
            "messaging.operation.name": "process",
            "messaging.operation.type": "process",
            "messaging.destination.name": "BookBorrowed",
            "messaging.destination.subscription.name": "shelf",
            "messaging.message.id": str(event.event_id),
            "messaging.whereupon.message.delivery_attempt": 1,
        }
        trace_id, span_id = id_of(published)
        [(seen, header)] = found
        assert seen == f"{trace_id:032x}"
        assert header is not None
        assert header.startswith(f"00-{trace_id:032x}-{span_id:016x}-")
        assert int(header[-2:], 16) & trace.TraceFlags.SAMPLED
        for span in (published, process):
            assert span.status.status_code is StatusCode.UNSET
            assert (span.end_time or 0) >= (span.start_time or 0) > 0


def test_names_are_those_of_the_conventions_that_are_said() -> None:
    known = {value for name, value in vars(messaging_attributes).items() if name.startswith("MESSAGING_")}
    used = Path(sys.modules[Tracing.__module__].__file__ or "").read_text(encoding="utf-8")
    ours = {word for word in used.replace("'", '"').split('"') if word.startswith("messaging.")}
    assert ours
    assert {name for name in ours if not name.startswith("messaging.whereupon.")} <= known
    assert {"error.type", "exception.type", "exception.message", "exception.stacktrace"} == {
        error_attributes.ERROR_TYPE,
        exception_attributes.EXCEPTION_TYPE,
        exception_attributes.EXCEPTION_MESSAGE,
        exception_attributes.EXCEPTION_STACKTRACE,
    }
    assert f"https://opentelemetry.io/schemas/{CONVENTIONS}" in {schema.value for schema in Schemas}
    assert {value.value for value in messaging_attributes.MessagingOperationTypeValues} >= {"send", "process"}


async def test_retries_are_numbered_in_traces_of_their_own_and_failures_are_exceptions(database_url: str) -> None:
    async with library(database_url) as here:

        @here.bus.subscribe(BookBorrowed, name="broken", retry=AT_ONCE)
        async def broken(event: BookBorrowed) -> None:
            raise LookupError("no such book")

        @here.bus.subscribe(BookBorrowed, name="ledger", retry=AT_ONCE)
        async def ledger(event: BookBorrowed, session: AsyncSession, context: EventContext) -> None:
            if context.attempt == 1:
                raise ValueError("locked")
            with here.tracer.start_as_current_span("write"):
                await session.execute(text("SELECT 1"))

        async with here.bus:
            await here.lend(1)
            await here.bus.drain(20)
        published = here.span("publish BookBorrowed")
        calls: dict[str, list[ReadableSpan]] = {}
        for span in here.spans("process BookBorrowed"):
            calls.setdefault(attributes_of(span)["messaging.destination.subscription.name"], []).append(span)
        for spans in calls.values():
            attempts = [attributes_of(span)["messaging.whereupon.message.delivery_attempt"] for span in spans]
            assert attempts == list(range(1, len(spans) + 1))
            assert [parent_of(span) for span in spans] == [id_of(published)] + [None] * (len(spans) - 1)
            assert [links_of(span) for span in spans] == [[id_of(published)]] * len(spans)
            assert len({id_of(span)[0] for span in spans}) == len(spans)
        assert [span.status.status_code for span in calls["broken"]] == [StatusCode.ERROR] * 3
        assert [attributes_of(span)["messaging.whereupon.outcome"] for span in calls["broken"]] == [
            "retrying", "retrying", "dead",
        ]  # fmt: skip
        for span in calls["broken"]:
            assert attributes_of(span)["error.type"] == "LookupError"
            [event] = span.events
            details = dict(event.attributes or {})
            assert (event.name, details["exception.type"]) == ("exception", "LookupError")
            assert details["exception.message"] == "no such book"
            assert 'raise LookupError("no such book")' in str(details["exception.stacktrace"])
            assert (span.start_time or 0) <= event.timestamp <= (span.end_time or 0)
        failed, succeeded = calls["ledger"]
        assert failed.status.description == "ValueError: locked"
        assert succeeded.status.status_code is StatusCode.UNSET
        assert "messaging.whereupon.outcome" not in attributes_of(succeeded)
        assert parent_of(here.span("write")) == id_of(succeeded)


async def test_each_delivery_of_a_batch_has_a_trace_of_its_own_with_its_link(database_url: str) -> None:
    async with library(database_url) as here:

        @here.bus.subscribe(BookBorrowed, name="ledger", batch=10)
        async def ledger(event: BookBorrowed, session: AsyncSession) -> None:
            with here.tracer.start_as_current_span(f"write {event.number}"):
                await session.execute(text("SELECT 1"))

        await here.bus.start(deliver=False)
        await here.lend(*range(8))
        await here.bus.close()
        async with here.bus:
            await here.bus.drain(20)
        published = {attributes_of(s)["messaging.message.id"]: id_of(s) for s in here.spans("publish BookBorrowed")}
        assert len(published) == 8
        calls = here.spans("process BookBorrowed")
        assert len(calls) == 8
        assert any(attributes_of(span).get("messaging.batch.message_count", 1) > 1 for span in calls)
        for span in calls:
            creation = published[attributes_of(span)["messaging.message.id"]]
            alone = "messaging.batch.message_count" not in attributes_of(span)
            assert (parent_of(span), links_of(span)) == (creation if alone else None, [creation])
        written = {parent_of(here.span(f"write {number}")) for number in range(8)}
        assert written == {id_of(span) for span in calls}


async def test_handlers_inside_and_right_after_the_transaction_are_children_of_publishing(database_url: str) -> None:
    async with library(database_url) as here:

        @here.bus.subscribe(BookBorrowed, name="inside", delivery=Delivery.IN_TRANSACTION, retry=AT_ONCE)
        async def inside(event: BookBorrowed, session: AsyncSession, context: EventContext) -> None:
            with here.tracer.start_as_current_span("inside"):
                if context.attempt == 1 and event.number == 2:
                    raise ValueError("not inside")

        @here.bus.subscribe(BookBorrowed, name="after", delivery=Delivery.AFTER_COMMIT)
        async def after(event: BookBorrowed) -> None:
            await asyncio.sleep(0)
            with here.tracer.start_as_current_span("after"):
                raise ValueError("and that is all")

        async with here.bus:
            with here.tracer.start_as_current_span("POST /loans"):
                await here.lend(1)
                assert trace.get_current_span().is_recording()
                assert trace.get_current_span().name == "POST /loans"  # type: ignore[attr-defined]
            await here.lend(2)
            await here.bus.drain(20)
        first, second = here.spans("publish BookBorrowed")
        calls = {id_of(span): span for span in here.spans("process BookBorrowed")}
        parents = {parent_of(span) for span in calls.values()}
        assert parents == {id_of(first), id_of(second), None}  # None: the retry from the log
        for name in ("inside", "after"):
            for span in here.spans(name):
                assert parent_of(span) in calls
        failed = [span for span in calls.values() if span.status.status_code is StatusCode.ERROR]
        outcomes = {str(attributes_of(span)["messaging.whereupon.outcome"]) for span in failed}
        assert (len(failed), outcomes) == (3, {"retrying", "failed"})


async def test_an_event_published_by_a_handler_hangs_on_that_handlers_span(database_url: str) -> None:
    async with library(database_url) as here:

        @here.bus.subscribe(BookBorrowed, name="returns", retry=AT_ONCE)
        async def returns(event: BookBorrowed, session: AsyncSession) -> None:
            await here.bus.publish(BookReturned(number=event.number), session=session)

        @here.bus.subscribe(BookReturned, name="shelf")
        async def shelf(event: BookReturned) -> None: ...

        async with here.bus:
            await here.lend(1)
            await here.bus.drain(20)
        published = here.span("publish BookReturned")
        assert parent_of(published) == id_of(here.span("process BookBorrowed"))
        assert parent_of(here.span("process BookReturned")) == id_of(published), "and not on what its cause carried"


async def test_a_late_delivery_begins_a_trace_of_its_own(database_url: str) -> None:
    async with library(database_url, same_trace=0) as here:

        @here.bus.subscribe(BookBorrowed, name="shelf")
        async def shelf(event: BookBorrowed) -> None: ...

        async with here.bus:
            await here.lend(1)
            await here.bus.drain(20)
        process = here.span("process BookBorrowed")
        assert parent_of(process) is None
        assert links_of(process) == [id_of(here.span("publish BookBorrowed"))]


async def test_a_workflow_is_a_span_around_its_events(database_url: str) -> None:
    async with library(database_url) as here, here.bus:
        async with (
            here.bus.workflow(Loan, number=1) as attempt,
            AsyncSession(here.bus.engine) as session,
            session.begin(),
        ):
            await attempt.succeeded(session=session)
        with pytest.raises(ZeroDivisionError):
            async with here.bus.workflow(Loan, number=2):
                raise ZeroDivisionError
        assert not trace.get_current_span().get_span_context().is_valid
        succeeded, failed = here.spans("workflow Loan")
        assert attributes_of(succeeded)["whereupon.workflow.id"] == str(attempt.id)
        assert [parent_of(span) for span in here.spans("publish LoanAttempted")] == [id_of(succeeded), id_of(failed)]
        assert parent_of(here.span("publish LoanSucceeded")) == id_of(succeeded)
        assert parent_of(here.span("publish LoanFailed")) == id_of(failed)
        assert succeeded.status.status_code is StatusCode.UNSET
        assert failed.status.description == "ZeroDivisionError: "


async def test_what_publish_refuses_is_an_error_of_its_span(sqlite_url: str) -> None:
    async with library(sqlite_url) as here:

        @here.bus.subscribe(BookBorrowed, delivery=Delivery.IN_TRANSACTION, required=True)
        async def refuse(event: BookBorrowed) -> None:
            raise PermissionError("not this one")

        async with here.bus:
            with pytest.raises(PermissionError):
                await here.lend(1)
        published, process = here.span("publish BookBorrowed"), here.span("process BookBorrowed")
        assert published.status.description == process.status.description == "PermissionError: not this one"
        assert parent_of(process) == id_of(published)


async def test_a_discarded_delivery_is_no_error(sqlite_url: str) -> None:
    async with library(sqlite_url) as here:

        @here.bus.subscribe(BookBorrowed)
        async def shelf(event: BookBorrowed) -> None:
            raise Discard("not ours")

        async with here.bus:
            await here.lend(1)
            await here.bus.drain(20)
        process = here.span("process BookBorrowed")
        assert process.status.status_code is StatusCode.UNSET
        assert attributes_of(process)["messaging.whereupon.outcome"] == "skipped"


async def test_the_bus_in_memory_has_the_same_spans(sqlite_url: str) -> None:
    async with library(sqlite_url) as here:
        bus = InMemoryEventBus(logger=Records())
        bus.observe(Tracing(here.provider))

        @bus.subscribe(BookBorrowed)
        async def shelf(event: BookBorrowed) -> None:
            with here.tracer.start_as_current_span("inside"):
                pass

        with here.tracer.start_as_current_span("POST /loans"):
            await bus.publish(BookBorrowed(number=1))
            assert trace.get_current_span().name == "POST /loans"  # type: ignore[attr-defined]
        assert parent_of(here.span("inside")) == id_of(here.span("process BookBorrowed"))
        assert parent_of(here.span("process BookBorrowed")) == id_of(here.span("publish BookBorrowed"))
        assert parent_of(here.span("publish BookBorrowed")) == id_of(here.span("POST /loans"))


async def test_nothing_that_is_not_sampled_is_recorded_and_what_is_carried_says_so(sqlite_url: str) -> None:
    exporter = InMemorySpanExporter()
    provider = provider_for(exporter, sampler=ALWAYS_OFF)
    bus = EventBus(sqlite_url, logger=Records(), create_tables=True)
    bus.observe(Tracing(provider))
    carried: list[str] = []

    @bus.subscribe(BookBorrowed)
    async def shelf(event: BookBorrowed, context: EventContext) -> None:
        carried.append(context.metadata.extra["traceparent"])

    async with bus:
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(BookBorrowed(number=1), session=session)
        await bus.drain(20)
    await bus.engine.dispose()
    assert exporter.get_finished_spans() == ()
    assert len(carried) == 1
    assert not int(carried[0][-2:], 16) & trace.TraceFlags.SAMPLED


async def test_without_an_sdk_nothing_is_carried_and_everything_is_delivered(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url, logger=Records(), create_tables=True)
    bus.observe(Tracing())
    carried: list[Any] = []

    @bus.subscribe(BookBorrowed)
    async def shelf(event: BookBorrowed, context: EventContext) -> None:
        carried.append((context.trace_id, dict(context.metadata.extra)))

    async with bus:
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(BookBorrowed(number=1), session=session)
        await bus.drain(20)
    await bus.engine.dispose()
    assert carried == [(None, {})]
    assert bus._raw_logger.named("observer_failed") == []


@pytest.mark.parametrize(
    "header",
    ["", "00", "00-0-0-01", f"00-{'0' * 32}-{'1' * 16}-01", f"00-{'1' * 32}-{'0' * 16}-01",
     f"ff-{'1' * 32}-{'1' * 16}-01", f"00-{'G' * 32}-{'1' * 16}-01", "ü" * 60],
)  # fmt: skip
async def test_a_carried_header_that_is_none_is_as_good_as_no_header(header: str) -> None:
    assert carried_in({"traceparent": header}) is None


async def test_a_header_given_by_hand_and_its_state_are_gone_on_with(sqlite_url: str) -> None:
    async with library(sqlite_url) as here:

        @here.bus.subscribe(BookBorrowed)
        async def shelf(event: BookBorrowed) -> None: ...

        given = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01", "tracestate": "vendor=1"}
        async with here.bus:
            with request_metadata(given):
                await here.lend(1)
            await here.bus.drain(20)
        published, process = here.span("publish BookBorrowed"), here.span("process BookBorrowed")
        assert parent_of(published) == (int("a" * 32, 16), int("b" * 16, 16))
        assert parent_of(process) == id_of(published)
        context = process.get_span_context()
        assert context is not None
        assert context.trace_state.to_header() == "vendor=1"


def test_a_negative_number_of_seconds_is_refused() -> None:
    with pytest.raises(ValueError, match="0 or more"):
        Tracing(same_trace=-1)


WORKER: Final = """
import json, os
from opentelemetry import trace
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import ConsoleSpanExporter, SimpleSpanProcessor
from whereupon import DomainEvent, EventBus
from whereupon.opentelemetry import Tracing

provider = TracerProvider()
output = open(os.environ["SPANS"], "w")
exporter = ConsoleSpanExporter(out=output, formatter=lambda span: span.to_json(None) + "\\n")
provider.add_span_processor(SimpleSpanProcessor(exporter))
trace.set_tracer_provider(provider)
bus = EventBus(os.environ["DATABASE"], poll_interval=0.05)
bus.observe(Tracing())

class BookBorrowed(DomainEvent):
    number: int

@bus.subscribe(BookBorrowed, name="shelf")
async def shelf(event: BookBorrowed) -> None:
    with trace.get_tracer("app").start_as_current_span("look at the shelf"):
        pass
"""


async def test_the_trace_goes_on_in_a_worker_process(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "shelves.py").write_text(WORKER)
    async with library(database_url, deliver=False) as here:

        @here.bus.subscribe(BookBorrowed, name="shelf")
        async def shelf(event: BookBorrowed) -> None: ...

        async with here.bus:
            with here.tracer.start_as_current_span("POST /loans"):
                [event] = await here.lend(1)
            worker = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "whereupon.cli", "worker", "shelves:bus",
                cwd=tmp_path,
                env={**os.environ, "DATABASE": database_url, "SPANS": str(tmp_path / "spans.json")},
                stderr=asyncio.subprocess.PIPE,
            )  # fmt: skip
            try:
                await here.bus.wait_settled([event], 60)
            finally:
                worker.terminate()
                _, errors = await asyncio.wait_for(worker.communicate(), 60)
        assert worker.returncode == 0, errors
        lines = (tmp_path / "spans.json").read_text().splitlines()
        spans = {span["name"]: span for span in map(json.loads, lines)}
        trace_id, span_id = id_of(here.span("publish BookBorrowed"))
        process = spans["process BookBorrowed"]
        assert process["context"]["trace_id"] == f"0x{trace_id:032x}"
        assert process["parent_id"] == f"0x{span_id:016x}"
        assert process["links"][0]["context"]["span_id"] == f"0x{span_id:016x}"
        assert spans["look at the shelf"]["parent_id"] == process["context"]["span_id"]
