"""The bank: who its customers are, what they allowed, and what goes wrong for them."""

from collections.abc import Callable
from datetime import UTC, datetime

from dashtam_sandbox_bank.faults import Faults
from dashtam_sandbox_bank.grants import Grants
from dashtam_sandbox_bank.people import People
from dashtam_sandbox_bank.settings import BankSettings


class Bank:
    """Everything is in memory: it is a sandbox, and forgets when it ends."""

    def __init__(self, settings: BankSettings, clock: Callable[[], datetime]) -> None:
        self.settings = settings
        self.clock = clock
        self.people = People(clock)
        self.grants = Grants(clock, settings.access_token_lifetime, settings.refresh_token_lifetime)
        self.faults = Faults()


def wall_clock() -> datetime:
    return datetime.now(UTC)
