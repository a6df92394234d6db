"""Connecting banks over HTTP."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr, model_validator

from dashtam.application.connections import (
    CompleteConnection,
    CompleteConnectionHandler,
    ConnectionQueries,
    Disconnect,
    DisconnectHandler,
    StartConnection,
    StartConnectionHandler,
)
from dashtam.application.sync import RequestSync, RequestSyncHandler
from dashtam.domain.result import Failure
from dashtam.presentation.authentication import SignedIn, SignedInDependency
from dashtam.presentation.problems import describes, problem_of

Secret = Annotated[SecretStr, Field(min_length=1, max_length=4096)]


class ProviderShown(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: UUID
    name: str
    display_name: str


class ConnectionWanted(BaseModel):
    model_config = ConfigDict(extra="forbid")

    provider_name: str = Field(max_length=50, examples=["sandbox"])


class ConnectionStarted(BaseModel):
    authorization_url: str
    """Where the user says yes; the bank sends them back with a state, and a code or an error."""


class Callback(BaseModel):
    """What the bank sent the user back with."""

    model_config = ConfigDict(extra="forbid")

    state: Secret
    code: Secret | None = None
    error: Annotated[str, Field(min_length=1, max_length=200)] | None = None

    @model_validator(mode="after")
    def _one_of_them(self) -> "Callback":
        if (self.code is None) == (self.error is None):
            raise ValueError("a bank sends either a code or an error")
        return self


class ConnectionShown(BaseModel):
    model_config = ConfigDict(from_attributes=True)

    id: UUID
    provider_id: UUID
    provider_name: str
    status: Literal["active", "reauthorization_required", "disconnected"]
    connected_at: datetime
    synced_at: datetime | None


def connection_routes(
    start_connection: StartConnectionHandler,
    complete_connection: CompleteConnectionHandler,
    disconnect: DisconnectHandler,
    request_sync: RequestSyncHandler,
    queries: ConnectionQueries,
    signed_in: SignedInDependency,
) -> APIRouter:
    routes = APIRouter(tags=["connections"])

    @routes.get("/providers", response_model=list[ProviderShown])
    async def show_providers() -> Any:
        return queries.providers()

    @routes.post("/connections", status_code=201, response_model=ConnectionStarted, responses=describes(401, 422))
    async def start(body: ConnectionWanted, user: SignedIn = Depends(signed_in)) -> Any:
        command = StartConnection(user_id=user.user_id, provider_name=body.provider_name)
        result = await start_connection.handle(command)
        if isinstance(result, Failure):
            return problem_of(result.error)
        return ConnectionStarted(authorization_url=result.value)

    @routes.post(
        "/connections/callback",
        status_code=201,
        response_model=ConnectionShown,
        responses=describes(401, 403, 409, 422, 502, 503),
    )
    async def complete(body: Callback, user: SignedIn = Depends(signed_in)) -> Any:
        command = CompleteConnection(
            user_id=user.user_id,
            state=body.state.get_secret_value(),
            code=None if body.code is None else body.code.get_secret_value(),
            error=body.error,
        )
        result = await complete_connection.handle(command)
        return problem_of(result.error) if isinstance(result, Failure) else result.value

    @routes.get("/connections", response_model=list[ConnectionShown], responses=describes(401))
    async def show_connections(user: SignedIn = Depends(signed_in)) -> Any:
        return await queries.of_user(user.user_id)

    @routes.delete("/connections/{connection_id}", status_code=204, responses=describes(401, 404, 409, 422))
    async def end(connection_id: UUID, user: SignedIn = Depends(signed_in)) -> Response:
        result = await disconnect.handle(Disconnect(user_id=user.user_id, connection_id=connection_id))
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=204)

    @routes.post("/connections/{connection_id}/sync", status_code=202, responses=describes(401, 404, 409, 422))
    async def sync(connection_id: UUID, user: SignedIn = Depends(signed_in)) -> Response:
        result = await request_sync.handle(RequestSync(user_id=user.user_id, connection_id=connection_id))
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=202)

    return routes
