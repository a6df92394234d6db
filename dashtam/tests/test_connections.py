"""Connecting banks by OAuth 2.0 and ending that, with the sandbox bank, on both databases."""

import asyncio
import stat
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit
from uuid import uuid4

import pytest
from banked import Banked, banked
from served import Served, eventually, mail_server, served
from sqlalchemy import func, select, text

from dashtam.bootstrap import Settings
from dashtam.infrastructure.bank import SANDBOX
from dashtam.infrastructure.sealing import Seal, SealBroken
from dashtam.infrastructure.secret_keys import SecretKeyError, make_key
from dashtam.infrastructure.tables import AuthorizationRequestModel, ConnectionModel, RevocationModel

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


async def subjects(dashtam: Served, email: str) -> list[str]:
    return [str(mail["Subject"]) for mail in dashtam.mail.accepted if email in str(mail["To"])]


async def test_whereupon_accounts_are_fetched_and_the_user_gets_a_mail(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        connection_id = await here.connected(ada)

        (connection,) = await ada.get("/connections")
        assert connection["id"] == connection_id
        assert (connection["status"], connection["provider_name"]) == ("active", "sandbox")
        await here.assert_same_as_bank()

        async def told() -> bool:
            return "Sandbox Bank is connected to Dashtam" in await subjects(here.dashtam, "ada@example.com")

        await eventually(told)
        count = len(here.bank.people.find("Ada").accounts)
        await here.until("AccountCreated", count)
        assert await here.count("ProviderConnectionAttempted") == 1
        assert await here.count("ProviderConnectionSucceeded") == 1
        assert await here.open_attempts() == 0


async def test_the_authorization_request_has_a_challenge_and_a_state_of_which_only_a_hash_is_stored(
    sqlite_url: str,
) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        asked = {key: values[0] for key, values in parse_qs(urlsplit(await here.start(ada)).query).items()}
        assert asked["code_challenge_method"] == "S256"
        async with here.dashtam.application.database.get_session() as session:
            (row,) = (await session.execute(select(AuthorizationRequestModel.__table__))).mappings()
        assert asked["state"] not in str(dict(row))
        assert asked["code_challenge"] not in str(dict(row))


async def test_no_token_is_stored_logged_or_published_in_clear(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        await here.connected(ada)
        sent = [
            request.headers["authorization"].split()[1] for request in here.wire.requests if "/api" in request.url.path
        ]
        assert sent
        async with here.dashtam.application.database.get_session() as session:
            everything = [
                str(row)
                for table in ("whereupon_log", "whereupon_audit", "whereupon_workflow", "provider_connections")
                for row in await session.execute(text(f"SELECT * FROM {table}"))
            ]
        assert not any(token in row for token in sent for row in everything)
        assert not any(token in here.dashtam.output.getvalue() for token in sent)


async def test_an_unknown_provider_is_refused(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up("ada@example.com")
        answer = await ada("POST", "/connections", json={"provider_name": "nowhere"})
        assert (answer.status_code, answer.json()["reason"]) == (422, "unknown_provider")
        (provider,) = (await dashtam.http.get("/providers")).json()
        assert provider == {"id": str(SANDBOX.id), "name": "sandbox", "display_name": "Sandbox Bank"}


@pytest.mark.parametrize(("method", "path"), [("GET", "/connections"), ("GET", "/accounts"), ("GET", "/balances")])
async def test_who_is_not_signed_in_sees_nothing(sqlite_url: str, method: str, path: str) -> None:
    async with served(sqlite_url) as dashtam:
        assert (await dashtam.http.request(method, path)).status_code == 401


async def completed(here: Banked, person: Any, back: dict[str, str], status: int, reason: str) -> None:
    answer = await person("POST", "/connections/callback", json=back)
    assert (answer.status_code, answer.json().get("reason")) == (status, reason)


async def test_a_callback_is_good_once(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        back = await here.consent(await here.start(ada))
        answers = await asyncio.gather(*(ada("POST", "/connections/callback", json=back) for _ in range(4)))
        assert sorted(answer.status_code for answer in answers) == [201, 409, 409, 409]
        assert await here.reasons("ProviderConnectionFailed") == ["state_reused"] * 3
        assert await here.count("ProviderConnectionAttempted") == 4
        assert len(await ada.get("/connections")) == 1


async def test_somebody_elses_callback_is_none(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        eve = await here.dashtam.sign_up("eve@example.com")
        back = await here.consent(await here.start(ada))
        await completed(here, eve, back, 422, "state_mismatch")
        await completed(here, ada, {"state": "made up", "code": "made up"}, 422, "state_mismatch")
        assert await eve.get("/connections") == []
        assert (await ada("POST", "/connections/callback", json=back)).status_code == 201


async def test_a_callback_that_comes_too_late_is_refused(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        back = await here.consent(await here.start(ada))
        here.clock.advance(minutes=10)
        await completed(here, ada, back, 422, "state_expired")
        assert await here.reasons("ProviderConnectionFailed") == ["state_expired"]


async def test_who_says_no_at_the_bank_has_no_connection(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        back = await here.consent(await here.start(ada), decision="deny")
        await completed(here, ada, back, 403, "access_denied")
        assert await here.reasons("ProviderConnectionFailed") == ["access_denied"]
        assert await ada.get("/connections") == []


@pytest.mark.parametrize(
    ("fault", "status", "reason"),
    [
        ({"status": 503}, 503, "provider_unavailable"),
        ({"status": 429, "retry_after": 2}, 503, "provider_unavailable"),
        ({"status": 401}, 502, "provider_refused"),
    ],
)
async def test_a_bank_that_gives_no_tokens_is_a_failure_with_a_reason(
    sqlite_url: str, fault: dict[str, Any], status: int, reason: str
) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        back = await here.consent(await here.start(ada))
        await here.fault(at="token", **fault)
        await completed(here, ada, back, status, reason)
        assert await here.reasons("ProviderConnectionFailed") == [reason]


async def test_a_code_that_the_bank_did_not_give_is_refused(sqlite_url: str) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        back = await here.consent(await here.start(ada))
        await completed(here, ada, back | {"code": "made-up"}, 422, "invalid_grant")


@pytest.mark.parametrize("body", [{"state": "x"}, {"state": "x", "code": "y", "error": "z"}, {"code": "y"}, {}])
async def test_a_callback_has_a_state_and_either_a_code_or_an_error(sqlite_url: str, body: dict[str, str]) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up("ada@example.com")
        assert (await ada("POST", "/connections/callback", json=body)).status_code == 422


async def test_connecting_again_authorizes_the_same_connection_anew(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        first = await here.connected(ada)
        accounts = await ada.get("/accounts")
        assert await here.connected(ada) == first
        assert await ada.get("/accounts") == accounts
        await here.assert_same_as_bank()
        assert await here.count("AccountCreated") == len(accounts)


async def test_disconnecting_closes_accounts_and_destroys_and_revokes_tokens(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        connection_id = await here.connected(ada)
        count = len(await ada.get("/accounts"))

        assert (await ada("DELETE", f"/connections/{connection_id}")).status_code == 204
        (connection,) = await ada.get("/connections")
        assert connection["status"] == "disconnected"
        assert {account["status"] for account in await ada.get("/accounts")} == {"closed"}
        assert await ada.get("/balances") == []
        assert await here.count("AccountClosed") == count
        assert await here.count("ProviderDisconnectionSucceeded") == 1

        async def revoked() -> bool:
            async with here.dashtam.application.database.get_session() as session:
                waiting = await session.scalar(select(func.count()).select_from(RevocationModel))
                sealed = await session.scalar(select(ConnectionModel.sealed_tokens))
            return sealed is None and waiting == 0 and here.bank.grants.of("Ada") == []

        await eventually(revoked)
        # again: nothing is left to do
        assert (await ada("DELETE", f"/connections/{connection_id}")).status_code == 204
        assert await here.count("ProviderDisconnectionAttempted") == 1
        answer = await ada("POST", f"/connections/{connection_id}/sync")
        assert (answer.status_code, answer.json()["reason"]) == (409, "not_connected")


async def test_of_two_who_disconnect_at_once_one_does_it(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        connection_id = await here.connected(ada)
        answers = await asyncio.gather(*(ada("DELETE", f"/connections/{connection_id}") for _ in range(3)))
        assert {answer.status_code for answer in answers} <= {204, 409}
        assert await here.count("ProviderDisconnectionSucceeded") == 1
        assert await here.count("AccountClosed") == len(await ada.get("/accounts"))


async def test_tokens_are_revoked_although_the_bank_is_down_at_first(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        connection_id = await here.connected(ada)
        await here.fault(at="revoke", status=503, retry_after=0, times=2)
        assert (await ada("DELETE", f"/connections/{connection_id}")).status_code == 204

        async def revoked() -> bool:
            return here.bank.grants.of("Ada") == []

        await eventually(revoked)


async def test_a_connection_that_ended_can_be_made_again_with_the_accounts_it_had(database_url: str) -> None:
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        connection_id = await here.connected(ada)
        accounts = {account["id"] for account in await ada.get("/accounts")}
        await ada("DELETE", f"/connections/{connection_id}")
        assert await here.connected(ada) == connection_id
        assert {account["id"] for account in await ada.get("/accounts")} == accounts
        await here.assert_same_as_bank()


@pytest.mark.parametrize(("method", "what"), [("DELETE", ""), ("POST", "/sync")])
async def test_somebody_elses_connection_is_not_found(sqlite_url: str, method: str, what: str) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        eve = await here.dashtam.sign_up("eve@example.com")
        connection_id = await here.connected(ada)
        for id_ in (connection_id, uuid4()):
            answer = await eve(method, f"/connections/{id_}{what}")
            assert (answer.status_code, answer.json()["reason"]) == (404, "connection_not_found")
        assert (await ada.get("/connections"))[0]["status"] == "active"


async def test_tokens_moved_to_another_connection_do_not_open_there(sqlite_url: str) -> None:
    async with banked(sqlite_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        eve = await here.dashtam.sign_up("eve@example.com")
        await here.connected(ada, "Ada")
        await here.connected(eve, "Eve")
        async with here.dashtam.application.database.get_session() as session:
            stolen = await session.scalar(
                select(ConnectionModel.sealed_tokens).where(ConnectionModel.user_id == ada.user_id)
            )
            target = await session.scalar(select(ConnectionModel.id).where(ConnectionModel.user_id == eve.user_id))
        assert target is not None
        assert stolen is not None
        with pytest.raises(SealBroken, match="belongs to another row"):
            here.dashtam.application.connections.seal.open(target, stolen)


def test_the_first_key_seals_and_every_key_opens() -> None:
    owner = uuid4()
    old, new = b"1" * 32, b"2" * 32
    sealed = Seal([old]).seal(owner, {"access": "x"})
    assert Seal([new, old]).open(owner, sealed) == {"access": "x"}
    with pytest.raises(SealBroken, match="DASHTAM_SECRET_KEYS"):
        Seal([new]).open(owner, sealed)
    with pytest.raises(SealBroken):
        Seal([old]).open(owner, sealed[:-4] + "AAA=")


async def test_sqlite_has_its_key_in_a_file_that_only_its_owner_reads(sqlite_url: str, tmp_path: Path) -> None:
    async with served(sqlite_url):
        pass
    assert stat.S_IMODE((tmp_path / "app.db.key").stat().st_mode) == 0o600


async def test_postgresql_needs_a_key_and_is_told_where_one_comes_from(postgres_url: str) -> None:
    with pytest.raises(SecretKeyError, match="DASHTAM_SECRET_KEYS"):
        async with served(postgres_url, secret_keys=()):
            pass


def test_a_key_that_is_none_is_refused_without_being_shown() -> None:
    with pytest.raises(ValueError, match="secret key 2 is not 32 bytes") as refused:
        Settings(secret_keys=(make_key(), "tr0ub4dor"))  # type: ignore[arg-type]
    assert "tr0ub4dor" not in str(refused.value)


def test_two_providers_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="give each its own"):
        Settings(providers=(SANDBOX, SANDBOX))


@pytest.mark.parametrize("url", ["ftp://bank.example", "/oauth", "https://bank.example/a?b=c"])
def test_a_bank_has_an_address_over_http(url: str) -> None:
    with pytest.raises(ValueError, match="http"):
        type(SANDBOX).model_validate(SANDBOX.model_dump() | {"token_url": url})


async def test_the_confirmation_mail_goes_out_once_although_the_mail_server_refused_at_first(sqlite_url: str) -> None:
    async with mail_server() as mail, banked(sqlite_url, mail) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        await here.dashtam.mail.message_to("ada@example.com")
        mail.refusals.append("451 come back later")
        await here.connected(ada)

        async def told() -> bool:
            return "Sandbox Bank is connected to Dashtam" in await subjects(here.dashtam, "ada@example.com")

        await eventually(told)
        assert mail.refused == 1
