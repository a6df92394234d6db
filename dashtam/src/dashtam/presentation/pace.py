"""Answers that take as long, whatever they are."""

import asyncio
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager


class Pace:
    """Holds an answer back until `seconds` after it was asked for.

    What depends on whether an address is registered would show in how long it takes, however alike the answers are.
    """

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    @asynccontextmanager
    async def kept(self) -> AsyncIterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            # The next whole multiple: what takes longer than usual is held back alike.
            spent = time.monotonic() - began
            if self._seconds > 0:
                await asyncio.sleep(self._seconds - spent % self._seconds)
