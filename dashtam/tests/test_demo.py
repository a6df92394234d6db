"""`make demo`, as its user meets it: a process, a terminal, two web pages, Ctrl-C."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

import dashtam.demo

pytestmark = [pytest.mark.integration, pytest.mark.slow]

PATIENCE = 180.0


@contextmanager
def demo(folder: Path, *arguments: str) -> Iterator[subprocess.Popen[str]]:
    process = subprocess.Popen(
        [sys.executable, "-m", "dashtam.demo", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "160", "PYTHONUNBUFFERED": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()


def all_of(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=PATIENCE)
    return output


def until(process: subprocess.Popen[str], telling: str) -> str:
    """What it prints up to the line with `telling`."""
    assert process.stdout is not None
    printed = ""
    deadline = time.monotonic() + PATIENCE
    for line in process.stdout:
        printed += line
        if telling in line:
            return printed
        assert time.monotonic() < deadline, printed
    raise AssertionError(f"it ended without {telling!r}:\n{printed}")


def test_the_demo_shows_what_followed_each_step_and_ends_by_itself(database_url: str, tmp_path: Path) -> None:
    with demo(tmp_path, "--once", "--database-url", database_url) as process:
        output = all_of(process)
    assert process.returncode == 0, output
    assert output.count("UserRegistrationSucceeded") >= 2
    assert output.count("UserRegistrationFailed") >= 3
    for reason in ("email_taken", "weak_password", "invalid_email", "invalid_grant"):
        assert f"reason: {reason}" in output
    for event in (
        "ProviderConnectionSucceeded",
        "AccountCreated ×",
        "AccountBalanceUpdated",
        "TransactionSyncSucceeded",
    ):
        assert event in output
    assert output.count("in the inbox: Welcome to Dashtam") == 2
    for mail in ("You are in", "Sandbox Bank needs your permission again", "Your password was changed"):
        assert f"in the inbox: {mail}" in output
    assert re.search(r"InitialSettings\S*\s+succeeded\s+\d+ ms\s+[\d.]+ ms", output), output
    assert '"event": "user_registration_succeeded"' in output.replace("\n", " ")


def test_people_live_a_day_with_faults_and_every_event_is_accounted_for(database_url: str, tmp_path: Path) -> None:
    with demo(tmp_path, "--simulate", "10", "--seed", "7", "--database-url", database_url) as process:
        output = all_of(process)
    assert process.returncode == 0, output
    assert "10/10 people" in output
    assert "Nothing is missing" in output
    assert re.search(r"AccountCreated\s+[1-9]", output), output
    numbers = r"\s+\d+\s+(\d+)\s+(\d+)\s+(\d+)\s+(\d+)"
    published = re.findall(rf"^[A-Z]\w+(?:Attempted|Succeeded|Failed){numbers}", output, re.M)
    assert len(published) > 15
    assert all(int(owed) == int(done) + int(skipped) and missing == "0" for owed, done, skipped, missing in published)


@pytest.mark.parametrize("people", ["0", "1001", "many"])
def test_more_people_than_the_bank_knows_are_refused(people: str, tmp_path: Path) -> None:
    with demo(tmp_path, "--simulate", people) as process:
        output = all_of(process)
    assert process.returncode == 2
    assert "--simulate" in output


def test_the_demo_stays_up_with_docs_and_inbox_until_ctrl_c(tmp_path: Path) -> None:
    leftover = tmp_path / ".demo" / "dashtam.db"
    leftover.parent.mkdir()
    leftover.write_text("of an older demo, and no database at all", encoding="utf-8")
    with demo(tmp_path) as process:
        output = until(process, "Ctrl-C")
        docs = re.search(r"API docs\s+(http://\S+)", output)
        inbox = re.search(r"Inbox\s+(http://\S+)", output)
        assert docs is not None, output
        assert inbox is not None, output
        assert httpx.get(docs[1]).status_code == 200
        page = httpx.get(inbox[1]).text
        assert page.count("Welcome to Dashtam") == 2
        bank = re.search(r"Bank\s+(http://\S+)", output)
        assert bank is not None, output
        assert httpx.get(bank[1]).status_code == 200
        mail = re.search(r'href="(/mails/\d+)"', page)
        assert mail is not None
        shown = httpx.get(inbox[1].rstrip("/") + mail[1])
        assert shown.status_code == 200
        assert "Dashtam" in shown.text
        assert httpx.get(inbox[1] + "mails/999").status_code == 404
        process.send_signal(signal.SIGINT)
        rest = all_of(process)
    assert process.returncode == 0, rest
    assert "Traceback" not in rest


def test_two_demos_at_once_take_different_ports(tmp_path: Path) -> None:
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    with demo(tmp_path / "one") as first:
        until(first, "Ctrl-C")
        with demo(tmp_path / "two", "--once") as second:
            output = all_of(second)
            assert second.returncode == 0, output
        first.send_signal(signal.SIGTERM)
        assert "Traceback" not in all_of(first)
        assert first.returncode == 0


@pytest.mark.parametrize(
    ("url", "telling"),
    [
        ("postgresql+asyncpg://nobody@127.0.0.1:1/none", "can't use the database"),
        ("mysql://root@localhost/test", "PostgreSQL or SQLite"),
        ("not a url", "neither an AsyncEngine nor a database URL"),
    ],
)
def test_a_database_that_will_not_do_is_one_clear_line(url: str, telling: str, tmp_path: Path) -> None:
    with demo(tmp_path, "--once", "--database-url", url) as process:
        output = all_of(process)
    assert process.returncode == 1, output
    assert telling in output
    assert "Traceback" not in output, output


async def test_the_bank_opens_elsewhere_where_somebody_took_its_port_meanwhile(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        monkeypatch.setattr(dashtam.demo, "bound", lambda _: taken.dup())
        async with dashtam.demo._bank("http://127.0.0.1:8000/connect/callback") as address:
            assert not address.endswith(f":{taken.getsockname()[1]}")
            async with httpx.AsyncClient(base_url=address) as client:
                assert (await client.get("/")).status_code < 500
