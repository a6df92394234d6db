"""Programs that are no Python packages, for tests of what we make for them or run behind them."""

from __future__ import annotations

import os
import shutil

import pytest


def program(name: str) -> str:
    """Where it is, a Debian package of its name; without it the test is skipped, in CI (CI=true) it fails."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found is not None:
        return found
    reason = f"no {name} on this machine; on Debian: apt-get update && apt-get install -y {name}"
    if os.environ.get("CI", "").lower() in {"true", "1"}:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)
