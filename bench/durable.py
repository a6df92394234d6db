"""Durable delivery measured: draining, publishing, workers, latency, kills, growth, idling, beside other packages.

Run it with `make bench-durable`. Every way runs in processes of its own, on one PostgreSQL server (or SQLite files), in
a database that is made for the measurement and dropped after it. The ways are measured in turn, one round forwards and
the next backwards; a ratio is the median of the rounds' ratios. Events are committed before a clock starts, it stops
when the last handler has been called, and every call is counted, in memory that outlives a killed process.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import importlib.metadata
import itertools
import json
import logging
import mmap
import os
import platform
import resource
import shutil
import signal
import statistics
import sys
import tempfile
import threading
import time
import traceback
from asyncio.subprocess import PIPE, Process
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import durable_picture
import durable_ways
from durable_ways import POSTGRESQL, SQLITE, Body, Way, way_of

SERVER = "postgresql://postgres@127.0.0.1:5432"
BURNS = {"compute 200 µs": 200e-6, "compute 2 ms": 2e-3}
"""Seconds of CPU that a handler that computes takes."""
BEST = ("txoutbox", "pgqueuer", "faststream-outbox")
"""The peers that the dearer measurements are made beside."""

# --- the board: counts that outlive a process -------------------------------------------------------------------------

_HEADER = 512


class Board:
    """A file mapped by all processes of a measurement: calls of each event and handler, and times of each event."""

    def __init__(self, path: str, events: int, handlers: int) -> None:
        self.path, self.events, self.handlers = path, events, handlers
        size = _HEADER + (events * handlers + 7) // 8 * 8 + events * 24
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT)
        try:
            if os.fstat(descriptor).st_size < size:
                os.ftruncate(descriptor, size)
            self.memory = mmap.mmap(descriptor, size)
        finally:
            os.close(descriptor)
        view = memoryview(self.memory)
        self.calls = view[:_HEADER].cast("Q")
        """How many calls each process has counted."""
        self.counts = view[_HEADER : _HEADER + events * handlers]
        self.times = view[size - events * 24 :].cast("Q")
        """For each event: before its commit, after it, begin of the handler; CLOCK_MONOTONIC in ns."""

    @property
    def called(self) -> int:
        return sum(self.calls)

    def close(self) -> None:
        for view in (self.calls, self.counts, self.times):
            view.release()
        with contextlib.suppress(BufferError):
            self.memory.close()

    def bodies(self, kind: str, seat: int, target: int = 0, done: Callable[[], None] | None = None) -> list[Body]:
        """What the handlers of a process do; `done` is called with the call that makes it `target`."""
        calls, counts, times, events = self.calls, self.counts, self.times, self.events
        numbers = itertools.count(1)

        def counting(place: int) -> Callable[[int], None]:
            base = place * events

            def count(number: int) -> None:
                counts[base + number] += 1
                calls[seat] = n = next(numbers)
                if n == target and done is not None:
                    done()

            return count

        def computing(place: int) -> Callable[[int], None]:
            count = counting(place)

            def compute(number: int) -> None:
                until = time.thread_time() + BURNS[kind]
                while time.thread_time() < until:
                    pass
                count(number)

            return compute

        def stamping(place: int) -> Callable[[int], None]:
            count = counting(place)

            def stamp(number: int) -> None:
                times[3 * number + 2] = time.monotonic_ns()
                count(number)

            return stamp

        make = computing if kind in BURNS else stamping if kind == "stamp" else counting
        wait = 0.002 if kind == "wait" else 0.0
        return [Body(make(place), wait) for place in range(self.handlers)]


# --- what runs in a process of its own --------------------------------------------------------------------------------


def _tell(**told: Any) -> None:
    print(json.dumps(told), flush=True)


async def _hear() -> dict[str, Any]:
    line = await asyncio.to_thread(sys.stdin.readline)
    if not line:
        os._exit(0)
    heard: dict[str, Any] = json.loads(line)
    return heard


def _end_with_parent() -> None:
    """A worker would go on for ever if the bench was killed: its stdin ends then."""
    sys.stdin.read()
    os._exit(0)


def _memory() -> int:
    """Resident bytes, now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


async def child(job: dict[str, Any]) -> None:
    logging.disable(logging.CRITICAL)
    role = {"store": _store, "drain": _drain, "work": _work, "publish": _publish, "here": _here, "raw": _raw}
    await role[job["role"]](job)


async def _store(job: dict[str, Any]) -> None:
    way = way_of(job["way"], job["url"], job["options"])
    if job.get("prepare", True):
        await way.prepare(job["handlers"])
    await way.store(range(job.get("first", 0), job["events"]), job["handlers"])
    await way.close()
    _tell(stored=job["events"])


async def _drain(job: dict[str, Any]) -> None:
    way = way_of(job["way"], job["url"], job["options"])
    board = Board(job["board"], job["events"], job["handlers"])
    await way.connect()
    loop = asyncio.get_running_loop()
    done = asyncio.Event()
    ended = 0.0

    def end() -> None:
        nonlocal ended
        ended = time.perf_counter()
        loop.call_soon_threadsafe(done.set)

    bodies = board.bodies(job["kind"], 0, job["events"] * job["handlers"], end)
    _tell(ready=True, tuning=way.tuning)
    await _hear()
    memory = _memory()
    cpu = time.process_time()
    began = time.perf_counter()
    async with way.deliver(bodies):
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), job["limit"])
        seconds = (ended or time.perf_counter()) - began
        cpu = time.process_time() - cpu
        _tell(
            seconds=seconds,
            called=board.called,
            cpu=cpu,
            memory=memory,
            peak=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        )
    await way.close()
    _tell(closed=True)


async def _work(job: dict[str, Any]) -> None:
    way = way_of(job["way"], job["url"], job["options"])
    board = Board(job["board"], job["events"], job["handlers"])
    statements: dict[str, int] = {}
    if job.get("statements"):
        from sqlalchemy import Engine, event

        @event.listens_for(Engine, "before_cursor_execute")
        def count(conn: Any, cursor: Any, statement: str, *rest: Any) -> None:
            statements[statement] = statements.get(statement, 0) + 1

    else:
        threading.Thread(target=_end_with_parent, daemon=True).start()
    stop = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    await way.connect()
    async with way.deliver(board.bodies(job["kind"], job["seat"])):
        _tell(ready=True, tuning=way.tuning)
        while job.get("statements") and not stop.is_set():
            if (await _hear()).get("reset"):
                statements.clear()
                _tell(reset=True)
            else:
                _tell(statements=statements)
        await stop.wait()
    await way.close()


