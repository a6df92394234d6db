"""Codes and tokens of the sandbox bank."""

import json
from typing import Any

import httpx
import pytest
from authlib.oauth2.rfc8414 import AuthorizationServerMetadata  # type: ignore[import-untyped]
from bank_visitor import CALLBACK, CREDENTIALS, ISSUER, SETTINGS, Visitor, basic, question, visiting

from dashtam_sandbox_bank import BankSettings, InvalidSetting
from dashtam_sandbox_bank.grants import (
    MOST_ACCESS_TOKENS,
    MOST_CODES,
    MOST_GRANTS,
    MOST_REFRESH_TOKENS,
)

pytestmark = pytest.mark.integration


def error(response: httpx.Response) -> tuple[int, str]:
    assert response.headers["cache-control"] == "no-store"
    return response.status_code, response.json()["error"]


async def valid(visitor: Visitor, access_token: str) -> bool:
    return (await visitor.get("/api/accounts", access_token)).status_code == 200


async def test_a_code_is_exchanged_for_tokens_that_are_good_for_what_was_allowed() -> None:
    async with visiting() as visitor:
        response = await visitor.exchange(await visitor.code())
        assert response.headers["cache-control"] == "no-store"
        tokens = response.json()
        assert tokens.keys() == {"token_type", "access_token", "expires_in", "refresh_token", "scope"}
        assert (tokens["token_type"], tokens["expires_in"]) == ("Bearer", 900)
        assert tokens["scope"] == "accounts transactions"
        assert await valid(visitor, tokens["access_token"])
        assert not await valid(visitor, tokens["refresh_token"])


async def test_a_code_can_be_used_once_and_its_second_use_revokes_what_it_gave() -> None:
    async with visiting() as visitor:
        code = await visitor.code()
        tokens = (await visitor.exchange(code)).json()
        renewed = (await visitor.refresh(tokens["refresh_token"])).json()
        assert error(await visitor.exchange(code)) == (400, "invalid_grant")
        assert not await valid(visitor, tokens["access_token"])
        assert not await valid(visitor, renewed["access_token"])
        assert error(await visitor.refresh(renewed["refresh_token"])) == (400, "invalid_grant")


async def test_a_code_betrays_its_second_use_as_long_as_what_it_gave_is_good() -> None:
    async with visiting() as visitor:
        code = await visitor.code()
        tokens = (await visitor.exchange(code)).json()
        visitor.clock.advance(days=20)
        assert error(await visitor.exchange(code)) == (400, "invalid_grant")
        assert error(await visitor.refresh(tokens["refresh_token"])) == (400, "invalid_grant")


async def test_a_code_is_good_for_a_minute() -> None:
    async with visiting() as visitor:
        late, early = await visitor.code(), await visitor.code()
        visitor.clock.advance(seconds=59)
        assert (await visitor.exchange(early)).status_code == 200
        visitor.clock.advance(seconds=1)
        assert error(await visitor.exchange(late)) == (400, "invalid_grant")


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"redirect_uri": f"{CALLBACK}?at=home"}, "invalid_grant"),
        ({"redirect_uri": ""}, "invalid_grant"),
        ({"code_verifier": "v" * 43}, "invalid_grant"),
        ({"code_verifier": ""}, "invalid_request"),
        ({"code_verifier": "short"}, "invalid_request"),
        ({"code_verifier": "é" * 43}, "invalid_request"),
        ({"code": "nothing"}, "invalid_grant"),
        ({"code": ""}, "invalid_request"),
        ({"grant_type": ""}, "invalid_request"),
        ({"grant_type": "password"}, "unsupported_grant_type"),
        ({"grant_type": 'é"\\'}, "unsupported_grant_type"),
    ],
)
async def test_a_code_is_good_only_with_what_it_was_asked_for_with(changes: dict[str, str], expected: str) -> None:
    async with visiting() as visitor:
        code = await visitor.code()
        assert error(await visitor.exchange(code, changes)) == (400, expected)
        assert (await visitor.exchange(code)).status_code == 200


async def test_a_client_proves_itself_in_the_header_or_in_the_body() -> None:
    async with visiting() as visitor:
        posted = {"client_id": "dashtam", "client_secret": "top-secret"}
        assert (await visitor.exchange(await visitor.code(), posted, header=False)).status_code == 200
        assert error(await visitor.exchange(await visitor.code(), posted)) == (400, "invalid_request")


@pytest.mark.parametrize(
    "header",
    [
        {},
        basic(b"dashtam", b"wrong"),
        basic(b"somebody", b"top-secret"),
        basic(b"dashtam", b""),
        basic(b"dashtam", b"\xff\xfe"),
        basic(b"dashtam", "é".encode()),
        {"authorization": "Basic é".encode("latin-1")},
        {"authorization": "Basic ####"},
        {"authorization": "Basic"},
        {"authorization": "Bearer x"},
    ],
)
async def test_who_does_not_prove_to_be_the_client_gets_nothing(header: dict[str, str]) -> None:
    async with visiting() as visitor:
        tokens = await visitor.connect()
        form = {"grant_type": "refresh_token", "refresh_token": tokens["refresh_token"]}
        refused = await visitor.http.post("/oauth/token", data=form, headers=header)
        assert error(refused) == (401, "invalid_client")
        assert refused.headers["www-authenticate"].startswith("Basic")
        kept = await visitor.http.post("/oauth/revoke", data={"token": tokens["access_token"]}, headers=header)
        assert error(kept) == (401, "invalid_client")
        assert await valid(visitor, tokens["access_token"])


