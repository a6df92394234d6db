"""Commands that only look: `explain`, `doctor`, `events`, `workflows`, `audit`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from typing import Annotated, Final
from uuid import UUID

import cyclopts
import msgspec
from cyclopts import Parameter
from rich.text import Text

from whereupon.console import (
    EXIT_ERROR,
    Json,
    Refused,
    Url,
    Where,
    answer,
    answer_json,
    bus_for,
    dispose,
    operate,
    out,
    say,
)
from whereupon.doctor import Check, Level
from whereupon.durable import EventBus
from whereupon.story import (
    AttemptStory,
    AuditEntry,
    DeliveryStory,
    EventStory,
    HandlerStory,
    LoggedEvent,
    Mentioned,
    TypeStory,
)
from whereupon.workflow import State

STYLES: Final = {
    "succeeded": "green", "in publish": "green", "dead": "bold red", "retrying": "yellow", "running": "cyan",
    "parked": "yellow", "waiting": "yellow", "skipped": "magenta", Level.FAULT: "bold red", Level.WARNING: "yellow",
    Level.NOTE: "dim",
}  # fmt: skip

Limit = Annotated[int, Parameter(help="So many at most, the newest first.")]
Since = Annotated[datetime | None, Parameter(help="From then on. Times without a zone are UTC.")]
Until = Annotated[datetime | None, Parameter(help="Before that.")]


def aware(moment: datetime | None) -> datetime | None:
    return moment if moment is None or moment.tzinfo is not None else moment.replace(tzinfo=UTC)


def _id_in(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def explain(
    what: Annotated[str, Parameter(help="An event's id, or the name of a type of events.")],
    target: Where = None,
    /,
    *,
    url: Url = None,
    as_json: Json = False,
) -> int:
    """Tell an event's whole story, or how a type of events is served.

    Of an event: who published it and when, what caused it and what it caused, and for each subscription what became
    of it and why. With a bus the answer knows what its build declares; with --url it knows what the database does.
    A type needs a bus.
    """
    event_id = _id_in(what)
    if event_id is None:
        if target is None:
            raise Refused(
                f"{what!r} is no event's id. How a type of events is served a build tells: "
                f"`whereupon explain {what} module:bus`"
            )

        async def ask_type(bus: EventBus) -> TypeStory:
            return bus.explain_type(what)

        story = operate(target, url, ask_type)
        if as_json:
            answer_json(story)
        else:
            _print(_type_told(story))
        return 0
    found = operate(target, url, lambda bus: bus.explain(event_id))
    if as_json:
        answer_json(found)
    else:
        _print(_event_told(found))
    return 0


def doctor(target: Where = None, /, *, url: Url = None, as_json: Json = False) -> int:
    """Look for what is wrong, where experience says it is; exit code 1 if something is not delivered.

    Tables, the PostgreSQL cluster, clocks, long transactions, workers, subscriptions and builds, lag, dead letters,
    events that nobody hears, attempts that nobody closed. Nothing is changed. With a bus the answer knows what its
    build declares.
    """
    bus = bus_for(target, url)
    checks: list[Check] = []

    async def run() -> None:
        try:
            async for check in bus.examine():
                checks.append(check)
                if not as_json:
                    _print(_check_told(check))
        finally:
            await dispose(bus)

    asyncio.run(run())
    found = [finding for check in checks for finding in check.findings]
    faults = sum(finding.level is Level.FAULT for finding in found)
    if as_json:
        answer_json(checks)
    elif faults:
        say(f"{faults} of {len(found)} findings keep something from being delivered.", style="red")
    else:
        answer(f"{len(checks)} checks, {len(found)} findings, and nothing that keeps an event from being delivered.")
    return EXIT_ERROR if faults else 0


events = cyclopts.App(name="events", help="The log: what was published.")

Types = Annotated[list[str] | None, Parameter(name="--type", help="Of this type only; may be given more than once.")]


@events.command(name="list")
def list_events(
    target: Where = None,
    /,
    *,
    url: Url = None,
    types: Types = None,
    since: Since = None,
    until: Until = None,
    related: Annotated[UUID | None, Parameter(help="What goes back to the same event as this one.")] = None,
    before: Annotated[int | None, Parameter(help="Go on after this position, the last that was listed.")] = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> int:
    """List events of the log, the newest first."""
    found = operate(
        target,
        url,
        lambda bus: bus.stories.events(
            types=types or (),
            since=aware(since),
            until=aware(until),
            related_to=related,
            before=before,
            limit=limit,
        ),
    )
    if as_json:
        answer_json(found)
        return 0
    for event in found:
        _print([_event_line(event)])
    if not found:
        answer("no events.")
    elif len(found) == limit:
        answer(f"there may be more: --before {found[-1].position}")
    return 0


@events.command(name="show")
def show_event(
    event: Annotated[UUID, Parameter(help="The event's id.")],
    target: Where = None,
    /,
    *,
    url: Url = None,
    as_json: Json = False,
) -> int:
    """Show one event with its fields. `whereupon explain` tells what became of it."""
    story = operate(target, url, lambda bus: bus.explain(event))
    if as_json:
        answer_json({**msgspec.to_builtins(story), "deliveries": None, "near_misses": None})
        return 0
    _print(_head_told(story))
    _print(_payload_told(story.payload))
    return 0


@events.command
def tail(
    target: Where = None,
    /,
    *,
    url: Url = None,
    types: Types = None,
    last: Annotated[int, Parameter(help="So many that are there already, first.")] = 10,
    as_json: Annotated[bool, Parameter(name="--json", negative="", help="One line of JSON for each event.")] = False,
) -> int:
    """Show events as they are committed, until Ctrl-C; none is left out, however late its transaction commits."""
    bus = bus_for(target, url)

    def show(event: LoggedEvent) -> None:
        if as_json:
            answer(msgspec.json.encode(event).decode())
        else:
            _print([_event_line(event)])

    async def run() -> None:
        try:
            async with contextlib.aclosing(bus.stories.follow(types or (), last=last)) as following:
                async for event in following:
                    show(event)
        finally:
            await dispose(bus)

    with contextlib.suppress(KeyboardInterrupt):
        asyncio.run(run())
    return 0


def workflows(
    target: Where = None,
    /,
    *,
    url: Url = None,
    state: Annotated[State | None, Parameter(help="That are in this state.")] = None,
    name: Annotated[str | None, Parameter(help="At this workflow.")] = None,
    before: Annotated[datetime | None, Parameter(help="That were opened before that.")] = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> int:
    """List attempts at workflows: which are open, and how the others ended. Closed ones are kept for 7 days."""
    found = operate(
        target,
        url,
        lambda bus: bus.stories.attempts(state=state, name=name, opened_before=aware(before), limit=limit),
    )
    if as_json:
        answer_json(found)
        return 0
    for attempt in found:
        _print([_attempt_line(attempt)])
    if not found:
        answer("no attempts.")
    elif len(found) == limit:
        answer(f"there may be more: --before {found[-1].opened_at.isoformat()}")
    return 0


def audit(
    target: Where = None,
    /,
    *,
    url: Url = None,
    user: Annotated[UUID | None, Parameter(help="Of this user.")] = None,
    action: Annotated[str | None, Parameter(help="This action, as the event declares it.")] = None,
    event: Annotated[UUID | None, Parameter(help="Of this event.")] = None,
    resource: Annotated[str | None, Parameter(help="Of this resource, as TYPE:ID.")] = None,
    ip: Annotated[str | None, Parameter(help="From this IP address.")] = None,
    correlation: Annotated[UUID | None, Parameter(help="With this correlation id.")] = None,
    since: Since = None,
    until: Until = None,
    limit: Limit = 100,
    as_json: Json = False,
) -> int:
    """Search the audit trail, the newest first."""
    of: tuple[str, str] | None = None
    if resource is not None:
        kind, colon, id_ = resource.partition(":")
        if not (kind and colon and id_):
            raise Refused(f"--resource {resource!r} names none: write its type and its id, as in account:42")
        of = (kind, id_)
    found = operate(
        target,
        url,
        lambda bus: bus.stories.audit(
            user_id=user,
            action=action,
            event_id=event,
            resource=of,
            ip_address=ip,
            correlation_id=correlation,
            since=aware(since),
            until=aware(until),
            limit=limit,
        ),
    )
    if as_json:
        answer_json(found)
        return 0
    for entry in found:
        _print([_audit_line(entry)])
    if not found:
        answer("nothing of the kind in the audit trail.")
    elif len(found) == limit:
        answer(f"there may be more: --until {found[-1].occurred_at.isoformat()}")
    return 0


# --- in words -------------------------------------------------------------------------------------------------------


def _print(lines: Sequence[Text | str] | Iterator[Text | str]) -> None:
    for line in lines:
        out.print(line if isinstance(line, Text) else Text(line), soft_wrap=True)


def _styled(word: str, width: int = 0) -> Text:
    return Text(word.ljust(width), style=STYLES.get(word, ""))


def _plain(text: str | None) -> str:
    """Without what would move a terminal's cursor: it may be what somebody typed."""
    return "".join(part if part.isprintable() else f"\\x{ord(part):02x}" for part in text or "")


