"""What operators do to subscriptions and deliveries, from another process than the one that owns the lanes."""

from __future__ import annotations

import asyncio
import random
from collections import Counter, defaultdict
from collections.abc import AsyncIterator, Callable
from itertools import islice
from typing import Any

import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncSession

from tests.notebook import until
from whereupon import ActionRefused, DomainEvent, EventBus, EventContext, Retry, schema

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ONCE = Retry(max_attempts=1)
POLL = 0.05


class ParcelPosted(DomainEvent):
    road: str
    number: int
    torn: bool = False


class Depot:
    """Buses on one database, each as a process of its own would have it; what their handlers saw is kept together."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.seen: dict[str, list[int]] = defaultdict(list)
        """The numbers that were handled, by road, in order."""
        self.calls = Counter[int]()
        self.contexts: list[EventContext] = []
        self.running = 0
        self.most = 0
        self.buses: list[EventBus] = []
        self.may_end = asyncio.Event()
        self.may_end.set()
        self.torn: Callable[[ParcelPosted], bool] = lambda event: event.torn
        self.declared: dict[str, Any] | None = None
        """How the first bus declares the subscription; the others are of the same build."""

    def bus(self, *, work: float = 0, transactional: bool = False, **options: Any) -> EventBus:
        if self.declared is None:
            self.declared = {"transactional": transactional, "ordered_by": options.get("ordered_by")}
        transactional = self.declared["transactional"]
        options["ordered_by"] = self.declared["ordered_by"]
        bus = EventBus(self.url, create_tables=True, poll_interval=POLL, lease=2)
        self.buses.append(bus)

        async def handle(event: ParcelPosted, context: EventContext) -> None:
            self.calls[event.number] += 1
            self.contexts.append(context)
            self.running += 1
            self.most = max(self.most, self.running)
            try:
                if work:
                    await asyncio.sleep(work)
                await self.may_end.wait()
                if self.torn(event):
                    raise ValueError(f"parcel {event.number} is torn")
                self.seen[event.road].append(event.number)
            finally:
                self.running -= 1

        async def handle_in_transaction(event: ParcelPosted, context: EventContext, session: AsyncSession) -> None:
            await session.execute(text("SELECT 1"))
            await handle(event, context)

        chosen = handle_in_transaction if transactional else handle
        bus.subscribe(ParcelPosted, chosen, name="parcels", **{"retry": ONCE, **options})
        return bus

    async def at_rest(self) -> int:
        """Wait until nothing has been begun for ten polls; how many calls there were."""
        begun = -1
        async with asyncio.timeout(30):
            while begun != (begun := self.calls.total()):  # noqa: ASYNC110
                await asyncio.sleep(POLL * 10)
        return begun

    async def send(self, bus: EventBus, *parcels: tuple[str, int] | tuple[str, int, bool]) -> list[ParcelPosted]:
        events = [ParcelPosted(road=road, number=number, torn=torn == [True]) for road, number, *torn in parcels]
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(*events, session=session)
        return events


@pytest.fixture
async def depot(database_url: str) -> AsyncIterator[Depot]:
    depot = Depot(database_url)
    yield depot
    for bus in depot.buses:
        await bus.engine.dispose()


async def states(bus: EventBus, events: list[ParcelPosted]) -> list[str]:
    found = {state.event_id: state.state for state in await bus.deliveries(*(event.event_id for event in events))}
    return [found[event.event_id] for event in events]


async def reaches(bus: EventBus, events: list[ParcelPosted], expected: list[str], within: float = 15) -> None:
    """Wait until the deliveries of these are in these states."""
    found: list[str] = []
    try:
        async with asyncio.timeout(within):
            while (found := await states(bus, events)) != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.03)
    except TimeoutError:
        raise AssertionError(f"{found} never became {expected}") from None


async def rows(bus: EventBus, statement: str) -> list[Any]:
    async with bus.engine.connect() as connection:
        return [tuple(row) for row in await connection.execute(text(statement))]


# --- pausing ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ordered", [False, True])
async def test_a_paused_subscription_begins_nothing_and_lets_end_what_runs(depot: Depot, ordered: bool) -> None:
    owner, desk = depot.bus(work=0.02, concurrency=3, ordered_by="road" if ordered else None), depot.bus()
    async with owner:
        events = await depot.send(owner, *(("long", number) for number in range(120)))
        await until(lambda: sum(depot.calls.values()) > 5)
        assert await desk.operator.pause("parcels", "the road is closed", author="ada")
        await asyncio.sleep(POLL * 4)
        begun = depot.calls.copy()
        await asyncio.sleep(POLL * 4)
        assert depot.calls == begun
        assert 5 < begun.total() < 120
        assert depot.running == 0
        assert sorted(depot.seen["long"]) == sorted(begun)  # what ran has ended, and is settled
        assert (await states(desk, events)).count("succeeded") == begun.total()
        [parcels] = await desk.operator.handlers()
        assert (parcels.paused, parcels.held) == (True, 0)
        assert await desk.operator.resume("parcels", "it is open again", author="ada")
        await owner.wait_settled(events, 20)
    assert depot.calls == Counter(range(120))
    if ordered:
        assert depot.seen["long"] == list(range(120))


async def test_pausing_reaches_every_worker_and_nothing_is_lost(depot: Depot) -> None:
    one, other, desk = depot.bus(work=0.01), depot.bus(work=0.01), depot.bus()
    async with one, other:
        await until(lambda: all(bus._worker is not None and bus._worker.lanes for bus in (one, other)))
        events = await depot.send(desk, *(("long", number) for number in range(200)))
        await until(lambda: sum(depot.calls.values()) > 20)
        for round_ in range(3):
            await desk.operator.pause("parcels", f"round {round_}")
            begun = await depot.at_rest()
            events += await depot.send(desk, ("long", 1000 + round_))
            await asyncio.sleep(POLL * 3)
            assert depot.calls.total() == begun
            await desk.operator.resume("parcels", f"round {round_} is over")
            await asyncio.sleep(0.05)
        await desk.wait_settled(events, 30)
    assert depot.calls == Counter([*range(200), *range(1000, 1003)])


async def test_a_paused_subscription_stays_paused_for_workers_that_start(depot: Depot) -> None:
    desk = depot.bus()
    await desk.start(deliver=False)
    await desk.operator.pause("parcels", "not yet")
    events = await depot.send(desk, ("long", 1))
    async with depot.bus():
        await asyncio.sleep(POLL * 5)
        assert await states(desk, events) == ["waiting"]
        await desk.operator.resume("parcels", "now")
        await desk.wait_settled(events, 10)
    await desk.close()


async def test_pausing_what_is_paused_changes_and_records_nothing(depot: Depot) -> None:
    desk = depot.bus()
    await desk.start(deliver=False)
    assert not await desk.operator.resume("parcels", "to be sure")
    assert await desk.operator.pause("parcels", "first")
    assert not await desk.operator.pause("parcels", "second")
    [action] = await desk.operator.actions("parcels")
    assert (action.action, action.reason, action.subscription) == ("pause", "first", "parcels")
    assert action.author
    await desk.close()


@pytest.mark.parametrize("reason", ["", "  \n"])
async def test_an_action_without_a_reason_is_refused(depot: Depot, reason: str) -> None:
    desk = depot.bus()
    await desk.start(deliver=False)
    with pytest.raises(ActionRefused, match="say why"):
        await desk.operator.pause("parcels", reason)
    with pytest.raises(ActionRefused, match=r"there is no subscription 'parcel' in .*: there is parcels"):
        await desk.operator.pause("parcel", "a slip")
    assert await desk.operator.actions() == []
    await desk.close()


# --- dead letters -----------------------------------------------------------------------------------------------------


async def with_a_dead_head(depot: Depot, owner: EventBus) -> list[ParcelPosted]:
    events = await depot.send(
        owner, ("long", 0), ("long", 1, True), ("long", 2), ("short", 0), ("long", 3), ("short", 1)
    )
    await reaches(owner, events, ["succeeded", "dead", "parked", "succeeded", "parked", "succeeded"])
    return events


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_retried_head_runs_with_all_its_attempts_and_its_key_follows_in_order(
    depot: Depot, transactional: bool
) -> None:
    owner = depot.bus(ordered_by="road", retry=Retry(max_attempts=2, first=0), transactional=transactional)
    desk = depot.bus()
    async with owner:
        events = await with_a_dead_head(depot, owner)
        [letter] = await desk.operator.dead("parcels")
        assert (letter.event_id, letter.attempts, letter.error_type) == (events[1].event_id, 2, "ValueError")
        failures = iter([True, False])
        depot.torn = lambda event: event.torn and next(failures)
        assert await desk.operator.retry("parcels", events[1].event_id, reason="glued", author="ada") == 1
        await reaches(owner, events, ["succeeded"] * 6)
        later = await depot.send(owner, ("long", 4))
        await owner.wait_settled(later, 10)
        assert await rows(owner, "SELECT count(*) FROM whereupon_exception") == [(0,)]
    assert depot.seen == {"long": [0, 1, 2, 3, 4], "short": [0, 1]}
    assert [context.attempt for context in depot.contexts if context.event_id == events[1].event_id] == [1, 2, 1, 2]
    [action] = await desk.operator.actions()
    assert (action.action, action.author, action.reason) == ("retry", "ada", "glued")
    assert (action.event_id, action.subscription, action.generation) == (events[1].event_id, "parcels", 0)
    assert action.details == {"state": "dead", "attempts": 2, "error": "ValueError: parcel 1 is torn"}


@pytest.mark.parametrize("transactional", [False, True])
async def test_a_skipped_head_lets_its_key_go_on_in_order(depot: Depot, transactional: bool) -> None:
    owner, desk = depot.bus(ordered_by="road", transactional=transactional), depot.bus()
    async with owner:
        events = await with_a_dead_head(depot, owner)
        await desk.operator.skip("parcels", events[1].event_id, reason="it is gone", author="ada")
        await reaches(owner, events, ["succeeded", "skipped", *["succeeded"] * 4])
        later = await depot.send(owner, ("long", 4))
        await owner.wait_settled(later, 10)
        [state] = await owner.deliveries(events[1].event_id)
    assert state.error == "Skipped: it is gone (by ada)"
    assert depot.seen == {"long": [0, 2, 3, 4], "short": [0, 1]}


async def test_a_key_that_an_operator_has_freed_is_not_blocked_in_the_owners_memory(depot: Depot) -> None:
    """Nothing was parked behind the dead one, so nothing tells its owner that the key is free."""
    owner, desk = depot.bus(ordered_by="road"), depot.bus()
    async with owner:
        events = await depot.send(owner, ("long", 1, True))
        await reaches(owner, events, ["dead"])
        await desk.operator.skip("parcels", events[0].event_id, reason="it is gone")
        later = await depot.send(owner, ("long", 2), ("long", 3))
        await owner.wait_settled(later, 10)
        more = await depot.send(owner, ("long", 4), ("long", 5))
        await owner.wait_settled(more, 10)
    assert depot.seen["long"] == [2, 3, 4, 5]


@pytest.mark.parametrize("given", ["event", "fields", "bytes"])
async def test_an_edited_head_is_delivered_as_edited_and_its_key_follows(depot: Depot, given: str) -> None:
    owner, desk = depot.bus(ordered_by="road"), depot.bus()
    async with owner:
        events = await with_a_dead_head(depot, owner)
        bad = events[1]
        mended = ParcelPosted(event_id=bad.event_id, occurred_at=bad.occurred_at, road="long", number=11)
        replacement: Any = {
            "event": mended,
            "fields": {"road": "long", "number": 11},
            "bytes": desk._codec.encode(mended),
        }[given]
        await desk.operator.edit("parcels", bad.event_id, replacement, reason="wrong label", author="ada")
        await reaches(owner, events, ["succeeded"] * 6)
        logged = await rows(owner, "SELECT payload FROM whereupon_log ORDER BY position LIMIT 2")
    assert depot.seen["long"] == [0, 11, 2, 3]
    assert b'"number":1,' in bytes(logged[1][0])  # what was published stays what it was
    [action] = await desk.operator.actions()
    assert action.action == "edit"
    assert '"number":1,' in action.details["payload"]
    assert (action.details["attempts"], action.details["version"]) == (1, 1)


@pytest.mark.parametrize(
    ("replacement", "reason"),
    [
        ({"road": "long"}, "could not be delivered either: .*missing required field `number`"),
        ({"road": "long", "number": "eleven"}, "could not be delivered either: .*Expected `int`, got `str`"),
        ({"road": "long", "number": 11, "weight": 2}, "ParcelPosted has no field weight: it has .*number"),
        ({"road": "short", "number": 11}, "ordered by road, and this delivery has its place behind others of 'long'"),
        (b"{", "could not be delivered either"),
        (ParcelPosted(road="long", number=11), "an edited event keeps its id.*Make it with event_id=UUID"),
        ({"road": "long", "number": 1, "event_id": str(ParcelPosted(road="", number=0).event_id)}, "keeps its id"),
    ],
)
async def test_what_would_not_be_delivered_is_no_replacement(depot: Depot, replacement: Any, reason: str) -> None:
    owner, desk = depot.bus(ordered_by="road"), depot.bus()
    async with owner:
        events = await with_a_dead_head(depot, owner)
        before = await desk.operator.delivery("parcels", events[1].event_id)
        with pytest.raises(ActionRefused, match=f"(?s){reason}"):
            await desk.operator.edit("parcels", events[1].event_id, replacement, reason="wrong label")
        assert await desk.operator.delivery("parcels", events[1].event_id) == before
        assert await desk.operator.actions() == []


async def test_what_can_not_be_decoded_can_be_edited_and_delivered(depot: Depot) -> None:
    owner, desk = depot.bus(), depot.bus()
    await owner.start(deliver=False)
    events = await depot.send(owner, ("long", 1))
    await owner.close()
    async with owner.engine.begin() as connection:
        await connection.execute(update(schema.log).values(payload=b"\xff\x00", headers="no JSON"))
    async with owner:
        await reaches(owner, events, ["dead"])
        letter = await desk.operator.delivery("parcels", events[0].event_id)
        assert letter.error_type == "EventDecodingError"
        assert letter.payload == b"\xff\x00"
        await desk.operator.edit("parcels", letter.event_id, {"road": "long", "number": 5}, reason="damaged")
        await owner.wait_settled(events, 10)
        assert await states(owner, events) == ["succeeded"]
    assert depot.seen["long"] == [5]
    [action] = await desk.operator.actions()
    assert action.details["payload_base64"] == "/wA="
    assert action.details["headers"] == "no JSON"


async def test_only_what_no_handler_has_in_hand_can_be_settled_by_hand(depot: Depot) -> None:
    owner, desk = depot.bus(ordered_by="road"), depot.bus()
    depot.may_end.clear()
    async with owner:
        events = await depot.send(owner, ("long", 1), ("long", 2))
        await reaches(owner, events, ["running", "parked"])
        with pytest.raises(ActionRefused, match="is running, and skip is for one that is dead or"):
            await desk.operator.skip("parcels", events[0].event_id, reason="too slow")
        with pytest.raises(ActionRefused, match="is parked, and retry is for one that is dead or retrying"):
            await desk.operator.retry("parcels", events[1].event_id, reason="now")
        await desk.operator.skip("parcels", events[1].event_id, reason="not needed")
        depot.may_end.set()
        await owner.wait_settled(events, 10)
        assert await states(owner, events) == ["succeeded", "skipped"]
        with pytest.raises(ActionRefused, match="has no exception of parcels"):
            await desk.operator.retry("parcels", events[0].event_id, reason="once more")
        with pytest.raises(ActionRefused, match="is skipped, and retry is for"):
            await desk.operator.retry("parcels", events[1].event_id, reason="after all")


async def test_many_are_retried_or_skipped_by_subscription_and_error_within_a_limit(depot: Depot) -> None:
    owner, desk = depot.bus(lanes=3), depot.bus()

    def torn(event: ParcelPosted) -> bool:
        if event.number % 3 == 0:
            raise KeyError(event.number)
        return True

    depot.torn = torn
    async with owner:
        events = await depot.send(owner, *((f"road {number}", number) for number in range(12)))
        await reaches(owner, events, ["dead"] * 12)
        first = await desk.operator.dead(limit=5)
        rest = await desk.operator.dead(after=first[-1].id)
        assert [letter.id for letter in first + rest] == sorted(letter.id for letter in first + rest)
        assert {letter.event_id for letter in first + rest} == {event.event_id for event in events}
        assert all(letter.payload is None and letter.traceback is None for letter in first)
        assert len(await desk.operator.dead("parcels", error_type="KeyError")) == 4
        assert await desk.operator.dead("nobody") == []
        with pytest.raises(ActionRefused, match="say which dead letters"):
            await desk.operator.skip(reason="all of them")
        assert await desk.operator.skip(error_type="KeyError", reason="no such road") == 4
        assert await desk.operator.skip(error_type="KeyError", reason="no such road") == 0
        depot.torn = lambda _: False
        assert await desk.operator.retry("parcels", limit=3, reason="three to see") == 3
        await until(lambda: sum(map(len, depot.seen.values())) == 3)
        assert len(await desk.operator.dead()) == 5
        assert await desk.operator.retry("parcels", reason="and the others") == 5
        await owner.wait_settled(events, 10)
        assert Counter(await states(owner, events)) == {"succeeded": 8, "skipped": 4}
    assert Counter(action.action for action in await desk.operator.actions()) == {"skip": 4, "retry": 8}


@pytest.mark.parametrize("transactional", [False, True])
async def test_keys_drain_in_order_while_operators_retry_edit_and_skip_under_load(
    depot: Depot, transactional: bool
) -> None:
    owners = [depot.bus(ordered_by="road", lanes=3, transactional=transactional) for _ in range(2)]
    desk = depot.bus()
    chance = random.Random(7)
    roads = [f"road {number}" for number in range(6)]
    numbers = iter(range(10_000))
    sent: list[ParcelPosted] = []
    skipped: set[int] = set()
    mended: set[int] = set()
    first = ["edit", "skip", "retry"]  # each of them is done, whatever chance has it
    depot.torn = lambda event: event.torn and event.number not in mended
    done = asyncio.Event()

    async def load() -> None:
        for _ in range(60):
            batch = [(chance.choice(roads), next(numbers), chance.random() < 0.08) for _ in range(4)]
            sent.extend(await depot.send(chance.choice(owners), *batch))
            await asyncio.sleep(0.02)
        done.set()

    async def operate() -> None:
        by_id = {}
        while True:
            by_id.update({event.event_id: event for event in sent})
            letters = [letter for letter in await desk.operator.dead("parcels") if letter.event_id in by_id]
            if done.is_set() and not letters and not await open_ones():
                return
            for letter in letters:
                event = by_id[letter.event_id]
                what = first.pop() if first else chance.choice(["retry", "edit", "skip", "wait"])
                if what == "retry":
                    mended.add(event.number)
                    await desk.operator.retry("parcels", letter.event_id, reason="mended")
                elif what == "edit":
                    fields = {"road": event.road, "number": event.number, "torn": False}
                    await desk.operator.edit("parcels", letter.event_id, fields, reason="mended")
                elif what == "skip":
                    skipped.add(event.number)
                    await desk.operator.skip("parcels", letter.event_id, reason="gone")
            await asyncio.sleep(0.03)

    async def open_ones() -> bool:
        """A dead one is open, too: it may have died after the letters were read."""
        found = await desk.deliveries(*(event.event_id for event in sent))
        return any(state.state not in ("succeeded", "skipped") for state in found)

    async with owners[0], owners[1], asyncio.timeout(60), asyncio.TaskGroup() as group:
        group.create_task(load())
        group.create_task(operate())
    expected: dict[str, list[int]] = defaultdict(list)
    for event in sent:
        if event.number not in skipped:
            expected[event.road].append(event.number)
    assert depot.seen == expected
    assert skipped
    assert mended


async def test_parked_behind_nobody(depot: Depot) -> None:
    """While the owner writes that e2 is parked, uncommitted, an operator skips e1: the skip waits, and e2 goes on."""
    owner, desk = depot.bus(ordered_by="road", lanes=1), depot.bus()
    written, go_on = asyncio.Event(), asyncio.Event()
    async with owner:
        [head] = await depot.send(owner, ("long", 1, True))
        await reaches(owner, [head], ["dead"])
        store, follow = owner._store, owner._store.follow

        async def follow_late(*arguments: Any, **options: Any) -> Any:
            found = await follow(*arguments, **options)
            written.set()  # the row of e2 is written, its key was seen to be blocked, and nothing is committed
            await go_on.wait()
            return found

        store.follow = follow_late  # type: ignore[method-assign]
        sending = asyncio.create_task(depot.send(desk, ("long", 2)))
        async with asyncio.timeout(10):
            [second] = await sending
            await written.wait()
        skip = asyncio.create_task(desk.operator.skip("parcels", head.event_id, reason="it is gone"))
        await asyncio.sleep(0.3)
        assert not skip.done()
        store.follow = follow  # type: ignore[method-assign]
        go_on.set()
        async with asyncio.timeout(10):
            await skip
        await owner.wait_settled([second], 10)
        third = await depot.send(owner, ("long", 3))
        await owner.wait_settled(third, 10)
    assert depot.seen["long"] == [2, 3]


async def test_a_retry_that_succeeds_in_its_transaction_and_a_skip_behind_it_do_not_cross(depot: Depot) -> None:
    """The handler's transaction drops e1 and makes e2 due, while an operator skips e2: e3 is left behind neither."""
    owner, desk = depot.bus(ordered_by="road", lanes=1, transactional=True), depot.bus()
    async with owner:
        events = await depot.send(owner, ("long", 1, True), ("long", 2), ("long", 3))
        await reaches(owner, events, ["dead", "parked", "parked"])
        depot.torn = lambda _: False
        forgotten, go_on = asyncio.Event(), asyncio.Event()
        store, forget = owner._store, owner._store.forget

        async def forget_late(*arguments: Any) -> int:
            found = await forget(*arguments)
            forgotten.set()
            await go_on.wait()
            return found

        store.forget = forget_late  # type: ignore[assignment, method-assign]
        await desk.operator.retry("parcels", events[0].event_id, reason="glued")
        async with asyncio.timeout(10):
            await forgotten.wait()
        skip = asyncio.create_task(desk.operator.skip("parcels", events[1].event_id, reason="it is gone"))
        await asyncio.sleep(0.3)
        store.forget = forget  # type: ignore[method-assign]
        go_on.set()
        refused = None
        try:
            async with asyncio.timeout(10):
                await skip
        except ActionRefused as error:  # it had begun by then
            refused = error
        await owner.wait_settled(events, 10)
    assert depot.seen["long"] == ([1, 3] if refused is None else [1, 2, 3])


