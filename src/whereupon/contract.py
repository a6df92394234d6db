"""What every store has to do, as tests: one suite, and each database passes it.

A store of your own passes it, too, once a sub-class gives it a database:

    from whereupon.testing import StoreContract

    class TestMyStore(StoreContract):
        @pytest.fixture
        async def store(self) -> AsyncIterator[Store]:
            store = MyStore(create_async_engine("…"))  # an empty database, of this test alone
            await store.prepare(create=True)
            yield store
            await store.close()

It needs pytest, and pytest-asyncio in its mode `auto`. Where write transactions overlap, take
`ConcurrentStoreContract`: it has the same tests, and those of what commits late.
"""

from __future__ import annotations

import asyncio
import dataclasses
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import event as sqlalchemy_events
from sqlalchemy import insert, select, text
from sqlalchemy.engine import Engine
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.errors import LeaseLost
from whereupon.event import DomainEvent
from whereupon.schema import exception, history, process
from whereupon.store import (
    DEAD,
    HISTORY_SPAN,
    PARKED,
    RETRYING,
    RUNNING,
    SKIPPED,
    WAITING,
    Cursor,
    DeliveryState,
    Entry,
    Failure,
    LaneState,
    Move,
    Record,
    Remembered,
    Row,
    Store,
    in_history,
)
from whereupon.subscription import Subscription, Subscriptions

READER = "reader"
"""The subscription that the tests register, with one lane unless they say otherwise."""


class ContractRecordKept(DomainEvent):
    """What the subscriptions of these tests hear; the log is written without it."""

    number: int


async def _nothing(event: ContractRecordKept) -> None: ...


def subscription(name: str = READER, *, lanes: int = 1, ordered_by: str | None = None) -> Subscription:
    return Subscriptions().add(ContractRecordKept, _nothing, name=name, lanes=lanes, ordered_by=ordered_by)


async def register(store: Store, *names: str, lanes: int = 1) -> None:
    await store.register([subscription(name, lanes=lanes) for name in names or (READER,)])


def records(*types: str, **changes: Any) -> list[Record]:
    return [Record(uuid4(), type_, 1, b"{}", "{}", None, None)._replace(**changes) for type_ in types]


async def append(store: Store, connection: AsyncConnection, *types: str, **changes: Any) -> list[UUID]:
    """Write events in the transaction of this connection; return their ids."""
    made = records(*types, **changes)
    await connection.run_sync(store.append, made, positions=False)
    return [record.event_id for record in made]


async def publish(store: Store, *types: str, **changes: Any) -> list[UUID]:
    """Write events in a transaction of their own."""
    async with store.writing() as connection:
        return await append(store, connection, *types, **changes)


async def worker(store: Store, lease: float = 3600.0) -> UUID:
    """A process with a lease of so many seconds, judged by the database's clock."""
    owner = uuid4()
    async with store.writing() as connection:
        await connection.execute(
            insert(process).values(
                id=owner,
                lease_until=store.later(lease),
                in_flight=10,
                host="contract",
                pid=1,
                started_at=store.later(0),
            )
        )
    return owner


async def lanes_of(store: Store, name: str = READER) -> list[LaneState]:
    return (await store.layout([name])).lanes


async def claim(store: Store, owner: UUID | None = None, name: str = READER) -> Cursor:
    """Take the only lane of a subscription, or the first of several."""
    lanes = await lanes_of(store, name)
    [cursor] = await store.claim(lanes[:1], await worker(store) if owner is None else owner)
    return cursor


async def expire(store: Store) -> None:
    """Have the leases of all processes run out."""
    async with store.writing() as connection:
        await connection.execute(process.update().values(lease_until=store.later(-1)))


async def take_over(store: Store, name: str = READER) -> Cursor:
    """Take a lane from whoever has it, as if that one's lease had run out."""
    await expire(store)
    return await claim(store, name=name)


async def read_all(
    store: Store, place: Any, limit: int = 10, types: Sequence[str] | None = None
) -> tuple[list[Row], Any]:
    """Page after page until nothing more is visible, without settling any; and the place after that."""
    rows: list[Row] = []
    while True:
        page = await store.read(place, types, limit)
        positions = [row.position for row in page.rows]
        assert len(positions) <= limit
        assert positions == sorted(positions), "a page is in the order of positions"
        rows += page.rows
        place = page.after
        if page.complete:
            return rows, place


async def ids(store: Store, place: Any, limit: int = 10, types: Sequence[str] | None = None) -> list[UUID]:
    rows, _ = await read_all(store, place, limit, types)
    return [row.event_id for row in rows]


async def settle(store: Store, cursor: Cursor, place: Any, add: Iterable[int] = (), drop: Iterable[int] = ()) -> bool:
    """Move a cursor; whether it was still held."""
    return cursor.key in await store.settle([Move(cursor, place, list(add), list(drop))], uuid4(), [])


async def keep(store: Store, cursor: Cursor, *failures: Failure) -> None:
    async with store.writing() as connection:
        await store.fence(connection, cursor)
        await store.keep_failures(connection, cursor, failures)


async def due(store: Store, cursor: Cursor, active: Collection[int] = (), limit: int = 10) -> list[Any]:
    async with store.writing() as connection:
        return list(await store.due(connection, cursor, active, limit))


async def exceptions(store: Store) -> list[Any]:
    async with store.reading() as connection:
        return list((await connection.execute(select(exception).order_by(exception.c.id))).all())


async def states(store: Store) -> list[str]:
    return [row.state for row in await exceptions(store)]


async def failing(store: Store, number: int = 1, **changes: Any) -> tuple[Cursor, list[Row]]:
    """A cursor that is held, and so many events to fail after it."""
    await register(store)
    await publish(store, *"A" * number, **changes)
    cursor = await claim(store)
    rows, _ = await read_all(store, cursor.place, 100)
    return cursor, rows


