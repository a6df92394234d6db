"""Dashtam as a process of its own."""

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import httpx
import pytest
from served import eventually

pytestmark = pytest.mark.integration


@contextmanager
def serving(port: int, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dashtam", "serve", "--port", str(port)]
    output = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    with subprocess.Popen(command, env=os.environ | environment, text=True, **output) as process:  # type: ignore[call-overload]
        try:
            yield process
        finally:
            process.kill()


async def answers(process: subprocess.Popen[str], url: str) -> bool:
    assert process.poll() is None, process.communicate()[0]
    try:
        async with httpx.AsyncClient() as http:
            return (await http.get(f"{url}/health")).status_code == 200
    except httpx.TransportError:
        return False


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
async def test_dashtam_registers_people_and_stops_when_asked_to(
    sqlite_url: str, unused_tcp_port: int, asked: signal.Signals
) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    with serving(unused_tcp_port, DASHTAM_DATABASE_URL=sqlite_url, DASHTAM_LOG_FORMAT="console") as process:
        await eventually(lambda: answers(process, url))
        async with httpx.AsyncClient(base_url=url) as http:
            person = {"email": "ada@example.com", "password": "correct horse 7"}
            assert (await http.post("/users", json=person)).status_code == 202
            assert (await http.post("/sessions", json=person)).json()["reason"] == "invalid_credentials"
        process.send_signal(asked)
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert "user_registration_succeeded" in output
    assert "never awaited" not in output
    assert "Exception ignored" not in output


async def test_metrics_are_told_where_the_settings_say_and_not_to_the_public(
    sqlite_url: str, unused_tcp_port_factory: Callable[[], int]
) -> None:
    public, told = unused_tcp_port_factory(), unused_tcp_port_factory()
    url = f"http://127.0.0.1:{public}"
    with serving(public, DASHTAM_DATABASE_URL=sqlite_url, DASHTAM_METRICS_PORT=str(told)) as process:
        await eventually(lambda: answers(process, url))
        async with httpx.AsyncClient(base_url=url) as http:
            person = {"email": "ada@example.com", "password": "correct horse 7"}
            assert (await http.post("/users", json=person)).status_code == 202
            assert (await http.get("/metrics")).status_code == 404
            page = (await http.get(f"http://127.0.0.1:{told}/metrics")).text
    assert 'whereupon_workflows_closed_total{outcome="succeeded",workflow="UserRegistration"} 1.0' in page
    assert "ada@example.com" not in page


async def test_a_port_that_is_taken_is_an_error(tmp_path: Path, unused_tcp_port: int) -> None:
    first = f"sqlite+aiosqlite:///{tmp_path}/first.db"
    second = f"sqlite+aiosqlite:///{tmp_path}/second.db"
    with serving(unused_tcp_port, DASHTAM_DATABASE_URL=first) as process:
        await eventually(lambda: answers(process, f"http://127.0.0.1:{unused_tcp_port}"))
        with serving(unused_tcp_port, DASHTAM_DATABASE_URL=second) as other:
            output, _ = other.communicate(timeout=30)
    assert other.returncode > 0
    assert "address already in use" in output


async def test_what_a_client_says_of_its_address_is_not_believed_and_its_password_s_hash_is_in_no_log(
    tmp_path: Path, unused_tcp_port: int
) -> None:
    database = tmp_path / "app.db"
    url = f"http://127.0.0.1:{unused_tcp_port}"
    environment = {"DASHTAM_DATABASE_URL": f"sqlite+aiosqlite:///{database}", "DASHTAM_LOG_LEVEL": "DEBUG"}
    with serving(unused_tcp_port, **environment) as process:
        await eventually(lambda: answers(process, url))
        async with httpx.AsyncClient(base_url=url, headers={"X-Forwarded-For": "203.0.113.7"}) as http:
            person = {"email": "ada@example.com", "password": "correct horse 7"}
            assert (await http.post("/users", json=person)).status_code == 202
        process.terminate()
        output, _ = process.communicate(timeout=30)
    with closing(sqlite3.connect(database)) as connection:
        ((hashed,),) = connection.execute("SELECT password_hash FROM users").fetchall()
        found = connection.execute("SELECT DISTINCT ip_address FROM whereupon_audit")
        assert found.fetchall() == [("127.0.0.1",)]
    assert '"level": "debug"' in output
    assert hashed not in output
    assert "correct horse 7" not in output
