"""A user chooses another password, whereupon all their sessions are over and they are written to."""

from dataclasses import dataclass, field
from uuid import UUID

from dashtam.application.database import DatabaseProtocol
from dashtam.application.password_reset import PasswordResetService
from dashtam.application.rate_limit import RateLimits, TooManyAttempts
from dashtam.domain.events import UserPasswordChange
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.user import PasswordCheck, UserNotFound, UserRepository, WeakPassword, WrongPassword
from whereupon import EventBusProtocol


@dataclass(frozen=True, slots=True, kw_only=True)
class ChangePassword:
    user_id: UUID
    current_password: str = field(repr=False)
    new_password: str = field(repr=False)


class PasswordChange:
    """By the user, who knows the present password, or by an administrator."""

    def __init__(
        self,
        users: UserRepository,
        passwords: PasswordCheck,
        password_reset: PasswordResetService,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
        rate_limits: RateLimits,
    ) -> None:
        self._users = users
        self._passwords = passwords
        self._password_reset = password_reset
        self._event_bus = event_bus
        self._database = database
        self._rate_limits = rate_limits

    async def by_user(
        self, cmd: ChangePassword
    ) -> Result[None, UserNotFound | WrongPassword | WeakPassword | TooManyAttempts]:
        try:
            await self._rate_limits.count("password_change", email=str(cmd.user_id))
            async with self._event_bus.workflow(UserPasswordChange, user_id=cmd.user_id) as attempt:
                try:
                    async with self._database.get_session():
                        known = await self._users.find_by_id(cmd.user_id, for_update=False)
                    if known is None:
                        raise UserNotFound
                    if not await self._passwords.matches(cmd.current_password, known.password_hash):
                        raise WrongPassword
                    checked = known.password_hash
                    known.change_password(cmd.new_password)
                    await self._users.hash_password(known)  # before anything is locked
                    async with self._database.get_session() as session:
                        user = await self._users.find_by_id(cmd.user_id, for_update=True)
                        if user is None:
                            raise UserNotFound
                        if user.password_hash != checked:  # changed meanwhile
                            raise WrongPassword
                        user.password_hash = known.password_hash
                        await self._users.save(user)
                        await attempt.succeeded(user_id=user.id, initiated_by="user", session=session)
                except (UserNotFound, WrongPassword, WeakPassword) as error:
                    await attempt.failed(error.reason)
                    return Failure(error)
        except TooManyAttempts as error:
            return Failure(error)
        return Success(None)

    async def by_admin(self, user_id: UUID, new_password: str) -> Result[None, UserNotFound | WeakPassword]:
        """Whoever calls this has checked that they may."""
        # the service publishes Succeeded in its transaction, and that is the outcome of this attempt
        async with self._event_bus.workflow(UserPasswordChange, user_id=user_id) as attempt:
            result = await self._password_reset.reset_password(user_id, new_password)
            if isinstance(result, Failure):
                await attempt.failed(result.error.reason)
        return result
