"""What tests need: publishing without a session, on purpose, and for other stores the suite that every store passes.

`StoreContract` and `ConcurrentStoreContract` need pytest; they are loaded when they are asked for.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from whereupon.contract import ConcurrentStoreContract as ConcurrentStoreContract
    from whereupon.contract import StoreContract as StoreContract
    from whereupon.durable import EventBus

__all__ = ["ConcurrentStoreContract", "StoreContract", "own_transactions"]


def __getattr__(name: str) -> Any:
    if name not in ("ConcurrentStoreContract", "StoreContract"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    import sys

    import pytest

    if "whereupon.contract" not in sys.modules:
        pytest.register_assert_rewrite("whereupon.contract")  # a failed assertion shows its values
    import whereupon.contract

    return getattr(whereupon.contract, name)


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
