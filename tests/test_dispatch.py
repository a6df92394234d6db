"""A handler is stepped in place; whatever it may ask of its task must be as in a task of its own."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import sys
import tracemalloc
import weakref
from asyncio import CancelledError
from collections.abc import Awaitable, Callable, Generator, Iterator
from contextvars import ContextVar, copy_context
from typing import Any

import pytest

from whereupon._dispatch import HandlerTask, Runner, Seat
from whereupon.errors import BusStateError, HandlerTimeout

Handler = Callable[[Any], Awaitable[Any]]


class Stage:
    """Starts handlers as a bus does, and keeps what was reported of them."""

    def __init__(self) -> None:
        self.runner = Runner()
        self.failed: list[tuple[str, BaseException]] = []
        self.ended: list[tuple[str, BaseException | None]] = []

    def start(self, *handlers: Handler, timeout: float | None = None) -> int:
        calls: list[Any] = [(handler, timeout, getattr(handler, "__name__", "?")) for handler in handlers]
        return len(self.runner.start(calls, "event", copy_context(), self._failed, self._ended))

    def _failed(self, label: str, argument: object, error: BaseException) -> None:
        self.failed.append((label, error))

    def _ended(self, seat: Seat, error: BaseException | None) -> None:
        self.ended.append((seat.label, error))

    async def end(self) -> None:
        """Let those that suspended end."""
        while self.runner.running:
            await asyncio.wait([seat.task for seat in self.runner.running], timeout=5)
        await asyncio.sleep(0)

    def errors(self) -> dict[str, str]:
        errors = [*self.failed, *self.ended]
        return {label: type(error).__name__ for label, error in errors if error is not None}


@pytest.fixture
def stage() -> Stage:
    return Stage()


@pytest.fixture(autouse=True)
def _nothing_is_left_behind(caplog: pytest.LogCaptureFixture) -> Iterator[None]:
    """No coroutine is dropped before it began, no task while it is pending, no error unseen."""
    unraisable: list[object] = []
    hook, sys.unraisablehook = sys.unraisablehook, unraisable.append
    try:
        yield
        gc.collect()
    finally:
        sys.unraisablehook = hook
    assert not unraisable
    assert not [record.getMessage() for record in caplog.records if record.name == "asyncio"]


def mine() -> asyncio.Task[Any]:
    task = asyncio.current_task()
    assert task is not None
    return task


async def quiet(event: object) -> None:
    pass


async def yielding(event: object) -> None:
    await asyncio.sleep(0)


# -- one task per handler ----------------------------------------------------------------------------------------------


async def test_handlers_that_never_wait_share_one_idle_task(stage: Stage) -> None:
    before = asyncio.all_tasks()
    seen: list[int] = []

    async def look(event: object) -> None:
        seen.append(id(asyncio.current_task()))

    assert stage.start(look, look, look) == 0
    await asyncio.sleep(0)
    stage.start(look)
    assert len(seen) == 4
    assert len(set(seen)) == 1
    assert seen[0] != id(mine())
    assert asyncio.all_tasks() == before  # an idle task is hidden from who waits for all of them
    assert not stage.runner.running


async def test_the_publisher_is_the_current_task_again_afterwards(stage: Stage) -> None:
    publisher = mine()

    async def fails(event: object) -> None:
        raise ValueError("no")

    stage.start(quiet, fails, yielding, quiet)
    assert asyncio.current_task() is publisher
    await stage.end()
    assert asyncio.current_task() is publisher


async def test_a_handler_keeps_its_task_across_its_first_wait(stage: Stage) -> None:
    tasks: list[asyncio.Task[Any]] = []

    async def waits(event: object) -> None:
        tasks.append(mine())
        await asyncio.sleep(0)
        tasks.append(mine())
        await asyncio.sleep(0.001)
        tasks.append(mine())

    assert stage.start(waits, waits) == 2
    await stage.end()
    assert len(tasks) == 6
    assert len(set(tasks)) == 2
    assert stage.errors() == {}


async def test_a_waiting_handler_is_among_all_tasks_whether_its_task_was_idle_before_or_new(stage: Stage) -> None:
    stage.start(quiet)
    await asyncio.sleep(0)
    tasks: list[asyncio.Task[Any]] = []

    async def waits(event: object) -> None:
        tasks.append(mine())
        await asyncio.sleep(0)

    stage.start(waits, waits)
    assert set(tasks) <= asyncio.all_tasks()
    await stage.end()


def _kept(kept: list[object]) -> None:
    kept.append(asyncio.current_task())


def _watched(kept: list[object]) -> None:
    kept.append(weakref.ref(mine()))


def _keyed(kept: list[object]) -> None:
    states: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()
    states[mine()] = "state"
    kept.append(states)


def _cancelled(kept: list[object]) -> None:
    mine().cancel()


def _cancelled_and_taken_back(kept: list[object]) -> None:
    mine().cancel()
    mine().uncancel()


def _named(kept: list[object]) -> None:
    mine().set_name("mine")


def _with_callback(kept: list[object]) -> None:
    mine().add_done_callback(kept.append)


def _with_attribute(kept: list[object]) -> None:
    mine().request = "mine"  # type: ignore[attr-defined]


def _to_be_cancelled_later(kept: list[object]) -> None:
    kept.append(asyncio.get_running_loop().call_later(60, mine().cancel))


@pytest.mark.parametrize("used_before", [False, True], ids=["new", "idle"])
@pytest.mark.parametrize(
    "leave",
    [
        _kept,
        _watched,
        _keyed,
        _cancelled,
        _cancelled_and_taken_back,
        _named,
        _with_callback,
        _with_attribute,
        _to_be_cancelled_later,
    ],
)
async def test_a_task_with_a_trace_on_it_serves_no_other_handler(
    stage: Stage, leave: Callable[[list[object]], None], used_before: bool
) -> None:
    if used_before:
        stage.start(quiet)
        await asyncio.sleep(0)
    kept: list[object] = []
    seen: list[asyncio.Task[Any]] = []

    async def leaves(event: object) -> None:
        leave(kept)

    async def looks(event: object) -> None:
        task = mine()
        seen.append(task)
        assert task.get_name() == "whereupon-handler"
        assert not task.cancelling()
        assert not hasattr(task, "request")
        await asyncio.sleep(0)
        await asyncio.sleep(0.001)

    stage.start(leaves, looks)
    await stage.end()
    assert stage.errors() == {}
    assert seen[0] not in kept
    for trace in kept:
        if isinstance(trace, weakref.ref):
            assert trace() is not seen[0]
        if isinstance(trace, asyncio.TimerHandle):
            trace.cancel()


async def test_a_kept_task_is_done_when_its_handler_is(stage: Stage) -> None:
    kept: list[asyncio.Task[Any]] = []

    async def ends(event: object) -> None:
        kept.append(mine())

    async def fails(event: object) -> None:
        kept.append(mine())
        raise ValueError("no")

    stage.start(ends, fails)
    _done, pending = await asyncio.wait(kept, timeout=1)
    assert not pending
    assert kept[0].exception() is None
    assert isinstance(kept[1].exception(), ValueError)


@pytest.mark.parametrize("waits", [False, True])
async def test_a_callback_on_the_task_is_called_when_its_handler_ends(stage: Stage, waits: bool) -> None:
    called: list[asyncio.Task[Any]] = []
    release = asyncio.Event()

    async def handler(event: object) -> None:
        mine().add_done_callback(called.append)
        if waits:
            await release.wait()

    stage.start(handler, yielding)
    for _ in range(4):
        await asyncio.sleep(0)
    assert bool(called) is not waits
    release.set()
    await stage.end()
    assert len(called) == 1


# -- context, timeouts, groups -----------------------------------------------------------------------------------------

colour: ContextVar[str] = ContextVar("colour", default="none")


async def test_each_handler_has_a_context_of_its_own_before_and_after_its_first_wait(stage: Stage) -> None:
    colour.set("publisher")
    seen: list[str] = []

    def painter(own: str, *, waits: bool) -> Handler:
        async def paint(event: object) -> None:
            seen.append(colour.get())
            token = colour.set(own)
            if waits:
                await asyncio.sleep(0)
                await asyncio.sleep(0.001)
            assert colour.get() == own
            colour.reset(token)  # in the context it was set in, or this raises
            colour.set(own)

        return paint

    stage.start(
        painter("a", waits=False), painter("b", waits=True), painter("c", waits=True), painter("d", waits=False)
    )
    await stage.end()
    assert stage.errors() == {}
    assert seen == ["publisher"] * 4
    assert colour.get() == "publisher"


async def test_an_idle_task_keeps_nothing_of_the_context_it_was_made_in(stage: Stage) -> None:
    class Request:
        pass

    request: ContextVar[Request] = ContextVar("request")

    async def publish() -> weakref.ref[Request]:
        made = Request()
        request.set(made)
        stage.start(quiet)
        return weakref.ref(made)

    made = await asyncio.create_task(publish())
    await asyncio.sleep(0)
    gc.collect()
    assert made() is None


@pytest.mark.parametrize("first", [True, False], ids=["in its first step", "later"])
async def test_a_timeout_inside_a_handler_cancels_that_handler_alone(stage: Stage, first: bool) -> None:
    ends: list[str] = []

    async def limited(event: object) -> None:
        if not first:
            await asyncio.sleep(0)
        try:
            async with asyncio.timeout(0.01):
                await asyncio.sleep(60)
        except TimeoutError:
            ends.append("limited")
        assert not mine().cancelling()
        await asyncio.sleep(0)

    async def other(event: object) -> None:
        await asyncio.sleep(0.03)
        ends.append("other")

    stage.start(limited, other, limited)
    await stage.end()
    assert ends == ["limited", "limited", "other"]
    assert stage.errors() == {}


async def test_a_timeout_that_did_not_fire_leaves_no_trace(stage: Stage) -> None:
    seen: set[int] = set()

    async def limited(event: object) -> None:
        seen.add(id(asyncio.current_task()))
        async with asyncio.timeout(60):
            await quiet(event)

    stage.start(limited, limited, limited)
    assert len(seen) == 1


async def test_a_timeout_that_is_over_when_entered_fires_at_the_first_wait(stage: Stage) -> None:
    seen: list[str] = []

    async def limited(event: object) -> None:
        try:
            async with asyncio.timeout(0):
                await asyncio.sleep(60)
        except TimeoutError:
            seen.append("timeout")

    stage.start(limited, quiet, limited)
    await stage.end()
    assert seen == ["timeout", "timeout"]


async def test_a_task_group_inside_a_handler_cancels_that_handler_and_its_children_alone(stage: Stage) -> None:
    seen: list[str] = []

    async def child() -> None:
        raise ValueError("child")

    async def sibling() -> None:
        try:
            await asyncio.sleep(60)
        except CancelledError:
            seen.append("sibling cancelled")
            raise

    async def grouped(event: object) -> None:
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(sibling())
                group.create_task(child())
                await asyncio.sleep(60)
        except* ValueError:
            seen.append("caught")
        assert not mine().cancelling()

    async def other(event: object) -> None:
        await asyncio.sleep(0.01)
        seen.append("other")

    stage.start(grouped, other)
    await stage.end()
    assert seen == ["sibling cancelled", "caught", "other"]
    assert stage.errors() == {}


async def test_cancel_scopes_of_anyio_work_inside_a_handler(stage: Stage) -> None:
    anyio = pytest.importorskip("anyio")
    seen: list[bool] = []

    async def scoped(event: object) -> None:
        with anyio.move_on_after(0.01) as scope:
            await anyio.sleep(60)
        seen.append(scope.cancelled_caught)
        with anyio.CancelScope() as outer:
            outer.cancel()
            await anyio.sleep(60)
        seen.append(outer.cancelled_caught)
        async with anyio.create_task_group() as group:
            group.start_soon(anyio.sleep, 0)

    stage.start(scoped, scoped, quiet)
    await stage.end()
    assert seen == [True, True] * 2
    assert stage.errors() == {}


async def test_two_handlers_may_first_wait_for_one_future(stage: Stage) -> None:
    shared: asyncio.Future[str] = asyncio.get_running_loop().create_future()
    seen: list[str] = []

    async def waits(event: object) -> None:
        seen.append(await shared)

    stage.start(waits, waits, waits)
    third = asyncio.ensure_future(asyncio.wait_for(shared, 1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    shared.set_result("ready")
    assert await third == "ready"
    await stage.end()
    assert stage.errors() == {}
    assert seen == ["ready"] * 3
    assert stage.errors() == {}


# -- how handlers end --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
@pytest.mark.parametrize("raised", [ValueError, CancelledError, GeneratorExit, StopAsyncIteration, BaseException])
async def test_what_one_handler_raises_reaches_no_other(stage: Stage, raised: type[BaseException], waits: bool) -> None:
    ran: list[str] = []

    async def first(event: object) -> None:
        ran.append("first")

    async def fails(event: object) -> None:
        if waits:
            await asyncio.sleep(0)
        raise raised("no")

    async def last(event: object) -> None:
        await asyncio.sleep(0.001)
        ran.append("last")

    stage.start(first, fails, last)
    await stage.end()
    assert ran == ["first", "last"]
    assert stage.errors() == {"fails": raised.__name__}
    assert not mine().cancelling()


async def test_a_stop_iteration_is_an_error_and_no_end(stage: Stage) -> None:
    async def fails(event: object) -> None:
        raise StopIteration

    async def fails_later(event: object) -> None:
        await asyncio.sleep(0)
        raise StopIteration

    stage.start(fails, fails_later)
    await stage.end()
    assert stage.errors() == {"fails": "RuntimeError", "fails_later": "RuntimeError"}


async def test_what_a_handler_returns_is_nobodys_business(stage: Stage) -> None:
    async def returns(event: object) -> int:
        return 42

    async def returns_later(event: object) -> tuple[str, ...]:
        await asyncio.sleep(0)
        return ("a", "b")

    stage.start(returns, returns_later)
    await stage.end()
    assert stage.errors() == {}
    assert stage.ended == [("returns_later", None)]


@pytest.mark.parametrize("exit_by", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("waits", [False, True], ids=["at once", "after a wait"])
def test_an_exit_ends_the_loop_as_from_any_task(exit_by: type[BaseException], waits: bool) -> None:
    stage = Stage()

    async def exits(event: object) -> None:
        if waits:
            await asyncio.sleep(0)
        raise exit_by

    async def main() -> None:
        stage.start(quiet, exits)
        await asyncio.sleep(1)

    with pytest.raises(exit_by):
        asyncio.run(main())
    assert stage.errors() == ({"exits": exit_by.__name__} if waits else {})

    async def again() -> None:
        publisher = asyncio.current_task()
        stage.start(quiet, yielding)
        assert asyncio.current_task() is publisher
        await stage.end()

    asyncio.run(again())


class _Slow:
    """An awaitable that is no coroutine, as an extension module makes them."""

    def __await__(self) -> Generator[Any, None, None]:
        yield from asyncio.sleep(0.001).__await__()


class _BareIterator:
    """Its iterator can't be thrown into."""

    def __await__(self) -> Any:
        return iter([None, None])


