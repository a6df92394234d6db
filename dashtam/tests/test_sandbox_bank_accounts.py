"""Accounts and transactions of the sandbox bank, and what can be made of them under /sandbox."""

import json
import re
import time
from decimal import Decimal
from typing import Any

import httpx
import pytest
from bank_visitor import Visitor, question, sealed, visiting

from dashtam_sandbox_bank.people import DECIMALS, MOST_ACCOUNTS, MOST_PEOPLE, MOST_TRANSACTIONS

pytestmark = pytest.mark.integration

JSON = {"content-type": "application/json"}


async def history(visitor: Visitor, token: str, account_id: str, limit: int = 50) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    cursor = ""
    while True:
        path = f"/api/accounts/{account_id}/transactions?limit={limit}" + (f"&cursor={cursor}" if cursor else "")
        page = (await visitor.get(path, token)).json()
        found += page["transactions"]
        if page["next"] is None:
            return found
        assert page["next"] == page["cursor"]
        cursor = page["next"]


@pytest.mark.parametrize("name", ["Ada", "Grace Hopper", "zoë@example.com", "李"])
async def test_everybody_has_accounts_whose_balances_are_the_sums_of_their_transactions(name: str) -> None:
    async with visiting() as visitor:
        token = (await visitor.connect(name))["access_token"]
        accounts = await visitor.accounts(token)
        assert 2 <= len(accounts) <= 4
        assert len({account["id"] for account in accounts}) == len(accounts)
        for account in accounts:
            assert account.keys() == {"id", "name", "type", "currency", "balance", "status", "updated_at"}
            assert account["type"] in ("checking", "savings", "credit_card", "investment")
            assert account["status"] == "open"
            transactions = await history(visitor, token, account["id"])
            assert 40 <= len(transactions) <= 200
            assert len({transaction["id"] for transaction in transactions}) == len(transactions)
            assert sum(Decimal(transaction["amount"]) for transaction in transactions) == Decimal(account["balance"])
            times = [transaction["booked_at"] for transaction in transactions]
            assert times == sorted(times)
            assert account["updated_at"] == times[-1]
            assert all(re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z", at) for at in times)
            decimals = DECIMALS[account["currency"]]
            shape = rf"-?\d+\.\d{{{decimals}}}" if decimals else r"-?\d+"
            for money in (account["balance"], *(transaction["amount"] for transaction in transactions)):
                assert re.fullmatch(shape, money)
            assert {transaction["currency"] for transaction in transactions} == {account["currency"]}


async def test_people_are_the_same_in_every_run_and_differ_from_each_other() -> None:
    async def seen(name: str) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        async with visiting() as visitor:
            token = (await visitor.connect(name))["access_token"]
            accounts = await visitor.accounts(token)
            return accounts, await history(visitor, token, accounts[0]["id"])

    accounts, transactions = await seen("Ada")
    assert await seen("Ada") == (accounts, transactions)
    others, other_transactions = await seen("Grace")
    assert not {account["id"] for account in others} & {account["id"] for account in accounts}
    assert not {each["id"] for each in other_transactions} & {each["id"] for each in transactions}


async def test_pages_of_any_size_hold_each_item_once() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        (first, *_) = accounts = await visitor.accounts(token)
        whole = await history(visitor, token, first["id"], 200)
        for limit in (1, 7, 199):
            assert await history(visitor, token, first["id"], limit) == whole

        listed: list[dict[str, Any]] = []
        cursor = ""
        while cursor is not None:
            page = (await visitor.get(f"/api/accounts?limit=1{cursor and '&cursor=' + cursor}", token)).json()
            listed += page["accounts"]
            cursor = page["next"]
        assert listed == accounts


async def test_with_the_last_cursor_only_what_is_new_is_told() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        (account, *_) = await visitor.accounts(token)
        path = f"/api/accounts/{account['id']}/transactions?limit=200"
        page = (await visitor.get(path, token)).json()
        assert page["next"] is None
        nothing = (await visitor.get(f"{path}&cursor={page['cursor']}", token)).json()
        assert nothing == {"transactions": [], "next": None, "cursor": page["cursor"]}

        activity = {"transactions": 3, "account_id": account["id"]}
        booked = (await visitor.http.post("/sandbox/people/Ada/activity", json=activity)).json()
        new = (await visitor.get(f"{path}&cursor={page['cursor']}", token)).json()
        assert new["transactions"] == [each["transaction"] for each in booked]
        assert len(booked) == 3
        assert {each["booked_at"] for each in new["transactions"]} == {"2026-11-01T00:00:00.000Z"}
        (after, *_) = await visitor.accounts(token)
        moved = sum(Decimal(each["amount"]) for each in new["transactions"])
        assert Decimal(after["balance"]) == Decimal(account["balance"]) + moved
        assert after["updated_at"] == "2026-11-01T00:00:00.000Z"


async def test_a_clock_that_goes_back_does_not_change_the_order() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        (account, *_) = await visitor.accounts(token)
        (person,) = visitor.bank.people
        person.act(1, account["id"])
        visitor.clock.advance(days=-700)
        person.act(1, account["id"])
        person.close(account["id"])
        (later, *_) = await visitor.accounts((await visitor.connect())["access_token"])
        assert later["updated_at"] == "2026-11-01T00:00:00.000Z"


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("limit=0", 422),
        ("limit=201", 422),
        ("limit=many", 422),
        ("limit=" + "9" * 5_000, 422),
        ("cursor=after-100000", 400),
        ("cursor=after--1", 400),
        ("cursor=after-٣", 400),
        ("cursor=%00%ff", 400),
        ("cursor=" + "x" * 101, 422),
    ],
)
async def test_a_page_that_can_not_be_is_refused_and_what_was_asked_is_not_repeated(query: str, status: int) -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        (account, *_) = await visitor.accounts(token)
        for path in ("/api/accounts", f"/api/accounts/{account['id']}/transactions"):
            refused = await visitor.get(f"{path}?{query}", token)
            assert refused.status_code == status
            assert refused.json().keys() == {"error", "error_description"}
            assert "9999" not in refused.text


