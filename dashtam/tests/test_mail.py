from email.message import EmailMessage

import aiosmtplib
import pytest
from served import MailServer, mail_server

from dashtam.application.mail import Mail, MailRefused
from dashtam.infrastructure.mail import SmtpMailer

pytestmark = pytest.mark.integration


def mailer(server: MailServer) -> SmtpMailer:
    return SmtpMailer(host="127.0.0.1", port=server.port, sender="hello@dashtam.example")


def welcome(to: str = "ada@example.com", subject: str = "Welcome to Dashtam", key: str = "1:mail") -> Mail:
    return Mail(
        template="welcome",
        to=to,
        subject=subject,
        key=key,
        variables={"email": to, "link": "https://dashtam.example/verify?token=x"},
    )


def text_of(message: EmailMessage, form: str) -> str:
    body = message.get_body((form,))
    assert body is not None
    return str(body.get_content())


async def test_a_mail_says_the_same_as_text_and_as_html() -> None:
    async with mail_server() as server:
        await mailer(server).send(welcome())
        (message,) = server.accepted
        assert message.get_content_type() == "multipart/alternative"
        for form in ("plain", "html"):
            assert "ada@example.com" in text_of(message, form)
            assert "in one place" in " ".join(text_of(message, form).split())
        assert message["From"] == "Dashtam <hello@dashtam.example>"
        assert message["To"] == "ada@example.com"
        assert message["Auto-Submitted"] == "auto-generated"
        assert message["Date"].datetime.tzinfo is not None


async def test_a_mail_that_is_sent_again_has_the_same_message_id_and_another_mail_another() -> None:
    async with mail_server() as server:
        for key in ("1:mail", "1:mail", "2:mail"):
            await mailer(server).send(welcome(key=key))
        first, again, other = (message["Message-ID"] for message in server.accepted)
        assert first == again != other
        assert first.endswith("@dashtam.example>")


@pytest.mark.parametrize(
    "to", ["ada@example.com\r\nBcc: eve@example.com", "ada@example.com, eve@example.com", "Ada <ada@example.com>", ""]
)
async def test_a_recipient_who_is_more_than_one_address_is_refused_before_anything_is_sent(to: str) -> None:
    async with mail_server() as server:
        with pytest.raises(ValueError):  # noqa: PT011 (whichever part of the address is found wrong first)
            await mailer(server).send(welcome(to=to))
        assert server.envelopes == []


async def test_a_subject_can_t_add_a_header() -> None:
    async with mail_server() as server:
        with pytest.raises(ValueError, match="linefeed"):
            await mailer(server).send(welcome(subject="Welcome\r\nBcc: eve@example.com"))
        assert server.envelopes == []


async def test_what_people_typed_is_text_in_html() -> None:
    async with mail_server() as server:
        mail = Mail(
            template="welcome",
            to="ada@example.com",
            subject="<b>",
            key="k",
            variables={"email": "<script>alert(1)", "link": "/"},
        )
        await mailer(server).send(mail)
        (message,) = server.accepted
        assert "<script>" not in text_of(message, "html")
        assert "&lt;script&gt;alert(1)" in text_of(message, "html")
        assert "<script>alert(1)" in text_of(message, "plain")


async def test_a_refusal_for_good_is_told_from_one_for_now() -> None:
    async with mail_server() as server:
        server.refusals = ["550 no such mailbox", "451 later"]
        with pytest.raises(MailRefused, match="550 no such mailbox"):
            await mailer(server).send(welcome())
        with pytest.raises(aiosmtplib.SMTPRecipientsRefused):
            await mailer(server).send(welcome())
        await mailer(server).send(welcome())
        assert len(server.accepted) == 1


async def test_a_server_that_offers_no_encryption_gets_no_mail_that_must_be_encrypted() -> None:
    async with mail_server() as server:
        strict = SmtpMailer(host="127.0.0.1", port=server.port, sender="hello@dashtam.example", security="starttls")
        with pytest.raises(aiosmtplib.SMTPException, match="STARTTLS"):
            await strict.send(welcome())
        assert server.envelopes == []
