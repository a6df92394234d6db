"""What came of a block, as the database tells."""

from collections.abc import Sequence
from typing import Any

from sqlalchemy import Row, select

from dashtam.application.database import DatabaseProtocol
from dashtam.infrastructure.tables import AuditLogModel
from whereupon import schema


async def audit_trail(database: DatabaseProtocol) -> Sequence[Row[Any]]:
    """Every audit record, the oldest first."""
    table = AuditLogModel.__table__
    async with database.get_session() as session:
        return (await session.execute(select(table).order_by(table.c.occurred_at, table.c.id))).all()


async def published(database: DatabaseProtocol) -> list[str]:
    """The stored name of every event in the log, in order."""
    async with database.get_session() as session:
        return list(await session.scalars(select(schema.log.c.type).order_by(schema.log.c.position)))
