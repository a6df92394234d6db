"""The fault table: real workers and publishers on a real database, something is broken under load, and all is counted.

`python -m tests.faults` prints it (`make faults`). What was committed is told by a table that publishers write in the
same transactions, and what was delivered by what handlers did: neither by whereupon's own tables. It must hold
that every committed event reached every handler, that no effect in the database is doubled, that each account's events
were handled in the order of publishing, and that no more outside effects were repeated than could be in flight.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final, NamedTuple

import msgspec
from sqlalchemy import NullPool, create_engine, text
from sqlalchemy.engine import make_url

from tests.fault_shop import DURABLE, ORDERED, TABLES, TRANSACTIONAL, Settings
from tests.servers import PostgresServer, PostgresUnavailable, empty_database, provide_postgres, start_postgres

ROOT: Final = Path(__file__).parent.parent
STILL_FOR: Final = 90.0
"""Seconds in which nothing moves, though something is left to do, before that counts as lost."""
MOST_CRASHES: Final = 40
"""So many workers may die of two events before these must be known for what they are."""
HANDLERS: Final = (*DURABLE, *TRANSACTIONAL)


_LEFT_OPEN: Final = (
    "SELECT x.subscription, x.lane, x.position, x.key, x.state, x.attempts, x.alone, x.next_at, x.updated_at, "
    "x.error_type, c.owner, CURRENT_TIMESTAMP AS now FROM whereupon_exception x JOIN whereupon_cursor c "
    "ON c.subscription = x.subscription AND c.generation = x.generation AND c.lane = x.lane "
    "WHERE x.state <> 'dead' ORDER BY x.id LIMIT 12"
)


class Effect(NamedTuple):
    """A line that a handler wrote outside the database."""

    handler: str
    key: str
    event_id: str
    account: int
    sequence: int
    at: int


class Row(NamedTuple):
    """What a handler wrote in its transaction."""

    handler: str
    event_id: str
    account: int
    sequence: int
    previous: int | None
    """The account's highest sequence that the handler had written before."""


class Figures(msgspec.Struct):
    """A line of the table."""

    fault: str
    database: str
    hits: int
    """How often the fault was inflicted."""
    committed: int
    delivered: dict[str, int]
    """Of the committed events, for each handler: to how many of them it was applied."""
    invented: int
    """Effects of events that nobody committed."""
    doubled: int
    """Effects in the database beyond one for each event and handler."""
    repeated: int
    """Effects outside the database beyond one for each event and handler."""
    allowed: int
    """How many of these there may be: what could be in flight at each hit."""
    disordered: int
    dead: int
    dead_expected: int
    given_up: int
    """Committed events that must end as dead letters, and so are not delivered to one handler each."""
    unsettled: int
    """Exceptions that are left in other states than dead, beside those that must be."""
    recovery: float
    """Seconds from the last hit until all was delivered."""
    notes: list[str]
    """What else was not as it should be."""

    @property
    def lost(self) -> int:
        return sum(self.committed - number for number in self.delivered.values()) - self.given_up

    def broken(self) -> list[str]:
        """The promises that were broken, in words."""
        found = list(self.notes)
        if not self.committed:
            found.append("nothing was committed, so nothing was shown")
        if self.lost:
            found.append(f"{self.lost} deliveries lost: {self.delivered} of {self.committed}")
        if self.invented:
            found.append(f"{self.invented} effects of events that were never committed")
        if self.doubled:
            found.append(f"{self.doubled} effects in the database doubled")
        if self.repeated > self.allowed:
            found.append(f"{self.repeated} outside effects repeated, where {self.allowed} were in flight at most")
        if self.disordered:
            found.append(f"{self.disordered} events out of their account's order")
        if self.dead != self.dead_expected:
            found.append(f"{self.dead} dead letters instead of {self.dead_expected}")
        if self.unsettled:
            found.append(f"{self.unsettled} exceptions left open")
        return found


