"""Every store passes the one suite, on every driver."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import AsyncIterator

import pytest
from sqlalchemy.engine import make_url
from sqlalchemy.ext.asyncio import create_async_engine

from whereupon._postgres import PostgresStore
from whereupon._sqlite import SQLiteStore, configure
from whereupon.store import Store
from whereupon.testing import ConcurrentStoreContract, StoreContract

pytestmark = pytest.mark.integration


class TestSQLiteStore(StoreContract):
    @pytest.fixture
    async def store(self, sqlite_url: str) -> AsyncIterator[Store]:
        engine = create_async_engine(sqlite_url)
        configure(engine)
        store = SQLiteStore(engine)
        await store.prepare(create=True)
        yield store
        await store.close()
        await engine.dispose()


class TestPostgresStore(ConcurrentStoreContract):
    driver = "asyncpg"

    @pytest.fixture
    async def store(self, postgres_url: str) -> AsyncIterator[Store]:
        engine = create_async_engine(make_url(postgres_url).set(drivername=f"postgresql+{self.driver}"))
        store = PostgresStore(engine)
        await store.prepare(create=True)
        yield store
        await store.close()
        await engine.dispose()


class TestPostgresStoreOnPsycopg(TestPostgresStore):
    driver = "psycopg"
