"""A database that is restored from a dump into another cluster goes on where it stood, once it was told so."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest
from psycopg.sql import SQL
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.servers import PostgresServer, binary_folders, empty_database, start_postgres
from whereupon import DomainEvent, EventBus
from whereupon.errors import ForeignClusterError

pytestmark = [pytest.mark.integration, pytest.mark.slow]

BURNED = 5_000
"""Transaction ids that one of two clusters is ahead of the other."""


class CrateShipped(DomainEvent):
    number: int


@pytest.fixture(scope="module")
def clusters() -> Iterator[tuple[PostgresServer, PostgresServer, Path]]:
    """Two fresh clusters, the second with far higher transaction ids, and where their programs are."""
    binaries = next(folder for folder in binary_folders() if (folder / "pg_dump").exists())
    low, high = start_postgres([binaries]), start_postgres([binaries])
    try:
        with psycopg.connect(plain(high.url, "postgres"), autocommit=True) as connection:
            connection.execute("SET synchronous_commit = off")
            connection.execute(
                SQL("DO $$ BEGIN FOR i IN 1..{} LOOP PERFORM pg_current_xact_id(); COMMIT; END LOOP; END $$").format(
                    BURNED
                )
            )
        yield low, high, binaries
    finally:
        low.stop()
        high.stop()


def plain(url: str, database: str | None = None) -> str:
    parsed = make_url(url).set(drivername="postgresql")
    return (parsed.set(database=database) if database else parsed).render_as_string(hide_password=False)


def move(source: str, target: str, binaries: Path) -> None:
    dump = subprocess.run([binaries / "pg_dump", plain(source)], check=True, capture_output=True)
    subprocess.run(
        [binaries / "psql", "--quiet", "-v", "ON_ERROR_STOP=1", plain(target)],
        input=dump.stdout,
        check=True,
        capture_output=True,
    )


def bus_on(url: str, heard: Counter[int], *, deliver: bool = True) -> EventBus:
    bus = EventBus(url, deliver=deliver, create_tables=True)

    @bus.subscribe(CrateShipped, name="docker", ordered_by="number")
    async def docker(event: CrateShipped) -> None:
        heard[event.number] += 1

    @bus.subscribe(CrateShipped, name="clerk", lanes=1)
    async def clerk(event: CrateShipped) -> None:
        heard[event.number] += 1

    return bus


async def publish(bus: EventBus, numbers: range) -> None:
    for number in numbers:
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(CrateShipped(number=number), session=session)


@pytest.mark.parametrize("upwards", [False, True])
async def test_a_restored_database_delivers_what_was_not_handled_and_nothing_twice(
    clusters: tuple[PostgresServer, PostgresServer, Path], upwards: bool
) -> None:
    """Into a cluster whose ids are far below, so that new events looked handled, and one where they are far above."""
    low, high, binaries = clusters
    source, target = (low, high) if upwards else (high, low)
    before: Counter[int] = Counter()
    after: Counter[int] = Counter()
    with empty_database(source.url) as old, empty_database(target.url) as new:
        async with bus_on(old, before) as bus:
            await publish(bus, range(20))
            await bus.drain(20)
        publisher = bus_on(old, before, deliver=False)
        async with AsyncSession(publisher.engine) as late, late.begin():  # commits last, with an id among the first
            await publisher.publish(CrateShipped(number=20), session=late)
            await late.flush()
            await publish(publisher, range(21, 30))
        await publisher.close()
        await asyncio.to_thread(move, old, new, binaries)

        publisher = bus_on(new, after, deliver=False)
        await publish(publisher, range(30, 37))  # nobody has noticed yet
        with pytest.raises(ForeignClusterError, match="whereupon db rebase"):
            await bus_on(new, after).start()

        plan = await publisher.operator.rebasable()
        assert (plan.needed, plan.number, plan.placed) == (True, 1, 7)

        publishing = asyncio.create_task(publish(publisher, range(37, 87)))
        await asyncio.sleep(0.02)
        done = await publisher.operator.rebase("restored", author="ada")
        assert done.needed
        assert done.placed >= 7
        await publishing
        await publish(publisher, range(87, 90))
        assert (await publisher.operator.rebase("restored")).needed is False
        (action,) = await publisher.operator.actions()
        assert (action.action, action.author, action.reason, action.subscription) == ("rebase", "ada", "restored", "")
        assert action.details == {"cluster": done.number, "placed": done.placed}
        await publisher.close()
        async with bus_on(new, after) as bus:
            await bus.drain(20)
            await publish(bus, range(90, 95))
            await bus.drain(20)
    assert before == Counter(dict.fromkeys(range(20), 2))
    assert after == Counter(dict.fromkeys(range(20, 95), 2))


async def test_what_commits_after_a_rebase_and_saw_the_database_before_it_is_delivered_as_well(
    clusters: tuple[PostgresServer, PostgresServer, Path],
) -> None:
    low, high, binaries = clusters
    heard: Counter[int] = Counter()
    with empty_database(high.url) as old, empty_database(low.url) as new:
        async with bus_on(old, heard) as bus:
            await publish(bus, range(3))
            await bus.drain(20)
        await asyncio.to_thread(move, old, new, binaries)
        publisher = bus_on(new, heard, deliver=False)
        await publish(publisher, range(3, 4))
        slow = publisher.engine.execution_options(isolation_level="REPEATABLE READ")
        async with AsyncSession(slow) as session:
            await session.execute(text("SELECT 1"))  # its snapshot is taken, and knows no new cluster
            await publisher.operator.rebase("restored")
            await publisher.publish(CrateShipped(number=4), session=session)
            await session.commit()
        await publisher.operator.rebase("restored")  # or a worker's upkeep, within a minute
        await publisher.close()
        async with bus_on(new, heard) as bus:
            await bus.drain(20)
    assert heard == Counter(dict.fromkeys(range(5), 2))


async def test_a_replica_whose_sequence_was_left_behind_goes_on_after_the_last_position(
    clusters: tuple[PostgresServer, PostgresServer, Path],
) -> None:
    low, high, binaries = clusters
    heard: Counter[int] = Counter()
    with empty_database(high.url) as old, empty_database(low.url) as new:
        async with bus_on(old, heard) as bus:
            await publish(bus, range(5))
            await bus.drain(20)
        await asyncio.to_thread(move, old, new, binaries)
        publisher = bus_on(new, heard, deliver=False)
        async with publisher.engine.begin() as connection:
            await connection.execute(text("SELECT setval('whereupon_log_position', 1, false)"))
        assert (await publisher.operator.rebase("restored")).needed
        await publish(publisher, range(5, 10))
        await publisher.close()
        async with bus_on(new, heard) as bus:
            await bus.drain(20)
    assert heard == Counter(dict.fromkeys(range(10), 2))


async def test_the_command_shows_the_plan_and_rebases_only_what_was_said_yes_to(
    clusters: tuple[PostgresServer, PostgresServer, Path],
) -> None:
    low, high, binaries = clusters
    heard: Counter[int] = Counter()
    with empty_database(high.url) as old, empty_database(low.url) as new:
        async with bus_on(old, heard) as bus:
            await publish(bus, range(3))
            await bus.drain(20)
        await asyncio.to_thread(move, old, new, binaries)
        publisher = bus_on(new, heard, deliver=False)
        await publish(publisher, range(3, 5))
        command = [sys.executable, "-m", "whereupon.cli", "db", "rebase", "--url", new, "--reason", "restored"]

        async def run(*more: str) -> subprocess.CompletedProcess[str]:
            return await asyncio.to_thread(
                subprocess.run, [*command, *more], capture_output=True, text=True, timeout=60
            )

        refused = await run()
        assert (refused.returncode, refused.stdout) == (2, "")
        assert "its cluster number 1: 2 subscriptions go on where they stood" in refused.stderr
        assert "2 events that were published here meanwhile" in refused.stderr
        assert (await publisher.operator.rebasable()).needed
        done = await run("--yes", "--author", "ada", "--json")
        assert json.loads(done.stdout) == {"needed": True, "cluster": 1, "placed": 2}
        assert "nothing to do" in (await run("--yes")).stdout
        (action,) = await publisher.operator.actions()
        assert (action.author, action.reason) == ("ada", "restored")
        await publisher.close()
        async with bus_on(new, heard) as bus:
            await bus.drain(20)
    assert heard == Counter(dict.fromkeys(range(5), 2))


async def test_a_database_that_was_not_moved_needs_no_rebase(database_url: str) -> None:
    heard: Counter[int] = Counter()
    async with bus_on(database_url, heard) as bus:
        assert (await bus.operator.rebase("restored")).needed is False
        await publish(bus, range(3))
        await bus.drain(20)
    assert heard == Counter(dict.fromkeys(range(3), 2))
