"""`whereupon catalogue export` and `whereupon catalogue check`, as somebody types them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import pytest

from tests.test_cli import refused, run
from whereupon import DomainEvent, EventBus
from whereupon.catalogue import CatalogueError
from whereupon.cli import app
from whereupon.console import Refused

pytestmark = pytest.mark.integration

HERE = "tests.test_cli_catalogue"
Typed: TypeAlias = Callable[..., tuple[int, str, str]]


def workshop() -> EventBus:
    class KeyCut(DomainEvent, category="keys"):
        """A key was cut."""

        key_id: str
        teeth: frozenset[str] = frozenset({"deep", "flat", "round", "short", "steep"})

    return heard(KeyCut)


def workshop_that_polishes() -> EventBus:
    class KeyCut(DomainEvent, category="keys"):
        """A key was cut."""

        key_id: str
        teeth: frozenset[str] = frozenset({"deep", "flat", "round", "short", "steep"})
        polished: bool = False

    return heard(KeyCut)


def workshop_that_counts() -> EventBus:
    class KeyCut(DomainEvent, category="keys"):
        """A key was cut."""

        key_id: int
        teeth: frozenset[str] = frozenset({"deep", "flat", "round", "short", "steep"})
        polished: bool = False

    return heard(KeyCut)


def heard(event_type: type[DomainEvent]) -> EventBus:
    async def hand_over(event: DomainEvent) -> None: ...

    bus = EventBus("sqlite+aiosqlite:///never-made.db")
    bus.subscribe(event_type, hand_over, name="hand_over")
    return bus


@pytest.fixture
def typed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Typed:
    """Runs a command in an empty folder; its exit code, and what it says on stdout and on stderr."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "400")

    def run_it(what: str, bus: str, *arguments: str) -> tuple[int, str, str]:
        tokens = ["catalogue", what, f"{HERE}:{bus}", "--package", "nowhere", *arguments]
        code: Any = app(tokens, result_action="return_value", exit_on_error=False)
        said = capsys.readouterr()
        return code, said.out, said.err

    return run_it


def test_a_catalogue_goes_to_stdout_without_a_database(typed: Typed, tmp_path: Path) -> None:
    code, out, _ = typed("export", "workshop")
    document = json.loads(out)
    assert (code, document["asyncapi"], document["info"]["title"]) == (0, "3.0.0", "tests")
    assert "receive.KeyCut.hand_over" in document["operations"]
    schema = json.loads(typed("export", "workshop", "--format", "json-schema", "--title", "Keys")[1])
    assert (schema["title"], schema["$defs"]["KeyCut"]["description"]) == ("Keys", "A key was cut.")
    assert "e_KeyCut --> h_hand_over" in typed("export", "workshop", "--format", "mermaid")[1]
    assert os.listdir(tmp_path) == []


def test_a_file_is_written_anew_if_it_is_a_catalogue_and_not_if_it_is_something_else(
    typed: Typed, tmp_path: Path
) -> None:
    _, out, err = typed("export", "workshop", "--output", "docs/events.json")
    assert (out, err) == ("", "whereupon: docs/events.json: 1 event, 1 subscription, as asyncapi\n")
    typed("export", "workshop", "--format", "mermaid", "--output", "docs/events.json")
    typed("export", "workshop", "--format", "json-schema", "--output", "docs/events.json")
    (tmp_path / "notes.json").write_text('{"mine": true}')
    with pytest.raises(Refused, match="is no catalogue, and is not overwritten"):
        typed("export", "workshop", "--output", "notes.json")
    assert (tmp_path / "notes.json").read_text() == '{"mine": true}'
    with pytest.raises(Refused, match="is a folder"):
        typed("export", "workshop", "--output", "docs")


def test_pages_need_a_folder_and_leave_that_of_others_alone(typed: Typed, tmp_path: Path) -> None:
    _, _, err = typed("export", "workshop", "--format", "html", "--output", "site")
    assert err == "whereupon: site: 3 pages of 1 event. Begin with site/index.html\n"
    assert (tmp_path / "site" / "event-KeyCut.html").exists()
    typed("export", "workshop", "--format", "html", "--output", "site")
    with pytest.raises(Refused, match="--output site"):
        typed("export", "workshop", "--format", "html")
    with pytest.raises(CatalogueError, match="holds files that are no catalogue's"):
        typed("export", "workshop", "--format", "html", "--output", ".")


