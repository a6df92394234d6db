"""What the usage guide shows runs as shown: its Python, its commands, what they print and what they raise."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from pathlib import Path
from types import new_class

import pytest

from tests import printed
from tests.printed import blocks_of, is_as_shown, titles_of
from whereupon import DomainEvent, EventDefinitionError, cli

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent
GUIDE = ROOT / "docs" / "guide.md"
PAGE = GUIDE.read_text(encoding="utf-8")
BLOCKS = blocks_of(PAGE)
OBSERVABILITY = ROOT / "docs" / "observability.md"


def run(page: Path, chapter: str, folder: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-P", "-W", "error", printed.__file__, str(page), chapter],
        cwd=folder,
        env={name: value for name, value in os.environ.items() if not name.startswith(("PYTEST_", "DASHTAM_"))},
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("chapter", titles_of(BLOCKS))
def test_every_chapter_of_the_guide_runs_as_it_is_shown(chapter: str, tmp_path: Path) -> None:
    done = run(GUIDE, chapter, tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("chapter", titles_of(blocks_of(OBSERVABILITY.read_text(encoding="utf-8"))))
def test_every_chapter_on_metrics_traces_and_logs_runs_as_it_is_shown(chapter: str, tmp_path: Path) -> None:
    done = run(OBSERVABILITY, chapter, tmp_path)
    assert done.returncode == 0, done.stderr


def test_what_a_page_shows_wrongly_is_told_with_its_line(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "## One\n\n```python\nprint(6 * 7)\n```\n\n```text\n42\n```\n\n"
        '```python\nraise ValueError("no")\n```\n\n```text\nValueError: yes\n```\n\n'
        "```console\n$ whereupon dead show statement <event id> app:bus\n```\n",
        encoding="utf-8",
    )
    done = run(page, "One", tmp_path)
    assert done.returncode == 1
    assert "42" not in done.stderr
    assert "line 12: it is shown as\nValueError: yes\n\nand is\nValueError: no\n" in done.stderr
    assert "line 20: nothing says what <event id>" in done.stderr


def test_an_error_that_a_page_does_not_show_is_told(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text('## One\n\n```python\nraise ValueError("no")\n```\n', encoding="utf-8")
    assert "and is\nValueError: no\n" in run(page, "One", tmp_path).stderr


def test_placeholders_stand_for_what_differs_and_for_nothing_else() -> None:
    met: dict[str, str] = {}
    id_ = "01a22237-f154-77c5-8c1a-c66f18fc0d81"
    assert is_as_shown("1  <event id>\n  dead", f"1 {id_} dead\n", met)
    assert met == {"<event id>": id_}
    assert is_as_shown("…\nall (…) is well", "much\nmore\nall (…) is well", {})
    assert not is_as_shown("1  <event id>  dead", "1  7  dead", {})
    assert not is_as_shown("all (…) is well", "all (that) is well", {})
    assert not is_as_shown("parked", "1 parked", {})


def test_every_block_of_commands_names_commands_that_are_run() -> None:
    commands = [
        line for block in BLOCKS if block.language == "console" for line in block.text.splitlines() if line[:2] == "$ "
    ]
    assert len(commands) > 10
    assert {line.split()[1] for line in commands} <= printed.PROGRAMS.keys()


def test_every_command_that_the_guide_speaks_of_exists() -> None:
    spoken = set(re.findall(r"whereupon (handlers|dead|db|catalogue) (\w+)", PAGE))
    assert len(spoken) > 10
    for group, command in spoken:
        assert command in cli.app[group], command


def test_every_event_that_the_guide_names_exists() -> None:
    catalogue = (ROOT / "dashtam" / "src" / "dashtam" / "domain" / "events.py").read_text(encoding="utf-8")
    own = "\n".join(block.text for block in BLOCKS if block.language == "python" and block.shown is None)
    defined = {
        node.name for text in (catalogue, own) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.ClassDef)
    }
    prose = re.sub(r"^```.*?^```$", "", PAGE, flags=re.DOTALL | re.MULTILINE)
    named = set(re.findall(r"`([A-Z]\w+(?:Attempted|Succeeded|Failed|Created|Updated|Closed))`", prose))
    assert len(named) > 8
    assert named <= defined, sorted(named - defined)


def test_every_name_that_the_guide_calls_wrong_is_refused() -> None:
    wrong = re.findall(r"^\| `\w+` \| `(\w+)` \|", PAGE, re.MULTILINE)
    assert len(wrong) >= 4
    for name in wrong:
        with pytest.raises(EventDefinitionError):
            new_class(name, (DomainEvent,))


def test_every_link_of_the_guide_leads_somewhere() -> None:
    headings = {
        re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-")
        for heading in re.findall(r"^#+ (.+)$", PAGE, re.MULTILINE)
    }
    for target in re.findall(r"\]\(([^)]+)\)", PAGE):
        path, _, anchor = target.partition("#")
        assert not path or (GUIDE.parent / path).exists(), target
        assert path or anchor in headings, target


def test_the_readme_leads_to_the_guide() -> None:
    assert "(docs/guide.md)" in (ROOT / "README.md").read_text(encoding="utf-8")
