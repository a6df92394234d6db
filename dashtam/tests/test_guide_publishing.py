"""The guide's blocks on publishing: with the session of the change, after it was saved, and not at all for reads."""

import ast
import re
from collections.abc import AsyncIterator
from contextlib import AbstractContextManager, asynccontextmanager
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import pytest
from guide import block, run
from guide.aftermath import audit_trail, published
from served import Served, eventually, served
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

import dashtam.domain.events
from dashtam.application.registration import RegisterUser
from dashtam.domain.audit import AuditAction
from dashtam.domain.result import Failure, Success
from dashtam.domain.user import EmailTaken, User, UserNotFound
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.tables import UserModel, UserSettingsModel
from dashtam.infrastructure.users import SqlUserRepository
from whereupon import InMemoryEventBus, PublishError, SessionRequiredError
from whereupon.testing import own_transactions

pytestmark = pytest.mark.integration

ADA = "ada@example.com"


async def users_in(dashtam: Served) -> int:
    async with dashtam.application.database.get_session() as session:
        return await session.scalar(select(func.count()).select_from(UserModel)) or 0


async def assert_registration_was_followed_by_everything(dashtam: Served, user_id: UUID, email: str) -> None:
    message = await dashtam.mail.message_to(email)
    assert message["Subject"] == "Welcome to Dashtam"

    async def initialised() -> UserSettingsModel | None:
        async with dashtam.application.database.get_session() as session:
            return await session.get(UserSettingsModel, user_id)

    assert await eventually(initialised)
    assert (await dashtam.logged("user_registration_succeeded"))[-1]["email"] == email
    record = (await audit_trail(dashtam.application.database))[-1]
    assert (record.action, record.user_id) == (AuditAction.USER_REGISTERED, user_id)


class CommittingUsers:
    """Users as the guide's last pattern has them: each is saved in a transaction of its own."""

    def __init__(self, users: SqlUserRepository, database: Database) -> None:
        self._users = users
        self._database = database

    async def save(self, user: User) -> None:
        async with self._database.get_session():
            await self._users.save(user)


class InterruptedDatabase:
    """A database whose connection breaks when a transaction is about to be committed."""

    def __init__(self, database: Database) -> None:
        self._database = database

    @asynccontextmanager
    async def get_session(self) -> AsyncIterator[AsyncSession]:
        async with self._database.get_session() as session:
            yield session
            raise ConnectionResetError("broken before the commit")

    def joined(self, session: AsyncSession) -> AbstractContextManager[None]:
        return self._database.joined(session)


async def test_a_forgotten_session_is_refused_in_the_guide_s_words_and_the_published_event_stays(
    database_url: str,
) -> None:
    printed = block("06-session-required")
    filled = printed.filled_in(
        lambda source: source.replace(
            "UserRegistrationSucceeded(...)", "UserRegistrationSucceeded(user_id=user.id, email=user.email)"
        )
    )
    kind, words = printed.comments().splitlines()[-1].split(": ")

    async with served(database_url) as dashtam:
        database = dashtam.application.database
        async with database.get_session() as session:
            user = User.create(email=ADA, password="correct horse 7")
            await dashtam.application.users.save(user)
            with pytest.raises(RuntimeError) as refused:
                await run(filled.statements(), printed.namespace(event_bus=dashtam.bus, user=user, session=session))

        assert kind == "RuntimeError"
        assert isinstance(refused.value, SessionRequiredError)
        assert str(refused.value).startswith(words)
        assert "publish(UserRegistrationSucceeded(…), session=session)" in str(refused.value)
        await assert_registration_was_followed_by_everything(dashtam, user.id, ADA)
        assert await published(database) == ["UserRegistrationSucceeded"]


async def test_an_event_made_of_an_ellipsis_is_refused(database_url: str) -> None:
    async with served(database_url) as dashtam:
        database = dashtam.application.database
        user = User.create(email=ADA, password="correct horse 7")

        async def register() -> None:
            async with database.get_session() as session:
                await dashtam.application.users.save(user)
                await block("06-session-required").run(event_bus=dashtam.bus, user=user, session=session)

        with pytest.raises(TypeError, match="positional"):
            await register()

        # The error rolled the transaction back, and the event that was published in it with the user.
        assert await published(database) == []
        assert await users_in(dashtam) == 0


async def test_the_guide_s_command_handler_registers_a_user_and_everything_follows(database_url: str) -> None:
    handler_class = (await block("07-command-handler").run())["RegisterUserHandler"]
    async with served(database_url) as dashtam:
        application = dashtam.application
        handler = handler_class(user_repo=application.users, event_bus=application.bus, database=application.database)
        result = await handler.handle(RegisterUser(email=ADA, password="correct horse 7"))

        assert result.is_success()
        await assert_registration_was_followed_by_everything(dashtam, result.value, ADA)


async def test_the_guide_s_command_handler_leaves_no_event_of_a_registration_that_failed(database_url: str) -> None:
    handler_class = (await block("07-command-handler").run())["RegisterUserHandler"]
    async with served(database_url) as dashtam:
        application = dashtam.application
        users, bus, database = application.users, application.bus, application.database
        command = RegisterUser(email=ADA, password="correct horse 7")
        with pytest.raises(ConnectionResetError):
            await handler_class(users, bus, InterruptedDatabase(database)).handle(command)
        assert await published(database) == []

        handler = handler_class(users, bus, database)
        registered = await handler.handle(command)
        with pytest.raises(EmailTaken):
            await handler.handle(command)

        await assert_registration_was_followed_by_everything(dashtam, registered.value, ADA)
        await dashtam.bus.drain(10)
        assert await published(database) == ["UserRegistrationSucceeded"]
        assert len(dashtam.mail.accepted) == 1


