"""Registering, as the API and the pages offer it."""

from dashtam.application.rate_limit import RateLimits
from dashtam.application.registration import RegisterUser, RegisterUserHandler
from dashtam.domain.events import UserRegistration
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.user import EmailTaken, InvalidEmail, WeakPassword
from dashtam.presentation.pace import Pace
from whereupon import EventBusProtocol


class SignUp:
    """The answer is the same whether somebody has this address already or not, and takes as long."""

    def __init__(
        self, event_bus: EventBusProtocol, register_user: RegisterUserHandler, rate_limits: RateLimits, pace: Pace
    ) -> None:
        self._event_bus = event_bus
        self._register_user = register_user
        self._rate_limits = rate_limits
        self._pace = pace

    async def attempt(self, email: str, password: str) -> Result[None, InvalidEmail | WeakPassword]:
        """Raises `TooManyAttempts`."""
        await self._rate_limits.count("registration", email=email)
        # the handler publishes Succeeded in its transaction, and that is the outcome of this attempt
        async with self._pace.kept(), self._event_bus.workflow(UserRegistration, email=email) as attempt:
            result = await self._register_user.handle(RegisterUser(email=email, password=password))
            if isinstance(result, Failure):
                await attempt.failed(result.error.reason)
        if isinstance(result, Failure) and not isinstance(result.error, EmailTaken):
            return Failure(result.error)
        return Success(None)
