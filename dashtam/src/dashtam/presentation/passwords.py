"""New passwords and confirmed addresses over HTTP."""

from typing import Annotated, Any
from uuid import UUID

from fastapi import APIRouter, Depends, Response
from pydantic import BaseModel, ConfigDict, Field, SecretStr

from dashtam.application.email_verification import VerifyEmail
from dashtam.application.password_change import ChangePassword, PasswordChange
from dashtam.application.password_reset import ConfirmPasswordReset, ForgottenPassword
from dashtam.domain.result import Failure
from dashtam.domain.user import LONGEST_EMAIL, LONGEST_PASSWORD
from dashtam.presentation.authentication import SignedIn, SignedInDependency, require_admin
from dashtam.presentation.pace import Pace
from dashtam.presentation.problems import describes, problem_of

Password = Annotated[SecretStr, Field(max_length=LONGEST_PASSWORD, examples=["battery staple 8"])]
Token = Annotated[SecretStr, Field(max_length=200)]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class Verification(Strict):
    token: Token


class OwnPassword(Strict):
    current_password: Password
    new_password: Password


class NewPassword(Strict):
    new_password: Password


class ForgottenBy(Strict):
    email: str = Field(max_length=LONGEST_EMAIL, examples=["ada@example.com"])


class Reset(Strict):
    token: Token
    new_password: Password


class Told(BaseModel):
    detail: str


def password_routes(
    verify_email: VerifyEmail,
    password_change: PasswordChange,
    forgotten_password: ForgottenPassword,
    signed_in: SignedInDependency,
    pace: Pace,
) -> APIRouter:
    routes = APIRouter()

    @routes.post(
        "/email-verifications",
        status_code=204,
        response_model=None,
        responses=describes(400, 413, 422, 429),
        tags=["users"],
        name="verify_email",
    )
    async def verify(body: Verification) -> Any:
        """The token is in the link of the welcome mail."""
        result = await verify_email.handle(body.token.get_secret_value())
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=204)

    @routes.put(
        "/users/me/password",
        status_code=204,
        response_model=None,
        responses=describes(400, 401, 403, 404, 413, 422, 429),
        tags=["passwords"],
    )
    async def change_own_password(body: OwnPassword, who: SignedIn = Depends(signed_in)) -> Any:
        """Every session is over then, this one too."""
        result = await password_change.by_user(
            ChangePassword(
                user_id=who.user_id,
                current_password=body.current_password.get_secret_value(),
                new_password=body.new_password.get_secret_value(),
            )
        )
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=204)

    @routes.put(
        "/users/{user_id}/password",
        status_code=204,
        response_model=None,
        responses=describes(400, 401, 403, 404, 413, 422),
        tags=["passwords"],
    )
    async def change_password_of(user_id: UUID, body: NewPassword, who: SignedIn = Depends(signed_in)) -> Any:
        """As an administrator."""
        require_admin(who)
        result = await password_change.by_admin(user_id, body.new_password.get_secret_value())
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=204)

    @routes.post(
        "/password-resets",
        status_code=202,
        response_model=Told,
        responses=describes(400, 413, 422, 429),
        tags=["passwords"],
    )
    async def request_reset(body: ForgottenBy) -> Any:
        """The answer is the same whether somebody has this address or not."""
        async with pace.kept():
            result = await forgotten_password.request(body.email)
        if isinstance(result, Failure):
            return problem_of(result.error)
        return Told(detail="If somebody has this address, they get a mail with a link.")

    @routes.post(
        "/password-resets/confirmation",
        status_code=204,
        response_model=None,
        responses=describes(400, 413, 422, 429),
        tags=["passwords"],
    )
    async def confirm_reset(body: Reset) -> Any:
        """Every session of the user is over then."""
        result = await forgotten_password.confirm(
            ConfirmPasswordReset(token=body.token.get_secret_value(), new_password=body.new_password.get_secret_value())
        )
        return problem_of(result.error) if isinstance(result, Failure) else Response(status_code=204)

    return routes
