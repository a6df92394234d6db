"""The pages of those who are not logged in, and the way in and out."""

from collections.abc import Mapping
from typing import Final

from fastapi import APIRouter, Depends
from starlette.responses import Response

from dashtam.application.email_verification import VerifyEmail
from dashtam.application.password_reset import ConfirmPasswordReset, ForgottenPassword
from dashtam.application.rate_limit import TooManyAttempts
from dashtam.application.sessions import LogIn, Sessions
from dashtam.domain.result import Error, Failure
from dashtam.domain.user import LONGEST_EMAIL, LONGEST_PASSWORD
from dashtam.presentation.pace import Pace
from dashtam.presentation.sign_up import SignUp
from dashtam.presentation.web.browser_session import FieldInvalid, Visit
from dashtam.presentation.web.pages import Pages, redirect

LONGEST_TOKEN: Final = 200
ADDRESS: Final = "The email address"
PASSWORD: Final = "The password"
_INVALID: Final[Mapping[str, tuple[str, ...]]] = {
    "invalid_email": ("email",),
    "weak_password": ("password",),
    "invalid_credentials": ("email", "password"),
}


def entrance_routes(
    pages: Pages,
    sign_up: SignUp,
    verify_email: VerifyEmail,
    sessions: Sessions,
    forgotten_password: ForgottenPassword,
    pace: Pace,
) -> APIRouter:
    routes = pages.routes()
    anybody = Depends(pages.browsers.anybody)
    logged_in = Depends(pages.browsers.logged_in)

    def again(visit: Visit, error: Error, template: str, **values: str) -> Response:
        return pages.show_error(visit, error, template, invalid=_INVALID, **values)

    @routes.get("/")
    async def start(visit: Visit = anybody) -> Response:
        return pages.show(visit, "start.html.jinja")

    @routes.get("/register")
    async def show_registration(visit: Visit = anybody) -> Response:
        return pages.show(visit, "register.html.jinja", email="")

    @routes.post("/register")
    async def register(visit: Visit = anybody) -> Response:
        email = visit.fields.get("email", "")
        try:
            result = await sign_up.attempt(
                visit.field("email", ADDRESS, LONGEST_EMAIL), visit.field("password", PASSWORD, LONGEST_PASSWORD)
            )
        except (FieldInvalid, TooManyAttempts) as error:
            return again(visit, error, "register.html.jinja", email=email)
        if isinstance(result, Failure):
            return again(visit, result.error, "register.html.jinja", email=email)
        return redirect("/login?done=registered")

    @routes.get("/verify")
    async def show_verification(token: str = "", visit: Visit = anybody) -> Response:
        """Only a button: what follows links in mails to see whether they are harmful must not confirm anything."""
        return pages.show(visit, "verify.html.jinja", token=token)

    @routes.post("/verify")
    async def verify(visit: Visit = anybody) -> Response:
        token = visit.fields.get("token", "")[:LONGEST_TOKEN]
        result = await verify_email.handle(token)
        if isinstance(result, Failure):
            return again(visit, result.error, "verify.html.jinja", token=token)
        return redirect("/login?done=verified")

    @routes.get("/login")
    async def show_login(visit: Visit = anybody) -> Response:
        if visit.session is not None:
            return redirect("/home")
        return pages.show(visit, "login.html.jinja", email="")

    @routes.post("/login")
    async def log_in(visit: Visit = anybody) -> Response:
        email = visit.fields.get("email", "")
        try:
            command = LogIn(
                email=visit.field("email", ADDRESS, LONGEST_EMAIL),
                password=visit.field("password", PASSWORD, LONGEST_PASSWORD),
            )
        except FieldInvalid as error:
            return again(visit, error, "login.html.jinja", email=email)
        result = await sessions.log_in(command)
        if isinstance(result, Failure):
            return again(visit, result.error, "login.html.jinja", email=email)
        response = redirect("/home")
        pages.browsers.remember(result.value, response)
        return response

    @routes.post("/logout")
    async def log_out(visit: Visit = logged_in) -> Response:
        await sessions.log_out(visit.user.id, visit.user_id)  # closed meanwhile, it is closed as well
        response = redirect("/login?done=logged_out")
        pages.browsers.forget(response)
        return response

    @routes.get("/forgot")
    async def show_forgotten(visit: Visit = anybody) -> Response:
        return pages.show(visit, "forgot.html.jinja", email="")

    @routes.post("/forgot")
    async def ask_for_reset(visit: Visit = anybody) -> Response:
        email = visit.fields.get("email", "")
        try:
            async with pace.kept():
                result = await forgotten_password.request(visit.field("email", ADDRESS, LONGEST_EMAIL))
        except FieldInvalid as error:
            return again(visit, error, "forgot.html.jinja", email=email)
        if isinstance(result, Failure):
            return again(visit, result.error, "forgot.html.jinja", email=email)
        return redirect("/login?done=asked")

    @routes.get("/reset")
    async def show_reset(token: str = "", visit: Visit = anybody) -> Response:
        return pages.show(visit, "reset.html.jinja", token=token)

    @routes.post("/reset")
    async def reset(visit: Visit = anybody) -> Response:
        token = visit.fields.get("token", "")[:LONGEST_TOKEN]
        try:
            command = ConfirmPasswordReset(
                token=token, new_password=visit.field("password", PASSWORD, LONGEST_PASSWORD)
            )
        except FieldInvalid as error:
            return again(visit, error, "reset.html.jinja", token=token)
        result = await forgotten_password.confirm(command)
        if isinstance(result, Failure):
            return again(visit, result.error, "reset.html.jinja", token=token)
        return redirect("/login?done=reset")

    return routes
