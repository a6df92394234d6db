"""A proxy between clients and a PostgreSQL server, for tests of connections that break."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from typing import NamedTuple, Self

from sqlalchemy import make_url


class Side(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter


class Proxy:
    """Forwards TCP connections to a server, each until one side ends it; subclasses `relay` in another way.

    Closed, it is as if the server were down, at the same port; opened again, as if it were up again.
    """

    def __init__(self, url: str) -> None:
        target = make_url(url)
        self._target = (target.host or "127.0.0.1", target.port or 5432)
        with contextlib.closing(socket.socket()) as probe:
            probe.bind(("127.0.0.1", 0))
            self._port: int = probe.getsockname()[1]
        self.url = target.set(host="127.0.0.1", port=self._port).render_as_string(hide_password=False)
        self._server: asyncio.Server | None = None
        self._relaying: set[asyncio.Task[None]] = set()

    async def __aenter__(self) -> Self:
        await self.open()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self) -> None:
        self._server = await asyncio.start_server(self._connected, "127.0.0.1", self._port)

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        for task in self._relaying:
            task.cancel()
        await asyncio.gather(*self._relaying, return_exceptions=True)

    def _connected(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        # not a coroutine, of which asyncio would make a task that nobody could wait for
        task = asyncio.ensure_future(self._serve(Side(reader, writer)))
        self._relaying.add(task)
        task.add_done_callback(self._relaying.discard)

    async def _serve(self, client: Side) -> None:
        sides = [client]
        try:
            server = Side(*await asyncio.open_connection(*self._target))
            sides.append(server)
            await self.relay(client, server)
        except OSError:
            pass  # one side is gone, and the other learns of it below
        finally:
            for side in sides:
                side.writer.transport.abort()

    async def relay(self, client: Side, server: Side) -> None:
        ways = [asyncio.ensure_future(forward(client, server)), asyncio.ensure_future(forward(server, client))]
        try:
            await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        finally:
            await cancelled(*ways)


async def forward(source: Side, sink: Side) -> None:
    """Until the source ends."""
    while data := await source.reader.read(65536):
        sink.writer.write(data)
        await sink.writer.drain()


async def cancelled(*tasks: asyncio.Future[None]) -> None:
    """Cancel these, and wait for their ends."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
