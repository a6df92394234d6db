"""Runs handlers: at once, and in a task of its own only if it suspends.

Most handlers of a fact end without ever waiting; a task, a timer and two turns of the loop for each of them cost more than
the handlers do. So a handler's coroutine is stepped in place once. Only if it waits for something does a task take it over
from there.

While it is stepped the current task must be the one that may take it over: `asyncio.timeout`, `TaskGroup` and cancel scopes
ask `current_task()` when they are entered, and cancel that. A *seat* is such a task, real and idle. It is `current_task()`
during the first step, and serves the next handler if that step neither suspended nor left a trace on it.
"""

from __future__ import annotations

import asyncio
import types
from asyncio import AbstractEventLoop, CancelledError, Future, Task, TimerHandle
from asyncio.tasks import _enter_task, _leave_task
from collections.abc import Awaitable, Callable, Generator, Iterable, Iterator
from contextvars import Context
from sys import getrefcount
from typing import Any, Final, TypeAlias
from weakref import getweakrefcount

from whereupon.errors import HandlerTimeout

_DONE: Final = object()
_NAME: Final = "whereupon-handler"

Call: TypeAlias = tuple[Callable[[Any], Awaitable[None]], float | None, Any]
"""A handler, the seconds it may take once it has suspended, and a label of the caller's for it."""

try:
    from asyncio.tasks import _swap_current_task  # type: ignore[attr-defined,unused-ignore]
except ImportError:  # Python 3.11

    def _swap_current_task(loop: AbstractEventLoop, task: Task[Any] | None) -> Task[Any] | None:
        previous = asyncio.current_task(loop)
        if previous is not None:
            _leave_task(loop, previous)
        if task is not None:
            _enter_task(loop, task)
        return previous


class Seat:
    """A task that waits for a handler to take over, and then runs it to its end."""

    label: Any
    argument: Any
    steps: Iterator[Any] | None = None
    coroutine: Any
    context: Context
    waits_for: Any
    inbox: Future[None] | None = None
    dismissed = False
    timeout: float | None = None
    expired = False
    ended: Callable[[Seat, BaseException | None], None]

    def __init__(self, runner: Runner, loop: AbstractEventLoop) -> None:
        self.runner = runner
        self.loop = loop
        driver = _drive(self)
        driver.send(None)  # a task that is cancelled before its first step would drop a coroutine that has not begun
        self.task: Task[None] = Task(driver, loop=loop, name=_NAME)

    def wake(self) -> None:
        if self.inbox is not None and not self.inbox.done():
            self.inbox.set_result(None)

    def dismiss(self) -> None:
        self.dismissed = True
        self.wake()

    def end(self, error: BaseException | None) -> None:
        if self.expired and isinstance(error, CancelledError):
            error = HandlerTimeout(f"it ran longer than its {self.timeout:g} s and was cancelled")
        self.runner.leave(self)
        self.ended(self, error)


async def _drive(seat: Seat) -> None:
    await _steps_of(seat)


@types.coroutine
def _steps_of(seat: Seat) -> Generator[Any, Any, None]:
    failure: BaseException | None = None
    try:
        yield  # until the task's first step
        if seat.steps is None and not seat.dismissed:
            seat.inbox = seat.loop.create_future()
            yield from seat.inbox
    except BaseException as error:
        failure = error
    if seat.steps is None:
        if failure is not None and not seat.dismissed:
            raise failure
        return
    run, steps = seat.context.run, seat.steps
    waits_for = seat.waits_for
    while True:
        if failure is not None and isinstance(failure, CancelledError) and waits_for is not None and waits_for.cancel():
            # as a task does that is cancelled while it waits: cancel what it waits for, and see what comes of it
            failure = None
        if failure is None:
            try:
                yield waits_for
            except GeneratorExit:
                seat.coroutine.close()
                raise
            except BaseException as error:
                failure = error
        try:
            if failure is None:
                waits_for = run(next, steps, _DONE)
                if waits_for is _DONE:
                    seat.end(None)
                    return
            else:
                thrown, failure, waits_for = failure, None, None
                waits_for = run(seat.coroutine.throw, thrown)
        except StopIteration:
            seat.end(None)
            return
        except CancelledError as error:
            seat.end(error)
            raise
        except Exception as error:
            seat.end(error)
            # whoever kept the task finds the error there; it counts as seen, since the bus was told
            seat.task.add_done_callback(lambda task: task.cancelled() or task.exception())
            raise


