"""The dashboard in a real Chromium.

With SCREENSHOTS=1 in the environment it also writes docs/images/dashboard-*.png.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from playwright.async_api import Browser, Page, async_playwright, expect
from starlette.applications import Starlette
from starlette.routing import Mount

from tests.lighthouse import FogRose, Lighthouse, ShipMoored, ShipSighted, lighthouse
from whereupon import gauges

pytestmark = [pytest.mark.integration, pytest.mark.slow]

IMAGES = Path(__file__).parents[1] / "docs" / "images"
PAGES = (
    "", "events", "map", "handlers", "dead", "workflows", "catalogue", "audit", "actions", "checkup", "canaries",
    "pause?name=keep_log", "nowhere",
)  # fmt: skip
CONTRAST = """() => {
    const channel = (c) => { c /= 255; return c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4; };
    const light = (rgb) => 0.2126 * channel(rgb[0]) + 0.7152 * channel(rgb[1]) + 0.0722 * channel(rgb[2]);
    const parsed = (text) => text.match(/[\\d.]+/g).map(Number);
    const behind = (element) => {
        for (; element; element = element.parentElement) {
            const found = parsed(getComputedStyle(element).backgroundColor);
            if (found.length < 4 || found[3] > 0) return found;
        }
        return [255, 255, 255];
    };
    const bad = [];
    for (const element of document.querySelectorAll("body *")) {
        const own = [...element.childNodes].some((node) => node.nodeType === 3 && node.textContent.trim());
        if (!own || element.closest("svg, .skip, datalist, option") || !element.getClientRects().length) continue;
        const pair = [light(parsed(getComputedStyle(element).color)), light(behind(element))].sort((a, b) => b - a);
        const ratio = (pair[0] + 0.05) / (pair[1] + 0.05);
        if (ratio < 4.5) bad.push(element.tagName + " " + element.className + " " + ratio.toFixed(2));
    }
    return bad;
}"""
"""Text whose contrast to what is behind it is below 4.5 to 1 (WCAG 2.2, 1.4.3)."""
UNNAMED = """() => [...document.querySelectorAll(
    "input:not([type=hidden]), select, textarea, button, a, svg[role], [role=region]")]
    .filter((e) => !((e.labels && e.labels.length) || e.getAttribute("aria-label") || e.getAttribute("aria-labelledby")
        || e.textContent.trim()))
    .map((e) => e.outerHTML)"""
"""What has no name that a screen reader could say."""


def chromium_path() -> str:
    """Skips the test where there is no Chromium; in CI it fails."""
    for name in ("chromium", "chromium-browser", "google-chrome"):
        if (found := shutil.which(name)) is not None:
            return found
    reason = "no chromium, chromium-browser or google-chrome in PATH: install one, `apt-get install chromium` does"
    if os.environ.get("CI", "").lower() in {"true", "1"}:
        pytest.fail(reason, pytrace=False)
    pytest.skip(reason)


class Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


@asynccontextmanager
async def served(app: Any) -> AsyncIterator[str]:
    door = socket.create_server(("127.0.0.1", 0))
    server = Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
    serving = asyncio.create_task(server.serve([door]))
    try:
        yield f"http://127.0.0.1:{door.getsockname()[1]}/admin/whereupon/"
    finally:
        server.should_exit = True
        await serving


@pytest.fixture
async def browser() -> AsyncIterator[Browser]:
    async with async_playwright() as playwright:
        running = await playwright.chromium.launch(
            executable_path=chromium_path(),
            args=["--no-sandbox", "--disable-background-networking", "--disable-gpu"],
        )
        yield running
        await running.close()


@pytest.fixture
async def house(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Lighthouse, str]]:
    monkeypatch.setattr(gauges, "PATIENCE", 60.0)
    async with lighthouse(sqlite_url) as running:
        await running.wreck("Mary Rose", "Vasa")
        ships = [ShipSighted(name=f"ship {n}") for n in range(20)]
        for ship in ships:
            await running.publish(ship, ShipMoored(name=ship.name), actor="keeper")
        await running.bus.wait_settled(ships, 30)
        async with served(Starlette(routes=[Mount("/admin/whereupon", running.board)])) as url:
            try:
                yield running, url
            finally:
                await running.board.close()


@asynccontextmanager
async def page_of(browser: Browser, url: str, **options: Any) -> AsyncIterator[Page]:
    """A page of a browser that knows nothing yet; what it complains of, or asks of another host, fails the test."""
    context = await browser.new_context(base_url=url, viewport={"width": 1200, "height": 800}, **options)
    context.set_default_timeout(30_000)
    page = await context.new_page()
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text) if message.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url) if not _own(request.url, url) else None)
    try:
        yield page
        # a page that is not there is told as one by the console, too
        assert [line for line in said if "404 (Not Found)" not in line and "409 (Conflict)" not in line] == []
    finally:
        await context.close()


def _own(address: str, url: str) -> bool:
    return address.startswith((url, "data:"))


async def screenshot(page: Page, name: str) -> None:
    if os.environ.get("SCREENSHOTS"):
        # without the footer, which names the database of this machine
        await page.evaluate("document.querySelector('footer').hidden = true")
        ends = int(await page.evaluate("document.querySelector('main').getBoundingClientRect().bottom")) + 16
        clip: Any = {"x": 0, "y": 0, "width": 1200, "height": min(800, ends)}
        await page.screenshot(path=IMAGES / f"dashboard-{name}.png", animations="disabled", clip=clip)


async def test_every_page_is_readable_light_and_dark_and_breaks_no_rule_of_the_browser(
    browser: Browser, house: tuple[Lighthouse, str]
) -> None:
    _, url = house
    papers = []
    for scheme in ("light", "dark"):
        async with page_of(browser, url, color_scheme=scheme) as page:
            for path in PAGES:
                await page.goto(path or "./")
                assert await page.evaluate(CONTRAST) == [], (path, scheme)
                assert await page.evaluate(UNNAMED) == [], path
                assert await page.locator("h1").count() == 1
                assert await page.locator("html[lang=en] main").count() == 1
            papers.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
            if scheme == "light":
                await page.goto("./")
                await expect(page.get_by_role("img", name="events published")).to_be_visible()
                await screenshot(page, "overview")
                await page.goto("map")
                await screenshot(page, "map")
            else:
                await page.goto("dead")
                await screenshot(page, "dead")
    assert papers[0] != papers[1]


async def test_figures_that_are_being_read_come_by_themselves(
    browser: Browser, house: tuple[Lighthouse, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    running, url = house
    monkeypatch.setattr(gauges, "PATIENCE", 0.02)
    wait = asyncio.Event()
    measured = running.board._gauges._measured

    async def slowly() -> gauges.Reading:
        await wait.wait()
        return await measured()

    monkeypatch.setattr(running.board._gauges, "_measured", slowly)
    async with page_of(browser, url) as page:
        for path, figure in (("./", "Waits longest"), ("map", "of the newest")):
            running.board._gauges._reading = None
            wait.clear()
            await page.goto(path)
            await expect(page.get_by_text("The figures are being read")).to_be_visible()
            wait.set()
            await expect(page.get_by_text(figure).first).to_be_visible()


async def test_the_stream_shows_an_event_that_is_published_meanwhile(
    browser: Browser, house: tuple[Lighthouse, str]
) -> None:
    running, url = house
    async with page_of(browser, url) as page:
        async with page.expect_response("**/stream*"):
            await page.goto("events?type=FogRose")
        await expect(page.get_by_role("button", name="Hold still")).to_be_visible()
        fog = FogRose(metres=12)
        for _ in range(100):  # until it watches
            await running.publish(FogRose(metres=1), ShipMoored(name="not asked for"))
            if await page.locator("tr.fresh").count():
                break
            await asyncio.sleep(0.2)
        await running.publish(fog)
        row = page.locator(f'tr.fresh a[href$="{fog.event_id}"]')
        await expect(row).to_be_visible()
        await expect(page.locator("tbody")).not_to_contain_text("ShipMoored")
        await page.get_by_role("button", name="Hold still").click()
        await running.publish(FogRose(metres=13))
        await expect(page.get_by_role("status")).to_contain_text("1 new since")
        await screenshot(page, "events")
        await row.click()
        await expect(page.get_by_role("heading", level=1)).to_have_text("FogRose")
        await screenshot(page, "story")


async def test_dead_letters_are_retried_by_the_keyboard_alone(browser: Browser, house: tuple[Lighthouse, str]) -> None:
    running, url = house

    async with page_of(browser, url) as page:

        async def tab_to(what: str) -> None:
            for _ in range(60):
                await page.keyboard.press("Tab")
                focused = await page.evaluate("[document.activeElement.id, document.activeElement.innerText]")
                if what in focused:
                    return
            raise AssertionError(f"nobody gets to {what} by Tab")

        await page.goto("./")
        await page.keyboard.press("Tab")
        await expect(page.get_by_role("link", name="Skip to the content")).to_be_focused()
        await tab_to("Dead letters")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("heading", level=1)).to_have_text("Dead letters")
        await tab_to("Retry…")
        await page.keyboard.press("Enter")
        await expect(page.get_by_label("Why")).to_be_focused()
        await page.keyboard.type("they have wireless now")
        await screenshot(page, "plan")
        await page.keyboard.press("Enter")
        await expect(page.get_by_role("status").first).to_have_text("Delivered again: 2.")
    assert [a.reason for a in await running.bus.operator.actions()] == ["they have wireless now"] * 2


async def test_without_javascript_everything_is_there_to_read_and_to_do(
    browser: Browser, house: tuple[Lighthouse, str]
) -> None:
    running, url = house
    async with page_of(browser, url, java_script_enabled=False) as page:
        await page.goto("./")
        for name in ("Events", "Map", "Handlers", "Dead letters", "Catalogue", "Audit"):
            await page.get_by_role("navigation").get_by_role("link", name=name).click()
            await expect(page.get_by_role("navigation").get_by_role("link", name=name)).to_have_attribute(
                "aria-current", "page"
            )
        await page.goto("handlers")
        await page.get_by_role("link", name="Pause keep_log").click()
        await page.get_by_label("Why").fill("it is full")
        await page.get_by_role("button", name="Pause it").click()
        await expect(page.get_by_role("status")).to_contain_text("Paused")
    assert [h.paused_because for h in await running.bus.operator.handlers() if h.paused] == ["it is full"]
