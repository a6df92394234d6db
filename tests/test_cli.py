"""The command line: what it says, and the exit codes that scripts rely on."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.integration

BUS = """
from whereupon import EventBus
bus = EventBus({url!r}, create_tables=False)
not_a_bus = 7
def make():
    return bus
class Container:
    bus = bus
"""


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "whereupon.cli", *arguments],
        cwd=folder,
        env={**os.environ, "COLUMNS": "80"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def refused(done: subprocess.CompletedProcess[str], code: int) -> str:
    """The one line that it said."""
    assert done.returncode == code, done.stderr
    assert done.stdout == ""
    [line] = done.stderr.splitlines()
    assert line.startswith("whereupon: ")
    return line


@pytest.fixture
def app(tmp_path: Path, database_url: str) -> Path:
    (tmp_path / "app.py").write_text(BUS.format(url=database_url))
    return tmp_path


def test_help_names_the_commands_and_the_exit_codes(tmp_path: Path) -> None:
    done = run(tmp_path, "--help")
    assert done.returncode == 0
    assert all(word in done.stdout for word in ("worker", "db", "Exit codes"))
    assert "drain_timeout" in run(tmp_path, "worker", "--help").stdout


def test_the_tables_are_made_once_and_reported(app: Path) -> None:
    assert "has no whereupon tables. Run `whereupon db upgrade" in refused(run(app, "db", "status", "app:bus"), 1)
    made = run(app, "db", "upgrade", "app:bus")
    assert (made.returncode, made.stderr) == (0, "")
    assert "is at revision 1 now (before: no tables)" in made.stdout
    again = run(app, "db", "upgrade", "app:make")
    assert "is at revision 1 already" in again.stdout
    status = run(app, "db", "status", "app:Container.bus")
    assert (status.returncode, status.stderr) == (0, "")
    assert "is at revision 1, as this build needs it" in status.stdout


def test_the_tables_can_be_made_by_url_alone_and_at_once(tmp_path: Path, database_url: str) -> None:
    both = [
        subprocess.Popen(
            [sys.executable, "-m", "whereupon.cli", "db", "upgrade", "--url", database_url],
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for _ in range(2)
    ]
    said = [process.communicate(timeout=60)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert run(tmp_path, "db", "status", "--url", database_url).returncode == 0


def test_a_worker_without_tables_says_how_to_make_them(app: Path) -> None:
    assert "Run `whereupon db upgrade" in refused(run(app, "worker", "app:bus"), 1)


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("app", "'app' names no bus: write module:name, as in app.main:bus"),
        ("nowhere:bus", "there is no module 'nowhere', needed for nowhere:bus"),
        ("app.main:bus", "there is no module 'app.main', needed for app.main:bus"),
        ("app:missing", "app has no 'missing'"),
        ("app:not_a_bus", "app:not_a_bus is a int, not an EventBus"),
        ("app:Container", "app:Container is a type, not an EventBus"),
    ],
)
@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_target_that_is_no_bus_is_refused_in_one_line(app: Path, target: str, reason: str) -> None:
    assert reason in refused(run(app, "worker", target), 2)


@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("import no_such_package\n", "ModuleNotFoundError: No module named 'no_such_package'"),
        ("from os import no_such_name\n", "ImportError: cannot import name 'no_such_name'"),
        ("value = [1, 2\n", "SyntaxError: "),
        ("raise RuntimeError('set [red]DATABASE_URL[/red]')\n", "RuntimeError: set [red]DATABASE_URL[/red]"),
    ],
)
def test_an_error_in_the_users_module_is_shown_with_its_line(tmp_path: Path, source: str, reason: str) -> None:
    (tmp_path / "shop.py").write_text(f"# a comment\n{source}")
    done = run(tmp_path, "worker", "shop:bus")
    assert done.returncode == 1
    assert reason in done.stderr
    assert 'shop.py", line 2' in done.stderr
    assert "importlib" not in done.stderr
    assert "cli.py" not in done.stderr
    assert done.stderr.splitlines()[-1] == "whereupon: shop could not be imported, for the reason above"


@pytest.mark.parametrize(
    "arguments", [("db", "upgrade"), ("db", "upgrade", "app:bus", "--url", "sqlite+aiosqlite:///other.db")]
)
def test_upgrade_takes_a_bus_or_a_url(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    assert "say which database" in refused(run(tmp_path, *arguments), 2)


@pytest.mark.parametrize("arguments", [("worker",), ("nonsense",), ("worker", "app:bus", "--no-such-option")])
def test_a_command_that_is_wrong_exits_with_2(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    done = run(tmp_path, *arguments)
    assert done.returncode == 2
    assert done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("mysql+aiomysql://localhost/app", "whereupon keeps its log in PostgreSQL or SQLite"),
        ("no url", "database URL"),
        ("postgresql+asyncpg://postgres@127.0.0.1:1/app", "can't use the database postgresql+asyncpg://"),
        ("sqlite+aiosqlite:////nowhere/at/all/app.db", "unable to open database file"),
    ],
)
def test_a_database_that_can_not_be_used_is_named_with_the_reason(tmp_path: Path, url: str, reason: str) -> None:
    assert reason in refused(run(tmp_path, "db", "upgrade", "--url", url), 1)


def test_what_looks_like_markup_is_printed_as_it_is(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(
        "from whereupon.errors import WhereuponError\ndef make(): raise WhereuponError('[bold]x')"
    )
    assert refused(run(tmp_path, "worker", "app:make"), 1) == "whereupon: [bold]x"


def test_a_database_that_was_not_moved_needs_no_rebase(app: Path) -> None:
    assert run(app, "db", "upgrade", "app:bus").returncode == 0
    done = run(app, "db", "rebase", "app:bus", "--reason", "restored")
    assert done.returncode == 0, done.stderr
    assert "is where it was: nothing to do" in done.stdout


def test_what_stands_between_colons_is_no_picture(tmp_path: Path) -> None:
    assert "needed for nothing:bus:more" in refused(run(tmp_path, "db", "status", "nothing:bus:more"), 2)
