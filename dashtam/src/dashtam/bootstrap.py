"""The one page that wires Dashtam: who provides what, and who hears of what."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

from fastapi import FastAPI
from pydantic import EmailStr, Field, SecretStr
from pydantic_settings import BaseSettings, SettingsConfigDict

from dashtam.application.logger import LoggerProtocol
from dashtam.application.notifications import NotificationEventHandler
from dashtam.application.password_reset import PasswordResetService
from dashtam.application.registration import EmailEventHandler, InitialSettings, RegisterUserHandler
from dashtam.application.users import UserQueries
from dashtam.domain.events import AccountCreated, UserRegistrationSucceeded
from dashtam.infrastructure import schema
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.logs import LogFormat, make_logger
from dashtam.infrastructure.mail import Security, SmtpMailer
from dashtam.infrastructure.passwords import PasswordHasher
from dashtam.infrastructure.users import (
    SqlAuditTrail,
    SqlUserRepository,
    SqlUserSettingsRepository,
    StoredNotifications,
)
from dashtam.presentation.api import create_api
from whereupon import AuditEventHandler, EventBus, LoggingEventHandler


class Settings(BaseSettings):
    """Each can be set in the environment: DASHTAM_DATABASE_URL, DASHTAM_SMTP_HOST, …"""

    model_config = SettingsConfigDict(env_prefix="DASHTAM_", frozen=True)

    database_url: str = "sqlite+aiosqlite:///dashtam.db"
    deliver: bool = True
    """Whether this process delivers events too; otherwise `whereupon worker dashtam.bootstrap:get_event_bus` does."""

    smtp_host: str = "127.0.0.1"
    smtp_port: int = 1025
    smtp_security: Security = "none"
    smtp_username: str | None = None
    smtp_password: SecretStr | None = None
    mail_from: EmailStr = "hello@dashtam.example"

    log_format: LogFormat = "json"
    log_level: Annotated[str, Field(pattern="^(DEBUG|INFO|WARNING|ERROR)$")] = "INFO"
    trusted_proxies: tuple[str, ...] = ()
    """Networks whose X-Forwarded-For is believed, as a JSON list: ["10.0.0.0/8"]."""


@dataclass(frozen=True, kw_only=True)
class Application:
    """Dashtam, wired. Nothing is connected or running yet."""

    settings: Settings
    logger: LoggerProtocol
    bus: EventBus
    database: Database
    users: SqlUserRepository
    register_user: RegisterUserHandler
    password_reset: PasswordResetService
    queries: UserQueries

    async def prepare(self) -> None:
        """Make SQLite's tables, and raise `SchemaOutdated` or `DatabaseError` where nothing could be stored."""
        await self.bus.revision()  # says most clearly what is wrong with a database that does not answer
        if self.database.engine.dialect.name == "sqlite":
            await schema.upgrade(self.database.engine)
        await schema.check(self.database.engine)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Events are delivered; on leaving, handlers that run are waited for."""
        await self.prepare()
        async with self.bus:
            yield


def build(settings: Settings, logger: LoggerProtocol | None = None) -> Application:
    logger = logger or make_logger(settings.log_format, settings.log_level)
    bus = EventBus(settings.database_url, logger=logger, deliver=settings.deliver)
    database = Database(bus.engine)
    users = SqlUserRepository(database, PasswordHasher())
    user_settings = SqlUserSettingsRepository(database)
    notifications = StoredNotifications(database)
    mailer = SmtpMailer(
        host=settings.smtp_host,
        port=settings.smtp_port,
        security=settings.smtp_security,
        username=settings.smtp_username,
        password=settings.smtp_password.get_secret_value() if settings.smtp_password else None,
        sender=settings.mail_from,
    )

    bus.register(AuditEventHandler())
    bus.register(LoggingEventHandler(logger))
    bus.subscribe(UserRegistrationSucceeded, InitialSettings(user_settings, users, database).initialise_settings)
    bus.subscribe(UserRegistrationSucceeded, EmailEventHandler(mailer).handle_user_registration_succeeded)
    bus.subscribe(AccountCreated, NotificationEventHandler(logger, notifications).handle_account_created)

    return Application(
        settings=settings,
        logger=logger,
        bus=bus,
        database=database,
        users=users,
        register_user=RegisterUserHandler(users, bus, database),
        password_reset=PasswordResetService(users, bus, database),
        queries=UserQueries(database, users, user_settings, SqlAuditTrail(database), notifications),
    )


def create_app(settings: Settings | None = None) -> FastAPI:
    """The web application, over the default one or over one of its own for `settings`."""
    return api_of(get_application() if settings is None else build(settings))


def api_of(application: Application) -> FastAPI:
    @asynccontextmanager
    async def lifespan(_api: FastAPI) -> AsyncIterator[None]:
        async with application.running():
            yield

    return create_api(
        event_bus=application.bus,
        register_user=application.register_user,
        queries=application.queries,
        check_database=application.database.ping,
        logger=application.logger,
        trusted_proxies=application.settings.trusted_proxies,
        lifespan=lifespan,
    )


@lru_cache
def get_settings() -> Settings:
    return Settings()


@lru_cache
def get_application() -> Application:
    return build(get_settings())


def get_logger() -> LoggerProtocol:
    return get_application().logger


def get_event_bus() -> EventBus:
    """Dashtam's bus, with all handlers subscribed."""
    return get_application().bus


def get_database() -> Database:
    return get_application().database


def forget() -> None:
    """Have the next call read the settings and wire everything anew: for tests that change the environment."""
    get_settings.cache_clear()
    get_application.cache_clear()
