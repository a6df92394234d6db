"""How far a subscription is behind, and what it has promised."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from tests.statements import statements
from whereupon import Delivery, DomainEvent, EventBus, Retry, SubscriptionError

pytestmark = pytest.mark.integration


class FerryDelayed(DomainEvent):
    line: str
    sunk: bool = False


async def announce(event: FerryDelayed) -> None:
    if event.sunk:
        raise ValueError("sunk")


def harbour(url: str, *, deliver: bool = False, **options: Any) -> EventBus:
    bus = EventBus(url, create_tables=True, deliver=deliver, poll_interval=0.05)
    bus.subscribe(FerryDelayed, announce, name="announce", **{"ordered_by": "line", **options})
    return bus


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    """Which delivers nothing, and has promised what can't be kept then."""
    async with harbour(database_url, within="1ms") as bus:
        yield bus


async def delay(bus: EventBus, *events: DomainEvent) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)


async def states(bus: EventBus, *events: DomainEvent) -> list[str]:
    return [state.state for state in await bus.deliveries(*(event.event_id for event in events))]


async def test_nothing_owed_is_no_lag(bus: EventBus) -> None:
    [lag] = await bus.lags()
    assert (lag.subscription, lag.oldest, lag.age, lag.late, lag.within) == ("announce", None, 0.0, False, 0.001)


async def test_the_oldest_event_that_was_not_read_is_owed(bus: EventBus) -> None:
    events = [FerryDelayed(line=f"line {number}") for number in range(20)]
    await delay(bus, *events[:10])
    await delay(bus, *events[10:])
    await asyncio.sleep(0.01)
    [lag] = await bus.lags()
    assert lag.oldest is not None
    assert (lag.oldest.event_id, lag.oldest.event_type) == (events[0].event_id, "FerryDelayed")
    assert (lag.age > 0.001, lag.late) == (True, True)


async def test_what_is_retried_or_parked_is_owed_and_what_is_dead_is_not(database_url: str) -> None:
    first, second = FerryDelayed(line="north", sunk=True), FerryDelayed(line="north")
    async with harbour(database_url, deliver=True, retry=Retry(max_attempts=2, first=3600)) as bus:
        await delay(bus, first, second)
        async with asyncio.timeout(60):
            while await states(bus, first, second) != ["retrying", "parked"]:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        [lag] = await bus.lags()
        assert lag.oldest is not None
        assert (lag.oldest.event_id, lag.within, lag.late) == (first.event_id, None, False)
        await bus.operator.skip("announce", first.event_id, reason="sunk")
        await bus.wait_settled([first, second], 20)
    async with harbour(database_url, deliver=True, retry=Retry(max_attempts=1)) as bus:
        await delay(bus, first := FerryDelayed(line="south", sunk=True))
        await bus.wait_settled([first], 20)
        await bus.drain(20)
        assert [lag.oldest for lag in await bus.lags()] == [None]


async def test_what_ran_inside_publish_is_not_owed(database_url: str) -> None:
    async with harbour(database_url, delivery=Delivery.IN_TRANSACTION, ordered_by=None) as bus:
        await delay(bus, FerryDelayed(line="north"))
        assert [lag.oldest for lag in await bus.lags()] == [None]


async def test_measuring_takes_no_more_statements_for_a_longer_log(bus: EventBus) -> None:
    numbers = []
    for size in (100, 400):
        await delay(bus, *(FerryDelayed(line=str(number)) for number in range(size)))
        with statements(bus.engine.sync_engine) as seen:
            await bus.lags()
        numbers.append(len(seen))
    assert numbers[0] == numbers[1]


async def test_many_handlers_that_have_settled_all_take_no_more_statements_than_one(bus: EventBus) -> None:
    numbers = []
    for more in (0, 40):
        for number in range(more):
            bus.subscribe(FerryDelayed, announce, name=f"announce {number}")
        await bus.deliveries()  # which registers them
        with statements(bus.engine.sync_engine) as seen:
            assert [lag.oldest for lag in await bus.lags()] == [None] * (1 + more)
        numbers.append(len(seen))
    assert numbers[1] <= numbers[0] + 1  # those that were registered later stand at another place


async def test_what_lies_far_beyond_the_events_of_other_lanes_is_owed(database_url: str) -> None:
    others, held = [FerryDelayed(line="north") for _ in range(150)], FerryDelayed(line="held")
    let_go = asyncio.Event()
    bus = EventBus(database_url, create_tables=True, poll_interval=0.05)

    @bus.subscribe(FerryDelayed, name="announce", ordered_by="line")
    async def announce(event: FerryDelayed) -> None:
        if event.line == "held":
            await let_go.wait()

    async with bus:
        await delay(bus, *others, held)
        await bus.wait_settled(others, 30)
        [lag] = await bus.lags()
        assert lag.oldest is not None
        assert lag.oldest.event_id == held.event_id
        let_go.set()
        await bus.wait_settled([held], 30)
        await bus.drain(30)
        assert [lag.oldest for lag in await bus.lags()] == [None]


@pytest.mark.parametrize(
    ("given", "seconds"),
    [("30s", 30.0), ("5m", 300.0), ("250 ms", 0.25), ("1.5h", 5400.0), (2, 2.0), (timedelta(days=1), 86400.0)],
)
def test_a_promise_is_given_in_any_unit(sqlite_url: str, given: Any, seconds: float) -> None:
    bus = harbour(sqlite_url, within=given)
    assert bus.subscriptions["announce"].within == seconds


@pytest.mark.parametrize("given", ["soon", "", "30", 0, -1, float("inf"), float("nan"), True, timedelta(0), "0s"])
def test_a_promise_that_is_no_time_is_refused_with_how_to_write_it(sqlite_url: str, given: Any) -> None:
    with pytest.raises(SubscriptionError, match='within="30s"'):
        harbour(sqlite_url, within=given)


def test_what_runs_in_the_publishers_process_promises_nothing(sqlite_url: str) -> None:
    with pytest.raises(SubscriptionError, match="within is for DURABLE and TRANSACTIONAL"):
        harbour(sqlite_url, within="1s", delivery=Delivery.AFTER_COMMIT, ordered_by=None)
