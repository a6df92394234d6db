"""The command line: `whereupon worker`, `whereupon db upgrade`, `whereupon handlers`, `whereupon dead`."""

from __future__ import annotations

import asyncio
import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple
from uuid import UUID

import cyclopts
import msgspec
from cyclopts import Parameter

from whereupon import exporting, looking, monitoring, schema, showing
from whereupon.action import CanaryStep, DeadLetter, HandlerState, Span
from whereupon.cluster import Rebase
from whereupon.console import (
    EXIT_ERROR,
    EXIT_USAGE,
    ImportFailed,
    Json,
    Refused,
    Target,
    Url,
    Where,
    age_of,
    answer,
    answer_json,
    bus_for,
    dispose,
    err,
    load_bus,
    operate,
    progress_of,
    say,
)
from whereupon.durable import EventBus
from whereupon.errors import ActionRefused, DatabaseUnavailableError, WhereuponError
from whereupon.pace import check_rate
from whereupon.retention import Pruned

SHOWN: Final = 10
"""Dead letters that a plan names one by one."""

app = cyclopts.App(
    name="whereupon",
    help="Deliver domain events, and keep their tables.\n\nExit codes: 0 done, 1 it failed (the reason is on stderr), "
    "2 the command was wrong.",
    version_flags=["--version"],
    version=lambda: importlib.import_module("importlib.metadata").version("whereupon"),
)
db = cyclopts.App(name="db", help="The tables that whereupon keeps in the application's database.")
app.command(db)
handlers = cyclopts.App(
    name="handlers", help="Subscriptions: pause, resume, retire, adopt, replay, backfill, change their lanes."
)
app.command(handlers)
dead = cyclopts.App(name="dead", help="Dead letters: deliveries that used up their attempts.")
app.command(dead)

for command in (looking.explain, looking.doctor, looking.workflows, looking.audit, showing.dashboard):
    app.command(command)
app.command(looking.events)
app.command(exporting.catalogue)
app.command(monitoring.app)
app.register_install_completion_command()


@app.command
def worker(
    target: Target,
    /,
    *,
    verbose: Annotated[bool, Parameter(help="Log what the worker does, not only what goes wrong.")] = False,
    metrics: monitoring.Address = None,
) -> int:
    """Deliver a bus's events in this process, until SIGINT or SIGTERM.

    On a signal it begins nothing new, lets handlers end for the bus's drain_timeout, and gives its leases back; a
    second signal ends it at once. A database that is down is waited for.
    """
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(message)s",
        stream=sys.stderr,
    )
    bus = load_bus(target)
    with monitoring.metrics_at(bus, metrics):
        asyncio.run(_work(bus, target))
    return 0


async def _work(bus: EventBus, target: str) -> None:
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()

    def on_signal(number: int) -> None:
        if stop.is_set():
            os._exit(128 + number)
        stop.set()

    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, on_signal, number)
    try:
        if await _started(bus, stop):
            await _deliver(bus, target, stop)
    finally:
        await dispose(bus)


async def _deliver(bus: EventBus, target: str, stop: asyncio.Event) -> None:
    served = [s.name for s in bus.subscriptions]
    say(f"worker for {target}: {len(served)} subscriptions on {bus.database}. Ctrl-C ends it.")
    await stop.wait()
    say("stopping; handlers that run are let end.")
    await bus.close(drain=False)


async def _started(bus: EventBus, stop: asyncio.Event) -> bool:
    """Start the bus, waiting for a database that is down; False if stopped meanwhile."""
    wait = 0.5
    while True:
        try:
            await bus.start(deliver=True)
            return True
        except DatabaseUnavailableError as error:
            say(f"{error}. Trying again in {wait:g} s.", style="yellow")
        try:
            await asyncio.wait_for(stop.wait(), wait)
            return False
        except TimeoutError:
            wait = min(wait * 2, 30.0)


Reason = Annotated[str, Parameter(help="Why; kept with what is done.")]
Author = Annotated[str | None, Parameter(help="Who does it; the user of this machine unless given.")]
Yes = Annotated[bool, Parameter(negative="", help="Do it without asking.")]
Name = Annotated[str, Parameter(help="The subscription.")]
Event = Annotated[UUID, Parameter(help="The event's id.")]
Only = Annotated[str | None, Parameter(help="Of this subscription.")]
Fingerprint = Annotated[str | None, Parameter(help="Of this cause, as `dead groups` names it.")]
ErrorType = Annotated[str | None, Parameter(help="That died of this error, as `ValueError`.")]


