"""All pages together, as the API takes them in."""

from dataclasses import dataclass

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dashtam.application.activity import Activity
from dashtam.application.email_verification import VerifyEmail
from dashtam.application.password_change import PasswordChange
from dashtam.application.password_reset import ForgottenPassword
from dashtam.application.sessions import Sessions
from dashtam.application.users import UserQueries
from dashtam.presentation.pace import Pace
from dashtam.presentation.sign_up import SignUp
from dashtam.presentation.web.administration import administration_routes
from dashtam.presentation.web.entrance import entrance_routes
from dashtam.presentation.web.home import Banking, home_routes
from dashtam.presentation.web.live import Live, live_routes
from dashtam.presentation.web.pages import Pages
from dashtam.presentation.web.yourself import personal_routes


@dataclass(frozen=True, kw_only=True, slots=True)
class Site:
    pages: Pages
    live: Live
    activity: Activity
    banking: Banking

    def routers(
        self,
        *,
        sign_up: SignUp,
        verify_email: VerifyEmail,
        sessions: Sessions,
        password_change: PasswordChange,
        forgotten_password: ForgottenPassword,
        users: UserQueries,
        pace: Pace,
    ) -> list[APIRouter]:
        static = self.pages.routes()
        static.add_api_route("/static/{name}", self.pages.static_file)
        return [
            entrance_routes(self.pages, sign_up, verify_email, sessions, forgotten_password, pace),
            home_routes(self.pages, self.banking, users),
            personal_routes(self.pages, sessions, password_change, users),
            administration_routes(self.pages, users, password_change),
            live_routes(self.pages, self.live, self.activity, sessions),
            static,
        ]

    async def missing(self, request: Request) -> Response:
        """The page that is shown where there is none; for browsers alone, as programs are told by a problem."""
        return self.pages.missing(await self.pages.browsers.visit(request))
