"""The application of the fault table: what its publishers commit and what its handlers do, in processes of their own.

`whereupon worker tests.fault_shop:bus` delivers, `python -m tests.fault_shop` publishes until SIGTERM. Both read
`Settings` from the variable SHOP, and end with whoever started them: that process holds their standard input open.
"""

from __future__ import annotations

import asyncio
import datetime as datetime_module
import importlib
import os
import random
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any, Self

import asyncpg
import msgspec
from sqlalchemy import text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine

from whereupon import DomainEvent, EventBus, EventContext, Retry

DURABLE = ("mail", "letters", "flaky", "risky")
"""Subscriptions whose effects are outside the database: a line in a file for each."""
TRANSACTIONAL = ("book", "ledger")
"""Subscriptions whose effects are rows, written in the transaction that settles the delivery."""
ORDERED = ("letters", "ledger")
ACCOUNTS = 12
NOT_TAKEN = (
    SQLAlchemyError,
    OSError,
    asyncpg.PostgresError,
    asyncpg.InterfaceError,
    asyncpg.InternalClientError,  # of a connection that the server ends between two statements
)
"""What a publisher may get of a database at fault: it goes on with the next transaction."""


class Settings(msgspec.Struct, frozen=True):
    database: str
    folder: str
    """Where effects outside the database are written."""
    lease: float = 2.0
    in_flight: int = 20
    attempts: int = 50
    """Calls after which a delivery to `risky` is a dead letter."""
    failing: float = 0.05
    """Share of the calls to ordered handlers that raise; of those to `flaky`, four times as many do."""
    work: float = 0.002
    """Seconds that a handler takes."""
    clock: float = 0.0
    """Seconds that this worker's clock is ahead of the machine's."""
    jump: float = 0.0
    """Seconds that it jumps by on SIGUSR1."""
    hears_all: bool = False
    """Whether there is a subscription to all events, `everything`, too."""
    pause: float = 0.02
    """Seconds between two transactions of a publisher, on average."""
    hold: float = 0.0
    """Seconds for which a publisher keeps every tenth transaction open after it has written."""
    act: str = ""
    """What a handler does to its process for every `act_every`-th event: block it, or kill it."""
    act_every: int = 0
    transactions: int = 0
    """How many transactions a publisher commits, 0: until it is told to stop."""
    seed: int = 1


class TicketIssued(DomainEvent):
    account: int
    sequence: int
    """Of its account, from 1 on and without a gap: what is rolled back gives its number back."""
    act: str = ""


TABLES = (
    "CREATE TABLE account (id INTEGER PRIMARY KEY, last INTEGER NOT NULL)",
    "CREATE TABLE sold (event_id VARCHAR(36) NOT NULL, account INTEGER NOT NULL, sequence INTEGER NOT NULL)",
    "CREATE TABLE effect (handler VARCHAR(20) NOT NULL, event_id VARCHAR(36) NOT NULL, account INTEGER NOT NULL, "
    "sequence INTEGER NOT NULL, previous INTEGER)",
    "CREATE INDEX effect_account ON effect (handler, account, sequence)",
    *(f"INSERT INTO account VALUES ({number}, 0)" for number in range(-1, ACCOUNTS)),
)


