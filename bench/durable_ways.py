"""The ways of publishing durably that bench/durable.py compares: this package and others, each as its own docs say.

A way keeps what it needs in one database that is empty when `prepare` is called. Events are numbered from 0; a handler
is called with the number and nothing else, so that every package is asked for the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, ClassVar

from whereupon import DomainEvent

Mark = Callable[[], None]
"""Called right before the commit of a transaction."""


class CardIssued(DomainEvent):
    number: int


class Body:
    """What a handler does, as an async function and as a plain one; `number` is the event's."""

    def __init__(self, plain: Callable[[int], None], wait: float = 0.0) -> None:
        self.plain = plain
        self.wait = wait
        """Seconds that the handler waits for something outside."""

    async def run(self, number: int) -> None:
        self.plain(number)
        if self.wait:
            await asyncio.sleep(self.wait)

    def run_plain(self, number: int) -> None:
        self.plain(number)
        if self.wait:
            time.sleep(self.wait)


class Way:
    """One package on one database."""

    name: ClassVar[str]
    package: ClassVar[str | None] = None
    most: ClassVar[int | None] = None
    """Events that a drain is measured with, at most: it would take minutes otherwise."""
    in_transaction: ClassVar[bool] = True
    """Whether an event can be published in the application's own transaction."""
    crosses: ClassVar[bool] = True
    """Whether a worker in another process delivers."""
    note: ClassVar[str] = ""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        self.url = url
        """`postgresql://…` or the path of an SQLite file."""
        self.options = options

    @property
    def tuning(self) -> str:
        """What was set for a drain, for the table."""
        return ""

    async def prepare(self, handlers: int) -> None:
        """Make the tables."""
        raise NotImplementedError

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        """Publish these, owed to so many handlers, and commit: `at_once` in a single transaction."""
        raise NotImplementedError

    async def connect(self) -> None:
        """What needs no events and takes time: connections, imports. Called before a clock starts."""

    def deliver(self, bodies: Sequence[Body]) -> AbstractAsyncContextManager[Any]:
        """Deliver to these handlers until the block is left."""
        raise NotImplementedError

    def clients(self, number: int) -> AbstractAsyncContextManager[list[Client]]:
        """So many clients that run transactions of one INSERT."""
        raise NotImplementedError

    async def close(self) -> None:
        pass


class Client:
    """Runs transactions, one after the other, on a connection of its own."""

    async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
        """One INSERT into `app_order`, and the event if wanted; `mark()` is called right before the commit."""
        raise NotImplementedError


def batches(numbers: range, size: int) -> Iterator[range]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


# --- whereupon ----------------------------------------------------------------------------------------------------------


class Whereupon(Way):
    name = "whereupon"

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        self.bus: Any = None

    @property
    def async_url(self) -> str:
        if "://" not in self.url:
            return f"sqlite+aiosqlite:///{self.url}"
        return self.url.replace("postgresql://", "postgresql+asyncpg://")

    @property
    def tuning(self) -> str:
        return f"in_flight={self.options.get('in_flight', 100):,}"

    def _make_bus(self, bodies: Sequence[Body], *, deliver: bool) -> Any:
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import AsyncSession

        from whereupon import EventBus

        named = {key: self.options[key] for key in ("in_flight", "lease") if key in self.options}
        bus = EventBus(self.async_url, deliver=deliver, **named)
        concurrency = {"concurrency": self.options["concurrency"]} if "concurrency" in self.options else {}
        for place, body in enumerate(bodies):
            if batch := self.options.get("transactional"):
                insert = text("INSERT INTO app_effect (number) VALUES (:number)")

                def transactional(body: Body = body, insert: Any = insert) -> Any:
                    async def handler(event: CardIssued, session: AsyncSession) -> None:
                        await session.execute(insert, {"number": event.number})
                        await body.run(event.number)

                    return handler

                bus.subscribe(CardIssued, transactional(), name=f"handler_{place}", batch=batch, **concurrency)
            else:

                def durable(body: Body = body) -> Any:
                    if body.wait:

                        async def waiting(event: CardIssued) -> None:
                            await body.run(event.number)

                        return waiting
                    plain = body.plain

                    async def handler(event: CardIssued) -> None:
                        plain(event.number)

                    return handler

                bus.subscribe(CardIssued, durable(), name=f"handler_{place}", **concurrency)
        return bus

    async def prepare(self, handlers: int) -> None:
        from sqlalchemy import text

        bus = self._make_bus([Body(lambda number: None)] * handlers, deliver=False)
        await bus.create_tables()
        async with bus, bus.engine.begin() as connection:
            await connection.execute(text("CREATE TABLE app_order (number BIGINT, total BIGINT)"))
            await connection.execute(text("CREATE TABLE app_effect (number BIGINT)"))

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        from sqlalchemy.ext.asyncio import async_sessionmaker

        bus = self._make_bus([Body(lambda number: None)] * handlers, deliver=False)
        async with bus:
            sessions = async_sessionmaker(bus.engine)
            for some in batches(numbers, len(numbers) if at_once else 1000):
                events = [CardIssued(number=number) for number in some]
                async with sessions.begin() as session:
                    await bus.publish(*events, session=session)

    async def connect(self) -> None:
        pass

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        self.bus = self._make_bus(bodies, deliver=True)
        async with self.bus:
            yield self.bus

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import async_sessionmaker

        insert = text("INSERT INTO app_order (number, total) VALUES (:number, :total)")
        here = self.bus is not None
        bus = self.bus if here else self._make_bus([Body(lambda number: None)], deliver=False)
        sessions = async_sessionmaker(bus.engine, expire_on_commit=False)

        class SessionClient(Client):
            async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
                async with sessions() as session:
                    await session.execute(insert, {"number": number, "total": 42})
                    if publish:
                        await bus.publish(CardIssued(number=number), session=session)
                    mark()
                    await session.commit()

        async with contextlib.AsyncExitStack() as stack:
            if not here:
                await stack.enter_async_context(bus)
            yield [SessionClient() for _ in range(number)]


