"""Events of one key are delivered one at a time, in the order of publishing, across lanes and workers."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

import msgspec
import pytest
from sqlalchemy import event as sqlalchemy_events
from sqlalchemy import select, text, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from tests.notebook import until
from tests.statements import statements
from whereupon import Discard, DomainEvent, EventBus, EventContext, Retry
from whereupon.errors import SubscriptionError
from whereupon.lane import Delivery, Lane, Logged
from whereupon.observer import Observer, Run
from whereupon.schema import log
from whereupon.store import Page

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

AT_ONCE = Retry(max_attempts=4, first=0)


class PageTurned(DomainEvent):
    book: str
    number: int


class BookClosed(DomainEvent):
    title: str


@pytest.fixture
async def buses(database_url: str) -> AsyncIterator[tuple[EventBus, EventBus]]:
    """Two processes' worth of buses on one database, neither entered."""
    pair = tuple(EventBus(database_url, create_tables=True, poll_interval=0.05, lease=3) for _ in range(2))
    await pair[0].create_tables()
    async with pair[0].engine.begin() as connection:
        await connection.execute(text("CREATE TABLE page (book TEXT NOT NULL, number INTEGER NOT NULL)"))
    yield pair[0], pair[1]
    for bus in pair:
        await bus.engine.dispose()


async def turn(bus: EventBus, *pages: tuple[str, int]) -> list[PageTurned]:
    events = [PageTurned(book=book, number=number) for book, number in pages]
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)
    return events


async def states(bus: EventBus, events: list[PageTurned]) -> list[str]:
    found = {state.event_id: state.state for state in await bus.deliveries(*(event.event_id for event in events))}
    return [found[event.event_id] for event in events]


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2])
async def test_order_holds_through_failures_slow_handlers_takeovers_and_stops(
    buses: tuple[EventBus, EventBus], seed: int
) -> None:
    first, second = buses
    chance = random.Random(seed)
    numbers = {book: iter(range(10_000)) for book in "abcdefgh"}
    succeeded: dict[str, list[int]] = defaultdict(list)
    running: set[str] = set()
    overlaps: list[str] = []

    for bus in buses:

        @bus.subscribe(PageTurned, name="reader", ordered_by="book", retry=Retry(max_attempts=50, first=0), lanes=3)
        async def reader(event: PageTurned, context: EventContext) -> None:
            if event.book in running:
                overlaps.append(event.book)
            running.add(event.book)
            try:
                await asyncio.sleep(1.3 if chance.random() < 0.01 else chance.choice([0, 0, 0.003]))
                if chance.random() < 0.15:
                    raise RuntimeError
                succeeded[event.book].append(event.number)
            finally:
                running.discard(event.book)

    published: list[PageTurned] = []
    async with first:
        async with second:
            for _ in range(30):
                books = chance.choices("abcdefgh", k=5)
                published += await turn(chance.choice(buses), *((book, next(numbers[book])) for book in books))
                if chance.random() < 0.1:
                    await asyncio.sleep(0.05)
            await asyncio.sleep(0.2)
        for book in "abcd":  # the second has stopped: the first has all lanes now
            published += await turn(first, (book, next(numbers[book])))
        await first.wait_settled(published, 60)
    expected = defaultdict(list)
    for event in published:
        expected[event.book].append(event.number)
    # a clean hand-over waits for what runs, so nothing is delivered twice, and nothing overlaps
    assert {book: numbers for book, numbers in succeeded.items() if numbers != expected[book]} == {}
    assert overlaps == []


