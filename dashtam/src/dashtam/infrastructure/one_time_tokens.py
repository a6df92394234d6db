"""One-time tokens: derived from their id by a key, stored as a hash."""

import base64
import hashlib
import hmac
from datetime import UTC, datetime
from uuid import UUID

from sqlalchemy import ColumnElement, and_, select, update

from dashtam.domain.one_time_token import LIFETIME, Purpose, TokenExpired, TokenInvalid, TokenUsed
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.rows import delete_ended, insert
from dashtam.infrastructure.secret_keys import SecretKeys
from dashtam.infrastructure.tables import OneTimeTokenModel

_LENGTH = 16 + 32  # an id, and the code that nobody makes without the key


class SqlOneTimeTokens:
    """A token is its id and an HMAC of it, so a mail that is sent twice holds the same; what is stored is a hash."""

    def __init__(self, database: Database, keys: SecretKeys) -> None:
        self._database = database
        self._keys = keys.derived("one-time tokens")

    async def issue(self, token_id: UUID, user_id: UUID, purpose: Purpose, issued_at: datetime) -> str:
        session = self._database.current("OneTimeTokens.issue")
        # If keys were replaced between two mails of one token, the later mail holds what still works.
        token = self._token(token_id, self._keys[0])
        row = {
            "id": token_id,
            "user_id": user_id,
            "purpose": purpose.value,
            "token_hash": _hash(token),
            "expires_at": issued_at + LIFETIME[purpose],
        }
        statement = insert(session, OneTimeTokenModel).values(**row)
        await session.execute(
            statement.on_conflict_do_update(index_elements=["id"], set_={"token_hash": row["token_hash"]})
        )
        return token

    def id_of(self, token: str) -> UUID | None:
        try:
            decoded = base64.b64decode(token, altchars=b"-_", validate=True)
        except ValueError:
            return None
        if len(decoded) != _LENGTH:
            return None
        token_id = UUID(bytes=decoded[:16])
        if any(hmac.compare_digest(self._token(token_id, key).encode(), token.encode()) for key in self._keys):
            return token_id
        return None

    async def owner(self, token: str, purpose: Purpose) -> UUID:
        session = self._database.current("OneTimeTokens.owner")
        found = select(OneTimeTokenModel.user_id).where(self._which(token, purpose))
        user_id: UUID | None = await session.scalar(found)
        if user_id is None:
            raise TokenInvalid
        return user_id

    async def redeem(self, token: str, purpose: Purpose) -> UUID:
        session = self._database.current("OneTimeTokens.redeem")
        now, mine = datetime.now(UTC), self._which(token, purpose)
        used_up: UUID | None = await session.scalar(  # of two that come at once one sees it unused
            update(OneTimeTokenModel)
            .where(mine, OneTimeTokenModel.used_at.is_(None), OneTimeTokenModel.expires_at > now)
            .values(used_at=now)
            .returning(OneTimeTokenModel.user_id)
        )
        if used_up is not None:
            return used_up
        row = (await session.execute(select(OneTimeTokenModel.used_at).where(mine))).one_or_none()
        if row is None:
            raise TokenInvalid
        raise TokenExpired if row.used_at is None else TokenUsed

    def _which(self, token: str, purpose: Purpose) -> ColumnElement[bool]:
        """Raises `TokenInvalid` for a token that nobody was given."""
        token_id = self.id_of(token)
        if token_id is None:
            raise TokenInvalid
        return and_(
            OneTimeTokenModel.id == token_id,
            OneTimeTokenModel.purpose == purpose.value,
            OneTimeTokenModel.token_hash == _hash(token),
        )

    async def withdraw(self, user_id: UUID, purpose: Purpose) -> None:
        session = self._database.current("OneTimeTokens.withdraw")
        await session.execute(
            update(OneTimeTokenModel)
            .where(
                OneTimeTokenModel.user_id == user_id,
                OneTimeTokenModel.purpose == purpose.value,
                OneTimeTokenModel.used_at.is_(None),
            )
            .values(used_at=datetime.now(UTC))
        )

    async def forget_ended(self, before: datetime, limit: int) -> int:
        session = self._database.current("OneTimeTokens.forget_ended")
        return await delete_ended(session, OneTimeTokenModel, before, limit)

    @staticmethod
    def _token(token_id: UUID, key: bytes) -> str:
        code = hmac.digest(key, token_id.bytes, "sha256")
        return base64.urlsafe_b64encode(token_id.bytes + code).decode()


def _hash(token: str) -> str:
    return hashlib.sha256(token.encode()).hexdigest()
