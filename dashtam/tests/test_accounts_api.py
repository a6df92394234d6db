"""Accounts, transactions and balances over HTTP: a user's own, exact, page by page; on both databases."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from decimal import Decimal
from typing import Any
from uuid import uuid4

import pytest
from banked import Banked, banked
from served import Person
from sqlalchemy import func, select, text, update

from dashtam.infrastructure.tables import TransactionModel

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


@asynccontextmanager
async def ready(database_url: str) -> AsyncIterator[tuple[Banked, Person, list[dict[str, Any]]]]:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        await here.connected(ada)
        yield here, ada, await ada.get("/accounts")


async def all_pages(person: Person, account_id: str, limit: int) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    after = ""
    while True:
        page = await person.get(f"/accounts/{account_id}/transactions?limit={limit}{after}")
        assert len(page["transactions"]) <= limit
        found += page["transactions"]
        if page["next"] is None:
            return found
        assert len(page["transactions"]) == limit
        after = f"&after={page['next']}"


async def test_an_account_is_shown_with_its_balance_as_text(database_url: str) -> None:
    async with ready(database_url) as (here, ada, accounts):
        theirs = {account.name: account for account in here.bank.people.find("Ada").accounts}
        assert len(accounts) == len(theirs)
        for account in accounts:
            assert account["balance"] == f"{theirs[account['name']].balance:f}"
            assert account["currency"] == theirs[account["name"]].currency
            assert account["type"] == theirs[account["name"]].type
            assert account["status"] == "open"
            assert await ada.get(f"/accounts/{account['id']}") == account


async def test_balances_are_the_sums_of_open_accounts_by_currency(database_url: str) -> None:
    async with ready(database_url) as (_, ada, accounts):
        sums: dict[str, Decimal] = {}
        for account in accounts:
            sums[account["currency"]] = sums.get(account["currency"], Decimal()) + Decimal(account["balance"])
        balances = await ada.get("/balances")
        assert {each["currency"]: Decimal(each["amount"]) for each in balances} == sums
        assert sum(each["account_count"] for each in balances) == len(accounts)
        assert all(isinstance(each["amount"], str) for each in balances)


@pytest.mark.parametrize("limit", [1, 7, 1000])
async def test_pages_hold_every_transaction_once_the_newest_first(database_url: str, limit: int) -> None:
    async with ready(database_url) as (here, ada, accounts):
        account = accounts[0]
        (theirs,) = (each for each in here.bank.people.find("Ada").accounts if each.name == account["name"])
        found = await all_pages(ada, account["id"], limit)
        assert [each["amount"] for each in found] == [f"{each.amount:f}" for each in reversed(theirs.transactions)]
        assert [each["description"] for each in found] == [each.description for each in reversed(theirs.transactions)]
        assert len({each["id"] for each in found}) == len(theirs.transactions)


async def test_pages_hold_transactions_of_the_same_moment_too(database_url: str) -> None:
    async with ready(database_url) as (here, ada, accounts):
        async with here.dashtam.application.database.get_session() as session:
            await session.execute(update(TransactionModel).values(booked_at=here.clock()))
            count = await session.scalar(select(func.count()).select_from(TransactionModel))
        found = [each for account in accounts for each in await all_pages(ada, account["id"], 9)]
        assert len({each["id"] for each in found}) == len(found) == count


async def test_what_is_booked_while_somebody_turns_pages_shifts_none(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, ada, accounts):
        account_id = accounts[0]["id"]
        before = await all_pages(ada, account_id, 1000)
        first = await ada.get(f"/accounts/{account_id}/transactions?limit=10")
        await here.tell("activity", transactions=12)
        (connection,) = await ada.get("/connections")
        await here.sync(ada, connection["id"])
        second = await ada.get(f"/accounts/{account_id}/transactions?limit=10&after={first['next']}")
        assert first["transactions"] + second["transactions"] == before[:20]


@pytest.mark.parametrize("what", ["", "/transactions"])
async def test_somebody_elses_account_is_not_found(sqlite_url: str, what: str) -> None:
    async with ready(sqlite_url) as (here, _, accounts):
        eve = await here.dashtam.sign_up("eve@example.com")
        for account_id in (accounts[0]["id"], uuid4()):
            answer = await eve("GET", f"/accounts/{account_id}{what}")
            assert (answer.status_code, answer.json()["reason"]) == (404, "account_not_found")
        assert await eve.get("/accounts") == []
        assert await eve.get("/balances") == []
        assert await eve.get("/connections") == []


async def test_pages_begin_after_a_transaction_of_the_account(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (_, ada, accounts):
        one, other = (account["id"] for account in accounts[:2])
        elsewhere = (await ada.get(f"/accounts/{other}/transactions"))["transactions"][0]["id"]
        for after in (elsewhere, uuid4()):
            answer = await ada("GET", f"/accounts/{one}/transactions?after={after}")
            assert (answer.status_code, answer.json()["reason"]) == (422, "transaction_not_found")


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=many", "after=me"])
async def test_a_page_that_makes_no_sense_is_refused(sqlite_url: str, query: str) -> None:
    async with ready(sqlite_url) as (_, ada, accounts):
        answer = await ada("GET", f"/accounts/{accounts[0]['id']}/transactions?{query}")
        assert (answer.status_code, answer.json()["reason"]) == (422, "invalid")


async def test_two_users_at_one_bank_each_see_their_own(database_url: str) -> None:
    async with ready(database_url) as (here, ada, accounts):
        eve = await here.dashtam.sign_up("eve@example.com")
        await here.connected(eve, "Eve")
        assert len(await eve.get("/accounts")) == len(here.bank.people.find("Eve").accounts)
        assert await ada.get("/accounts") == accounts


async def test_a_page_of_transactions_is_read_from_the_index(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, _, _accounts):
        async with here.dashtam.application.database.get_session() as session:
            plan = await session.execute(
                text(
                    "EXPLAIN QUERY PLAN SELECT * FROM transactions WHERE account_id = 'a' "
                    "AND (booked_at, id) < ('b', 'c') ORDER BY booked_at DESC, id DESC LIMIT 10"
                )
            )
            steps = " ".join(row.detail for row in plan)
        assert "USING INDEX ix_transactions_account_id_booked_at_id" in steps
        assert "TEMP B-TREE" not in steps


async def test_the_api_describes_money_as_text(sqlite_url: str) -> None:
    async with banked(sqlite_url) as here:
        schemas = (await here.dashtam.http.get("/openapi.json")).json()["components"]["schemas"]
        for shown, field in (("AccountShown", "balance"), ("TransactionShown", "amount"), ("BalanceShown", "amount")):
            assert schemas[shown]["properties"][field]["type"] == "string"
