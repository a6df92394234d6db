"""How long the log is kept: what prune takes, what it never takes, and the partitions of PostgreSQL."""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from tests.notebook import Records, until
from tests.statements import statements
from whereupon import ActionRefused, DomainEvent, EventBus, Retry, Workflow, _postgres, retention, worker
from whereupon._postgres import PostgresStore
from whereupon.pace import Pace
from whereupon.retention import Pruned, Upkeep, make_partitions, mark, partitions_of, prune

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ALL = timedelta(0)


class StockTaken(DomainEvent):
    number: int


class ShelfMoved(DomainEvent):
    number: int


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    made = EventBus(database_url, create_tables=True, poll_interval=0.02, logger=Records())
    yield made
    await made.engine.dispose()


@pytest.fixture
async def on_postgres(postgres_url: str) -> AsyncIterator[EventBus]:
    made = EventBus(postgres_url, create_tables=True, poll_interval=0.02, logger=Records())
    yield made
    await made.engine.dispose()


def store_of(bus: EventBus) -> PostgresStore:
    assert isinstance(bus._store, PostgresStore)
    return bus._store


async def publish(bus: EventBus, *numbers: int, kind: type[StockTaken] | type[ShelfMoved] = StockTaken) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*(kind(number=number) for number in numbers), session=session)


async def rows(bus: EventBus, query: str, **values: Any) -> list[Any]:
    async with bus.engine.connect() as connection:
        return list((await connection.execute(text(query), values)).all())


async def positions(bus: EventBus) -> list[int]:
    return [row.position for row in await rows(bus, "SELECT position FROM whereupon_log ORDER BY position")]


async def execute(bus: EventBus, *statements: str) -> None:
    async with bus.engine.begin() as connection:
        for statement in statements:
            await connection.execute(text(statement))


async def in_partitions_of(bus: EventBus, size: int, number: int = 3) -> None:
    """Have the log, empty so far, in partitions of `size` positions."""
    await bus._store.prepare(create=True)
    for name in ("whereupon_log_1", "whereupon_log_1000001"):
        await execute(bus, f"DROP TABLE {name}")
    for first in range(1, size * number, size):
        await execute(
            bus,
            f"CREATE TABLE whereupon_log_{first} PARTITION OF whereupon_log FOR VALUES FROM ({first}) "
            f"TO ({first + size})",
        )


async def names(bus: EventBus) -> list[str]:
    async with bus.engine.connect() as connection:
        return [partition.name.removeprefix("public.") for partition in await partitions_of(connection)]


def heard_by(bus: EventBus, *subscriptions: str, **options: Any) -> Counter[tuple[str, int]]:
    heard: Counter[tuple[str, int]] = Counter()
    # with one lane each a cursor is where its worker is; one of several that had nothing is saved once a minute
    options.setdefault("lanes", 1)

    def subscribe(name: str) -> None:
        async def handler(event: StockTaken) -> None:
            heard[name, event.number] += 1

        bus.subscribe(StockTaken, handler, name=name, **options)

    for name in subscriptions:
        subscribe(name)
    return heard


async def pruned(bus: EventBus, older_than: timedelta = ALL, **options: Any) -> Pruned:
    return await prune(bus._store, older_than, **options)


async def test_what_every_cursor_has_passed_goes_and_positions_go_on(bus: EventBus) -> None:
    heard = heard_by(bus, "one", "two")
    async with bus:
        await publish(bus, 1, 2, 3)
        await bus.drain(10)
    before = await positions(bus)
    report = await bus.operator.prune("old enough", older_than=ALL)
    assert (report.deleted, report.kept, await positions(bus)) == (3, [], [])
    async with bus:
        await publish(bus, 4)
        await bus.drain(10)
    assert (await positions(bus))[0] > before[-1]
    assert heard == {(name, number): 1 for name in ("one", "two") for number in (1, 2, 3, 4)}


async def test_what_is_younger_than_the_age_stays(bus: EventBus) -> None:
    await bus.deliveries()
    await publish(bus, 1, 2)
    past = "'2020-01-01 00:00:00.000000'"
    await execute(bus, f"UPDATE whereupon_log SET recorded_at = {past} WHERE position = 1")
    assert (await pruned(bus, timedelta(days=30))).deleted == 1
    assert await positions(bus) == [2]
    with pytest.raises(ValueError, match="not negative"):
        await pruned(bus, timedelta(days=-1))


async def test_a_paused_subscription_keeps_what_it_has_not_passed_and_is_named(bus: EventBus) -> None:
    heard = heard_by(bus, "awake", "asleep")
    async with bus:
        await publish(bus, 1, 2)
        await bus.drain(10)
    await execute(bus, "UPDATE whereupon_subscription SET paused = true WHERE name = 'asleep'")
    async with bus:
        await publish(bus, 3, 4)
        await bus.drain(10)
        report = await pruned(bus)
        assert (report.deleted, await positions(bus)) == (2, [3, 4])
        assert [(holder.subscription, holder.why) for holder in report.holders] == [("asleep", "paused")]
        assert [kept.why for kept in report.kept] == ["held"]
    await execute(bus, "UPDATE whereupon_subscription SET paused = false")
    async with bus:
        await bus.drain(10)
    assert set(heard.values()) == {1}
    assert len(heard) == 8
    assert (await pruned(bus)).deleted == 2


