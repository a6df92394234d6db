"""The pages of the dashboard that only look, and how any of its pages is shown."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

import jinja2
from starlette.responses import HTMLResponse, Response, StreamingResponse

from whereupon import drawing
from whereupon.catalogue import Catalogue, EventEntry, as_text
from whereupon.durable import EventBus
from whereupon.errors import ActionRefused
from whereupon.event import DomainEvent
from whereupon.gate import FORM_TOKEN, Gate, Refusal, Visit
from whereupon.gauges import Gauges, Reading
from whereupon.livestream import LeftOut, Livestream
from whereupon.lookback import PAGE, ListedEvent, Lookback, place_in
from whereupon.story import TypeStory
from whereupon.workflow import State

FOREVER: Final = "public, max-age=31536000, immutable"
"""For files whose address changes with their content."""
SEARCHED: Final = 20_000
"""Later events among which a story looks for what was caused; `explain` looks among more."""
LONGEST: Final = 200
"""Characters of something to be searched for."""
_MEDIA_TYPES: Final = {"css": "text/css", "js": "text/javascript"}
_ASSETS: Final = "dashboard_assets"

DONE: Final[Mapping[str, str]] = {
    "retry": "Delivered again:",
    "skip": "Skipped:",
    "edit": "Edited, and delivered again.",
    "pause": "Paused. What runs ends; nothing new begins.",
    "resume": "Resumed. Workers go on where they stopped.",
    "unchanged": "Nothing was changed: it was so already.",
    "replay": "The replay has begun, as generation",
    "stop": "Nothing more is retried by it.",
}
"""What a page says about the form that led to it: words of ours only, whatever is in the address."""


class Pages:
    """Templates and files."""

    def __init__(self, gate: Gate, database: str) -> None:
        self._gate = gate
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("whereupon", f"{_ASSETS}/templates"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        folder = files("whereupon").joinpath(_ASSETS, "static")
        self._static = {
            each.name: each.read_bytes() for each in folder.iterdir() if each.name.rpartition(".")[2] in _MEDIA_TYPES
        }
        self._templates.filters |= {
            "moment": moment, "clock": clock, "span": span, "ago": ago, "number": number, "first_line": first_line,
            "query": query, "sparkline": drawing.sparkline, "pretty": pretty,
        }  # fmt: skip
        self._templates.globals |= {
            "static": self._static_address,
            "form_token_name": FORM_TOKEN,
            "database": database,
            "spark": (drawing.WIDE, drawing.HIGH),
            "box": drawing.BOX,
        }

    def render(self, template: str, **values: Any) -> str:
        return self._templates.get_template(template).render(values)

    def show(self, visit: Visit, template: str, status: int = 200, **values: Any) -> Response:
        asked = visit.request.query_params
        done = DONE.get(asked.get("done", "")) if status == 200 else None
        if done is not None and (many := asked.get("number", "")).isdecimal() and len(many) < 10:
            done = f"{done} {int(many):,}."
        text = self.render(
            template,
            **{"problem": None, "refresh": None}
            | values
            | {
                "me": visit.visitor,
                "may_act": visit.may_act,
                "form_token": visit.form_token,
                "base": visit.base,
                "fragment": visit.is_fragment,
                "done": done,
            },
        )
        response = HTMLResponse(text.encode("utf-8", "replace"), status)
        self._gate.keep(visit, response)
        return response

    def error(self, status: int, reason: str, base: str, *, headers: Mapping[str, str] | None = None) -> Response:
        """A page that needs nobody to be let in, and no database."""
        text = self.render(
            "error.html.jinja", title=HTTPStatus(status).phrase, reason=reason, base=base, status=status, me=None,
            may_act=False, done=None, problem=None, here="", refresh=None,
        )  # fmt: skip
        return HTMLResponse(text.encode("utf-8", "replace"), status, dict(headers or {}))

    def static_file(self, name: str) -> Response:
        if name not in self._static:
            raise Refusal(404, "There is no such file.")
        return Response(
            self._static[name], media_type=_MEDIA_TYPES[name.rpartition(".")[2]], headers={"cache-control": FOREVER}
        )

    def _static_address(self, name: str) -> str:
        return f"static/{name}?v={hashlib.sha256(self._static[name]).hexdigest()[:12]}"


@dataclass(frozen=True, slots=True)
class Rate:
    """What a sparkline shows, in figures."""

    values: Sequence[int]
    what: str

    @property
    def last_minute(self) -> int:
        """Of the last minute that is over."""
        return self.values[-2] if len(self.values) > 1 else 0

    @property
    def all(self) -> int:
        return sum(self.values)


@dataclass(frozen=True, slots=True, kw_only=True)
class Known:
    """An event type of the catalogue."""

    name: str
    version: int | None
    """None where this build has no class for it."""
    summary: str
    handlers: int
    newest: int
    """How many of the newest events are of it."""


class Board:
    def __init__(self, bus: EventBus, pages: Pages, gauges: Gauges, lookback: Lookback, livestream: Livestream) -> None:
        self._bus = bus
        self._pages = pages
        self._gauges = gauges
        self._lookback = lookback
        self._livestream = livestream
        self._entries: dict[type[DomainEvent], tuple[EventEntry, str]] = {}

    # --- what happens now -------------------------------------------------------------------------------------------

    async def overview(self, visit: Visit) -> Response:
        reading = await self._gauges.read()
        template = "overview_now.html.jinja" if visit.is_fragment else "overview.html.jinja"
        values: dict[str, Any] = {"here": "overview", "reading": reading}
        if reading is not None:
            values |= {
                "published": Rate(reading.published, "events published, by the minute"),
                "handlers": [self._gauged(reading, one.name) for one in reading.served],
                "dead": sum(group.number for group in reading.dead),
            }
        return self._pages.show(visit, template, **values)

    def _gauged(self, reading: Reading, name: str) -> dict[str, Any]:
        calls = reading.calls.get(name, ())
        served = next(one for one in reading.served if one.name == name)
        return {
            "served": served,
            "lag": reading.lags.get(name),
            "dead": reading.dead_of(name),
            "succeeded": Rate([one.succeeded for one in calls], f"calls of {name} that succeeded, by the minute"),
            "failed": Rate([one.failed for one in calls], f"calls of {name} that failed, by the minute"),
        }

    async def map(self, visit: Visit) -> Response:
        reading = await self._gauges.read()
        values: dict[str, Any] = {"here": "map", "reading": reading}
        if reading is not None:
            everything = [one.name for one in reading.served if one.types is None]
            heard = {one.name: sorted(one.types) for one in reading.served if one.types is not None}
            for subscription in self._bus.subscriptions:
                if subscription.name not in heard and subscription.name not in everything:
                    names = [cls.__event__.name for cls in subscription.event_types if cls is not DomainEvent]
                    if names:
                        heard[subscription.name] = sorted(names)
                    else:
                        everything.append(subscription.name)
            types = {self._name_now(name): number for name, number in reading.types.items()}
            values |= {
                "map": drawing.map_of(heard, sorted(set(types) - {event for of in heard.values() for event in of})),
                "everything": sorted(everything),
                "types": types,
                "handlers": {one.name: self._gauged(reading, one.name) for one in reading.served},
                "heard": heard,
            }
        template = "map_now.html.jinja" if visit.is_fragment else "map.html.jinja"
        return self._pages.show(visit, template, **values)

    def _name_now(self, stored: str) -> str:
        cls = self._bus.class_of(stored)
        return stored if cls is None else cls.__event__.name

    # --- events -----------------------------------------------------------------------------------------------------

    async def events(self, visit: Visit) -> Response:
        asked = visit.request.query_params
        wanted = _wanted(asked)
        before = _number(asked, "before")
        if (found := _id_in(wanted["id"])) is not None:
            return Response(status_code=303, headers={"location": f"event?{urlencode({'id': str(found)})}"})
        if wanted["id"]:
            raise Refusal(422, f"{wanted['id']!r} is no event's id: it is a UUID.")
        correlation = _uuid(wanted["correlation"], "a correlation id")
        stretch = await self._lookback.events(
            event_type=wanted["type"] or None,
            correlation_id=correlation,
            actor=wanted["actor"] or None,
            before=before,
        )
        reading = await self._gauges.read()
        return self._pages.show(
            visit,
            "events.html.jinja",
            here="events",
            events=stretch.found,
            stretch=stretch,
            wanted=wanted,
            live=before is None,
            types=sorted(reading.types) if reading is not None else (),
            where={name: value for name, value in wanted.items() if value},
        )

    async def stream(self, visit: Visit) -> Response:
        """Server-Sent Events. A page that comes back gets what it missed."""
        wanted = _wanted(visit.request.query_params)
        correlation = _uuid(wanted["correlation"], "a correlation id")
        names = set(self._lookback.names_of(wanted["type"])) if wanted["type"] else None

        def accepts(event: ListedEvent) -> bool:
            return (
                (names is None or event.event_type in names)
                and (not wanted["actor"] or event.metadata.actor == wanted["actor"])
                and (correlation is None or correlation in (event.metadata.correlation_id, event.event_id))
            )

        seen = visit.request.headers.get("last-event-id", "")
        after = int(seen) if seen.isdecimal() and len(seen) < 19 else None
        if self._livestream.is_full(visit.bound_to):
            raise Refusal(503, "Too many people watch the stream: reload the page to see what is new.")

        async def told() -> AsyncIterator[bytes]:
            with self._livestream.open(visit.bound_to, accepts) as viewer:
                yield b"retry: 2000\n\n"
                if after is not None:
                    await self._livestream.catch_up(viewer, after)
                async for event in self._livestream.follow(viewer):
                    match event:
                        case None:
                            yield b": still here\n\n"
                        case LeftOut():
                            yield _message("left-out", self._pages.render("left_out.html.jinja", number=event.number))
                        case _:
                            row = self._pages.render("event_row.html.jinja", event=event, fresh=True)
                            yield _message("event", row, event.position)

        return StreamingResponse(told(), media_type="text/event-stream", headers={"x-accel-buffering": "no"})

    async def event(self, visit: Visit) -> Response:
        asked = visit.request.query_params
        event_id = _uuid(asked.get("id", ""), "the id of an event")
        if event_id is None:
            raise Refusal(422, "Which event? Its id is missing in the address.")
        try:
            story = await self._bus.stories.of_event(event_id, searched=SEARCHED)
        except ActionRefused as error:
            raise Refusal(404, str(error)) from None
        return self._pages.show(visit, "event.html.jinja", here="events", story=story, timeline=_timeline(story))

    # --- subscriptions ----------------------------------------------------------------------------------------------

    async def handlers(self, visit: Visit) -> Response:
        served = await self._lookback.served()
        reading = await self._gauges.read()
        declared = {s.name: s for s in self._bus.subscriptions}
        return self._pages.show(
            visit,
            "handlers.html.jinja",
            here="handlers",
            served=served,
            reading=reading,
            declared=declared,
            silent=[s for s in self._bus.subscriptions if s.name not in {one.name for one in served}],
        )

    async def dead(self, visit: Visit) -> Response:
        subscription = _text(visit.request.query_params, "subscription")
        groups = await self._bus.operator.groups(subscription or None)
        return self._pages.show(
            visit, "dead.html.jinja", here="dead", groups=groups, subscription=subscription,
            total=sum(group.number for group in groups),
        )  # fmt: skip

    async def group(self, visit: Visit) -> Response:
        asked = visit.request.query_params
        subscription, fingerprint = _text(asked, "subscription"), _text(asked, "fingerprint")
        after = _number(asked, "after") or 0
        group = await self.group_of(subscription, fingerprint)
        letters = await self._bus.operator.dead(subscription, fingerprint=fingerprint, after=after, limit=PAGE + 1)
        return self._pages.show(
            visit,
            "group.html.jinja",
            here="dead",
            group=group,
            subscription=subscription,
            fingerprint=fingerprint,
            letters=letters[:PAGE],
            go_on=letters[PAGE - 1].id if len(letters) > PAGE else None,
        )

    async def group_of(self, subscription: str, fingerprint: str) -> Any:
        """A group of dead letters, or None if nothing of it is dead (any more)."""
        groups = await self._bus.operator.groups(subscription)
        return next((group for group in groups if group.fingerprint == fingerprint), None)

    async def letter(self, visit: Visit) -> Response:
        subscription, event_id, generation = letter_in(visit.request.query_params)
        letter = await self._bus.operator.delivery(subscription, event_id, generation=generation)
        return self._pages.show(
            visit, "letter.html.jinja", here="dead", letter=letter, payload=pretty(letter.payload or b"")
        )

    # --- the rest ---------------------------------------------------------------------------------------------------

    async def workflows(self, visit: Visit) -> Response:
        asked = visit.request.query_params
        state, name = _text(asked, "state"), _text(asked, "name")
        if state and state not in list(State):
            raise Refusal(422, f"{state!r} is no state of an attempt: open, succeeded, failed or interrupted.")
        stretch = await self._lookback.attempts(
            state=State(state) if state else None, name=name or None, before=_uuid(asked.get("before", ""), "a place")
        )
        return self._pages.show(
            visit, "workflows.html.jinja", here="workflows", stretch=stretch, state=state, name=name,
            states=list(State), where={k: v for k, v in (("state", state), ("name", name)) if v},
        )  # fmt: skip

    async def audit(self, visit: Visit) -> Response:
        asked = visit.request.query_params
        names = ("user", "action", "event", "resource", "ip", "correlation", "until")
        wanted = {name: _text(asked, name) for name in names}
        of: tuple[str, str] | None = None
        if wanted["resource"]:
            kind, colon, id_ = wanted["resource"].partition(":")
            if not (kind and colon and id_):
                raise Refusal(
                    422, f"{wanted['resource']!r} names no resource: write its type and id, as in account:42."
                )
            of = (kind, id_)
        before = asked.get("before")
        if before is not None:
            try:
                place_in(before)
            except ValueError:
                raise Refusal(422, "The address of this page was changed: search anew.") from None
        stretch = await self._lookback.audit(
            user_id=_uuid(wanted["user"], "the id of a user"),
            action=wanted["action"] or None,
            event_id=_uuid(wanted["event"], "the id of an event"),
            resource=of,
            ip_address=wanted["ip"] or None,
            correlation_id=_uuid(wanted["correlation"], "a correlation id"),
            until=time_in(wanted["until"]),
            before=before,
        )
        return self._pages.show(
            visit, "audit.html.jinja", here="audit", stretch=stretch, wanted=wanted,
            where={name: value for name, value in wanted.items() if value},
        )  # fmt: skip

    async def actions(self, visit: Visit) -> Response:
        asked = visit.request.query_params
        subscription = _text(asked, "subscription")
        stretch = await self._lookback.actions(subscription=subscription or None, before=_number(asked, "before"))
        return self._pages.show(
            visit, "actions.html.jinja", here="actions", stretch=stretch, subscription=subscription,
            where={"subscription": subscription} if subscription else {},
        )  # fmt: skip

    async def catalogue(self, visit: Visit) -> Response:
        reading = await self._gauges.read()
        newest = dict(reading.types) if reading is not None else {}
        classes = {cls.__event__.name: cls for s in self._bus.subscriptions for cls in s.event_types}
        classes.pop(DomainEvent.__event__.name, None)
        for stored in newest:
            if (cls := self._bus.class_of(stored)) is not None:
                classes.setdefault(cls.__event__.name, cls)
        known = []
        for name in sorted({*classes, *(stored for stored in newest if self._bus.class_of(stored) is None)}):
            cls = classes.get(name)
            known.append(
                Known(
                    name=name,
                    version=None if cls is None else cls.__event__.version,
                    summary="" if cls is None else first_line(_doc_of(cls)),
                    handlers=0 if cls is None else len(self._bus.subscriptions.hearing(cls)),
                    newest=sum(newest.get(stored, 0) for stored in self._lookback.names_of(name)),
                )
            )
        return self._pages.show(
            visit, "catalogue.html.jinja", here="catalogue", known=known, newest=sum(newest.values()), reading=reading
        )

    async def event_type(self, visit: Visit) -> Response:
        name = _text(visit.request.query_params, "name")
        cls = self._bus.class_of(name)
        story: TypeStory | None = None
        if cls is not None:
            story = self._bus.explain_type(name)
        else:
            listed = await self._lookback.events(event_type=name, limit=1)
            if not listed.found:
                try:
                    self._bus.explain_type(name)
                except ActionRefused as error:
                    raise Refusal(404, str(error)) from None
        entry, schema = (None, "") if cls is None else self._entry_of(cls)
        return self._pages.show(
            visit, "type.html.jinja", here="catalogue", name=name, story=story, entry=entry, schema=schema,
            example=None if entry is None or entry.example is None else as_text(entry.example),
        )  # fmt: skip

    def _entry_of(self, cls: type[DomainEvent]) -> tuple[EventEntry, str]:
        """What the catalogue knows of it, and its JSON Schema; kept, since sources are read for it."""
        if cls not in self._entries:
            catalogue = Catalogue.of(self._bus, only=[cls])
            name = cls.__event__.name
            self._entries[cls] = catalogue.event(name), as_text(catalogue.json_schema(name))
        return self._entries[cls]

    async def checkup(self, visit: Visit) -> Response:
        checks = [check async for check in self._bus.examine()]
        return self._pages.show(visit, "checkup.html.jinja", here="checkup", checks=checks)


# --- what stands in addresses ---------------------------------------------------------------------------------------

Asked = Mapping[str, str]


def letter_in(asked: Asked) -> tuple[str, UUID, int]:
    """Which delivery an address or a form names. Raises `Refusal`."""
    event_id = _uuid(asked.get("event", ""), "the id of an event")
    subscription = _text(asked, "subscription")
    if event_id is None or not subscription:
        raise Refusal(422, "Which delivery? It takes a subscription and the id of an event.")
    return subscription, event_id, _number(asked, "generation") or 0


def time_in(text: str) -> datetime | None:
    """Times without a zone are UTC. Raises `Refusal`."""
    if not text:
        return None
    try:
        found = datetime.fromisoformat(text)
    except ValueError:
        raise Refusal(422, f"{text!r} is no time: write it as 2026-11-28 or 2026-11-28T19:30.") from None
    try:
        return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
    except OverflowError:
        raise Refusal(422, f"{text!r} is a time that nothing was recorded at.") from None


def _wanted(asked: Asked) -> dict[str, str]:
    return {name: _text(asked, name) for name in ("type", "correlation", "actor", "id")}


def _text(asked: Asked, name: str) -> str:
    text = asked.get(name, "").strip()
    if len(text) > LONGEST * (5 if name in ("subscription", "name") else 1):
        raise Refusal(422, f"What is given as {name} is longer than anything that is kept under that name.")
    if "\0" in text:
        raise Refusal(422, f"What is given as {name} has a character in it that nobody can type.")
    return text


def _number(asked: Asked, name: str) -> int | None:
    text = asked.get(name, "").strip()
    if not text:
        return None
    if not (text.isascii() and text.isdecimal()) or len(text) > 18:
        raise Refusal(422, f"What is given as {name} is no number.")
    return int(text)


def _id_in(text: str) -> UUID | None:
    try:
        return UUID(text)
    except ValueError:
        return None


def _uuid(text: str, what: str) -> UUID | None:
    text = text.strip()
    if not text:
        return None
    found = _id_in(text)
    if found is None:
        raise Refusal(422, f"{text[:LONGEST]!r} is not {what}: those are UUIDs.")
    return found


# --- in words -------------------------------------------------------------------------------------------------------


def moment(at: datetime) -> str:
    return f"{at.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def clock(at: datetime) -> str:
    return f"{at.astimezone(UTC):%H:%M:%S}"


def span(seconds: float) -> str:
    if seconds < 1:
        return f"{seconds * 1000:.3g} ms"
    for unit, size in (("d", 86400.0), ("h", 3600.0), ("min", 60.0)):
        if seconds >= 2 * size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} s"


def ago(at: datetime) -> str:
    return f"{span(max(0.0, round((datetime.now(UTC) - at).total_seconds())))} ago"


def number(value: int) -> str:
    return f"{value:,}"


def first_line(text: str | None) -> str:
    return (text or "").strip().partition("\n")[0]


def query(values: Mapping[str, Any]) -> str:
    return urlencode({name: str(value) for name, value in values.items()})


def pretty(payload: bytes | str) -> str:
    """A payload as it can be read: JSON over several lines, anything else as it is."""
    text = payload.decode("utf-8", "backslashreplace") if isinstance(payload, bytes) else payload
    try:
        return json.dumps(json.loads(text), indent=2, ensure_ascii=False)
    except (ValueError, RecursionError):
        return text


def _doc_of(cls: type[DomainEvent]) -> str:
    own = cls.__dict__.get("__doc__") or ""
    return "" if own.startswith(f"{cls.__name__}(") else inspect.cleandoc(own)  # dataclasses make one of their own


def _message(name: str, data: str, id_: int | None = None) -> bytes:
    lines = [f"event: {name}"]
    if id_ is not None:
        lines.append(f"id: {id_}")
    # a lone CR would end a line of the stream, too
    lines += [f"data: {line}" for line in data.replace("\r", " ").split("\n")]
    return ("\n".join(lines) + "\n\n").encode("utf-8", "replace")


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """What happened at one time of an event's story."""

    at: datetime
    what: str
    style: str
    detail: str = ""
    link: str | None = None


