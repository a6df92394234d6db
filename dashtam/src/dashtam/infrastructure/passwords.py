"""Password hashes."""

import asyncio

from pwdlib import PasswordHash
from pwdlib.hashers.argon2 import Argon2Hasher


class PasswordHasher:
    """argon2id: `time_cost` passes over `memory_kib` KiB of memory; the defaults are what pwdlib recommends."""

    def __init__(self, *, time_cost: int = 3, memory_kib: int = 65_536) -> None:
        self._hasher = PasswordHash((Argon2Hasher(time_cost=time_cost, memory_cost=memory_kib),))
        self._nobodys: str | None = None

    async def hash(self, password: str) -> str:
        """In a thread: it takes a fifth of a second, on purpose."""
        return await asyncio.to_thread(self._hasher.hash, password)

    async def matches(self, password: str, password_hash: str | None) -> bool:
        """False for None, after as long as a check of a hash takes: how long it took tells nobody who is registered."""
        if self._nobodys is None:
            self._nobodys = await self.hash("of nobody")
        matches = await asyncio.to_thread(self._verify, password, password_hash or self._nobodys)
        return matches and password_hash is not None

    def _verify(self, password: str, password_hash: str) -> bool:
        try:
            return self._hasher.verify(password, password_hash)
        except UnicodeEncodeError:  # half a surrogate pair is in no password
            return False
