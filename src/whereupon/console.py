"""What all commands share: the bus that is named, what is said on which stream, and how a command is refused."""

from __future__ import annotations

import asyncio
import importlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Annotated, Any, Final, TypeVar

import msgspec
from cyclopts import Parameter
from rich.console import Console
from rich.progress import Progress

from whereupon.durable import EventBus
from whereupon.retention import check_age

EXIT_ERROR: Final = 1
EXIT_USAGE: Final = 2

T = TypeVar("T")

out = Console(emoji=False)  # else what stands between colons, as in `app:bus: `, becomes a picture
err = Console(stderr=True, emoji=False)

Target = Annotated[
    str, Parameter(help="Where the bus is: `package.module:name`; a function without arguments is called.")
]
Json = Annotated[bool, Parameter(name="--json", negative="", help="Answer in JSON.")]


class Refused(Exception):
    """The command can't be carried out; its text is all that is shown."""


class ImportFailed(Exception):
    """The user's module raised while it was imported; that is the cause."""

    def shown(self) -> str:
        """What was raised and from which line of the user's, without the machinery that imports."""
        error = self.__cause__
        assert error is not None
        trace = error.__traceback__
        machinery = (__name__, "importlib")
        while trace is not None and trace.tb_frame.f_globals.get("__name__", "").startswith(machinery):
            trace = trace.tb_next
        return "".join(traceback.format_exception(type(error), error, trace))


def load_bus(target: str) -> EventBus:
    """The bus that `module:name` names. Raises `Refused` with what to mend."""
    module_name, _, name = target.partition(":")
    if not module_name or not name:
        raise Refused(f"{target!r} names no bus: write module:name, as in app.main:bus")
    if (here := os.getcwd()) not in sys.path:
        sys.path.insert(0, here)
    try:
        found: Any = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module_name}.".startswith(f"{error.name}."):
            raise ImportFailed(module_name) from error  # something that the module itself imports
        raise Refused(
            f"there is no module {error.name!r}, needed for {target}. "
            f"Run this where `python -c 'import {module_name}'` works"
        ) from error
    except Exception as error:
        raise ImportFailed(module_name) from error
    try:
        for part in name.split("."):
            found = getattr(found, part)
    except AttributeError:
        raise Refused(f"{module_name} has no {name!r}: say under which name it keeps its EventBus") from None
    if callable(found) and not isinstance(found, (EventBus, type)):
        found = found()
    if not isinstance(found, EventBus):
        raise Refused(f"{target} is a {type(found).__name__}, not an EventBus")
    return found


async def dispose(bus: EventBus) -> None:
    """Close the connections, of an engine of the application's, too: SQLite's threads would keep the process alive."""
    await bus.engine.dispose()
    give_up = time.monotonic() + 1
    # aiosqlite's thread reports its end to the event loop, and complains at length if that is closed by then
    while time.monotonic() < give_up and any("_connection_worker" in thread.name for thread in threading.enumerate()):  # noqa: ASYNC110
        await asyncio.sleep(0.005)


Where = Annotated[str | None, Parameter(help="The bus, as `package.module:name`.")]
Url = Annotated[str | None, Parameter(help="The database's URL, instead of a bus.")]


def bus_for(target: str | None, url: str | None) -> EventBus:
    if (target is None) == (url is None):
        raise Refused(
            "say which database: either module:bus or --url, as in `whereupon db upgrade --url sqlite+aiosqlite:///app.db`"
        )
    return load_bus(target) if target is not None else EventBus(str(url), create_tables=False)


_UNITS: Final = {"s": "seconds", "m": "minutes", "h": "hours", "d": "days", "w": "weeks"}


def age_of(text: str) -> timedelta:
    match = re.fullmatch(r"(\d+)([smhdw])", text.strip())
    if match is None:
        raise Refused(f"--older-than {text!r} is no age: write a number and s, m, h, d or w, as in 30d")
    try:
        age = timedelta(**{_UNITS[match[2]]: int(match[1])})
        check_age(age)
        return age
    except (OverflowError, ValueError):
        raise Refused(f"--older-than {text} is longer than anything was kept") from None


def operate(target: str | None, url: str | None, work: Callable[[EventBus], Coroutine[Any, Any, T]]) -> T:
    """What `work` returns for the bus that was named."""
    bus = bus_for(target, url)

    async def run() -> T:
        try:
            return await work(bus)
        finally:
            await dispose(bus)

    return asyncio.run(run())


@contextmanager
def progress_of(total: int, what: str) -> Iterator[Callable[[int], None]]:
    """A bar on stderr for work that takes a while; the function that it yields is told how much of it is done."""
    with Progress(console=err, transient=True, disable=not err.is_terminal) as bar:
        task = bar.add_task(what, total=total)
        yield lambda done: bar.update(task, completed=done)


def answer_json(value: Any) -> None:
    out.print(
        msgspec.json.format(msgspec.json.encode(value), indent=2).decode(),
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def say(text: str, style: str = "") -> None:
    """A line on stderr, as it is: what looks like Rich's markup (`whereupon[sqlite]`) stays."""
    err.print(f"whereupon: {text}", style=style, markup=False, highlight=False, soft_wrap=True)


def answer(text: str) -> None:
    out.print(text, markup=False, highlight=False, soft_wrap=True)