class Scene:
    """A database with the shop's tables, and the processes that work on it; `opened` makes one."""

    def __init__(self, url: str, folder: Path, seed: int, short: bool) -> None:
        self.url = url
        self.folder = folder
        self.short = short
        self.chance = random.Random(seed)
        self.started: list[subprocess.Popen[bytes]] = []
        """All of them, also those that have ended: each ends with its standard input, which is closed at the end."""
        self.workers: list[subprocess.Popen[bytes]] = []
        self.publishers: list[subprocess.Popen[bytes]] = []
        self.hits = 0
        self.dead_expected = self.given_up = self.open_expected = 0
        self.may_repeat = 0
        """Outside effects that may be repeated."""
        self.notes: list[str] = []
        self.checks: list[Callable[[Scene], None]] = []
        """What a fault wants to look at once all is delivered; what is wrong goes into the notes."""
        self.operating: list[Callable[[Scene], None]] = []
        """What somebody does again and again until all is delivered."""
        self.server: PostgresServer | None = None
        self.settings = Settings(url, str(folder), seed=seed)
        backend = make_url(url)
        self.postgres = backend.get_backend_name() == "postgresql"
        sync = backend.set(drivername="postgresql+psycopg" if self.postgres else "sqlite")
        options: dict[str, Any] = {} if self.postgres else {"connect_args": {"timeout": 60}}
        self.engine = create_engine(sync, poolclass=NullPool, isolation_level="AUTOCOMMIT", **options)
        self._read: dict[Path, int] = {}
        self._effects: list[Effect] = []
        self._numbers = itertools.count()

    # --- processes --------------------------------------------------------------------------------------------------

    def set_up(self) -> None:
        """Make the tables, and register the subscriptions: a publisher that commits one transaction does it."""
        subprocess.run(
            [sys.executable, "-m", "whereupon.cli", "db", "upgrade", "--url", self.url],
            check=True, capture_output=True, cwd=ROOT,
        )  # fmt: skip
        with self.engine.connect() as connection:
            for statement in TABLES:
                connection.exec_driver_sql(statement)

    def work(self, **changes: Any) -> subprocess.Popen[bytes]:
        """Start a worker."""
        worker = self._start(["-m", "whereupon.cli", "worker", "tests.fault_shop:bus"], changes)
        self.workers.append(worker)
        return worker

    def publish(self, **changes: Any) -> subprocess.Popen[bytes]:
        """Start a publisher."""
        publisher = self._start(["-m", "tests.fault_shop"], changes)
        self.publishers.append(publisher)
        return publisher

    def _start(self, arguments: list[str], changes: dict[str, Any]) -> subprocess.Popen[bytes]:
        number = next(self._numbers)
        settings = msgspec.structs.replace(self.settings, **{"seed": self.settings.seed + number, **changes})
        with (self.folder / f"stderr.{number}").open("wb") as errors:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                cwd=ROOT,
                env={**os.environ, "SHOP": msgspec.json.encode(settings).decode()},
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
            )
        self.started.append(process)
        return process

    def load(self, workers: int, publishers: int = 2, **changes: Any) -> None:
        """Workers and publishers, at work."""
        for _ in range(publishers):
            self.publish(**changes)
        for _ in range(workers):
            self.work(**changes)
        for worker in self.workers:
            self.until_busy(worker, 60)

    def until_busy(self, worker: subprocess.Popen[bytes], within: float, more: int = 1) -> bool:
        """Wait until a worker has made so many more effects; False if it has not by then."""
        path = self.folder / f"effects.{worker.pid}"
        before = path.stat().st_size if path.exists() else 0
        give_up = time.monotonic() + within
        while time.monotonic() < give_up:
            if path.exists() and path.stat().st_size >= before + 100 * more:
                return True
            if worker.poll() is not None:
                return False
            time.sleep(0.02)
        return False

    def kill(self, worker: subprocess.Popen[bytes]) -> None:
        """Kill a worker; what it had in flight may be repeated."""
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        self.workers.remove(worker)
        self.hit(self.settings.in_flight)

    def hit(self, may_repeat: int = 0) -> None:
        self.hits += 1
        self.may_repeat += may_repeat

    def end_publishing(self) -> None:
        for publisher in self.publishers:
            publisher.send_signal(signal.SIGTERM)
        for publisher in self.publishers:
            try:
                code = publisher.wait(60)
            except subprocess.TimeoutExpired:
                publisher.kill()
                code = publisher.wait()
            if code not in (0, -signal.SIGTERM):  # it may not have got as far as to handle the signal
                self.notes.append(f"a publisher ended with {code}")
        self.publishers.clear()

    def end(self) -> None:
        for process in self.started:
            process.kill()
            process.wait()
            if process.stdin is not None:
                process.stdin.close()
        self.engine.dispose()

    # --- counting ---------------------------------------------------------------------------------------------------

    def ask(self, query: str, **parameters: Any) -> Sequence[Any]:
        with self.engine.connect() as connection:
            result = connection.execute(text(query), parameters)
            return result.all() if result.returns_rows else []

    def effects(self) -> list[Effect]:
        """What was done outside the database, in the order of time."""
        for path in self.folder.glob("effects.*"):
            with path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                data = file.read()
            whole = data.rfind(b"\n") + 1
            self._read[path] = self._read.get(path, 0) + whole
            for line in data[:whole].decode().splitlines():
                handler, key, event_id, account, sequence, at = line.split()
                self._effects.append(Effect(handler, key, event_id, int(account), int(sequence), int(at)))
        self._effects.sort(key=lambda effect: effect.at)
        return self._effects

    def missing(self) -> int:
        """How many deliveries are to come; 0 does not say that none is made twice yet."""
        committed = self.ask("SELECT count(*) FROM sold")[0][0]
        inside: dict[str, int] = dict(self.ask("SELECT handler, count(DISTINCT event_id) FROM effect GROUP BY handler"))
        outside = Counter(handler for handler, _ in {(effect.handler, effect.key) for effect in self.effects()})
        return sum(int(committed) - inside.get(name, 0) - outside[name] for name in HANDLERS) - self.given_up

    def open_exceptions(self) -> int:
        found = self.ask("SELECT count(*) FROM whereupon_exception WHERE state <> 'dead'")[0][0]
        return int(found) - self.open_expected

    def figures(self, fault: str) -> Figures:
        """Stop publishing, wait until nothing is missing, and count."""
        began = time.monotonic()
        self.end_publishing()
        before, moved = None, began
        while any(left := (max(0, self.missing()), self.open_exceptions())):
            if left != before:
                before, moved = left, time.monotonic()
            elif time.monotonic() > moved + STILL_FOR:
                break
            for operate in self.operating:
                operate(self)
            time.sleep(0.1)
        recovery = time.monotonic() - began
        if self.open_exceptions():
            # before the workers end: a clean stop tidies up
            self.notes += [f"left open: {dict(row._mapping)}" for row in self.ask(_LEFT_OPEN)]
        for worker in self.workers:
            worker.send_signal(signal.SIGTERM)
        for worker in self.workers:
            try:
                code = worker.wait(30)
            except subprocess.TimeoutExpired:
                self.notes.append(f"worker {worker.pid} did not end within 30 s of SIGTERM")
                continue
            if code not in (0, -signal.SIGTERM):
                self.notes.append(f"a worker ended with {code} at SIGTERM")
        for check in self.checks:
            check(self)
        return self._count(fault, recovery)

    def _count(self, fault: str, recovery: float) -> Figures:
        sold = {row.event_id for row in self.ask("SELECT event_id FROM sold")}
        rows = [Row(*row) for row in self.ask("SELECT handler, event_id, account, sequence, previous FROM effect")]
        effects = self.effects()
        applied = Counter((row.handler, row.event_id) for row in rows)
        written = Counter((effect.handler, effect.event_id) for effect in effects)
        keys = {(effect.handler, effect.key) for effect in effects}
        if len(keys) != len(written):
            self.notes.append(f"{len(keys)} idempotency keys for {len(written)} deliveries")
        delivered = Counter(handler for handler, event_id in (*applied, *written) if event_id in sold)
        dead = self.ask("SELECT count(*) FROM whereupon_exception WHERE state = 'dead'")[0][0]
        return Figures(
            fault=fault,
            database="postgresql" if self.postgres else "sqlite",
            hits=self.hits,
            committed=len(sold),
            delivered={name: delivered[name] for name in HANDLERS},
            invented=sum(event_id not in sold for _, event_id in (*applied, *written)),
            doubled=applied.total() - len(applied),
            repeated=written.total() - len(written),
            allowed=self.may_repeat,
            disordered=disordered_rows(rows) + disordered_effects(effects),
            dead=dead,
            dead_expected=self.dead_expected,
            given_up=self.given_up,
            unsettled=self.open_exceptions(),
            recovery=recovery,
            notes=self.notes,
        )

    def said(self, last: int = 30) -> str:
        """The last lines that each process wrote."""
        parts = []
        for path in sorted(self.folder.glob("stderr.*"), key=lambda path: int(path.suffix[1:])):
            lines = path.read_text(errors="replace").splitlines()
            parts += [f"--- {path.name}", *lines[-last:]]
        return "\n".join(parts)


