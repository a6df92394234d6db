"""Mail over SMTP."""

from datetime import UTC, datetime
from email.headerregistry import Address
from email.message import EmailMessage
from email.policy import SMTP
from functools import partial
from hashlib import sha256
from typing import Literal

import aiosmtplib
import jinja2
from email_validator import validate_email

from dashtam.application.mail import Mail, MailRefused

Security = Literal["none", "starttls", "tls"]


class SmtpMailer:
    """Sends each mail over a connection of its own.

    A mail server that can't be reached, or refuses for now, is an exception of aiosmtplib, `OSError` or `TimeoutError`.
    """

    def __init__(
        self,
        *,
        host: str,
        port: int,
        sender: str,
        security: Security = "none",
        username: str | None = None,
        password: str | None = None,
        timeout: float = 10.0,
    ) -> None:
        self._sender = Address("Dashtam", addr_spec=sender)
        self._deliver = partial(
            aiosmtplib.send,
            sender=sender,
            hostname=host,
            port=port,
            username=username,
            password=password,
            use_tls=security == "tls",
            start_tls=security == "starttls",
            timeout=timeout,
            local_hostname=self._sender.domain,  # asking the resolver for it could block the loop
        )
        self._templates = jinja2.Environment(
            loader=jinja2.PackageLoader("dashtam.infrastructure", "templates"),
            autoescape=lambda name: name is not None and name.endswith(".html.jinja"),
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    async def send(self, mail: Mail) -> None:
        recipient = validate_email(mail.to, check_deliverability=False)
        to = Address(username=recipient.local_part, domain=recipient.ascii_domain)
        try:
            await self._deliver(
                self._message(mail, to), recipients=[f"{recipient.local_part}@{recipient.ascii_domain}"]
            )
        except aiosmtplib.SMTPRecipientsRefused as error:
            for refused in error.recipients:
                if 500 <= refused.code < 600:
                    raise MailRefused(
                        f"the mail server takes no mail for {mail.to}: {refused.code} {refused.message}"
                    ) from error
            raise

    def _message(self, mail: Mail, to: Address) -> EmailMessage:
        message = EmailMessage(policy=SMTP)
        message["From"] = self._sender
        message["To"] = to
        message["Subject"] = mail.subject
        message["Date"] = datetime.now(UTC)
        message["Message-ID"] = f"<{sha256(mail.key.encode()).hexdigest()}@{self._sender.domain}>"
        message["Auto-Submitted"] = "auto-generated"  # RFC 3834: nobody's out-of-office answers it
        message.set_content(self._render(mail, "txt"))
        message.add_alternative(self._render(mail, "html"), subtype="html")
        return message

    def _render(self, mail: Mail, form: Literal["txt", "html"]) -> str:
        template = self._templates.get_template(f"{mail.template}.{form}.jinja")
        return template.render(mail.variables, subject=mail.subject)
