"""Confirmed addresses, changed and forgotten passwords, on both databases."""

import asyncio
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import pytest
from guide.aftermath import published
from served import PASSWORD, Served, eventually, served
from sqlalchemy import text, update
from test_sessions import ADA, actions, trail

from dashtam.domain.audit import AuditAction
from dashtam.domain.events import UserPasswordChangeSucceeded
from dashtam.domain.one_time_token import Purpose
from dashtam.domain.result import Success
from dashtam.infrastructure.database import NoSessionError
from dashtam.infrastructure.passwords import PasswordHasher
from dashtam.infrastructure.tables import OneTimeTokenModel
from dashtam.presentation.pace import Pace

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

NEW = "battery staple 8"


async def test_an_address_is_confirmed_once_by_the_link_in_the_welcome_mail(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register(ADA)
        token = await dashtam.token(ADA, "Welcome to Dashtam")
        assert (await dashtam.verify(ADA)).status_code == 204
        await dashtam.mail.message_to(ADA, "You are in")

        again = await dashtam.verify(ADA)
        assert (again.status_code, again.json()["reason"]) == (422, "token_used")
        assert [action for action in await actions(dashtam) if "VERIF" in action] == [
            AuditAction.EMAIL_VERIFICATION_ATTEMPTED,
            AuditAction.USER_EMAIL_VERIFIED,
            AuditAction.EMAIL_VERIFICATION_ATTEMPTED,
            AuditAction.EMAIL_VERIFICATION_FAILED,
        ]
        async with dashtam.application.database.get_session() as session:
            everything = [
                str(row)
                for table in ("whereupon_log", "whereupon_audit", "one_time_tokens", "whereupon_exception")
                for row in await session.execute(text(f"SELECT * FROM {table}"))
            ]
        assert not any(token in row for row in everything)
        assert token not in dashtam.output.getvalue()


async def test_a_mail_that_is_sent_again_holds_the_same_token(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register(ADA)
        await dashtam.token(ADA, "Welcome to Dashtam")
        dashtam.mail.refusals.append("451 later")
        await dashtam.http.post("/password-resets", json={"email": ADA})
        token = await dashtam.token(ADA, "Choose a new password")
        assert dashtam.mail.refused == 1  # so the handler ran twice
        async with dashtam.application.database.get_session() as session:
            rows = (
                await session.execute(text("SELECT id FROM one_time_tokens WHERE purpose = 'password_reset'"))
            ).all()
        assert len(rows) == 1
        answer = await dashtam.http.post("/password-resets/confirmation", json={"token": token, "new_password": NEW})
        assert answer.status_code == 204


@pytest.mark.parametrize("token", ["", "x", "=" * 64, "A" * 64, "\u00fc" * 64, "A" * 64 + "=", "../../etc/passwd"])
async def test_a_token_that_is_none_of_ours_is_refused_and_nobody_attempted_anything(
    sqlite_url: str, token: str
) -> None:
    async with served(sqlite_url) as dashtam:
        for path, body in (
            ("/email-verifications", {"token": token}),
            ("/password-resets/confirmation", {"token": token, "new_password": NEW}),
        ):
            answer = await dashtam.http.post(path, json=body)
            assert (answer.status_code, answer.json()["reason"]) == (422, "token_invalid")
        assert await published(dashtam.application.database) == []


async def test_a_user_who_changes_the_password_is_logged_out_everywhere_and_written_to(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        phone = await dashtam.person(ADA)
        body = {"current_password": PASSWORD, "new_password": NEW}
        assert (await ada("PUT", "/users/me/password", json=body)).status_code == 204

        # At the very next request: the sessions were closed in the same transaction.
        assert (await ada("GET", "/users/me")).status_code == 401
        assert (await phone("GET", "/users/me")).status_code == 401
        renewal = await dashtam.http.post("/sessions/renewal", json={"refresh_token": phone.tokens["refresh_token"]})
        assert renewal.status_code == 401
        assert (await dashtam.log_in(ADA)).json()["reason"] == "invalid_credentials"
        assert (await dashtam.log_in(ADA, NEW)).status_code == 201

        mail = await dashtam.mail.message_to(ADA, "Your password was changed")
        assert "by an administrator" not in str(mail)
        found = [entry for entry in await trail(dashtam) if "PASSWORD" in entry[0] or "SESSIONS" in entry[0]]
        assert found == [
            (AuditAction.USER_PASSWORD_CHANGE_ATTEMPTED, {}),
            (AuditAction.USER_PASSWORD_CHANGED, {"initiated_by": "user", "method": "self_service"}),
            (AuditAction.ALL_SESSIONS_REVOCATION_ATTEMPTED, {"reason": "password_changed"}),
            (AuditAction.ALL_SESSIONS_REVOKED, {"reason": "password_changed", "session_count": 2}),
        ]


@pytest.mark.parametrize(
    ("current", "new", "status", "reason"),
    [
        ("wrong horse 8", NEW, 403, "wrong_password"),
        (PASSWORD, "short 1", 422, "weak_password"),
        (PASSWORD, "nothingbutletters", 422, "weak_password"),
    ],
)
async def test_a_change_that_fails_changes_nothing_and_says_why(
    database_url: str, current: str, new: str, status: int, reason: str
) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        body = {"current_password": current, "new_password": new}
        refused = await ada("PUT", "/users/me/password", json=body)
        assert (refused.status_code, refused.json()["reason"]) == (status, reason)
        assert (await ada("GET", "/users/me")).status_code == 200
        assert (await trail(dashtam))[-2:] == [
            (AuditAction.USER_PASSWORD_CHANGE_ATTEMPTED, {}),
            (AuditAction.USER_PASSWORD_CHANGE_FAILED, {"reason": reason}),
        ]


async def test_an_administrator_sets_somebody_s_password(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        eve = await dashtam.sign_up("eve@example.com")
        path = f"/users/{ada.user_id}/password"
        assert (await eve("PUT", path, json={"new_password": NEW})).json()["reason"] == "forbidden"
        await dashtam.make_admin("eve@example.com")
        assert (await eve("PUT", path, json={"new_password": NEW})).status_code == 204
        nobody = await eve("PUT", f"/users/{uuid4()}/password", json={"new_password": NEW})
        assert (nobody.status_code, nobody.json()["reason"]) == (404, "user_not_found")

        assert (await ada("GET", "/users/me")).status_code == 401
        assert (await eve("GET", "/users/me")).status_code == 200
        assert "by an administrator" in str(await dashtam.mail.message_to(ADA, "Your password was changed"))
        changes = [context for action, context in await trail(dashtam) if action == AuditAction.USER_PASSWORD_CHANGED]
        assert changes == [{"initiated_by": "admin", "method": "administrative"}]


async def reset(dashtam: Served, token: str, password: str = NEW) -> tuple[int, str | None]:
    answer = await dashtam.http.post("/password-resets/confirmation", json={"token": token, "new_password": password})
    return answer.status_code, None if answer.status_code == 204 else answer.json()["reason"]


async def test_a_forgotten_password_is_set_anew_by_the_link_in_a_mail(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        await dashtam.http.post("/password-resets", json={"email": "ADA@example.com"})
        token = await dashtam.token(ADA, "Choose a new password")
        assert token not in dashtam.output.getvalue()

        assert await reset(dashtam, token, "weak") == (422, "weak_password")  # which uses nothing up
        assert await reset(dashtam, token) == (204, None)
        assert await reset(dashtam, token) == (422, "token_used")
        assert (await ada("GET", "/users/me")).status_code == 401
        assert (await dashtam.log_in(ADA, NEW)).status_code == 201
        await dashtam.mail.message_to(ADA, "Your password was changed")
        assert [action for action in await actions(dashtam) if "RESET" in action or "SESSIONS" in action] == [
            AuditAction.PASSWORD_RESET_REQUEST_ATTEMPTED,
            AuditAction.USER_PASSWORD_RESET_REQUESTED,
            AuditAction.PASSWORD_RESET_CONFIRM_ATTEMPTED,
            AuditAction.PASSWORD_RESET_CONFIRM_FAILED,
            AuditAction.PASSWORD_RESET_CONFIRM_ATTEMPTED,
            AuditAction.USER_PASSWORD_RESET_COMPLETED,
            AuditAction.ALL_SESSIONS_REVOCATION_ATTEMPTED,
            AuditAction.ALL_SESSIONS_REVOKED,
            AuditAction.PASSWORD_RESET_CONFIRM_ATTEMPTED,
            AuditAction.PASSWORD_RESET_CONFIRM_FAILED,
        ]


async def test_nobody_learns_from_a_reset_whether_an_address_is_registered(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register(ADA)
        answers = [
            await dashtam.http.post("/password-resets", json={"email": email}) for email in (ADA, "nobody@example.com")
        ]
        assert answers[0].status_code == answers[1].status_code == 202
        assert answers[0].content == answers[1].content
        await dashtam.mail.message_to(ADA, "Choose a new password")
        assert not any("nobody" in str(mail["To"]) for mail in dashtam.mail.accepted)
        assert (await trail(dashtam))[-1] == (
            AuditAction.PASSWORD_RESET_REQUEST_FAILED,
            {"email": "nobody@example.com", "reason": "user_not_found"},
        )


async def test_answers_that_must_not_tell_come_at_even_times(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    clock = [0.0]

    async def sleep(seconds: float) -> None:
        waited.append(seconds)

    monkeypatch.setattr("dashtam.presentation.pace.time.monotonic", lambda: clock[0])
    monkeypatch.setattr("dashtam.presentation.pace.asyncio.sleep", sleep)
    for took in (0.125, 0.375, 0.75):
        clock[0] = 0.0
        async with Pace(0.5).kept():
            clock[0] = took
    assert waited == [0.375, 0.125, 0.25]


async def test_a_token_that_came_too_late_and_one_for_something_else_are_refused(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register(ADA)
        welcome = await dashtam.token(ADA, "Welcome to Dashtam")
        assert await reset(dashtam, welcome) == (422, "token_invalid")
        await dashtam.http.post("/password-resets", json={"email": ADA})
        token = await dashtam.token(ADA, "Choose a new password")
        async with dashtam.application.database.get_session() as session:
            await session.execute(update(OneTimeTokenModel).values(expires_at=datetime.now(UTC)))
        assert await reset(dashtam, token) == (422, "token_expired")
        assert (await dashtam.verify(ADA)).json()["reason"] == "token_expired"


async def test_of_many_who_use_a_token_at_once_one_succeeds(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.sign_up(ADA)
        await dashtam.http.post("/password-resets", json={"email": ADA})
        token = await dashtam.token(ADA, "Choose a new password")
        answers = await asyncio.gather(*(reset(dashtam, token, f"{NEW}{number}") for number in range(4)))
        assert sorted(answers, key=str) == [(204, None)] + [(422, "token_used")] * 3


async def test_a_reset_makes_every_older_link_useless(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.sign_up(ADA)
        tokens = []
        for count in (1, 2):
            await dashtam.http.post("/password-resets", json={"email": ADA})

            async def look(count: int = count) -> bool:
                return [m["Subject"] for m in dashtam.mail.accepted].count("Choose a new password") == count

            await eventually(look)
            tokens.append(await dashtam.token(ADA, "Choose a new password"))
        assert tokens[0] != tokens[1]
        assert await reset(dashtam, tokens[1]) == (204, None)
        assert await reset(dashtam, tokens[0]) == (422, "token_used")


async def test_a_changed_password_takes_back_the_links_for_another_one(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        await dashtam.http.post("/password-resets", json={"email": ADA})
        token = await dashtam.token(ADA, "Choose a new password")
        body = {"current_password": PASSWORD, "new_password": NEW}
        assert (await ada("PUT", "/users/me/password", json=body)).status_code == 204
        assert await reset(dashtam, token, "a thief's word 9") == (422, "token_used")
        assert (await dashtam.log_in(ADA, NEW)).status_code == 201


async def test_what_is_no_address_is_kept_by_nothing(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        answer = await dashtam.http.post("/password-resets", json={"email": PASSWORD})
        assert answer.status_code == 202
        assert await published(dashtam.application.database) == []
        assert PASSWORD not in dashtam.output.getvalue()


async def test_a_reset_is_asked_for_so_often_and_no_more(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        for email in (ADA, "nobody@example.com"):
            statuses = [
                (await dashtam.http.post("/password-resets", json={"email": email})).status_code for _ in range(4)
            ]
            assert statuses == [202, 202, 202, 429]


async def test_a_password_change_whose_sessions_can_t_be_closed_changes_nothing(sqlite_url: str) -> None:
    async with served(sqlite_url, raise_faults=False) as dashtam:
        ada = await dashtam.sign_up(ADA)
        async with dashtam.application.database.get_session() as session:
            await session.execute(
                text("CREATE TRIGGER broken BEFORE UPDATE ON sessions BEGIN SELECT RAISE(ABORT, 'no'); END")
            )
        body = {"current_password": PASSWORD, "new_password": NEW}
        assert (await ada("PUT", "/users/me/password", json=body)).status_code == 500
        async with dashtam.application.database.get_session() as session:
            await session.execute(text("DROP TRIGGER broken"))
        assert (await ada("GET", "/users/me")).status_code == 200
        assert (await dashtam.log_in(ADA)).status_code == 201
        assert UserPasswordChangeSucceeded.__name__ not in await published(dashtam.application.database)


async def test_keys_are_replaced_without_a_break(sqlite_url: str) -> None:
    from dashtam.infrastructure.secret_keys import make_key

    old, new = make_key(), make_key()
    token: dict[str, Any] = {}
    async with served(sqlite_url, secret_keys=(old,)) as dashtam:
        ada = await dashtam.sign_up(ADA)
        await dashtam.http.post("/password-resets", json={"email": ADA})
        token["reset"] = await dashtam.token(ADA, "Choose a new password")
    async with served(sqlite_url, secret_keys=(new,)) as dashtam:
        ada.client = dashtam.http
        assert (await ada("GET", "/users/me")).status_code == 401
        assert await reset(dashtam, token["reset"]) == (422, "token_invalid")
    async with served(sqlite_url, secret_keys=(new, old)) as dashtam:
        ada.client = dashtam.http
        assert (await ada("GET", "/users/me")).status_code == 200
        assert await reset(dashtam, token["reset"]) == (204, None)


async def test_a_token_s_id_is_that_of_the_event_that_announces_it(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        await dashtam.register(ADA)
        token = await dashtam.token(ADA, "Welcome to Dashtam")
        async with dashtam.application.database.get_session() as session:
            event_id = await session.scalar(
                text("SELECT event_id FROM whereupon_log WHERE type = 'UserRegistrationSucceeded'")
            )
            (row,) = await session.execute(text("SELECT id, purpose FROM one_time_tokens"))
        assert row.purpose == Purpose.EMAIL_VERIFICATION.value
        assert UUID(str(event_id)) == UUID(str(row.id))
        assert token


async def test_nobody_waits_for_a_transaction_in_which_a_password_is_hashed(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hashed_in: list[str] = []
    hash_ = PasswordHasher.hash

    async def spied(self: PasswordHasher, password: str) -> str:
        try:
            dashtam.application.database.current("a test")
        except NoSessionError:
            hashed_in.append("no transaction")
        else:
            hashed_in.append("a transaction")
        return await hash_(self, password)

    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        monkeypatch.setattr(PasswordHasher, "hash", spied)
        body = {"current_password": PASSWORD, "new_password": NEW}
        assert (await ada("PUT", "/users/me/password", json=body)).status_code == 204
        assert (await dashtam.application.password_reset.reset_password(ada.user_id, f"{NEW}!")) == Success(None)
        await dashtam.http.post("/password-resets", json={"email": ADA})
        assert await reset(dashtam, await dashtam.token(ADA, "Choose a new password"), f"{NEW}!!") == (204, None)
    assert hashed_in == ["no transaction"] * 3
