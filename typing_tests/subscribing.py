"""How type checkers see buses and handlers. Checked, never run: each `type: ignore` is an error that must be found.

mypy reports an ignore that hides nothing, and so does pyright by the line below: a check that is lost fails.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

import functools
import logging
from datetime import timedelta
from typing import assert_type

import structlog
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import (
    Attempt,
    AuditEventHandler,
    Delivery,
    Discard,
    DomainEvent,
    EventBus,
    EventBusProtocol,
    EventContext,
    InMemoryEventBus,
    LoggingEventHandler,
    Metadata,
    Receipt,
    Retry,
    RetryLater,
    Workflow,
    request_metadata,
)


class DoorOpened(DomainEvent):
    door: int


class DoorClosed(DomainEvent):
    door: int


async def on_opened(event: DoorOpened) -> None: ...
async def with_context(event: DoorOpened, context: EventContext) -> None: ...
async def with_session(event: DoorOpened, session: AsyncSession) -> None: ...
async def with_both(event: DoorOpened, *, session: AsyncSession, context: EventContext) -> None: ...
async def on_closed(event: DoorClosed) -> None: ...
async def on_either(event: DoorOpened | DoorClosed) -> None: ...
async def on_any(event: DomainEvent) -> None: ...
async def with_sender(event: DoorOpened, sender: str) -> None: ...


def in_a_hurry(event: DoorOpened) -> None: ...


class Porter:
    async def handle_opened(self, event: DoorOpened) -> None: ...


def a_bus_is_one(bus: EventBusProtocol) -> EventBusProtocol:
    return bus


def buses() -> None:
    a_bus_is_one(InMemoryEventBus())
    a_bus_is_one(InMemoryEventBus(logger=logging.getLogger("shop")))
    a_bus_is_one(InMemoryEventBus(logger=structlog.get_logger()))
    a_bus_is_one(EventBus("sqlite+aiosqlite:///app.db"))
    a_bus_is_one(EventBus("sqlite+aiosqlite:///app.db", logger=structlog.get_logger(), deliver=False))
    a_bus_is_one(object())  # type: ignore[arg-type]
    EventBus(5)  # type: ignore[arg-type]


def subscribing(bus: EventBusProtocol, memory: InMemoryEventBus, durable: EventBus) -> None:
    for each in (bus, memory, durable):
        each.subscribe(DoorOpened, on_opened)
    bus.subscribe(DoorOpened, with_context)
    bus.subscribe(DoorOpened, with_session, delivery=Delivery.TRANSACTIONAL)
    bus.subscribe(DoorOpened, with_both, name="both", retry=Retry(max_attempts=3), timeout=None, concurrency=2)
    bus.subscribe(DoorOpened, on_either)
    bus.subscribe(DoorClosed, on_either)
    bus.subscribe(DoorOpened, on_any, required=True, delivery=Delivery.IN_TRANSACTION)
    bus.subscribe(DomainEvent, on_any)
    bus.subscribe(DoorOpened, Porter().handle_opened)
    bus.subscribe(DoorOpened, functools.partial(with_sender, sender="x"))
    bus.register(Porter())
    bus.register(LoggingEventHandler(structlog.get_logger()))
    bus.register(AuditEventHandler(), required=True)

    bus.subscribe(DoorClosed, on_opened)  # type: ignore[arg-type]
    memory.subscribe(DoorClosed, on_opened)  # type: ignore[arg-type]
    durable.subscribe(DoorClosed, on_opened)  # type: ignore[arg-type]
    bus.subscribe(DomainEvent, on_opened)  # type: ignore[arg-type]
    bus.subscribe(DoorOpened, in_a_hurry)  # type: ignore[arg-type]
    memory.subscribe(DoorOpened, in_a_hurry)  # type: ignore[arg-type]
    bus.subscribe(int, on_any)  # type: ignore[type-var, arg-type]
    bus.subscribe(DoorOpened(door=1), on_opened)  # type: ignore[call-overload]
    bus.subscribe(DoorOpened, None)  # type: ignore[call-overload]
    memory.subscribe(DoorOpened, None)  # type: ignore[call-overload]
    bus.subscribe(DoorOpened, on_opened, retries=5)  # type: ignore[call-overload]
    bus.subscribe(DoorOpened, on_opened, retry=5)  # type: ignore[call-overload]
    bus.subscribe(DoorOpened, on_opened, delivery="durable")  # type: ignore[call-overload]


async def decorating(bus: EventBusProtocol, memory: InMemoryEventBus, context: EventContext) -> None:
    @bus.subscribe(DoorOpened, timeout=5)
    async def first(event: DoorOpened, context: EventContext) -> None: ...

    @memory.subscribe(DoorOpened)
    async def second(event: DoorOpened) -> None: ...

    event = DoorOpened(door=1)
    assert_type(await first(event, context=context), None)
    assert_type(await second(event), None)
    await first(event)  # type: ignore[call-arg]
    await first(event, context=5)  # type: ignore[arg-type]
    await second(DoorClosed(door=1))  # type: ignore[arg-type]

    @bus.subscribe(DoorClosed)  # type: ignore[arg-type]
    async def third(event: DoorOpened) -> None: ...

    @memory.subscribe(DoorOpened)  # type: ignore[arg-type]
    def fourth(event: DoorOpened) -> None: ...


async def publishing(bus: EventBusProtocol, memory: InMemoryEventBus, session: AsyncSession) -> None:
    async with bus as running, memory as also_running:
        assert_type(also_running, InMemoryEventBus)
        await running.publish(DoorOpened(door=1), DoorClosed(door=1), session=session)
    receipt: Receipt = await bus.publish(DoorOpened(door=1), metadata={"actor": "x"})
    assert_type(receipt.events, tuple[DomainEvent, ...])
    await receipt.settled(timeout=5)
    await bus.publish(DoorOpened(door=1), metadata=Metadata(ip_address="192.0.2.7"))
    await bus.drain()
    with request_metadata({"actor": "x"}), request_metadata(Metadata(actor="x")):
        await memory.publish(DoorOpened(door=1))

    await bus.publish(DoorOpened)  # type: ignore[arg-type]
    await bus.publish("opened")  # type: ignore[arg-type]
    await memory.publish(5)  # type: ignore[arg-type]
    await bus.publish(DoorOpened(door=1), metadata=5)  # type: ignore[arg-type]
    await bus.publish(DoorOpened(door=1), sesion=session)  # type: ignore[call-arg]


def asking_for_more() -> None:
    raise RetryLater(5) from RetryLater(timedelta(seconds=5), "not yet")


def refusing() -> None:
    raise Discard()  # type: ignore[call-arg]


class DoorUnlockingAttempted(DomainEvent):
    door: int


class DoorUnlockingSucceeded(DomainEvent):
    door: int
    turns: int


class DoorUnlockingFailed(DomainEvent):
    door: int
    reason: str


DoorUnlocking = Workflow(DoorUnlockingAttempted, DoorUnlockingSucceeded, DoorUnlockingFailed)


async def unlocking(bus: EventBusProtocol, memory: InMemoryEventBus, durable: EventBus, session: AsyncSession) -> None:
    async with bus.workflow(DoorUnlocking, door=1) as attempt:
        assert_type(attempt, Attempt[DoorUnlockingAttempted, DoorUnlockingSucceeded])
        assert_type(attempt.attempted, DoorUnlockingAttempted)
        await attempt.succeeded(DoorUnlockingSucceeded(door=1, turns=2), session=session)
        await attempt.succeeded(turns=2, session=session)
        await attempt.failed("no_key", session=session)
        await attempt.succeeded(DoorOpened(door=1), session=session)  # type: ignore[call-overload]
        await attempt.failed(OSError())  # type: ignore[arg-type]
    memory.workflow(DoorUnlocking, door="1")  # type: ignore[arg-type]
    durable.workflow(DoorUnlocking)  # type: ignore[call-arg]
    durable.workflow(DoorUnlocking, door=1, colour="red")  # type: ignore[call-arg]