class StoreContract:
    """A sub-class gives the fixture `store`: a store on an empty database of that test alone, prepared."""

    # --- registering ------------------------------------------------------------------------------------------------

    async def test_a_subscription_hears_what_commits_from_its_registration_on(self, store: Store) -> None:
        await publish(store, "A")
        await register(store)
        later = await publish(store, "A", "B")
        assert await ids(store, (await claim(store)).place) == later

    async def test_registering_again_leaves_the_cursor_where_it_is(self, store: Store) -> None:
        assert await store.register([subscription(lanes=3)]) == {READER: 3}
        before = await publish(store, "A")
        assert await store.register([subscription(lanes=3)]) == {READER: 3}
        for lane in await lanes_of(store):
            [cursor] = await store.claim([lane], await worker(store))
            assert await ids(store, cursor.place) == before

    async def test_those_who_register_at_once_make_each_lane_once(self, store: Store) -> None:
        both = [subscription("one", lanes=2), subscription("two", lanes=3)]
        answers = await asyncio.gather(*(store.register(both) for _ in range(4)))
        assert answers == [{"one": 2, "two": 3}] * 4
        assert [lane.key.lane for lane in await lanes_of(store, "one")] == [0, 1]
        assert [lane.key.lane for lane in await lanes_of(store, "two")] == [0, 1, 2]

    async def test_a_new_subscription_is_registered_beside_an_old_one_from_its_own_now(self, store: Store) -> None:
        await register(store, "old")
        first = await publish(store, "A")
        await register(store, "old", "new")
        second = await publish(store, "A")
        assert await ids(store, (await claim(store, name="old")).place) == first + second
        assert await ids(store, (await claim(store, name="new")).place) == second

    async def test_preparing_twice_keeps_what_is_there_and_the_id_of_the_database(self, store: Store) -> None:
        await register(store)
        before = await store.database_id()
        events = await publish(store, "A")
        await store.prepare(create=True)
        assert await store.database_id() == before
        async with store.engine.connect() as connection:
            assert await store.database_id(connection) == before
        assert await ids(store, (await claim(store)).place) == events

    # --- appending --------------------------------------------------------------------------------------------------

    async def test_what_is_read_is_what_was_appended(self, store: Store) -> None:
        await register(store)
        record = Record(
            uuid4(), "Geändert", 3, bytes(range(256)), '{"trace_id": "é"}', '{"item": "a b"}', ["inside", "\u2713"]
        )
        async with store.writing() as connection:
            [position] = await connection.run_sync(store.append, [record], positions=True)
        [row], _ = await read_all(store, (await claim(store)).place)
        assert (row.position, row.event_id, row.type, row.version, row.payload) == (position, *record[:4])
        assert (row.headers, row.keys) == (record.headers, record.keys)
        assert row.ran is not None
        assert "inside" in row.ran
        assert abs(store.later(0) - row.recorded_at) < timedelta(minutes=1)
        assert row.recorded_at.utcoffset() == timedelta(0)

    async def test_events_of_a_transaction_keep_the_order_of_publishing(self, store: Store) -> None:
        await register(store)
        async with store.engine.begin() as connection:
            first = await append(store, connection, *"ABCA")
            made = records(*"BA" * 50)
            positions = await connection.run_sync(store.append, made, positions=True)
            last = await append(store, connection, "C")
        assert positions == sorted(positions)
        expected = [*first, *(record.event_id for record in made), *last]
        rows, _ = await read_all(store, (await claim(store)).place, 1000)
        assert [row.event_id for row in rows] == expected
        assert [row.position for row in rows][4:-1] == positions

    @pytest.mark.parametrize("number", [1, 20])
    async def test_appending_is_one_statement_whatever_the_number(self, store: Store, number: int) -> None:
        seen: list[str] = []

        def note(*args: Any) -> None:
            seen.append(args[2])

        async with store.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))
            sqlalchemy_events.listen(Engine, "before_cursor_execute", note)
            try:
                await append(store, connection, *"A" * number)
            finally:
                sqlalchemy_events.remove(Engine, "before_cursor_execute", note)
        assert len(seen) == 1

    async def test_what_is_rolled_back_is_never_read(self, store: Store) -> None:
        await register(store)
        first = await publish(store, "A")
        async with store.engine.connect() as connection:
            await append(store, connection, *"AAA")
            await connection.rollback()
        last = await publish(store, "A")
        assert await ids(store, (await claim(store)).place) == first + last

    async def test_of_a_transaction_with_savepoints_what_is_released_is_read(self, store: Store) -> None:
        await register(store)
        async with store.engine.begin() as connection:
            before = await append(store, connection, "A")
            async with connection.begin_nested():
                released = await append(store, connection, "B")
                inner = await connection.begin_nested()
                await append(store, connection, "C")
                await inner.rollback()
                released += await append(store, connection, "D")
            undone = await connection.begin_nested()
            await append(store, connection, "E")
            async with connection.begin_nested():
                await append(store, connection, "F")
            await undone.rollback()
            after = await append(store, connection, "G")
        assert await ids(store, (await claim(store)).place) == [*before, *released, *after]

    async def test_the_first_to_begin_may_be_the_last_to_commit(self, store: Store) -> None:
        await register(store)
        cursor = await claim(store)
        async with store.engine.connect() as first, store.engine.connect() as second:
            await first.begin()
            quick = await append(store, second, "A")
            await second.commit()
            rows, place = await read_all(store, cursor.place)
            assert [row.event_id for row in rows] == quick
            slow = await append(store, first, "A")
            await first.commit()
        assert await ids(store, place) == slow

    # --- reading ----------------------------------------------------------------------------------------------------

    async def test_what_is_not_committed_is_not_read(self, store: Store) -> None:
        await register(store)
        cursor = await claim(store)
        async with store.engine.connect() as connection:
            events = await append(store, connection, "A")
            page = await store.read(cursor.place, None, 10)
            assert page.rows == []
            assert page.complete
            await connection.commit()
        assert await ids(store, page.after) == events

    async def test_reading_changes_nothing(self, store: Store) -> None:
        await register(store)
        events = await publish(store, *"AAA")
        cursor = await claim(store)
        assert [await ids(store, cursor.place, limit) for limit in (1, 2, 10)] == [events] * 3
        assert await ids(store, (await take_over(store)).place) == events

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 7])
    async def test_a_window_is_paged_to_its_end(self, store: Store, number: int) -> None:
        await register(store)
        events = await publish(store, *"A" * number) if number else []
        rows, place = await read_all(store, (await claim(store)).place, 2)
        assert [row.event_id for row in rows] == events
        page = await store.read(place, None, 2)
        assert page.rows == []
        assert page.complete
        later = await publish(store, "A")
        assert await ids(store, place) == later

    async def test_a_window_of_many_pages_is_read_once_each(self, store: Store) -> None:
        await register(store)
        events = await publish(store, *"AB" * 600)
        rows, _ = await read_all(store, (await claim(store)).place, 100)
        assert [row.event_id for row in rows] == events

    @pytest.mark.parametrize("limit", [1, 2, 10])
    async def test_other_types_are_passed_over(self, store: Store, limit: int) -> None:
        await register(store)
        events = await publish(store, *"ABCABC")
        place = (await claim(store)).place
        assert await ids(store, place, limit, ["A", "C"]) == [events[0], events[2], events[3], events[5]]
        rows, after = await read_all(store, place, limit, ["Unheard"])
        assert rows == []
        assert await ids(store, after) == []

    @pytest.mark.parametrize("limit", [2, 3, 10])
    async def test_from_a_place_within_a_page_the_rest_is_read(self, store: Store, limit: int) -> None:
        await register(store)
        events = await publish(store, *"ABABA")
        page = await store.read((await claim(store)).place, None, limit)
        for number, row in enumerate(page.rows):
            place = store.within(page.window, row.position)
            assert await ids(store, place, 2) == events[number + 1 :]

    async def test_a_place_within_a_page_can_be_kept(self, store: Store) -> None:
        await register(store)
        events = await publish(store, *"AAAAA")
        cursor = await claim(store)
        page = await store.read(cursor.place, None, 3)
        assert await settle(store, cursor, store.within(page.window, page.rows[1].position))
        assert await ids(store, (await take_over(store)).place, 2) == events[2:]

    async def test_of_two_places_the_later_is_known(self, store: Store) -> None:
        await register(store)
        place = (await claim(store)).place
        places = [place]
        for _ in range(3):
            await publish(store, "A")
            _, place = await read_all(store, place)
            places.append(place)
        for number, one in enumerate(places):
            for other_number, other in enumerate(places):
                assert store.is_later(one, other) == (number > other_number)

    @pytest.mark.parametrize("limit", [1, 2, 10])
    async def test_reading_toward_a_place_ends_there(self, store: Store, limit: int) -> None:
        await register(store)
        start = (await claim(store)).place
        first = await publish(store, *"AAA")
        _, toward = await read_all(store, start)
        later = await publish(store, *"AA")
        place, found = start, []
        while place != toward:
            page = await store.read(place, None, limit, toward=toward)
            assert not page.complete, "of what lies beyond nothing is known"
            found += [row.event_id for row in page.rows]
            place = page.after
        assert found == first
        assert await ids(store, place) == later

    # --- settling ---------------------------------------------------------------------------------------------------

    async def test_the_next_owner_goes_on_where_the_last_one_settled(self, store: Store) -> None:
        await register(store)
        await publish(store, "A")
        cursor = await claim(store)
        _, place = await read_all(store, cursor.place)
        assert await settle(store, cursor, place)
        later = await publish(store, "A")
        assert await ids(store, (await take_over(store)).place) == later

    async def test_lanes_of_several_subscriptions_are_settled_at_once_and_those_still_held_are_told(
        self, store: Store
    ) -> None:
        await register(store, "one", "two", "three")
        events = await publish(store, "A")
        cursors = [await claim(store, name=name) for name in ("one", "two", "three")]
        page = await store.read(cursors[0].place, None, 10)
        stolen = await take_over(store, "two")
        moves = [Move(cursor, page.after, [], []) for cursor in cursors]
        assert await store.settle(moves, uuid4(), []) == {cursors[0].key, cursors[2].key}
        assert await ids(store, stolen.place) == events
        assert await ids(store, (await take_over(store, "two")).place) == events
        assert await ids(store, (await take_over(store, "one")).place) == []

    async def test_done_is_what_is_settled_beyond_the_place(self, store: Store) -> None:
        await register(store)
        await publish(store, *"AAAAA")
        cursor = await claim(store)
        page = await store.read(cursor.place, None, 10)
        first, second, third, *_ = [row.position for row in page.rows]
        assert await settle(store, cursor, cursor.place, add=[second, third])
        assert await settle(store, cursor, cursor.place, add=[third])  # again is once
        cursor = await take_over(store)
        assert cursor.done == {second, third}
        async with store.writing() as connection:
            place = store.within(page.window, second)
            await store.move(connection, Move(cursor, place, [first], [second]), uuid4())
            assert await store.done_now(connection, cursor) == {first, third}
        cursor = await take_over(store)
        assert cursor.done == {first, third}
        assert await settle(store, cursor, page.after, drop=[first, third])
        assert (await take_over(store)).done == set()

    async def test_a_move_is_undone_with_the_transaction_that_it_is_in(self, store: Store) -> None:
        await register(store)
        events = await publish(store, "A")
        cursor = await claim(store)
        page = await store.read(cursor.place, None, 10)
        position = page.rows[0].position
        kept = Remembered(READER, 0, [Entry(position, 0, 1, 1, "succeeded")])
        async with store.engine.connect() as connection:
            await store.take_turn(connection, cursor)
            await store.move(connection, Move(cursor, page.after, [position], []), uuid4(), [kept])
            await connection.rollback()
        async with store.reading() as reading:
            assert (await reading.execute(select(history))).all() == []
        cursor = await take_over(store)
        assert cursor.done == set()
        assert await ids(store, cursor.place) == events

    async def test_a_stale_token_moves_nothing_and_raises(self, store: Store) -> None:
        cursor, rows = await failing(store)
        page = await store.read(cursor.place, None, 10)
        current = await take_over(store)
        assert current.token > cursor.token
        move = Move(cursor, page.after, [rows[0].position], [])
        assert await store.settle([move], uuid4(), []) == set()
        assert await store.settle([move._replace(add=[])], uuid4(), []) == set()
        for attempt in (
            lambda connection: store.fence(connection, cursor),
            lambda connection: store.move(connection, move, uuid4()),
            lambda connection: store.due(connection, cursor, [], 10),
        ):
            async with store.engine.connect() as connection:
                with pytest.raises(LeaseLost, match=f"lane 0 of {READER}"):
                    await attempt(connection)
        found = await take_over(store)
        assert (found.place, found.done) == (current.place, set())

    async def test_a_second_run_of_the_same_delivery_by_the_same_owner_is_told_from_the_first(
        self, store: Store
    ) -> None:
        """The row has the same state, attempt and owner in both: only the token tells which run may settle it."""
        owner = await worker(store)
        await register(store)
        await publish(store, "A")
        first = await claim(store, owner)
        [row], after = await read_all(store, first.place)
        await keep(store, first, Failure(row, RUNNING, 1, None))
        second = await claim(store, owner)  # it stalled, was given up, and took the lane again
        [again] = await due(store, second)
        assert (again.row.position, again.attempt) == (row.position, 1)
        async with store.engine.connect() as connection:
            with pytest.raises(LeaseLost):
                await store.fence(connection, first)
            await connection.rollback()
            with pytest.raises(LeaseLost):
                await store.move(connection, Move(first, after, [], []), owner)
        assert await states(store) == [RUNNING]
        assert not await settle(store, first, after)
        assert await settle(store, second, after)

    async def test_what_was_done_is_kept_in_the_history_with_the_move(self, store: Store) -> None:
        await register(store, "one", "two")
        events = await publish(store, "A", "A")
        one, two = await claim(store, name="one"), await claim(store, name="two")
        page = await store.read(one.place, None, 10)
        first, second = [row.position for row in page.rows]
        began = int(datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC).timestamp() * 1e6)
        calls = [Entry(first, began, 1500, 1, "succeeded"), Entry(second, began, 2500, 2, "dead")]
        owner = await worker(store)
        await store.settle([Move(one, page.after, [], [])], owner, [Remembered("one", 0, calls)])
        async with store.writing() as connection:
            await store.move(connection, Move(two, page.after, [], []), owner, [Remembered("two", 0, calls[:1])])
        async with store.reading() as connection:
            kept = (await connection.execute(select(history).order_by(history.c.id))).all()
        assert [(row.subscription, row.worker, row.first_position, row.last_position) for row in kept] == [
            ("one", owner, first, second),
            ("two", owner, first, first),
        ]
        told = {
            (state.event_id, state.subscription): state
            for state in await store.deliveries(events, {"A": ["one", "two"]})
        }
        assert told[events[0], "one"] == DeliveryState(
            events[0], "A", "one", "succeeded", 1, datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC), 0.0015, None
        )
        assert told[events[1], "one"].attempts == 2
        assert told[events[1], "two"].started_at is None

    async def test_calls_for_events_that_lie_far_apart_are_found_though_no_look_goes_far(self, store: Store) -> None:
        await register(store, "one")
        cursor, owner = await claim(store, name="one"), await worker(store)
        far = 7 * HISTORY_SPAN
        positions = [1, far, far + 1, HISTORY_SPAN - 1, far + HISTORY_SPAN]
        calls = [Entry(position, 0, 1500, 1, "succeeded") for position in positions]
        async with store.writing() as connection:
            await store.move(connection, Move(cursor, cursor.place, [], []), owner, [Remembered("one", 0, calls)])
        async with store.reading() as connection:
            for position in positions:
                found = await connection.execute(select(history).where(*in_history(position, position)))
                assert sum(f"[{position}," in row.entries for row in found) == 1
            kept = (await connection.execute(select(history))).all()
        assert max(row.last_position - row.first_position for row in kept) < HISTORY_SPAN
        assert sum(row.entries.count('"succeeded"') for row in kept) == len(positions)

    # --- exceptions -------------------------------------------------------------------------------------------------

    async def test_an_exception_holds_a_copy_of_its_event(self, store: Store) -> None:
        changes: dict[str, Any] = {"payload": b"\x00\xff", "headers": '{"a": 1}', "keys": '{"item": "x"}', "version": 7}
        cursor, [row] = await failing(store, **changes)
        failure = Failure(row, DEAD, 3, None, "ValueError", "no\x00 \ud800 way", "Traceback …", "x", True)
        await keep(store, cursor, failure)
        [kept] = await exceptions(store)
        assert (kept.event_id, kept.type, kept.version, kept.payload, kept.headers, kept.keys, kept.recorded_at) == (
            row.event_id, row.type, 7, b"\x00\xff", '{"a": 1}', '{"item": "x"}', row.recorded_at
        )  # fmt: skip
        assert (kept.subscription, kept.generation, kept.lane, kept.position) == (*cursor.key, row.position)
        assert (kept.state, kept.attempts, kept.next_at, kept.key, kept.alone) == (DEAD, 3, None, "x", True)
        assert (kept.error_type, kept.traceback) == ("ValueError", "Traceback …")
        assert kept.error_message.startswith("no\ufffd ")

    async def test_keeping_a_failure_twice_is_keeping_it_once_and_later_is_changing_it(self, store: Store) -> None:
        cursor, [row, other] = await failing(store, 2)
        first = Failure(row, RUNNING, 1, None)
        await keep(store, cursor, first, first, Failure(other, RUNNING, 1, None))
        assert await states(store) == [RUNNING, RUNNING]
        before = [kept.id for kept in await exceptions(store)]
        await keep(store, cursor, Failure(row, RETRYING, 1, 60.0, "ValueError", "no"))
        changed, unchanged = await exceptions(store)
        assert [changed.id, unchanged.id] == before, "its place in the queue of its key is its first one"
        assert (changed.state, changed.error_message, unchanged.state) == (RETRYING, "no", RUNNING)
        assert 50 < (changed.next_at - store.later(0)).total_seconds() <= 60

    async def test_failures_are_kept_in_the_publishers_transaction_as_well(self, store: Store) -> None:
        cursor, [row] = await failing(store)
        for commits in (False, True):
            async with store.engine.connect() as connection:
                await connection.run_sync(store.append_failures, [(cursor.key, Failure(row, RETRYING, 1, -1.0))])
                await (connection.commit() if commits else connection.rollback())
            assert len(await exceptions(store)) == commits
        assert [one.row.event_id for one in await due(store, cursor)] == [row.event_id]

    async def test_forgetting_tells_how_many_there_were_and_takes_no_other_lanes(self, store: Store) -> None:
        await register(store, "one", "two")
        await publish(store, *"AAA")
        one, two = await claim(store, name="one"), await claim(store, name="two")
        rows, _ = await read_all(store, one.place)
        positions = [row.position for row in rows]
        for cursor in (one, two):
            await keep(store, cursor, *(Failure(row, RUNNING, 1, None) for row in rows[:2]))
        async with store.writing() as connection:
            assert await store.kept(connection, one, positions) == set(positions[:2])
            assert await store.forget(connection, one, []) == 0
            assert await store.forget(connection, one, positions[1:]) == 1
            assert await store.kept(connection, one, positions) == {positions[0]}
            assert await store.kept(connection, two, positions) == set(positions[:2])

    async def test_what_is_due_is_recorded_as_begun_before_it_begins(self, store: Store) -> None:
        cursor, rows = await failing(store, 5)
        waits = {RETRYING: -1.0, WAITING: -2.0}
        await keep(
            store,
            cursor,
            *(Failure(row, state, 2, wait) for row, (state, wait) in zip(rows, waits.items(), strict=False)),
            Failure(rows[2], RETRYING, 2, 3600.0),
            Failure(rows[3], DEAD, 2, None),
            Failure(rows[4], SKIPPED, 2, None),
        )
        first = await due(store, cursor, limit=1)
        second = await due(store, cursor, [one.row.position for one in first])
        found = first + second
        assert {one.row.position for one in found} == {rows[0].position, rows[1].position}
        assert {(one.attempt, one.interrupted, one.alone) for one in found} == {(3, False, False)}
        assert first[0].row.position == rows[1].position, "the longest due comes first"
        assert [(row.state, row.attempts) for row in await exceptions(store)] == [
            (RUNNING, 3), (RUNNING, 3), (RETRYING, 2), (DEAD, 2), (SKIPPED, 2),
        ]  # fmt: skip
        assert await due(store, cursor, [one.row.position for one in found]) == []

    async def test_an_attempt_that_was_begun_and_never_ended_is_told_and_not_recorded_again(self, store: Store) -> None:
        cursor, [row, other] = await failing(store, 2)
        await keep(store, cursor, Failure(row, RUNNING, 1, None), Failure(other, RUNNING, 4, None, alone=True))
        found = {one.row.position: one for one in await due(store, await take_over(store))}
        assert found[row.position][1:4] == (1, True, False), "one of several may be innocent"
        assert found[other.position][1:4] == (5, True, True)
        assert [kept.attempts for kept in await exceptions(store)] == [1, 4]

    async def test_the_time_until_the_next_is_due_is_told(self, store: Store) -> None:
        cursor, rows = await failing(store, 3)
        assert await store.next_due([cursor]) is None
        await keep(store, cursor, Failure(rows[0], DEAD, 1, None), Failure(rows[1], RUNNING, 1, None))
        assert await store.next_due([cursor]) is None
        await keep(store, cursor, Failure(rows[0], RETRYING, 1, 500.0), Failure(rows[1], WAITING, 1, 100.0))
        wait = await store.next_due([cursor])
        assert wait is not None
        assert 50 < wait <= 100
        await keep(store, cursor, Failure(rows[2], RETRYING, 1, -5.0))
        assert await store.next_due([cursor]) == 0
        other = dataclasses.replace(cursor, key=cursor.key._replace(lane=7))
        assert await store.next_due([other]) is None

    @pytest.mark.parametrize("limit", [2, 10])
    async def test_the_next_owner_knows_which_exceptions_lie_beyond_the_cursor(self, store: Store, limit: int) -> None:
        cursor, rows = await failing(store, 5)
        page = await store.read(cursor.place, None, limit)
        await keep(store, cursor, *(Failure(rows[number], RETRYING, 1, 60.0) for number in (0, 1, 4)))
        assert (await take_over(store)).exceptions == {rows[0].position, rows[1].position, rows[4].position}
        cursor = await take_over(store)
        await settle(store, cursor, store.within(page.window, page.rows[0].position))
        assert (await take_over(store)).exceptions == {rows[1].position, rows[4].position}
        cursor = await take_over(store)
        _, place = await read_all(store, cursor.place)
        await settle(store, cursor, place)
        assert (await take_over(store)).exceptions == set()
        assert len(await exceptions(store)) == 3

    @pytest.mark.parametrize("state", [RETRYING, WAITING, RUNNING])
    async def test_the_next_owner_is_told_of_exceptions_that_an_earlier_one_left(
        self, store: Store, state: str
    ) -> None:
        cursor, [row] = await failing(store)
        page = await store.read(cursor.place, None, 10)
        await keep(store, cursor, Failure(row, state, 1, None if state == RUNNING else 60.0))
        assert (await take_over(store)).left
        cursor = await take_over(store)
        await settle(store, cursor, page.after)
        assert (await take_over(store)).left, "though the cursor is past it"
        cursor = await take_over(store)
        async with store.writing() as connection:
            await store.forget(connection, cursor, [row.position])
        assert not (await take_over(store)).left, "nobody needs to look"

    async def test_of_each_key_the_first_that_was_parked_follows_once_nothing_before_it_is_open(
        self, store: Store
    ) -> None:
        cursor, rows = await failing(store, 6)
        a1, a2, a3, b1, b2, c1 = rows
        await keep(
            store,
            cursor,
            Failure(a2, RETRYING, 1, 60.0, key="a"),  # the head is the first that came here, not the lowest position
            Failure(a1, PARKED, 0, None, key="a"),
            Failure(a3, PARKED, 0, None, key="a"),
            Failure(b1, DEAD, 9, None, key="b"),
            Failure(b2, PARKED, 0, None, key="b"),
            Failure(c1, SKIPPED, 1, None, key="c"),
        )
        assert (await take_over(store)).blocked == {"a": 3, "b": 2}
        cursor = await take_over(store)
        async with store.writing() as connection:
            await store.fence(connection, cursor)
            found = [await store.follow(connection, cursor, key) for key in "abc"]
            assert found == [(3, False, None), (2, False, None), (0, False, None)]
            await store.forget(connection, cursor, [a2.position, b1.position])
            assert await store.unpark(connection, cursor, "abc") == 2
            found = [await store.follow(connection, cursor, key) for key in "abc"]
            assert found == [(2, False, None), (1, False, None), (0, False, None)], "who was released is open itself"
        assert {one.row.position for one in await due(store, cursor)} == {a1.position, b2.position}
        assert {(one.position, one.state) for one in await exceptions(store)} >= {(a3.position, PARKED)}

    async def test_who_follows_may_be_begun_at_once_and_is_taken_for_interrupted_if_that_ends_there(
        self, store: Store
    ) -> None:
        cursor, [row, other] = await failing(store, 2)
        await keep(store, cursor, Failure(row, PARKED, 0, None, key="a"), Failure(other, PARKED, 2, None, key="a"))
        async with store.writing() as connection:
            await store.fence(connection, cursor)
            following = await store.follow(connection, cursor, "a", begin=True)
        assert (following.blocking, following.released) == (2, True)
        assert following.begun is not None
        assert (following.begun.row.event_id, following.begun.row.payload) == (row.event_id, row.payload)
        assert (following.begun.attempt, following.begun.interrupted, following.begun.key) == (1, False, "a")
        async with store.writing() as connection:
            await store.fence(connection, cursor)
            assert await store.due(connection, cursor, [row.position], 10) == []
            [again] = await store.due(connection, cursor, [], 10)
        assert (again.row.event_id, again.attempt, again.interrupted, again.alone) == (row.event_id, 1, True, False)

    # --- lanes ------------------------------------------------------------------------------------------------------

    async def test_a_lane_goes_to_one_of_those_who_ask_at_once(self, store: Store) -> None:
        await register(store, lanes=4)
        lanes = await lanes_of(store)
        owners = [await worker(store) for _ in range(4)]
        claims = await asyncio.gather(*(store.claim(lanes, owner) for owner in owners))
        assert Counter(cursor.key for cursors in claims for cursor in cursors) == Counter(lane.key for lane in lanes)
        for owner, cursors in zip(owners, claims, strict=True):
            held = {lane.key: lane.token for lane in await lanes_of(store) if lane.owner == owner}
            assert held == {cursor.key: cursor.token for cursor in cursors}

    async def test_a_lane_is_claimed_only_as_it_was_seen(self, store: Store) -> None:
        await register(store)
        seen = await lanes_of(store)
        owner = await worker(store)
        await claim(store, owner)
        await store.release(owner)
        assert await store.claim(seen, owner) == []
        assert len(await store.claim(await lanes_of(store), owner)) == 1

    async def test_a_lane_is_its_owners_until_the_lease_has_run_out(self, store: Store) -> None:
        await register(store)
        owner, other = await worker(store), await worker(store)
        before = await claim(store, owner)
        [lane] = await lanes_of(store)
        assert (lane.owner, lane.token, lane.alive, lane.in_flight) == (owner, before.token, True, 10)
        assert await store.claim([lane], other) == []
        async with store.writing() as connection:
            await connection.execute(
                process.update().where(process.c.id == owner).values(lease_until=store.later(-0.01))
            )
        [lane] = await lanes_of(store)
        assert (lane.owner, lane.alive, lane.in_flight) == (owner, False, 10)
        [taken] = await store.claim([lane], other)
        assert taken.token > before.token

    async def test_a_lane_of_a_process_that_is_gone_is_free(self, store: Store) -> None:
        await register(store)
        await claim(store, uuid4())
        [lane] = await lanes_of(store)
        assert (lane.alive, lane.in_flight) == (False, None)
        assert len(await store.claim([lane], await worker(store))) == 1

    async def test_the_deaths_of_a_lanes_owners_are_counted_until_one_lives_on(self, store: Store) -> None:
        await register(store)
        owner = await worker(store)
        counts = [(await claim(store, owner)).crashes]
        for _ in range(2):
            await expire(store)
            owner = await worker(store)
            counts.append((await claim(store, owner)).crashes)
        await store.release(owner)
        given = await claim(store, await worker(store))
        counts.append(given.crashes)  # what may end a worker goes with the lane, though nobody has died since
        await store.calm(given)
        await expire(store)
        counts.append((await claim(store, await worker(store))).crashes)
        assert counts == [0, 1, 2, 2, 1]

    async def test_who_died_with_one_delivery_running_alone_leaves_no_other_to_suspect(self, store: Store) -> None:
        await register(store)
        await claim(store, await worker(store))
        await expire(store)
        owner = await worker(store)
        assert (await claim(store, owner)).crashes == 1
        for alone, crashes in ((True, 0), (False, 1)):
            async with store.writing() as connection:
                await store.mark_alone(connection, owner, alone)
            await expire(store)
            [lane] = await lanes_of(store)
            assert lane.alone is alone
            owner = await worker(store)
            assert (await claim(store, owner)).crashes == crashes

    async def test_giving_back_takes_nothing_from_others(self, store: Store) -> None:
        await register(store, lanes=3)
        mine, theirs = await worker(store), await worker(store)
        lanes = await lanes_of(store)
        [first, second] = await store.claim(lanes[:2], mine)
        await store.claim(lanes[2:], theirs)
        await store.release(mine, [first.key, lanes[2].key])
        assert [lane.owner for lane in await lanes_of(store)] == [None, mine, theirs]
        await store.release(mine)
        assert [lane.owner for lane in await lanes_of(store)] == [None, None, theirs]
        assert not await settle(store, dataclasses.replace(second, token=second.token - 1), second.place)

    async def test_workers_see_each_other_with_what_they_serve(self, store: Store) -> None:
        await register(store)
        one, two = await worker(store), await worker(store)
        gone = await worker(store, lease=-1)
        await store.serve(one, ["b", "a"])
        assert dict((await store.layout([READER])).workers) == {one: ["a", "b"], two: []}
        assert gone not in dict((await store.layout([READER])).workers)

    # --- the pulse --------------------------------------------------------------------------------------------------

    async def test_a_pulse_tells_whether_the_log_has_grown(self, store: Store) -> None:
        await register(store)
        owner = await worker(store)
        await claim(store, owner)
        assert (await store.pulse(owner, [READER])).grown, "of what was before the first nothing is known"
        assert not (await store.pulse(owner, [READER])).grown
        await publish(store, "A")
        assert (await store.pulse(owner, [READER])).grown
        assert not (await store.pulse(owner, [READER])).grown
        async with store.engine.connect() as connection:
            await append(store, connection, "A")
            assert not (await store.pulse(owner, [READER])).grown
            await connection.rollback()
        assert not (await store.pulse(owner, [READER])).grown

    async def test_a_pulse_names_the_lanes_with_something_due(self, store: Store) -> None:
        cursor, [row, later] = await failing(store, 2)
        owner = await worker(store)
        await keep(store, cursor, Failure(later, RETRYING, 1, 3600.0))
        assert (await store.pulse(owner, [READER])).due == []
        await keep(store, cursor, Failure(row, RETRYING, 1, -1.0))
        assert (await store.pulse(owner, [READER])).due == [cursor.key]
        assert (await store.pulse(owner, [READER])).due == [cursor.key], "until somebody takes it"
        await due(store, cursor)
        assert (await store.pulse(owner, [READER])).due == []

    async def test_a_pulse_tells_that_lanes_or_workers_changed(self, store: Store) -> None:
        await register(store)
        owner = await worker(store)
        assert (await store.pulse(owner, [READER])).restless
        await claim(store, owner)
        await store.pulse(owner, [READER])
        assert not (await store.pulse(owner, [READER])).restless
        await worker(store)
        assert (await store.pulse(owner, [READER])).restless
        assert not (await store.pulse(owner, [READER])).restless
        await store.release(owner)
        assert (await store.pulse(owner, [READER])).restless

    # --- what became of events --------------------------------------------------------------------------------------

    async def test_of_each_delivery_it_is_known_what_became_of_it(self, store: Store) -> None:
        await register(store, "one", "two")
        events = await publish(store, *"AAAAB")
        cursor = await claim(store, name="one")
        page = await store.read(cursor.place, None, 10)
        rows = page.rows
        assert {state.state for state in await self._told(store, events, "one")} == {"waiting"}
        await keep(
            store, cursor, Failure(rows[1], DEAD, 3, None, "ValueError", "no"), Failure(rows[3], RETRYING, 1, 9.0)
        )
        await settle(store, cursor, store.within(page.window, rows[0].position), add=[rows[2].position])
        told = await self._told(store, events, "one")
        assert [(state.state, state.attempts, state.error) for state in told] == [
            ("succeeded", 1, None),
            ("dead", 3, "ValueError: no"),
            ("succeeded", 1, None),
            ("retrying", 1, None),
        ]
        assert {state.state for state in await self._told(store, events, "two")} == {"waiting"}
        assert await store.deliveries([uuid4()], {"A": ["one"]}) == []
        assert await store.deliveries(events[4:], {"A": ["one"]}) == []

    async def test_what_ran_in_the_publishers_transaction_has_succeeded(self, store: Store) -> None:
        await register(store, "one", "two")
        events = await publish(store, "A", ran=["one"])
        assert [state.state for state in await self._told(store, events, "one")] == ["succeeded"]
        assert [state.state for state in await self._told(store, events, "two")] == ["waiting"]

    async def test_what_is_older_than_a_subscription_was_never_owed_to_it(self, store: Store) -> None:
        events = await publish(store, "A")
        await register(store)
        assert await store.deliveries(events, {"A": [READER]}) == []

    async def _told(self, store: Store, events: Sequence[UUID], name: str) -> list[DeliveryState]:
        found = {state.event_id: state for state in await store.deliveries(events, {"A": [name]})}
        return [found[event_id] for event_id in events if event_id in found]


