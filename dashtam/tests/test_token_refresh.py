"""Access tokens are replaced in time, by one caller, and users are told when that is over; on both databases."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from urllib.parse import parse_qs
from uuid import UUID

import pytest
from banked import Banked, banked
from served import Person, Served, eventually
from sqlalchemy import select, update

from dashtam.application.token_refresh import KEPT_UNTIL, LEASE, TokenRefresher
from dashtam.application.upkeep import Chore, Upkeep
from dashtam.bootstrap import Settings, build
from dashtam.domain.connection import InvalidGrant, NotConnected, ProviderUnavailable, Tokens
from dashtam.domain.events import TokenRefreshFailed
from dashtam.infrastructure.bank import SANDBOX
from dashtam.infrastructure.connections import SqlConnectionRepository
from dashtam.infrastructure.tables import ConnectionModel

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ALERT = "Sandbox Bank needs your permission again"


@asynccontextmanager
async def ready(database_url: str) -> AsyncIterator[tuple[Banked, Person, UUID]]:
    """Ada, connected, with everything fetched."""
    async with banked(database_url) as here:
        ada = await here.dashtam.sign_up("ada@example.com")
        yield here, ada, UUID(await here.connected(ada))


def repository_of(here: Banked) -> SqlConnectionRepository:
    application = here.dashtam.application
    return SqlConnectionRepository(application.database, application.connections.seal)


def refresher(here: Banked) -> TokenRefresher:
    return here.dashtam.application.connections.refresher


async def status(ada: Person) -> str:
    (connection,) = await ada.get("/connections")
    found: str = connection["status"]
    return found


def alerts(dashtam: Served) -> int:
    return sum(str(mail["Subject"]) == ALERT for mail in dashtam.mail.accepted)


async def kinds(ada: Person, dashtam: Served) -> list[str]:
    found = await dashtam.application.queries.notifications(ada.user_id, limit=100)
    return [each.kind for each in found]


async def test_a_token_that_is_good_for_a_while_is_used_as_it_is(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, _, connection_id):
        await refresher(here).access(connection_id)
        here.clock.advance(minutes=13)
        await refresher(here).access(connection_id)
        assert await here.count("TokenRefreshAttempted") == 0


async def test_a_token_that_ends_within_a_minute_is_replaced_before_it_is_used(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        here.clock.advance(minutes=14, seconds=30)
        await here.sync(ada, str(connection_id))
        assert await here.count("TokenRefreshSucceeded") == 1
        assert await here.count("TokenRefreshFailed") == 0
        await here.assert_same_as_bank()


async def test_a_token_that_the_bank_rejects_is_replaced_once(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        await here.tell("access-token/expire")
        await here.sync(ada, str(connection_id))
        assert await here.count("TokenRefreshSucceeded") == 1
        assert await here.count("AccountSyncFailed") == 0


async def test_refresh_tokens_rotate_for_days(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, _, connection_id):
        seen = set()
        for _ in range(5):
            here.clock.advance(hours=20)
            seen.add((await refresher(here).access(connection_id)).token)
        assert len(seen) == 5
        assert await here.count("TokenRefreshSucceeded") == 5


async def test_of_many_who_need_a_token_one_asks_the_bank_and_all_get_it(database_url: str) -> None:
    async with ready(database_url) as (here, _, connection_id):
        # a second process, as far as the database can tell
        settings = here.dashtam.application.settings
        other = build(
            Settings(database_url=database_url, secret_keys=settings.secret_keys, deliver=False),
            bank_transport=here.wire,
            clock=here.clock,
        )
        try:
            here.clock.advance(minutes=15)
            await here.fault(at="token", delay_seconds=0.3, times=1)
            before = here.wire.asked("/oauth/token")
            each = [refresher(here), other.connections.refresher] * 5
            got = await asyncio.gather(*(one.access(connection_id) for one in each))
        finally:
            await other.bus.engine.dispose()
            await other.connections.http.aclose()
        assert len({access.token for access in got}) == 1
        assert here.wire.asked("/oauth/token") == before + 1
        assert await here.count("TokenRefreshAttempted") == 1


async def test_a_refresh_whose_process_died_is_taken_over_when_its_lease_has_run_out(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, _, connection_id):
        here.clock.advance(minutes=15)
        repository = SqlConnectionRepository(
            here.dashtam.application.database, here.dashtam.application.connections.seal
        )
        now = here.clock()
        async with here.dashtam.application.database.get_session():
            assert await repository.claim_refresh(connection_id, 1, now=now, until=now + LEASE)
            assert not await repository.claim_refresh(connection_id, 1, now=now, until=now + LEASE)
        waiting = asyncio.create_task(refresher(here).access(connection_id))
        await asyncio.sleep(0.5)
        assert await here.count("TokenRefreshAttempted") == 0
        here.clock.advance(seconds=31)
        assert (await waiting).version == 2


async def test_nobody_waits_for_ever_for_somebody_elses_refresh(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, _, connection_id):
        here.clock.advance(minutes=15)
        async with here.dashtam.application.database.get_session() as session:
            await session.execute(update(ConnectionModel).values(refreshing_until=here.clock() + timedelta(days=1)))
        waiting = asyncio.create_task(refresher(here).access(connection_id))
        await asyncio.sleep(0.3)
        here.clock.advance(minutes=1)
        with pytest.raises(ProviderUnavailable):
            await waiting


async def test_when_a_bank_takes_the_refresh_token_no_more_the_user_is_told_and_the_connection_marked(
    database_url: str,
) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        await here.tell("refresh-token/expire")
        here.clock.advance(minutes=15)
        with pytest.raises(InvalidGrant):
            await refresher(here).access(connection_id)

        async def marked() -> bool:
            return await status(ada) == "reauthorization_required"

        async def alerted() -> bool:
            return alerts(here.dashtam) == 1

        async def notified() -> bool:
            return "token_refresh_failed" in await kinds(ada, here.dashtam)

        for look in (marked, alerted, notified):
            await eventually(look)
        assert await here.reasons("TokenRefreshFailed") == ["invalid_grant"]
        answer = await ada("POST", f"/connections/{connection_id}/sync")
        assert (answer.status_code, answer.json()["reason"]) == (409, "reauthorization_required")

        # the user allows it again, and all is well
        assert await here.connected(ada) == str(connection_id)
        assert await status(ada) == "active"
        await here.sync(ada, str(connection_id))
        await here.assert_same_as_bank()
        assert alerts(here.dashtam) == 1


async def test_a_sync_that_finds_the_authorization_gone_is_given_up_and_told_once(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        await here.tell("grant/revoke")
        asked = [await ada("POST", f"/connections/{connection_id}/sync") for _ in range(3)]
        heard = sum(answer.status_code == 202 for answer in asked)  # the others came when it was marked already
        assert heard >= 1

        async def marked() -> bool:
            return await status(ada) == "reauthorization_required"

        await eventually(marked)

        async def settled() -> bool:
            return await here.count("AccountSyncFailed") == heard

        await eventually(settled)
        assert await here.reasons("TokenRefreshFailed") == ["invalid_grant"]
        assert set(await here.reasons("AccountSyncFailed")) <= {"invalid_grant", "reauthorization_required"}


async def test_a_bank_that_does_not_answer_for_a_while_alarms_nobody(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        here.clock.advance(minutes=15)
        await here.fault(at="token", status=503, times=1)
        with pytest.raises(ProviderUnavailable):
            await refresher(here).access(connection_id)
        assert await here.reasons("TokenRefreshFailed") == ["provider_unavailable"]
        await here.sync(ada, str(connection_id))
        assert await status(ada) == "active"
        assert alerts(here.dashtam) == 0
        assert "token_refresh_failed" not in await kinds(ada, here.dashtam)


async def test_an_answer_that_gets_lost_costs_no_authorization(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        here.clock.advance(minutes=15)
        here.wire.cut.append("/oauth/token")
        with pytest.raises(ProviderUnavailable):
            await refresher(here).access(connection_id)
        await here.sync(ada, str(connection_id))
        assert await here.count("TokenRefreshSucceeded") == 1
        assert await status(ada) == "active"


async def connects_meanwhile(here: Banked, ada: Person, connection_id: UUID) -> str:
    """The user allows it again while the old tokens are being refreshed; what the refresh gives."""
    here.clock.advance(minutes=15)
    synced = await here.count("TransactionSyncSucceeded")
    back = await here.consent(await here.start(ada))
    before = here.wire.asked("/oauth/token")
    here.wire.held["/oauth/token"] = let_go = asyncio.Event()
    refreshing = asyncio.create_task(refresher(here).access(connection_id))

    async def asked() -> bool:
        return here.wire.asked("/oauth/token") == before + 1

    await eventually(asked)
    assert (await ada("POST", "/connections/callback", json=back)).status_code == 201
    let_go.set()
    token = (await refreshing).token
    accounts = here.bank.people.find("Ada").accounts
    await here.until("TransactionSyncSucceeded", synced + sum(account.open for account in accounts))
    return token


async def stored(here: Banked, connection_id: UUID) -> Tokens:
    repository = repository_of(here)
    async with here.dashtam.application.database.get_session():
        tokens = await repository.tokens(connection_id)
    assert tokens is not None
    return tokens


@pytest.mark.parametrize("refused", [False, True])
async def test_what_a_user_allows_again_is_not_undone_by_a_refresh_that_was_under_way(
    database_url: str, refused: bool
) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        if refused:
            await here.tell("refresh-token/expire")
        token = await connects_meanwhile(here, ada, connection_id)
        assert (await stored(here, connection_id)).access == token
        assert await here.reasons("TokenRefreshFailed") == ["tokens_replaced"]
        await here.sync(ada, str(connection_id))
        assert await status(ada) == "active"
        assert alerts(here.dashtam) == 0


async def test_a_failure_from_before_the_user_allowed_it_again_marks_nothing(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        async with here.dashtam.application.database.get_session() as session:
            connected_at = await session.scalar(select(ConnectionModel.connected_at))
        assert connected_at is not None
        for occurred_at, found in (
            (connected_at - timedelta(seconds=1), "active"),
            (datetime.now(UTC), "reauthorization_required"),
        ):
            receipt = await here.dashtam.bus.publish(
                TokenRefreshFailed(
                    user_id=ada.user_id,
                    provider_id=SANDBOX.id,
                    connection_id=connection_id,
                    provider_name="sandbox",
                    reason="invalid_grant",
                    occurred_at=occurred_at,
                )
            )
            await receipt.settled()
            assert await status(ada) == found


async def test_a_token_without_a_refresh_token_is_used_until_it_ends(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, ada, connection_id):
        repository = repository_of(here)
        tokens = await stored(here, connection_id)
        async with here.dashtam.application.database.get_session():
            connection = await repository.find_by_id(connection_id, for_update=True)
            assert connection is not None
            await repository.replace_tokens(
                connection, Tokens(access=tokens.access, refresh=None, expires_at=tokens.expires_at)
            )
        assert (await refresher(here).access(connection_id)).token == tokens.access
        here.clock.advance(minutes=15)
        with pytest.raises(InvalidGrant):
            await refresher(here).access(connection_id)

        async def marked() -> bool:
            return await status(ada) == "reauthorization_required"

        await eventually(marked)


async def test_the_upkeep_replaces_what_ends_soon_and_nothing_else(database_url: str) -> None:
    async with ready(database_url) as (here, _, connection_id):
        expiring = here.dashtam.application.connections.expiring_tokens
        await expiring.refresh()
        assert await here.count("TokenRefreshAttempted") == 0
        here.clock.advance(minutes=11)
        await expiring.refresh()
        await expiring.refresh()
        assert await here.count("TokenRefreshSucceeded") == 1
        ends = (await stored(here, connection_id)).expires_at
        assert ends is not None
        assert ends - here.clock() > KEPT_UNTIL

        here.clock.advance(minutes=20)  # it has ended: whoever needs one next renews it, and nobody asks for ever
        await expiring.refresh()
        assert await here.count("TokenRefreshAttempted") == 1


async def test_the_upkeep_goes_on_after_banks_and_databases_that_fail(sqlite_url: str) -> None:
    async with ready(sqlite_url) as (here, _, _connection_id):
        application = here.dashtam.application
        refresh = application.connections.expiring_tokens.refresh
        chores = [Chore(name="refresh_tokens", do=refresh, every=timedelta(milliseconds=20))]
        async with application.database.get_session() as session:
            sealed = await session.scalar(select(ConnectionModel.sealed_tokens))
        async with application.database.get_session() as session:
            await session.execute(update(ConnectionModel).values(sealed_tokens="broken"))
        here.clock.advance(minutes=11)
        running = asyncio.create_task(Upkeep(chores, application.logger).run())
        try:
            await here.dashtam.logged("upkeep_failed")
            await here.fault(at="token", status=500, times=2)
            async with application.database.get_session() as session:
                await session.execute(update(ConnectionModel).values(sealed_tokens=sealed))
            await here.until("TokenRefreshSucceeded")
            assert await here.reasons("TokenRefreshFailed") == ["provider_unavailable"] * 2
        finally:
            running.cancel()
            with pytest.raises(asyncio.CancelledError):
                await running


async def test_what_a_bank_renews_for_a_user_who_disconnects_meanwhile_is_revoked(database_url: str) -> None:
    async with ready(database_url) as (here, ada, connection_id):
        old = await stored(here, connection_id)
        here.clock.advance(minutes=15)
        before = here.wire.asked("/oauth/token")
        here.wire.held["/oauth/token"] = let_go = asyncio.Event()
        refreshing = asyncio.create_task(refresher(here).access(connection_id))

        async def asked() -> bool:
            return here.wire.asked("/oauth/token") == before + 1

        await eventually(asked)
        assert (await ada("DELETE", f"/connections/{connection_id}")).status_code == 204
        let_go.set()
        with pytest.raises(NotConnected):
            await refreshing

        async def revoked() -> bool:
            asked = [request for request in here.wire.requests if request.url.path == "/oauth/revoke"]
            tokens = {parse_qs(request.content.decode())["token"][0] for request in asked}
            return old.refresh in tokens and len(tokens - {old.access, old.refresh}) > 0

        await eventually(revoked)
        assert here.bank.grants.of("Ada") == []
