"""The command `whereupon dashboard`."""

from __future__ import annotations

import asyncio
import importlib.util
from typing import Annotated, Any

from cyclopts import Parameter

from whereupon.console import Refused, Url, Where, bus_for, dispose, say


def dashboard(
    target: Where = None,
    /,
    *,
    url: Url = None,
    host: Annotated[str, Parameter(help="The address to answer at; another than a loopback one needs --authorize.")] = (
        "127.0.0.1"
    ),
    port: Annotated[int, Parameter(help="The port to answer at; 0 takes a free one.")] = 8050,
    authorize: Annotated[
        str | None,
        Parameter(help="`package.module:name` of a function of the request, that says who may look and who may act."),
    ] = None,
) -> int:
    """Show what happens on a bus, and what can be done about it, as pages for a browser on this machine.

    Overview, events as they are committed, their stories, handlers, dead letters, workflows, catalogue, audit trail.
    It delivers nothing. With a bus it knows what its build declares, and can edit and replay; with --url it knows what
    the database does. Whoever can reach it on this machine may act, in the name of the user that runs it: to show it
    to others, mount it in an application, `app.mount("/whereupon", dashboard(bus, authorize=…))`. Ctrl-C ends it.
    """
    try:
        from whereupon import dashboard as pages
        from whereupon.gate import is_loopback
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("starlette", "jinja2"):
            raise
        raise Refused(f"the dashboard needs {error.name}: pip install 'whereupon[dashboard]'") from None
    if importlib.util.find_spec("uvicorn") is None:
        raise Refused("to run by itself the dashboard needs uvicorn: pip install 'whereupon[dashboard]'")
    if authorize is None and not is_loopback(host):
        raise Refused(
            f"--host {host} is reached from elsewhere, and nothing says who may look: bind it to 127.0.0.1, or give "
            "--authorize module:function, or mount it in your application"
        )
    who = None if authorize is None else _function(authorize)
    bus = bus_for(target, url)
    try:
        door = pages.door_at(host, port)
    except OSError as error:
        raise Refused(f"can't answer at {host}:{port}: {error.strerror or error}. Give it another --port") from None

    async def run() -> None:
        shown = f"[{host}]" if ":" in host else host
        try:
            await pages.serve(
                bus,
                door,
                authorize=who,
                started=lambda: say(
                    f"dashboard of {bus.database} at http://{shown}:{door.getsockname()[1]}/ . Ctrl-C ends it."
                ),
            )
        finally:
            await dispose(bus)

    asyncio.run(run())
    return 0


def _function(target: str) -> Any:
    module_name, _, name = target.partition(":")
    try:
        found: Any = importlib.import_module(module_name)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError, ValueError):
        raise Refused(f"--authorize {target!r} names no function: write module:name, as in app.admin:who_may") from None
    if not callable(found):
        raise Refused(f"--authorize {target} is a {type(found).__name__}, not a function of the request")
    return found
