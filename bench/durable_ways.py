"""The ways of publishing durably that bench/durable.py compares: this package and others, each as its own docs say.

A way keeps what it needs in one database that is empty when `prepare` is called. Events are numbered from 0; a handler
is called with the number and nothing else, so that every package is asked for the same.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import sqlite3
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from datetime import timedelta
from typing import Any, ClassVar
from uuid import uuid4

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
    shares: ClassVar[bool] = True
    """Whether two workers may share what is owed to one handler."""
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


class _SessionClient(Client):
    def __init__(self, sessions: Any, publish: Callable[[Any, int], Any]) -> None:
        from sqlalchemy import text

        self.sessions, self.publish = sessions, publish
        self.insert = text("INSERT INTO app_order (number, total) VALUES (:number, :total)")

    async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
        async with self.sessions() as session:
            await session.execute(self.insert, {"number": number, "total": 42})
            if publish:
                await self.publish(session, number)
            mark()
            await session.commit()


def batches(numbers: range, size: int) -> Iterator[range]:
    for start in range(0, len(numbers), size):
        yield numbers[start : start + size]


# --- whereupon --------------------------------------------------------------------------------------------------------


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
        from sqlalchemy import BigInteger, Column, text
        from sqlalchemy.ext.asyncio import AsyncSession
        from sqlalchemy.orm import declarative_base

        from whereupon import EventBus

        named = {key: self.options[key] for key in ("in_flight", "lease") if key in self.options}
        bus = EventBus(self.async_url, deliver=deliver, **named)
        concurrency = {"concurrency": self.options["concurrency"]} if "concurrency" in self.options else {}
        for place, body in enumerate(bodies):
            if batch := self.options.get("transactional"):
                insert = text("INSERT INTO app_effect (number) VALUES (:number)")

                def executing(body: Body = body, insert: Any = insert) -> Any:
                    async def handler(event: CardIssued, session: AsyncSession) -> None:
                        await session.execute(insert, {"number": event.number})
                        await body.run(event.number)

                    return handler

                def adding(body: Body = body) -> Any:
                    class Effect(declarative_base()):  # type: ignore[misc]
                        __tablename__ = "app_effect"
                        number = Column(BigInteger, primary_key=True, autoincrement=False)

                    async def handler(event: CardIssued, session: AsyncSession) -> None:
                        session.add(Effect(number=event.number))
                        await body.run(event.number)

                    return handler

                called = adding() if self.options.get("adding") else executing()
                bus.subscribe(CardIssued, called, name=f"handler_{place}", batch=batch, **concurrency)
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
        """Import what a bus and a driver need; connections are made, and statements compiled, as the clock runs."""
        bus = self._make_bus([], deliver=False)
        await bus.revision()
        await bus.engine.dispose()

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        self.bus = self._make_bus(bodies, deliver=True)
        async with self.bus:
            yield self.bus

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        from sqlalchemy.ext.asyncio import async_sessionmaker

        here = self.bus is not None
        bus = self.bus if here else self._make_bus([Body(lambda number: None)], deliver=False)
        sessions = async_sessionmaker(bus.engine, expire_on_commit=False)

        async def publish(session: Any, number: int) -> None:
            await bus.publish(CardIssued(number=number), session=session)

        async with contextlib.AsyncExitStack() as stack:
            if not here:
                await stack.enter_async_context(bus)
            yield [_SessionClient(sessions, publish) for _ in range(number)]


# --- txoutbox ---------------------------------------------------------------------------------------------------------


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


# --- pgqueuer ---------------------------------------------------------------------------------------------------------


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


# --- faststream-outbox ------------------------------------------------------------------------------------------------


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
        return f"max_workers=10, fetch_batch_size={self.batch}, terminal_flush_batch_size={min(100, self.batch)}"

    @property
    def batch(self) -> int:
        return int(self.options.get("batch", 500))

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
                fetch_batch_size=self.batch,
                terminal_flush_batch_size=min(100, self.batch),
                lease_ttl_seconds=self.options.get("lease", 60.0),
                min_fetch_interval=0.05,
                max_fetch_interval=1.0,
            )(subscriber(body))
        async with broker:
            yield broker

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        from sqlalchemy.ext.asyncio import async_sessionmaker

        broker = self._broker()
        await broker.connect()

        async def publish(session: Any, number: int) -> None:
            await broker.publish({"number": number}, queue="handler_0", session=session)

        sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        yield [_SessionClient(sessions, publish) for _ in range(number)]

    async def close(self) -> None:
        await self.engine.dispose()


# --- omni-box ---------------------------------------------------------------------------------------------------------


class OmniBox(Way):
    name = "omni-box"
    package = "omni-box"

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        from omni_box import OmniBoxDomainService
        from omni_box.infra.storage.postgres import OutboxEventDBBase
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
        from sqlalchemy.orm import DeclarativeBase

        class Base(DeclarativeBase):
            pass

        class OutboxEventDB(OutboxEventDBBase, Base):
            __tablename__ = "outbox_events"

        self.model, self.metadata = OutboxEventDB, Base.metadata
        self.engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=12)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)
        self.domain = OmniBoxDomainService()

    @property
    def tuning(self) -> str:
        return f"batch_size={self.batch:,}, a key for each event"

    @property
    def batch(self) -> int:
        return int(self.options.get("batch", 1000))

    def _repository(self, session: Any) -> Any:
        from omni_box.infra.storage.postgres import PostgresOutboxRepository

        return PostgresOutboxRepository(session, model_class=self.model)

    def _event(self, number: int, place: int) -> Any:
        return self.domain.create_outbox_event(
            aggregate_type="card",
            aggregate_id=uuid4(),
            event_type="card.issued",
            topic=f"handler_{place}",
            partition_key=str(number),  # it hands out one event of a key at a time
            payload={"number": number},
        )

    async def prepare(self, handlers: int) -> None:
        from sqlalchemy import text

        async with self.engine.begin() as connection:
            await connection.run_sync(self.metadata.create_all)
            await connection.execute(text("CREATE TABLE app_order (number BIGINT, total BIGINT)"))

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        async with self.sessions() as session, session.begin():
            repository = self._repository(session)
            for some in batches(numbers, 500):
                await repository.bulk_create([self._event(n, place) for n in some for place in range(handlers)])

    async def connect(self) -> None:
        async with self.engine.connect():
            pass

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        from omni_box import EventPublisher, OutboxPublisher

        by_topic = {f"handler_{place}": body for place, body in enumerate(bodies)}

        class Handlers(EventPublisher):  # type: ignore[misc,valid-type]
            async def publish(self, event: Any, repo: Any) -> None:
                await by_topic[event.topic].run(event.payload["number"])

        stop = asyncio.Event()

        async def run() -> None:
            while not stop.is_set():
                async with self.sessions() as session, session.begin():
                    publisher = OutboxPublisher(self._repository(session), Handlers())
                    result = await publisher.publish_batch(worker_id=f"publisher-{os.getpid()}", batch_size=self.batch)
                if not result.processed_event_ids:
                    await asyncio.sleep(0.05)

        running = asyncio.create_task(run())
        try:
            yield running
        finally:
            stop.set()
            await running

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        way = self

        async def publish(session: Any, number: int) -> None:
            await way._repository(session).create(way._event(number, 0))

        yield [_SessionClient(self.sessions, publish) for _ in range(number)]

    async def close(self) -> None:
        await self.engine.dispose()


# --- python-cqrs ------------------------------------------------------------------------------------------------------


class PythonCqrs(Way):
    name = "python-cqrs"
    package = "python-cqrs"
    most = 10_000
    note = "its outbox has no locks, so two of its publishers deliver everything twice"
    shares = False

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        import cqrs
        from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

        self.engine = create_async_engine(url.replace("postgresql://", "postgresql+asyncpg://"), pool_size=12)
        self.sessions = async_sessionmaker(self.engine, expire_on_commit=False)

        def make(number: int, place: int) -> Any:
            return cqrs.NotificationEvent[dict[str, int]](
                event_name="card_issued", topic=f"handler_{place}", payload={"number": number}
            )

        self._event = make
        with contextlib.suppress(KeyError):  # a second way of this process
            cqrs.OutboxedEventMap.register("card_issued", cqrs.NotificationEvent[dict[str, int]])

    @property
    def tuning(self) -> str:
        return "batch_size=500, a commit a batch"

    async def prepare(self, handlers: int) -> None:
        from cqrs.outbox.sqlalchemy import Base
        from sqlalchemy import text

        async with self.engine.begin() as connection:
            await connection.run_sync(Base.metadata.create_all)
            await connection.execute(text("CREATE TABLE app_order (number BIGINT, total BIGINT)"))

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        import cqrs

        async with self.sessions() as session:
            repository = cqrs.SqlAlchemyOutboxedEventRepository(session)
            for number in numbers:
                for place in range(handlers):
                    repository.add(self._event(number, place))
            await repository.commit()

    async def connect(self) -> None:
        async with self.engine.connect():
            pass

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        import cqrs
        from cqrs.message_brokers.protocol import Message, MessageBroker

        by_topic = {f"handler_{place}": body for place, body in enumerate(bodies)}

        class Handlers(MessageBroker):  # type: ignore[misc,valid-type]
            async def send_message(self, message: Message) -> None:
                payload = message.payload
                await by_topic[message.topic].run(payload["payload"]["number"])

        async def run() -> None:
            async with self.sessions() as session:
                producer = cqrs.EventProducer(Handlers(), cqrs.SqlAlchemyOutboxedEventRepository(session))
                async for messages in producer.event_batch_generator(500):
                    for message in messages:
                        await producer.send_message(message)
                    await producer.repository.commit()
                    if not messages:
                        await asyncio.sleep(0.05)

        running = asyncio.create_task(run())
        try:
            yield running
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await running

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        import cqrs

        async def publish(session: Any, number: int) -> None:
            cqrs.SqlAlchemyOutboxedEventRepository(session).add(self._event(number, 0))

        yield [_SessionClient(self.sessions, publish) for _ in range(number)]

    async def close(self) -> None:
        await self.engine.dispose()


# --- procrastinate ----------------------------------------------------------------------------------------------------


class Procrastinate(Way):
    name = "procrastinate"
    package = "procrastinate"
    most = 5_000

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        import procrastinate

        self.app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=url, min_size=4, max_size=12))
        self.opened = False

    @property
    def tuning(self) -> str:
        return "concurrency=10, delete_jobs=always"

    async def connect(self) -> None:
        if not self.opened:
            await self.app.open_async()
            self.opened = True

    def _tasks(self, bodies: Sequence[Body]) -> list[Any]:
        def task(place: int, body: Body) -> Any:
            @self.app.task(name=f"handler_{place}")
            async def handler(number: int) -> None:
                await body.run(number)

            return handler

        return [task(place, body) for place, body in enumerate(bodies)]

    async def prepare(self, handlers: int) -> None:
        import psycopg

        await self.connect()
        await self.app.schema_manager.apply_schema_async()
        async with await psycopg.AsyncConnection.connect(self.url) as connection:
            await connection.execute("CREATE TABLE app_order (number BIGINT, total BIGINT)")

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        await self.connect()
        for some in batches(numbers, len(numbers) if at_once else 1000):
            for place in range(handlers):
                task = self.app.configure_task(f"handler_{place}", allow_unknown=True)
                await task.batch_defer_async(*[{"number": number} for number in some])

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        await self.connect()
        self._tasks(bodies)
        lease = self.options.get("lease", 30)

        async def retry_stalled() -> None:
            """The task that its docs advise; without it nobody delivers what a dead worker held."""
            while True:
                await asyncio.sleep(lease / 2)
                for job in await self.app.job_manager.get_stalled_jobs(seconds_since_heartbeat=lease):
                    await self.app.job_manager.retry_job(job)

        worker = self.app.run_worker_async(
            concurrency=10,
            delete_jobs="always",
            install_signal_handlers=False,
            shutdown_graceful_timeout=2,
            update_heartbeat_interval=lease / 3,
            stalled_worker_timeout=lease,
        )
        running = [asyncio.create_task(worker), asyncio.create_task(retry_stalled())]
        try:
            yield running
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        import psycopg

        await self.connect()
        app = self.app

        class PsycopgClient(Client):
            def __init__(self, connection: Any) -> None:
                self.connection = connection

            async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
                async with self.connection.transaction():
                    await self.connection.execute(
                        "INSERT INTO app_order (number, total) VALUES (%s, %s)", (number, 42), prepare=True
                    )
                    if publish:
                        await app.configure_task(
                            "handler_0", allow_unknown=True, connection=self.connection
                        ).defer_async(number=number)
                    mark()

        connections = [await psycopg.AsyncConnection.connect(self.url, autocommit=True) for _ in range(number)]
        try:
            yield [PsycopgClient(connection) for connection in connections]
        finally:
            for connection in connections:
                await connection.close()

    async def close(self) -> None:
        if self.opened:
            await self.app.close_async()


# --- eventsourcing ----------------------------------------------------------------------------------------------------


class EventSourcing(Way):
    name = "eventsourcing"
    package = "eventsourcing"
    most = 10_000
    in_transaction = False
    shares = False
    note = "it stores its aggregates in transactions of its own, so nothing is published in the application's"

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        from eventsourcing.application import Application
        from eventsourcing.domain import Aggregate, event
        from sqlalchemy import make_url

        address = make_url(url)
        self.env = {
            "PERSISTENCE_MODULE": "eventsourcing.postgres",
            "POSTGRES_DBNAME": str(address.database),
            "POSTGRES_HOST": str(address.host),
            "POSTGRES_PORT": str(address.port),
            "POSTGRES_USER": str(address.username),
            "POSTGRES_PASSWORD": "",
        }

        class Card(Aggregate):
            @event("Issued")
            def __init__(self, number: int) -> None:
                self.number = number

        class Cards(Application):  # type: ignore[type-arg]
            pass

        # events are stored under their class's path, and looked up under it
        module = sys.modules[__name__]
        for cls in (Card, Cards):
            cls.__module__, cls.__qualname__ = __name__, cls.__name__
            setattr(module, cls.__name__, cls)
        for cls in vars(Card).values():
            if isinstance(cls, type):
                cls.__module__, cls.__qualname__ = __name__, f"Card.{cls.__name__}"
        self.card, self.application = Card, Cards

    @property
    def tuning(self) -> str:
        return "a projection for each handler, its position stored with each event"

    async def prepare(self, handlers: int) -> None:
        await asyncio.to_thread(lambda: self.application(env=self.env).close())

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        def run() -> None:
            app = self.application(env=self.env)
            for some in batches(numbers, len(numbers) if at_once else 1000):
                app.save(*[self.card(number) for number in some])
            app.close()

        await asyncio.to_thread(run)

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        from eventsourcing.postgres import PostgresTrackingRecorder
        from eventsourcing.projection import Projection, ProjectionRunner

        def projection(place: int, body: Body) -> type[Any]:
            class Handler(Projection[PostgresTrackingRecorder]):
                name = f"handler_{place}"

                def process_event(self, domain_event: Any, tracking: Any) -> None:  # type: ignore[override]
                    body.run_plain(domain_event.number)
                    self.view.insert_tracking(tracking)

            return Handler

        def start() -> list[Any]:
            return [
                ProjectionRunner(
                    application_class=self.application,
                    projection_class=projection(place, body),
                    view_class=PostgresTrackingRecorder,
                    env=self.env,
                )
                for place, body in enumerate(bodies)
            ]

        runners = await asyncio.to_thread(start)
        try:
            yield runners
        finally:
            for runner in runners:
                await asyncio.to_thread(runner.stop)

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        app = await asyncio.to_thread(lambda: self.application(env=self.env))
        card = self.card

        class SavingClient(Client):
            """Saves one aggregate: its own transaction, the only one it has."""

            async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
                def run() -> None:
                    mark()
                    app.save(card(number))

                await asyncio.to_thread(run)

        yield [SavingClient() for _ in range(number)]
        await asyncio.to_thread(app.close)


# --- django-domain-events ---------------------------------------------------------------------------------------------


class DjangoDomainEvents(Way):
    name = "django-domain-events"
    package = "django-domain-events"
    most = 2_000

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        import dataclasses

        import django
        from django.conf import settings
        from sqlalchemy import make_url

        address = make_url(url)
        settings.configure(
            LOGGING_CONFIG=None,
            USE_TZ=True,
            INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "django_domain_events"],
            DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
            DATABASES={
                "default": {
                    "ENGINE": "django.db.backends.postgresql",
                    "NAME": address.database,
                    "HOST": address.host,
                    "PORT": address.port,
                    "USER": address.username,
                }
            },
            DJANGO_DOMAIN_EVENTS={"BATCH_SIZE": 500, "LEASE_SECONDS": int(options.get("lease", 300))},
        )
        django.setup()
        from django_domain_events import DURABLE, event, receiver

        @event(name="cards.issued")
        @dataclasses.dataclass(frozen=True)
        class Issued:
            number: int

        self.event = Issued
        self.bodies: dict[int, Body] = {}
        self._durable, self._receiver = DURABLE, receiver

    def _receive(self, handlers: int) -> None:
        for place in range(handlers):
            if place not in self.bodies:
                self.bodies[place] = Body(lambda number: None)

                def receive(event: Any, place: int = place) -> None:
                    self.bodies[place].run_plain(event.number)

                def plain(event: Any, receive: Any = receive) -> None:
                    receive(event)

                self._receiver(self.event, mode=self._durable, key=f"handler_{place}")(plain)

    @property
    def tuning(self) -> str:
        return "BATCH_SIZE=500"

    async def prepare(self, handlers: int) -> None:
        def run() -> None:
            from django.core.management import call_command
            from django.db import connection

            call_command("migrate", verbosity=0)
            with connection.cursor() as cursor:
                cursor.execute("CREATE TABLE app_order (number BIGINT, total BIGINT)")
            connection.close()

        await asyncio.to_thread(run)

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        def run() -> None:
            from django.db import connection, transaction
            from django_domain_events import fire

            self._receive(handlers)
            with transaction.atomic():
                for number in numbers:
                    fire(self.event(number))
            connection.close()

        await asyncio.to_thread(run)

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        from django_domain_events.delivery.run_relay import run_relay
        from django_domain_events.delivery.wake import wait_for_work

        self._receive(len(bodies))
        self.bodies.update(enumerate(bodies))
        stop = threading.Event()

        def run() -> None:
            from django.db import connection

            run_relay(worker_id=f"bench-{os.getpid()}", stop=stop.is_set, wait=wait_for_work)
            connection.close()

        running = asyncio.create_task(asyncio.to_thread(run))
        try:
            yield running
        finally:
            stop.set()
            await running

    @asynccontextmanager
    async def clients(self, number: int) -> AsyncIterator[list[Client]]:
        from django.db import connection, transaction
        from django_domain_events import fire

        self._receive(1)
        event = self.event

        class ThreadClient(Client):
            """Django's connections belong to threads: each client has one."""

            def __init__(self) -> None:
                self.thread = ThreadPoolExecutor(1)

            async def transaction(self, number: int, publish: bool, mark: Mark) -> None:
                def run() -> None:
                    with transaction.atomic():
                        with connection.cursor() as cursor:
                            cursor.execute("INSERT INTO app_order (number, total) VALUES (%s, %s)", [number, 42])
                        if publish:
                            fire(event(number))
                        mark()

                await asyncio.get_running_loop().run_in_executor(self.thread, run)

        made = [ThreadClient() for _ in range(number)]
        yield list(made)
        for client in made:
            client.thread.submit(connection.close).result()
            client.thread.shutdown()


