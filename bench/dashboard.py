"""How long each page of the dashboard takes on a database that has been in use for long.

Run it with `make bench-dashboard`. It fills a PostgreSQL database and an SQLite file of its own (events, the history of
their calls, an audit trail, dead letters, attempts), drops them at the end, and asks for each page in turn, as a
browser would, in this process: what is measured is the page, without a network. Nothing is delivered meanwhile.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlencode
from uuid import UUID

import httpx
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from whereupon import DomainEvent, EventBus
from whereupon.dashboard import dashboard
from whereupon.retention import SIZE

SERVER = "postgresql+asyncpg://postgres@127.0.0.1:5432/postgres"
DAYS = 7
"""For so long the events were published, evenly."""
UNREAD = 5_000
"""Events that no handler has read yet."""
CAUSES = 20
"""Different errors that deliveries of each of two handlers died of."""


class ParcelSent(DomainEvent):
    number: int


class ParcelWeighed(DomainEvent):
    number: int


class ParcelDelivered(DomainEvent):
    number: int


class ParcelReturned(DomainEvent):
    number: int


class ParcelInsured(DomainEvent):
    """One in ten thousand."""

    number: int


async def _handle(_: DomainEvent) -> None: ...


def declare(bus: EventBus) -> None:
    bus.subscribe(ParcelSent, _handle, name="print_label", within="30s")
    bus.subscribe(ParcelSent, _handle, name="send_mail")
    bus.subscribe(ParcelWeighed, _handle, name="charge", ordered_by="number", within="1m")
    bus.subscribe(ParcelDelivered, _handle, name="thank")
    bus.subscribe(ParcelReturned, _handle, name="refund", ordered_by="number")
    bus.subscribe(DomainEvent, _handle, name="mirror")


HANDLERS = ("print_label", "send_mail", "charge", "thank", "refund", "mirror")


class Filling:
    """The statements that fill a database, in its own words."""

    def __init__(self, *, sqlite: bool, now: datetime) -> None:
        self.sqlite = sqlite
        self.now_ms = int(now.timestamp() * 1000)

    def series(self, first: int, last: int, select: str) -> str:
        if self.sqlite:
            return (
                f"WITH RECURSIVE s (n) AS (SELECT {first} UNION ALL SELECT n + 1 FROM s WHERE n < {last}) "
                f"SELECT {select} FROM s"
            )
        return f"SELECT {select} FROM generate_series(CAST({first} AS bigint), {last}) AS n"

    def at(self, ms: str) -> str:
        if self.sqlite:
            return f"strftime('%Y-%m-%d %H:%M:%f000', ({ms}) / 1000.0, 'unixepoch')"
        return f"to_timestamp(({ms}) / 1000.0)"

    def uuid7(self, ms: str, n: str = "n") -> str:
        if self.sqlite:
            return f"printf('%012x7%03x8%015x', {ms}, ({n}) % 4096, {n})"
        return (
            f"CAST(lpad(to_hex(({ms})::bigint), 12, '0') || '7' || lpad(to_hex((({n}) % 4096)::bigint), 3, '0') || '8' "
            f"|| lpad(to_hex(({n})::bigint), 15, '0') AS uuid)"
        )

    def bytes_of(self, expression: str) -> str:
        return f"CAST({expression} AS BLOB)" if self.sqlite else f"convert_to({expression}, 'UTF8')"

    def kind(self) -> str:
        return (
            "CASE WHEN n % 10000 = 5000 THEN 'ParcelInsured' WHEN n % 10 < 4 THEN 'ParcelSent' WHEN n % 10 < 7 "
            "THEN 'ParcelWeighed' WHEN n % 10 < 9 THEN 'ParcelDelivered' ELSE 'ParcelReturned' END"
        )


async def fill(bus: EventBus, events: int, dead: int) -> None:
    sqlite = bus.engine.dialect.name == "sqlite"
    says = Filling(sqlite=sqlite, now=datetime.now(UTC))
    step = DAYS * 86_400_000 // events
    ms = f"({says.now_ms} - ({events} - n) * {step})"
    if sqlite:
        ms = f"CAST({ms} AS INTEGER)"
    payload = says.bytes_of('\'{"number":\' || n || \',"note":"left with the neighbours, second floor"}\'')
    headers = (
        f'\'{{"correlation_id":"00000000-0000-7000-8000-\' || {"printf" if sqlite else "lpad"}'
        + ("('%012d', n / 3)" if sqlite else "((n / 3)::text, 12, '0')")
        + ' || \'","actor":"clerk-\' || (n % 50) || \'"}\''
    )

    async def do(what: str, *statements: str) -> None:
        began = time.monotonic()
        async with bus._store.writing() as connection:
            if not sqlite:
                await connection.execute(text("SET LOCAL synchronous_commit = off"))
            for statement in statements:
                await connection.exec_driver_sql(statement)
        print(f"  {what}: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)

    if not sqlite:
        await do(
            "partitions",
            *(
                f"CREATE TABLE IF NOT EXISTS whereupon_log_{first} PARTITION OF whereupon_log "
                f"FOR VALUES FROM ({first}) TO ({first + SIZE})"
                for first in range(1, events + SIZE, SIZE)
            ),
        )
    columns = "event_id, type, version, payload, headers, recorded_at"
    row = f"{says.uuid7(ms)}, {says.kind()}, 1, {payload}, {headers}, {says.at(ms)}"
    for first in range(1, events - UNREAD + 1, 500_000):
        last = min(first + 499_999, events - UNREAD)
        await do(f"events up to {last:,}", f"INSERT INTO whereupon_log ({columns}) {says.series(first, last, row)}")
    async with bus:
        pass  # registers its subscriptions, which begin here
    await do("events unread", f"INSERT INTO whereupon_log ({columns}) {says.series(events - UNREAD + 1, events, row)}")
    each = 60_000
    entry = "'[' || (n * 80) || ',' || n || ',1500,1,\"succeeded\"]'"
    entries = "'[' || " + " || ',' || ".join([entry] * 20) + " || ']'"
    when = f"({says.now_ms} - ({each} - n) * {DAYS * 86_400_000 // each})"
    for number, name in enumerate(HANDLERS):
        history = f"'{name}', {says.uuid7(when, str(number))}, n * 80, n * 80 + 79, {entries}, {says.at(when)}"
        await do(
            f"history of {name}",
            "INSERT INTO whereupon_history (subscription, worker, first_position, last_position, entries, recorded_at) "
            + says.series(1, each, history),
        )
    event_of = f"({ms.replace('n)', f'(n * {max(1, events // dead)}))')})"
    died = (
        "CASE WHEN n % 4 = 0 THEN 'charge' ELSE 'print_label' END, 0, n % 4, "
        f"n * {max(1, events // dead)}, {says.uuid7(event_of, f'n * {max(1, events // dead)}')}, 'ParcelSent', 1, "
        f"{payload}, {headers}, NULL, 'dead', 8, 'ValueError', 'no label for parcel ' || n, "
        "'Traceback (most recent call last):' || "
        f"{'printf' if sqlite else 'repeat'}({chr(39)}{'%.1500c' if sqlite else 'x'}{chr(39)}, "
        f"{chr(39) + 'x' + chr(39) if sqlite else '1500'}), 'cause' || (n % {CAUSES}), "
        f"{says.at(event_of)}, {says.at(event_of)}"
    )
    columns = (
        "subscription, generation, lane, position, event_id, type, version, payload, headers, key, state, attempts, "
        "error_type, error_message, traceback, fingerprint, recorded_at, updated_at"
    )
    await do("dead letters", f"INSERT INTO whereupon_exception ({columns}) {says.series(1, dead, died)}")
    waiting = died.replace("'dead', 8", "CASE WHEN n % 2 = 0 THEN 'retrying' ELSE 'parked' END, 2")
    waiting = waiting.replace("CASE WHEN n % 4 = 0 THEN 'charge' ELSE 'print_label' END", "'refund'")
    await do("retried ones", f"INSERT INTO whereupon_exception ({columns}) {says.series(1, min(5_000, dead), waiting)}")
    records = events // 5
    spread = f"({says.now_ms} - ({records} - n) * {DAYS * 86_400_000 // records})"
    audit = (
        f"{says.uuid7(spread)}, {says.uuid7(spread)}, 'ParcelSent', 'PARCEL_SENT_' || (n % 20), 'success', "
        f"{says.uuid7('1', 'n % 1000')}, 'parcel', 'p' || n, '{{}}', '10.0.' || (n % 250) || '.1', {says.at(spread)}, "
        f"{says.at(spread)}"
    )
    await do(
        "audit trail",
        "INSERT INTO whereupon_audit (id, event_id, event_type, action, outcome, user_id, resource_type, resource_id, "
        f"context, ip_address, occurred_at, recorded_at) {says.series(1, records, audit)}",
    )
    attempts = events // 10
    since = f"({says.now_ms} - ({attempts} - n) * {DAYS * 86_400_000 // attempts})"
    attempt = (
        f"{says.uuid7(since)}, 'Delivery', CASE WHEN n % 5000 = 0 THEN 'open' ELSE 'succeeded' END, "
        f"{says.uuid7('1', '1')}, 'ParcelReturned', 1, '{{}}', {says.at(since)}, "
        f"CASE WHEN n % 5000 = 0 THEN NULL ELSE {says.at(since)} END"
    )
    await do(
        "attempts",
        "INSERT INTO whereupon_workflow (id, name, state, process, type, version, headers, opened_at, closed_at) "
        + says.series(1, attempts, attempt),
        "INSERT INTO whereupon_action (author, action, subscription, reason, details) "
        + says.series(1, 100_000, "'clerk', 'retry', 'print_label', 'the printer works again', '{}'"),
    )
    engine = bus.engine.execution_options(isolation_level="AUTOCOMMIT") if not sqlite else bus.engine
    began = time.monotonic()
    async with engine.connect() as connection:
        await connection.exec_driver_sql("ANALYZE" if sqlite else "VACUUM ANALYZE")
        await connection.commit()
    print(f"  statistics: {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)


async def known_in(bus: EventBus) -> dict[str, Any]:
    """What there is to be asked for."""
    async with bus.engine.connect() as connection:
        found = (
            await connection.exec_driver_sql(
                "SELECT event_id, subscription, fingerprint, position FROM whereupon_exception WHERE id = 500"
            )
        ).one()
        newest = (
            await connection.exec_driver_sql(
                "SELECT event_id, position FROM whereupon_log ORDER BY position DESC LIMIT 1"
            )
        ).one()
    return {
        "dead": UUID(str(found.event_id)),
        "subscription": found.subscription,
        "fingerprint": found.fingerprint,
        "newest": UUID(str(newest.event_id)),
        "user": UUID(int=(1 << 80) | (7 << 76) | (7 << 64) | (8 << 60) | 7),
        "middle": newest.position // 2,
    }


def pages(known: dict[str, Any]) -> dict[str, tuple[str, dict[str, Any]]]:
    group = {"subscription": known["subscription"], "fingerprint": known["fingerprint"]}
    letter = {"subscription": known["subscription"], "event": known["dead"]}
    nobody = UUID(int=1 << 124)
    return {
        "overview": ("", {}),
        "map": ("map", {}),
        "events, newest": ("events", {}),
        "events, in the middle of the log": ("events", {"before": known["middle"]}),
        "events of a rare type": ("events", {"type": "ParcelInsured"}),
        "events of an actor that there is not": ("events", {"actor": "nobody"}),
        "events of a correlation id that there is not": ("events", {"correlation": nobody}),
        "story of an old event": ("event", {"id": known["dead"]}),
        "story of the newest event": ("event", {"id": known["newest"]}),
        "handlers": ("handlers", {}),
        "dead letters by cause": ("dead", {}),
        "dead letters of one cause": ("group", group),
        "one dead letter": ("letter", letter),
        "plan of a retry": ("retry", group),
        "plan of a replay since a time": ("replay", {"name": "charge", "since": "2026-01-01"}),
        "workflows": ("workflows", {}),
        "workflows that are open": ("workflows", {"state": "open"}),
        "workflows that there are not": ("workflows", {"state": "interrupted"}),
        "catalogue": ("catalogue", {}),
        "event type": ("type", {"name": "ParcelSent"}),
        "audit trail": ("audit", {}),
        "audit trail of a user": ("audit", {"user": known["user"]}),
        "audit trail of an address that there is not": ("audit", {"ip": "192.0.2.1"}),
        "actions": ("actions", {}),
        "actions on a handler": ("actions", {"subscription": "print_label"}),
        "check-up": ("checkup", {}),
    }


async def made(url: str, events: int, dead: int) -> None:
    bus = EventBus(url, create_tables=True, deliver=False)
    declare(bus)
    await bus.create_tables()
    await fill(bus, events, dead)
    await bus.engine.dispose()


async def measure(url: str, rounds: int) -> dict[str, list[float]]:
    taken: dict[str, list[float]] = {}
    looked = EventBus(url, create_tables=False)  # as `whereupon dashboard` has it
    declare(looked)
    known = await known_in(looked)
    app = dashboard(looked, authorize=lambda _: "actor")
    transport = httpx.ASGITransport(app=app)
    try:
        async with httpx.AsyncClient(transport=transport, base_url="http://bench") as client:
            began = time.perf_counter()
            await client.get("/")
            taken["overview, the first time"] = [time.perf_counter() - began]
            for _ in range(rounds):
                for name, (path, asked) in pages(known).items():
                    began = time.perf_counter()
                    response = await client.get(f"/{path}?{urlencode(asked)}")
                    taken.setdefault(name, []).append(time.perf_counter() - began)
                    if response.status_code != 200:
                        raise SystemExit(f"{name}: {response.status_code}\n{response.text}")
            for _ in range(rounds):
                began = time.perf_counter()
                await app._gauges._measured()
                taken.setdefault("(reading all figures, in the background)", []).append(time.perf_counter() - began)
    finally:
        await app.close()
        await looked.engine.dispose()
    return taken


@asynccontextmanager
async def database(name: str, given: str | None) -> AsyncIterator[str]:
    if given is not None:
        yield given
        return
    if name == "sqlite":
        with tempfile.TemporaryDirectory(prefix="whereupon-bench-") as folder:
            yield f"sqlite+aiosqlite:///{folder}/bench.db"
        return
    server = os.environ.get("WHEREUPON_BENCH_SERVER", SERVER)
    own = f"whereupon_bench_dashboard_{os.getpid()}"
    engine = create_async_engine(server, isolation_level="AUTOCOMMIT")
    try:
        async with engine.connect() as connection:
            await connection.execute(text(f"CREATE DATABASE {own} TEMPLATE template0"))
        try:
            yield make_url(server).set(database=own).render_as_string(hide_password=False)
        finally:
            async with engine.connect() as connection:
                await connection.execute(text(f"DROP DATABASE IF EXISTS {own} WITH (FORCE)"))
    finally:
        await engine.dispose()


def table(results: dict[str, dict[str, list[float]]]) -> str:
    names = list(next(iter(results.values())))
    width = max(map(len, names))
    head = " | ".join(f"{one}, p50 | p95" for one in results)
    lines = [f"| {'page, in ms'.ljust(width)} | {head} |", f"| {'-' * width} |" + " ---: | ---: |" * len(results)]
    for name in names:
        cells = []
        for taken in results.values():
            values = sorted(taken[name])
            p95 = values[min(len(values) - 1, int(len(values) * 0.95))]
            cells.append(f"{statistics.median(values) * 1000:.0f} | {p95 * 1000:.0f}")
        lines.append(f"| {name.ljust(width)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--events", type=int, default=5_000_000)
    parser.add_argument("--dead", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=40, help="how often each page is asked for")
    parser.add_argument("--database", choices=("postgresql", "sqlite"), action="append", help="default: both")
    parser.add_argument("--only-fill", metavar="URL", help="fill this empty database, and leave it")
    parser.add_argument("--filled", metavar="URL", help="measure on a database that --only-fill has left")
    parser.add_argument("--json", help="also write the times into this file, in seconds")
    asked = parser.parse_args()

    async def run() -> dict[str, dict[str, list[float]]]:
        results = {}
        for name in asked.database or ("postgresql", "sqlite"):
            async with database(name, asked.filled or asked.only_fill) as url:
                if not asked.filled:
                    print(f"{name}: filling", file=sys.stderr, flush=True)
                    await made(url, asked.events, asked.dead)
                if not asked.only_fill:
                    results[name] = await measure(url, asked.rounds)
        return results

    results = asyncio.run(run())
    if not results:
        return
    print(
        f"{asked.events:,} events, {asked.dead:,} dead letters; Python {platform.python_version()}, "
        f"{os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}\n"
    )
    print(table(results))
    if asked.json:
        with open(asked.json, "w", encoding="utf-8") as file:
            json.dump(results, file)


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
