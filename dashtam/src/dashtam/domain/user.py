"""A user: an address to reach them by, and a password that nobody can read."""

from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID

from email_validator import EmailNotValidError, validate_email
from uuid_utils.compat import uuid7

from dashtam.domain.result import Error

SHORTEST_PASSWORD = 10
LONGEST_PASSWORD = 1_000
LONGEST_EMAIL = 254  # RFC 5321, 4.5.3.1.3, without the angle brackets


class InvalidEmail(Error):
    """Nobody can be written to at this address."""

    reason = "invalid_email"


class WeakPassword(Error):
    """The password is too easily guessed."""

    reason = "weak_password"


class EmailTaken(Error):
    """Somebody registered with this address before."""

    reason = "email_taken"

    def __init__(self) -> None:
        super().__init__("Somebody is registered with this address. Log in, or use another one.")


class WrongPassword(Error):
    """It is not the password that this user has now."""

    reason = "wrong_password"

    def __init__(self) -> None:
        super().__init__("That is not your present password.")


class UserNotFound(Error):
    """Nobody has this id."""

    reason = "user_not_found"

    def __init__(self) -> None:
        super().__init__("There is no such user.")


@dataclass(slots=True, kw_only=True)
class User:
    """Made by `User.create`, or by the repository from what is stored."""

    id: UUID = field(default_factory=uuid7)
    email: str
    registered_at: datetime = field(default_factory=lambda: datetime.now(UTC))
    email_verified_at: datetime | None = None
    is_admin: bool = False
    password_hash: str | None = field(default=None, repr=False)
    """None for a person who was invited and has not chosen a password."""
    new_password: str | None = field(default=None, repr=False, compare=False)
    """In clear from the moment it is chosen until the repository saves its hash; never stored, logged or published."""

    @classmethod
    def create(cls, *, email: str, password: str | None = None) -> "User":
        """Raises `InvalidEmail` or `WeakPassword`."""
        user = cls(email=_deliverable(email))
        if password is not None:
            user.change_password(password)
        return user

    def change_password(self, password: str) -> None:
        """The user has it once they are saved. Raises `WeakPassword`."""
        _refuse_weak(password, self.email)
        self.new_password = password

    def verify_email(self) -> None:
        if self.email_verified_at is None:
            self.email_verified_at = datetime.now(UTC)


class PasswordCheck(Protocol):
    async def matches(self, password: str, password_hash: str | None) -> bool:
        """False for None, after as long as a check of a hash takes."""
        ...


class UserRepository(Protocol):
    """Users as they are stored; each call joins the database session of its caller."""

    async def save(self, user: User) -> None:
        """Raises `EmailTaken`; the transaction can't be used any further then."""
        ...

    async def hash_password(self, user: User) -> None:
        """What `save` does first with a password that was chosen; whoever holds locks then calls it before.

        It takes a fifth of a second, on purpose, and needs no database session.
        """
        ...

    async def find_by_id(self, user_id: UUID, *, for_update: bool = True) -> User | None:
        """Nobody else changes this user until the caller's transaction ends, but where `for_update` is False."""
        ...

    async def newest(self, limit: int) -> list[User]: ...

    async def find_by_email(self, email: str, *, for_update: bool = False) -> User | None:
        """Upper and lower case are the same to it. Whoever writes afterwards needs `for_update`."""
        ...


def is_address(text: str) -> bool:
    try:
        _deliverable(text)
    except InvalidEmail:
        return False
    return True


def email_key(email: str) -> str:
    """Equal for addresses that are one person's: however their letters are written, and upper and lower case alike."""
    try:
        return _deliverable(email).casefold()
    except InvalidEmail:
        return email.casefold()


def _deliverable(email: str) -> str:
    try:
        return validate_email(email, check_deliverability=False, strict=True).normalized
    except EmailNotValidError as error:
        raise InvalidEmail(str(error)) from None


def _refuse_weak(password: str, email: str) -> None:
    if len(password) < SHORTEST_PASSWORD:
        raise WeakPassword(f"A password has {SHORTEST_PASSWORD} characters or more.")
    if len(password) > LONGEST_PASSWORD:
        raise WeakPassword(f"A password has {LONGEST_PASSWORD} characters at most.")
    if any(0xD800 <= ord(character) <= 0xDFFF for character in password):
        raise WeakPassword("A password is made of whole characters.")
    if password.isalpha() or not any(character.isalpha() for character in password):
        raise WeakPassword("A password has letters, and something that is none.")
    if password.casefold() == email.casefold():
        raise WeakPassword("A password is not the email address.")
