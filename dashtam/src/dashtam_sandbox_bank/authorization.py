"""The OAuth 2.0 server: Authlib's grants, told where codes and tokens are kept and how requests look here.

Authlib has no integration for ASGI applications. Its grants are synchronous; so is the memory they work on. It has no
type hints, and pyright's for it are not quite its own: what comes from it is `Any` until it is given a name here.
"""

from collections.abc import Mapping
from typing import Any, Final

from authlib.common.urls import add_params_to_uri  # type: ignore[import-untyped]
from authlib.oauth2 import OAuth2Error, OAuth2Request  # type: ignore[import-untyped]
from authlib.oauth2.rfc6749 import (  # type: ignore[import-untyped]
    AuthorizationServer,
    InvalidRequestError,
    OAuth2Payload,
)
from authlib.oauth2.rfc6749.grants import (  # type: ignore[import-untyped]
    AuthorizationCodeGrant,
    RefreshTokenGrant,
)
from authlib.oauth2.rfc6749.util import extract_basic_authorization  # type: ignore[import-untyped]
from authlib.oauth2.rfc7009 import RevocationEndpoint  # type: ignore[import-untyped]
from authlib.oauth2.rfc7636 import CodeChallenge  # type: ignore[import-untyped]
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from dashtam_sandbox_bank.bank import Bank
from dashtam_sandbox_bank.client import AUTH_METHODS, SCOPES, Client
from dashtam_sandbox_bank.grants import REUSE_GRACE, Code, Grants, Token, new_token
from dashtam_sandbox_bank.parameters import Parameters, UnreadableParameters
from dashtam_sandbox_bank.refusals import answer

AUTHORIZE: Final = "/oauth/authorize"
TOKEN: Final = "/oauth/token"
REVOKE: Final = "/oauth/revoke"


class UnknownRedirect(Exception):
    """Nobody can be sent anywhere: this client, or this redirect URI, is not known."""


class _Payload(OAuth2Payload):  # type: ignore[misc]
    def __init__(self, parameters: Parameters) -> None:
        self._parameters = parameters

    @property
    def data(self) -> Any:
        return self._parameters.data

    @property
    def datalist(self) -> Any:
        return self._parameters.datalist


class _Request(OAuth2Request):  # type: ignore[misc]
    def __init__(self, method: str, path: str, parameters: Parameters, headers: Mapping[str, str]) -> None:
        # Authlib refuses http except on loopback; a sandbox may well be another container
        super().__init__(method, f"https://sandbox.invalid{path}", headers=headers)
        self.payload = _Payload(parameters)
        self._parameters = parameters

    @property
    def args(self) -> Any:
        return self._parameters.data

    @property
    def form(self) -> Any:
        return self._parameters.data


class _CodeGrant(AuthorizationCodeGrant):  # type: ignore[misc]
    TOKEN_ENDPOINT_AUTH_METHODS = AUTH_METHODS
    server: "_Server"

    def save_authorization_code(self, code: str, request: Any) -> None:
        self.server.grants.save_code(
            code,
            client_id=request.client.client_id,
            person=request.user,
            redirect_uri=request.payload.redirect_uri,
            scope=request.scope,
            code_challenge=request.payload.data["code_challenge"],
        )

    def query_authorization_code(self, code: str, client: Any) -> Code | None:
        known = self.server.grants.peek_code(code)
        if known is None or known.client_id != client.client_id:
            return None
        if known.grant is not None:  # one of two who know it should not: neither keeps what it gave
            self.server.grants.revoke(known.grant)
            return None
        return known if known.expires_at > self.server.now() else None

    def delete_authorization_code(self, authorization_code: Code) -> None:
        """It was spent when its tokens were saved."""

    def authenticate_user(self, authorization_code: Code) -> str:
        return authorization_code.person


class _S256Only(CodeChallenge):  # type: ignore[misc]
    SUPPORTED_CODE_CHALLENGE_METHOD = ["S256"]  # noqa: RUF012  # as Authlib has it

    def validate_code_challenge(self, grant: _CodeGrant, redirect_uri: str) -> None:
        request: Any = grant.request
        data = request.payload.data
        if "code_challenge" not in data or data.get("code_challenge_method") != "S256":
            raise InvalidRequestError("PKCE is required: send code_challenge, and code_challenge_method=S256.")
        super().validate_code_challenge(grant, redirect_uri)


