"""Everything that happens in Dashtam, on one page.

A workflow is tried (*Attempted*, durable before the work starts) and has one outcome: *Succeeded*, committed with what
changed, or *Failed*, with a `reason` of one machine-readable word. Each class says here what the audit and the log
make of it. No secret is ever a field: whoever needs a token asks for it by its id.
"""

from collections.abc import Mapping
from decimal import Decimal
from typing import Literal
from uuid import UUID

from dashtam.domain.audit import AuditAction
from whereupon import DomainEvent, Workflow


class AuthenticationEvent(DomainEvent, abstract=True, category="authentication", resource="user"):
    """Who may act as whom."""


class SessionEvent(DomainEvent, abstract=True, category="authentication", resource="session"):
    """A session was opened or closed."""


class ProviderEvent(DomainEvent, abstract=True, category="provider", resource="provider"):
    """The connection to a bank."""


class AccountEvent(DomainEvent, abstract=True, category="account", resource="account"):
    """An account at a bank, as Dashtam keeps it."""


# User registration


class UserRegistrationAttempted(AuthenticationEvent, audit=AuditAction.USER_REGISTRATION_ATTEMPTED):
    email: str


class UserRegistrationSucceeded(AuthenticationEvent, audit=AuditAction.USER_REGISTERED):
    user_id: UUID
    email: str


class UserRegistrationFailed(AuthenticationEvent, audit=AuditAction.USER_REGISTRATION_FAILED):
    email: str
    reason: str


UserRegistration = Workflow(
    UserRegistrationAttempted, UserRegistrationSucceeded, UserRegistrationFailed, unforeseen="internal_error"
)


# Email verification


class EmailVerificationAttempted(AuthenticationEvent, audit=AuditAction.EMAIL_VERIFICATION_ATTEMPTED):
    token_id: UUID


class EmailVerificationSucceeded(AuthenticationEvent, audit=AuditAction.USER_EMAIL_VERIFIED):
    user_id: UUID
    email: str


class EmailVerificationFailed(AuthenticationEvent, audit=AuditAction.EMAIL_VERIFICATION_FAILED):
    token_id: UUID
    reason: str


EmailVerification = Workflow(
    EmailVerificationAttempted, EmailVerificationSucceeded, EmailVerificationFailed, unforeseen="internal_error"
)


# Login and logout


class UserLoginAttempted(SessionEvent, audit=AuditAction.USER_LOGIN_ATTEMPTED):
    email: str


class UserLoginSucceeded(SessionEvent, audit=AuditAction.USER_LOGIN_SUCCESS):
    user_id: UUID
    email: str
    session_id: UUID


class UserLoginFailed(SessionEvent, audit=AuditAction.USER_LOGIN_FAILED):
    email: str
    reason: str


UserLogin = Workflow(UserLoginAttempted, UserLoginSucceeded, UserLoginFailed, unforeseen="internal_error")


class UserLogoutAttempted(SessionEvent, audit=AuditAction.USER_LOGOUT_ATTEMPTED):
    user_id: UUID


class UserLogoutSucceeded(SessionEvent, audit=AuditAction.USER_LOGOUT):
    user_id: UUID
    session_id: UUID


class UserLogoutFailed(SessionEvent, audit=AuditAction.USER_LOGOUT_FAILED):
    user_id: UUID
    reason: str


UserLogout = Workflow(UserLogoutAttempted, UserLogoutSucceeded, UserLogoutFailed, unforeseen="internal_error")


# Password change


class UserPasswordChangeAttempted(AuthenticationEvent, audit=AuditAction.USER_PASSWORD_CHANGE_ATTEMPTED):
    user_id: UUID


class UserPasswordChangeSucceeded(AuthenticationEvent, audit=AuditAction.USER_PASSWORD_CHANGED):
    user_id: UUID
    initiated_by: Literal["user", "admin"]

    def audit_context(self) -> Mapping[str, object]:
        method = "self_service" if self.initiated_by == "user" else "administrative"
        return {"initiated_by": self.initiated_by, "method": method}


class UserPasswordChangeFailed(AuthenticationEvent, audit=AuditAction.USER_PASSWORD_CHANGE_FAILED):
    user_id: UUID
    reason: str


