"""`make demo`: Dashtam and its inbox on this machine, a few people registering, and what followed each."""

import argparse
import asyncio
import contextlib
import secrets
import signal
import socket
import sys
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID, uuid4

import httpx
import uvicorn
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text
from starlette.types import ASGIApp

from dashtam.bootstrap import Application, Settings, api_of, build
from dashtam.inbox import Inbox
from dashtam.infrastructure import schema
from dashtam.infrastructure.logs import forward_standard_logging, make_logger
from whereupon import Delivery, DeliveryState, DomainEvent, EventContext, WhereuponError

HOST: Final = "127.0.0.1"
FOLDER: Final = Path(".demo")
PATIENCE: Final = 30.0
"""Seconds until something that did not happen counts as gone wrong."""

_STATES: Final = {
    "succeeded": "green",
    "waiting": "yellow",
    "running": "yellow",
    "retrying": "yellow",
    "dead": "bold red",
    "skipped": "magenta",
}


@dataclass(frozen=True, slots=True)
class Visitor:
    """Somebody who fills in the form, and what they should be answered."""

    name: str
    email: str
    password: str
    status: int


class Watcher:
    """Notes the events of each request, told apart by their correlation id, as they are committed."""

    delivery = Delivery.AFTER_COMMIT

    def __init__(self) -> None:
        self._seen: defaultdict[UUID, list[DomainEvent]] = defaultdict(list)
        self._more = asyncio.Condition()

    async def handle(self, event: DomainEvent, context: EventContext) -> None:
        async with self._more:
            self._seen[context.correlation_id].append(event)
            self._more.notify_all()

    async def events(self, correlation: UUID, count: int) -> list[DomainEvent]:
        """The first `count` events of a request, in order, once they are committed."""
        async with self._more:
            await self._more.wait_for(lambda: len(self._seen[correlation]) >= count)
        return sorted(self._seen[correlation], key=lambda event: event.event_id)


class _Server(uvicorn.Server):
    """Leaves signals to the demo, which ends several servers in order; `up` is set once it answers, or has failed."""

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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dashtam.demo",
        description="Start Dashtam with an inbox, register a few people over HTTP, show what followed, and stay up.",
    )
    parser.add_argument(
        "--database-url",
        metavar="URL",
        help=f"PostgreSQL, say: postgresql+asyncpg://user@host/database (default: SQLite, a new file in {FOLDER}/)",
    )
    parser.add_argument("--once", action="store_true", help="end after the tour: exit code 0 if everything happened")
    chosen = parser.parse_args(arguments)
    console = Console()
    try:
        return asyncio.run(_demo(console, chosen.database_url, once=chosen.once))
    except KeyboardInterrupt:
        return 0
    except (WhereuponError, schema.SchemaOutdated, OSError) as error:
        Console(stderr=True).print(f"[red]demo:[/red] {error}", highlight=False, soft_wrap=True)
        return 1


async def _demo(console: Console, database_url: str | None, *, once: bool) -> int:
    FOLDER.mkdir(exist_ok=True)
    if database_url is None:
        database_url = f"sqlite+aiosqlite:///{_new_file()}"
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    smtp_door = _bound(1025)
    smtp_port = smtp_door.getsockname()[1]
    settings = Settings(database_url=database_url, smtp_port=smtp_port)
    inbox, watcher = Inbox(), Watcher()
    log_file = FOLDER / "dashtam.log"
    with log_file.open("w", encoding="utf-8") as log:
        logger = make_logger("json", settings.log_level, log)
        forward_standard_logging(logger, "WARNING")
        application = build(settings, logger)
        application.bus.register(watcher)
        await application.bus.revision()  # a database that is down is said to be, in one line, before anything starts
        await schema.upgrade(application.database.engine)
        async with (
            inbox.listening(smtp_door),
            _serving(inbox.app, 8025) as inbox_url,
            _serving(api_of(application), 8000) as api_url,
        ):
            addresses = {
                "API docs": f"{api_url}/docs",
                "Inbox": f"{inbox_url}/",
                "SMTP": f"{HOST}:{smtp_port}",
                "Database": application.bus.database,
                "Log": str(log_file),
            }
            happened = await _tour(console, application, inbox, watcher, api_url, log_file)
            _print_addresses(console, addresses)
            if not once:
                console.print("Register somebody yourself at the API docs. [bold]Ctrl-C[/bold] ends the demo.")
                await stop.wait()
                console.print("\nStopping; handlers that run are let end.")
        return 0 if happened else 1


def _new_file() -> Path:
    path = FOLDER / "dashtam.db"
    for old in (path, path.with_name(path.name + "-wal"), path.with_name(path.name + "-shm")):
        old.unlink(missing_ok=True)
    return path


