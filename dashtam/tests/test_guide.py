"""The guide's blocks are kept as they are printed, each with what must become of it."""

import ast
import os
from difflib import unified_diff
from pathlib import Path

import pytest
from guide import BLOCKS, FOLDER, Becomes, Block, printed_in
from guide.imports import ADDED, CHANGED

pytestmark = pytest.mark.unit

TESTS = sorted(Path(__file__).parent.glob("test_guide*.py"))


def compiles(source: str) -> bool:
    try:
        compile(source, "block", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    except SyntaxError:
        return False
    return True


def test_every_stored_block_is_listed() -> None:
    stored = {path.stem for path in FOLDER.iterdir() if path.suffix in {".txt", ".json"}}
    assert stored == {block.name for block in BLOCKS}


def test_what_must_become_of_a_block_is_pinned_by_tests_that_exist() -> None:
    defined = {
        node.name
        for path in TESTS
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    # The guide's own tests are collected under their own names.
    own = {
        node.name
        for block in BLOCKS
        if block.becomes is Becomes.RUNS
        for node in ast.parse(block.source).body
        if isinstance(node, ast.AsyncFunctionDef) and node.name.startswith("test_")
    }
    for block in BLOCKS:
        assert block.tests, block.name
        assert set(block.tests) <= defined | own, block.name


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_a_block_is_python_unless_its_bodies_are_left_out(block: Block) -> None:
    if block.becomes is Becomes.RECORD:
        assert block.record
    else:
        assert compiles(block.source) is (block.becomes is not Becomes.ELISION)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.name)
def test_nothing_but_import_lines_is_changed(block: Block) -> None:
    printed, run = block.printed.splitlines(), block.source.splitlines()
    assert len(printed) == len(run)
    changed = [(before, after) for before, after in zip(printed, run, strict=True) if before != after]
    assert all(CHANGED[before] == after for before, after in changed)
    assert not any(line.startswith(("from src", "import src")) for line in run)


def test_only_imports_are_replaced_by_imports_and_each_is_needed() -> None:
    for before, after in CHANGED.items():
        assert before.startswith("from src.")
        (old,), (new,) = (ast.parse(line + " name)" if line.endswith("(") else line).body for line in (before, after))
        assert isinstance(old, ast.ImportFrom)
        assert isinstance(new, ast.ImportFrom)
        assert [alias.name for alias in old.names] == [alias.name for alias in new.names]
    assert CHANGED.keys() <= {line for block in BLOCKS for line in block.printed.splitlines()}
    assert ADDED.keys() <= {block.name for block in BLOCKS}
    for line in (line for lines in ADDED.values() for line in lines):
        (node,) = ast.parse(line).body
        assert isinstance(node, ast.ImportFrom)


def test_the_reader_of_a_guide_finds_blocks_under_their_headings_in_lists_too() -> None:
    guide = (
        "# Guide\n## One\n```python\na = 1\n```\n### Two\n1. first\n\n    ```json\n    {\n      }\n    ```\n## Three\n"
    )
    assert list(printed_in(guide)) == [("python", "One", "a = 1\n"), ("json", "One › Two", "{\n  }\n")]


if "DOMAIN_EVENTS_GUIDE" in os.environ:

    def test_the_stored_blocks_are_the_guide_s() -> None:
        printed = list(printed_in(Path(os.environ["DOMAIN_EVENTS_GUIDE"]).read_text(encoding="utf-8")))
        assert [(language, heading) for language, heading, _ in printed] == [
            ("json" if block.becomes is Becomes.RECORD else "python", block.heading) for block in BLOCKS
        ]
        for block, (_, _, text) in zip(BLOCKS, printed, strict=True):
            difference = unified_diff(block.printed.splitlines(), text.splitlines(), block.path.name, "guide")
            assert block.printed == text, "\n".join(difference)