async def test_what_follows_a_dead_head_waits_and_other_keys_go_on(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses
    heard: list[tuple[str, int]] = []

    @bus.subscribe(PageTurned, name="reader", ordered_by="book", retry=AT_ONCE, lanes=1)
    async def reader(event: PageTurned) -> None:
        if (event.book, event.number) == ("torn", 1):
            raise RuntimeError("a page is missing")
        heard.append((event.book, event.number))

    async with bus:
        events = await turn(bus, ("torn", 0), ("torn", 1), ("torn", 2), ("whole", 0), ("torn", 3), ("whole", 1))
        await bus.drain(20)
        assert await states(bus, events) == ["succeeded", "dead", "parked", "succeeded", "parked", "succeeded"]
        later = await turn(bus, ("torn", 4), ("whole", 2))
        await bus.drain(20)
        assert await states(bus, later) == ["parked", "succeeded"]
    assert heard == [("torn", 0), ("whole", 0), ("whole", 1), ("whole", 2)]


async def test_the_next_owner_of_a_lane_knows_which_keys_are_blocked(buses: tuple[EventBus, EventBus]) -> None:
    first, second = buses
    heard: list[int] = []
    for bus in buses:

        @bus.subscribe(PageTurned, name="reader", ordered_by="book", retry=Retry(max_attempts=1))
        async def reader(event: PageTurned) -> None:
            if event.number == 0:
                raise RuntimeError
            heard.append(event.number)

    async with first:
        await turn(first, ("torn", 0))
        await first.drain(20)
    async with second:
        events = await turn(second, ("torn", 1))
        await second.drain(20)
        assert await states(second, events) == ["parked"]
    assert heard == []


@pytest.mark.parametrize("transactional", [False, True])
async def test_what_waits_behind_a_retry_follows_it_in_order(
    buses: tuple[EventBus, EventBus], transactional: bool
) -> None:
    bus, _ = buses
    heard: list[int] = []

    async def read(event: PageTurned, attempt: int) -> None:
        if event.number == 0 and attempt < 3:
            raise RuntimeError
        heard.append(event.number)

    if transactional:

        @bus.subscribe(PageTurned, name="reader", ordered_by="book", retry=Retry(first=0.05))
        async def in_transaction(event: PageTurned, session: AsyncSession, context: EventContext) -> None:
            await read(event, context.attempt)
    else:

        @bus.subscribe(PageTurned, name="reader", ordered_by="book", retry=Retry(first=0.05))
        async def outside(event: PageTurned, context: EventContext) -> None:
            await read(event, context.attempt)

    async with bus:
        events = await turn(bus, *(("torn", number) for number in range(6)))
        await bus.wait_settled(events, 20)
        later = await turn(bus, ("torn", 6))
        await bus.wait_settled(later, 20)
        async with bus.engine.connect() as connection:
            assert await connection.scalar(text("SELECT count(*) FROM whereupon_exception")) == 0
    assert heard == list(range(7))


async def test_what_is_given_up_by_its_handler_lets_its_key_go_on(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses
    heard: list[int] = []

    @bus.subscribe(PageTurned, name="reader", ordered_by="book")
    async def reader(event: PageTurned) -> None:
        if event.number == 1:
            raise Discard("nothing on it")
        heard.append(event.number)

    async with bus:
        events = await turn(bus, *(("torn", number) for number in range(4)))
        await bus.drain(20)
        assert await states(bus, events) == ["succeeded", "skipped", "succeeded", "succeeded"]
    assert heard == [0, 2, 3]


async def test_a_slow_head_holds_its_key_and_nothing_else(buses: tuple[EventBus, EventBus]) -> None:
    """After a second it becomes an exception, so the lane goes on; what follows it waits nevertheless."""
    bus, _ = buses
    heard: list[tuple[str, int]] = []
    go_on = asyncio.Event()

    @bus.subscribe(PageTurned, name="reader", ordered_by="book", lanes=1)
    async def reader(event: PageTurned) -> None:
        if (event.book, event.number) == ("slow", 0):
            await go_on.wait()
        heard.append((event.book, event.number))

    async with bus:
        events = await turn(bus, ("slow", 0), ("slow", 1), ("quick", 0))
        async with asyncio.timeout(10):
            while await states(bus, events) != ["running", "parked", "succeeded"]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        more = await turn(bus, ("slow", 2), ("quick", 1))
        await bus.wait_settled(more[1:], 10)
        assert heard == [("quick", 0), ("quick", 1)]
        go_on.set()
        await bus.wait_settled([*events, *more], 10)
    assert heard == [("quick", 0), ("quick", 1), ("slow", 0), ("slow", 1), ("slow", 2)]


async def test_subscriptions_may_order_the_same_events_by_different_fields(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses
    by_book: dict[str, list[int]] = defaultdict(list)
    by_number: dict[int, list[str]] = defaultdict(list)

    @bus.subscribe(PageTurned, ordered_by="book", lanes=3)
    async def books(event: PageTurned) -> None:
        await asyncio.sleep(random.uniform(0, 0.004))
        by_book[event.book].append(event.number)

    @bus.subscribe(PageTurned, ordered_by="number", lanes=2)
    async def numbers(event: PageTurned) -> None:
        await asyncio.sleep(random.uniform(0, 0.004))
        by_number[event.number].append(event.book)

    async with bus:
        events = await turn(bus, *((book, number) for number in range(10) for book in "abcd"))
        await bus.wait_settled(events, 20)
    assert by_book == {book: list(range(10)) for book in "abcd"}
    assert by_number == {number: list("abcd") for number in range(10)}


async def test_events_published_by_a_build_that_stored_no_keys_are_ordered_by_what_they_hold(
    buses: tuple[EventBus, EventBus],
) -> None:
    bus, old = buses  # the old build knows the event, and not that somebody orders it
    heard: dict[str, list[int]] = defaultdict(list)

    @bus.subscribe(PageTurned, name="reader", ordered_by="book")
    async def reader(event: PageTurned) -> None:
        await asyncio.sleep(random.uniform(0, 0.004))
        heard[event.book].append(event.number)

    async with bus:
        events = await turn(old, *((book, number) for number in range(10) for book in "abc"))
        await bus.wait_settled(events, 20)
    assert heard == {book: list(range(10)) for book in "abc"}


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_head_that_fails_just_as_it_is_found_to_run_long_stays_the_head(
    buses: tuple[EventBus, EventBus], monkeypatch: pytest.MonkeyPatch, transactional: bool
) -> None:
    """What waits behind it in memory is parked first; what became of the head is written in the same transaction."""
    bus, _ = buses
    heard: list[int] = []
    found_long = asyncio.Event()
    long_running = Lane.long_running

    def look(self: Lane, now: float, longest: float) -> list[Delivery]:
        found = long_running(self, now, longest)
        if found:
            found_long.set()
        return found

    monkeypatch.setattr("whereupon.worker.LONG", 0.1)
    monkeypatch.setattr(Lane, "long_running", look)

    async def read(event: PageTurned, context: EventContext) -> None:
        if event.number == 0 and context.attempt == 1:
            await found_long.wait()
            raise RuntimeError("torn")
        heard.append(event.number)

    async def reader(event: PageTurned, context: EventContext) -> None:
        await read(event, context)

    async def writer(event: PageTurned, context: EventContext, session: AsyncSession) -> None:
        await read(event, context)

    bus.subscribe(
        PageTurned, writer if transactional else reader, name="reader", ordered_by="book", lanes=1, retry=AT_ONCE
    )
    async with bus:
        events = await turn(bus, *(("a", number) for number in range(4)))
        await bus.wait_settled(events, 20)
    assert heard == [0, 1, 2, 3]


@pytest.mark.parametrize("transactional", [False, True])
async def test_what_comes_while_a_head_runs_long_goes_behind_what_was_parked_for_it(
    buses: tuple[EventBus, EventBus], monkeypatch: pytest.MonkeyPatch, transactional: bool
) -> None:
    """The head succeeds before it is committed that others are parked behind it, and the next one waits in memory."""
    bus, _ = buses
    heard: list[int] = []
    lanes: list[Lane] = []
    found_long, may_end, may_commit = asyncio.Event(), asyncio.Event(), asyncio.Event()
    commit = Lane.commit

    async def commit_late(self: Lane, batch: Sequence[Delivery], running: Sequence[Delivery] = ()) -> None:
        if running:
            lanes.append(self)
            found_long.set()
            await may_commit.wait()
        await commit(self, batch, running)

    monkeypatch.setattr("whereupon.worker.LONG", 0.1)
    monkeypatch.setattr(Lane, "commit", commit_late)

    async def read(event: PageTurned) -> None:
        if event.number == 0:
            await may_end.wait()
        heard.append(event.number)

    async def reader(event: PageTurned) -> None:
        await read(event)

    async def writer(event: PageTurned, session: AsyncSession) -> None:
        await read(event)

    bus.subscribe(PageTurned, writer if transactional else reader, name="reader", ordered_by="book", lanes=1)
    async with bus:
        events = await turn(bus, *(("a", number) for number in range(3)))
        await asyncio.wait_for(found_long.wait(), 10)
        events += await turn(bus, ("a", 3))
        await until(lambda: lanes[0].chains["a"])
        may_end.set()
        await until(lambda: heard)
        await asyncio.sleep(0.2)
        may_commit.set()
        await bus.wait_settled(events, 20)
    assert heard == [0, 1, 2, 3]


async def spoil(bus: EventBus, event: PageTurned, payload: bytes = b"{") -> None:
    async with bus.engine.begin() as connection:
        await connection.execute(update(log).where(log.c.event_id == event.event_id).values(payload=payload))


async def stored(bus: EventBus, event: PageTurned) -> bytes:
    async with bus.engine.connect() as connection:
        return bytes(await connection.scalar(select(log.c.payload).where(log.c.event_id == event.event_id)) or b"")


async def halted(bus: EventBus) -> str:
    """Wait until the ordered subscription is paused and nobody holds a lane of it; the reason."""
    while True:
        reader = next(one for one in await bus.operator.handlers() if one.name == "reader")
        if reader.paused and not reader.held:
            assert reader.paused_because
            return reader.paused_because
        await asyncio.sleep(0.02)


@pytest.mark.parametrize("repaired", [True, False])
async def test_nothing_passes_an_event_whose_key_cannot_be_told_before_somebody_says_so(
    buses: tuple[EventBus, EventBus], database_url: str, repaired: bool
) -> None:
    publisher = EventBus(database_url)  # of a build that knows the event, and not that somebody orders it
    heard: dict[str, list[int]] = defaultdict(list)
    beside = Counter[int]()
    for bus in buses:

        @bus.subscribe(PageTurned, name="reader", ordered_by="book", lanes=3)
        async def reader(event: PageTurned) -> None:
            await asyncio.sleep(random.uniform(0, 0.004))
            heard[event.book].append(event.number)

        @bus.subscribe(PageTurned, name="librarian")
        async def librarian(event: PageTurned) -> None:
            beside[event.number] += 1

        await bus.start(deliver=False)
        await bus.close()
    before = await turn(publisher, *((book, number) for number in range(10) for book in "abc"))
    [spoilt] = await turn(publisher, ("a", 10))
    whole = await stored(publisher, spoilt)
    await spoil(publisher, spoilt)
    after = await turn(publisher, *((book, number) for number in range(11, 20) for book in "abc"))
    try:
        async with buses[0], buses[1]:
            reason = await asyncio.wait_for(halted(buses[0]), 20)
            assert f"PageTurned {spoilt.event_id} at position 31" in reason
            assert "which book it is of" in reason
            assert all(numbers == list(range(len(numbers))) and len(numbers) <= 10 for numbers in heard.values())
            await until(lambda: sum(beside.values()) == len(before + after))  # who orders nothing waits for nothing
            if repaired:
                await spoil(publisher, spoilt, whole)
            await buses[0].operator.resume("reader", "looked at")
            await buses[0].wait_settled([*before, spoilt, *after], 20)
            found = {one.subscription: one.state for one in await buses[0].deliveries(spoilt.event_id)}
            assert found["reader"] == ("succeeded" if repaired else "dead")
        async with buses[1]:  # and a worker that was not there then goes on as well
            more = await turn(publisher, ("a", 20))
            await buses[1].wait_settled(more, 20)
    finally:
        await publisher.close()
        await publisher.engine.dispose()
    expected = {book: [number for number in range(20) if number != 10] for book in "bc"}
    expected["a"] = [number for number in range(21) if repaired or number != 10]
    assert heard == expected


async def test_where_one_lane_meets_such_an_event_alone_the_others_have_not_read_as_far(
    buses: tuple[EventBus, EventBus], monkeypatch: pytest.MonkeyPatch
) -> None:
    heard: list[int] = []
    bus, _ = buses

    @bus.subscribe(PageTurned, name="reader", ordered_by="book", lanes=3)
    async def reader(event: PageTurned) -> None:
        heard.append(event.number)

    async with bus:
        worker = bus._worker
        assert worker is not None
        share = worker.shares["reader"]
        await until(lambda: len(share.lanes) == 3 and all(lane.attached for lane in share.lanes.values()))
        look, may_read = worker.store.read, asyncio.Event()

        async def read_later(*arguments: Any, **options: Any) -> Page:
            await may_read.wait()
            return await look(*arguments, **options)

        monkeypatch.setattr(worker.store, "read", read_later)
        alone = share.lanes[0]
        alone.attached = False
        events = await turn(bus, *((f"book {number}", number) for number in range(20)))
        page = await look(alone.read_place, None, 500)
        spoilt = msgspec.structs.replace(page.rows[-1], payload=b"{", keys=None)
        worker._offer_mine(alone, [Logged(row, page.window) for row in (*page.rows[:-1], spoilt)])
        await asyncio.wait_for(halted(bus), 20)
        may_read.set()
        await bus.operator.resume("reader", "looked at")
        await bus.wait_settled(events, 20)
        await bus.drain(20)
    assert sorted(heard) == list(range(20))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"ordered_by": "title"}, "PageTurned has no such field: it has .*book, number"),
        ({"lanes": 0}, "lanes=0: it is into how many shares it is split, 1 to 1024"),
        ({"batch": 3}, "only deliveries in transactions can share one"),
        ({"rate": 0}, "rate=0: it is deliveries a second, more than 0"),
        ({"delivery": "after_commit", "ordered_by": "book"}, "where it can't wait"),
    ],
)
def test_what_can_not_be_shared_or_ordered_is_refused(sqlite_url: str, options: dict[str, object], reason: str) -> None:
    async def reader(event: PageTurned) -> None: ...

    with pytest.raises(SubscriptionError, match=reason):
        EventBus(sqlite_url).subscribe(PageTurned, reader, **options)  # type: ignore[call-overload]