# --- huey -------------------------------------------------------------------------------------------------------------


class Huey(Way):
    name = "huey"
    package = "huey"
    most = 10_000
    note = "each of its tasks is put into the queue by a transaction of its own"

    def __init__(self, url: str, options: dict[str, Any]) -> None:
        super().__init__(url, options)
        from huey import SqliteHuey

        self.huey = SqliteHuey(filename=url, results=False)
        self.bodies: dict[int, Body] = {}
        self.tasks: dict[int, Any] = {}

    @property
    def tuning(self) -> str:
        return "4 threads, results=False"

    def _tasks(self, handlers: int) -> None:
        def task(place: int) -> Any:
            @self.huey.task(name=f"handler_{place}")
            def handler(number: int) -> None:
                self.bodies[place].run_plain(number)

            return handler

        for place in range(handlers):
            if place not in self.tasks:
                self.tasks[place] = task(place)

    async def prepare(self, handlers: int) -> None:
        pass

    async def store(self, numbers: range, handlers: int, *, at_once: bool = False) -> None:
        self._tasks(handlers)
        for number in numbers:
            for place in range(handlers):
                self.tasks[place](number)

    @asynccontextmanager
    async def deliver(self, bodies: Sequence[Body]) -> AsyncIterator[Any]:
        self._tasks(len(bodies))
        self.bodies.update(enumerate(bodies))
        consumer = self.huey.create_consumer(
            workers=4,
            worker_type="thread",
            initial_delay=0.01,
            max_delay=0.1,
            periodic=False,
            check_worker_health=False,
        )
        consumer.start()
        try:
            yield consumer
        finally:
            consumer.stop(graceful=True)


# --- the shape that most have, as a sketch ----------------------------------------------------------------------------


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
                        "UPDATE sketch SET state = 2, lease_until = NULL WHERE id = ANY($1)",
                        [row["id"] for row in rows],
                    )
                else:
                    await asyncio.sleep(0.01)


POSTGRESQL: dict[str, type[Way]] = {
    way.name: way
    for way in (
        Whereupon,
        TxOutbox,
        PgQueuerWay,
        FastStreamOutbox,
        OmniBox,
        EventSourcing,
        PythonCqrs,
        Procrastinate,
        DjangoDomainEvents,
    )
}
SQLITE: dict[str, type[Way]] = {way.name: way for way in (Whereupon, TxOutboxSqlite, Huey)}
SKETCHES: dict[str, type[Way]] = {RowPerDelivery.name: RowPerDelivery}


def way_of(name: str, url: str, options: dict[str, Any]) -> Way:
    ways = (POSTGRESQL | SKETCHES) if "://" in url else SQLITE
    return ways[name](url, options)
