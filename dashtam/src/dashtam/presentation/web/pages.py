"""How pages are shown, whatever is on them: templates, headers, and what an error looks like."""

import hashlib
from collections.abc import Callable, Coroutine, Mapping, Sequence
from datetime import UTC, datetime
from decimal import Decimal
from http import HTTPStatus
from importlib.resources import files
from typing import Any, Final

import jinja2
from fastapi import APIRouter
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import HTMLResponse, RedirectResponse, Response

from dashtam.application.logger import LoggerProtocol
from dashtam.domain.result import Error
from dashtam.domain.session import NotLoggedIn
from dashtam.presentation.problems import headers_of, status_of
from dashtam.presentation.web.browser_session import FORM_TOKEN, BrowserSessions, FormRefused, Visit

FOREVER: Final = "public, max-age=31536000, immutable"
"""For files whose address changes with their content."""
_MEDIA_TYPES: Final = {"css": "text/css", "js": "text/javascript"}

DONE: Final[Mapping[str, str]] = {
    "registered": "The rest is in your mailbox: follow the link in the mail, and then log in.",
    "verified": "Your address is confirmed. You can log in now.",
    "asked": "If somebody has this address, they get a mail with a link.",
    "reset": "You have a new password. Every session is over: log in with it.",
    "logged_out": "You are logged out.",
    "changed": "Your password was changed, and every session is over: log in with the new one.",
    "revoked": "That device is logged out.",
    "all_revoked": "Every device is logged out, this one too.",
    "settings": "Your settings are saved.",
    "connected": "Your bank is connected. Accounts and transactions are being fetched, and appear here.",
    "syncing": "Your bank is being asked for what is new. It appears here.",
    "disconnected": "The bank is disconnected, and its accounts are closed here.",
    "password_set": "The user has a new password, and every session of theirs is over.",
}
"""What a page says about the form that led to it: words of ours only, whatever is in the address."""


class Pages:
    def __init__(self, browsers: BrowserSessions, bank_origins: Sequence[str], logger: LoggerProtocol) -> None:
        """`bank_origins`: where the form that connects a bank leads, as scheme://host:port."""
        self.browsers = browsers
        self._banks = " ".join(dict.fromkeys(bank_origins))
        self._logger = logger
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("dashtam.presentation.web"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        folder = files("dashtam.presentation.web").joinpath("static")
        self._static = {
            each.name: each.read_bytes() for each in folder.iterdir() if each.name.rpartition(".")[2] in _MEDIA_TYPES
        }
        self._templates.filters |= {"amount": _amount, "moment": _moment, "words": _words}
        self._templates.globals |= {"static": self._static_address, "form_token_name": FORM_TOKEN}

    def routes(self) -> APIRouter:
        """For routes whose every answer is a page, errors too, and that no API document mentions."""
        return APIRouter(include_in_schema=False, route_class=self._route_class())

    def show(
        self,
        visit: Visit,
        template: str,
        status: int = 200,
        *,
        headers: Mapping[str, str] | None = None,
        leads_to_banks: bool = False,
        **values: Any,
    ) -> Response:
        """`leads_to_banks`: a form of the page is answered with a redirect to one."""
        text = self._templates.get_template(template).render(
            {"problem": None, "invalid": ()}
            | values
            | {
                "me": visit.session,
                "form_token": visit.form_token,
                "path": visit.request.url.path,
                "done": DONE.get(visit.request.query_params.get("done", "")) if status == 200 else None,
            }
        )
        form_action = f"'self' {self._banks}" if leads_to_banks else "'self'"  # browsers hold redirects to it, too
        response = HTMLResponse(
            text.encode("utf-8", "replace"),
            status,
            {
                "content-security-policy": "default-src 'none'; style-src 'self'; script-src 'self'; "
                f"img-src 'self' data:; connect-src 'self'; form-action {form_action}; frame-ancestors 'none'; "
                "base-uri 'none'",
                "referrer-policy": "no-referrer",
                "x-content-type-options": "nosniff",
                "cache-control": "no-store",
            }
            | dict(headers or {}),
        )
        self.browsers.keep_visitor(visit, response)
        return response

    def show_error(
        self, visit: Visit, error: Error, template: str, *, invalid: Mapping[str, Sequence[str]], **values: Any
    ) -> Response:
        """A form once more, with what is wrong with it. `invalid`: by an error's reason, the fields it is about."""
        return self.show(
            visit,
            template,
            status_of(error),
            headers=headers_of(error),
            problem=str(error),
            invalid=invalid.get(error.reason, ()),
            **values,
        )

    def missing(self, visit: Visit) -> Response:
        return self._error_page(visit, 404, "There is no such page.")

    async def static_file(self, name: str) -> Response:
        if name not in self._static:
            raise HTTPException(404, "There is no such file.")
        return Response(
            self._static[name],
            media_type=_MEDIA_TYPES[name.rpartition(".")[2]],
            headers={"cache-control": FOREVER, "x-content-type-options": "nosniff"},
        )

    def _static_address(self, name: str) -> str:
        return f"/static/{name}?v={hashlib.sha256(self._static[name]).hexdigest()[:12]}"

    def _error_page(self, visit: Visit, status: int, detail: str, headers: Mapping[str, str] | None = None) -> Response:
        return self.show(
            visit, "error.html.jinja", status, headers=headers, title=HTTPStatus(status).phrase, detail=detail
        )

    async def _answer(self, request: Request, error: Exception) -> Response:
        visit: Visit | None = getattr(request.state, "visit", None)
        if visit is None:  # even who it is could not be found out
            visit = Visit(request=request, session=None, bound_to="", form_token="")
        match error:
            case NotLoggedIn():
                if visit.is_fragment:
                    return Response(status_code=401, headers={"HX-Redirect": "/login", "cache-control": "no-store"})
                response: Response = RedirectResponse("/login", 303)
                self.browsers.forget(response)
                return response
            case FormRefused():
                return self._error_page(visit, 403, str(error))
            case Error():
                return self._error_page(visit, status_of(error), str(error), headers_of(error))
            case HTTPException():
                return self._error_page(visit, error.status_code, str(error.detail), error.headers)
            case RequestValidationError() if any(each["loc"][0] == "path" for each in error.errors()):
                return self.missing(visit)
            case RequestValidationError():
                return self._error_page(visit, 422, "Something in the address of this page is not as it must be.")
            case _:
                self._logger.error("request_failed", method=request.method, path=request.url.path, exc_info=error)
                return self._error_page(visit, 500, "That is our fault. It was logged.")

    def _route_class(self) -> type[APIRoute]:
        pages = self

        class PageRoute(APIRoute):
            def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
                handle = super().get_route_handler()

                async def handled(request: Request) -> Response:
                    try:
                        return await handle(request)
                    except Exception as error:  # whatever it is, a page tells of it
                        return await pages._answer(request, error)

                return handled

        return PageRoute


def redirect(path: str) -> Response:
    """See another page now, by GET."""
    return RedirectResponse(path, 303, headers={"cache-control": "no-store"})


def _amount(amount: Decimal) -> str:
    return f"{amount:,f}"


def _moment(moment: datetime) -> str:
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S}"


def _words(name: str) -> str:
    """USER_LOGIN_SUCCESS as a person would read it."""
    return name.replace("_", " ").capitalize()
