"""The one page that wires Dashtam: who provides what, and who hears of what."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from functools import lru_cache
from typing import Annotated
from urllib.parse import urlsplit

import httpx
from fastapi import APIRouter, FastAPI
from pydantic import EmailStr, Field, SecretStr, field_validator
from pydantic_settings import BaseSettings, SettingsConfigDict

from dashtam.application.accounts import AccountQueries
from dashtam.application.activity import Activity
from dashtam.application.bank import Clock
from dashtam.application.connections import (
    CompleteConnectionHandler,
    ConnectionMails,
    ConnectionQueries,
    DisconnectHandler,
    StartConnectionHandler,
    TokenRevocation,
)
from dashtam.application.email_verification import VerifyEmail
from dashtam.application.logger import LoggerProtocol
from dashtam.application.mail import EmailEventHandler
from dashtam.application.notifications import NotificationEventHandler
from dashtam.application.password_change import PasswordChange
from dashtam.application.password_reset import ForgottenPassword, PasswordResetService
from dashtam.application.registration import InitialSettings, RegisterUserHandler
from dashtam.application.sessions import SessionEventHandler, Sessions
from dashtam.application.sync import LONGEST_SYNC, AccountSync, RequestSyncHandler, TransactionSync
from dashtam.application.token_refresh import ExpiringTokens, ReauthorizationReaction, TokenRefresher
from dashtam.application.upkeep import Chore, Forgetting, Upkeep
from dashtam.application.user_mail import UserMail
from dashtam.application.users import UserQueries
from dashtam.domain.events import (
    AccountSyncRequested,
    AccountSyncSucceeded,
    PasswordResetConfirmSucceeded,
    ProviderConnectionSucceeded,
    ProviderDisconnectionSucceeded,
    TokenRefreshFailed,
    UserPasswordChangeSucceeded,
    UserRegistrationSucceeded,
)
from dashtam.infrastructure import schema
from dashtam.infrastructure.accounts import SqlAccountRepository, SqlTransactionRepository
from dashtam.infrastructure.bank import SANDBOX, BankHttp, OAuthBank, ProviderSettings
from dashtam.infrastructure.connections import SqlAuthorizationRequests, SqlConnectionRepository
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.logs import LogFormat, make_logger
from dashtam.infrastructure.mail import Security, SmtpMailer
from dashtam.infrastructure.notifications import AppriseNotifier
from dashtam.infrastructure.one_time_tokens import SqlOneTimeTokens
from dashtam.infrastructure.passwords import PasswordHasher
from dashtam.infrastructure.rate_limits import SqlRateLimits
from dashtam.infrastructure.sealing import Seal
from dashtam.infrastructure.secret_keys import SecretKeys, keys_for
from dashtam.infrastructure.sessions import JwtAccessTokens, SqlSessionRepository
from dashtam.infrastructure.users import (
    SqlAuditTrail,
    SqlUserRepository,
    SqlUserSettingsRepository,
    StoredNotifications,
)
from dashtam.presentation.accounts import account_routes
from dashtam.presentation.api import create_api
from dashtam.presentation.authentication import SignedInDependency, signed_in_by
from dashtam.presentation.connections import connection_routes
from dashtam.presentation.pace import Pace
from dashtam.presentation.sign_up import SignUp
from dashtam.presentation.web.administration import administrators
from dashtam.presentation.web.browser_session import BrowserSessions
from dashtam.presentation.web.home import Banking
from dashtam.presentation.web.live import Live
from dashtam.presentation.web.pages import Pages
from dashtam.presentation.web.site import Site
from whereupon import AuditEventHandler, Delivery, EventBus, LoggingEventHandler, Retry
from whereupon.dashboard import dashboard
from whereupon.fastapi import install
from whereupon.prometheus import Metrics


class Settings(BaseSettings):
    """Each can be set in the environment: DASHTAM_DATABASE_URL, DASHTAM_SMTP_HOST, …"""

    model_config = SettingsConfigDict(env_prefix="DASHTAM_", frozen=True, hide_input_in_errors=True)

    database_url: str = "sqlite+aiosqlite:///dashtam.db"
    deliver: bool = True
    """Whether this process delivers events too; otherwise `whereupon worker dashtam.bootstrap:get_event_bus` does."""
    keep_days: Annotated[int, Field(ge=1)] | None = 90
    """So long the log keeps events that everybody has got, and sessions and links are kept after their end."""
    lease_seconds: Annotated[float, Field(ge=1)] = 30.0
    """What a process that died had begun is free for others after so long."""
    metrics_port: Annotated[int, Field(ge=1, le=65_535)] | None = None
    """Where Prometheus finds this process's metrics, at 127.0.0.1; nowhere unless given. A worker has --metrics."""

    public_url: Annotated[str, Field(pattern=r"^https?://[^?#]*[^?#/]$")] = "http://127.0.0.1:8000"
    """Where people find Dashtam, without a slash at the end: links in mails lead there, and banks send them back."""
    secret_keys: tuple[SecretStr, ...] = ()
    """As a JSON list: the first signs and encrypts, all of them read. On SQLite one is made where none is given."""

    argon2_memory_kib: Annotated[int, Field(ge=8_192)] = 65_536
    argon2_time_cost: Annotated[int, Field(ge=1)] = 3
    even_answer_seconds: Annotated[float, Field(ge=0, le=10)] = 0.5
    """Answers that must not tell whether somebody is registered come at multiples of this; 0: when they are ready."""
    rate_limit_factor: Annotated[float, Field(gt=0)] = 1.0
    """How many times as often as usual something may be tried, where many people share an address."""

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

    providers: tuple[ProviderSettings, ...] = (SANDBOX,)
    """The banks that can be connected, as a JSON list of objects."""
    notification_urls: tuple[SecretStr, ...] = ()
    """Where else notifications go, as Apprise names channels: ["json://host/path", "mailto://…"]."""

    @field_validator("secret_keys")
    @classmethod
    def _keys_are_keys(cls, keys: tuple[SecretStr, ...]) -> tuple[SecretStr, ...]:
        if keys:
            SecretKeys([key.get_secret_value() for key in keys])
        return keys

    @field_validator("providers")
    @classmethod
    def _providers_are_told_apart(cls, providers: tuple[ProviderSettings, ...]) -> tuple[ProviderSettings, ...]:
        if len({each.name for each in providers}) < len(providers) or len({p.id for p in providers}) < len(providers):
            raise ValueError("two providers have one name or one id: give each its own")
        return providers


