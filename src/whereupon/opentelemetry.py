"""OpenTelemetry: a span for each event published and one for each call of a handler, linked across the database.

    bus.observe(Tracing())

The names are those of the semantic conventions for messaging, version 1.44.0, where they are in development still. What
a publisher leaves for the handlers is a W3C `traceparent` (and `tracestate`) in the `extra` of the event's metadata, so
it is stored with the event and outlives both processes.

A call is linked to the span that published its event, always. It is a child of that span as well, and so in the trace
of the request, if it is the first attempt, by itself, of an event that is not older than `same_trace` seconds. A retry,
a replay, a batch and a late delivery begin traces of their own: their time is not the request's, several events have
several parents, and a back end that has closed a trace shows what is added to it a day later badly or not at all.
"""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Mapping
from typing import Any, Final, NamedTuple

from opentelemetry import context as otel_context
from opentelemetry import trace
from opentelemetry.context import Context
from opentelemetry.trace import (
    Link,
    NonRecordingSpan,
    Span,
    SpanContext,
    SpanKind,
    Status,
    StatusCode,
    TraceFlags,
    Tracer,
    TracerProvider,
    TraceState,
)

from whereupon.context import Metadata
from whereupon.event import FrozenDict
from whereupon.logs import message_of, trace_of
from whereupon.observer import FAILED, SUCCEEDED, Observer, Publication, Run
from whereupon.workflow import Attempt

CONVENTIONS: Final = "1.44.0"
"""The version of the semantic conventions that attributes and span names are taken from."""

_TRACEPARENT: Final = re.compile(
    r"(?!ff)[0-9a-f]{2}-(?!0{32})([0-9a-f]{32})-(?!0{16})([0-9a-f]{16})-([0-9a-f]{2})(?:-.*)?"
)
_ERRORS: Final = frozenset({FAILED, "retrying", "dead"})
_ROOT: Final = Context()


class _Call(NamedTuple):
    span: Span
    began: int
    """Nanoseconds from 1970."""
    token: Any
    """For giving the context back to whoever made the call in it."""


class Tracing(Observer):
    """Spans for what a bus publishes and what its handlers do; give it to `bus.observe` before the bus starts.

    `tracer_provider` is the process's own unless given. `same_trace` is for how many seconds after an event was
    recorded the first attempt of a handler belongs to the trace of its publisher; 0: never.
    """

    def __init__(self, tracer_provider: TracerProvider | None = None, *, same_trace: float = 600.0) -> None:
        if not same_trace >= 0:
            raise ValueError(f"Tracing(same_trace={same_trace}): it is a number of seconds, 0 or more")
        self._tracer: Tracer = trace.get_tracer(
            "whereupon",
            importlib.metadata.version("whereupon"),
            tracer_provider,
            schema_url=f"https://opentelemetry.io/schemas/{CONVENTIONS}",
        )
        self._same_trace = same_trace

    # --- publishing -------------------------------------------------------------------------------------------------

    def publishing(self, publication: Publication) -> Span:
        event, metadata = publication.event, publication.metadata
        name = type(event).__event__.name
        attributes = _attributes("publish", "send", name, str(event.event_id), metadata)
        parent = None
        if not trace.get_current_span().get_span_context().is_valid:  # nobody traces here, but the cause was traced
            carried = carried_in(metadata.extra)
            parent = None if carried is None else trace.set_span_in_context(NonRecordingSpan(carried))
        span = self._tracer.start_span(f"publish {name}", parent, SpanKind.PRODUCER, attributes)
        context = span.get_span_context()
        if context.is_valid:
            publication.metadata = _carrying(metadata, context)
        return span

    def staged(self, publication: Publication, state: Span) -> None:
        if publication.error is not None:
            _fail(state, publication.error)
        state.end()

    # --- handlers ---------------------------------------------------------------------------------------------------

    def started(self, run: Run) -> _Call:
        began = time.time_ns()
        name = run.event_type
        attributes = _attributes("process", "process", name, str(run.event_id), run.metadata)
        attributes["messaging.destination.subscription.name"] = run.subscription.name
        attributes["messaging.whereupon.message.delivery_attempt"] = run.attempt
        if run.generation:
            attributes["messaging.whereupon.generation"] = run.generation
        if run.together > 1:
            attributes["messaging.batch.message_count"] = run.together
        creation = carried_in(run.metadata.extra)
        parent: Context | None = _ROOT
        if creation is not None and self._in_same_trace(run, began):
            parent = trace.set_span_in_context(NonRecordingSpan(creation))
        elif creation is None and run.inline:
            parent = None  # as whatever else is called here
        links = () if creation is None else (Link(creation),)
        span = self._tracer.start_span(f"process {name}", parent, SpanKind.CONSUMER, attributes, links, began)
        token = otel_context.attach(trace.set_span_in_context(span))
        return _Call(span, began, token if run.inline else None)

    def _in_same_trace(self, run: Run, now: int) -> bool:
        if run.attempt > 1 or run.generation or run.together > 1:
            return False
        return run.recorded_at is None or now / 1e9 - run.recorded_at.timestamp() < self._same_trace

    def ended(self, run: Run, state: _Call) -> None:
        span, began, token = state
        ended = began + int(run.seconds * 1e9)
        if run.outcome != SUCCEEDED and span.is_recording():
            span.set_attribute("messaging.whereupon.outcome", run.outcome)
            if run.outcome in _ERRORS:
                _fail_as(span, run.error_type or "", run.error_message or "", run.traceback, ended)
        span.end(ended)
        if token is not None:
            otel_context.detach(token)

    # --- workflows --------------------------------------------------------------------------------------------------

    def attempting(self, attempt: Attempt[Any, Any]) -> tuple[Span, Any]:
        name = attempt.workflow.name
        attributes = {"whereupon.workflow.name": name, "whereupon.workflow.id": str(attempt.id)}
        span = self._tracer.start_span(f"workflow {name}", attributes=attributes)
        return span, otel_context.attach(trace.set_span_in_context(span))

    def left(self, attempt: Attempt[Any, Any], error: BaseException | None, state: tuple[Span, Any]) -> None:
        span, token = state
        if error is not None:
            _fail(span, error)
        span.end()
        otel_context.detach(token)


