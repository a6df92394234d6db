"""Each attempt at something has one outcome, however it ends. Run it: python examples/workflow.py"""

import asyncio
from uuid import UUID, uuid4

from sqlalchemy import text
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker

from whereupon import DomainEvent, EventBus, Workflow


class RegistrationAttempted(DomainEvent):
    email: str


class RegistrationSucceeded(DomainEvent):
    user_id: UUID
    email: str


class RegistrationFailed(DomainEvent):
    email: str
    reason: str


class EmailTaken(Exception):
    reason = "email_taken"


Registration = Workflow(RegistrationAttempted, RegistrationSucceeded, RegistrationFailed)
bus = EventBus("sqlite+aiosqlite:///:memory:")
sessions = async_sessionmaker(bus.engine, expire_on_commit=False)


@bus.subscribe(RegistrationSucceeded)
async def welcome(event: RegistrationSucceeded) -> None:
    print(f"welcome, {event.email}")


@bus.subscribe(RegistrationFailed)
async def note(event: RegistrationFailed) -> None:
    print(f"{event.email} is not registered: {event.reason}")


async def register(email: str) -> None:
    async with bus.workflow(Registration, email=email) as attempt, sessions.begin() as session:
        # here Attempted is committed already
        user_id = uuid4()
        try:
            await session.execute(text("INSERT INTO users VALUES (:id, :email)"), {"id": user_id.hex, "email": email})
        except IntegrityError:
            raise EmailTaken from None
        await attempt.succeeded(user_id=user_id, session=session)  # commits with the user, or not at all


async def main() -> None:
    async with sessions.begin() as session:
        await session.execute(text("CREATE TABLE users (id TEXT, email TEXT PRIMARY KEY)"))
    async with bus:
        await register("ada@example.com")
        try:
            await register("ada@example.com")
        except EmailTaken:
            print("told the visitor that the address is taken")
    await bus.engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