def disordered_rows(rows: Sequence[Row]) -> int:
    """Rows of an ordered handler that came when the account's last was not the one just before it."""
    return sum((row.previous or 0) != row.sequence - 1 for row in rows if row.handler in ORDERED)


def disordered_effects(effects: Sequence[Effect]) -> int:
    """Effects of ordered handlers whose first time was not right after that of their predecessor."""
    last: dict[tuple[str, int], int] = defaultdict(int)
    seen: set[tuple[str, str]] = set()
    disordered = 0
    for effect in effects:
        if effect.handler in ORDERED and (effect.handler, effect.event_id) not in seen:
            seen.add((effect.handler, effect.event_id))
            disordered += effect.sequence != last[effect.handler, effect.account] + 1
            last[effect.handler, effect.account] = effect.sequence
    return disordered


# --- the faults -------------------------------------------------------------------------------------------------------


def kills(scene: Scene) -> None:
    """A worker is killed by SIGKILL, again and again."""
    count = 3
    scene.load(count)
    for _ in range(4 if scene.short else 50):
        victim = scene.chance.choice(scene.workers)
        scene.until_busy(victim, 4, more=20)
        time.sleep(scene.chance.uniform(0, 0.1))
        scene.kill(victim)
        scene.work()


def terminations(scene: Scene) -> None:
    """The server ends all connections of all workers."""
    scene.load(2)
    for _ in range(4 if scene.short else 30):
        scene.until_busy(scene.workers[0], 10, more=20)
        scene.ask(
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
            "WHERE datname = current_database() AND application_name = 'shop worker'"
        )
        scene.hit()
        time.sleep(scene.chance.uniform(0, 0.3))


