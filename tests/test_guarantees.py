"""docs/guarantees.md cites tests that there are, and leaves no promise, trap or interleaving out."""

from __future__ import annotations

import re

import pytest

from tests.citations import ROOT, defined_tests

pytestmark = pytest.mark.unit

PAGE = (ROOT / "docs" / "guarantees.md").read_text(encoding="utf-8")


def rows(heading: str) -> dict[int, str]:
    """The rows of the table below a heading, by their numbers."""
    section = PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]
    return {int(number): rest for number, rest in re.findall(r"^\| (\d+) \|(.*)$", section, re.MULTILINE)}


def test_every_test_that_is_cited_exists() -> None:
    cited = set(re.findall(r"`(\w+)::(\w+)`", PAGE))
    assert len(cited) > 60
    assert cited <= defined_tests(), sorted(cited - defined_tests())


@pytest.mark.parametrize(("heading", "number"), [("Promises", 10), ("Traps", 13), ("Interleavings", 12)])
def test_each_is_listed_with_a_test_or_said_to_be_open(heading: str, number: int) -> None:
    listed = rows(heading)
    assert list(listed) == list(range(1, number + 1))
    for number_of_one, row in listed.items():
        assert "::test_" in row or "*Open" in row, f"{heading} {number_of_one}"
