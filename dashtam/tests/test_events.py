"""The catalogue, as it is promised; the table below is what the documentation says."""

from decimal import Decimal
from uuid import UUID, uuid4

import pytest

from dashtam.domain import events
from dashtam.domain.audit import AuditAction
from dashtam.domain.events import AccountCreated, ProviderConnectionSucceeded, UserPasswordChangeSucceeded
from whereupon import DomainEvent, Outcome

# workflow: attempted, succeeded, the success's audit action, its resource
WORKFLOWS = {
    "UserRegistration": ("email", "user_id email", "USER_REGISTERED", "user"),
    "EmailVerification": ("token_id", "user_id email", "USER_EMAIL_VERIFIED", "user"),
    "UserLogin": ("email", "user_id email session_id", "USER_LOGIN_SUCCESS", "session"),
    "UserLogout": ("user_id", "user_id session_id", "USER_LOGOUT", "session"),
    "UserPasswordChange": ("user_id", "user_id initiated_by", "USER_PASSWORD_CHANGED", "user"),
    "PasswordResetRequest": ("email", "user_id email", "USER_PASSWORD_RESET_REQUESTED", "user"),
    "PasswordResetConfirm": ("token_id", "user_id email", "USER_PASSWORD_RESET_COMPLETED", "user"),
    "SessionRevocation": (
        "session_id user_id reason",
        "session_id user_id reason",
        "SESSION_REVOKED",
        "session",
    ),
    "AllSessionsRevocation": ("user_id reason", "user_id reason session_count", "ALL_SESSIONS_REVOKED", "user"),
    "ProviderConnection": (
        "user_id provider_name",
        "user_id provider_id connection_id provider_name",
        "PROVIDER_CONNECTED",
        "provider",
    ),
    "ProviderDisconnection": (
        "user_id connection_id provider_name",
        "user_id connection_id provider_name",
        "PROVIDER_DISCONNECTED",
        "provider",
    ),
    "TokenRefresh": (
        "user_id provider_id connection_id provider_name",
        "user_id provider_id connection_id provider_name",
        "PROVIDER_TOKEN_REFRESHED",
        "provider",
    ),
    "AccountSync": (
        "user_id connection_id",
        "user_id connection_id account_count",
        "ACCOUNT_SYNC_SUCCEEDED",
        "connection",
    ),
    "TransactionSync": (
        "user_id account_id",
        "user_id account_id transaction_count",
        "TRANSACTION_SYNC_SUCCEEDED",
        "account",
    ),
}
FACTS = {
    "AccountCreated": "user_id provider_id account_id account_type balance currency",
    "AccountUpdated": "user_id provider_id account_id account_type",
    "AccountClosed": "user_id provider_id account_id",
    "AccountBalanceUpdated": "user_id account_id previous_balance new_balance currency",
}
REQUESTS = {"AccountSyncRequested"}  # what was asked for: what follows is audited, they aren't


def catalogue() -> dict[str, type[DomainEvent]]:
    return {
        name: found
        for name, found in vars(events).items()
        if isinstance(found, type) and issubclass(found, DomainEvent) and not found.__event__.abstract
    }


def fields(event_type: type[DomainEvent]) -> set[str]:
    return set(event_type.__event__.fields) - {"event_id", "occurred_at"}


def snake(name: str) -> str:
    return "".join("_" + letter if letter.isupper() else letter.upper() for letter in name).lstrip("_")


def test_the_page_of_events_holds_the_whole_catalogue_and_nothing_else() -> None:
    phases = {w + phase for w in WORKFLOWS for phase in ("Attempted", "Succeeded", "Failed")}
    assert set(catalogue()) == phases | set(FACTS) | REQUESTS


@pytest.mark.parametrize("workflow", WORKFLOWS)
def test_a_workflow_is_attempted_and_succeeds_or_fails(workflow: str) -> None:
    attempted, succeeded, action, resource = WORKFLOWS[workflow]
    found = catalogue()
    tried, done, failed = (found[workflow + phase] for phase in ("Attempted", "Succeeded", "Failed"))

    assert fields(tried) == set(attempted.split())
    assert fields(done) == set(succeeded.split())
    assert fields(failed) == {*attempted.split(), "reason"}
    assert [e.__event__.outcome for e in (tried, done, failed)] == list(Outcome)
    assert [e.__event__.stands_alone for e in (tried, done, failed)] == [True, False, True]
    stem = snake(workflow)
    assert [e.__event__.audit for e in (tried, done, failed)] == [f"{stem}_ATTEMPTED", action, f"{stem}_FAILED"]
    assert {e.__event__.resource for e in (tried, done, failed)} == {resource}


@pytest.mark.parametrize("fact", FACTS)
def test_a_fact_about_an_account_is_audited_as_the_account_s(fact: str) -> None:
    event_type = catalogue()[fact]
    assert fields(event_type) == set(FACTS[fact].split())
    assert event_type.__event__.audit == snake(fact)
    assert event_type.__event__.resource_id == "account_id"


def test_every_audit_action_belongs_to_one_event() -> None:
    used = [event_type.__event__.audit for event_type in catalogue().values()]
    assert sorted(action for action in used if action) == sorted(AuditAction)


def test_money_is_decimal() -> None:
    annotations = AccountCreated.__annotations__ | events.AccountBalanceUpdated.__annotations__
    assert {annotations[name] for name in ("balance", "previous_balance", "new_balance")} == {Decimal}


@pytest.mark.parametrize(("initiated_by", "method"), [("user", "self_service"), ("admin", "administrative")])
def test_the_audit_of_a_password_change_says_who_did_it_and_how(initiated_by: str, method: str) -> None:
    event = UserPasswordChangeSucceeded(user_id=uuid4(), initiated_by=initiated_by)  # type: ignore[arg-type]
    assert event.audit_context() == {"initiated_by": initiated_by, "method": method}


def test_a_provider_can_be_connected_before_the_connection_has_an_id() -> None:
    event = ProviderConnectionSucceeded(user_id=uuid4(), provider_id=UUID(int=1), provider_name="schwab")
    assert event.connection_id is None