# --- retiring ---------------------------------------------------------------------------------------------------------


async def test_a_subscription_is_retired_once_no_worker_serves_it(depot: Depot) -> None:
    owner, desk = depot.bus(), depot.bus()
    async with owner:
        events = await depot.send(owner, ("long", 1, True), ("long", 2))
        await reaches(owner, events, ["dead", "succeeded"])
        with pytest.raises(ActionRefused, match=r"parcels is served by .* \(process \d+\): stop these workers"):
            await desk.operator.retire("parcels", "nobody needs it")
    assert await desk.operator.retire("parcels", "nobody needs it", author="ada") == {"dead": 1}
    assert await desk.operator.handlers() == []
    for table in ("cursor", "exception", "subscription"):
        assert await rows(owner, f"SELECT count(*) FROM whereupon_{table}") == [(0,)]
    [action] = await desk.operator.actions("parcels")
    assert (action.action, action.author, action.details["exceptions"]) == ("retire", "ada", {"dead": 1})
    async with owner:  # it declares it: from now on
        later = await depot.send(owner, ("long", 3))
        await owner.wait_settled(later, 10)
    assert depot.seen["long"] == [2, 3]


async def test_a_subscription_in_use_is_retired_by_force_and_its_worker_lets_go(depot: Depot) -> None:
    owner, desk = depot.bus(), depot.bus()
    async with owner:
        events = await depot.send(owner, ("long", 1))
        await owner.wait_settled(events, 10)
        await desk.operator.retire("parcels", "it does harm", force=True)
        await depot.send(owner, ("long", 2))
        worker = owner._worker
        assert worker is not None
        await until(lambda: not worker.lanes)
    assert depot.seen["long"] in ([1], [1, 2])


