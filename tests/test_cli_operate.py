"""Operating from the command line, while a worker process owns the lanes."""

from __future__ import annotations

import asyncio
import json
import os
import pty
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.test_cli import refused, run
from whereupon import DomainEvent, EventBus

pytestmark = [pytest.mark.integration, pytest.mark.slow]

APP = """
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy import text
from whereupon import DomainEvent, EventBus, Retry

bus = EventBus({url!r}, poll_interval=0.05, lease=2)

class CrateLoaded(DomainEvent):
    ship: str
    number: int
    leaks: bool = False

@bus.subscribe(CrateLoaded, name="crates", ordered_by="ship", retry=Retry(max_attempts=1), lanes=2)
async def crates(event: CrateLoaded, session: AsyncSession) -> None:
    if event.leaks:
        raise ValueError(f"crate {{event.number}} leaks")
    await session.execute(text("INSERT INTO crate (ship, number) VALUES (:ship, :number)"),
                          {{"ship": event.ship, "number": event.number}})
"""


class CrateLoaded(DomainEvent):
    ship: str
    number: int
    leaks: bool = False


async def _nothing(event: CrateLoaded) -> None: ...


@pytest.fixture
def dock(tmp_path: Path, database_url: str) -> Path:
    (tmp_path / "dock.py").write_text(APP.format(url=database_url))
    return tmp_path


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    """The publisher's side: it delivers nothing itself."""
    bus = EventBus(database_url, create_tables=True, deliver=False)
    bus.subscribe(CrateLoaded, _nothing, name="crates", ordered_by="ship", lanes=2)
    await bus.create_tables()
    key = "INTEGER PRIMARY KEY" if "sqlite" in database_url else "bigserial PRIMARY KEY"
    async with bus.engine.begin() as connection:
        await connection.execute(text(f"CREATE TABLE crate (id {key}, ship TEXT NOT NULL, number INTEGER NOT NULL)"))
    async with bus:
        yield bus


@pytest.fixture
def worker(dock: Path, bus: EventBus) -> Iterator[None]:
    process = subprocess.Popen(
        [sys.executable, "-m", "whereupon.cli", "worker", "dock:bus"], cwd=dock, stderr=subprocess.DEVNULL
    )
    yield
    process.kill()
    process.wait()


async def load(bus: EventBus, *crates: tuple[str, int, bool]) -> list[CrateLoaded]:
    events = [CrateLoaded(ship=ship, number=number, leaks=leaks) for ship, number, leaks in crates]
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)
    return events


async def states(bus: EventBus, events: list[CrateLoaded]) -> list[str]:
    found = {state.event_id: state.state for state in await bus.deliveries(*(event.event_id for event in events))}
    return [found[event.event_id] for event in events]


async def reaches(bus: EventBus, events: list[CrateLoaded], expected: list[str]) -> None:
    found: list[str] = []
    try:
        async with asyncio.timeout(30):
            while (found := await states(bus, events)) != expected:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
    except TimeoutError:
        raise AssertionError(f"{found} never became {expected}") from None


async def loaded(bus: EventBus, ship: str) -> list[int]:
    async with bus.engine.connect() as connection:
        query = text("SELECT number FROM crate WHERE ship = :ship ORDER BY id")
        return list(await connection.scalars(query, {"ship": ship}))


async def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return await asyncio.to_thread(run, folder, *arguments)


