"""The audit trail: written from each event's own declaration, with the log, and never changed after that."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from decimal import Decimal
from typing import Any
from uuid import UUID, uuid4

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import DBAPIError

from tests.notebook import Note, Notebook, NoteShared, NoteWritten, Records, SharingAttempted, SharingFailed, notebook
from whereupon import AuditEventHandler, DomainEvent, EventBus, InMemoryEventBus, request_metadata
from whereupon.audit import audit_log

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


class BudgetChanged(DomainEvent, audit="BUDGET_CHANGED", resource="budget", category="money"):
    budget_id: UUID
    user_id: UUID
    amount: Decimal
    valid_until: datetime | None

    def audit_context(self) -> dict[str, Any]:
        return {**super().audit_context(), "method": "form", "limit": Decimal("9.90")}


class BudgetCopied(DomainEvent, audit="BUDGET_COPIED", resource="budget", resource_id="copy_id"):
    budget_id: int
    copy_id: str
    user_id: str


class BudgetDamaged(DomainEvent, audit="BUDGET_DAMAGED"):
    def audit_context(self) -> dict[str, Any]:
        return {"what": object()}


@pytest.fixture
async def notes(database_url: str) -> AsyncIterator[Notebook]:
    async with notebook(database_url, subscribed=lambda bus: bus.register(AuditEventHandler())) as notes:
        yield notes


async def test_a_row_is_what_the_event_declares_and_who_caused_it(notes: Notebook) -> None:
    cause, budget, user = uuid4(), uuid4(), uuid4()
    event = BudgetChanged(
        budget_id=budget, user_id=user, amount=Decimal("12.50"), valid_until=datetime(2030, 1, 2, 3, tzinfo=UTC)
    )
    before = datetime.now(UTC)
    with request_metadata({"ip_address": "10.1.2.3", "user_agent": "browser", "correlation_id": cause}):
        async with notes.sessions.begin() as session:
            await notes.bus.publish(event, session=session, metadata={"actor": "admin"})
    (row,) = await notes.audited()
    assert row._asdict() | {"id": None, "recorded_at": None} == {
        "id": None,
        "event_id": event.event_id,
        "event_type": "BudgetChanged",
        "action": "BUDGET_CHANGED",
        "category": "money",
        "outcome": "succeeded",
        "user_id": user,
        "resource_type": "budget",
        "resource_id": str(budget),
        "context": {
            "budget_id": str(budget),
            "amount": "12.50",
            "valid_until": "2030-01-02T03:00:00Z",
            "method": "form",
            "limit": "9.90",
        },
        "actor": "admin",
        "ip_address": "10.1.2.3",
        "user_agent": "browser",
        "correlation_id": cause,
        "occurred_at": event.occurred_at,
        "recorded_at": None,
    }
    assert before <= row.recorded_at <= datetime.now(UTC)


async def test_what_is_no_uuid_is_not_taken_for_a_user_and_a_resource_is_named_by_any_field(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        await notes.bus.publish(BudgetCopied(budget_id=1, copy_id="two", user_id="me"), session=session)
    (row,) = await notes.audited()
    assert (row.user_id, row.resource_id, row.category) == (None, "two", None)


async def test_an_event_without_an_audit_action_leaves_no_row(notes: Notebook) -> None:
    async with notes.sessions.begin() as session:
        await notes.write(session, "a")
    assert await notes.audited() == []


async def test_the_row_commits_and_rolls_back_with_the_event(notes: Notebook) -> None:
    async with notes.sessions() as session:
        await notes.bus.publish(NoteShared(note_id=1, user_id=uuid4()), session=session)
        await session.rollback()
        await notes.bus.publish(NoteShared(note_id=2, user_id=uuid4()), session=session)
        savepoint = await session.begin_nested()
        await notes.bus.publish(NoteShared(note_id=3, user_id=uuid4()), session=session)
        await savepoint.rollback()
        await session.commit()
    assert [row.resource_id for row in await notes.audited()] == ["2"]
    assert await notes.logged_types() == ["NoteShared"]


async def test_attempted_and_failed_survive_the_rollback_of_the_work(notes: Notebook) -> None:
    await notes.bus.publish(SharingAttempted(text="x"))
    async with notes.sessions() as session:
        session.add(Note(text="x"))
        await notes.bus.publish(NoteShared(note_id=1, user_id=uuid4()), session=session)
        await session.rollback()
    await notes.bus.publish(SharingFailed(text="x", reason="refused"))
    assert [(row.action, row.outcome) for row in await notes.audited()] == [
        ("NOTE_SHARING_ATTEMPTED", "attempted"),
        ("NOTE_SHARING_FAILED", "failed"),
    ]
    assert await notes.texts() == []


STATEMENTS = {
    "UPDATE": "UPDATE whereupon_audit SET actor = 'nobody'",
    "DELETE": "DELETE FROM whereupon_audit",
    "TRUNCATE": "TRUNCATE whereupon_audit",
    "UPSERT": "INSERT INTO whereupon_audit SELECT * FROM whereupon_audit WHERE true "
    "ON CONFLICT (event_id) DO UPDATE SET actor = 'nobody'",
}


@pytest.mark.parametrize("what", STATEMENTS)
async def test_the_database_itself_refuses_to_change_a_row(notes: Notebook, what: str) -> None:
    if what == "TRUNCATE" and notes.bus.engine.dialect.name == "sqlite":
        pytest.skip("SQLite has no TRUNCATE, and takes DELETE without WHERE for it")
    async with notes.sessions.begin() as session:
        await notes.bus.publish(NoteShared(note_id=1, user_id=uuid4()), session=session)
    before = await notes.audited()
    async with notes.sessions() as session:
        with pytest.raises(DBAPIError, match="append-only"):
            await session.execute(text(STATEMENTS[what]))
    assert await notes.audited() == before


@pytest.mark.parametrize("statement", ["INSERT OR REPLACE INTO", "REPLACE INTO"])
async def test_sqlite_refuses_to_replace_a_row(sqlite_url: str, statement: str) -> None:
    """REPLACE deletes the row in its way, and SQLite fires no DELETE trigger for that unless told to."""
    async with notebook(sqlite_url, subscribed=lambda bus: bus.register(AuditEventHandler())) as notes:
        async with notes.sessions.begin() as session:
            await notes.bus.publish(NoteShared(note_id=1, user_id=uuid4()), session=session)
        before = await notes.audited()
        names = ", ".join(column.name for column in audit_log.columns)
        forged = names.replace("action", "'FORGED'", 1)
        forgery = f"{statement} whereupon_audit ({names}) SELECT {forged} FROM whereupon_audit"
        async with notes.sessions() as session:
            with pytest.raises(DBAPIError, match="append-only"):
                await session.execute(text(forgery))
            await session.commit()
        assert await notes.audited() == before


async def test_hostile_text_is_kept_as_far_as_text_can_be(notes: Notebook) -> None:
    hostile = "a\x00b'; DROP TABLE whereupon_audit; -- \u202e\U0001f4a5"
    kept = hostile.replace("\x00", "\ufffd")
    with request_metadata({"ip_address": hostile, "user_agent": "\ud800" + hostile, "actor": hostile}):
        await notes.bus.publish(SharingAttempted(text=hostile))
    (row,) = await notes.audited()
    assert row.context == {"text": kept}
    assert (row.ip_address, row.actor, row.user_agent) == (kept, kept, "?" + kept)
    assert await notes.logged() == [hostile]


async def test_a_context_that_can_not_be_written_is_an_error_at_publish(notes: Notebook) -> None:
    async with notes.sessions() as session:
        with pytest.raises(TypeError):
            await notes.bus.publish(BudgetDamaged(), session=session)
        await notes.bus.publish(NoteWritten(text="kept"), session=session)
        await session.commit()
    assert await notes.logged() == ["kept"]
    assert await notes.audited() == []


async def test_on_a_bus_without_a_log_it_writes_in_the_publishers_session(database_url: str) -> None:
    logger = Records()
    async with notebook(database_url) as notes, InMemoryEventBus(logger=logger) as bus:
        bus.register(AuditEventHandler())
        for outcome in ("rollback", "commit"):
            async with notes.sessions() as session:
                with request_metadata({"ip_address": "10.0.0.1"}):
                    await bus.publish(
                        NoteShared(note_id=len(outcome), user_id=UUID(int=1)), NoteWritten(text="x"), session=session
                    )
                await getattr(session, outcome)()
        (row,) = await notes.audited()
    assert (row.action, row.resource_id, row.user_id, row.ip_address) == ("NOTE_SHARED", "6", UUID(int=1), "10.0.0.1")
    assert logger.records == []


async def test_events_of_a_publisher_that_knows_no_audit_are_audited_from_the_log(database_url: str) -> None:
    """A script that never imported the handler publishes; the worker that has it catches up, once."""

    def audited(bus: EventBus) -> None:
        bus.register(AuditEventHandler())

    async with notebook(database_url, subscribed=audited, deliver=True) as notes:
        async with EventBus(database_url, deliver=False) as script, notes.sessions.begin() as session:
            receipt = await script.publish(NoteShared(note_id=7, user_id=uuid4()), session=session)
        async with notes.sessions.begin() as session:
            await notes.bus.publish(NoteShared(note_id=8, user_id=uuid4()), session=session)
        async with asyncio.timeout(10):
            while True:
                found = await notes.bus.deliveries(receipt.events[0].event_id)
                if [state.state for state in found] == ["succeeded"]:
                    break
                await asyncio.sleep(0.02)
        await notes.bus.drain(10)
        async with notes.sessions() as session:
            assert sorted(await session.scalars(select(audit_log.c.resource_id))) == ["7", "8"]
        assert notes.logger.of("event_handler_failed") == []