@pytest.mark.parametrize(
    "authorization", [None, b"", b"Bearer", b"Bearer  ", b"Basic x", b"Bearer \xff\xfe", b"Bearer unknown"]
)
async def test_without_a_good_token_nothing_is_told(authorization: bytes | None) -> None:
    async with visiting() as visitor:
        headers = {} if authorization is None else {b"authorization": authorization}
        for path in ("/api/accounts", "/api/accounts/x/transactions"):
            refused = await visitor.http.get(path, headers=headers)
            assert refused.status_code == 401
            assert refused.headers["www-authenticate"].startswith('Bearer realm="sandbox bank"')


async def test_nobody_sees_the_accounts_of_others() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect("Ada"))["access_token"]
        other = (await visitor.connect("Grace"))["access_token"]
        (account, *_) = await visitor.accounts(token)
        refused = await visitor.get(f"/api/accounts/{account['id']}/transactions", other)
        assert (refused.status_code, refused.json()["error"]) == (404, "unknown_account")


async def test_an_account_that_is_closed_stays_listed_and_takes_no_more() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        before = await visitor.accounts(token)
        here = "/sandbox/people/Ada/accounts"
        opened = await visitor.http.post(here, json={"type": "investment", "currency": "JPY", "name": "Nest egg"})
        assert opened.status_code == 201
        assert (opened.json()["balance"], opened.json()["name"]) == ("0", "Nest egg")
        plain = await visitor.http.post(here)
        assert (plain.status_code, plain.json()["type"]) == (201, "savings")

        for _ in range(2):
            closed = await visitor.http.post(f"{here}/{before[0]['id']}/close")
            assert closed.json() == before[0] | {"status": "closed", "updated_at": "2026-11-01T00:00:00.000Z"}
        assert [account["status"] for account in await visitor.accounts(token)] == ["closed"] + ["open"] * (
            len(before) + 1
        )

        one = {"transactions": 1, "account_id": before[0]["id"]}
        refused = await visitor.http.post("/sandbox/people/Ada/activity", json=one)
        assert (refused.status_code, refused.json()["error"]) == (409, "account_closed")
        more = (await visitor.http.post("/sandbox/people/Ada/activity", json={"transactions": 20})).json()
        assert before[0]["id"] not in {each["account_id"] for each in more}