async def test_awaitables_that_are_no_coroutines_are_awaited(stage: Stage) -> None:
    future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
    asyncio.get_running_loop().call_later(0.001, future.set_result, None)
    made: list[Awaitable[None]] = [_Slow(), _BareIterator(), future]

    def handler(awaitable: Awaitable[None]) -> Handler:
        return lambda event: awaitable

    assert stage.start(*(handler(awaitable) for awaitable in made)) == 3
    await stage.end()
    assert [error for _, error in stage.ended] == [None] * 3


async def test_what_can_not_be_awaited_is_a_failure_that_says_so(stage: Stage) -> None:
    def returns_nothing(event: object) -> Any:
        return None

    stage.start(returns_nothing, quiet)
    assert stage.errors() == {"returns_nothing": "TypeError"}
    assert "await" in str(stage.failed[0][1])


# -- cancelling --------------------------------------------------------------------------------------------------------


async def _cancel_before_the_first_turn(task: asyncio.Task[Any]) -> None:
    task.cancel("because")


async def _cancel_while_it_waits(task: asyncio.Task[Any]) -> None:
    for _ in range(3):
        await asyncio.sleep(0)
    task.cancel("because")


@pytest.mark.parametrize("used_before", [False, True], ids=["new", "idle"])
@pytest.mark.parametrize("cancel", [_cancel_before_the_first_turn, _cancel_while_it_waits])
async def test_a_handler_that_is_cancelled_sees_it_where_it_waits(
    stage: Stage, cancel: Callable[[asyncio.Task[Any]], Awaitable[None]], used_before: bool
) -> None:
    if used_before:
        stage.start(quiet)
        await asyncio.sleep(0)
    tasks: list[asyncio.Task[Any]] = []
    waited_for: list[asyncio.Future[None]] = []
    seen: list[str] = []

    async def waits(event: object) -> None:
        tasks.append(mine())
        waited_for.append(asyncio.get_running_loop().create_future())
        try:
            await waited_for[0]
        except CancelledError as error:
            await asyncio.sleep(0)  # cleaning up may take its time
            seen.append(f"cancelled {error}")
            raise

    async def other(event: object) -> None:
        await asyncio.sleep(0.01)
        seen.append("other")

    stage.start(waits, other)
    await cancel(tasks[0])
    await stage.end()
    assert seen == ["cancelled because", "other"]
    assert waited_for[0].cancelled()
    assert tasks[0].cancelled()
    assert stage.errors() == {"waits": "CancelledError"}


