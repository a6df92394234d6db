"""What use cases need of the database: one transaction around everything they change."""

from contextlib import AbstractAsyncContextManager, AbstractContextManager
from typing import Protocol

from sqlalchemy.ext.asyncio import AsyncSession


class DatabaseProtocol(Protocol):
    def get_session(self) -> AbstractAsyncContextManager[AsyncSession]:
        """A session with a transaction: committed when the block ends, rolled back when it raises.

        Repositories that are called inside the block work in it.
        """
        ...

    def joined(self, session: AsyncSession) -> AbstractContextManager[None]:
        """Repositories that are called inside the block work in `session`, whose transaction is somebody else's."""
        ...
