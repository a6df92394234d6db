"""Which tests there are, for the pages that cite them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent


def defined_tests() -> set[tuple[str, str]]:
    """Module and name of every test of both projects, and of the suite that is shipped (module `contract`)."""
    sources = [
        *(ROOT / "tests").glob("test_*.py"),
        *(ROOT / "dashtam" / "tests").glob("test_*.py"),
        ROOT / "src" / "whereupon" / "contract.py",
    ]
    return {
        (source.stem, name)
        for source in sources
        for name in re.findall(r"def (test_\w+)\(", source.read_text(encoding="utf-8"))
    }
