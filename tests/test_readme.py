"""What the README and the examples show runs as shown."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.citations import defined_tests

ROOT = Path(__file__).parent.parent
BLOCKS = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), re.DOTALL)
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def run(source: Path, folder: Path) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", str(source)],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_first_block_of_the_readme_sends_its_welcome(tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text(BLOCKS[0], encoding="utf-8")
    assert "to ada@example.com: welcome!" in run(script, tmp_path)


@pytest.mark.parametrize("number", range(1, len(BLOCKS)))
def test_every_other_block_of_the_readme_runs(number: int, tmp_path: Path) -> None:
    script = tmp_path / "readme.py"
    script.write_text(BLOCKS[number], encoding="utf-8")
    run(script, tmp_path)


@pytest.mark.parametrize("example", EXAMPLES, ids=lambda path: path.stem)
def test_every_example_runs(example: Path, tmp_path: Path) -> None:
    assert run(example, tmp_path)


def test_every_test_that_the_readme_cites_exists() -> None:
    cited = set(re.findall(r"`(test_\w+)`", (ROOT / "README.md").read_text(encoding="utf-8")))
    defined = {name for _, name in defined_tests()}
    assert cited, "the README names the tests of its promises"
    assert cited <= defined, sorted(cited - defined)
