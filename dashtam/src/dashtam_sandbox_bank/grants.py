"""What people allowed clients: codes, grants and tokens, each known by its hash only."""

import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from hashlib import sha256
from typing import Final, Literal

from dashtam_sandbox_bank.client import Client

CODE_LIFETIME: Final = timedelta(seconds=60)
REUSE_GRACE: Final = timedelta(seconds=60)
"""From a refresh token's first use: a client that crashed before it stored the answer may ask again."""

MOST_CODES: Final = 1_000
"""Unused ones; beyond that the oldest is forgotten."""
MOST_GRANTS: Final = 100
"""Of one person; beyond that the oldest is revoked."""
MOST_ACCESS_TOKENS: Final = 100
"""Of one grant; beyond that the oldest is forgotten, and so no longer valid."""
MOST_REFRESH_TOKENS: Final = 1_000
"""Of one grant, used ones included: one that is forgotten is refused, but no longer gives a thief away."""

_SWEEP_EVERY = timedelta(seconds=30)

TokenKind = Literal["access", "refresh"]


@dataclass(kw_only=True, slots=True, eq=False)
class Grant:
    """One person's consent to one client, and everything that came of it."""

    client_id: str
    person: str
    scope: str
    given_at: datetime
    revoked: bool = False
    _access: dict[str, None] = field(default_factory=dict)
    _refresh: dict[str, None] = field(default_factory=dict)

    def hashes(self, kind: TokenKind) -> dict[str, None]:
        """Of its tokens, the oldest first."""
        return self._access if kind == "access" else self._refresh


@dataclass(kw_only=True, slots=True, eq=False)
class Code:
    """An authorization code, with the names that Authlib's grants look for."""

    hashed: str
    client_id: str
    person: str
    redirect_uri: str
    scope: str
    code_challenge: str
    code_challenge_method: str
    expires_at: datetime
    grant: Grant | None = None
    """What it gave, once it was used."""

    def get_redirect_uri(self) -> str:
        return self.redirect_uri

    def get_scope(self) -> str:
        return self.scope


@dataclass(kw_only=True, slots=True, eq=False)
class Token:
    """One that was issued, with the names that Authlib's grants look for."""

    hashed: str
    kind: TokenKind
    grant: Grant
    scope: str
    expires_at: datetime
    used_at: datetime | None = None
    """When a refresh token gave its successor."""

    def get_scope(self) -> str:
        return self.scope

    def check_client(self, client: Client) -> bool:
        return self.grant.client_id == client.client_id


