"""Two builds with two definitions of one subscription: one of them serves it, and no event is stepped over."""

from __future__ import annotations

import asyncio
from collections import Counter
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import DomainEvent, EventBus
from whereupon.errors import SubscriptionConflictError

pytestmark = pytest.mark.integration


class TrainArrived(DomainEvent):
    number: int


class TrainDelayed(DomainEvent):
    number: int


class Log:
    def __init__(self) -> None:
        self.names: list[str] = []

    def __getattr__(self, level: str) -> Any:
        def log(name: str, **details: Any) -> None:
            self.names.append(name)

        return log


def build(url: str, heard: Counter[tuple[str, int]], *events: type[DomainEvent], **options: Any) -> EventBus:
    """A process of a build whose subscription `board` hears these events."""
    bus = EventBus(url, create_tables=True, poll_interval=0.05, lease=3, **options)

    async def board(event: Any) -> None:
        heard[type(event).__name__, event.number] += 1

    for event in events:
        bus.subscribe(event, board, name="board")
    return bus


async def publish(bus: EventBus, *events: DomainEvent) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)


async def until(heard: Counter[tuple[str, int]], number: int) -> None:
    async with asyncio.timeout(30):
        while len(heard) < number:  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_two_builds_one_name_and_the_old_one_steps_over_nothing(database_url: str) -> None:
    """Interleaving 2: the new build adds a type while a worker of the old one holds the lanes."""
    by_old: Counter[tuple[str, int]] = Counter()
    by_new: Counter[tuple[str, int]] = Counter()
    log = Log()
    old = build(database_url, by_old, TrainArrived, logger=log)
    async with old:
        await publish(old, *(TrainArrived(number=number) for number in range(10)))
        await until(by_old, 10)
        publisher = build(database_url, by_new, TrainArrived, TrainDelayed, deliver=False)
        await publish(publisher, *(TrainDelayed(number=number) for number in range(10)))
        await publish(publisher, *(TrainArrived(number=number) for number in range(10, 20)))
        async with asyncio.timeout(30):
            while "subscription_superseded" not in log.names:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        async with build(database_url, by_new, TrainArrived, TrainDelayed) as new:  # both run
            await publish(old, *(TrainArrived(number=number) for number in range(20, 30)))
            await until(by_new, 30)
            await new.drain(20)
        await publisher.close()
    # what it had read by then it may have handled, as after a crash; what only the new build hears it never saw
    assert {("TrainArrived", number) for number in range(10)} <= set(by_old)
    assert set(by_old) <= {("TrainArrived", number) for number in range(20)}
    assert max(by_old.values()) == 1
    assert by_new == Counter(
        {("TrainDelayed", number): 1 for number in range(10)} | {("TrainArrived", n): 1 for n in range(10, 30)}
    )


async def test_an_older_build_that_starts_again_takes_nothing_back_until_it_is_adopted(database_url: str) -> None:
    by_old: Counter[tuple[str, int]] = Counter()
    by_new: Counter[tuple[str, int]] = Counter()
    async with build(database_url, by_old, TrainArrived):
        pass
    async with build(database_url, by_new, TrainArrived, TrainDelayed):
        pass
    log = Log()
    async with build(database_url, by_old, TrainArrived, logger=log) as old:
        await publish(old, TrainArrived(number=1))
        async with asyncio.timeout(30):
            while "subscription_superseded" not in log.names:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        assert by_old == Counter()
        async with build(database_url, by_new, TrainArrived, TrainDelayed):
            await until(by_new, 1)
        await publish(old, TrainArrived(number=2))
        assert await old.operator.adopt("board", "the new build was rolled back") is True
        assert await old.operator.adopt("board", "twice does no harm") is False
        await until(by_old, 1)
        [action] = await old.operator.actions("board")
        assert (action.action, action.reason) == ("adopt", "the new build was rolled back")
    assert by_new == Counter({("TrainArrived", 1): 1})
    assert by_old == Counter({("TrainArrived", 2): 1})


async def test_another_order_under_the_same_name_is_refused_with_the_way_out(database_url: str) -> None:
    heard: Counter[tuple[str, int]] = Counter()
    async with build(database_url, heard, TrainArrived):
        pass
    bus = EventBus(database_url, create_tables=True)

    @bus.subscribe(TrainArrived, name="board", ordered_by="number")
    async def board(event: TrainArrived) -> None: ...

    with pytest.raises(
        SubscriptionConflictError, match=r"ordered by nothing in .* and by number here.*name of its own"
    ):
        await bus.start()
