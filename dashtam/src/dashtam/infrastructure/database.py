"""Sessions, and which of them a repository works in."""

from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker


class NoSessionError(RuntimeError):
    """A repository was called outside a session."""


class _Joined:
    """A session that repositories work in, until its block ends."""

    __slots__ = ("database", "open", "session")

    def __init__(self, database: "Database", session: AsyncSession) -> None:
        self.database = database
        self.session = session
        self.open = True


_joined: ContextVar[_Joined | None] = ContextVar("dashtam_session", default=None)


class Database:
    """Dashtam's database. The engine belongs to whoever made it."""

    def __init__(self, engine: AsyncEngine) -> None:
        self.engine = engine
        # Errors are logged and kept with dead letters: the values of their statements, a hash among them, are not.
        engine.sync_engine.hide_parameters = True
        self._sessions = async_sessionmaker(engine, expire_on_commit=False)

    @asynccontextmanager
    async def get_session(self) -> AsyncIterator[AsyncSession]:
        async with self._sessions.begin() as session:
            with self.joined(session):
                yield session

    async def ping(self) -> None:
        """Raises what the driver raises where the database does not answer."""
        async with self.engine.connect() as connection:
            await connection.execute(text("SELECT 1"))

    @contextmanager
    def joined(self, session: AsyncSession) -> Iterator[None]:
        outer = _joined.get()
        here = _Joined(self, session)
        _joined.set(here)
        try:
            yield
        finally:
            here.open = False  # a task started inside may outlive the block, and still see it
            if _joined.get() is here:
                _joined.set(outer)

    def current(self, caller: str) -> AsyncSession:
        """The session of the block that this is called in; raises `NoSessionError` naming `caller`."""
        joined = _joined.get()
        if joined is None or joined.database is not self or not joined.open:
            ended = joined is not None and joined.database is self
            raise NoSessionError(
                f"{caller} works in the session of its caller, and "
                + ("that session has ended" if ended else "there is none")
                + ": call it inside `async with database.get_session():`, or in a handler that was handed a session, "
                "inside `with database.joined(session):`"
            )
        return joined.session
