"""The bus without a database: what it promises to publishers and handlers."""

from __future__ import annotations

import asyncio
import functools
import gc
import logging
import sys
import tracemalloc
from asyncio import CancelledError
from collections.abc import AsyncIterator, Callable, Iterator
from contextvars import ContextVar, copy_context
from pathlib import Path
from typing import Any
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine

from whereupon import (
    BusStateError,
    Delivery,
    DomainEvent,
    EventContext,
    InMemoryEventBus,
    Metadata,
    PublishError,
    SessionRequiredError,
    request_metadata,
)
from whereupon.memory import _Staged


class TicketBooked(DomainEvent):
    number: int = 1


class TicketPrinted(DomainEvent):
    number: int = 1


class InvoiceSent(DomainEvent):
    number: int = 1


class RecordingLogger:
    """A logger as structlog's are, that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, /, **details: Any) -> None:
        self.records.append(("info", event, details))

    def warning(self, event: str, /, **details: Any) -> None:
        self.records.append(("warning", event, details))

    def error(self, event: str, /, **details: Any) -> None:
        self.records.append(("error", event, details))

    def failures(self) -> list[tuple[str, str]]:
        """Handler and error type of every `event_handler_failed`."""
        return [(d["handler_name"], d["error_type"]) for _, event, d in self.records if event == "event_handler_failed"]


@pytest.fixture
def logger() -> RecordingLogger:
    return RecordingLogger()


@pytest.fixture
def bus(logger: RecordingLogger) -> InMemoryEventBus:
    return InMemoryEventBus(logger=logger)


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No coroutine is dropped before it began, no task while it is pending, no error unseen."""
    unraisable: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not unraisable
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


# -- publishing --------------------------------------------------------------------------------------------------------


async def test_publish_returns_when_the_handlers_are_done(bus: InMemoryEventBus) -> None:
    seen: list[str] = []

    @bus.subscribe(TicketBooked)
    async def slow(event: TicketBooked) -> None:
        await asyncio.sleep(0.01)
        seen.append("slow")

    @bus.subscribe(TicketBooked)
    async def fast(event: TicketBooked) -> None:
        seen.append("fast")

    event = TicketBooked()
    receipt = await bus.publish(event)
    assert seen == ["fast", "slow"]
    assert receipt.events == (event,)
    await receipt.settled(timeout=1)


async def test_handlers_run_at_the_same_time(bus: InMemoryEventBus) -> None:
    both = asyncio.Barrier(2)
    met: list[str] = []

    async def first(event: TicketBooked) -> None:
        await both.wait()
        met.append("first")

    async def second(event: TicketBooked) -> None:
        await both.wait()
        met.append("second")

    bus.subscribe(TicketBooked, first)
    bus.subscribe(TicketBooked, second)
    async with asyncio.timeout(1):
        await bus.publish(TicketBooked())
    assert sorted(met) == ["first", "second"]


async def test_several_events_in_one_call_reach_their_own_handlers_in_order(bus: InMemoryEventBus) -> None:
    seen: list[tuple[str, int]] = []

    @bus.subscribe(TicketBooked)
    async def placed(event: TicketBooked) -> None:
        seen.append(("placed", event.number))

    @bus.subscribe(TicketPrinted)
    async def shipped(event: TicketPrinted) -> None:
        seen.append(("shipped", event.number))
        await asyncio.sleep(0)
        seen.append(("arrived", event.number))

    receipt = await bus.publish(TicketBooked(number=1), TicketPrinted(number=2), TicketBooked(number=3))
    assert seen == [("placed", 1), ("shipped", 2), ("placed", 3), ("arrived", 2)]
    assert [type(event) for event in receipt.events] == [TicketBooked, TicketPrinted, TicketBooked]


async def test_an_event_nobody_hears_is_published_all_the_same(bus: InMemoryEventBus) -> None:
    event = TicketBooked()
    assert (await bus.publish(event)).events == (event,)


async def test_a_subscription_to_every_event_hears_every_event(bus: InMemoryEventBus) -> None:
    heard: list[str] = []

    async def everything(event: DomainEvent) -> None:
        heard.append(type(event).__name__)

    bus.subscribe(DomainEvent, everything)
    await bus.publish(TicketBooked())
    await bus.publish(TicketPrinted())
    assert heard == ["TicketBooked", "TicketPrinted"]


