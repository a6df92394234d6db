"""How often something may be tried."""

from typing import Protocol

from dashtam.domain.result import Error


class TooManyAttempts(Error):
    """It was tried too often."""

    reason = "too_many_attempts"

    def __init__(self, retry_after: int) -> None:
        """`retry_after`: seconds."""
        super().__init__(f"That was tried too often. Try again in {retry_after} seconds.")
        self.retry_after = retry_after


class RateLimits(Protocol):
    """Counted in the database, so by all processes together. Opens a transaction of its own: call it outside yours."""

    async def count(self, what: str, *, email: str | None = None) -> None:
        """Count one more try of `what` from the address that the request came from, and for `email`.

        Raises `TooManyAttempts` if that is more than may be.
        """
        ...

    async def forgive(self, what: str, *, email: str) -> None:
        """The tries for `email` from this address are not held against anybody: the last one succeeded."""
        ...
