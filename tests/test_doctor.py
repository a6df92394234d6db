"""Each thing that may be wrong with a bus and its database is made wrong, and found, with a way out."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace

import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncSession

from tests.notebook import until
from whereupon import (
    AuditEventHandler,
    Delivery,
    DomainEvent,
    EventBus,
    Outcome,
    Retry,
    Workflow,
    doctor,
    schema,
)
from whereupon.doctor import Finding, Level

pytestmark = pytest.mark.integration

POLL = 0.05


class GongStruck(DomainEvent):
    tower: str
    cracked: bool = False


class GongCast(DomainEvent):
    tower: str


class GongTuningAttempted(DomainEvent, outcome=Outcome.ATTEMPTED):
    tower: str


class GongTuningSucceeded(DomainEvent):
    tower: str


class GongTuningFailed(DomainEvent, outcome=Outcome.FAILED):
    tower: str
    reason: str


GongTuning = Workflow(GongTuningAttempted, GongTuningSucceeded, GongTuningFailed)


async def listen(event: GongStruck) -> None:
    if event.cracked:
        raise ValueError("cracked")


async def admire(_: GongCast) -> None: ...


def belfry(url: str, *, deliver: bool = False, poll: float = POLL) -> EventBus:
    bus = EventBus(url, create_tables=True, deliver=deliver, poll_interval=poll, lease=2)
    bus.subscribe(GongStruck, listen, name="listen", ordered_by="tower", retry=Retry(max_attempts=1))
    return bus


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    """Which delivers nothing."""
    bus = belfry(database_url)
    async with bus:
        yield bus


async def ring(bus: EventBus, *events: DomainEvent) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)


async def found(bus: EventBus, check: str) -> list[Finding]:
    findings: list[Finding] = []
    async for one in bus.examine():
        assert all(finding.check == one.name and finding.way_out for finding in one.findings)
        if one.name == check:
            findings.extend(one.findings)
    return findings


async def only(bus: EventBus, check: str) -> Finding:
    [finding] = await found(bus, check)
    return finding


async def test_of_a_bus_that_is_well_nothing_is_found(database_url: str) -> None:
    async with belfry(database_url, deliver=True) as bus:
        event = GongStruck(tower="north")
        await ring(bus, event)
        await bus.wait_settled([event], 20)
        checks = [check async for check in bus.examine()]
    assert [finding for check in checks for finding in check.findings] == []
    assert len(checks) == 10


async def test_without_tables_nothing_else_is_asked(database_url: str) -> None:
    bus = EventBus(database_url, create_tables=False)
    try:
        checks = [check async for check in bus.examine()]
    finally:
        await bus.engine.dispose()
    [tables] = checks
    [finding] = tables.findings
    assert (finding.level, finding.way_out) == (Level.FAULT, "whereupon db upgrade")
    assert "has no whereupon tables" in finding.what


async def test_a_database_that_was_moved_is_found(postgres_url: str) -> None:
    bus = belfry(postgres_url)
    async with bus:
        async with bus.engine.begin() as connection:
            await connection.execute(text("UPDATE whereupon_cluster SET system_identifier = 1"))
        finding = await only(bus, "cluster")
    assert (finding.level, finding.way_out) == (Level.FAULT, "whereupon db rebase")


async def test_a_clock_that_goes_otherwise_is_found(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with belfry(postgres_url) as bus:
        assert await found(bus, "clock") == []
        for shift, told in ((90, "90.0 s ahead of"), (-90, "90.0 s behind")):
            clock = SimpleNamespace(monotonic=time.monotonic, time=lambda shift=shift: time.time() + shift)
            monkeypatch.setattr(doctor, "time", clock)
            assert told in (await only(bus, "clock")).what


async def test_a_transaction_that_stays_open_is_found(postgres_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with belfry(postgres_url) as bus, bus.engine.begin() as connection:
        pid = await connection.scalar(text("SELECT pg_backend_pid()"))
        assert not any(str(pid) in finding.what for finding in await found(bus, "transactions"))
        monkeypatch.setattr(doctor, "LATE", timedelta(0))
        monkeypatch.setattr(doctor, "SHOWN", 100)
        findings = await found(bus, "transactions")
        [finding] = (one for one in findings if f"backend {pid} " in one.what)
    assert "idle in transaction" in finding.what
    assert f"pg_terminate_backend({pid})" in finding.way_out


async def test_that_nobody_delivers_is_found(bus: EventBus, database_url: str) -> None:
    finding = await only(bus, "workers")
    assert finding.level is Level.FAULT
    assert "no worker runs" in finding.what
    async with belfry(database_url, deliver=True):
        assert await found(bus, "workers") == []


async def test_subscriptions_that_are_paused_or_that_no_worker_knows_are_found(
    bus: EventBus, database_url: str
) -> None:
    other = EventBus(database_url, poll_interval=POLL)
    other.subscribe(GongCast, admire, name="admire")
    async with other:
        await until(lambda: other._worker is not None)
        unserved = await only(bus, "subscriptions")
        assert (unserved.level, "no running worker knows listen" in unserved.what) == (Level.FAULT, True)
        # seen from a build that does not declare it
        [retired] = [one for one in await found(other, "subscriptions") if "listen" in one.what]
        assert retired.level is Level.WARNING
        assert "handlers retire listen" in retired.way_out
        await bus.operator.pause("listen", "bells are silent", author="ada")
        paused = await only(bus, "subscriptions")
    assert (paused.level, paused.what) == (Level.WARNING, "listen is paused")


async def test_builds_that_disagree_are_found(bus: EventBus, database_url: str) -> None:
    newer = belfry(database_url)
    newer.subscribe(GongCast, listen_to_both, name="both")
    async with newer:
        pass
    newest = belfry(database_url)
    newest.subscribe(GongCast, listen_to_both, name="both")
    newest.subscribe(GongStruck, listen_to_both, name="both")
    about_to_take_over = [one for one in await found(newest, "subscriptions") if "both" in one.what]
    assert "takes over" in about_to_take_over[0].what
    async with newest:
        pass
    [older] = [one for one in await found(newer, "subscriptions") if "both" in one.what]
    assert "it is an older build" in older.what
    assert "handlers adopt both" in older.way_out
    declared = belfry(database_url)
    declared.subscribe(GongCast, admire, name="admire")
    [unstarted] = [one for one in await found(declared, "subscriptions") if "admire" in one.what]
    assert unstarted.level is Level.NOTE
    for one in (newer, newest, declared):
        await one.engine.dispose()


async def listen_to_both(_: GongStruck | GongCast) -> None: ...


async def test_what_waits_too_long_is_found_and_not_what_was_delivered(
    bus: EventBus, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "LATE", timedelta(0))
    assert await found(bus, "lag") == []
    events = [GongStruck(tower=f"tower {number}") for number in range(20)]
    await ring(bus, *events)
    finding = await only(bus, "lag")
    assert (finding.level, f"listen owes GongStruck {events[0].event_id}" in finding.what) == (Level.FAULT, True)
    async with belfry(database_url, deliver=True) as worker:
        await worker.wait_settled(events, 20)
        await worker.drain(20)
    assert await found(bus, "lag") == []


async def test_dead_letters_and_what_is_overdue_are_found(
    bus: EventBus, database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cracked, behind = GongStruck(tower="north", cracked=True), GongStruck(tower="north")
    async with belfry(database_url, deliver=True) as worker:
        await ring(worker, cracked, behind)
        await until_parked(worker, behind)
    finding = await only(bus, "failures")
    assert finding.what == "listen has 1 dead letter, and 1 wait behind them"
    async with bus.engine.begin() as connection:
        await connection.execute(
            update(schema.exception)
            .where(schema.exception.c.state == "dead")
            .values(state="retrying", next_at=datetime.now(UTC) - timedelta(minutes=5))
        )
    overdue = await only(bus, "failures")
    assert (overdue.level, overdue.what) == (
        Level.FAULT,
        "a delivery of listen has been due for 5 min, and nobody tries it",
    )


async def until_parked(bus: EventBus, event: GongStruck) -> None:
    async def parked() -> bool:
        return [one.state for one in await bus.deliveries(event.event_id)] == ["parked"]

    for _ in range(300):
        if await parked():
            return
        await asyncio.sleep(0.05)
    raise AssertionError("it was never parked")


async def test_events_that_nobody_hears_and_handlers_that_nobody_feeds_are_found(
    bus: EventBus, database_url: str
) -> None:
    await ring(bus, GongCast(tower="north"))
    deaf, unfed = await found(bus, "hearing")
    assert (deaf.level, deaf.what) == (Level.WARNING, "nobody reacts to GongCast (1 of the last 1 events)")
    assert unfed.what == "listen heard nothing among the last 1 events: it hears GongStruck"
    bus.register(AuditEventHandler())
    other = belfry(database_url)
    other.register(AuditEventHandler())
    async with other:
        deaf, _ = await found(other, "hearing")
    assert (deaf.level, "only what hears everything" in deaf.what) == (Level.NOTE, True)
    immediately = belfry(database_url)
    immediately.subscribe(GongCast, admire, name="at once", delivery=Delivery.AFTER_COMMIT)
    assert not any("GongCast" in finding.what for finding in await found(immediately, "hearing"))
    await immediately.engine.dispose()


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"type": "GongMelted"}, "this build knows no class for GongMelted"),
        ({"version": 7}, "GongStruck is in the log in version 7, and this build knows 1"),
    ],
)
async def test_events_that_this_build_can_t_read_are_found(
    bus: EventBus, changes: dict[str, object], told: str
) -> None:
    await ring(bus, GongStruck(tower="north"))
    async with bus.engine.begin() as connection:
        await connection.execute(update(schema.log).values(**changes))
    assert any(told in finding.what for finding in await found(bus, "hearing"))


async def test_an_attempt_whose_process_is_gone_is_found(bus: EventBus, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "LATE", timedelta(0))
    async with bus.workflow(GongTuning, tower="north") as attempt:
        assert await found(bus, "workflows") == []
        async with bus.engine.begin() as connection:
            await connection.execute(text("DELETE FROM whereupon_process"))
        finding = await only(bus, "workflows")
        assert finding.level is Level.FAULT
        assert f"GongTuning ({attempt.attempted.event_id})" in finding.what
        await attempt.failed("out of tune")
