"""Logging in and out, and what closes sessions, on both databases."""

import asyncio
import base64
import json
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from guide.aftermath import published
from served import PASSWORD, Person, Served, served
from sqlalchemy import func, select, text, update

from dashtam.application import upkeep
from dashtam.domain.audit import AuditAction
from dashtam.infrastructure.tables import AuditLogModel, OneTimeTokenModel, RateLimitModel, SessionModel

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ADA = "ada@example.com"


async def trail(dashtam: Served, *after: AuditAction) -> list[tuple[str, dict[str, Any]]]:
    """Audited actions and their contexts, those of signing up left out."""
    table = AuditLogModel.__table__.c
    async with dashtam.application.database.get_session() as session:
        rows = await session.execute(select(table.action, table.context).order_by(table.occurred_at, table.id))
        return [(row.action, row.context) for row in rows]


async def actions(dashtam: Served) -> list[str]:
    return [action for action, _ in await trail(dashtam)]


async def test_a_session_is_opened_used_and_closed(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.sign_up(ADA)
        answer = await dashtam.log_in("ADA@example.com", **{"User-Agent": "Analytical Engine/1"})
        assert answer.headers["cache-control"] == "no-store"
        ada = Person(dashtam.http, await dashtam.user_id(ADA), ADA, PASSWORD, answer.json())
        assert (ada.tokens["token_type"], ada.tokens["expires_in"]) == ("Bearer", 900)

        here, first = await ada.get("/sessions")
        assert (here["id"], here["current"], here["user_agent"]) == (str(ada.session_id), True, "Analytical Engine/1")
        assert first["current"] is False

        assert (await ada("DELETE", "/sessions/current")).status_code == 204
        for path in ("/users/me", "/sessions"):
            over = await ada("GET", path)
            assert (over.status_code, over.json()["reason"]) == (401, "not_logged_in")
        assert (await actions(dashtam))[-4:] == [
            AuditAction.USER_LOGIN_ATTEMPTED,
            AuditAction.USER_LOGIN_SUCCESS,
            AuditAction.USER_LOGOUT_ATTEMPTED,
            AuditAction.USER_LOGOUT,
        ]
        async with dashtam.application.database.get_session() as session:
            stored = [str(row) for row in await session.execute(text("SELECT * FROM sessions"))]
        assert len(stored) == 2
        secret = ada.tokens["refresh_token"].rpartition(".")[2]
        assert not any(secret in row for row in stored)
        assert secret not in dashtam.output.getvalue()
        assert PASSWORD not in dashtam.output.getvalue()


@pytest.mark.parametrize("email", [ADA, "nobody@example.com", "no address", "<b>\r\nBcc: eve@example.com", "\0", ""])
async def test_a_wrong_password_and_an_unknown_address_are_answered_alike(database_url: str, email: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register(ADA)
        hashed = []
        verify = dashtam.application.sessions._passwords._verify  # type: ignore[attr-defined]

        def counted(*password_and_hash: str) -> bool:
            hashed.append(password_and_hash)
            return bool(verify(*password_and_hash))

        dashtam.application.sessions._passwords._verify = counted  # type: ignore[attr-defined]
        refused = await dashtam.log_in(email, "wrong horse 8")

        assert refused.status_code == 401
        assert refused.json() == {
            "type": "about:blank",
            "title": "Unauthorized",
            "status": 401,
            "detail": "The address or the password is wrong, or the address is not confirmed yet.",
            "reason": "invalid_credentials",
        }
        assert len(hashed) == 1  # as long as the check of a hash takes, whoever it is
        attempts = [found for found in await trail(dashtam) if "LOGIN" in found[0]]
        if "@example.com" in email and "<" not in email:
            assert attempts == [
                (AuditAction.USER_LOGIN_ATTEMPTED, {"email": email}),
                (AuditAction.USER_LOGIN_FAILED, {"email": email, "reason": "invalid_credentials"}),
            ]
        else:  # a password, perhaps, typed into the wrong field: nothing keeps it
            assert attempts == []
            assert not email or email not in dashtam.output.getvalue()


async def test_whoever_registers_an_address_does_not_learn_by_logging_in_whether_it_was_free(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.sign_up(ADA)
        answers = []
        for email in (ADA, "free@example.com"):
            assert (await dashtam.register(email, "an attacker's 9")).status_code == 202
            answers.append(await dashtam.log_in(email, "an attacker's 9"))
        assert answers[0].status_code == answers[1].status_code == 401
        assert answers[0].content == answers[1].content
        reasons = [context["reason"] for action, context in await trail(dashtam) if action == "USER_LOGIN_FAILED"]
        assert reasons == ["invalid_credentials", "email_not_verified"]


async def test_a_refresh_token_works_once_and_stolen_it_closes_the_session(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)

        async def renew(token: str) -> Any:
            return await dashtam.http.post("/sessions/renewal", json={"refresh_token": token})

        first = ada.tokens["refresh_token"]
        renewed = (await renew(first)).json()
        assert renewed["session_id"] == str(ada.session_id)
        assert renewed["refresh_token"] != first
        # Somebody who asked twice, or lost the answer, gets the same answer again for a moment.
        again = (await renew(first)).json()
        assert again["refresh_token"] == renewed["refresh_token"]

        async with dashtam.application.database.get_session() as session:
            long_ago = datetime.now(UTC) - timedelta(minutes=1)
            await session.execute(update(SessionModel).values(renewed_at=long_ago))
        stolen = await renew(first)
        assert (stolen.status_code, stolen.json()["reason"]) == (401, "refresh_token_reused")
        assert (await renew(again["refresh_token"])).json()["reason"] == "not_logged_in"
        assert (await ada("GET", "/users/me")).status_code == 401
        assert (await trail(dashtam))[-1] == (
            AuditAction.SESSION_REVOKED,
            {"session_id": str(ada.session_id), "reason": "refresh_token_reused"},
        )
        for nonsense in ("", "x", "x.y", f"{ada.session_id}.", f"{ada.session_id}.\ud800", "." * 200, first + "A"):
            body = json.dumps({"refresh_token": nonsense})
            answer = await dashtam.http.post(
                "/sessions/renewal", content=body, headers={"content-type": "application/json"}
            )
            assert answer.status_code in (401, 422), nonsense


async def test_a_stolen_token_that_is_several_renewals_old_closes_the_session_too(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        token = first = ada.tokens["refresh_token"]
        for _ in range(3):
            answer = await dashtam.http.post("/sessions/renewal", json={"refresh_token": token})
            token = answer.json()["refresh_token"]
        stolen = await dashtam.http.post("/sessions/renewal", json={"refresh_token": first})
        assert stolen.json()["reason"] == "refresh_token_reused"
        assert (await dashtam.http.post("/sessions/renewal", json={"refresh_token": token})).status_code == 401


async def test_tries_that_are_refused_keep_nobody_else_from_theirs(database_url: str) -> None:
    async with served(database_url, trusted_proxies=("127.0.0.0/8",)) as dashtam:
        await dashtam.sign_up(ADA)
        for _ in range(120):
            await dashtam.log_in(ADA, "wrong horse 8", **{"X-Forwarded-For": "198.51.100.7"})
        assert (await dashtam.log_in(ADA, **{"X-Forwarded-For": "198.51.100.7"})).status_code == 429
        assert (await dashtam.log_in(ADA, **{"X-Forwarded-For": "203.0.113.9"})).status_code == 201


async def test_an_address_is_found_however_its_letters_are_written(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register("jos\u00e9@ex\u00e4mple.com")
        await dashtam.verify("jos\u00e9@")  # the domain is written in ASCII in the mail
        for email in ("jos\u00e9@ex\u00e4mple.com", "jose\u0301@xn--exmple-cua.com", "JOS\u00c9@EX\u00c4MPLE.COM"):
            assert (await dashtam.log_in(email)).status_code == 201, email


async def test_of_many_renewals_at_once_each_is_answered_and_the_session_stays(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        request = {"refresh_token": ada.tokens["refresh_token"]}
        answers = await asyncio.gather(*(dashtam.http.post("/sessions/renewal", json=request) for _ in range(4)))
        assert [answer.status_code for answer in answers] == [200] * 4
        assert len({answer.json()["refresh_token"] for answer in answers}) == 1
        assert (await ada("GET", "/users/me")).status_code == 200


async def test_an_access_token_that_is_not_ours_is_refused(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        header, claims, signature = ada.tokens["access_token"].split(".")
        unsigned = base64.urlsafe_b64encode(b'{"alg":"none","typ":"JWT"}').decode().rstrip("=")
        for token in (f"{unsigned}.{claims}.", f"{header}.{claims}.{signature[::-1]}", "", "a.b.c", "\u00fc"):
            answer = await dashtam.http.get("/users/me", headers=[(b"authorization", f"Bearer {token}".encode())])
            assert answer.status_code == 401, token


async def test_another_device_is_logged_out_and_only_one_s_own(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        phone = await dashtam.person(ADA)
        eve = await dashtam.sign_up("eve@example.com")

        assert (await eve("DELETE", f"/sessions/{phone.session_id}")).json()["reason"] == "session_not_found"
        assert (await phone("GET", "/users/me")).status_code == 200
        assert (await ada("DELETE", f"/sessions/{phone.session_id}")).status_code == 204
        assert (await phone("GET", "/users/me")).status_code == 401
        assert (await ada("DELETE", f"/sessions/{phone.session_id}")).status_code == 404
        assert (await ada("GET", "/users/me")).status_code == 200

        await dashtam.person(ADA)
        assert (await ada("DELETE", "/sessions")).json() == {"session_count": 2}
        assert (await ada("GET", "/users/me")).status_code == 401
        assert (await eve("GET", "/users/me")).status_code == 200
        revocations = [found for found in await trail(dashtam) if "REVO" in found[0]]
        assert [action for action, _ in revocations] == [
            AuditAction.SESSION_REVOCATION_ATTEMPTED,
            AuditAction.SESSION_REVOCATION_FAILED,
            AuditAction.SESSION_REVOCATION_ATTEMPTED,
            AuditAction.SESSION_REVOKED,
            AuditAction.SESSION_REVOCATION_ATTEMPTED,
            AuditAction.SESSION_REVOCATION_FAILED,
            AuditAction.ALL_SESSIONS_REVOCATION_ATTEMPTED,
            AuditAction.ALL_SESSIONS_REVOKED,
        ]


async def test_a_session_expires(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        async with dashtam.application.database.get_session() as session:
            await session.execute(update(SessionModel).values(expires_at=datetime.now(UTC)))
        assert (await ada("GET", "/users/me")).status_code == 401
        renewal = await dashtam.http.post("/sessions/renewal", json={"refresh_token": ada.tokens["refresh_token"]})
        assert renewal.status_code == 401


async def test_the_use_of_a_session_is_noted_once_a_minute(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        (before,) = await ada.get("/sessions")
        assert (await ada.get("/sessions"))[0]["last_used_at"] == before["last_used_at"]
        async with dashtam.application.database.get_session() as session:
            await session.execute(update(SessionModel).values(last_used_at=datetime.now(UTC) - timedelta(minutes=2)))
        await ada.get("/users/me")
        assert (await ada.get("/sessions"))[0]["last_used_at"] > before["last_used_at"]


async def test_what_somebody_does_is_audited_with_who_they_are(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up(ADA)
        await ada("DELETE", "/sessions/current")
        async with dashtam.application.database.get_session() as session:
            table = AuditLogModel.__table__.c
            actors = set(await session.scalars(select(table.actor).where(table.action.like("USER_LOGOUT%"))))
        assert actors == {str(ada.user_id)}


async def test_logging_in_is_tried_so_often_from_one_place_and_no_more(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.sign_up(ADA)
        for _ in range(10):
            assert (await dashtam.log_in(ADA, "wrong horse 8")).status_code == 401
        limited = await dashtam.log_in(ADA)
        assert (limited.status_code, limited.json()["reason"]) == (429, "too_many_attempts")
        assert 0 < int(limited.headers["retry-after"]) <= 900
        assert limited.json()["detail"].endswith(f"in {limited.headers['retry-after']} seconds.")
        before = await published(dashtam.application.database)
        assert (await dashtam.log_in(ADA)).status_code == 429
        assert await published(dashtam.application.database) == before  # nobody fills the log by trying on
        # Of an address that nobody has the same is said.
        for _ in range(10):
            assert (await dashtam.log_in("nobody@example.com")).status_code == 401
        assert (await dashtam.log_in("nobody@example.com")).status_code == 429


async def test_a_login_that_succeeds_is_held_against_nobody(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        await dashtam.sign_up(ADA)
        for _ in range(12):
            assert (await dashtam.log_in(ADA, "wrong horse 8")).status_code == 401
            assert (await dashtam.log_in(ADA)).status_code == 201


async def test_counts_of_tries_are_hashed_and_cleared_away(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.log_in("nobody@example.com")
        async with dashtam.application.database.get_session() as session:
            rows = [str(row) for row in await session.execute(text("SELECT * FROM rate_limits"))]
            assert len(rows) == 3
            assert not any("nobody" in row for row in rows)
        async with dashtam.application.database.get_session() as session:
            await session.execute(update(RateLimitModel).values(ends_at=1, window=0))
        await dashtam.log_in("somebody@example.com")
        async with dashtam.application.database.get_session() as session:
            assert await session.scalar(select(func.count()).select_from(RateLimitModel)) == 3


async def test_sessions_and_links_are_forgotten_a_while_after_their_end(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(upkeep, "FORGOTTEN_AT_ONCE", 2)
    async with served(database_url, keep_days=30) as dashtam:
        database = dashtam.application.database
        ada = await dashtam.sign_up(ADA)
        for _ in range(5):
            await dashtam.log_in(ADA)
        now = datetime.now(UTC)
        async with database.get_session() as session:
            others = SessionModel.id != ada.session_id
            await session.execute(update(SessionModel).where(others).values(expires_at=now - timedelta(days=31)))
            await session.execute(update(OneTimeTokenModel).values(expires_at=now - timedelta(days=31)))
        await dashtam.http.post("/password-resets", json={"email": ADA})
        link = await dashtam.token(ADA, "Choose a new password")
        (chore,) = (each for each in dashtam.application.upkeep.chores if each.name == "forget_ended")
        await chore.do()
        async with database.get_session() as session:
            assert list(await session.scalars(select(SessionModel.id))) == [ada.session_id]
            assert await session.scalar(select(func.count()).select_from(OneTimeTokenModel)) == 1
        assert await ada.answers("/users/me")
        answer = await dashtam.http.post(
            "/password-resets/confirmation", json={"token": link, "new_password": "battery staple 8"}
        )
        assert answer.status_code == 204
