"""A bank was connected or a user asks for what is new, whereupon accounts are fetched; whereupon transactions are."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Final, TypeVar
from uuid import UUID

from dashtam.application.bank import Bank, Banks, TransactionsListed, pause
from dashtam.application.database import DatabaseProtocol
from dashtam.application.token_refresh import TokenRefresher
from dashtam.domain import events
from dashtam.domain.account import Account, AccountRepository, AccountStatus, ListedAccount, TransactionRepository
from dashtam.domain.connection import (
    AccessTokenRejected,
    ConnectionNotFound,
    ConnectionRepository,
    CursorRejected,
    InvalidGrant,
    NotConnected,
    ProviderConnection,
    ProviderInvalidData,
    ProviderRefused,
    ProviderUnavailable,
    ReauthorizationRequired,
    UnknownProvider,
)
from dashtam.domain.events import (
    AccountBalanceUpdated,
    AccountClosed,
    AccountCreated,
    AccountSyncRequested,
    AccountSyncSucceeded,
    AccountUpdated,
    ProviderConnectionSucceeded,
)
from dashtam.domain.result import Error, Failure, Result, Success
from whereupon import Discard, DomainEvent, EventBusProtocol, EventContext, RetryLater

T = TypeVar("T")

ATTEMPTS: Final = 12
"""So often a bank is asked for one event, over more than an hour; the next sync asks for the same and more."""
LIES: Final = 3
"""So often, if what it answers can't be true."""
LONGEST_SYNC: Final = 300.0
"""Seconds that one delivery may take; the next goes on with what was not fetched by then."""
MOST_PAGES: Final = 1_000
"""Of one account's transactions in one attempt."""


class SyncOvertaken(Error):
    """Another sync of the same connection or account finished meanwhile, and knows better."""

    reason = "sync_overtaken"

    def __init__(self) -> None:
        super().__init__("Another sync finished meanwhile.")


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestSync:
    user_id: UUID
    connection_id: UUID


class RequestSyncHandler:
    """Has a connection synced in its turn, as after connecting it."""

    def __init__(
        self, connections: ConnectionRepository, event_bus: EventBusProtocol, database: DatabaseProtocol
    ) -> None:
        self._connections = connections
        self._event_bus = event_bus
        self._database = database

    async def handle(
        self, cmd: RequestSync
    ) -> Result[None, ConnectionNotFound | NotConnected | ReauthorizationRequired]:
        async with self._database.get_session() as session:
            connection = await self._connections.find_by_id(cmd.connection_id, for_update=True)
            if connection is None or connection.user_id != cmd.user_id:
                return Failure(ConnectionNotFound())
            try:
                connection.check_usable()
            except (NotConnected, ReauthorizationRequired) as error:
                return Failure(error)
            await self._event_bus.publish(
                AccountSyncRequested(user_id=cmd.user_id, connection_id=cmd.connection_id), session=session
            )
        return Success(None)


class _BankAccess:
    """Calls to a bank on behalf of a connection, with an access token that is good."""

    def __init__(self, banks: Banks, tokens: TokenRefresher) -> None:
        self._banks = banks
        self._tokens = tokens

    async def call(self, connection: ProviderConnection, ask: Callable[[Bank, str], Awaitable[T]]) -> T:
        bank = self._banks.get(connection.provider_name)
        if bank is None:
            raise UnknownProvider
        access = await self._tokens.access(connection.id)
        try:
            return await ask(bank, access.token)
        except AccessTokenRejected:
            access = await self._tokens.access(connection.id, rejected=access.version)
        try:
            return await ask(bank, access.token)
        except AccessTokenRejected as error:
            raise ProviderUnavailable("The bank does not accept the access token it has just given.") from error