async def test_who_subscribes_later_hears_later_events(bus: InMemoryEventBus) -> None:
    heard: list[str] = []

    async def early(event: TicketBooked) -> None:
        heard.append("early")
        if len(bus.subscriptions) == 1:
            bus.subscribe(TicketBooked, late)

    async def late(event: TicketBooked) -> None:
        heard.append("late")

    bus.subscribe(TicketBooked, early)
    await bus.publish(TicketBooked())
    assert heard == ["early"]
    await bus.publish(TicketBooked())
    assert heard == ["early", "early", "late"]


class OrderHandlers:
    def __init__(self) -> None:
        self.heard: list[str] = []

    async def handle_order_placed(self, event: TicketBooked) -> None:
        self.heard.append(f"placed {event.number}")

    async def handle_order_shipped(self, event: TicketPrinted) -> None:
        self.heard.append(f"shipped {event.number}")
        raise ValueError("no")


async def test_the_methods_of_a_registered_object_are_subscribed_by_annotation(
    bus: InMemoryEventBus, logger: RecordingLogger
) -> None:
    handlers = OrderHandlers()
    bus.register(handlers)
    await bus.publish(TicketBooked(number=1), TicketPrinted(number=2), InvoiceSent())
    assert handlers.heard == ["placed 1", "shipped 2"]
    assert logger.failures() == [("handle_order_shipped", "ValueError")]
    assert "OrderHandlers.handle_order_placed" in bus.subscriptions


@pytest.mark.parametrize("arguments", [(), (TicketBooked,), ("TicketBooked",), (TicketBooked(), object())])
async def test_what_is_no_event_is_refused_before_anything_runs(
    bus: InMemoryEventBus, arguments: tuple[Any, ...]
) -> None:
    handler = AsyncMock()
    bus.subscribe(TicketBooked, handler, name="handler")
    with pytest.raises(PublishError):
        await bus.publish(*arguments)
    handler.assert_not_called()


async def test_a_mock_may_be_a_handler(bus: InMemoryEventBus, logger: RecordingLogger) -> None:
    works, fails = AsyncMock(return_value="ignored"), AsyncMock(side_effect=ValueError("no"))
    bus.subscribe(TicketBooked, works, name="works")
    bus.subscribe(TicketBooked, fails, name="fails")
    event = TicketBooked()
    await bus.publish(event)
    works.assert_awaited_once_with(event)
    fails.assert_awaited_once_with(event)
    assert [error for _, error in logger.failures()] == ["ValueError"]


# -- failures ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
async def test_a_failing_handler_is_logged_and_reaches_neither_publisher_nor_other_handlers(
    bus: InMemoryEventBus, logger: RecordingLogger, waits: bool
) -> None:
    ran: list[str] = []

    async def before(event: TicketBooked) -> None:
        ran.append("before")

    async def send_invoice(event: TicketBooked) -> None:
        if waits:
            await asyncio.sleep(0)
        raise ValueError("no printer")

    async def after(event: TicketBooked) -> None:
        await asyncio.sleep(0.001)
        ran.append("after")

    for handler in (before, send_invoice, after):
        bus.subscribe(TicketBooked, handler)
    event = TicketBooked()
    await bus.publish(event)
    assert ran == ["before", "after"]
    ((level, name, details),) = logger.records
    assert (level, name) == ("warning", "event_handler_failed")
    asked_for = ("event_type", "event_id", "handler_name", "error_type", "error_message")
    assert {key: details[key] for key in asked_for} == {
        "event_type": "TicketBooked",
        "event_id": str(event.event_id),
        "handler_name": "send_invoice",
        "error_type": "ValueError",
        "error_message": "no printer",
    }


async def test_a_failure_in_the_standard_log_carries_its_details_as_attributes(
    caplog: pytest.LogCaptureFixture,
) -> None:
    bus = InMemoryEventBus()

    @bus.subscribe(TicketBooked)
    async def send_invoice(event: TicketBooked) -> None:
        raise ValueError("no printer")

    event = TicketBooked()
    with caplog.at_level(logging.WARNING, logger="whereupon"):
        await bus.publish(event)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert record.getMessage().startswith("event_handler_failed")
    assert vars(record)["event_id"] == str(event.event_id)
    assert vars(record)["handler_name"] == "send_invoice"
    assert vars(record)["error_type"] == "ValueError"


class _CallableHandler:
    async def __call__(self, event: TicketBooked) -> None:
        raise ValueError("no")


class _Mailer:
    async def handle(self, event: TicketBooked) -> None:
        raise ValueError("no")

    async def send(self, event: TicketBooked) -> None:
        raise ValueError("no")


