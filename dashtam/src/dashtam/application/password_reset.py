"""A password is set anew: by an administrator, or by a user who forgot it and has a link from a mail."""

from dataclasses import dataclass, field
from uuid import UUID

from dashtam.application.database import DatabaseProtocol
from dashtam.application.rate_limit import RateLimits, TooManyAttempts
from dashtam.domain.events import PasswordResetConfirm, PasswordResetRequest, UserPasswordChangeSucceeded
from dashtam.domain.one_time_token import OneTimeTokens, Purpose, TokenError, TokenExpired, TokenInvalid, TokenUsed
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.user import UserNotFound, UserRepository, WeakPassword, is_address
from whereupon import EventBusProtocol


class PasswordResetService:
    def __init__(self, user_repo: UserRepository, event_bus: EventBusProtocol, database: DatabaseProtocol) -> None:
        self._users = user_repo
        self._event_bus = event_bus
        self._database = database

    async def reset_password(self, user_id: UUID, new_password: str) -> Result[None, UserNotFound | WeakPassword]:
        """As an administrator does it: whoever calls this has checked that they may."""
        async with self._database.get_session():
            known = await self._users.find_by_id(user_id, for_update=False)
        if known is None:
            return Failure(UserNotFound())
        try:
            known.change_password(new_password)
        except WeakPassword as error:
            return Failure(error)
        await self._users.hash_password(known)  # before anything is locked
        async with self._database.get_session() as session:
            user = await self._users.find_by_id(user_id, for_update=True)
            if user is None:
                return Failure(UserNotFound())
            user.password_hash = known.password_hash
            await self._users.save(user)
            await self._event_bus.publish(
                UserPasswordChangeSucceeded(user_id=user.id, initiated_by="admin"), session=session
            )
            return Success(None)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConfirmPasswordReset:
    token: str = field(repr=False)
    new_password: str = field(repr=False)


class ForgottenPassword:
    def __init__(
        self,
        users: UserRepository,
        tokens: OneTimeTokens,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
        rate_limits: RateLimits,
    ) -> None:
        self._users = users
        self._tokens = tokens
        self._event_bus = event_bus
        self._database = database
        self._rate_limits = rate_limits

    async def request(self, email: str) -> Result[None, TooManyAttempts]:
        """A success, whether somebody has this address or not: only its mailbox learns which."""
        try:
            await self._rate_limits.count("password_reset", email=email)
        except TooManyAttempts as error:
            return Failure(error)
        if not is_address(email):
            return Success(None)
        async with (
            self._event_bus.workflow(PasswordResetRequest, email=email) as attempt,
            self._database.get_session() as session,
        ):
            user = await self._users.find_by_email(email, for_update=True)
            if user is None:
                await attempt.failed(UserNotFound.reason, session=session)
            else:
                await attempt.succeeded(user_id=user.id, email=user.email, session=session)
        return Success(None)

    async def confirm(self, cmd: ConfirmPasswordReset) -> Result[None, TokenError | WeakPassword | TooManyAttempts]:
        token_id = self._tokens.id_of(cmd.token)
        if token_id is None:  # not even one of ours: nobody attempted anything
            return Failure(TokenInvalid())
        try:
            await self._rate_limits.count("password_reset_confirm")
        except TooManyAttempts as limited:
            return Failure(limited)
        async with self._event_bus.workflow(PasswordResetConfirm, token_id=token_id) as attempt:
            try:
                async with self._database.get_session():
                    user_id = await self._tokens.owner(cmd.token, Purpose.PASSWORD_RESET)
                    known = await self._users.find_by_id(user_id, for_update=False)
                if known is None:
                    raise TokenInvalid
                known.change_password(cmd.new_password)
                await self._users.hash_password(known)  # before anything is locked
                async with self._database.get_session() as session:
                    # The user first, everywhere: who locks a token first may wait for who locked the user first.
                    user = await self._users.find_by_id(user_id, for_update=True)
                    if user is None:
                        raise TokenInvalid
                    await self._tokens.redeem(cmd.token, Purpose.PASSWORD_RESET)
                    user.password_hash = known.password_hash
                    user.verify_email()  # who has the link has the mailbox
                    await self._users.save(user)
                    await attempt.succeeded(user_id=user.id, email=user.email, session=session)
            except (TokenInvalid, TokenExpired, TokenUsed, WeakPassword) as error:
                await attempt.failed(error.reason)
                return Failure(error)
        return Success(None)
