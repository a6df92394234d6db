"""Dashtam in processes that end in the middle of what they do: `python killed.py`, settings and then a JSON job a line.

To import Dashtam takes seconds and to fork takes none, so one process makes it and every job runs in a fork of that.
A fork serves one request, and what follows from it until all of that is settled, unless it is to die at a step: just
before or after a COMMIT that changes something, a mail, or an answer of the bank. What a job is answered with says how
the fork ended, and which steps it came to.
"""

import asyncio
import gc
import io
import json
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import aiosmtplib
import httpx
from banked import Clock
from served import QUICK, settle
from sqlalchemy import Engine, event

from dashtam.bootstrap import Settings, api_of, build
from dashtam.infrastructure.bank import SANDBOX, ProviderSettings
from dashtam.infrastructure.logs import make_logger
from whereupon import EventBus

LEASE: Final = 1.0

_WRITTEN = re.compile(r"\b(?:INSERT INTO|DELETE FROM|(?<!FOR )(?<!DO )(?<!NO KEY )UPDATE(?! OF\b))\s+\"?([a-z_]+)")
_HOUSEKEEPING = {"whereupon_process", "whereupon_cursor", "whereupon_exception"}
"""A commit of these alone keeps a lease, takes a lane, or sets aside what is to run alone since somebody crashed."""


def bank_at(url: str) -> ProviderSettings:
    return SANDBOX.model_copy(
        update={
            "authorize_url": f"{url}/oauth/authorize",
            "token_url": f"{url}/oauth/token",
            "revoke_url": f"{url}/oauth/revoke",
            "api_url": f"{url}/api",
        }
    )


def settings_of(*, database_url: str, smtp_port: int, bank_url: str, secret_key: str) -> dict[str, Any]:
    """The same for everybody on this database, who lives or dies."""
    return QUICK | {
        "database_url": database_url,
        "smtp_port": smtp_port,
        "secret_keys": (secret_key,),
        "providers": (bank_at(bank_url),),
        "rate_limit_factor": 10_000.0,
        "lease_seconds": LEASE,
    }


class Steps:
    """Counts steps once armed, tells each on a pipe, and ends the process at the fatal one."""

    def __init__(self) -> None:
        self.pipe = -1
        self.fatal: int | None = None
        self.armed = False
        self._count = 0

    def take(self, name: str) -> None:
        if not self.armed:
            return
        self._count += 1
        self.tell(name)
        if self._count == self.fatal:
            os.kill(os.getpid(), signal.SIGKILL)

    def tell(self, line: str) -> None:
        os.write(self.pipe, f"{line}\n".encode())

    @contextmanager
    def around(self, name: str) -> Iterator[None]:
        self.take(f"before {name}")
        yield
        self.take(f"after {name}")


class Wire(httpx.AsyncBaseTransport):
    """To the bank."""

    def __init__(self, steps: Steps) -> None:
        self._steps = steps
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        path = re.sub(r"acc_\w+", "…", request.url.path)
        with self._steps.around(f"the bank's answer to {request.method} {path}"):
            return await self._inner.handle_async_request(request)

    async def aclose(self) -> None:
        await self._inner.aclose()


def watch_commits(bus: EventBus, steps: Steps) -> None:
    """Those of the engines too that the bus makes for itself: they share its dialect, and not its listeners."""
    dialect: Any = bus.engine.dialect
    commit = dialect.do_commit

    def begin(connection: Any) -> None:
        connection.connection.info.pop("wrote", None)

    def execute(connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if found := _WRITTEN.findall(statement):
            connection.connection.info.setdefault("wrote", set()).update(found)

    def do_commit(connection: Any) -> None:
        wrote = connection.info.pop("wrote", set())
        if wrote <= _HOUSEKEEPING:
            commit(connection)
            return
        with steps.around(f"COMMIT of {', '.join(sorted(name.removeprefix('whereupon_') for name in wrote))}"):
            commit(connection)

    event.listen(Engine, "begin", begin)
    event.listen(Engine, "before_cursor_execute", execute)
    dialect.do_commit = do_commit


def watch_mails(steps: Steps) -> None:
    """Those of the mailers that are made from now on."""
    send = aiosmtplib.send

    async def watched(message: Any, *args: Any, **options: Any) -> Any:
        with steps.around(f"the mail “{message['Subject']}”"):
            return await send(message, *args, **options)

    setattr(aiosmtplib, "send", watched)  # noqa: B010 (the module says its type is this very function)


class Stage:
    """Dashtam, made before anything of it runs: a fork finds no event loop, no thread and no connection."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self.steps = Steps()
        self.clock = Clock()
        watch_mails(self.steps)
        self.application = build(
            Settings(**settings_of(**settings)),
            make_logger("json", stream=io.StringIO()),
            bank_transport=Wire(self.steps),
            clock=self.clock,
        )
        watch_commits(self.application.bus, self.steps)
        self.api = api_of(self.application)

    async def serve(self, job: dict[str, Any]) -> None:
        bus, steps = self.application.bus, self.steps
        try:
            async with (
                self.api.router.lifespan_context(self.api),
                httpx.AsyncClient(transport=httpx.ASGITransport(self.api), base_url="http://dashtam.example") as http,
            ):
                await settle(bus, job["since"])  # what those who died before have left
                steps.armed = True
                answer = await http.request(job["method"], job["path"], json=job["json"], headers=job["headers"])
                if not answer.is_success:
                    steps.tell(f"error: {answer.status_code} {answer.text}")
                await settle(bus, job["since"])
                steps.armed = False
        finally:
            await self.application.database.engine.dispose()

    def fork(self, job: dict[str, Any]) -> dict[str, Any]:
        reading, writing = os.pipe()
        process = os.fork()
        if process == 0:
            status = 1
            try:
                os.close(reading)
                self.steps.pipe, self.steps.fatal = writing, job["step"]
                self.clock.advance(seconds=job["later"])
                asyncio.run(self.serve(job))
                status = 0
            except BaseException:
                os.write(writing, f"error: {json.dumps(traceback.format_exc())}\n".encode())
            finally:
                os._exit(status)
        os.close(writing)
        with os.fdopen(reading) as told:
            lines = told.read().splitlines()
        _, status = os.waitpid(process, 0)
        return {
            "process": process,
            "status": os.waitstatus_to_exitcode(status),
            "steps": [line for line in lines if not line.startswith("error: ")],
            "errors": [line for line in lines if line.startswith("error: ")],
        }


def main() -> None:
    stage = Stage(json.loads(sys.stdin.readline()))
    gc.freeze()
    for line in sys.stdin:
        print(json.dumps(stage.fork(json.loads(line))), flush=True)


if __name__ == "__main__":
    main()
