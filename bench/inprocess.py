"""Publishing in one process: what it costs to have handlers run, here and in other packages.

Run it with `make bench`. Every way of publishing is measured in turn, round after round, so that a busy moment of the
machine hits all of them; the ratio to `asyncio.gather` is the median of the rounds' ratios. No clock stops before
every handler has run to its end, which is counted. Events are made before the clock starts.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import gc
import importlib.metadata
import logging
import os
import platform
import statistics
import sys
import time
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from whereupon import DomainEvent, InMemoryEventBus

Body = Callable[[], Awaitable[None]]
"""What a handler does, without the parameters that differ from package to package."""


@dataclass
class Way:
    """One way of publishing, ready to run: `publish(event)` returns when the handlers have ended."""

    publish: Callable[[Any], Awaitable[Any]]
    make: Callable[[], Any]
    """Makes an event."""
    fresh: bool = False
    """Whether an event can be published only once."""
    close: Callable[[], Awaitable[Any]] | None = None


class CardIssued(DomainEvent):
    number: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlainCardIssued:
    number: int
    event_id: UUID = field(default_factory=uuid4)
    occurred_at: datetime = field(default_factory=lambda: datetime.now(UTC))


def taking_event(body: Body) -> Callable[[Any], Awaitable[None]]:
    """A handler that takes the event alone; a function of its own, since some packages keep one of each."""

    async def handler(event: Any) -> None:
        await body()

    handler.__name__ = handler.__qualname__ = f"handler_{id(body)}"
    return handler


def bare_loop(bodies: Sequence[Body]) -> Way:
    handlers = [taking_event(body) for body in bodies]

    async def publish(event: Any) -> None:
        for handler in handlers:
            await handler(event)

    return Way(publish, lambda: PlainCardIssued(number=1))


def gather(bodies: Sequence[Body]) -> Way:
    handlers = [taking_event(body) for body in bodies]

    async def publish(event: Any) -> None:
        await asyncio.gather(*[handler(event) for handler in handlers], return_exceptions=True)

    return Way(publish, lambda: PlainCardIssued(number=1))


def task_group(bodies: Sequence[Body]) -> Way:
    handlers = [taking_event(body) for body in bodies]

    async def publish(event: Any) -> None:
        async with asyncio.TaskGroup() as group:
            for handler in handlers:
                group.create_task(handler(event))  # type: ignore[arg-type]

    return Way(publish, lambda: PlainCardIssued(number=1))


def whereupon(bodies: Sequence[Body]) -> Way:
    bus = InMemoryEventBus()
    for body in bodies:
        bus.subscribe(CardIssued, taking_event(body))  # type: ignore[arg-type]
    return Way(bus.publish, lambda: CardIssued(number=1))


def blinker(bodies: Sequence[Body]) -> Way:
    from blinker import Signal

    signal = Signal()
    handlers = [taking_event(body) for body in bodies]
    for handler in handlers:
        signal.connect(handler, weak=False)
    return Way(signal.send_async, lambda: PlainCardIssued(number=1))


def aiosignal(bodies: Sequence[Body]) -> Way:
    from aiosignal import Signal

    signal: Any = Signal(None)
    signal.extend([taking_event(body) for body in bodies])
    signal.freeze()
    return Way(signal.send, lambda: PlainCardIssued(number=1))


def pyee(bodies: Sequence[Body]) -> Way:
    from pyee.asyncio import AsyncIOEventEmitter

    emitter = AsyncIOEventEmitter()
    for body in bodies:
        emitter.add_listener("card_issued", taking_event(body))
    emitter.add_listener("error", lambda error: None)  # without one an error ends in the loop's exception handler

    async def publish(event: Any) -> None:
        emitter.emit("card_issued", event)
        await emitter.wait_for_complete()

    return Way(publish, lambda: PlainCardIssued(number=1))


def django(bodies: Sequence[Body]) -> Way:
    from django.conf import settings
    from django.dispatch import Signal

    if not settings.configured:
        settings.configure(LOGGING_CONFIG=None)
    signal = Signal()

    def receiver(body: Body) -> Callable[..., Awaitable[None]]:
        async def receive(sender: Any, **named: Any) -> None:
            await body()

        return receive

    for body in bodies:
        signal.connect(receiver(body), weak=False)

    async def publish(event: Any) -> None:
        await signal.asend_robust(sender=PlainCardIssued, event=event)

    return Way(publish, lambda: PlainCardIssued(number=1))


def python_cqrs(bodies: Sequence[Body]) -> Way:
    import cqrs

    class Issued(cqrs.DomainEvent):  # type: ignore[misc,valid-type]
        number: int

    def handler(body: Body) -> Any:
        class Handler(cqrs.EventHandler[Issued]):
            async def handle(self, event: Issued) -> None:
                await body()

        return Handler

    class Container:
        """As small as one can be, so that the package is measured and not a container."""

        external_container = None

        def attach_external_container(self, container: Any) -> None:
            raise NotImplementedError

        async def resolve(self, type_: Any) -> Any:
            return type_()

    events = cqrs.EventMap()
    for body in bodies:
        events.bind(Issued, handler(body))
    emitter = cqrs.EventEmitter(event_map=events, container=Container())
    return Way(emitter.emit, lambda: Issued(number=1))


def pyventus(bodies: Sequence[Body]) -> Way:
    from pyventus.core.processing.asyncio import AsyncIOProcessingService
    from pyventus.events import EventEmitter, EventLinker

    class Linker(EventLinker):
        """The linker's table belongs to the class, so each way needs one of its own."""

    for body in bodies:
        Linker.subscribe(PlainCardIssued, event_callback=taking_event(body))
    emitter = EventEmitter(event_processor=AsyncIOProcessingService(), event_linker=Linker)

    async def publish(event: Any) -> None:
        emitter.emit(event)
        await asyncio.wait(AsyncIOProcessingService.all_tasks())

    return Way(publish, lambda: PlainCardIssued(number=1))


