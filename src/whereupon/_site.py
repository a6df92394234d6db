"""The catalogue as HTML pages that need nothing else: no server, no other file, no script to be read.

Whatever is said by the application stands in text nodes and attributes, escaped where they are made (`tag`). Should
that fail, the pages' content security policy allows no script and no style but the one of each that is written here.
"""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Final

from whereupon._asyncapi import with_extension
from whereupon._mermaid import groups_of
from whereupon._payload import schema_key
from whereupon.errors import CatalogueError

if TYPE_CHECKING:
    from whereupon.catalogue import Catalogue, EventEntry, FieldEntry, HandlerEntry

MARK: Final = ".whereupon-catalogue"
"""The file that lists what a folder was written with; only what it lists is ever deleted."""
_PAGE: Final = re.compile(r"(index|map|event-[A-Za-z0-9_.-]+)\.html")


class Markup(str):
    """Text that is HTML already; every other text is escaped."""

    __slots__ = ()


Child = str | Markup | Iterable["Child"] | None


def tag(name: str, /, *children: Child, **attributes: str | int | bool | None) -> Markup:
    """An element. `class_` and `aria_label` stand for `class` and `aria-label`; None and False leave one out."""
    written = "".join(
        f" {key.rstrip('_').replace('_', '-')}" + ("" if value is True else f'="{html.escape(str(value))}"')
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in ("input", "meta", "rect"):
        return Markup(f"<{name}{written}>" if name != "rect" else f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{_joined(children)}</{name}>")


def _joined(children: Child) -> str:
    if children is None:
        return ""
    if isinstance(children, Markup):
        return str(children)
    if isinstance(children, str):
        return html.escape(children)
    return "".join(map(_joined, children))


def pages(catalogue: Catalogue) -> dict[str, str]:
    names = _page_names(catalogue)
    found = {"index.html": _index(catalogue, names), "map.html": _map(catalogue, names)}
    for one in catalogue.events:
        found[names[one.name]] = _event(catalogue, one, names)
    return found


def write(site: Mapping[str, str], folder: Path) -> list[Path]:
    earlier: set[str] = set()
    mark = folder / MARK
    if folder.exists() and not folder.is_dir():
        raise CatalogueError(f"{folder} is a file: name a folder for the pages, a new one or an empty one")
    if mark.is_file():
        earlier = {line for line in mark.read_text(encoding="utf-8").splitlines() if _PAGE.fullmatch(line)}
    elif folder.is_dir() and any(folder.iterdir()):
        raise CatalogueError(
            f"{folder} holds files that are no catalogue's: name a folder that is new, empty, or was written by this"
        )
    folder.mkdir(parents=True, exist_ok=True)
    for name in sorted(earlier - site.keys()):
        (folder / name).unlink(missing_ok=True)
    mark.write_text("".join(f"{name}\n" for name in sorted(site)), encoding="utf-8")
    for name, text in site.items():
        (folder / name).write_text(text, encoding="utf-8", errors="replace", newline="\n")
    return [mark, *(folder / name for name in site)]


def _page_names(catalogue: Catalogue) -> dict[str, str]:
    """A file's name for each event, told apart where case doesn't count, too."""
    alike = [one.name.casefold() for one in catalogue.events]
    return {
        one.name: f"event-{schema_key(one.name if alike.count(one.name.casefold()) == 1 else f'{one.name} ')}.html"
        for one in catalogue.events
    }


# --- a page ---------------------------------------------------------------------------------------------------------

_STYLE: Final = """
:root { color-scheme: light dark; --text: #1c2530; --dim: #566373; --back: #fff; --soft: #f3f5f8; --line: #cfd6de;
  --accent: #0b57a8; --fail: #a5281f; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e8ee; --dim: #9fabb9; --back: #14191f; --soft: #1e252d;
  --line: #3b4652; --accent: #7db8f5; --fail: #f2938b; } }
* { box-sizing: border-box; }
body { margin: 0; font: 16px/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); }
header, main { max-width: 70rem; margin: 0 auto; padding: 1rem 1.5rem; }
header { border-bottom: 1px solid var(--line); display: flex; gap: 1.5rem; flex-wrap: wrap; align-items: baseline; }
header strong { margin-right: auto; }
h1 { font-size: 1.6rem; overflow-wrap: anywhere; } h2 { font-size: 1.2rem; margin: 2rem 0 .5rem; }
h3 { font-size: 1rem; margin: 1rem 0 .25rem; color: var(--dim); }
a { color: var(--accent); }
a:focus-visible, input:focus-visible, summary:focus-visible { outline: 3px solid var(--accent); outline-offset: 2px; }
.skip { position: absolute; left: -100rem; } .skip:focus { left: 1rem; top: .5rem; background: var(--back); }
.tell { white-space: pre-line; max-width: 45rem; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; margin: .5rem 0; }
th, td { text-align: left; vertical-align: top; padding: .35rem .75rem .35rem 0; border-bottom: 1px solid var(--line); }
thead th { color: var(--dim); font-weight: 600; white-space: nowrap; }
tbody th { font-weight: 600; overflow-wrap: anywhere; }
code, pre { font: .9rem/1.45 ui-monospace, monospace; } td code { overflow-wrap: anywhere; }
pre { background: var(--soft); padding: 1rem; overflow-x: auto; border-radius: 6px; }
ul.events { list-style: none; margin: 0; padding: 0; columns: 22rem; }
ul.events li { padding: .1rem 0; break-inside: avoid; overflow-wrap: anywhere; }
.dim { color: var(--dim); } .failed { color: var(--fail); }
input { font: inherit; color: inherit; background: var(--soft); border: 1px solid var(--line); border-radius: 6px;
  padding: .4rem .7rem; width: min(30rem, 100%); }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.5rem; }
dt { color: var(--dim); } dd, dd p { margin: 0; }
svg { max-width: 100%; min-width: 48rem; height: auto; }
svg text { font: 13px system-ui, sans-serif; fill: var(--text); } svg .group { fill: var(--dim); font-weight: 600; }
svg rect { fill: var(--soft); stroke: var(--line); } svg path { fill: none; stroke: var(--dim); }
svg .in_transaction { stroke-width: 3; } svg .after_commit { stroke-dasharray: 4 4; }
svg a:focus-visible rect { stroke: var(--accent); stroke-width: 3; }
"""

_SCRIPT: Final = """
const box = document.getElementById("search"), count = document.getElementById("count");
const items = [...document.querySelectorAll("[data-words]")];
function search() {
  const words = box.value.toLowerCase().split(/\\s+/).filter(Boolean);
  let shown = 0;
  for (const item of items) {
    item.hidden = !words.every(word => item.dataset.words.includes(word));
    shown += !item.hidden;
  }
  for (const part of document.querySelectorAll("[data-group]"))
    part.hidden = !part.querySelector("[data-words]:not([hidden])");
  count.textContent = words.length ? `${shown} of ${items.length} events` : "";
}
document.getElementById("searching").hidden = false;
box.addEventListener("input", search);
document.addEventListener("keydown", event => {
  if (event.key === "/" && document.activeElement !== box) { event.preventDefault(); box.focus(); }
  if (event.key === "Escape" && document.activeElement === box) { box.value = ""; search(); }
});
search();
"""


def _digest(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


_POLICY: Final = (
    f"default-src 'none'; style-src {_digest(_STYLE)}; script-src {_digest(_SCRIPT)}; "
    "base-uri 'none'; form-action 'none'"
)


def _page(catalogue: Catalogue, title: str, *content: Child, script: bool = False) -> str:
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        tag("title", f"{title} · {catalogue.title}" if title != catalogue.title else title),
        tag("style", Markup(_STYLE)),
    )
    body = tag(
        "body",
        tag("a", "To the content", href="#content", class_="skip"),
        tag(
            "header",
            tag("strong", catalogue.title),
            tag("nav", _link("index.html", "Events"), " · ", _link("map.html", "Map and handlers"), aria_label="Pages"),
        ),
        tag("main", tag("h1", title), *content, id="content", tabindex=-1),
        tag("script", Markup(_SCRIPT)) if script else None,
    )
    return f'<!DOCTYPE html>\n<html lang="en">\n{head}\n{body}\n</html>\n'


def _link(page: str, text: str) -> Markup:
    return tag("a", text, href=page)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Child]]) -> Markup:
    """The first cell of each row is its heading."""
    return tag(
        "div",
        tag(
            "table",
            tag("thead", tag("tr", [tag("th", head, scope="col") for head in heads])),
            tag(
                "tbody",
                [tag("tr", tag("th", row[0], scope="row"), [tag("td", cell) for cell in row[1:]]) for row in rows],
            ),
        ),
        class_="wide",
        tabindex=0,
        role="region",
        aria_label=f"Table: {', '.join(heads)}",
    )