# --- txoutbox -----------------------------------------------------------------------------------------------------------


class _AsyncpgClient(Client):
    def __init__(self, connection: Any, publish: Callable[[Any, int], Any]) -> None:
        self.connection = connection
        self.publish = publish

    async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
        async with self.connection.transaction():
            await self.connection.execute("INSERT INTO app_order (number, total) VALUES ($1, $2)", number, 42)
            if publish:
                await self.publish(self.connection, number)
            mark()


class _OnAsyncpg(Way):
    """What the packages that are driven by asyncpg have in common."""

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        self.pool: Any = None

    async def connect(self) -> None:
        import asyncpg

        if self.pool is None:
            self.pool = await asyncpg.create_pool(self.url, min_size=4, max_size=12)

    async def app_tables(self) -> None:
        await self.pool.execute("CREATE TABLE app_order (number BIGINT, total BIGINT)")

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        import asyncpg

        await self.connect()
        connections = [await asyncpg.connect(self.url) for _ in range(number)]
        try:
            yield [_AsyncpgClient(connection, self.publish) for connection in connections]
        finally:
            for connection in connections:
                await connection.close()

    async def publish(self, connection: Any, number: int) -> None:
        raise NotImplementedError

    async def close(self) -> None:
        if self.pool is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.pool.close(), 5)


class TxOutbox(_OnAsyncpg):
    name = "txoutbox"
    package = "txoutbox"

    @property
    def batch(self) -> int:
        return int(self.options.get("batch", 1000))

    @property
    def tuning(self) -> str:
        return f"batch_size={self.batch:,}, concurrency=100, strict_ordering=False"

    def _storage(self) -> Any:
        from txoutbox.adapters.postgres import PostgresStorage

        return PostgresStorage(self.pool, strict_ordering=False, notify_channel="outbox")

    async def prepare(self, handlers: int) -> None:
        await self.connect()
        await self._storage().create_schema()
        await self.app_tables()

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        await self.connect()
        async with self.pool.acquire() as connection, connection.transaction():
            # its own insert() is one statement a message; stored is what that stores
            await connection.executemany(
                "INSERT INTO outbox (topic, key, payload, headers) VALUES ($1, NULL, $2, '{}')",
                [
                    (f"handler_{place}", json.dumps({"number": number}).encode())
                    for number in numbers
                    for place in range(handlers)
                ],
            )

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        from txoutbox import OutboxMessage, Relay, RelayConfig

        by_topic = {f"handler_{place}": body for place, body in enumerate(bodies)}

        async def publish(message: OutboxMessage) -> None:
            await by_topic[message.topic].run(message.json()["number"])

        await self.connect()
        storage = self._storage()
        seconds = self.options.get("lease", 60)
        config = RelayConfig(
            batch_size=self.batch,
            concurrency=100,
            lease=timedelta(seconds=seconds),
            publish_timeout=min(5.0, seconds / (self.batch / 100)),
            poll_max=self.options.get("poll_max", 5.0),
        )
        relay = Relay(storage, publish, config=config)
        async with await storage.listen(relay.wake), relay:
            yield relay

    async def publish(self, connection: Any, number: int) -> None:
        await self._storage().insert(connection, "handler_0", {"number": number})


