"""Encryption of what the database keeps and must not know."""

import base64
import json
from collections.abc import Sequence
from uuid import UUID

from cryptography.fernet import Fernet, InvalidToken, MultiFernet


class SealBroken(RuntimeError):
    """What is stored can't be opened, or was sealed for something else."""


class Seal:
    """The first key seals, every key opens: so keys are replaced without a break.

    What is sealed knows which row it is for: put into another one, it does not open there.
    """

    def __init__(self, keys: Sequence[bytes]) -> None:
        """Keys of 32 bytes."""
        self._fernet = MultiFernet([Fernet(base64.urlsafe_b64encode(key)) for key in keys])

    def seal(self, owner: UUID, value: object) -> str:
        """`value` is anything that JSON can say."""
        return self._fernet.encrypt(json.dumps([str(owner), value]).encode()).decode()

    def open(self, owner: UUID, sealed: str) -> object:
        """Raises `SealBroken`."""
        try:
            whose, value = json.loads(self._fernet.decrypt(sealed))
        except InvalidToken:
            raise SealBroken(
                f"what is stored for {owner} was changed, or sealed with a key that Dashtam was not given: add the "
                "key that it had then to DASHTAM_SECRET_KEYS, after the current one"
            ) from None
        if whose != str(owner):
            raise SealBroken(f"what is stored for {owner} belongs to another row: somebody has moved it there")
        result: object = value
        return result