async def test_a_grant_can_be_revoked_at_the_bank() -> None:
    async with visiting() as visitor:
        tokens = await visitor.connect()
        assert (await visitor.http.get("/sandbox/people/Ada")).json()["grants"] == 1
        assert (await visitor.http.post("/sandbox/people/Ada/grant/revoke")).json() == {"ended": 1}
        assert (await visitor.get("/api/accounts", tokens["access_token"])).status_code == 401
        assert (await visitor.refresh(tokens["refresh_token"])).json()["error"] == "invalid_grant"
        again = await visitor.http.post("/sandbox/people/Ada/grant/revoke")
        assert (again.status_code, again.json()["error"]) == (409, "no_grant")


async def test_an_access_token_can_be_made_to_expire() -> None:
    async with visiting() as visitor:
        tokens = await visitor.connect()
        assert (await visitor.http.post("/sandbox/people/Ada/access-token/expire")).json() == {"ended": 1}
        assert (await visitor.get("/api/accounts", tokens["access_token"])).status_code == 401
        assert (await visitor.refresh(tokens["refresh_token"])).status_code == 200


@pytest.mark.parametrize(
    ("fault", "status", "headers"),
    [
        ({"status": 401}, 401, {"www-authenticate": 'Bearer realm="sandbox bank", error="invalid_token"'}),
        ({"status": 429, "retry_after": 2}, 429, {"retry-after": "2"}),
        ({"status": 500}, 500, {}),
        ({"status": 503, "retry_after": 0}, 503, {"retry-after": "0"}),
    ],
)
@pytest.mark.parametrize("at", ["accounts", "transactions", "api"])
async def test_a_fault_strikes_as_often_and_where_it_was_set(
    at: str, fault: dict[str, Any], status: int, headers: dict[str, str]
) -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        other = (await visitor.connect("Grace"))["access_token"]
        (account, *_) = await visitor.accounts(token)
        places = {"accounts": "/api/accounts", "transactions": f"/api/accounts/{account['id']}/transactions"}

        set_to = {"at": at, "times": 2} | fault
        answer = await visitor.http.put("/sandbox/people/Ada/faults", json=set_to)
        (only,) = answer.json()
        assert only == {"status": None, "retry_after": None, "delay_seconds": 0.0} | set_to
        await visitor.accounts(other)
        struck = places[at] if at in places else places["accounts"]
        for place, path in places.items():
            if at not in (place, "api"):
                assert (await visitor.get(path, token)).status_code == 200
        for _ in range(2):
            response = await visitor.get(struck, token)
            assert response.status_code == status
            assert headers.items() <= dict(response.headers).items()
        assert (await visitor.get(struck, token)).status_code == 200
        assert (await visitor.http.get("/sandbox/people/Ada/faults")).json() == []


async def test_a_fault_without_times_lasts_until_it_is_ended() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        await visitor.http.put("/sandbox/people/Ada/faults", json={"at": "accounts", "status": 503})
        await visitor.http.put("/sandbox/people/Ada/faults", json={"at": "accounts", "status": 500, "times": None})
        await visitor.http.put("/sandbox/people/Ada/faults", json={"lie": "nan"})
        for _ in range(5):
            assert (await visitor.get("/api/accounts", token)).status_code == 500
        assert (await visitor.http.delete("/sandbox/people/Ada/faults")).status_code == 204
        assert await visitor.accounts(token)


