"""Connections, their tokens and authorization requests in the database."""

from datetime import UTC, datetime, timedelta
from hashlib import sha256
from typing import Any, Final, cast
from uuid import UUID

from sqlalchemy import CursorResult, delete, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from dashtam.domain.connection import (
    AuthorizationRequest,
    ConnectionStatus,
    Provider,
    ProviderConnection,
    Tokens,
)
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.rows import insert
from dashtam.infrastructure.sealing import Seal
from dashtam.infrastructure.tables import AuthorizationRequestModel, ConnectionModel, RevocationModel

_KEPT: Final = timedelta(days=1)
"""After its end a request is kept so long, so that a callback that comes again is told what it is."""


class SqlConnectionRepository:
    def __init__(self, database: Database, seal: Seal) -> None:
        self._database = database
        self._seal = seal

    async def find_by_id(self, connection_id: UUID, *, for_update: bool = False) -> ProviderConnection | None:
        session = self._database.current("ConnectionRepository.find_by_id")
        if for_update:
            await _lock(session, ConnectionModel.id == connection_id)
        return _connection(await session.get(ConnectionModel, connection_id, populate_existing=True))

    async def of_user(self, user_id: UUID) -> list[ProviderConnection]:
        session = self._database.current("ConnectionRepository.of_user")
        found = select(ConnectionModel).where(ConnectionModel.user_id == user_id).order_by(ConnectionModel.id)
        rows = await session.scalars(found.execution_options(populate_existing=True))
        return [connection for row in rows if (connection := _connection(row)) is not None]

    async def of_provider(self, user_id: UUID, provider: Provider) -> ProviderConnection:
        session = self._database.current("ConnectionRepository.of_provider")
        made = insert(session, ConnectionModel).values(
            id=uuid7(),
            user_id=user_id,
            provider_id=provider.id,
            provider_name=provider.name,
            status=ConnectionStatus.DISCONNECTED,
            connected_at=datetime.now(UTC),
            token_version=0,
            sync_version=0,
        )
        await session.execute(made.on_conflict_do_nothing(index_elements=["user_id", "provider_id"]))
        here = (ConnectionModel.user_id == user_id, ConnectionModel.provider_id == provider.id)
        await _lock(session, *here)
        found = select(ConnectionModel).where(*here).execution_options(populate_existing=True)
        connection = _connection((await session.scalars(found)).one())
        assert connection is not None
        connection.provider_name = provider.name
        return connection

    async def save(self, connection: ProviderConnection) -> None:
        session = self._database.current("ConnectionRepository.save")
        await session.execute(
            update(ConnectionModel)
            .where(ConnectionModel.id == connection.id)
            .values(
                provider_name=connection.provider_name,
                status=connection.status,
                connected_at=connection.connected_at,
                sync_version=connection.sync_version,
                synced_at=connection.synced_at,
            )
        )

    async def tokens(self, connection_id: UUID) -> Tokens | None:
        session = self._database.current("ConnectionRepository.tokens")
        sealed = await session.scalar(select(ConnectionModel.sealed_tokens).where(ConnectionModel.id == connection_id))
        return None if sealed is None else self._opened(connection_id, sealed)

    async def replace_tokens(self, connection: ProviderConnection, tokens: Tokens) -> None:
        session = self._database.current("ConnectionRepository.replace_tokens")
        connection.token_version += 1
        connection.access_expires_at = tokens.expires_at
        expires_at = None if tokens.expires_at is None else tokens.expires_at.isoformat()
        sealed = self._seal.seal(
            connection.id, {"access": tokens.access, "refresh": tokens.refresh, "expires_at": expires_at}
        )
        await self._put(session, connection, sealed)

    async def hand_over_tokens(self, connection: ProviderConnection) -> None:
        session = self._database.current("ConnectionRepository.hand_over_tokens")
        sealed = await session.scalar(select(ConnectionModel.sealed_tokens).where(ConnectionModel.id == connection.id))
        if sealed is not None:
            session.add(RevocationModel(id=uuid7(), connection_id=connection.id, sealed_tokens=sealed))
        connection.token_version += 1
        connection.access_expires_at = None
        await self._put(session, connection, None)

    async def _put(self, session: AsyncSession, connection: ProviderConnection, sealed: str | None) -> None:
        await session.execute(
            update(ConnectionModel)
            .where(ConnectionModel.id == connection.id)
            .values(
                sealed_tokens=sealed,
                token_version=connection.token_version,
                access_expires_at=connection.access_expires_at,
                refreshing_until=None,
            )
        )

    async def tokens_to_revoke(self, connection_id: UUID) -> list[tuple[UUID, Tokens]]:
        session = self._database.current("ConnectionRepository.tokens_to_revoke")
        found = select(RevocationModel).where(RevocationModel.connection_id == connection_id)
        return [(row.id, self._opened(connection_id, row.sealed_tokens)) for row in await session.scalars(found)]

    async def forget_revoked(self, ids: list[UUID]) -> None:
        session = self._database.current("ConnectionRepository.forget_revoked")
        await session.execute(delete(RevocationModel).where(RevocationModel.id.in_(ids)))

    async def claim_refresh(self, connection_id: UUID, version: int, *, now: datetime, until: datetime) -> bool:
        session = self._database.current("ConnectionRepository.claim_refresh")
        free = or_(ConnectionModel.refreshing_until.is_(None), ConnectionModel.refreshing_until < now)
        return await _changed(
            session,
            update(ConnectionModel)
            .where(
                ConnectionModel.id == connection_id,
                ConnectionModel.status == ConnectionStatus.ACTIVE,
                ConnectionModel.token_version == version,
                free,
            )
            .values(refreshing_until=until),
        )

    async def end_refresh(self, connection_id: UUID, version: int) -> None:
        session = self._database.current("ConnectionRepository.end_refresh")
        await session.execute(
            update(ConnectionModel)
            .where(ConnectionModel.id == connection_id, ConnectionModel.token_version == version)
            .values(refreshing_until=None)
        )

    async def expiring(self, after: datetime, before: datetime, limit: int) -> list[UUID]:
        session = self._database.current("ConnectionRepository.expiring")
        return list(
            await session.scalars(
                select(ConnectionModel.id)
                .where(
                    ConnectionModel.access_expires_at > after,
                    ConnectionModel.access_expires_at < before,
                    ConnectionModel.status == ConnectionStatus.ACTIVE,
                )
                .order_by(ConnectionModel.access_expires_at)
                .limit(limit)
            )
        )

    def _opened(self, connection_id: UUID, sealed: str) -> Tokens:
        stored = cast("dict[str, Any]", self._seal.open(connection_id, sealed))
        ends = stored["expires_at"]
        return Tokens(
            access=stored["access"],
            refresh=stored["refresh"],
            expires_at=None if ends is None else datetime.fromisoformat(ends),
        )