async def test_the_guide_s_domain_service_resets_a_password(database_url: str) -> None:
    service_class = (await block("08-domain-service").run())["PasswordResetService"]
    async with served(database_url) as dashtam:
        application = dashtam.application
        service = service_class(user_repo=application.users, event_bus=application.bus, database=application.database)
        async with application.database.get_session():
            user = User.create(email=ADA, password="correct horse 7")
            await application.users.save(user)

        assert await service.reset_password(user.id, "battery staple 8") == Success(None)
        unknown = await service.reset_password(uuid4(), "battery staple 8")

        assert isinstance(unknown, Failure)
        assert isinstance(unknown.error, UserNotFound)
        async with application.database.get_session():
            changed = await application.users.find_by_id(user.id)
        assert changed is not None
        assert changed.password_hash not in (None, user.password_hash)
        (record,) = await audit_trail(application.database)
        assert (record.action, record.user_id) == (AuditAction.USER_PASSWORD_CHANGED, user.id)
        assert record.context == {"initiated_by": "admin", "method": "administrative"}


async def test_publishing_before_the_user_is_saved_is_refused_and_nothing_follows(database_url: str) -> None:
    register_user = (await block("28-published-before-save").run())["register_user"]
    async with served(database_url) as dashtam:
        users = CommittingUsers(dashtam.application.users, dashtam.application.database)
        with pytest.raises(
            SessionRequiredError,
            match=re.escape("AuditEventHandler requires a database session")
            + r".*UserRegistrationSucceeded\(…\), session=session.*Nothing was published, and no handler ran",
        ):
            await register_user(SimpleNamespace(_event_bus=dashtam.bus, _users=users), ADA)

        assert await published(dashtam.application.database) == []
        assert await audit_trail(dashtam.application.database) == []
        assert await users_in(dashtam) == 0
        assert dashtam.mail.accepted == []


async def test_publishing_after_the_user_is_saved_is_followed_by_everything(database_url: str) -> None:
    register_user = (await block("29-published-after-save").run())["register_user"]
    async with served(database_url) as dashtam:
        users = CommittingUsers(dashtam.application.users, dashtam.application.database)
        with own_transactions(dashtam.bus):
            result = await register_user(SimpleNamespace(_event_bus=dashtam.bus, _users=users), ADA)

        assert result.is_success()
        await assert_registration_was_followed_by_everything(dashtam, result.value, ADA)


async def test_publishing_after_the_save_without_its_session_is_refused_where_nobody_asked_for_it(
    database_url: str,
) -> None:
    register_user = (await block("29-published-after-save").run())["register_user"]
    async with served(database_url) as dashtam:
        application = dashtam.application
        with pytest.raises(SessionRequiredError, match="session=session"):
            async with application.database.get_session():
                await register_user(SimpleNamespace(_event_bus=dashtam.bus, _users=application.users), ADA)
        # The user is not there either: saved, but in the transaction that the error rolled back.
        assert await users_in(dashtam) == 0


async def test_on_sqlite_an_own_transaction_inside_the_one_of_the_save_is_refused_instead_of_waiting_for_ever(
    sqlite_url: str,
) -> None:
    register_user = (await block("29-published-after-save").run())["register_user"]
    async with served(sqlite_url) as dashtam:
        application = dashtam.application
        with own_transactions(dashtam.bus), pytest.raises(PublishError, match=r"write lock.*Pass session=session"):
            async with application.database.get_session():
                await register_user(SimpleNamespace(_event_bus=dashtam.bus, _users=application.users), ADA)
        assert await users_in(dashtam) == 0


async def test_dashtam_has_no_event_for_what_is_only_read() -> None:
    printed = block("20-events-for-everything")
    called = [node.func for node in ast.walk(ast.parse(printed.source)) if isinstance(node, ast.Call)]
    events = [name.id for name in called if isinstance(name, ast.Name)]
    assert len(events) == 3
    assert not any(hasattr(dashtam.domain.events, name) for name in events)
    surroundings: dict[str, Any] = {"event_bus": InMemoryEventBus(), "user_id": uuid4(), "account_id": uuid4()}
    for name, statement in zip(events, printed.statements(), strict=True):
        with pytest.raises(NameError, match=name):
            await run([statement], printed.namespace(**surroundings))


async def test_what_is_only_read_is_read_without_the_bus(database_url: str) -> None:
    shown = ast.walk(ast.parse(block("21-direct-calls").source))
    assert not any(isinstance(node, ast.Attribute) and node.attr == "publish" for node in shown)

    async with served(database_url) as dashtam:
        await dashtam.register(ADA)
        await assert_registration_was_followed_by_everything(dashtam, await dashtam.user_id(ADA), ADA)
        await dashtam.verify(ADA)
        ada = await dashtam.person(ADA)
        before = await published(dashtam.application.database)
        for read in ("", "/settings", "/audit", "/notifications"):
            await ada.get(f"/users/me{read}")
        assert await published(dashtam.application.database) == before
