"""OAuth 2.0 over HTTP: the page where a person consents, and the endpoints where a client gets tokens."""

from authlib.oauth2 import OAuth2Error  # type: ignore[import-untyped]
from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import Response

from dashtam_sandbox_bank.authorization import (
    AUTHORIZE,
    REVOKE,
    TOKEN,
    Asked,
    Authorization,
    Considered,
    UnknownRedirect,
)
from dashtam_sandbox_bank.bank import Bank
from dashtam_sandbox_bank.faults import Place, suffer
from dashtam_sandbox_bank.pages import Pages
from dashtam_sandbox_bank.parameters import Parameters, UnreadableParameters
from dashtam_sandbox_bank.refusals import Refused, answer

PASSWORD = "sandbox"

_FORM = {
    "requestBody": {
        "required": True,
        "content": {"application/x-www-form-urlencoded": {"schema": {"type": "object"}}},
    }
}


def oauth_routes(bank: Bank, pages: Pages) -> APIRouter:
    routes = APIRouter(tags=["oauth"])
    authorization = Authorization(bank)

    def consider(request: Request) -> Considered | Response:
        """What is asked, or the answer to what can't be."""
        try:
            return authorization.consider(Parameters.of_query(request))
        except (UnknownRedirect, UnreadableParameters) as error:
            return pages.show(request, "refused.html.jinja", 400, reason=str(error))
        except OAuth2Error as error:
            return authorization.send_back(error)

    def ask(
        request: Request, considered: Considered, status: int = 200, *, problem: str | None = None, name: str = ""
    ) -> Response:
        return pages.show(
            request,
            "consent.html.jinja",
            status,
            purpose=_purpose(request),
            sends_to=considered.redirect_uri,
            client_id=considered.client_id,
            scopes=considered.scopes,
            redirect_uri=considered.redirect_uri,
            problem=problem,
            name=name,
        )

    @routes.get(AUTHORIZE, summary="Log in and consent")
    async def authorize(request: Request) -> Response:
        considered = consider(request)
        return considered if isinstance(considered, Response) else ask(request, considered)

    @routes.post(AUTHORIZE, openapi_extra=_FORM, summary="Allow, or deny")
    async def decide(request: Request) -> Response:
        considered = consider(request)
        if isinstance(considered, Response):
            return considered
        try:
            form = await Parameters.of_form(request)
        except UnreadableParameters as error:
            return ask(request, considered, 400, problem=str(error))
        name = form.get("name") or ""
        if not pages.seals.holds(request, _purpose(request), form.get("seal")):
            problem = "This page was open for too long, or your browser takes no cookies. Please try again."
            return ask(request, considered, 403, problem=problem, name=name)
        decision = form.get("decision")
        if decision == "deny":
            return considered.answer(None)
        if decision != "allow":
            return ask(request, considered, 400, problem="Press Allow or Deny.", name=name)
        if form.get("password") != PASSWORD:
            return ask(request, considered, 403, problem="That is not the password. It is: sandbox", name=name)
        try:
            person = bank.people.welcome(name)
        except Refused as refused:
            return ask(request, considered, refused.status, problem=refused.description, name=name)
        return considered.answer(person.name)

    async def suffer_for(asked: Asked, place: Place) -> None:
        """The faults of whoever the code or token belongs to."""
        if (code := asked.parameters.get("code")) and (known := bank.grants.peek_code(code)):
            await suffer(bank.faults.take_fault(known.person, place))
            return
        value = asked.parameters.get("refresh_token") or asked.parameters.get("token")
        if value and (token := bank.grants.peek_token(value)):
            await suffer(bank.faults.take_fault(token.grant.person, place))

    @routes.post(TOKEN, openapi_extra=_FORM, summary="Exchange a code or a refresh token for tokens")
    async def token(request: Request) -> Response:
        asked = await authorization.read(request)
        await suffer_for(asked, "token")
        return authorization.token(asked)

    @routes.post(REVOKE, openapi_extra=_FORM, summary="Give a token back (RFC 7009)")
    async def revoke(request: Request) -> Response:
        asked = await authorization.read(request)
        await suffer_for(asked, "revoke")
        return authorization.revoke(asked)

    @routes.get("/.well-known/oauth-authorization-server", summary="Where what is (RFC 8414)")
    async def metadata() -> Response:
        return answer(authorization.metadata())

    return routes


def _purpose(request: Request) -> str:
    query: bytes = request.scope["query_string"]
    return "consent " + query.decode("latin-1")