@dataclass(frozen=True, kw_only=True)
class Connections:
    """Everything about connections to banks."""

    start: StartConnectionHandler
    complete: CompleteConnectionHandler
    disconnect: DisconnectHandler
    request_sync: RequestSyncHandler
    queries: ConnectionQueries
    accounts: AccountQueries
    refresher: TokenRefresher
    expiring_tokens: ExpiringTokens
    http: BankHttp
    seal: Seal


@dataclass(frozen=True, kw_only=True)
class Application:
    """Dashtam, wired. Nothing is connected or running yet."""

    settings: Settings
    logger: LoggerProtocol
    bus: EventBus
    database: Database
    users: SqlUserRepository
    register_user: RegisterUserHandler
    sign_up: SignUp
    pace: Pace
    verify_email: VerifyEmail
    sessions: Sessions
    access_tokens: JwtAccessTokens
    password_change: PasswordChange
    password_reset: PasswordResetService
    forgotten_password: ForgottenPassword
    queries: UserQueries
    rate_limits: SqlRateLimits
    connections: Connections
    live: Live
    activity: Activity
    upkeep: Upkeep
    metrics: Metrics | None
    form_keys: tuple[bytes, ...] = field(repr=False)

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
        port = self.settings.metrics_port or 0
        try:
            with nullcontext() if self.metrics is None else self.metrics.serving("127.0.0.1", port):
                async with self.bus:
                    upkeep = asyncio.create_task(self.upkeep.run())
                    try:
                        yield
                    finally:
                        upkeep.cancel()
                        with suppress(asyncio.CancelledError):
                            await upkeep
        finally:
            await self.connections.http.aclose()


def _now() -> datetime:
    return datetime.now(UTC)