async def test_a_handler_cancelled_before_the_first_turn_may_go_on(stage: Stage) -> None:
    tasks: list[asyncio.Task[Any]] = []
    seen: list[str] = []

    async def stubborn(event: object) -> None:
        tasks.append(mine())
        try:
            await asyncio.sleep(0)
        except CancelledError:
            mine().uncancel()
        await asyncio.sleep(0.001)
        seen.append("went on")

    stage.start(stubborn)
    tasks[0].cancel()
    await stage.end()
    assert seen == ["went on"]
    assert stage.ended == [("stubborn", None)]


@pytest.mark.parametrize("used_before", [False, True], ids=["new", "idle"])
async def test_a_handler_that_cancels_itself_is_cancelled_at_its_next_wait(stage: Stage, used_before: bool) -> None:
    if used_before:
        stage.start(quiet)
        await asyncio.sleep(0)
    reached: list[str] = []

    async def cancels_itself(event: object) -> None:
        mine().cancel()
        reached.append("before")
        await asyncio.sleep(0)
        reached.append("after")

    stage.start(cancels_itself, quiet, yielding)
    await stage.end()
    assert reached == ["before"]
    assert stage.errors() == {"cancels_itself": "CancelledError"}


@pytest.mark.parametrize("used_before", [False, True], ids=["new", "idle"])
async def test_a_cancellation_taken_back_before_the_first_wait_is_as_in_a_task(stage: Stage, used_before: bool) -> None:
    async def takes_it_back(event: object) -> None:
        mine().cancel()
        mine().uncancel()
        await asyncio.sleep(0.001)

    task = asyncio.create_task(takes_it_back("event"))
    await asyncio.wait([task])
    if used_before:
        stage.start(quiet)
        await asyncio.sleep(0)
    stage.start(takes_it_back)
    await stage.end()
    assert stage.errors() == ({"takes_it_back": "CancelledError"} if task.cancelled() else {})