def stops(scene: Scene) -> None:
    """A worker stands still for longer than its lease, and goes on."""
    scene.load(2)
    for number in range(2 if scene.short else 10):
        victim = scene.workers[number % 2]
        scene.until_busy(victim, 10, more=20)
        victim.send_signal(signal.SIGSTOP)
        time.sleep(scene.settings.lease + scene.chance.uniform(0.2, 2))
        victim.send_signal(signal.SIGCONT)
        scene.hit(scene.settings.in_flight)


def clocks(scene: Scene) -> None:
    """One worker's clock is an hour ahead, another's an hour behind; one jumps there and back at work."""
    scene.load(1)
    for ahead in (3600.0, -3600.0):
        scene.work(clock=ahead)
        scene.hit()
    jumper = scene.work(jump=3600.0)
    for worker in scene.workers:
        if not scene.until_busy(worker, 60):
            scene.notes.append("a worker with a wrong clock got no lane")
    jumper.send_signal(signal.SIGUSR1)
    scene.hit()
    time.sleep(3 if scene.short else 15)
    if not scene.short:
        scene.kill(scene.workers[1])  # what the one that is ahead leaves is taken over as soon as any other's
        time.sleep(5)


def busy(scene: Scene) -> None:
    """Four writers hammer the file, and keep it locked at times."""
    scene.load(2, publishers=4, pause=0.0, hold=0.3)
    scene.hit()
    time.sleep(4 if scene.short else 20)


