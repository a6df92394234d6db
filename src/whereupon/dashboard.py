"""The dashboard: what happens on a bus, and what can be done about it, as pages for a browser.

    app.mount("/whereupon", dashboard(bus, authorize=who_may))

or by itself, on this machine alone: `whereupon dashboard module:bus`.
"""

from __future__ import annotations

import asyncio
import contextlib
import getpass
import os
import signal
import socket
from collections.abc import Awaitable, Callable, Iterator, Mapping
from hashlib import sha256
from typing import Final

from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from whereupon.board import Board, Pages
from whereupon.durable import EventBus
from whereupon.errors import ActionRefused, DatabaseError, WhereuponError
from whereupon.gate import Authorize, Gate, Instead, Refusal, Visit, Visitor, is_loopback, secured
from whereupon.gauges import GROUPS, Gauges
from whereupon.livestream import Livestream
from whereupon.lookback import Lookback, listed
from whereupon.steering import Steering

__all__ = ["Dashboard", "Visitor", "dashboard", "door_at", "serve"]

LONGEST: Final = 30.0
"""Seconds that a page may take, where the database accepts a question and does not answer it."""
GRACE: Final = 5
"""Seconds that requests have to end when the server does."""

_Page = Callable[[Visit], Awaitable[Response]]


def dashboard(bus: EventBus, *, authorize: Authorize, secret: str | bytes | None = None) -> Dashboard:
    """An ASGI application, to be mounted under any path of any other.

    `authorize(request)` says who may come in: None (nobody), "reader" (to look), "actor" (to pause, retry, skip, edit
    and replay, too), an object with a `name` and one of these as its `role`, or a Response to be answered instead,
    such as a redirect to the login. It may be async. The name is kept with what its bearer does.

    Readers see the payloads of events. `secret` signs the tokens of forms; without one they are signed by what the
    processes of this database have in common, its id.
    """
    if not callable(authorize):
        raise TypeError(
            f"dashboard(bus, authorize={authorize!r}): it shows the payloads of events and lets people retry and skip "
            "them, so it takes a function of the request that says who may: authorize=lambda request: 'reader' if … "
            "else None. Without one it only runs by itself, on this machine: `whereupon dashboard module:bus`"
        )
    return Dashboard(bus, authorize=authorize, secret=secret)


class Dashboard:
    """What `dashboard` returns."""

    def __init__(
        self,
        bus: EventBus,
        *,
        authorize: Authorize,
        secret: str | bytes | None = None,
        local: bool = False,
        stopping: Callable[[], bool] | None = None,
    ) -> None:
        """`local`: answer to loopback names alone. `stopping` tells when the server is about to end."""
        self._bus = bus
        store = bus._store
        self._secret = secret.encode() if isinstance(secret, str) else secret
        self._key: bytes | None = None
        self._gate = Gate(authorize, self._signing_key, local=local)
        self._pages = pages = Pages(self._gate, bus.database)
        lookback = Lookback(store, bus.class_of)
        self._gauges = gauges = Gauges(store, lookback, bus.lags, lambda: bus.operator.groups(limit=GROUPS))
        self._livestream = Livestream(store, listed, stopping=stopping)
        board = Board(bus, pages, gauges, lookback, self._livestream)
        self._steering = steering = Steering(bus, pages, board, gauges, lookback)
        self._looking: Mapping[str, _Page] = {
            "": board.overview,
            "map": board.map,
            "events": board.events,
            "event": board.event,
            "stream": board.stream,
            "handlers": board.handlers,
            "dead": board.dead,
            "group": board.group,
            "letter": board.letter,
            "workflows": board.workflows,
            "catalogue": board.catalogue,
            "type": board.event_type,
            "audit": board.audit,
            "actions": board.actions,
            "checkup": board.checkup,
            "canaries": steering.canaries,
            "canary-run": steering.canary_run,
        }
        self._acting: Mapping[str, _Page] = {
            "pause": steering.pause,
            "resume": steering.resume,
            "replay": steering.replay,
            "retry": steering.retry,
            "skip": steering.skip,
            "edit": steering.edit,
            "canary": steering.canary,
            "stop": steering.stop,
        }

    async def close(self) -> None:
        """End streams and what runs in the background. uvicorn's signals are heard of without it."""
        await self._livestream.close()
        await self._steering.close()
        await self._gauges.close()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._live(receive, send)
            return
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                await send({"type": "websocket.close", "code": 1000})
            return
        request = Request(scope, receive)
        response = await self._answer(request)

        async def sending(message: Message) -> None:
            if message["type"] == "http.response.start":
                secured(MutableHeaders(scope=message))
            await send(message)

        await response(scope, receive, sending)

    async def _live(self, receive: Receive, send: Send) -> None:
        while (message := await receive())["type"] != "lifespan.shutdown":
            if message["type"] == "lifespan.startup":
                await send({"type": "lifespan.startup.complete"})
        await self.close()
        await send({"type": "lifespan.shutdown.complete"})

    async def _answer(self, request: Request) -> Response:
        path = _path_of(request.scope)
        if not path:
            # without the slash at its end, links would lead past the dashboard
            here = request.scope.get("root_path", "").rpartition("/")[2]
            return Response(status_code=307, headers={"location": f"{here}/"})
        path = path.removeprefix("/")
        base = "../" * path.count("/")
        try:
            self._gate.check_host(request)
            if path.startswith("static/"):
                return self._pages.static_file(path.removeprefix("static/"))
            async with asyncio.timeout(LONGEST):
                return await self._page(request, path, base)
        except Refusal as error:
            return self._pages.error(error.status, error.reason, base)
        except Instead as error:
            return error.response
        except HTTPException as error:  # what authorize raises
            return self._pages.error(error.status_code, str(error.detail), base, headers=error.headers)
        except ActionRefused as error:
            return self._pages.error(404, str(error), base)
        except DatabaseError as error:
            return self._pages.error(503, str(error), base, headers={"retry-after": "5"})
        except TimeoutError:
            return self._pages.error(
                503, f"The database has not answered within {LONGEST:g} s: {self._bus.database}", base
            )
        except ClientDisconnect:
            return Response(status_code=400)
        except WhereuponError as error:
            return self._pages.error(409, str(error), base)
        except Exception as error:  # whatever it is, a page tells of it, and says nothing that a stack trace would
            self._bus.logger.error("dashboard_failed", method=request.method, path=path, exc_info=error)
            return self._pages.error(500, "That is a fault of the dashboard. The log of its process tells more.", base)

    async def _page(self, request: Request, path: str, base: str) -> Response:
        visit = await self._gate.admit(request, base)
        page = self._looking.get(path)
        allowed = ("GET", "HEAD") if page is not None else ("GET", "HEAD", "POST")
        page = page or self._acting.get(path)
        if page is None:
            raise Refusal(404, "There is no such page.")
        if request.method not in allowed:
            raise Refusal(405, f"{request.method} is not what this page is for.")
        visit = await self._gate.with_token(visit)
        if request.method == "POST":
            visit = await self._gate.with_form(visit)
        return await page(visit)

    async def _signing_key(self) -> bytes:
        if self._key is None:
            secret = self._secret
            if secret is None:
                await self._bus._reachable()  # says most clearly what is wrong with a database that can't be used
                secret = (await self._bus._store.database_id()).encode()
            self._key = sha256(b"whereupon dashboard\0" + secret).digest()
        return self._key


