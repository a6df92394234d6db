"""A process's lease: what it owns is its own until the lease runs out, by the database's clock.

It is renewed from a thread with an event loop and a connection of its own, so that a handler that blocks the process's
event loop costs no lease. A thread alone would keep a process alive that is stuck for good; so it goes on only while
the loop shows a heartbeat, or has not been silent for longer than its handlers may take. After that it writes down
where every thread stands, and ends the process.
"""

from __future__ import annotations

import asyncio
import contextlib
import faulthandler
import os
import random
import socket
import sys
import threading
import time
from asyncio import AbstractEventLoop, TimerHandle
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID, uuid4

from sqlalchemy import delete, func, insert, text, update
from sqlalchemy.exc import OperationalError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from whereupon.logs import message_of
from whereupon.schema import process
from whereupon.store import LOOK, sibling

EXIT_STUCK: Final = 70
"""The exit status of a process whose event loop was stuck for longer than any of its handlers may take."""
GRACE: Final = 30.0
"""Seconds that the event loop may be silent beyond what its handlers may take."""
FORGOTTEN: Final = 10
"""Leases after which the row of a dead process is deleted."""


class Lease:
    """The row of this process in `whereupon_process`, made by `start` and deleted by `stop`. Belongs to one loop."""

    def __init__(
        self,
        engine: AsyncEngine,
        seconds: float,
        *,
        in_flight: int,
        autocommit: bool,
        log: Callable[..., None],
        on_lost: Callable[[], None],
    ) -> None:
        self.id: UUID = uuid4()
        self._engine = engine
        self._postgres = engine.dialect.name == "postgresql"
        self._autocommit = autocommit
        self._seconds = seconds
        self._in_flight = in_flight
        self._log = log
        self._on_lost = on_lost
        self._until = 0.0
        """Until when what this process owns is its own for sure, by `time.monotonic`."""
        self._allowed: float | None = GRACE
        self._beat_at = time.monotonic()
        self._beating: TimerHandle | None = None
        self._loop: AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._started: asyncio.Future[None] | None = None
        self._end: Callable[[], None] = lambda: None

    @property
    def is_held(self) -> bool:
        """Whether it has not run out, as far as this process can tell: it may have stood still for long."""
        return time.monotonic() < self._until

    def allow(self, longest: float | None) -> None:
        """The event loop may be silent for so many seconds, the longest that a handler may take, and some more.

        None lets it be silent for ever.
        """
        self._allowed = None if longest is None else longest + GRACE

    async def start(self) -> None:
        """Take the lease, and keep it from now on. Raises what the database raises."""
        self._loop = asyncio.get_running_loop()
        self.id = uuid4()
        self._stopping.clear()
        started = self._started = self._loop.create_future()
        self._beat()
        self._thread = threading.Thread(target=self._run, name="whereupon-lease", daemon=True)
        self._thread.start()
        try:
            await started  # the thread may have taken it out of `_started` already
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Give the lease up, and with it whatever this process owns."""
        if self._beating is not None:
            self._beating.cancel()
            self._beating = None
        thread, self._thread = self._thread, None
        if thread is not None:
            self._stopping.set()
            self._end()
            await asyncio.get_running_loop().run_in_executor(None, thread.join, 5.0)

    def _beat(self) -> None:
        assert self._loop is not None
        self._beat_at = time.monotonic()
        self._beating = self._loop.call_later(min(1.0, self._seconds / 6), self._beat)

    # --- in the thread ----------------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            asyncio.run(self._keep())
        except Exception as error:
            self._tell(self._log, "error", "lease_thread_failed", error)

    async def _keep(self) -> None:
        loop, ended = asyncio.get_running_loop(), asyncio.Event()

        def end() -> None:
            with contextlib.suppress(RuntimeError):  # it has ended by itself
                loop.call_soon_threadsafe(ended.set)

        self._end = end
        engine = sibling(self._engine)
        if self._autocommit:
            engine = engine.execution_options(isolation_level="AUTOCOMMIT")
        try:
            await self._renew_until(ended, engine)
        finally:
            with contextlib.suppress(Exception):
                async with asyncio.timeout(2), engine.connect() as connection:
                    await connection.execute(delete(process).where(process.c.id == self.id))
                    await connection.commit()
            await engine.dispose()

    async def _renew_until(self, ended: asyncio.Event, engine: AsyncEngine) -> None:
        failures, tidied = 0, 0.0
        # SQLite's statement goes on waiting for the lock when it is cancelled, and its answer would be missed
        patience = max(1.0, self._seconds / 2) if self._postgres else None
        while not self._stopping.is_set():
            wait = self._seconds / 3
            try:
                async with asyncio.timeout(patience), engine.connect() as connection:
                    began, lost = await self._renew_as_soon_as_may_be(connection)
                    await connection.commit()
                    until, late = began + self._seconds, began > self._until
                    if time.monotonic() - tidied > 60:
                        tidied = time.monotonic()
                        with contextlib.suppress(OperationalError):  # in a minute it is tried again
                            await self._tidy(connection)
                            await connection.commit()
            except Exception as error:
                if self._started is not None and not self._report_started(error):
                    return
                failures += 1
                if failures in (2, 20):
                    self._tell(self._log, "warning", "lease_not_renewed", error)
                wait = random.uniform(0.5, 1) * min(self._seconds / 3, 0.1 * 2 ** min(failures, 10))
            else:
                if self._started is not None:
                    self._until = until
                    self._report_started(None)
                elif lost or late:
                    self._call(partial(self._renewed_too_late, until))
                else:
                    self._until = until
                failures = 0
            await self._sleep(ended, wait)

    def _report_started(self, error: Exception | None) -> bool:
        """Tell the one who waits in `start`; False if there is no use in going on."""
        started, self._started = self._started, None
        assert started is not None

        def report() -> None:
            if not started.done():
                if error is None:
                    started.set_result(None)
                else:
                    started.set_exception(error)

        self._call(report)
        return error is None

    async def _sleep(self, ended: asyncio.Event, wait: float) -> None:
        """Wait for the next renewal, with an eye on the event loop."""
        until = time.monotonic() + wait
        while not self._stopping.is_set() and (left := until - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(min(left, 1.0)):
                    await ended.wait()
            self._look_at_the_loop()

    def _look_at_the_loop(self) -> None:
        silent = time.monotonic() - self._beat_at
        if self._allowed is None or silent <= self._allowed or self._stopping.is_set():
            return
        why = (
            f"the event loop has not moved for {silent:.0f} s, longer than any handler may take: this process ends, so "
            "that another can go on. What every thread was doing follows on stderr"
        )
        self._tell(self._log, "error", "worker_stuck", RuntimeError(why))
        sys.stderr.write(f"whereupon: {why}\n")
        faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(EXIT_STUCK)

    async def _renew_as_soon_as_may_be(self, connection: AsyncConnection) -> tuple[float, bool]:
        """Renew; when that was begun, by `time.monotonic`, and what `_renew` returns.

        For SQLite's lock nobody waits in line. Whoever waits in SQLite looks for it ever more rarely, and beside busy
        writers may find it taken for longer than a lease; so here it is looked for often.
        """
        if not self._postgres:
            await connection.exec_driver_sql("PRAGMA busy_timeout = 0")
        while True:
            began = time.monotonic()
            try:
                return began, await self._renew(connection)
            except OperationalError as error:
                if self._postgres or self._stopping.is_set() or "database is locked" not in str(error.orig):
                    raise
                await connection.rollback()
                await asyncio.sleep(LOOK)

    async def _renew(self, connection: AsyncConnection) -> bool:
        """Extend the lease; return whether it had run out, so that what this process owned may be another's."""
        until = self._later(self._seconds)
        if self._postgres:
            renewed = await connection.execute(
                text(
                    "UPDATE whereupon_process AS p "
                    "SET lease_until = clock_timestamp() + make_interval(secs => :seconds) "
                    "FROM (SELECT id, lease_until < clock_timestamp() AS late FROM whereupon_process WHERE id = :id) o "
                    "WHERE p.id = o.id RETURNING o.late"
                ),
                {"id": self.id, "seconds": float(self._seconds)},
            )
            row = renewed.first()
            if row is not None:
                return bool(row.late)
        else:
            found = await connection.execute(
                update(process)
                .where(process.c.id == self.id)
                .values(lease_until=until)
                .returning(process.c.lease_until)
            )
            if found.first() is not None:
                return False
        await connection.execute(
            insert(process).values(
                id=self.id,
                lease_until=until,
                in_flight=self._in_flight,
                host=socket.gethostname(),
                pid=os.getpid(),
                started_at=self._later(0),
            )
        )
        return True

    def _later(self, seconds: float) -> Any:
        if self._postgres:
            return func.clock_timestamp() + timedelta(seconds=seconds)
        return datetime.now(UTC) + timedelta(seconds=seconds)

    async def _tidy(self, connection: AsyncConnection) -> None:
        """Forget processes that are long dead."""
        await connection.execute(delete(process).where(process.c.lease_until < self._later(-FORGOTTEN * self._seconds)))

    # --- to the event loop of the process ---------------------------------------------------------------------------

    def _renewed_too_late(self, until: float) -> None:
        self._on_lost()  # first, lest something is begun that another has begun meanwhile
        self._until = until

    def _call(self, function: Callable[[], None]) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # it is closed: nobody is left to be told
            self._loop.call_soon_threadsafe(function)

    def _tell(self, log: Callable[..., None], level: str, name: str, error: Exception) -> None:
        details = {"error_type": type(error).__name__, "error_message": message_of(error), "process": str(self.id)}
        log(level, name, **details)