def blocks(scene: Scene) -> None:
    """A handler blocks its process's event loop for longer than a lease."""
    scene.load(2)
    number = 3 if scene.short else 12
    scene.publish(act="block", act_every=2, transactions=2 * number, pause=0.2).wait(120)
    for _ in range(number):
        # one of the handlers blocks amid its transaction: on SQLite that keeps everybody from renewing a lease
        scene.hit(0 if scene.postgres else len(scene.workers) * scene.settings.in_flight)


def steals(scene: Scene) -> None:
    """Somebody takes lanes away from their workers, by hand."""
    scene.load(2)
    for number in range(15 if scene.short else 100):
        name, lane = scene.chance.choice(scene.ask("SELECT subscription, lane FROM whereupon_cursor"))
        scene.ask(
            f"UPDATE whereupon_cursor SET token = token + 1 {', owner = NULL' if number % 2 else ''} "
            "WHERE subscription = :name AND lane = :lane",
            name=name, lane=lane,
        )  # fmt: skip
        scene.hit(scene.settings.in_flight)
        time.sleep(scene.chance.uniform(0.05, 0.3))


def restarts(scene: Scene) -> None:
    """Workers are told to stop, and others started: a deploy. Nothing may be repeated."""
    scene.load(2)
    for _ in range(3 if scene.short else 15):
        victim = scene.workers.pop(0)
        scene.work()
        scene.until_busy(victim, 5, more=10)
        victim.send_signal(signal.SIGTERM)
        if code := victim.wait(30):
            scene.notes.append(f"a worker ended with {code} at SIGTERM")
        scene.hit()


def publishers(scene: Scene) -> None:
    """Publishers are killed by SIGKILL, before, in and after their commits."""
    scene.load(2, publishers=3)
    for _ in range(4 if scene.short else 20):
        victim = scene.publishers.pop(0)
        time.sleep(scene.chance.uniform(0.3, 0.6))
        victim.kill()
        victim.wait()
        scene.publish()
        scene.hit()
    time.sleep(1)


def crash_loop(scene: Scene) -> None:
    """A handler kills its process on one event, whatever worker takes it, while others are started anew."""
    scene.settings = msgspec.structs.replace(scene.settings, attempts=3, lease=1.0)
    scene.load(2)
    scene.publish(act="die", act_every=1, transactions=1).wait(30)
    scene.publish(act="die", act_every=1, transactions=1).wait(30)
    scene.dead_expected = scene.given_up = 2
    moved = time.monotonic()
    while scene.hits < MOST_CRASHES and time.monotonic() < moved + STILL_FOR:
        for worker in list(scene.workers):
            if worker.poll() is not None:
                scene.workers.remove(worker)
                scene.hit(scene.settings.in_flight)
                scene.work()
                moved = time.monotonic()
        if len(scene.ask("SELECT 1 FROM whereupon_exception WHERE state = 'dead'")) >= scene.dead_expected:
            break
        time.sleep(0.1)
    dead = scene.ask("SELECT subscription, attempts, error_message FROM whereupon_exception WHERE state = 'dead'")
    for row in dead:
        if row.subscription != "risky" or row.attempts != 3 or "crash loop" not in row.error_message:
            scene.notes.append(f"an unexpected dead letter: {row}")


