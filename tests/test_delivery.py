"""What a worker makes of the log: who is called, how often, and what is kept of it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections import Counter
from collections.abc import AsyncIterator
from datetime import datetime
from typing import Any

import asyncpg
import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.log_records import Records
from whereupon import Delivery, Discard, DomainEvent, EventBus, EventContext, Retry, RetryLater

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class MealOrdered(DomainEvent):
    number: int


class MealServed(DomainEvent):
    number: int


AT_ONCE = Retry(max_attempts=3, first=0)


@pytest.fixture
def records() -> Records:
    return Records()


@pytest.fixture
async def bus(database_url: str, records: Records) -> AsyncIterator[EventBus]:
    """Not entered: subscribe first. Its tables exist."""
    bus = EventBus(database_url, logger=records, create_tables=True, poll_interval=0.05, lease=2)
    yield bus
    await bus.engine.dispose()


async def place(bus: EventBus, *numbers: int) -> list[MealOrdered]:
    events = [MealOrdered(number=number) for number in numbers]
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)
    return events


async def rows(bus: EventBus, statement: str, **parameters: Any) -> list[Any]:
    async with bus.engine.connect() as connection:
        return list((await connection.execute(text(statement), parameters)).all())


async def state_of(bus: EventBus, event: DomainEvent, subscription: str) -> Any:
    [state] = [s for s in await bus.deliveries(event.event_id) if s.subscription == subscription]
    return state


async def until(true: Any, within: float = 10.0) -> None:
    """Wait for an async condition."""
    async with asyncio.timeout(within):
        while not await true():  # noqa: ASYNC110
            await asyncio.sleep(0.02)


async def test_each_event_reaches_each_subscription_once(bus: EventBus) -> None:
    heard: dict[str, list[int]] = {"first": [], "second": []}

    @bus.subscribe(MealOrdered, name="first", concurrency=100)
    async def first(event: MealOrdered) -> None:
        heard["first"].append(event.number)

    @bus.subscribe(MealOrdered, name="second", concurrency=100)
    async def second(event: MealOrdered) -> None:
        heard["second"].append(event.number)

    async with bus:
        await place(bus, *range(550))  # more than a page
        await bus.drain(60)
    # the lanes of a subscription keep no step with each other, and on a busy machine it shows
    for numbers in heard.values():
        assert sorted(numbers) == list(range(550))


# --- failures -------------------------------------------------------------------------------------------------------


async def test_a_failing_delivery_is_retried_and_recorded_before_each_retry_starts(bus: EventBus) -> None:
    recorded: list[tuple[int, str, int]] = []

    @bus.subscribe(MealOrdered, name="flaky", retry=AT_ONCE)
    async def flaky(event: MealOrdered, context: EventContext) -> None:
        for row in await rows(bus, "SELECT state, attempts FROM whereupon_exception"):
            recorded.append((context.attempt, row.state, row.attempts))
        if context.attempt < 3:
            raise RuntimeError("not yet")

    async with bus:
        [event] = await place(bus, 1)
        await bus.drain(10)
        state = await state_of(bus, event, "flaky")
        assert (state.state, state.attempts) == ("succeeded", 3)
        assert await rows(bus, "SELECT * FROM whereupon_exception") == []
    assert recorded == [(2, "running", 2), (3, "running", 3)]


async def test_a_delivery_that_used_up_its_attempts_is_a_dead_letter_with_its_error(
    bus: EventBus, records: Records
) -> None:
    @bus.subscribe(MealOrdered, name="broken", retry=AT_ONCE)
    async def broken(event: MealOrdered) -> None:
        raise LookupError(f"no order {event.number}")

    async with bus:
        [event] = await place(bus, 7)
        await bus.drain(10)
        [row] = await rows(bus, "SELECT * FROM whereupon_exception")
        state = await state_of(bus, event, "broken")
    assert (row.state, row.attempts, row.next_at, row.error_type) == ("dead", 3, None, "LookupError")
    assert row.error_message == "no order 7"
    assert "in broken" in row.traceback
    assert "raise LookupError" in row.traceback
    assert (state.state, state.attempts, state.error) == ("dead", 3, "LookupError: no order 7")
    failed = records.named("event_handler_failed")
    assert [record["attempt"] for record in failed] == [1, 2, 3]
    assert failed[0] | {"exc_info": None, "retry_in_seconds": 0} == {
        "event_type": "MealOrdered",
        "event_id": str(event.event_id),
        "handler_name": "broken",
        "error_type": "LookupError",
        "error_message": "no order 7",
        "subscription": "broken",
        "attempt": 1,
        "exc_info": None,
        "retry_in_seconds": 0,
    }
    assert len(records.named("event_delivery_dead")) == 1


async def test_a_retry_waits_between_nothing_and_the_ceiling_of_its_attempt(bus: EventBus) -> None:
    retry = Retry(max_attempts=9, first=1000, factor=3)

    @bus.subscribe(MealOrdered, name="broken", retry=retry, concurrency=50)
    async def broken(event: MealOrdered) -> None:
        raise RuntimeError

    async with bus:
        await place(bus, *range(40))
        await bus.drain(10)
        found = await rows(bus, "SELECT next_at FROM whereupon_exception WHERE state = 'retrying'")
        [(now,)] = await rows(bus, "SELECT max(updated_at) FROM whereupon_exception")
    waits = [(_time(row.next_at) - _time(now)) for row in found]
    assert len(waits) == 40
    assert min(waits) > -5
    assert max(waits) <= 1000
    assert max(waits) - min(waits) > 300  # spread, so that they don't all come back at once


def _time(value: Any) -> float:
    return (datetime.fromisoformat(value) if isinstance(value, str) else value).timestamp()


async def test_retry_later_says_when_and_counts_as_an_attempt(bus: EventBus) -> None:
    calls: list[tuple[int, float]] = []

    @bus.subscribe(MealOrdered, name="later", retry=Retry(max_attempts=2, first=1000))
    async def later(event: MealOrdered, context: EventContext) -> None:
        calls.append((context.attempt, time.monotonic()))
        raise RetryLater(0.3)

    async with bus:
        [event] = await place(bus, 1)
        await bus.wait_settled([event], 10)
        assert (await state_of(bus, event, "later")).state == "dead"
    assert [attempt for attempt, _ in calls] == [1, 2]
    assert calls[1][1] - calls[0][1] >= 0.29


async def test_a_discarded_delivery_is_skipped_with_its_reason_and_not_tried_again(bus: EventBus) -> None:
    calls = Counter[int]()

    @bus.subscribe(MealOrdered, name="picky", retry=AT_ONCE)
    async def picky(event: MealOrdered) -> None:
        calls[event.number] += 1
        raise Discard("an order of a test customer")

    async with bus:
        [event] = await place(bus, 1)
        await bus.drain(10)
        state = await state_of(bus, event, "picky")
    assert calls == {1: 1}
    assert (state.state, state.error) == ("skipped", "Discard: an order of a test customer")


async def test_a_failing_handler_neither_delays_nor_repeats_another(bus: EventBus) -> None:
    heard: list[int] = []

    @bus.subscribe(MealOrdered, name="broken", retry=Retry(max_attempts=5, first=30))
    async def broken(event: MealOrdered) -> None:
        raise RuntimeError

    @bus.subscribe(MealOrdered, name="fine")
    async def fine(event: MealOrdered) -> None:
        heard.append(event.number)

    async with bus:
        await place(bus, *range(20))
        await bus.drain(10)
    assert sorted(heard) == list(range(20))


async def test_with_more_to_do_than_can_be_done_each_handler_and_each_retry_has_its_turn(database_url: str) -> None:
    bus = EventBus(database_url, create_tables=True, in_flight=4, poll_interval=0.05)
    done: list[int] = []
    shaken: list[int] = []
    """How many the others had done whenever it was called for the first event."""

    async def busy(event: MealOrdered) -> None:
        await asyncio.sleep(0.002)
        done.append(event.number)

    async def shaky(event: MealOrdered) -> None:
        if event.number == 0:
            shaken.append(len(done))
            if len(shaken) == 1:
                raise RuntimeError
        await asyncio.sleep(0.002)

    for number in range(3):
        bus.subscribe(MealOrdered, busy, name=f"busy {number}")
    bus.subscribe(MealOrdered, shaky, name="shaky", retry=Retry(first=0.01, longest=0.01))
    async with bus:
        events = await place(bus, *range(100))
        await bus.wait_settled(events, 60)
    assert len(done) == 300
    assert len(shaken) == 2
    assert shaken[1] < 150, "its retry waited until the others had little left to do"


async def test_a_handler_that_runs_too_long_is_cancelled_and_has_failed(bus: EventBus) -> None:
    @bus.subscribe(MealOrdered, name="slow", timeout=0.05, retry=Retry(max_attempts=1))
    async def slow(event: MealOrdered) -> None:
        await asyncio.sleep(60)

    async with bus:
        [event] = await place(bus, 1)
        await bus.drain(10)
        state = await state_of(bus, event, "slow")
    assert state.state == "dead"
    assert state.error == "HandlerTimeout: it ran longer than its 0.05 s and was cancelled"


async def test_a_transactional_handler_that_runs_too_long_leaves_nothing(bus: EventBus) -> None:
    @bus.subscribe(MealOrdered, name="slow", timeout=0.2, retry=Retry(max_attempts=1))
    async def slow(event: MealOrdered, session: AsyncSession) -> None:
        await session.execute(text("INSERT INTO effect (number) VALUES (:number)"), {"number": event.number})
        await asyncio.sleep(60)

    async with effects(bus), bus:
        [event] = await place(bus, 1)
        await bus.drain(10)
        assert (await state_of(bus, event, "slow")).state == "dead"
        assert await rows(bus, "SELECT * FROM effect") == []


@contextlib.asynccontextmanager
async def effects(bus: EventBus) -> AsyncIterator[None]:
    """A table that handlers write into."""
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE effect (number INTEGER NOT NULL)"))
    yield


async def cancel_self() -> None:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    await asyncio.sleep(1)


async def raise_cancelled() -> None:
    raise asyncio.CancelledError


async def leave() -> None:
    raise SystemExit(3)


class Unprintable(Exception):
    def __str__(self) -> str:
        raise ValueError("no text")


async def raise_unprintable() -> None:
    raise Unprintable


async def raise_what_no_database_keeps() -> None:
    raise RuntimeError("nul \x00 and a lone surrogate \ud800")


@pytest.mark.parametrize(
    ("misbehave", "error_type"),
    [
        (cancel_self, "CancelledError"),
        (raise_cancelled, "CancelledError"),
        (leave, "SystemExit"),
        (raise_unprintable, "Unprintable"),
        (raise_what_no_database_keeps, "RuntimeError"),
    ],
)
@pytest.mark.parametrize("transactional", [False, True])
async def test_whatever_a_handler_raises_is_a_failure_and_the_worker_lives_on(
    bus: EventBus, misbehave: Any, error_type: str, transactional: bool
) -> None:
    heard: list[int] = []

    async def act(event: MealOrdered) -> None:
        if event.number == 1:
            await misbehave()
        heard.append(event.number)

    if transactional:

        @bus.subscribe(MealOrdered, name="odd", retry=Retry(max_attempts=1))
        async def with_session(event: MealOrdered, session: AsyncSession) -> None:
            await act(event)

    else:
        bus.subscribe(MealOrdered, act, name="odd", retry=Retry(max_attempts=1))
    async with bus:
        first, _ = await place(bus, 1, 2)
        await bus.drain(10)
        await place(bus, 3)
        await bus.drain(10)
        state = await state_of(bus, first, "odd")
        [(error,)] = await rows(bus, "SELECT error_type FROM whereupon_exception WHERE state = 'dead'")
    assert state.state == "dead"
    assert error == error_type
    assert sorted(heard) == [2, 3]


async def test_a_logger_that_raises_decides_nothing(database_url: str, caplog: pytest.LogCaptureFixture) -> None:
    class Broken(Records):
        def warning(self, event: str, /, **details: Any) -> None:
            raise OSError("the log's disk is full")

    bus = EventBus(database_url, logger=Broken(), create_tables=True)

    @bus.subscribe(MealOrdered, name="flaky", retry=AT_ONCE)
    async def flaky(event: MealOrdered, context: EventContext) -> None:
        if context.attempt == 1:
            raise RuntimeError

    async with bus:
        [event] = await place(bus, 1)
        await bus.drain(10)
        assert (await state_of(bus, event, "flaky")).state == "succeeded"
    assert "the logger given to the bus raised" in caplog.text


# --- slow handlers --------------------------------------------------------------------------------------------------


async def test_a_slow_delivery_becomes_an_exception_and_holds_nobody_up(bus: EventBus) -> None:
    go_on = asyncio.Event()
    heard: list[int] = []

    @bus.subscribe(MealOrdered, name="slow")
    async def slow(event: MealOrdered) -> None:
        if event.number == 1:
            await go_on.wait()
        heard.append(event.number)

    async with bus:
        first, *_ = await place(bus, 1, 2, 3)
        await until(lambda: _exists(bus, "SELECT 1 FROM whereupon_exception WHERE state = 'running' AND attempts = 1"))
        await place(bus, 4)
        await until(lambda: _true(4 in heard))
        assert (await state_of(bus, first, "slow")).state == "running"
        go_on.set()
        await bus.drain(10)
        state = await state_of(bus, first, "slow")
        assert await rows(bus, "SELECT * FROM whereupon_exception") == []
    assert heard == [2, 3, 4, 1]
    assert state.state == "succeeded"
    assert state.seconds is not None
    assert 1 < state.seconds < 20


async def _exists(bus: EventBus, statement: str) -> bool:
    return bool(await rows(bus, statement))


async def _true(value: bool) -> bool:
    return value


@pytest.mark.parametrize("succeeds", [True, False])
async def test_a_delivery_whose_record_takes_long_is_not_passed_over(bus: EventBus, succeeds: bool) -> None:
    """Its handler has ended, but nobody can note that: until then the cursor stays, and nothing is called again."""
    calls = Counter[int]()

    @bus.subscribe(MealOrdered, name="stuck", retry=Retry(max_attempts=4, first=1000))
    async def handler(event: MealOrdered) -> None:
        calls[event.number] += 1
        if not succeeds:
            raise RuntimeError

    async with bus:
        await bus.drain(10)
        await change(bus, "ALTER TABLE whereupon_history RENAME TO away")  # whatever is settled is noted there
        [event] = await place(bus, 1)
        await until(lambda: _true(calls[1] == 1))
        await asyncio.sleep(1.2)
        assert not await rows(bus, "SELECT 1 FROM whereupon_exception")
        await change(bus, "ALTER TABLE away RENAME TO whereupon_history")
        await bus.drain(20)
        state = await state_of(bus, event, "stuck")
    assert (state.state, state.attempts) == ("succeeded" if succeeds else "retrying", 1)
    assert calls == {1: 1}


async def change(bus: EventBus, statement: str) -> None:
    async with bus.engine.begin() as connection:
        await connection.execute(text(statement))


# --- what can't be read ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        ("payload = CAST('no JSON' AS {bytes})", "does not fit"),
        ("payload = CAST('{{}}' AS {bytes})", "does not fit"),
        ("headers = 'not json'", "the headers of MealOrdered at position"),
        ("headers = '[1]'", "the headers of MealOrdered at position"),
    ],
)
async def test_a_row_that_cannot_be_decoded_is_a_dead_letter_and_the_rest_flows(
    bus: EventBus, records: Records, damage: str, reason: str
) -> None:
    heard: list[int] = []

    @bus.subscribe(MealOrdered, name="reader")
    async def reader(event: MealOrdered) -> None:
        heard.append(event.number)

    events = await place(bus, 1, 2, 3)
    blob = "BLOB" if bus.engine.dialect.name == "sqlite" else "bytea"
    async with bus.engine.begin() as connection:
        await connection.execute(text(f"UPDATE whereupon_log SET {damage.format(bytes=blob)} WHERE position = 2"))
    async with bus:
        await bus.drain(10)
        state = await state_of(bus, events[1], "reader")
        [row] = await rows(bus, "SELECT * FROM whereupon_exception")
    assert sorted(heard) == [1, 3]
    assert (state.state, state.attempts) == ("dead", 1)
    assert row.error_type == "EventDecodingError"
    assert reason in row.error_message
    assert len(records.named("event_undecodable")) == 1


@pytest.mark.parametrize("damage", ["ran = '{\"a\": 1}'", "ran = '7'", "keys = '7'", "keys = 'not json'"])
async def test_a_row_whose_notes_for_the_delivery_are_damaged_is_delivered_and_stops_nobody(
    bus: EventBus, damage: str
) -> None:
    heard: dict[str, list[int]] = {"reader": [], "in order": []}

    @bus.subscribe(MealOrdered, name="reader")
    async def reader(event: MealOrdered) -> None:
        heard["reader"].append(event.number)

    @bus.subscribe(MealOrdered, name="in order", ordered_by="number")
    async def in_order(event: MealOrdered) -> None:
        heard["in order"].append(event.number)

    events = await place(bus, 1, 2, 3)
    async with bus.engine.begin() as connection:
        await connection.execute(
            text(f"UPDATE whereupon_log SET {damage.replace(':', chr(92) + ':')} WHERE position = 2")
        )
    async with bus:
        await bus.drain(10)
        assert {name: sorted(numbers) for name, numbers in heard.items()} == {
            "reader": [1, 2, 3],
            "in order": [1, 2, 3],
        }
        states = await bus.deliveries(*(event.event_id for event in events))
        assert {state.state for state in states} == {"succeeded"}


@pytest.mark.parametrize("change", ["type = 'MealTeleported'", "version = 99"])
async def test_an_event_of_a_newer_build_waits_without_using_an_attempt(
    bus: EventBus, records: Records, change: str
) -> None:
    heard: list[object] = []

    @bus.subscribe(DomainEvent, name="everything")
    async def everything(event: DomainEvent) -> None:
        heard.append(event)

    await place(bus, 1, 2, 3)
    async with bus.engine.begin() as connection:
        await connection.execute(text(f"UPDATE whereupon_log SET {change} WHERE position = 2"))
    async with bus:
        await bus.drain(10)
        [row] = await rows(bus, "SELECT * FROM whereupon_exception")
        assert (row.state, row.attempts, row.error_type) == ("waiting", 0, "UnknownEventError")
        async with bus.engine.begin() as connection:  # as if its minute were over
            await connection.execute(text("UPDATE whereupon_exception SET next_at = updated_at"))
    async with bus:
        await until(lambda: _exists(bus, "SELECT 1 FROM whereupon_exception WHERE state = 'waiting' AND attempts = 0"))
        await bus.drain(10)
    assert len(heard) == 2
    assert len(records.named("event_unknown")) == 1


async def test_a_waiting_event_is_delivered_by_the_build_that_knows_it(database_url: str) -> None:
    old = EventBus(database_url, create_tables=True, deliver=True)

    @old.subscribe(DomainEvent, name="everything")
    async def ignore(event: DomainEvent) -> None: ...

    await place(old, 5)
    stored_name = f"MealRelocatedOn{old.engine.dialect.name}"  # classes are known to the whole process
    async with old.engine.begin() as connection:
        await connection.execute(text("UPDATE whereupon_log SET type = :name"), {"name": stored_name})
    async with old:
        await old.drain(10)
    new = EventBus(database_url)
    heard: list[tuple[object, int]] = []

    class MealMoved(DomainEvent, name=stored_name):
        number: int

    @new.subscribe(DomainEvent, name="everything")
    async def everything(event: DomainEvent, context: EventContext) -> None:
        heard.append((event, context.attempt))

    async with new.engine.begin() as connection:
        await connection.execute(text("UPDATE whereupon_exception SET next_at = updated_at"))
    async with new:
        await until(lambda: _true(bool(heard)))
        await new.drain(10)
        assert await rows(new, "SELECT * FROM whereupon_exception") == []
    [(event, attempt)] = heard
    assert isinstance(event, MealMoved)
    assert (event.number, attempt) == (5, 1)


# --- in the publisher's transaction, then from the log --------------------------------------------------------------


async def test_what_failed_inside_the_transaction_is_delivered_again_soon_after_it(bus: EventBus) -> None:
    attempts: list[int] = []

    @bus.subscribe(MealOrdered, name="inside", delivery=Delivery.IN_TRANSACTION, retry=AT_ONCE)
    async def inside(event: MealOrdered, context: EventContext) -> None:
        attempts.append(context.attempt)
        if context.attempt == 1:
            raise RuntimeError

    async with bus:
        await bus.drain(10)
        [event] = await place(bus, 1)
        await until(lambda: _true(attempts == [1, 2]), within=3)
        await bus.drain(10)
        assert (await state_of(bus, event, "inside")).state == "succeeded"


async def test_a_retry_that_succeeded_ahead_of_the_cursor_is_not_delivered_again(bus: EventBus) -> None:
    """A failure inside the publisher's transaction lies beyond a page in hand; the page's end must not forget it."""
    calls = Counter[int]()
    go_on = asyncio.Event()

    @bus.subscribe(MealOrdered, name="inside", delivery=Delivery.IN_TRANSACTION, retry=AT_ONCE, concurrency=4)
    async def inside(event: MealOrdered, context: EventContext) -> None:
        calls[event.number] += 1
        if event.number == 2 and context.attempt == 1:
            raise RuntimeError
        if event.number == 1:
            await go_on.wait()

    other = EventBus(bus.engine)  # a script that never imported the handler: the log has to deliver to it
    async with bus, other:
        await bus.drain(10)
        await place(other, 1)
        await until(lambda: _true(calls[1] == 1))
        await place(bus, 2)
        await until(lambda: _true(calls[2] == 2), within=5)
        await until(lambda: _exists_no(bus, "SELECT 1 FROM whereupon_exception WHERE position = 2"))
        go_on.set()
        await bus.drain(10)
        await place(other, 3)
        await bus.drain(10)
    assert calls == {1: 1, 2: 2, 3: 1}


async def _exists_no(bus: EventBus, statement: str) -> bool:
    return not await rows(bus, statement)


# --- what is kept, and what idleness costs --------------------------------------------------------------------------


async def test_the_history_tells_of_every_call(bus: EventBus) -> None:
    @bus.subscribe(MealOrdered, name="flaky", retry=AT_ONCE)
    async def flaky(event: MealOrdered, context: EventContext) -> None:
        await asyncio.sleep(0.01)
        if context.attempt == 1 and event.number == 1:
            raise RuntimeError

    async with bus:
        await place(bus, 0, 1, 2)
        await bus.drain(10)
        found = await rows(bus, "SELECT subscription, worker, entries FROM whereupon_history ORDER BY id")
    calls = [entry for row in found for entry in json.loads(row.entries)]
    assert Counter((entry[0], entry[3], entry[4]) for entry in calls) == {
        (1, 1, "succeeded"): 1,
        (2, 1, "retrying"): 1,
        (2, 2, "succeeded"): 1,
        (3, 1, "succeeded"): 1,
    }
    assert all(9_000 < entry[2] < 5_000_000 for entry in calls)  # microseconds
    assert len({row.worker for row in found}) == 1


async def test_settled_waits_for_the_commit_and_then_for_every_handler(bus: EventBus) -> None:
    go_on = asyncio.Event()

    @bus.subscribe(MealOrdered, name="slow")
    async def slow(event: MealOrdered) -> None:
        await go_on.wait()

    @bus.subscribe(MealOrdered, name="quick")
    async def quick(event: MealOrdered) -> None: ...

    async with bus:
        async with AsyncSession(bus.engine) as session, session.begin():
            receipt = await bus.publish(MealOrdered(number=1), session=session)
        with pytest.raises(TimeoutError, match=r"not settled after 2 s: slow \((waiting|running)\)"):
            await receipt.settled(2)
        go_on.set()
        await receipt.settled(5)
        assert {s.state for s in await bus.deliveries(receipt.events[0].event_id)} == {"succeeded"}


async def test_drain_includes_retries_that_are_due_and_not_those_due_later(bus: EventBus) -> None:
    calls = Counter[str]()

    @bus.subscribe(MealOrdered, name="now", retry=Retry(max_attempts=6, first=0))
    async def now(event: MealOrdered) -> None:
        calls["now"] += 1
        raise RuntimeError

    @bus.subscribe(MealOrdered, name="later")
    async def later(event: MealOrdered) -> None:
        calls["later"] += 1
        raise RetryLater(300)

    async with bus:
        await place(bus, 1)
        await bus.drain(10)
        assert calls == {"now": 6, "later": 1}


@pytest.mark.parametrize("unforeseen", [False, True])
async def test_a_settlement_that_fails_whatever_the_error_is_made_again_and_takes_no_place_for_good(
    bus: EventBus, unforeseen: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What had ended was forgotten once, where the driver raised what it raises by mistake, when a server ended."""
    called = Counter[int]()

    @bus.subscribe(MealOrdered, name="cook")
    async def cook(event: MealOrdered) -> None:
        called[event.number] += 1

    async with bus:
        worker = bus._worker
        assert worker is not None
        settle, failed = worker.store.settle, [0]

        async def settle_or_fail(*arguments: Any) -> Any:
            failed[0] += 1
            if failed[0] <= 2:
                raise RuntimeError("not foreseen") if unforeseen else asyncpg.InternalClientError("cannot switch state")
            return await settle(*arguments)

        if unforeseen or bus.engine.driver == "asyncpg":
            monkeypatch.setattr(worker.store, "settle", settle_or_fail)
        events = await place(bus, *range(20))
        await bus.wait_settled(events, 30)
        await bus.drain(20)
        assert worker.free == worker.in_flight
        again = await place(bus, *range(20, 40))
        await bus.wait_settled(again, 30)
    assert set(called) == set(range(40))
    if not unforeseen:
        assert set(called.values()) == {1}


async def test_a_lane_that_is_lost_while_it_asks_for_retries_takes_no_place_for_good(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its place was never given back once, and a worker that waits until nothing runs waited for ever."""
    called = Counter[int]()

    @bus.subscribe(MealOrdered, name="cook", retry=AT_ONCE, lanes=1)
    async def cook(event: MealOrdered) -> None:
        called[event.number] += 1
        if called[event.number] == 1:
            raise RuntimeError("at first")

    async with bus:
        worker = bus._worker
        assert worker is not None
        look = worker.store.due
        lost: list[Any] = []

        async def look_and_lose(*arguments: Any) -> Any:
            found = await look(*arguments)
            if found and not lost:
                lost.append(found)
                [lane] = worker.lanes.values()
                worker.lose(lane)
            return found

        monkeypatch.setattr(worker.store, "due", look_and_lose)
        events = await place(bus, *range(5))
        await bus.wait_settled(events, 30)
        await bus.drain(20)
        assert lost
        assert worker.free == worker.in_flight
        assert worker.shares["cook"].free == 10
    assert set(called) == set(range(5))