class AccountSync:
    """Has Dashtam's accounts be as the bank lists them: all of that in one transaction, or nothing."""

    def __init__(
        self,
        banks: Banks,
        tokens: TokenRefresher,
        connections: ConnectionRepository,
        accounts: AccountRepository,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
    ) -> None:
        self._access = _BankAccess(banks, tokens)
        self._connections = connections
        self._accounts = accounts
        self._event_bus = event_bus
        self._database = database

    async def sync_accounts(
        self, event: ProviderConnectionSucceeded | AccountSyncRequested, context: EventContext
    ) -> None:
        if event.connection_id is None:
            raise Discard("the event names no connection")
        async with _settling(context):
            async with self._database.get_session():
                connection = await self._connections.find_by_id(event.connection_id)
            if connection is None:
                raise ConnectionNotFound
            if connection.synced_at is not None and connection.synced_at > event.occurred_at:
                return  # one that began after this was asked for has seen all of it
            await self.sync(connection)

    async def sync(self, connection: ProviderConnection) -> None:
        """Raises the error that it fails for, as *Failed* says."""
        began_at = datetime.now(UTC)
        async with self._event_bus.workflow(
            events.AccountSync, user_id=connection.user_id, connection_id=connection.id
        ) as attempt:
            listed = await self._access.call(connection, lambda bank, token: bank.accounts(token))
            async with self._database.get_session() as session:
                current = await self._connections.find_by_id(connection.id, for_update=True)
                if current is None:
                    raise ConnectionNotFound
                current.check_usable()
                if current.sync_version != connection.sync_version:
                    raise SyncOvertaken
                known = await self._accounts.of_connection(current.id)
                changed, facts = reconciled(current, known, listed, datetime.now(UTC))
                for account in changed:
                    await self._accounts.save(account)
                current.synced(began_at)
                await self._connections.save(current)
                if facts:
                    await self._event_bus.publish(*facts, session=session)
                count = sum(account.status is AccountStatus.OPEN for account in listed)
                await attempt.succeeded(account_count=count, session=session)


def reconciled(
    connection: ProviderConnection, known: list[Account], listed: list[ListedAccount], now: datetime
) -> tuple[list[Account], list[DomainEvent]]:
    """The accounts that have to be saved to be as the bank lists them, and what that means has happened.

    One that is no longer listed is closed; one that was closed before we saw it is none of ours. Raises
    `ProviderInvalidData` for what can't happen to an account.
    """
    ours = {account.provider_account_id: account for account in known}
    changed: list[Account] = []
    facts: list[DomainEvent] = []
    for theirs in listed:
        account = ours.pop(theirs.provider_account_id, None)
        if account is None:
            if theirs.status is AccountStatus.OPEN:
                account = _opened(connection, theirs, now)
                changed.append(account)
                facts.append(
                    AccountCreated(
                        user_id=account.user_id,
                        provider_id=account.provider_id,
                        account_id=account.id,
                        account_type=account.type,
                        balance=account.balance.amount,
                        currency=account.balance.currency,
                    )
                )
            continue
        happened = _updated(account, theirs)
        if happened:
            account.updated_at = now
            changed.append(account)
            facts.extend(happened)
    for account in ours.values():
        if account.status is AccountStatus.OPEN:
            account.status, account.updated_at = AccountStatus.CLOSED, now
            account.complete = True  # as complete as it gets
            changed.append(account)
            facts.append(_closed(account))
    return changed, facts


def _opened(connection: ProviderConnection, listed: ListedAccount, now: datetime) -> Account:
    return Account(
        user_id=connection.user_id,
        connection_id=connection.id,
        provider_id=connection.provider_id,
        provider_account_id=listed.provider_account_id,
        name=listed.name,
        type=listed.type,
        balance=listed.balance,
        updated_at=now,
    )


def _updated(account: Account, listed: ListedAccount) -> list[DomainEvent]:
    if account.balance.currency != listed.balance.currency:
        raise ProviderInvalidData(f"account {account.provider_account_id}: currency: it was another one before")
    facts: list[DomainEvent] = []
    reopened = account.status is AccountStatus.CLOSED and listed.status is AccountStatus.OPEN
    if reopened or (account.name, account.type) != (listed.name, listed.type):
        account.name, account.type = listed.name, listed.type
        facts.append(
            AccountUpdated(
                user_id=account.user_id,
                provider_id=account.provider_id,
                account_id=account.id,
                account_type=account.type,
            )
        )
    if account.balance != listed.balance:
        facts.append(
            AccountBalanceUpdated(
                user_id=account.user_id,
                account_id=account.id,
                previous_balance=account.balance.amount,
                new_balance=listed.balance.amount,
                currency=account.balance.currency,
            )
        )
        account.balance = listed.balance
    if account.status is AccountStatus.OPEN and listed.status is AccountStatus.CLOSED:
        facts.append(_closed(account))
    account.status = listed.status
    account.complete = account.complete and account.status is AccountStatus.CLOSED
    return facts


