"""A bank as use cases see it: it authorizes, and lists accounts and what was booked on them."""

import random
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Protocol, TypeAlias

from dashtam.domain.account import Account, ListedAccount, Transaction
from dashtam.domain.connection import Provider, ProviderUnavailable, Tokens
from dashtam.domain.result import Error

FIRST_PAUSE: Final = timedelta(seconds=2)
"""At most so long after the first failure a bank is asked again, and each time twice as long as before."""
LONGEST_PAUSE: Final = timedelta(minutes=15)
"""A bank may ask for more patience than that, and doesn't get it: it might have said a year."""

Clock: TypeAlias = Callable[[], datetime]
"""For what ends by itself: tokens, leases, requests. What is compared with events goes by the clock on the wall."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionsListed:
    """A page of what was booked, the oldest first."""

    transactions: list[Transaction]
    cursor: str | None
    """The place after the last of them, to go on from now or some day; None where the bank named none."""
    more: bool


class Bank(Protocol):
    """Each call is over HTTP and takes its time: never in a database transaction.

    Each raises `ProviderUnavailable`, `ProviderRefused` or `ProviderInvalidData`, and what it says here.
    """

    @property
    def provider(self) -> Provider: ...

    def authorization_url(self, *, state: str, verifier: str) -> str:
        """Where to send a user for their consent."""
        ...

    async def exchange(self, code: str, verifier: str) -> Tokens:
        """Raises `InvalidGrant`."""
        ...

    async def refresh(self, tokens: Tokens) -> Tokens:
        """Raises `InvalidGrant`."""
        ...

    async def revoke(self, tokens: Tokens) -> None: ...

    async def accounts(self, access_token: str) -> list[ListedAccount]:
        """All of them. Raises `AccessTokenRejected`."""
        ...

    async def transactions(self, access_token: str, account: Account) -> TransactionsListed:
        """What comes after the account's cursor. Raises `AccessTokenRejected` or `CursorRejected`."""
        ...


Banks: TypeAlias = Mapping[str, Bank]
"""By the names of their providers."""


def pause(error: Error, attempt: int) -> float:
    """Seconds until a bank is asked again: what it said, or longer from attempt to attempt, up to a limit."""
    longest = LONGEST_PAUSE.total_seconds()
    if isinstance(error, ProviderUnavailable) and error.retry_after is not None:
        return min(error.retry_after.total_seconds(), longest)
    return random.uniform(0.5, 1) * min(FIRST_PAUSE.total_seconds() * 2.0 ** min(attempt - 1, 20), longest)
