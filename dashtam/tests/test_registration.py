"""A person registers, and everything that follows from it, on both databases."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest
from served import Served, eventually, mail_server, served
from sqlalchemy import func, select, text

from dashtam.application.registration import RegisterUser
from dashtam.domain.audit import AuditAction
from dashtam.domain.events import UserRegistrationSucceeded
from dashtam.domain.result import Failure, Success
from dashtam.infrastructure.tables import AuditLogModel, UserModel, UserSettingsModel
from dashtam.infrastructure.users import SqlUserRepository

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]


async def actions(dashtam: Served) -> list[tuple[str, str, dict[str, Any]]]:
    """The audit trail: action, outcome, context."""
    async with dashtam.application.database.get_session() as session:
        rows = await session.execute(select(AuditLogModel.__table__).order_by(AuditLogModel.__table__.c.occurred_at))
        return [(row.action, row.outcome, row.context) for row in rows]


async def count(dashtam: Served, model: type) -> int:
    async with dashtam.application.database.get_session() as session:
        return await session.scalar(select(func.count()).select_from(model)) or 0


async def test_whereupon_mail_audit_log_and_settings_follow(database_url: str) -> None:
    async with served(database_url) as dashtam:
        response = await dashtam.register("Ada@Example.com", **{"User-Agent": "Analytical Engine/1"})

        assert response.status_code == 202
        user_id = str(await dashtam.user_id("Ada@example.com"))

        message = await dashtam.mail.message_to("Ada@example.com")
        assert message["Subject"] == "Welcome to Dashtam"

        assert await actions(dashtam) == [
            (AuditAction.USER_REGISTRATION_ATTEMPTED, "attempted", {"email": "Ada@Example.com"}),
            (AuditAction.USER_REGISTERED, "succeeded", {"email": "Ada@example.com"}),
        ]

        await dashtam.verify("Ada@example.com")
        ada = await dashtam.person("Ada@example.com")
        shown = await ada.get("/users/me")
        assert shown.keys() == {"id", "email", "registered_at", "email_verified_at", "is_admin"}
        assert (shown["id"], shown["email"], shown["is_admin"]) == (user_id, "Ada@example.com", False)
        await eventually(lambda: ada.answers("/users/me/settings"))
        assert await ada.get("/users/me/settings") == {"currency": "EUR", "language": "en", "notifications": True}
        *_, record = await ada.get("/users/me/audit")
        assert record["action"] == "USER_REGISTERED"
        assert record["category"] == "authentication"
        assert (record["resource_type"], record["resource_id"]) == ("user", user_id)
        assert record["user_agent"] == "Analytical Engine/1"

        (line,) = await dashtam.logged("user_registration_succeeded")
        assert line["level"] == "info"
        assert line["user_id"] == user_id
        assert line["timestamp"].endswith("Z")
        (attempted,) = await dashtam.logged("user_registration_attempted")
        assert attempted["email"] == "Ada@Example.com"


async def test_the_password_is_stored_as_an_argon2_hash_and_found_nowhere_else(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register("ada@example.com", "tr0ub4dor&3 secret")
        await dashtam.register("ada@example.com", "tr0ub4dor&3 secret")
        await dashtam.mail.message_to("ada@example.com")
        await dashtam.logged("user_registration_failed")
        async with dashtam.application.database.get_session() as session:
            stored = await session.scalar(select(UserModel.password_hash))
            everything = [
                str(row)
                for table in ("whereupon_log", "whereupon_audit", "whereupon_exception", "notifications")
                for row in await session.execute(text(f"SELECT * FROM {table}"))
            ]
        assert stored is not None
        assert stored.startswith("$argon2id$")
        assert everything
        assert not any("tr0ub4dor" in row or "argon2" in row for row in everything)
        assert "tr0ub4dor" not in dashtam.output.getvalue()
        assert not any("tr0ub4dor" in str(message) for message in dashtam.mail.accepted)


@pytest.mark.parametrize(
    ("email", "password", "status", "reason"),
    [
        ("ada@example.com", "tooshort1", 422, "weak_password"),
        ("ada@example.com", "nothingbutletters", 422, "weak_password"),
        ("ada@example.com", "half a pair \ud800", 422, "weak_password"),
        ("ada@nowhere", "correct horse 7", 422, "invalid_email"),
        ("ada@example.com\r\nBcc: eve@example.com", "correct horse 7", 422, "invalid_email"),
        ("ada\u0000@example.com", "correct horse 7", 422, "invalid_email"),
        ("<script>alert(1)</script>@example.com", "correct horse 7", 422, "invalid_email"),
        ("'; DROP TABLE users; --", "correct horse 7", 422, "invalid_email"),
    ],
)
async def test_a_registration_that_fails_is_told_why_and_leaves_attempt_and_failure(
    sqlite_url: str, email: str, password: str, status: int, reason: str
) -> None:
    async with served(sqlite_url) as dashtam:
        await refused(dashtam, email, password, status, reason)


async def test_a_nul_in_an_address_is_refused_on_every_database(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await refused(dashtam, "ada\u0000@example.com", "correct horse 7", 422, "invalid_email")


async def refused(dashtam: Served, email: str, password: str, status: int, reason: str) -> None:
    response = await dashtam.register(email, password)

    assert response.status_code == status
    assert response.headers["content-type"] == "application/problem+json"
    assert response.json()["reason"] == reason
    assert password not in response.text
    assert [(action, outcome) for action, outcome, _ in await actions(dashtam)] == [
        (AuditAction.USER_REGISTRATION_ATTEMPTED, "attempted"),
        (AuditAction.USER_REGISTRATION_FAILED, "failed"),
    ]
    (line,) = await dashtam.logged("user_registration_failed")
    assert line["level"] == "warning"
    assert line["reason"] == reason
    assert await count(dashtam, UserModel) == 0
    assert dashtam.mail.accepted == []


async def test_an_address_can_be_registered_once_and_only_its_owner_is_told_so(database_url: str) -> None:
    async with served(database_url) as dashtam:
        first = await dashtam.register("ada@example.com")
        again = await dashtam.register("ADA@EXAMPLE.COM")

        assert (again.status_code, again.content) == (first.status_code, first.content)
        assert first.status_code == 202
        await dashtam.mail.message_to("ada@example.com", "You have an account with Dashtam")
        assert [action for action, _, _ in await actions(dashtam)] == [
            AuditAction.USER_REGISTRATION_ATTEMPTED,
            AuditAction.USER_REGISTERED,
            AuditAction.USER_REGISTRATION_ATTEMPTED,
            AuditAction.USER_REGISTRATION_FAILED,
        ]
        assert await count(dashtam, UserModel) == 1


async def test_of_those_who_register_one_address_at_once_one_succeeds(database_url: str) -> None:
    async with served(database_url) as dashtam:
        answers = await asyncio.gather(*(dashtam.register("ada@example.com") for _ in range(4)))

        assert [answer.status_code for answer in answers] == [202] * 4
        outcomes = [action for action, _, _ in await actions(dashtam)]
        assert outcomes.count(AuditAction.USER_REGISTRATION_ATTEMPTED) == 4
        assert outcomes.count(AuditAction.USER_REGISTERED) == 1
        assert outcomes.count(AuditAction.USER_REGISTRATION_FAILED) == 3
        assert await count(dashtam, UserModel) == 1
        await dashtam.mail.message_to("ada@example.com")


# A user refers to nobody, which the database minds only when the transaction commits.
COMMIT_FAILS = {
    "sqlite": [
        "CREATE TABLE promise (kept_by TEXT REFERENCES users (id) DEFERRABLE INITIALLY DEFERRED)",
        "CREATE TRIGGER promise AFTER INSERT ON users BEGIN INSERT INTO promise VALUES ('nobody'); END",
    ],
    "postgresql": [
        "CREATE TABLE promise (kept_by uuid REFERENCES users (id) DEFERRABLE INITIALLY DEFERRED)",
        "CREATE FUNCTION promise() RETURNS trigger LANGUAGE plpgsql AS "
        "$$ BEGIN INSERT INTO promise VALUES (gen_random_uuid()); RETURN NEW; END $$",
        "CREATE TRIGGER promise AFTER INSERT ON users FOR EACH ROW EXECUTE FUNCTION promise()",
    ],
}
COMMIT_SUCCEEDS = {
    "sqlite": ["DROP TRIGGER promise"],
    "postgresql": ["DROP TRIGGER promise ON users"],
}


async def change_schema(dashtam: Served, statements: dict[str, list[str]]) -> None:
    async with dashtam.application.database.get_session() as session:
        for statement in statements[session.get_bind().dialect.name]:
            await session.execute(text(statement))


async def test_a_registration_whose_commit_fails_never_succeeded(database_url: str) -> None:
    async with served(database_url, raise_faults=False) as dashtam:
        await change_schema(dashtam, COMMIT_FAILS)
        assert (await dashtam.register("ada@example.com")).status_code == 500
        await change_schema(dashtam, COMMIT_SUCCEEDS)
        # One that does succeed shows that the handlers have had their turn.
        assert (await dashtam.register("eve@example.com")).status_code == 202
        await dashtam.mail.message_to("eve@example.com")
        await dashtam.logged("user_registration_succeeded")

        assert len(dashtam.mail.accepted) == 1
        assert [(action, context.get("reason")) for action, _, context in await actions(dashtam)] == [
            (AuditAction.USER_REGISTRATION_ATTEMPTED, None),
            (AuditAction.USER_REGISTRATION_FAILED, "internal_error"),
            (AuditAction.USER_REGISTRATION_ATTEMPTED, None),
            (AuditAction.USER_REGISTERED, None),
        ]
        assert await count(dashtam, UserModel) == 1


async def test_a_fault_of_ours_is_a_failed_registration_and_a_500_that_tells_nothing(sqlite_url: str) -> None:
    async with served(sqlite_url, raise_faults=False) as dashtam:
        async with dashtam.application.database.get_session() as session:
            await session.execute(
                text("CREATE TRIGGER broken BEFORE INSERT ON users BEGIN SELECT RAISE(ABORT, 'disk on fire'); END")
            )
        response = await dashtam.register("ada@example.com", "tr0ub4dor&3 secret")

        assert response.status_code == 500
        assert response.headers["content-type"] == "application/problem+json"
        assert response.json()["reason"] == "internal_error"
        assert "fire" not in response.text
        assert [(action, context.get("reason")) for action, _, context in await actions(dashtam)] == [
            (AuditAction.USER_REGISTRATION_ATTEMPTED, None),
            (AuditAction.USER_REGISTRATION_FAILED, "internal_error"),
        ]
        (logged,) = await dashtam.logged("request_failed")
        assert "disk on fire" in logged["exception"]
        assert "tr0ub4dor" not in dashtam.output.getvalue()
        assert "argon2id" not in dashtam.output.getvalue()


async def test_the_welcome_mail_arrives_although_the_mail_server_refused_at_first(database_url: str) -> None:
    async with mail_server() as mail, served(database_url, mail) as dashtam:
        mail.refusals.append("451 greylisted, come back later")
        await dashtam.register("ada@example.com")

        message = await mail.message_to("ada@example.com")
        assert mail.refused == 1
        assert message["Subject"] == "Welcome to Dashtam"
        (failure,) = await dashtam.logged("event_handler_failed")
        assert failure["level"] == "warning"
        assert failure["handler_name"] == "handle_user_registration_succeeded"
        assert failure["event_type"] == "UserRegistrationSucceeded"
        assert failure["error_type"] == "SMTPRecipientsRefused"
        # The others did not wait for it.
        assert len(await dashtam.logged("user_registration_succeeded")) == 1
        async with dashtam.application.database.get_session() as session:
            assert await session.get(UserSettingsModel, await dashtam.user_id("ada@example.com")) is not None


async def test_a_mail_that_the_server_refuses_for_good_is_not_tried_again(sqlite_url: str) -> None:
    async with mail_server() as mail, served(sqlite_url, mail) as dashtam:
        mail.refusals.append("550 no such mailbox")
        await dashtam.register("ada@example.com")

        async def settled() -> bool:
            return mail.refused == 1

        await eventually(settled)
        # A mail that is taken shows that the refused one had its turn again, if it ever was to.
        await dashtam.register("eve@example.com")
        await mail.message_to("eve@example.com")
        await asyncio.sleep(1.5)  # longer than the first retry waits at most
        assert len(mail.accepted) == 1


async def test_registering_needs_no_mail_server(sqlite_url: str, unused_tcp_port: int) -> None:
    async with mail_server() as mail:
        mail.port = unused_tcp_port
        async with served(sqlite_url, mail) as dashtam:
            assert (await dashtam.register("ada@example.com")).status_code == 202
            (failure, *_) = await dashtam.logged("event_handler_failed")
            assert failure["error_type"] == "SMTPConnectError"


async def test_markup_and_letters_of_any_language_arrive_as_they_were_typed(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        assert (await dashtam.register("a&'lovelace'@example.com")).status_code == 202
        message = await dashtam.mail.message_to("lovelace")
        html = message.get_body(("html",))
        plain = message.get_body(("plain",))
        assert html is not None
        assert plain is not None
        assert "a&amp;&#39;lovelace&#39;@example.com" in html.get_content()
        assert "a&'lovelace'@example.com" in plain.get_content()

        assert (await dashtam.register("bücher@exämple.com")).status_code == 202
        message = await dashtam.mail.message_to("bücher")
        assert dashtam.mail.envelopes[-1].rcpt_tos == ["bücher@xn--exmple-cua.com"]


async def test_the_handler_answers_with_the_id_or_the_error(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        handler = dashtam.application.register_user
        done = await handler.handle(RegisterUser(email="ada@example.com", password="correct horse 7"))
        assert isinstance(done, Success)
        assert done.is_success()
        assert isinstance(done.value, UUID)
        again = await handler.handle(RegisterUser(email="ada@example.com", password="correct horse 7"))
        assert isinstance(again, Failure)
        assert not again.is_success()
        assert again.error.reason == "email_taken"


async def test_an_administrator_sets_a_password_anew(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register("ada@example.com")
        user_id = await dashtam.user_id("ada@example.com")
        async with dashtam.application.database.get_session():
            before = await dashtam.application.users.find_by_id(user_id)

        assert (await dashtam.application.password_reset.reset_password(user_id, "battery staple 8")).is_success()
        weak = await dashtam.application.password_reset.reset_password(user_id, "weak")
        unknown = await dashtam.application.password_reset.reset_password(uuid4(), "battery staple 8")

        assert isinstance(weak, Failure)
        assert weak.error.reason == "weak_password"
        assert isinstance(unknown, Failure)
        assert unknown.error.reason == "user_not_found"
        async with dashtam.application.database.get_session():
            after = await dashtam.application.users.find_by_email("ADA@example.com")
        assert before is not None
        assert after is not None
        assert after.password_hash != before.password_hash
        assert (await actions(dashtam))[-1] == (
            AuditAction.USER_PASSWORD_CHANGED,
            "succeeded",
            {"initiated_by": "admin", "method": "administrative"},
        )


async def test_resets_at_the_same_time_wait_for_each_other(database_url: str) -> None:
    async with served(database_url) as dashtam:
        await dashtam.register("ada@example.com")
        user_id = await dashtam.user_id("ada@example.com")
        resets = (dashtam.application.password_reset.reset_password(user_id, f"battery staple {n}") for n in range(4))
        assert all(result.is_success() for result in await asyncio.gather(*resets))


async def test_a_repository_outside_a_session_says_where_to_call_it(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        users: SqlUserRepository = dashtam.application.users
        with pytest.raises(RuntimeError, match=r"UserRepository\.find_by_email.*async with database\.get_session"):
            await users.find_by_email("ada@example.com")

        async with dashtam.application.database.get_session():

            async def after_the_block() -> None:
                await asyncio.sleep(0.05)
                await users.find_by_email("ada@example.com")

            late = asyncio.create_task(after_the_block())
        with pytest.raises(RuntimeError, match="that session has ended"):
            await late


async def test_a_person_who_is_gone_gets_no_settings_and_that_is_said_once(database_url: str) -> None:
    event = UserRegistrationSucceeded(user_id=uuid4(), email="gone@example.com")
    async with served(database_url) as dashtam:
        async with dashtam.application.database.get_session() as session:
            receipt = await dashtam.bus.publish(event, session=session)
        await receipt.settled()
        (settings,) = [
            state
            for state in await dashtam.bus.deliveries(event.event_id)
            if state.subscription == "InitialSettings.initialise_settings"
        ]
    assert (settings.state, settings.attempts) == ("skipped", 1)
    assert settings.error is not None
    assert str(event.user_id) in settings.error
