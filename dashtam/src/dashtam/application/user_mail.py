"""Mail to users of whom an event tells the id alone."""

from collections.abc import Mapping
from uuid import UUID

from dashtam.application.database import DatabaseProtocol
from dashtam.application.mail import Mail, Mailer, MailRefused
from dashtam.domain.user import UserRepository
from whereupon import Discard


class UserMail:
    def __init__(self, mailer: Mailer, users: UserRepository, database: DatabaseProtocol) -> None:
        self._mailer = mailer
        self._users = users
        self._database = database

    async def send(self, user_id: UUID, template: str, subject: str, *, key: str, **variables: object) -> None:
        """For handlers: raises `Discard` where there is nobody to write to."""
        async with self._database.get_session():
            user = await self._users.find_by_id(user_id, for_update=False)
        if user is None:
            raise Discard(f"there is no user {user_id} (any more), so nobody to write to")
        shown: Mapping[str, object] = {"email": user.email, **variables}
        try:
            await self._mailer.send(Mail(template=template, to=user.email, subject=subject, key=key, variables=shown))
        except MailRefused as error:
            raise Discard(str(error)) from error
