"""The pages over plain HTTP, as a browser without JavaScript has them."""

import html
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any
from urllib.parse import urlencode, urlsplit
from uuid import uuid4

import httpx
import pytest
from banked import Banked, banked
from served import PASSWORD, MailServer, Served, eventually, served
from sqlalchemy import select

from dashtam.bootstrap import api_of
from dashtam.domain.audit import AuditAction
from whereupon.audit import audit_log

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ADA = "ada@example.com"
OTHER_PASSWORD = "battery staple 8"
HTML = {"accept": "text/html,application/xhtml+xml;q=0.9,*/*;q=0.8"}
INSIDE = (
    "/home",
    "/home/accounts",
    "/home/followed",
    f"/home/accounts/{uuid4()}",
    "/connect",
    "/connect/callback?state=x&code=y",
    "/devices",
    "/password",
    "/settings",
    "/live",
    "/admin",
    "/admin/followed",
    f"/admin/users/{uuid4()}",
)
OUTSIDE = ("/", "/register", "/verify?token=x", "/login", "/forgot", "/reset?token=x")
FORMS: tuple[tuple[str, dict[str, str]], ...] = (
    ("/register", {"email": "eve@example.com", "password": PASSWORD}),
    ("/verify", {"token": "x"}),
    ("/login", {"email": ADA, "password": PASSWORD}),
    ("/forgot", {"email": ADA}),
    ("/reset", {"token": "x", "password": OTHER_PASSWORD}),
)
INNER_FORMS: tuple[tuple[str, dict[str, str]], ...] = (
    ("/logout", {}),
    ("/connect", {"provider": "sandbox"}),
    ("/devices/revoke", {}),
    (f"/devices/{uuid4()}/revoke", {}),
    ("/password", {"current_password": PASSWORD, "new_password": OTHER_PASSWORD}),
    ("/settings", {"currency": "CHF", "language": "de"}),
    (f"/home/connections/{uuid4()}/sync", {}),
    (f"/home/connections/{uuid4()}/disconnect", {}),
    (f"/admin/users/{uuid4()}/password", {"password": OTHER_PASSWORD}),
)


class Browser:
    """Keeps cookies, and sends forms with the token of the page that it saw them on."""

    def __init__(self, dashtam: Served, base_url: str = "http://dashtam.example", **headers: str) -> None:
        transport = httpx.ASGITransport(api_of(dashtam.application))
        self.http = httpx.AsyncClient(transport=transport, base_url=base_url, headers=HTML | headers)
        self.dashtam = dashtam

    async def get(self, path: str, **headers: str) -> httpx.Response:
        return await self.http.get(path, headers=headers)

    async def send(self, page: str, path: str | None = None, **fields: str) -> httpx.Response:
        return await self.http.post(path or page, data={"form_token": token(await self.get(page))} | fields)

    async def log_in(self, email: str = ADA, password: str = PASSWORD) -> httpx.Response:
        return await self.send("/login", email=email, password=password)

    async def sign_up(self, email: str = ADA) -> None:
        assert (await self.dashtam.register(email)).status_code == 202
        assert (await self.dashtam.verify(email)).status_code == 204
        assert (await self.log_in(email)).headers["location"] == "/home"


def token(page: httpx.Response) -> str:
    found = re.search(r'name="form_token" value="([0-9a-f]{64})"', page.text)
    assert found is not None, page.text
    return found[1]


def alert(page: httpx.Response) -> str:
    found = re.search(r'role="alert" tabindex="-1" autofocus><p>(.*?)</p>', page.text)
    assert found is not None, page.text
    return html.unescape(found[1])


@asynccontextmanager
async def browsers(
    database_url: str, mail: MailServer | None = None, *, base_url: str = "http://dashtam.example", **settings: Any
) -> AsyncIterator[Browser]:
    async with served(database_url, mail, **settings) as dashtam:
        browser = Browser(dashtam, base_url)
        async with browser.http:
            yield browser


