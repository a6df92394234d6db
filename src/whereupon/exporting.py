"""Commands of the catalogue: `whereupon catalogue export`, `whereupon catalogue check`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any, Final, Literal, TypeAlias

import cyclopts
import msgspec
from cyclopts import Parameter

from whereupon.catalogue import Catalogue, CatalogueError, Level, as_text
from whereupon.console import EXIT_ERROR, Json, Refused, Target, answer, answer_json, load_bus, say

catalogue = cyclopts.App(name="catalogue", help="The catalogue: which events there are, and who hears them.")

Format: TypeAlias = Literal["asyncapi", "json-schema", "mermaid", "html"]
Packages = Annotated[
    list[str] | None,
    Parameter(
        name="--package",
        help="Of events that nobody is subscribed to, only those defined in this package; may be given more than once.",
    ),
]
STYLES: Final = {Level.BREAKING: "bold red", Level.COMPATIBLE: "green", Level.WORDING: "dim"}


@catalogue.command
def export(
    target: Target,
    /,
    *,
    format: Annotated[Format, Parameter(help="What to make of it.")] = "asyncapi",
    output: Annotated[Path | None, Parameter(help="The file, for html the folder; else stdout.")] = None,
    title: Annotated[str | None, Parameter(help="What it is the catalogue of; else the package of the bus.")] = None,
    api_version: Annotated[str, Parameter(help="The application's version, for AsyncAPI.")] = "1",
    package: Packages = None,
) -> int:
    """Write down which events there are, what they look like where they are stored, and who hears them.

    asyncapi: AsyncAPI 3.0. json-schema: JSON Schema of what is stored, draft 2020-12. mermaid: a map, as text.
    html: pages to read without a server. No database is asked. The answer is equal for equal declarations, so that it
    can be committed.
    """
    found = _catalogue_of(target, title or target.partition(":")[0].partition(".")[0], api_version, package)
    if format == "html":
        if output is None:
            raise Refused("html is a folder of pages: say which, as in --output site")
        written = found.write_site(output)
        pages = _counted(len(written) - 1, "page")
        say(f"{output}: {pages} of {_counted(len(found.events), 'event')}. Begin with {output / 'index.html'}")
        return 0
    text = found.mermaid() if format == "mermaid" else as_text(_document(found, format))
    data = text.encode("utf-8", "backslashreplace")  # of a lone surrogate, what JSON writes for it
    if output is None:
        sys.stdout.buffer.write(data)
        sys.stdout.buffer.flush()
        return 0
    if output.is_dir():
        raise Refused(f"{output} is a folder, and {format} is one file: name that")
    if output.exists() and not _is_ours(output):
        raise Refused(f"{output} is no catalogue, and is not overwritten: name another file, or delete it")
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_bytes(data)
    said = _counted(len(found.events), "event"), _counted(len(found.handlers), "subscription"), f"as {format}"
    say(f"{output}: {', '.join(said)}")
    return 0


@catalogue.command
def check(
    target: Target,
    /,
    *,
    against: Annotated[Path, Parameter(help="A file that `catalogue export` wrote as asyncapi or json-schema.")],
    breaking_only: Annotated[bool, Parameter(negative="", help="Let compatible changes pass.")] = False,
    package: Packages = None,
    as_json: Json = False,
) -> int:
    """Say what differs between the events as they are and as they were; exit code 1 if something does.

    Breaking: stored events, or builds that still run, could not be read any more, or not by those. Compatible: a new
    event, a new field with a default, what a new version declares and upcast reads. Wording: descriptions.
    """
    try:
        before = msgspec.json.decode(against.read_bytes(), type=dict[str, Any])
    except OSError as error:
        raise Refused(f"{against} can't be read: {error.strerror}") from None
    except (msgspec.MsgspecError, UnicodeError) as error:
        raise Refused(f"{against} is no JSON: {error}. Only asyncapi and json-schema can be compared") from None
    found = _catalogue_of(target, "", "", package)
    try:
        changes = found.changes_since(before)
    except CatalogueError as error:
        raise Refused(f"{against}: {error}") from None
    shown = [change for change in changes if change.level is Level.BREAKING or not breaking_only]
    if as_json:
        answer_json(shown)
    else:
        for change in shown:
            answer(f"{change.level.ljust(10)}  {_plain(str(change))}")
    breaking = sum(change.level is Level.BREAKING for change in changes)
    if not shown:
        if changes:
            say(f"nothing breaks: {_counted(len(changes), 'difference')} from {against}, compatible or in words.")
        else:
            say(f"{against} is up to date, with {_counted(len(found.events), 'event')}.")
        return 0
    say(
        f"{_counted(len(changes), 'difference')} from {against}, {breaking} of them breaking. "
        "If they are meant, write the file anew: `whereupon catalogue export`",
        style="red" if breaking else "yellow",
    )
    return EXIT_ERROR


def _catalogue_of(target: str, title: str, version: str, packages: list[str] | None) -> Catalogue:
    return Catalogue.of(load_bus(target), title=title, version=version, packages=packages)


def _document(found: Catalogue, format: Format) -> dict[str, Any]:
    return found.asyncapi() if format == "asyncapi" else found.json_schema()


def _is_ours(file: Path) -> bool:
    """Whether it is a catalogue, of any format, or nothing yet."""
    text = file.read_bytes()
    return not text.strip() or text.startswith(b"%% Made by `whereupon catalogue export`") or b'"x-whereupon"' in text


def _counted(number: int, one: str) -> str:
    return f"{number} {one}{'' if number == 1 else 's'}"


def _plain(text: str) -> str:
    """Without what would move a terminal's cursor: it may come from a file."""
    return "".join(part if part.isprintable() else f"\\x{ord(part):02x}" for part in text)
