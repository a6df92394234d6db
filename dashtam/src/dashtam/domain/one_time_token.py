"""Tokens that are mailed, work once and not for long."""

from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final, Protocol
from uuid import UUID

from dashtam.domain.result import Error


class Purpose(StrEnum):
    """Stored with each token: one of one kind opens no door of another."""

    EMAIL_VERIFICATION = "email_verification"
    PASSWORD_RESET = "password_reset"


LIFETIME: Final = {Purpose.EMAIL_VERIFICATION: timedelta(days=3), Purpose.PASSWORD_RESET: timedelta(hours=1)}


class TokenInvalid(Error):
    """Nobody was given this token."""

    reason = "token_invalid"

    def __init__(self) -> None:
        super().__init__("This link is not one of ours, or part of it is missing: copy it from the mail as a whole.")


class TokenExpired(Error):
    """It came too late."""

    reason = "token_expired"

    def __init__(self) -> None:
        super().__init__("This link has expired: ask for a new one.")


class TokenUsed(Error):
    """It was used before."""

    reason = "token_used"

    def __init__(self) -> None:
        super().__init__("This link was used before, and works once: ask for a new one.")


TokenError = TokenInvalid | TokenExpired | TokenUsed


class OneTimeTokens(Protocol):
    """Tokens, of which only hashes are stored; calls with the database join the session of their caller."""

    async def issue(self, token_id: UUID, user_id: UUID, purpose: Purpose, issued_at: datetime) -> str:
        """The token of this id, the same whenever it is asked for; stored the first time.

        Handlers ask with the id of the event that announces it, so a mail that is sent twice holds one token.
        """
        ...

    def id_of(self, token: str) -> UUID | None:
        """The id of a token that we made, whether it still works or not; None for anything else."""
        ...

    async def owner(self, token: str, purpose: Purpose) -> UUID:
        """Whose it is, whether it still works or not. Raises `TokenInvalid`."""
        ...

    async def redeem(self, token: str, purpose: Purpose) -> UUID:
        """Use it up, if the caller's transaction commits, which has its user locked; whose it is.

        Raises `TokenInvalid`, `TokenExpired`, `TokenUsed`.
        """
        ...

    async def withdraw(self, user_id: UUID, purpose: Purpose) -> None:
        """No token that this user was given for this works any more."""
        ...
