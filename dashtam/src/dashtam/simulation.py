"""`make demo SIMULATE=200`: many people live a day at once, faults included, and every event is accounted for."""

import asyncio
import json
import random
import time
from collections import Counter, defaultdict
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn
from rich.rule import Rule
from rich.table import Table
from rich.text import Text
from sqlalchemy import func, select

from dashtam.bootstrap import Application
from dashtam.inbox import Inbox
from dashtam.infrastructure.tables import AccountModel, ConnectionModel, UserModel
from dashtam.visitor import Visitor, WentWrong
from whereupon.schema import exception, log, workflow

AT_ONCE: Final = 16
"""People who do something at the same time."""
GREYLISTED: Final = 0.05
"""The share of mails that the mail server takes only at the second attempt."""
SETTLES_WITHIN: Final = 300.0
"""Seconds after the last person went to bed in which all that was put off has to come to its end."""

_NAMES: Final = ("Ada", "Alan", "Barbara", "Donald", "Edsger", "Frances", "Grace", "John", "Katherine", "Radia")
_FAULTS: Final[tuple[dict[str, Any], ...]] = (
    {"at": "accounts", "status": 500, "times": 2},
    {"at": "accounts", "status": 429, "retry_after": 1, "times": 2},
    {"at": "accounts", "status": 401, "times": 1},
    {"at": "transactions", "status": 503, "times": 2},
    {"at": "transactions", "status": None, "delay_seconds": 0.5, "times": 3},
    {"at": "token", "status": 503, "times": 1},
    {"lie": "float_amount", "times": 1},
    {"lie": "not_json", "times": 1},
)
_MAILED: Final = {
    "UserRegistrationSucceeded",
    "EmailVerificationSucceeded",
    "UserPasswordChangeSucceeded",
    "PasswordResetRequestSucceeded",
    "PasswordResetConfirmSucceeded",
    "ProviderConnectionSucceeded",
}
_MAILED_IF: Final = {"UserRegistrationFailed": "email_taken", "TokenRefreshFailed": "invalid_grant"}


@dataclass
class Day:
    """What happened so far, for the live view."""

    people: int
    done: int = 0
    did: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)


async def simulate(
    console: Console,
    application: Application,
    inbox: Inbox,
    visitor: Callable[[str, str, str], Visitor],
    people: int,
    seed: int | None,
    stop: asyncio.Event,
) -> int:
    """0 if everything that was owed came, 1 if not, or if it was stopped before the end."""
    seed = random.SystemRandom().randrange(10**6) if seed is None else seed
    console.print(Rule(Text(f"{people} people live a day (seed {seed})", "bold"), align="left"))
    chance = random.Random(seed)
    inbox.greylisted = GREYLISTED
    run, day, visitors = f"{chance.randrange(16**6):06x}", Day(people), []
    turns = asyncio.Semaphore(AT_ONCE)
    begun = time.monotonic()

    async def live(number: int) -> None:
        name = f"{_NAMES[number % len(_NAMES)]} {number}"
        person = visitor(name, f"{name.lower().replace(' ', '.')}.{run}@example.com", f"correct horse {number}")
        visitors.append(person)
        own = random.Random(chance.random())
        async with turns:
            try:
                await _a_day(person, own, day)
            except WentWrong as error:
                day.wrong.append(str(error))
            day.done += 1

    with Live(console=console, refresh_per_second=4, transient=True) as screen:
        living = asyncio.gather(*(live(number) for number in range(people)))
        ended = asyncio.ensure_future(stop.wait())
        try:
            while not living.done() and not ended.done():
                screen.update(await _view(application, inbox, day, visitors, begun, "living"))
                await asyncio.wait((living, ended), timeout=0.25, return_when=asyncio.FIRST_COMPLETED)
            if not living.done():
                return 1
            await living
            inbox.greylisted = 0.0
            deadline = time.monotonic() + SETTLES_WITHIN
            while await _put_off(application) and time.monotonic() < deadline and not ended.done():
                screen.update(await _view(application, inbox, day, visitors, begun, "waiting for what was put off"))
                await asyncio.wait((ended,), timeout=0.25)
        finally:
            living.cancel()
            ended.cancel()
            await asyncio.gather(living, ended, return_exceptions=True)
    await application.bus.drain(SETTLES_WITHIN)
    console.print(await _view(application, inbox, day, visitors, begun, "done"))
    return 0 if await _reconciled(console, application, inbox, visitors, day) else 1