async def test_an_access_token_expires_and_a_refresh_token_gives_the_next() -> None:
    async with visiting() as visitor:
        tokens = await visitor.connect()
        visitor.clock.advance(seconds=899)
        assert await valid(visitor, tokens["access_token"])
        visitor.clock.advance(seconds=1)
        refused = await visitor.get("/api/accounts", tokens["access_token"])
        assert error(refused) == (401, "invalid_token")
        assert 'error="invalid_token"' in refused.headers["www-authenticate"]

        renewed = (await visitor.refresh(tokens["refresh_token"])).json()
        assert renewed["refresh_token"] != tokens["refresh_token"]
        assert await valid(visitor, renewed["access_token"])


async def test_a_used_refresh_token_gives_a_pair_again_within_a_minute_of_its_first_use() -> None:
    async with visiting() as visitor:
        tokens = await visitor.connect()
        first = (await visitor.refresh(tokens["refresh_token"])).json()
        visitor.clock.advance(seconds=60)
        again = (await visitor.refresh(tokens["refresh_token"])).json()
        assert again["refresh_token"] != first["refresh_token"]
        assert await valid(visitor, again["access_token"])
        assert await valid(visitor, first["access_token"])
        assert (await visitor.refresh(again["refresh_token"])).status_code == 200


async def test_a_used_refresh_token_that_comes_later_revokes_everything_of_its_grant() -> None:
    async with visiting() as visitor:
        other = await visitor.connect()
        tokens = await visitor.connect()
        renewed = (await visitor.refresh(tokens["refresh_token"])).json()
        visitor.clock.advance(seconds=61)
        assert error(await visitor.refresh(tokens["refresh_token"])) == (400, "invalid_grant")
        assert error(await visitor.refresh(renewed["refresh_token"])) == (400, "invalid_grant")
        assert not await valid(visitor, renewed["access_token"])
        assert await valid(visitor, other["access_token"])


async def test_a_refresh_token_expires_and_so_does_one_that_is_made_to() -> None:
    async with visiting() as visitor:
        late = await visitor.connect()
        visitor.clock.advance(seconds=SETTINGS.refresh_token_seconds)
        assert error(await visitor.refresh(late["refresh_token"])) == (400, "invalid_grant")

        made = await visitor.connect()
        ended = await visitor.http.post("/sandbox/people/Ada/refresh-token/expire")
        assert ended.json() == {"ended": 1}
        assert error(await visitor.refresh(made["refresh_token"])) == (400, "invalid_grant")
        assert await valid(visitor, made["access_token"])


async def test_a_client_may_ask_for_less_but_not_for_more() -> None:
    async with visiting() as visitor:
        tokens = await visitor.connect(scope="accounts")
        assert error(await visitor.refresh(tokens["refresh_token"], scope="accounts transactions")) == (
            400,
            "invalid_scope",
        )
        both = await visitor.connect()
        less = (await visitor.refresh(both["refresh_token"], scope="accounts")).json()
        assert less["scope"] == "accounts"
        (account, *_) = await visitor.accounts(less["access_token"])
        refused = await visitor.get(f"/api/accounts/{account['id']}/transactions", less["access_token"])
        assert error(refused) == (403, "insufficient_scope")
        more = (await visitor.refresh(less["refresh_token"])).json()
        assert more["scope"] == "accounts transactions"


async def test_a_refresh_token_that_is_given_back_takes_its_grant_along_and_an_access_token_only_itself() -> None:
    async with visiting() as visitor:
        tokens = await visitor.connect()
        renewed = (await visitor.refresh(tokens["refresh_token"])).json()

        async def give_back(token: str, **form: str) -> int:
            response = await visitor.http.post("/oauth/revoke", data={"token": token} | form, auth=CREDENTIALS)
            return response.status_code

        assert await give_back(tokens["access_token"], token_type_hint="refresh_token") == 200
        assert not await valid(visitor, tokens["access_token"])
        assert await valid(visitor, renewed["access_token"])
        assert await give_back(renewed["refresh_token"], token_type_hint="something") == 200
        assert not await valid(visitor, renewed["access_token"])
        assert error(await visitor.refresh(renewed["refresh_token"])) == (400, "invalid_grant")
        assert await give_back("never heard of") == 200
        nothing = await visitor.http.post("/oauth/revoke", data={}, auth=CREDENTIALS)
        assert error(nothing) == (400, "invalid_request")


