"""What can be set about the bank."""

import re
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import urlsplit

LONGEST_LIFETIME = 10 * 365 * 24 * 3600  # seconds

_CREDENTIAL = re.compile(r"[\x21-\x7e]{1,200}")


class InvalidSetting(ValueError):
    """The bank can't work with this setting."""


@dataclass(frozen=True, kw_only=True, slots=True)
class BankSettings:
    """Raises `InvalidSetting`."""

    client_id: str = "dashtam"
    client_secret: str = "sandbox-secret"
    redirect_uris: tuple[str, ...] = ("http://127.0.0.1:8000/connect/callback",)
    """Where a person may be sent back to; compared character by character."""
    access_token_seconds: int = 900
    refresh_token_seconds: int = 30 * 24 * 3600
    issuer: str = "http://127.0.0.1:8100"
    """The address under which the bank is reached; it is told so, and does not believe a request's Host header."""

    def __post_init__(self) -> None:
        for name in ("client_id", "client_secret"):
            if _CREDENTIAL.fullmatch(getattr(self, name)) is None:
                raise InvalidSetting(f"{name} has 1 to 200 visible ASCII characters and no blank. Choose another one.")
        if not self.redirect_uris:
            raise InvalidSetting("redirect_uris is empty: nobody could be sent back. Give the client's callback.")
        for uri in self.redirect_uris:
            _check_address("redirect_uris", uri)
        _check_address("issuer", self.issuer)
        if self.issuer.endswith("/") or "?" in self.issuer:
            raise InvalidSetting(f"issuer is {self.issuer!r}: write it without query and without a slash at its end.")
        for name in ("access_token_seconds", "refresh_token_seconds"):
            seconds = getattr(self, name)
            if not 1 <= seconds <= LONGEST_LIFETIME:
                raise InvalidSetting(f"{name} is {seconds}: give 1 to {LONGEST_LIFETIME} seconds.")

    @property
    def access_token_lifetime(self) -> timedelta:
        return timedelta(seconds=self.access_token_seconds)

    @property
    def refresh_token_lifetime(self) -> timedelta:
        return timedelta(seconds=self.refresh_token_seconds)


def _check_address(name: str, address: str) -> None:
    way_out = "give an absolute http or https address without a fragment, such as http://127.0.0.1:8000/callback."
    try:
        parts = urlsplit(address)
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:
        usable = False
    # the origin goes into a header, Content-Security-Policy, where these would begin something else
    if not usable or "#" in address or re.search(r"[^\x21-\x7e]|[;,'\"<>\\]", address):
        raise InvalidSetting(f"{name} has {address!r}: {way_out}")
