"""Transactions, readers and takeovers in any order, on both databases: what is delivered is what was committed.

Hypothesis chooses the steps. Writers begin, publish, save, roll back to a savepoint, prepare, commit and roll back;
readers take pages of any size, settle a part of them, die, and are followed by others. `make soak` tries for longer.
"""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import UUID, uuid4

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncTransaction, create_async_engine

from tests.servers import empty_database, start_postgres
from whereupon._postgres import PostgresStore
from whereupon._sqlite import SQLiteStore, configure
from whereupon.contract import append, register, take_over, worker
from whereupon.errors import LeaseLost
from whereupon.store import Cursor, Move, Page, Row, Store

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SOAK = int(os.environ.get("WHEREUPON_SOAK", "0"))
"""How many more sequences of steps are tried."""
TYPES = {"all": None, "some": ["A"]}
"""The readers, with the types that they hear."""


@dataclass
class Writer:
    """A transaction that is open, or prepared."""

    number: int
    connection: AsyncConnection
    events: list[UUID] = field(default_factory=list)
    savepoints: list[tuple[AsyncTransaction, int]] = field(default_factory=list)
    """Those open, with how many events there were before each."""
    wrote: bool = False


@dataclass
class InHand:
    """An event that was read, and is not passed by the cursor."""

    row: Row
    window: Any
    settled: bool


@dataclass
class Reader:
    name: str
    cursor: Cursor
    read_place: Any
    hand: list[InHand] = field(default_factory=list)
    delivered: list[UUID] = field(default_factory=list)
    """What is settled, each as often as it was."""
    done: set[int] = field(default_factory=set)
    """What the cursor's row should hold."""
    last: dict[int, int] = field(default_factory=dict)
    """Of each transaction, the last event that was read since the reader began."""
    before: Cursor | None = None
    """The cursor of the one that this one followed."""

    @property
    def types(self) -> list[str] | None:
        return TYPES[self.name]