async def _send_by(printer: str, event: TicketBooked) -> None:
    raise ValueError("no")


@pytest.mark.parametrize(
    ("handler", "handler_name"),
    [
        (_CallableHandler(), "_CallableHandler"),
        (_Mailer().handle, "handle"),
        (_Mailer().send, "send"),
        (functools.partial(_send_by, "laser"), "_send_by"),
    ],
)
async def test_handlers_that_are_no_functions_are_named_sensibly(
    bus: InMemoryEventBus, logger: RecordingLogger, handler: Any, handler_name: str
) -> None:
    bus.subscribe(TicketBooked, handler)
    await bus.publish(TicketBooked())
    assert logger.failures() == [(handler_name, "ValueError")]


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
async def test_a_cancelled_error_that_a_handler_raises_is_its_own_failure(
    bus: InMemoryEventBus, logger: RecordingLogger, waits: bool
) -> None:
    ran: list[str] = []

    async def gives_up(event: TicketBooked) -> None:
        if waits:
            await asyncio.sleep(0)
        raise CancelledError("the client was closed")

    async def other(event: TicketBooked) -> None:
        await asyncio.sleep(0.001)
        ran.append("other")

    bus.subscribe(TicketBooked, gives_up)
    bus.subscribe(TicketBooked, other)
    await bus.publish(TicketBooked())
    assert ran == ["other"]
    assert logger.failures() == [("gives_up", "CancelledError")]
    publisher = asyncio.current_task()
    assert publisher is not None
    assert not publisher.cancelling()


async def test_a_handler_past_its_timeout_is_logged_as_such(bus: InMemoryEventBus, logger: RecordingLogger) -> None:
    async def slow(event: TicketBooked) -> None:
        await asyncio.sleep(60)

    bus.subscribe(TicketBooked, slow, timeout=0.01)
    async with asyncio.timeout(1):
        await bus.publish(TicketBooked())
    assert logger.failures() == [("slow", "HandlerTimeout")]


class _BrokenLogger(RecordingLogger):
    def warning(self, event: str, /, **details: Any) -> None:
        raise OSError("disk full")


class _Unshowable(Exception):
    def __str__(self) -> str:
        raise RuntimeError("can't be shown")


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
@pytest.mark.parametrize(("broken", "error"), [(_BrokenLogger(), ValueError("no")), (RecordingLogger(), _Unshowable())])
async def test_a_failure_that_can_not_be_logged_stops_nobody_and_is_told_to_the_standard_log(
    broken: RecordingLogger, error: Exception, waits: bool, caplog: pytest.LogCaptureFixture
) -> None:
    bus = InMemoryEventBus(logger=broken)
    ran: list[str] = []

    async def fails(event: TicketBooked) -> None:
        if waits:
            await asyncio.sleep(0)
        raise error

    async def other(event: TicketBooked) -> None:
        ran.append("other")

    bus.subscribe(TicketBooked, fails)
    bus.subscribe(TicketBooked, other)
    async with asyncio.timeout(1):
        await bus.publish(TicketBooked())
    assert ran == ["other"]
    (record,) = [record for record in caplog.records if record.name == "whereupon"]
    assert "fails of TicketBooked" in record.getMessage()


# -- cancelling the publisher ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("turns", range(5))
async def test_a_cancelled_publisher_leaves_the_handlers_running(
    bus: InMemoryEventBus, logger: RecordingLogger, turns: int
) -> None:
    done: list[str] = []

    async def slow(event: TicketBooked) -> None:
        for _ in range(10):
            await asyncio.sleep(0)
        done.append("slow")

    bus.subscribe(TicketBooked, slow)
    publisher = asyncio.create_task(bus.publish(TicketBooked()))
    await asyncio.sleep(0)
    for _ in range(turns):
        await asyncio.sleep(0)
    publisher.cancel()
    with pytest.raises(CancelledError):
        await publisher
    assert done == []
    await bus.drain(timeout=1)
    assert done == ["slow"]
    assert logger.records == []


async def test_a_handler_that_cancels_its_publisher_cancels_the_publisher_alone(
    bus: InMemoryEventBus, logger: RecordingLogger
) -> None:
    done: list[str] = []

    async def cancels(event: TicketBooked) -> None:
        publisher.cancel()

    async def slow(event: TicketBooked) -> None:
        await asyncio.sleep(0.001)
        done.append("slow")

    bus.subscribe(TicketBooked, cancels)
    bus.subscribe(TicketBooked, slow)
    publisher = asyncio.create_task(bus.publish(TicketBooked()))
    with pytest.raises(CancelledError):
        await publisher
    await bus.drain(timeout=1)
    assert done == ["slow"]
    assert logger.records == []


