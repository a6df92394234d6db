"""Mail as use cases see it: a template, who gets it, and what makes it the same mail when it is sent again."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True, slots=True, kw_only=True)
class Mail:
    template: str
    """There is a text and an HTML template of this name."""
    to: str
    subject: str
    key: str
    """The delivery's idempotency key; the Message-ID is made from it, so that a mail sent twice is shown once."""
    variables: Mapping[str, object] = field(default_factory=dict)


class MailRefused(Exception):
    """The server says for good that it will not take mail for this person; any other failure may pass."""


class Mailer(Protocol):
    async def send(self, mail: Mail) -> None:
        """Returns once a mail server took the mail. Raises `MailRefused` where trying again is no use."""
        ...
