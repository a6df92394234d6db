"""A mail server for one machine: it takes every mail, delivers none, and shows them on a web page."""

import asyncio
import html
import random
import socket
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from email import message_from_bytes
from email.message import EmailMessage
from email.policy import default
from typing import Final

from aiosmtpd.smtp import SMTP, Envelope, Session
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import HTMLResponse, PlainTextResponse, Response
from starlette.routing import Route

KEPT: Final = 10_000
"""Mails; older ones are dropped."""
LARGEST: Final = 1024 * 1024
"""Bytes; a larger mail is refused."""

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 50rem; padding: 0 1rem }}
table {{ border-collapse: collapse; width: 100% }}
th, td {{ text-align: left; padding: .4rem .6rem; border-bottom: 1px solid #ccc }}
pre {{ white-space: pre-wrap; background: #f4f4f4; color: #111; padding: 1rem }}
iframe {{ width: 100%; height: 24rem; border: 1px solid #ccc; background: #fff }}
@media (prefers-color-scheme: dark) {{ body {{ background: #16181d; color: #ddd }} a {{ color: #9cf }} }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


@dataclass(frozen=True, slots=True)
class Received:
    """A mail as it arrived."""

    number: int
    at: datetime
    sender: str
    recipients: tuple[str, ...]
    message: EmailMessage

    @property
    def subject(self) -> str:
        return str(self.message.get("Subject", ""))

    def part(self, kind: str) -> str | None:
        """The text of the part that is preferred for `plain` or `html`, None where there is none."""
        body = self.message.get_body(preferencelist=(kind,))
        return body.get_content() if isinstance(body, EmailMessage) else None


class Inbox:
    """The mails, and the two doors to them: SMTP and a web page."""

    def __init__(self) -> None:
        self._mails: deque[Received] = deque(maxlen=KEPT)
        self._count = 0
        self._known: set[str] = set()
        self.greylisted = 0.0
        """The share of deliveries that are put off: "come back later" (RFC 6647), and taken when they do."""
        self.put_off = 0
        self.app = Starlette(
            routes=[
                Route("/", self._list),
                Route("/mails/{number:int}", self._show),
                Route("/mails/{number:int}/source", self._source),
            ]
        )

    @property
    def mails(self) -> list[Received]:
        """Those kept, the oldest first."""
        return list(self._mails)

    def to(self, address: str) -> list[Received]:
        return [mail for mail in self._mails if address in mail.recipients]

    async def handle_DATA(self, _server: SMTP, _session: Session, envelope: Envelope) -> str:
        content = envelope.content or b""
        message = message_from_bytes(content if isinstance(content, bytes) else content.encode(), policy=default)
        if self._is_put_off(str(message["Message-ID"])):
            return "451 4.7.1 greylisted, come back later"
        self._count += 1
        self._mails.append(
            Received(
                number=self._count,
                at=datetime.now(UTC),
                sender=envelope.mail_from or "",
                recipients=tuple(envelope.rcpt_tos),
                message=message,
            )
        )
        return "250 kept"

    def _is_put_off(self, message_id: str) -> bool:
        # By the mail and not by chance alone: one that comes back is taken.
        if not self.greylisted or message_id in self._known or random.random() >= self.greylisted:
            return False
        self._known.add(message_id)
        self.put_off += 1
        return True

    @asynccontextmanager
    async def listening(self, door: socket.socket) -> AsyncIterator[None]:
        """Take mail at this socket, which is closed when the block ends."""
        loop = asyncio.get_running_loop()
        server = await loop.create_server(
            lambda: SMTP(self, enable_SMTPUTF8=True, hostname="inbox.localhost", data_size_limit=LARGEST, loop=loop),
            sock=door,
        )
        async with server:
            yield

    async def _list(self, _request: Request) -> Response:
        rows = "".join(
            f'<tr><td><a href="/mails/{mail.number}">{html.escape(mail.subject) or "(no subject)"}</a></td>'
            f"<td>{html.escape(', '.join(mail.recipients))}</td><td>{mail.at:%H:%M:%S}</td></tr>"
            for mail in reversed(self._mails)
        )
        body = (
            f"<table><tr><th>Subject</th><th>To</th><th>At (UTC)</th></tr>{rows}</table>"
            if rows
            else "<p>No mail yet.</p>"
        )
        return HTMLResponse(_PAGE.format(title="Inbox", body=body))

    async def _show(self, request: Request) -> Response:
        mail = self._find(request)
        if mail is None:
            return HTMLResponse(
                _PAGE.format(title="No such mail", body='<p><a href="/">Inbox</a></p>'), status_code=404
            )
        plain, rich = mail.part("plain"), mail.part("html")
        body = (
            f"<p>From {html.escape(mail.sender)} to {html.escape(', '.join(mail.recipients))} · "
            f'<a href="/mails/{mail.number}/source">source</a> · <a href="/">inbox</a></p>'
        )
        if plain is not None:
            body += f"<pre>{html.escape(plain)}</pre>"
        if rich is not None:  # sandboxed: a mail is whatever somebody sent
            body += f'<iframe sandbox title="the mail as HTML" srcdoc="{html.escape(rich, quote=True)}"></iframe>'
        return HTMLResponse(_PAGE.format(title=html.escape(mail.subject) or "(no subject)", body=body))

    async def _source(self, request: Request) -> Response:
        mail = self._find(request)
        if mail is None:
            return PlainTextResponse("no such mail\n", status_code=404)
        return PlainTextResponse(mail.message.as_bytes().decode("utf-8", "replace"))

    def _find(self, request: Request) -> Received | None:
        return next((mail for mail in self._mails if mail.number == request.path_params["number"]), None)