class Runner:
    """Runs the handlers of one bus, on one event loop at a time."""

    def __init__(self) -> None:
        self._spare: Seat | None = None
        self.running: dict[Seat, None] = {}
        """Handlers that suspended and have not ended; kept alive here."""
        self._deadlines: dict[float, dict[Seat, float]] = {}
        self._timers: dict[float, TimerHandle] = {}

    def start(
        self,
        calls: Iterable[Call],
        argument: Any,
        context: Context,
        failed: Callable[[Any, Any, BaseException], None],
        ended: Callable[[Seat, BaseException | None], None],
    ) -> int:
        """Call each handler with `argument` in a copy of `context`, as far as its first suspension; return how many suspended.

        `failed(label, argument, error)` is called at once for one that raised by then, `ended(seat, error)` from its task when
        one that suspended is over. What is neither an `Exception` nor a `CancelledError` (`SystemExit`) goes to the caller.
        """
        loop = asyncio.get_running_loop()
        seat = self._spare
        if seat is None or seat.loop is not loop or seat.task.done():
            seat = self._spare = Seat(self, loop)
        task = seat.task
        suspended = 0
        publisher = _swap_current_task(loop, task)
        try:
            references, watchers = getrefcount(task), getweakrefcount(task)
            for function, timeout, label in calls:
                try:
                    coroutine: Any = function(argument)
                    steps = coroutine.__await__()
                    own = context.copy()
                    waits_for = own.run(next, steps, _DONE)
                except (Exception, CancelledError) as error:
                    failed(label, argument, error)
                    waits_for = _DONE
                if waits_for is _DONE:
                    if (
                        getrefcount(task) == references  # nobody keeps the task,
                        and getweakrefcount(task) == watchers  # nor anything about it;
                        and not task.cancelling()  # it was not cancelled,
                        and task.get_name() is _NAME  # nor renamed
                    ):
                        continue
                    seat.dismiss()
                else:
                    suspended += 1
                    seat.label, seat.coroutine, seat.steps, seat.context = label, coroutine, steps, own
                    seat.waits_for, seat.ended, seat.argument = waits_for, ended, argument
                    self.running[seat] = None
                    if timeout is not None:
                        self._limit(seat, timeout)
                    if seat.inbox is not None:
                        seat.wake()
                _swap_current_task(loop, None)
                seat = self._spare = Seat(self, loop)
                task = seat.task
                _swap_current_task(loop, task)
                references, watchers = getrefcount(task), getweakrefcount(task)
        finally:
            _swap_current_task(loop, publisher)
        return suspended

    def leave(self, seat: Seat) -> None:
        self.running.pop(seat, None)
        if seat.timeout is not None:
            self._deadlines[seat.timeout].pop(seat, None)

    def _limit(self, seat: Seat, timeout: float) -> None:
        """Note when the handler's time is up. Handlers of one timeout expire in the order they came, so share a timer."""
        seat.timeout = timeout
        waiting = self._deadlines.setdefault(timeout, {})
        waiting[seat] = seat.loop.time() + timeout
        if timeout not in self._timers:
            self._timers[timeout] = seat.loop.call_later(timeout, self._expire, seat.loop, timeout)

    def _expire(self, loop: AbstractEventLoop, timeout: float) -> None:
        del self._timers[timeout]
        waiting = self._deadlines[timeout]
        now = loop.time()
        for seat, deadline in list(waiting.items()):
            if deadline > now and seat.loop is loop:
                self._timers[timeout] = loop.call_at(deadline, self._expire, loop, timeout)
                break
            del waiting[seat]
            if seat.loop is loop:
                seat.expired = True
                seat.task.cancel()

    def cancel(self) -> list[Task[None]]:
        """Cancel every handler that runs; return their tasks."""
        tasks = [seat.task for seat in self.running]
        for task in tasks:
            task.cancel()
        return tasks

    def close(self) -> None:
        """Let go of the idle task and the timers; handlers that still run are left alone."""
        for timer in self._timers.values():
            timer.cancel()
        self._timers.clear()
        if self._spare is not None and not self._spare.loop.is_closed():
            self._spare.dismiss()
        self._spare = None