# --- lanes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(2, 5), (5, 1), (3, 3)])
@pytest.mark.parametrize("ordered", [False, True])
async def test_lanes_change_under_load_and_nothing_is_lost_doubled_or_out_of_order(
    depot: Depot, before: int, after: int, ordered: bool
) -> None:
    options: dict[str, Any] = {"lanes": before, "ordered_by": "road" if ordered else None}
    one, other, desk = (depot.bus(work=0.003, **options) for _ in range(3))
    sent: list[ParcelPosted] = []
    numbers = iter(range(10_000))

    async def load() -> None:
        for _ in range(40):
            sent.extend(await depot.send(desk, *((f"road {number % 7}", number) for number in islice(numbers, 4))))
            await asyncio.sleep(0.02)

    async with one, other:
        loading = asyncio.create_task(load())
        await until(lambda: sum(depot.calls.values()) > 20)
        heard: list[int] = []
        was = await desk.operator.lanes("parcels", after, "more workers", timeout=20, progress=heard.append)
        assert (was, heard[-1]) == (before, 0)
        await loading
        await desk.wait_settled(sent, 30)
        cursors = await rows(desk, "SELECT lane, token FROM whereupon_cursor ORDER BY lane")
        assert [lane for lane, _ in cursors] == list(range(after))
        [parcels] = await desk.operator.handlers()
        assert (parcels.lanes, parcels.paused) == (after, False)
    assert depot.calls == Counter(event.number for event in sent)
    if ordered:
        assert depot.seen == {
            road: [event.number for event in sent if event.road == road] for road in {event.road for event in sent}
        }
    assert [action.action for action in await desk.operator.actions()] == ["pause", "lanes", "resume"]


