"""A person registers, whereupon their settings are initialised (and a welcome mail is sent: see `mail`)."""

from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass, field
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from dashtam.application.database import DatabaseProtocol
from dashtam.domain.events import UserRegistrationSucceeded
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.settings import UserSettings, UserSettingsRepository
from dashtam.domain.user import EmailTaken, InvalidEmail, User, UserRepository, WeakPassword
from whereupon import Discard, EventBusProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class RegisterUser:
    email: str
    password: str = field(repr=False)


RegistrationError = InvalidEmail | WeakPassword | EmailTaken


class RegisterUserHandler:
    """Stores the user and publishes that they registered, in one transaction.

    Without a database it opens no session: the repository and the bus must then do without one.
    """

    def __init__(
        self,
        user_repo: UserRepository,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol | None = None,
    ) -> None:
        self._users = user_repo
        self._event_bus = event_bus
        self._database = database

    async def handle(self, cmd: RegisterUser) -> Result[UUID, RegistrationError]:
        try:
            user = User.create(email=cmd.email, password=cmd.password)
            async with self._session() as session:
                # Whether the address is taken only the unique index knows: a look-up first would miss whoever
                # registers at the same moment.
                await self._users.save(user)
                await self._event_bus.publish(
                    UserRegistrationSucceeded(user_id=user.id, email=user.email),
                    session=session,
                )
        except (InvalidEmail, WeakPassword, EmailTaken) as error:
            return Failure(error)
        return Success(user.id)

    def _session(self) -> AbstractAsyncContextManager[AsyncSession | None]:
        return nullcontext() if self._database is None else self._database.get_session()


class InitialSettings:
    """Every user has settings from the start: the defaults."""

    def __init__(
        self, settings_repo: UserSettingsRepository, user_repo: UserRepository, database: DatabaseProtocol
    ) -> None:
        self._settings = settings_repo
        self._users = user_repo
        self._database = database

    async def initialise_settings(self, event: UserRegistrationSucceeded, session: AsyncSession) -> None:
        with self._database.joined(session):
            if await self._users.find_by_id(event.user_id, for_update=True) is None:
                raise Discard(f"there is no user {event.user_id} (any more), so nobody to have settings")
            if await self._settings.find_by_user(event.user_id) is None:
                await self._settings.save(UserSettings(user_id=event.user_id))