async def test_a_timeout_around_publish_ends_the_wait_and_not_the_handler(bus: InMemoryEventBus) -> None:
    done: list[str] = []

    async def slow(event: TicketBooked) -> None:
        await asyncio.sleep(0.03)
        done.append("slow")

    bus.subscribe(TicketBooked, slow)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.001):
            await bus.publish(TicketBooked())
    await bus.drain(timeout=1)
    assert done == ["slow"]


# -- context and metadata ----------------------------------------------------------------------------------------------


async def test_a_hundred_concurrent_publishes_never_see_each_others_metadata(bus: InMemoryEventBus) -> None:
    """Each with its own IP address, given in two ways, to handlers that suspend at different points."""
    seen: dict[int, list[tuple[str, str | None]]] = {}

    def handler(name: str, before: int, after: int) -> Callable[..., Any]:
        async def handle(event: TicketBooked, context: EventContext) -> None:
            for _ in range(before * (event.number % 3)):
                await asyncio.sleep(0)
            address = context.ip_address
            for _ in range(after * (event.number % 4)):
                await asyncio.sleep(0)
            assert context.ip_address == address
            assert context.event_id == event.event_id
            seen.setdefault(event.number, []).append((name, address))
            await bus.publish(TicketPrinted(number=event.number))

        return handle

    inherited: dict[int, list[tuple[str | None, UUID | None]]] = {}

    @bus.subscribe(TicketPrinted)
    async def shipped(event: TicketPrinted, context: EventContext) -> None:
        await asyncio.sleep(0)
        inherited.setdefault(event.number, []).append((context.ip_address, context.causation_id))

    for name, before, after in [("at once", 0, 0), ("first", 1, 0), ("later", 0, 1), ("both", 2, 3)]:
        bus.subscribe(TicketBooked, handler(name, before, after), name=name)
    ids: dict[int, UUID] = {}

    async def request(number: int) -> None:
        event = TicketBooked(number=number)
        ids[number] = event.event_id
        metadata = {"ip_address": f"10.0.0.{number}"}
        if number % 2:
            await bus.publish(event, metadata=metadata)
            return
        with request_metadata(metadata):
            await asyncio.sleep(0)
            await bus.publish(event)

    await asyncio.gather(*(request(number) for number in range(100)))
    assert len(seen) == 100
    for number in range(100):
        address = f"10.0.0.{number}"
        assert sorted(seen[number]) == [(name, address) for name in ("at once", "both", "first", "later")]
        assert inherited[number] == [(address, ids[number])] * 4


async def test_an_event_published_in_a_handler_inherits_correlation_and_names_its_cause(bus: InMemoryEventBus) -> None:
    seen: dict[str, EventContext] = {}

    @bus.subscribe(TicketBooked)
    async def ship(event: TicketBooked, context: EventContext) -> None:
        seen["placed"] = context
        await asyncio.sleep(0)
        await bus.publish(TicketPrinted())

    @bus.subscribe(TicketPrinted)
    async def invoice(event: TicketPrinted, context: EventContext) -> None:
        seen["shipped"] = context
        await bus.publish(InvoiceSent(), metadata=Metadata(actor="the printer"))

    @bus.subscribe(InvoiceSent)
    async def keep(event: InvoiceSent, context: EventContext) -> None:
        seen["sent"] = context

    request = uuid4()
    await bus.publish(TicketBooked(), metadata={"correlation_id": request, "actor": "alice", "request": "r1"})
    assert {context.correlation_id for context in seen.values()} == {request}
    assert seen["placed"].causation_id is None
    assert seen["shipped"].causation_id == seen["placed"].event_id
    assert seen["sent"].causation_id == seen["shipped"].event_id
    assert [seen[name].actor for name in ("placed", "shipped", "sent")] == ["alice", "alice", "the printer"]
    assert seen["sent"].metadata.extra == {"request": "r1"}
    after = TicketPrinted()
    await bus.publish(after)  # outside any handler again
    assert seen["shipped"].causation_id is None
    assert seen["shipped"].correlation_id == after.event_id


colour: ContextVar[str] = ContextVar("colour", default="none")


