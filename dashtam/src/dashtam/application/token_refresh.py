"""Access tokens are replaced before they end; when a bank refuses to, its user is told and asked to allow it again."""

import asyncio
import random
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Final
from uuid import UUID

from sqlalchemy.ext.asyncio import AsyncSession

from dashtam.application.bank import Banks, Clock
from dashtam.application.database import DatabaseProtocol
from dashtam.application.user_mail import UserMail
from dashtam.domain import events
from dashtam.domain.connection import (
    ConnectionNotFound,
    ConnectionRepository,
    ConnectionStatus,
    InvalidGrant,
    ProviderConnection,
    ProviderUnavailable,
    Tokens,
    UnknownProvider,
)
from dashtam.domain.events import TokenRefreshFailed
from dashtam.domain.result import Error
from whereupon import EventBusProtocol, EventContext

USED_UNTIL: Final = timedelta(seconds=60)
"""A token that ends sooner than that is replaced before it is used."""
KEPT_UNTIL: Final = timedelta(minutes=5)
"""A token that ends sooner than that is replaced by the upkeep, used or not."""
LEASE: Final = timedelta(seconds=30)
"""Longer than a refresh may take, and shorter than banks let a used refresh token come again after a crash."""
PATIENCE: Final = LEASE + timedelta(seconds=5)
"""For somebody else's refresh, whose process may have died."""


