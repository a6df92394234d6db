"""Somebody else sets a user's password anew."""

from uuid import UUID

from dashtam.application.database import DatabaseProtocol
from dashtam.domain.events import UserPasswordChangeSucceeded
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.user import UserNotFound, UserRepository, WeakPassword
from whereupon import EventBusProtocol


class PasswordResetService:
    def __init__(self, user_repo: UserRepository, event_bus: EventBusProtocol, database: DatabaseProtocol) -> None:
        self._users = user_repo
        self._event_bus = event_bus
        self._database = database

    async def reset_password(self, user_id: UUID, new_password: str) -> Result[None, UserNotFound | WeakPassword]:
        """As an administrator does it: whoever calls this has checked that they may."""
        async with self._database.get_session() as session:
            user = await self._users.find_by_id(user_id, for_update=True)
            if user is None:
                return Failure(UserNotFound())
            try:
                user.change_password(new_password)
            except WeakPassword as error:
                return Failure(error)
            await self._users.save(user)
            await self._event_bus.publish(
                UserPasswordChangeSucceeded(user_id=user.id, initiated_by="admin"), session=session
            )
            return Success(None)