async def test_what_a_handler_sets_in_its_context_stays_there(bus: InMemoryEventBus) -> None:
    seen: list[str] = []

    def paints(name: str, waits: bool) -> Callable[..., Any]:
        async def paint(event: TicketBooked) -> None:
            seen.append(colour.get())
            colour.set(name)
            if waits:
                await asyncio.sleep(0)
            assert colour.get() == name

        return paint

    for name, waits in [("a", False), ("b", True), ("c", False)]:
        bus.subscribe(TicketBooked, paints(name, waits), name=name)
    colour.set("publisher")
    await bus.publish(TicketBooked())
    assert seen == ["publisher"] * 3
    assert colour.get() == "publisher"


async def test_handlers_may_publish_on_the_same_bus_to_any_depth(
    bus: InMemoryEventBus, logger: RecordingLogger
) -> None:
    seen: list[tuple[str, int]] = []

    async def counts_down(event: TicketBooked) -> None:
        task = asyncio.current_task()
        seen.append(("at once", event.number))
        if event.number:
            await bus.publish(TicketBooked(number=event.number - 1))
        assert asyncio.current_task() is task

    async def counts_down_slowly(event: TicketBooked) -> None:
        task = asyncio.current_task()
        await asyncio.sleep(0)
        assert asyncio.current_task() is task
        seen.append(("slowly", event.number))

    bus.subscribe(TicketBooked, counts_down)
    bus.subscribe(TicketBooked, counts_down_slowly)
    await bus.publish(TicketBooked(number=20))
    assert sorted(seen) == sorted((how, number) for how in ("at once", "slowly") for number in range(21))
    assert logger.records == []


# -- loops and callbacks -----------------------------------------------------------------------------------------------


def test_a_bus_serves_one_event_loop_after_the_other(logger: RecordingLogger) -> None:
    bus = InMemoryEventBus(logger=logger)
    seen: list[int] = []

    async def at_once(event: TicketBooked) -> None:
        seen.append(event.number)

    async def later(event: TicketBooked) -> None:
        await asyncio.sleep(0.001)
        seen.append(event.number)

    bus.subscribe(TicketBooked, at_once)
    bus.subscribe(TicketBooked, later)

    async def main(number: int) -> None:
        await bus.publish(TicketBooked(number=number))
        await bus.drain(timeout=1)

    asyncio.run(main(1))
    asyncio.run(main(2))
    assert seen == [1, 1, 2, 2]
    assert logger.records == []


def test_what_a_closed_loop_cut_off_is_logged_and_does_not_hold_up_the_next(logger: RecordingLogger) -> None:
    bus = InMemoryEventBus(logger=logger)

    async def waits(event: TicketBooked) -> None:
        await asyncio.sleep(60)

    bus.subscribe(TicketBooked, waits)
    loop = asyncio.new_event_loop()
    publisher = loop.create_task(bus.publish(TicketBooked()))
    loop.run_until_complete(asyncio.sleep(0.001))
    publisher.cancel()
    with pytest.raises(CancelledError):
        loop.run_until_complete(publisher)
    loop.close()
    asyncio.run(bus.drain(timeout=1))
    assert logger.failures() == [("waits", "BusStateError")]


def test_a_handler_that_asyncio_run_cancels_at_its_end_is_logged(logger: RecordingLogger) -> None:
    bus = InMemoryEventBus(logger=logger)

    async def waits(event: TicketBooked) -> None:
        await asyncio.sleep(60)

    bus.subscribe(TicketBooked, waits)

    async def main() -> None:
        publisher = asyncio.create_task(bus.publish(TicketBooked()))
        await asyncio.sleep(0.001)
        publisher.cancel()

    asyncio.run(main())
    assert logger.failures() == [("waits", "CancelledError")]


def test_a_plain_callback_may_publish_to_handlers_that_never_wait(bus: InMemoryEventBus) -> None:
    seen: list[asyncio.Task[Any] | None] = []

    async def handler(event: TicketBooked) -> None:
        seen.append(asyncio.current_task())

    bus.subscribe(TicketBooked, handler)

    def callback() -> None:
        with pytest.raises(StopIteration):
            bus.publish(TicketBooked()).send(None)
        seen.append(asyncio.current_task())

    async def main() -> None:
        asyncio.get_running_loop().call_soon(callback)
        await asyncio.sleep(0.001)

    asyncio.run(main())
    assert seen[0] is not None
    assert seen[1] is None


# -- draining and closing ----------------------------------------------------------------------------------------------


async def _published_and_left(bus: InMemoryEventBus, event: DomainEvent) -> None:
    publisher = asyncio.create_task(bus.publish(event))
    await asyncio.sleep(0)
    publisher.cancel()
    await asyncio.wait([publisher])


