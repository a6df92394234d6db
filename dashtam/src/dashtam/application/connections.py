"""A user connects a bank, whereupon its accounts are fetched; or ends that, whereupon the tokens are revoked."""

import secrets
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Final
from uuid import UUID

from dashtam.application.bank import Bank, Banks, Clock, pause
from dashtam.application.database import DatabaseProtocol
from dashtam.application.logger import LoggerProtocol
from dashtam.application.user_mail import UserMail
from dashtam.domain.account import AccountRepository, AccountStatus
from dashtam.domain.connection import (
    AccessDenied,
    AuthorizationRequest,
    AuthorizationRequestRepository,
    ConnectionNotFound,
    ConnectionRepository,
    ConnectionStatus,
    InvalidGrant,
    NotConnected,
    Provider,
    ProviderConnection,
    ProviderInvalidData,
    ProviderRefused,
    ProviderUnavailable,
    StateExpired,
    StateMismatch,
    StateReused,
    Tokens,
    UnknownProvider,
)
from dashtam.domain.events import (
    AccountClosed,
    ProviderConnecting,
    ProviderConnectionSucceeded,
    ProviderDisconnecting,
    ProviderDisconnectionSucceeded,
)
from dashtam.domain.result import Error, Failure, Result, Success
from whereupon import EventBusProtocol, EventContext, RetryLater

