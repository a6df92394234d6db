"""Web servers within this process, for the demo and for tests: several of them, each ended in order."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Final, Literal

import uvicorn
from starlette.types import ASGIApp

HOST: Final = "127.0.0.1"


class _Server(uvicorn.Server):
    """Leaves signals to whoever serves; `up` is set once it answers, or has failed."""

    def __init__(self, config: uvicorn.Config) -> None:
        super().__init__(config)
        self.up = asyncio.Event()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        try:
            await super().startup(sockets)
        finally:
            self.up.set()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


def bound(wanted: int) -> socket.socket:
    """A socket on the wanted port, or on any free one if that is taken."""
    for port in (wanted, 0):
        door = socket.socket()
        door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            door.bind((HOST, port))
            door.listen()
        except OSError:
            door.close()
        else:
            return door
    raise OSError(f"no port is free on {HOST}")


@asynccontextmanager
async def serving(
    app: ASGIApp, wanted_port: int = 0, *, door: socket.socket | None = None, lifespan: Literal["on", "off"] = "on"
) -> AsyncIterator[str]:
    """Serve an application in this process until the block ends; gives its address.

    At the wanted port if it is free, or at `door`, which is closed then. `lifespan="off"` where somebody else runs
    what the application needs. Raises `OSError` if it does not start.
    """
    if door is None:
        door = bound(wanted_port)
    port = door.getsockname()[1]
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, proxy_headers=False, lifespan=lifespan))
    serving = asyncio.create_task(server.serve([door]))
    serving.add_done_callback(lambda _: server.up.set())
    try:
        await server.up.wait()
        if not server.started:
            raise OSError(f"the server on port {port} did not start: the log says why")
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        await serving
