"""Runs handlers: at once, and in a task of its own only if it suspends.

Most handlers of a fact end without ever waiting; a task, a timer and two turns of the loop for each of them cost more
than the handlers do. So a handler's coroutine is stepped in place once. Only if it waits for something does a task take
it over from there.

While it is stepped the current task must be the one that may take it over: `asyncio.timeout`, `TaskGroup` and cancel
scopes ask `current_task()` when they are entered, and cancel that. A *seat* holds such a task, real and idle. It is
`current_task()` during the first step, and serves the next handler if that step neither suspended nor left a trace on
it: a reference to the task, a weak one, a cancellation, a callback, a name, an attribute. What that does not cover is
listed in docs/decisions/0002-handlers-are-stepped-in-place.md.
"""

from __future__ import annotations

import asyncio
import sys
import types
from asyncio import AbstractEventLoop, CancelledError, Future, Task, TimerHandle
from asyncio.tasks import _register_task, _unregister_task
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator, Sequence
from contextvars import Context
from sys import getrefcount
from types import CoroutineType
from typing import Any, Final, Self, TypeAlias, TypeGuard
from weakref import getweakrefcount

from whereupon.errors import BusStateError, HandlerTimeout

_DONE: Final = object()
_NAME: Final = "whereupon-handler"
_UNCANCEL_CLEARS: Final = sys.version_info >= (3, 13)

Call: TypeAlias = tuple[Callable[[Any], Awaitable[None]], float | None, Any]
"""A handler, the seconds it may take once it has suspended, and a label of the caller's for it."""
Errand: TypeAlias = tuple[Callable[[Any], Awaitable[None]], Any, Context, float | None, Any]
"""A call with an argument and a context of its own, for `Runner.start_each`."""

try:
    from asyncio.tasks import _swap_current_task  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # Python 3.11
    _current_tasks: Final[dict[AbstractEventLoop, Task[Any]]] = vars(asyncio.tasks)["_current_tasks"]

    def _swap_current_task(loop: AbstractEventLoop, task: Task[Any] | None) -> Task[Any] | None:
        previous = _current_tasks.pop(loop, None)
        if task is not None:
            _current_tasks[loop] = task
        return previous


class HandlerTask(Task[None]):
    """A task that knows whether anything was done to it."""

    __slots__ = ("touched",)
    touched: bool

    def __setattr__(self, name: str, value: Any) -> None:
        super().__setattr__("touched", True)
        super().__setattr__(name, value)

    def cancel(self, msg: Any = None) -> bool:
        super().__setattr__("touched", True)
        return super().cancel(msg)

    def set_name(self, value: object, /) -> None:
        super().__setattr__("touched", True)
        super().set_name(value)

    def add_done_callback(self, callback: Callable[[Self], object], /, *, context: Context | None = None) -> None:
        super().__setattr__("touched", True)
        super().add_done_callback(callback, context=context)


_set = object.__setattr__  # past HandlerTask's own


class Seat:
    """A task that waits for a handler to take over, and then runs it to its end."""

    __slots__ = (
        "argument",
        "context",
        "coroutine",
        "dismissed",
        "ended",
        "error",
        "hidden",
        "house",
        "inbox",
        "label",
        "loop",
        "steps",
        "stopped",
        "task",
        "timeout",
        "waits_for",
    )

    label: Any
    argument: Any
    coroutine: Any
    steps: Iterator[Any] | None
    """What is left of the handler; None while no handler was taken over."""
    context: Context
    waits_for: Any
    ended: Callable[[Seat, BaseException | None], None]

    def __init__(self, house: _House, loop: AbstractEventLoop) -> None:
        self.house = house
        self.loop = loop
        self.steps = None
        self.error: BaseException | None = None
        """What a handler raised that never suspended, but whose task somebody keeps."""
        self.inbox: Future[None] | None = None
        self.dismissed = self.hidden = False
        self.timeout: float | None = None
        self.stopped: str | None = None
        """Why whereupon cancelled it."""
        driver = _drive(self)
        driver.send(None)  # a task that is cancelled before its first step would drop a coroutine that has not begun
        self.task = HandlerTask(driver, loop=loop, name=_NAME, context=Context())
        _set(self.task, "touched", False)

    def hide(self) -> None:
        """Idle, it is nobody's business: not of those who wait for all tasks, nor of those who look for lost ones."""
        self.hidden = True
        _unregister_task(self.task)
        _set(self.task, "_log_destroy_pending", False)

    def take_over(self) -> None:
        """Go on with the handler from its first suspension."""
        if self.hidden:
            self.hidden = False
            _register_task(self.task)
            _set(self.task, "_log_destroy_pending", True)
        if self.inbox is not None and not self.inbox.done():
            self.inbox.set_result(None)

    def dismiss(self, error: BaseException | None = None) -> None:
        """End the task as the handler ended, for whoever keeps it."""
        if not self.dismissed:
            self.dismissed, self.error = True, error
            _set(self.task, "touched", True)
            self.take_over()

    def stop(self, why: str) -> None:
        self.stopped = why
        self.task.cancel()

    def end(self, error: BaseException | None) -> None:
        if self.stopped is not None and isinstance(error, CancelledError):
            error = HandlerTimeout(self.stopped)
        house = self.house
        house.running.pop(self, None)
        if self.timeout is not None:
            house.deadlines[self.timeout].pop(self, None)
        self.ended(self, error)