def assert_is_page(page: httpx.Response, status: int = 200) -> None:
    assert page.status_code == status, page.text
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    policy = page.headers["content-security-policy"]
    for part in ("default-src 'none'", "script-src 'self'", "style-src 'self'", "frame-ancestors 'none'"):
        assert part in policy
    assert "base-uri 'none'" in policy
    assert "unsafe" not in policy
    assert page.headers["referrer-policy"] == "no-referrer"
    assert page.headers["x-content-type-options"] == "nosniff"
    assert page.headers["cache-control"] == "no-store"
    assert page.text.count("<h1>") == 1
    assert '<html lang="en">' in page.text
    assert "<style" not in page.text
    assert " style=" not in page.text
    assert re.findall(r"<script(?! src=)", page.text) == []
    ids = re.findall(r'\bid="([^"]+)"', page.text)
    assert len(ids) == len(set(ids))
    labelled = set(re.findall(r'<label for="([^"]+)"', page.text))
    inputs = re.findall(r'<(?:input|select)(?![^>]*type="hidden")(?![^>]*aria-hidden)[^>]*\bid="([^"]+)"', page.text)
    assert set(inputs) <= labelled
    pointed_at = re.findall(r'aria-(?:describedby|labelledby)="([^"]+)"', page.text)
    described = {word for words in pointed_at for word in words.split()}
    assert described <= set(ids)


