"""The API: its routes, and what every request goes through."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

from fastapi import FastAPI
from pydantic import BaseModel

from dashtam.application.logger import LoggerProtocol
from dashtam.application.registration import RegisterUserHandler
from dashtam.application.users import UserQueries
from dashtam.presentation.body_limit import BodyLimit
from dashtam.presentation.problems import answer_with_problems, describes, problem
from dashtam.presentation.users import user_routes
from whereupon import EventBusProtocol
from whereupon.asgi import RequestContextMiddleware

LARGEST_BODY = 64 * 1024  # bytes


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def create_api(
    *,
    event_bus: EventBusProtocol,
    register_user: RegisterUserHandler,
    queries: UserQueries,
    check_database: Callable[[], Awaitable[None]],
    logger: LoggerProtocol,
    trusted_proxies: Sequence[str],
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
) -> FastAPI:
    """`check_database` raises where the database does not answer."""
    api = FastAPI(
        title="Dashtam", summary="All your accounts, at whichever bank they are, in one place.", lifespan=lifespan
    )
    api.include_router(user_routes(event_bus, register_user, queries))

    @api.get("/health", response_model=Health, responses=describes(503), tags=["health"])
    async def health() -> Any:
        try:
            await check_database()
        except Exception as error:  # whichever the driver has for it
            logger.error("database_unavailable", error_type=type(error).__name__, error_message=str(error))
            return problem(503, "The database does not answer.", reason="database_unavailable")
        return Health()

    answer_with_problems(api, logger)
    api.add_middleware(BodyLimit, limit=LARGEST_BODY)
    api.add_middleware(RequestContextMiddleware, trusted_proxies=tuple(trusted_proxies))
    return api
