"""Dashtam and the sandbox bank at addresses of their own, and a real browser to look at them with."""

import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Final

import pytest
from playwright.async_api import Browser, Page, async_playwright
from served import PASSWORD, MailServer, Served, served

from dashtam.bootstrap import api_of
from dashtam.infrastructure.bank import SANDBOX
from dashtam.serving import HOST, bound, serving
from dashtam_sandbox_bank import Bank, BankSettings, create_bank

PATIENCE: Final = 15_000.0
"""Milliseconds until the browser counts what it waits for as not happening."""
CHROMIUM: Final = ("chromium", "chromium-browser", "google-chrome")


def address(door: socket.socket) -> str:
    return f"http://{HOST}:{door.getsockname()[1]}"


@dataclass(frozen=True, kw_only=True)
class Town:
    """Dashtam, and a bank in the same street."""

    dashtam: Served
    url: str
    bank: Bank
    bank_url: str

    async def sign_up(self, email: str) -> None:
        assert (await self.dashtam.register(email)).status_code == 202
        assert (await self.dashtam.verify(email)).status_code == 204


@asynccontextmanager
async def town(database_url: str, mail: MailServer | None = None) -> AsyncIterator[Town]:
    here, there = bound(0), bound(0)
    url, bank_url = address(here), address(there)
    provider = SANDBOX.model_copy(
        update={
            "authorize_url": f"{bank_url}/oauth/authorize",
            "token_url": f"{bank_url}/oauth/token",
            "revoke_url": f"{bank_url}/oauth/revoke",
            "api_url": f"{bank_url}/api",
        }
    )
    bank = create_bank(BankSettings(issuer=bank_url, redirect_uris=(f"{url}/connect/callback",)))
    async with (
        serving(bank, door=there, lifespan="off"),
        served(database_url, mail, public_url=url, providers=(provider,)) as dashtam,
        serving(api_of(dashtam.application), door=here, lifespan="off"),
    ):
        try:
            yield Town(dashtam=dashtam, url=url, bank=bank.state.bank, bank_url=bank_url)
        finally:
            dashtam.application.live.close()


def chromium_path() -> str:
    """Skips the test where there is no Chromium; in CI it fails."""
    for name in CHROMIUM:
        if (found := shutil.which(name)) is not None:
            return found
    reason = f"no {', '.join(CHROMIUM)} in PATH: install one, `apt-get install chromium` does"
    if os.environ.get("CI", "").lower() in {"true", "1"}:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


@asynccontextmanager
async def browsing() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(
            executable_path=chromium_path(),
            args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"],
        )
        try:
            yield browser
        finally:
            await browser.close()


@asynccontextmanager
async def page_of(browser: Browser, town: Town, *, javascript: bool = True, width: int = 1024) -> AsyncIterator[Page]:
    """A page of a browser that knows nothing yet. A policy that it had to enforce fails the test."""
    context = await browser.new_context(
        base_url=town.url, java_script_enabled=javascript, viewport={"width": width, "height": 900}
    )
    context.set_default_timeout(PATIENCE)
    page = await context.new_page()
    refused: list[str] = []
    page.on("console", lambda said: refused.append(said.text) if "Content Security Policy" in said.text else None)
    page.on("pageerror", lambda error: refused.append(str(error)))
    try:
        yield page
        assert refused == []
    finally:
        await context.close()


async def log_in(page: Page, email: str, password: str = PASSWORD) -> None:
    await page.goto("/login")
    await page.get_by_label("Email address").fill(email)
    await page.get_by_label("Password").fill(password)
    await page.get_by_role("button", name="Log in").click()


async def connect_bank(page: Page, name: str = "Ada") -> None:
    """From wherever somebody is logged in, by way of the bank, to the home page."""
    await page.goto("/connect")
    await page.get_by_role("button", name="Go to the bank").click()
    await page.get_by_label("Name").fill(name)
    await page.get_by_label("Password").fill("sandbox")
    await page.get_by_role("button", name="Allow").click()
    await page.wait_for_url("**/home?done=connected")