async def test_pages_for_anybody_have_headers_landmarks_and_labels(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        for path in OUTSIDE:
            assert_is_page(await browser.get(path))


async def test_what_somebody_does_is_audited_as_theirs_on_pages_and_over_the_api(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        eve = await browser.dashtam.sign_up("eve@example.com")
        assert (await eve("DELETE", "/sessions/current")).status_code == 204
        await browser.sign_up()
        await browser.send("/home", "/logout")
        async with browser.dashtam.application.database.get_session() as session:
            trail = (await session.execute(select(audit_log.c.action, audit_log.c.actor, audit_log.c.user_id))).all()
    logged_out = [row for row in trail if row.action == AuditAction.USER_LOGOUT]
    assert [row.actor for row in logged_out] == [str(row.user_id) for row in logged_out]
    assert len({row.actor for row in logged_out}) == 2
    assert {row.actor for row in trail if row.action == AuditAction.USER_LOGIN_SUCCESS} == {None}


async def test_every_other_page_sends_those_who_are_not_logged_in_to_the_login(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        for cookie in ("", "nonsense", f"{uuid4()}.secret", "{}.x"):
            if cookie:
                browser.http.cookies.set("dashtam_session", cookie)
            for path in INSIDE:
                answer = await browser.get(path)
                assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
            for path, fields in INNER_FORMS:
                answer = await browser.http.post(path, data=fields)
                assert (answer.status_code, answer.headers["location"]) == (303, "/login"), path
        part = await browser.get("/home/followed", **{"hx-request": "true"})
        assert (part.status_code, part.headers["hx-redirect"], part.text) == (401, "/login", "")


async def test_pages_inside_have_headers_landmarks_and_labels(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()

        async def settings_are_there() -> bool:
            return (await browser.get("/settings")).status_code == 200

        await eventually(settings_are_there)
        for path in ("/", "/home", "/connect", "/devices", "/password", "/settings"):
            assert_is_page(await browser.get(path))
        for path in ("/admin", f"/admin/users/{uuid4()}", "/admin/followed", "/live?of=everybody"):
            page = await browser.get(path)
            assert_is_page(page, 403)
            assert alert(page) == "Only an administrator may do this."
        for path in (f"/home/accounts/{uuid4()}", "/home/accounts/x", "/nowhere"):
            assert_is_page(await browser.get(path), 404)


async def test_the_whole_way_in_and_out_by_forms(database_url: str) -> None:
    async with browsers(database_url) as browser:
        answer = await browser.send("/register", email=ADA, password=PASSWORD)
        assert answer.headers["location"] == "/login?done=registered"
        assert "mailbox" in (await browser.get("/login?done=registered")).text
        answer = await browser.log_in()
        assert_is_page(answer, 401)
        assert alert(answer).endswith("the address is not confirmed yet.")

        link = f"/verify?token={await browser.dashtam.token(ADA, 'Welcome to Dashtam')}"
        for _ in range(2):  # whatever follows links confirms nothing
            assert_is_page(await browser.get(link))
        assert (await browser.log_in()).status_code == 401
        mailed = link.partition("=")[2]
        assert (await browser.send(link, "/verify", token=mailed)).headers["location"] == "/login?done=verified"
        again = await browser.send(link, "/verify", token=mailed)
        assert_is_page(again, 422)
        assert "works once" in alert(again)

        assert (await browser.log_in()).headers["location"] == "/home"
        assert (await browser.get("/login")).headers["location"] == "/home"
        assert "User login success" in (await browser.get("/home")).text
        assert (await browser.send("/home", "/logout")).headers["location"] == "/login?done=logged_out"
        assert "dashtam_session" not in browser.http.cookies
        assert (await browser.get("/home")).headers["location"] == "/login"


async def test_a_password_is_forgotten_reset_and_changed(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()
        other = Browser(browser.dashtam)
        async with other.http:
            for address in (ADA, "nobody@example.com"):
                assert (await other.send("/forgot", email=address)).headers["location"] == "/login?done=asked"
            mailed = await browser.dashtam.token(ADA, "Choose a new password")
            page = f"/reset?token={mailed}"
            weak = await other.send(page, "/reset", token=mailed, password="short")
            assert_is_page(weak, 422)
            assert 'aria-invalid="true"' in weak.text
            answer = await other.send(page, "/reset", token=mailed, password=OTHER_PASSWORD)
            assert answer.headers["location"] == "/login?done=reset"
        assert (await browser.get("/home")).headers["location"] == "/login"

        assert (await browser.log_in(password=OTHER_PASSWORD)).headers["location"] == "/home"
        wrong = await browser.send("/password", current_password=PASSWORD, new_password=PASSWORD)
        assert_is_page(wrong, 403)
        assert alert(wrong) == "That is not your present password."
        right = await browser.send("/password", current_password=OTHER_PASSWORD, new_password=PASSWORD)
        assert right.headers["location"] == "/login?done=changed"
        assert (await browser.log_in()).headers["location"] == "/home"


@pytest.mark.parametrize(("url", "secure"), [("http://dashtam.example", False), ("https://dashtam.example", True)])
async def test_the_cookie_is_a_secret_that_scripts_and_other_sites_do_not_get(
    sqlite_url: str, url: str, secure: bool
) -> None:
    async with browsers(sqlite_url, base_url=url, public_url=url) as browser:
        assert "dashtam_session" not in (await browser.get("/login")).headers["set-cookie"]
        await browser.sign_up()
        cookie, *attributes = (
            (await browser.send("/", "/login", email=ADA, password=PASSWORD)).headers["set-cookie"].split("; ")
        )
        assert re.fullmatch(r"dashtam_session=[0-9a-f-]{36}\.0\.[\w-]{43}", cookie)
        assert {"HttpOnly", "SameSite=lax", "Path=/", "Max-Age=2592000"} <= set(attributes)
        assert ("Secure" in attributes) is secure
        assert cookie.partition("=")[2] not in (await browser.get("/home")).text


async def test_a_form_without_its_token_is_refused_and_does_nothing(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.dashtam.register(ADA)
        await browser.dashtam.verify(ADA)
        outside = token(await browser.get("/login"))
        for path, fields in FORMS:
            for given in ({}, {"form_token": ""}, {"form_token": "é" * 64}, {"form_token": outside[:-1] + "g"}):
                answer = await browser.http.post(path, data=fields | given)
                assert_is_page(answer, 403)
                assert "Nothing was changed" in alert(answer)
                assert 'href="/"' in answer.text
        assert "dashtam_session" not in browser.http.cookies

        await browser.log_in()
        for path, fields in INNER_FORMS:
            for given in ({}, {"form_token": outside}):  # one of before the login is none of this session
                assert_is_page(await browser.http.post(path, data=fields | given), 403)
        assert (await browser.get("/home")).status_code == 200
        files = {"form_token": ("x.txt", token(await browser.get("/home")))}
        assert (await browser.http.post("/logout", files=files)).status_code in (400, 403)
        assert (await browser.get("/home")).status_code == 200


async def test_the_token_of_one_session_is_worth_nothing_in_another(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()
        eve = Browser(browser.dashtam)
        async with eve.http:
            await eve.sign_up("eve@example.com")
            stolen = token(await eve.get("/home"))
            assert (await browser.http.post("/logout", data={"form_token": stolen})).status_code == 403
            visitor = Browser(browser.dashtam)
            async with visitor.http:
                planted = token(await visitor.get("/login"))
                other = Browser(browser.dashtam)
                async with other.http:
                    fields = {"form_token": planted, "email": "eve@example.com", "password": PASSWORD}
                    assert (await other.http.post("/login", data=fields)).status_code == 403


async def test_a_session_that_is_revoked_is_over_at_the_next_request(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()
        phone = Browser(browser.dashtam, **{"user-agent": "<b>phone</b>"})
        async with phone.http:
            assert (await phone.log_in()).headers["location"] == "/home"
            page = await browser.get("/devices")
            assert "&lt;b&gt;phone&lt;/b&gt;" in page.text
            assert "<b>phone" not in page.text
            actions = set(re.findall(r'action="(/devices/[0-9a-f-]{36}/revoke)"', page.text))
            mine = re.search(r"\(this one\).*?action=\"([^\"]+)\"", page.text, re.DOTALL)
            assert mine is not None
            (phones,) = actions - {mine[1]}
            # somebody else's session is not there for her
            eve = Browser(browser.dashtam)
            async with eve.http:
                await eve.sign_up("eve@example.com")
                assert_is_page(await eve.send("/devices", phones), 404)
            assert (await phone.get("/home")).status_code == 200
            assert (await browser.send("/devices", phones)).headers["location"] == "/devices?done=revoked"
            assert (await phone.get("/home")).headers["location"] == "/login"
            assert "dashtam_session" not in phone.http.cookies
            await phone.log_in()
            assert (await browser.send("/devices", "/devices/revoke")).headers["location"] == "/login?done=all_revoked"
            for each in (browser, phone):
                assert (await each.get("/home")).headers["location"] == "/login"


async def test_what_was_written_is_shown_as_text(sqlite_url: str) -> None:
    hostile = '"><script>alert(1)</script>@example.com'
    async with browsers(sqlite_url) as browser:
        for page in ("/register", "/login"):
            answer = await browser.send(page, email=hostile, password=PASSWORD)
            assert_is_page(answer, 422 if page == "/register" else 401)
            assert "<script>alert" not in answer.text
            assert html.escape(hostile, quote=True).replace("&quot;", "&#34;") in answer.text
        for path in ("/verify", "/reset", "/login?done=", "/settings?done="):
            joint = "" if "?" in path else "?token="
            answer = await browser.get(path + joint + '"><script>alert(1)</script>')
            assert "<script>alert" not in answer.text


@pytest.mark.parametrize("email", ["a\0b@example.com", "a" * 300 + "@example.com", "", "\udcff@example.com"])
async def test_what_can_not_be_an_address_is_refused_with_words(sqlite_url: str, email: str) -> None:
    async with browsers(sqlite_url) as browser:
        for page in ("/register", "/login", "/forgot"):
            found = token(await browser.get(page))
            fields = {"form_token": found, "password": PASSWORD, "email": email.encode("utf-8", "surrogateescape")}
            headers = {"content-type": "application/x-www-form-urlencoded"}
            answer = await browser.http.post(page, content=urlencode(fields), headers=headers)
            assert_is_page(answer, 422)
            assert alert(answer)


async def test_too_many_tries_are_told_how_long_to_wait(sqlite_url: str) -> None:
    async with browsers(sqlite_url, rate_limit_factor=0.1) as browser:
        await browser.log_in(password="wrong password 1")
        answer = await browser.log_in(password="wrong password 1")
        assert_is_page(answer, 429)
        assert int(answer.headers["retry-after"]) > 0
        assert "too often" in alert(answer)


async def test_a_fault_of_ours_is_a_page_that_tells_nothing_of_itself(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()

        async def broken(*_: object, **__: object) -> None:
            raise RuntimeError("the secret recipe")

        monkeypatch.setattr(browser.dashtam.application.queries, "audit", broken)
        answer = await browser.get("/home")
        assert_is_page(answer, 500)
        assert alert(answer) == "That is our fault. It was logged."
        assert "recipe" not in answer.text
        assert "the secret recipe" in browser.dashtam.output.getvalue()


async def test_settings_are_changed(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()

        async def are_there() -> bool:
            return (await browser.get("/settings")).status_code == 200

        await eventually(are_there)
        answer = await browser.send("/settings", currency="CHF", language="de")
        assert answer.headers["location"] == "/settings?done=settings"
        page = await browser.get("/settings?done=settings")
        assert "<option selected>CHF</option>" in page.text
        assert "Your settings are saved." in page.text
        for wrong in ({"currency": "XXX", "language": "de"}, {"currency": "CHF", "language": "no language"}):
            assert_is_page(await browser.send("/settings", **wrong), 422)


async def test_administrators_have_the_dashboard_of_events_and_nobody_else_does(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        response = await browser.get("/admin/events/")
        assert (response.status_code, response.headers["location"]) == (303, "/login")
        await browser.sign_up()
        assert (await browser.get("/admin/events/dead")).status_code == 403
        await browser.dashtam.make_admin(ADA)
        page = await browser.get("/admin/events/handlers")
        assert page.status_code == 200
        assert "SessionEventHandler" in page.text
        assert "UserRegistrationSucceeded" in (await browser.get("/admin/events/events")).text


async def test_an_administrator_sees_everybody_and_sets_a_password(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()
        await browser.dashtam.make_admin(ADA)
        eve = Browser(browser.dashtam)
        async with eve.http:
            await eve.sign_up("o'hara&eve@example.com")
            page = await browser.get("/admin")
            assert_is_page(page)
            assert "o&#39;hara&amp;eve@example.com" in page.text
            user_id = await browser.dashtam.user_id("o'hara&eve@example.com")
            assert f"/admin/users/{user_id}" in page.text
            assert_is_page(await browser.get(f"/admin/users/{user_id}"))
            path = f"/admin/users/{user_id}"
            assert_is_page(await browser.send(path, f"{path}/password", password="short"), 422)
            answer = await browser.send(path, f"{path}/password", password=OTHER_PASSWORD)
            assert answer.headers["location"] == f"{path}?done=password_set"
            assert (await eve.get("/home")).headers["location"] == "/login"
            assert (await eve.log_in("o'hara&eve@example.com", OTHER_PASSWORD)).headers["location"] == "/home"
        part = await browser.get("/admin/followed", **{"hx-request": "true"})
        assert "User password changed" in part.text
        assert "<html" not in part.text
        assert_is_page(await browser.get(f"/admin/users/{uuid4()}"), 404)


async def at_bank(here: Banked, browser: Browser, decision: str = "allow") -> str:
    """From the page to the bank and back; where the bank sends the browser."""
    answer = await browser.send("/connect", provider="sandbox")
    assert answer.status_code == 303, answer.text
    back = await here.consent(answer.headers["location"], decision=decision)
    return "/connect/callback?" + str(httpx.QueryParams(back))


async def test_a_bank_is_connected_synced_and_disconnected(sqlite_url: str) -> None:
    async with banked(sqlite_url) as here:
        browser = Browser(here.dashtam)
        async with browser.http:
            await browser.sign_up()
            page = await browser.get("/connect")
            # Chromium holds the redirect that answers a form to this, too
            assert "form-action 'self' http://127.0.0.1:8100;" in page.headers["content-security-policy"]
            unknown = await browser.send("/connect", provider="none of them")
            assert_is_page(unknown, 422)
            denied = await browser.get(await at_bank(here, browser, "deny"))
            assert_is_page(denied, 403)
            assert alert(denied) == "You did not allow the connection at the bank, so there is none."

            back = await at_bank(here, browser)
            assert (await browser.get(back)).headers["location"] == "/home?done=connected"
            again = await browser.get(back)
            assert_is_page(again, 409)
            accounts = here.bank.people.find("Ada").accounts
            await here.until("TransactionSyncSucceeded", len(accounts))

            page = await browser.get("/home")
            assert_is_page(page)
            for account in accounts:
                assert f"{account.balance:,f} {account.currency}" in page.text
            connection = re.search(r"/home/connections/([0-9a-f-]{36})/sync", page.text)
            assert connection is not None

            found = re.search(r'href="(/home/accounts/[0-9a-f-]{36})"', page.text)
            assert found is not None
            address = found[1]
            first = await browser.get(address)
            assert_is_page(first)
            shown = len(re.findall("<tr>", first.text))
            path: str | None = address
            seen: list[str] = []
            while path is not None:
                one = await browser.get(path)
                seen += re.findall(r'<td><time datetime="([^"]+)"', one.text)
                older = re.search(r'rel="next" href="([^"]+)"', one.text)
                path = None if older is None else older[1]
            assert len(seen) > shown
            assert seen == sorted(seen, reverse=True)
            eve = Browser(here.dashtam)
            async with eve.http:
                await eve.sign_up("eve@example.com")
                assert_is_page(await eve.get(address), 404)
                assert_is_page(await eve.send("/home", f"/home/connections/{connection[1]}/disconnect"), 404)

            answer = await browser.send("/home", f"/home/connections/{connection[1]}/sync")
            assert answer.headers["location"] == "/home?done=syncing"
            answer = await browser.send("/home", f"/home/connections/{connection[1]}/disconnect")
            assert answer.headers["location"] == "/home?done=disconnected"
            page = await browser.get("/home")
            assert "Connect again" in page.text
            assert urlsplit(answer.headers["location"]).netloc == ""


async def test_the_api_is_as_it_was_beside_the_pages(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        document = (await browser.get("/openapi.json")).json()
        for path in (*OUTSIDE, *INSIDE):
            assert urlsplit(path).path not in document["paths"]
        assert not any(path.startswith(("/home", "/admin", "/static", "/live")) for path in document["paths"])
        for path, status in (("/users/me", 401), ("/sessions", 401), ("/users/x/audit", 401)):
            answer = await browser.get(path)  # though it is a browser that asks
            assert answer.headers["content-type"] == "application/problem+json"
            assert answer.status_code == status
        nowhere = await browser.http.get("/nowhere", headers={"accept": "*/*"})
        assert (nowhere.status_code, nowhere.headers["content-type"]) == (404, "application/problem+json")
        await browser.sign_up()
        assert (await browser.get("/users/me")).status_code == 401  # a cookie opens no door of the API


async def test_static_files_are_served_and_nothing_beside_them(sqlite_url: str) -> None:
    async with browsers(sqlite_url) as browser:
        await browser.sign_up()
        page = await browser.get("/home")
        named = re.findall(r'(?:src|href)="(/static/[^"]+)"', page.text)
        assert len(named) == 3
        for path in named:
            answer = await browser.get(path)
            assert answer.status_code == 200
            assert answer.headers["x-content-type-options"] == "nosniff"
        for path in ("/static/NOTICE", "/static/..%2fpages.py", "/static/", "/static/pages.py"):
            assert (await browser.get(path)).status_code == 404
