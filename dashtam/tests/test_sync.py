"""Accounts and transactions as the bank has them, whatever the bank does; on both databases."""

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import Any
from uuid import uuid4

import httpx
import pytest
from banked import Banked, banked
from served import Person, eventually
from sqlalchemy import func, select, update
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.types import ASGIApp

from dashtam.application.bank import LONGEST_PAUSE, pause
from dashtam.application.sync import reconciled
from dashtam.domain.account import Account, AccountStatus, AccountType, InvalidMoney, ListedAccount, Money
from dashtam.domain.connection import (
    ProviderConnection,
    ProviderInvalidData,
    ProviderRefused,
    ProviderUnavailable,
    Tokens,
)
from dashtam.domain.events import AccountBalanceUpdated, AccountClosed, AccountCreated, AccountUpdated
from dashtam.infrastructure import bank as bank_module
from dashtam.infrastructure.bank import LARGEST_ANSWER, SANDBOX, BankHttp, OAuthBank
from dashtam.infrastructure.tables import AccountModel, TransactionModel
from whereupon.schema import exception

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


@asynccontextmanager
async def ready(database_url: str) -> AsyncIterator[tuple[Banked, Person, str]]:
    """Ada, connected, with everything fetched."""
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        yield here, ada, await here.connected(ada)


async def stored(here: Banked) -> tuple[int, int]:
    """How many accounts and transactions."""
    async with here.dashtam.application.database.get_session() as session:
        return (
            await session.scalar(select(func.count()).select_from(AccountModel)) or 0,
            await session.scalar(select(func.count()).select_from(TransactionModel)) or 0,
        )