async def test_tokens_can_be_refused_and_what_is_tried_again_then_works() -> None:
    async with visiting() as visitor:
        visitor.bank.people.welcome("Ada")
        fault = {"at": "token", "status": 503, "retry_after": 1, "times": 1}
        await visitor.http.put("/sandbox/people/Ada/faults", json=fault)
        code = await visitor.code()
        failed = await visitor.exchange(code)
        assert (failed.status_code, failed.json()["error"]) == (503, "temporarily_unavailable")
        tokens = (await visitor.exchange(code)).json()

        await visitor.http.put("/sandbox/people/Ada/faults", json={"at": "token", "status": 401, "times": 1})
        refused = await visitor.refresh(tokens["refresh_token"])
        assert (refused.status_code, refused.json()["error"]) == (401, "invalid_client")
        assert (await visitor.refresh(tokens["refresh_token"])).status_code == 200

        await visitor.http.put("/sandbox/people/Ada/faults", json={"at": "revoke", "status": 500, "times": 1})
        given = {"data": {"token": tokens["refresh_token"]}, "auth": httpx.BasicAuth("dashtam", "top-secret")}
        assert (await visitor.http.post("/oauth/revoke", **given)).status_code == 500  # type: ignore[arg-type]
        assert (await visitor.http.post("/oauth/revoke", **given)).status_code == 200  # type: ignore[arg-type]


async def test_a_slow_answer_is_right_all_the_same() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        slow = {"at": "api", "status": None, "delay_seconds": 0.2, "times": 1}
        await visitor.http.put("/sandbox/people/Ada/faults", json=slow)
        began = time.monotonic()
        assert await visitor.accounts(token)
        assert time.monotonic() - began >= 0.2


async def test_each_lie_is_what_it_is_called() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        truth = await visitor.accounts(token)
        transactions = f"/api/accounts/{truth[0]['id']}/transactions"

        async def told(lie: str, path: str = "/api/accounts") -> httpx.Response:
            await visitor.http.put("/sandbox/people/Ada/faults", json={"lie": lie, "times": 1})
            response = await visitor.get(path, token)
            assert response.status_code == 200
            assert response.headers["content-type"] == "application/json"
            assert await visitor.accounts(token) == truth
            return response

        assert isinstance((await told("float_amount")).json()["accounts"][0]["balance"], float)
        assert isinstance((await told("float_amount", transactions)).json()["transactions"][0]["amount"], float)
        assert (await told("nan")).json()["accounts"][0]["balance"] == "NaN"
        assert Decimal((await told("huge", transactions)).json()["transactions"][0]["amount"]) > 10**39
        assert (await told("unknown_currency")).json()["accounts"][0]["currency"] == "QQQ"
        assert "balance" not in (await told("missing_field")).json()["accounts"][0]
        assert "amount" not in (await told("missing_field", transactions)).json()["transactions"][0]
        assert isinstance((await told("wrong_shape")).json(), list)
        wrong = (await told("wrong_balance")).json()["accounts"][0]
        assert Decimal(wrong["balance"]) == Decimal(truth[0]["balance"]) + 1
        with pytest.raises(json.JSONDecodeError):
            (await told("not_json")).json()


