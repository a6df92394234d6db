"""Dead letters by what they died of, and what becomes of those that are tried again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.schema import exception
from whereupon.store import DEAD, PARKED, RUNNING, SKIPPED

MOST_COUNTED: Final = 10_000
"""Dead letters of one cause that are counted one by one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadGroup:
    """The dead letters of one subscription that died of one cause."""

    subscription: str
    fingerprint: str
    error_type: str | None
    error_message: str | None
    """Of the one that came last."""
    number: int
    more: bool
    """Whether there are more than were counted."""
    oldest: datetime
    """When the first of them failed for the last time, and the last one."""
    newest: datetime
    newest_event: UUID


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcomes:
    """What has become of dead letters since they were retried."""

    succeeded: int = 0
    skipped: int = 0
    """Which the handler discarded, or an operator skipped."""
    failed: int = 0
    parked: int = 0
    """Which wait behind another one of their key."""
    open: int = 0
    """Which nobody has tried yet, or which run."""


# Each group is found by a step through the index, however many letters it has; counting stops at its bound. A step that
# compares both columns as one row would walk through the rest of the subscription, on SQLite.
_GROUPS: Final = """
WITH RECURSIVE cause(subscription, fingerprint) AS (
    SELECT * FROM (
        SELECT subscription, fingerprint FROM whereupon_exception
        WHERE state = 'dead' AND subscription >= :first AND (:only IS NULL OR subscription = :only)
        ORDER BY subscription, fingerprint LIMIT 1
    ) AS first
    UNION ALL
    SELECT
        coalesce(
            (SELECT x.subscription FROM whereupon_exception x
             WHERE x.state = 'dead' AND x.subscription = c.subscription AND x.fingerprint > c.fingerprint
             ORDER BY x.fingerprint LIMIT 1),
            (SELECT x.subscription FROM whereupon_exception x
             WHERE x.state = 'dead' AND x.subscription > c.subscription
             ORDER BY x.subscription, x.fingerprint LIMIT 1)
        ),
        coalesce(
            (SELECT x.fingerprint FROM whereupon_exception x
             WHERE x.state = 'dead' AND x.subscription = c.subscription AND x.fingerprint > c.fingerprint
             ORDER BY x.fingerprint LIMIT 1),
            (SELECT x.fingerprint FROM whereupon_exception x
             WHERE x.state = 'dead' AND x.subscription > c.subscription
             ORDER BY x.subscription, x.fingerprint LIMIT 1)
        )
    FROM cause c WHERE c.subscription IS NOT NULL AND (:only IS NULL OR c.subscription = :only)
)
SELECT subscription, fingerprint,
    (SELECT count(*) FROM (
        SELECT 1 FROM whereupon_exception x WHERE x.state = 'dead' AND x.subscription = c.subscription
        AND x.fingerprint = c.fingerprint LIMIT :most
    ) AS counted) AS number,
    (SELECT min(x.id) FROM whereupon_exception x WHERE x.state = 'dead' AND x.subscription = c.subscription
     AND x.fingerprint = c.fingerprint) AS oldest,
    (SELECT max(x.id) FROM whereupon_exception x WHERE x.state = 'dead' AND x.subscription = c.subscription
     AND x.fingerprint = c.fingerprint) AS newest
FROM cause c
WHERE subscription IS NOT NULL AND (:only IS NULL OR subscription = :only)
LIMIT :limit
"""


async def dead_groups(connection: AsyncConnection, subscription: str | None, limit: int) -> list[DeadGroup]:
    """The causes by subscription, at most `limit`; two statements, whatever there is."""
    query = _GROUPS.replace(":only", "CAST(:only AS text)")
    found = (
        await connection.execute(
            text(query), {"first": subscription or "", "only": subscription, "most": MOST_COUNTED + 1, "limit": limit}
        )
    ).all()
    ids = [row_id for row in found for row_id in (row.oldest, row.newest)]
    columns = (exception.c.id, exception.c.event_id, exception.c.error_type, exception.c.error_message)
    ends = {
        row.id: row
        for row in await connection.execute(
            select(*columns, exception.c.updated_at).where(exception.c.id.in_(ids), exception.c.state == DEAD)
        )
    }
    return [
        DeadGroup(
            subscription=row.subscription,
            fingerprint=row.fingerprint,
            error_type=ends[row.newest].error_type,
            error_message=ends[row.newest].error_message,
            number=min(row.number, MOST_COUNTED),
            more=row.number > MOST_COUNTED,
            oldest=ends[row.oldest].updated_at,
            newest=ends[row.newest].updated_at,
            newest_event=ends[row.newest].event_id,
        )
        for row in found
        if row.oldest in ends and row.newest in ends  # else it was settled between the two looks
    ]


async def outcomes(connection: AsyncConnection, ids: Sequence[int]) -> Outcomes:
    """Of retried ones, by the ids of their exceptions: one that is gone has succeeded."""
    left = {"skipped": 0, "failed": 0, "parked": 0, "open": 0}
    rows = await connection.execute(
        select(exception.c.state, exception.c.attempts, func.count())
        .where(exception.c.id.in_(ids))
        .group_by(exception.c.state, exception.c.attempts)
    )
    for state, attempts, number in rows:
        if state == SKIPPED:
            left["skipped"] += number
        elif state == PARKED:
            left["parked"] += number
        elif attempts <= (1 if state == RUNNING else 0) and state != DEAD:
            left["open"] += number
        else:
            left["failed"] += number
    return Outcomes(succeeded=len(ids) - sum(left.values()), **left)
