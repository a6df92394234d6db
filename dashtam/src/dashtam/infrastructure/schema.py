"""The tables in the database: Dashtam's and whereupon's, in one Alembic history."""

from importlib.resources import files

from alembic import command
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, text
from sqlalchemy.ext.asyncio import AsyncEngine

from whereupon import schema

_UPGRADING = 0x44415348  # any number that nobody else takes an advisory lock by


class SchemaOutdated(RuntimeError):
    """The database has not the tables that this version of Dashtam works with."""


def _config() -> Config:
    migrations = files("dashtam") / "migrations"
    config = Config()
    for option, value in {
        "script_location": str(migrations),
        "version_locations": "\n".join([str(migrations / "versions"), schema.version_location()]),
        "path_separator": "newline",
    }.items():
        config.set_main_option(option, value.replace("%", "%%"))
    return config


async def upgrade(engine: AsyncEngine) -> None:
    """Make or change the tables as this version needs them, all or nothing; does nothing where that is done."""
    async with engine.begin() as connection:
        if engine.dialect.name == "postgresql":
            await connection.execute(text("SELECT pg_advisory_xact_lock(:key)"), {"key": _UPGRADING})
        await connection.run_sync(_upgrade)


def _upgrade(connection: Connection) -> None:
    config = _config()
    config.attributes["connection"] = connection
    command.upgrade(config, "heads")


async def check(engine: AsyncEngine) -> None:
    """Raises `SchemaOutdated` where `upgrade` would change something."""
    async with engine.connect() as connection:
        current = set(await connection.run_sync(lambda c: MigrationContext.configure(c).get_current_heads()))
    needed = set(ScriptDirectory.from_config(_config()).get_heads())
    if current != needed:
        raise SchemaOutdated(
            f"the database is at {', '.join(sorted(current)) or 'no version at all'}, and Dashtam needs "
            f"{', '.join(sorted(needed))}: run `python -m dashtam upgrade`"
        )
