"""Password hashes."""

import asyncio

from pwdlib import PasswordHash


class PasswordHasher:
    """argon2id, with the parameters that pwdlib recommends."""

    def __init__(self) -> None:
        self._hasher = PasswordHash.recommended()

    async def hash(self, password: str) -> str:
        """In a thread: it takes a fifth of a second, on purpose."""
        return await asyncio.to_thread(self._hasher.hash, password)
