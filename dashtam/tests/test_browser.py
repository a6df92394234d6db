"""Dashtam's pages in a real Chromium.

With SCREENSHOTS=1 in the environment the journey also writes what it sees to docs/images/home.png and
docs/images/consent.png.
"""

import os
import re
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from browsed import Town, browsing, connect_bank, log_in, page_of, town
from playwright.async_api import Browser, Page, expect
from served import PASSWORD, eventually, settle

from dashtam.application.sessions import LogIn
from dashtam.bootstrap import build

WRONG = "The address or the password is wrong, or the address is not confirmed yet."
pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ADA = "ada@example.com"
IMAGES = Path(__file__).parents[2] / "docs" / "images"


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with browsing() as running:
        yield running


@pytest.fixture
async def here(sqlite_url: str) -> AsyncIterator[Town]:
    async with town(sqlite_url) as running:
        yield running


@pytest.fixture
async def anywhere(database_url: str) -> AsyncIterator[Town]:
    """On each of the databases."""
    async with town(database_url) as running:
        yield running


async def screenshot(page: Page, name: str, *, full_page: bool = False) -> None:
    if os.environ.get("SCREENSHOTS"):
        IMAGES.mkdir(exist_ok=True)
        await page.screenshot(path=IMAGES / f"{name}.png", animations="disabled", full_page=full_page)


async def records(page: Page) -> int:
    return await page.locator("table.records tbody tr").count()


async def test_a_person_registers_confirms_logs_in_connects_a_bank_and_watches_what_follows(
    browser: Browser, anywhere: Town
) -> None:
    async with page_of(browser, anywhere) as page:
        await page.goto("/")
        await page.get_by_role("main").get_by_role("link", name="Register").click()
        await page.get_by_label("Email address").fill(ADA)
        await page.get_by_label("Password").fill(PASSWORD)
        await page.get_by_role("button", name="Register").click()
        await expect(page.get_by_role("status")).to_contain_text("mailbox")

        token = await anywhere.dashtam.token(ADA, "Welcome to Dashtam")
        await page.goto(f"/verify?token={token}")
        await page.get_by_role("button", name="Confirm the address").click()
        await expect(page.get_by_role("status")).to_contain_text("confirmed")

        await log_in(page, ADA)
        await page.wait_for_url("**/home")
        await page.get_by_role("main").get_by_role("link", name="Connect a bank").last.click()
        await page.get_by_role("button", name="Go to the bank").click()
        await expect(page).to_have_url(re.compile(f"^{re.escape(anywhere.bank_url)}/"))
        await page.get_by_label("Name").fill("Ada")
        await page.get_by_label("Password").fill("sandbox")
        await screenshot(page, "consent")
        await page.get_by_role("button", name="Allow").click()
        await page.wait_for_url("**/home?done=connected")

        for account in anywhere.bank.people.find("Ada").accounts:
            row = page.get_by_role("row", name=account.name).first
            await expect(row).to_contain_text(f"{account.balance:,f} {account.currency}")
        await expect(page.get_by_role("region", name="What followed").first).to_contain_text("Account sync succeeded")
        await screenshot(page, "home", full_page=True)

        # nothing is loaded anew: what happens elsewhere appears
        await settle(anywhere.dashtam.bus, 0)  # of what still followed from the connection, something would be newer
        await page.evaluate("window.untouched = true")
        before = await records(page)
        await anywhere.dashtam.log_in(ADA)

        async def grown() -> bool:
            return await records(page) > before

        await eventually(grown)
        await expect(page.locator("[aria-live=polite]")).to_contain_text("User login success")
        assert await page.evaluate("window.untouched") is True


async def test_what_another_process_commits_appears_without_a_reload(browser: Browser, anywhere: Town) -> None:
    await anywhere.sign_up(ADA)
    async with page_of(browser, anywhere) as page:
        await log_in(page, ADA)
        await page.wait_for_url("**/home")
        before = await records(page)
        elsewhere = build(
            anywhere.dashtam.application.settings
        )  # as another process has it: nobody anywhere hears of it
        async with elsewhere.running():
            await elsewhere.sessions.log_in(LogIn(email=ADA, password=PASSWORD))

            async def grown() -> bool:
                return await records(page) > before

            await eventually(grown)
        await elsewhere.database.engine.dispose()


