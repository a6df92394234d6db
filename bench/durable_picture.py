"""Bars as an SVG, readable on light and on dark ground; plain text is all it takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH = 860
LABELS = 290
ROW = 22
HEAD = 40
STYLE = """
  text { font: 13px system-ui, sans-serif; fill: #1f2328; }
  .title { font-weight: 600; }
  .note { fill: #59636e; }
  .bar { fill: #8c959f; }
  .ours { fill: #1a7f37; }
  @media (prefers-color-scheme: dark) {
    text { fill: #e6edf3; }
    .note { fill: #9198a1; }
    .bar { fill: #6e7681; }
    .ours { fill: #3fb950; }
  }
"""


@dataclass(frozen=True)
class Group:
    """Bars that share a scale."""

    title: str
    bars: Sequence[tuple[str, float]]
    better: str
    """`more` or `less`."""


def draw(groups: Sequence[Group]) -> str:
    """One picture of all groups, one below the other."""
    parts: list[str] = []
    top = 8
    for group in groups:
        if not group.bars:
            continue
        most = max(value for _, value in group.bars) or 1.0
        parts.append(f'<text class="title" x="8" y="{top + 20}">{escape(group.title)}</text>')
        parts.append(
            f'<text class="note" x="{WIDTH - 8}" y="{top + 20}" text-anchor="end">{group.better} is better</text>'
        )
        top += HEAD - 8
        for label, value in group.bars:
            length = max(1.0, (WIDTH - LABELS - 90) * max(0.0, value) / most)
            kind = "bar ours" if label.startswith("whereupon") else "bar"
            parts.append(f'<text x="{LABELS - 8}" y="{top + 15}" text-anchor="end">{escape(label)}</text>')
            parts.append(
                f'<rect class="{kind}" x="{LABELS}" y="{top + 3}" width="{length:.1f}" height="{ROW - 6}" rx="2"/>'
            )
            parts.append(f'<text class="note" x="{LABELS + length + 6:.1f}" y="{top + 15}">{_figure(value)}</text>')
            top += ROW
        top += 14
    title = "; ".join(group.title for group in groups)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {top}" width="{WIDTH}" role="img">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</svg>\n"
    )


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 or value == int(value) else f"{value:,.2f}"