class Grants:
    """Nothing in here awaits: what one request does to a code or a token is done before the next one looks."""

    def __init__(
        self, clock: Callable[[], datetime], access_token_lifetime: timedelta, refresh_token_lifetime: timedelta
    ) -> None:
        self._clock = clock
        self._lifetimes: dict[TokenKind, timedelta] = {
            "access": access_token_lifetime,
            "refresh": refresh_token_lifetime,
        }
        self._codes: dict[str, Code] = {}
        self._spent: dict[str, Code] = {}
        """Used codes whose grants live: each betrays a second use."""
        self._tokens: dict[str, Token] = {}
        self._grants: dict[Grant, None] = {}
        self._next_sweep = clock() + _SWEEP_EVERY

    def of(self, person: str) -> list[Grant]:
        """Those that are good for something, the oldest first."""
        self._sweep(at_once=True)
        return [grant for grant in self._grants if grant.person == person]

    def __iter__(self) -> Iterator[Grant]:
        return iter(list(self._grants))

    @property
    def kept(self) -> int:
        """Codes and tokens in memory."""
        return len(self._codes) + len(self._spent) + len(self._tokens)

    def save_code(
        self, code: str, *, client_id: str, person: str, redirect_uri: str, scope: str, code_challenge: str
    ) -> None:
        self._sweep()
        while len(self._codes) >= MOST_CODES:
            del self._codes[next(iter(self._codes))]
        hashed = _hash(code)
        self._codes[hashed] = Code(
            hashed=hashed,
            client_id=client_id,
            person=person,
            redirect_uri=redirect_uri,
            scope=scope,
            code_challenge=code_challenge,
            code_challenge_method="S256",
            expires_at=self._clock() + CODE_LIFETIME,
        )

    def peek_code(self, code: str) -> Code | None:
        """Used or not, in time or not."""
        hashed = _hash(code)
        return self._codes.get(hashed) or self._spent.get(hashed)

    def spend(self, code: Code) -> Grant:
        """The grant that this code stands for. The code is used from now on."""
        grant = Grant(client_id=code.client_id, person=code.person, scope=code.scope, given_at=self._clock())
        others = [other for other in self._grants if other.person == code.person]
        for oldest in others[: max(0, len(others) - MOST_GRANTS + 1)]:
            self.revoke(oldest)
        self._codes.pop(code.hashed, None)
        self._spent[code.hashed] = code
        code.grant = grant
        self._grants[grant] = None
        return grant

    def save_token(self, value: str, kind: TokenKind, grant: Grant, scope: str) -> None:
        self._sweep()
        known = grant.hashes(kind)
        while len(known) >= (MOST_ACCESS_TOKENS if kind == "access" else MOST_REFRESH_TOKENS):
            self._forget(next(iter(known)))
        hashed = _hash(value)
        known[hashed] = None
        expires_at = self._clock() + self._lifetimes[kind]
        self._tokens[hashed] = Token(hashed=hashed, kind=kind, grant=grant, scope=scope, expires_at=expires_at)

    def peek_token(self, value: str) -> Token | None:
        """Used or not, in time or not; those of a revoked grant are unknown."""
        return self._tokens.get(_hash(value))

    def find_token(self, value: str, kind: TokenKind) -> Token | None:
        """One that is in time."""
        token = self.peek_token(value)
        return token if token is not None and token.kind == kind and token.expires_at > self._clock() else None

    def revoke(self, grant: Grant) -> None:
        grant.revoked = True
        for hashed in [*grant.hashes("access"), *grant.hashes("refresh")]:
            self._forget(hashed)
        self._grants.pop(grant, None)
        for value in [value for value, code in self._spent.items() if code.grant is grant]:
            del self._spent[value]

    def revoke_token(self, token: Token) -> None:
        """A refresh token takes its whole grant along, an access token only itself (RFC 7009, 2.1)."""
        if token.kind == "refresh":
            self.revoke(token.grant)
        else:
            self._forget(token.hashed)

    def expire(self, person: str, kind: TokenKind) -> int:
        """Let this person's tokens of a kind be out of time. How many were not?"""
        now = self._clock()
        ended = 0
        for grant in self.of(person):
            for hashed in grant.hashes(kind):
                token = self._tokens[hashed]
                if token.expires_at > now:
                    token.expires_at = now
                    ended += 1
        return ended

    def _forget(self, hashed: str) -> None:
        token = self._tokens.pop(hashed)
        del token.grant.hashes(token.kind)[hashed]

    def _sweep(self, *, at_once: bool = False) -> None:
        """Forget what nobody can use any more."""
        now = self._clock()
        if now < self._next_sweep and not at_once:
            return
        self._next_sweep = now + _SWEEP_EVERY
        for value in [value for value, code in self._codes.items() if code.expires_at <= now]:
            del self._codes[value]
        for value in [value for value, token in self._tokens.items() if token.expires_at <= now]:
            self._forget(value)
        for grant in [grant for grant in self._grants if not grant.hashes("access") and not grant.hashes("refresh")]:
            self.revoke(grant)


def _hash(value: str) -> str:
    return sha256(value.encode("utf-8", "surrogatepass")).hexdigest()


def new_token() -> str:
    return secrets.token_urlsafe(32)
