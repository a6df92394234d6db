"""A person confirms that the address they registered with is theirs."""

from dashtam.application.database import DatabaseProtocol
from dashtam.application.rate_limit import RateLimits, TooManyAttempts
from dashtam.domain.events import EmailVerification
from dashtam.domain.one_time_token import OneTimeTokens, Purpose, TokenError, TokenExpired, TokenInvalid, TokenUsed
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.user import UserRepository
from whereupon import EventBusProtocol


class VerifyEmail:
    def __init__(
        self,
        users: UserRepository,
        tokens: OneTimeTokens,
        event_bus: EventBusProtocol,
        database: DatabaseProtocol,
        rate_limits: RateLimits,
    ) -> None:
        self._users = users
        self._tokens = tokens
        self._event_bus = event_bus
        self._database = database
        self._rate_limits = rate_limits

    async def handle(self, token: str) -> Result[None, TokenError | TooManyAttempts]:
        token_id = self._tokens.id_of(token)
        if token_id is None:  # not even one of ours: nobody attempted anything
            return Failure(TokenInvalid())
        try:
            await self._rate_limits.count("email_verification")
        except TooManyAttempts as limited:
            return Failure(limited)
        async with self._event_bus.workflow(EmailVerification, token_id=token_id) as attempt:
            try:
                async with self._database.get_session():
                    user_id = await self._tokens.owner(token, Purpose.EMAIL_VERIFICATION)
                async with self._database.get_session() as session:
                    user = await self._users.find_by_id(user_id, for_update=True)
                    if user is None:
                        raise TokenInvalid
                    await self._tokens.redeem(token, Purpose.EMAIL_VERIFICATION)
                    user.verify_email()
                    await self._users.save(user)
                    await attempt.succeeded(user_id=user.id, email=user.email, session=session)
            except (TokenInvalid, TokenExpired, TokenUsed) as error:
                await attempt.failed(error.reason)
                return Failure(error)
        return Success(None)