async def answered(folder: Path, *arguments: str) -> Any:
    """What it answers in JSON."""
    done = await command(folder, *arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.usefixtures("worker")
async def test_dead_letters_are_listed_retried_edited_and_skipped_while_a_worker_runs(
    bus: EventBus, dock: Path
) -> None:
    events = await load(
        bus,
        *(("Anna", number, number in (1, 3, 5)) for number in range(7)),
        *(("Bela", number, False) for number in range(3)),
    )
    await reaches(bus, events, ["succeeded", "dead", *["parked"] * 5, *["succeeded"] * 3])
    [letter] = await answered(dock, "dead", "list", "dock:bus")
    assert (letter["event_id"], letter["error_type"]) == (str(events[1].event_id), "ValueError")
    shown = await command(dock, "dead", "show", "crates", str(events[1].event_id), "dock:bus")
    assert '"number":1' in shown.stdout
    assert "ValueError: crate 1 leaks" in shown.stdout

    retry = ("dead", "retry", "dock:bus", "--subscription", "crates", "--reason", "dried")
    done = await command(dock, *retry)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "retry 1 of these:" in done.stderr
    assert str(events[1].event_id) in done.stderr
    assert "add --yes" in done.stderr
    assert await answered(dock, *retry, "--yes") == {"changed": 1}
    async with asyncio.timeout(20):  # it leaks still
        while [action.action for action in await bus.operator.actions()] != ["retry"] or (  # noqa: ASYNC110
            await states(bus, events)
        )[1] != "dead":
            await asyncio.sleep(0.05)

    edit = ("dead", "edit", "crates", str(events[1].event_id), "dock:bus", "--reason", "sealed", "--yes")
    bad = await command(dock, *edit, "--payload", '{"ship": "Anna", "number": "one"}')
    assert bad.returncode == 1
    assert "could not be delivered either" in bad.stderr
    assert "--payload is no JSON object" in refused(await command(dock, *edit, "--payload", "one"), 2)
    (dock / "sealed.json").write_text('{"ship": "Anna", "number": 1}')
    assert await answered(dock, *edit, "--payload", "@sealed.json") == {"changed": 1}
    await reaches(bus, events[:5], ["succeeded", "succeeded", "succeeded", "dead", "parked"])

    skip = ("dead", "skip", "dock:bus", "--subscription", "crates", "--reason", "overboard", "--yes")
    assert await answered(dock, *skip, "--event", str(events[3].event_id)) == {"changed": 1}
    await reaches(bus, events[:6], ["succeeded", "succeeded", "succeeded", "skipped", "succeeded", "dead"])
    assert await answered(dock, *skip, "--error-type", "ValueError", "--author", "ada") == {"changed": 1}
    await reaches(bus, events[5:7], ["skipped", "succeeded"])
    assert await loaded(bus, "Anna") == [0, 1, 2, 4, 6]
    assert await loaded(bus, "Bela") == [0, 1, 2]
    actions = await bus.operator.actions()
    assert [(action.action, action.reason) for action in actions] == [
        ("retry", "dried"), ("edit", "sealed"), ("skip", "overboard"), ("skip", "overboard"),
    ]  # fmt: skip
    assert actions[-1].author == "ada"


@pytest.mark.usefixtures("worker")
async def test_a_worker_process_is_paused_given_other_lanes_and_resumed(bus: EventBus, dock: Path) -> None:
    first = await load(bus, ("Anna", 0, False))
    await reaches(bus, first, ["succeeded"])
    why = ("--reason", "storm", "--yes")
    assert await answered(dock, "handlers", "pause", "crates", "dock:bus", *why) == {
        "subscription": "crates", "changed": True,
    }  # fmt: skip
    async with asyncio.timeout(20):
        while (await bus.operator.handlers())[0].held:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    events = await load(bus, *(("Anna", number, False) for number in range(1, 30)))
    await asyncio.sleep(0.5)
    assert await states(bus, events) == ["waiting"] * 29
    listed = await command(dock, "handlers", "list", "dock:bus")
    assert listed.stdout == "crates: paused, ordered by ship\n  storm\n"
    changed = await answered(dock, "handlers", "lanes", "crates", "5", "dock:bus", *why)
    assert changed == {"subscription": "crates", "lanes": 5, "before": 2}
    assert await states(bus, events) == ["retrying", *["parked"] * 28]
    done = await command(dock, "handlers", "resume", "crates", "--url", str(bus.engine.url), *why)
    assert done.stdout == "crates is resumed.\n", done.stderr
    await reaches(bus, events, ["succeeded"] * 29)
    assert await loaded(bus, "Anna") == list(range(30))
    served = await command(dock, "handlers", "retire", "crates", "dock:bus", *why)
    assert served.returncode == 1
    assert "crates is served by" in served.stderr
    gone = await answered(dock, "handlers", "retire", "crates", "dock:bus", "--force", *why)
    assert gone == {"subscription": "crates", "exceptions": {}}
    assert (await command(dock, "handlers", "list", "dock:bus")).stdout == "no subscriptions.\n"


@pytest.mark.usefixtures("bus")
async def test_what_is_asked_wrongly_is_refused_with_the_way_out(dock: Path) -> None:
    done = await command(dock, "handlers", "pause", "crates", "dock:bus")
    assert (done.returncode, done.stdout) == (2, "")
    assert "--reason" in done.stderr
    why = ("--reason", "storm", "--yes")
    assert "there is crates" in refused(await command(dock, "handlers", "pause", "crate", "dock:bus", *why), 2)
    assert "say which: --subscription" in refused(await command(dock, "dead", "skip", "dock:bus", *why), 2)
    canary = await command(dock, "dead", "retry", "dock:bus", "--canary", "--error-type", "ValueError", *why)
    assert "--canary takes --subscription" in refused(canary, 2)
    empty = await command(dock, "handlers", "pause", "crates", "dock:bus", "--reason", " ", "--yes")
    assert empty.returncode == 1
    assert "say why" in empty.stderr


@pytest.mark.parametrize(("said", "code", "paused"), [("y\n", 0, True), ("\n", 1, False)])
async def test_on_a_terminal_it_asks_and_does_only_what_was_agreed_to(
    bus: EventBus, dock: Path, said: str, code: int, paused: bool
) -> None:
    ours, theirs = pty.openpty()
    os.write(ours, said.encode())
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "whereupon.cli", "handlers", "pause", "crates", "dock:bus", "--reason", "storm"),
        cwd=dock, stdin=theirs, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    async with asyncio.timeout(30):
        _, errors = await process.communicate()
    os.close(theirs)
    os.close(ours)
    assert process.returncode == code, errors
    assert b"pause crates: 2 lanes, 0 held by workers; exceptions: none" in errors
    assert b"Do it? [y/N]" in errors
    [crates] = await bus.operator.handlers()
    assert crates.paused is paused