def on_this_machine(bus: EventBus, stopping: Callable[[], bool] | None = None) -> Dashboard:
    """A dashboard for whoever is logged in on this machine; to be bound to a loopback address alone."""
    try:
        name = getpass.getuser()
    except (OSError, KeyError):  # a container's user may have no name
        name = f"uid {os.getuid()}"
    visitor = Visitor(name=name, role="actor")
    return Dashboard(bus, authorize=lambda _request: visitor, local=True, stopping=stopping)


async def serve(
    bus: EventBus, door: socket.socket, *, authorize: Authorize | None = None, started: Callable[[], None]
) -> None:
    """Serve a dashboard by itself until SIGINT or SIGTERM, at a socket that listens; nothing is delivered.

    Without `authorize` the socket has to be bound to a loopback address: whoever is on this machine may act.
    """
    import uvicorn

    if authorize is None and not is_loopback(door.getsockname()[0]):
        raise ValueError(
            f"the dashboard shows payloads and lets people act, and {door.getsockname()[0]} is reached from elsewhere: "
            "bind it to 127.0.0.1, or say who may, with authorize="
        )

    class Server(uvicorn.Server):
        @contextlib.contextmanager
        def capture_signals(self) -> Iterator[None]:
            """Else it raises them again at its end, before connections to the database are closed."""
            numbers = (signal.SIGINT, signal.SIGTERM)
            before = {number: signal.signal(number, self.handle_exit) for number in numbers}
            try:
                yield
            finally:
                for number, handler in before.items():
                    signal.signal(number, handler)

        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            started()

    def stopping() -> bool:
        return server.should_exit

    app = (
        on_this_machine(bus, stopping) if authorize is None else Dashboard(bus, authorize=authorize, stopping=stopping)
    )
    server = Server(
        uvicorn.Config(
            app, log_config=None, access_log=False, server_header=False, timeout_graceful_shutdown=GRACE, lifespan="on"
        )
    )
    await server.serve([door])


def _path_of(scope: Scope) -> str:
    """The path below where the dashboard is mounted; the whole path where a proxy has taken that away already."""
    path: str = scope["path"]
    root: str = scope.get("root_path", "")
    if root and (path == root or path.startswith(f"{root}/")):
        return path[len(root) :]
    return path


def door_at(host: str, port: int) -> socket.socket:
    """A socket that listens. Raises `OSError`."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    door = socket.socket(family)
    try:
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        door.bind((host, port))
        door.listen()
    except BaseException:
        door.close()
        raise
    return door
