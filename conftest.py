"""Fixtures for both projects: databases that exist, one for each test."""

import asyncio
import os
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Protocol

import pytest

from tests.servers import (
    PostgresServer,
    PostgresUnavailable,
    drop_leftovers,
    empty_database,
    provide_postgres,
)

# With pytest-xdist the controller provides the server and tells each worker its URL, or why there is none.
_URL = "whereupon_postgres_url"
_REASON = "whereupon_postgres_reason"
_server = pytest.StashKey[PostgresServer | PostgresUnavailable]()


def _provide(config: pytest.Config) -> PostgresServer | PostgresUnavailable:
    """The session's server, stopped when pytest ends, or the reason why there is none."""
    if _server not in config.stash:
        try:
            server = provide_postgres()
        except PostgresUnavailable as error:
            config.stash[_server] = error
        else:
            config.stash[_server] = server
            config.add_cleanup(server.stop)
            drop_leftovers(server.url)
    return config.stash[_server]


class _Worker(Protocol):
    """What is used of pytest-xdist's WorkerController, which has no type hints."""

    config: pytest.Config
    workerinput: dict[str, str]


@pytest.hookimpl(optionalhook=True)
def pytest_configure_node(node: _Worker) -> None:
    """Called by pytest-xdist, in the controller, before it starts a worker."""
    provided = _provide(node.config)
    if isinstance(provided, PostgresServer):
        node.workerinput[_URL] = provided.url
    else:
        node.workerinput[_REASON] = str(provided)


@pytest.fixture(scope="session")
def postgres_server(pytestconfig: pytest.Config) -> str:
    """The URL of a PostgreSQL server, without a database, whose user may create some; see `provide_postgres`.

    Without one the test is skipped, in CI (CI=true) it fails.
    """
    told: dict[str, str] = getattr(pytestconfig, "workerinput", {})
    if _URL in told:
        return told[_URL]
    if _REASON in told:
        reason = told[_REASON]
    else:
        provided = _provide(pytestconfig)
        if isinstance(provided, PostgresServer):
            return provided.url
        reason = str(provided)
    if os.environ.get("CI", "").lower() in {"true", "1"}:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@pytest.fixture
def _postgres_database(postgres_server: str) -> Iterator[str]:
    with empty_database(postgres_server) as url:
        yield url


@pytest.fixture
async def postgres_url(_postgres_database: str) -> AsyncIterator[str]:
    """The URL of an empty PostgreSQL database that belongs to this test alone."""
    yield _postgres_database
    # A bus that the test left open may be telling of what it published. Cancelled by the end of the loop, asyncpg would
    # begin to cancel the statement, in a task that nobody runs any more: a leak that some later test is blamed for.
    told = [task for task in asyncio.all_tasks() if getattr(task.get_coro(), "__qualname__", "") == "Ringer._tell"]
    if told:
        await asyncio.wait(told, timeout=5)


@pytest.fixture
def sqlite_url(tmp_path: Path) -> str:
    """The URL of an SQLite database that belongs to this test alone; its file does not exist yet."""
    return f"sqlite+aiosqlite:///{tmp_path}/app.db"


@pytest.fixture(params=["sqlite", "postgresql"])
def database_url(request: pytest.FixtureRequest) -> str:
    """The URL of an empty database that belongs to this test alone: the test runs once on each database."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url
