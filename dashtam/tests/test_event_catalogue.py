"""The catalogue that is kept is of the events that there are, and of what is stored of them."""

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from banked import banked
from browsed import PATIENCE, browsing
from catalogued import KEPT, MAP, PAGE, ROOT, dashtam
from playwright.async_api import Page
from served import PASSWORD
from sqlalchemy import select

from whereupon.catalogue import Catalogue, Level, as_text
from whereupon.schema import log

WAY_OUT = "If the change is meant, `make catalogue` writes it down"


@pytest.fixture(scope="module")
def catalogue() -> Catalogue:
    return dashtam()


@pytest.fixture(scope="module")
def kept() -> Any:
    return json.loads(KEPT.read_text(encoding="utf-8"))


@pytest.mark.unit
def test_events_and_handlers_are_as_the_kept_catalogue_says(catalogue: Catalogue, kept: Any) -> None:
    changes = [f"{change.level}: {change}" for change in catalogue.changes_since(kept)]
    assert not changes, "\n".join([*changes, WAY_OUT])
    assert KEPT.read_text(encoding="utf-8") == as_text(catalogue.asyncapi()), WAY_OUT


@pytest.mark.unit
def test_the_page_shows_the_map_as_it_is(catalogue: Catalogue) -> None:
    assert MAP.findall(PAGE.read_text(encoding="utf-8")) == [catalogue.mermaid()], WAY_OUT


@pytest.mark.unit
def test_a_field_that_the_kept_catalogue_knows_and_the_code_does_not_is_breaking(
    catalogue: Catalogue, kept: Any
) -> None:
    schema = kept["components"]["schemas"]["AccountCreated"]
    schema = {**schema, "properties": {**schema["properties"], "iban": {"type": "string"}}}
    schemas = kept["components"]["schemas"] | {"AccountCreated": schema}
    [change] = catalogue.changes_since(kept | {"components": kept["components"] | {"schemas": schemas}})
    assert (change.level, change.event, change.field) == (Level.BREAKING, "AccountCreated", "iban")


@pytest.mark.unit
def test_the_kept_catalogue_is_asyncapi_as_its_official_schema_has_it(kept: Any) -> None:
    official = json.loads((ROOT / "tests" / "asyncapi" / "3.0.0.json").read_text(encoding="utf-8"))
    assert [error.message for error in jsonschema.Draft7Validator(official).iter_errors(kept)] == []
    assert {operation["action"] for operation in kept["operations"].values()} == {"send", "receive"}
    assert len(kept["x-whereupon-workflows"]) == 14


@pytest.mark.integration
async def test_what_people_do_is_stored_as_the_catalogue_says(catalogue: Catalogue, kept: Any, sqlite_url: str) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        await here.connected(ada)
        await here.dashtam.log_in("ada@example.com", "not her password")
        body = {"current_password": PASSWORD, "new_password": "another good password 7"}
        assert (await ada("PUT", "/users/me/password", json=body)).status_code == 204
        async with here.dashtam.bus.engine.connect() as connection:
            rows = (await connection.execute(select(log.c.type, log.c.payload, log.c.headers))).all()
    headers = kept["components"]["messageTraits"]["stored"]["headers"]
    for row in rows:
        schema = catalogue.json_schema(row.type)
        validator = jsonschema.Draft202012Validator(schema, format_checker=jsonschema.FormatChecker())
        payload = json.loads(row.payload)
        validator.validate(payload)
        jsonschema.Draft7Validator({"$ref": f"#/components/schemas/{row.type}", **kept}).validate(payload)
        jsonschema.Draft7Validator(headers).validate(json.loads(row.headers))
        for name in schema["required"]:
            assert not validator.is_valid({key: value for key, value in payload.items() if key != name})
            assert not validator.is_valid(payload | {name: []})
    assert len({row.type for row in rows}) > 15


@asynccontextmanager
async def opened(folder: Path) -> AsyncIterator[Page]:
    """The first page, from the disk; whatever a page's policy refuses fails the test."""
    async with browsing() as browser:
        page = await browser.new_page(color_scheme="dark")
        page.set_default_timeout(PATIENCE)
        said: list[str] = []
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        asked: list[str] = []
        page.on("request", lambda request: asked.append(request.url))
        await page.goto((folder / "index.html").as_uri())
        yield page
        assert said == []
        assert all(url.startswith(folder.as_uri()) for url in asked)


@pytest.mark.integration
@pytest.mark.slow
async def test_the_pages_are_searched_and_read_by_keyboard_from_the_disk(catalogue: Catalogue, tmp_path: Path) -> None:
    catalogue.write_site(tmp_path)
    async with opened(tmp_path) as page:
        await page.keyboard.press("/")
        await page.keyboard.type("transaction_count")
        assert await page.get_by_role("listitem").filter(visible=True).all_inner_texts() == ["TransactionSyncSucceeded"]
        assert await page.get_by_text("1 of 47 events").is_visible()
        await page.keyboard.press("Tab")
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/event-TransactionSyncSucceeded.html")
        assert await page.get_by_role("cell", name="required").count() == 3
        dark = await page.evaluate("getComputedStyle(document.body).backgroundColor")
        await page.emulate_media(color_scheme="light")
        assert await page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
        await page.get_by_role("link", name="Map and handlers").press("Enter")
        await page.wait_for_url("**/map.html")
        await page.locator("svg").get_by_role("link", name="TokenRefreshFailed").focus()
        await page.keyboard.press("Enter")
        await page.wait_for_url("**/event-TokenRefreshFailed.html")
        assert await page.get_by_text("ReauthorizationReaction.alert_user").is_visible()