async def test_a_sync_of_what_has_not_changed_changes_nothing(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        before, facts = await stored(here), await here.count("AccountCreated")
        await here.sync(ada, connection_id)
        assert await stored(here) == before
        assert await here.count("AccountCreated") == facts
        assert await here.count("AccountUpdated") == 0
        assert await here.count("AccountBalanceUpdated") == 0
        await here.assert_same_as_bank()


async def test_what_happens_at_the_bank_is_seen_and_told(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        count = len(await ada.get("/accounts"))
        await here.tell("activity", transactions=2 * count)
        await here.tell("accounts", name="Rainy days")
        closing = here.bank.people.find("Ada").accounts[0].id
        assert (await here.at_bank.post(f"/sandbox/people/Ada/accounts/{closing}/close")).is_success
        await here.sync(ada, connection_id)

        # with what was booked on the closed account before it was closed
        await here.assert_same_as_bank()
        assert await here.count("AccountCreated") == count + 1
        assert await here.count("AccountClosed") == 1
        assert await here.count("AccountBalanceUpdated") == count
        assert "Rainy days" in {account["name"] for account in await ada.get("/accounts")}

        async def told() -> bool:
            found = await here.dashtam.application.queries.notifications(ada.user_id, limit=100)
            kinds = [each.kind for each in found]
            return kinds.count("account_closed") == 1 and kinds.count("account_balance_updated") == count

        await eventually(told)
        here.wire.requests.clear()
        await here.sync(ada, connection_id)
        assert here.wire.asked(f"{closing}/transactions") == 0


async def test_only_what_is_new_is_fetched(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, ada, connection_id):
        count = len(await ada.get("/accounts"))
        await here.tell("activity", transactions=3, account_id=here.bank.people.find("Ada").accounts[0].id)
        here.wire.requests.clear()
        await here.sync(ada, connection_id)
        assert here.wire.asked("/transactions") == count  # one page each
        assert {request.url.params["cursor"] for request in here.wire.requests if "/transactions" in request.url.path}
        await here.assert_same_as_bank()


async def test_many_requests_for_a_sync_lose_nothing_and_ask_the_bank_little(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        await here.tell("activity", transactions=5)
        here.wire.requests.clear()
        before = await here.count("AccountSyncAttempted")
        answers = await asyncio.gather(*(ada("POST", f"/connections/{connection_id}/sync") for _ in range(20)))
        assert {answer.status_code for answer in answers} == {202}

        async def same() -> bool:
            async with here.dashtam.application.database.get_session() as session:
                found = await session.scalar(select(func.count()).select_from(TransactionModel))
            return found == sum(len(account.transactions) for account in here.bank.people.find("Ada").accounts)

        await eventually(same)
        assert await here.count("AccountSyncAttempted") - before < 20
        assert await here.count("AccountSyncFailed") == 0
        await here.assert_same_as_bank()


@pytest.mark.parametrize("at", ["accounts", "transactions"])
@pytest.mark.parametrize(
    "fault", [{"status": 500}, {"status": 503}, {"status": 429, "retry_after": 1}, {"status": 401}], ids=str
)
async def test_after_a_bank_s_bad_moments_everything_is_there_once(
    sqlite_url: str, at: str, fault: dict[str, Any]
) -> None:
    await bad_moments(sqlite_url, at, fault)


@pytest.mark.parametrize("at", ["accounts", "transactions"])
async def test_after_a_bank_was_down_everything_is_there_once(database_url: str, at: str) -> None:
    await bad_moments(database_url, at, {"status": 503})


async def bad_moments(database_url: str, at: str, fault: dict[str, Any]) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        await here.at_bank.put("/sandbox/people/Ada")
        await here.fault(at=at, times=2, **fault)
        await here.connected(ada)
        await here.assert_same_as_bank()
        assert await here.open_attempts() == 0
        workflow = "AccountSync" if at == "accounts" else "TransactionSync"
        attempted = await here.count(f"{workflow}Attempted")
        assert attempted == await here.count(f"{workflow}Succeeded") + await here.count(f"{workflow}Failed")
        assert set(await here.reasons(f"{workflow}Failed")) == {"provider_unavailable"}
        assert (await ada.get("/connections"))[0]["status"] == "active"


async def test_a_bank_s_wish_for_patience_is_heeded(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, ada, connection_id):
        await here.fault(at="accounts", status=429, retry_after=3, times=1)
        begun = asyncio.get_running_loop().time()
        await here.sync(ada, connection_id)
        assert asyncio.get_running_loop().time() - begun >= 3


def test_a_bank_s_wish_for_patience_has_a_limit() -> None:
    assert pause(ProviderUnavailable("", timedelta(days=400)), 1) == LONGEST_PAUSE.total_seconds()
    assert pause(ProviderUnavailable("", timedelta(seconds=7)), 9) == 7
    assert all(pause(ProviderUnavailable(""), attempt) <= LONGEST_PAUSE.total_seconds() for attempt in range(1, 2000))


async def test_a_bank_that_is_too_slow_is_not_waited_for(sqlite_url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    async with ready(sqlite_url) as (here, ada, connection_id):
        monkeypatch.setattr(bank_module, "LONGEST_ANSWER", 0.3)
        await here.fault(at="accounts", delay_seconds=5, times=1)
        await here.sync(ada, connection_id)
        assert await here.reasons("AccountSyncFailed") == ["provider_unavailable"]


LIES = ["float_amount", "nan", "huge", "unknown_currency", "missing_field", "not_json", "wrong_shape"]


@pytest.mark.parametrize("lie", LIES)
async def test_of_accounts_that_can_t_be_true_nothing_is_stored(sqlite_url: str, lie: str) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        await here.at_bank.put("/sandbox/people/Ada")
        await here.fault(lie=lie)
        connection_id = await here.connect(ada)
        await here.until("AccountSyncFailed", 3)
        assert set(await here.reasons("AccountSyncFailed")) == {"provider_invalid_data"}
        assert await stored(here) == (0, 0)

        # given up, and not in the way of what comes later
        await here.at_bank.delete("/sandbox/people/Ada/faults")
        before = len(here.bank.people.find("Ada").accounts)
        assert (await ada("POST", f"/connections/{connection_id}/sync")).status_code == 202
        await here.until("TransactionSyncSucceeded", before)
        await here.assert_same_as_bank()


@pytest.mark.parametrize("lie", LIES)
async def test_of_transactions_that_can_t_be_true_nothing_is_stored(sqlite_url: str, lie: str) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        here.wire.held["/api/accounts"] = let_go = asyncio.Event()
        await here.connect(ada)

        async def listed() -> bool:
            return here.wire.asked("/api/accounts") == 1

        await eventually(listed)
        await here.fault(lie=lie, times=1)  # what was listed is on its way already
        let_go.set()
        count = len(here.bank.people.find("Ada").accounts)
        await here.until("TransactionSyncFailed", 1)

        async def all_there() -> bool:
            return await here.count("TransactionSyncSucceeded") >= 2 * count - 1

        await eventually(all_there)
        assert await here.reasons("TransactionSyncFailed") == ["provider_invalid_data"]
        await here.assert_same_as_bank()


async def test_a_lie_is_reported_by_account_and_field_and_its_value_is_not(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, ada, connection_id):
        await here.fault(lie="huge")
        assert (await ada("POST", f"/connections/{connection_id}/sync")).status_code == 202
        (first, *_) = await here.dashtam.logged("event_handler_failed")
        account_id = here.bank.people.find("Ada").accounts[0].id
        assert f"account {account_id}: balance: " in first["error_message"]
        assert "99999" not in here.dashtam.output.getvalue()


async def test_a_wrong_balance_is_the_bank_s_word_until_it_says_otherwise(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, ada, connection_id):
        count = len(await ada.get("/accounts"))
        await here.fault(lie="wrong_balance", times=1)
        await here.sync(ada, connection_id)
        assert await here.count("AccountBalanceUpdated") == count
        await here.sync(ada, connection_id)
        assert await here.count("AccountBalanceUpdated") == 2 * count
        await here.assert_same_as_bank()


async def test_pages_that_were_stored_before_a_fault_are_not_fetched_again(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bank_module, "PAGE", 10)
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        person = here.bank.people.welcome("Ada")
        path = f"/api/accounts/{person.accounts[0].id}/transactions"
        here.wire.held[path] = let_go = asyncio.Event()
        await here.connect(ada)

        async def asked() -> bool:
            return here.wire.asked(path) == 1

        await eventually(asked)
        here.wire.cut.append(path)  # the first page's answer is lost …
        let_go.set()
        await here.until("TransactionSyncSucceeded", len(person.accounts))
        pages = sum(-(-len(account.transactions) // 10) for account in person.accounts)
        assert here.wire.asked("/transactions") == pages + 1  # … and it alone was asked for twice
        await here.assert_same_as_bank()


async def test_a_bank_that_forgot_its_cursors_is_read_from_the_beginning_without_a_double(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        async with here.dashtam.application.database.get_session() as session:
            await session.execute(update(AccountModel).values(cursor="after-999999"))
        await here.tell("activity", transactions=4)
        await here.sync(ada, connection_id)
        await here.assert_same_as_bank()
        assert await here.count("TransactionSyncFailed") == 0


async def test_disconnecting_while_a_sync_is_under_way_leaves_accounts_closed(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        await here.tell("activity", transactions=4)
        here.wire.held["/api/accounts"] = let_go = asyncio.Event()
        assert (await ada("POST", f"/connections/{connection_id}/sync")).status_code == 202

        async def under_way() -> bool:
            return "/api/accounts" not in here.wire.held

        await eventually(under_way)
        assert (await ada("DELETE", f"/connections/{connection_id}")).status_code == 204
        let_go.set()
        await here.until("AccountSyncFailed", 1)
        assert await here.reasons("AccountSyncFailed") == ["not_connected"]
        assert {account["status"] for account in await ada.get("/accounts")} == {"closed"}


async def test_no_failed_sync_stays_behind_as_a_dead_letter(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, ada, connection_id):
        await here.fault(lie="nan")
        await ada("POST", f"/connections/{connection_id}/sync")
        await here.until("AccountSyncFailed", 3)

        async def skipped() -> bool:
            async with here.dashtam.bus.engine.connect() as connection:
                states = list(await connection.scalars(select(exception.c.state)))
            return states == [] or set(states) == {"skipped"}

        await eventually(skipped)


# What a bank may answer that the sandbox never does


class Rogue:
    """A bank that answers every request with what it is told to."""

    def __init__(self, answer: Response) -> None:
        self.answer = answer
        self.cookies: list[str | None] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        self.cookies.append(Request(scope).headers.get("cookie"))
        await self.answer(scope, receive, send)


@asynccontextmanager
async def at(app: ASGIApp) -> AsyncIterator[OAuthBank]:
    http = BankHttp(httpx.ASGITransport(app))
    try:
        yield OAuthBank(SANDBOX, http, redirect_uri="http://127.0.0.1:8000/callback", clock=lambda: datetime.now(UTC))
    finally:
        await http.aclose()


def account(**changes: object) -> dict[str, object]:
    listed = {"id": "1", "name": "One", "type": "checking", "currency": "EUR", "balance": "1.00", "status": "open"}
    return listed | changes


def page(*accounts: dict[str, object], following: object = None) -> Response:
    return Response(json.dumps({"accounts": accounts, "next": following}))


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (Response(b"x" * (LARGEST_ANSWER + 1)), "has more than 1,048,576 bytes"),
        (Response(b"\x1f\x8b", headers={"content-encoding": "gzip"}), "compressed"),
        (Response(b"[" * 100_000), "not JSON"),
        (Response(b"\xff"), "not JSON"),
        (Response(b"[]"), "not a JSON object"),
        (Response(b"{}"), "accounts: it is not a list"),
        (page(account(), account()), "account 1: it is listed twice"),
        (page(account(), following=7), "page: next: it is not text"),
        (page(account(id=1)), "account number 1: id: it is not text"),
        (page(account(id="..")), "account number 1: id"),
        (page(account(id="a\nb")), "account number 1: id: it has characters"),
        (page(account(id="x" * 201)), "account number 1: id: it has not 1 to 200"),
        (page(account(name="a\x00b")), "account 1: name: it has characters"),
        (page(account(name="\ud800")), "account 1: name: it has characters"),
        (page(account(type="piggy bank")), "account 1: type: it is none of checking"),
        (page(account(status=True)), "account 1: status"),
        (page(account(balance=1.5)), "account 1: balance: the amount is not text"),
        (page(account(balance=None)), "account 1: balance: the amount is not text"),
        (page(account(balance="1e3")), "account 1: balance"),
        (page(account(balance="Infinity")), "account 1: balance"),
        (page(account(balance="１.00")), "account 1: balance"),
        (page(account(balance="1.001")), "account 1: balance: the amount has more than the 2 decimals"),
        (page(account(currency="eur")), "account 1: balance: the currency is none"),
        (page(account(currency=["EUR"])), "account 1: balance: the currency is not text"),
    ],
)
async def test_an_answer_that_can_t_be_true_is_refused_where_it_is_wrong(answer: Response, message: str) -> None:
    async with at(Rogue(answer)) as bank:
        with pytest.raises(ProviderInvalidData, match=message):
            await bank.accounts("token")


async def test_a_redirect_is_not_followed() -> None:
    rogue = Rogue(RedirectResponse("http://169.254.169.254/"))
    async with at(rogue) as bank:
        with pytest.raises(ProviderRefused, match="307"):
            await bank.accounts("token")
    assert len(rogue.cookies) == 1


async def test_a_bank_with_pages_without_end_is_left_after_a_thousand(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = 0

    async def endless(scope: Any, receive: Any, send: Any) -> None:
        nonlocal asked
        asked += 1
        await page(account(id=str(asked)), following=str(asked))(scope, receive, send)

    async with at(endless) as bank:
        with pytest.raises(ProviderInvalidData, match="1,000 pages"):
            await bank.accounts("token")
    assert asked == 1000


async def test_a_page_that_follows_itself_is_refused() -> None:
    async with at(Rogue(page(following="again"))) as bank:
        with pytest.raises(ProviderInvalidData, match="next"):
            await bank.accounts("token")


async def test_a_cookie_that_a_bank_sets_is_not_sent_back_for_the_next_user() -> None:
    rogue = Rogue(page())
    rogue.answer.set_cookie("who", "ada")
    async with at(rogue) as bank:
        for _ in range(2):
            await bank.accounts("token")
    assert rogue.cookies == [None, None]


@pytest.mark.parametrize(
    ("answer", "field"),
    [
        ({"token_type": "mac", "access_token": "a"}, "token_type"),
        ({"token_type": "Bearer", "access_token": "a\r\nX: y"}, "access_token"),
        ({"token_type": "Bearer"}, "access_token"),
        ({"token_type": "Bearer", "access_token": "a", "refresh_token": 7}, "refresh_token"),
        ({"token_type": "Bearer", "access_token": "a", "expires_in": "900"}, "expires_in"),
        ({"token_type": "Bearer", "access_token": "a", "expires_in": -1}, "expires_in"),
    ],
)
async def test_tokens_that_are_none_are_refused(answer: dict[str, object], field: str) -> None:
    async with at(Rogue(Response(json.dumps(answer)))) as bank:
        with pytest.raises(ProviderInvalidData, match=f"tokens: {field}"):
            await bank.exchange("code", "verifier")


async def test_a_bank_that_does_not_rotate_leaves_the_refresh_token_as_it_is() -> None:
    async with at(Rogue(Response('{"token_type": "bearer", "access_token": "new"}'))) as bank:
        fresh = await bank.refresh(Tokens(access="old", refresh="kept", expires_at=None))
    assert fresh == Tokens(access="new", refresh="kept", expires_at=None)


@pytest.mark.parametrize(
    ("said", "heard"),
    [
        ("120", timedelta(minutes=2)),
        ("-5", None),
        ("1e9", None),
        ("soon", None),
        ("", None),
        ("Wed, 21 Oct 2015 07:28:00 GMT", timedelta()),
        ("Wed, 99 Oct 2015 07:28:00 GMT", None),
        ("9" * 400, None),
    ],
)
async def test_retry_after_is_heard_where_it_makes_sense(said: str, heard: timedelta | None) -> None:
    async with at(Rogue(Response(status_code=429, headers={"retry-after": said}))) as bank:
        with pytest.raises(ProviderUnavailable) as error:
            await bank.accounts("token")
    assert error.value.retry_after == heard


async def test_transactions_in_another_currency_or_at_no_time_are_refused() -> None:
    ours = known()
    right = {
        "id": "t1",
        "booked_at": "2026-11-01T10:00:00Z",
        "amount": "1.00",
        "currency": "EUR",
        "description": "",
        "counterparty": "",
    }
    for changes, where in (
        ({"currency": "USD"}, "currency"),
        ({"booked_at": "2026-11-01T10:00:00"}, "booked_at"),
        ({"booked_at": "0001-01-01T00:00:00+23:00"}, "booked_at"),
        ({"booked_at": "yesterday"}, "booked_at"),
        ({"description": "x" * 1001}, "description"),
        ({"counterparty": None}, "counterparty"),
    ):
        answer = {"transactions": [right | changes], "next": None, "cursor": None}
        async with at(Rogue(Response(json.dumps(answer)))) as bank:
            with pytest.raises(ProviderInvalidData, match=f"account 1: transaction t1: {where}"):
                await bank.transactions("token", ours)


# Which facts follow from a list


CONNECTION = ProviderConnection(
    user_id=uuid4(), provider_id=SANDBOX.id, provider_name="sandbox", connected_at=datetime.now(UTC)
)


def known(status: AccountStatus = AccountStatus.OPEN) -> Account:
    return Account(
        user_id=CONNECTION.user_id,
        connection_id=CONNECTION.id,
        provider_id=CONNECTION.provider_id,
        provider_account_id="1",
        name="One",
        type=AccountType.CHECKING,
        balance=Money(Decimal("1.00"), "EUR"),
        status=status,
        updated_at=datetime.now(UTC),
    )


def listed(
    *,
    id_: str = "1",
    name: str = "One",
    type_: AccountType = AccountType.CHECKING,
    balance: str = "1.00",
    currency: str = "EUR",
    status: AccountStatus = AccountStatus.OPEN,
) -> ListedAccount:
    return ListedAccount(
        provider_account_id=id_, name=name, type=type_, balance=Money.parse(balance, currency), status=status
    )


CLOSED = AccountStatus.CLOSED


@pytest.mark.parametrize(
    ("before", "now", "facts"),
    [
        ([], [listed()], [AccountCreated]),
        ([], [listed(status=CLOSED)], []),
        ([known()], [listed()], []),
        ([known()], [listed(name="Uno")], [AccountUpdated]),
        ([known()], [listed(type_=AccountType.SAVINGS)], [AccountUpdated]),
        ([known()], [listed(balance="2.00")], [AccountBalanceUpdated]),
        ([known()], [listed(balance="2.00", name="Uno")], [AccountUpdated, AccountBalanceUpdated]),
        ([known()], [listed(balance="0.00", status=CLOSED)], [AccountBalanceUpdated, AccountClosed]),
        ([known()], [], [AccountClosed]),
        ([known(CLOSED)], [], []),
        ([known(CLOSED)], [listed(status=CLOSED)], []),
        ([known(CLOSED)], [listed()], [AccountUpdated]),
        ([known()], [listed(id_="2")], [AccountCreated, AccountClosed]),
    ],
)
def test_facts_follow_from_what_is_listed(before: list[Account], now: list[ListedAccount], facts: list[type]) -> None:
    changed, happened = reconciled(CONNECTION, before, now, datetime.now(UTC))
    assert [type(fact) for fact in happened] == facts
    assert len(changed) == len({fact.account_id for fact in happened})  # type: ignore[attr-defined]


def test_an_account_does_not_change_its_currency() -> None:
    with pytest.raises(ProviderInvalidData, match="account 1: currency"):
        reconciled(CONNECTION, [known()], [listed(currency="USD")], datetime.now(UTC))


# Money


@pytest.mark.parametrize(
    ("text", "currency", "shown"),
    [
        ("1234.5", "EUR", "1234.50 EUR"),
        ("-0.00", "EUR", "0.00 EUR"),
        ("-7", "JPY", "-7 JPY"),
        ("7.00", "JPY", "7 JPY"),
        ("1.234", "KWD", "1.234 KWD"),
        ("999999999999999.99", "USD", "999999999999999.99 USD"),
    ],
)
def test_money_has_the_decimals_of_its_currency(text: str, currency: str, shown: str) -> None:
    assert str(Money.parse(text, currency)) == shown


@pytest.mark.parametrize(
    ("amount", "currency"),
    [
        (Decimal("NaN"), "EUR"),
        (Decimal("Infinity"), "EUR"),
        (Decimal("0.001"), "EUR"),
        (Decimal("0.1"), "JPY"),
        (Decimal("1E+15"), "EUR"),
        (Decimal(1), "QQQ"),
        (Decimal(1), ""),
        (1.0, "EUR"),
        (1, "EUR"),
    ],
)
def test_what_is_no_money_is_refused_and_not_repeated(amount: Any, currency: str) -> None:
    with pytest.raises(InvalidMoney) as refused:
        Money(amount, currency)
    assert "NaN" not in str(refused.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "1,00",
        "1_000",
        "+1",
        " 1",
        "1.",
        ".5",
        "0x1",
        "１",
        "1\n",
        "9" * 16,
        pytest.param("1" + "0" * 10**6, id="1…"),
    ],
)
def test_amounts_are_written_in_one_way(text: str) -> None:
    with pytest.raises(InvalidMoney):
        Money.parse(text, "EUR")
