"""What can be asked about users over HTTP."""

from datetime import datetime
from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Query, Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from dashtam.application.registration import RegisterUser, RegisterUserHandler
from dashtam.application.users import UserQueries
from dashtam.domain.events import UserRegistration
from dashtam.domain.result import Failure
from dashtam.domain.user import LONGEST_EMAIL, LONGEST_PASSWORD
from dashtam.presentation.problems import describes, problem_of
from whereupon import EventBusProtocol

Limit = Annotated[int, Query(ge=1, le=1000, description="how many at most, the newest first")]


class Registration(BaseModel):
    model_config = ConfigDict(extra="forbid")

    email: str = Field(max_length=LONGEST_EMAIL, examples=["ada@example.com"])
    password: SecretStr = Field(max_length=LONGEST_PASSWORD, examples=["correct horse 7"])


class Registered(BaseModel):
    user_id: UUID


class FromAttributes(BaseModel):
    model_config = ConfigDict(from_attributes=True)


class UserShown(FromAttributes):
    id: UUID
    email: str
    registered_at: datetime


class SettingsShown(FromAttributes):
    currency: str
    language: str
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


def user_routes(event_bus: EventBusProtocol, register_user: RegisterUserHandler, queries: UserQueries) -> APIRouter:
    routes = APIRouter(prefix="/users", tags=["users"])

    @routes.post(
        "", status_code=201, response_model=Registered, responses=describes(400, 409, 413, 422), name="register"
    )
    async def register(body: Registration, response: Response) -> Any:
        command = RegisterUser(email=body.email, password=body.password.get_secret_value())
        # the handler publishes Succeeded in its transaction, and that is the outcome of this attempt
        async with event_bus.workflow(UserRegistration, email=body.email) as attempt:
            result = await register_user.handle(command)
            if isinstance(result, Failure):
                await attempt.failed(result.error.reason)
        if isinstance(result, Failure):
            return problem_of(result.error)
        response.headers["Location"] = f"/users/{result.value}"
        return Registered(user_id=result.value)

    @routes.get("/{user_id}", response_model=UserShown, responses=describes(404, 422))
    async def show_user(user_id: UUID) -> Any:
        return await queries.user(user_id)

    @routes.get("/{user_id}/settings", response_model=SettingsShown, responses=describes(404, 422))
    async def show_settings(user_id: UUID) -> Any:
        return await queries.settings(user_id)

    @routes.get("/{user_id}/audit", response_model=list[AuditRecordShown], responses=describes(404, 422))
    async def show_audit(user_id: UUID, limit: Limit = 100) -> Any:
        return await queries.audit(user_id, limit=limit)

    @routes.get("/{user_id}/notifications", response_model=list[NotificationShown], responses=describes(404, 422))
    async def show_notifications(user_id: UUID, limit: Limit = 100) -> Any:
        return await queries.notifications(user_id, limit=limit)

    return routes
