"""Accounts and transactions in the database."""

from typing import Any
from uuid import UUID

from sqlalchemy import select, tuple_, update
from sqlalchemy.ext.asyncio import AsyncSession

from dashtam.domain.account import (
    Account,
    AccountStatus,
    AccountType,
    Money,
    Transaction,
    TransactionNotFound,
    TransactionPage,
)
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.rows import insert
from dashtam.infrastructure.tables import AccountModel, TransactionModel


class SqlAccountRepository:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def find_by_id(self, account_id: UUID, *, for_update: bool = False) -> Account | None:
        session = self._database.current("AccountRepository.find_by_id")
        lock = False
        if for_update:
            lock = not await _locked(session, account_id)
        row = await session.get(AccountModel, account_id, populate_existing=True, with_for_update=lock)
        return None if row is None else _account(row)

    async def of_user(self, user_id: UUID) -> list[Account]:
        session = self._database.current("AccountRepository.of_user")
        return await _accounts(session, AccountModel.user_id == user_id)

    async def of_connection(self, connection_id: UUID) -> list[Account]:
        session = self._database.current("AccountRepository.of_connection")
        return await _accounts(session, AccountModel.connection_id == connection_id)

    async def save(self, account: Account) -> None:
        session = self._database.current("AccountRepository.save")
        changing = {
            "name": account.name,
            "type": account.type,
            "status": account.status,
            "balance": account.balance.amount,
            "currency": account.balance.currency,
            "updated_at": account.updated_at,
            "complete": account.complete,
        }
        statement = insert(session, AccountModel).values(
            id=account.id,
            user_id=account.user_id,
            connection_id=account.connection_id,
            provider_id=account.provider_id,
            provider_account_id=account.provider_account_id,
            **changing,
        )
        await session.execute(statement.on_conflict_do_update(index_elements=["id"], set_=changing))

    async def move_cursor(self, account: Account) -> None:
        session = self._database.current("AccountRepository.move_cursor")
        moved = update(AccountModel).where(AccountModel.id == account.id)
        await session.execute(moved.values(cursor=account.cursor, complete=account.complete))


class SqlTransactionRepository:
    def __init__(self, database: Database) -> None:
        self._database = database

    async def save(self, account: Account, transactions: list[Transaction]) -> int:
        session = self._database.current("TransactionRepository.save")
        if not transactions:
            return 0
        named = [transaction.provider_transaction_id for transaction in transactions]
        known = set(
            await session.scalars(
                select(TransactionModel.provider_transaction_id).where(
                    TransactionModel.account_id == account.id, TransactionModel.provider_transaction_id.in_(named)
                )
            )
        )
        statement = insert(session, TransactionModel)
        changing = {
            name: statement.excluded[name]
            for name in ("booked_at", "amount", "currency", "description", "counterparty")
        }
        await session.execute(
            statement.on_conflict_do_update(index_elements=["account_id", "provider_transaction_id"], set_=changing),
            [_row(transaction) for transaction in transactions],
        )
        return len(set(named) - known)

    async def page(self, account_id: UUID, *, after: UUID | None, limit: int) -> TransactionPage:
        session = self._database.current("TransactionRepository.page")
        place = tuple_(TransactionModel.booked_at, TransactionModel.id)
        newest = (
            select(TransactionModel)
            .where(TransactionModel.account_id == account_id)
            .order_by(TransactionModel.booked_at.desc(), TransactionModel.id.desc())
            .limit(limit + 1)  # the one more tells whether there is another page
        )
        if after is not None:
            last = await session.get(TransactionModel, after)
            if last is None or last.account_id != account_id:
                raise TransactionNotFound
            newest = newest.where(place < (last.booked_at, last.id))
        found = [_transaction(row) for row in await session.scalars(newest)]
        page = found[:limit]
        return TransactionPage(transactions=page, after=page[-1].id if len(found) > limit else None)


async def _locked(session: AsyncSession, account_id: UUID) -> bool:
    """SQLite has no row locks: an update that changes nothing locks it as a whole, before anything is read."""
    if session.get_bind().dialect.name != "sqlite":
        return False
    await session.execute(
        update(AccountModel).where(AccountModel.id == account_id).values(id=AccountModel.id),
        execution_options={"synchronize_session": False},
    )
    return True


async def _accounts(session: AsyncSession, here: Any) -> list[Account]:
    found = select(AccountModel).where(here).order_by(AccountModel.id)
    return [_account(row) for row in await session.scalars(found.execution_options(populate_existing=True))]


def _account(row: AccountModel) -> Account:
    return Account(
        id=row.id,
        user_id=row.user_id,
        connection_id=row.connection_id,
        provider_id=row.provider_id,
        provider_account_id=row.provider_account_id,
        name=row.name,
        type=AccountType(row.type),
        balance=Money(row.balance, row.currency),
        status=AccountStatus(row.status),
        updated_at=row.updated_at,
        cursor=row.cursor,
        complete=row.complete,
    )


def _row(transaction: Transaction) -> dict[str, object]:
    return {
        "id": transaction.id,
        "account_id": transaction.account_id,
        "provider_transaction_id": transaction.provider_transaction_id,
        "booked_at": transaction.booked_at,
        "amount": transaction.money.amount,
        "currency": transaction.money.currency,
        "description": transaction.description,
        "counterparty": transaction.counterparty,
    }


def _transaction(row: TransactionModel) -> Transaction:
    return Transaction(
        id=row.id,
        account_id=row.account_id,
        provider_transaction_id=row.provider_transaction_id,
        booked_at=row.booked_at,
        money=Money(row.amount, row.currency),
        description=row.description,
        counterparty=row.counterparty,
    )