def _timeline(story: Any) -> list[Step]:
    steps = []
    if story.made_at is not None:
        steps.append(Step(at=story.made_at, what="made", style="own"))
    steps.append(Step(at=story.recorded_at, what="written into the log", style="own"))
    if story.committed_at is not None:
        steps.append(Step(at=story.committed_at, what="committed", style="own"))
    if story.attempt is not None:
        of = f"{story.attempt.workflow}: {story.attempt.state}"
        steps.append(
            Step(at=story.attempt.opened_at, what="attempt opened", style="own", detail=story.attempt.workflow)
        )
        if story.attempt.closed_at is not None:
            steps.append(Step(at=story.attempt.closed_at, what="attempt closed", style="own", detail=of))
    for delivery in story.deliveries:
        of = delivery.subscription + (f" (replay {delivery.generation})" if delivery.generation else "")
        for call in delivery.calls:
            steps.append(
                Step(
                    at=call.started_at,
                    what=f"{of}: attempt {call.attempt} {call.outcome}",
                    style=call.outcome,
                    detail=f"took {span(call.seconds)} on {call.worker}",
                )
            )
        for act in delivery.actions:
            steps.append(Step(at=act.at, what=f"{act.author}: {act.action} {of}", style="action", detail=act.reason))
        if delivery.next_at is not None:
            steps.append(Step(at=delivery.next_at, what=f"{of}: next attempt", style="retrying"))
    for event in story.caused:
        if event.recorded_at is not None:
            steps.append(
                Step(
                    at=event.recorded_at,
                    what=f"caused {event.event_type}",
                    style="caused",
                    link=f"event?{urlencode({'id': str(event.event_id)})}",
                )
            )
    return sorted(steps, key=lambda step: step.at)
