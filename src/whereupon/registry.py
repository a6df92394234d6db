"""Subscriptions and workers as the database has them, for whoever looks at them from outside a worker."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any

import msgspec
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.event import DomainEvent
from whereupon.schema import process
from whereupon.schema import subscription as subscription_table
from whereupon.store import Store


@dataclass(frozen=True, slots=True)
class Registered:
    """A subscription as the database has it."""

    name: str
    paused: bool
    definition: str
    types: frozenset[str] | None
    """The names of the events that it hears; None: all."""
    lanes: int
    ordered_by: str | None
    created_at: datetime

    def stored_names(self, class_of: Callable[[str], type[DomainEvent] | None]) -> list[str] | None:
        """Under which names the log has what it hears: those of its events, and older ones; None: all."""
        return None if self.types is None else with_aliases(self.types, class_of)

    def hears(self, stored_name: str, class_of: Callable[[str], type[DomainEvent] | None]) -> bool:
        if self.types is None or stored_name in self.types:
            return True
        cls = class_of(stored_name)
        return cls is not None and cls.__event__.name in self.types  # stored under an older name


def with_aliases(names: Iterable[str], class_of: Callable[[str], type[DomainEvent] | None]) -> list[str]:
    found = set(names)
    for name in tuple(found):
        if (cls := class_of(name)) is not None:
            found.update(cls.__event__.aliases)
    return sorted(found)


async def registered(connection: AsyncConnection) -> list[Registered]:
    """All of them, by name."""
    rows = await connection.execute(select(subscription_table).order_by(subscription_table.c.name))
    found = []
    for row in rows:
        types = msgspec.json.decode(row.definition, type=dict[str, Any])["types"]
        heard = None if types == ["*"] else frozenset(types)
        found.append(
            Registered(row.name, bool(row.paused), row.definition, heard, row.lanes, row.ordered_by, row.created_at)
        )
    return found


async def alive(connection: AsyncConnection, store: Store) -> list[set[str]]:
    """What each live worker serves."""
    rows = await connection.execute(
        select(process.c.serves).where(process.c.in_flight > 0, process.c.lease_until > store.now)
    )
    return [set(msgspec.json.decode(row.serves, type=list[str])) for row in rows]
