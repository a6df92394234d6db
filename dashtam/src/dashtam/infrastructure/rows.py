"""SQL that more than one repository needs."""

from datetime import datetime
from typing import Any, cast

from sqlalchemy import CursorResult, delete, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncSession

from dashtam.infrastructure.tables import Model, OneTimeTokenModel, SessionModel


def insert(session: AsyncSession, model: type[Model]) -> Any:
    """An INSERT that knows ON CONFLICT."""
    if session.get_bind().dialect.name == "sqlite":
        return sqlite.insert(model)
    return postgresql.insert(model)


async def delete_ended(
    session: AsyncSession, model: type[SessionModel] | type[OneTimeTokenModel], before: datetime, limit: int
) -> int:
    ended = select(model.id).where(model.expires_at < before).order_by(model.expires_at).limit(limit)
    ended = ended.with_for_update(skip_locked=True)  # somebody else deletes those
    result = await session.execute(
        delete(model).where(model.id.in_(ended)), execution_options={"synchronize_session": False}
    )
    return cast("CursorResult[Any]", result).rowcount