class TokensReplaced(Error):
    """Somebody stored other tokens, or ended the connection, while these were being refreshed."""

    reason = "tokens_replaced"

    def __init__(self) -> None:
        super().__init__("The connection was changed meanwhile.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Access:
    token: str = field(repr=False)
    version: int
    """To say which tokens the bank rejected."""


class TokenRefresher:
    """Gives access tokens that can be used; replaces those that can't, one caller at a time across all processes."""

    def __init__(
        self,
        banks: Banks,
        connections: ConnectionRepository,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
        clock: Clock,
    ) -> None:
        self._banks = banks
        self._connections = connections
        self._event_bus = event_bus
        self._database = database
        self._clock = clock

    async def access(
        self, connection_id: UUID, *, rejected: int | None = None, margin: timedelta = USED_UNTIL
    ) -> Access:
        """Tokens of another version than the `rejected` one, good for `margin` at least.

        Raises `ConnectionNotFound`, `NotConnected`, `ReauthorizationRequired`, and what a bank raises.
        """
        give_up = self._clock() + PATIENCE
        while True:
            connection, tokens = await self._stored(connection_id)
            ends, now = connection.access_expires_at, self._clock()
            if connection.token_version != rejected and (ends is None or ends - now > margin):
                return Access(token=tokens.access, version=connection.token_version)
            async with self._database.get_session():
                claimed = await self._connections.claim_refresh(
                    connection_id, connection.token_version, now=now, until=now + LEASE
                )
            if claimed:
                try:
                    return await self._refresh(connection, tokens)
                except TokensReplaced:
                    continue
            if now > give_up:
                raise ProviderUnavailable("Somebody else is renewing the access to the bank, and does not finish.")
            await asyncio.sleep(random.uniform(0.05, 0.2))

    async def _stored(self, connection_id: UUID) -> tuple[ProviderConnection, Tokens]:
        async with self._database.get_session():
            connection = await self._connections.find_by_id(connection_id)
            if connection is None:
                raise ConnectionNotFound
            connection.check_usable()
            tokens = await self._connections.tokens(connection_id)
        if tokens is None:
            raise ConnectionNotFound
        return connection, tokens

    async def _refresh(self, connection: ProviderConnection, tokens: Tokens) -> Access:
        try:
            async with self._event_bus.workflow(
                events.TokenRefresh,
                user_id=connection.user_id,
                provider_id=connection.provider_id,
                connection_id=connection.id,
                provider_name=connection.provider_name,
            ) as attempt:
                try:
                    fresh = await self._ask(connection, tokens)
                except InvalidGrant:
                    # In a transaction in which the connection can't change: a user who allows it again right now
                    # does so before this, and it failed for another reason, or after, and it is over and done with.
                    async with self._database.get_session() as session:
                        await self._unchanged(connection)
                        await attempt.failed(InvalidGrant.reason, session=session)
                    raise
                try:
                    async with self._database.get_session() as session:
                        current = await self._unchanged(connection)
                        await self._connections.replace_tokens(current, fresh)
                        await attempt.succeeded(session=session)
                except TokensReplaced:
                    await self._give_up(connection, fresh)
                    raise
                return Access(token=fresh.access, version=current.token_version)
        except InvalidGrant:
            raise  # nobody tries these tokens again until the lease has run out; by then the connection is marked
        except BaseException:
            async with self._database.get_session():
                await self._connections.end_refresh(connection.id, connection.token_version)
            raise

    async def _ask(self, connection: ProviderConnection, tokens: Tokens) -> Tokens:
        bank = self._banks.get(connection.provider_name)
        if bank is None:
            raise UnknownProvider
        if tokens.refresh is None:
            raise InvalidGrant
        try:
            async with asyncio.timeout((LEASE - timedelta(seconds=5)).total_seconds()):
                return await bank.refresh(tokens)
        except TimeoutError as error:
            raise ProviderUnavailable("The bank takes too long to renew the access.") from error

    async def _give_up(self, connection: ProviderConnection, fresh: Tokens) -> None:
        """The connection ended while the bank was asked: nobody keeps what it answered, so nobody may use it."""
        async with self._database.get_session():
            now = await self._connections.find_by_id(connection.id)
        bank = self._banks.get(connection.provider_name)
        if bank is not None and (now is None or now.status is ConnectionStatus.DISCONNECTED):
            with suppress(Error):  # as the disconnection's own revocation: as best it can
                await bank.revoke(fresh)

    async def _unchanged(self, seen: ProviderConnection) -> ProviderConnection:
        """For update. Raises `TokensReplaced`."""
        connection = await self._connections.find_by_id(seen.id, for_update=True)
        if connection is None or (connection.token_version, connection.status) != (seen.token_version, seen.status):
            raise TokensReplaced
        return connection


class ExpiringTokens:
    """Access tokens that end soon are replaced ahead of that, so that who needs one rarely waits for it."""

    def __init__(
        self, refresher: TokenRefresher, connections: ConnectionRepository, database: DatabaseProtocol, clock: Clock
    ) -> None:
        self._refresher = refresher
        self._connections = connections
        self._database = database
        self._clock = clock

    async def refresh(self) -> None:
        async with self._database.get_session():
            now = self._clock()  # those that have ended already are renewed when they are next needed
            expiring = await self._connections.expiring(now, now + KEPT_UNTIL, limit=1000)
        for connection_id in expiring:
            try:
                await self._refresher.access(connection_id, margin=KEPT_UNTIL)
            except Error:
                continue  # told by the event TokenRefreshFailed, or the connection has ended since


class ReauthorizationReaction:
    """What follows when a bank takes a refresh token no more; that it did not answer for once alerts nobody."""

    def __init__(
        self, connections: ConnectionRepository, mail: UserMail, banks: Banks, database: DatabaseProtocol
    ) -> None:
        self._connections = connections
        self._mail = mail
        self._banks = banks
        self._database = database

    async def require_reauthorization(self, event: TokenRefreshFailed, session: AsyncSession) -> None:
        if event.reason != InvalidGrant.reason:
            return
        with self._database.joined(session):
            connection = await self._connections.find_by_id(event.connection_id, for_update=True)
            if connection is not None and connection.refused(event.occurred_at):
                await self._connections.save(connection)

    async def alert_user(self, event: TokenRefreshFailed, context: EventContext) -> None:
        if event.reason != InvalidGrant.reason:
            return
        bank = self._banks.get(event.provider_name)
        name = event.provider_name if bank is None else bank.provider.display_name
        await self._mail.send(
            event.user_id,
            "reauthorization_required",
            f"{name} needs your permission again",
            key=context.idempotency_key,
            provider=name,
        )
