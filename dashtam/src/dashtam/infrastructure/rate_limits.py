"""Tries, counted in the database."""

import hashlib
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Final

from sqlalchemy import delete

from dashtam.application.rate_limit import TooManyAttempts
from dashtam.domain.user import email_key
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.rows import insert
from dashtam.infrastructure.tables import RateLimitModel
from whereupon import current_metadata


@dataclass(frozen=True, slots=True, kw_only=True)
class Limit:
    """Tries within `seconds`. A client is an IP address."""

    seconds: int
    of_client: int
    for_email: int
    of_client_for_email: int


LIMITS: Final[Mapping[str, Limit]] = {
    # Those for one address from anywhere are many: else anybody could keep somebody else from logging in.
    "login": Limit(seconds=15 * 60, of_client=100, for_email=100, of_client_for_email=10),
    "password_change": Limit(seconds=15 * 60, of_client=100, for_email=10, of_client_for_email=10),
    "password_reset": Limit(seconds=60 * 60, of_client=30, for_email=9, of_client_for_email=3),
    "password_reset_confirm": Limit(seconds=60 * 60, of_client=30, for_email=30, of_client_for_email=30),
    "email_verification": Limit(seconds=60 * 60, of_client=100, for_email=100, of_client_for_email=100),
    "registration": Limit(seconds=60 * 60, of_client=100, for_email=10, of_client_for_email=4),
}


class SqlRateLimits:
    """Windows of a fixed length: where two of them meet, up to twice as many tries fit in.

    A package for this would keep its counts in memory, so for each process alone, or on a server that nobody else here
    needs. What is counted is stored as a hash.
    """

    def __init__(self, database: Database, *, factor: float = 1.0) -> None:
        """`factor` times as many tries as usual may be made: more where many people share one address."""
        self._database = database
        self._factor = factor

    async def count(self, what: str, *, email: str | None = None) -> None:
        limit, now = LIMITS[what], time.time()
        window = int(now // limit.seconds)
        ends_at = (window + 1) * limit.seconds
        most = {key: math.ceil(number * self._factor) for key, number in _counted(what, limit, email)}
        # One transaction of its own, and in one order: two that count the same never wait for each other in a circle.
        async with self._database.get_session() as session:
            counts: dict[str, int] = {}
            for key in sorted(most):
                statement = insert(session, RateLimitModel).values(key=key, window=window, count=1, ends_at=ends_at)
                statement = statement.on_conflict_do_update(
                    index_elements=["key", "window"], set_={"count": RateLimitModel.count + 1}
                )
                counts[key] = (await session.execute(statement.returning(RateLimitModel.count))).scalar_one()
            if any(count > most[key] for key, count in counts.items()):
                # Which undoes this count: one client's tries that are refused keep nobody else from theirs.
                raise TooManyAttempts(max(1, math.ceil(ends_at - now)))
        if 1 in counts.values():
            # Who is first in a window clears away what is over, of everybody; in another transaction, as two that hold
            # a count each, and clear away the same, could wait for each other.
            async with self._database.get_session() as session:
                await session.execute(delete(RateLimitModel).where(RateLimitModel.ends_at < now))

    async def forgive(self, what: str, *, email: str) -> None:
        client = current_metadata().ip_address
        async with self._database.get_session() as session:
            await session.execute(delete(RateLimitModel).where(RateLimitModel.key == _key(what, client, email)))


def _counted(what: str, limit: Limit, email: str | None) -> list[tuple[str, int]]:
    client = current_metadata().ip_address
    counted = []
    if client is not None:
        counted.append((_key(what, client, None), limit.of_client))
    if email is not None:
        counted.append((_key(what, None, email), limit.for_email))
        counted.append((_key(what, client, email), limit.of_client_for_email))
    return counted


def _key(what: str, client: str | None, email: str | None) -> str:
    named = "\0".join((what, client or "", email_key(email or "")))
    return hashlib.sha256(named.encode("utf-8", "surrogatepass")).hexdigest()
