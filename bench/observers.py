"""What watching a bus costs: without an observer, with metrics, with traces, with both.

Run it with `make bench-observers`. Each way runs in a process of its own, on a database of its own, one way after the
other in each round, forwards and backwards in turn; a ratio is the median of the rounds' ratios to `off`. Told is the
CPU time of the process, its exporter's thread included: what watching costs is CPU, and on a machine that others use as
well the clock on the wall measures them. (`--wall` has it instead.) With
`--base FOLDER` a checkout of an older commit (its `src`) is measured beside them, without an observer.

Spans are made by OpenTelemetry's SDK and batched for an exporter that throws them away. `1 in 100` are sampled by their
traces. The handlers: one that does nothing, one that computes for 200 µs, one that writes a row in its transaction.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
import timeit
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

SERVER = "postgresql+asyncpg://postgres@127.0.0.1:5432"
WAYS = ("off", "metrics", "tracing", "1 in 100", "both")
BURN = 200e-6
"""Seconds of CPU that the handler that computes takes."""
WORK = ("publish", "nothing", "computes", "writes")
TITLES = {
    "publish": "a transaction that publishes",
    "nothing": "a handler that does nothing",
    "computes": "a handler that computes for 200 µs",
    "writes": "a handler that writes a row in its transaction",
}


# --- one way, in a process of its own ---------------------------------------------------------------------------------


def _observe(bus: Any, way: str) -> None:
    if way in ("metrics", "both"):
        from whereupon.prometheus import Metrics

        Metrics(bus)
    if way in ("tracing", "1 in 100", "both"):
        from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor, SpanExporter, SpanExportResult
        from opentelemetry.sdk.trace.sampling import ALWAYS_ON, ParentBased, TraceIdRatioBased

        from whereupon.opentelemetry import Tracing

        class Nowhere(SpanExporter):
            def export(self, spans: Sequence[ReadableSpan]) -> SpanExportResult:
                return SpanExportResult.SUCCESS

        provider = TracerProvider(sampler=ParentBased(TraceIdRatioBased(0.01) if way == "1 in 100" else ALWAYS_ON))
        provider.add_span_processor(BatchSpanProcessor(Nowhere()))
        bus.observe(Tracing(provider))


async def child(way: str, url: str, events: int, *, wall: bool) -> None:
    clock = time.perf_counter if wall else time.process_time
    from sqlalchemy import text
    from sqlalchemy.ext.asyncio import AsyncSession

    from whereupon import DomainEvent, EventBus

    class OrderPlaced(DomainEvent):
        number: int

    class OrderPriced(DomainEvent):
        number: int

    class OrderBooked(DomainEvent):
        number: int

    counts = dict.fromkeys(WORK, 0)
    bus = EventBus(url, create_tables=True)

    @bus.subscribe(OrderPlaced, concurrency=100)
    async def nothing(event: OrderPlaced) -> None:
        counts["nothing"] += 1

    @bus.subscribe(OrderPriced, concurrency=100)
    async def computes(event: OrderPriced) -> None:
        until = time.thread_time() + BURN
        while time.thread_time() < until:
            pass
        counts["computes"] += 1

    @bus.subscribe(OrderBooked)
    async def writes(event: OrderBooked, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO entry VALUES (:number)"), {"number": event.number})
        counts["writes"] += 1

    _observe(bus, way)
    await bus.create_tables()
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE entry (number INTEGER NOT NULL)"))
    seconds: dict[str, float] = {}
    each = {"nothing": events, "computes": events // 5, "writes": events // 20, "publish": events // 20}

    await bus.start(deliver=False)
    began = 0.0
    for number in range(each["publish"] + 50):
        if number == 50:  # what comes first is slower
            began = clock()
        async with AsyncSession(bus.engine) as session, session.begin():
            await session.execute(text("INSERT INTO entry VALUES (:number)"), {"number": number})
            await bus.publish(OrderPlaced(number=number), session=session)
    seconds["publish"] = (clock() - began) / each["publish"]
    await bus.close()

    for name, cls in (("nothing", OrderPlaced), ("computes", OrderPriced), ("writes", OrderBooked)):
        await bus.start(deliver=False)
        for first in range(0, each[name], 500):
            async with AsyncSession(bus.engine) as session, session.begin():
                batch = [cls(number=number) for number in range(first, min(first + 500, each[name]))]
                await bus.publish(*batch, session=session)
        await bus.close()
        wanted = each[name] + (each["publish"] + 50 if name == "nothing" else 0)
        began = clock()
        await bus.start(deliver=True)
        await bus.drain(300)
        seconds[name] = (clock() - began) / wanted
        assert counts[name] == wanted, (name, counts[name], wanted)
        await bus.close()
    await bus.engine.dispose()
    print(json.dumps(seconds), flush=True)


def by_itself() -> None:
    """What the observers do for one delivery, and nothing else: the least of 15 tries."""
    from contextvars import Context
    from datetime import UTC, datetime
    from uuid import uuid4

    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.sampling import ALWAYS_OFF, ALWAYS_ON
    from prometheus_client import CollectorRegistry

    from whereupon import DomainEvent, EventBus, Metadata
    from whereupon.observer import Run
    from whereupon.opentelemetry import Tracing
    from whereupon.prometheus import Metrics

    class OrderPacked(DomainEvent):
        number: int

    bus = EventBus("sqlite+aiosqlite:///:memory:")

    @bus.subscribe(OrderPacked)
    async def handle(event: OrderPacked) -> None: ...

    [subscription] = bus.subscriptions
    metadata = Metadata(extra={"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"})
    now = datetime.now(UTC)

    def run() -> Run:
        made = Run(subscription, uuid4(), "OrderPacked", metadata, recorded_at=now)
        made.outcome = "succeeded"
        return made

    def least(work: Callable[[], object], each: int) -> str:
        return f"{min(timeit.repeat(work, timer=time.process_time, number=20, repeat=15)) / 20 / each * 1e6:.1f} µs"

    metrics = Metrics(bus, registry=CollectorRegistry())
    runs = [run() for _ in range(500)]
    print(f"metrics: {least(lambda: metrics.settled(runs), 500)}")
    for name, sampler in (("a span that is recorded", ALWAYS_ON), ("a span that is not sampled", ALWAYS_OFF)):
        tracing = Tracing(TracerProvider(sampler=sampler))

        def trace(tracing: Tracing = tracing) -> None:
            for one in runs:
                tracing.ended(one, Context().run(tracing.started, one))

        print(f"{name}: {least(trace, 500)}")


# --- all ways, in turn ------------------------------------------------------------------------------------------------


async def _database(statement: str) -> None:
    import asyncpg

    connection = await asyncpg.connect(f"{SERVER.replace('+asyncpg', '')}/postgres")
    try:
        await connection.execute(statement)
    finally:
        await connection.close()


def _run(
    way: str, database: str, events: int, base: str | None, folder: str, number: int, wall: bool
) -> dict[str, float]:
    name = f"whereupon_bench_observers_{os.getpid()}_{number}"
    if database == "PostgreSQL":
        asyncio.run(_database(f"CREATE DATABASE {name}"))
        url = f"{SERVER}/{name}"
    else:
        url = f"sqlite+aiosqlite:///{folder}/{name}.db"
    environment = dict(os.environ)
    if way == "base":
        environment["PYTHONPATH"] = str(base)
    try:
        done = subprocess.run(
            [sys.executable, __file__, "--child", "off" if way == "base" else way, url, str(events), str(int(wall))],
            env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            sys.exit(f"{way} on {database} failed:\n{done.stderr}")
        found: dict[str, float] = json.loads(done.stdout)
        return found
    finally:
        if database == "PostgreSQL":
            asyncio.run(_database(f"DROP DATABASE {name} WITH (FORCE)"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--events", type=int, default=20_000, help="for the handler that does nothing; others get less")
    parser.add_argument("--base", help="the src folder of an older checkout, to be measured without an observer")
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=WAYS, help="beside off")
    parser.add_argument("--wall", action="store_true", help="the clock on the wall instead of CPU time")
    parser.add_argument("--databases", nargs="+", default=["PostgreSQL", "SQLite"])
    parser.add_argument("--by-itself", action="store_true", help="what the observers do for one delivery, no more")
    options = parser.parse_args()
    if options.by_itself:
        by_itself()
        return
    ways = (("base",) if options.base else ()) + tuple(way for way in WAYS if way == "off" or way in options.ways)
    print(
        f"CPython {platform.python_version()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}", file=sys.stderr
    )
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        for database in options.databases:
            found: dict[str, list[dict[str, float]]] = {way: [] for way in ways}
            for round_ in range(options.rounds):
                for way in ways if round_ % 2 == 0 else reversed(ways):
                    number += 1
                    print(f"\r{database}, round {round_ + 1} of {options.rounds}: {way:<10}", end="", file=sys.stderr)
                    base = None if options.base is None else str(Path(options.base).resolve())
                    found[way].append(_run(way, database, options.events, base, folder, number, options.wall))
            print(file=sys.stderr)
            unit = "µs" if options.wall else "µs of CPU"
            columns = " | ".join(f"{TITLES[work]} | × off" for work in WORK)
            print(f"\n| {database}, {unit} | {columns} |")
            print(f"| --- |{' ---: | ---: |' * len(WORK)}")
            for way in ways:
                cells = []
                for work in WORK:
                    ratios = [own[work] / off[work] for own, off in zip(found[way], found["off"], strict=True)]
                    own = statistics.median(one[work] for one in found[way])
                    cells.append(f"{own * 1e6:,.1f} | {statistics.median(ratios):.2f}")
                print(f"| {way} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--child"]:
        logging.disable(logging.CRITICAL)
        asyncio.run(child(sys.argv[2], sys.argv[3], int(sys.argv[4]), wall=sys.argv[5] == "1"))
    else:
        main()
