"""A person who uses Dashtam over HTTP, reads their mail and goes to their bank: for the demo and the simulation."""

import asyncio
import re
import time
from collections import Counter
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit
from uuid import UUID, uuid4

import httpx

from dashtam.inbox import Inbox, Received

PATIENCE: Final = 60.0
"""Seconds until something that did not happen counts as gone wrong."""
LIMITS: Final = httpx.Limits(max_connections=100, keepalive_expiry=2.0)
"""Connections are given up well before servers do, after 5 seconds as a rule: else one closes just as it is used."""


class WentWrong(Exception):
    """What should have happened did not, or something else did."""


class Visitor:
    """Each request has a correlation id, the last one's is kept: everything that follows from it carries it."""

    def __init__(
        self, name: str, email: str, password: str, *, api: httpx.AsyncClient, bank: httpx.AsyncClient, inbox: Inbox
    ) -> None:
        self.name = name
        self.email = email
        self.password = password
        self.statuses: Counter[int] = Counter()
        self.correlation = uuid4()
        self.seconds = 0.0
        """How long the last request took."""
        self._api = api
        self._bank = bank
        self._inbox = inbox
        self._token: str | None = None

    async def ask(self, method: str, path: str, body: object = None, *, expect: int | None = None) -> httpx.Response:
        """Raises `WentWrong` for another status than is expected."""
        self.correlation = uuid4()
        headers = {"X-Correlation-ID": str(self.correlation)}
        if self._token is not None:
            headers["Authorization"] = f"Bearer {self._token}"
        begun = time.perf_counter()
        answer = await self._api.request(method, path, json=body, headers=headers)
        self.seconds = time.perf_counter() - begun
        self.statuses[answer.status_code] += 1
        if expect is not None and answer.status_code != expect:
            raise WentWrong(f"{self.name}: {method} {path} → {answer.status_code}, not {expect}: {answer.text[:300]}")
        return answer

    async def register(self, password: str | None = None, *, expect: int = 202) -> httpx.Response:
        return await self.ask(
            "POST", "/users", {"email": self.email, "password": password or self.password}, expect=expect
        )

    async def mail(self, subject: str, since: int = 0) -> Received:
        """The last mail with this subject, once there are more than `since`."""
        try:
            async with asyncio.timeout(PATIENCE):
                while True:
                    found = self.mails(subject)
                    if len(found) > since:
                        return found[-1]
                    await asyncio.sleep(0.05)
        except TimeoutError:
            raise WentWrong(f"{self.name}: no mail {subject!r} after {PATIENCE:g} s") from None

    def mails(self, subject: str) -> list[Received]:
        return [mail for mail in self._inbox.to(self.email) if mail.subject == subject]

    async def verify(self) -> httpx.Response:
        token = _token_in(await self.mail("Welcome to Dashtam"))
        return await self.ask("POST", "/email-verifications", {"token": token}, expect=204)

    async def log_in(self, password: str | None = None, *, expect: int = 201) -> httpx.Response:
        self._token = None
        body = {"email": self.email, "password": password or self.password}
        answer = await self.ask("POST", "/sessions", body, expect=expect)
        if answer.status_code == 201:
            self._token = answer.json()["access_token"]
        return answer

    async def log_out(self) -> httpx.Response:
        answer = await self.ask("DELETE", "/sessions/current", expect=204)
        self._token = None
        return answer

    async def change_password(self, password: str) -> httpx.Response:
        body = {"current_password": self.password, "new_password": password}
        answer = await self.ask("PUT", "/users/me/password", body, expect=204)
        self.password = password
        return answer

    async def forget_password(self) -> httpx.Response:
        self._token = None
        return await self.ask("POST", "/password-resets", {"email": self.email}, expect=202)

    async def reset_password(self, password: str, since: int = 0) -> httpx.Response:
        token = _token_in(await self.mail("Choose a new password", since))
        answer = await self.ask(
            "POST", "/password-resets/confirmation", {"token": token, "new_password": password}, expect=204
        )
        self.password = password
        return answer

    async def connect(self, decision: str = "allow", *, expect: int = 201) -> httpx.Response:
        """Go to the bank, say yes or no there, and come back."""
        started = await self.ask("POST", "/connections", {"provider_name": "sandbox"}, expect=201)
        url = started.json()["authorization_url"]
        # a browser of their own: in one that all share, the bank's cookie for one form is lost to the next
        async with httpx.AsyncClient(base_url=self._bank.base_url, timeout=PATIENCE) as browser:
            page = await browser.get(url)
            seal = re.search(r'name="seal" value="([^"]+)"', page.text)
            if seal is None:
                raise WentWrong(f"{self.name}: the bank shows no form at {url}: {page.status_code} {page.text[:300]}")
            form = {"seal": seal[1], "name": self.name, "password": "sandbox", "decision": decision}
            back = await browser.post(url, data=form)
        sent = {key: values[0] for key, values in parse_qs(urlsplit(back.headers.get("location", "")).query).items()}
        callback = {key: sent[key] for key in ("state", "code", "error") if key in sent}
        return await self.ask("POST", "/connections/callback", callback, expect=expect)

    async def at_bank(self, method: str, what: str, body: object = None) -> Any:
        """What the bank's control API does to this person's accounts, or what goes wrong with them."""
        answer = await self._bank.request(method, f"/sandbox/people/{self.name}/{what}".rstrip("/"), json=body)
        if not answer.is_success:
            raise WentWrong(f"{self.name}: {method} {what} at the bank → {answer.status_code}: {answer.text[:300]}")
        return answer.json() if answer.content else None

    async def connections(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = (await self.ask("GET", "/connections", expect=200)).json()
        return found

    async def sync(self, connection_id: UUID | str, *, expect: int = 202) -> httpx.Response:
        return await self.ask("POST", f"/connections/{connection_id}/sync", expect=expect)

    async def disconnect(self, connection_id: UUID | str) -> httpx.Response:
        return await self.ask("DELETE", f"/connections/{connection_id}", expect=204)


def _token_in(mail: Received) -> str:
    found = re.search(r"token=([\w=-]+)", mail.part("plain") or "")
    if found is None:
        raise WentWrong(f"the mail {mail.subject!r} holds no link with a token")
    return found[1]