class TxOutboxSqlite(Way):
    name = "txoutbox"
    package = "txoutbox"

    @property
    def batch(self) -> int:
        return int(self.options.get("batch", 1000))

    @property
    def tuning(self) -> str:
        return f"batch_size={self.batch:,}, concurrency=100, strict_ordering=False"

    def _storage(self) -> Any:
        from txoutbox.adapters.sqlite import SqliteStorage

        return SqliteStorage(self.url, strict_ordering=False)

    async def prepare(self, handlers: int) -> None:
        storage = self._storage()
        storage.create_schema()
        storage.close()

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        storage = self._storage()
        connection = sqlite3.connect(self.url)
        with connection:
            for number in numbers:
                for place in range(handlers):
                    storage.insert(connection, f"handler_{place}", {"number": number})
        connection.close()
        storage.close()

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        from txoutbox import OutboxMessage, Relay, RelayConfig

        by_topic = {f"handler_{place}": body for place, body in enumerate(bodies)}

        async def publish(message: OutboxMessage) -> None:
            await by_topic[message.topic].run(message.json()["number"])

        storage = self._storage()
        async with Relay(storage, publish, config=RelayConfig(batch_size=self.batch, concurrency=100)) as relay:
            yield relay
        storage.close()


# --- pgqueuer -----------------------------------------------------------------------------------------------------------


class PgQueuerWay(_OnAsyncpg):
    name = "pgqueuer"
    package = "pgqueuer"

    @property
    def batch(self) -> int:
        return int(self.options.get("batch", 500))

    @property
    def tuning(self) -> str:
        return f"batch_size={self.batch:,}"

    async def prepare(self, handlers: int) -> None:
        from pgqueuer.queries import Queries

        await self.connect()
        await Queries.from_asyncpg_pool(self.pool).install()
        await self.app_tables()

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        from pgqueuer.db import AsyncpgDriver
        from pgqueuer.queries import Queries

        await self.connect()
        async with self.pool.acquire() as connection, connection.transaction():
            queries = Queries(AsyncpgDriver(connection))
            for some in batches(numbers, 5000):
                names = [f"handler_{place}" for _ in some for place in range(handlers)]
                payloads: list[bytes | None] = [
                    json.dumps({"number": number}).encode() for number in some for _ in range(handlers)
                ]
                await queries.enqueue(names, payloads, [0] * len(names))

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        from pgqueuer import PgQueuer
        from pgqueuer.models import Job

        await self.connect()
        queuer = PgQueuer.from_asyncpg_pool(self.pool)
        for place, body in enumerate(bodies):

            def entry(body: Body) -> Any:
                async def handler(job: Job) -> None:
                    await body.run(json.loads(job.payload or b"")["number"])

                return handler

            queuer.entrypoint(f"handler_{place}")(entry(body))
        lease = timedelta(seconds=self.options.get("lease", 30))
        running = asyncio.create_task(queuer.qm.run(batch_size=self.batch, heartbeat_timeout=lease))
        try:
            yield queuer
        finally:
            queuer.shutdown.set()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(running, 10)

    async def publish(self, connection: Any, number: int) -> None:
        from pgqueuer.db import AsyncpgDriver
        from pgqueuer.queries import Queries

        queries = self._queries.get(connection)
        if queries is None:
            queries = self._queries[connection] = Queries(AsyncpgDriver(connection))
        await queries.enqueue("handler_0", json.dumps({"number": number}).encode())

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        self._queries: dict[Any, Any] = {}


# --- faststream-outbox --------------------------------------------------------------------------------------------------


