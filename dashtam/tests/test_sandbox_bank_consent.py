"""How a person lets a client into the sandbox bank, and what it makes of requests that are not as they should be."""

import re

import pytest
from bank_visitor import CALLBACK, ISSUER, Visitor, question, sealed, told, visiting

pytestmark = pytest.mark.integration


async def test_whoever_allows_is_sent_back_with_a_code_the_state_and_the_issuer() -> None:
    async with visiting() as visitor:
        answer = told(await visitor.decide(question()))
        assert answer.keys() == {"code", "state", "iss"}
        assert (answer["state"], answer["iss"]) == ("state of mind", ISSUER)


async def test_whoever_denies_need_not_log_in_and_is_sent_back_with_access_denied() -> None:
    async with visiting() as visitor:
        answer = told(await visitor.decide(question(), "", "", decision="deny"))
        assert (answer["error"], answer["state"]) == ("access_denied", "state of mind")
        assert len(visitor.bank.people) == 0


async def test_a_query_of_the_redirect_uri_is_kept() -> None:
    async with visiting() as visitor:
        response = await visitor.decide(question(redirect_uri=f"{CALLBACK}?at=home"))
        assert response.headers["location"].startswith(f"{CALLBACK}?at=home&code=")


@pytest.mark.parametrize(
    ("name", "password", "why"),
    [
        ("Ada", "Sandbox", "not the password"),
        ("Ada", "", "not the password"),
        ("", "sandbox", "A name has"),
        ("   ", "sandbox", "A name has"),
        ("<script>", "sandbox", "A name has"),
        ("a/b", "sandbox", "A name has"),
        ("..", "sandbox", "A name has"),
        ("x" * 101, "sandbox", "A name has"),
        ("\x00", "sandbox", "A name has"),
    ],
)
async def test_a_login_that_fails_says_so_and_keeps_the_name(name: str, password: str, why: str) -> None:
    async with visiting() as visitor:
        page = await visitor.decide(question(), name, password)
        assert page.status_code in (403, 422)
        alert = re.search(r'role="alert"[^>]*>([^<]+)', page.text)
        assert alert is not None
        assert why in alert[1]
        assert "<script" not in page.text
        assert len(visitor.bank.people) == 0
        if name == "Ada":
            assert 'value="Ada"' in page.text


async def test_the_page_can_be_used_without_sight_script_or_mouse() -> None:
    async with visiting() as visitor:
        page = await visitor.http.get(question())
        assert '<html lang="en">' in page.text
        assert page.text.count("<h1>") == 1
        assert "autofocus" in page.text
        for field in re.findall(r'<input id="(\w+)"', page.text):
            assert f'<label for="{field}">' in page.text
        assert "<script" not in page.text
        assert "style=" not in page.text
        policy = page.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "form-action 'self' http://dashtam.example;" in policy
        assert page.headers["cache-control"] == "no-store"
        style = await visitor.http.get("/bank.css")
        assert style.headers["content-type"].startswith("text/css")
        assert "prefers-color-scheme: dark" in style.text


@pytest.mark.parametrize(
    "changes",
    [
        {"client_id": None},
        {"client_id": "somebody"},
        {"client_id": 'é"\\\x00'},
        {"redirect_uri": None},
        {"redirect_uri": "http://thief.example/"},
        {"redirect_uri": f"{CALLBACK}/"},
        {"redirect_uri": f"{CALLBACK}?at=work"},
        {"redirect_uri": 'javascript:alert("é\\")'},
    ],
)
async def test_an_unknown_client_or_redirect_uri_is_a_page_and_never_a_redirect(changes: dict[str, str | None]) -> None:
    async with visiting() as visitor:
        for response in (
            await visitor.http.get(question(**changes)),
            await visitor.http.post(question(**changes), data={"decision": "deny"}),
            await visitor.http.get(f"{question(**changes)}&redirect_uri={CALLBACK}&client_id=dashtam&client_id=x"),
        ):
            assert response.status_code == 400
            assert "location" not in response.headers
            assert 'role="alert"' in response.text


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"response_type": None}, "invalid_request"),
        ({"response_type": "token"}, "unsupported_response_type"),
        ({"response_type": 'é"\\'}, "unsupported_response_type"),
        ({"scope": "accounts payments"}, "invalid_scope"),
        ({"scope": '"'}, "invalid_scope"),
        ({"code_challenge": None}, "invalid_request"),
        ({"code_challenge": "short"}, "invalid_request"),
        ({"code_challenge_method": None}, "invalid_request"),
        ({"code_challenge_method": "plain"}, "invalid_request"),
        ({"code_challenge": None, "code_challenge_method": None}, "invalid_request"),
    ],
)
async def test_other_errors_are_sent_back_to_the_client(changes: dict[str, str | None], error: str) -> None:
    async with visiting() as visitor:
        response = await visitor.http.get(question(**changes))
        assert response.headers["location"].startswith(f"{CALLBACK}?")
        answer = told(response)
        assert (answer["error"], answer["state"], answer["iss"]) == (error, "state of mind", ISSUER)


async def test_a_parameter_that_comes_twice_is_an_error() -> None:
    async with visiting() as visitor:
        for twice in ("scope=accounts", "state=x", "code_challenge_method=S256", "anything=1&anything=2"):
            assert told(await visitor.http.get(f"{question()}&{twice}"))["error"] == "invalid_request"


async def test_without_a_scope_both_are_asked_for() -> None:
    async with visiting() as visitor:
        assert (await visitor.connect(scope=None))["scope"] == "accounts transactions"


async def forged(visitor: Visitor, seal: str, path: str | None = None) -> int:
    form = {"seal": seal, "name": "Ada", "password": "sandbox", "decision": "allow"}
    return (await visitor.http.post(path or question(), data=form)).status_code


async def test_the_form_is_taken_only_from_the_browser_and_for_the_request_it_was_shown_for() -> None:
    async with visiting() as visitor, visiting() as elsewhere:
        page = await visitor.http.get(question())
        seal = sealed(page)
        cookie = page.headers["set-cookie"]
        assert "HttpOnly" in cookie
        assert "SameSite=lax" in cookie

        assert await forged(visitor, "") == 403
        assert await forged(visitor, "é.\x00") == 403
        assert await forged(visitor, seal[:-1] + ("0" if seal[-1] != "0" else "1")) == 403
        assert await forged(visitor, sealed(await elsewhere.http.get(question()))) == 403
        assert await forged(visitor, seal, question(scope="accounts")) == 403
        assert await forged(visitor, seal) == 303

        browser = visitor.http.cookies["sandbox_bank_browser"]
        visitor.http.cookies.clear()
        assert await forged(visitor, seal) == 403

        visitor.http.cookies.set("sandbox_bank_browser", browser)
        visitor.clock.advance(minutes=61)
        assert await forged(visitor, seal) == 403


async def test_what_is_no_form_or_no_decision_is_asked_again() -> None:
    async with visiting() as visitor:
        nothing = await visitor.decide(question(), decision="maybe")
        assert (nothing.status_code, "Press Allow or Deny" in nothing.text) == (400, True)
        strange = await visitor.http.post(question(), content=b"\xff" * 100)
        assert strange.status_code == 400
        many = await visitor.http.post(question(), data={f"field{n}": "x" for n in range(100)})
        assert many.status_code == 400


async def test_the_same_name_is_the_same_person_however_it_is_typed() -> None:
    async with visiting() as visitor:
        await visitor.connect("Zoe\u0308")
        await visitor.connect(" Zo\u00eb ")
        (person,) = visitor.bank.people
        assert person.name == "Zo\u00eb"
