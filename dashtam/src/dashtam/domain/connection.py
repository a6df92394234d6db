"""A user's connection to a bank, and what can go wrong with it."""

from dataclasses import dataclass, field
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Protocol
from uuid import UUID

from uuid_utils.compat import uuid7

from dashtam.domain.result import Error


class ConnectionStatus(StrEnum):
    ACTIVE = "active"
    REAUTHORIZATION_REQUIRED = "reauthorization_required"
    """The bank takes our tokens no more: the user has to allow it once again."""
    DISCONNECTED = "disconnected"


class UnknownProvider(Error):
    """No bank of this name is set up."""

    reason = "unknown_provider"

    def __init__(self) -> None:
        super().__init__("There is no such provider. Ask for the list of providers.")


class ConnectionNotFound(Error):
    """The user has no connection of this id."""

    reason = "connection_not_found"

    def __init__(self) -> None:
        super().__init__("There is no such connection.")


class NotConnected(Error):
    """The connection was ended."""

    reason = "not_connected"

    def __init__(self) -> None:
        super().__init__("This connection has ended. Connect the provider again.")


class ReauthorizationRequired(Error):
    """The bank takes our tokens no more."""

    reason = "reauthorization_required"

    def __init__(self) -> None:
        super().__init__("The bank has ended this connection's authorization. Connect the provider again.")


class StateMismatch(Error):
    """A callback that answers nothing this user has asked for."""

    reason = "state_mismatch"

    def __init__(self) -> None:
        super().__init__("You have started no such connection. Start it again.")


class StateExpired(Error):
    """The user took too long at the bank."""

    reason = "state_expired"

    def __init__(self) -> None:
        super().__init__("It took too long to come back from the bank. Start the connection again.")


class StateReused(Error):
    """A callback that came before, and comes again."""

    reason = "state_reused"

    def __init__(self) -> None:
        super().__init__("This answer of the bank was used already. See your connections, or start again.")


class AccessDenied(Error):
    """The user did not allow it at the bank."""

    reason = "access_denied"

    def __init__(self) -> None:
        super().__init__("You did not allow the connection at the bank, so there is none.")


class ProviderUnavailable(Error):
    """The bank does not answer, or asks for patience. It may later."""

    reason = "provider_unavailable"

    def __init__(self, message: str, retry_after: timedelta | None = None) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """What the bank said, if it said something."""


class ProviderRefused(Error):
    """The bank understood, and will not."""

    reason = "provider_refused"


class ProviderInvalidData(Error):
    """The bank's answer can't be true; what it says is not repeated, only where."""

    reason = "provider_invalid_data"


class InvalidGrant(Error):
    """The bank does not take this code or refresh token (any more)."""

    reason = "invalid_grant"

    def __init__(self) -> None:
        super().__init__("The bank does not accept the authorization it gave.")


class AccessTokenRejected(Error):
    """The bank does not take this access token; a new one may do."""

    reason = "access_token_rejected"

    def __init__(self) -> None:
        super().__init__("The bank does not accept the access token.")


class CursorRejected(Error):
    """The bank no longer knows the place up to which we have the transactions."""

    reason = "cursor_rejected"

    def __init__(self) -> None:
        super().__init__("The bank does not know the place to go on from.")


@dataclass(frozen=True, slots=True, kw_only=True)
class Provider:
    """A bank that can be connected."""

    id: UUID
    name: str
    """What the API and events call it; never changed."""
    display_name: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Tokens:
    """What a bank gave; in clear in memory only."""

    access: str = field(repr=False)
    refresh: str | None = field(repr=False)
    expires_at: datetime | None
    """When the access token ends; None where the bank didn't say."""