AUTHORIZATION_LIFETIME: Final = timedelta(minutes=10)
REVOCATION_ATTEMPTS: Final = 8
UNKNOWN: Final = "unknown"
"""The provider of a callback that answers nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StartConnection:
    user_id: UUID
    provider_name: str


class StartConnectionHandler:
    """A simple write that nobody reacts to, so no event."""

    def __init__(
        self, banks: Banks, requests: AuthorizationRequestRepository, database: DatabaseProtocol, clock: Clock
    ) -> None:
        self._banks = banks
        self._requests = requests
        self._database = database
        self._clock = clock

    async def handle(self, cmd: StartConnection) -> Result[str, UnknownProvider]:
        """The address at the bank to send the user to."""
        bank = self._banks.get(cmd.provider_name)
        if bank is None:
            return Failure(UnknownProvider())
        state, verifier = secrets.token_urlsafe(32), secrets.token_urlsafe(32)
        request = AuthorizationRequest(
            user_id=cmd.user_id,
            provider_name=cmd.provider_name,
            expires_at=self._clock() + AUTHORIZATION_LIFETIME,
            used=False,
            verifier=verifier,
        )
        async with self._database.get_session():
            await self._requests.add(state, request)
        return Success(bank.authorization_url(state=state, verifier=verifier))


@dataclass(frozen=True, slots=True, kw_only=True)
class CompleteConnection:
    """What the bank sent the user back with: a code, or an error."""

    user_id: UUID
    state: str = field(repr=False)
    code: str | None = field(default=None, repr=False)
    error: str | None = None


class CompleteConnectionHandler:
    def __init__(
        self,
        banks: Banks,
        requests: AuthorizationRequestRepository,
        connections: ConnectionRepository,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
        clock: Clock,
    ) -> None:
        self._banks = banks
        self._requests = requests
        self._connections = connections
        self._event_bus = event_bus
        self._database = database
        self._clock = clock

    async def handle(self, cmd: CompleteConnection) -> Result[ProviderConnection, Error]:
        async with self._database.get_session():
            request = await self._requests.find(cmd.state)
        if request is not None and request.user_id != cmd.user_id:
            request = None  # somebody else's, and it stays theirs
        try:
            return Success(await self._complete(cmd, request))
        except Error as error:
            return Failure(error)

    async def _complete(self, cmd: CompleteConnection, request: AuthorizationRequest | None) -> ProviderConnection:
        name = UNKNOWN if request is None else request.provider_name
        async with self._event_bus.workflow(ProviderConnecting, user_id=cmd.user_id, provider_name=name) as attempt:
            if request is None:
                raise StateMismatch
            await self._use_up(cmd, request)
            if cmd.error == "access_denied":
                raise AccessDenied
            if cmd.code is None:
                raise ProviderRefused("The bank refused the connection. Try again later, or ask the bank.")
            bank = self._banks.get(request.provider_name)
            if bank is None:
                raise UnknownProvider
            tokens = await bank.exchange(cmd.code, request.verifier)
            async with self._database.get_session() as session:
                connection = await self._connections.of_provider(cmd.user_id, bank.provider)
                connection.authorize(datetime.now(UTC))  # after the lock: see ProviderConnection.refused
                await self._connections.save(connection)
                await self._connections.replace_tokens(connection, tokens)
                await attempt.succeeded(provider_id=bank.provider.id, connection_id=connection.id, session=session)
        return connection

    async def _use_up(self, cmd: CompleteConnection, request: AuthorizationRequest) -> None:
        now = self._clock()
        async with self._database.get_session():
            if await self._requests.use(cmd.state, cmd.user_id, now):
                return
            found = await self._requests.find(cmd.state)
        # whether it was used the database said in the moment that it refused
        if found is not None and not found.used and found.expires_at <= now:
            raise StateExpired
        raise StateReused


@dataclass(frozen=True, slots=True, kw_only=True)
class Disconnect:
    user_id: UUID
    connection_id: UUID


class DisconnectHandler:
    """Ends a connection: its accounts are closed, its tokens no longer there for anything but to be revoked."""

    def __init__(
        self,
        connections: ConnectionRepository,
        accounts: AccountRepository,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
    ) -> None:
        self._connections = connections
        self._accounts = accounts
        self._event_bus = event_bus
        self._database = database

    async def handle(self, cmd: Disconnect) -> Result[None, ConnectionNotFound | NotConnected]:
        async with self._database.get_session():
            connection = await self._connections.find_by_id(cmd.connection_id)
        if connection is None or connection.user_id != cmd.user_id:
            return Failure(ConnectionNotFound())
        if connection.status is ConnectionStatus.DISCONNECTED:
            return Success(None)  # as it was asked for, so there is nothing to attempt
        try:
            await self._disconnect(connection)
        except (ConnectionNotFound, NotConnected) as error:
            return Failure(error)
        return Success(None)

    async def _disconnect(self, seen: ProviderConnection) -> None:
        async with (
            self._event_bus.workflow(
                ProviderDisconnecting,
                user_id=seen.user_id,
                connection_id=seen.id,
                provider_name=seen.provider_name,
            ) as attempt,
            self._database.get_session() as session,
        ):
            connection = await self._connections.find_by_id(seen.id, for_update=True)
            if connection is None:
                raise ConnectionNotFound
            connection.disconnect()
            await self._connections.save(connection)
            await self._connections.hand_over_tokens(connection)
            for account in await self._accounts.of_connection(connection.id):
                if account.status is AccountStatus.CLOSED:
                    continue
                account.status, account.updated_at = AccountStatus.CLOSED, datetime.now(UTC)
                await self._accounts.save(account)
                await self._event_bus.publish(
                    AccountClosed(user_id=account.user_id, provider_id=account.provider_id, account_id=account.id),
                    session=session,
                )
            await attempt.succeeded(session=session)


class ConnectionQueries:
    """What can be read of connections."""

    def __init__(self, banks: Banks, connections: ConnectionRepository, database: DatabaseProtocol) -> None:
        self._banks = banks
        self._connections = connections
        self._database = database

    def providers(self) -> list[Provider]:
        return [bank.provider for bank in self._banks.values()]

    async def of_user(self, user_id: UUID) -> list[ProviderConnection]:
        async with self._database.get_session():
            return await self._connections.of_user(user_id)


class ConnectionMails:
    """Writes to users that a bank was connected: if it was not they, they should know."""

    def __init__(self, mail: UserMail, banks: Banks) -> None:
        self._mail = mail
        self._banks = banks

    async def handle_provider_connection_succeeded(
        self, event: ProviderConnectionSucceeded, context: EventContext
    ) -> None:
        bank = self._banks.get(event.provider_name)
        name = event.provider_name if bank is None else bank.provider.display_name
        await self._mail.send(
            event.user_id,
            "provider_connected",
            f"{name} is connected to Dashtam",
            key=context.idempotency_key,
            provider=name,
            connected_at=event.occurred_at,
        )


class TokenRevocation:
    """Tells the bank that the tokens of an ended connection are to be worth nothing, as best it can.

    They are deleted then, and deleted as well once the bank has not answered often enough.
    """

    def __init__(
        self, banks: Banks, connections: ConnectionRepository, database: DatabaseProtocol, logger: LoggerProtocol
    ) -> None:
        self._banks = banks
        self._connections = connections
        self._database = database
        self._logger = logger

    async def revoke_tokens(self, event: ProviderDisconnectionSucceeded, context: EventContext) -> None:
        async with self._database.get_session():
            left = await self._connections.tokens_to_revoke(event.connection_id)
        bank = self._banks.get(event.provider_name)
        for id_, tokens in left:
            if bank is not None:
                await self._revoke(bank, tokens, event, context)
            async with self._database.get_session():
                await self._connections.forget_revoked([id_])

    async def _revoke(
        self, bank: Bank, tokens: Tokens, event: ProviderDisconnectionSucceeded, context: EventContext
    ) -> None:
        try:
            await bank.revoke(tokens)
        except (ProviderUnavailable, ProviderRefused, ProviderInvalidData, InvalidGrant) as error:
            if isinstance(error, ProviderUnavailable) and context.attempt < REVOCATION_ATTEMPTS:
                raise RetryLater(pause(error, context.attempt), error.reason) from error
            self._logger.warning(
                "tokens_not_revoked",
                connection_id=str(event.connection_id),
                provider_name=event.provider_name,
                error_type=type(error).__name__,
                error_message=str(error),
            )
