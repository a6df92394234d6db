"""Accounts and transactions, for whoever has a token that is good for them."""

import re
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Annotated, Any, Final, Literal, TypeVar

from fastapi import APIRouter, Query
from pydantic import BaseModel
from starlette.requests import Request
from starlette.responses import Response

from dashtam_sandbox_bank.bank import Bank
from dashtam_sandbox_bank.faults import NOT_JSON, suffer, tell
from dashtam_sandbox_bank.people import Account, AccountType, Currency, Person, Transaction
from dashtam_sandbox_bank.refusals import Refused, answer

T = TypeVar("T")

Limit = Annotated[int, Query(ge=1, le=200, description="how many at most")]
Cursor = Annotated[str | None, Query(max_length=100, description="`next` or `cursor` of an earlier answer")]

_CURSOR: Final = re.compile(r"after-([0-9]{1,9})")


class AccountShown(BaseModel):
    id: str
    name: str
    type: AccountType
    currency: Currency
    balance: str
    status: Literal["open", "closed"]
    updated_at: str


class AccountPage(BaseModel):
    accounts: list[AccountShown]
    next: str | None
    """The cursor of the next page, if there is one."""


class TransactionShown(BaseModel):
    id: str
    booked_at: str
    amount: str
    currency: Currency
    description: str
    counterparty: str


class TransactionPage(BaseModel):
    transactions: list[TransactionShown]
    """The oldest first."""
    next: str | None
    """The cursor of the next page, if there is one."""
    cursor: str
    """The place after the last transaction here: ask with it later for what is new by then."""


def show_account(account: Account) -> AccountShown:
    return AccountShown(
        id=account.id,
        name=account.name,
        type=account.type,
        currency=account.currency,
        balance=f"{account.balance:f}",
        status="open" if account.open else "closed",
        updated_at=_rfc3339(account.updated_at),
    )


def show_transaction(transaction: Transaction) -> TransactionShown:
    return TransactionShown(
        id=transaction.id,
        booked_at=_rfc3339(transaction.booked_at),
        amount=f"{transaction.amount:f}",
        currency=transaction.currency,
        description=transaction.description,
        counterparty=transaction.counterparty,
    )


def account_routes(bank: Bank) -> APIRouter:
    routes = APIRouter(prefix="/api", tags=["accounts"])

    def customer(request: Request, scope: str) -> Person:
        """Who the bearer token stands for."""
        scheme, _, value = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not value.strip():
            raise Refused(
                401,
                "unauthorized",
                "Send an access token: Authorization: Bearer …",
                headers={"www-authenticate": 'Bearer realm="sandbox bank"'},
            )
        token = bank.grants.find_token(value.strip(), "access")
        if token is None:
            raise _refuse_token(401, "invalid_token", "This access token is unknown, out of time or revoked.")
        if scope not in token.scope.split():
            raise _refuse_token(403, "insufficient_scope", f"This access token is not good for {scope}.", scope)
        return bank.people.find(token.grant.person)

    def send(person: Person, page: BaseModel, listed: Literal["accounts", "transactions"]) -> Response:
        content: Any = page.model_dump()
        lie = bank.faults.take_lie(person.name, listed)
        if lie == "not_json":
            return Response(NOT_JSON, headers={"cache-control": "no-store"}, media_type="application/json")
        return answer(content if lie is None else tell(lie, content, listed))

    @routes.get("/accounts", responses={200: {"model": AccountPage}})
    async def accounts(request: Request, limit: Limit = 50, cursor: Cursor = None) -> Response:
        person = customer(request, "accounts")
        await suffer(bank.faults.take_fault(person.name, "accounts"))
        found, end = _slice(person.accounts, cursor, limit)
        more = _cursor(end) if end < len(person.accounts) else None
        return send(person, AccountPage(accounts=[show_account(account) for account in found], next=more), "accounts")

    @routes.get("/accounts/{account_id}/transactions", responses={200: {"model": TransactionPage}})
    async def transactions(request: Request, account_id: str, limit: Limit = 50, cursor: Cursor = None) -> Response:
        person = customer(request, "transactions")
        await suffer(bank.faults.take_fault(person.name, "transactions"))
        account = person.account(account_id)
        found, end = _slice(account.transactions, cursor, limit)
        page = TransactionPage(
            transactions=[show_transaction(transaction) for transaction in found],
            next=_cursor(end) if end < len(account.transactions) else None,
            cursor=_cursor(end),
        )
        return send(person, page, "transactions")

    return routes


def _slice(items: Sequence[T], cursor: str | None, limit: int) -> tuple[Sequence[T], int]:
    """Those after the cursor, and the place after the last one of them."""
    begin = 0
    if cursor is not None:
        read = _CURSOR.fullmatch(cursor)
        begin = int(read[1]) if read else -1
        if not 0 <= begin <= len(items):  # one of an earlier run may be further than this run's list
            raise Refused(400, "invalid_cursor", "This cursor leads nowhere. Ask without one, from the beginning.")
    found = items[begin : begin + limit]
    return found, begin + len(found)


def _cursor(place: int) -> str:
    return f"after-{place}"


def _refuse_token(status: int, error: str, description: str, scope: str | None = None) -> Refused:
    challenge = f'Bearer realm="sandbox bank", error="{error}", error_description="{description}"'
    if scope is not None:
        challenge += f', scope="{scope}"'
    return Refused(status, error, description, headers={"www-authenticate": challenge})


def _rfc3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
