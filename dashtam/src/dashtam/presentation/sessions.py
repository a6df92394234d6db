"""Logging in and out over HTTP."""

from datetime import datetime
from typing import Any
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from dashtam.application.sessions import LogIn, Sessions
from dashtam.domain.result import Failure
from dashtam.domain.session import AccessTokens, OpenedSession
from dashtam.domain.user import LONGEST_EMAIL, LONGEST_PASSWORD
from dashtam.presentation.authentication import SignedIn, SignedInDependency
from dashtam.presentation.problems import describes, problem_of


class Credentials(BaseModel):
    model_config = ConfigDict(extra="forbid")

    email: str = Field(max_length=LONGEST_EMAIL, examples=["ada@example.com"])
    password: SecretStr = Field(max_length=LONGEST_PASSWORD, examples=["correct horse 7"])


class Renewal(BaseModel):
    model_config = ConfigDict(extra="forbid")

    refresh_token: SecretStr = Field(max_length=200)


class Tokens(BaseModel):
    session_id: UUID
    access_token: str
    token_type: str = "Bearer"
    expires_in: int
    """Seconds until the access token expires."""
    refresh_token: str
    """For another access token; it works once, and the answer holds the next one."""


class SessionShown(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: UUID
    opened_at: datetime
    last_used_at: datetime
    expires_at: datetime
    ip_address: str | None
    user_agent: str | None
    current: bool = False


class Revoked(BaseModel):
    session_count: int


def session_routes(sessions: Sessions, access_tokens: AccessTokens, signed_in: SignedInDependency) -> APIRouter:
    routes = APIRouter(prefix="/sessions", tags=["sessions"])

    def tokens(opened: OpenedSession, response: Response) -> Tokens:
        response.headers["Cache-Control"] = "no-store"
        return Tokens(
            session_id=opened.session.id,
            access_token=access_tokens.issue(opened.session),
            expires_in=int(access_tokens.lifetime.total_seconds()),
            refresh_token=opened.refresh_token,
        )

    @routes.post("", status_code=201, response_model=Tokens, responses=describes(400, 401, 413, 422, 429))
    async def log_in(body: Credentials, response: Response) -> Any:
        command = LogIn(email=body.email, password=body.password.get_secret_value())
        result = await sessions.log_in(command)
        return problem_of(result.error) if isinstance(result, Failure) else tokens(result.value, response)

    @routes.post("/renewal", response_model=Tokens, responses=describes(400, 401, 413, 422))
    async def renew(body: Renewal, response: Response) -> Any:
        result = await sessions.renew(body.refresh_token.get_secret_value())
        return problem_of(result.error) if isinstance(result, Failure) else tokens(result.value, response)

    @routes.get("", response_model=list[SessionShown], responses=describes(401))
    async def list_sessions(who: SignedIn = Depends(signed_in)) -> Any:
        """Those that are open, the one used last first."""
        return [
            SessionShown.model_validate(session).model_copy(update={"current": session.id == who.session_id})
            for session in await sessions.open_ones(who.user_id)
        ]

    @routes.delete("/current", status_code=204, response_model=None, responses=describes(401))
    async def log_out(who: SignedIn = Depends(signed_in)) -> Any:
        result = await sessions.log_out(who.session_id, who.user_id)
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=204)

    @routes.delete("/{session_id}", status_code=204, response_model=None, responses=describes(401, 404, 422))
    async def revoke(session_id: UUID, who: SignedIn = Depends(signed_in)) -> Any:
        """Log out another device."""
        result = await sessions.revoke(session_id, who.user_id, reason="by_user")
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=204)

    @routes.delete("", response_model=Revoked, responses=describes(401))
    async def revoke_all(who: SignedIn = Depends(signed_in)) -> Any:
        """Log out every device, this one too."""
        return Revoked(session_count=await sessions.revoke_all(who.user_id, reason="by_user"))

    return routes