async def test_a_wrong_balance_waits_until_a_balance_is_told() -> None:
    async with visiting() as visitor:
        token = (await visitor.connect())["access_token"]
        truth = await visitor.accounts(token)
        await visitor.http.put("/sandbox/people/Ada/faults", json={"lie": "wrong_balance", "times": 1})
        await history(visitor, token, truth[0]["id"])
        assert await visitor.accounts(token) != truth


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe",
        b"null",
        b"[]",
        b"7",
        b'"fault"',
        b"{}",
        b'{"at": "accounts"}',
        b'{"at": "accounts", "retry_after": 2, "delay_seconds": 1}',
        b'{"at": "nowhere", "status": 500}',
        b'{"at": "\\ud800", "status": 500}',
        b'{"at": "api", "status": 500, "\\ud800": 1}',
        b'{"at": "api", "status": 500, "extra": 1}',
        b'{"at": "api", "status": 418}',
        b'{"at": "api", "status": "500"}',
        b'{"at": "api", "status": 500, "times": 0}',
        b'{"at": "api", "status": 500, "times": true}',
        b'{"at": "api", "status": 500, "times": 1e400}',
        b'{"at": "api", "status": 500, "retry_after": -1}',
        b'{"at": "api", "status": null, "delay_seconds": NaN}',
        b'{"at": "api", "status": null, "delay_seconds": 61}',
        b'{"at": "api", "status": null, "delay_seconds": ' + b"9" * 5_000 + b"}",
        b'{"lie": "everything"}',
        b'{"lie": null}',
        b'{"lie": "nan", "at": "api"}',
        b"[" * 30_000,
        b'{"transactions": 501}',
        b'{"transactions": 1, "account_id": 7}',
        b'{"name": "\\u0000"}',
        b'{"type": "pension"}',
        b'{"currency": "XXX"}',
    ],
)
async def test_whatever_is_sent_to_the_switches_changes_nothing_and_is_refused(body: bytes) -> None:
    async with visiting() as visitor:
        visitor.bank.people.welcome("Ada")
        before = (await visitor.http.get("/sandbox/people")).json()
        put = await visitor.http.put("/sandbox/people/Ada/faults", content=body, headers=JSON)
        acted = await visitor.http.post("/sandbox/people/Ada/activity", content=body, headers=JSON)
        answers = [put, acted]
        if body not in (b"", b"{}", b"null"):  # these open an account, as it comes
            answers.append(await visitor.http.post("/sandbox/people/Ada/accounts", content=body, headers=JSON))
        for response in answers:
            assert response.status_code in (400, 422), response.text
            assert response.json().keys() == {"error", "error_description"}
        assert (await visitor.http.get("/sandbox/people")).json() == before


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", ""),
        ("GET", "/faults"),
        ("PUT", "/faults"),
        ("DELETE", "/faults"),
        ("POST", "/refresh-token/expire"),
        ("POST", "/access-token/expire"),
        ("POST", "/grant/revoke"),
        ("POST", "/activity"),
        ("POST", "/accounts"),
        ("POST", "/accounts/x/close"),
    ],
)
async def test_nobody_is_found_under_a_name_that_nobody_has_and_told_how_to_be(method: str, path: str) -> None:
    async with visiting() as visitor:
        content = {"/faults": {"lie": "nan"}, "/activity": {"transactions": 1}}.get(path)
        for name in ("Nobody", "%00%ff", "%20"):
            response = await visitor.http.request(method, f"/sandbox/people/{name}{path}", json=content)
            assert (response.status_code, response.json()["error"]) == (404, "unknown_person")
            assert "/oauth/authorize" in response.json()["error_description"]


async def test_a_page_of_another_site_can_not_press_the_switches() -> None:
    async with visiting() as visitor:
        await visitor.connect()
        for site in ("cross-site", "same-site"):
            refused = await visitor.http.post("/sandbox/people/Ada/grant/revoke", headers={"sec-fetch-site": site})
            assert (refused.status_code, refused.json()["error"]) == (403, "cross_site")
        assert (await visitor.http.get("/sandbox/people/Ada")).json()["grants"] == 1


