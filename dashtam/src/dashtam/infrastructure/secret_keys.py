"""The keys that Dashtam signs and encrypts with, all derived from those it is given."""

import base64
import binascii
import contextlib
import os
import secrets
from collections.abc import Sequence
from pathlib import Path

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from sqlalchemy import make_url

LENGTH = 32  # bytes
_MAKE_ONE = "make one with `python -m dashtam make-key`"


class SecretKeyError(ValueError):
    """A key is missing or none. What is wrong with it is said, the key isn't."""


def make_key() -> str:
    return base64.urlsafe_b64encode(secrets.token_bytes(LENGTH)).decode()


class SecretKeys:
    """The first key makes what is new, every key reads what was made before: so keys are replaced without a break."""

    def __init__(self, keys: Sequence[str]) -> None:
        """Raises `SecretKeyError` for a key that is not 32 bytes in URL-safe base64."""
        self._keys = [_decoded(number, key) for number, key in enumerate(keys, 1)]
        if not self._keys:
            raise SecretKeyError(f"there is no secret key: {_MAKE_ONE}")

    def derived(self, purpose: str) -> list[bytes]:
        """Keys of 32 bytes for one purpose; whoever has them knows those of no other purpose (HKDF, RFC 5869)."""
        return [HKDF(algorithm=SHA256(), length=LENGTH, salt=None, info=purpose.encode()).derive(k) for k in self._keys]


def keys_for(database_url: str, given: Sequence[str]) -> SecretKeys:
    """The keys that are given; without any, on SQLite, one in a file beside the database, made the first time.

    Raises `SecretKeyError` where neither is possible.
    """
    if given:
        return SecretKeys(given)
    url = make_url(database_url)
    if url.get_backend_name() != "sqlite":
        raise SecretKeyError(
            f"DASHTAM_SECRET_KEYS is not set, and every process on this database needs the same keys: {_MAKE_ONE}, "
            'and set DASHTAM_SECRET_KEYS=["…"]'
        )
    if not url.database or url.database == ":memory:":
        return SecretKeys([make_key()])  # lives as long as the database
    return SecretKeys([_kept_in(Path(url.database + ".key"))])


def _kept_in(path: Path) -> str:
    if not path.exists():
        # Whole under another name first: of two processes that start at once, both must read the same whole key.
        draft = path.with_name(f"{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            with os.fdopen(descriptor, "w") as file:
                file.write(make_key() + "\n")
            with contextlib.suppress(FileExistsError):  # another one was first, and its key is the one
                os.link(draft, path)
        finally:
            draft.unlink()
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise SecretKeyError(f"the key file {path} can't be read: {error}") from error


def _decoded(number: int, key: str) -> bytes:
    try:
        decoded = base64.urlsafe_b64decode(key.encode("ascii"))
    except (binascii.Error, UnicodeEncodeError):
        decoded = b""
    if len(decoded) != LENGTH:
        raise SecretKeyError(f"secret key {number} is not {LENGTH} bytes in URL-safe base64: {_MAKE_ONE}")
    return decoded