UserPasswordChange = Workflow(
    UserPasswordChangeAttempted, UserPasswordChangeSucceeded, UserPasswordChangeFailed, unforeseen="internal_error"
)


# Password reset


class PasswordResetRequestAttempted(AuthenticationEvent, audit=AuditAction.PASSWORD_RESET_REQUEST_ATTEMPTED):
    email: str


class PasswordResetRequestSucceeded(AuthenticationEvent, audit=AuditAction.USER_PASSWORD_RESET_REQUESTED):
    user_id: UUID
    email: str


class PasswordResetRequestFailed(AuthenticationEvent, audit=AuditAction.PASSWORD_RESET_REQUEST_FAILED):
    email: str
    reason: str


PasswordResetRequest = Workflow(
    PasswordResetRequestAttempted,
    PasswordResetRequestSucceeded,
    PasswordResetRequestFailed,
    unforeseen="internal_error",
)


class PasswordResetConfirmAttempted(AuthenticationEvent, audit=AuditAction.PASSWORD_RESET_CONFIRM_ATTEMPTED):
    token_id: UUID


class PasswordResetConfirmSucceeded(AuthenticationEvent, audit=AuditAction.USER_PASSWORD_RESET_COMPLETED):
    user_id: UUID
    email: str


class PasswordResetConfirmFailed(AuthenticationEvent, audit=AuditAction.PASSWORD_RESET_CONFIRM_FAILED):
    token_id: UUID
    reason: str


PasswordResetConfirm = Workflow(
    PasswordResetConfirmAttempted,
    PasswordResetConfirmSucceeded,
    PasswordResetConfirmFailed,
    unforeseen="internal_error",
)


# Session revocation: `reason` says why it is revoked; in *Failed*, why it was not


class SessionRevocationAttempted(SessionEvent, audit=AuditAction.SESSION_REVOCATION_ATTEMPTED):
    session_id: UUID
    user_id: UUID
    reason: str


class SessionRevocationSucceeded(SessionEvent, audit=AuditAction.SESSION_REVOKED):
    session_id: UUID
    user_id: UUID
    reason: str


class SessionRevocationFailed(SessionEvent, audit=AuditAction.SESSION_REVOCATION_FAILED):
    session_id: UUID
    user_id: UUID
    reason: str


SessionRevocation = Workflow(
    SessionRevocationAttempted, SessionRevocationSucceeded, SessionRevocationFailed, unforeseen="internal_error"
)


class AllSessionsRevocationAttempted(AuthenticationEvent, audit=AuditAction.ALL_SESSIONS_REVOCATION_ATTEMPTED):
    user_id: UUID
    reason: str


class AllSessionsRevocationSucceeded(AuthenticationEvent, audit=AuditAction.ALL_SESSIONS_REVOKED):
    user_id: UUID
    reason: str
    session_count: int


class AllSessionsRevocationFailed(AuthenticationEvent, audit=AuditAction.ALL_SESSIONS_REVOCATION_FAILED):
    user_id: UUID
    reason: str


AllSessionsRevocation = Workflow(
    AllSessionsRevocationAttempted,
    AllSessionsRevocationSucceeded,
    AllSessionsRevocationFailed,
    unforeseen="internal_error",
)


# Provider connection and disconnection


class ProviderConnectionAttempted(ProviderEvent, audit=AuditAction.PROVIDER_CONNECTION_ATTEMPTED):
    user_id: UUID
    provider_name: str


class ProviderConnectionSucceeded(ProviderEvent, audit=AuditAction.PROVIDER_CONNECTED):
    user_id: UUID
    provider_id: UUID
    connection_id: UUID | None = None
    provider_name: str


class ProviderConnectionFailed(ProviderEvent, audit=AuditAction.PROVIDER_CONNECTION_FAILED):
    user_id: UUID
    provider_name: str
    reason: str


ProviderConnecting = Workflow(
    ProviderConnectionAttempted, ProviderConnectionSucceeded, ProviderConnectionFailed, unforeseen="internal_error"
)


class ProviderDisconnectionAttempted(ProviderEvent, audit=AuditAction.PROVIDER_DISCONNECTION_ATTEMPTED):
    user_id: UUID
    connection_id: UUID
    provider_name: str


