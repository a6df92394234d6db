"""A database that was moved: restored from a dump, replicated logically, or upgraded into another cluster.

What a cursor has passed is told by transaction ids, and those of another cluster begin anew: as they are, new events
would look handled, and old ones would be delivered again once their numbers come round. So PostgreSQL's log and cursors
keep ids that are shifted by 2**48 for each cluster the database was in, by the system identifier of the cluster (the
functions `whereupon_shift`, `whereupon_xact_id` and `whereupon_snapshot` of the migrations). Where the identifier is
not the latest one known, events are written with a shift of 2**62, which no cursor has passed and no snapshot sees,
and nothing is delivered. `rebase` makes the cluster known, and gives those events their place after all older ones:
cursors go on where they stood.

SQLite's positions mean the same wherever the file is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon.errors import ForeignClusterError
from whereupon.store import Store

UNPLACED: Final = 1 << 62
"""What is added to the transaction ids of a cluster that is not known yet."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rebase:
    """What `rebase` did, or would do."""

    needed: bool
    """Whether the database was in a cluster that it did not know."""
    number: int
    """Which of its clusters this is, from 0 up."""
    placed: int
    """Events that were published in it before the rebase, and can be delivered now."""


async def check(store: Store) -> None:
    """Raises `ForeignClusterError` where the database was moved and not rebased."""
    if store.engine.dialect.name != "postgresql":
        return
    with store.reaching():
        async with store.reading() as connection:
            foreign = await _foreign(connection)
    if foreign:
        raise ForeignClusterError(
            f"{store.shown_url} was restored or replicated into another PostgreSQL cluster, where transaction ids mean "
            "something else: what each subscription has handled can't be told by them. Nothing is delivered, and what "
            "is published waits. Run `whereupon db rebase` once, when no more of the old cluster will be restored"
        )


async def plan(connection: AsyncConnection) -> Rebase:
    """What `rebase` would do, as far as what is committed by now goes."""
    if connection.dialect.name != "postgresql":
        return Rebase(needed=False, number=0, placed=0)
    needed = await _foreign(connection)
    number = await connection.scalar(text("SELECT max(number) FROM whereupon_cluster"))
    waiting = await connection.scalar(
        text("SELECT count(*) FROM whereupon_log WHERE tx_id >= CAST(CAST(:unplaced AS text) AS xid8)").bindparams(
            unplaced=UNPLACED
        )
    )
    return Rebase(needed=needed, number=int(number) + needed, placed=int(waiting))


async def rebase(connection: AsyncConnection) -> Rebase:
    """Make the cluster that the database is in the one its cursors and its log go on in, when that commits.

    Safe to repeat. Publishers wait for it, and it waits for those that have written and not committed.
    """
    if connection.dialect.name != "postgresql":
        return Rebase(needed=False, number=0, placed=0)
    await connection.execute(text("LOCK TABLE whereupon_log IN SHARE ROW EXCLUSIVE MODE"))
    needed = await _foreign(connection)
    if needed:
        await _make_known(connection)
    placed = await place(connection)
    number = await connection.scalar(text("SELECT max(number) FROM whereupon_cluster"))
    return Rebase(needed=needed, number=int(number), placed=placed)


async def _foreign(connection: AsyncConnection) -> bool:
    return bool(await connection.scalar(text("SELECT whereupon_shift() = :unplaced"), {"unplaced": UNPLACED}))


async def _make_known(connection: AsyncConnection) -> None:
    for statement in (
        "INSERT INTO whereupon_cluster (number, system_identifier) "
        "SELECT (SELECT max(number) + 1 FROM whereupon_cluster), system_identifier FROM pg_control_system()",
        # a logical replica has the rows, and not what the sequence had come to
        "SELECT setval('whereupon_log_position', greatest((SELECT last_value FROM whereupon_log_position), "
        "(SELECT max(position) FROM whereupon_log), (SELECT max(position) FROM whereupon_exception)))",
        # below them no more events were expected; a sequence that began again may have handed such positions out
        "DELETE FROM whereupon_meta WHERE key = 'marks'",
        # the processes of the old cluster do not serve here; they are fenced off, should they come back
        "UPDATE whereupon_cursor SET owner = NULL, token = token + 1",
        "DELETE FROM whereupon_process",
    ):
        await connection.execute(text(statement))


async def place(connection: AsyncConnection) -> int:
    """Give events that were written before the rebase the ids they would have got after it; return how many."""
    moved = await connection.execute(
        text(
            "UPDATE whereupon_log SET tx_id = CAST(CAST(CAST(CAST(tx_id AS text) AS bigint) - :unplaced "
            "+ whereupon_shift() AS text) AS xid8) "
            "WHERE tx_id >= CAST(CAST(:unplaced AS text) AS xid8) AND whereupon_shift() < :unplaced"
        ).bindparams(unplaced=UNPLACED)
    )
    return moved.rowcount
