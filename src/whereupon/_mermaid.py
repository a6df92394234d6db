"""The catalogue as a Mermaid flowchart: what is published, and who hears it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Final

from whereupon._payload import schema_key

if TYPE_CHECKING:
    from whereupon.catalogue import Catalogue, EventEntry, HandlerEntry

HEAD: Final = "%% Made by `whereupon catalogue export`"
_UNSAFE: Final = re.compile(r"[^\w .,:/()-]")
_PLAIN: Final = re.compile(r"[A-Za-z0-9_.]+")
_TWICE: Final = re.compile(r"[_.][_.]|^\.|\.$")
"""Where `.` and `__` could be taken for each other."""
_SHAPES: Final = {"attempted": ("([", "])"), "succeeded": ("[", "]"), "failed": ("[/", "/]")}


def flowchart(catalogue: Catalogue) -> str:
    return "\n".join(_lines(catalogue)) + "\n"


def groups_of(catalogue: Catalogue) -> list[tuple[str, list[tuple[str | None, list[EventEntry]]]]]:
    """Events by category, and within it by workflow; an event of several workflows is with the first.

    Events of no workflow come last in their category, as those of None. The category of none is "".
    """
    order = {name: at for one in reversed(catalogue.workflows) for at, name in enumerate(one.events)}
    found: dict[str, dict[str | None, list[EventEntry]]] = {}
    for one in catalogue.events:
        workflow = one.workflows[0] if one.workflows else None
        found.setdefault(one.category or "", {}).setdefault(workflow, []).append(one)
    return [
        (
            category,
            [
                (workflow, sorted(events, key=lambda one: (order.get(one.name, 0), one.name)))
                for workflow, events in sorted(within.items(), key=lambda pair: (pair[0] is None, pair[0] or ""))
            ],
        )
        for category, within in sorted(found.items())
    ]


def _lines(catalogue: Catalogue) -> Iterator[str]:
    yield HEAD
    yield "flowchart LR"
    for category, within in groups_of(catalogue):
        indent = "  "
        if category:
            yield f"{indent}subgraph {_id('c', category)}[{_text(category)}]"
            indent = "    "
        for workflow, events in within:
            yield from _events(workflow, events, catalogue, indent)
        if category:
            yield "  end"
    particular = [one for one in catalogue.handlers if not one.hears_everything]
    for one in particular:
        yield f"  {_handler(one)}"
    for one in particular:
        for name in one.hears:
            yield f"  {_id('e', name)} {_arrow(one)} {_id('h', one.name)}"
    general = [one for one in catalogue.handlers if one.hears_everything]
    if general:
        yield '  every(("every event"))'
        for one in general:
            yield f"  every {_arrow(one)} {_handler(one)}"


def _events(workflow: str | None, events: list[EventEntry], catalogue: Catalogue, indent: str) -> Iterator[str]:
    if workflow is not None:
        yield f"{indent}subgraph {_id('w', workflow)}[{_text(workflow)}]"
    inner = indent + "  " if workflow is not None else indent
    for one in events:
        begin, end = _SHAPES[one.outcome]
        yield f"{inner}{_id('e', one.name)}{begin}{_text(one.name)}{end}"
    if workflow is not None:
        yield f"{indent}end"


def _handler(one: HandlerEntry) -> str:
    order = f", by {one.ordered_by}" if one.ordered_by else ""
    told = f"{one.delivery.replace('_', ' ')}{order}"
    return f'{_id("h", one.name)}{{{{"{_escaped(one.name)}<br/>{_escaped(told)}"}}}}'


def _arrow(one: HandlerEntry) -> str:
    """Thick where it is part of the publisher's transaction, dotted where a crash loses it."""
    return {"in_transaction": "==>", "after_commit": "-.->"}.get(one.delivery, "-->")


def _id(kind: str, name: str) -> str:
    """An id that is no word of Mermaid's, and no other name's."""
    plain = _PLAIN.fullmatch(name) is not None and _TWICE.search(name) is None
    return f"{kind}_{name.replace('.', '__') if plain else schema_key(f'{name} ').replace('.', '_').replace('-', '_')}"


def _text(name: str) -> str:
    return f'"{_escaped(name)}"'


def _escaped(text: str) -> str:
    """As Mermaid writes characters that could mean something to it or to HTML: `#35;`."""
    return _UNSAFE.sub(lambda found: f"#{ord(found[0])};", text)