async def test_cancelling_a_handler_cancels_the_task_it_first_waits_for(stage: Stage) -> None:
    tasks: list[asyncio.Task[Any]] = []
    seen: list[str] = []

    async def inner() -> None:
        try:
            await asyncio.sleep(60)
        except CancelledError:
            seen.append("inner")

    async def waits(event: object) -> None:
        tasks.append(mine())
        await asyncio.create_task(inner())
        seen.append("went on, as the inner task did")

    stage.start(waits)
    await asyncio.sleep(0)
    tasks[0].cancel()
    await stage.end()
    assert seen == ["inner", "went on, as the inner task did"]


# -- whereupon's own timeouts ------------------------------------------------------------------------------------------


async def test_a_handler_past_its_timeout_is_cancelled_and_reported_so(stage: Stage) -> None:
    seen: list[str] = []

    async def slow(event: object) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("cleaned up")

    stage.start(slow, quiet, timeout=0.01)
    stage.start(yielding, timeout=0.01)
    await stage.end()
    assert seen == ["cleaned up"]
    ((_, error),) = [end for end in stage.ended if end[1] is not None]
    assert isinstance(error, HandlerTimeout)
    assert str(error) == "it ran longer than its 0.01 s and was cancelled"


async def test_handlers_of_one_timeout_share_a_timer_and_expire_each_in_its_time(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop = asyncio.get_running_loop()
    made: list[float] = []
    call_later = loop.call_later

    def counting(delay: float, *rest: Any, **options: Any) -> asyncio.TimerHandle:
        made.append(delay)
        return call_later(delay, *rest, **options)

    monkeypatch.setattr(loop, "call_later", counting)
    forever = asyncio.Event()
    expired: list[float] = []

    async def slow(event: object) -> None:
        began = loop.time()
        try:
            await forever.wait()
        finally:
            expired.append(loop.time() - began)

    stage.start(slow, slow, slow, timeout=0.05)
    await asyncio.sleep(0)
    later = asyncio.Event()
    loop.call_at(loop.time() + 0.02, later.set)
    await later.wait()
    stage.start(slow, timeout=0.05)
    assert made == [0.05]
    await stage.end()
    assert len(expired) == 4
    assert all(0.045 <= seconds < 1 for seconds in expired)
    assert {type(error) for _, error in stage.ended} == {HandlerTimeout}


async def test_handlers_that_never_wait_need_no_timer(stage: Stage, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a timer was made")

    monkeypatch.setattr(asyncio.get_running_loop(), "call_later", refuse)
    assert stage.start(quiet, quiet, timeout=1) == 0
    assert stage.failed == []


# -- loops, nesting, memory --------------------------------------------------------------------------------------------


def test_without_a_current_task_there_is_none_afterwards() -> None:
    stage = Stage()
    loop = asyncio.new_event_loop()
    seen: list[Any] = []

    async def look(event: object) -> None:
        seen.append(asyncio.current_task())
        await asyncio.sleep(0)
        seen.append(asyncio.current_task())

    def callback() -> None:
        assert asyncio.current_task() is None
        stage.start(quiet, look)
        seen.append(asyncio.current_task())

    try:
        loop.call_soon(callback)
        loop.run_until_complete(asyncio.sleep(0.01))
    finally:
        loop.close()
    first, none, second = seen
    assert isinstance(first, HandlerTask)
    assert none is None
    assert second is first
    assert stage.ended == [("look", None)]


async def test_a_handler_that_starts_handlers_shares_its_task_with_none_of_them(stage: Stage) -> None:
    tasks: list[asyncio.Task[Any]] = []

    def nested(depth: int, *, waits: bool) -> Handler:
        async def handler(event: object) -> None:
            own = mine()
            tasks.append(own)
            if depth:
                stage.start(nested(depth - 1, waits=not waits), nested(depth - 1, waits=waits))
            assert asyncio.current_task() is own
            if waits:
                await asyncio.sleep(0)
                assert asyncio.current_task() is own

        return handler

    stage.start(nested(3, waits=False), nested(3, waits=True), quiet)
    await stage.end()
    assert stage.errors() == {}
    assert len(tasks) == 30
    publisher = mine()
    tasks.clear()
    stage.start(quiet, yielding)
    assert mine() is publisher
    await stage.end()


async def test_a_recursion_without_end_is_a_failure_and_no_more(stage: Stage) -> None:
    publisher = mine()

    async def recurses(event: object) -> None:
        stage.start(recurses)

    stage.start(recurses)
    assert mine() is publisher
    assert "RecursionError" in stage.errors().values()
    stage.failed.clear()
    stage.start(quiet, yielding)
    await stage.end()
    assert stage.errors() == {}


@pytest.mark.parametrize("close", [True, False], ids=["closed", "left open"])
def test_a_runner_serves_one_loop_after_the_other(close: bool) -> None:
    stage = Stage()
    seen: list[str] = []

    async def slow(event: object) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            seen.append("ended")

    async def main() -> None:
        stage.start(quiet, yielding, timeout=30)
        stage.start(slow, timeout=0.01)
        await stage.end()
        stage.start(quiet)
        if close:
            stage.runner.close()

    for turn in (1, 2, 3):
        asyncio.run(main())
        assert len(seen) == turn
    assert [type(error) for _, error in stage.ended] == [type(None), HandlerTimeout] * 3


def test_asyncio_run_cancels_handlers_that_still_run_and_they_are_reported() -> None:
    stage = Stage()
    cleaned: list[str] = []

    async def slow(event: object) -> None:
        try:
            await asyncio.sleep(60)
        finally:
            cleaned.append("up")

    async def main() -> None:
        stage.start(slow, quiet)
        await asyncio.sleep(0)
        stage.start(slow)  # this one's task has not had its first turn

    asyncio.run(main())
    assert cleaned == ["up", "up"]
    assert stage.errors() == {"slow": "CancelledError"}
    assert not stage.runner.running


def test_what_ran_on_a_loop_that_was_closed_is_reported_from_the_next_one() -> None:
    stage = Stage()
    first, second = asyncio.new_event_loop(), asyncio.new_event_loop()

    async def waits(event: object) -> None:
        await asyncio.sleep(60)

    async def begin() -> None:
        stage.start(waits, quiet)
        await asyncio.sleep(0)

    async def go_on() -> None:
        stage.start(quiet, yielding)
        await stage.end()

    first.run_until_complete(begin())
    first.close()
    second.run_until_complete(go_on())
    second.close()
    assert [(label, type(error)) for label, error in stage.ended] == [
        ("waits", BusStateError),
        ("yielding", type(None)),
    ]


def test_an_idle_task_is_collected_in_silence_with_its_loop() -> None:
    stage = Stage()

    async def begin() -> None:
        stage.start(quiet)

    async def begin_and_turn() -> None:
        stage.start(quiet)
        await asyncio.sleep(0)

    for main in (begin, begin_and_turn):
        loop = asyncio.new_event_loop()
        loop.run_until_complete(main())
        loop.close()
    stage.runner = Runner()
    gc.collect()  # and the fixture looks


async def test_memory_stays_flat(stage: Stage) -> None:
    kept: list[object] = []

    async def fails(event: object) -> None:
        raise ValueError("no")

    async def touches(event: object) -> None:
        mine().set_name("mine")

    async def rounds(count: int) -> None:
        for _ in range(count):
            stage.start(quiet, touches, fails, yielding, timeout=30)
            await stage.end()
            stage.failed.clear()
            stage.ended.clear()

    await rounds(100)
    gc.collect()
    tracemalloc.start()
    try:
        await rounds(50)
        gc.collect()
        before, _ = tracemalloc.get_traced_memory()
        await rounds(1000)
        gc.collect()
        after, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert after - before < 20_000
    assert kept == []
    assert not stage.runner.running


async def test_the_debug_mode_of_asyncio_finds_nothing_to_complain_of(stage: Stage) -> None:
    asyncio.get_running_loop().set_debug(True)
    stage.start(quiet, yielding)
    with contextlib.suppress(CancelledError):
        await stage.end()
    stage.start(quiet, yielding)
    await stage.end()
    assert stage.errors() == {}


@pytest.mark.skipif(sys.version_info < (3, 12), reason="eager tasks came with Python 3.12")
async def test_eager_tasks_may_start_handlers_and_be_made_by_them(stage: Stage) -> None:
    asyncio.get_running_loop().set_task_factory(vars(asyncio)["eager_task_factory"])
    seen: list[str] = []

    async def child() -> None:
        seen.append("child")
        await asyncio.sleep(0)

    async def makes_a_task(event: object) -> None:
        own = mine()
        task = asyncio.create_task(child())
        assert asyncio.current_task() is own
        await task
        assert asyncio.current_task() is own

    async def publisher() -> None:
        own = mine()
        stage.start(quiet, makes_a_task, yielding)
        assert asyncio.current_task() is own

    await asyncio.create_task(publisher())
    await stage.end()
    assert seen == ["child"]
    assert stage.errors() == {}
