"""Dead letters by what they died of, and retries that go on only while the failure stays away."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from sqlalchemy import insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.statements import statements
from whereupon import ActionRefused, DomainEvent, EventBus, Retry, RetryLater, schema
from whereupon.action import CanaryStep

pytestmark = pytest.mark.integration


class KilnFired(DomainEvent):
    number: int
    shelf: str = ""


class Pottery:
    """A bus whose handler breaks what it is told to, and how."""

    def __init__(self, url: str) -> None:
        self.calls = Counter[int]()
        self.breaks: Callable[[KilnFired], Exception | None] = lambda event: ValueError(f"pot {event.number} cracked")
        self.bus = EventBus(url, create_tables=True, poll_interval=0.05)

    def serve(self, **options: Any) -> EventBus:
        async def unload(event: KilnFired) -> None:
            self.calls[event.number] += 1
            if (error := self.breaks(event)) is not None:
                raise error

        self.bus.subscribe(KilnFired, unload, name="unload", **{"retry": Retry(max_attempts=1), **options})
        return self.bus

    async def fire(self, number: int, **fields: Any) -> list[KilnFired]:
        events = [KilnFired(number=each, **fields) for each in range(number)]
        async with AsyncSession(self.bus.engine) as session, session.begin():
            await self.bus.publish(*events, session=session)
        await self.bus.wait_settled(events, 60)
        return events


@pytest.fixture
async def pottery(database_url: str) -> AsyncIterator[Pottery]:
    pottery = Pottery(database_url)
    yield pottery
    await pottery.bus.close(drain=False)
    await pottery.bus.engine.dispose()


async def fill(bus: EventBus, number: int, *, fingerprint: str = "kiln", subscription: str = "other") -> None:
    """Dead letters of a subscription that nobody serves."""
    async with bus.engine.begin() as connection:
        [event] = (await connection.execute(select(schema.log).limit(1))).all()
        first = (await connection.execute(text("SELECT coalesce(max(position), 0) FROM whereupon_exception"))).scalar()
        rows = [
            {
                "subscription": subscription, "generation": 0, "lane": 0, "position": int(first or 0) + 1 + each,
                "event_id": event.event_id, "type": event.type, "version": 1, "payload": b"{}", "headers": "{}",
                "state": "dead", "attempts": 1, "alone": False, "error_type": "KilnError", "error_message": "cold",
                "fingerprint": fingerprint, "recorded_at": event.recorded_at, "updated_at": event.recorded_at,
            }
            for each in range(number)
        ]  # fmt: skip
        await connection.execute(insert(schema.exception), rows)


async def test_dead_letters_of_one_cause_are_one_group(pottery: Pottery) -> None:
    pottery.breaks = lambda event: (ValueError if event.number % 3 else KeyError)(f"pot {event.number} cracked")
    async with pottery.serve() as bus:
        await pottery.fire(9)
        values, keys = sorted(await bus.operator.groups(), key=lambda group: -group.number)
        assert (values.subscription, values.error_type, values.number, values.more) == (
            "unload",
            "ValueError",
            6,
            False,
        )
        assert (keys.error_type, keys.number) == ("KeyError", 3)
        assert "cracked" in str(values.error_message)
        letters = await bus.operator.dead(fingerprint=values.fingerprint)
        assert {letter.error_type for letter in letters} == {"ValueError"}
        assert (values.newest_event, values.newest) == (letters[-1].event_id, letters[-1].updated_at)
        assert values.oldest <= values.newest
        assert await bus.operator.skip(fingerprint=keys.fingerprint, reason="swept up") == 3
        assert [group.fingerprint for group in await bus.operator.groups("unload")] == [values.fingerprint]
        assert await bus.operator.groups("another") == []


async def test_groups_are_counted_to_a_bound_in_as_many_statements_whatever_there_is(pottery: Pottery) -> None:
    async with pottery.serve() as bus:
        await pottery.fire(1)
        await fill(bus, 10_001)
        for number in range(30):
            await fill(bus, 2, fingerprint=f"cause {number}", subscription=f"other {number % 3}")
        with statements() as seen:
            groups = await bus.operator.groups()
        assert len([one for one in seen if "count(*)" in one.sql or "error_message" in one.sql]) == 2
        assert len(groups) == 32
        assert [(g.number, g.more) for g in groups if g.subscription == "other"] == [(10_000, True)]
        assert {(g.number, g.more) for g in groups if g.subscription.startswith("other ")} == {(2, False)}
        assert len(await bus.operator.groups(limit=5)) == 5
        assert len(await bus.operator.groups("other 1")) == 10


async def steps_of(bus: EventBus, **options: Any) -> list[CanaryStep]:
    return [step async for step in bus.operator.canary("unload", reason="new glaze", **options)]


async def test_a_canary_goes_on_in_growing_steps_while_all_is_well(pottery: Pottery) -> None:
    async with pottery.serve(concurrency=50) as bus:
        await pottery.fire(120)
        pottery.breaks = lambda _: None
        steps = await steps_of(bus)
        assert [(step.retried, step.total, step.outcomes.succeeded) for step in steps] == [
            (1, 1, 1), (10, 11, 10), (100, 111, 100), (9, 120, 9)
        ]  # fmt: skip
        assert [step.going_on for step in steps] == [True, True, True, False]
        assert set(pottery.calls.values()) == {2}
        assert await bus.operator.groups() == []
        assert len(await bus.operator.actions("unload", limit=500)) == 120


async def test_a_canary_stops_where_the_failure_returns_and_leaves_the_others_dead(pottery: Pottery) -> None:
    async with pottery.serve() as bus:
        events = await pottery.fire(40)
        oldest = [letter.event_id for letter in await bus.operator.dead("unload")]
        doomed = {event.number for event in events if event.event_id == oldest[5]}
        pottery.breaks = lambda event: ValueError("pot 99 cracked") if event.number in doomed else None
        steps = await steps_of(bus)
        assert [(step.retried, step.going_on, step.returned) for step in steps] == [(1, True, False), (10, False, True)]
        assert steps[-1].failure is not None
        assert (steps[-1].failure.event_id, steps[-1].outcomes.failed) == (oldest[5], 1)
        await bus.drain(20)
        assert len(await bus.operator.dead("unload", limit=100)) == 30
        assert sum(pottery.calls.values()) == 40 + 11


async def test_a_canary_of_one_cause_leaves_other_causes_alone_and_tells_a_new_one(pottery: Pottery) -> None:
    pottery.breaks = lambda event: (ValueError if event.number % 2 else KeyError)("cracked")
    async with pottery.serve() as bus:
        await pottery.fire(8)
        [cause] = [group.fingerprint for group in await bus.operator.groups() if group.error_type == "ValueError"]
        pottery.breaks = lambda _: RuntimeError("no water")
        [step] = await steps_of(bus, fingerprint=cause)
        assert (step.retried, step.outcomes.failed, step.returned, step.going_on) == (1, 1, False, False)
        assert step.failure is not None
        assert step.failure.error_type == "RuntimeError"
        assert {group.error_type: group.number for group in await bus.operator.groups()} == {
            "KeyError": 4, "ValueError": 3, "RuntimeError": 1
        }  # fmt: skip


async def test_a_canary_stops_at_a_failure_that_will_be_retried_by_itself(pottery: Pottery) -> None:
    async with pottery.serve(retry=Retry(max_attempts=2, first=0)) as bus:
        await pottery.fire(3)
        [group] = await bus.operator.groups()
        pottery.breaks = lambda _: RetryLater(3600)
        steps = await steps_of(bus, fingerprint=group.fingerprint, patience=5)
        assert [(step.retried, step.outcomes.failed, step.outcomes.open) for step in steps] == [(1, 1, 0)]
        assert sum(pottery.calls.values()) == 6 + 1


async def test_a_canary_does_not_wait_for_what_is_parked_behind_another_cause(pottery: Pottery) -> None:
    pottery.breaks = lambda event: ValueError("cracked")
    async with pottery.serve(ordered_by="shelf") as bus:
        first, second = [KilnFired(number=each, shelf="top") for each in range(2)]
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(first, second, session=session)
        await bus.wait_settled([first], 20)
        async with bus.engine.begin() as connection:  # as if it had died before the other, of something else
            await connection.execute(
                text("UPDATE whereupon_exception SET state = 'dead', fingerprint = 'late' WHERE state = 'parked'")
            )
        [step] = await steps_of(bus, fingerprint="late")
        assert (step.outcomes.parked, step.outcomes.open, step.going_on) == (1, 0, False)


async def test_a_canary_ends_when_nobody_delivers(pottery: Pottery) -> None:
    async with pottery.serve() as bus:
        await pottery.fire(3)
    other = EventBus(bus.engine, deliver=False)
    steps = [step async for step in other.operator.canary("unload", reason="why not", patience=0.3)]
    assert [(step.retried, step.outcomes.open, step.going_on) for step in steps] == [(1, 1, False)]


async def test_many_are_retried_at_the_rate_that_was_asked_for(pottery: Pottery) -> None:
    async with pottery.serve(lanes=1) as bus:
        await pottery.fire(12)
        pottery.breaks = lambda _: None
        changed: list[tuple[int, float]] = []
        now = asyncio.get_running_loop().time
        await bus.operator.retry(
            "unload", reason="again", rate=10, progress=lambda number: changed.append((number, now()))
        )
        assert [number for number, _ in changed] == [10, 12]
        assert changed[1][1] - changed[0][1] >= 0.9
    for rate in (0, -1, float("inf")):
        with pytest.raises(ActionRefused, match="a rate is a number above 0"):
            await bus.operator.retry("unload", reason="again", rate=rate)


async def test_a_retry_of_many_says_which(pottery: Pottery) -> None:
    async with pottery.serve() as bus:
        events = await pottery.fire(1)
        with pytest.raises(ActionRefused, match="say which dead letters"):
            await bus.operator.retry(reason="all of them")
        with pytest.raises(ActionRefused, match="and nothing else"):
            await bus.operator.retry("unload", events[0].event_id, reason="one", fingerprint="x")
