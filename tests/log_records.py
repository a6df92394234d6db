"""A logger for tests that look at what is logged."""

from __future__ import annotations

from typing import Any


class Records:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.all: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, /, **details: Any) -> None:
        self.all.append(("info", event, details))

    def warning(self, event: str, /, **details: Any) -> None:
        self.all.append(("warning", event, details))

    def error(self, event: str, /, **details: Any) -> None:
        self.all.append(("error", event, details))

    def named(self, event: str) -> list[dict[str, Any]]:
        return [details for _, name, details in self.all if name == event]
