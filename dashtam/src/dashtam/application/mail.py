"""Mail as use cases see it, and what people are written when something happened to them."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol
from uuid import UUID

from dashtam.application.database import DatabaseProtocol
from dashtam.domain.events import (
    EmailVerificationSucceeded,
    PasswordResetConfirmSucceeded,
    PasswordResetRequestSucceeded,
    UserPasswordChangeSucceeded,
    UserRegistrationFailed,
    UserRegistrationSucceeded,
)
from dashtam.domain.one_time_token import OneTimeTokens, Purpose
from dashtam.domain.user import EmailTaken, User, UserRepository
from whereupon import Discard, DomainEvent, EventContext


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


class EmailEventHandler:
    """Writes to people about what happened to them. Links hold tokens, and no event does."""

    def __init__(
        self,
        mailer: Mailer,
        users: UserRepository,
        tokens: OneTimeTokens,
        database: DatabaseProtocol,
        public_url: str,
    ) -> None:
        """`public_url`: where the links lead, without a slash at the end."""
        self._mailer = mailer
        self._users = users
        self._tokens = tokens
        self._database = database
        self._public_url = public_url

    async def handle_user_registration_succeeded(self, event: UserRegistrationSucceeded, context: EventContext) -> None:
        link = f"{self._public_url}/verify?token={await self._token(event, event.user_id, Purpose.EMAIL_VERIFICATION)}"
        await self._send("welcome", event.email, "Welcome to Dashtam", context, email=event.email, link=link)

    async def handle_user_registration_failed(self, event: UserRegistrationFailed, context: EventContext) -> None:
        """Whoever registers an address that is taken is not told so: its owner is."""
        if event.reason != EmailTaken.reason:
            return
        async with self._database.get_session():
            user = await self._users.find_by_email(event.email)
        if user is None:
            raise Discard("nobody has this address any more")
        await self._send("already_registered", user.email, "You have an account with Dashtam", context)

    async def handle_email_verification_succeeded(
        self, event: EmailVerificationSucceeded, context: EventContext
    ) -> None:
        await self._send("verified", event.email, "You are in", context)

    async def handle_user_password_change_succeeded(
        self, event: UserPasswordChangeSucceeded, context: EventContext
    ) -> None:
        user = await self._user(event.user_id)
        await self._send(
            "password_changed",
            user.email,
            "Your password was changed",
            context,
            by_administrator=event.initiated_by == "admin",
            at=event.occurred_at,
            ip_address=context.ip_address,
        )

    async def handle_password_reset_request_succeeded(
        self, event: PasswordResetRequestSucceeded, context: EventContext
    ) -> None:
        link = f"{self._public_url}/reset?token={await self._token(event, event.user_id, Purpose.PASSWORD_RESET)}"
        await self._send("password_reset", event.email, "Choose a new password", context, link=link)

    async def handle_password_reset_confirm_succeeded(
        self, event: PasswordResetConfirmSucceeded, context: EventContext
    ) -> None:
        await self._send(
            "password_changed",
            event.email,
            "Your password was changed",
            context,
            by_administrator=False,
            at=event.occurred_at,
            ip_address=context.ip_address,
        )

    async def _token(self, event: DomainEvent, user_id: UUID, purpose: Purpose) -> str:
        async with self._database.get_session():
            if await self._users.find_by_id(user_id, for_update=True) is None:
                raise Discard(f"there is no user {user_id} (any more), so nobody to write to")
            return await self._tokens.issue(event.event_id, user_id, purpose, event.occurred_at)

    async def _user(self, user_id: UUID) -> User:
        async with self._database.get_session():
            user = await self._users.find_by_id(user_id, for_update=False)
        if user is None:
            raise Discard(f"there is no user {user_id} (any more), so nobody to write to")
        return user

    async def _send(self, template: str, to: str, subject: str, context: EventContext, **variables: object) -> None:
        try:
            await self._mailer.send(
                Mail(template=template, to=to, subject=subject, key=context.idempotency_key, variables=variables)
            )
        except MailRefused as error:
            raise Discard(str(error)) from error
