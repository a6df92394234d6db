"""A subscription may begin in the past and go on into the present, and a range of the log may be delivered again."""

from __future__ import annotations

import asyncio
from collections import Counter, defaultdict
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import ActionRefused, DomainEvent, EventBus, EventContext
from whereupon.errors import SubscriptionError

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class ShelfFilled(DomainEvent):
    shelf: str
    number: int


class ShelfEmptied(DomainEvent):
    shelf: str


class RackFilled(DomainEvent, aliases=("RackStocked",)):
    number: int


def bus_on(url: str, *, deliver: bool = True) -> EventBus:
    return EventBus(url, create_tables=True, poll_interval=0.05, lease=2, deliver=deliver)


async def publish(bus: EventBus, numbers: range) -> None:
    for number in numbers:
        async with AsyncSession(bus.engine) as session, session.begin():
            events = [ShelfFilled(shelf="abc"[number % 3], number=number), ShelfEmptied(shelf="a")]
            await bus.publish(*events, session=session)


async def database_now(bus: EventBus) -> datetime:
    if bus.engine.dialect.name == "sqlite":
        return datetime.now(UTC)
    async with bus.engine.connect() as connection:
        now: datetime = (await connection.execute(text("SELECT clock_timestamp()"))).scalar_one()
        return now


async def test_a_subscription_from_the_beginning_hears_all_once_while_publishing_goes_on(database_url: str) -> None:
    publisher = bus_on(database_url, deliver=False)
    await publish(publisher, range(700))
    heard: list[int] = []
    bus = bus_on(database_url)

    @bus.subscribe(ShelfFilled, name="librarian", start="beginning", ordered_by="shelf")
    async def librarian(event: ShelfFilled) -> None:
        heard.append(event.number)

    publishing = asyncio.create_task(publish(publisher, range(700, 900)))
    async with bus:
        await publishing
        async with asyncio.timeout(60):
            while len(heard) < 900:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await bus.drain(20)
    await publisher.close()
    assert Counter(heard) == Counter(range(900))
    by_shelf = defaultdict(list)
    for number in heard:
        by_shelf[number % 3].append(number)
    assert all(numbers == sorted(numbers) for numbers in by_shelf.values())


async def test_a_subscription_from_a_time_hears_what_was_recorded_since(database_url: str) -> None:
    publisher = bus_on(database_url, deliver=False)
    await publish(publisher, range(5))
    await asyncio.sleep(0.01)
    moment = await database_now(publisher)
    await asyncio.sleep(0.01)
    await publish(publisher, range(5, 12))
    await publisher.close()
    heard: list[int] = []
    bus = bus_on(database_url)

    @bus.subscribe(ShelfFilled, name="librarian", start=moment)
    async def librarian(event: ShelfFilled) -> None:
        heard.append(event.number)

    async with bus:
        await publish(bus, range(12, 14))
        await bus.drain(20)
    assert Counter(heard) == Counter(range(5, 14))


async def test_a_subscription_starts_once_and_not_at_each_start_of_a_process(database_url: str) -> None:
    heard: list[int] = []
    for turn in range(3):
        bus = bus_on(database_url)

        @bus.subscribe(ShelfFilled, name="librarian", start="beginning")
        async def librarian(event: ShelfFilled) -> None:
            heard.append(event.number)

        async with bus:
            await publish(bus, range(turn, turn + 1))
            await bus.drain(20)
    assert sorted(heard) == [0, 1, 2]


async def test_catching_up_is_held_to_its_rate_and_what_is_new_is_not(database_url: str) -> None:
    publisher = bus_on(database_url, deliver=False)
    await publish(publisher, range(30))
    await publisher.close()
    began: dict[int, float] = {}
    bus = bus_on(database_url)

    @bus.subscribe(ShelfFilled, name="librarian", start="beginning", backfill_rate=10, lanes=1)
    async def librarian(event: ShelfFilled) -> None:
        began[event.number] = asyncio.get_running_loop().time()

    async with bus:
        await publish(bus, range(30, 90))
        async with asyncio.timeout(60):
            while len(began) < 90:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
    # ten may have gathered at the start; sixty at that rate would take six seconds
    assert began[29] - began[0] >= (30 - 11) / 10 * 0.9
    assert began[89] - began[30] < began[29] - began[0]