@pytest.mark.usefixtures("worker")
async def test_a_range_is_replayed_and_a_definition_adopted_with_a_reason(bus: EventBus, dock: Path) -> None:
    events = await load(bus, *(("Anna", number, False) for number in range(4)))
    await reaches(bus, events, ["succeeded"] * 4)
    replay = ("handlers", "replay", "crates", "dock:bus", "--reason", "water in the hold")
    asked = await command(dock, *replay, "--rate", "50")
    assert (asked.returncode, "4 events at most (positions 1 to 4) at 50 a second" in asked.stderr) == (2, True), asked
    nothing = await command(dock, *replay, "--since", "2100-01-01")
    assert (nothing.returncode, "nothing in the log that crates hears" in nothing.stderr) == (1, True), nothing
    done = await answered(dock, *replay, "--yes")
    assert done["generation"] == 1
    async with asyncio.timeout(30):
        while await loaded(bus, "Anna") != [0, 1, 2, 3, 0, 1, 2, 3]:  # noqa: ASYNC110
            await asyncio.sleep(0.05)
    done = await answered(dock, "handlers", "adopt", "crates", "dock:bus", "--reason", "to be sure", "--yes")
    assert done["changed"] is False
    assert [(action.action, action.reason) for action in await bus.operator.actions("crates")] == [
        ("replay", "water in the hold")
    ]


@pytest.mark.usefixtures("worker")
async def test_dead_letters_are_grouped_by_cause_and_tried_by_a_canary_that_says_why_it_stopped(
    bus: EventBus, dock: Path
) -> None:
    events = await load(bus, *((f"ship {number}", number, True) for number in range(14)))
    await reaches(bus, events, ["dead"] * 14)
    [group] = await answered(dock, "dead", "groups", "dock:bus")
    assert (group["subscription"], group["number"], group["error_type"]) == ("crates", 14, "ValueError")
    told = (await command(dock, "dead", "groups", "dock:bus")).stdout
    assert f"{group['fingerprint']}  crates  14  ValueError: crate" in told
    cause = ("--subscription", "crates", "--fingerprint", group["fingerprint"], "--reason", "caulked")
    stopped = await command(dock, "dead", "retry", "dock:bus", "--canary", *cause, "--yes")
    assert stopped.returncode == 1
    assert "retried 1: 1 failed. Stopped, the failure is back: ValueError: crate" in stopped.stderr
    assert "1 dead letters are delivered again, and the others left as they are." in stopped.stdout
    async with bus.engine.begin() as connection:
        for table in ("whereupon_exception", "whereupon_log"):
            await connection.execute(text(f"UPDATE {table} SET payload = :sound"), {"sound": sound(events[0])})
    steps = (await answered(dock, "dead", "retry", "dock:bus", "--canary", *cause, "--yes"))["steps"]
    assert [(step["retried"], step["outcomes"]["succeeded"]) for step in steps] == [(1, 1), (10, 10), (3, 3)]
    assert await answered(dock, "dead", "groups", "dock:bus") == []


def sound(event: CrateLoaded) -> bytes:
    """An event that does not leak, as it is stored."""
    fields = {"event_id": str(event.event_id), "occurred_at": event.occurred_at.isoformat(), "ship": "any", "number": 1}
    return json.dumps(fields).encode()


async def test_a_subscription_from_now_gets_the_past_once(database_url: str, dock: Path, bus: EventBus) -> None:
    await load(bus, ("Anna", 1, False), ("Anna", 2, False))
    heard: list[int] = []
    late = EventBus(database_url, poll_interval=0.05)

    @late.subscribe(CrateLoaded, name="customs")
    async def customs(event: CrateLoaded) -> None:
        heard.append(event.number)

    (dock / "late.py").write_text((dock / "dock.py").read_text().replace('name="crates"', 'name="customs"'))
    async with late:
        await load(late, ("Anna", 3, False))
        await late.drain(20)
        assert heard == [3]
        backfill = ("handlers", "backfill", "customs", "late:bus", "--reason", "new rules", "--rate", "100", "--yes")
        assert await answered(dock, *backfill) == {"subscription": "customs", "generation": 1}
        async with asyncio.timeout(30):
            while sorted(heard) != [1, 2, 3]:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        again = await command(dock, *backfill)
        assert again.returncode == 1
        assert "customs was given the past at" in again.stderr
        await late.drain(20)
    assert sorted(heard) == [1, 2, 3]


def test_completion_is_installed_for_the_shell_that_is_named(tmp_path: Path) -> None:
    done = subprocess.run(
        [Path(sys.executable).with_name("whereupon"), "--install-completion", "--shell", "bash"],
        env={**os.environ, "HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    written = [path for path in tmp_path.rglob("*") if path.is_file() and "explain" in path.read_text()]
    assert written, done.stdout
    checked = subprocess.run(["bash", "-n", *written], check=False, capture_output=True)
    assert checked.returncode == 0, checked.stderr