class SqlAuthorizationRequests:
    def __init__(self, database: Database, seal: Seal) -> None:
        self._database = database
        self._seal = seal

    async def add(self, state: str, request: AuthorizationRequest) -> None:
        session = self._database.current("AuthorizationRequestRepository.add")
        long_ago = request.expires_at - _KEPT
        await session.execute(delete(AuthorizationRequestModel).where(AuthorizationRequestModel.expires_at < long_ago))
        id_ = uuid7()
        session.add(
            AuthorizationRequestModel(
                state_hash=_hash(state),
                id=id_,
                user_id=request.user_id,
                provider_name=request.provider_name,
                sealed_verifier=self._seal.seal(id_, request.verifier),
                expires_at=request.expires_at,
            )
        )

    async def find(self, state: str) -> AuthorizationRequest | None:
        session = self._database.current("AuthorizationRequestRepository.find")
        row = await session.get(AuthorizationRequestModel, _hash(state), populate_existing=True)
        if row is None:
            return None
        return AuthorizationRequest(
            user_id=row.user_id,
            provider_name=row.provider_name,
            expires_at=row.expires_at,
            used=row.used_at is not None,
            verifier=cast("str", self._seal.open(row.id, row.sealed_verifier)),
        )

    async def use(self, state: str, user_id: UUID, now: datetime) -> bool:
        session = self._database.current("AuthorizationRequestRepository.use")
        return await _changed(
            session,
            update(AuthorizationRequestModel)
            .where(
                AuthorizationRequestModel.state_hash == _hash(state),
                AuthorizationRequestModel.user_id == user_id,
                AuthorizationRequestModel.used_at.is_(None),
                AuthorizationRequestModel.expires_at > now,
            )
            .values(used_at=now),
        )


def _hash(state: str) -> str:
    """Long and random, so it needs no salt and no slow hash."""
    return sha256(state.encode("utf-8", "replace")).hexdigest()


async def _lock(session: AsyncSession, *here: Any) -> None:
    """SQLite has no row locks: an update that changes nothing locks it as a whole, before anything is read."""
    if session.get_bind().dialect.name == "sqlite":
        await _changed(session, update(ConnectionModel).where(*here).values(id=ConnectionModel.id))
    else:
        await session.execute(select(ConnectionModel.id).where(*here).with_for_update(key_share=True))


async def _changed(session: AsyncSession, statement: Any) -> bool:
    result = await session.execute(statement, execution_options={"synchronize_session": False})
    return cast("CursorResult[Any]", result).rowcount == 1


def _connection(row: ConnectionModel | None) -> ProviderConnection | None:
    if row is None:
        return None
    return ProviderConnection(
        id=row.id,
        user_id=row.user_id,
        provider_id=row.provider_id,
        provider_name=row.provider_name,
        status=ConnectionStatus(row.status),
        connected_at=row.connected_at,
        access_expires_at=row.access_expires_at,
        token_version=row.token_version,
        sync_version=row.sync_version,
        synced_at=row.synced_at,
    )