class _House:
    """The seats of one event loop."""

    def __init__(self, loop: AbstractEventLoop | None, *, contains_exits: bool = False) -> None:
        self.loop = loop
        self.contains_exits = contains_exits
        self.idle: list[Seat] = []
        self.running: dict[Seat, None] = {}
        self.deadlines: dict[float, dict[Seat, float]] = {}
        self.timers: dict[float, TimerHandle] = {}

    def limit(self, seat: Seat, timeout: float) -> None:
        """Note when the handler's time is up. Handlers of one timeout expire as they came, so they share a timer."""
        seat.timeout = timeout
        waiting = self.deadlines.get(timeout)
        if waiting is None:
            waiting = self.deadlines[timeout] = {}
        waiting[seat] = seat.loop.time() + timeout
        if timeout not in self.timers:
            self.timers[timeout] = seat.loop.call_later(timeout, self._expire, seat.loop, timeout, context=Context())

    def _expire(self, loop: AbstractEventLoop, timeout: float) -> None:
        del self.timers[timeout]
        waiting = self.deadlines[timeout]
        now = loop.time()
        for seat, deadline in list(waiting.items()):
            if deadline > now:
                self.timers[timeout] = loop.call_at(deadline, self._expire, loop, timeout)
                break
            del waiting[seat]
            seat.stop(f"it ran longer than its {timeout:g} s and was cancelled")


async def _drive(seat: Seat) -> None:
    await _steps_of(seat)


@types.coroutine
def _steps_of(seat: Seat) -> Generator[Any, Any, None]:
    failure = yield from _until_taken_over(seat)
    steps = seat.steps
    if steps is None:
        if failure is not None:
            seat.task.add_done_callback(_seen)
            raise failure
        return
    run, throw, waits_for = seat.context.run, seat.coroutine.throw, seat.waits_for
    closing = False
    try:
        if failure is not None:
            # as a task does that is cancelled while it waits: cancel what it waits for, and see what comes of it
            if _is_future(waits_for) and waits_for.cancel(*failure.args):
                failure = None
        elif waits_for is None:  # it asked for one turn of the loop, and has had it
            waits_for = run(next, steps, _DONE)
        if _is_future(waits_for):
            waits_for._asyncio_future_blocking = True
        while waits_for is not _DONE:
            if failure is None:
                try:
                    yield waits_for
                except GeneratorExit:
                    closing = True
                    run(seat.coroutine.close)
                    raise
                except BaseException as error:
                    failure = error
            if failure is None:
                waits_for = run(next, steps, _DONE)
            else:
                thrown, failure = failure, None
                try:
                    waits_for = run(throw, thrown)
                except StopIteration:
                    break
                finally:
                    del thrown
    except BaseException as error:
        if not closing:
            seat.end(error)
            if seat.house.contains_exits and isinstance(error, SystemExit):
                return  # raised from a task it would end the event loop
            # whoever kept the task finds the error there; it counts as seen, since the bus was told
            seat.task.add_done_callback(_seen)
        raise
    seat.end(None)


def _until_taken_over(seat: Seat) -> Generator[Any, Any, BaseException | None]:
    """Wait for a handler to take over, or for the dismissal; return what is to be raised then."""
    failure: BaseException | None = None
    try:
        yield  # until the task's first step
        if seat.steps is None and not seat.dismissed:
            seat.inbox = seat.loop.create_future()
            yield from seat.inbox
    except CancelledError as error:
        if seat.task.cancelling() or not _UNCANCEL_CLEARS or seat.inbox is None:
            failure = error
    except GeneratorExit:
        if seat.steps is not None:
            seat.context.run(seat.coroutine.close)
        raise
    if failure is None:
        failure, seat.error = seat.error, None
    return failure


def _is_future(waits_for: Any) -> TypeGuard[Future[Any]]:
    return getattr(waits_for, "_asyncio_future_blocking", None) is not None


def _seen(task: Task[None]) -> None:
    if not task.cancelled():
        task.exception()


async def _awaiting(awaitable: Awaitable[None]) -> None:
    """Make a coroutine of what a handler returned that is marked async, but is not an `async def`."""
    await awaitable


def _nobody(seat: Seat, error: BaseException | None) -> None:
    """Its end was reported before."""


