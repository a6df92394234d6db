"""Dashtam as its tests run it: the real application on a real database, with a real mail server beside it."""

import asyncio
import atexit
import functools
import io
import json
import re
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from pathlib import Path
from typing import Any, Final, TypeVar
from uuid import UUID

import httpx
from aiosmtpd.smtp import SMTP, Envelope, Session
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import create_async_engine

from dashtam.bootstrap import Application, Settings, api_of, build
from dashtam.infrastructure import schema
from dashtam.infrastructure.logs import make_logger
from dashtam.infrastructure.secret_keys import make_key
from whereupon import EventBus
from whereupon.schema import log, workflow

T = TypeVar("T")

QUICK: Final[dict[str, Any]] = {"argon2_memory_kib": 8_192, "argon2_time_cost": 1, "even_answer_seconds": 0}
"""Settings for tests that are about something else than what hashes and even answers are for."""

PASSWORD = "correct horse 7"
PATIENCE = 20.0  # seconds until what must happen counts as not happening
SETTLED: Final = 60.0  # seconds for all that follows
OPEN: Final = ("running", "retrying", "waiting", "parked")


async def eventually(look: Callable[[], Awaitable[T]]) -> T:
    """What `look` answers once it is true; fails the test if it never is."""
    answer = await look()
    try:
        async with asyncio.timeout(PATIENCE):
            while not answer:
                await asyncio.sleep(0.02)
                answer = await look()
    except TimeoutError:
        raise AssertionError(f"{look} still answers {answer!r} after {PATIENCE:g} s") from None
    return answer


async def unsettled(bus: EventBus, since: int) -> list[str]:
    """What is still to come of what was published after this position; nothing once everything has followed."""
    async with bus.engine.connect() as connection:
        last = await connection.scalar(select(func.max(log.c.position)))
        events = list(await connection.scalars(select(log.c.event_id).where(log.c.position > since)))
        open_ones = list(await connection.scalars(select(workflow.c.name).where(workflow.c.state == "open")))
    if open_ones:
        return [f"{name} is open" for name in open_ones]
    waiting = [
        f"{each.subscription}: {each.event_type} is {each.state}"
        for each in (await bus.deliveries(*events) if events else [])
        if each.state in OPEN
    ]
    if waiting:
        return waiting
    async with bus.engine.connect() as connection:
        if last != await connection.scalar(select(func.max(log.c.position))):
            return ["something was published meanwhile"]
    return []


async def settle(bus: EventBus, since: int) -> None:
    give_up = time.monotonic() + SETTLED
    while left := await unsettled(bus, since):
        if time.monotonic() > give_up:
            raise AssertionError(f"after {SETTLED:g} s: {'; '.join(left)}")
        await asyncio.sleep(0.03)


@dataclass
class MailServer:
    """An SMTP server that keeps what it takes. `refusals` are its next answers to RCPT, instead of 250."""

    port: int = 0
    accepted: list[EmailMessage] = field(default_factory=list)
    envelopes: list[Envelope] = field(default_factory=list)
    refusals: list[str] = field(default_factory=list)
    refused: int = 0

    async def handle_RCPT(
        self, _server: SMTP, _session: Session, envelope: Envelope, address: str, _options: list[str]
    ) -> str:
        if self.refusals:
            self.refused += 1
            return self.refusals.pop(0)
        envelope.rcpt_tos.append(address)
        return "250 OK"

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        content = envelope.content
        assert isinstance(content, bytes)
        message = message_from_bytes(content, policy=default)
        assert isinstance(message, EmailMessage)
        self.accepted.append(message)
        self.envelopes.append(envelope)
        return "250 OK"

    async def message_to(self, address: str, subject: str = "Welcome to Dashtam") -> EmailMessage:
        """The one mail to this address that has this subject."""

        async def look() -> list[EmailMessage]:
            mails = [message for message in self.accepted if address in str(message["To"])]
            return [message for message in mails if message["Subject"] == subject]

        (message,) = await eventually(look)
        return message


@asynccontextmanager
async def mail_server() -> AsyncIterator[MailServer]:
    mail = MailServer()
    server = await asyncio.get_running_loop().create_server(
        lambda: SMTP(mail, hostname="mail.example", enable_SMTPUTF8=True), "127.0.0.1", 0
    )
    mail.port = server.sockets[0].getsockname()[1]
    async with server:
        yield mail


@dataclass
class Person:
    """Somebody who is logged in, as a client."""

    client: httpx.AsyncClient
    user_id: UUID
    email: str
    password: str
    tokens: dict[str, Any]

    @property
    def session_id(self) -> UUID:
        return UUID(self.tokens["session_id"])

    async def __call__(self, method: str, path: str, **request: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.tokens['access_token']}"} | request.pop("headers", {})
        return await self.client.request(method, path, headers=headers, **request)

    async def answers(self, path: str) -> bool:
        return (await self("GET", path)).status_code == 200

    async def get(self, path: str) -> Any:
        answer = await self("GET", path)
        assert answer.status_code == 200, answer.text
        return answer.json()