async def test_one_lane_of_a_worker_that_died_keeps_its_part(bus: EventBus) -> None:
    heard_by(bus, "laned", lanes=4)
    async with bus:
        await publish(bus, 1, 2, 3)
        await bus.drain(10)
    place = "page, 0" if bus.engine.dialect.name == "sqlite" else "page, snapshot::text"
    kept = (await rows(bus, f"SELECT {place} FROM whereupon_cursor WHERE lane = 2"))[0]
    async with bus:
        await publish(bus, 4, 5)
        await bus.drain(10)
    # as if its worker had died before the last two
    snapshot = "" if bus.engine.dialect.name == "sqlite" else f", snapshot = '{kept[1]}'"
    await execute(
        bus, f"UPDATE whereupon_cursor SET page = {kept[0]}{snapshot}, owner = '{uuid4().hex}' WHERE lane = 2"
    )
    report = await pruned(bus)
    assert (report.deleted, await positions(bus)) == (3, [4, 5])
    assert [(one.subscription, one.lane, one.why) for one in report.holders] == [("laned", 2, "unserved")]


async def test_a_window_that_is_paged_lets_go_of_what_is_handled_of_it(on_postgres: EventBus) -> None:
    bus = on_postgres
    heard_by(bus, "paging", lanes=1)
    await bus.deliveries()
    await publish(bus, 1, 2, 3, 4)
    await execute(bus, "UPDATE whereupon_cursor SET target = pg_current_snapshot(), page = 3")
    report = await pruned(bus)
    assert (report.deleted, await positions(bus)) == (3, [4])
    assert [holder.subscription for holder in report.holders] == ["paging"]


async def test_an_old_dead_letter_keeps_nothing_and_can_be_tried_again_after_its_event_has_gone(bus: EventBus) -> None:
    fails = True
    heard: list[int] = []

    @bus.subscribe(StockTaken, name="fragile", retry=Retry(max_attempts=1), ordered_by="number", lanes=1)
    async def fragile(event: StockTaken) -> None:
        if fails:
            raise RuntimeError("not today")
        heard.append(event.number)

    async with bus:
        await publish(bus, 7)
        await bus.drain(10)
        report = await pruned(bus)
        assert (report.deleted, report.kept, await positions(bus)) == (1, [], [])
        (event_id,) = [row.event_id for row in await rows(bus, "SELECT event_id FROM whereupon_exception")]
        (told,) = await bus.deliveries(event_id if not isinstance(event_id, str) else _uuid(event_id))
        assert (told.state, told.subscription, told.error) == ("dead", "fragile", "RuntimeError: not today")
    fails = False
    async with bus.engine.begin() as connection:
        await connection.execute(
            text("UPDATE whereupon_exception SET state = 'retrying', next_at = :past"), {"past": _past(bus)}
        )
    async with bus:
        await until(lambda: heard)
        await bus.drain(10)
        await publish(bus, 7)  # the same key
        await bus.drain(10)
    assert heard == [7, 7]
    assert await rows(bus, "SELECT 1 FROM whereupon_exception") == []


def _uuid(value: str) -> Any:
    from uuid import UUID

    return UUID(value)


def _past(bus: EventBus) -> Any:
    from datetime import UTC, datetime

    past = datetime(2020, 1, 1, tzinfo=UTC)
    return past.strftime("%Y-%m-%d %H:%M:%S.%f") if bus.engine.dialect.name == "sqlite" else past


