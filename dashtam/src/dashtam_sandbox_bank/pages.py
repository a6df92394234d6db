"""The pages a person sees. They work without JavaScript, and bring none."""

from importlib.resources import files
from typing import Any
from urllib.parse import quote, urlsplit

import jinja2
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from dashtam_sandbox_bank.form_seals import FormSeals

STYLESHEET = "/bank.css"


class Pages:
    def __init__(self, seals: FormSeals) -> None:
        self.seals = seals
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("dashtam_sandbox_bank"),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        self._templates.filters["segment"] = lambda text: quote(text, safe="")
        self._style = files("dashtam_sandbox_bank").joinpath("static", "bank.css").read_text("utf-8")
        self.routes = APIRouter(include_in_schema=False)
        self.routes.add_api_route(STYLESHEET, self._stylesheet)

    def show(
        self,
        request: Request,
        template: str,
        status: int = 200,
        *,
        purpose: str = "",
        sends_to: str | None = None,
        **values: Any,
    ) -> Response:
        """`purpose`: what the forms of the page are for. `sends_to`: where they may end, beside the bank itself."""
        browser = self.seals.browser(request)
        text = self._templates.get_template(template).render(
            values | {"seal": self.seals.seal(browser, purpose), "stylesheet": STYLESHEET}
        )
        form_action = "'self'"
        if sends_to is not None:  # browsers hold the redirect that follows a form to this, too
            parts = urlsplit(sends_to)
            form_action += f" {parts.scheme}://{parts.netloc}"
        response = HTMLResponse(
            text.encode("utf-8", "replace"),
            status,
            {
                "content-security-policy": f"default-src 'none'; style-src 'self'; form-action {form_action}; "
                "base-uri 'none'; frame-ancestors 'none'",
                "cache-control": "no-store",
                "referrer-policy": "no-referrer",
                "x-content-type-options": "nosniff",
            },
        )
        self.seals.remember(browser, response)
        return response

    async def _stylesheet(self) -> Response:
        return Response(self._style, headers={"x-content-type-options": "nosniff"}, media_type="text/css")