def lato(bodies: Sequence[Body]) -> Way:
    from lato import Application, Event

    class Issued(Event):
        number: int

    application = Application()
    for body in bodies:
        application.handler(Issued)(taking_event(body))
    return Way(application.publish_async, lambda: Issued(number=1))


def bubus(bodies: Sequence[Body]) -> Way:
    os.environ.setdefault("BUBUS_LOGGING_LEVEL", "CRITICAL")
    from bubus import BaseEvent, EventBus

    class IssuedEvent(BaseEvent[None]):
        number: int

    bus = EventBus()
    for body in bodies:
        bus.on(IssuedEvent, taking_event(body))

    async def publish(event: Any) -> None:
        await bus.dispatch(event)

    return Way(publish, lambda: IssuedEvent(number=1), fresh=True, close=lambda: bus.stop(timeout=1))


def abxbus(bodies: Sequence[Body]) -> Way:
    os.environ.setdefault("ABXBUS_LOGGING_LEVEL", "CRITICAL")
    from abxbus import BaseEvent, EventBus

    class IssuedEvent(BaseEvent[None]):
        number: int

    bus = EventBus(max_history_drop=True)  # else it refuses the 101st event
    for body in bodies:
        bus.on(IssuedEvent, taking_event(body))

    async def publish(event: Any) -> None:
        await bus.emit(event).now()

    async def close() -> None:
        stopped: Any = bus.destroy() if hasattr(bus, "destroy") else bus.stop()
        if stopped is not None:
            await stopped

    return Way(publish, lambda: IssuedEvent(number=1), fresh=True, close=close)


WAYS: dict[str, tuple[str | None, Callable[[Sequence[Body]], Way]]] = {
    "whereupon InMemoryEventBus": (None, whereupon),
    "bare await loop": (None, bare_loop),
    "asyncio.gather": (None, gather),
    "asyncio.TaskGroup": (None, task_group),
    "blinker send_async": ("blinker", blinker),
    "aiosignal": ("aiosignal", aiosignal),
    "pyee AsyncIOEventEmitter": ("pyee", pyee),
    "django asend_robust": ("django", django),
    "python-cqrs EventEmitter": ("python-cqrs", python_cqrs),
    "pyventus EventEmitter": ("pyventus", pyventus),
    "lato publish_async": ("lato", lato),
    "bubus": ("bubus", bubus),
    "abxbus": ("abxbus", abxbus),
}
COUNTS = (1, 4, 10)
KINDS = {"never suspend": False, "suspend once": True}


