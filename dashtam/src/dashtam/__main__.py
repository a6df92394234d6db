"""`python -m dashtam serve`, `python -m dashtam upgrade`."""

import argparse
import asyncio
import signal
import sys

import uvicorn
from pydantic import ValidationError

from dashtam import bootstrap
from dashtam.infrastructure import schema
from dashtam.infrastructure.logs import forward_standard_logging
from dashtam.infrastructure.schema import SchemaOutdated
from whereupon import WhereuponError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dashtam", description="Dashtam. Settings come from the environment: DASHTAM_DATABASE_URL, …"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="answer HTTP, and deliver events")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    commands.add_parser("upgrade", help="make or change the tables in the database")
    chosen = parser.parse_args(arguments)
    try:
        settings = bootstrap.get_settings()
        asyncio.run(_upgrade() if chosen.command == "upgrade" else _check())
    except ValidationError as error:
        for problem in error.errors():
            print(f"DASHTAM_{str(problem['loc'][0]).upper()}: {problem['msg']}", file=sys.stderr)
        return 2
    except (WhereuponError, SchemaOutdated, OSError) as error:
        print(f"dashtam: {error}", file=sys.stderr)
        return 1
    if chosen.command == "serve":
        return _serve(settings, chosen.host, chosen.port)
    return 0


async def _upgrade() -> None:
    application = bootstrap.get_application()
    engine = application.database.engine
    try:
        await application.bus.revision()
        await schema.upgrade(engine)
    finally:
        await engine.dispose()
    print(f"{application.bus.database} is up to date")


async def _check() -> None:
    """Say what is wrong with the database before a web server wraps it in tracebacks."""
    application = bootstrap.get_application()
    try:
        await application.prepare()
    finally:
        await application.database.engine.dispose()


def _serve(settings: bootstrap.Settings, host: str, port: int) -> int:
    application = bootstrap.get_application()
    forward_standard_logging(application.logger, settings.log_level)
    config = uvicorn.Config(
        bootstrap.api_of(application), host=host, port=port, log_config=None, access_log=False, lifespan="on"
    )
    server = uvicorn.Server(config)
    # uvicorn stops in order, handlers and all, and then raises the signal again: asked to stop, we did.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        server.run()
    except KeyboardInterrupt:
        return 0
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