class Shop:
    """One process's bus and what its handlers need."""

    def __init__(self, settings: Settings, role: str) -> None:
        self.settings = settings
        self.chance = random.Random(f"{settings.seed} {os.getpid()}")
        self._effects: int | None = None
        url = make_url(settings.database)
        database: Any = settings.database
        if url.get_backend_name() == "postgresql":
            # the connections of workers are told apart by the name, to be terminated
            database = create_async_engine(
                url,
                connect_args={"server_settings": {"application_name": f"shop {role}"}},
                pool_size=5,
                max_overflow=0,  # several of these processes share a server with other tests
            )
        self.bus = EventBus(
            database,
            create_tables=True,
            deliver=role == "worker",
            lease=settings.lease,
            in_flight=settings.in_flight,
            poll_interval=0.05,
        )
        self._subscribe()

    def _subscribe(self) -> None:
        again = Retry(max_attempts=50, first=0.02, longest=0.5)
        few = Retry(max_attempts=self.settings.attempts, first=0.02, longest=0.5)
        subscribe = self.bus.subscribe
        subscribe(TicketIssued, self.mail, name="mail", retry=again, lanes=4)
        subscribe(TicketIssued, self.letters, name="letters", retry=again, lanes=4, ordered_by="account")
        subscribe(TicketIssued, self.flaky, name="flaky", retry=again, lanes=2)
        subscribe(TicketIssued, self.risky, name="risky", retry=few, lanes=2)
        subscribe(TicketIssued, self.book, name="book", retry=again, lanes=4)
        subscribe(TicketIssued, self.ledger, name="ledger", retry=again, lanes=4, ordered_by="account")
        if self.settings.hears_all:
            subscribe(DomainEvent, self.everything, name="everything", retry=again, lanes=2)

    # --- handlers ---------------------------------------------------------------------------------------------------

    async def mail(self, event: TicketIssued, context: EventContext) -> None:
        if event.act == "block":
            time.sleep(1.5 * self.settings.lease)  # noqa: ASYNC251 - that is the fault
        await self._work()
        self._write("mail", event, context)

    async def letters(self, event: TicketIssued, context: EventContext) -> None:
        await self._work()
        self._fail(self.settings.failing)
        self._write("letters", event, context)

    async def flaky(self, event: TicketIssued, context: EventContext) -> None:
        self._fail(4 * self.settings.failing)
        await self._work()
        self._write("flaky", event, context)

    async def risky(self, event: TicketIssued, context: EventContext) -> None:
        await self._work()
        if event.act == "die":
            os.kill(os.getpid(), signal.SIGKILL)
        self._write("risky", event, context)

    async def everything(self, event: DomainEvent, context: EventContext) -> None: ...

    async def book(self, event: TicketIssued, session: AsyncSession) -> None:
        await self._insert("book", event, session)
        if event.act == "block":
            time.sleep(1.5 * self.settings.lease)  # noqa: ASYNC251 - that is the fault
        await self._work()

    async def ledger(self, event: TicketIssued, session: AsyncSession) -> None:
        await self._insert("ledger", event, session)
        await self._work()
        self._fail(self.settings.failing)

    async def _work(self) -> None:
        await asyncio.sleep(self.chance.uniform(0, 2 * self.settings.work))

    def _fail(self, rate: float) -> None:
        if self.chance.random() < rate:
            raise RuntimeError("at random")

    def _write(self, handler: str, event: TicketIssued, context: EventContext) -> None:
        if self._effects is None:
            path = Path(self.settings.folder) / f"effects.{os.getpid()}"
            self._effects = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        # one clock for all processes of this machine, and none of those that the faults shift
        now = time.clock_gettime_ns(time.CLOCK_MONOTONIC)
        line = f"{handler} {context.idempotency_key} {event.event_id} {event.account} {event.sequence} {now}\n"
        os.write(self._effects, line.encode())

    @staticmethod
    async def _insert(handler: str, event: TicketIssued, session: AsyncSession) -> None:
        await session.execute(
            text(
                "INSERT INTO effect SELECT CAST(:handler AS VARCHAR(20)), CAST(:event_id AS VARCHAR(36)), "
                "CAST(:account AS INTEGER), CAST(:sequence AS INTEGER), (SELECT max(e.sequence) FROM effect e "
                "WHERE e.handler = CAST(:handler AS VARCHAR(20)) AND e.account = CAST(:account AS INTEGER))"
            ),
            {
                "handler": handler,
                "event_id": str(event.event_id),
                "account": event.account,
                "sequence": event.sequence,
            },
        )

    # --- publishing -------------------------------------------------------------------------------------------------

    async def publish(self) -> None:
        stop = asyncio.Event()
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
        committed = 0
        async with self.bus:
            while not stop.is_set():
                try:
                    async with AsyncSession(self.bus.engine) as session, session.begin():
                        await self._trade(session, committed + 1)
                except _Undone:
                    continue
                except NOT_TAKEN as error:
                    sys.stderr.write(f"not taken: {type(error).__name__}: {str(error)[:200]}\n")
                    await asyncio.sleep(self.chance.uniform(0.02, 0.2))
                    continue
                committed += 1
                if committed == self.settings.transactions:
                    return
                await asyncio.sleep(self.chance.uniform(0, 2 * self.settings.pause))

    async def _trade(self, session: AsyncSession, number: int) -> None:
        chance, settings = self.chance, self.settings
        if settings.act and number % settings.act_every == 0:
            await self._sell(session, -1 if settings.act == "die" else chance.randrange(ACCOUNTS), settings.act)
            return
        # in order, for two transactions to wait for each other never
        for account in sorted(chance.choices(range(ACCOUNTS), k=chance.randint(1, 3))):
            if chance.random() < 0.8:
                await self._sell(session, account)
                continue
            try:
                async with session.begin_nested():
                    await self._sell(session, account)
                    if chance.random() < 0.5:
                        raise _Undone
            except _Undone:
                continue
        if settings.hold and number % 10 == 0:
            await asyncio.sleep(settings.hold)
        if chance.random() < 0.1:
            raise _Undone

    async def _sell(self, session: AsyncSession, account: int, act: str = "") -> None:
        sequence = await session.scalar(
            text("UPDATE account SET last = last + 1 WHERE id = :account RETURNING last"), {"account": account}
        )
        assert isinstance(sequence, int)
        event = TicketIssued(account=account, sequence=sequence, act=act)
        await session.execute(
            text("INSERT INTO sold VALUES (:event_id, :account, :sequence)"),
            {"event_id": str(event.event_id), "account": account, "sequence": sequence},
        )
        await self.bus.publish(event, session=session)