async def test_there_are_limits_to_people_accounts_and_transactions() -> None:
    async with visiting() as visitor:
        person = visitor.bank.people.welcome("Ada")
        while len(person.accounts) < MOST_ACCOUNTS:
            person.open()
        full = await visitor.http.post("/sandbox/people/Ada/accounts")
        assert (full.status_code, full.json()["error"]) == (409, "too_many_accounts")

        account = person.accounts[0]
        account.transactions.extend(account.transactions[-1:] * (MOST_TRANSACTIONS - len(account.transactions)))
        one = {"transactions": 1, "account_id": account.id}
        refused = await visitor.http.post("/sandbox/people/Ada/activity", json=one)
        assert (refused.status_code, refused.json()["error"]) == (409, "account_full")

        for n in range(MOST_PEOPLE - 1):
            visitor.bank.people._people[f"somebody {n}"] = person
        page = await visitor.decide(question(), "One more")
        assert page.status_code == 503
        assert "Start the bank anew" in page.text
        assert (await visitor.http.put("/sandbox/people/One more")).status_code == 503
        await visitor.connect("Ada")


async def test_a_person_can_play_without_a_program() -> None:
    async with visiting() as visitor:
        assert "Nobody has logged in yet" in (await visitor.http.get("/")).text
        tokens = await visitor.connect("Zoë's")
        start = await visitor.http.get("/")
        found = re.search(r'href="(/people/[^"]+)"', start.text)
        assert found is not None
        here = found[1]

        async def press(**form: str) -> httpx.Response:
            seal = sealed(await visitor.http.get(here))
            return await visitor.http.post(here, data={"seal": seal} | form)

        fault = {
            "do": "fault",
            "at": "accounts",
            "status": "500",
            "delay_seconds": "0",
            "retry_after": "",
            "times": "1",
        }
        assert (await press(**fault)).status_code == 303
        assert "answers 500, once" in (await visitor.http.get(here)).text
        assert "1 fault on" in (await visitor.http.get("/")).text
        assert (await visitor.get("/api/accounts", tokens["access_token"])).status_code == 500

        assert (await press(do="lie", lie="nan", times="")).status_code == 303
        assert "lies: nan, until it is ended" in (await visitor.http.get(here)).text
        assert (await press(do="fault", at="api", status="", delay_seconds="0.5", times="2")).status_code == 303
        assert "api: 0.5 s late, 2 times" in (await visitor.http.get(here)).text
        assert (await press(do="end")).status_code == 303
        (before, *_) = await visitor.accounts(tokens["access_token"])

        for button in ("act", "open", "expire-access", "expire-refresh"):
            assert (await press(do=button)).status_code == 303
        assert (await press(do="close", account_id=before["id"])).status_code == 303
        assert "closed" in (await visitor.http.get(here)).text
        gone = await press(do="revoke")
        assert (gone.status_code, 'role="alert"' in gone.text) == (409, True)

        for wrong in (
            {"do": "fault", "at": "accounts", "times": "often"},
            {"do": "fault", "at": "accounts", "status": "500", "delay_seconds": "nan"},
            {"do": "fault", "at": "accounts", "status": "9" * 5_000},
            {"do": "fault", "at": "\x00", "status": "٣"},
            {"do": "lie"},
            {"do": "lie", "lie": "<b>"},
            {"do": "close", "account_id": "x"},
            {"do": "dance"},
            {},
        ):
            refused = await press(**wrong)
            assert refused.status_code in (400, 404, 422)
            assert 'role="alert"' in refused.text
        assert visitor.bank.faults.of("Zoë's") == []


async def test_the_switches_on_the_page_are_for_the_browser_it_was_shown_to() -> None:
    async with visiting() as visitor:
        visitor.bank.people.welcome("Ada")
        visitor.bank.people.welcome("Grace")
        of_grace = sealed(await visitor.http.get("/people/Grace"))
        for seal in ("", of_grace):
            refused = await visitor.http.post("/people/Ada", data={"seal": seal, "do": "lie", "lie": "nan"})
            assert refused.status_code == 403
        assert (await visitor.http.post("/people/Ada", json={"do": "lie"})).status_code == 400
        assert (await visitor.http.get("/people/Nobody")).status_code == 404
        assert visitor.bank.faults.of("Ada") == []
