"""For FastAPI and Starlette: a bus that runs with the application, and what endpoints ask for.

FastAPI is imported when `Bus` or `in_transaction` is first used; the rest works with Starlette alone.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Iterable
from contextlib import asynccontextmanager
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeAlias
from uuid import UUID

from starlette.applications import Starlette
from starlette.requests import HTTPConnection

from whereupon.asgi import Application, Receive, RequestContextMiddleware, Scope, Send
from whereupon.bus import EventBusProtocol
from whereupon.errors import BusStateError

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker

    Bus: TypeAlias = EventBusProtocol
    """As a parameter, `bus: Bus`, the bus that is installed."""

__all__ = ["Bus", "bus_of", "in_transaction", "install"]

_KEY: Final = "whereupon.bus"
"""Of the scope, which applications that are mounted in this one share."""


def install(
    app: Starlette,
    bus: EventBusProtocol,
    *,
    trusted_proxies: Iterable[str] = (),
    actor: Callable[[HTTPConnection], str | int | UUID | None] | None = None,
) -> None:
    """Run `bus` with `app`, have requests find it, and their events carry where they come from.

    The bus is entered once the lifespans of the application, and of routers included so far, have started, and drained
    before they end, so what they provide is there for handlers. If the application's lifespan enters the bus itself,
    that is left to it.

    `trusted_proxies` is that of `RequestContextMiddleware`. `actor` is asked whenever an event is published, so what it
    looks at, as `connection.state.user_id`, may be set by dependencies and middlewares; what `acting_as` said comes
    first. Raises `ValueError` for a proxy that is no network, and for an application that has a bus.
    """
    if not isinstance(app, Starlette):
        raise TypeError(f"install takes the FastAPI or Starlette application itself, not {app!r}")
    if any(isinstance(each.cls, type) and issubclass(each.cls, _BusMiddleware) for each in app.user_middleware):
        raise ValueError(
            f"this application has a bus already, so {bus!r} can't be installed: install one, where the application is "
            "made. For a bus in each test, make an application in each: def create_app(bus): …"
        )
    proxies = trusted_proxies if isinstance(trusted_proxies, str) else tuple(trusted_proxies)
    RequestContextMiddleware(app, proxies)  # refuses here what would be refused when the application starts
    app.add_middleware(
        _BusMiddleware,
        bus=bus,
        trusted_proxies=proxies,
        actor=None if actor is None else lambda scope: actor(HTTPConnection(scope)),
    )
    own = app.router.lifespan_context

    @asynccontextmanager
    async def lifespan(app: Any) -> AsyncIterator[Any]:
        async with own(app) as state:
            if bus.is_running:
                yield state
                return
            async with bus:
                yield state

    app.router.lifespan_context = lifespan


class _BusMiddleware(RequestContextMiddleware):
    def __init__(
        self,
        app: Application,
        bus: EventBusProtocol,
        trusted_proxies: Iterable[str],
        actor: Callable[[Scope], str | int | UUID | None] | None,
    ) -> None:
        super().__init__(app, trusted_proxies, actor)
        self._bus = bus

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] in ("http", "websocket"):
            scope[_KEY] = self._bus
        await super().__call__(scope, receive, send)


def bus_of(connection: HTTPConnection) -> EventBusProtocol:
    """The bus that is installed in the application that serves this request or WebSocket.

    Raises `BusStateError` where none is installed, and for one that is not running.
    """
    bus: EventBusProtocol | None = connection.scope.get(_KEY)
    if bus is None:
        raise BusStateError(
            "this application has no bus: install(app, bus) of whereupon.fastapi where it is made, on the application "
            "that the server runs"
        )
    if not bus.is_running:
        raise BusStateError(
            f"{bus!r} is not running, so nobody would deliver what is published: the application's lifespan was not "
            "run. Servers run it for the outermost application alone, so install the bus there. In tests: `with "
            "TestClient(app)`, or with httpx `async with app.router.lifespan_context(app)`"
        )
    return bus


def in_transaction(sessions: async_sessionmaker[Any] | None = None) -> Any:
    """A dependency: a session in a transaction of the request, to be written as `Annotated[AsyncSession, …]`.

    The transaction is committed when the endpoint has returned, before the response is sent: if the commit fails, the
    answer is an error and no event was published. What is raised, `HTTPException` as well, rolls back; so does nothing
    else, whatever the status of a response that is returned. After that the session is closed for good: streamed
    responses and background tasks need one of their own. `sessions` are by default sessions of the bus's engine.
    Raises `BusStateError` in a WebSocket, where a transaction would last as long as the connection.
    """
    from fastapi import Depends
    from sqlalchemy.ext.asyncio import AsyncSession

    async def session_in_transaction(connection: HTTPConnection) -> AsyncIterator[AsyncSession]:
        if connection.scope["type"] == "websocket":
            raise BusStateError(
                "in_transaction is for requests: in a WebSocket the transaction would last as long as the connection. "
                "Open one for each message: async with sessions.begin() as session"
            )
        make = partial(AsyncSession, _engine_of(connection), expire_on_commit=False) if sessions is None else sessions
        # closed without this, it would begin anew in a background task, and what is written there never be committed
        async with make(close_resets_only=False) as session, session.begin():
            yield session

    # "request", the default, is over when the response was sent
    return Depends(session_in_transaction, scope="function")


def _engine_of(connection: HTTPConnection) -> AsyncEngine:
    bus = bus_of(connection)
    engine: AsyncEngine | None = getattr(bus, "engine", None)
    if engine is None:
        raise BusStateError(f"{bus!r} has no database for sessions: write in_transaction(sessions)")
    return engine


if not TYPE_CHECKING:  # to a type checker every name would be one of this module's

    def __getattr__(name: str) -> Any:
        if name != "Bus":
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        from fastapi import Depends

        async def running_bus(connection: HTTPConnection) -> EventBusProtocol:  # not async, it would be run in a thread
            return bus_of(connection)

        globals()["Bus"] = bus = Annotated[EventBusProtocol, Depends(running_bus)]
        return bus