class _Undone(Exception):
    """A publisher rolls back."""


# --- the process ------------------------------------------------------------------------------------------------------


class _Clock:
    """Shifts what this process takes for the time of day, in the library's modules as everywhere."""

    def __init__(self, ahead: float) -> None:
        self.ahead = ahead
        real, clock = time.time, self

        class Shifted(datetime_module.datetime):
            @classmethod
            def now(cls, tz: datetime_module.tzinfo | None = None) -> Self:
                now = cls.fromtimestamp(real() + clock.ahead, tz)
                assert isinstance(now, cls)
                return now

        time.time = lambda: real() + clock.ahead
        for name in ("store", "lease", "_sqlite", "context"):
            module = importlib.import_module(f"whereupon.{name}")
            if hasattr(module, "datetime"):
                setattr(module, "datetime", Shifted)  # noqa: B010 - no module says that it may be replaced

    def jump(self, seconds: float) -> None:
        self.ahead += seconds


def _end_with_the_parent() -> None:
    def wait() -> None:
        os.read(0, 1)  # sys.stdin's lock would be missed at the end of this process
        os._exit(0)

    threading.Thread(target=wait, daemon=True).start()


def _main() -> Shop | None:
    """The shop of this process, if it was started to be one."""
    if "SHOP" not in os.environ:
        return None
    settings = msgspec.json.decode(os.environ["SHOP"], type=Settings)
    _end_with_the_parent()
    publishes = __name__ == "__main__"
    if settings.clock or settings.jump:
        clock = _Clock(settings.clock)
        signal.signal(signal.SIGUSR1, lambda *_: clock.jump(settings.jump))
    shop = Shop(settings, "publisher" if publishes else "worker")
    if publishes:
        asyncio.run(shop.publish())
    return shop


shop = _main()
if shop is not None:
    bus = shop.bus
