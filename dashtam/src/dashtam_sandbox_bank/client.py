"""The client the bank knows: Dashtam, or whoever is tried out with it."""

from dataclasses import dataclass
from hmac import compare_digest
from typing import Final

SCOPES: Final = ("accounts", "transactions")
AUTH_METHODS: Final = ("client_secret_basic", "client_secret_post")


@dataclass(frozen=True, kw_only=True, slots=True)
class Client:
    """With the names that Authlib's grants look for."""

    client_id: str
    secret: str
    redirect_uris: tuple[str, ...]

    def get_client_id(self) -> str:
        return self.client_id

    def get_default_redirect_uri(self) -> str | None:
        return None  # it has to be told, and is compared

    def get_allowed_scope(self, scope: str | None) -> str:
        return " ".join(dict.fromkeys((scope or "").split())) or " ".join(SCOPES)

    def check_redirect_uri(self, redirect_uri: str) -> bool:
        return redirect_uri in self.redirect_uris

    def check_client_secret(self, client_secret: str) -> bool:
        return compare_digest(client_secret.encode("utf-8", "surrogatepass"), self.secret.encode())

    def check_endpoint_auth_method(self, method: str, _endpoint: str) -> bool:
        return method in AUTH_METHODS

    def check_response_type(self, response_type: str) -> bool:
        return response_type == "code"

    def check_grant_type(self, grant_type: str) -> bool:
        return grant_type in ("authorization_code", "refresh_token")