def carried_in(extra: Mapping[str, str]) -> SpanContext | None:
    """The span that published an event, from the metadata stored with it; None where nothing valid is."""
    found = _TRACEPARENT.fullmatch(extra.get("traceparent", ""))
    if found is None:
        return None
    state = extra.get("tracestate")
    return SpanContext(
        int(found[1], 16),
        int(found[2], 16),
        is_remote=True,
        trace_flags=TraceFlags(int(found[3], 16)),
        trace_state=TraceState() if not state else TraceState.from_header([state]),
    )


def _carrying(metadata: Metadata, context: SpanContext) -> Metadata:
    extra = dict(metadata.extra)
    extra["traceparent"] = f"00-{context.trace_id:032x}-{context.span_id:016x}-{context.trace_flags:02x}"
    extra.pop("tracestate", None)
    if context.trace_state:
        extra["tracestate"] = context.trace_state.to_header()
    return Metadata(
        correlation_id=metadata.correlation_id,
        causation_id=metadata.causation_id,
        actor=metadata.actor,
        ip_address=metadata.ip_address,
        user_agent=metadata.user_agent,
        trace_id=metadata.trace_id or f"{context.trace_id:032x}",
        extra=FrozenDict(extra),
    )


def _attributes(operation: str, kind: str, destination: str, message: str, metadata: Metadata) -> dict[str, Any]:
    attributes: dict[str, Any] = {
        "messaging.system": "whereupon",
        "messaging.operation.name": operation,
        "messaging.operation.type": kind,
        "messaging.destination.name": destination,
        "messaging.message.id": message,
    }
    if metadata.correlation_id is not None:
        attributes["messaging.message.conversation_id"] = str(metadata.correlation_id)
    return attributes


def _fail(span: Span, error: BaseException) -> None:
    if span.is_recording():
        _fail_as(span, type(error).__name__, message_of(error), trace_of(error))


def _fail_as(span: Span, kind: str, message: str, stack: str | None, at: int | None = None) -> None:
    details = {"exception.type": kind, "exception.message": message}
    if stack:
        details["exception.stacktrace"] = stack
    span.add_event("exception", details, at)
    span.set_attribute("error.type", kind)
    span.set_status(Status(StatusCode.ERROR, f"{kind}: {message}"))
