"""Answers that say no."""

import json
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from pydantic import ValidationError
from starlette.exceptions import HTTPException
from starlette.responses import Response


class Refused(Exception):
    """The bank will not do that. `description` says why, and the way out."""

    def __init__(self, status: int, error: str, description: str, *, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(description)
        self.status = status
        self.error = error
        self.description = description
        self.headers = dict(headers or {})


def answer(content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Response:
    """JSON of ASCII only: what was sent to us, and comes back in an error, may be no text that UTF-8 can carry."""
    body = json.dumps(content, separators=(",", ":"))
    return Response(body, status, {"cache-control": "no-store"} | dict(headers or {}), "application/json")


def refusal(refused: Refused) -> Response:
    content = {"error": refused.error, "error_description": refused.description}
    return answer(content, refused.status, refused.headers)


def what_is_wrong(error: RequestValidationError | ValidationError) -> str:
    """Each fault with its place. What was sent is not sent back: it may be a secret."""
    faults = []
    for fault in error.errors():
        place = ".".join(str(part) for part in fault["loc"] if part not in ("body", "query", "path"))
        faults.append(f"{place}: {fault['msg']}" if place else str(fault["msg"]))
    return "; ".join(faults[:10])


def answer_refusals(app: FastAPI) -> None:
    async def refused(_request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return refusal(error)

    async def invalid(_request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        return refusal(Refused(422, "invalid_request", what_is_wrong(error)))

    async def http(_request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        return refusal(Refused(error.status_code, "http_error", str(error.detail), headers=error.headers))

    app.add_exception_handler(Refused, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(HTTPException, http)
