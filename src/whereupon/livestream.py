"""Events as they are committed, for many viewers: the log is asked once for all of them."""

from __future__ import annotations

import asyncio
import signal
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final, TypeAlias

from sqlalchemy import func, select

from whereupon.lookback import ListedEvent
from whereupon.schema import log
from whereupon.store import Store

EVERY: Final = 1.0
"""Seconds between two looks at the log, and from the begin of a shutdown until streams notice."""
HEARTBEAT: Final = 10.0
"""Seconds after which something is sent where nothing happened: proxies take silence for an end."""
AT_ONCE: Final = 200
"""Events that one look shows; of more it says how many there were."""
WAITING: Final = 200
"""Events that wait for a viewer whose connection is slow; of more the oldest are left out."""
REMEMBERED: Final = 500
"""The last events, for viewers that come back."""
MOST_VIEWERS: Final = 50
MOST_OF_ONE: Final = 4
"""Streams of one browser, which has six connections to a server: the oldest ends."""
LONGEST: Final = 900.0
"""Seconds after which a stream ends; browsers come back by themselves. Where a server can't tell us of its end, this
is how long it has to wait."""

Listed: TypeAlias = Callable[[Any], ListedEvent]


@dataclass(frozen=True, slots=True)
class LeftOut:
    """So many events, at least, were not shown."""

    number: int


@dataclass(eq=False, slots=True, kw_only=True)
class Viewer:
    owner: str
    accepts: Callable[[ListedEvent], bool]
    waiting: deque[ListedEvent] = field(default_factory=lambda: deque(maxlen=WAITING))
    left_out: int = 0
    over: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def offer(self, event: ListedEvent) -> None:
        if self.accepts(event):
            self.left_out += len(self.waiting) == WAITING
            self.waiting.append(event)
            self.woken.set()

    def end(self) -> None:
        self.over = True
        self.woken.set()


class Livestream:
    def __init__(self, store: Store, listed: Listed, *, stopping: Callable[[], bool] | None = None) -> None:
        """`stopping` tells whether the server is about to end; by itself it knows of uvicorn's signals alone."""
        self._store = store
        self._listed = listed
        self._stopping = stopping or server_stops
        self._viewers: list[Viewer] = []
        self._last: deque[ListedEvent] = deque(maxlen=REMEMBERED)
        self._task: asyncio.Task[None] | None = None
        self._closed = False

    def is_full(self, owner: str) -> bool:
        """Whether another stream would be one too many. Of a browser with several of them one ends instead."""
        return len(self._viewers) >= MOST_VIEWERS and len(self._of(owner)) < MOST_OF_ONE

    def _of(self, owner: str) -> list[Viewer]:
        return [viewer for viewer in self._viewers if viewer.owner == owner and not viewer.over]

    @contextmanager
    def open(self, owner: str, accepts: Callable[[ListedEvent], bool]) -> Iterator[Viewer]:
        """A viewer that gets what is committed from now on; ask `is_full` before."""
        mine = self._of(owner)
        if len(mine) >= MOST_OF_ONE:
            mine[0].end()
        viewer = Viewer(owner=owner, accepts=accepts, over=self._closed)
        self._viewers.append(viewer)
        if self._task is None or self._task.done():
            self._last.clear()
            self._task = asyncio.create_task(self._watch())
        try:
            yield viewer
        finally:
            self._viewers.remove(viewer)

    async def catch_up(self, viewer: Viewer, after: int) -> None:
        """Give a viewer that comes back what came after the position that it saw last.

        Out of memory in the order of commits; else by position, and then what has committed late meanwhile is left to
        the list of events.
        """
        known = list(self._last)
        seen = next((number for number, event in enumerate(known) if event.position == after), None)
        missed = known[seen + 1 :] if seen is not None else await self._since(after)
        later = [event for event in viewer.waiting if event.position not in {one.position for one in missed}]
        viewer.waiting.clear()
        for event in (*missed, *later):
            viewer.offer(event)

    async def _since(self, after: int) -> list[ListedEvent]:
        query = (
            select(log.c.position, log.c.event_id, log.c.type, log.c.recorded_at, log.c.headers)
            .where(log.c.position > after)
            .order_by(log.c.position)
            .limit(AT_ONCE)
        )
        async with self._store.reading() as connection:
            return [self._listed(row) for row in await connection.execute(query)]

    async def follow(self, viewer: Viewer) -> AsyncIterator[ListedEvent | LeftOut | None]:
        """What is new for a viewer, None as a sign of life, until the stream has to end."""
        began = said = time.monotonic()
        while not viewer.over and not self._stopping() and time.monotonic() - began < LONGEST:
            viewer.woken.clear()
            while viewer.waiting:
                if viewer.left_out:
                    number, viewer.left_out = viewer.left_out, 0
                    yield LeftOut(number)
                said = time.monotonic()
                yield viewer.waiting.popleft()
            if viewer.left_out:
                number, viewer.left_out = viewer.left_out, 0
                yield LeftOut(number)
            if time.monotonic() - said >= HEARTBEAT:
                said = time.monotonic()
                yield None
            try:
                async with asyncio.timeout(EVERY):
                    await viewer.woken.wait()
            except TimeoutError:
                continue

    async def close(self) -> None:
        """End all streams, and those that will be opened."""
        self._closed = True
        for viewer in self._viewers:
            viewer.end()
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})

    async def _watch(self) -> None:
        """While somebody looks. A database that does not answer is asked again."""
        place = None
        while self._viewers:
            try:
                if place is None:
                    async with self._store.reading() as connection:
                        place = await self._store.end(connection)
                page = await self._store.read(place, None, AT_ONCE)
                place = page.after
                for row in page.rows:
                    event = self._listed(row)
                    self._last.append(event)
                    for viewer in self._viewers:
                        viewer.offer(event)
                if len(page.rows) == AT_ONCE:
                    place = await self._skip(page.rows[-1].position)
            except self._store.errors:
                place = None  # what is committed until it answers is in the list of events
                self._tell_left_out(1)
            await asyncio.sleep(EVERY)

    async def _skip(self, shown: int) -> object:
        """Go on at the end of the log, where more is committed than anybody could read."""
        async with self._store.reading() as connection:
            last = await connection.scalar(select(func.max(log.c.position))) or shown
            place = await self._store.end(connection)
        if last > shown:
            self._tell_left_out(last - shown)
        return place

    def _tell_left_out(self, number: int) -> None:
        for viewer in self._viewers:
            viewer.left_out += number
            viewer.woken.set()


def server_stops() -> bool:
    """Whether a signal has told uvicorn to end.

    It waits for its connections then, tells applications nothing before they are closed, and would wait for a stream
    for ever. Its handler of the signal is a method of the server, of which `should_exit` is public.
    """
    for number in (signal.SIGTERM, signal.SIGINT):
        server = getattr(signal.getsignal(number), "__self__", None)
        if getattr(server, "should_exit", False) is True:
            return True
    return False