class FastStreamOutbox(Way):
    name = "faststream-outbox"
    package = "faststream-outbox"

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        from faststream_outbox import make_outbox_table
        from sqlalchemy import MetaData
        from sqlalchemy.ext.asyncio import create_async_engine

        self.metadata = MetaData()
        self.table = make_outbox_table(self.metadata, table_name="outbox")
        self.engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=60)

    @property
    def tuning(self) -> str:
        return "max_workers=10, fetch_batch_size=500, terminal_flush_batch_size=100"

    def _broker(self) -> Any:
        from faststream_outbox import OutboxBroker

        return OutboxBroker(self.engine, outbox_table=self.table, apply_types=False, logger=None)

    async def prepare(self, handlers: int) -> None:
        from faststream_outbox.autovacuum import outbox_autovacuum_ddl
        from sqlalchemy import text

        async with self.engine.begin() as connection:
            await connection.run_sync(self.metadata.create_all)
            await connection.execute(text(outbox_autovacuum_ddl("outbox")))
            await connection.execute(text("CREATE TABLE app_order (number BIGINT, total BIGINT)"))

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        broker = self._broker()
        await broker.connect()
        async with self.engine.begin() as connection:
            for some in batches(numbers, 2000):
                for place in range(handlers):
                    await broker.publish_batch(
                        *[{"number": number} for number in some], queue=f"handler_{place}", session=connection
                    )

    async def connect(self) -> None:
        async with self.engine.connect():
            pass

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        broker = self._broker()
        for place, body in enumerate(bodies):

            def subscriber(body: Body) -> Any:
                async def handler(message: dict[str, Any]) -> None:
                    await body.run(message["number"])

                return handler

            broker.subscriber(
                f"handler_{place}",
                max_workers=10,
                fetch_batch_size=500,
                terminal_flush_batch_size=100,
                lease_ttl_seconds=self.options.get("lease", 60.0),
                min_fetch_interval=0.05,
                max_fetch_interval=1.0,
            )(subscriber(body))
        async with broker:
            yield broker

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        from sqlalchemy import text
        from sqlalchemy.ext.asyncio import async_sessionmaker

        insert = text("INSERT INTO app_order (number, total) VALUES (:number, :total)")
        broker = self._broker()
        await broker.connect()
        sessions = async_sessionmaker(self.engine, expire_on_commit=False)

        class SessionClient(Client):
            async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
                async with sessions() as session:
                    await session.execute(insert, {"number": number, "total": 42})
                    if publish:
                        await broker.publish({"number": number}, queue="handler_0", session=session)
                    mark()
                    await session.commit()

        yield [SessionClient() for _ in range(number)]

    async def close(self) -> None:
        await self.engine.dispose()


# --- the shape that most have, as a sketch ------------------------------------------------------------------------------


class RowPerDelivery(_OnAsyncpg):
    """A row for each delivery, claimed with SKIP LOCKED under a lease, updated when done: as small as it can be."""

    name = "a row per delivery (sketch)"

    async def prepare(self, handlers: int) -> None:
        await self.connect()
        await self.pool.execute(
            """
            CREATE TABLE sketch (
                id BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY, handler SMALLINT NOT NULL, payload BYTEA NOT NULL,
                state SMALLINT NOT NULL DEFAULT 0, lease_until TIMESTAMPTZ
            );
            CREATE INDEX sketch_pending ON sketch (id) WHERE state < 2
            """
        )
        await self.app_tables()

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        await self.connect()
        async with self.pool.acquire() as connection, connection.transaction():
            await connection.executemany(
                "INSERT INTO sketch (handler, payload) VALUES ($1, $2)",
                [(place, json.dumps({"number": n}).encode()) for n in numbers for place in range(handlers)],
            )

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        await self.connect()
        running = asyncio.create_task(self._run(bodies))
        try:
            yield running
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    async def _run(self, bodies: Sequence[Body]) -> None:
        async with self.pool.acquire() as connection:
            while True:
                rows = await connection.fetch(
                    """
                    UPDATE sketch SET state = 1, lease_until = now() + interval '30 s' WHERE id IN (
                        SELECT id FROM sketch WHERE state < 2 AND (lease_until IS NULL OR lease_until < now())
                        ORDER BY id LIMIT 500 FOR UPDATE SKIP LOCKED
                    ) RETURNING id, handler, payload
                    """
                )
                for row in rows:
                    await bodies[row["handler"]].run(json.loads(row["payload"])["number"])
                if rows:
                    await connection.execute(
                        "UPDATE sketch SET state = 2, lease_until = NULL WHERE id = ANY($1)", [row["id"] for row in rows]
                    )
                else:
                    await asyncio.sleep(0.01)


POSTGRESQL: dict[str, type[Way]] = {way.name: way for way in (Whereupon, TxOutbox, PgQueuerWay, FastStreamOutbox)}
SQLITE: dict[str, type[Way]] = {way.name: way for way in (Whereupon, TxOutboxSqlite)}
SKETCHES: dict[str, type[Way]] = {RowPerDelivery.name: RowPerDelivery}


def way_of(name: str, url: str, options: dict[str, Any]) -> Way:
    ways = (POSTGRESQL | SKETCHES) if "://" in url else SQLITE
    return ways[name](url, options)