def _confirm(plan: str, yes: bool) -> bool:
    """Show what is to be done, and ask whether to do it. Raises `Refused` where nobody can be asked."""
    say(plan)
    if yes:
        return True
    if not sys.stdin.isatty():
        raise Refused("nobody can be asked whether to do this, since stdin is no terminal: add --yes")
    err.print("Do it? [y/N] ", end="", markup=False, highlight=False)
    if input().strip().lower() in ("y", "yes"):
        return True
    say("nothing was changed.")
    return False


def _done(text: str, as_json: bool, **facts: Any) -> int:
    if as_json:
        answer_json(facts)
    else:
        answer(text)
    return 0


@db.command
def upgrade(target: Where = None, /, *, url: Url = None) -> int:
    """Create whereupon's tables, or bring them up to this version.

    Safe to repeat, and to run on several hosts at once.
    """
    bus = bus_for(target, url)

    async def run() -> tuple[int | None, int | None]:
        try:
            before = await bus.revision()
            await bus.create_tables()
            return before, await bus.revision()
        finally:
            await dispose(bus)

    before, after = asyncio.run(run())
    if before == after:
        answer(f"{bus.database} is at revision {after} already.")
    else:
        answer(f"{bus.database} is at revision {after} now (before: {before or 'no tables'}).")
    return 0


@db.command
def status(target: Where = None, /, *, url: Url = None) -> int:
    """Say which revision the tables are at; exit code 1 unless this build can use them."""
    bus = bus_for(target, url)

    async def run() -> int | None:
        try:
            return await bus.revision()
        finally:
            await dispose(bus)

    revision = asyncio.run(run())
    schema.check_revision(revision, bus.database)
    answer(f"{bus.database} is at revision {revision}, as this build needs it.")
    return 0


