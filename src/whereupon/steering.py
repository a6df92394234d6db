"""The pages of the dashboard that act: each shows what would be done, takes a reason, and then does it."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Final
from urllib.parse import urlencode
from uuid import UUID

import msgspec
from starlette.responses import Response
from uuid_utils.compat import uuid7

from whereupon.action import CanaryStep, DeadLetter
from whereupon.board import Board, Pages, letter_in, moment, pretty, time_in
from whereupon.durable import EventBus
from whereupon.errors import ActionRefused, WhereuponError
from whereupon.gate import Refusal, Visit
from whereupon.gauges import Gauges
from whereupon.lookback import Lookback, Served

AT_ONCE: Final = 1_000
"""Dead letters that one form retries or skips, unless it says otherwise; the most that it may say is ten times that."""
MOST: Final = 10_000
SHOWN: Final = 5
"""Dead letters that a plan names one by one."""
LONGEST_REASON: Final = 2_000
KEPT: Final = 20
"""Canaries that are over and can still be looked at."""
STOPPED: Final = "It was stopped: nothing more is retried by it."
MOST_CANARIES: Final = 10
"""That run at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Field:
    """A field of a plan's form."""

    name: str
    label: str
    kind: str = "text"
    value: str = ""
    hint: str = ""
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a form would do, for whoever has to decide."""

    action: str
    """Where the form is sent, and what it is called."""
    title: str
    lines: Sequence[str]
    button: str
    way_back: str
    hidden: Mapping[str, str]
    fields: Sequence[Field] = ()
    cautious: bool = False
    """Whether it can't be undone."""


@dataclass(eq=False, slots=True, kw_only=True)
class Canary:
    """Dead letters that are retried a few at first, in the background of this process."""

    id: UUID
    subscription: str
    fingerprint: str
    author: str
    reason: str
    began: datetime
    steps: list[CanaryStep] = field(default_factory=list)
    over: str | None = None
    """How it ended."""
    task: asyncio.Task[None] | None = None


