"""What a user may choose about how Dashtam treats them."""

from dataclasses import dataclass
from typing import Protocol
from uuid import UUID

from dashtam.domain.result import Error


class SettingsPending(Error):
    """The user registered a moment ago, and the settings follow."""

    reason = "settings_pending"

    def __init__(self) -> None:
        super().__init__("The settings of this user are being initialised. Ask again in a moment.")


@dataclass(frozen=True, slots=True, kw_only=True)
class UserSettings:
    user_id: UUID
    currency: str = "EUR"
    """ISO 4217: what totals over several accounts are shown in."""
    language: str = "en"
    """BCP 47: the language of mails."""
    notifications: bool = True
    """Whether to be told of changes to accounts."""


class UserSettingsRepository(Protocol):
    """Settings as they are stored; each call joins the database session of its caller."""

    async def save(self, settings: UserSettings) -> None: ...

    async def find_by_user(self, user_id: UUID) -> UserSettings | None: ...