@db.command
def rebase(
    target: Where = None,
    /,
    *,
    reason: Reason,
    author: Author = None,
    url: Url = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Go on in the PostgreSQL cluster that the database was restored or replicated into.

    Needed once after a restore from a dump, a switch to a logical replica or pg_upgrade: until then nothing is
    delivered, and what is published waits. Each subscription goes on where it stood. Safe to repeat.
    """

    async def work(bus: EventBus) -> int:
        plan = await bus.operator.rebasable()
        if not plan.needed and not plan.placed:
            return _rebased(f"{bus.database} is where it was: nothing to do.", plan, as_json)
        subscriptions = len(await bus.operator.handlers())
        head = (
            f"{bus.database} was in another PostgreSQL cluster. Go on in this one, its cluster number {plan.number}: "
            f"{subscriptions} subscriptions go on where they stood, the leases of the old cluster's workers end"
            if plan.needed
            else f"{bus.database} goes on in this cluster already"
        )
        waiting = f"{plan.placed} events that were published here meanwhile are delivered after all older ones"
        if not _confirm(f"{head}; {waiting}. Publishers wait for it.", yes):
            return EXIT_ERROR
        done = await bus.operator.rebase(reason, author=author)
        text = (
            f"{bus.database} goes on here, its cluster number {done.number}. {done.placed} events that were published "
            "here before this are delivered after all older ones. Start the workers."
        )
        return _rebased(text, done, as_json)

    return operate(target, url, work)


def _rebased(text: str, done: Rebase, as_json: bool) -> int:
    return _done(text, as_json, needed=done.needed, cluster=done.number, placed=done.placed)


@db.command
def prune(
    target: Where = None,
    /,
    *,
    older_than: Annotated[str, Parameter(help="The age from which events go: 30d, 12h, 90m, 45s or 2w.")],
    reason: Annotated[str | None, Parameter(help="Why; kept with what is done. Needed without --dry-run.")] = None,
    rate: Annotated[float | None, Parameter(help="So many rows a second, at most, of what goes one by one.")] = None,
    author: Author = None,
    url: Url = None,
    yes: Yes = False,
    dry_run: Annotated[
        bool, Parameter(negative="", help="Only say what would go, and what holds back what; exit code 0.")
    ] = False,
    as_json: Json = False,
) -> int:
    """Delete old events that every subscription has passed, and tell what stays.

    What a cursor has not passed stays, however old it is: the answer names the subscription. Dead letters keep a copy
    of their event, and hold nothing back. The history of calls and attempts that are closed go after 7 days; the
    audit trail is never pruned.
    """
    age = age_of(older_than)
    check_rate("prune", rate)
    if not dry_run and not (reason or "").strip():
        raise Refused("say why: --reason TEXT is kept with what is done. --dry-run only says what would go")

    async def work(bus: EventBus) -> int:
        plan = await bus.operator.prunable(older_than=age)
        if dry_run:
            return _pruned(plan, as_json)
        speed = "" if rate is None else f"\nat {rate:g} rows a second"
        if not _confirm("\n".join(("prune:", *_told(plan))) + speed, yes):
            return EXIT_ERROR
        report = await bus.operator.prune(str(reason), older_than=age, rate=rate, author=author, progress=say)
        return _pruned(report, as_json)

    return operate(target, url, work)


def _pruned(report: Pruned, as_json: bool) -> int:
    if as_json:
        answer_json({**msgspec.to_builtins(report), "holders": report.holders})
        return 0
    for line in _told(report):
        answer(line)
    return 0


def _told(report: Pruned) -> Iterator[str]:
    would = "would go" if report.dry_run else "went"
    yield f"Events recorded before {report.before:%Y-%m-%d %H:%M:%S} UTC:"
    for dropped in report.dropped:
        yield f"  {dropped.name}, positions {dropped.first} to {dropped.last}: {would} as a whole"
    yield f"  {report.deleted} {would} one by one"
    yield f"  {report.history} rows of the history of calls and {report.attempts} closed attempts {would}"
    for kept in report.kept:
        match kept.why:
            case "held":
                yield f"  {kept.where} keeps what these have not passed:"
                yield from (f"    {holder}" for holder in kept.holders)
            case "young":
                yield f"  {kept.where} keeps some, and goes as a whole when its last event is old enough"
            case _:
                yield f"  {kept.where} stays for now: a transaction was in the way all the time. Try again later"


# --- operating --------------------------------------------------------------------------------------------------------


@handlers.command(name="list")
def list_handlers(target: Where = None, /, *, url: Url = None, as_json: Json = False) -> int:
    """Say which subscriptions there are, and how they are."""
    found = operate(target, url, lambda bus: bus.operator.handlers())
    if as_json:
        answer_json(found)
        return 0
    for one in found:
        order = f", ordered by {one.ordered_by}" if one.ordered_by else ""
        counts = "".join(f", {number} {state}" for state, number in sorted(one.exceptions.items()))
        served = "paused" if one.paused else f"{one.held} of {one.lanes} lanes held"
        answer(f"{one.name}: {served}{order}{counts}")
        if one.paused_because:
            answer(f"  {one.paused_because}")
    if not found:
        answer("no subscriptions.")
    return 0


def _plan_for(one: HandlerState) -> str:
    counts = ", ".join(f"{number} {state}" for state, number in sorted(one.exceptions.items())) or "none"
    return f"{one.name}: {one.lanes} lanes, {one.held} held by workers; exceptions: {counts}"


async def _handler(bus: EventBus, name: str) -> HandlerState:
    found = {one.name: one for one in await bus.operator.handlers()}
    if name not in found:
        raise Refused(f"there is no subscription {name!r} in {bus.database}: there is {', '.join(found) or 'none'}")
    return found[name]


@handlers.command
def pause(
    name: Name,
    target: Where = None,
    /,
    *,
    reason: Reason,
    author: Author = None,
    url: Url = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Have no worker begin deliveries of a subscription, until it is resumed. What runs ends."""
    return _pause(name, target, url, reason, author, yes, as_json, pausing=True)


@handlers.command
def resume(
    name: Name,
    target: Where = None,
    /,
    *,
    reason: Reason,
    author: Author = None,
    url: Url = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Have workers deliver again where they stopped."""
    return _pause(name, target, url, reason, author, yes, as_json, pausing=False)


def _pause(
    name: str,
    target: str | None,
    url: str | None,
    reason: str,
    author: str | None,
    yes: bool,
    as_json: bool,
    *,
    pausing: bool,
) -> int:
    what = "pause" if pausing else "resume"

    async def work(bus: EventBus) -> int:
        one = await _handler(bus, name)
        if not _confirm(f"{what} {_plan_for(one)}", yes):
            return EXIT_ERROR
        act = bus.operator.pause if pausing else bus.operator.resume
        changed = await act(name, reason, author=author)
        text = (
            f"{name} is {what}d."
            if changed
            else f"{name} was {what}d already."
            if pausing
            else f"{name} was not paused."
        )
        return _done(text, as_json, subscription=name, changed=changed)

    return operate(target, url, work)


@handlers.command
def retire(
    name: Name,
    target: Where = None,
    /,
    *,
    reason: Reason,
    author: Author = None,
    url: Url = None,
    yes: Yes = False,
    force: Annotated[bool, Parameter(negative="", help="Even while a live worker serves it.")] = False,
    as_json: Json = False,
) -> int:
    """Forget a subscription that no build declares any more: its place in the log and its exceptions are deleted."""

    async def work(bus: EventBus) -> int:
        one = await _handler(bus, name)
        if not _confirm(f"retire {_plan_for(one)}; its place in the log and its exceptions are deleted", yes):
            return EXIT_ERROR
        lost = await bus.operator.retire(name, reason, author=author, force=force)
        text = f"{name} is retired, with {sum(lost.values())} exceptions."
        return _done(text, as_json, subscription=name, exceptions=lost)

    return operate(target, url, work)


@handlers.command
def adopt(
    name: Name,
    target: Target,
    /,
    *,
    reason: Reason,
    author: Author = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Go on with a subscription as this build declares it, after a newer build was rolled back.

    Events that only the newer definition hears are passed over from then on.
    """

    async def work(bus: EventBus) -> int:
        one = await _handler(bus, name)
        if not _confirm(f"serve {_plan_for(one)} as this build declares it", yes):
            return EXIT_ERROR
        changed = await bus.operator.adopt(name, reason, author=author)
        text = f"{name} is served as this build declares it" + ("." if changed else " already.")
        return _done(text, as_json, subscription=name, changed=changed)

    return operate(target, None, work)


@handlers.command
def replay(
    name: Name,
    target: Target,
    /,
    *,
    reason: Reason,
    since: Annotated[
        datetime | None, Parameter(help="From what was recorded then or later; else the beginning.")
    ] = None,
    until: Annotated[datetime | None, Parameter(help="Up to what was recorded before that; else now.")] = None,
    rate: Annotated[float | None, Parameter(help="Deliveries a second, at most.")] = None,
    author: Author = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Deliver a range of the log to a subscription again, beside what is new. Times without a zone are UTC."""

    async def work(bus: EventBus) -> int:
        one = await _handler(bus, name)
        span = f"from {since or 'the beginning'} to {until or 'now'}"
        found = await bus.operator.replayable(name, since=_aware(since), until=_aware(until))
        plan = f"deliver {span}, {_many(name, found, rate)}, to {_plan_for(one)} again, each with a new idempotency key"
        if not _confirm(plan, yes):
            return EXIT_ERROR
        generation = await bus.operator.replay(
            name, reason, since=_aware(since), until=_aware(until), rate=rate, author=author
        )
        text = f"{name} is delivered {span} again, as generation {generation}."
        return _done(text, as_json, subscription=name, generation=generation)

    return operate(target, None, work)


@handlers.command
def backfill(
    name: Name,
    target: Target,
    /,
    *,
    reason: Reason,
    since: Annotated[
        datetime | None, Parameter(help="From what was recorded then or later; else the beginning.")
    ] = None,
    rate: Annotated[float | None, Parameter(help="Deliveries a second, at most.")] = None,
    author: Author = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Give a subscription that started from now what was published before it was there.

    Beside what is new, and once: replay delivers a range again. Times without a zone are UTC.
    """

    async def work(bus: EventBus) -> int:
        one = await _handler(bus, name)
        span = f"from {since or 'the beginning'} to {one.created_at:%Y-%m-%d %H:%M:%S} UTC, when it was registered,"
        found = await bus.operator.replayable(name, since=_aware(since), until=one.created_at)
        if found is not None:  # else it is refused below, for that or because it was done before
            plan = f"deliver what is {span} {_many(name, found, rate)}, to {_plan_for(one)}"
            if not _confirm(plan, yes):
                return EXIT_ERROR
        generation = await bus.operator.backfill(name, reason, since=_aware(since), rate=rate, author=author)
        text = f"{name} gets what is {span} as generation {generation}."
        return _done(text, as_json, subscription=name, generation=generation)

    return operate(target, None, work)


def _many(name: str, found: Span | None, rate: float | None) -> str:
    if found is None:
        raise ActionRefused(f"there is nothing in the log that {name} hears in that time")
    speed = "" if rate is None else f" at {rate:g} a second"
    return f"{found.most} events at most (positions {found.first} to {found.last}){speed}"


def _aware(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo is not None else moment.replace(tzinfo=UTC)


@handlers.command
def lanes(
    name: Name,
    number: Annotated[int, Parameter(help="Into how many lanes.")],
    target: Target,
    /,
    *,
    reason: Reason,
    author: Author = None,
    yes: Yes = False,
    timeout: Annotated[float, Parameter(help="Seconds to wait for what runs.")] = 60.0,
    as_json: Json = False,
) -> int:
    """Split a subscription into another number of lanes. It is paused meanwhile."""

    async def work(bus: EventBus) -> int:
        one = await _handler(bus, name)
        if not _confirm(f"split into {number} lanes, pausing meanwhile: {_plan_for(one)}", yes):
            return EXIT_ERROR

        def progress(held: int) -> None:
            say(f"{held} lanes are held." if held else "no lane is held any more.")

        before = await bus.operator.lanes(name, number, reason, author=author, timeout=timeout, progress=progress)
        text = f"{name} has {number} lanes now (before: {before})."
        return _done(text, as_json, subscription=name, lanes=number, before=before)

    return operate(target, None, work)


@dead.command(name="list")
def list_dead(
    target: Where = None,
    /,
    *,
    url: Url = None,
    subscription: Only = None,
    error_type: ErrorType = None,
    fingerprint: Fingerprint = None,
    after: Annotated[int, Parameter(help="Go on after this id, the last that was listed.")] = 0,
    limit: Annotated[int, Parameter(help="So many at most.")] = 100,
    as_json: Json = False,
) -> int:
    """List dead letters, oldest first."""
    found = operate(
        target,
        url,
        lambda bus: bus.operator.dead(
            subscription, error_type=error_type, fingerprint=fingerprint, after=after, limit=limit
        ),
    )
    if as_json:
        answer_json([_shown_letter(letter) for letter in found])
        return 0
    for letter in found:
        answer(_line(letter))
    if not found:
        answer("no dead letters.")
    elif len(found) == limit:
        answer(f"there may be more: --after {found[-1].id}")
    return 0


@dead.command
def groups(
    target: Where = None,
    /,
    *,
    url: Url = None,
    subscription: Only = None,
    limit: Annotated[int, Parameter(help="So many causes at most.")] = 100,
    as_json: Json = False,
) -> int:
    """Say what dead letters died of, and how many of each cause there are."""
    found = operate(target, url, lambda bus: bus.operator.groups(subscription, limit=limit))
    if as_json:
        answer_json(found)
        return 0
    for group in found:
        error = (group.error_message or "").partition("\n")[0]
        answer(
            f"{group.fingerprint}  {group.subscription}  {group.number}{' and more' if group.more else ''}  "
            f"{group.error_type}: {error}"
        )
        answer(f"  from {group.oldest:%Y-%m-%d %H:%M:%S} to {group.newest:%Y-%m-%d %H:%M:%S} UTC")
    if not found:
        answer("no dead letters.")
    elif len(found) == limit:
        answer("there may be more: --limit")
    return 0


def _line(letter: DeadLetter) -> str:
    error = (letter.error_message or "").partition("\n")[0]
    return (
        f"{letter.id}  {letter.subscription}  {letter.event_id}  {letter.event_type}  {letter.attempts} attempts  "
        f"{letter.error_type}: {error}"
    )


def _shown_letter(letter: DeadLetter) -> dict[str, Any]:
    shown = {name: getattr(letter, name) for name in letter.__dataclass_fields__}
    if letter.payload is not None:
        shown["payload"] = letter.payload.decode("utf-8", "backslashreplace")
    return shown


@dead.command
def show(subscription: Name, event: Event, target: Where = None, /, *, url: Url = None, as_json: Json = False) -> int:
    """Show one delivery with its event and its error, dead or waiting for something else."""
    letter = operate(target, url, lambda bus: bus.operator.delivery(subscription, event))
    shown = _shown_letter(letter)
    if as_json:
        answer_json(shown)
        return 0
    for name, value in shown.items():
        if value is not None:
            answer(f"{name}: {value}")
    return 0


Chosen = Annotated[UUID | None, Parameter(name="--event", help="This event only; takes --subscription as well.")]
Limit = Annotated[int, Parameter(help="So many at most, the oldest first.")]
Rate = Annotated[float | None, Parameter(help="So many a second, at most.")]


@dead.command
def retry(
    target: Where = None,
    /,
    *,
    reason: Reason,
    subscription: Only = None,
    event: Chosen = None,
    error_type: ErrorType = None,
    fingerprint: Fingerprint = None,
    limit: Limit = 1000,
    rate: Rate = None,
    canary: Annotated[
        bool, Parameter(negative="", help="1 first, then 10, 100, all: as long as none fails. Takes --subscription.")
    ] = False,
    author: Author = None,
    url: Url = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Deliver dead letters again, with all their attempts."""
    which = _Which(subscription, event, error_type, fingerprint)
    if canary:
        return _canary(target, url, which, rate, reason, author, yes, as_json)
    return _settle("retry", target, url, which, limit, rate, reason, author, yes, as_json)


@dead.command
def skip(
    target: Where = None,
    /,
    *,
    reason: Reason,
    subscription: Only = None,
    event: Chosen = None,
    error_type: ErrorType = None,
    fingerprint: Fingerprint = None,
    limit: Limit = 1000,
    rate: Rate = None,
    author: Author = None,
    url: Url = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Settle dead letters without a delivery; what waits behind them goes on."""
    which = _Which(subscription, event, error_type, fingerprint)
    return _settle("skip", target, url, which, limit, rate, reason, author, yes, as_json)


class _Which(NamedTuple):
    """The dead letters that were named."""

    subscription: str | None
    event: UUID | None
    error_type: str | None
    fingerprint: str | None

    async def find(self, bus: EventBus, limit: int) -> list[DeadLetter]:
        if self.event is not None:
            return [await bus.operator.delivery(str(self.subscription), self.event)]
        return await bus.operator.dead(
            self.subscription, error_type=self.error_type, fingerprint=self.fingerprint, limit=limit
        )


def _settle(
    what: str,
    target: str | None,
    url: str | None,
    which: _Which,
    limit: int,
    rate: float | None,
    reason: str,
    author: str | None,
    yes: bool,
    as_json: bool,
) -> int:
    causes = (which.error_type, which.fingerprint)
    if which.subscription is None and (which.event is not None or causes == (None, None)):
        raise Refused("say which: --subscription NAME, with --event ID for one; or --fingerprint or --error-type NAME")
    if which.event is not None and causes != (None, None):
        raise Refused("--event names one dead letter: leave --error-type and --fingerprint out")

    async def work(bus: EventBus) -> int:
        found = await which.find(bus, limit)
        if not found:
            return _done("no dead letters.", as_json, changed=0)
        if not _confirm("\n".join(_plan(f"{what} {len(found)} of these:", found, rate)), yes):
            return EXIT_ERROR
        act = bus.operator.retry if what == "retry" else bus.operator.skip
        with progress_of(len(found), what) as progress:
            changed = await act(
                which.subscription,
                which.event,
                reason=reason,
                author=author,
                error_type=which.error_type,
                fingerprint=which.fingerprint,
                limit=len(found),
                rate=rate,
                progress=progress,
            )
        told = "delivered again" if what == "retry" else "skipped"
        return _done(f"{changed} dead letters are {told}.", as_json, changed=changed)

    return operate(target, url, work)


def _plan(head: str, found: Sequence[DeadLetter], rate: float | None) -> Iterator[str]:
    yield head
    yield from map(_line, found[:SHOWN])
    if len(found) > SHOWN:
        yield f"and {len(found) - SHOWN} more"
    if rate is not None:
        yield f"at {rate:g} a second"


def _canary(
    target: str | None,
    url: str | None,
    which: _Which,
    rate: float | None,
    reason: str,
    author: str | None,
    yes: bool,
    as_json: bool,
) -> int:
    subscription = which.subscription
    if subscription is None or which.event is not None:
        raise Refused("--canary takes --subscription NAME, and --fingerprint or --error-type where it is of one cause")

    async def work(bus: EventBus) -> int:
        found = await which.find(bus, SHOWN + 1)
        if not found:
            return _done("no dead letters.", as_json, steps=[])
        more = " and more" if len(found) > SHOWN else ""
        head = "retry the first of these, then 10, then 100, then all, as long as none fails:"
        plan = [*_plan(head, found[:SHOWN], rate), *([more.strip()] if more else [])]
        if not _confirm("\n".join(plan), yes):
            return EXIT_ERROR
        steps: list[CanaryStep] = []
        async for step in bus.operator.canary(
            subscription,
            reason=reason,
            fingerprint=which.fingerprint,
            error_type=which.error_type,
            rate=rate,
            author=author,
        ):
            steps.append(step)
            say(_step_told(step))
        well = not steps or not (steps[-1].outcomes.failed or steps[-1].outcomes.open)
        total = steps[-1].total if steps else 0
        told = f"{total} dead letters are delivered again" + ("." if well else ", and the others left as they are.")
        _done(told, as_json, steps=steps)
        return 0 if well else EXIT_ERROR

    return operate(target, url, work)


def _step_told(step: CanaryStep) -> str:
    parts = [f"{number} {name}" for name, number in asdict(step.outcomes).items() if number]
    told = f"retried {step.retried}: {', '.join(parts)}"
    if step.failure is not None:
        again = "the failure is back" if step.returned else "another failure"
        error = (step.failure.error_message or "").partition("\n")[0]
        return f"{told}. Stopped, {again}: {step.failure.error_type}: {error}"
    if step.outcomes.open:
        return f"{told}. Stopped: nobody delivers them. Does a worker run?"
    return told


@dead.command
def edit(
    subscription: Name,
    event: Event,
    target: Target,
    /,
    *,
    reason: Reason,
    payload: Annotated[str, Parameter(help="The event's fields as a JSON object; `@FILE` reads them from a file.")],
    author: Author = None,
    yes: Yes = False,
    as_json: Json = False,
) -> int:
    """Give a dead letter other fields, and deliver it again. The log keeps what was published."""
    try:
        text = Path(payload[1:]).read_bytes() if payload.startswith("@") else payload.encode()
        fields = msgspec.json.decode(text, type=dict[str, Any])
    except (OSError, msgspec.MsgspecError, UnicodeError) as error:
        raise Refused(f"--payload is no JSON object: {error}") from None

    async def work(bus: EventBus) -> int:
        letter = await bus.operator.delivery(subscription, event)
        now = _shown_letter(letter)["payload"]
        plan = (_line(letter), f"now:  {now}", f"then: {msgspec.json.encode(fields).decode()}")
        if not _confirm("\n".join(("edit and retry:", *plan)), yes):
            return EXIT_ERROR
        await bus.operator.edit(subscription, event, fields, reason=reason, author=author)
        return _done(f"{event} is delivered again to {subscription}, as edited.", as_json, changed=1)

    return operate(target, None, work)


def main() -> None:
    """Run the command line; what it raises of its own is printed as one sentence."""
    try:
        code = app(result_action="return_value", exit_on_error=False)
    except cyclopts.CycloptsError:
        sys.exit(EXIT_USAGE)  # it has said why
    except Refused as error:
        say(str(error), style="red")
        sys.exit(EXIT_USAGE)
    except ImportFailed as error:
        err.print(error.shown(), end="", markup=False, highlight=False, soft_wrap=True)
        say(f"{error} could not be imported, for the reason above", style="red")
        sys.exit(EXIT_ERROR)
    except WhereuponError as error:
        say(str(error), style="red")
        sys.exit(EXIT_ERROR)
    sys.exit(code if isinstance(code, int) else 0)


if __name__ == "__main__":
    main()
