"""A small application that the tests of publishing share: notes, and the events that tell of them."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from typing import Any
from uuid import UUID

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from whereupon import DomainEvent, EventBus
from whereupon.audit import audit_log
from whereupon.schema import log


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "note"
    id: Mapped[int] = mapped_column(primary_key=True)
    text: Mapped[str] = mapped_column(unique=True)


class NoteWritten(DomainEvent):
    text: str


class NoteShared(DomainEvent, audit="NOTE_SHARED", category="notes", resource="note"):
    note_id: int
    user_id: UUID


class SharingAttempted(DomainEvent, audit="NOTE_SHARING_ATTEMPTED", category="notes"):
    text: str


class SharingFailed(DomainEvent, audit="NOTE_SHARING_FAILED", category="notes"):
    text: str
    reason: str


class Records:
    """A logger that keeps what it is told."""

    def __init__(self) -> None:
        self.records: list[tuple[str, str, dict[str, Any]]] = []

    def info(self, event: str, /, **details: Any) -> None:
        self.records.append(("info", event, details))

    def warning(self, event: str, /, **details: Any) -> None:
        self.records.append(("warning", event, details))

    def error(self, event: str, /, **details: Any) -> None:
        self.records.append(("error", event, details))

    def of(self, event: str) -> list[dict[str, Any]]:
        return [details for _, name, details in self.records if name == event]


class Notebook:
    def __init__(self, bus: EventBus, logger: Records) -> None:
        self.bus = bus
        self.logger = logger
        self.sessions = async_sessionmaker(bus.engine, expire_on_commit=False)

    async def texts(self) -> list[str]:
        """What notes are committed."""
        async with self.sessions() as session:
            return sorted(await session.scalars(select(Note.text)))

    async def logged(self) -> list[str]:
        """The texts of the events that are committed, in the order of the log."""
        async with self.sessions() as session:
            rows = await session.execute(select(log.c.type, log.c.payload).order_by(log.c.position))
            return [_text_of(row.payload) for row in rows]

    async def logged_types(self) -> list[str]:
        async with self.sessions() as session:
            return list(await session.scalars(select(log.c.type).order_by(log.c.position)))

    async def audited(self) -> Sequence[Any]:
        """Rows of the audit trail, oldest first."""
        async with self.sessions() as session:
            return (await session.execute(select(audit_log).order_by(audit_log.c.recorded_at))).all()

    async def write(self, session: AsyncSession, text: str) -> None:
        """Add a note, and publish that it was written."""
        session.add(Note(text=text))
        await self.bus.publish(NoteWritten(text=text), session=session)


def _text_of(payload: bytes) -> str:
    import msgspec

    fields: dict[str, Any] = msgspec.json.decode(payload)
    return str(fields.get("text", fields))


@asynccontextmanager
async def notebook(
    url: str, *, subscribed: Callable[[EventBus], None] | None = None, deliver: bool = False, **options: Any
) -> AsyncIterator[Notebook]:
    """A notebook with a bus that is entered; without a worker unless `deliver` says so."""
    logger = Records()
    bus = EventBus(url, create_tables=True, deliver=deliver, logger=logger, **options)
    if subscribed is not None:
        subscribed(bus)
    async with bus.engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    async with bus:
        yield Notebook(bus, logger)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until `condition()` is true; `TimeoutError` if it never is."""
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 — whatever is waited for knows nothing of this
            await asyncio.sleep(0.01)