class LogModel(RuleBasedStateMachine):
    @staticmethod
    def database() -> AbstractContextManager[Store]:
        """A store on an empty database; a sub-class says which."""
        raise NotImplementedError

    def __init__(self) -> None:
        super().__init__()
        self.runner = asyncio.Runner()
        self.opened = type(self).database()
        self.store = self.opened.__enter__()
        self.sqlite = isinstance(self.store, SQLiteStore)
        self.writers: dict[int, Writer] = {}
        self.prepared: dict[str, Writer] = {}
        self.published: dict[UUID, tuple[str, int, int]] = {}
        """Of each event its type, its transaction, and its number in that."""
        self.committed: set[UUID] = set()
        self.numbers = iter(range(1_000_000))
        self.readers: dict[str, Reader] = {reader.name: reader for reader in self.run(self.open())}

    def run(self, coroutine: Coroutine[Any, Any, Any]) -> Any:
        return self.runner.run(coroutine)

    async def open(self) -> list[Reader]:
        await self.store.prepare(create=True)
        await register(self.store, *TYPES)
        found = []
        for name in TYPES:
            cursor = await take_over(self.store, name)
            found.append(Reader(name, cursor, cursor.place))
        return found

    @property
    def holder(self) -> int | None:
        """The writer that has SQLite's only write lock; everybody else who wants it would wait for ever here."""
        return next((writer.number for writer in self.writers.values() if self.sqlite and writer.wrote), None)

    @property
    def writable(self) -> bool:
        return self.holder is None

    def some_writer(self, data: st.DataObject) -> Writer:
        return self.writers[data.draw(st.sampled_from(sorted(self.writers)), label="writer")]

    def some_reader(self, data: st.DataObject) -> Reader:
        name: str = data.draw(st.sampled_from(sorted(TYPES)), label="reader")
        return self.readers[name]

    # --- writers ----------------------------------------------------------------------------------------------------

    @precondition(lambda self: len(self.writers) < 4)
    @rule(takes_an_id=st.booleans())
    def begin(self, takes_an_id: bool) -> None:
        async def begin() -> None:
            connection = await self.store.engine.connect()
            await connection.begin()
            if takes_an_id and not self.sqlite:
                await connection.execute(text("SELECT pg_current_xact_id()"))
            writer = Writer(next(self.numbers), connection)
            self.writers[writer.number] = writer

        self.run(begin())

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), types=st.text("AB", min_size=1, max_size=4))
    def publish(self, data: st.DataObject, types: str) -> None:
        free = [number for number in sorted(self.writers) if self.holder in (None, number)]
        writer = self.writers[data.draw(st.sampled_from(free), label="writer")]
        made = self.run(append(self.store, writer.connection, *types))
        for type_, event_id in zip(types, made, strict=True):
            # numbers are handed out once, so that what a savepoint took back leaves a gap and no double
            self.published[event_id] = (type_, writer.number, len(self.published))
        writer.events += made
        writer.wrote = True

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def savepoint(self, data: st.DataObject) -> None:
        writer = self.some_writer(data)

        async def begin() -> None:
            writer.savepoints.append((await writer.connection.begin_nested(), len(writer.events)))

        self.run(begin())

    @precondition(lambda self: any(writer.savepoints for writer in self.writers.values()))
    @rule(data=st.data(), releases=st.booleans())
    def end_a_savepoint(self, data: st.DataObject, releases: bool) -> None:
        saved = [number for number, writer in sorted(self.writers.items()) if writer.savepoints]
        writer = self.writers[data.draw(st.sampled_from(saved), label="writer")]
        savepoint, before = writer.savepoints.pop()
        self.run(savepoint.commit() if releases else savepoint.rollback())
        if not releases:
            del writer.events[before:]

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), commits=st.sampled_from([True, True, True, False]))
    def end(self, data: st.DataObject, commits: bool) -> None:
        writer = self.writers.pop(self.some_writer(data).number)
        self.run(self._end(writer, commits))

    async def _end(self, writer: Writer, commits: bool) -> None:
        await (writer.connection.commit() if commits else writer.connection.rollback())
        await writer.connection.close()
        if commits:
            self.committed.update(writer.events)

    @precondition(lambda self: self.writers and not self.sqlite and len(self.prepared) < 5)
    @rule(data=st.data())
    def prepare(self, data: st.DataObject) -> None:
        writer = self.writers.pop(self.some_writer(data).number)

        async def prepare() -> None:
            name = uuid4().hex
            await writer.connection.execute(text(f"PREPARE TRANSACTION '{name}'"))
            await writer.connection.close()
            self.prepared[name] = writer

        self.run(prepare())

    @precondition(lambda self: self.prepared)
    @rule(data=st.data(), commits=st.sampled_from([True, True, False]))
    def end_a_prepared_one(self, data: st.DataObject, commits: bool) -> None:
        self.run(self._end_prepared(data.draw(st.sampled_from(list(self.prepared)), label="prepared"), commits))

    async def _end_prepared(self, name: str, commits: bool) -> None:
        async with self.store.reading() as connection:
            await connection.execute(text(f"{'COMMIT' if commits else 'ROLLBACK'} PREPARED '{name}'"))
        writer = self.prepared.pop(name)
        if commits:
            self.committed.update(writer.events)

    # --- readers ----------------------------------------------------------------------------------------------------

    @rule(data=st.data(), limit=st.integers(1, 4))
    def read(self, data: st.DataObject, limit: int) -> None:
        reader = self.some_reader(data)
        self.take(reader, self.run(self.store.read(reader.read_place, reader.types, limit)), limit)

    @precondition(lambda self: self.behind() is not None)
    @rule(limit=st.integers(1, 4))
    def read_toward_the_other(self, limit: int) -> None:
        found = self.behind()
        assert found is not None
        reader, toward = found
        page = self.run(self.store.read(reader.read_place, reader.types, limit, toward=toward))
        assert not page.complete
        self.take(reader, page, limit)

    def behind(self) -> tuple[Reader, Any] | None:
        """The reader that is behind, and where the other is."""
        one, other = self.readers.values()
        if self.store.is_later(one.read_place, other.read_place):
            return other, one.read_place
        if self.store.is_later(other.read_place, one.read_place):
            return one, other.read_place
        return None

    def take(self, reader: Reader, page: Page, limit: int) -> None:
        positions = [row.position for row in page.rows]
        assert len(positions) <= limit
        assert positions == sorted(set(positions)), "a page is in the order of positions"
        held = {one.row.position for one in reader.hand}
        for row in page.rows:
            type_, transaction, number = self.published[row.event_id]
            assert row.event_id in self.committed, "only what is committed is read"
            assert row.type == type_
            assert reader.types is None or type_ in reader.types
            assert row.position not in held, "nothing is read twice by one who remembers it"
            assert reader.last.get(transaction, -1) < number, "a transaction's events come in its order"
            assert (row.event_id in reader.delivered) == (row.position in reader.done)
            reader.last[transaction] = number
            reader.hand.append(InHand(row, page.window, row.position in reader.done))
        reader.read_place = page.after

    @precondition(lambda self: self.writable)
    @rule(data=st.data(), with_effects=st.booleans())
    def settle_a_part(self, data: st.DataObject, with_effects: bool) -> None:
        reader = self.some_reader(data)
        left = [one for one in reader.hand if not one.settled]
        chosen = data.draw(st.lists(st.booleans(), min_size=len(left), max_size=len(left)), label="which")
        self.settle(reader, [one for one, take in zip(left, chosen, strict=True) if take], with_effects)

    def settle(self, reader: Reader, chosen: list[InHand], with_effects: bool) -> None:
        """Settle these, and move the cursor past what is settled at the beginning."""
        for one in chosen:
            one.settled = True
        passed: list[InHand] = []
        while len(passed) < len(reader.hand) and reader.hand[len(passed)].settled:
            passed.append(reader.hand[len(passed)])
        if len(passed) == len(reader.hand):
            place = reader.read_place
        elif passed:
            place = self.store.within(passed[-1].window, passed[-1].row.position)
        else:
            place = reader.cursor.place
        add = [one.row.position for one in chosen if one not in passed]
        drop = [one.row.position for one in passed if one.row.position in reader.done]
        move = Move(reader.cursor, place, add, drop)

        async def settle() -> None:
            if with_effects:
                async with self.store.writing() as connection:
                    await self.store.move(connection, move, uuid4())
            else:
                assert await self.store.settle([move], uuid4(), []) == {reader.cursor.key}

        self.run(settle())
        reader.cursor.place = place
        reader.done = (reader.done | set(add)) - set(drop)
        reader.delivered += [one.row.event_id for one in chosen]
        del reader.hand[: len(passed)]

    @precondition(lambda self: self.writable)
    @rule(data=st.data())
    def die_and_be_followed(self, data: st.DataObject) -> None:
        reader = self.some_reader(data)
        cursor = self.run(take_over(self.store, reader.name))
        assert cursor.token > reader.cursor.token
        assert cursor.done == reader.done
        reader.before, reader.cursor, reader.read_place = reader.cursor, cursor, cursor.place
        reader.hand.clear()
        reader.last.clear()

    @precondition(lambda self: self.writable and any(reader.before for reader in self.readers.values()))
    @rule(data=st.data())
    def settle_what_is_anothers_now(self, data: st.DataObject) -> None:
        followed = [name for name, reader in sorted(self.readers.items()) if reader.before is not None]
        reader = self.readers[data.draw(st.sampled_from(followed), label="reader")]
        assert reader.before is not None
        move = Move(reader.before, reader.read_place, [one.row.position for one in reader.hand], list(reader.done))

        async def settle() -> None:
            assert await self.store.settle([move], await worker(self.store), []) == set()
            async with self.store.engine.connect() as connection:
                with pytest.raises(LeaseLost):
                    await self.store.move(connection, move, uuid4())

        self.run(settle())

    @precondition(lambda self: self.writable)
    @rule(data=st.data(), limit=st.integers(1, 5))
    def read_and_settle_everything(self, data: st.DataObject, limit: int) -> None:
        self.finish(self.some_reader(data), limit)

    def finish(self, reader: Reader, limit: int) -> None:
        complete = False
        while not complete:
            page = self.run(self.store.read(reader.read_place, reader.types, limit))
            self.take(reader, page, limit)
            self.settle(reader, [one for one in reader.hand if not one.settled], False)
            complete = page.complete
        assert Counter(reader.delivered) == Counter(self.owed(reader))

    def owed(self, reader: Reader) -> list[UUID]:
        types = reader.types
        return [one for one in self.committed if types is None or self.published[one][0] in types]

    @invariant()
    def nothing_is_settled_twice_and_nothing_is_invented(self) -> None:
        for reader in self.readers.values():
            assert Counter(reader.delivered) <= Counter(self.owed(reader))

    def teardown(self) -> None:
        async def end() -> None:
            for writer in self.writers.values():
                await self._end(writer, False)
            for number, name in enumerate(list(self.prepared)):
                await self._end_prepared(name, number % 2 == 0)

        try:
            self.run(end())
            self.writers.clear()
            for reader in self.readers.values():
                self.finish(reader, 3)
        finally:
            self.run(self.store.close())
            self.run(self.store.engine.dispose())
            self.runner.close()
            self.opened.__exit__(None, None, None)


def tried(machine: type[LogModel], examples: int) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples + SOAK,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow],
        ),
    )


@pytest.fixture(scope="module")
def two_phase_server() -> Iterator[str]:
    server = start_postgres(settings={"max_prepared_transactions": "10"})
    yield server.url
    server.stop()


def test_every_order_of_transactions_and_reads_delivers_exactly_what_was_committed(two_phase_server: str) -> None:
    @contextmanager
    def opened() -> Iterator[Store]:
        with empty_database(two_phase_server) as url:
            yield PostgresStore(create_async_engine(url))

    class OnPostgres(LogModel):
        database = staticmethod(opened)

    tried(OnPostgres, 25)


def test_every_order_of_transactions_and_reads_delivers_what_was_committed_on_sqlite() -> None:
    @contextmanager
    def opened() -> Iterator[Store]:
        with TemporaryDirectory() as folder:
            engine = create_async_engine(f"sqlite+aiosqlite:///{Path(folder)}/log.db")
            configure(engine)
            yield SQLiteStore(engine)

    class OnSQLite(LogModel):
        database = staticmethod(opened)

    tried(OnSQLite, 25)
