"""What can be read of accounts. Reading changes nothing, so no event tells of it."""

from collections import defaultdict
from dataclasses import dataclass
from decimal import Decimal
from uuid import UUID

from dashtam.application.database import DatabaseProtocol
from dashtam.domain.account import (
    Account,
    AccountNotFound,
    AccountRepository,
    AccountStatus,
    TransactionPage,
    TransactionRepository,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Balance:
    """Of all open accounts in one currency."""

    currency: str
    amount: Decimal
    account_count: int


class AccountQueries:
    """A user's own: each raises `AccountNotFound` for an account of somebody else, as for none."""

    def __init__(
        self, database: DatabaseProtocol, accounts: AccountRepository, transactions: TransactionRepository
    ) -> None:
        self._database = database
        self._accounts = accounts
        self._transactions = transactions

    async def of_user(self, user_id: UUID) -> list[Account]:
        async with self._database.get_session():
            return await self._accounts.of_user(user_id)

    async def account(self, user_id: UUID, account_id: UUID) -> Account:
        async with self._database.get_session():
            return await self._find(user_id, account_id)

    async def transactions(self, user_id: UUID, account_id: UUID, *, after: UUID | None, limit: int) -> TransactionPage:
        """Those after the one whose id is `after`, the newest first. Raises `TransactionNotFound`."""
        async with self._database.get_session():
            await self._find(user_id, account_id)
            return await self._transactions.page(account_id, after=after, limit=limit)

    async def balances(self, user_id: UUID) -> list[Balance]:
        """By currency: what they are together would need rates of exchange."""
        amounts: defaultdict[str, list[Decimal]] = defaultdict(list)
        for account in await self.of_user(user_id):
            if account.status is AccountStatus.OPEN:
                amounts[account.balance.currency].append(account.balance.amount)
        return [
            Balance(currency=currency, amount=sum(each, Decimal()), account_count=len(each))
            for currency, each in sorted(amounts.items())
        ]

    async def _find(self, user_id: UUID, account_id: UUID) -> Account:
        account = await self._accounts.find_by_id(account_id)
        if account is None or account.user_id != user_id:
            raise AccountNotFound
        return account
