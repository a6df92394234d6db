"""What a user decides about themselves: devices, password, settings."""

from collections.abc import Mapping
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends
from pydantic import ValidationError
from starlette.responses import Response

from dashtam.application.password_change import ChangePassword, PasswordChange
from dashtam.application.sessions import Sessions
from dashtam.application.users import ChangeSettings, UserQueries
from dashtam.domain.account import DECIMALS
from dashtam.domain.result import Failure
from dashtam.domain.user import LONGEST_PASSWORD
from dashtam.presentation.users import SettingsChanged
from dashtam.presentation.web.browser_session import FieldInvalid, Visit
from dashtam.presentation.web.pages import Pages, redirect

_INVALID: Final[Mapping[str, tuple[str, ...]]] = {
    "wrong_password": ("current_password",),
    "weak_password": ("new_password",),
}
_CURRENCIES: Final = sorted(DECIMALS)


def personal_routes(pages: Pages, sessions: Sessions, password_change: PasswordChange, users: UserQueries) -> APIRouter:
    routes = pages.routes()
    logged_in = Depends(pages.browsers.logged_in)

    def logged_out(path: str) -> Response:
        response = redirect(path)
        pages.browsers.forget(response)
        return response

    @routes.get("/devices")
    async def show_devices(visit: Visit = logged_in) -> Response:
        return pages.show(
            visit, "devices.html.jinja", sessions=await sessions.open_ones(visit.user_id), current=visit.user.id
        )

    @routes.post("/devices/revoke")
    async def revoke_all(visit: Visit = logged_in) -> Response:
        await sessions.revoke_all(visit.user_id, reason="by_user")
        return logged_out("/login?done=all_revoked")

    @routes.post("/devices/{session_id}/revoke")
    async def revoke(session_id: UUID, visit: Visit = logged_in) -> Response:
        result = await sessions.revoke(session_id, visit.user_id, reason="by_user")
        if isinstance(result, Failure):
            raise result.error
        return (
            logged_out("/login?done=logged_out") if session_id == visit.user.id else redirect("/devices?done=revoked")
        )

    @routes.get("/password")
    async def show_password(visit: Visit = logged_in) -> Response:
        return pages.show(visit, "password.html.jinja", user=await users.user(visit.user_id))

    @routes.post("/password")
    async def change_password(visit: Visit = logged_in) -> Response:
        user = await users.user(visit.user_id)
        try:
            command = ChangePassword(
                user_id=visit.user_id,
                current_password=visit.field("current_password", "The present password", LONGEST_PASSWORD),
                new_password=visit.field("new_password", "The new password", LONGEST_PASSWORD),
            )
        except FieldInvalid as error:
            return pages.show_error(visit, error, "password.html.jinja", invalid=_INVALID, user=user)
        result = await password_change.by_user(command)
        if isinstance(result, Failure):
            return pages.show_error(visit, result.error, "password.html.jinja", invalid=_INVALID, user=user)
        return logged_out("/login?done=changed")

    @routes.get("/settings")
    async def show_settings(visit: Visit = logged_in) -> Response:
        return pages.show(
            visit, "settings.html.jinja", chosen=await users.settings(visit.user_id), currencies=_CURRENCIES
        )

    @routes.post("/settings")
    async def change_settings(visit: Visit = logged_in) -> Response:
        chosen: dict[str, Any] = {
            "currency": visit.fields.get("currency", ""),
            "language": visit.fields.get("language", "").strip(),
            "notifications": "notifications" in visit.fields,
        }
        try:
            if chosen["currency"] not in DECIMALS:
                raise FieldInvalid("Choose one of the currencies.")
            await users.change_settings(ChangeSettings(user_id=visit.user_id, **SettingsChanged(**chosen).model_dump()))
        except ValidationError:
            error = FieldInvalid('A language is written as a short code: "en", or "pt-BR".')
            return again(visit, error, "language", chosen)
        except FieldInvalid as error:
            return again(visit, error, "currency", chosen)
        return redirect("/settings?done=settings")

    def again(visit: Visit, error: FieldInvalid, field: str, chosen: dict[str, Any]) -> Response:
        return pages.show_error(
            visit,
            error,
            "settings.html.jinja",
            invalid={error.reason: (field,)},
            chosen=chosen,
            currencies=_CURRENCIES,
        )

    return routes
