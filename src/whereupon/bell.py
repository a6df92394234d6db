"""Wakes the workers of other processes on PostgreSQL: one rings after its commits, the others hear it.

NOTIFY inside a transaction has all commits of the server wait for each other. So it is sent after the commit, on a
connection that is in no transaction, once for all that was committed in some milliseconds. It is a hint and no more:
whoever misses it finds the events by polling.

A LISTEN connection can be up and hear nothing: behind a pooler in transaction mode, or behind a router that has
forgotten it. So it is believed only while it hears. What it listens to is rung on *another* connection: in transaction
mode a pooler passes on what one sends to oneself, if it happens to take the same server for both.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import re
import secrets
import time
from asyncio import Task
from collections.abc import AsyncIterator, Callable, Collection
from contextlib import asynccontextmanager
from contextvars import Context
from typing import Any, Final

from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from whereupon._postgres import PostgresStore
from whereupon.logs import message_of

BUNDLE: Final = 0.005
"""Seconds between two notifications of one process, at least."""
SILENCE: Final = 10.0
"""Seconds without a sound after which a listener has itself rung, to know that it hears."""
PATIENCE: Final = 3.0
"""Seconds in which it must hear that."""
LONGEST_PAUSE: Final = 60.0
"""Seconds between two tries to listen, at most."""

_ANY, _PROOF = "", "?"
_MOST: Final = 7_900
"""Bytes of a payload; the server refuses 8,000."""
_PLAIN: Final = re.compile(r"[\w.:/-]+", re.ASCII)
_debug: Final = logging.getLogger("whereupon").debug


def channel_of(database_id: str) -> str:
    """The channel of one set of tables: a database may hold several, in schemas of their own."""
    return "whereupon_" + re.sub(r"[^0-9a-z]", "", database_id.lower())[:40]


def payload_of(types: Collection[str] | None) -> str:
    """The stored types of what was committed; empty for any, also if they are too many or too odd to be told."""
    if types is None or not all(_PLAIN.fullmatch(name) for name in types):
        return _ANY
    payload = ",".join(sorted(types))
    return payload if len(payload) <= _MOST else _ANY


def types_in(payload: str) -> frozenset[str] | None:
    """The reverse of `payload_of`."""
    return frozenset(payload.split(",")) if payload else None


_BY: Final = "|"
"""Stands between who rang and what it told."""


class Ringer:
    """Notifies the workers of other processes that events were committed. Belongs to the bus's loop."""

    def __init__(self, store: PostgresStore) -> None:
        self.id = secrets.token_hex(4)
        """By which its own process knows what it rang itself."""
        self.channel = ""
        """Set once the database is known, before anything is rung."""
        self._store = store
        self._pending: set[str] | None = set()
        """The types to tell of; None for any."""
        self._pool: Any = None
        self._task: Task[None] | None = None

    def ring(self, types: Collection[str] | None) -> None:
        """Have it told, soon, that events of these stored types were committed. Does not raise, does not wait."""
        self._pending = None if types is None or self._pending is None else self._pending | set(types)
        self._pool = self._store.own.pool
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._tell(), context=Context())

    async def flush(self, timeout: float = 1.0) -> None:
        """Send what waits to be sent, so many seconds at most."""
        task = self._task
        if task is not None and not task.done():
            await asyncio.wait([task], timeout=timeout)
        self.forget()
        if task is not None and not task.done():
            task.cancel()
            await asyncio.wait([task])

    def forget(self) -> None:
        """Drop what was not sent: its event loop has ended, or the database is away."""
        self._task, self._pending = None, set()

    async def _tell(self) -> None:
        while self._has_news:
            await self._tell_once()
            await asyncio.sleep(BUNDLE)

    @property
    def _has_news(self) -> bool:
        return self._pending is None or bool(self._pending)

    async def _tell_once(self) -> None:
        if not self._has_news:
            return
        payload = payload_of(self._pending)
        self._pending = set()
        if self._store.own.pool is not self._pool:
            return  # the engine was disposed of since: a connection made now would be left to nobody
        try:
            await self._send(payload)
        except Exception as error:
            _debug("no worker was notified of %r: %s. They find it by polling", payload, message_of(error))

    async def prove(self) -> None:
        """Ring for listeners that want to know whether they hear. Raises what the driver raises."""
        await self._send(_PROOF)

    async def _send(self, payload: str) -> None:
        """Sent as a plain query, on the driver's own connection: one round trip, and no transaction or statement."""
        query = f"NOTIFY \"{self.channel}\", '{self.id}{_BY}{payload}'"
        for last in (False, True):
            pool = self._store.own.pool  # before connecting: the engine may be disposed of while that goes on
            async with self._store.autocommit.connect() as connection:
                driver = await _driver_of(connection)
                try:
                    await driver.execute(query)
                except Exception:
                    await connection.invalidate()
                    if last:
                        raise
                    continue  # one of a pool may have been closed by the server long ago
                if self._store.own.pool is not pool:
                    await connection.invalidate()
                return