class Steering:
    def __init__(self, bus: EventBus, pages: Pages, board: Board, gauges: Gauges, lookback: Lookback) -> None:
        self._bus = bus
        self._pages = pages
        self._board = board
        self._gauges = gauges
        self._lookback = lookback
        self._canaries: dict[UUID, Canary] = {}

    async def close(self) -> None:
        for canary in self._canaries.values():
            await self._end(canary)

    async def _end(self, canary: Canary) -> None:
        if canary.task is None or canary.over is not None:
            return
        canary.task.cancel()
        await asyncio.wait({canary.task})
        if canary.over is None:  # it had not even begun
            canary.over = STOPPED

    async def _answer(
        self,
        visit: Visit,
        plan: Callable[[Mapping[str, str]], Awaitable[Plan]],
        act: Callable[[str], Awaitable[str]],
    ) -> Response:
        """The plan; for a form that was sent, what `act` leads to, or the plan again with what is wrong with it."""
        if visit.request.method != "POST":
            if not visit.may_act:
                raise Refusal(403, f"{visit.visitor.name} may look and not act here.")
            return self._shown(visit, await plan(visit.request.query_params))
        reason = visit.fields.get("reason", "").strip()
        try:
            if not reason:
                raise ActionRefused("Say why: the reason is kept with what was done, for those who come later.")
            if len(reason) > LONGEST_REASON:
                raise ActionRefused(f"The reason has {LONGEST_REASON:,} characters at most.")
            address = await act(reason)
        except ActionRefused as error:
            try:
                again = await plan(visit.fields)
            except WhereuponError:
                raise error from None  # what it was about is gone
            return self._shown(visit, again, 409, problem=str(error), reason=reason)
        return Response(status_code=303, headers={"location": address})

    def _shown(
        self, visit: Visit, plan: Plan, status: int = 200, *, problem: str | None = None, reason: str = ""
    ) -> Response:
        return self._pages.show(
            visit, "plan.html.jinja", status, here="", plan=plan, problem=problem, reason=reason,
            longest_reason=LONGEST_REASON,
        )  # fmt: skip

    # --- subscriptions ----------------------------------------------------------------------------------------------

    async def _served(self, asked: Mapping[str, str]) -> Served:
        name = asked.get("name", "")
        served = {one.name: one for one in await self._lookback.served()}
        if name not in served:
            raise Refusal(404, f"There is no subscription {name[:200]!r} in this database.")
        return served[name]

    async def pause(self, visit: Visit) -> Response:
        async def plan(asked: Mapping[str, str]) -> Plan:
            one = await self._served(asked)
            return Plan(
                action="pause",
                title=f"Pause {one.name}",
                lines=[
                    "No worker begins a delivery of it from the next poll on; what runs ends.",
                    f"{_lanes(one)} {_open(one)}",
                    "Events gather in the log meanwhile. A handler that runs inside publish still runs there.",
                ],
                button="Pause it",
                way_back="handlers",
                hidden={"name": one.name},
            )

        async def act(reason: str) -> str:
            name = (await self._served(visit.fields)).name
            changed = await self._bus.operator.pause(name, reason, author=visit.visitor.name)
            return f"handlers?done={'pause' if changed else 'unchanged'}"

        return await self._answer(visit, plan, act)

    async def resume(self, visit: Visit) -> Response:
        async def plan(asked: Mapping[str, str]) -> Plan:
            one = await self._served(asked)
            why = f"It was paused because: {one.paused_because}" if one.paused_because else "It is not paused."
            return Plan(
                action="resume",
                title=f"Resume {one.name}",
                lines=["Workers deliver again where they stopped.", why, _open(one)],
                button="Resume it",
                way_back="handlers",
                hidden={"name": one.name},
            )

        async def act(reason: str) -> str:
            name = (await self._served(visit.fields)).name
            changed = await self._bus.operator.resume(name, reason, author=visit.visitor.name)
            return f"handlers?done={'resume' if changed else 'unchanged'}"

        return await self._answer(visit, plan, act)

    async def replay(self, visit: Visit) -> Response:
        async def plan(asked: Mapping[str, str]) -> Plan:
            one = await self._served(asked)
            since, until = time_in(asked.get("since", "")), time_in(asked.get("until", ""))
            number = await self._gauges.between(since, until)
            heard = "all of them" if one.types is None else f"of the types {', '.join(sorted(one.types))}"
            begin = "the beginning of the log" if since is None else f"{moment(since)} UTC"
            end = "now" if until is None else f"{moment(until)} UTC"
            return Plan(
                action="replay",
                title=f"Replay {one.name}",
                lines=[
                    f"From {begin} to {end} the log has {number:,} events at most. {one.name} is given those that it "
                    f"hears ({heard}) once more, beside what is new.",
                    "Its handler sees a new idempotency key, and a generation other than 0.",
                    "Order by key holds within the replay, not between it and what is new.",
                ],
                button="Replay",
                way_back="handlers",
                hidden={"name": one.name},
                fields=[
                    Field(name="since", label="From (UTC)", value=asked.get("since", ""),
                          hint="As 2026-11-28T19:30; empty: the beginning."),
                    Field(name="until", label="Until (UTC)", value=asked.get("until", ""), hint="Empty: now."),
                    Field(name="rate", label="Deliveries a second, at most", value=asked.get("rate", "10"),
                          hint="Empty: as fast as it goes."),
                ],
                cautious=True,
            )  # fmt: skip

        async def act(reason: str) -> str:
            name = (await self._served(visit.fields)).name
            try:
                since, until = time_in(visit.fields.get("since", "")), time_in(visit.fields.get("until", ""))
            except Refusal as error:
                raise ActionRefused(error.reason) from None
            rate = visit.fields.get("rate", "").strip()
            try:
                wanted = float(rate) if rate else None
            except ValueError:
                raise ActionRefused(f"{rate[:50]!r} is no number of deliveries a second.") from None
            generation = await self._bus.operator.replay(
                name, reason, since=since, until=until, rate=wanted, author=visit.visitor.name
            )
            return f"handlers?done=replay&number={generation}"

        return await self._answer(visit, plan, act)

    # --- dead letters -----------------------------------------------------------------------------------------------

    async def retry(self, visit: Visit) -> Response:
        return await self._settle(visit, "retry")

    async def skip(self, visit: Visit) -> Response:
        return await self._settle(visit, "skip")

    async def _settle(self, visit: Visit, what: str) -> Response:
        """One letter that is named by its event, or many of one group."""

        async def plan(asked: Mapping[str, str]) -> Plan:
            if asked.get("event"):
                subscription, event_id, generation = letter_in(asked)
                letter = await self._bus.operator.delivery(subscription, event_id, generation=generation)
                return _plan_for_one(what, letter)
            return await self._plan_for_group(what, asked)

        async def act(reason: str) -> str:
            operate = self._bus.operator.retry if what == "retry" else self._bus.operator.skip
            fields, author = visit.fields, visit.visitor.name
            if fields.get("event"):
                subscription, event_id, generation = letter_in(fields)
                number = await operate(subscription, event_id, generation=generation, reason=reason, author=author)
                where = _address("dead", {"subscription": subscription})
            else:
                subscription, fingerprint = _group_in(fields)
                limit = _limit_in(fields)
                number = await operate(subscription, fingerprint=fingerprint, limit=limit, reason=reason, author=author)
                where = _address("group", {"subscription": subscription, "fingerprint": fingerprint})
            return f"{where}&done={what}&number={number}"

        return await self._answer(visit, plan, act)

    async def _plan_for_group(self, what: str, asked: Mapping[str, str]) -> Plan:
        subscription, fingerprint = _group_in(asked)
        group = await self._board.group_of(subscription, fingerprint)
        if group is None:
            raise Refusal(404, "None of that group is dead any more.")
        letters = await self._bus.operator.dead(subscription, fingerprint=fingerprint, limit=SHOWN)
        many = f"{group.number:,}{' or more' if group.more else ''}"
        then = (
            "They are delivered again, with all their attempts; one that is not the first of its key waits for that."
            if what == "retry"
            else "They are settled without a delivery, for ever, and what waits behind them goes on."
        )
        return Plan(
            action=what,
            title=f"{what.capitalize()} dead letters of {subscription}",
            lines=[
                f"{many} died of {group.error_type or 'something unknown'}: {(group.error_message or '')[:300]}",
                then,
                *(f"{one.event_type} {one.event_id}, died {moment(one.updated_at)} UTC" for one in letters),
                *(["and others"] if group.number > len(letters) else []),
            ],
            button="Retry them" if what == "retry" else "Skip them",
            way_back=_address("group", {"subscription": subscription, "fingerprint": fingerprint}),
            hidden={"subscription": subscription, "fingerprint": fingerprint},
            fields=[
                Field(name="limit", label="So many, the oldest first", kind="number",
                      value=asked.get("limit", str(min(group.number, AT_ONCE))),
                      hint=f"{MOST:,} at most at once.", required=True)
            ],
            cautious=what == "skip",
        )  # fmt: skip

    async def edit(self, visit: Visit) -> Response:
        async def plan(asked: Mapping[str, str]) -> Plan:
            subscription, event_id, generation = letter_in(asked)
            letter = await self._bus.operator.delivery(subscription, event_id, generation=generation)
            now = pretty(letter.payload or b"")
            return Plan(
                action="edit",
                title=f"Edit {letter.event_type} for {subscription}",
                lines=[
                    _died(letter),
                    "This delivery gets other fields, and is tried again. The log keeps what was published.",
                    "Its id stays, and so does the value that the subscription orders by.",
                ],
                button="Edit and retry",
                way_back=_letter_address("letter", letter),
                hidden={"subscription": subscription, "event": str(event_id), "generation": str(generation)},
                fields=[
                    Field(name="payload", label="Fields, as JSON", kind="textarea", value=asked.get("payload", now),
                          required=True)
                ],
                cautious=True,
            )  # fmt: skip

        async def act(reason: str) -> str:
            subscription, event_id, generation = letter_in(visit.fields)
            try:
                fields = msgspec.json.decode(visit.fields.get("payload", "").encode(), type=dict[str, Any])
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise ActionRefused(f"The fields are no JSON object: {error}.") from None
            await self._bus.operator.edit(
                subscription, event_id, fields, generation=generation, reason=reason, author=visit.visitor.name
            )
            return f"{_address('dead', {'subscription': subscription})}&done=edit"

        return await self._answer(visit, plan, act)

    # --- a few first ------------------------------------------------------------------------------------------------

    async def canary(self, visit: Visit) -> Response:
        async def plan(asked: Mapping[str, str]) -> Plan:
            shown = await self._plan_for_group("retry", asked)
            return Plan(
                action="canary",
                title=f"Retry dead letters of {shown.hidden['subscription']}, a few first",
                lines=[
                    shown.lines[0],
                    "One is retried, and its outcome waited for; then 10, then 100, then all. It ends when one fails "
                    "as before.",
                    "It runs in the process of this dashboard: if that ends, nothing more is retried.",
                ],
                button="Begin",
                way_back=shown.way_back,
                hidden=shown.hidden,
            )

        async def act(reason: str) -> str:
            subscription, fingerprint = _group_in(visit.fields)
            return f"canary-run?id={self._begin(subscription, fingerprint, visit.visitor.name, reason).id}"

        return await self._answer(visit, plan, act)

    def _begin(self, subscription: str, fingerprint: str, author: str, reason: str) -> Canary:
        running = [canary for canary in self._canaries.values() if canary.over is None]
        if any((one.subscription, one.fingerprint) == (subscription, fingerprint) for one in running):
            raise ActionRefused("These are being retried already, a few first: see Canaries.")
        if len(running) >= MOST_CANARIES:
            raise ActionRefused(f"{len(running)} canaries run already: wait until one of them has ended.")
        canary = Canary(
            id=uuid7(), subscription=subscription, fingerprint=fingerprint, author=author, reason=reason,
            began=datetime.now(UTC),
        )  # fmt: skip
        over = [one.id for one in self._canaries.values() if one.over is not None]
        for old in over[: max(0, len(over) - KEPT + 1)]:
            del self._canaries[old]
        self._canaries[canary.id] = canary
        canary.task = asyncio.create_task(self._retry_by_steps(canary))
        return canary

    async def _retry_by_steps(self, canary: Canary) -> None:
        try:
            async for step in self._bus.operator.canary(
                canary.subscription, reason=canary.reason, fingerprint=canary.fingerprint, author=canary.author
            ):
                canary.steps.append(step)
            canary.over = _outcome(canary.steps[-1] if canary.steps else None)
        except asyncio.CancelledError:
            canary.over = STOPPED
            raise
        except WhereuponError as error:
            canary.over = f"It ended: {error}"
        except Exception as error:
            canary.over = f"It ended by a fault of its own, {type(error).__name__}; the log of this process tells more."
            self._bus.logger.error("dashboard_canary_failed", subscription=canary.subscription, exc_info=error)

    async def canaries(self, visit: Visit) -> Response:
        return self._pages.show(
            visit, "canaries.html.jinja", here="dead", canaries=list(reversed(self._canaries.values()))
        )

    async def canary_run(self, visit: Visit) -> Response:
        canary = self._canary_in(visit.request.query_params)
        template = "canary_now.html.jinja" if visit.is_fragment else "canary.html.jinja"
        return self._pages.show(visit, template, here="dead", canary=canary)

    async def stop(self, visit: Visit) -> Response:
        """End a canary. It takes no reason: nothing is changed by it."""
        if visit.request.method != "POST":
            return Response(status_code=303, headers={"location": "canaries"})
        canary = self._canary_in(visit.fields)
        await self._end(canary)
        return Response(status_code=303, headers={"location": f"canary-run?id={canary.id}&done=stop"})

    def _canary_in(self, asked: Mapping[str, str]) -> Canary:
        try:
            return self._canaries[UUID(asked.get("id", ""))]
        except (KeyError, ValueError):
            raise Refusal(
                404,
                "This process knows no such canary: it is over for long, or another process of the dashboard runs it. "
                "What it has retried is among the actions.",
            ) from None