def _closed(account: Account) -> AccountClosed:
    return AccountClosed(user_id=account.user_id, provider_id=account.provider_id, account_id=account.id)


class TransactionSync:
    """Fetches what was booked since last time, page by page; each is stored with the place to go on from."""

    def __init__(
        self,
        banks: Banks,
        tokens: TokenRefresher,
        connections: ConnectionRepository,
        accounts: AccountRepository,
        transactions: TransactionRepository,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
    ) -> None:
        self._access = _BankAccess(banks, tokens)
        self._connections = connections
        self._accounts = accounts
        self._transactions = transactions
        self._event_bus = event_bus
        self._database = database

    async def sync_transactions(self, event: AccountSyncSucceeded, context: EventContext) -> None:
        async with _settling(context):
            async with self._database.get_session():
                connection = await self._connections.find_by_id(event.connection_id)
                accounts = await self._accounts.of_connection(event.connection_id)
            if connection is None:
                raise ConnectionNotFound
            failed: list[ProviderInvalidData | ProviderRefused] = []
            for account in accounts:
                if not account.complete:  # one that was closed since last time has transactions from before that
                    try:
                        await self.sync(connection, account)
                    except (ProviderInvalidData, ProviderRefused) as error:
                        failed.append(error)  # of this account; the others may be in order
            if failed:
                raise failed[0]

    async def sync(self, connection: ProviderConnection, account: Account) -> int:
        """How many were new. Raises the error that it fails for, as *Failed* says; pages stored before stay."""
        async with self._event_bus.workflow(
            events.TransactionSync, user_id=account.user_id, account_id=account.id
        ) as attempt:
            new = 0
            for _ in range(MOST_PAGES):
                try:
                    listed = await self._access.call(connection, partial(_transactions, account))
                except CursorRejected:
                    # from the beginning: what we have is told apart by the bank's ids
                    listed = await self._access.call(connection, partial(_transactions, replace(account, cursor=None)))
                async with self._database.get_session() as session:
                    current = await self._accounts.find_by_id(account.id, for_update=True)
                    if current is None or current.complete or current.cursor != account.cursor:
                        raise SyncOvertaken
                    new += await self._transactions.save(current, listed.transactions)
                    if listed.cursor is not None:
                        current.cursor = listed.cursor
                    current.complete = current.status is AccountStatus.CLOSED and not listed.more
                    await self._accounts.move_cursor(current)
                    if not listed.more:
                        await attempt.succeeded(transaction_count=new, session=session)
                        return new
                account = current
            raise ProviderInvalidData(f"account {account.provider_account_id}: more than {MOST_PAGES} pages")


def _transactions(account: Account, bank: Bank, access_token: str) -> Awaitable[TransactionsListed]:
    return bank.transactions(access_token, account)


@asynccontextmanager
async def _settling(context: EventContext) -> AsyncIterator[None]:
    """Says what becomes of a delivery whose sync failed.

    None of them ever dies of its bank: it would hold up all later syncs of the connection.
    """
    limit = asyncio.timeout(LONGEST_SYNC)
    try:
        async with limit:
            yield
    except TimeoutError as error:
        if not limit.expired():
            raise
        late = ProviderUnavailable(f"It takes more than {LONGEST_SYNC:g} seconds; the next attempt goes on.")
        raise _again_or_never(late, context, ATTEMPTS) from error
    except (ProviderUnavailable, ProviderRefused, SyncOvertaken) as error:
        raise _again_or_never(error, context, ATTEMPTS) from error
    except ProviderInvalidData as error:
        raise _again_or_never(error, context, LIES) from error
    except (InvalidGrant, ReauthorizationRequired, NotConnected, ConnectionNotFound, UnknownProvider) as error:
        raise Discard(f"{error.reason}: {error}") from error


def _again_or_never(error: Error, context: EventContext, attempts: int) -> Exception:
    said = f"{error.reason}: {error}"
    return RetryLater(pause(error, context.attempt), said) if context.attempt < attempts else Discard(said)