@pytest.mark.parametrize("format", ["asyncapi", "json-schema"])
def test_the_check_ends_with_one_if_something_differs_and_names_it(typed: Typed, format: str) -> None:
    typed("export", "workshop", "--format", format, "--output", "events.json")
    against = ("--against", "events.json")
    assert typed("check", "workshop", *against) == (0, "", "whereupon: events.json is up to date, with 1 event.\n")

    code, out, err = typed("check", "workshop_that_polishes", *against)
    assert (code, out) == (1, "compatible  KeyCut.polished: a new field, with a default\n")
    assert "1 difference from events.json, 0 of them breaking" in err
    code, out, err = typed("check", "workshop_that_polishes", *against, "--breaking-only")
    assert (code, out) == (0, "")
    assert "nothing breaks: 1 difference from events.json" in err

    code, out, _ = typed("check", "workshop_that_counts", *against, "--breaking-only")
    assert code == 1
    assert out.startswith("breaking    KeyCut.key_id: its type is integer (before: text), and the version is still 1.")
    code, out, _ = typed("check", "workshop_that_counts", *against, "--json")
    assert code == 1
    assert [(one["level"], one["event"], one["field"]) for one in json.loads(out)] == [
        ("breaking", "KeyCut", "key_id"),
        ("compatible", "KeyCut", "polished"),
    ]

    typed("export", "workshop_that_counts", "--format", format, "--output", "events.json")
    assert typed("check", "workshop_that_counts", *against)[0] == 0


def test_what_can_not_be_compared_is_refused(typed: Typed, tmp_path: Path) -> None:
    typed("export", "workshop", "--format", "mermaid", "--output", "map.mmd")
    with pytest.raises(Refused, match="is no JSON"):
        typed("check", "workshop", "--against", "map.mmd")
    with pytest.raises(Refused, match=r"gone\.json can't be read: No such file"):
        typed("check", "workshop", "--against", "gone.json")
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(Refused, match=r"other\.json: the document is no catalogue"):
        typed("check", "workshop", "--against", "other.json")


def test_what_a_file_holds_moves_no_cursor(typed: Typed, tmp_path: Path) -> None:
    document = json.loads(typed("export", "workshop", "--format", "json-schema")[1])
    document["$defs"]["KeyCut"]["x-whereupon"]["event"] = "Key\x1b[2JCut"
    (tmp_path / "events.json").write_text(json.dumps(document))
    _, out, _ = typed("check", "workshop", "--against", "events.json")
    assert "Key\\x1b[2JCut: the event is gone" in out
    assert "\x1b" not in out


APP = """
from whereupon import DomainEvent, EventBus
import visitors

bus = EventBus("sqlite+aiosqlite:///never-made.db")

class KeyCut(DomainEvent):
    key_id: str
    teeth: frozenset[str] = frozenset({"deep", "flat", "round", "short", "steep"})
"""


@pytest.mark.slow
def test_equal_declarations_make_equal_bytes_and_the_exit_code_is_the_answer(tmp_path: Path) -> None:
    (tmp_path / "app.py").write_text(APP)
    (tmp_path / "visitors.py").write_text("from whereupon import DomainEvent\nclass DoorbellRung(DomainEvent): ...\n")
    made = []
    for seed in ("1", "2"):
        done = subprocess.run(
            [sys.executable, "-m", "whereupon.cli", "catalogue", "export", "app:bus", "--package", "app"],
            cwd=tmp_path, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True, timeout=60,
        )  # fmt: skip
        made.append(done.stdout)
    assert made[0] == made[1]
    assert b"DoorbellRung" not in made[0]
    (tmp_path / "events.json").write_bytes(made[0])
    checked = run(tmp_path, "catalogue", "check", "app:bus", "--against", "events.json")
    assert (checked.returncode, checked.stdout) == (1, "compatible  DoorbellRung: a new event\n")
    assert "is a folder" in refused(run(tmp_path, "catalogue", "export", "app:bus", "--output", "."), 2)