async def test_a_range_is_delivered_again_beside_what_is_new_under_keys_of_its_own(database_url: str) -> None:
    heard: Counter[tuple[int, int]] = Counter()
    keys: set[str] = set()
    in_order: dict[tuple[int, str], list[int]] = defaultdict(list)
    buses = [bus_on(database_url) for _ in range(2)]
    for bus in buses:

        @bus.subscribe(ShelfFilled, name="librarian", ordered_by="shelf", lanes=3)
        async def librarian(event: ShelfFilled, context: EventContext) -> None:
            heard[context.generation, event.number] += 1
            keys.add(context.idempotency_key)
            in_order[context.generation, event.shelf].append(event.number)

    first, second = buses
    async with first, second:
        await publish(first, range(40))
        await asyncio.sleep(0.01)
        since = await database_now(first)
        await asyncio.sleep(0.01)
        await publish(first, range(40, 80))
        await asyncio.sleep(0.01)
        until = await database_now(first)
        await asyncio.sleep(0.01)
        await publish(first, range(80, 100))
        assert await first.operator.replay("librarian", "the shelf was dropped", since=since, until=until) == 1
        await publish(first, range(100, 120))
        async with asyncio.timeout(60):
            while len(heard) < 160:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        for bus in buses:
            await bus.drain(20)
        assert await second.operator.replay("librarian", "again, all of it") == 2
        async with asyncio.timeout(60):
            while len(heard) < 280:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        for bus in buses:
            await bus.drain(20)
    assert heard == Counter(
        [(0, n) for n in range(120)] + [(1, n) for n in range(40, 80)] + [(2, n) for n in range(120)]
    )
    assert len(keys) == 280
    assert all(numbers == sorted(numbers) for numbers in in_order.values())


async def test_what_was_stored_under_an_older_name_is_delivered_again_as_well(database_url: str) -> None:
    heard: list[int] = []
    bus = bus_on(database_url)

    @bus.subscribe(RackFilled, name="librarian")
    async def librarian(event: RackFilled) -> None:
        heard.append(event.number)

    async with bus:
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(*(RackFilled(number=number) for number in range(3)), session=session)
        await bus.drain(20)
        async with bus.engine.begin() as connection:  # the first and the last are from before it was renamed
            await connection.execute(text("UPDATE whereupon_log SET type = 'RackStocked' WHERE position <> 2"))
        await bus.operator.replay("librarian", "the rack was dropped")
        async with asyncio.timeout(30):
            while len(heard) < 6:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await bus.drain(20)
    assert sorted(heard) == [0, 0, 1, 1, 2, 2]


async def test_a_replay_that_is_over_holds_no_pruning_back(database_url: str) -> None:
    heard: Counter[int] = Counter()
    bus = bus_on(database_url)

    @bus.subscribe(ShelfFilled, name="librarian")
    async def librarian(event: ShelfFilled) -> None:
        heard[event.number] += 1

    async with bus:
        await publish(bus, range(20))
        await bus.drain(20)
        await bus.operator.replay("librarian", "to see whether it ends")
        async with asyncio.timeout(30):
            while heard.total() < 40:  # noqa: ASYNC110
                await asyncio.sleep(0.02)
        await bus.drain(20)
    async with bus_on(database_url, deliver=False) as quiet:
        report = await quiet.operator.prune("old enough", older_than=timedelta(0))
        assert [holder for holder in report.holders if holder.generation] == []


async def test_a_replay_of_nothing_or_of_what_is_not_declared_is_refused(database_url: str) -> None:
    bus = bus_on(database_url)

    @bus.subscribe(ShelfFilled, name="librarian")
    async def librarian(event: ShelfFilled) -> None: ...

    async with bus:
        with pytest.raises(ActionRefused, match="nothing in the log that librarian hears"):
            await bus.operator.replay("librarian", "why not")
        with pytest.raises(ActionRefused, match="not declared by this bus"):
            await bus.operator.replay("reader", "why not")
        with pytest.raises(ActionRefused, match="in no time zone"):
            await bus.operator.replay("librarian", "why not", since=datetime(2026, 1, 1))  # noqa: DTZ001


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"start": "yesterday"}, 'start=\'yesterday\': it is "now", "beginning" or a datetime'),
        ({"start": datetime(2026, 1, 1)}, "in no time zone"),  # noqa: DTZ001
        ({"start": "beginning", "delivery": "after_commit"}, "can't hear of what was published before it"),
        ({"backfill_rate": 5}, "nothing to catch up on"),
        ({"start": "beginning", "backfill_rate": 0}, "backfill_rate=0: it is deliveries a second"),
    ],
)
def test_a_start_that_makes_no_sense_is_refused(sqlite_url: str, options: dict[str, object], reason: str) -> None:
    async def librarian(event: ShelfFilled) -> None: ...

    with pytest.raises(SubscriptionError, match=reason):
        EventBus(sqlite_url).subscribe(ShelfFilled, librarian, **options)  # type: ignore[call-overload]