async def test_drain_waits_for_handlers_and_for_those_that_they_start(bus: InMemoryEventBus) -> None:
    done: list[str] = []

    async def first(event: TicketBooked) -> None:
        await asyncio.sleep(0.005)
        await _published_and_left(bus, TicketPrinted())
        done.append("first")

    async def second(event: TicketPrinted) -> None:
        await asyncio.sleep(0.01)
        done.append("second")

    bus.subscribe(TicketBooked, first)
    bus.subscribe(TicketPrinted, second)
    await _published_and_left(bus, TicketBooked())
    await bus.drain(timeout=1)
    assert done == ["first", "second"]


async def test_drain_gives_up_after_its_timeout_and_leaves_the_handlers_running(bus: InMemoryEventBus) -> None:
    release = asyncio.Event()
    done: list[str] = []

    async def waits(event: TicketBooked) -> None:
        await release.wait()
        done.append("waits")

    bus.subscribe(TicketBooked, waits)
    await _published_and_left(bus, TicketBooked())
    with pytest.raises(TimeoutError):
        await bus.drain(timeout=0.01)
    release.set()
    await bus.drain(timeout=1)
    assert done == ["waits"]


async def test_a_handler_that_drains_does_not_wait_for_itself(bus: InMemoryEventBus, logger: RecordingLogger) -> None:
    async def drains(event: TicketBooked) -> None:
        await asyncio.sleep(0)
        await bus.drain(timeout=1)

    bus.subscribe(TicketBooked, drains)
    await bus.publish(TicketBooked())
    assert logger.records == []


async def test_leaving_the_bus_waits_for_its_handlers_and_closes_it(bus: InMemoryEventBus) -> None:
    done: list[str] = []

    async def slow(event: TicketBooked) -> None:
        await asyncio.sleep(0.01)
        done.append("slow")

    bus.subscribe(TicketBooked, slow)
    async with bus:
        await _published_and_left(bus, TicketBooked())
    assert done == ["slow"]
    with pytest.raises(BusStateError, match="closed"):
        await bus.publish(TicketBooked())
    async with bus:  # and it may be opened again
        await bus.publish(TicketBooked())
    assert done == ["slow", "slow"]


async def test_handlers_that_outlast_the_drain_are_cancelled_and_logged(logger: RecordingLogger) -> None:
    bus = InMemoryEventBus(logger=logger, drain_timeout=0.02)
    cleaned: list[str] = []

    async def waits(event: TicketBooked) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("up")

    bus.subscribe(TicketBooked, waits)
    async with asyncio.timeout(2), bus:
        await _published_and_left(bus, TicketBooked())
    assert cleaned == ["up"]
    ((_, _, details),) = logger.records
    assert details["handler_name"] == "waits"
    assert details["error_message"] == "it still ran 0.02 s after the bus began to close, and was cancelled"


async def test_a_handler_that_will_not_be_cancelled_holds_up_closing_for_a_while_only(logger: RecordingLogger) -> None:
    bus = InMemoryEventBus(logger=logger, drain_timeout=0.02)
    release = asyncio.Event()
    done: list[str] = []

    async def stubborn(event: TicketBooked) -> None:
        while not release.is_set():
            try:
                await release.wait()
            except CancelledError:
                done.append("refused")
        done.append("ended")

    bus.subscribe(TicketBooked, stubborn)
    async with asyncio.timeout(2):
        async with bus:
            await _published_and_left(bus, TicketBooked())
    assert done == ["refused"]
    assert logger.failures() == [("stubborn", "HandlerTimeout")]
    release.set()
    await asyncio.sleep(0.01)
    assert done == ["refused", "ended"]
    assert len(logger.records) == 1


async def test_an_error_in_the_block_passes_through_the_closing(bus: InMemoryEventBus) -> None:
    with pytest.raises(ValueError, match="mine"):
        async with bus:
            raise ValueError("mine")