class ConcurrentStoreContract(StoreContract):
    """For a database where write transactions overlap: positions are taken in one order, and commit in another."""

    async def test_a_late_commit_is_not_skipped_and_an_open_transaction_stalls_nobody(self, store: Store) -> None:
        await register(store)
        place = (await claim(store)).place
        async with store.engine.connect() as slow, store.engine.connect() as quick:
            late = await append(store, slow, "A")  # takes its position, and commits last
            early = await append(store, quick, "A")
            await quick.commit()
            rows, place = await read_all(store, place)
            assert [row.event_id for row in rows] == early
            assert await ids(store, place) == []
            await slow.commit()
            rows, place = await read_all(store, place)
            assert [row.event_id for row in rows] == late
        assert await ids(store, place) == []

    async def test_many_transactions_that_commit_in_any_order_are_each_read_once(self, store: Store) -> None:
        await register(store)
        place = (await claim(store)).place
        found: list[UUID] = []
        async with AsyncExitStack() as stack:
            writers = [await stack.enter_async_context(store.engine.connect()) for _ in range(4)]
            written = [await append(store, writer, "A", "B") for writer in writers]
            for number in (2, 0, 3, 1):
                written[number] += await append(store, writers[number], "A")
                await writers[number].commit()
                rows, place = await read_all(store, place, 2)
                assert [row.event_id for row in rows] == written[number]
                found += written[number]
        assert await ids(store, place) == []
        assert len(found) == len(set(found)) == 12

    async def test_what_commits_after_a_registration_is_delivered_though_it_was_written_before(
        self, store: Store
    ) -> None:
        async with store.engine.connect() as connection:
            events = await append(store, connection, "A")
            await register(store)
            await connection.commit()
        assert await ids(store, (await claim(store)).place) == events

    async def test_a_commit_in_the_middle_of_a_paged_window_waits_for_the_next_one(self, store: Store) -> None:
        await register(store)
        place = (await claim(store)).place
        async with store.engine.connect() as slow, store.engine.connect() as quick:
            late = await append(store, slow, "A")  # the lowest position of all
            early = await append(store, quick, *"AAAAA")
            await quick.commit()
            page = await store.read(place, None, 2)
            assert [row.event_id for row in page.rows] == early[:2]
            assert not page.complete
            await slow.commit()
        assert await ids(store, page.after, 2) == [*early[2:], *late]

    @pytest.mark.parametrize("limit", [1, 2, 3])
    async def test_a_large_window_begins_with_what_committed_late_at_a_lower_position(
        self, store: Store, limit: int
    ) -> None:
        await register(store)
        place = (await claim(store)).place
        async with store.engine.connect() as slow, store.engine.connect() as quick:
            late = await append(store, slow, "A", "A")
            first = await append(store, quick, "A")
            await quick.commit()
            _, place = await read_all(store, place)  # the cursor is past higher positions already
            more = await append(store, quick, *"AAAA")
            await quick.commit()
            await slow.commit()
        assert first
        assert await ids(store, place, limit) == [*late, *more]

    async def test_from_a_place_within_a_page_a_late_commit_is_read_though_it_is_lower(self, store: Store) -> None:
        await register(store)
        cursor = await claim(store)
        async with store.engine.connect() as slow:
            late = await append(store, slow, "A")
            early = await publish(store, *"AAA")
            page = await store.read(cursor.place, None, 10)
            place = store.within(page.window, page.rows[1].position)
            await settle(store, cursor, place)
            await slow.commit()
        assert await ids(store, (await take_over(store)).place) == [early[2], *late]

    @pytest.mark.parametrize("limit", [1, 2, 3, 10])
    async def test_a_window_is_in_the_order_of_positions_and_not_of_transactions(
        self, store: Store, limit: int
    ) -> None:
        """A transaction that began early but publishes late, after a lock that it waited for, comes later."""
        await register(store)
        place = (await claim(store)).place
        async with store.engine.connect() as first_begun, store.engine.connect() as second_begun:
            await first_begun.execute(text("CREATE TEMPORARY TABLE begun (n INTEGER)"))
            earlier = await append(store, second_begun, "A", "B")
            await second_begun.commit()
            later = await append(store, first_begun, "A", "B")
            await first_begun.commit()
        assert await ids(store, place, limit) == [*earlier, *later]

    async def test_savepoints_write_under_their_transaction(self, store: Store) -> None:
        """A savepoint may have an id of its own; the log must hold that of the transaction."""
        await register(store)
        place = (await claim(store)).place
        async with store.engine.connect() as connection:
            await connection.begin()
            async with connection.begin_nested():
                events = await append(store, connection, "A")  # the first write of all, inside
            _, place = await read_all(store, place)  # a window that ends while it is open
            async with connection.begin_nested(), connection.begin_nested():
                events += await append(store, connection, "A")
            await connection.commit()
        assert await ids(store, place) == events

    async def test_a_pulse_tells_of_a_late_commit(self, store: Store) -> None:
        await register(store)
        owner = await worker(store)
        await claim(store, owner)
        async with store.engine.connect() as slow:
            await append(store, slow, "A")
            await store.pulse(owner, [READER])
            await publish(store, "A")
            assert (await store.pulse(owner, [READER])).grown
            assert not (await store.pulse(owner, [READER])).grown
            await slow.commit()
            assert (await store.pulse(owner, [READER])).grown
        assert not (await store.pulse(owner, [READER])).grown

    async def test_who_asks_for_a_lane_in_the_midst_of_a_settlement_is_not_kept_waiting(self, store: Store) -> None:
        await register(store)
        cursor = await claim(store)
        async with store.writing() as connection:
            await store.fence(connection, cursor)
            await connection.execute(process.update().values(lease_until=store.later(-1)))
            async with asyncio.timeout(5):
                assert await store.claim(await lanes_of(store), await worker(store)) == []
        assert (await take_over(store)).token == cursor.token + 1

    async def test_a_takeover_that_commits_first_fences_off_a_settlement_that_waits(self, store: Store) -> None:
        cursor, [row] = await failing(store)
        page = await store.read(cursor.place, None, 10)
        other = await worker(store)
        async with store.engine.connect() as thief:
            await thief.execute(  # a claim that is not committed yet
                text("UPDATE whereupon_cursor SET token = token + 1, owner = :owner"), {"owner": other}
            )
            settling = asyncio.create_task(settle(store, cursor, page.after, add=[row.position]))
            moving = asyncio.create_task(self._move(store, cursor, page.after))
            await asyncio.sleep(0.1)
            assert not settling.done()
            await thief.commit()
        assert not await settling
        with pytest.raises(LeaseLost):
            await moving
        assert (await take_over(store)).done == set()

    async def _move(self, store: Store, cursor: Cursor, place: Any) -> None:
        async with store.writing() as connection:
            await store.move(connection, Move(cursor, place, [], []), uuid4())