class Count:
    def __init__(self) -> None:
        self.ran = 0

    def body(self, suspends: bool) -> Body:
        async def at_once() -> None:
            self.ran += 1

        async def after_a_turn() -> None:
            await asyncio.sleep(0)
            self.ran += 1

        return after_a_turn if suspends else at_once


class Measured:
    """One way with one number of handlers, measured again and again."""

    def __init__(self, way: Way, handlers: int, count: Count) -> None:
        self.way = way
        self.handlers = handlers
        self.count = count
        self.repetitions = 1
        self.seconds: list[float] = []

    async def once(self) -> float:
        """Seconds per publish."""
        way = self.way
        events = [way.make() for _ in range(self.repetitions)] if way.fresh else [way.make()] * self.repetitions
        publish = way.publish
        self.count.ran = 0
        began = time.perf_counter()
        for event in events:
            await publish(event)
        seconds = (time.perf_counter() - began) / self.repetitions
        if self.count.ran != self.repetitions * self.handlers:
            raise AssertionError(
                f"{self.count.ran} handlers had run when the clock stopped, of {self.repetitions * self.handlers}"
            )
        return seconds

    async def calibrate(self, slice_seconds: float) -> None:
        await self.once()
        seconds = await self.once()
        self.repetitions = max(3, min(20_000, int(slice_seconds / seconds)))


colour: ContextVar[str] = ContextVar("colour", default="")


async def isolation(make: Callable[[Sequence[Body]], Way], error: type[BaseException]) -> str:
    """What becomes of the other three handlers, and of the publisher, when one of four raises."""
    ran: list[int] = []

    def body(number: int) -> Body:
        async def handler() -> None:
            if number == 1:
                raise error("one of four")
            await asyncio.sleep(0)
            ran.append(number)

        return handler

    way = make([body(number) for number in range(4)])
    task = asyncio.ensure_future(_publish_one(way))
    finished, _ = await asyncio.wait([task], timeout=3)
    publisher = ""
    if not finished:
        publisher = ", publisher still waits after 3 s"
        task.cancel()
        await asyncio.wait([task], timeout=1)
    elif task.cancelled():
        publisher = ", publisher cancelled"
    elif task.exception() is not None:
        publisher = f", publisher gets {type(task.exception()).__name__}"
    await asyncio.sleep(0.01)
    await _close(way)
    return f"{len(ran)} of 3 run{publisher}"


async def own_context(make: Callable[[Sequence[Body]], Way]) -> str:
    """Whether a handler sees what another one set in its context."""
    seen: list[str] = []

    def body(number: int) -> Body:
        async def handler() -> None:
            seen.append(colour.get())
            colour.set(f"handler {number}")

        return handler

    way = make([body(number) for number in range(4)])
    await asyncio.create_task(_publish_one(way))
    await _close(way)
    return "no" if any(seen) else "yes"


async def _publish_one(way: Way) -> None:
    await way.publish(way.make())


async def _close(way: Way) -> None:
    if way.close is not None:
        with contextlib.suppress(Exception, CancelledError):
            await way.close()


def version(package: str | None) -> str:
    return "" if package is None else f" {importlib.metadata.version(package)}"


def machine() -> str:
    model = next(
        (
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        )
        if Path("/proc/cpuinfo").exists()
        else iter([]),
        platform.processor() or platform.machine(),
    )
    python = f"{platform.python_implementation()} {platform.python_version()}"
    load = f", load {os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else ""
    return f"{python}, {platform.system()}, {model}, {os.cpu_count()} cores{load}"