# --- the index ------------------------------------------------------------------------------------------------------


def _index(catalogue: Catalogue, names: Mapping[str, str]) -> str:
    searching = tag(
        "p",
        tag("label", "Search events, fields and handlers ", tag("span", "(key /)", class_="dim"), for_="search"),
        " ",
        tag("input", id="search", type="search", autocomplete="off"),
        " ",
        tag("span", id="count", class_="dim", aria_live="polite"),
        id="searching",
        hidden=True,
    )
    groups = [
        tag(
            "section",
            tag("h2", category or "Other events"),
            [
                tag(
                    "div",
                    tag("h3", workflow or "Others") if workflow is not None or len(within) > 1 else None,
                    tag(
                        "ul",
                        [tag("li", _event_link(one, names), data_words=_words(one)) for one in events],
                        class_="events",
                    ),
                    data_group=True,
                )
                for workflow, events in within
            ],
            data_group=True,
        )
        for category, within in groups_of(catalogue)
    ]
    counted = f"{len(catalogue.events)} events, {len(catalogue.workflows)} workflows"
    counted += f", {len(catalogue.handlers)} subscriptions."
    return _page(catalogue, catalogue.title, tag("p", counted), searching, groups, script=True)


def _event_link(one: EventEntry, names: Mapping[str, str]) -> Markup:
    return tag("a", one.name, href=names[one.name], class_="failed" if one.outcome == "failed" else None)