async def test_a_handler_of_everything_can_not_be_ordered(sqlite_url: str) -> None:
    async def reader(event: DomainEvent) -> None: ...

    with pytest.raises(SubscriptionError, match="hears everything, and not every event has a field 'book'"):
        EventBus(sqlite_url).subscribe(DomainEvent, reader, ordered_by="book")


# --- sharing a transaction, and a rate --------------------------------------------------------------------------------


async def test_deliveries_of_a_batch_share_a_transaction(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses
    calls = Counter[int]()

    @bus.subscribe(PageTurned, name="reader", batch=20, lanes=1)
    async def reader(event: PageTurned, session: AsyncSession) -> None:
        assert not session.identity_map.keys()
        assert session.autoflush is True
        session.autoflush = False
        calls[event.number] += 1
        await session.execute(
            text("INSERT INTO page VALUES (:book, :number)"), {"book": event.book, "number": event.number}
        )

    await bus.start(deliver=False)
    events = await turn(bus, *(("a", number) for number in range(40)))
    await bus.close()
    commits = 0

    def count(*_: object) -> None:
        nonlocal commits
        commits += 1

    sqlalchemy_events.listen(bus.engine.sync_engine, "commit", count)
    with statements(bus.engine.sync_engine) as sent:
        async with bus:
            await bus.wait_settled(events, 20)
    assert calls == Counter(range(40))
    assert commits <= 5
    assert [one.sql for one in sent if "SAVEPOINT" in one.sql] == []


class _Sudden(BaseException):
    pass


class _Base(DeclarativeBase):
    pass


class _Written(_Base):
    __tablename__ = "page"

    serial: Mapped[int] = mapped_column(primary_key=True)
    book: Mapped[str]
    number: Mapped[int | None]


@pytest.mark.parametrize("bad", [7, 39], ids=["amid others", "the last"])
@pytest.mark.parametrize(
    "how",
    [
        "raises", "ends suddenly", "is cancelled", "is cancelled when it has returned", "times out amid a statement",
        "breaks a rule", "breaks a rule and says nothing", "breaks a rule in its session and says nothing",
        "breaks a rule at last", "breaks a rule at COMMIT",
    ],
)  # fmt: skip
async def test_a_bad_one_of_a_batch_costs_only_itself(buses: tuple[EventBus, EventBus], how: str, bad: int) -> None:
    bus, _ = buses
    on_postgres = bus.engine.dialect.name == "postgresql"
    if how == "breaks a rule and says nothing" and not on_postgres:
        pytest.skip("on SQLite the transaction goes on, so nothing is wrong")
    calls = Counter[int]()

    @bus.subscribe(PageTurned, name="reader", batch=20, lanes=1, timeout=5, retry=Retry(max_attempts=2, first=0))
    async def reader(event: PageTurned, session: AsyncSession) -> None:
        calls[event.number] += 1
        row = {"serial": event.number, "book": event.book, "number": event.number}
        insert = text("INSERT INTO page VALUES (:serial, :book, :number)")
        if event.number != bad:
            await session.execute(insert, row)
        elif how == "breaks a rule at last":
            session.add(_Written(serial=event.number, book=event.book, number=None))
        elif how == "breaks a rule in its session and says nothing":
            session.add(_Written(serial=event.number, book=event.book, number=None))
            with contextlib.suppress(IntegrityError):
                await session.flush()
        elif how == "breaks a rule at COMMIT":
            await session.execute(insert, row | {"number": 1_000})
        elif how == "breaks a rule and says nothing":
            with contextlib.suppress(IntegrityError):
                await session.execute(insert, row | {"number": None})
        elif how == "breaks a rule":
            await session.execute(insert, row | {"number": None})
        else:
            await session.execute(insert, row)
            await fail(session)

    async def fail(session: AsyncSession) -> None:
        task = asyncio.current_task()
        assert task is not None
        match how:
            case "raises":
                raise RuntimeError
            case "ends suddenly":
                raise _Sudden
            case "is cancelled":
                raise asyncio.CancelledError
            case "is cancelled when it has returned":
                task.cancel()
            case _:
                async with asyncio.timeout(0.2):
                    await session.execute(text("SELECT pg_sleep(30)" if on_postgres else ENDLESS))

    await bus.start(deliver=False)
    async with bus.engine.begin() as connection:
        await connection.execute(text("DROP TABLE page"))
        await connection.execute(text("CREATE TABLE leaf (number integer PRIMARY KEY)"))
        await connection.execute(
            text("INSERT INTO leaf VALUES (:number)"), [{"number": number} for number in range(40)]
        )
        await connection.execute(
            text(
                "CREATE TABLE page (serial integer PRIMARY KEY, book text, number integer NOT NULL "
                "REFERENCES leaf (number) DEFERRABLE INITIALLY DEFERRED)"
            )
        )
    events = await turn(bus, *(("a", number) for number in range(40)))
    await bus.close()
    async with bus:
        await bus.drain(60)
        found = await bus.deliveries(*(event.event_id for event in events))
        async with bus.engine.connect() as connection:
            written = list(await connection.scalars(text("SELECT number FROM page ORDER BY number")))
    number_of = {event.event_id: event.number for event in events}
    assert {number_of[one.event_id]: (one.state, one.attempts) for one in found} == {
        number: ("dead", 2) if number == bad else ("succeeded", 1) for number in range(40)
    }
    assert written == [number for number in range(40) if number != bad]
    assert max(number for page, number in calls.items() if page != bad) <= 3


async def test_savepoints_that_a_handler_leaves_open_keep_what_it_wrote(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses

    @bus.subscribe(PageTurned, name="reader", batch=20, lanes=1, retry=Retry(max_attempts=1))
    async def reader(event: PageTurned, session: AsyncSession) -> None:
        await session.begin_nested()
        await session.execute(text("INSERT INTO page VALUES ('a', :number)"), {"number": event.number})
        if event.number == 7:
            raise RuntimeError

    await bus.start(deliver=False)
    events = await turn(bus, *(("a", number) for number in range(20)))
    await bus.close()
    async with bus:
        await bus.drain(20)
        assert (await states(bus, events)).count("succeeded") == 19
        async with bus.engine.connect() as connection:
            written = list(await connection.scalars(text("SELECT number FROM page ORDER BY number")))
    assert written == [number for number in range(20) if number != 7]


async def test_a_hook_that_raises_after_the_commit_doubles_nothing(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses

    @bus.subscribe(PageTurned, name="reader", batch=20, lanes=1, retry=Retry(max_attempts=3, first=0))
    async def reader(event: PageTurned, session: AsyncSession) -> None:
        session.sync_session.info["hooked"] = True
        await session.execute(text("INSERT INTO page VALUES ('a', :number)"), {"number": event.number})

    def raises(session: Session) -> None:
        if session.info.get("hooked"):
            raise LookupError("too late")

    await bus.start(deliver=False)
    events = await turn(bus, *(("a", number) for number in range(20)))
    await bus.close()
    sqlalchemy_events.listen(Session, "after_commit", raises)
    try:
        async with bus:
            await bus.drain(20)
            found = await states(bus, events)
    finally:
        sqlalchemy_events.remove(Session, "after_commit", raises)
    async with bus.engine.connect() as connection:
        written = list(await connection.scalars(text("SELECT number FROM page ORDER BY number")))
    assert (found, written) == (["succeeded"] * 20, list(range(20)))


ENDLESS = "WITH RECURSIVE c (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM c WHERE x < 3000000) SELECT count(*) FROM c"


async def test_deliveries_of_a_batch_keep_their_sessions_and_causes_apart(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses
    kept: list[_Written] = []  # a session forgets by itself what nobody holds
    left: list[int] = []

    @bus.subscribe(PageTurned, name="reader", batch=20, lanes=1)
    async def reader(event: PageTurned, session: AsyncSession) -> None:
        left.append(len(list(session.identity_map.keys())))
        kept.append(_Written(serial=event.number, book=event.book, number=event.number))
        session.add(kept[-1])
        if event.number % 3 == 0:
            session.expunge_all() if event.number % 2 else session.expire_all()
            session.add(_Written(serial=100 + event.number, book=event.book, number=event.number))

    def closes(session: Session, *_: object) -> None:
        for one in session.new:
            bus.stage(BookClosed(title=str(one.serial)), session=session)

    await bus.start(deliver=False)
    async with bus.engine.begin() as connection:
        await connection.execute(text("DROP TABLE page"))
        await connection.execute(text("CREATE TABLE page (serial integer PRIMARY KEY, book text, number integer)"))
    events = await turn(bus, *(("a", number) for number in range(20)))
    await bus.close()
    sqlalchemy_events.listen(Session, "before_flush", closes)
    try:
        async with bus:
            await bus.wait_settled(events, 30)
            async with bus.engine.connect() as connection:
                told = (
                    await connection.execute(select(log.c.payload, log.c.headers).where(log.c.type == "BookClosed"))
                ).all()
    finally:
        sqlalchemy_events.remove(Session, "before_flush", closes)
    assert left == [0] * 20
    cause_of = {
        int(msgspec.json.decode(payload)["title"]): msgspec.json.decode(headers)["causation_id"]
        for payload, headers in told
    }
    # what was expunged before it was sent is not written, as in a session that is nobody else's
    expected = {number for number in range(20) if number % 6 != 3} | {100 + number for number in range(0, 20, 3)}
    assert cause_of == {serial: str(events[serial % 100].event_id) for serial in expected}


async def test_a_retry_shares_its_transaction_with_nobody(buses: tuple[EventBus, EventBus]) -> None:
    """Where it fails once more, what is fresh would be called again for that."""
    bus, _ = buses
    together: dict[int, list[int]] = {1: [], 2: []}

    class Watch(Observer):
        def started(self, run: Run) -> None:
            together[run.attempt].append(run.together)

    bus.observe(Watch())

    @bus.subscribe(PageTurned, name="reader", batch=10, concurrency=1, lanes=1, retry=Retry(first=0.001))
    async def reader(event: PageTurned, session: AsyncSession, context: EventContext) -> None:
        await session.execute(text("INSERT INTO page VALUES ('a', :number)"), {"number": event.number})
        if event.number % 10 == 0 and context.attempt == 1:
            raise RuntimeError

    await bus.start(deliver=False)
    events = await turn(bus, *(("a", number) for number in range(200)))
    await bus.close()
    async with bus:
        await bus.wait_settled(events, 30)
    assert together[2] == [1] * 20
    assert max(together[1]) > 1


@pytest.mark.parametrize("batch", [1, 20])
async def test_a_rate_bounds_how_many_begin(buses: tuple[EventBus, EventBus], batch: int) -> None:
    bus, _ = buses
    began: list[float] = []

    async def reader(event: PageTurned) -> None:
        began.append(asyncio.get_running_loop().time())

    async def writer(event: PageTurned, session: AsyncSession) -> None:
        await reader(event)

    bus.subscribe(PageTurned, reader if batch == 1 else writer, name="reader", rate=40, lanes=2, batch=batch)

    async with bus:
        await bus.drain(10)
        events = await turn(bus, *(("a", number) for number in range(100)))
        await bus.wait_settled(events, 30)
    # what had gathered while it was idle is one second's worth at most
    assert len(began) == 100
    assert began[-1] - began[0] > (100 - 40) / 40 * 0.9


async def test_a_rate_bounds_what_is_tried_again_too(buses: tuple[EventBus, EventBus]) -> None:
    bus, _ = buses
    began: list[float] = []
    failed: set[int] = set()

    @bus.subscribe(PageTurned, name="reader", rate=40, lanes=2, retry=Retry(max_attempts=2, first=0))
    async def reader(event: PageTurned) -> None:
        began.append(asyncio.get_running_loop().time())
        if event.number not in failed:
            failed.add(event.number)
            raise RuntimeError("the page sticks")

    async with bus:
        await bus.drain(10)
        events = await turn(bus, *((f"book {number}", number) for number in range(60)))
        await bus.wait_settled(events, 30)
    assert len(began) == 120
    assert began[-1] - began[0] > (120 - 40) / 40 * 0.9