def build(
    settings: Settings,
    logger: LoggerProtocol | None = None,
    *,
    bank_transport: httpx.AsyncBaseTransport | None = None,
    clock: Clock = _now,
) -> Application:
    """`bank_transport` and `clock` are for tests: a bank in the same process, and tokens that end when told to."""
    logger = logger or make_logger(settings.log_format, settings.log_level)
    keys = keys_for(settings.database_url, [key.get_secret_value() for key in settings.secret_keys])
    kept = None if settings.keep_days is None else timedelta(days=settings.keep_days)
    bus = EventBus(
        settings.database_url, logger=logger, deliver=settings.deliver, lease=settings.lease_seconds, retain=kept
    )
    database = Database(bus.engine)
    passwords = PasswordHasher(time_cost=settings.argon2_time_cost, memory_kib=settings.argon2_memory_kib)
    users = SqlUserRepository(database, passwords)
    sessions = SqlSessionRepository(database, keys)
    tokens = SqlOneTimeTokens(database, keys)
    rate_limits = SqlRateLimits(database, factor=settings.rate_limit_factor)
    user_settings = SqlUserSettingsRepository(database)
    notifications = StoredNotifications(database)
    notifier = (
        AppriseNotifier(notifications, settings.notification_urls) if settings.notification_urls else notifications
    )
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
    bus.register(EmailEventHandler(mailer, users, tokens, database, settings.public_url))
    session_handler = SessionEventHandler(sessions, tokens, bus, database)
    bus.subscribe(
        UserPasswordChangeSucceeded,
        session_handler.handle_user_password_change_succeeded,
        delivery=Delivery.IN_TRANSACTION,
        required=True,
    )
    bus.subscribe(
        PasswordResetConfirmSucceeded,
        session_handler.handle_password_reset_confirm_succeeded,
        delivery=Delivery.IN_TRANSACTION,
        required=True,
    )
    bus.register(NotificationEventHandler(logger, notifier))
    connections = _connections(
        settings, keys, bus, database, BankHttp(bank_transport), UserMail(mailer, users, database), logger, clock
    )
    chores = [Chore(name="refresh_tokens", do=connections.expiring_tokens.refresh, every=timedelta(minutes=1))]
    if kept is not None:
        forgetting = Forgetting([sessions, tokens], database, kept)
        chores.append(Chore(name="forget_ended", do=forgetting.forget, every=timedelta(hours=1)))

    live = Live()
    bus.register(live)

    password_reset = PasswordResetService(users, bus, database)
    register_user = RegisterUserHandler(users, bus, database)
    pace = Pace(settings.even_answer_seconds)
    audit = SqlAuditTrail(database)
    return Application(
        settings=settings,
        logger=logger,
        bus=bus,
        database=database,
        users=users,
        register_user=register_user,
        sign_up=SignUp(bus, register_user, rate_limits, pace),
        pace=pace,
        verify_email=VerifyEmail(users, tokens, bus, database, rate_limits),
        sessions=Sessions(users, passwords, sessions, bus, database, rate_limits),
        access_tokens=JwtAccessTokens(keys),
        password_change=PasswordChange(users, passwords, password_reset, bus, database, rate_limits),
        password_reset=password_reset,
        forgotten_password=ForgottenPassword(users, tokens, bus, database, rate_limits),
        rate_limits=rate_limits,
        queries=UserQueries(database, users, user_settings, audit, notifications),
        connections=connections,
        live=live,
        activity=Activity(audit, notifications, connections.queries, database),
        upkeep=Upkeep(chores, logger),
        metrics=Metrics(bus) if settings.metrics_port is not None else None,
        form_keys=tuple(keys.derived("csrf")),
    )