async def test_a_cursor_that_passed_only_what_it_does_not_hear_is_saved_soon_and_holds_nothing_back(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert worker.UNSAVED <= 60
    monkeypatch.setattr(worker, "UNSAVED", 0.2)
    heard_by(bus, "deaf")
    async with bus:
        await publish(bus, 1, 2, kind=ShelfMoved)
        await bus.drain(10)

        async def gone() -> None:
            while await positions(bus):
                await pruned(bus)
                await asyncio.sleep(0.05)

        await asyncio.wait_for(gone(), 10)


@pytest.mark.slow
async def test_pruning_beside_publishers_and_workers_of_other_processes_loses_nothing(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "SIZE", 100)
    sqlite = database_url.startswith("sqlite")
    program = tmp_path / "counting.py"
    program.write_text(
        "import asyncio, sys\n"
        "from whereupon import DomainEvent, EventBus\n"
        "class StockTaken(DomainEvent):\n    number: int\n"
        f"bus = EventBus({database_url!r}, poll_interval=0.02)\n"
        "out = open(sys.argv[1], 'a')\n"
        "for name in ('one', 'two'):\n"
        "    async def handler(event: StockTaken, name=name) -> None:\n"
        "        out.write(f'{name} {event.number}\\n'); out.flush()\n"
        "    def bound(name=name):\n"
        "        async def handler(event: StockTaken) -> None:\n"
        "            out.write(f'{name} {event.number}\\n'); out.flush()\n"
        "        return handler\n"
        "    bus.subscribe(StockTaken, bound(), name=name, lanes=4)\n"
        "async def main():\n"
        "    async with bus:\n"
        "        print('ready', flush=True)\n"
        "        await asyncio.get_running_loop().run_in_executor(None, sys.stdin.readline)\n"
        "        await bus.drain(30)\n"
        "asyncio.run(main())\n"
    )
    bus = EventBus(database_url, create_tables=True, deliver=False)
    if not sqlite:
        await in_partitions_of(bus, 100)
    else:
        await bus._store.prepare(create=True)
    files = [tmp_path / f"heard{number}" for number in range(2)]
    workers = [
        subprocess.Popen(  # noqa: ASYNC220 — it waits for a line
            [sys.executable, str(program), str(file)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        for file in files
    ]
    dropped = deleted = 0
    pruned = asyncio.Event()
    try:
        for one in workers:
            assert one.stdout is not None
            assert await asyncio.to_thread(one.stdout.readline) == "ready\n"

        async def write(writer: int) -> None:
            for turn in range(60):
                base = writer * 10_000 + turn * 10
                async with AsyncSession(bus.engine) as session:
                    await bus.publish(*(StockTaken(number=base + n) for n in range(5)), session=session)
                    if not sqlite and turn % 10 == writer:  # written at once, and committed late
                        await session.flush()
                        await asyncio.sleep(0.1)
                    await (session.rollback() if turn % 7 == 3 else session.commit())

        async def tidy() -> None:
            nonlocal dropped, deleted
            while True:
                if isinstance(bus._store, PostgresStore):
                    await mark(bus._store)
                    await make_partitions(bus._store)
                report = await prune(bus._store, ALL)
                dropped += len(report.dropped)
                deleted += report.deleted
                if deleted and (sqlite or dropped):
                    pruned.set()
                await asyncio.sleep(0.02)

        tidying = asyncio.create_task(tidy())
        await asyncio.gather(*(write(writer) for writer in range(3)))
        with contextlib.suppress(TimeoutError):  # workers on a busy machine are far behind the publishers
            await asyncio.wait_for(pruned.wait(), 30)
        tidying.cancel()
        await asyncio.gather(tidying, return_exceptions=True)
        assert tidying.cancelled()
    finally:
        for one in workers:
            await asyncio.to_thread(one.communicate, "\n", 60)
        await bus.engine.dispose()
    assert [one.returncode for one in workers] == [0, 0]
    heard = Counter(line for file in files for line in file.read_text().splitlines())
    committed = [w * 10_000 + turn * 10 + n for w in range(3) for turn in range(60) if turn % 7 != 3 for n in range(5)]
    assert heard == Counter(f"{name} {number}" for name in ("one", "two") for number in committed)
    assert deleted > 0
    assert sqlite or dropped > 0


# --- partitions -------------------------------------------------------------------------------------------------------


async def test_partitions_that_all_have_passed_are_dropped_and_a_worker_reads_on_across_them(
    on_postgres: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = on_postgres
    monkeypatch.setattr(retention, "SIZE", 10)
    await in_partitions_of(bus, 10)
    heard = heard_by(bus, "one")
    async with bus:
        await publish(bus, *range(1, 26))
        await bus.drain(10)
        report = await pruned(bus)
        assert [(one.first, one.last) for one in report.dropped] == [(1, 10), (11, 20)]
        assert report.deleted == 5  # of the one that is being written into
        assert await names(bus) == [
            "whereupon_log_21", "whereupon_log_31", "whereupon_log_41", "whereupon_log_default"
        ]  # fmt: skip
        await publish(bus, *range(26, 61))
        await bus.drain(10)
        await pruned(bus)
        await publish(bus, 61)
        await bus.drain(10)
    assert heard == {("one", number): 1 for number in range(1, 62)}


async def test_a_worker_that_comes_after_partitions_went_reads_the_rest_in_small_pages(
    on_postgres: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = on_postgres
    monkeypatch.setattr(retention, "SIZE", 10)
    monkeypatch.setattr(worker, "PAGE", 3)
    monkeypatch.setattr(_postgres, "STRETCH", 4)
    await in_partitions_of(bus, 10)
    heard = heard_by(bus, "one", "two")
    async with bus:
        await publish(bus, *range(1, 13))
        await bus.drain(10)
    assert [one.first for one in (await pruned(bus)).dropped] == [1]
    await publish(bus, *range(13, 56))
    async with bus:
        await bus.drain(10)
    assert heard == {(name, number): 1 for name in ("one", "two") for number in range(1, 56)}


async def test_a_late_commit_into_an_old_partition_is_delivered_and_keeps_the_partition_until_then(
    on_postgres: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = on_postgres
    monkeypatch.setattr(retention, "SIZE", 10)
    monkeypatch.setattr(retention, "TRIES", 2)
    await in_partitions_of(bus, 10)
    heard = heard_by(bus, "one")
    async with bus:
        late = await bus.engine.connect()
        session = AsyncSession(bind=late)
        transaction = await late.begin()
        await bus.publish(StockTaken(number=0), session=session)
        await session.run_sync(lambda _: None)
        await late.run_sync(_write_staged)
        await publish(bus, *range(1, 15))
        await bus.drain(10)
        report = await pruned(bus)
        assert ([kept.why for kept in report.kept], report.dropped) == (["busy"], [])
        await publish(bus, 15)  # not held up by the attempts
        await transaction.commit()
        assert "whereupon_log_1" in await names(bus)
        await bus.drain(10)
        await session.close()
        await late.close()
        assert heard == {("one", number): 1 for number in range(16)}
        assert [one.first for one in (await pruned(bus)).dropped] == [1]


def _write_staged(connection: Any) -> None:
    """What is staged is written just before the commit; here long before that, as a session that owns nothing may."""
    from whereupon import _staging

    transaction = _staging._current(connection)
    assert transaction is not None
    transaction.write(connection)
    transaction.staged.clear()


async def test_what_commits_between_the_judging_of_a_partition_and_its_lock_saves_it(
    on_postgres: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = on_postgres
    monkeypatch.setattr(retention, "SIZE", 10)
    monkeypatch.setattr(retention, "TRIES", 1)
    await in_partitions_of(bus, 10)
    heard = heard_by(bus, "one")
    locking = retention._lock_timeout
    async with bus, bus.engine.connect() as late:
        await late.execute(text("SELECT pg_current_xact_id()"))  # and draws a position that it writes much later
        await publish(bus, *range(1, 6))
        await execute(bus, "SELECT nextval('whereupon_log_position')")
        await publish(bus, *range(7, 12))
        await bus.drain(10)

        async def commit_first(connection: Any) -> None:
            await late.execute(
                text(
                    "INSERT INTO whereupon_log (position, event_id, type, version, payload, headers, recorded_at) "
                    "SELECT 6, gen_random_uuid(), type, version, payload, headers, '2020-01-01' "
                    "FROM whereupon_log WHERE position = 11"
                )
            )
            await late.commit()
            await locking(connection)

        monkeypatch.setattr(retention, "_lock_timeout", commit_first)
        monkeypatch.setattr(retention, "make_partitions", _none_made)
        report = await pruned(bus)
        assert [(kept.where, kept.why) for kept in report.kept] == [("public.whereupon_log_1", "busy")]
        await bus.drain(10)
    monkeypatch.undo()
    assert [one.first for one in (await pruned(bus)).dropped] == [1]
    assert heard["one", 11] == 2  # as itself, and as the one that came late


async def _none_made(store: Any) -> list[str]:
    return []


async def test_a_long_transaction_that_read_the_log_stalls_no_publisher_while_pruning_waits(
    on_postgres: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    bus = on_postgres
    monkeypatch.setattr(retention, "TRIES", 3)
    await in_partitions_of(bus, 5)
    heard_by(bus, "one")
    async with bus:
        await publish(bus, *range(7))
        await bus.drain(10)
        async with bus.engine.connect() as reader:
            await reader.execute(text("SELECT count(*) FROM whereupon_log"))
            pruning = asyncio.create_task(pruned(bus))
            while not pruning.done():
                await publish(bus, 8)
                await asyncio.sleep(0.01)
            assert [kept.why for kept in (await pruning).kept] == ["busy"]
        assert (await pruned(bus)).dropped[0].first == 1


async def test_what_found_no_partition_is_in_the_default_one_delivered_and_pruned(on_postgres: EventBus) -> None:
    bus = on_postgres
    await in_partitions_of(bus, 5, number=1)
    heard = heard_by(bus, "one")
    publisher = EventBus(bus.engine, deliver=False)
    heard_by(publisher, "one")
    await publish(publisher, *range(12))
    assert [row.n for row in await rows(bus, "SELECT count(*) AS n FROM whereupon_log_default")] == [7]
    async with bus:
        await bus.drain(10)
        assert heard == {("one", number): 1 for number in range(12)}
        report = await pruned(bus)
    assert ([one.first for one in report.dropped], report.deleted) == ([1], 7)


async def test_partitions_are_made_ahead_beyond_what_the_default_one_holds(on_postgres: EventBus) -> None:
    bus = on_postgres
    await in_partitions_of(bus, 10, number=1)
    store = store_of(bus)
    assert await make_partitions(store, size=10) == ["public.whereupon_log_11"]
    assert await make_partitions(store, size=10) == []
    await publish(bus, *range(35))  # nobody made any meanwhile
    assert await make_partitions(store, size=10) == ["public.whereupon_log_41", "public.whereupon_log_51"]
    await publish(bus, *range(10))
    found = await rows(
        bus, "SELECT tableoid::regclass::text AS name, count(*) FROM whereupon_log GROUP BY 1 ORDER BY min(position)"
    )
    assert [tuple(row) for row in found] == [
        ("whereupon_log_1", 10),
        ("whereupon_log_11", 10),
        ("whereupon_log_default", 20),
        ("whereupon_log_41", 5),
    ]


async def test_a_range_of_which_the_default_partition_holds_something_is_left_out(on_postgres: EventBus) -> None:
    bus = on_postgres
    await in_partitions_of(bus, 10, number=1)
    await execute(bus, "SELECT setval('whereupon_log_position', 14)")
    await publish(bus, 1)  # 15, in the default one
    await execute(bus, "SELECT setval('whereupon_log_position', 5)")
    assert await make_partitions(store_of(bus), size=10) == ["public.whereupon_log_21"]
    await publish(bus, *range(2, 8))
    assert await positions(bus) == [6, 7, 8, 9, 10, 11, 15]


async def test_a_partition_that_others_make_or_a_busy_log_stops_no_publisher(on_postgres: EventBus) -> None:
    bus = on_postgres
    await in_partitions_of(bus, 10, number=1)
    async with bus.engine.connect() as other:
        await other.execute(text("SELECT pg_advisory_xact_lock(hashtext('whereupon partitions'))"))
        assert await make_partitions(store_of(bus), size=10) == []
    async with bus.engine.connect() as reader:
        await reader.execute(text("SELECT count(*) FROM whereupon_log_default"))
        making = asyncio.create_task(make_partitions(store_of(bus), size=10))
        for number in range(5):
            await publish(bus, number)
        assert await making == []
    made = ["public.whereupon_log_11", "public.whereupon_log_21"]
    assert await make_partitions(store_of(bus), size=10) == made


async def test_a_worker_makes_partitions_and_prunes_if_it_was_told_how_long_to_keep(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = Records()
    monkeypatch.setattr("random.uniform", lambda low, high: low)
    heard_by(bus, "one")
    async with bus:
        await publish(bus, 1, 2)
        await bus.drain(10)
    await execute(bus, "UPDATE whereupon_log SET recorded_at = '2020-01-01 00:00:00.000000'")
    await execute(bus, "UPDATE whereupon_history SET recorded_at = '2020-01-01 00:00:00.000000'")
    await execute(bus, "DELETE FROM whereupon_meta WHERE key = 'pruned_at'")  # by the worker, which had nothing to do
    assert await rows(bus, "SELECT 1 FROM whereupon_history")

    def log(level: str, name: str, **details: Any) -> None:
        getattr(logger, level)(name, **details)

    await Upkeep(bus._store, retain=None, log=log).turn()
    assert await positions(bus) == [1, 2]  # nobody said how long; but what was called is forgotten
    assert await rows(bus, "SELECT 1 FROM whereupon_history") == []
    await Upkeep(bus._store, retain=timedelta(days=30), log=log).turn()
    assert await positions(bus) == [1, 2]  # another worker has pruned within the hour
    await execute(bus, "DELETE FROM whereupon_meta WHERE key = 'pruned_at'")
    await Upkeep(bus._store, retain=timedelta(days=30), log=log).turn()
    assert await positions(bus) == []
    assert logger.of("log_pruned") == [{"dropped": [], "deleted": 2, "held_by": []}]
    if bus.engine.dialect.name == "postgresql":
        assert "whereupon_log_2000001" in await names(bus)


class BerthRequestAttempted(DomainEvent):
    berth: int


class BerthRequestSucceeded(DomainEvent):
    berth: int


class BerthRequestFailed(DomainEvent):
    berth: int
    reason: str


BerthRequest = Workflow(BerthRequestAttempted, BerthRequestSucceeded, BerthRequestFailed)


async def test_attempts_go_some_time_after_they_were_closed_and_open_ones_stay(bus: EventBus) -> None:
    await bus.start(deliver=False)
    sessions = async_sessionmaker(bus.engine)

    async def request(berth: int) -> None:
        async with bus.workflow(BerthRequest, berth=berth) as attempt, sessions.begin() as session:
            await attempt.succeeded(berth=berth, session=session)

    await request(1)
    await request(2)
    await execute(bus, "UPDATE whereupon_workflow SET closed_at = '2020-01-01 00:00:00.000000'")
    await request(3)
    async with bus.workflow(BerthRequest, berth=4) as attempt:
        await execute(bus, "UPDATE whereupon_workflow SET opened_at = '2020-01-01 00:00:00.000000'")
        assert (await bus.operator.prunable(older_than=timedelta(days=1))).attempts == 2
        assert len(await rows(bus, "SELECT 1 FROM whereupon_workflow")) == 4
        assert (await bus.operator.prune("old enough", older_than=timedelta(days=1))).attempts == 2
        kept = await rows(bus, "SELECT state FROM whereupon_workflow ORDER BY closed_at IS NULL")
        assert [row[0] for row in kept] == ["succeeded", "open"]
        async with sessions.begin() as session:
            await attempt.succeeded(berth=4, session=session)
    await bus.close()


async def test_a_bus_that_retains_for_so_long_prunes_while_it_runs(
    bus: EventBus, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("random.uniform", lambda low, high: low)  # the first time at once
    heard_by(bus, "one")
    async with bus:
        await publish(bus, 1, 2)
        await bus.drain(10)
    await execute(bus, "UPDATE whereupon_log SET recorded_at = '2020-01-01 00:00:00.000000' WHERE position = 1")
    assert await positions(bus) == [1, 2]
    await execute(bus, "DELETE FROM whereupon_meta WHERE key = 'pruned_at'")
    keeping = EventBus(bus.engine, retain=timedelta(days=30), logger=Records())
    heard_by(keeping, "one")
    async with keeping:
        logger: Any = keeping.logger
        await until(lambda: logger.of("log_pruned"))
    assert await positions(bus) == [2]


async def test_a_worker_whose_user_owns_no_tables_says_so_once_and_goes_on(on_postgres: EventBus) -> None:
    bus = on_postgres
    await in_partitions_of(bus, 10, number=1)
    role = f"whereupon_{uuid4().hex}"
    await execute(
        bus,
        f"CREATE ROLE {role} LOGIN",
        f"GRANT SELECT, INSERT, UPDATE, DELETE ON ALL TABLES IN SCHEMA public TO {role}",
        f"GRANT SELECT, USAGE ON ALL SEQUENCES IN SCHEMA public TO {role}",
    )
    guest = EventBus(bus.engine.url.set(username=role), logger=Records())
    try:
        heard = heard_by(guest, "one")
        async with guest:
            await publish(guest, *range(15))
            await guest.drain(10)
            logger: Any = guest.logger
            await until(lambda: logger.of("log_partitions_not_made"))
        assert len(heard) == 15
        assert "permission denied" in logger.of("log_partitions_not_made")[0]["error_message"]
    finally:
        await guest.engine.dispose()
        await execute(bus, f"DROP OWNED BY {role}", f"DROP ROLE {role}")


@pytest.mark.parametrize("generic", [False, True])
async def test_a_read_touches_only_the_partitions_that_may_hold_something_new(
    on_postgres: EventBus, generic: bool
) -> None:
    bus = on_postgres
    await in_partitions_of(bus, 100, number=12)
    heard_by(bus, "one")
    store = store_of(bus)
    await bus.deliveries()
    for first in range(0, 1050, 50):
        await publish(bus, *range(first, first + 50))
    now = await marked(store)
    floor = store.floor(now)
    assert floor == 1050
    await publish(bus, *range(3))
    await execute(bus, "ANALYZE whereupon_log")
    values = {**_postgres._unseen_by(now), "floor": floor}
    window = {**values, "home": None, "types": ["StockTaken"], "limit": 501}
    pulse = {**values, "home": None, "owner": uuid4(), "names": ["one"]}
    page = {
        "snapshot": "3:3:", "target": now, "page": 550, "end": 590, "limit": 500, "types": ["StockTaken"]
    }  # fmt: skip
    expected = {"whereupon_log_1001", "whereupon_log_1101", "whereupon_log_default"}
    for query, given, touched in (
        (_postgres._WINDOW[True, False], window, expected),
        (_postgres._PULSE, pulse, expected),
        (_postgres._FIRST, {**values, "target": now}, expected),
        (_postgres._PAGE[False], page, {"whereupon_log_501", "whereupon_log_default"}),
    ):
        plan = await explained(bus, query, given, generic=generic)
        used = {node["Relation Name"] for node in nodes(plan) if "whereupon_log" in node.get("Relation Name", "")}
        assert used <= touched
        assert used


@pytest.mark.parametrize("analyzed", [False, True])
async def test_a_look_at_a_large_partition_uses_its_index_whatever_is_known_of_it(
    on_postgres: EventBus, analyzed: bool
) -> None:
    bus = on_postgres
    await bus.deliveries()
    for _ in range(100):
        await execute(
            bus,
            "INSERT INTO whereupon_log (event_id, type, version, payload, headers) "
            "SELECT gen_random_uuid(), 'StockTaken', 1, 'x', '{}' FROM generate_series(1, 200)",
        )
    if analyzed:
        await execute(bus, "ANALYZE whereupon_log")
    async with bus.engine.connect() as connection:
        now = await connection.scalar(text("SELECT CAST(pg_current_snapshot() AS text)"))
    values = {**_postgres._unseen_by(str(now)), "floor": 0, "home": None}
    looks: list[tuple[Any, dict[str, Any]]] = [(_postgres._PULSE, {**values, "owner": uuid4(), "names": ["one"]})]
    if analyzed:  # else a page of 500 is as cheap to sort out of so few, until they are more
        looks.append((_postgres._WINDOW[True, False], {**values, "types": ["StockTaken"], "limit": 501}))
        looks.append((_postgres._WINDOW[True, True], {**values, "limit": 501}))
    for query, given in looks:
        for generic in (False, True):
            plan = await explained(bus, query, given, generic=generic)
            scans = [node["Node Type"] for node in nodes(plan) if node.get("Relation Name") == "whereupon_log_1"]
            assert len(scans) == 2
            assert {"Seq Scan", "Parallel Seq Scan"}.isdisjoint(scans)


async def explained(bus: EventBus, query: Any, values: dict[str, Any], *, generic: bool) -> Any:
    statement = text(f"EXPLAIN (FORMAT JSON) {query.text}").bindparams(*query._bindparams.values())
    async with bus.engine.connect() as connection:
        mode = "force_generic_plan" if generic else "force_custom_plan"
        await connection.execute(text(f"SET plan_cache_mode = {mode}"))
        found = await connection.scalar(statement, values)
    return (json.loads(found) if isinstance(found, str) else found)[0]["Plan"]


def nodes(plan: Any) -> list[Any]:
    return [plan, *(node for child in plan.get("Plans", ()) for node in nodes(child))]


async def test_a_floor_lies_above_nothing_that_a_transaction_in_progress_may_still_write(
    on_postgres: EventBus,
) -> None:
    bus = on_postgres
    store = store_of(bus)
    heard = heard_by(bus, "one", "two")
    await bus.deliveries()
    async with bus.engine.connect() as open_one:
        await open_one.execute(text("SELECT pg_current_xact_id()"))
        await publish(bus, 1, 2)
        after = await marked(store)
        async with store.reading() as connection:
            during = await connection.scalar(text("SELECT CAST(pg_current_snapshot() AS text)"))
        assert (store.floor(during), store.floor(after)) == (0, 2)
        await publish(bus, 3)
        await marked(store)
        assert store.floor(after) == 2
        await open_one.rollback()
    async with bus:
        await bus.drain(10)
    assert len(heard) == 6


async def test_whoever_draws_a_position_has_its_transactions_id_by_then(on_postgres: EventBus) -> None:
    """Marks rely on it: the defaults are evaluated in the order of the log's columns."""
    bus = on_postgres
    await bus._store.prepare(create=True)
    values = "event_id, type, version, payload, headers"
    several = "SELECT gen_random_uuid(), 'A', n, 'x', '{}' FROM generate_series(1, 3) AS n ORDER BY n DESC"
    for source in ("VALUES (gen_random_uuid(), 'A', 1, 'x', '{}')", several):
        plan = await rows(bus, f"EXPLAIN (VERBOSE) INSERT INTO whereupon_log ({values}) {source} RETURNING position")
        (output,) = [row[0] for row in plan if "nextval" in row[0]]
        assert output.index("pg_current_xact_id()") < output.index("nextval")


async def marked(store: PostgresStore) -> str:
    """A snapshot for which all that was in progress before a mark is over, as that of other databases may not be."""
    await mark(store)
    async with store.reading() as connection:
        await store.load_marks(connection)
    tx_id = store.marks[-1][1]
    return f"{tx_id}:{tx_id}:"


# --- the command ------------------------------------------------------------------------------------------------------


def whereupon(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "whereupon.cli", "db", "prune", *arguments], capture_output=True, text=True, timeout=60
    )


async def test_the_command_shows_the_plan_then_prunes_and_names_what_holds_back(bus: EventBus) -> None:
    heard_by(bus, "awake", "asleep", lanes=1)
    async with bus:
        await publish(bus, 1, 2)
        await bus.drain(10)
    await execute(bus, "UPDATE whereupon_subscription SET paused = true WHERE name = 'asleep'")
    async with bus:
        await publish(bus, 3)
        await bus.drain(10)
    await bus.engine.dispose()
    url = bus.engine.url.render_as_string(hide_password=False)
    about = ("--url", url, "--older-than", "0s")
    planned = await asyncio.to_thread(whereupon, *about, "--dry-run")
    assert (planned.returncode, "2 would go one by one" in planned.stdout) == (0, True), planned
    silent = await asyncio.to_thread(whereupon, *about)
    assert (silent.returncode, "say why: --reason" in silent.stderr) == (2, True), silent
    unasked = await asyncio.to_thread(whereupon, *about, "--reason", "full disk")
    assert (unasked.returncode, "add --yes" in unasked.stderr) == (2, True), unasked
    assert "2 would go one by one" in unasked.stderr
    assert len(await positions(bus)) == 3
    assert await bus.operator.actions() == []
    why = ("--reason", "full disk", "--author", "ada", "--yes")
    done = await asyncio.to_thread(whereupon, *about, *why, "--rate", "500", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["deleted"], [holder["subscription"] for holder in told["holders"]]) == (2, ["asleep"])
    (action,) = await bus.operator.actions()
    assert (action.action, action.author, action.reason, action.subscription) == ("prune", "ada", "full disk", "")
    assert action.details == {
        "older_than": 0, "rate": 500, "finished": True, "dropped": [], "deleted": 2, "history": 0, "attempts": 0
    }  # fmt: skip
    shown = await asyncio.to_thread(whereupon, *about, *why)
    assert "asleep (lane 0: paused" in shown.stdout
    for age, reason in (("soon", "as in 30d"), ("999999d", "longer than anything was kept")):
        refused = await asyncio.to_thread(whereupon, "--url", url, "--older-than", age, *why)
        assert (refused.returncode, reason in refused.stderr) == (2, True), refused


async def test_pruning_at_a_rate_takes_no_more_at_once_than_a_second_may_have(bus: EventBus) -> None:
    heard_by(bus, "awake")
    async with bus:
        await publish(bus, *range(5))
        await bus.drain(10)
    with statements(bus.engine.sync_engine) as sent:
        report = await bus.operator.prune("full disk", older_than=ALL, rate=2)
    assert report.deleted == 5
    assert sum("DELETE FROM" in one.sql and "whereupon_log" in one.sql for one in sent) == 3
    for rate in (0, -1, float("inf"), float("nan")):
        with pytest.raises(ActionRefused, match="a rate is a number above 0"):
            await bus.operator.prune("full disk", older_than=ALL, rate=rate)
    with pytest.raises(ActionRefused, match="say why"):
        await bus.operator.prune(" ", older_than=ALL)


async def test_pruning_at_a_rate_goes_on_behind_what_may_not_go(on_postgres: EventBus) -> None:
    bus = on_postgres
    heard_by(bus, "awake")
    async with bus:
        await publish(bus, *range(5))
        await bus.drain(10)
    later = "UPDATE whereupon_log SET recorded_at = recorded_at + interval '1 day' WHERE position IN (2, 3)"
    await execute(bus, later)
    plan = await bus.operator.prunable(older_than=ALL)
    report = await bus.operator.prune("full disk", older_than=ALL, rate=1)
    assert (plan.deleted, report.deleted) == (3, 3)
    assert await positions(bus) == [2, 3]


async def test_a_pace_waits_for_as_long_as_so_much_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    now, waited = 100.0, list[float]()

    async def sleep(seconds: float) -> None:
        nonlocal now
        waited.append(seconds)
        now += seconds

    monkeypatch.setattr("whereupon.pace.time.monotonic", lambda: now)
    monkeypatch.setattr("whereupon.pace.asyncio.sleep", sleep)
    pace = Pace("prune", 4.0, 5000)
    for done in (0, 4, 8, 20):
        await pace.keep(done)
    assert (pace.at_once, waited) == (4, [1.0, 1.0, 3.0])
    now += 60
    await pace.keep(24)
    assert len(waited) == 3, "what is late already waits for nothing"
    assert Pace("prune", None, 5000).at_once == 5000
    assert Pace("prune", 0.25, 5000).at_once == 1


@pytest.mark.parametrize("older_than", [timedelta(days=-1), timedelta(days=10**6)])
async def test_an_age_that_is_none_is_refused_and_nothing_recorded(bus: EventBus, older_than: timedelta) -> None:
    await bus.deliveries()
    for pruning in (bus.operator.prunable(older_than=older_than), bus.operator.prune("why", older_than=older_than)):
        with pytest.raises(ValueError, match=r"an age is not negative|longer than anything was kept"):
            await pruning
    assert await bus.operator.actions() == []


async def test_of_a_pruning_that_was_interrupted_it_is_known_who_began_it(bus: EventBus) -> None:
    heard_by(bus, "awake")
    async with bus:
        await publish(bus, *range(4))
        await bus.drain(10)

    def full(line: str) -> None:
        raise RuntimeError(line)

    with pytest.raises(RuntimeError, match="deleted"):
        await bus.operator.prune("full disk", older_than=ALL, rate=2, author="ada", progress=full)
    (action,) = await bus.operator.actions()
    assert (action.author, action.details) == ("ada", {"older_than": 0, "rate": 2, "finished": False})
    assert len(await positions(bus)) == 2


# --- SQLite -----------------------------------------------------------------------------------------------------------


async def test_a_file_that_can_shrink_does(sqlite_url: str) -> None:
    engine = create_async_engine(sqlite_url)
    async with engine.connect() as connection:
        await connection.execute(text("PRAGMA auto_vacuum = INCREMENTAL"))
        await connection.execute(text("VACUUM"))
    await engine.dispose()
    bus = EventBus(sqlite_url)
    await bus.deliveries()
    await publish(bus, *range(3000))

    async def pages() -> int:
        return int((await rows(bus, "PRAGMA page_count"))[0][0])

    before = await pages()
    assert (await pruned(bus)).deleted == 3000
    assert await pages() < before / 2
    await bus.engine.dispose()


async def test_an_age_to_retain_is_positive(sqlite_url: str) -> None:
    with pytest.raises(ValueError, match="it is an age"):
        EventBus(sqlite_url, retain=timedelta(0))