async def test_dead_letters_and_what_waits_behind_them_move_to_the_new_lanes(depot: Depot) -> None:
    owner, desk = depot.bus(ordered_by="road", lanes=1), depot.bus(ordered_by="road")
    async with owner:
        events = await with_a_dead_head(depot, owner)
        await desk.operator.lanes("parcels", 7, "more workers")
        more = await depot.send(owner, ("long", 4), ("short", 2))
        await reaches(owner, more, ["parked", "succeeded"])
        await desk.operator.skip("parcels", events[1].event_id, reason="it is gone")
        await owner.wait_settled([*events, *more], 10)
    assert depot.seen == {"long": [0, 2, 3, 4], "short": [0, 1, 2]}


async def test_lanes_that_are_not_given_up_in_time_stay_as_they_are_and_go_on(depot: Depot) -> None:
    owner, desk = depot.bus(work=1.0, lanes=2), depot.bus()
    async with owner:
        events = await depot.send(owner, ("long", 1), ("long", 2))
        await until(lambda: depot.running == 2)
        with pytest.raises(ActionRefused, match="2 of 2 lanes are held still, by handlers that have not ended"):
            await desk.operator.lanes("parcels", 3, "more workers", timeout=0.2)
        await owner.wait_settled([*events, *await depot.send(owner, ("long", 3))], 10)
        [parcels] = await desk.operator.handlers()
    assert (parcels.lanes, parcels.paused) == (2, False)
    assert depot.calls == Counter([1, 2, 3])