def garbage(scene: Scene) -> None:
    """Rows that nobody can read lie in the log, amid good ones."""
    scene.settings = msgspec.structs.replace(scene.settings, hears_all=True)
    scene.checks.append(_garbage_is_visible)
    scene.operating.append(_resume_what_is_halted)
    scene.load(2)
    spoilt: list[dict[str, Any]] = [
        {"payload": b"{not json"},
        {"payload": b'{"account": -7}'},
        {"payload": b'{"account": "seven", "sequence": 1}'},
        {"payload": b"\xff\x00\xfe"},
        {"headers": "{not json"},
        {"headers": '{"actor": 7}'},
        {"headers": "[]"},
        {"type": "NeverHeardOf"},
        {"keys": "{not json", "payload": b"{"},
        {"keys": '{"account": [7]}', "payload": b"{"},
        {"keys": None, "payload": b"{"},
        {"ran": '{"a": 1}', "payload": b"{"},
    ]
    for number, changes in enumerate(spoilt):
        row: dict[str, Any] = {
            "event_id": f"{number:032x}",
            "type": "TicketIssued",
            "version": 1,
            "payload": b'{"event_id": "00000000-0000-0000-0000-000000000001", "occurred_at": "2026-01-01T00:00:00Z", '
            b'"account": -7, "sequence": 1, "act": ""}',
            "headers": "{}",
            "keys": f'{{"account": "spoilt {number}"}}',
            "ran": None,
            **changes,
        }
        ran = "CAST(:ran AS jsonb)" if scene.postgres else ":ran"
        event_id = "CAST(:event_id AS uuid)" if scene.postgres else ":event_id"
        scene.ask(
            "INSERT INTO whereupon_log (event_id, type, version, payload, headers, keys, ran) "
            f"VALUES ({event_id}, :type, :version, :payload, :headers, :keys, {ran})",
            **row,
        )
        scene.hit()
        for operate in scene.operating:
            operate(scene)
        time.sleep(scene.chance.uniform(0, 0.1 if scene.short else 1))
    scene.dead_expected = (len(HANDLERS) + 1) * (len(spoilt) - 1)
    scene.open_expected = 1
    time.sleep(1)


def _resume_what_is_halted(scene: Scene) -> None:
    """Where the key of a row can't be told, who orders by it waits for somebody to say that the rest may go on."""
    for (name,) in scene.ask("SELECT name FROM whereupon_subscription WHERE paused"):
        subprocess.run(
            [sys.executable, "-m", "whereupon.cli", "handlers", "resume", name, "--url", scene.url,
             "--reason", "it is garbage", "--yes"],
            check=True, capture_output=True, cwd=ROOT,
        )  # fmt: skip


def _garbage_is_visible(scene: Scene) -> None:
    """After all was delivered: each spoilt row is an exception with a reason, for whoever hears its type."""
    found = scene.ask("SELECT subscription, event_id, type, state, error_type, error_message FROM whereupon_exception")
    seen = Counter(row.subscription for row in found if row.type == "TicketIssued" and row.state == "dead")
    spoilt = scene.hits - 1
    for name in (*HANDLERS, "everything"):
        if seen[name] != spoilt:
            scene.notes.append(f"{seen[name]} of {spoilt} spoilt events are dead letters of {name}")
    unknown = [(row.subscription, row.state) for row in found if row.type == "NeverHeardOf"]
    if unknown != [("everything", "waiting")]:
        scene.notes.append(f"the event of an unknown type is {unknown}, and not waiting for those who hear all")
    if any(not row.error_type or not row.error_message for row in found):
        scene.notes.append("an exception without a reason")


def outages(scene: Scene) -> None:
    """PostgreSQL is restarted: orderly and as if its machine had lost power, for less and for more than a lease."""
    assert scene.server is not None
    scene.load(2)
    times = [(False, 0.3), (True, 2.5)] if scene.short else [(n % 2 == 1, down) for n in range(10) for down in (0.1, 3)]
    for immediate, down in times:
        scene.until_busy(scene.workers[0], 15, more=20)
        scene.server.halt(immediate=immediate)
        time.sleep(down)
        scene.server.resume()
        # leases may have run out meanwhile, by the database's clock
        scene.hit(len(scene.workers) * scene.settings.in_flight)


