"""Logging in and out, and what closes sessions: their users, and a new password."""

from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from dashtam.application.database import DatabaseProtocol
from dashtam.application.rate_limit import RateLimits, TooManyAttempts
from dashtam.domain.events import (
    AllSessionsRevocation,
    AllSessionsRevocationAttempted,
    AllSessionsRevocationSucceeded,
    PasswordResetConfirmSucceeded,
    SessionRevocation,
    UserLogin,
    UserLogout,
    UserPasswordChangeSucceeded,
)
from dashtam.domain.one_time_token import OneTimeTokens, Purpose
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.session import (
    InvalidCredentials,
    NotLoggedIn,
    OpenedSession,
    RefreshTokenReused,
    Session,
    SessionNotFound,
    SessionRepository,
)
from dashtam.domain.user import PasswordCheck, UserRepository, is_address
from whereupon import EventBusProtocol, current_metadata

USE_NOTED_AFTER: Final = timedelta(minutes=1)
"""So a session that is in use costs one write a minute, not one a request."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogIn:
    email: str
    password: str = field(repr=False)


LoginError = InvalidCredentials | TooManyAttempts


class Sessions:
    """Everything that opens and closes sessions on request."""

    def __init__(
        self,
        users: UserRepository,
        passwords: PasswordCheck,
        sessions: SessionRepository,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
        rate_limits: RateLimits,
    ) -> None:
        self._users = users
        self._passwords = passwords
        self._sessions = sessions
        self._event_bus = event_bus
        self._database = database
        self._rate_limits = rate_limits

    async def log_in(self, cmd: LogIn) -> Result[OpenedSession, LoginError]:
        try:
            await self._rate_limits.count("login", email=cmd.email)
        except TooManyAttempts as error:
            return Failure(error)
        if not is_address(cmd.email):  # a password, perhaps, typed into the wrong field: no event keeps it
            await self._passwords.matches(cmd.password, None)
            return Failure(InvalidCredentials())
        async with self._event_bus.workflow(UserLogin, email=cmd.email) as attempt:
            async with self._database.get_session():
                user = await self._users.find_by_email(cmd.email)
            # Outside any transaction, as it takes long; and of nobody's password as long as of somebody's.
            if not await self._passwords.matches(cmd.password, None if user is None else user.password_hash):
                await attempt.failed(InvalidCredentials.reason)
                return Failure(InvalidCredentials())
            assert user is not None
            if user.email_verified_at is None:
                await attempt.failed("email_not_verified")
                return Failure(InvalidCredentials())
            request = current_metadata()
            async with self._database.get_session() as session:
                now = await self._users.find_by_id(user.id, for_update=True)
                if now is None or now.password_hash != user.password_hash:  # changed since it was looked up
                    await attempt.failed(InvalidCredentials.reason, session=session)
                    return Failure(InvalidCredentials())
                opened = await self._sessions.open(
                    user.id, ip_address=request.ip_address, user_agent=request.user_agent
                )
                await attempt.succeeded(
                    user_id=user.id, email=user.email, session_id=opened.session.id, session=session
                )
        await self._rate_limits.forgive("login", email=cmd.email)
        return Success(opened)

    async def renew(self, refresh_token: str) -> Result[OpenedSession, NotLoggedIn | RefreshTokenReused]:
        """A plain write, so no event; but a token that comes twice closes its session."""
        try:
            async with self._database.get_session():
                return Success(await self._sessions.renew(refresh_token))
        except NotLoggedIn as error:
            return Failure(error)
        except RefreshTokenReused as error:
            # Whoever has it stole it, or was stolen from: neither keeps the session.
            await self.revoke(error.session_id, error.user_id, reason=error.reason)
            return Failure(error)

    async def authenticate(self, session_id: UUID) -> Session:
        """Raises `NotLoggedIn` from the moment on at which the session was closed."""
        async with self._database.get_session():
            session = await self._sessions.find_open(session_id)
        return await self._used(session)

    async def authenticate_secret(self, refresh_token: str) -> Session:
        """As `authenticate`, for whoever shows the refresh token itself, as browsers do; it stays what it is."""
        async with self._database.get_session():
            session = await self._sessions.find_by_token(refresh_token)
        return await self._used(session)

    async def is_open(self, session_id: UUID) -> bool:
        """Asking is no use of it."""
        async with self._database.get_session():
            return await self._sessions.find_open(session_id) is not None

    async def _used(self, session: Session | None) -> Session:
        if session is None:
            raise NotLoggedIn
        if datetime.now(UTC) - session.last_used_at > USE_NOTED_AFTER:
            async with self._database.get_session():
                await self._sessions.note_use(session.id)
        return session

    async def open_ones(self, user_id: UUID) -> list[Session]:
        async with self._database.get_session():
            return await self._sessions.of_user(user_id)

    async def log_out(self, session_id: UUID, user_id: UUID) -> Result[None, NotLoggedIn]:
        async with (
            self._event_bus.workflow(UserLogout, user_id=user_id) as attempt,
            self._database.get_session() as session,
        ):
            if not await self._sessions.close(session_id, user_id, "logout"):
                await attempt.failed(NotLoggedIn.reason, session=session)
                return Failure(NotLoggedIn())
            await attempt.succeeded(user_id=user_id, session_id=session_id, session=session)
        return Success(None)

    async def revoke(self, session_id: UUID, user_id: UUID, *, reason: str) -> Result[None, SessionNotFound]:
        async with (
            self._event_bus.workflow(
                SessionRevocation, session_id=session_id, user_id=user_id, reason=reason
            ) as attempt,
            self._database.get_session() as session,
        ):
            if not await self._sessions.close(session_id, user_id, reason):
                await attempt.failed(SessionNotFound.reason, session=session)
                return Failure(SessionNotFound())
            await attempt.succeeded(session_id=session_id, user_id=user_id, reason=reason, session=session)
        return Success(None)

    async def revoke_all(self, user_id: UUID, *, reason: str) -> int:
        """How many were open."""
        async with (
            self._event_bus.workflow(AllSessionsRevocation, user_id=user_id, reason=reason) as attempt,
            self._database.get_session() as session,
        ):
            count = await self._sessions.close_all(user_id, reason)
            await attempt.succeeded(user_id=user_id, reason=reason, session_count=count, session=session)
        return count


class SessionEventHandler:
    """Closes every session of a user who has a new password, and takes back every link for one, in its transaction.

    So there is no moment at which the new password holds and somebody is still logged in with the old one.
    """

    def __init__(
        self,
        sessions: SessionRepository,
        tokens: OneTimeTokens,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
    ) -> None:
        self._sessions = sessions
        self._tokens = tokens
        self._event_bus = event_bus
        self._database = database

    async def handle_user_password_change_succeeded(
        self, event: UserPasswordChangeSucceeded, session: AsyncSession
    ) -> None:
        await self._revoke_all(event.user_id, "password_changed", session)

    async def handle_password_reset_confirm_succeeded(
        self, event: PasswordResetConfirmSucceeded, session: AsyncSession
    ) -> None:
        await self._revoke_all(event.user_id, "password_reset", session)

    async def _revoke_all(self, user_id: UUID, reason: str, session: AsyncSession) -> None:
        with self._database.joined(session):
            count = await self._sessions.close_all(user_id, reason)
            # A link that somebody asked for before, who may be why the password was changed, works no more.
            await self._tokens.withdraw(user_id, Purpose.PASSWORD_RESET)
        if count:
            # Attempt and outcome commit together, with the new password: a crash leaves neither.
            await self._event_bus.publish(
                AllSessionsRevocationAttempted(user_id=user_id, reason=reason),
                AllSessionsRevocationSucceeded(user_id=user_id, reason=reason, session_count=count),
                session=session,
            )
