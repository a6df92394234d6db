"""Errors as problem details (RFC 9457)."""

from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from dashtam.application.logger import LoggerProtocol
from dashtam.domain.result import Error

_STATUS = {"email_taken": 409, "settings_pending": 404, "user_not_found": 404}  # others: 422


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


def problem_of(error: Error) -> ProblemResponse:
    return problem(_STATUS.get(error.reason, 422), str(error), reason=error.reason)


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


def answer_with_problems(api: FastAPI, logger: LoggerProtocol) -> None:
    """Every error that leaves `api` is a problem; one of ours is logged and tells nothing of itself."""

    async def expected(_request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, Error)
        return problem_of(error)

    async def http(_request: Request, error: Exception) -> ProblemResponse:
        assert isinstance(error, HTTPException)
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