def full(scene: Scene) -> None:
    """The file system of an SQLite database is full for a while."""
    database = make_url(scene.url).database
    assert database is not None
    ballast = Path(database).with_name("ballast")
    scene.load(2)
    for _ in range(2 if scene.short else 8):
        scene.until_busy(scene.workers[0], 15, more=20)
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        time.sleep(scene.chance.uniform(1, 2))
        ballast.unlink()
        scene.hit()
        time.sleep(0.5)
    for which in ("not taken", "worker_database_unavailable"):
        if not any(which in line and "full" in line for line in scene.said(1_000_000).splitlines()):
            scene.notes.append(f"the disk was not full enough: nobody said {which!r}")


class Kind(NamedTuple):
    inflict: Callable[[Scene], None]
    databases: tuple[str, ...]
    lease: float = 15.0
    """Seconds; short only where it has to run out, since a crowded machine may let a short one run out by itself."""


_BOTH: Final = ("postgresql", "sqlite")
KINDS: Final = {
    "kills": Kind(kills, _BOTH, 3.0),
    "restarts": Kind(restarts, _BOTH),
    "publishers": Kind(publishers, _BOTH),
    "terminations": Kind(terminations, ("postgresql",)),
    "outages": Kind(outages, ("own server",)),
    "stops": Kind(stops, _BOTH, 2.0),
    "clocks": Kind(clocks, ("postgresql",)),
    "full": Kind(full, ("small disk",)),
    "busy": Kind(busy, ("sqlite",)),
    "blocks": Kind(blocks, _BOTH, 2.0),
    "steals": Kind(steals, _BOTH),
    "garbage": Kind(garbage, _BOTH),
    "crash_loop": Kind(crash_loop, _BOTH),
}


# --- running them -----------------------------------------------------------------------------------------------------


class Report(msgspec.Struct):
    figures: Figures
    said: str
    """The last of what each process wrote."""


class NotHere(Exception):
    """What a fault needs can't be had on this machine; the message says what."""


def run(name: str, database: str, *, postgres: str | None = None, seed: int = 1, short: bool = False) -> Report:
    """Inflict a fault on a database of a kind, and count.

    `postgres` is the URL of a server that may be used, needed for "postgresql" alone. Raises `NotHere`.
    """
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="whereupon-faults-")))
        server = None
        if database == "small disk" and _SMALL_DISK not in os.environ:
            return _on_small_disk(name, folder, seed, short)
        if database == "small disk":
            url = f"sqlite+aiosqlite:///{os.environ[_SMALL_DISK]}/app.db"
        elif database == "sqlite":
            url = f"sqlite+aiosqlite:///{folder}/app.db"
        else:
            try:
                if database == "own server":
                    server = start_postgres()
                    stack.callback(server.stop)
            except PostgresUnavailable as error:
                raise NotHere(str(error)) from error
            at = postgres if server is None else server.url
            assert at is not None, "a fault of PostgreSQL needs a server"
            url = stack.enter_context(empty_database(at))
        scene = Scene(url, folder, seed, short)
        scene.server = server
        scene.settings = msgspec.structs.replace(scene.settings, lease=KINDS[name].lease)
        stack.callback(scene.end)
        scene.set_up()
        KINDS[name].inflict(scene)
        figures = scene.figures(name)
        return Report(figures, scene.said())


_SMALL_DISK: Final = "WHEREUPON_SMALL_DISK"


