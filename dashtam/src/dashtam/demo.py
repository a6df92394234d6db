"""`make demo`: Dashtam, its inbox and a bank on this machine, what a few people do there, and what followed each."""

import argparse
import asyncio
import secrets
import signal
import sys
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

import httpx
from pydantic import SecretStr
from rich.console import Console
from rich.markup import escape
from rich.rule import Rule
from rich.syntax import Syntax
from rich.table import Table
from rich.text import Text

from dashtam.bootstrap import Application, Settings, api_of, build
from dashtam.inbox import Inbox
from dashtam.infrastructure import schema
from dashtam.infrastructure.bank import SANDBOX, ProviderSettings
from dashtam.infrastructure.logs import forward_standard_logging, make_logger
from dashtam.infrastructure.secret_keys import SecretKeyError, make_key
from dashtam.serving import HOST, bound, serving
from dashtam.simulation import simulate
from dashtam.visitor import LIMITS, PATIENCE, Visitor, WentWrong
from whereupon import Delivery, DeliveryState, DomainEvent, EventContext, WhereuponError

FOLDER: Final = Path(".demo")

_STATES: Final = {
    "succeeded": "green",
    "waiting": "yellow",
    "running": "yellow",
    "retrying": "yellow",
    "dead": "bold red",
    "skipped": "magenta",
}


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
        """What followed from a request so far, in order, once that is `count` events at least."""
        async with self._more:
            await self._more.wait_for(lambda: len(self._seen[correlation]) >= count)
        return sorted(self._seen[correlation], key=lambda event: event.event_id)


@dataclass(frozen=True, slots=True)
class Step:
    """Something that a person does, and what should come of it."""

    visitor: Visitor
    title: str
    act: Callable[[], Awaitable[httpx.Response]]
    status: int
    mail: str | None = None
    """The subject of the mail that they should get."""
    events: int = 2
    """How many follow at least: an attempt and an outcome."""
    skipped: bool = False
    """Whether a handler may say that there is nothing for it to do."""


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m dashtam.demo",
        description="Start Dashtam with an inbox and a bank, show what a few people do and what follows, and stay up.",
    )
    parser.add_argument(
        "--database-url",
        metavar="URL",
        help=f"PostgreSQL, say: postgresql+asyncpg://user@host/database (default: SQLite, a new file in {FOLDER}/)",
    )
    parser.add_argument("--once", action="store_true", help="end after the tour: exit code 0 if everything happened")
    parser.add_argument(
        "--simulate",
        type=int,
        metavar="N",
        help="instead of the tour let N people live a day, faults included, and account for every event at the end",
    )
    parser.add_argument("--seed", type=int, help="of the simulation: the same people do the same (default: any)")
    chosen = parser.parse_args(arguments)
    if chosen.simulate is not None and not 1 <= chosen.simulate <= 1000:
        parser.error(f"--simulate {chosen.simulate}: from 1 to 1000 people, as the bank knows no more")
    console = Console()
    try:
        return asyncio.run(_demo(console, chosen))
    except KeyboardInterrupt:
        return 0
    except (WhereuponError, WentWrong, schema.SchemaOutdated, SecretKeyError, OSError) as error:
        Console(stderr=True).print(f"[red]demo:[/red] {error}", highlight=False, soft_wrap=True, markup=True)
        return 1


