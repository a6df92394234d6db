"""Commands that only look, from the command line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from tests.test_cli import refused, run
from whereupon import AuditEventHandler, DomainEvent, EventBus, Retry, request_metadata

pytestmark = [pytest.mark.integration, pytest.mark.slow]

APP = """
from whereupon import AuditEventHandler, DomainEvent, EventBus, Retry

bus = EventBus({url!r}, poll_interval=0.05)

class BarrelFilled(DomainEvent, audit="barrel_filled", resource="barrel", resource_id="number"):
    number: int
    leaks: bool = False

@bus.subscribe(BarrelFilled, name="barrels", retry=Retry(max_attempts=1))
async def barrels(event: BarrelFilled) -> None: ...

bus.register(AuditEventHandler())
"""


class BarrelFilled(DomainEvent, audit="barrel_filled", resource="barrel", resource_id="number"):
    number: int
    leaks: bool = False


async def barrels(event: BarrelFilled) -> None:
    if event.leaks:
        raise ValueError("a stave\x1b[2J is missing")


@pytest.fixture
def cellar(tmp_path: Path, sqlite_url: str) -> Path:
    (tmp_path / "cellar.py").write_text(APP.format(url=sqlite_url))
    return tmp_path


@pytest.fixture
async def bus(sqlite_url: str) -> AsyncIterator[EventBus]:
    bus = EventBus(sqlite_url, poll_interval=0.05)
    bus.subscribe(BarrelFilled, barrels, name="barrels", retry=Retry(max_attempts=1))
    bus.register(AuditEventHandler())
    async with bus:
        yield bus


async def fill(bus: EventBus, *events: BarrelFilled) -> None:
    with request_metadata({"actor": "ada\x1b[2J", "ip_address": "192.0.2.7"}):
        async with AsyncSession(bus.engine) as session, session.begin():
            receipt = await bus.publish(*events, session=session)
    await receipt.settled(20)


async def command(folder: Path, *arguments: str, code: int = 0) -> str:
    done = await asyncio.to_thread(run, folder, *arguments)
    assert done.returncode == code, done.stderr + done.stdout
    assert "\x1b" not in done.stdout  # what somebody typed moves no reader's cursor
    return done.stdout


async def answered(folder: Path, *arguments: str) -> Any:
    return json.loads(await command(folder, *arguments, "--json"))


async def test_an_event_is_explained_by_its_id_with_a_bus_or_a_url(bus: EventBus, cellar: Path) -> None:
    well, leaks = BarrelFilled(number=1), BarrelFilled(number=2, leaks=True)
    await fill(bus, well, leaks)
    told = await command(cellar, "explain", str(leaks.event_id), "cellar:bus")
    assert told.startswith(f"BarrelFilled {leaks.event_id}, version 1\n")
    assert "actor ada\\x1b[2J, from 192.0.2.7" in told
    assert "dead" in told
    assert "ValueError: a stave\\x1b[2J is missing" in told
    assert f"whereupon dead show barrels {leaks.event_id}" in told
    url = str(bus.engine.url)
    story = await answered(cellar, "explain", str(well.event_id), "--url", url)
    assert [(one["subscription"], one["state"]) for one in story["deliveries"]] == [
        ("AuditEventHandler", "in publish"),
        ("barrels", "succeeded"),
    ]
    shown = await command(cellar, "events", "show", str(leaks.event_id), "cellar:bus")
    assert "number  2" in shown.replace("       ", "  ")
    gone = await asyncio.to_thread(run, cellar, "explain", str(uuid7()), "cellar:bus")
    assert "by its id it was made at" in refused(gone, 1)


async def test_a_type_is_explained_by_the_build_that_serves_it(cellar: Path) -> None:
    told = await command(cellar, "explain", "BarrelFilled", "cellar:bus")
    assert "a publish takes 2 SQL statements of whereupon's" in told
    assert "barrels: durable, timeout" in told
    assert "one attempt, then dead" in told
    misspelt = await asyncio.to_thread(run, cellar, "explain", "BarrelFiled", "cellar:bus")
    assert "is it BarrelFilled?" in refused(misspelt, 1)
    no_build = await asyncio.to_thread(run, cellar, "explain", "BarrelFilled", "--url", "x")
    assert "is no event's id" in refused(no_build, 2)


async def test_the_doctor_ends_with_one_if_something_is_not_delivered(bus: EventBus, cellar: Path) -> None:
    assert "ok       workers" in await command(cellar, "doctor", "cellar:bus")
    await bus.close()
    checks = await answered_with(cellar, 1, "doctor", "cellar:bus")
    [workers] = [check for check in checks if check["name"] == "workers"]
    assert workers["findings"][0]["level"] == "fault"
    told = await command(cellar, "doctor", "cellar:bus", code=1)
    assert "fault    workers: no worker runs" in told
    assert "→ start one: `whereupon worker module:bus`" in told


async def answered_with(folder: Path, code: int, *arguments: str) -> Any:
    return json.loads(await command(folder, *arguments, "--json", code=code))


async def test_events_attempts_and_the_audit_trail_are_listed_page_by_page(bus: EventBus, cellar: Path) -> None:
    barrels_filled = [BarrelFilled(number=number) for number in range(3)]
    await fill(bus, *barrels_filled)
    listed = await command(cellar, "events", "list", "cellar:bus", "--limit", "2")
    assert str(barrels_filled[2].event_id) in listed.splitlines()[0]
    before = listed.splitlines()[-1].removeprefix("there may be more: --before ")
    [oldest] = await answered(cellar, "events", "list", "cellar:bus", "--before", before)
    assert oldest["event_id"] == str(barrels_filled[0].event_id)
    assert await command(cellar, "workflows", "cellar:bus") == "no attempts.\n"
    [entry] = await answered(cellar, "audit", "cellar:bus", "--resource", "barrel:1", "--ip", "192.0.2.7")
    assert entry["event_id"] == str(barrels_filled[1].event_id)
    unnamed = await asyncio.to_thread(run, cellar, "audit", "cellar:bus", "--resource", "barrel")
    assert "names none" in refused(unnamed, 2)


async def test_the_tail_shows_what_was_and_what_comes_until_it_is_told_to_stop(bus: EventBus, cellar: Path) -> None:
    before, after = BarrelFilled(number=1), BarrelFilled(number=2)
    await fill(bus, before)
    tail = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whereupon.cli", "events", "tail", "cellar:bus", "--json",
        cwd=cellar, env=os.environ | {"PYTHONUNBUFFERED": "1"}, stdout=subprocess.PIPE,
    )  # fmt: skip
    assert tail.stdout is not None
    try:
        async with asyncio.timeout(60):
            assert json.loads(await tail.stdout.readline())["event_id"] == str(before.event_id)
            await fill(bus, after)
            assert json.loads(await tail.stdout.readline())["event_id"] == str(after.event_id)
            tail.send_signal(signal.SIGINT)
            assert await tail.wait() == 0
    finally:
        if tail.returncode is None:
            tail.kill()
