"""Pictures for the dashboard, as geometry: sparklines, and the map of events and their handlers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final

WIDE: Final = 180
HIGH: Final = 28
ROW: Final = 46
"""From one box of the map to the next one below."""
BOX: Final = (320, 36)
GAP: Final = 200
"""Between the two columns."""
MARGIN: Final = 8
LETTERS: Final = 40
"""Characters of a name that fit into a box; all of it is in its title."""


def sparkline(values: Sequence[int]) -> str:
    """Points of a polyline within `WIDE` by `HIGH`, the largest value at the top; "" for fewer than two values."""
    if len(values) < 2:
        return ""
    most = max(max(values), 1)
    step = WIDE / (len(values) - 1)
    return " ".join(
        f"{number * step:.1f},{HIGH - 2 - value / most * (HIGH - 4):.1f}" for number, value in enumerate(values)
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Box:
    name: str
    x: int
    y: int

    @property
    def middle(self) -> float:
        return self.y + BOX[1] / 2

    @property
    def shown(self) -> str:
        return self.name if len(self.name) <= LETTERS else f"{self.name[: LETTERS - 1]}…"


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    event: str
    handler: str
    path: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Map:
    events: Sequence[Box]
    handlers: Sequence[Box]
    lines: Sequence[Line]
    width: int
    height: int


def map_of(heard: Mapping[str, Sequence[str]], others: Sequence[str] = ()) -> Map:
    """Events in one column and handlers in another, a line from each event to whoever hears it.

    `heard`: by handler, the events. `others` are events that nobody hears. Handlers stand in the middle of what they
    hear (Sugiyama's barycentre, one sweep each way), so that few lines cross.
    """
    events = sorted({event for of in heard.values() for event in of} | set(others))
    handlers = sorted(heard)
    for _ in range(2):
        at = {event: number for number, event in enumerate(events)}
        handlers.sort(key=lambda name: (_mean([at[event] for event in heard[name]]), name))
        to = {name: number for number, name in enumerate(handlers)}
        by: dict[str, list[int]] = {event: [] for event in events}
        for name in handlers:
            for event in heard[name]:
                by[event].append(to[name])
        events.sort(key=lambda event: (_mean(by[event]), event))
    rows = max(len(events), len(handlers), 1)
    left = _column(events, MARGIN, rows)
    right = _column(handlers, MARGIN + BOX[0] + GAP, rows)
    lines = []
    for name in handlers:
        for event in heard[name]:
            x1, y1, x2, y2 = left[event].x + BOX[0], left[event].middle, right[name].x, right[name].middle
            bend = (x1 + x2) / 2
            lines.append(
                Line(
                    event=event,
                    handler=name,
                    path=f"M{x1} {y1:g}C{bend:g} {y1:g} {bend:g} {y2:g} {x2} {y2:g}",
                )
            )
    return Map(
        events=list(left.values()),
        handlers=list(right.values()),
        lines=lines,
        width=2 * (MARGIN + BOX[0]) + GAP,
        height=2 * MARGIN + rows * ROW - (ROW - BOX[1]),
    )


def _column(names: Sequence[str], x: int, rows: int) -> dict[str, Box]:
    """Spread over the height of the longer column."""
    step = rows / max(len(names), 1)
    return {
        name: Box(name=name, x=x, y=round(MARGIN + (number * step + (step - 1) / 2) * ROW))
        for number, name in enumerate(names)
    }


def _mean(numbers: Sequence[int]) -> float:
    return sum(numbers) / len(numbers) if numbers else float("inf")