def _bound(wanted: int) -> socket.socket:
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
async def _serving(app: ASGIApp, wanted_port: int) -> AsyncIterator[str]:
    """Serve an application in this process until the block ends; gives its address."""
    door = _bound(wanted_port)
    port = door.getsockname()[1]
    server = _Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="on"))
    serving = asyncio.create_task(server.serve([door]))
    serving.add_done_callback(lambda _: server.up.set())
    try:
        await server.up.wait()
        if not server.started:
            raise OSError(f"the server on port {port} did not start: see {FOLDER}/dashtam.log")
        yield f"http://{HOST}:{port}"
    finally:
        server.should_exit = True
        await serving


def _visitors() -> list[Visitor]:
    run = secrets.token_hex(2)  # on a database that is kept, last time's people are there already
    ada = f"ada+{run}@example.com"
    return [
        Visitor("Ada", ada, "an analytical engine", 201),
        Visitor("Grace", f"grace+{run}@example.com", "nanoseconds-of-wire", 201),
        Visitor("Ada again", ada, "an analytical engine", 409),
        Visitor("Alan, in a hurry", f"alan+{run}@example.com", "enigma", 422),
        Visitor("Someone without an address", "nobody at all", "a long enough password", 422),
    ]


async def _tour(
    console: Console, application: Application, inbox: Inbox, watcher: Watcher, api_url: str, log_file: Path
) -> bool:
    """Register people over HTTP, show what followed each; False if something that should have happened did not."""
    happened = True
    async with httpx.AsyncClient(base_url=api_url, timeout=PATIENCE) as client:
        for visitor in _visitors():
            correlation = uuid4()
            begun = time.perf_counter()
            response = await client.post(
                "/users",
                json={"email": visitor.email, "password": visitor.password},
                headers={"X-Correlation-ID": str(correlation)},
            )
            seconds = time.perf_counter() - begun
            events = await _settled(application, watcher, correlation)
            states = await application.bus.deliveries(*[event.event_id for event in events])
            _print_visit(console, visitor, response, seconds, events, states)
            mails = inbox.to(visitor.email)
            if visitor.status == 201:
                console.print(
                    f"  in the inbox: {escape(', '.join(mail.subject for mail in mails)) or '[red]nothing[/red]'}\n"
                )
            happened &= response.status_code == visitor.status and len(events) == 2
            happened &= all(state.state == "succeeded" for state in states)
            happened &= visitor.status != 201 or len(mails) == 1
    _print_log(console, log_file)
    if not happened:
        console.print("[bold red]Not everything that should have followed did.[/bold red]")
    return happened


async def _settled(application: Application, watcher: Watcher, correlation: UUID) -> list[DomainEvent]:
    """The events of one request, once there are an attempt and an outcome and every handler is done with both."""
    async with asyncio.timeout(PATIENCE):
        events = await watcher.events(correlation, 2)
    await application.bus.wait_settled(events, PATIENCE)
    return events


def _print_visit(
    console: Console,
    visitor: Visitor,
    response: httpx.Response,
    seconds: float,
    events: list[DomainEvent],
    states: list[DeliveryState],
) -> None:
    answer = Text(f" {response.status_code} {response.reason_phrase} ", "green" if response.is_success else "yellow")
    console.print(
        Rule(
            Text.assemble((visitor.name, "bold"), "  POST /users → ", answer, f"in {seconds * 1000:.0f} ms"),
            align="left",
        )
    )
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    room = max(30, console.width - 38)  # what the other columns leave
    table.add_column("event, whereupon", header_style="dim", no_wrap=True, overflow="ellipsis", max_width=room)
    table.add_column("state", header_style="dim", min_width=max(map(len, ("with the commit", *_STATES))))
    table.add_column("after", header_style="dim", min_width=7, justify="right")
    table.add_column("took", header_style="dim", min_width=8, justify="right")
    for event in events:
        table.add_row(Text(type(event).__name__, "bold"))
        for state in (state for state in states if state.event_id == event.event_id):
            inside = state.started_at is None and state.state == "succeeded"
            after = None if state.started_at is None else (state.started_at - event.occurred_at).total_seconds()
            table.add_row(
                f"  {state.subscription}",
                Text("with the commit" if inside else state.state, _STATES.get(state.state, "")),
                "" if after is None else f"{after * 1000:.0f} ms",
                "" if state.seconds is None else f"{state.seconds * 1000:.1f} ms",
            )
    console.print(table)
    for reason in filter(None, (getattr(event, "reason", None) for event in events)):
        console.print(f"  reason: {reason}\n")


def _print_log(console: Console, log_file: Path) -> None:
    lines = [line for line in log_file.read_text(encoding="utf-8").splitlines() if "user_registration_" in line]
    console.print(Rule(Text("in the log, one line of JSON each", "bold"), align="left"))
    for line in lines[:2]:
        console.print(Syntax(line, "json", background_color="default", word_wrap=True))
    console.print()


def _print_addresses(console: Console, addresses: dict[str, str]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False, padding=(0, 3, 0, 0))
    for name, address in addresses.items():
        table.add_row(Text(name, "bold"), address)
    console.print(Rule(Text("Dashtam is up", "bold green"), align="left"))
    console.print(table)


if __name__ == "__main__":
    sys.exit(main())
