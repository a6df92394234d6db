"""One attempt, one outcome."""

import asyncio
from collections.abc import Awaitable, Callable
from typing import TypeVar

from dashtam.domain.result import Error, Failure, Result
from whereupon import DomainEvent, EventBusProtocol

T = TypeVar("T")
E = TypeVar("E", bound=Error)

_under_way: set[asyncio.Task[object]] = set()


async def attempt(
    bus: EventBusProtocol,
    attempted: DomainEvent,
    work: Callable[[], Awaitable[Result[T, E]]],
    *,
    failed: Callable[[str], DomainEvent],
) -> Result[T, E]:
    """Publish `attempted`, do the work, and publish `failed(reason)` if it answers with a failure or raises.

    *Attempted* is stored before the work starts; *Succeeded* is the work's own to publish, in its transaction. What
    the work raises is raised again. A caller that is cancelled waits for the work to end: cut off in the middle of a
    commit, nobody could tell which outcome it had.
    """
    task: asyncio.Task[Result[T, E]] = asyncio.create_task(_run(bus, attempted, work, failed))
    _under_way.add(task)  # the loop itself keeps no task alive
    task.add_done_callback(_under_way.discard)
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        if not task.done():
            await asyncio.wait([task])
        if not task.cancelled():
            task.exception()  # was published as a failure; nobody is left to hear of it
        raise


async def _run(
    bus: EventBusProtocol,
    attempted: DomainEvent,
    work: Callable[[], Awaitable[Result[T, E]]],
    failed: Callable[[str], DomainEvent],
) -> Result[T, E]:
    await bus.publish(attempted)
    try:
        result = await work()
    except Error as error:
        await bus.publish(failed(error.reason))
        raise
    except BaseException:
        await bus.publish(failed("internal_error"))
        raise
    if isinstance(result, Failure):
        await bus.publish(failed(result.error.reason))
    return result