async def _demo(console: Console, chosen: argparse.Namespace) -> int:
    FOLDER.mkdir(exist_ok=True)
    database_url = chosen.database_url or f"sqlite+aiosqlite:///{_new_file()}"
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    smtp_door, door = bound(1025), bound(8000)
    smtp_port, public_url = smtp_door.getsockname()[1], f"http://{HOST}:{door.getsockname()[1]}"
    inbox, watcher = Inbox(), Watcher()
    log_file = FOLDER / "dashtam.log"
    with log_file.open("w", encoding="utf-8") as log:
        async with _bank(f"{public_url}/connect/callback") as bank_url:
            settings = Settings(
                database_url=database_url,
                smtp_port=smtp_port,
                public_url=public_url,
                providers=(_sandbox(bank_url),),
                rate_limit_factor=1000.0,  # everybody here comes from one address
                secret_keys=() if chosen.database_url is None else (SecretStr(make_key()),),
            )
            if chosen.simulate is not None:
                # As cheap as OWASP's advice still allows: many hashes are made at once.
                settings = settings.model_copy(update={"argon2_memory_kib": 19_456, "argon2_time_cost": 2})
            logger = make_logger("json", settings.log_level, log)
            forward_standard_logging(logger, "WARNING")
            application = build(settings, logger)
            application.bus.register(watcher)
            await application.bus.revision()  # a database that is down is said to be, in one line
            await schema.upgrade(application.database.engine)
            async with (
                inbox.listening(smtp_door),
                serving(inbox.app, 8025) as inbox_url,
                serving(api_of(application), door=door),
                httpx.AsyncClient(base_url=public_url, timeout=PATIENCE, limits=LIMITS) as api,
                httpx.AsyncClient(base_url=bank_url, timeout=PATIENCE, limits=LIMITS) as bank,
            ):
                addresses = {
                    "Dashtam": f"{public_url}/",
                    "API docs": f"{public_url}/docs",
                    "Inbox": f"{inbox_url}/",
                    "Bank": f"{bank_url}/",
                    "SMTP": f"{HOST}:{smtp_port}",
                    "Database": application.bus.database,
                    "Log": str(log_file),
                }

                def visitor(name: str, email: str, password: str) -> Visitor:
                    return Visitor(name, email, password, api=api, bank=bank, inbox=inbox)

                if chosen.simulate is not None:
                    return await simulate(console, application, inbox, visitor, chosen.simulate, chosen.seed, stop)
                happened = await _tour(console, application, inbox, watcher, visitor, log_file)
                _print_addresses(console, addresses)
                if not chosen.once:
                    console.print(
                        "Register somebody yourself. The bank takes any name, with the password: sandbox. "
                        "[bold]Ctrl-C[/bold] ends the demo."
                    )
                    await stop.wait()
                    console.print("\nStopping; handlers that run are let end.")
                application.live.close()  # a page that is open would keep the server waiting
    return 0 if happened else 1


@asynccontextmanager
async def _bank(callback: str) -> AsyncIterator[str]:
    """The sandbox bank, as the process of its own that it is; gives its address."""
    with bound(8100) as door:
        free = door.getsockname()[1]
    process, address = await _start_bank(free, callback)
    if address is None:  # somebody else has taken the port meanwhile
        process, address = await _start_bank(0, callback)
    if address is None:
        raise OSError(f"the sandbox bank did not start: it ended with {await process.wait()}")
    try:
        yield address
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def _start_bank(port: int, callback: str) -> tuple[asyncio.subprocess.Process, str | None]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "dashtam_sandbox_bank", "--port", str(port), "--redirect-uri", callback),
        stdout=asyncio.subprocess.PIPE,
        start_new_session=True,  # Ctrl-C is for the demo, which ends the bank last
    )
    assert process.stdout is not None
    said = (await asyncio.wait_for(process.stdout.readline(), PATIENCE)).decode().split()
    return process, said[-1] if said else None


def _sandbox(bank_url: str) -> ProviderSettings:
    return SANDBOX.model_copy(
        update={
            "authorize_url": f"{bank_url}/oauth/authorize",
            "token_url": f"{bank_url}/oauth/token",
            "revoke_url": f"{bank_url}/oauth/revoke",
            "api_url": f"{bank_url}/api",
        }
    )


def _new_file() -> Path:
    path = FOLDER / "dashtam.db"
    for old in (path, *(path.with_name(path.name + ending) for ending in ("-wal", "-shm", ".key"))):
        old.unlink(missing_ok=True)
    return path


def _steps(visitor: Callable[[str, str, str], Visitor]) -> list[Step]:
    run = secrets.token_hex(2)  # on a database that is kept, last time's people are there already
    ada = visitor("Ada", f"ada+{run}@example.com", "an analytical engine")
    grace = visitor("Grace", f"grace+{run}@example.com", "nanoseconds-of-wire")
    alan = visitor("Alan, in a hurry", f"alan+{run}@example.com", "enigma")
    nobody = visitor("Someone without an address", "nobody at all", "a long enough password")

    async def sync() -> httpx.Response:
        await ada.at_bank("POST", "activity", {"transactions": 3})
        (connection,) = await ada.connections()
        return await ada.sync(connection["id"])

    async def sync_refused() -> httpx.Response:
        await ada.at_bank("POST", "grant/revoke")
        (connection,) = await ada.connections()
        return await ada.sync(connection["id"])

    return [
        Step(ada, "registers", ada.register, 202, "Welcome to Dashtam"),
        Step(grace, "registers", grace.register, 202, "Welcome to Dashtam"),
        Step(ada, "registers again: only her mailbox is told", ada.register, 202, "You have an account with Dashtam"),
        Step(alan, "registers", lambda: alan.register(expect=422), 422),
        Step(nobody, "registers", lambda: nobody.register(expect=422), 422),
        Step(ada, "follows the link in her mail", ada.verify, 204, "You are in"),
        Step(ada, "logs in", ada.log_in, 201),
        Step(ada, "connects her bank", ada.connect, 201, "Sandbox Bank is connected to Dashtam", events=6),
        Step(ada, "pays with her card three times, then syncs", sync, 202, events=4),
        Step(
            ada,
            "ends the consent at her bank, then syncs",
            sync_refused,
            202,
            "Sandbox Bank needs your permission again",
            events=4,
            skipped=True,
        ),
        Step(
            ada,
            "changes her password: every session is over",
            lambda: ada.change_password("a difference engine"),
            204,
            "Your password was changed",
            events=4,
        ),
    ]


