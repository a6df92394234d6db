"""`whereupon dashboard` as a process, and what is in the wheel."""

from __future__ import annotations

import asyncio
import re
import signal
import sys
import zipfile
from asyncio.subprocess import PIPE
from pathlib import Path

import httpx
import pytest
from hatchling.builders.wheel import WheelBuilder

from tests.test_cli import refused, run

pytestmark = [pytest.mark.integration, pytest.mark.slow]

ROOT = Path(__file__).parents[1]
APP = """
from whereupon import DomainEvent, EventBus

bus = EventBus({url!r})

class LanternHung(DomainEvent):
    height: int

@bus.subscribe(LanternHung)
async def admire_lantern(event: LanternHung) -> None: ...

def who(request):
    return "reader"
"""


@pytest.fixture
def lantern(tmp_path: Path, sqlite_url: str) -> Path:
    (tmp_path / "lantern.py").write_text(APP.format(url=sqlite_url))
    assert run(tmp_path, "db", "upgrade", "lantern:bus").returncode == 0
    return tmp_path


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
async def test_it_answers_on_this_machine_and_ends_in_order_though_somebody_watches(
    lantern: Path, number: signal.Signals
) -> None:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "whereupon.cli", "dashboard", "lantern:bus", "--port", "0",
        cwd=lantern, stdout=PIPE, stderr=PIPE,
    )  # fmt: skip
    assert process.stderr is not None
    try:
        async with asyncio.timeout(60):
            said = (await process.stderr.readline()).decode()
            found = re.search(r"http://127\.0\.0\.1:\d+/", said)
            assert found is not None, said + (await process.stderr.read()).decode()
            async with httpx.AsyncClient(base_url=found[0], timeout=30) as client:
                page = await client.get("/handlers")
                assert "admire_lantern" in page.text
                assert page.headers["x-frame-options"] == "DENY"
                assert (await client.get("/", headers={"host": "evil.example"})).status_code == 421
                async with client.stream("GET", "/stream") as stream:
                    parts = stream.aiter_text()
                    assert "retry" in await anext(parts)
                    process.send_signal(number)
                    async for _ in parts:  # until the server ends it
                        pass
            rest = (await process.stderr.read()).decode()
            assert await process.wait() == 0, rest
            assert rest == ""
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def test_to_others_it_is_shown_only_if_something_says_to_whom(lantern: Path) -> None:
    assert "nothing says who may look" in refused(run(lantern, "dashboard", "lantern:bus", "--host", "0.0.0.0"), 2)
    no_function = run(lantern, "dashboard", "lantern:bus", "--host", "0.0.0.0", "--authorize", "lantern:nobody")
    assert "names no function" in refused(no_function, 2)
    not_one = run(lantern, "dashboard", "lantern:bus", "--host", "0.0.0.0", "--authorize", "lantern:bus.database")
    assert "not a function" in refused(not_one, 2)
    assert "say which database" in refused(run(lantern, "dashboard"), 2)


def test_a_port_that_is_taken_is_told(lantern: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "Give it another --port" in refused(run(lantern, "dashboard", "lantern:bus", "--port", port), 2)


def test_the_wheel_has_everything_that_the_pages_are_made_of(tmp_path: Path) -> None:
    [wheel] = WheelBuilder(str(ROOT)).build(directory=str(tmp_path), versions=["standard"])
    with zipfile.ZipFile(wheel) as archive:
        inside = set(archive.namelist())
    assets = ROOT / "src" / "whereupon" / "dashboard_assets"
    wanted = {f"whereupon/dashboard_assets/{path.relative_to(assets)}" for path in assets.rglob("*") if path.is_file()}
    assert len(wanted) > 25
    assert wanted <= inside