class _RefreshGrant(RefreshTokenGrant):  # type: ignore[misc]
    TOKEN_ENDPOINT_AUTH_METHODS = AUTH_METHODS
    INCLUDE_NEW_REFRESH_TOKEN = True
    server: "_Server"

    def authenticate_refresh_token(self, refresh_token: str) -> Any:
        client: Any = self.request.client
        grants = self.server.grants
        token = grants.find_token(refresh_token, "refresh")
        if token is None or not token.check_client(client):
            return None
        if token.used_at is not None and self.server.now() - token.used_at > REUSE_GRACE:
            grants.revoke(token.grant)  # it was stolen, or its successor was: nobody can tell which
            return None
        return token

    def authenticate_user(self, refresh_token: Token) -> str:
        return refresh_token.grant.person

    def revoke_old_credential(self, refresh_token: Any) -> None:
        if refresh_token.used_at is None:  # its grace counts from the first use
            refresh_token.used_at = self.server.now()


class _Revocation(RevocationEndpoint):  # type: ignore[misc]
    CLIENT_AUTH_METHODS = AUTH_METHODS
    server: "_Server"

    def check_params(self, request: Any, client: Any) -> None:
        # a hint we don't know is no reason to refuse (RFC 7009, 2.1): tokens are found without
        if "token" not in request.form:
            raise InvalidRequestError("Missing 'token' in request.")

    def query_token(self, token_string: str, token_type_hint: str | None) -> Token | None:
        return self.server.grants.peek_token(token_string)

    def revoke_token(self, token: Token, request: Any) -> None:
        self.server.grants.revoke_token(token)


class _Server(AuthorizationServer):  # type: ignore[misc]
    def __init__(self, bank: Bank) -> None:
        super().__init__(scopes_supported=SCOPES)
        self.grants: Grants = bank.grants
        self.now = bank.clock
        settings = bank.settings
        self._issuer = settings.issuer
        self._lifetime = settings.access_token_seconds
        self._client = Client(
            client_id=settings.client_id, secret=settings.client_secret, redirect_uris=settings.redirect_uris
        )
        self.register_grant(_CodeGrant, [_S256Only(required=True)])
        self.register_grant(_RefreshGrant)
        self.register_endpoint(_Revocation)

    def query_client(self, client_id: str) -> Any:
        return self._client if client_id == self._client.client_id else None

    def generate_token(
        self,
        grant_type: str,
        client: Any,
        user: Any = None,
        scope: str | None = None,
        expires_in: int | None = None,
        include_refresh_token: bool = True,
    ) -> dict[str, str | int]:
        return {
            "token_type": "Bearer",
            "access_token": new_token(),
            "expires_in": self._lifetime,
            "refresh_token": new_token(),
            "scope": scope or "",
        }

    def save_token(self, token: dict[str, Any], request: Any) -> None:
        code: Code | None = request.authorization_code
        grant = request.refresh_token.grant if code is None else self.grants.spend(code)
        self.grants.save_token(token["access_token"], "access", grant, token["scope"])
        self.grants.save_token(token["refresh_token"], "refresh", grant, grant.scope)

    def create_oauth2_request(self, request: _Request) -> _Request:
        return request

    def handle_response(self, status: int, body: Any, headers: Any) -> Response:
        told = {name.lower(): value for name, value in headers}
        if location := told.get("location"):
            told_by = add_params_to_uri(location, [("iss", self._issuer)])  # RFC 9207
            return RedirectResponse(told_by, 303, {"cache-control": "no-store"})
        return answer(dict(body), status, told)

    def send_signal(self, name: str, *args: object, **kwargs: object) -> None:
        """Nobody listens."""