def _connections(
    settings: Settings,
    keys: SecretKeys,
    bus: EventBus,
    database: Database,
    http: BankHttp,
    mail: UserMail,
    logger: LoggerProtocol,
    clock: Clock,
) -> Connections:
    redirect_uri = f"{settings.public_url}/connect/callback"
    banks = {each.name: OAuthBank(each, http, redirect_uri=redirect_uri, clock=clock) for each in settings.providers}
    seal = Seal(keys.derived("bank tokens"))
    requests = SqlAuthorizationRequests(database, seal)
    connections = SqlConnectionRepository(database, seal)
    accounts = SqlAccountRepository(database)
    transactions = SqlTransactionRepository(database)
    refresher = TokenRefresher(banks, connections, bus, database, clock)

    account_sync = AccountSync(banks, refresher, connections, accounts, bus, database).sync_accounts
    transaction_sync = TransactionSync(banks, refresher, connections, accounts, transactions, bus, database)
    reauthorization = ReauthorizationReaction(connections, mail, banks, database)
    mails = ConnectionMails(mail, banks)
    revocation = TokenRevocation(banks, connections, database, logger)
    for asked in (ProviderConnectionSucceeded, AccountSyncRequested):
        bus.subscribe(
            asked, account_sync, ordered_by="connection_id", timeout=2 * LONGEST_SYNC, retry=Retry(max_attempts=20)
        )
    bus.subscribe(
        AccountSyncSucceeded,
        transaction_sync.sync_transactions,
        ordered_by="connection_id",
        timeout=2 * LONGEST_SYNC,
        retry=Retry(max_attempts=20),
    )
    bus.subscribe(ProviderConnectionSucceeded, mails.handle_provider_connection_succeeded)
    bus.subscribe(ProviderDisconnectionSucceeded, revocation.revoke_tokens, timeout=60)
    bus.subscribe(TokenRefreshFailed, reauthorization.require_reauthorization)
    bus.subscribe(TokenRefreshFailed, reauthorization.alert_user)

    return Connections(
        start=StartConnectionHandler(banks, requests, database, clock),
        complete=CompleteConnectionHandler(banks, requests, connections, bus, database, clock),
        disconnect=DisconnectHandler(connections, accounts, bus, database),
        request_sync=RequestSyncHandler(connections, bus, database),
        queries=ConnectionQueries(banks, connections, database),
        accounts=AccountQueries(database, accounts, transactions),
        refresher=refresher,
        expiring_tokens=ExpiringTokens(refresher, connections, database, clock),
        http=http,
        seal=seal,
    )


def create_app(settings: Settings | None = None) -> FastAPI:
    """The web application, over the default one or over one of its own for `settings`."""
    return api_of(get_application() if settings is None else build(settings))


def api_of(application: Application) -> FastAPI:
    signed_in = signed_in_by(application.access_tokens.session_of, application.sessions.authenticate)
    browsers = BrowserSessions(
        application.sessions,
        application.form_keys,
        over_https=application.settings.public_url.startswith("https:"),
    )
    api = create_api(
        sign_up=application.sign_up,
        verify_email=application.verify_email,
        sessions=application.sessions,
        access_tokens=application.access_tokens,
        password_change=application.password_change,
        forgotten_password=application.forgotten_password,
        pace=application.pace,
        queries=application.queries,
        signed_in=signed_in,
        routers=_connection_routers(application.connections, signed_in),
        site=_site(application, browsers),
        dashboard=dashboard(application.bus, authorize=administrators(browsers), secret=application.form_keys[0]),
        check_database=application.database.ping,
        logger=application.logger,
        lifespan=lambda _: application.running(),
    )
    install(api, application.bus, trusted_proxies=application.settings.trusted_proxies)
    return api


def _connection_routers(parts: Connections, signed_in: SignedInDependency) -> list[APIRouter]:
    return [
        connection_routes(parts.start, parts.complete, parts.disconnect, parts.request_sync, parts.queries, signed_in),
        account_routes(parts.accounts, signed_in),
    ]


def _site(application: Application, browsers: BrowserSessions) -> Site:
    parts, settings = application.connections, application.settings
    authorize_urls = [urlsplit(provider.authorize_url) for provider in settings.providers]
    return Site(
        pages=Pages(browsers, [f"{url.scheme}://{url.netloc}" for url in authorize_urls], application.logger),
        live=application.live,
        activity=application.activity,
        banking=Banking(
            start=parts.start,
            complete=parts.complete,
            disconnect=parts.disconnect,
            request_sync=parts.request_sync,
            connections=parts.queries,
            accounts=parts.accounts,
        ),
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
