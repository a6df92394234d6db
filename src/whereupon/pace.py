"""How fast operators let long work go."""

from __future__ import annotations

import asyncio
import time

from whereupon.errors import ActionRefused


def check_rate(what: str, rate: float | None) -> None:
    """Raises `ActionRefused` for a rate at which the work would never end."""
    if rate is not None and not 0 < rate < float("inf"):
        raise ActionRefused(f"{what} at {rate} a second: a rate is a number above 0, left out where there is none")


class Pace:
    """Holds work that is done in steps to `rate` a second; with None it goes as fast as it can.

    A step should take `at_once` at most. Raises `ActionRefused` for a rate of 0 or less.
    """

    def __init__(self, what: str, rate: float | None, most_at_once: int) -> None:
        check_rate(what, rate)
        self.at_once = most_at_once if rate is None else max(1, min(most_at_once, int(rate)))
        self._rate = rate
        self._began = time.monotonic()

    async def keep(self, done: int) -> None:
        """Wait until so many may have been done since the beginning."""
        if self._rate is not None and (early := self._began + done / self._rate - time.monotonic()) > 0:
            await asyncio.sleep(early)
