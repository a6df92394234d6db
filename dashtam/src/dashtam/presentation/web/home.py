"""What a user has: accounts, connections to banks, and what followed from what they did."""

from dataclasses import dataclass
from typing import Any, Final
from uuid import UUID

from fastapi import APIRouter, Depends
from starlette.responses import Response

from dashtam.application.accounts import AccountQueries
from dashtam.application.activity import NOTIFICATIONS, RECORDS
from dashtam.application.connections import (
    CompleteConnection,
    CompleteConnectionHandler,
    ConnectionQueries,
    Disconnect,
    DisconnectHandler,
    StartConnection,
    StartConnectionHandler,
)
from dashtam.application.sync import RequestSync, RequestSyncHandler
from dashtam.application.users import UserQueries
from dashtam.domain.account import AccountStatus
from dashtam.domain.result import Failure
from dashtam.presentation.problems import status_of
from dashtam.presentation.web.browser_session import Visit
from dashtam.presentation.web.pages import Pages, redirect

PAGE: Final = 25
"""Transactions on a page."""
LONGEST_ANSWER: Final = 4096
"""Characters of a code or a state that a bank sends."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Banking:
    """What can be done with banks."""

    start: StartConnectionHandler
    complete: CompleteConnectionHandler
    disconnect: DisconnectHandler
    request_sync: RequestSyncHandler
    connections: ConnectionQueries
    accounts: AccountQueries


def home_routes(pages: Pages, banking: Banking, users: UserQueries) -> APIRouter:
    routes = pages.routes()
    logged_in = Depends(pages.browsers.logged_in)

    async def accounts_of(user_id: UUID) -> dict[str, Any]:
        providers = {each.id: each.display_name for each in banking.connections.providers()}
        return {
            "accounts": sorted(
                await banking.accounts.of_user(user_id),
                key=lambda each: (each.status is AccountStatus.CLOSED, str(each.provider_id), each.name),
            ),
            "balances": await banking.accounts.balances(user_id),
            "connections": await banking.connections.of_user(user_id),
            "providers": providers,
            "notifications": await users.notifications(user_id, limit=NOTIFICATIONS),
        }

    @routes.get("/home")
    async def show_home(visit: Visit = logged_in) -> Response:
        return pages.show(
            visit,
            "home.html.jinja",
            leads_to_banks=True,
            records=await users.audit(visit.user_id, limit=RECORDS),
            **await accounts_of(visit.user_id),
        )

    @routes.get("/home/accounts")
    async def show_accounts(visit: Visit = logged_in) -> Response:
        """The part of the page that is about banks, as it is now."""
        if not visit.is_fragment:
            return redirect("/home")
        return pages.show(visit, "home_accounts.html.jinja", **await accounts_of(visit.user_id))

    @routes.get("/home/followed")
    async def show_followed(visit: Visit = logged_in) -> Response:
        if not visit.is_fragment:
            return redirect("/home#followed")
        return pages.show(
            visit, "followed.html.jinja", fragment=True, records=await users.audit(visit.user_id, limit=RECORDS)
        )

    @routes.get("/home/accounts/{account_id}")
    async def show_account(account_id: UUID, after: UUID | None = None, visit: Visit = logged_in) -> Response:
        account = await banking.accounts.account(visit.user_id, account_id)
        page = await banking.accounts.transactions(visit.user_id, account_id, after=after, limit=PAGE)
        return pages.show(visit, "account.html.jinja", account=account, page=page, is_first=after is None)

    @routes.get("/connect")
    async def choose_bank(visit: Visit = logged_in) -> Response:
        return pages.show(visit, "connect.html.jinja", leads_to_banks=True, providers=banking.connections.providers())

    @routes.post("/connect")
    async def go_to_bank(visit: Visit = logged_in) -> Response:
        name = visit.fields.get("provider", "")
        result = await banking.start.handle(StartConnection(user_id=visit.user_id, provider_name=name))
        if isinstance(result, Failure):
            return pages.show(
                visit,
                "connect.html.jinja",
                status_of(result.error),
                leads_to_banks=True,
                providers=banking.connections.providers(),
                problem="Choose one of the banks.",
            )
        return redirect(result.value)

    @routes.get("/connect/callback")
    async def come_back(
        state: str = "", code: str | None = None, error: str | None = None, visit: Visit = logged_in
    ) -> Response:
        """From the bank. What it says works once, so a page that may be loaded again is shown from another address."""
        command = CompleteConnection(
            user_id=visit.user_id,
            state=state[:LONGEST_ANSWER],
            code=None if code is None or error is not None else code[:LONGEST_ANSWER],
            error=error,
        )
        result = await banking.complete.handle(command)
        if isinstance(result, Failure):
            return pages.show(visit, "not_connected.html.jinja", status_of(result.error), problem=str(result.error))
        return redirect("/home?done=connected")

    @routes.post("/home/connections/{connection_id}/sync")
    async def sync(connection_id: UUID, visit: Visit = logged_in) -> Response:
        result = await banking.request_sync.handle(RequestSync(user_id=visit.user_id, connection_id=connection_id))
        if isinstance(result, Failure):
            raise result.error
        return redirect("/home?done=syncing")

    @routes.post("/home/connections/{connection_id}/disconnect")
    async def disconnect(connection_id: UUID, visit: Visit = logged_in) -> Response:
        result = await banking.disconnect.handle(Disconnect(user_id=visit.user_id, connection_id=connection_id))
        if isinstance(result, Failure):
            raise result.error
        return redirect("/home?done=disconnected")

    return routes
