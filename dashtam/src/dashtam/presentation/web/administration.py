"""The pages of administrators."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Final
from uuid import UUID

from fastapi import APIRouter, Depends
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dashtam.application.activity import RECORDS
from dashtam.application.password_change import PasswordChange
from dashtam.application.users import UserQueries
from dashtam.domain.result import Failure
from dashtam.domain.user import LONGEST_PASSWORD
from dashtam.presentation.authentication import Forbidden
from dashtam.presentation.web.browser_session import BrowserSessions, FieldInvalid, Visit
from dashtam.presentation.web.pages import Pages, redirect
from whereupon.dashboard import Visitor

NEWEST: Final = 50
"""Users."""
_INVALID: Final[Mapping[str, tuple[str, ...]]] = {"weak_password": ("password",)}


def administrators(browsers: BrowserSessions) -> Callable[[Request], Awaitable[Visitor | Response | None]]:
    """Who may see the dashboard of events, and act there: administrators who are logged in."""

    async def authorize(request: Request) -> Visitor | Response | None:
        visit = await browsers.visit(request)
        if visit.session is None:
            return RedirectResponse("/login", 303)
        return Visitor(name=f"user {visit.session.user_id}", role="actor") if visit.session.is_admin else None

    return authorize


def administration_routes(pages: Pages, users: UserQueries, password_change: PasswordChange) -> APIRouter:
    routes = pages.routes()
    logged_in = Depends(pages.browsers.logged_in)

    def require_admin(visit: Visit) -> None:
        if not visit.user.is_admin:
            raise Forbidden

    @routes.get("/admin")
    async def show(visit: Visit = logged_in) -> Response:
        require_admin(visit)
        return pages.show(
            visit,
            "admin.html.jinja",
            users=await users.newest_users(limit=NEWEST),
            records=await users.newest_audit(limit=RECORDS),
        )

    @routes.get("/admin/followed")
    async def show_followed(visit: Visit = logged_in) -> Response:
        require_admin(visit)
        if not visit.is_fragment:
            return redirect("/admin#followed")
        return pages.show(visit, "followed.html.jinja", fragment=True, records=await users.newest_audit(limit=RECORDS))

    @routes.get("/admin/users/{user_id}")
    async def show_user(user_id: UUID, visit: Visit = logged_in) -> Response:
        require_admin(visit)
        return pages.show(visit, "admin_user.html.jinja", user=await users.user(user_id))

    @routes.post("/admin/users/{user_id}/password")
    async def set_password(user_id: UUID, visit: Visit = logged_in) -> Response:
        require_admin(visit)
        user = await users.user(user_id)
        try:
            password = visit.field("password", "The password", LONGEST_PASSWORD)
        except FieldInvalid as error:
            return pages.show_error(visit, error, "admin_user.html.jinja", invalid=_INVALID, user=user)
        result = await password_change.by_admin(user_id, password)
        if isinstance(result, Failure):
            return pages.show_error(visit, result.error, "admin_user.html.jinja", invalid=_INVALID, user=user)
        # who sets a password of their own is logged out with it, and sent to the login by the next page
        return redirect(f"/admin/users/{user_id}?done=password_set")

    return routes
