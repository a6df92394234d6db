"""Accounts, transactions and balances over HTTP; amounts are text, as a JSON number may go through a float."""

from datetime import datetime
from typing import Annotated, Any, Literal
from uuid import UUID

from fastapi import APIRouter, Depends, Query
from pydantic import BaseModel

from dashtam.application.accounts import AccountQueries
from dashtam.domain.account import Account, Transaction
from dashtam.presentation.authentication import SignedIn, SignedInDependency
from dashtam.presentation.problems import describes


class AccountShown(BaseModel):
    id: UUID
    connection_id: UUID
    provider_id: UUID
    name: str
    type: Literal["checking", "savings", "credit_card", "investment"]
    status: Literal["open", "closed"]
    balance: str
    currency: str
    updated_at: datetime


class TransactionShown(BaseModel):
    id: UUID
    booked_at: datetime
    amount: str
    currency: str
    description: str
    counterparty: str


class TransactionsShown(BaseModel):
    transactions: list[TransactionShown]
    next: UUID | None
    """What to ask for as `after` to see more; null on the last page."""


class BalanceShown(BaseModel):
    currency: str
    amount: str
    account_count: int


def account_routes(queries: AccountQueries, signed_in: SignedInDependency) -> APIRouter:
    routes = APIRouter(tags=["accounts"])

    @routes.get("/accounts", response_model=list[AccountShown], responses=describes(401))
    async def show_accounts(user: SignedIn = Depends(signed_in)) -> Any:
        return [_account(account) for account in await queries.of_user(user.user_id)]

    @routes.get("/accounts/{account_id}", response_model=AccountShown, responses=describes(401, 404, 422))
    async def show_account(account_id: UUID, user: SignedIn = Depends(signed_in)) -> Any:
        return _account(await queries.account(user.user_id, account_id))

    @routes.get(
        "/accounts/{account_id}/transactions", response_model=TransactionsShown, responses=describes(401, 404, 422)
    )
    async def show_transactions(
        account_id: UUID,
        limit: Annotated[int, Query(ge=1, le=1000, description="how many at most, the newest first")] = 100,
        after: Annotated[UUID | None, Query(description="the `next` of the page before")] = None,
        user: SignedIn = Depends(signed_in),
    ) -> Any:
        page = await queries.transactions(user.user_id, account_id, after=after, limit=limit)
        return TransactionsShown(transactions=[_transaction(each) for each in page.transactions], next=page.after)

    @routes.get("/balances", response_model=list[BalanceShown], responses=describes(401))
    async def show_balances(user: SignedIn = Depends(signed_in)) -> Any:
        return [
            BalanceShown(currency=each.currency, amount=f"{each.amount:f}", account_count=each.account_count)
            for each in await queries.balances(user.user_id)
        ]

    return routes


def _account(account: Account) -> AccountShown:
    return AccountShown(
        id=account.id,
        connection_id=account.connection_id,
        provider_id=account.provider_id,
        name=account.name,
        type=account.type.value,
        status=account.status.value,
        balance=f"{account.balance.amount:f}",
        currency=account.balance.currency,
        updated_at=account.updated_at,
    )


def _transaction(transaction: Transaction) -> TransactionShown:
    return TransactionShown(
        id=transaction.id,
        booked_at=transaction.booked_at,
        amount=f"{transaction.money.amount:f}",
        currency=transaction.money.currency,
        description=transaction.description,
        counterparty=transaction.counterparty,
    )
