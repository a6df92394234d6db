"""A session: somebody is logged in, on some device, until it is closed."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Protocol
from uuid import UUID

from dashtam.domain.result import Error


class InvalidCredentials(Error):
    """One answer for a wrong password, an address that nobody has, and one that was not confirmed.

    Another one for the last would tell whoever has just registered an address whether it was free.
    """

    reason = "invalid_credentials"

    def __init__(self) -> None:
        super().__init__("The address or the password is wrong, or the address is not confirmed yet.")


class NotLoggedIn(Error):
    """There is no such session, or it is over."""

    reason = "not_logged_in"

    def __init__(self) -> None:
        super().__init__("You are not logged in, or your session is over: log in.")


class SessionNotFound(Error):
    """This user has no open session of this id."""

    reason = "session_not_found"

    def __init__(self) -> None:
        super().__init__("You have no such session, or it is closed already.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    id: UUID
    user_id: UUID
    opened_at: datetime
    last_used_at: datetime
    expires_at: datetime
    ip_address: str | None
    user_agent: str | None
    is_admin: bool = False
    """Whether its user is an administrator."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenedSession:
    """What its user is told once, and nobody can find out later."""

    session: Session
    refresh_token: str = field(repr=False)


class AccessTokens(Protocol):
    """Tokens that name a session for a short while. They say nothing of its being open: that is looked up."""

    @property
    def lifetime(self) -> timedelta: ...

    def issue(self, session: Session) -> str: ...

    def session_of(self, token: str) -> UUID:
        """Raises `NotLoggedIn` for a token that is not ours or has expired."""
        ...


class SessionRepository(Protocol):
    """Sessions as they are stored; each call joins the database session of its caller."""

    async def open(self, user_id: UUID, *, ip_address: str | None, user_agent: str | None) -> OpenedSession: ...

    async def renew(self, refresh_token: str) -> OpenedSession:
        """The session with a new token instead of this one.

        Raises `NotLoggedIn`, and `RefreshTokenReused` for a token that was renewed before.
        """
        ...

    async def find_open(self, session_id: UUID) -> Session | None:
        """None if it is closed or expired."""
        ...

    async def find_by_token(self, refresh_token: str) -> Session | None:
        """None if it is closed or expired, or the token is not the session's present one."""
        ...

    async def of_user(self, user_id: UUID) -> list[Session]:
        """Those that are open, the one used last first."""
        ...

    async def close(self, session_id: UUID, user_id: UUID, reason: str) -> bool:
        """False if this user has no open session of this id."""
        ...

    async def close_all(self, user_id: UUID, reason: str) -> int:
        """How many were open."""
        ...

    async def note_use(self, session_id: UUID) -> None:
        """That it was used now."""
        ...


class RefreshTokenReused(Error):
    """A refresh token came a second time: one of the two who have it stole it."""

    reason = "refresh_token_reused"

    def __init__(self, session_id: UUID, user_id: UUID) -> None:
        super().__init__("This refresh token was used before, so its session is closed: log in.")
        self.session_id = session_id
        self.user_id = user_id