async def _tour(
    console: Console,
    application: Application,
    inbox: Inbox,
    watcher: Watcher,
    visitor: Callable[[str, str, str], Visitor],
    log_file: Path,
) -> bool:
    """Have people do things over HTTP, show what followed each; False if something did not happen that should have."""
    happened = True
    for step in _steps(visitor):
        answer = await step.act()
        events = await _settled(application, watcher, step)
        states = await application.bus.deliveries(*[event.event_id for event in events])
        _print_step(console, step, answer, events, states)
        if step.mail is not None:
            got = step.visitor.mails(step.mail)
            console.print(f"  in the inbox: {escape(step.mail) if got else '[red]nothing[/red]'}\n")
            happened &= len(got) == 1
        fine = {"succeeded", "skipped"} if step.skipped else {"succeeded"}
        happened &= answer.status_code == step.status and {state.state for state in states} <= fine
    _print_log(console, log_file)
    if not happened:
        console.print("[bold red]Not everything that should have followed did.[/bold red]")
    return happened


async def _settled(application: Application, watcher: Watcher, step: Step) -> list[DomainEvent]:
    """What followed from a request, and from that, once every handler is done with all of it."""
    seen = 0
    async with asyncio.timeout(PATIENCE):
        while True:
            events = await watcher.events(step.visitor.correlation, max(step.events, seen))
            if len(events) == seen:
                return events
            seen = len(events)
            await application.bus.wait_settled(events, PATIENCE)


def _print_step(
    console: Console, step: Step, answer: httpx.Response, events: list[DomainEvent], states: list[DeliveryState]
) -> None:
    status = Text(f" {answer.status_code} {answer.reason_phrase} ", "green" if answer.is_success else "yellow")
    asked = f"  {answer.request.method} {answer.request.url.path} → "
    took = f"in {step.visitor.seconds * 1000:.0f} ms"
    title = Text.assemble((f"{step.visitor.name} {step.title}", "bold"), asked, status, took)
    console.print(Rule(title, align="left"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    room = max(30, console.width - 38)  # what the other columns leave
    table.add_column("event, whereupon", header_style="dim", no_wrap=True, overflow="ellipsis", max_width=room)
    table.add_column("state", header_style="dim", min_width=max(map(len, ("with the commit", *_STATES))))
    table.add_column("after", header_style="dim", min_width=7, justify="right")
    table.add_column("took", header_style="dim", min_width=8, justify="right")
    occurred = {event.event_id: event.occurred_at for event in events}
    for name, count in Counter(type(event).__name__ for event in events).items():
        table.add_row(Text.assemble((name, "bold"), f" ×{count}" if count > 1 else ""))
        heard: defaultdict[str, list[DeliveryState]] = defaultdict(list)
        for state in states:
            if state.event_type == name:
                heard[state.subscription].append(state)
        for subscription, found in heard.items():
            after = [(s.started_at - occurred[s.event_id]).total_seconds() for s in found if s.started_at is not None]
            seconds = [state.seconds for state in found if state.seconds is not None]
            inside = not after and all(state.state == "succeeded" for state in found)
            shown = ", ".join(sorted({state.state for state in found}))
            table.add_row(
                f"  {subscription}",
                Text("with the commit" if inside else shown, _STATES.get(shown, "yellow")),
                f"{max(after) * 1000:.0f} ms" if after else "",
                f"{sum(seconds) * 1000:.1f} ms" if seconds else "",
            )
    console.print(table)
    for failed in (event for event in events if type(event).__name__.endswith("Failed")):
        console.print(f"  reason: {getattr(failed, 'reason', '')}")
    console.print()


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