_FIGURE = str.maketrans("", "", ".,")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(width) if index and cell.translate(_FIGURE).isdigit() else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def construction(rounds: int, repetitions: int) -> list[tuple[str, float]]:
    """Median microseconds to make one event."""
    made: dict[str, Callable[[], Any]] = {
        "whereupon DomainEvent": lambda: CardIssued(number=1),
        "frozen slots dataclass, uuid4, datetime.now(UTC)": lambda: PlainCardIssued(number=1),
    }
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for _ in range(rounds):
        for name, make in made.items():
            began = time.perf_counter()
            for _ in range(repetitions):
                make()
            seconds[name].append((time.perf_counter() - began) / repetitions)
    return [(name, statistics.median(values) * 1e6) for name, values in seconds.items()]


async def measure(
    counts: Sequence[int], rounds: int, slice_seconds: float, missing: dict[str, str]
) -> dict[tuple[bool, int], dict[str, Measured]]:
    found: dict[tuple[bool, int], dict[str, Measured]] = {}
    for suspends in KINDS.values():
        for handlers in counts:
            ways: dict[str, Measured] = {}
            for name, (_, make) in WAYS.items():
                if name in missing:
                    continue
                count = Count()
                measured = Measured(make([count.body(suspends) for _ in range(handlers)]), handlers, count)
                await measured.calibrate(slice_seconds)
                ways[name] = measured
            gc.collect()
            for number in range(rounds):
                # one round forwards, the next backwards: nobody always follows the same neighbour
                for measured in ways.values() if number % 2 else reversed(ways.values()):
                    measured.seconds.append(await measured.once())
            for measured in ways.values():
                await _close(measured.way)
            found[suspends, handlers] = ways
    return found


async def report(rounds: int, slice_seconds: float, counts: Sequence[int]) -> None:
    logging.disable(logging.CRITICAL)
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)
    missing: dict[str, str] = {}
    for name, (_, make) in WAYS.items():
        try:
            way = make([Count().body(suspends=False)])
        except ImportError as error:
            missing[name] = f"missing: {error}"
        else:
            await _close(way)
    print(machine())
    found = await measure(counts, rounds, slice_seconds, missing)
    for title, suspends in KINDS.items():
        rows = []
        for name, (package, _) in WAYS.items():
            if name in missing:
                rows.append([name, missing[name], *[""] * (2 * len(counts) - 1)])
                continue
            cells = []
            for handlers in counts:
                ways = found[suspends, handlers]
                mine, base = ways[name].seconds, ways["asyncio.gather"].seconds
                ratio = statistics.median(a / b for a, b in zip(mine, base, strict=True))
                cells += [f"{statistics.median(mine) * 1e6:,.1f}", f"{ratio:,.2f}"]
            rows.append([name + version(package), *cells])
        head = [f"handlers that {title}", *[part for n in counts for part in (f"{n}: µs", "× gather")]]
        print(f"\n{table(head, rows)}")
    rows = []
    for name, (_, make) in WAYS.items():
        if name in missing:
            rows.append([name, missing[name], "", ""])
            continue
        rows.append(
            [
                name,
                await isolation(make, ValueError),
                await isolation(make, CancelledError),
                await own_context(make),
            ]
        )
    print(f"\n{table(['tried live', 'one of four raises ValueError', 'raises CancelledError', 'own context'], rows)}")
    made = construction(rounds, max(200, int(slice_seconds * 1e6 / 5)))
    base = made[-1][1]
    rows = [[name, f"{micro:.2f}", f"{micro / base:.2f}"] for name, micro in made]
    print(f"\n{table(['making an event', 'µs', '× dataclass'], rows)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="a few short rounds: about ten seconds, rough figures")
    parser.add_argument("--rounds", type=int, help="rounds over all ways (default 25, quick 5)")
    arguments = parser.parse_args()
    rounds = arguments.rounds or (5 if arguments.quick else 25)
    if rounds < 1:
        parser.error("--rounds is 1 or more")
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    asyncio.run(report(rounds, 0.002 if arguments.quick else 0.02, COUNTS))


if __name__ == "__main__":
    main()
