"""Who is asking: the session that an access token names, looked up at every request."""

from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated
from uuid import UUID

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from dashtam.domain.result import Error
from dashtam.domain.session import NotLoggedIn, Session
from whereupon import acting_as

AUTHENTICATED = (401,)
"""The statuses that every route of somebody who is logged in may answer with."""


class Forbidden(Error):
    """It is not theirs to do."""

    reason = "forbidden"

    def __init__(self) -> None:
        super().__init__("Only an administrator may do this.")


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedIn:
    user_id: UUID
    session_id: UUID
    is_admin: bool


SignedInDependency = Callable[..., Awaitable[SignedIn]]

_bearer = HTTPBearer(auto_error=False, description="the access token that `POST /sessions` answers with")


def signed_in_by(
    session_of: Callable[[str], UUID], authenticate: Callable[[UUID], Awaitable[Session]]
) -> SignedInDependency:
    """A dependency that gives who is asking, or answers 401; events of the request carry them as actor."""

    async def signed_in(
        _request: Request, credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(_bearer)]
    ) -> SignedIn:
        if credentials is None:
            raise NotLoggedIn
        session = await authenticate(session_of(credentials.credentials))
        acting_as(session.user_id)
        return SignedIn(user_id=session.user_id, session_id=session.id, is_admin=session.is_admin)

    return signed_in


def require_admin(who: SignedIn) -> None:
    """Raises `Forbidden`."""
    if not who.is_admin:
        raise Forbidden
