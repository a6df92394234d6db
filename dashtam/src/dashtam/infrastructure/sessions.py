"""Sessions in the database, and the tokens that stand for them."""

import base64
import hmac
import re
import secrets
from datetime import UTC, datetime, timedelta
from typing import Any, Final
from uuid import UUID

import jwt
from sqlalchemy import Row, Select, select, update
from uuid_utils.compat import uuid7

from dashtam.domain.session import NotLoggedIn, OpenedSession, RefreshTokenReused, Session
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.rows import delete_ended, insert
from dashtam.infrastructure.secret_keys import SecretKeys
from dashtam.infrastructure.tables import SessionModel, UserModel

LIFETIME: Final = timedelta(days=30)
"""Of a session that nobody renews."""
RENEWED_AGAIN: Final = timedelta(seconds=10)
"""How long a token that was renewed gets the same answer again: a client asked twice, or lost the answer."""
LONGEST_USER_AGENT: Final = 500


class JwtAccessTokens:
    """JSON Web Tokens (RFC 7519), signed with HMAC: nobody but Dashtam reads them."""

    def __init__(self, keys: SecretKeys, lifetime: timedelta = timedelta(minutes=15)) -> None:
        self.lifetime = lifetime
        self._keys = keys.derived("access tokens")

    def issue(self, session: Session) -> str:
        now = datetime.now(UTC)
        claims = {"sid": str(session.id), "sub": str(session.user_id), "iat": now, "exp": now + self.lifetime}
        return jwt.encode(claims, self._keys[0], algorithm="HS256")

    def session_of(self, token: str) -> UUID:
        for key in self._keys:
            try:
                claims = jwt.decode(token, key, algorithms=["HS256"], options={"require": ["sid", "sub", "exp"]})
                return UUID(claims["sid"])
            except (jwt.InvalidTokenError, ValueError, AttributeError, TypeError):
                continue
        raise NotLoggedIn