class Authorization:
    """What is asked at the three endpoints, answered."""

    def __init__(self, bank: Bank) -> None:
        self._server: Any = _Server(bank)
        self._issuer = bank.settings.issuer

    def consider(self, parameters: Parameters) -> "Considered":
        """What a client asks a person for. Raises `UnknownRedirect`, or an `OAuth2Error` that is to be sent back."""
        # before everything else: an answer that is sent to anybody else is a gift to them
        if parameters.repeated in ("client_id", "redirect_uri"):
            raise UnknownRedirect(f"{parameters.repeated} is given more than once.")
        client = self._server.query_client(parameters.get("client_id") or "")
        if client is None:
            raise UnknownRedirect("No client with this client_id is known here.")
        redirect_uri = parameters.get("redirect_uri")
        if redirect_uri is None or not client.check_redirect_uri(redirect_uri):
            raise UnknownRedirect("This redirect_uri is not one of those that the client is known to have.")
        request = _Request("GET", AUTHORIZE, parameters, {})
        try:
            if parameters.repeated is not None:
                raise InvalidRequestError("A parameter is given more than once.")
            response_type = parameters.get("response_type")
            if response_type is None:
                raise InvalidRequestError("Missing 'response_type' in request.")
            if response_type != "code":  # Authlib's own message repeats it, and fails on what no message may contain
                raise OAuth2Error("The response_type must be code.", error="unsupported_response_type")
            grant = self._server.get_consent_grant(request)
        except OAuth2Error as error:
            error.redirect_uri = redirect_uri
            error.state = parameters.get("state")
            raise
        return Considered(self._server, request, grant, redirect_uri)

    def send_back(self, error: OAuth2Error) -> Response:
        response: Response = self._server.handle_error_response(None, error)
        return response

    async def read(self, request: Request) -> "Asked":
        """A request to the token or revocation endpoint."""
        try:
            parameters = await Parameters.of_form(request)
        except UnreadableParameters as error:
            return Asked(Parameters([]), None, InvalidRequestError(str(error)))
        headers = {}
        if (sent := request.headers.get("authorization")) is not None:
            try:
                extract_basic_authorization({"Authorization": sent})
                headers["Authorization"] = sent
            except ValueError:  # Authlib lets what is no text out as it comes; without, it asks for credentials
                pass
        bridged = _Request(request.method, request.url.path, parameters, headers)
        problem = None
        if parameters.repeated is not None:
            problem = InvalidRequestError("A parameter is given more than once.")
        elif "client_secret" in parameters.data and sent is not None:
            problem = InvalidRequestError("Credentials are given twice: in the header and in the body.")
        return Asked(parameters, bridged, problem)

    def token(self, asked: "Asked") -> Response:
        if asked.problem is None and asked.parameters.get("grant_type") is None:
            return self.send_back(InvalidRequestError("Missing 'grant_type' in request."))
        if asked.problem is not None:
            return self.send_back(asked.problem)
        response: Response = self._server.create_token_response(asked.request)
        return response

    def revoke(self, asked: "Asked") -> Response:
        if asked.problem is not None:
            return self.send_back(asked.problem)
        response: Response = self._server.create_endpoint_response("revocation", asked.request)
        return response

    def metadata(self) -> dict[str, Any]:
        """RFC 8414."""
        return {
            "issuer": self._issuer,
            "authorization_endpoint": self._issuer + AUTHORIZE,
            "token_endpoint": self._issuer + TOKEN,
            "revocation_endpoint": self._issuer + REVOKE,
            "scopes_supported": list(SCOPES),
            "response_types_supported": ["code"],
            "response_modes_supported": ["query"],
            "grant_types_supported": ["authorization_code", "refresh_token"],
            "token_endpoint_auth_methods_supported": list(AUTH_METHODS),
            "revocation_endpoint_auth_methods_supported": list(AUTH_METHODS),
            "code_challenge_methods_supported": ["S256"],
            "authorization_response_iss_parameter_supported": True,
        }


class Considered:
    """A client's request that is as it should be, and waits for a person's answer."""

    def __init__(self, server: Any, request: Any, grant: Any, redirect_uri: str) -> None:
        self._server = server
        self._request = request
        self._grant = grant
        self.redirect_uri = redirect_uri

    @property
    def client_id(self) -> str:
        client_id: str = self._request.payload.client_id
        return client_id

    @property
    def scopes(self) -> list[str]:
        scope: str = self._request.scope
        return scope.split()

    def answer(self, person: str | None) -> Response:
        """Send the browser back: with a code for what is this person's, or, for None, with a refusal."""
        response: Response = self._server.create_authorization_response(self._request, person, self._grant)
        return response


class Asked:
    def __init__(self, parameters: Parameters, request: _Request | None, problem: OAuth2Error | None) -> None:
        self.parameters = parameters
        self.request = request
        self.problem = problem