async def _publish(job: dict[str, Any]) -> None:
    """Run transactions as told: so many, on so many clients, with or without publishing, at a pace or at once."""
    way = way_of(job["way"], job["url"], job["options"])
    board = Board(job["board"], job["events"], 1)
    async with way.clients(job["clients"]) as clients:
        _tell(ready=True)
        while (told := await _hear()).get("count") or told.get("store"):
            if told.get("store"):
                await way.store(range(told["first"], told["store"]), job["handlers"], at_once=True)
                _tell(committed=time.monotonic_ns())
                continue
            seconds = await _transactions(board, clients[: told.get("clients", 1)], told)
            _tell(seconds=seconds)
    await way.close()


async def _transactions(board: Board, clients: Sequence[Any], told: dict[str, Any]) -> float:
    """Mean seconds of a transaction, as its client sees it."""
    count, first, pace = told["count"], told.get("first", 0), told.get("pace")
    times = board.times
    each = count // len(clients)

    async def run(client: Any, numbers: range) -> float:
        began = time.perf_counter()
        for place, number in enumerate(numbers):
            if pace:
                await asyncio.sleep(max(0.0, began + place / pace - time.perf_counter()))

            def mark(at: int = 3 * number) -> None:
                times[at] = time.monotonic_ns()

            await client.transaction(number, told["publish"], mark)
            times[3 * number + 1] = time.monotonic_ns()
        return (time.perf_counter() - began) / len(numbers)

    runs = [run(client, range(first + i * each, first + (i + 1) * each)) for i, client in enumerate(clients)]
    return statistics.mean(await asyncio.gather(*runs))


async def _here(job: dict[str, Any]) -> None:
    """Publish and deliver in one process."""
    way = way_of(job["way"], job["url"], job["options"])
    board = Board(job["board"], job["events"], 1)
    done = asyncio.Event()
    await way.connect()
    async with way.deliver(board.bodies("stamp", 0, job["events"], done.set)), way.clients(1) as clients:
        await asyncio.sleep(job.get("settle", 2.0))
        await _transactions(board, clients, {"count": job["events"], "pace": job["pace"], "publish": True})
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(done.wait(), 15)
        _tell(called=board.called)
    await way.close()