class ProviderDisconnectionSucceeded(ProviderEvent, audit=AuditAction.PROVIDER_DISCONNECTED):
    user_id: UUID
    connection_id: UUID
    provider_name: str


class ProviderDisconnectionFailed(ProviderEvent, audit=AuditAction.PROVIDER_DISCONNECTION_FAILED):
    user_id: UUID
    connection_id: UUID
    provider_name: str
    reason: str


ProviderDisconnecting = Workflow(
    ProviderDisconnectionAttempted,
    ProviderDisconnectionSucceeded,
    ProviderDisconnectionFailed,
    unforeseen="internal_error",
)


# Provider token refresh


class TokenRefreshAttempted(ProviderEvent, audit=AuditAction.TOKEN_REFRESH_ATTEMPTED):
    user_id: UUID
    provider_id: UUID
    connection_id: UUID
    provider_name: str


class TokenRefreshSucceeded(ProviderEvent, audit=AuditAction.PROVIDER_TOKEN_REFRESHED):
    user_id: UUID
    provider_id: UUID
    connection_id: UUID
    provider_name: str


class TokenRefreshFailed(ProviderEvent, audit=AuditAction.TOKEN_REFRESH_FAILED):
    user_id: UUID
    provider_id: UUID
    connection_id: UUID
    provider_name: str
    reason: str


TokenRefresh = Workflow(TokenRefreshAttempted, TokenRefreshSucceeded, TokenRefreshFailed, unforeseen="internal_error")


# Account sync and transaction sync


class AccountSyncAttempted(AccountEvent, resource="connection", audit=AuditAction.ACCOUNT_SYNC_ATTEMPTED):
    user_id: UUID
    connection_id: UUID


class AccountSyncSucceeded(AccountEvent, resource="connection", audit=AuditAction.ACCOUNT_SYNC_SUCCEEDED):
    user_id: UUID
    connection_id: UUID
    account_count: int


class AccountSyncFailed(AccountEvent, resource="connection", audit=AuditAction.ACCOUNT_SYNC_FAILED):
    user_id: UUID
    connection_id: UUID
    reason: str


AccountSync = Workflow(AccountSyncAttempted, AccountSyncSucceeded, AccountSyncFailed, unforeseen="internal_error")


class AccountSyncRequested(AccountEvent, resource="connection"):
    """A user wants to see what is new: what follows is a sync, and that is what is audited."""

    user_id: UUID
    connection_id: UUID


class TransactionSyncAttempted(AccountEvent, audit=AuditAction.TRANSACTION_SYNC_ATTEMPTED):
    user_id: UUID
    account_id: UUID


class TransactionSyncSucceeded(AccountEvent, audit=AuditAction.TRANSACTION_SYNC_SUCCEEDED):
    user_id: UUID
    account_id: UUID
    transaction_count: int


class TransactionSyncFailed(AccountEvent, audit=AuditAction.TRANSACTION_SYNC_FAILED):
    user_id: UUID
    account_id: UUID
    reason: str


TransactionSync = Workflow(
    TransactionSyncAttempted, TransactionSyncSucceeded, TransactionSyncFailed, unforeseen="internal_error"
)


# Single facts about an account; amounts are in units of `currency` (ISO 4217), never rounded


class AccountCreated(AccountEvent, audit=AuditAction.ACCOUNT_CREATED):
    user_id: UUID
    provider_id: UUID
    account_id: UUID
    account_type: str
    balance: Decimal
    currency: str


class AccountUpdated(AccountEvent, audit=AuditAction.ACCOUNT_UPDATED):
    user_id: UUID
    provider_id: UUID
    account_id: UUID
    account_type: str


class AccountClosed(AccountEvent, audit=AuditAction.ACCOUNT_CLOSED):
    user_id: UUID
    provider_id: UUID
    account_id: UUID


class AccountBalanceUpdated(AccountEvent, audit=AuditAction.ACCOUNT_BALANCE_UPDATED):
    user_id: UUID
    account_id: UUID
    previous_balance: Decimal
    new_balance: Decimal
    currency: str
