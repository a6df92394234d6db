"""Blocks that define an event of Dashtam's, run where Dashtam is not imported: one name is defined once in a process.

`python -m guide.alone NAME` runs the block of that name; what came of it is asserted, and shown by a traceback.
"""

import asyncio
import doctest
import inspect
import sys
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import FrozenInstanceError
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import uuid4

import pytest

from guide import Block, block, run, statements
from whereupon import DomainEvent, InMemoryEventBus


def assert_fact(event: DomainEvent) -> None:
    """It has an id and a time of its own, and nothing in it can be changed."""
    assert event.event_id.version == 7
    assert event.occurred_at.tzinfo is UTC
    assert abs(datetime.now(UTC) - event.occurred_at) < timedelta(minutes=1)
    for field in type(event).__event__.fields:
        before = getattr(event, field)
        with pytest.raises(FrozenInstanceError, match=field):
            setattr(event, field, None)
        assert getattr(event, field) == before


async def account_created(printed: Block) -> None:
    names = await printed.run()
    cls: type[DomainEvent] = names["AccountCreated"]
    ids = {name: uuid4() for name in ("user_id", "provider_id", "account_id")}
    positional: tuple[Any, ...] = (*ids.values(), "checking", 1000.0)
    with pytest.raises(TypeError, match="positional"):
        cls(*positional)

    heard: list[DomainEvent] = []
    bus = InMemoryEventBus()

    @bus.subscribe(cls)
    async def keep(event: DomainEvent) -> None:
        heard.append(event)

    # The example in its docstring makes one and publishes it.
    names |= ids | {"event_bus": bus}
    for example in doctest.DocTestParser().get_examples(inspect.getdoc(cls) or ""):
        await run(statements(example.source, "the docstring's example"), names)
    (event,) = heard
    assert event is names["event"]
    assert {name: getattr(event, name) for name in ids} == ids
    assert_fact(event)


async def events_module(printed: Block) -> None:
    fields = "    user_id: UUID\n    account_id: UUID\n"
    filled = printed.filled_in(
        lambda source: source.replace("# ... (event definition)\n", f"# ... (event definition)\n{fields}")
    )
    names = await run(filled.statements(), printed.namespace())
    for name in ("AccountCreated", "AccountUpdated", "AccountClosed"):
        assert_fact(names[name](user_id=uuid4(), account_id=uuid4()))


async def past_tense(printed: Block) -> None:
    cls = (await printed.run())["UserRegistrationSucceeded"]
    user_id = uuid4()
    event = cls(user_id=user_id, email="ada@example.com")
    assert (event.user_id, event.email) == (user_id, "ada@example.com")
    assert_fact(event)


async def immutable_event(printed: Block) -> None:
    *define, change = printed.statements()
    names = await run(define, printed.namespace())
    names["event"] = names["UserRegistrationSucceeded"](user_id=uuid4(), email="ada@example.com")
    with pytest.raises(FrozenInstanceError, match="email"):
        await run([change], names)
    assert names["event"].email == "ada@example.com"
    assert_fact(names["event"])


ALONE: Final[Mapping[str, Callable[[Block], Awaitable[None]]]] = {
    "03-event-dataclass": account_created,
    "04-events-module": events_module,
    "25-past-tense": past_tense,
    "27-immutable-event": immutable_event,
}


async def main(name: str) -> None:
    await ALONE[name](block(name))


if __name__ == "__main__":
    asyncio.run(main(sys.argv[1]))