async def test_the_keyboard_is_enough_to_log_in_and_out(browser: Browser, here: Town) -> None:
    await here.sign_up(ADA)
    async with page_of(browser, here) as page:

        async def tab_to(what: str) -> None:
            """Presses Tab until what has the focus has this id or this text."""
            for _ in range(30):
                await page.keyboard.press("Tab")
                focused = await page.evaluate("[document.activeElement.id, document.activeElement.innerText]")
                if what in focused:
                    return
            raise AssertionError(f"nobody gets to {what} by Tab")

        await page.goto("/login")
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        await page.keyboard.press("Enter")
        await tab_to("email")
        await page.keyboard.type(ADA)
        await tab_to("password")
        await page.keyboard.type(PASSWORD)
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/home")
        await tab_to("Log out")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/login?done=logged_out")


@pytest.mark.parametrize("javascript", [True, False])
async def test_a_wrong_password_is_told_by_an_alert_that_has_the_focus(
    browser: Browser, here: Town, javascript: bool
) -> None:
    await here.sign_up(ADA)
    async with page_of(browser, here, javascript=javascript) as page:
        await log_in(page, ADA, "not her password 1")
        alert = page.get_by_role("alert")
        await expect(alert).to_have_text(WRONG)
        await expect(alert).to_be_focused()
        field = page.get_by_label("Password")
        await expect(field).to_have_accessible_description(WRONG)
        await expect(page.get_by_label("Email address")).to_have_value(ADA)


async def test_a_session_revoked_elsewhere_ends_at_the_next_click(browser: Browser, here: Town) -> None:
    await here.sign_up(ADA)
    async with page_of(browser, here) as page, page_of(browser, here) as other:
        await log_in(page, ADA)
        await page.wait_for_url("**/home")
        await page.goto("/settings")  # unlike the home page it hears of nothing, and so does not leave by itself
        await log_in(other, ADA)
        await other.wait_for_url("**/home")
        await other.goto("/devices")
        await other.get_by_role("button", name="Log out the device").click()
        await expect(other.get_by_role("status")).to_have_text("That device is logged out.")

        await page.get_by_role("link", name="Devices").click()
        await page.wait_for_url("**/login")
        await other.get_by_role("link", name="Settings").click()
        await expect(other.get_by_role("heading", level=1)).to_have_text("Settings")


async def test_hostile_names_are_text(browser: Browser, here: Town) -> None:
    await here.sign_up(ADA)
    hostile = "<script>document.title='gotcha'</script><img src=x onerror=alert(1)>"
    here.bank.people.welcome("Ada").open("savings", name=hostile)
    async with page_of(browser, here) as page:
        asked: list[str] = []
        page.on("dialog", lambda dialog: asked.append(dialog.message))
        await log_in(page, ADA)
        await page.wait_for_url("**/home")
        await connect_bank(page)
        link = page.get_by_role("link", name=hostile)
        await expect(link).to_be_visible()
        await link.click()
        await expect(page.get_by_role("heading", level=1)).to_have_text(hostile)
        assert "gotcha" in await page.title()  # as text, with the tags around it
        assert "<script>" in await page.title()
        assert asked == []


async def test_everything_works_without_javascript_on_a_narrow_screen(browser: Browser, anywhere: Town) -> None:
    await anywhere.sign_up(ADA)
    async with page_of(browser, anywhere, javascript=False, width=320) as page:
        await log_in(page, ADA)
        await page.wait_for_url("**/home")
        await connect_bank(page)

        async def fetched() -> bool:
            await page.goto("/home")
            return await page.locator("td.number").count() > 0

        await eventually(fetched)
        await page.get_by_role("button", name="Sync Sandbox Bank now").click()
        await expect(page.get_by_role("status")).to_contain_text("being asked")
        for path in ("/", "/home", "/connect", "/devices", "/password", "/settings"):
            await page.goto(path)
            assert await page.locator("h1").count() == 1
            assert await page.locator("html").get_attribute("lang") == "en"
            box = await page.locator("main").bounding_box()
            assert box is not None
            assert box["x"] + box["width"] <= 320, path
        await page.get_by_role("button", name="Log out").click()
        await page.wait_for_url("**/login?done=logged_out")
