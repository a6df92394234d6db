"""What tests of an application need: publishing without a session, on purpose."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from whereupon.durable import EventBus

__all__ = ["own_transactions"]


@contextlib.contextmanager
def own_transactions(bus: EventBus) -> Iterator[EventBus]:
    """In this block, `publish` without a session commits the event by itself instead of raising `SessionRequiredError`.

    For tests that care about handlers and not about the change, and for scripts that replay facts by hand. It is for
    the whole bus, so not for a process that serves requests.
    """
    before = bus._own_transactions
    bus._own_transactions = True
    try:
        yield bus
    finally:
        bus._own_transactions = before