async def test_a_subscription_that_was_paused_stays_paused_with_its_new_lanes(depot: Depot) -> None:
    owner, desk = depot.bus(lanes=2), depot.bus()
    async with owner:
        await desk.operator.pause("parcels", "closed")
        await desk.operator.lanes("parcels", 3, "more workers")
        [parcels] = await desk.operator.handlers()
        assert (parcels.lanes, parcels.paused) == (3, True)
        with pytest.raises(ActionRefused, match="can't have 0 lanes"):
            await desk.operator.lanes("parcels", 0, "fewer workers")
        with pytest.raises(ActionRefused, match="others is not declared by this bus"):
            await desk.operator.lanes("others", 2, "fewer workers")


async def test_lanes_left_by_a_worker_that_died_are_not_changed(depot: Depot) -> None:
    desk = depot.bus(lanes=2)
    await desk.start(deliver=False)
    nobody = ParcelPosted(road="", number=0).event_id
    async with desk.engine.begin() as connection:
        await connection.execute(update(schema.cursor).values(owner=nobody))
    with pytest.raises(ActionRefused, match="the worker that held lane 0 has died"):
        await desk.operator.lanes("parcels", 3, "more workers")
    [parcels] = await desk.operator.handlers()
    assert (parcels.lanes, parcels.paused) == (2, False)
    await desk.close()