class SqlSessionRepository:
    """A refresh token is its session's id, its number, and a code that takes a key and the session's salt to make.

    So nothing of it is stored, every token that ever was is told from one that never was, and who asks twice with one
    gets the same next one.
    """

    def __init__(self, database: Database, keys: SecretKeys) -> None:
        self._database = database
        self._keys = keys.derived("refresh tokens")

    async def open(self, user_id: UUID, *, ip_address: str | None, user_agent: str | None) -> OpenedSession:
        session = self._database.current("SessionRepository.open")
        now, session_id, salt = datetime.now(UTC), uuid7(), secrets.token_hex(16)
        user_agent = None if user_agent is None else user_agent[:LONGEST_USER_AGENT]
        await session.execute(
            insert(session, SessionModel).values(
                id=session_id,
                user_id=user_id,
                opened_at=now,
                last_used_at=now,
                expires_at=now + LIFETIME,
                ip_address=ip_address,
                user_agent=user_agent,
                salt=salt,
                generation=0,
            )
        )
        return await self._opened(session_id, 0, salt)

    async def renew(self, refresh_token: str) -> OpenedSession:
        session = self._database.current("SessionRepository.renew")
        session_id, number = _parts(refresh_token)
        now, mine = datetime.now(UTC), SessionModel.id == session_id
        # Locks the row, on SQLite the database: of two renewals with one token the second one sees the first.
        await session.execute(update(SessionModel).where(mine).values(id=SessionModel.id))
        row = (await session.execute(_open_ones(now).where(mine))).one_or_none()
        if row is None or not self._is_ours(refresh_token, row):
            raise NotLoggedIn
        if number == row.generation:
            await session.execute(
                update(SessionModel)
                .where(mine)
                .values(generation=number + 1, renewed_at=now, last_used_at=now, expires_at=now + LIFETIME)
            )
            return await self._opened(row.id, number + 1, row.salt)
        if number == row.generation - 1 and row.renewed_at is not None and now - row.renewed_at <= RENEWED_AGAIN:
            return await self._opened(row.id, row.generation, row.salt)
        raise RefreshTokenReused(row.id, row.user_id)

    async def _opened(self, session_id: UUID, number: int, salt: str) -> OpenedSession:
        found = await self.find_open(session_id)
        assert found is not None
        return OpenedSession(session=found, refresh_token=_token(self._keys[0], session_id, number, salt))

    def _is_ours(self, refresh_token: str, row: Row[Any]) -> bool:
        _, number = _parts(refresh_token)
        given = refresh_token.encode("utf-8", "surrogatepass")
        return 0 <= number <= row.generation and any(
            hmac.compare_digest(given, _token(key, row.id, number, row.salt).encode()) for key in self._keys
        )

    async def find_open(self, session_id: UUID) -> Session | None:
        session = self._database.current("SessionRepository.find_open")
        found = _open_ones(datetime.now(UTC)).where(SessionModel.id == session_id)
        row = (await session.execute(found)).one_or_none()
        return None if row is None else _session(row)

    async def find_by_token(self, refresh_token: str) -> Session | None:
        session = self._database.current("SessionRepository.find_by_token")
        session_id, number = _parts(refresh_token)
        found = _open_ones(datetime.now(UTC)).where(SessionModel.id == session_id)
        row = (await session.execute(found)).one_or_none()
        if row is None or number != row.generation or not self._is_ours(refresh_token, row):
            return None
        return _session(row)

    async def of_user(self, user_id: UUID) -> list[Session]:
        session = self._database.current("SessionRepository.of_user")
        found = _open_ones(datetime.now(UTC)).where(SessionModel.user_id == user_id)
        return [_session(row) for row in await session.execute(found.order_by(SessionModel.last_used_at.desc()))]

    async def close(self, session_id: UUID, user_id: UUID, reason: str) -> bool:
        return await self._close(SessionModel.id == session_id, SessionModel.user_id == user_id, reason=reason) == 1

    async def close_all(self, user_id: UUID, reason: str) -> int:
        return await self._close(SessionModel.user_id == user_id, reason=reason)

    async def _close(self, *which: Any, reason: str) -> int:
        session = self._database.current("SessionRepository.close")
        now = datetime.now(UTC)
        closed = await session.scalars(
            update(SessionModel)
            .where(*which, SessionModel.closed_at.is_(None), SessionModel.expires_at > now)
            .values(closed_at=now, closed_because=reason)
            .returning(SessionModel.id)
        )
        return len(closed.all())

    async def forget_ended(self, before: datetime, limit: int) -> int:
        session = self._database.current("SessionRepository.forget_ended")
        return await delete_ended(session, SessionModel, before, limit)

    async def note_use(self, session_id: UUID) -> None:
        session = self._database.current("SessionRepository.note_use")
        await session.execute(
            update(SessionModel).where(SessionModel.id == session_id).values(last_used_at=datetime.now(UTC))
        )


def _open_ones(now: datetime) -> Select[Any]:
    return (
        select(
            *(column for column in SessionModel.__table__.c),
            UserModel.is_admin,
        )
        .join(UserModel, UserModel.id == SessionModel.user_id)
        .where(SessionModel.closed_at.is_(None), SessionModel.expires_at > now)
    )


def _session(row: Row[Any]) -> Session:
    return Session(
        id=row.id,
        user_id=row.user_id,
        opened_at=row.opened_at,
        last_used_at=row.last_used_at,
        expires_at=row.expires_at,
        ip_address=row.ip_address,
        user_agent=row.user_agent,
        is_admin=row.is_admin,
    )


def _parts(refresh_token: str) -> tuple[UUID, int]:
    """The session's id and the token's number. Raises `NotLoggedIn` where there are none."""
    found = re.fullmatch(r"([0-9a-f-]{36})\.(\d{1,9})\.[\w-]{43}", refresh_token, re.ASCII)
    if found is None:
        raise NotLoggedIn
    try:
        return UUID(found[1]), int(found[2])
    except ValueError:
        raise NotLoggedIn from None


def _token(key: bytes, session_id: UUID, number: int, salt: str) -> str:
    code = hmac.digest(key, f"{session_id}.{number}.{salt}".encode(), "sha256")
    return f"{session_id}.{number}.{base64.urlsafe_b64encode(code).decode().rstrip('=')}"