async def _a_day(person: Visitor, chance: random.Random, day: Day) -> None:
    async def did(what: str, doing: Awaitable[Any]) -> Any:
        answer = await doing
        day.did[what] += 1
        return answer

    def happens(share: float) -> bool:
        return chance.random() < share

    if happens(0.08):
        await did("chose a weak password", person.register("weak", expect=422))
    await did("registered", person.register())
    if happens(0.1):
        await did("registered again", person.register())
    if happens(0.05):
        return  # never opens the mail
    await did("confirmed the address", person.verify())
    if happens(0.15):
        await did("mistyped the password", person.log_in("wrong horse 8", expect=401))
    await did("logged in", person.log_in())
    if happens(0.85):
        await _at_the_bank(person, chance, did)
    if happens(0.2):
        await did("changed the password", person.change_password(f"battery staple {chance.randrange(1000)}"))
        await did("logged in", person.log_in())
    if happens(0.15):
        since = len(person.mails("Choose a new password"))
        await did("forgot the password", person.forget_password())
        await did("reset the password", person.reset_password(f"a spare staple {chance.randrange(1000)}", since))
        await did("logged in", person.log_in())
    if happens(0.15):
        await did("logged out every device", person.ask("DELETE", "/sessions", expect=200))
        return
    if happens(0.6):
        await did("logged out", person.log_out())


async def _at_the_bank(
    person: Visitor, chance: random.Random, did: Callable[[str, Awaitable[Any]], Awaitable[Any]]
) -> None:
    await person.at_bank("PUT", "")
    if chance.random() < 0.08:
        await did("denied consent", person.connect("deny", expect=403))
    faulty = chance.random() < 0.3
    if faulty:
        fault = chance.choice([fault for fault in _FAULTS if fault.get("at") != "token"])
        await did("had a bank with a fault", person.at_bank("PUT", "faults", fault))
    await did("connected the bank", person.connect())
    (connection,) = await person.connections()
    for _ in range(chance.randrange(3)):
        await did("paid by card", person.at_bank("POST", "activity", {"transactions": chance.randrange(1, 5)}))
        await did("synced", person.sync(connection["id"]))
    if chance.random() < 0.08:
        await did("ended the consent", person.at_bank("POST", "grant/revoke"))
        await did("synced", person.sync(connection["id"]))
        return
    if chance.random() < 0.1:
        await did("disconnected the bank", person.disconnect(connection["id"]))
        return
    if chance.random() < 0.2:
        await did("had a bank with a fault", person.at_bank("PUT", "faults", chance.choice(_FAULTS)))
        await did("let the token expire", person.at_bank("POST", "access-token/expire"))
        await did("synced", person.sync(connection["id"]))


async def _put_off(application: Application) -> int:
    """How much waits for another attempt, or for its turn."""
    async with application.bus.engine.connect() as connection:
        exceptions = await connection.scalar(select(func.count()).where(exception.c.state.in_(("retrying", "parked"))))
        attempts = await connection.scalar(select(func.count()).where(workflow.c.state == "open"))
    return (exceptions or 0) + (attempts or 0)


async def _view(
    application: Application, inbox: Inbox, day: Day, visitors: list[Visitor], begun: float, doing: str
) -> Group:
    async with application.bus.engine.connect() as connection:
        events = await connection.scalar(select(func.count()).select_from(log))
        put_off = await connection.execute(select(exception.c.state, func.count()).group_by(exception.c.state))
        states: dict[str, int] = {state: count for state, count in put_off}  # noqa: C416 (rows are no tuples to mypy)
    statuses = sum((person.statuses for person in visitors), Counter[int]())
    seconds = time.monotonic() - begun
    progress = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.completed}/{task.total} people"),
        TextColumn(f"{seconds:.0f} s"),
    )
    progress.add_task(doing, total=day.people, completed=day.done)
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    requests = sum(statuses.values())
    table.add_row("requests", f"{requests:,}", Text(f"{requests / max(seconds, 0.1):,.0f} a second", "dim"))
    table.add_row("events", f"{events:,}", Text(f"{(events or 0) / max(seconds, 0.1):,.0f} a second", "dim"))
    table.add_row("mails", f"{len(inbox.mails):,}", Text(f"{inbox.put_off:,} put off by the mail server", "dim"))
    shown = ", ".join(f"{count} {state}" for state, count in sorted(states.items())) or "none"
    table.add_row("not delivered at once", shown, "")
    did = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    for what, count in day.did.most_common():
        did.add_row(Text(f"{count:,}", justify="right"), Text(what, "dim"))
    return Group(progress, table, did)


def _chunks(ids: list[UUID], size: int = 500) -> Iterator[list[UUID]]:
    for start in range(0, len(ids), size):
        yield ids[start : start + size]