# --- concurrency and rate ---------------------------------------------------------------------------------------------


async def test_no_more_handlers_run_in_a_process_than_the_subscriptions_concurrency(depot: Depot) -> None:
    owner = depot.bus(work=0.01, concurrency=3, lanes=4)
    async with owner:
        events = await depot.send(owner, *((f"road {number}", number) for number in range(60)))
        await owner.wait_settled(events, 20)
    assert depot.most == 3


async def test_retries_of_many_lanes_at_once_are_no_more_than_may_run_at_once(depot: Depot) -> None:
    owner = depot.bus(work=0.02, lanes=8, concurrency=4)
    depot.torn = lambda _: True
    async with owner:
        events = await depot.send(owner, *((f"road {number}", number) for number in range(40)))
        await reaches(owner, events, ["dead"] * 40)
        depot.torn, depot.most = lambda _: False, 0
        await owner.operator.retry("parcels", reason="glued")
        await owner.wait_settled(events, 20)
    assert 1 <= depot.most <= 4


async def test_workers_share_a_rate_by_the_lanes_they_have(depot: Depot) -> None:
    buses = [depot.bus(rate=40, lanes=4) for _ in range(2)]
    async with buses[0], buses[1]:
        await until(lambda: all(bus._worker is not None and len(bus._worker.lanes) == 2 for bus in buses))
        began = asyncio.get_running_loop().time()
        events = await depot.send(buses[0], *((f"road {number}", number) for number in range(120)))
        await buses[0].wait_settled(events, 30)
        took = asyncio.get_running_loop().time() - began
    # both have had one second's worth in hand at most, 40 together
    assert took > (120 - 40) / 40 * 0.9
