"""Pages that are open hear that something happened, by Server-Sent Events, and fetch what they show anew."""

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID

from fastapi import APIRouter, Depends
from sse_starlette import EventSourceResponse, ServerSentEvent
from starlette.responses import Response

from dashtam.application.activity import Activity
from dashtam.application.sessions import Sessions
from dashtam.domain.session import Session
from dashtam.presentation.authentication import Forbidden
from dashtam.presentation.web.browser_session import Visit
from dashtam.presentation.web.pages import Pages
from whereupon import Delivery, DomainEvent

LOOKED_EVERY: Final = 2.0
"""Seconds: what other processes commit nobody hears of here."""
GATHERED: Final = 0.1
"""Seconds from the first of several events to the one message for them."""
MOST_STREAMS: Final = 4
"""Of one session. A browser has six connections to a server, and more to do with them: the oldest page goes quiet."""


@dataclass(eq=False, slots=True, kw_only=True)
class Stream:
    """A page that is open. Being woken twice before it looks is being woken once, so nothing piles up for it."""

    session_id: UUID
    user_id: UUID | None
    """None: everybody's events concern it."""
    over: bool = False
    woken: asyncio.Event = field(default_factory=asyncio.Event)

    def end(self) -> None:
        self.over = True
        self.woken.set()


class Live:
    """Wakes the streams of the user whom an event concerns, once it is committed in this process."""

    delivery = Delivery.AFTER_COMMIT

    def __init__(self) -> None:
        self._streams: list[Stream] = []
        self._closed = False

    async def handle(self, event: DomainEvent) -> None:
        user_id = getattr(event, "user_id", None)
        for stream in self._streams:
            if stream.user_id is None or stream.user_id == user_id:
                stream.woken.set()

    def close(self) -> None:
        """End all streams: servers wait for what they answer. Those that uvicorn stops by a signal need no telling."""
        self._closed = True
        for stream in self._streams:
            stream.end()

    @contextmanager
    def open(self, session_id: UUID, user_id: UUID | None) -> Iterator[Stream]:
        stream = Stream(session_id=session_id, user_id=user_id, over=self._closed)
        siblings = [each for each in self._streams if each.session_id == session_id and not each.over]
        if len(siblings) >= MOST_STREAMS:
            siblings[0].end()
        self._streams.append(stream)
        try:
            yield stream
        finally:
            self._streams.remove(stream)


def live_routes(pages: Pages, live: Live, activity: Activity, sessions: Sessions) -> APIRouter:
    routes = pages.routes()
    logged_in = Depends(pages.browsers.logged_in)

    async def messages(session: Session, *, everybody: bool) -> AsyncIterator[ServerSentEvent]:
        seen: object = None
        with live.open(session.id, None if everybody else session.user_id) as stream:
            while True:
                stream.woken.clear()
                if stream.over or not await sessions.is_open(session.id):
                    break
                now = await (activity.of_everybody() if everybody else activity.of_user(session.user_id))
                if now != seen:  # also at first: something may have happened since the page was made
                    seen = now
                    yield ServerSentEvent(event="changed", data="look")
                try:
                    async with asyncio.timeout(LOOKED_EVERY):
                        await stream.woken.wait()
                except TimeoutError:
                    continue
                await asyncio.sleep(GATHERED)
        # browsers drop messages without data
        yield ServerSentEvent(event="over", data="bye")

    @routes.get("/live")
    async def listen(of: str = "", visit: Visit = logged_in) -> Response:
        everybody = of == "everybody"
        if everybody and not visit.user.is_admin:
            raise Forbidden
        return EventSourceResponse(messages(visit.user, everybody=everybody), send_timeout=30)

    return routes
