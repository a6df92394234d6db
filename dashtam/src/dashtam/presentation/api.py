"""The API: its routes, and what every request goes through."""

from collections.abc import Awaitable, Callable, Sequence
from contextlib import AbstractAsyncContextManager
from typing import Any, Literal

from fastapi import APIRouter, FastAPI
from pydantic import BaseModel
from starlette.types import ASGIApp

from dashtam.application.email_verification import VerifyEmail
from dashtam.application.logger import LoggerProtocol
from dashtam.application.password_change import PasswordChange
from dashtam.application.password_reset import ForgottenPassword
from dashtam.application.sessions import Sessions
from dashtam.application.users import UserQueries
from dashtam.domain.session import AccessTokens
from dashtam.presentation.authentication import SignedInDependency
from dashtam.presentation.body_limit import BodyLimit
from dashtam.presentation.pace import Pace
from dashtam.presentation.passwords import password_routes
from dashtam.presentation.problems import answer_with_problems, describes, problem
from dashtam.presentation.sessions import session_routes
from dashtam.presentation.sign_up import SignUp
from dashtam.presentation.users import user_routes
from dashtam.presentation.web.site import Site

LARGEST_BODY = 64 * 1024  # bytes


class Health(BaseModel):
    status: Literal["ok"] = "ok"


def create_api(
    *,
    sign_up: SignUp,
    verify_email: VerifyEmail,
    sessions: Sessions,
    access_tokens: AccessTokens,
    password_change: PasswordChange,
    forgotten_password: ForgottenPassword,
    queries: UserQueries,
    pace: Pace,
    signed_in: SignedInDependency,
    routers: Sequence[APIRouter],
    site: Site,
    dashboard: ASGIApp,
    check_database: Callable[[], Awaitable[None]],
    logger: LoggerProtocol,
    lifespan: Callable[[FastAPI], AbstractAsyncContextManager[None]],
) -> FastAPI:
    """`dashboard` is that of events, for administrators. `check_database` raises where the database does not answer."""
    api = FastAPI(
        title="Dashtam", summary="All your accounts, at whichever bank they are, in one place.", lifespan=lifespan
    )
    # Before the users: /users/me/password is not the password of a user whose id is "me".
    api.include_router(password_routes(verify_email, password_change, forgotten_password, signed_in, pace))
    api.include_router(user_routes(sign_up, queries, signed_in))
    api.include_router(session_routes(sessions, access_tokens, signed_in))
    for router in routers:
        api.include_router(router)
    for router in site.routers(
        sign_up=sign_up,
        verify_email=verify_email,
        sessions=sessions,
        password_change=password_change,
        forgotten_password=forgotten_password,
        users=queries,
        pace=pace,
    ):
        api.include_router(router)

    api.mount("/admin/events", dashboard)

    @api.get("/health", response_model=Health, responses=describes(503), tags=["health"])
    async def health() -> Any:
        try:
            await check_database()
        except Exception as error:  # whichever the driver has for it
            logger.error("database_unavailable", error_type=type(error).__name__, error_message=str(error))
            return problem(503, "The database does not answer.", reason="database_unavailable")
        return Health()

    answer_with_problems(api, logger, missing_page=site.missing)
    api.add_middleware(BodyLimit, limit=LARGEST_BODY)
    return api
