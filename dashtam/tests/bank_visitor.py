"""The sandbox bank in this process, and what a browser and a client do with it."""

import re
from base64 import b64encode
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import httpx
from authlib.oauth2.rfc7636 import create_s256_code_challenge  # type: ignore[import-untyped]

from dashtam_sandbox_bank import Bank, BankSettings, create_bank

ISSUER = "http://bank.example"
CALLBACK = "http://dashtam.example/callback"
SETTINGS = BankSettings(
    client_id="dashtam", client_secret="top-secret", redirect_uris=(CALLBACK, f"{CALLBACK}?at=home"), issuer=ISSUER
)
VERIFIER = sha256(b"verifier").hexdigest()
CREDENTIALS = httpx.BasicAuth("dashtam", "top-secret")


@dataclass
class Clock:
    now: datetime = field(default_factory=lambda: datetime(2026, 11, 1, tzinfo=UTC))

    def __call__(self) -> datetime:
        return self.now

    def advance(self, **delta: float) -> None:
        self.now += timedelta(**delta)


def question(**changes: str | None) -> str:
    """The path with which a client sends a browser to the bank; None leaves a parameter out."""
    parameters = {
        "response_type": "code",
        "client_id": "dashtam",
        "redirect_uri": CALLBACK,
        "scope": "accounts transactions",
        "state": "state of mind",
        "code_challenge": create_s256_code_challenge(VERIFIER),
        "code_challenge_method": "S256",
    } | changes
    return "/oauth/authorize?" + urlencode({name: value for name, value in parameters.items() if value is not None})


def told(response: httpx.Response) -> dict[str, str]:
    """What the browser is sent back with."""
    assert response.status_code == 303, response.text
    return {name: values[0] for name, values in parse_qs(urlsplit(response.headers["location"]).query).items()}


def sealed(page: httpx.Response) -> str:
    """The hidden field of its forms."""
    found = re.search(r'name="seal" value="([^"]+)"', page.text)
    assert found is not None, page.text
    return found[1]


@dataclass
class Visitor:
    bank: Bank
    clock: Clock
    http: httpx.AsyncClient

    async def decide(self, path: str, name: str = "Ada", password: str = "sandbox", **form: str) -> httpx.Response:
        page = await self.http.get(path)
        fields = {"seal": sealed(page), "name": name, "password": password, "decision": "allow"} | form
        return await self.http.post(path, data=fields)

    async def code(self, name: str = "Ada", **changes: str | None) -> str:
        return told(await self.decide(question(**changes), name))["code"]

    async def exchange(
        self, code: str, changes: Mapping[str, str] | None = None, *, header: bool = True
    ) -> httpx.Response:
        """With `header` the client proves itself there."""
        form = {
            "grant_type": "authorization_code",
            "code": code,
            "redirect_uri": CALLBACK,
            "code_verifier": VERIFIER,
        }
        credentials = CREDENTIALS if header else httpx.USE_CLIENT_DEFAULT
        return await self.http.post("/oauth/token", data=form | dict(changes or {}), auth=credentials)

    async def refresh(self, refresh_token: str, **changes: str) -> httpx.Response:
        form = {"grant_type": "refresh_token", "refresh_token": refresh_token} | changes
        return await self.http.post("/oauth/token", data=form, auth=CREDENTIALS)

    async def connect(self, name: str = "Ada", **changes: str | None) -> dict[str, Any]:
        response = await self.exchange(await self.code(name, **changes))
        assert response.status_code == 200, response.text
        tokens: dict[str, Any] = response.json()
        return tokens

    async def get(self, path: str, access_token: str) -> httpx.Response:
        return await self.http.get(path, headers={"authorization": f"Bearer {access_token}"})

    async def accounts(self, access_token: str) -> list[dict[str, Any]]:
        response = await self.get("/api/accounts", access_token)
        assert response.status_code == 200, response.text
        accounts: list[dict[str, Any]] = response.json()["accounts"]
        return accounts


@asynccontextmanager
async def visiting(settings: BankSettings = SETTINGS) -> AsyncIterator[Visitor]:
    clock = Clock()
    app = create_bank(settings, clock=clock)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url=ISSUER) as http:
        yield Visitor(app.state.bank, clock, http)


def basic(client_id: bytes, secret: bytes) -> dict[str, str]:
    return {"authorization": "Basic " + b64encode(client_id + b":" + secret).decode()}