def _address(page: str, values: Mapping[str, str]) -> str:
    return f"{page}?{urlencode(values)}"


def _letter_address(page: str, letter: DeadLetter) -> str:
    return _address(
        page,
        {
            "subscription": letter.subscription,
            "event": str(letter.event_id),
            "generation": str(letter.generation),
        },
    )


def _group_in(asked: Mapping[str, str]) -> tuple[str, str]:
    subscription, fingerprint = asked.get("subscription", ""), asked.get("fingerprint", "")
    if not subscription or not fingerprint:
        raise Refusal(422, "Which dead letters? It takes a subscription and the fingerprint of what they died of.")
    return subscription, fingerprint


def _limit_in(fields: Mapping[str, str]) -> int:
    text = fields.get("limit", "").strip()
    if not (text.isascii() and text.isdecimal()) or not 1 <= int(text[:9]) <= MOST or len(text) > 9:
        raise ActionRefused(f"How many? A number from 1 to {MOST:,}.")
    return int(text)


def _plan_for_one(what: str, letter: DeadLetter) -> Plan:
    then = (
        "It is delivered again, with all its attempts; if it is not the first of its key it waits for that."
        if what == "retry"
        else "It is settled without a delivery, for ever, and what waits behind it goes on."
    )
    return Plan(
        action=what,
        title=f"{what.capitalize()} {letter.event_type} for {letter.subscription}",
        lines=[_died(letter), then],
        button=f"{what.capitalize()} it",
        way_back=_letter_address("letter", letter),
        hidden={
            "subscription": letter.subscription,
            "event": str(letter.event_id),
            "generation": str(letter.generation),
        },
        cautious=what == "skip",
    )


def _outcome(last: CanaryStep | None) -> str:
    if last is None:
        return "There was nothing to retry any more."
    if last.failure is not None:
        as_before = "of the same cause as before" if last.returned else "of another cause"
        return f"It ended after {last.total:,}: one has failed again, {as_before}. The others are dead letters still."
    if last.outcomes.open:
        return f"It ended after {last.total:,}: nobody tries them. Does a worker run? Is it paused?"
    return f"It has ended: {last.total:,} were retried."


def _died(letter: DeadLetter) -> str:
    of = f", of {letter.error_type}: {(letter.error_message or '')[:300]}" if letter.error_type else ""
    return f"The delivery of {letter.event_id} is {letter.state} after {letter.attempts} attempts{of}"


def _lanes(one: Served) -> str:
    return f"Workers hold {one.held} of its {one.lanes} lanes."


def _open(one: Served) -> str:
    counts = ", ".join(f"{number} {state}" for state, number in sorted(one.open.items()))
    return (
        f"Of its deliveries that have failed before or run, {counts}."
        if counts
        else "No delivery of it is retried now."
    )
