"""What observers of a bus are told, and that they decide nothing."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any, Final

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.log_records import Records
from whereupon import (
    AuditEventHandler,
    BusStateError,
    Delivery,
    Discard,
    DomainEvent,
    EventBus,
    EventContext,
    InMemoryEventBus,
    Metadata,
    Retry,
    Workflow,
)
from whereupon.observer import Observer, Publication, Run

pytestmark = pytest.mark.integration

AT_ONCE: Final = Retry(max_attempts=3, first=0)


class CoffeeBrewed(DomainEvent, audit="COFFEE_BREWED"):
    number: int


class BrewingAttempted(DomainEvent):
    number: int


class BrewingSucceeded(DomainEvent):
    number: int


class BrewingFailed(DomainEvent):
    number: int
    reason: str


Brewing = Workflow(BrewingAttempted, BrewingSucceeded, BrewingFailed)


class Watch(Observer):
    """Keeps all that it is told."""

    def __init__(self) -> None:
        self.published_: list[DomainEvent] = []
        self.staged_: list[tuple[str, str | None]] = []
        self.began: Counter[str] = Counter()
        self.over: list[Run] = []
        self.settled_: list[Run] = []
        self.workflows: list[tuple[str, str]] = []
        self.blocks: list[str] = []

    def publishing(self, publication: Publication) -> str:
        return type(publication.event).__name__

    def staged(self, publication: Publication, state: str) -> None:
        self.staged_.append((state, None if publication.error is None else type(publication.error).__name__))

    def published(self, events: Sequence[DomainEvent]) -> None:
        self.published_ += events

    def started(self, run: Run) -> Run:
        self.began[run.subscription.name] += 1
        return run

    def ended(self, run: Run, state: Run) -> None:
        assert state is run
        self.over.append(run)

    def settled(self, runs: Sequence[Run]) -> None:
        self.settled_ += runs

    def attempting(self, attempt: Any) -> str:
        return str(attempt.workflow.name)

    def left(self, attempt: Any, error: BaseException | None, state: str) -> None:
        self.blocks.append(f"{state} {type(error).__name__}")

    def opened(self, workflow: str) -> None:
        self.workflows.append((workflow, "opened"))

    def closed(self, workflow: str, outcome: str) -> None:
        self.workflows.append((workflow, str(outcome)))

    def outcomes(self, runs: list[Run] | None = None) -> dict[str, dict[str, int]]:
        found: dict[str, Counter[str]] = {}
        for run in self.settled_ if runs is None else runs:
            found.setdefault(run.subscription.name, Counter())[run.outcome] += 1
        return {name: dict(counts) for name, counts in found.items()}


def make_bus(url: str, **options: Any) -> EventBus:
    return EventBus(url, logger=Records(), create_tables=True, poll_interval=0.05, **options)


async def brew(bus: EventBus, *numbers: int) -> list[CoffeeBrewed]:
    events = [CoffeeBrewed(number=number) for number in numbers]
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)
    return events


async def in_database(bus: EventBus, events: Sequence[DomainEvent]) -> dict[str, dict[str, int]]:
    """What the database says became of these, by subscription."""
    found: dict[str, Counter[str]] = {}
    for state in await bus.deliveries(*(event.event_id for event in events)):
        found.setdefault(state.subscription, Counter())[state.state] += 1
    return {name: dict(counts) for name, counts in found.items()}


def subscribe_all_kinds(bus: EventBus) -> None:
    @bus.subscribe(CoffeeBrewed, name="plain")
    async def plain(event: CoffeeBrewed) -> None: ...

    @bus.subscribe(CoffeeBrewed, name="waits")
    async def waits(event: CoffeeBrewed) -> None:
        await asyncio.sleep(0)

    @bus.subscribe(CoffeeBrewed, name="flaky", retry=AT_ONCE)
    async def flaky(event: CoffeeBrewed, context: EventContext) -> None:
        if event.number % 3 == 0 and context.attempt == 1:
            raise ConnectionError("not yet")

    @bus.subscribe(CoffeeBrewed, name="broken", retry=AT_ONCE)
    async def broken(event: CoffeeBrewed) -> None:
        if event.number % 4 == 0:
            raise LookupError("never")

    @bus.subscribe(CoffeeBrewed, name="choosy")
    async def choosy(event: CoffeeBrewed) -> None:
        if event.number % 2:
            raise Discard("odd")

    @bus.subscribe(CoffeeBrewed, name="ledger", retry=AT_ONCE)
    async def ledger(event: CoffeeBrewed, session: AsyncSession, context: EventContext) -> None:
        if event.number == 5 and context.attempt == 1:
            raise ValueError("once more")

    @bus.subscribe(CoffeeBrewed, name="batched", batch=5, retry=AT_ONCE)
    async def batched(event: CoffeeBrewed, session: AsyncSession, context: EventContext) -> None:
        if event.number == 7 and context.attempt == 1:
            raise ValueError("once more")

    @bus.subscribe(CoffeeBrewed, name="inside", delivery=Delivery.IN_TRANSACTION, retry=AT_ONCE)
    async def inside(event: CoffeeBrewed, context: EventContext) -> None:
        if event.number == 2 and context.attempt == 1:
            raise ValueError("not inside")

    @bus.subscribe(CoffeeBrewed, name="at once", delivery=Delivery.AFTER_COMMIT)
    async def after(event: CoffeeBrewed) -> None:
        if event.number == 1:
            raise ValueError("and that is all")


ALL_KINDS: Final = {
    "plain": {"succeeded": 12},
    "waits": {"succeeded": 12},
    "flaky": {"succeeded": 12, "retrying": 4},
    "broken": {"succeeded": 9, "retrying": 6, "dead": 3},
    "choosy": {"succeeded": 6, "skipped": 6},
    "ledger": {"succeeded": 12, "retrying": 1},
    "batched": {"succeeded": 12, "retrying": 1},
    "inside": {"succeeded": 12, "retrying": 1},
    "at once": {"succeeded": 11, "failed": 1},
}


async def test_what_observers_are_told_is_what_the_database_has(database_url: str) -> None:
    bus, watch = make_bus(database_url), Watch()
    bus.observe(watch)
    subscribe_all_kinds(bus)
    bus.register(AuditEventHandler())
    async with bus:
        events = await brew(bus, *range(12))
        await bus.drain(30)
        stored = await in_database(bus, events)
    assert watch.outcomes() == ALL_KINDS | {"AuditEventHandler": {"succeeded": 12}}
    final = {
        name: {state: n for state, n in counts.items() if state != "retrying"}
        for name, counts in watch.outcomes().items()
        if name != "at once"
    }
    assert final == stored
    over = watch.outcomes(watch.over)
    again = over["batched"].pop("interrupted")  # with the one that failed these were rolled back, and called once more
    assert 1 <= again <= 5
    assert over == ALL_KINDS
    assert watch.began == {
        name: sum(counts.values()) + (again if name == "batched" else 0) for name, counts in ALL_KINDS.items()
    }
    assert sorted(event.number for event in watch.published_ if isinstance(event, CoffeeBrewed)) == list(range(12))
    assert watch.staged_ == [("CoffeeBrewed", None)] * 12
    attempts = {run.attempt for run in watch.settled_ if run.subscription.name == "broken"}
    assert attempts == {1, 2, 3}
    [dead, *_] = [run for run in watch.settled_ if run.outcome == "dead"]
    assert (dead.error_type, dead.error_message) == ("LookupError", "never")
    assert all(run.called and run.seconds >= 0 for run in watch.over)
    assert {run.together for run in watch.over if run.subscription.name == "batched"} != {1}


async def test_what_is_rolled_back_was_neither_published_nor_settled(database_url: str) -> None:
    bus, watch = make_bus(database_url, deliver=False), Watch()
    bus.observe(watch)

    @bus.subscribe(CoffeeBrewed, name="inside", delivery=Delivery.IN_TRANSACTION, required=True)
    async def inside(event: CoffeeBrewed) -> None:
        if event.number == 2:
            raise ValueError("no")

    async with bus:
        async with AsyncSession(bus.engine) as session:
            await bus.publish(CoffeeBrewed(number=1), session=session)
            await session.rollback()
        async with AsyncSession(bus.engine) as session:
            with pytest.raises(ValueError, match="no"):
                await bus.publish(CoffeeBrewed(number=2), session=session)
        await brew(bus, 3)
    assert [event.number for event in watch.published_ if isinstance(event, CoffeeBrewed)] == [3]
    assert watch.outcomes() == {"inside": {"succeeded": 1}}
    assert watch.outcomes(watch.over) == {"inside": {"succeeded": 2, "failed": 1}}
    assert watch.staged_ == [("CoffeeBrewed", None), ("CoffeeBrewed", "ValueError"), ("CoffeeBrewed", None)]


async def test_a_call_that_a_stop_cuts_short_is_told_as_interrupted_and_happens_again(database_url: str) -> None:
    first, watch = make_bus(database_url, drain_timeout=0.2, lease=2), Watch()
    first.observe(watch)
    begun = asyncio.Event()

    @first.subscribe(CoffeeBrewed, name="slow")
    async def slow(event: CoffeeBrewed) -> None:
        begun.set()
        await asyncio.sleep(60)

    @first.subscribe(CoffeeBrewed, name="slow ledger")
    async def slow_ledger(event: CoffeeBrewed, session: AsyncSession) -> None:
        await asyncio.sleep(60)

    async with first:
        [event] = await brew(first, 1)
        await asyncio.wait_for(begun.wait(), 10)
    interrupted = {"slow": {"interrupted": 1}, "slow ledger": {"interrupted": 1}}
    assert watch.outcomes(watch.over) == interrupted
    assert {run.attempt for run in watch.over} == {1}
    again, calls = make_bus(database_url, lease=2), Watch()
    again.observe(calls)
    for name in ("slow", "slow ledger"):

        async def quick(event: CoffeeBrewed) -> None: ...

        async def quick_ledger(event: CoffeeBrewed, session: AsyncSession) -> None: ...

        again.subscribe(CoffeeBrewed, quick if name == "slow" else quick_ledger, name=name)
    async with again:
        await again.wait_settled([event], 20)
    assert calls.outcomes() == {"slow": {"succeeded": 1}, "slow ledger": {"succeeded": 1}}


async def test_an_event_that_can_t_be_read_is_told_without_a_call(database_url: str) -> None:
    bus, watch = make_bus(database_url), Watch()
    bus.observe(watch)

    @bus.subscribe(CoffeeBrewed, name="plain")
    async def plain(event: CoffeeBrewed) -> None: ...

    @bus.subscribe(CoffeeBrewed, name="ledger")
    async def ledger(event: CoffeeBrewed, session: AsyncSession) -> None: ...

    await bus.start(deliver=False)
    [event] = await brew(bus, 1)
    async with bus.engine.begin() as connection:
        await connection.execute(text("UPDATE whereupon_log SET payload = :nothing"), {"nothing": b"{"})
    await bus.close()
    async with bus:
        await bus.wait_settled([event], 20)
    assert watch.outcomes() == {"plain": {"dead": 1}, "ledger": {"dead": 1}}
    assert not any(run.called for run in watch.settled_)
    assert watch.over == []
    assert {run.error_type for run in watch.settled_} == {"EventDecodingError"}


async def test_a_workflow_is_told_when_it_opens_and_how_it_closes(database_url: str) -> None:
    bus, watch = make_bus(database_url), Watch()
    bus.observe(watch)
    async with bus:
        async with bus.workflow(Brewing, number=1) as attempt, AsyncSession(bus.engine) as session, session.begin():
            await attempt.succeeded(session=session)
        with pytest.raises(ZeroDivisionError):
            async with bus.workflow(Brewing, number=2):
                raise ZeroDivisionError
    assert watch.workflows == [("Brewing", told) for told in ("opened", "succeeded", "opened", "failed")]
    assert watch.blocks == ["Brewing NoneType", "Brewing ZeroDivisionError"]


async def test_whoever_closes_the_attempt_of_a_dead_process_tells_of_it(database_url: str) -> None:
    dying = make_bus(database_url)
    watch, survivor = Watch(), make_bus(database_url)
    survivor.observe(watch)
    async with dying:
        attempt = dying.workflow(Brewing, number=1)
        await attempt.__aenter__()
        async with dying.engine.begin() as connection:
            await connection.execute(text("DELETE FROM whereupon_process"))
        await survivor.start(deliver=False)
        assert await survivor._attempts.sweep() == 1
        await survivor.close()
    assert watch.workflows == [("Brewing", "interrupted")]
    assert [type(event).__name__ for event in watch.published_] == ["BrewingFailed"]
    await survivor.engine.dispose()


async def test_the_bus_in_memory_tells_the_same() -> None:
    bus, watch = InMemoryEventBus(logger=Records()), Watch()
    bus.observe(watch)

    @bus.subscribe(CoffeeBrewed, name="plain")
    async def plain(event: CoffeeBrewed) -> None: ...

    @bus.subscribe(CoffeeBrewed, name="broken")
    async def broken(event: CoffeeBrewed, context: EventContext) -> None:
        await asyncio.sleep(0)
        raise LookupError("never")

    await bus.publish(CoffeeBrewed(number=1))
    await bus.publish(CoffeeBrewed(number=2), CoffeeBrewed(number=3))
    assert watch.outcomes() == watch.outcomes(watch.over) == {"plain": {"succeeded": 3}, "broken": {"failed": 3}}
    assert len(watch.published_) == 3
    async with bus.workflow(Brewing, number=1) as attempt:
        await attempt.succeeded()
    assert watch.workflows == [("Brewing", "opened"), ("Brewing", "succeeded")]


async def test_the_bus_in_memory_tells_of_a_commit_and_not_of_a_rollback(sqlite_url: str) -> None:
    engine = make_bus(sqlite_url).engine
    bus, watch = InMemoryEventBus(logger=Records()), Watch()
    bus.observe(watch)

    @bus.subscribe(CoffeeBrewed, name="inside", delivery=Delivery.IN_TRANSACTION)
    async def inside(event: CoffeeBrewed) -> None: ...

    @bus.subscribe(CoffeeBrewed, name="ledger")
    async def ledger(event: CoffeeBrewed, session: AsyncSession) -> None: ...

    async with AsyncSession(engine) as session:
        await bus.publish(CoffeeBrewed(number=1), session=session)
        await session.rollback()
        assert watch.outcomes() == {}
        await bus.publish(CoffeeBrewed(number=2), session=session)
        await session.commit()
    await bus.drain(10)
    assert watch.outcomes() == {"inside": {"succeeded": 1}, "ledger": {"succeeded": 1}}
    assert len(watch.published_) == 1
    await engine.dispose()


# --- hostile observers ------------------------------------------------------------------------------------------------


class Hostile(Observer):
    """Raises wherever it is called."""

    def __init__(self, kind: type[BaseException]) -> None:
        self.kind = kind
        self.raised: Counter[str] = Counter()

    def _raise(self, hook: str) -> Any:
        self.raised[hook] += 1
        raise self.kind(f"from {hook}")

    def publishing(self, publication: Publication) -> Any:
        return self._raise("publishing")

    def staged(self, publication: Publication, state: Any) -> None:
        self._raise("staged")

    def published(self, events: Sequence[DomainEvent]) -> None:
        self._raise("published")

    def started(self, run: Run) -> Any:
        return self._raise("started")

    def ended(self, run: Run, state: Any) -> None:
        self._raise("ended")

    def settled(self, runs: Sequence[Run]) -> None:
        self._raise("settled")

    def attempting(self, attempt: Any) -> Any:
        return self._raise("attempting")

    def left(self, attempt: Any, error: BaseException | None, state: Any) -> None:
        self._raise("left")

    def opened(self, workflow: str) -> None:
        self._raise("opened")

    def closed(self, workflow: str, outcome: str) -> None:
        self._raise("closed")


HOOKS: Final = tuple(sorted(name for name in vars(Observer) if not name.startswith("_")))


@pytest.mark.parametrize("kind", [RuntimeError, asyncio.CancelledError, SystemExit])
async def test_an_observer_that_raises_decides_nothing_and_is_told_on_once_for_each_hook(
    database_url: str, kind: type[BaseException]
) -> None:
    bus, hostile, watch = make_bus(database_url), Hostile(kind), Watch()
    bus.observe(hostile)
    bus.observe(watch)
    subscribe_all_kinds(bus)
    async with bus:
        events = await brew(bus, *range(12))
        async with bus.workflow(Brewing, number=1) as attempt:
            await attempt.failed("no_beans")
        await bus.drain(30)
        stored = await in_database(bus, events)
    assert stored["broken"] == {"succeeded": 9, "dead": 3}
    assert {name: counts.get("succeeded") for name, counts in stored.items() if name not in ("broken", "choosy")} == (
        dict.fromkeys(("plain", "waits", "flaky", "ledger", "batched", "inside"), 12)
    )
    assert watch.outcomes() == ALL_KINDS, "another observer is none the worse for it"
    records = bus._raw_logger
    told = records.named("observer_failed")
    assert sorted(record["hook"] for record in told) == list(HOOKS)
    assert all(hostile.raised[hook] for hook in HOOKS)
    assert {(record["observer"], record["error_type"]) for record in told} == {("Hostile", kind.__name__)}
    assert not records.named("worker_lane_failed")


async def test_an_observer_can_t_leave_metadata_that_can_t_be_stored(database_url: str) -> None:
    class Careless(Observer):
        def publishing(self, publication: Publication) -> None:
            publication.metadata = {"trace": "x"}  # type: ignore[assignment]

    class Careful(Observer):
        def publishing(self, publication: Publication) -> None:
            publication.metadata = Metadata(actor="ada")

    bus = make_bus(database_url)
    bus.observe(Careful())
    bus.observe(Careless())
    heard: list[str | None] = []

    @bus.subscribe(CoffeeBrewed)
    async def note(event: CoffeeBrewed, context: EventContext) -> None:
        heard.append(context.actor)

    async with bus:
        await brew(bus, 1)
        await bus.drain(10)
    assert heard == ["ada"]
    [record] = bus._raw_logger.named("observer_failed")
    assert "which can't be stored" in record["error_message"]


async def test_a_logger_that_raises_at_an_observer_that_raises_decides_nothing(
    sqlite_url: str, caplog: pytest.LogCaptureFixture
) -> None:
    class Broken(Records):
        def error(self, event: str, /, **details: Any) -> None:
            raise ValueError("no log today")

    bus = EventBus(sqlite_url, logger=Broken(), create_tables=True)
    bus.observe(Hostile(RuntimeError))
    calls: list[int] = []

    @bus.subscribe(CoffeeBrewed)
    async def note(event: CoffeeBrewed) -> None:
        calls.append(event.number)

    async with bus:
        await brew(bus, 1)
        await bus.drain(10)
    assert calls == [1]
    assert "observer_failed" in caplog.text


async def test_a_bus_that_runs_takes_no_observer(sqlite_url: str) -> None:
    bus = make_bus(sqlite_url)
    async with bus:
        with pytest.raises(BusStateError, match=r"Call bus\.observe before `async with bus`"):
            bus.observe(Watch())


@pytest.mark.parametrize("make", [lambda: EventBus("sqlite+aiosqlite:///:memory:"), InMemoryEventBus])
def test_what_is_no_observer_is_refused(make: Callable[[], Any]) -> None:
    with pytest.raises(TypeError, match="inherit from it"):
        make().observe(object())


async def test_only_what_is_overridden_is_called_and_nothing_is_made_for_the_rest(sqlite_url: str) -> None:
    class Counting(Observer):
        def __init__(self) -> None:
            self.events = 0

        def published(self, events: Sequence[DomainEvent]) -> None:
            self.events += len(events)

    bus, counting = make_bus(sqlite_url), Counting()
    bus.observe(counting)
    bus.subscribe(CoffeeBrewed, _nothing)
    async with bus:
        await brew(bus, 1, 2)
        await bus.drain(10)
    assert counting.events == 2
    assert bus._observing is not None
    assert not bus._observing.watching


async def _nothing(event: CoffeeBrewed) -> None: ...
