"""`python -m dashtam serve`, `upgrade`, `make-key`, `make-admin`."""

import argparse
import asyncio
import signal
import sys

import uvicorn
from pydantic import ValidationError

from dashtam import bootstrap
from dashtam.domain.user import UserNotFound
from dashtam.infrastructure import schema
from dashtam.infrastructure.logs import forward_standard_logging
from dashtam.infrastructure.schema import SchemaOutdated
from dashtam.infrastructure.secret_keys import SecretKeyError, make_key
from whereupon import EventBus, WhereuponError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="dashtam", description="Dashtam. Settings come from the environment: DASHTAM_DATABASE_URL, …"
    )
    commands = parser.add_subparsers(dest="command", required=True)
    serve = commands.add_parser("serve", help="answer HTTP, and deliver events")
    serve.add_argument("--host", default="127.0.0.1")
    serve.add_argument("--port", type=int, default=8000)
    commands.add_parser("upgrade", help="make or change the tables in the database")
    commands.add_parser("make-key", help="print a new secret key, for DASHTAM_SECRET_KEYS")
    admin = commands.add_parser("make-admin", help="make a user who is registered an administrator")
    admin.add_argument("email")
    chosen = parser.parse_args(arguments)
    if chosen.command == "make-key":
        print(make_key())
        return 0
    try:
        settings = bootstrap.get_settings()
        match chosen.command:
            case "upgrade":
                asyncio.run(_upgrade(settings.database_url))
            case "make-admin":
                asyncio.run(_make_admin(chosen.email))
            case _:
                asyncio.run(_check())
    except ValidationError as error:
        for problem in error.errors():
            print(f"DASHTAM_{str(problem['loc'][0]).upper()}: {problem['msg']}", file=sys.stderr)
        return 2
    except (WhereuponError, SchemaOutdated, SecretKeyError, UserNotFound, OSError) as error:
        print(f"dashtam: {error}", file=sys.stderr)
        return 1
    if chosen.command == "serve":
        return _serve(settings, chosen.host, chosen.port)
    return 0


async def _upgrade(database_url: str) -> None:
    bus = EventBus(database_url)
    try:
        await bus.revision()
        await schema.upgrade(bus.engine)
    finally:
        await bus.engine.dispose()
    print(f"{bus.database} is up to date")


async def _make_admin(email: str) -> None:
    """Only whoever may run commands on the server may do this: there is no route for it."""
    application = bootstrap.get_application()
    try:
        await application.prepare()
        async with application.database.get_session():
            user = await application.users.find_by_email(email, for_update=True)
            if user is None:
                raise UserNotFound
            user.is_admin = True
            await application.users.save(user)
    finally:
        await application.database.engine.dispose()
    print(f"{user.email} is an administrator")


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
        bootstrap.api_of(application),
        host=host,
        port=port,
        log_config=None,
        access_log=False,
        proxy_headers=False,  # whose are believed says a setting of ours
        lifespan="on",
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