class Deaf(Exception):
    """A listener that does not hear what is rung."""


class Listener:
    """The one LISTEN connection of a worker process: made anew when it is lost, or does not prove that it hears.

    `engine` is its own, and disposed of by `stop`. `on_ring` is called with the stored types that others have
    committed, None for any.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        ringer: Ringer,
        *,
        on_ring: Callable[[frozenset[str] | None], None],
        log: Callable[..., None],
        poll_interval: float,
    ) -> None:
        self._engine = engine
        self._ringer = ringer
        self._on_ring = on_ring
        self._log = log
        self._poll_interval = poll_interval
        self._shown_url = engine.url.render_as_string(hide_password=True)
        self._task: Task[None] | None = None
        self._stirred = asyncio.Event()
        """Set when something is heard, and when the connection ends."""
        self._heard_at = 0.0
        self._end: str | None = None
        """Why the connection ended."""
        self._troubled = False
        """Whether it was said that it does not hear."""
        self.hears = False
        """Whether it has proven to hear, and not failed since."""

    def start(self) -> None:
        self._task = asyncio.get_running_loop().create_task(self._run(), context=Context())

    async def stop(self) -> None:
        task, self._task = self._task, None
        if task is not None:
            task.cancel()
            await asyncio.wait([task])
        await self._engine.dispose()

    async def _run(self) -> None:
        failures = 0
        while True:
            try:
                await self._listen()
            except Exception as error:
                failures = 1 if self.hears else failures + 1
                self.hears = False
                wait = random.uniform(0.5, 1) * min(LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))
                if isinstance(error, Deaf):
                    wait = max(wait, random.uniform(0.5, 1) * LONGEST_PAUSE / 4)
                self._say(error, wait)
                await asyncio.sleep(wait)

    def _say(self, error: Exception, wait: float) -> None:
        if self._troubled:
            return
        self._troubled = True
        polls = f"Until it does, events of other processes are found by polling, every {self._poll_interval:g} s"
        if isinstance(error, Deaf):
            self._log(
                "warning",
                "listener_deaf",
                database=self._shown_url,
                error_message=f"LISTEN through {self._shown_url} hears no NOTIFY: it is behind a pooler in transaction "
                f"mode (PgBouncer), or in another database than the bus's. {polls}. Give the bus a URL that leads "
                'straight to the server: EventBus(…, listen_url="postgresql+asyncpg://…")',
            )
        else:
            self._log(
                "warning",
                "listener_lost",
                database=self._shown_url,
                error_type=type(error).__name__,
                error_message=f"{message_of(error)}. {polls}",
                retry_in_seconds=round(wait, 2),
            )

    async def _listen(self) -> None:
        """Listen on a new connection until it ends or is silent; raises why."""
        self._end, self._heard_at = None, 0.0
        engine = AsyncEngine(self._engine.sync_engine.execution_options(isolation_level="AUTOCOMMIT"))
        async with engine.connect() as connection:
            try:
                driver = await _driver_of(connection)
                listening = _with_asyncpg if self._engine.driver == "asyncpg" else _with_psycopg
                async with listening(driver, self._ringer.channel, self._hear, self._ended):
                    await self._prove_to_hear()
                    self.hears = True
                    if self._troubled:
                        self._troubled = False
                        self._log("info", "listener_back", database=self._shown_url)
                    self._on_ring(None)  # what was committed while nobody listened
                    while True:
                        await self._be_silent()
                        await self._prove_to_hear()
            finally:
                await connection.invalidate()  # nobody else is to have one that listens

    def _hear(self, payload: str) -> None:
        self._heard_at = time.monotonic()
        self._stirred.set()
        by, _, told = payload.rpartition(_BY)
        if told != _PROOF and by != self._ringer.id:
            self._on_ring(types_in(told))

    def _ended(self, why: str) -> None:
        self._end = why
        self._stirred.set()

    async def _stirs(self, within: float) -> bool:
        """Wait until something is heard. Raises `ConnectionError` if the connection ends."""
        self._stirred.clear()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                if self._end is None:
                    await self._stirred.wait()
        if self._end is not None:
            raise ConnectionError(self._end)
        return self._stirred.is_set()

    async def _be_silent(self) -> None:
        """Return after some seconds without a sound; other listeners are to ask at another time."""
        silence = random.uniform(0.75, 1.25) * SILENCE
        while (left := self._heard_at + silence - time.monotonic()) > 0:
            await self._stirs(left)

    async def _prove_to_hear(self) -> None:
        self._stirred.clear()
        before = self._heard_at
        await self._ringer.prove()
        if self._heard_at == before and not await self._stirs(PATIENCE):
            raise Deaf("nothing was heard") if before == 0 else ConnectionError("it went silent")


def _stay(pid: int) -> str:
    """Has the server (14 and newer) not end the session for its idleness; but none that a pooler shares out."""
    return (
        "SELECT set_config(name, '0', false) FROM pg_settings "
        f"WHERE name = 'idle_session_timeout' AND pg_backend_pid() = {pid:d}"
    )


@asynccontextmanager
async def _with_asyncpg(
    driver: Any, channel: str, hear: Callable[[str], None], ended: Callable[[str], None]
) -> AsyncIterator[None]:
    def heard(_connection: Any, _pid: int, _channel: str, payload: object) -> None:
        hear(str(payload))

    def terminated(_connection: Any) -> None:
        ended("the server closed the connection")

    driver.add_termination_listener(terminated)
    await driver.execute(_stay(driver.get_server_pid()))
    await driver.add_listener(channel, heard)
    try:
        yield
    finally:
        driver.remove_termination_listener(terminated)
        # behind a pooler the server's session lives on: it should not go on listening for whoever has it next
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1):
                await driver.remove_listener(channel, heard)


@asynccontextmanager
async def _with_psycopg(
    driver: Any, channel: str, hear: Callable[[str], None], ended: Callable[[str], None]
) -> AsyncIterator[None]:
    async def read() -> None:
        try:
            async for notification in driver.notifies():
                hear(notification.payload)
        except Exception as error:
            ended(message_of(error))
        else:
            ended("the connection was closed")

    await driver.execute(_stay(driver.info.backend_pid))
    await driver.execute(f'LISTEN "{channel}"')
    reader = asyncio.get_running_loop().create_task(read())
    try:
        yield
    finally:
        reader.cancel()
        await asyncio.wait([reader])
        with contextlib.suppress(Exception):
            async with asyncio.timeout(1):
                await driver.execute(f'UNLISTEN "{channel}"')


async def _driver_of(connection: AsyncConnection) -> Any:
    """The connection of asyncpg or psycopg; both execute a text as a plain query."""
    return (await connection.get_raw_connection()).driver_connection
