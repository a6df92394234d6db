"""What nobody asks for and has to be done all the same, again and again."""

import asyncio
import random
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Final, Protocol

from dashtam.application.database import DatabaseProtocol
from dashtam.application.logger import LoggerProtocol

FORGOTTEN_AT_ONCE: Final = 1_000
"""Rows of one transaction: on SQLite everybody else waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chore:
    name: str
    do: Callable[[], Awaitable[None]]
    every: timedelta


class Upkeep:
    """Runs chores, each at its own pace. Every process that serves has one, and it does no harm if two do the same."""

    def __init__(self, chores: Sequence[Chore], logger: LoggerProtocol) -> None:
        self.chores = chores
        self._logger = logger

    async def run(self) -> None:
        """Until it is cancelled."""
        async with asyncio.TaskGroup() as group:
            for chore in self.chores:
                group.create_task(self._repeat(chore))

    async def _repeat(self, chore: Chore) -> None:
        while True:
            await asyncio.sleep(random.uniform(0.8, 1) * chore.every.total_seconds())  # not all processes at once
            try:
                await chore.do()
            except Exception as error:  # whatever it is, the next round may do better
                self._logger.error("upkeep_failed", chore=chore.name, error_type=type(error).__name__, exc_info=error)


class Expiring(Protocol):
    """Rows that have an end. Each call joins the database session of its caller."""

    async def forget_ended(self, before: datetime, limit: int) -> int:
        """Delete, of those that ended before then, so many at most; how many it were."""
        ...


class Forgetting:
    """Deletes sessions and one-time tokens a while after their end. What happened to them is in the audit log."""

    def __init__(self, repositories: Sequence[Expiring], database: DatabaseProtocol, kept: timedelta) -> None:
        self._repositories = repositories
        self._database = database
        self._kept = kept

    async def forget(self) -> None:
        before = datetime.now(UTC) - self._kept
        for repository in self._repositories:
            forgotten = FORGOTTEN_AT_ONCE
            while forgotten == FORGOTTEN_AT_ONCE:
                async with self._database.get_session():
                    forgotten = await repository.forget_ended(before, FORGOTTEN_AT_ONCE)