@pytest.mark.slow
async def test_memory_stays_flat_over_many_publishes(bus: InMemoryEventBus) -> None:
    async def at_once(event: TicketBooked) -> None:
        pass

    async def with_context(event: TicketPrinted, context: EventContext) -> None:
        pass

    async def waits(event: InvoiceSent) -> None:
        await asyncio.sleep(0)

    bus.subscribe(TicketBooked, at_once)
    bus.subscribe(TicketPrinted, with_context)
    bus.subscribe(InvoiceSent, waits)

    async def rounds(count: int) -> None:
        for number in range(count):
            await bus.publish(TicketBooked(number=number))
            if number % 20 == 0:
                await bus.publish(TicketPrinted(number=number))
                await bus.publish(InvoiceSent(number=number))

    await rounds(1000)
    gc.collect()
    tracemalloc.start()
    try:
        await rounds(200)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        await rounds(190_000)
        tracemalloc.start()
        await rounds(200)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert len(asyncio.all_tasks()) == 1


# -- with a session ----------------------------------------------------------------------------------------------------


class AuditEventHandler:
    def __init__(self) -> None:
        self.heard: list[str] = []

    async def handle(self, event: TicketBooked, session: AsyncSession) -> None:
        self.heard.append(type(event).__name__)


async def test_a_forgotten_session_raises_before_anything_runs(bus: InMemoryEventBus) -> None:
    ran: list[str] = []

    @bus.subscribe(TicketPrinted)
    async def ship(event: TicketPrinted) -> None:
        ran.append("ship")

    @bus.subscribe(TicketBooked)
    async def first(event: TicketBooked) -> None:
        ran.append("first")

    audit = AuditEventHandler()
    bus.register(audit)
    for events in [(TicketBooked(),), (TicketPrinted(), TicketBooked())]:
        with pytest.raises(SessionRequiredError, match=r"^AuditEventHandler requires a database session") as raised:
            await bus.publish(*events)
        assert isinstance(raised.value, RuntimeError)
        assert "session=session" in str(raised.value)
    assert ran == []
    assert audit.heard == []


@pytest.fixture
async def engine(tmp_path: Path) -> AsyncIterator[AsyncEngine]:
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path}/app.db")
    async with engine.begin() as connection:
        await connection.execute(text("CREATE TABLE note (words TEXT)"))
    yield engine
    await engine.dispose()


async def _notes(engine: AsyncEngine) -> list[str]:
    async with engine.connect() as connection:
        return list((await connection.execute(text("SELECT words FROM note ORDER BY rowid"))).scalars())


async def test_handlers_of_a_session_run_after_its_commit_only(bus: InMemoryEventBus, engine: AsyncEngine) -> None:
    seen: list[tuple[str, list[str], str | None]] = []

    @bus.subscribe(TicketBooked)
    async def look(event: TicketBooked, context: EventContext) -> None:
        seen.append(("look", await _notes(engine), context.ip_address))

    async with AsyncSession(engine) as session:
        async with session.begin():
            await session.execute(text("INSERT INTO note VALUES ('placed')"))
            receipt = await bus.publish(TicketBooked(), session=session, metadata={"ip_address": "10.0.0.1"})
            await asyncio.sleep(0.01)
            assert seen == []
        await receipt.settled(timeout=1)
    assert seen == [("look", ["placed"], "10.0.0.1")]


async def test_after_a_rollback_nothing_runs(bus: InMemoryEventBus, engine: AsyncEngine) -> None:
    handler = AsyncMock()
    bus.subscribe(TicketBooked, handler, name="handler")

    async def fails() -> None:
        async with AsyncSession(engine) as session, session.begin():
            await bus.publish(TicketBooked(), session=session)
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        await fails()
    async with AsyncSession(engine) as session:
        await bus.publish(TicketBooked(), session=session)  # left without a commit
    await asyncio.sleep(0.01)
    await bus.drain(timeout=1)
    handler.assert_not_called()


async def test_a_rolled_back_savepoint_takes_its_events_with_it(bus: InMemoryEventBus, engine: AsyncEngine) -> None:
    heard: list[int] = []

    @bus.subscribe(TicketBooked)
    async def hear(event: TicketBooked) -> None:
        heard.append(event.number)

    async with AsyncSession(engine) as session:
        async with session.begin():
            await bus.publish(TicketBooked(number=1), session=session)
            async with session.begin_nested():
                await bus.publish(TicketBooked(number=2), session=session)
            savepoint = await session.begin_nested()
            await bus.publish(TicketBooked(number=3), session=session)
            await savepoint.rollback()
            await bus.publish(TicketBooked(number=4), session=session)
        await bus.drain(timeout=1)
    assert heard == [1, 2, 4]


