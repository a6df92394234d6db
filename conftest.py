"""Fixtures for both projects: databases that exist, one for each test."""

import asyncio
import gc
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import AsyncEngine, create_async_engine

from dashtam.infrastructure import schema as dashtam_schema
from tests.servers import (
    PostgresServer,
    PostgresUnavailable,
    drop_leftovers,
    empty_database,
    name_anew,
    provide_postgres,
)
from whereupon import schema

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


def pytest_collection_finish() -> None:
    """What was imported stays: a collection that looks through it all stops everything for a good part of a second."""
    gc.collect()
    gc.freeze()


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


@pytest.fixture(scope="session")
def _whereupon_template(postgres_server: str) -> Iterator[str]:
    """The name of a database with whereupon's tables, as migrations make them, for others to be copies of."""
    with _migrated(postgres_server, schema.upgrade) as name:
        yield name


@pytest.fixture(scope="session")
def _dashtam_template(postgres_server: str) -> Iterator[str]:
    with _migrated(postgres_server, dashtam_schema.upgrade) as name:
        yield name


@contextmanager
def _migrated(server: str, upgrade: Callable[[AsyncEngine], Awaitable[None]]) -> Iterator[str]:
    async def make_tables(url: str) -> None:
        engine = create_async_engine(url)
        try:
            await upgrade(engine)
        finally:
            await engine.dispose()  # a database that somebody is connected to can't be copied

    with empty_database(server, lasting=24 * 3600) as url:
        asyncio.run(make_tables(url))
        name = make_url(url).database
        assert name is not None
        yield name


@pytest.fixture
def _postgres_database(postgres_server: str, request: pytest.FixtureRequest) -> Iterator[str]:
    template = "template0"
    if request.node.get_closest_marker("tables_ready") is not None:
        of_dashtam = "dashtam" in request.path.relative_to(request.config.rootpath).parts
        template = request.getfixturevalue("_dashtam_template" if of_dashtam else "_whereupon_template")
    with empty_database(postgres_server, template) as url:
        if template != "template0":
            name_anew(url)
        yield url


@pytest.fixture
async def postgres_url(_postgres_database: str) -> AsyncIterator[str]:
    """The URL of a PostgreSQL database that belongs to this test alone: empty, unless it is marked `tables_ready`."""
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
    """The URL of a database that belongs to this test alone, empty or nearly so: it runs once on each database."""
    name = {"sqlite": "sqlite_url", "postgresql": "postgres_url"}[request.param]
    url: str = request.getfixturevalue(name)
    return url
