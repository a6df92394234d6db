"""Errors as problem details (RFC 9457)."""

from collections.abc import Awaitable, Callable
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dashtam.application.logger import LoggerProtocol
from dashtam.application.rate_limit import TooManyAttempts
from dashtam.domain.result import Error

_STATUS = {  # others: 422
    "access_denied": 403,
    "account_not_found": 404,
    "connection_not_found": 404,
    "email_taken": 409,
    "forbidden": 403,
    "invalid_credentials": 401,
    "not_connected": 409,
    "not_logged_in": 401,
    "provider_invalid_data": 502,
    "provider_refused": 502,
    "provider_unavailable": 503,
    "reauthorization_required": 409,
    "refresh_token_reused": 401,
    "session_not_found": 404,
    "settings_pending": 404,
    "state_reused": 409,
    "too_many_attempts": 429,
    "user_not_found": 404,
    "wrong_password": 403,
}


class InvalidField(BaseModel):
    pointer: str
    """A JSON pointer to what is wrong in the body, or the parameter's name."""
    detail: str


class Problem(BaseModel):
    """Problem details, RFC 9457; `reason` and `invalid` are ours."""

    type: str = "about:blank"
    title: str
    status: int
    detail: str
    reason: str | None = None
    """One machine-readable word."""
    invalid: list[InvalidField] | None = None


class ProblemResponse(JSONResponse):
    media_type = "application/problem+json"


def problem(
    status: int,
    detail: str,
    *,
    reason: str | None = None,
    invalid: list[InvalidField] | None = None,
    headers: dict[str, str] | None = None,
) -> ProblemResponse:
    content = Problem(title=HTTPStatus(status).phrase, status=status, detail=detail, reason=reason, invalid=invalid)
    return ProblemResponse(content.model_dump(exclude_none=True), status_code=status, headers=headers)


def status_of(error: Error) -> int:
    return _STATUS.get(error.reason, 422)


def headers_of(error: Error) -> dict[str, str]:
    headers = {}
    if status_of(error) == 401:
        headers["WWW-Authenticate"] = "Bearer"  # RFC 9110, 11.6.1: a 401 says how to authenticate
    if isinstance(error, TooManyAttempts):
        headers["Retry-After"] = str(error.retry_after)
    return headers


def problem_of(error: Error) -> ProblemResponse:
    return problem(status_of(error), str(error), reason=error.reason, headers=headers_of(error))


def describes(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For `responses=`: these statuses come with problem details."""
    schema = {"schema": {"$ref": "#/components/schemas/Problem"}}
    return {
        status: {
            "model": Problem,
            "description": HTTPStatus(status).phrase,
            "content": {"application/problem+json": schema},
        }
        for status in statuses
    }


def answer_with_problems(
    api: FastAPI, logger: LoggerProtocol, missing_page: Callable[[Request], Awaitable[Response]]
) -> None:
    """Every error that leaves `api` is a problem; one of ours is logged and tells nothing of itself.

    `missing_page`: what a browser is shown for an address that is neither a page nor of the API.
    """

    async def expected(_request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, Error)
        return problem_of(error)

    async def http(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        is_nowhere = error.status_code == 404 and "endpoint" not in request.scope
        if is_nowhere and "text/html" in request.headers.get("accept", ""):
            return await missing_page(request)
        return problem(error.status_code, str(error.detail), headers=dict(error.headers or {}))

    async def invalid(_request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, RequestValidationError)
        # What was sent is not sent back: it may be a password.
        found = [InvalidField(pointer=_pointer(e["loc"]), detail=str(e["msg"])) for e in error.errors()]
        if any(e["type"] == "json_invalid" for e in error.errors()):
            return problem(400, "The body is not JSON.", reason="malformed_json")
        return problem(422, "Something in the request is not as it must be.", reason="invalid", invalid=found)

    async def unexpected(request: Request, error: Exception) -> ProblemResponse:
        logger.error("request_failed", method=request.method, path=request.url.path, exc_info=error)
        return problem(500, "That is our fault. It was logged.", reason="internal_error")

    api.add_exception_handler(Error, expected)
    api.add_exception_handler(HTTPException, http)
    api.add_exception_handler(RequestValidationError, invalid)
    api.add_exception_handler(Exception, unexpected)


def _pointer(location: tuple[int | str, ...]) -> str:
    where, *path = location
    if where != "body":
        return str(path[0]) if path else str(where)
    return "".join("/" + str(part).replace("~", "~0").replace("/", "~1") for part in path)