def _words(one: EventEntry) -> str:
    """What a search finds the event by."""
    parts = [one.name, *one.aliases, one.description, one.audit, one.category, one.resource, *one.workflows]
    parts += [*(part.name for part in one.fields), *one.handlers]
    return " ".join(part for part in parts if part).lower()


# --- an event -------------------------------------------------------------------------------------------------------


def _event(catalogue: Catalogue, one: EventEntry, names: Mapping[str, str]) -> str:
    known = catalogue.event(one.name)
    stored = f"{one.name}, version {one.version}"
    if one.aliases:
        stored += f"; before as {', '.join(one.aliases)}"
    if one.upcasts:
        stored += "; older versions are read by its upcast"
    resource = one.resource and (f"{one.resource}, its id in {one.resource_id}" if one.resource_id else one.resource)
    workflows = [
        tag(
            "p",
            workflow.name,
            ": ",
            [
                [" · " if at else "", tag("strong", name) if name == one.name else _link(names[name], name)]
                for at, name in enumerate(workflow.events)
            ],
        )
        for workflow in catalogue.workflows
        if workflow.name in one.workflows
    ]
    facts: list[tuple[str, Child]] = [
        ("Stored as", stored),
        ("Category", one.category),
        ("Outcome", tag("span", one.outcome, class_="failed" if one.outcome == "failed" else None)),
        ("Workflow", workflows or None),
        ("Audited as", one.audit or "not audited"),
        ("Resource", resource),
        ("Published", "by itself, or in a session" if one.stands_alone else "in the session of the change it tells of"),
        ("Class", tag("code", f"{one.event_type.__module__}.{one.event_type.__qualname__}")),
    ]
    hearing = catalogue.hearing(known)
    schema = with_extension(catalogue.json_schema(one.name), one)
    return _page(
        catalogue,
        one.name,
        tag("p", one.description, class_="tell") if one.description else None,
        tag("dl", [(tag("dt", name), tag("dd", value)) for name, value in facts if value is not None]),
        tag("h2", "Fields"),
        _table(("Field", "Type", "Default", "What it is"), map(_field_row, one.fields)),
        tag("h2", "Who hears it"),
        _handlers(hearing, names, events=False) if hearing else tag("p", "Nobody."),
        tag("h2", "Example"),
        tag("pre", tag("code", json.dumps(one.example, indent=2, ensure_ascii=False)), tabindex=0)
        if one.example is not None
        else tag("p", "None: the class refuses values that are made up."),
        tag(
            "details",
            tag("summary", "JSON Schema of what is stored"),
            tag("pre", tag("code", json.dumps(schema, indent=2, ensure_ascii=False)), tabindex=0),
        ),
    )


def _field_row(part: FieldEntry) -> Sequence[Child]:
    default: Child = "required" if part.required else "computed" if part.default is None else tag("code", part.default)
    told: list[Child] = [tag("span", part.description, class_="tell")] if part.description else []
    if part.not_secret:
        told.append(tag("div", f"No secret: {part.not_secret}", class_="dim"))
    return tag("code", part.name), tag("code", part.type), default, told