@dataclass(slots=True, kw_only=True)
class ProviderConnection:
    """One for each user and provider, however often it is ended and authorized again."""

    id: UUID = field(default_factory=uuid7)
    user_id: UUID
    provider_id: UUID
    provider_name: str
    status: ConnectionStatus = ConnectionStatus.ACTIVE
    connected_at: datetime
    """When the user last allowed it."""
    access_expires_at: datetime | None = None
    token_version: int = 0
    """Another number for other tokens: whoever has used some can see whether they were replaced meanwhile."""
    sync_version: int = 0
    """Another number after each account sync: one that was overtaken can see so."""
    synced_at: datetime | None = None
    """When the last account sync that succeeded began."""

    def authorize(self, now: datetime) -> None:
        """The user has allowed it, for the first time or once again; the tokens are stored beside it."""
        self.status = ConnectionStatus.ACTIVE
        self.connected_at = now

    def refused(self, at: datetime) -> bool:
        """The bank refused the tokens; False if that is over, as the user has allowed it again or ended it since."""
        if self.status is not ConnectionStatus.ACTIVE or self.connected_at > at:
            return False
        self.status = ConnectionStatus.REAUTHORIZATION_REQUIRED
        return True

    def disconnect(self) -> None:
        """Raises `NotConnected` for one that has ended."""
        if self.status is ConnectionStatus.DISCONNECTED:
            raise NotConnected
        self.status = ConnectionStatus.DISCONNECTED

    def synced(self, began_at: datetime) -> None:
        self.synced_at = began_at
        self.sync_version += 1

    def check_usable(self) -> None:
        """Raises `NotConnected` or `ReauthorizationRequired`."""
        if self.status is ConnectionStatus.DISCONNECTED:
            raise NotConnected
        if self.status is ConnectionStatus.REAUTHORIZATION_REQUIRED:
            raise ReauthorizationRequired


class ConnectionRepository(Protocol):
    """Connections and their tokens as they are stored; each call joins the database session of its caller."""

    async def find_by_id(self, connection_id: UUID, *, for_update: bool = False) -> ProviderConnection | None:
        """`for_update`: nobody else changes it, its tokens or its accounts until the caller's transaction ends."""
        ...

    async def of_user(self, user_id: UUID) -> list[ProviderConnection]: ...

    async def of_provider(self, user_id: UUID, provider: Provider) -> ProviderConnection:
        """The one of this user and provider, made if there is none, for update."""
        ...

    async def save(self, connection: ProviderConnection) -> None:
        """All of it but the tokens."""
        ...

    async def tokens(self, connection_id: UUID) -> Tokens | None: ...

    async def replace_tokens(self, connection: ProviderConnection, tokens: Tokens) -> None:
        """Stores them, encrypted, as the next version; whoever refreshes them gives that up."""
        ...

    async def hand_over_tokens(self, connection: ProviderConnection) -> None:
        """Takes the tokens from the connection; they are kept to be revoked, and for nothing else."""
        ...

    async def tokens_to_revoke(self, connection_id: UUID) -> list[tuple[UUID, Tokens]]: ...

    async def forget_revoked(self, ids: list[UUID]) -> None: ...

    async def claim_refresh(self, connection_id: UUID, version: int, *, now: datetime, until: datetime) -> bool:
        """One caller at a time may refresh the tokens of this version, until then; False: it is not this one."""
        ...

    async def end_refresh(self, connection_id: UUID, version: int) -> None:
        """The next may try, if the tokens are still those."""
        ...

    async def expiring(self, after: datetime, before: datetime, limit: int) -> list[UUID]:
        """Active connections whose access token ends between the two."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class AuthorizationRequest:
    """A user was sent to a bank to allow something."""

    user_id: UUID
    provider_name: str
    expires_at: datetime
    used: bool
    verifier: str = field(repr=False)
    """RFC 7636: shows the bank that who brings the code is who asked for it."""


class AuthorizationRequestRepository(Protocol):
    """Found by their state, of which only a hash is stored; each call joins the database session of its caller."""

    async def add(self, state: str, request: AuthorizationRequest) -> None:
        """Those that ended long ago are deleted with it."""
        ...

    async def find(self, state: str) -> AuthorizationRequest | None: ...

    async def use(self, state: str, user_id: UUID, now: datetime) -> bool:
        """True once, and only for that user, in time."""
        ...