def _when(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}.{moment.microsecond // 1000:03d}"


def _long(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def _mention(event: Mentioned) -> str:
    if event.event_type is None:
        return f"{event.event_id} (no longer in the log)"
    return f"{event.event_type} {event.event_id}"


def _head_told(story: EventStory) -> Iterator[Text | str]:
    yield Text.assemble((story.event_type, "bold"), f" {story.event_id}, version {story.version}")
    if story.made_at is not None:
        yield f"  made        {_when(story.made_at)} UTC"
    place = "gone from the log; told from a copy" if story.position is None else f"position {story.position}"
    yield f"  written     {_when(story.recorded_at)} UTC, {place}"
    if story.committed_at is not None:
        yield f"  committed   {_when(story.committed_at)} UTC"
    told = story.metadata
    by = [
        _plain(f"{name} {value}")
        for name, value in (
            ("actor", told.actor),
            ("from", told.ip_address),
            ("by", told.user_agent),
            ("trace", told.trace_id),
            *told.extra.items(),
        )
        if value
    ]
    yield f"  published   {', '.join(by) or 'nobody said by whom'}"
    if told.correlation_id is not None:
        yield f"  correlation {told.correlation_id}"
    if (attempt := story.attempt) is not None:
        closed = "" if attempt.closed_at is None else f", closed {_when(attempt.closed_at)}"
        because = f" ({_plain(attempt.reason)})" if attempt.reason else ""
        line = Text.assemble(f"  attempt     {attempt.workflow}: ", _styled(attempt.state), because)
        yield line + Text(f", opened {_when(attempt.opened_at)}{closed}")
        if attempt.attempted_id != story.event_id:
            yield f"              attempted as {attempt.attempted_id}"
        elif attempt.outcome_id is not None:
            yield f"              its outcome is {attempt.outcome_id}"
    if story.cause is not None:
        yield f"  caused by   {_mention(story.cause)}"


def _event_told(story: EventStory) -> Iterator[Text | str]:
    yield from _head_told(story)
    if story.caused:
        for number, event in enumerate(story.caused):
            yield f"  {'caused' if number == 0 else '':12}{_mention(event)}"
    if not story.searched_all:
        yield f"  {'' if story.caused else 'caused':12}(looked for among the {story.searched} events after it)"
    yield "deliveries"
    width = max((len(one.state) for one in story.deliveries), default=0)
    for one in story.deliveries:
        yield from _delivery_told(one, width)
    if not story.deliveries:
        yield "  nobody hears it"
    for miss in story.near_misses:
        yield f"  not subscribed: {miss.subscription}, which hears {miss.hears}"
    others = story.deaf - len(story.near_misses)
    if others:
        more = "more " if story.near_misses else ""
        yield f"  {others} {more}{'subscription does' if others == 1 else 'subscriptions do'} not hear it"


def _delivery_told(one: DeliveryStory, width: int) -> Iterator[Text | str]:
    replay = f" (replay {one.generation})" if one.generation else ""
    yield Text.assemble("  ", _styled(one.state, width), f"  {one.subscription}{replay}")
    indent = " " * (width + 4)
    if one.why:
        yield f"{indent}{_plain(one.why)}"
    if one.key is not None:
        yield f"{indent}its key is {_plain(one.key)}"
    if one.error_type is not None:
        first, _, rest = (one.error_message or "").partition("\n")
        yield Text(f"{indent}{one.error_type}: {_plain(first)}{' …' if rest else ''}", style="red")
    for call in one.calls:
        yield (
            f"{indent}attempt {call.attempt} began {_when(call.started_at)}, took {_long(call.seconds)} on "
            f"{call.worker}: {call.outcome}"
        )
    for act in one.actions:
        yield f"{indent}{_when(act.at)} {_plain(act.author)}: {act.action} ({_plain(act.reason)})"


def _payload_told(payload: str) -> Iterator[str]:
    try:
        fields = json.loads(payload)
    except ValueError:
        yield f"  {_plain(payload)}"
        return
    if not isinstance(fields, dict):
        yield f"  {_plain(payload)}"
        return
    width = max(map(len, fields), default=0)
    for name, value in fields.items():
        yield f"  {name.ljust(width)}  {_plain(value if isinstance(value, str) else json.dumps(value))}"


def _type_told(story: TypeStory) -> Iterator[Text | str]:
    aliases = f", stored before as {', '.join(story.aliases)}" if story.aliases else ""
    yield Text.assemble((story.event_type, "bold"), f", version {story.version}{aliases}: {story.defined_in}")
    for name, kind in story.fields.items():
        yield f"  {name}: {kind}"
    yield f"audited as {story.audit}" if story.audit is not None else "not audited"
    yield (
        "may be published without a session, in a transaction of its own"
        if story.stands_alone
        else "is published with the session of the change it tells of"
    )
    yield f"a publish takes {story.statements} SQL statements of whereupon's: {'; '.join(story.statements_why)}"
    yield "handlers"
    for handler in story.handlers:
        yield from _handler_told(handler)
    if not story.handlers:
        yield "  none"
    for miss in story.near_misses:
        yield f"  not subscribed: {miss.subscription}, which hears {miss.hears}"


def _handler_told(handler: HandlerStory) -> Iterator[str]:
    details = [handler.delivery.replace("_", " ")]
    if handler.required:
        details.append("required")
    if handler.hears_everything:
        details.append("hears everything")
    if handler.ordered_by:
        details.append(f"ordered by {handler.ordered_by}")
    if handler.timeout is not None:
        details.append(f"timeout {_long(handler.timeout)}")
    if handler.batch > 1:
        details.append(f"up to {handler.batch} in one transaction")
    if handler.rate is not None:
        details.append(f"{handler.rate:g} a second at most")
    if handler.within is not None:
        details.append(f"promised within {_long(handler.within)}")
    yield f"  {handler.subscription}: {', '.join(details)}"
    if len(handler.tries) == 1:
        yield "    one attempt, then dead"
    elif handler.tries:
        waits = ", ".join(_long(each.after) for each in handler.tries[1:])
        yield f"    {len(handler.tries)} attempts; the later ones begin at most {waits} after the first has failed"
        yield f"    so dead after at most {_long(handler.tries[-1].after)}, and what the attempts take themselves"


def _check_told(check: Check) -> Iterator[Text | str]:
    if not check.findings:
        yield Text.assemble(("ok       ", "green"), f"{check.name}: {check.question}")
    for finding in check.findings:
        yield Text.assemble(_styled(finding.level, 9), f"{check.name}: {_plain(finding.what)}")
        yield f"         → {_plain(finding.way_out)}"


def _event_line(event: LoggedEvent) -> Text:
    by = event.metadata.actor or event.metadata.ip_address
    return Text.assemble(
        f"{event.position}  {_when(event.recorded_at)}  {event.event_id}  ",
        (event.event_type, "bold"),
        f"  {_plain(by)}" if by else "",
    )


def _attempt_line(attempt: AttemptStory) -> Text:
    took = "" if attempt.closed_at is None else f"  {_long((attempt.closed_at - attempt.opened_at).total_seconds())}"
    because = f"  {_plain(attempt.reason)}" if attempt.reason else ""
    return Text.assemble(
        f"{_when(attempt.opened_at)}  {attempt.attempted_id}  ",
        _styled(attempt.state, len("interrupted")),
        f"  {attempt.workflow}{took}{because}",
    )


def _audit_line(entry: AuditEntry) -> Text:
    who = [f"user {entry.user_id}"] if entry.user_id is not None else []
    who += [_plain(text) for text in (entry.actor, entry.ip_address) if text]
    of = f"  {entry.resource_type}:{_plain(entry.resource_id)}" if entry.resource_type and entry.resource_id else ""
    return Text.assemble(
        f"{_when(entry.occurred_at)}  ", (_plain(entry.action), "bold"), f"  {entry.outcome}  {', '.join(who)}{of}"
    )