def _handlers(found: Iterable[HandlerEntry], names: Mapping[str, str], *, events: bool) -> Markup:
    heads = [
        "Subscription",
        *(["Hears"] if events else []),
        "Delivery",
        "Order",
        "Tried again",
        "Timeout",
        "What it does",
    ]
    return _table(heads, [_handler_row(one, names, events=events) for one in found])


def _handler_row(one: HandlerEntry, names: Mapping[str, str], *, events: bool) -> Sequence[Child]:
    delivery = one.delivery.replace("_", " ") + (", required" if one.required else "")
    if one.within is not None:
        delivery += f", within {one.within:g} s"
    hears: Child = "every event" if one.hears_everything else [[_link(names[name], name), " "] for name in one.hears]
    again = "no"
    if one.retry is not None:
        again = f"{one.retry.max_attempts} attempts, up to {one.retry.first:g} s to {one.retry.longest:g} s apart"
    return (
        one.name,
        *([hears] if events else []),
        delivery,
        f"by {one.ordered_by}" if one.ordered_by else "none",
        again,
        "none" if one.timeout is None else f"{one.timeout:g} s",
        tag("span", one.description.partition("\n\n")[0], class_="tell"),
    )


# --- the map --------------------------------------------------------------------------------------------------------

_ROW: Final = 24
_GAP: Final = 14
_WIDTH: Final = 1080
_LEFT: Final = 380
_RIGHT: Final = 470
_CHARACTER: Final = 7
"""Pixels that one takes at most, as a rule."""


def _map(catalogue: Catalogue, names: Mapping[str, str]) -> str:
    general = [one.name for one in catalogue.handlers if one.hears_everything]
    also = f"Every event is heard by {', '.join(general)}, too, which the picture leaves out." if general else None
    lines = "A thick line is delivered in the publisher's transaction, a broken one is lost if the process dies."
    return _page(
        catalogue,
        "Map and handlers",
        tag("p", " ".join(part for part in ("Events on the left, who hears them on the right.", lines, also) if part)),
        tag("div", _picture(catalogue, names), class_="wide"),
        tag("h2", "Subscriptions"),
        _handlers(catalogue.handlers, names, events=True) if catalogue.handlers else tag("p", "There are none."),
    )


def _picture(catalogue: Catalogue, names: Mapping[str, str]) -> Markup:
    at: dict[str, int] = {}
    drawn: list[Markup] = []
    y = 0
    for category, within in groups_of(catalogue):
        for workflow, events in within:
            y += _GAP
            group = " · ".join(part for part in (category, workflow) if part) or "other events"
            drawn.append(tag("text", _short(group, _LEFT), x=0, y=y + 12, class_="group"))
            y += _ROW
            for one in events:
                at[one.name] = y
                drawn.append(_box(one.name, 0, y, _LEFT, href=names[one.name]))
                y += _ROW
    left = y
    handlers = [one for one in catalogue.handlers if not one.hears_everything]
    handlers.sort(key=lambda one: (sum(at[name] for name in one.hears) / len(one.hears), one.name))
    lines: list[Markup] = []
    y = _GAP + _ROW
    for handler in handlers:
        y = max(y, min(at[name] for name in handler.hears) - _ROW)
        drawn.append(_box(handler.name, _WIDTH - _RIGHT, y, _RIGHT))
        for name in handler.hears:
            lines.append(_line(at[name], y, handler.delivery))
        y += _ROW + 4
    height = max(left, y) + _GAP
    return tag(
        "svg",
        lines,
        drawn,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"-4 0 {_WIDTH + 8} {height}",
        width=_WIDTH + 8,
        height=height,
        role="group",
        aria_label="Events and who hears them; the table below says the same",
    )


def _box(name: str, x: int, y: int, width: int, href: str | None = None) -> Markup:
    inside = (
        tag("rect", x=x, y=y, width=width, height=_ROW - 4, rx=4),
        tag("text", tag("title", name), _short(name, width), x=x + 8, y=y + 14),
    )
    return tag("a", *inside, href=href) if href else tag("g", *inside)


def _line(start: int, end: int, delivery: str) -> Markup:
    one, other, half = start + _ROW // 2 - 2, end + _ROW // 2 - 2, (_LEFT + _WIDTH - _RIGHT) // 2
    return tag("path", d=f"M{_LEFT} {one} C{half} {one} {half} {other} {_WIDTH - _RIGHT} {other}", class_=delivery)


def _short(name: str, width: int) -> str:
    fitting = width // _CHARACTER - 1
    return name if len(name) <= fitting else f"{name[: fitting - 1]}…"