@dataclass
class Served:
    application: Application
    http: httpx.AsyncClient
    mail: MailServer
    output: io.StringIO

    @property
    def bus(self) -> EventBus:
        return self.application.bus

    @property
    def log(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.output.getvalue().splitlines()]

    async def logged(self, event: str) -> list[dict[str, Any]]:
        async def look() -> list[dict[str, Any]]:
            return [record for record in self.log if record["event"] == event]

        return await eventually(look)

    async def user_id(self, email: str) -> UUID:
        async with self.application.database.get_session():
            user = await self.application.users.find_by_email(email)
        assert user is not None, f"nobody is registered as {email}"
        return user.id

    async def make_admin(self, email: str) -> None:
        async with self.application.database.get_session():
            user = await self.application.users.find_by_email(email, for_update=True)
            assert user is not None
            user.is_admin = True
            await self.application.users.save(user)

    async def token(self, email: str, subject: str) -> str:
        """What the link holds in the last mail with this subject."""

        async def look() -> list[str]:
            mails = [mail for mail in self.mail.accepted if email in str(mail["To"]) and mail["Subject"] == subject]
            body = mails[-1].get_body(("plain",)) if mails else None
            return re.findall(r"token=([\w=-]+)", body.get_content()) if isinstance(body, EmailMessage) else []

        return (await eventually(look))[0]

    async def verify(self, email: str) -> httpx.Response:
        token = await self.token(email, "Welcome to Dashtam")
        return await self.http.post("/email-verifications", json={"token": token})

    async def log_in(self, email: str, password: str = PASSWORD, **headers: str) -> httpx.Response:
        return await self.http.post("/sessions", json={"email": email, "password": password}, headers=headers)

    async def sign_up(self, email: str, password: str = PASSWORD) -> "Person":
        """Somebody who registered, confirmed the address and is logged in."""
        assert (await self.register(email, password)).status_code == 202
        assert (await self.verify(email)).status_code == 204
        return await self.person(email, password)

    async def person(self, email: str, password: str = PASSWORD, **headers: str) -> "Person":
        answer = await self.log_in(email, password, **headers)
        assert answer.status_code == 201, answer.text
        return Person(self.http, await self.user_id(email), email, password, answer.json())

    async def register(self, email: str, password: str = PASSWORD, **headers: str) -> httpx.Response:
        body = json.dumps({"email": email, "password": password})  # httpx's own way can't say "\\ud800"
        return await self.http.post("/users", content=body, headers={"content-type": "application/json"} | headers)


@functools.cache
def _template() -> Path:
    """An SQLite file with Dashtam's tables, made once a process: to migrate takes longer than most tests do."""
    path = Path(tempfile.mkdtemp(prefix="dashtam-")) / "template.db"
    atexit.register(shutil.rmtree, path.parent, ignore_errors=True)
    return path


async def copy_template(path: Path) -> None:
    """Put the tables where there is no file yet."""
    if not await asyncio.to_thread(_template().exists):
        engine = create_async_engine(f"sqlite+aiosqlite:///{_template()}")
        try:
            await schema.upgrade(engine)
        finally:
            await engine.dispose()
    if not await asyncio.to_thread(path.exists):
        await asyncio.to_thread(shutil.copyfile, _template(), path)


@asynccontextmanager
async def served(
    database_url: str,
    mail: MailServer | None = None,
    *,
    raise_faults: bool = True,
    parts: Mapping[str, Any] | None = None,
    **settings: Any,
) -> AsyncIterator[Served]:
    """Dashtam, running; without a `mail` server of the caller's with one of its own.

    `raise_faults`: what no handler of the API expected is raised in the test, instead of answered with 500 alone.
    `parts` are what `build` takes beside settings.
    """
    if mail is None:
        async with (
            mail_server() as own,
            served(database_url, own, raise_faults=raise_faults, parts=parts, **settings) as running,
        ):
            yield running
        return
    output = io.StringIO()
    if not database_url.startswith("sqlite"):
        settings = {"secret_keys": (make_key(),)} | settings
    application = build(
        Settings(database_url=database_url, smtp_port=mail.port, **(QUICK | settings)),
        make_logger("json", stream=output),
        **(parts or {}),
    )
    engine = application.database.engine
    if engine.dialect.name == "sqlite":
        await copy_template(Path(str(engine.url.database)))
    try:
        if engine.dialect.name == "postgresql":
            await schema.upgrade(engine)
        api = api_of(application)
        async with (
            api.router.lifespan_context(api),
            httpx.AsyncClient(
                transport=httpx.ASGITransport(api, raise_app_exceptions=raise_faults), base_url="http://dashtam.example"
            ) as http,
        ):
            yield Served(application, http, mail, output)
    finally:
        await engine.dispose()