async def _reconciled(
    console: Console, application: Application, inbox: Inbox, visitors: list[Visitor], day: Day
) -> bool:
    """Print what was published and what became of all of it; whether nothing is missing."""
    missing = list(day.wrong)
    console.print(Rule(Text("reconciliation", "bold"), align="left"))
    async with application.bus.engine.connect() as connection:
        rows = (await connection.execute(select(log.c.event_id, log.c.type, log.c.payload))).all()
        attempts = (
            await connection.execute(
                select(workflow.c.name, workflow.c.state, func.count()).group_by(workflow.c.name, workflow.c.state)
            )
        ).all()
    missing += await _deliveries(console, application, rows)
    missing += _attempts(console, Counter(row.type for row in rows), attempts)
    missing += _mails(console, inbox, rows)
    missing += await _balances(console, application, visitors)
    for what in missing[:20]:
        console.print(f"[bold red]✗[/bold red] {what}", highlight=False)
    if len(missing) > 20:
        console.print(f"… and {len(missing) - 20} more")
    if not missing:
        console.print("[bold green]✓ Nothing is missing, and nothing is there that should not be.[/bold green]")
    return not missing


async def _deliveries(console: Console, application: Application, rows: Any) -> list[str]:
    states: defaultdict[str, Counter[str]] = defaultdict(Counter)
    missing = []
    for ids in _chunks([row.event_id for row in rows]):
        for delivery in await application.bus.deliveries(*ids):
            states[delivery.event_type][delivery.state] += 1
            if delivery.state not in ("succeeded", "skipped"):
                missing.append(
                    f"{delivery.event_type} {delivery.event_id} for {delivery.subscription}: {delivery.state}"
                    + (f", {delivery.error}" if delivery.error else "")
                )
    published = Counter(row.type for row in rows)
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("event", "published", "owed to handlers", "succeeded", "skipped", "missing"):
        table.add_column(column, header_style="dim", justify="left" if column == "event" else "right")
    for name, count in sorted(published.items()):
        of = states[name]
        left = of.total() - of["succeeded"] - of["skipped"]
        table.add_row(
            name, *(f"{number:,}" for number in (count, of.total(), of["succeeded"], of["skipped"])),
            Text(f"{left:,}", "bold red" if left else "green"),
        )  # fmt: skip
    console.print(table)
    return missing


def _attempts(console: Console, published: Counter[str], attempts: Any) -> list[str]:
    """Each attempt has one outcome, and each outcome of a workflow is in the log."""
    missing = []
    states: defaultdict[str, Counter[str]] = defaultdict(Counter)
    for name, state, count in attempts:
        states[name][state] += count
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for column in ("workflow", "attempted", "succeeded", "failed", "interrupted", "open"):
        table.add_column(column, header_style="dim", justify="left" if column == "workflow" else "right")
    for name, of in sorted(states.items()):
        table.add_row(name, f"{of.total():,}", *(f"{of[s]:,}" for s in ("succeeded", "failed", "interrupted", "open")))
        if of["open"]:
            missing.append(f"{of['open']} attempts at {name} have no outcome")
    for name in {type_.removesuffix("Attempted") for type_ in published if type_.endswith("Attempted")}:
        attempted, outcomes = published[f"{name}Attempted"], published[f"{name}Succeeded"] + published[f"{name}Failed"]
        if attempted != outcomes:
            missing.append(f"{name}: {attempted} attempted, {outcomes} outcomes")
    console.print(table)
    return missing


def _mails(console: Console, inbox: Inbox, rows: Any) -> list[str]:
    owed = sum(
        row.type in _MAILED or _MAILED_IF.get(row.type, ...) == json.loads(row.payload).get("reason") for row in rows
    )
    came = len({mail.message["Message-ID"] for mail in inbox.mails})
    console.print(f"mails: {owed:,} owed, {came:,} came, {len(inbox.mails) - came} of them twice", highlight=False)
    return [] if owed == came else [f"{owed} mails were owed and {came} came"]


async def _balances(console: Console, application: Application, visitors: list[Visitor]) -> list[str]:
    """Every account of everybody who is still connected is at Dashtam as it is at the bank."""
    missing = []
    compared = 0
    for person in visitors:
        async with application.database.get_session() as session:
            found = await session.execute(
                select(AccountModel.provider_account_id, AccountModel.balance, AccountModel.status)
                .join(ConnectionModel, ConnectionModel.id == AccountModel.connection_id)
                .join(UserModel, UserModel.id == ConnectionModel.user_id)
                .where(UserModel.email == person.email, ConnectionModel.status == "active")
            )
            ours = {row.provider_account_id: (str(row.balance), row.status) for row in found}
        if ours:
            at_bank = await person.at_bank("GET", "")
            theirs = {each["id"]: (each["balance"], each["status"]) for each in at_bank["accounts"]}
            compared += len(theirs)
            if ours != theirs:
                missing.append(f"the accounts of {person.name} are {ours} here and {theirs} at the bank")
    console.print(f"accounts: {compared:,} compared with the bank's", highlight=False)
    return missing
