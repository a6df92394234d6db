"""Events share the fate of the savepoint that they were published in, whatever becomes of the savepoints around it."""

# ruff: noqa: PT012, SIM117 — what fails is often the end of a block

from __future__ import annotations

import itertools
from collections.abc import AsyncIterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import AsyncSession

from tests.notebook import Note, Notebook, NoteWritten, notebook
from whereupon import Delivery, EventBus

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


@pytest.fixture
async def notes(database_url: str) -> AsyncIterator[Notebook]:
    async with notebook(database_url) as notes:
        yield notes


async def committed(notes: Notebook) -> list[str]:
    texts = await notes.texts()
    assert sorted(await notes.logged()) == texts
    return texts


@pytest.mark.parametrize("outcomes", list(itertools.product(["commit", "rollback"], repeat=3)), ids="-".join)
async def test_three_savepoints_deep_an_event_needs_all_of_them_to_be_released(
    notes: Notebook, outcomes: tuple[str, str, str]
) -> None:
    outer, middle, inner = outcomes
    async with notes.sessions.begin() as session:
        first = await session.begin_nested()
        await notes.write(session, "outer")
        second = await session.begin_nested()
        await notes.write(session, "middle")
        third = await session.begin_nested()
        await notes.write(session, "inner")
        await getattr(third, inner)()
        await notes.write(session, "middle again")
        await getattr(second, middle)()
        await notes.write(session, "outer again")
        await getattr(first, outer)()
        await notes.write(session, "outside")
    expected = ["outside"]
    if outer == "commit":
        expected += ["outer", "outer again"]
        if middle == "commit":
            expected += ["middle", "middle again"]
            if inner == "commit":
                expected += ["inner"]
    assert await committed(notes) == sorted(expected)


async def test_rolling_back_an_outer_savepoint_takes_an_open_inner_one_along(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        outer = await session.begin_nested()
        await notes.write(session, "outer")
        await session.begin_nested()
        await notes.write(session, "inner")
        await outer.rollback()
        await notes.write(session, "outside")
    assert await committed(notes) == ["outside"]


async def test_releasing_an_outer_savepoint_releases_an_open_inner_one(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        outer = await session.begin_nested()
        await session.begin_nested()
        await notes.write(session, "inner")
        await outer.commit()
    assert await committed(notes) == ["inner"]


async def test_committing_with_a_savepoint_open_keeps_its_events(notes: Notebook) -> None:
    async with notes.sessions() as session:
        await session.begin_nested()
        await notes.write(session, "inside")
        await session.commit()  # commits the savepoint
        await session.commit()
    assert await committed(notes) == ["inside"]


async def test_a_savepoint_older_than_the_first_event_is_honoured(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        session.add(Note(text="before"))
        savepoint = await session.begin_nested()
        await notes.write(session, "inside")
        await savepoint.rollback()
        await notes.bus.publish(NoteWritten(text="before"), session=session)
    assert await committed(notes) == ["before"]


async def test_a_savepoint_as_the_first_statement_is_rolled_back_alone(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        async with session.begin_nested() as savepoint:
            await notes.write(session, "inside")
            await savepoint.rollback()
        await notes.write(session, "after")
    assert await committed(notes) == ["after"]


async def test_a_flush_that_fails_in_a_savepoint_takes_its_events_with_it(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        await notes.write(session, "taken")
        await session.flush()
        with pytest.raises(IntegrityError):
            async with session.begin_nested():
                await notes.bus.publish(NoteWritten(text="dropped"), session=session)
                session.add(Note(text="taken"))
        await notes.write(session, "after")
    assert await committed(notes) == ["after", "taken"]


async def test_savepoints_of_one_transaction_mean_nothing_to_the_next(notes: Notebook) -> None:
    async with notes.sessions() as session:
        await session.begin_nested()
        await notes.write(session, "dropped")
        await session.rollback()
        await session.rollback()
        await notes.write(session, "kept")
        savepoint = await session.begin_nested()
        await savepoint.rollback()
        await session.commit()
    assert await committed(notes) == ["kept"]


async def test_savepoints_of_the_connection_and_of_the_session_are_the_same_to_events(notes: Notebook) -> None:
    async with notes.bus.engine.connect() as connection, connection.begin():
        savepoint = await connection.begin_nested()
        async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint") as session:
            await notes.write(session, "dropped")
            await session.commit()
        await savepoint.rollback()
        async with connection.begin_nested():
            async with AsyncSession(bind=connection, join_transaction_mode="create_savepoint") as session:
                await notes.write(session, "kept")
                await session.commit()
    assert await committed(notes) == ["kept"]


async def test_releasing_a_savepoint_runs_no_after_commit_handler(database_url: str) -> None:
    heard: list[str] = []

    def subscribed(bus: EventBus) -> None:
        @bus.subscribe(NoteWritten, delivery=Delivery.AFTER_COMMIT)
        async def hear(event: NoteWritten) -> None:
            heard.append(event.text)

    async with notebook(database_url, subscribed=subscribed) as notes:
        async with notes.sessions.begin() as session:
            async with session.begin_nested():
                await notes.write(session, "inside")
            await notes.bus.drain(5)
            assert heard == []
        await notes.bus.drain(5)
        assert heard == ["inside"]


# --- any order of steps -----------------------------------------------------------------------------------------------

steps = st.lists(st.sampled_from(["publish", "begin", "release", "undo", "undo outer", "release outer"]), max_size=25)


@settings(max_examples=60, deadline=None)
@given(steps=steps, commits=st.booleans())
async def test_after_any_steps_the_log_holds_what_the_table_holds(steps: list[str], commits: bool) -> None:
    """The database itself says what a savepoint is worth: each event is published next to a row of its own."""
    numbers = itertools.count()
    async with notebook("sqlite+aiosqlite:///:memory:") as notes:
        async with notes.sessions() as session:
            open_: list[Any] = []
            for step in steps:
                if step == "publish":
                    await notes.write(session, f"{next(numbers):03}")
                elif step == "begin":
                    open_.append(await session.begin_nested())
                elif open_:
                    index = 0 if step.endswith("outer") else len(open_) - 1
                    savepoint = open_[index]
                    del open_[index:]
                    await (savepoint.commit() if step.startswith("release") else savepoint.rollback())
            for savepoint in reversed(open_):
                await savepoint.commit()
            await (session.commit() if commits else session.rollback())
        texts = await notes.texts()
        assert await notes.logged() == texts
        assert commits or texts == []