async def test_a_handler_with_a_session_gets_one_of_its_own_that_is_committed_for_it(
    bus: InMemoryEventBus, engine: AsyncEngine, logger: RecordingLogger
) -> None:
    sessions: list[AsyncSession] = []

    @bus.subscribe(TicketBooked)
    async def writes(event: TicketBooked, session: AsyncSession) -> None:
        sessions.append(session)
        await session.execute(text("INSERT INTO note VALUES ('by the handler')"))

    @bus.subscribe(TicketBooked)
    async def writes_and_fails(event: TicketBooked, session: AsyncSession) -> None:
        sessions.append(session)
        await session.execute(text("INSERT INTO note VALUES ('rolled back')"))
        raise ValueError("no")

    async with AsyncSession(engine) as session:
        async with session.begin():
            await bus.publish(TicketBooked(), session=session)
        await bus.drain(timeout=5)
        sessions.append(session)
    assert len({id(session) for session in sessions}) == 3
    assert await _notes(engine) == ["by the handler"]
    assert logger.failures() == [("writes_and_fails", "ValueError")]


async def test_a_handler_in_the_transaction_runs_within_publish_and_fails_alone(
    bus: InMemoryEventBus, engine: AsyncEngine, logger: RecordingLogger
) -> None:
    async def writes(event: TicketBooked, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO note VALUES ('kept')"))

    async def fails(event: TicketBooked, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO note VALUES ('rolled back')"))
        raise ValueError("no")

    bus.subscribe(TicketBooked, writes, delivery=Delivery.IN_TRANSACTION)
    bus.subscribe(TicketBooked, fails, delivery=Delivery.IN_TRANSACTION)
    async with AsyncSession(engine) as session, session.begin():
        await bus.publish(TicketBooked(), session=session)
        assert logger.failures() == [("fails", "ValueError")]
    assert await _notes(engine) == ["kept"]


async def test_a_required_handler_in_the_transaction_fails_the_publisher(
    bus: InMemoryEventBus, engine: AsyncEngine
) -> None:
    async def fails(event: TicketBooked, session: AsyncSession) -> None:
        raise ValueError("no")

    bus.subscribe(TicketBooked, fails, delivery=Delivery.IN_TRANSACTION, required=True)

    async def publish() -> None:
        async with AsyncSession(engine) as session, session.begin():
            await session.execute(text("INSERT INTO note VALUES ('rolled back')"))
            await bus.publish(TicketBooked(), session=session)

    with pytest.raises(ValueError, match="no"):
        await publish()
    assert await _notes(engine) == []


async def test_a_handler_after_the_commit_is_limited_by_its_timeout(
    bus: InMemoryEventBus, engine: AsyncEngine, logger: RecordingLogger
) -> None:
    async def slow(event: TicketBooked, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO note VALUES ('rolled back')"))
        await asyncio.sleep(60)

    bus.subscribe(TicketBooked, slow, timeout=0.05)
    async with AsyncSession(engine) as session:
        async with session.begin():
            await bus.publish(TicketBooked(), session=session)
        await bus.drain(timeout=5)
    assert logger.failures() == [("slow", "HandlerTimeout")]
    assert await _notes(engine) == []


async def test_a_publisher_cancelled_after_its_commit_loses_nothing(bus: InMemoryEventBus, engine: AsyncEngine) -> None:
    heard: list[int] = []

    @bus.subscribe(TicketBooked)
    async def hear(event: TicketBooked) -> None:
        await asyncio.sleep(0.001)
        heard.append(event.number)

    async def publish() -> None:
        async with AsyncSession(engine) as session:
            async with session.begin():
                await bus.publish(TicketBooked(number=7), session=session)
            publisher.cancel()
            await asyncio.sleep(60)

    publisher = asyncio.create_task(publish())
    await asyncio.wait([publisher])
    assert publisher.cancelled()
    await bus.drain(timeout=1)
    assert heard == [7]


@pytest.mark.parametrize("closed_before_the_commit", [True, False])
def test_what_was_committed_for_a_loop_that_is_closed_is_logged_once(
    bus: InMemoryEventBus, logger: RecordingLogger, closed_before_the_commit: bool
) -> None:
    async def hear(event: TicketBooked) -> None:
        raise AssertionError("there is no loop to run on")

    bus.subscribe(TicketBooked, hear)
    loop = asyncio.new_event_loop()
    staged = [_Staged(TicketBooked(), Metadata(), copy_context(), tuple(bus.subscriptions), None, loop)]
    if closed_before_the_commit:
        loop.close()
    bus.committed(staged, certain=True)
    loop.close()
    for _ in range(2):
        asyncio.run(bus.drain(timeout=1))
    assert logger.failures() == [("hear", "BusStateError")]