@pytest.mark.parametrize(
    ("content", "content_type"),
    [
        (b"", "application/x-www-form-urlencoded"),
        (b"\xff\xfe&=&%00=%zz&&&", "application/x-www-form-urlencoded"),
        (b"a=1&" * 1_000, "application/x-www-form-urlencoded"),
        (b"grant_type=refresh_token&grant_type=refresh_token", "application/x-www-form-urlencoded"),
        (b"grant_type=refresh_token&refresh_token=%ED%A0%80", "application/x-www-form-urlencoded"),
        (b'{"grant_type": "refresh_token"}', "application/json"),
        (b"--x\r\n\r\n--", "multipart/form-data; boundary=x"),
        (b"--", "multipart/form-data"),
        (b"x", "\xff/\x80"),
    ],
)
async def test_whatever_is_sent_to_the_endpoints_is_answered_as_an_error(content: bytes, content_type: str) -> None:
    async with visiting() as visitor:
        for path in ("/oauth/token", "/oauth/revoke"):
            response = await visitor.http.post(
                path, content=content, headers={b"content-type": content_type.encode("latin-1")}, auth=CREDENTIALS
            )
            assert error(response)[0] == 400


async def test_a_body_that_is_too_large_is_refused() -> None:
    async with visiting() as visitor:
        for path in ("/oauth/token", "/oauth/revoke", question()):
            response = await visitor.http.post(path, data={"token": "x" * 70_000}, auth=CREDENTIALS)
            assert response.status_code == 413


async def test_the_metadata_say_what_is_where() -> None:
    async with visiting() as visitor:
        response = await visitor.http.get("/.well-known/oauth-authorization-server", headers={"host": "thief.example"})
        metadata: dict[str, Any] = response.json()
        assert metadata["issuer"] == ISSUER
        for name in ("authorization_endpoint", "token_endpoint", "revocation_endpoint"):
            assert metadata[name].startswith(f"{ISSUER}/oauth/")
        # Authlib would have https, which a sandbox does without
        AuthorizationServerMetadata(json.loads(response.text.replace("http://", "https://"))).validate()
        assert metadata["code_challenge_methods_supported"] == ["S256"]


async def test_no_code_or_token_is_kept_as_it_is() -> None:
    async with visiting() as visitor:
        code = await visitor.code()
        tokens = await visitor.connect()
        kept = repr(vars(visitor.bank.grants))
        for secret in (code, tokens["access_token"], tokens["refresh_token"]):
            assert secret not in kept


async def test_what_nobody_can_use_any_more_is_forgotten() -> None:
    async with visiting() as visitor:
        await visitor.code()
        tokens = await visitor.connect()
        await visitor.refresh(tokens["refresh_token"])
        assert visitor.bank.grants.kept == 6
        visitor.clock.advance(seconds=900)
        assert len(visitor.bank.grants.of("Ada")) == 1
        assert visitor.bank.grants.kept == 3  # two refresh tokens, and the code that they came of
        visitor.clock.advance(seconds=SETTINGS.refresh_token_seconds)
        assert visitor.bank.grants.of("Ada") == []
        assert visitor.bank.grants.kept == 0


async def test_memory_is_bounded_whatever_is_asked_for() -> None:
    async with visiting() as visitor:
        grants = visitor.bank.grants
        for n in range(MOST_CODES + 10):
            grants.save_code(
                f"code {n}",
                client_id="dashtam",
                person="Ada",
                redirect_uri=CALLBACK,
                scope="accounts",
                code_challenge="x" * 43,
            )
        assert grants.kept == MOST_CODES
        assert grants.peek_code("code 9") is None

        for n in range(10, MOST_GRANTS + 20):
            code = grants.peek_code(f"code {n}")
            assert code is not None
            grants.save_token(f"first {n}", "refresh", grants.spend(code), "accounts")
        (*_, grant) = living = grants.of("Ada")
        assert len(living) == MOST_GRANTS

        for n in range(MOST_REFRESH_TOKENS + 10):
            grants.save_token(f"access {n}", "access", grant, "accounts")
            grants.save_token(f"refresh {n}", "refresh", grant, "accounts")
        assert len(grant.hashes("access")) == MOST_ACCESS_TOKENS
        assert len(grant.hashes("refresh")) == MOST_REFRESH_TOKENS


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"client_id": ""}, "client_id"),
        ({"client_secret": "with blank"}, "client_secret"),
        ({"redirect_uris": ()}, "redirect_uris"),
        ({"redirect_uris": ("/callback",)}, "redirect_uris"),
        ({"redirect_uris": ("javascript:alert(1)",)}, "redirect_uris"),
        ({"redirect_uris": ("http://a.example/#x",)}, "redirect_uris"),
        ({"redirect_uris": ("http://[",)}, "redirect_uris"),
        ({"redirect_uris": ("http://a.example; script-src *",)}, "redirect_uris"),
        ({"issuer": "http://bank.example/"}, "issuer"),
        ({"access_token_seconds": 0}, "access_token_seconds"),
        ({"refresh_token_seconds": 10**12}, "refresh_token_seconds"),
    ],
)
def test_a_setting_that_can_not_work_is_refused_by_its_name(wrong: dict[str, object], named: str) -> None:
    with pytest.raises(InvalidSetting, match=f"^{named} "):
        BankSettings(**wrong)  # type: ignore[arg-type]