class Runner:
    """Runs the handlers of one bus, on one event loop at a time.

    With `contain_exits` a `SystemExit` of a handler that had suspended ends that handler, and not the event loop.
    """

    def __init__(self, *, contain_exits: bool = False) -> None:
        self._contain_exits = contain_exits
        self._house = _House(None)
        self._houses: dict[AbstractEventLoop, _House] = {}

    @property
    def running(self) -> dict[Seat, None]:
        """Handlers that suspended and have not ended; kept alive here."""
        return self._house.running

    def start(
        self,
        calls: Iterable[Call],
        argument: Any,
        context: Context,
        failed: Callable[[Any, Any, BaseException], None],
        ended: Callable[[Seat, BaseException | None], None],
    ) -> Sequence[Seat]:
        """Call each handler with `argument` in a copy of `context`, as far as it gets without waiting.

        Returns the seats of those that wait for something. `failed(label, argument, error)` is called at once for a
        handler that raised by then, `ended(seat, error)` from its task when one that waited is over; neither may raise.
        `SystemExit` and `KeyboardInterrupt` go to the caller.
        """
        return self._start(calls, False, argument, context, failed, ended)

    def start_each(
        self,
        errands: Iterable[Errand],
        failed: Callable[[Any, Any, BaseException], None],
        ended: Callable[[Seat, BaseException | None], None],
        waiting: Callable[[Any, Seat], None],
    ) -> None:
        """As `start`, for calls with arguments and contexts of their own; one is taken once the one before is done.

        `waiting(label, seat)` is called for a handler that waits for something. What makes the errands runs in the
        place of a handler's task, so it must not touch the current one.
        """
        self._start(errands, True, None, None, failed, ended, waiting)

    def _start(
        self,
        calls: Iterable[Any],
        each: bool,
        argument: Any,
        context: Any,
        failed: Callable[[Any, Any, BaseException], None],
        ended: Callable[[Seat, BaseException | None], None],
        waiting: Callable[[Any, Seat], None] | None = None,
    ) -> Sequence[Seat]:
        loop = asyncio.get_running_loop()
        house = self._house
        if house.loop is not loop:
            house = self.move_to(loop)
        idle = house.idle
        seat = idle.pop() if idle else Seat(house, loop)
        task = seat.task
        free = True
        coroutine: Any = None
        steps: Any = None
        own = context
        suspended: list[Seat] | tuple[()] = ()
        publisher = _swap_current_task(loop, task)
        try:
            # the loop below runs no callback, so whatever raises these numbers is a handler's doing
            references, watchers = getrefcount(task), getweakrefcount(task)
            for call in calls:
                if each:
                    function, argument, context, timeout, label = call
                else:
                    function, timeout, label = call
                if not free:
                    seat = Seat(house, loop)
                    task = seat.task
                    free = True
                    _swap_current_task(loop, task)
                    references, watchers = getrefcount(task), getweakrefcount(task)
                try:
                    coroutine = function(argument)
                    if type(coroutine) is not CoroutineType:
                        coroutine = _awaiting(coroutine)
                    steps = coroutine.__await__()
                    own = context.copy()
                    waits_for = own.run(next, steps, _DONE)
                except (KeyboardInterrupt, SystemExit):
                    raise
                except BaseException as error:
                    waits_for = _DONE
                    failed(label, argument, error)
                    if getrefcount(task) != references or task.touched:
                        seat.dismiss(error)
                if waits_for is not _DONE:
                    if waits_for is not None and _is_future(waits_for):
                        # who awaits a future marks it, for the task to see; the next one to await it finds no mark
                        waits_for._asyncio_future_blocking = False
                    free = False
                    suspended = [*suspended, seat]
                    seat.label, seat.argument, seat.coroutine, seat.steps = label, argument, coroutine, steps
                    seat.context, seat.waits_for, seat.ended = own, waits_for, ended
                    house.running[seat] = None
                    if timeout is not None:
                        house.limit(seat, timeout)
                    seat.take_over()
                    if waiting is not None:
                        waiting(label, seat)
                elif getrefcount(task) != references or getweakrefcount(task) != watchers or task.touched:
                    free = False
                    seat.dismiss()
        except BaseException:
            if free:
                free = False
                seat.dismiss()
            raise
        finally:
            _swap_current_task(loop, publisher)
        if free:
            if not seat.hidden:
                seat.hide()
            idle.append(seat)
        return suspended

    def move_to(self, loop: AbstractEventLoop) -> _House:
        """Serve this event loop from now on. What still ran on one that was closed is over, and reported so."""
        for other in [one for one in self._houses if one.is_closed()]:
            house = self._houses.pop(other)
            for seat in list(house.running):
                _set(seat.task, "_log_destroy_pending", False)
                seat.end(BusStateError("its event loop was closed while it ran"))
                seat.ended = _nobody
        self._house = self._houses.setdefault(loop, _House(loop, contains_exits=self._contain_exits))
        return self._house

    def stop(self, why: str) -> list[Task[None]]:
        """Cancel every handler that runs; return their tasks."""
        tasks: list[Task[None]] = []
        for seat in list(self._house.running):
            seat.stop(why)
            tasks.append(seat.task)
        return tasks

    def abandon(self, why: str) -> None:
        """Report those that run on although they were cancelled, and forget them."""
        for seat in list(self._house.running):
            seat.end(HandlerTimeout(f"{why}, but runs on"))
            seat.ended = _nobody

    def close(self) -> None:
        """Let go of the idle tasks and the timers; handlers that still run are left alone."""
        house = self._house
        for timer in house.timers.values():
            timer.cancel()
        house.timers.clear()
        if house.loop is not None and not house.loop.is_closed():
            for seat in house.idle:
                seat.dismiss()
        house.idle.clear()
