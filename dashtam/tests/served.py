"""Dashtam as its tests run it: the real application on a real database, with a real mail server beside it."""

import asyncio
import io
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Any, TypeVar

import httpx
from aiosmtpd.smtp import SMTP, Envelope, Session

from dashtam.bootstrap import Application, Settings, api_of, build
from dashtam.infrastructure import schema
from dashtam.infrastructure.logs import make_logger
from whereupon import EventBus

T = TypeVar("T")

PATIENCE = 20.0  # seconds until what must happen counts as not happening


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

    async def message_to(self, address: str) -> EmailMessage:
        async def look() -> list[EmailMessage]:
            return [message for message in self.accepted if address in str(message["To"])]

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

    async def register(self, email: str, password: str = "correct horse 7", **headers: str) -> httpx.Response:
        body = json.dumps({"email": email, "password": password})  # httpx's own way can't say "\\ud800"
        return await self.http.post("/users", content=body, headers={"content-type": "application/json"} | headers)


@asynccontextmanager
async def served(
    database_url: str, mail: MailServer | None = None, *, raise_faults: bool = True, **settings: Any
) -> AsyncIterator[Served]:
    """Dashtam, running; without a `mail` server of the caller's with one of its own.

    `raise_faults`: what no handler of the API expected is raised in the test, instead of answered with 500 alone.
    """
    if mail is None:
        async with mail_server() as own, served(database_url, own, raise_faults=raise_faults, **settings) as running:
            yield running
        return
    output = io.StringIO()
    application = build(
        Settings(database_url=database_url, smtp_port=mail.port, **settings), make_logger("json", stream=output)
    )
    engine = application.database.engine
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
