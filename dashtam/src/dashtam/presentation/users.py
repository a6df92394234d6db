"""What can be asked about users over HTTP."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from dashtam.application.users import ChangeSettings, UserQueries
from dashtam.domain.result import Failure
from dashtam.domain.user import LONGEST_EMAIL, LONGEST_PASSWORD
from dashtam.presentation.authentication import SignedIn, SignedInDependency, require_admin
from dashtam.presentation.problems import describes, problem_of
from dashtam.presentation.sign_up import SignUp

Limit = Annotated[int, Query(ge=1, le=1000, description="how many at most, the newest first")]


class Registration(BaseModel):
    model_config = ConfigDict(extra="forbid")

    email: str = Field(max_length=LONGEST_EMAIL, examples=["ada@example.com"])
    password: SecretStr = Field(max_length=LONGEST_PASSWORD, examples=["correct horse 7"])


class Registered(BaseModel):
    detail: str = "The rest is in your mailbox."


class FromAttributes(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class UserShown(FromAttributes):
    id: UUID
    email: str
    registered_at: datetime
    email_verified_at: datetime | None
    is_admin: bool


class SettingsShown(FromAttributes):
    currency: str
    language: str
    notifications: bool


class SettingsChanged(BaseModel):
    model_config = ConfigDict(extra="forbid")

    currency: str = Field(pattern="^[A-Z]{3}$", examples=["EUR"])
    language: str = Field(pattern="^[a-z]{2,3}(-[A-Za-z0-9]{2,8})*$", max_length=35, examples=["en"])
    notifications: bool


class AuditRecordShown(FromAttributes):
    event_id: UUID
    action: str
    category: str | None
    outcome: str
    resource_type: str | None
    resource_id: str | None
    context: dict[str, Any]
    ip_address: str | None
    user_agent: str | None
    correlation_id: UUID | None
    occurred_at: datetime


class NotificationShown(FromAttributes):
    kind: str
    message: str
    created_at: datetime


def user_routes(sign_up: SignUp, queries: UserQueries, signed_in: SignedInDependency) -> APIRouter:
    routes = APIRouter(prefix="/users", tags=["users"])

    @routes.post(
        "", status_code=202, response_model=Registered, responses=describes(400, 413, 422, 429), name="register"
    )
    async def register(body: Registration) -> Any:
        """The answer is the same whether somebody has this address already or not."""
        result = await sign_up.attempt(body.email, body.password.get_secret_value())
        return problem_of(result.error) if isinstance(result, Failure) else Registered()

    @routes.get("/me", response_model=UserShown, responses=describes(401, 404))
    async def show_me(who: SignedIn = Depends(signed_in)) -> Any:
        return await queries.user(who.user_id)

    @routes.get("/me/settings", response_model=SettingsShown, responses=describes(401, 404))
    async def show_settings(who: SignedIn = Depends(signed_in)) -> Any:
        return await queries.settings(who.user_id)

    @routes.put("/me/settings", response_model=SettingsShown, responses=describes(400, 401, 404, 413, 422))
    async def change_settings(body: SettingsChanged, who: SignedIn = Depends(signed_in)) -> Any:
        """Nothing follows from it, so no event tells of it."""
        return await queries.change_settings(ChangeSettings(user_id=who.user_id, **body.model_dump()))

    @routes.get("/me/audit", response_model=list[AuditRecordShown], responses=describes(401, 404, 422))
    async def show_audit(who: SignedIn = Depends(signed_in), limit: Limit = 100) -> Any:
        return await queries.audit(who.user_id, limit=limit)

    @routes.get("/me/notifications", response_model=list[NotificationShown], responses=describes(401, 404, 422))
    async def show_notifications(who: SignedIn = Depends(signed_in), limit: Limit = 100) -> Any:
        return await queries.notifications(who.user_id, limit=limit)

    @routes.get("", response_model=list[UserShown], responses=describes(401, 403, 422))
    async def list_users(who: SignedIn = Depends(signed_in), limit: Limit = 100) -> Any:
        """As an administrator: those who registered last."""
        require_admin(who)
        return await queries.newest_users(limit=limit)

    @routes.get("/{user_id}", response_model=UserShown, responses=describes(401, 403, 404, 422))
    async def show_user(user_id: UUID, who: SignedIn = Depends(signed_in)) -> Any:
        """Oneself, or as an administrator anybody."""
        _require_oneself_or_admin(who, user_id)
        return await queries.user(user_id)

    @routes.get("/{user_id}/audit", response_model=list[AuditRecordShown], responses=describes(401, 403, 404, 422))
    async def show_audit_of(user_id: UUID, who: SignedIn = Depends(signed_in), limit: Limit = 100) -> Any:
        """Of oneself, or as an administrator of anybody."""
        _require_oneself_or_admin(who, user_id)
        return await queries.audit(user_id, limit=limit)

    return routes


def _require_oneself_or_admin(who: SignedIn, user_id: UUID) -> None:
    if who.user_id != user_id:
        require_admin(who)