async def _raw(job: dict[str, Any]) -> None:
    """The two things that can't be left out: reading and decoding pages; one commit of a cursor for each batch."""
    events, url = job["events"], job["url"]
    from whereupon import JsonCodec

    decode = JsonCodec().decode
    cls = durable_ways.CardIssued
    found: dict[str, float] = {}
    if "://" in url:
        import asyncpg

        connection = await asyncpg.connect(url)
        position = read = 0
        began = time.perf_counter()
        while rows := await connection.fetch(
            "SELECT position, event_id, type, version, payload, headers FROM whereupon_log "
            "WHERE position > $1 ORDER BY position LIMIT 500",
            position,
        ):
            for row in rows:
                decode(cls, row["version"], row["payload"])
            read += len(rows)
            position = rows[-1]["position"]
        found["read"] = read / (time.perf_counter() - began)
        await connection.execute("CREATE TABLE raw_cursor (id INT PRIMARY KEY, page BIGINT)")
        await connection.execute("INSERT INTO raw_cursor VALUES (1, 0)")
        for size in (100, 1000):
            moves = max(1, min(events // size, 2000))
            began = time.perf_counter()
            for move in range(moves):
                await connection.execute("UPDATE raw_cursor SET page = $1 WHERE id = 1", move)
            found[f"move {size}"] = moves * size / (time.perf_counter() - began)
        await connection.close()
    else:
        import sqlite3

        file = sqlite3.connect(url, isolation_level=None)
        position = read = 0
        began = time.perf_counter()
        while page := file.execute(
            "SELECT position, event_id, type, version, payload, headers FROM whereupon_log "
            "WHERE position > ? ORDER BY position LIMIT 500",
            (position,),
        ).fetchall():
            for one in page:
                decode(cls, one[3], one[4])
            read += len(page)
            position = page[-1][0]
        found["read"] = read / (time.perf_counter() - began)
        file.execute("CREATE TABLE raw_cursor (id INT PRIMARY KEY, page BIGINT)")
        file.execute("INSERT INTO raw_cursor VALUES (1, 0)")
        for size in (100, 1000):
            moves = max(1, min(events // size, 2000))
            began = time.perf_counter()
            for move in range(moves):
                file.execute("UPDATE raw_cursor SET page = ? WHERE id = 1", (move,))
            found[f"move {size}"] = moves * size / (time.perf_counter() - began)
        file.close()
    _tell(**found)


class Failed(Exception):
    """A process of a measurement ended, or said nothing, instead of answering."""


class Child:
    """A process that does one of the above, and answers in lines of JSON."""

    def __init__(self, process: Process, errors: Path, what: str) -> None:
        self.process, self.errors, self.what = process, errors, what

    @classmethod
    async def start(cls, folder: Path, **job: Any) -> Child:
        descriptor, errors = tempfile.mkstemp(dir=folder, suffix=".err")
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable, __file__, "--child", json.dumps(job), stdin=PIPE, stdout=PIPE, stderr=descriptor
            )
        finally:
            os.close(descriptor)
        return cls(process, Path(errors), f"{job['way']} {job['role']}")

    async def line(self, limit: float = 60.0) -> dict[str, Any]:
        assert self.process.stdout is not None
        try:
            line = await asyncio.wait_for(self.process.stdout.readline(), limit)
        except TimeoutError:
            raise Failed(f"{self.what}: nothing said for {limit:g} s") from None
        if not line:
            said = [part for part in self.errors.read_text(errors="replace").splitlines() if part.strip()]
            raise Failed(f"{self.what}: {said[-1].strip() if said else 'ended'}")
        heard: dict[str, Any] = json.loads(line)
        return heard

    async def ask(self, limit: float = 60.0, **told: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(told).encode() + b"\n")
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            await self.process.stdin.drain()
        return await self.line(limit)

    @property
    def pid(self) -> int:
        return self.process.pid

    def resident(self) -> int:
        try:
            return int(Path(f"/proc/{self.pid}/statm").read_text().split()[1]) * resource.getpagesize()
        except (OSError, IndexError):
            return 0

    def cpu(self) -> float:
        """Seconds of CPU taken so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    async def kill(self, number: int = signal.SIGKILL) -> None:
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.send_signal(number)
            try:
                await asyncio.wait_for(self.process.wait(), 15)
            except TimeoutError:
                self.process.kill()
                await self.process.wait()

    async def end(self) -> None:
        """Let it end by itself, within a moment."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        try:
            await asyncio.wait_for(self.process.wait(), 20)
        except TimeoutError:
            await self.kill()


# --- the bench --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Entry:
    """One line of a table: a way with options of its own."""

    way: str
    label: str
    options: dict[str, Any] = field(default_factory=dict, hash=False)


@dataclass
class Bench:
    quick: bool
    rounds: int
    events: int
    peers: list[str]
    grown: int
    folder: Path
    bars: list[durable_picture.Group] = field(default_factory=list)
    databases: set[str] = field(default_factory=set)
    _made: int = 0

    # --- databases, files and processes ---

    async def server(self, statement: str) -> Any:
        import asyncpg

        connection = await asyncpg.connect(f"{SERVER}/postgres")
        try:
            return await connection.fetch(statement)
        finally:
            await connection.close()

    @asynccontextmanager
    async def database(self, kind: str = "postgresql") -> AsyncIterator[str]:
        """An empty database, gone after the block."""
        self._made += 1
        name = f"whereupon_bench_{os.getpid()}_{self._made}"
        if kind == "sqlite":
            yield str(self.folder / f"{name}.db")
            for path in self.folder.glob(f"{name}.db*"):
                path.unlink(missing_ok=True)
            return
        await self.server(f"CREATE DATABASE {name}")
        self.databases.add(name)
        try:
            yield f"{SERVER}/{name}"
        finally:
            await self.drop(name)

    async def drop_leftovers(self) -> None:
        """Databases of a bench that was killed."""
        rows = await self.server("SELECT datname FROM pg_database WHERE datname LIKE 'whereupon_bench_%'")
        for (name,) in rows:
            if not runs(name.split("_")[2]):
                await self.drop(name)

    async def drop(self, name: str) -> None:
        await self.server(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)")
        self.databases.discard(name)

    async def execute(self, url: str, *statements: str) -> Any:
        """Run statements on a database; the rows of the last one."""
        if "://" not in url:
            import sqlite3

            with contextlib.closing(sqlite3.connect(url)) as file, file:
                rows: Any = []
                for statement in statements:
                    rows = file.execute(statement).fetchall()
                return rows
        import asyncpg

        connection = await asyncpg.connect(url)
        try:
            rows = []
            for statement in statements:
                rows = await connection.fetch(statement)
            return [tuple(row.values()) for row in rows]
        finally:
            await connection.close()

    @asynccontextmanager
    async def board(self, events: int, handlers: int = 1) -> AsyncIterator[Board]:
        self._made += 1
        path = self.folder / f"board{self._made}"
        board = Board(str(path), events, handlers)
        try:
            yield board
        finally:
            board.close()
            path.unlink(missing_ok=True)

    @asynccontextmanager
    async def child(self, **job: Any) -> AsyncIterator[Child]:
        started = await Child.start(self.folder, **job)
        try:
            yield started
        finally:
            await started.kill()

    async def store(self, url: str, entry: Entry, events: int, handlers: int, **more: Any) -> None:
        job = {"role": "store", "way": entry.way, "url": url, "options": entry.options}
        async with self.child(**job, events=events, handlers=handlers, **more) as storing:
            await storing.line(300)
            await storing.end()

    def entries(self, ways: dict[str, type[Way]], only: Iterable[str] | None = None) -> list[Entry]:
        """The default whereupon, then the peers that can be had."""
        found = [Entry("whereupon", "whereupon")]
        for name, way in ways.items():
            if name == "whereupon" or name not in self.peers or (only is not None and name not in only):
                continue
            if missing(way) is None:
                found.append(Entry(name, f"{name} {version(way.package)}"))
        return found

    async def interleaved(
        self, entries: Sequence[Entry], measure: Callable[[Entry], Awaitable[Any]], rounds: int | None = None
    ) -> dict[str, list[Any]]:
        """What each entry gave, round by round; one that failed gives the reason and is left out of later rounds."""
        found: dict[str, list[Any]] = {entry.label: [] for entry in entries}
        failed: set[str] = set()
        for number in range(rounds or self.rounds):
            for entry in entries if number % 2 == 0 else list(reversed(entries)):
                if entry.label in failed:
                    continue
                began = time.monotonic()
                try:
                    found[entry.label].append(await measure(entry))
                except Exception as error:
                    failed.add(entry.label)
                    found[entry.label] = [as_failure(error)]
                else:
                    progress(f"  round {number + 1}: {entry.label} ({time.monotonic() - began:.1f} s)")
        return found


def runs(pid: str) -> bool:
    """Whether there is such a process."""
    return Path(f"/proc/{pid}").exists()


def progress(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def as_failure(error: Exception) -> Failed:
    """What is shown of an error instead of figures; what can't be measured costs its own line and no other."""
    if isinstance(error, Failed):
        progress(f"  {error}")
        return error
    traceback.print_exception(error)
    return Failed(f"{type(error).__name__}: {error}")


def missing(way: type[Way]) -> str | None:
    """Why a way can't be measured here."""
    if way.package is None:
        return None
    try:
        importlib.metadata.version(way.package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
    return None


def version(package: str | None) -> str:
    return importlib.metadata.version(package) if package else ""


def shown(value: float) -> str:
    if value != value:  # NaN: nothing was measured
        return "–"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:,.1f}" if abs(value) >= 10 else f"{value:,.2f}"


def ratio(mine: Sequence[float], others: Sequence[float]) -> float:
    """The median of the rounds' ratios."""
    return statistics.median(a / b for a, b in zip(mine, others, strict=False))


def best_of(found: dict[str, list[Any]], key: Callable[[Any], float]) -> str | None:
    """The peer with the greatest median."""
    peers = {
        label: statistics.median(map(key, values))
        for label, values in found.items()
        if not label.startswith("whereupon") and values and not isinstance(values[0], Failed)
    }
    return max(peers, key=lambda label: peers[label]) if peers else None


def quantile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))] if ordered else float("nan")


_FIGURE = str.maketrans("", "", ".,–-")


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in [head, *rows]) for column in range(len(head))]
    lines = []
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [
            cell.rjust(width) if index and (cell.translate(_FIGURE).isdigit() or cell == "–") else cell.ljust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def say(text: str = "") -> None:
    print(text, flush=True)


# --- 1. drain ---------------------------------------------------------------------------------------------------------


@dataclass
class Drained:
    events: int
    deliveries: int
    seconds: float
    called: int
    cpu: float
    tuning: str
    memory: tuple[int, int] = (0, 0)
    samples: list[tuple[int, int]] = field(default_factory=list)
    """Calls made, and resident bytes then."""

    @property
    def per_second(self) -> float:
        return self.called / self.seconds


async def drained(
    bench: Bench, url: str, entry: Entry, events: int, handlers: int, *, kind: str = "count", limit: float = 240
) -> Drained:
    """Deliver what is stored, in one process, and check that each delivery was made once."""
    async with bench.board(events, handlers) as board:
        job = {"role": "drain", "way": entry.way, "url": url, "options": entry.options, "kind": kind, "limit": limit}
        async with bench.child(**job, events=events, handlers=handlers, board=board.path) as draining:
            ready = await draining.line()
            asking = asyncio.create_task(draining.ask(limit + 30, go=True))
            samples = []
            while not asking.done():
                samples.append((board.called, draining.resident()))
                await asyncio.wait([asking], timeout=0.1)
            result = await asking
            with contextlib.suppress(Failed):
                await draining.line(30)  # closed; what it counts after the last is a delivery made twice
            counts = bytes(board.counts)
        called = result["called"]
        lost, twice = counts.count(0), sum(counts) - (len(counts) - counts.count(0))
        if lost and called >= events * handlers:
            raise Failed(f"{entry.label}: {lost} deliveries never made, {twice} made again")
        if lost:
            progress(f"  {entry.label}: {called:,} of {events * handlers:,} in {limit:g} s")
            if not called:
                raise Failed(f"{entry.label}: nothing delivered in {limit:g} s")
        if twice:
            progress(f"  {entry.label}: {twice} deliveries made again")
        return Drained(
            events,
            events * handlers,
            result["seconds"],
            min(called, events * handlers),
            result["cpu"],
            ready["tuning"],
            (result["memory"], result["peak"]),
            samples,
        )


async def drain(bench: Bench) -> None:
    say("## Draining what is stored\n")
    say(
        "One process, handlers that do nothing. The clock runs from the start of the worker (its process is up, its "
        "modules are imported) to the\nlast call. For four handlers a package with a row for each delivery gets four "
        "rows for each event, as many rows as whereupon has events.\n"
    )
    for kind, ways in (("postgresql", POSTGRESQL), ("sqlite", SQLITE)):
        for handlers in (1, 4):
            await _drain_table(bench, kind, ways, handlers)
        await _limits(bench, kind)


async def _drain_table(bench: Bench, kind: str, ways: dict[str, type[Way]], handlers: int) -> None:
    title = {"postgresql": "PostgreSQL", "sqlite": "SQLite"}[kind]
    plural = "1 handler" if handlers == 1 else f"{handlers} handlers"
    progress(f"drain: {title}, {plural}")
    entries = bench.entries(ways)
    entries.insert(1, Entry("whereupon", "whereupon, tuned", {"in_flight": 1000, "concurrency": 1000}))

    async def measure(entry: Entry) -> Drained:
        events = bench.events
        if entry.way != "whereupon":
            # a package with a row for each delivery gets as many rows as there are events
            events = min(events, ways[entry.way].most or events) // handlers
        async with bench.database(kind) as url:
            await bench.store(url, entry, events, handlers)
            if kind == "postgresql":
                await bench.execute(url, "VACUUM ANALYZE")
            return await drained(bench, url, entry, events, handlers, limit=60 if bench.quick else 240)

    found = await bench.interleaved(entries, measure)
    best = best_of(found, lambda one: one.per_second)
    rows, bars = [], []
    for label, results in found.items():
        if isinstance(results[0], Failed):
            rows.append([label, f"failed: {results[0]}", *[""] * 5])
            continue
        rates = [one.per_second for one in results]
        median = statistics.median(rates)
        against = [one.per_second for one in found[best]] if best else []
        rows.append(
            [
                label,
                results[0].tuning,
                f"{results[0].events:,}",
                shown(median / handlers),
                shown(median),
                f"{ratio(rates, against):.2f}" if against else "",
                shown(1e6 * statistics.median(one.cpu / one.called for one in results)),
            ]
        )
        bars.append((label, median))
    head = [f"{title}, {plural}", "set", "events", "events/s", "deliveries/s", "× best peer", "µs CPU a delivery"]
    say(table(head, rows) + "\n")
    bench.bars.append(durable_picture.Group(f"Drain, {title}, {plural}: deliveries/s", bars, better="more"))


async def _limits(bench: Bench, kind: str) -> None:
    """What nothing in Python that reads and settles can be faster than."""
    progress(f"drain: raw limits, {kind}")
    async with bench.database(kind) as url:
        await bench.store(url, Entry("whereupon", "whereupon"), bench.events, 1)
        try:
            async with bench.child(role="raw", way="raw", url=url, events=bench.events) as raw:
                found = await raw.line(120)
        except Exception as error:
            say(f"failed: {as_failure(error)}\n")
            return
    rows = [
        ["SELECT pages of 500, decode each event", shown(found["read"])],
        ["commit one UPDATE of a cursor for every 100 events", shown(found["move 100"])],
        ["commit one UPDATE of a cursor for every 1,000 events", shown(found["move 1000"])],
    ]
    say(table([f"raw limits, {'PostgreSQL' if kind == 'postgresql' else 'SQLite'}", "events/s"], rows) + "\n")


async def transactional(bench: Bench) -> None:
    events = max(1000, bench.events // 10)
    for kind in ("postgresql", "sqlite"):
        progress(f"transactional: {kind}")
        entries = [
            Entry("whereupon", f"{how}, batch={batch}", {"transactional": batch, "adding": how == "session.add"})
            for how in ("session.execute", "session.add")
            for batch in (1, 100)
        ]

        async def measure(entry: Entry, kind: str = kind) -> Drained:
            async with bench.database(kind) as url:
                await bench.store(url, entry, events, 1)
                result = await drained(bench, url, entry, events, 1, limit=120)
                written = await bench.execute(url, "SELECT count(*), count(DISTINCT number) FROM app_effect")
                if tuple(written[0]) != (result.called, result.called):
                    raise Failed(f"{entry.label}: {written[0]} rows for {result.called} deliveries")
                return result

        found = await bench.interleaved(entries, measure)
        alone = found[entries[0].label]
        rows = []
        for label, results in found.items():
            if isinstance(results[0], Failed) or isinstance(alone[0], Failed):
                rows.append([label, f"failed: {results[0]}", ""])
                continue
            rates = [one.per_second for one in results]
            rows.append(
                [label, shown(statistics.median(rates)), f"{ratio(rates, [one.per_second for one in alone]):.2f}"]
            )
        title = "PostgreSQL" if kind == "postgresql" else "SQLite"
        say(table([f"{title}, TRANSACTIONAL, one row each", "deliveries/s", "× batch=1"], rows) + "\n")


# --- 2. publish -------------------------------------------------------------------------------------------------------


async def publish(bench: Bench) -> None:
    say("## Publishing in a transaction\n")
    say(
        "A transaction of one INSERT, without and with one event that one durable handler hears, in turn; a "
        "transaction's time is what its client\nwaits, shown are medians, and the median of the differences.\n"
    )
    block = 40 if bench.quick else 160
    pairs = max(6, bench.rounds * 4)
    entries = [entry for entry in bench.entries(POSTGRESQL) if POSTGRESQL[entry.way].in_transaction]
    for clients in (1, 8):
        progress(f"publish: {clients} clients")
        count = block * (1 if clients == 1 else 2) // clients * clients
        async with contextlib.AsyncExitStack() as stack:
            children: dict[str, Child] = {}
            failures: dict[str, Failed] = {}
            board = await stack.enter_async_context(bench.board((2 * pairs + 2) * count))
            for entry in entries:
                url = await stack.enter_async_context(bench.database())
                try:
                    await bench.store(url, entry, 0, 1)
                    child = await stack.enter_async_context(
                        bench.child(
                            role="publish",
                            way=entry.way,
                            url=url,
                            options=entry.options,
                            events=board.events,
                            clients=clients,
                            handlers=1,
                            board=board.path,
                        )
                    )
                    await child.line()
                    for published in (False, True):
                        await child.ask(count=count, publish=published, clients=clients, first=0)
                    children[entry.label] = child
                except Exception as error:
                    failures[entry.label] = as_failure(error)
            seconds: dict[str, dict[bool, list[float]]] = {label: {False: [], True: []} for label in children}
            for pair in range(pairs):
                for label in children if pair % 2 else reversed(list(children)):
                    for place, published in enumerate((False, True) if pair % 2 else (True, False)):
                        told = await children[label].ask(
                            count=count, publish=published, clients=clients, first=(2 * pair + place + 2) * count
                        )
                        seconds[label][published].append(told["seconds"])
            for child in children.values():
                await child.end()
        rows, bars = [], []
        for entry in entries:
            if entry.label in failures:
                rows.append([entry.label, f"failed: {failures[entry.label]}", "", "", ""])
                continue
            without, with_ = seconds[entry.label][False], seconds[entry.label][True]
            added = statistics.median(b - a for a, b in zip(without, with_, strict=True)) * 1e6
            rows.append(
                [
                    entry.label,
                    shown(statistics.median(without) * 1e6),
                    shown(statistics.median(with_) * 1e6),
                    shown(added),
                    f"{statistics.median(b / a for a, b in zip(without, with_, strict=True)):.2f}",
                ]
            )
            bars.append((entry.label, added))
        plural = "1 client" if clients == 1 else f"{clients} clients"
        head = [f"PostgreSQL, {plural}", "µs without", "µs with one event", "µs added", "× without"]
        say(table(head, rows) + "\n")
        bench.bars.append(durable_picture.Group(f"Publish, {plural}: µs added to a transaction", bars, better="less"))


# --- 3. workers -------------------------------------------------------------------------------------------------------


async def workers(bench: Bench) -> None:
    say("## Two worker processes against one, when the handler computes\n")
    for kind, seconds in BURNS.items():
        progress(f"workers: {kind}")
        await _workers(bench, kind, int((0.8 if bench.quick else 4) / seconds))


async def _workers(bench: Bench, kind: str, events: int) -> None:
    entries = bench.entries(POSTGRESQL, BEST)
    lines = [Entry(entry.way, f"{entry.label}, {n}", {"workers": n}) for entry in entries for n in (1, 2)]

    async def measure(entry: Entry) -> tuple[float, list[int]]:
        number = entry.options["workers"]
        async with bench.database() as url, bench.board(events) as board, contextlib.AsyncExitStack() as stack:
            await bench.store(url, entry, 0, 1)
            job = {"way": entry.way, "url": url, "options": entry.options, "events": events, "handlers": 1}
            for seat in range(number):
                worker = await stack.enter_async_context(
                    bench.child(role="work", kind=kind, seat=seat, board=board.path, **job)
                )
                await worker.line()
            publisher = await stack.enter_async_context(bench.child(role="publish", clients=1, board=board.path, **job))
            await publisher.line()
            await asyncio.sleep(4)  # they share out what is theirs
            committed = (await publisher.ask(store=events, first=0))["committed"]
            seconds = await _until_called(board, events, committed, entry.label)
            return events / seconds, list(board.calls[:number])

    found = await bench.interleaved(lines, measure)
    rows = []
    for entry in entries:
        one, two = found[f"{entry.label}, 1"], found[f"{entry.label}, 2"]
        if failed := [result[0] for result in (one, two) if isinstance(result[0], Failed)]:
            rows.append([entry.label, f"failed: {failed[0]}", "", "", ""])
            continue
        alone, both = [rate for rate, _ in one], [rate for rate, _ in two]
        rows.append(
            [
                entry.label,
                shown(statistics.median(alone)),
                shown(statistics.median(both)),
                f"{ratio(both, alone):.2f}",
                " / ".join(f"{share:,}" for share in two[-1][1]),
            ]
        )
    head = [f"events/s, {kind}", "one process", "two processes", "two / one", "calls of each"]
    say(table(head, rows) + "\n")


async def _until_called(board: Board, total: int, since: int, label: str, limit: float = 120) -> float:
    """Seconds since then, once so many calls are counted."""
    deadline = time.monotonic() + limit
    while board.called < total:
        if time.monotonic() > deadline:
            raise Failed(f"{label}: {board.called:,} of {total:,} in {limit:g} s")
        await asyncio.sleep(0.001)
    return (time.monotonic_ns() - since) / 1e9


# --- 4. latency -------------------------------------------------------------------------------------------------------


async def latency(bench: Bench) -> None:
    say("## Latency at 50 events a second\n")
    say("From the return of the commit (and from its call) to the begin of the handler, CLOCK_MONOTONIC.\n")
    events = 150 if bench.quick else 1000
    rows, bars = [], []

    def cells(times: Sequence[int]) -> list[str] | None:
        triples = [times[3 * n : 3 * n + 3] for n in range(5, events) if times[3 * n + 2]]
        if not triples:
            return None
        after = [(begun - committed) / 1e6 for _, committed, begun in triples]
        before = [(begun - committing) / 1e6 for committing, _, begun in triples]
        bars.append((label, max(0.0, quantile(after, 0.5))))
        return [
            f"{quantile(after, 0.5):.2f}",
            f"{quantile(after, 0.99):.2f}",
            f"{quantile(before, 0.5):.2f}",
            f"{quantile(before, 0.99):.2f}",
        ]

    for entry in bench.entries(POSTGRESQL):
        for across in (False, True):
            where = "across processes" if across else "in the publisher's process"
            label = f"{entry.label}, {where}"
            progress(f"latency: {label}")
            job = {"way": entry.way, "url": "", "options": entry.options, "events": events, "handlers": 1}
            try:
                async with bench.database() as url, bench.board(events) as board:
                    job |= {"url": url, "board": board.path}
                    await bench.store(url, entry, 0, 1)
                    if across:
                        async with (
                            bench.child(role="work", kind="stamp", seat=0, **job) as worker,
                            bench.child(role="publish", clients=1, **job) as publisher,
                        ):
                            await worker.line()
                            await publisher.line()
                            await asyncio.sleep(2)
                            await publisher.ask(events / 50 + 60, count=events, publish=True, pace=50)
                            with contextlib.suppress(Failed):
                                await _until_called(board, events, 0, label, 15)
                            await publisher.end()
                    else:
                        async with bench.child(role="here", pace=50, **job) as both:
                            await both.line(events / 50 + 90)
                    found = cells(list(board.times))
            except Exception as error:
                rows.append([label, f"failed: {as_failure(error)}", "", "", ""])
                continue
            rows.append([label, *(found or ["nothing delivered", "", "", ""])])
    head = ["PostgreSQL, ms", "p50 from commit", "p99 from commit", "p50 with the commit", "p99 with the commit"]
    say(table(head, rows) + "\n")
    bench.bars.append(durable_picture.Group("Latency, commit → handler: ms, median", bars, better="less"))


# --- 5. kills ---------------------------------------------------------------------------------------------------------


async def kills(bench: Bench) -> None:
    say("## Five SIGKILLs during 3,000 events of 2 ms each\n")
    say(
        "A worker is killed after each sixth of the events and another one started at once; leases of 2 s; whereupon "
        "with its `in_flight` of 100, the\nothers with batches of 100 (procrastinate and django-domain-events, which "
        "finish one at a time, as they are).\n"
    )
    events, number = 3000, 5
    lease = 2.0
    entries = [
        # a hundred at a time for everybody: what is claimed and called, but not acknowledged, comes again
        Entry(entry.way, entry.label, entry.options | {"lease": lease, "batch": 100})
        for entry in bench.entries(POSTGRESQL)
        if (POSTGRESQL[entry.way].most or events) >= events
    ]
    entries.append(Entry("whereupon", "whereupon TRANSACTIONAL, rows written", {"lease": lease, "transactional": 1}))
    rows, bars = [], []

    async def measure(entry: Entry) -> tuple[int, int, int, int]:
        async with bench.database() as url, bench.board(events) as board:
            await bench.store(url, entry, events, 1)
            job = {"way": entry.way, "url": url, "options": entry.options, "events": events, "handlers": 1}
            for seat in range(number + 1):
                async with bench.child(role="work", kind="wait", seat=seat, board=board.path, **job) as worker:
                    await worker.line()
                    goal = events * (seat + 1) // (number + 1)
                    deadline = time.monotonic() + 90
                    while time.monotonic() < deadline:
                        seen = events - bytes(board.counts).count(0)
                        if seen >= goal or worker.process.returncode is not None:
                            break
                        await asyncio.sleep(0.001 if seat < number else 0.05)
                    if seat == number:
                        await asyncio.sleep(lease + 1.5)  # what the killed had in flight comes again now
            counts = bytes(board.counts)
            lost = counts.count(0)
            doubled, rowless = 0, 0
            if "transactional" in entry.options:
                written, distinct = (
                    await bench.execute(url, "SELECT count(*), count(DISTINCT number) FROM app_effect")
                )[0]
                doubled, rowless = written - distinct, events - distinct
            return sum(counts) - (events - lost), lost, doubled, rowless

    for entry in entries:
        progress(f"kills: {entry.label}")
        try:
            repeated, lost, doubled, rowless = await measure(entry)
        except Exception as error:
            rows.append([entry.label, f"failed: {as_failure(error)}", "", "", ""])
            continue
        transactional = "transactional" in entry.options
        most = f"{number} × 100" if entry.way == "whereupon" else ""
        if transactional:
            rows.append([entry.label, f"{repeated:,} calls", most, f"{rowless:,}", f"{doubled:,}"])
        else:
            rows.append([entry.label, f"{repeated:,}", most, f"{lost:,}", ""])
            bars.append((entry.label, float(repeated)))
    head = ["PostgreSQL", "effects outside repeated", "in flight, at most", "lost", "effects in the database doubled"]
    say(table(head, rows) + "\n")
    bench.bars.append(durable_picture.Group("Five SIGKILLs: effects repeated", bars, better="less"))


# --- 6. growth --------------------------------------------------------------------------------------------------------


async def growth(bench: Bench) -> None:
    say("## Growth\n")
    for part in (_grown_log, _dead_tuples, _memory_table):
        try:
            await part(bench)
        except Exception as error:
            say(f"failed: {as_failure(error)}\n")


async def _grown_log(bench: Bench) -> None:
    progress(f"growth: a log of {bench.grown:,}")
    events = bench.events
    entry = Entry("whereupon", "whereupon")
    rates: dict[int, list[float]] = {0: [], bench.grown: []}
    async with bench.database() as empty, bench.database() as full:
        # "from now" begins where the log ends: delivered to nobody, and past every cursor that is made after it
        await bench.store(full, Entry("whereupon", "whereupon"), 1000, 0)
        await _multiply_log(bench, full, bench.grown)
        for url in (empty, full):
            await bench.store(url, entry, 0, 1, prepare=url is empty)
        for number in range(max(2, bench.rounds)):
            for size, url in [(0, empty), (bench.grown, full)][:: 1 if number % 2 else -1]:
                await bench.store(url, entry, events, 1, prepare=False)
                await bench.execute(url, "ANALYZE")
                rates[size].append((await drained(bench, url, entry, events, 1)).per_second)
                progress(f"  {size:,}: {rates[size][-1]:,.0f} events/s")
    rows = [
        [f"{size:,} events", shown(statistics.median(values)), f"{ratio(values, rates[0]):.2f}"]
        for size, values in rates.items()
    ]
    say(table(["delivered before", "events/s", "× none"], rows) + "\n")


async def _multiply_log(bench: Bench, url: str, size: int) -> None:
    """Copy the log's rows until there are so many, as if they had been published."""
    columns = [
        name
        for (name,) in await bench.execute(
            url,
            "SELECT column_name::text FROM information_schema.columns WHERE table_name = 'whereupon_log' "
            "AND column_name NOT IN ('position', 'tx_id') ORDER BY ordinal_position",
        )
    ]
    values = ", ".join("gen_random_uuid()" if name == "event_id" else name for name in columns)
    have = 1000
    while have < size:
        some = min(have, size - have)
        await bench.execute(
            url,
            f"INSERT INTO whereupon_log ({', '.join(columns)}) SELECT {values} FROM "
            f"(SELECT * FROM whereupon_log ORDER BY position LIMIT {some}) AS copied",
        )
        have += some
        progress(f"  {have:,} rows")
    await bench.execute(url, "VACUUM ANALYZE")


async def held(bench: Bench) -> None:
    import asyncpg

    say("## A snapshot held open\n")

    events = 40_000 if bench.quick else 400_000
    bursts = 10
    rows = []
    sketch = durable_ways.RowPerDelivery.name
    for entry in (Entry("whereupon", "whereupon"), Entry(sketch, sketch)):
        progress(f"growth: a snapshot held, {entry.label}")
        async with bench.database() as url, bench.board(events) as board, contextlib.AsyncExitStack() as stack:
            await bench.store(url, entry, 0, 1)
            job = {"way": entry.way, "url": url, "options": entry.options, "events": events, "handlers": 1}
            worker = await stack.enter_async_context(
                bench.child(role="work", kind="count", seat=0, board=board.path, **job)
            )
            publisher = await stack.enter_async_context(bench.child(role="publish", clients=1, board=board.path, **job))
            await worker.line()
            await publisher.line()
            holder = await asyncpg.connect(url)
            try:
                await holder.execute("BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM app_order")
                rates = []
                for burst in range(bursts):
                    first, end = events * burst // bursts, events * (burst + 1) // bursts
                    committed = (await publisher.ask(120, store=end, first=first))["committed"]
                    seconds = await _until_called(board, end, committed, entry.label)
                    rates.append((end - first) / seconds)
                    progress(f"  burst {burst + 1}: {rates[-1]:,.0f} events/s")
            finally:
                await holder.close()
            fifth = bursts // 5
            early, late = statistics.mean(rates[:fifth]), statistics.mean(rates[-fifth:])
            rows.append([entry.label, shown(early), shown(late), f"{late / early:.2f}"])
    head = [f"a snapshot held open, {events:,} events", "first fifth, events/s", "last fifth", "last / first"]
    say(table(head, rows) + "\n")


async def _dead_tuples(bench: Bench) -> None:
    events, handlers = bench.events, 4
    rows = []
    for entry in bench.entries(POSTGRESQL, ("txoutbox",)):
        progress(f"growth: dead tuples, {entry.label}")
        some = events if entry.way == "whereupon" else events // handlers
        async with bench.database() as url:
            await bench.store(url, entry, some, handlers)
            tables = await bench.execute(
                url,
                "SELECT format('%I.%I', schemaname, relname) FROM pg_stat_user_tables WHERE relname NOT LIKE 'app%'",
            )
            for (name,) in tables:  # else autovacuum hides what a drain leaves
                kind = (await bench.execute(url, f"SELECT relkind::text FROM pg_class WHERE oid = '{name}'::regclass"))[
                    0
                ][0]
                if kind == "r":
                    await bench.execute(url, f"ALTER TABLE {name} SET (autovacuum_enabled = false)")
            before = await _dead(bench, url)
            result = await drained(bench, url, entry, some, handlers)
            await asyncio.sleep(0.5)
            after = await _dead(bench, url)
        left = {name: dead - before.get(name, 0) for name, dead in after.items() if dead > before.get(name, 0)}
        where = ", ".join(f"{name} {dead:,}" for name, dead in sorted(left.items(), key=lambda item: -item[1])[:3])
        rows.append([entry.label, f"{result.called:,}", f"{sum(left.values()):,}", where])
    say(table(["autovacuum off", "deliveries", "dead tuples", "of which"], rows) + "\n")


async def _dead(bench: Bench, url: str) -> dict[str, int]:
    rows = await bench.execute(
        url,
        "SELECT pg_stat_force_next_flush()",
        "SELECT pg_stat_clear_snapshot()",
        "SELECT relname::text, n_dead_tup FROM pg_stat_user_tables",
    )
    return {name: int(dead) for name, dead in rows}


async def _memory_table(bench: Bench) -> None:
    events = 4 * bench.events if bench.quick else max(1_000_000, bench.events)
    progress(f"growth: memory over a backlog of {events:,}")
    entry = Entry("whereupon", "whereupon")
    async with bench.database() as url:
        await bench.store(url, entry, events, 1)
        result = await drained(bench, url, entry, events, 1)
    tenth = next((memory for called, memory in result.samples if called >= events / 10), result.memory[1])
    late = max((memory for called, memory in result.samples if called >= events / 10), default=result.memory[1])
    rows = [[f"{events:,} events", *(f"{size / 2**20:.1f}" for size in (result.memory[0], tenth, late))]]
    say(table(["resident memory of a worker, MiB", "at start", "after a tenth", "most after that"], rows) + "\n")


# --- 7. idle ----------------------------------------------------------------------------------------------------------


async def idle(bench: Bench) -> None:
    say("## An idle worker, over 10 seconds\n")
    rows = []
    for entry in bench.entries(POSTGRESQL):
        progress(f"idle: {entry.label}")
        try:
            rows.append(await _idle(bench, entry))
        except Exception as error:
            rows.append([entry.label, f"failed: {as_failure(error)}", "", ""])
    say(table(["PostgreSQL", "statements", "transactions", "% of a core"], rows) + "\n")


async def _idle(bench: Bench, entry: Entry) -> list[str]:
    ours = entry.way == "whereupon"
    async with bench.database() as url, bench.board(100) as board:
        await bench.store(url, entry, 100, 1)
        name = url.rpartition("/")[2]
        sums = f"SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = '{name}'"
        job = {"way": entry.way, "url": url, "options": entry.options, "events": 100, "handlers": 1}
        async with bench.child(role="work", kind="count", seat=0, board=board.path, statements=ours, **job) as worker:
            await worker.line()
            await _until_called(board, 100, 0, entry.label, 30)
            await asyncio.sleep(4)
            if ours:
                await worker.ask(reset=True)
            transactions, cpu = (await bench.server(sums))[0][0], worker.cpu()
            await asyncio.sleep(10)
            cpu = worker.cpu() - cpu
            transactions = (await bench.server(sums))[0][0] - transactions
            statements = (await worker.ask(statements=True))["statements"] if ours else {}
        for statement, count in sorted(statements.items(), key=lambda item: -item[1])[:8]:
            progress(f"  {count:4} × {' '.join(statement.split())[:150]}")
    return [entry.label, f"{sum(statements.values()):,}" if ours else "–", f"{transactions:,}", f"{cpu * 10:.2f}"]


# --- all of it --------------------------------------------------------------------------------------------------------

SECTIONS: dict[str, Callable[[Bench], Awaitable[None]]] = {
    "drain": drain,
    "transactional": transactional,
    "publish": publish,
    "workers": workers,
    "latency": latency,
    "kills": kills,
    "growth": growth,
    "held": held,
    "idle": idle,
}


def machine() -> str:
    model = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                model = line.partition(":")[2].strip()
                break
    python = f"{platform.python_implementation()} {platform.python_version()}"
    return f"{python}, {platform.system()}, {model}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}"


async def report(bench: Bench, sections: Sequence[str]) -> None:
    rows = await bench.server(
        "SELECT current_setting('server_version'), current_setting('fsync'), current_setting('synchronous_commit')"
    )
    number, fsync, synchronous = rows[0]
    if (fsync, synchronous) != ("on", "on"):
        raise SystemExit(f"fsync is {fsync} and synchronous_commit {synchronous}: both must be on")
    import sqlite3

    this = asyncio.current_task()
    assert this is not None
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, this.cancel)
    await bench.drop_leftovers()
    say(machine() + "  ")
    say(f"PostgreSQL {number.split()[0]}, fsync {fsync}, synchronous_commit {synchronous}; ")
    counted = "1 round" if bench.rounds == 1 else f"{bench.rounds} rounds"
    say(f"SQLite {sqlite3.sqlite_version}; whereupon {version('whereupon')}; {counted}\n")
    left_out = [
        f"- {name} is left out: {reason}."
        for name, way in (POSTGRESQL | SQLITE).items()
        if name in bench.peers and (reason := missing(way))
    ]
    try:
        for name in sections:
            began = time.monotonic()
            try:
                await SECTIONS[name](bench)
            except Exception as error:
                say(f"failed: {as_failure(error)}\n")
            progress(f"{name}: {time.monotonic() - began:.0f} s")
    finally:
        for name in list(bench.databases):
            await bench.drop(name)
    notes = left_out + [
        f"- {name}: {way.note}" for name, way in (POSTGRESQL | SQLITE).items() if way.note and name in bench.peers
    ]
    if notes:
        say("\n".join(notes))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="small numbers, one round: some minutes, rough figures")
    parser.add_argument("--rounds", type=int, help="rounds over all ways (default 3, quick 1)")
    parser.add_argument("--events", type=int, help="events of a drain (default 100,000, quick 10,000)")
    parser.add_argument("--grown", type=int, help="events in the grown log (default 1,000,000, quick 100,000)")
    parser.add_argument("--only", default=",".join(SECTIONS), help=f"of {', '.join(SECTIONS)}, with commas between")
    names = [name for name in POSTGRESQL | SQLITE if name != "whereupon"]
    parser.add_argument("--peers", default=",".join(names), help=f"of {', '.join(names)}; '' for none")
    parser.add_argument("--picture", metavar="PATH", help="write the bars as an SVG")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        asyncio.run(child(json.loads(arguments.child)))
        return
    sections = [name for name in arguments.only.split(",") if name]
    peers = [name for name in arguments.peers.split(",") if name]
    for name in sections:
        if name not in SECTIONS:
            parser.error(f"--only {name}: there is {', '.join(SECTIONS)}")
    for name in peers:
        if name not in names:
            parser.error(f"--peers {name}: there is {', '.join(names)}")
    quick = arguments.quick
    folder = Path(tempfile.mkdtemp(prefix="whereupon-bench-"))
    bench = Bench(
        quick,
        arguments.rounds or (1 if quick else 3),
        arguments.events or (10_000 if quick else 100_000),
        peers,
        arguments.grown or (100_000 if quick else 1_000_000),
        folder,
    )
    try:
        asyncio.run(report(bench, sections))
        if arguments.picture:
            Path(arguments.picture).write_text(durable_picture.draw(bench.bars))
            progress(f"drawn: {arguments.picture}")
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