def _on_small_disk(name: str, folder: Path, seed: int, short: bool) -> Report:
    """Run a fault in a process that has a small file system mounted, which no other process sees."""
    disk = folder / "disk"
    disk.mkdir()
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--mount", "--user", "--map-root-user"]
    mount = 'mount -t tmpfs -o size=48m none "$1" && shift && exec "$@"'
    command = [sys.executable, "-m", "tests.faults", "--only", name, "--seed", str(seed), "--json"]
    ran = subprocess.run(
        [*unshare, "sh", "-c", mount, "sh", str(disk), *command, *(["--short"] if short else [])],
        capture_output=True, text=True, check=False, cwd=ROOT, env={**os.environ, _SMALL_DISK: str(disk)},
    )  # fmt: skip
    if not ran.stdout:
        raise NotHere(f"no small file system could be mounted: {ran.stderr.strip()[-500:]}")
    return msgspec.json.decode(ran.stdout, type=Report)


_HEAD: Final = (
    "fault", "database", "hits", "committed", "delivered", "lost", "doubled", "repeated", "allowed", "disordered",
    "dead", "recovery",
)  # fmt: skip


def _line(figures: Figures) -> list[str]:
    return [
        figures.fault.replace("_", " "),
        figures.database,
        str(figures.hits),
        f"{figures.committed:,}",
        f"{sum(figures.delivered.values()):,}",
        str(figures.lost + figures.invented),
        str(figures.doubled),
        str(figures.repeated),
        f"≤ {figures.allowed}",
        str(figures.disordered),
        str(figures.dead) if not figures.dead_expected else f"{figures.dead} of {figures.dead_expected}",
        f"{figures.recovery:.1f} s",
    ]


def _table(lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[column]) for line in lines) for column in range(len(_HEAD))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if number < 2 else cell.rjust(width)
            for number, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


_EXPLAINED: Final = f"""
committed   events, by a table that publishers wrote in the same transactions
delivered   to {len(HANDLERS)} handlers, by what these did; lost: what lacks, or came of nothing committed
doubled     effects in the database beyond one for each event and handler
repeated    effects outside the database beyond one, and how many of these could be in flight when it hit
disordered  events of an account that were first handled out of the order of publishing
dead        dead letters, and how many there must be
recovery    from the end of publishing, right after the last hit, until all was delivered"""


def main() -> int:
    """Print the table; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--short", action="store_true", help="a few hits of each fault, as in CI")
    parser.add_argument("--only", metavar="NAME", action="append", choices=list(KINDS), help="this fault; repeatable")
    parser.add_argument("--on", metavar="DATABASE", choices=_BOTH, help="postgresql or sqlite alone")
    parser.add_argument("--seed", type=int, default=1, metavar="N", help="for what is left to chance in the faults")
    parser.add_argument("--json", action="store_true", help="one fault's figures, and what its processes said, as JSON")
    arguments = parser.parse_args()
    with contextlib.ExitStack() as stack:
        postgres = None
        if arguments.on != "sqlite" and not arguments.json:
            try:
                server = start_postgres()
            except PostgresUnavailable:
                server = provide_postgres()
            stack.callback(server.stop)
            postgres = server.url
        return _print_table(arguments, postgres)


def _print_table(arguments: argparse.Namespace, postgres: str | None) -> int:
    lines: list[Sequence[str]] = [_HEAD]
    failed = False
    for name, kind in KINDS.items():
        if arguments.only and name not in arguments.only:
            continue
        for database in kind.databases:
            family = "postgresql" if database in ("postgresql", "own server") else "sqlite"
            if arguments.on and arguments.on != family:
                continue
            print(f"{name} on {family} …", end="", flush=True, file=sys.stderr)
            began = time.monotonic()
            try:
                report = run(name, database, postgres=postgres, seed=arguments.seed, short=arguments.short)
            except NotHere as error:
                print(f" left out: {error}", file=sys.stderr)
                continue
            print(f" {time.monotonic() - began:.0f} s", file=sys.stderr)
            if arguments.json:
                print(msgspec.json.encode(report).decode())
                continue
            if broken := report.figures.broken():
                failed = True
                print(f"{report.said}\n{name} on {family} BROKEN: {'; '.join(broken)}", file=sys.stderr)
            lines.append(_line(report.figures))
    if not arguments.json:
        print(_table(lines))
        print(_EXPLAINED)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
