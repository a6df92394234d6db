"""A person registers, whereupon a mail is sent and settings are stored. Run it: python examples/quickstart.py"""

import asyncio
from uuid import UUID, uuid4

from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from whereupon import DomainEvent, EventBus, EventContext


class UserRegistrationSucceeded(DomainEvent):
    user_id: UUID
    email: str


bus = EventBus("sqlite+aiosqlite:///:memory:")  # a private file; in an application: app.db, or postgresql+asyncpg://…
sessions = async_sessionmaker(bus.engine, expire_on_commit=False)


@bus.subscribe(UserRegistrationSucceeded)
async def send_welcome_email(event: UserRegistrationSucceeded, context: EventContext) -> None:
    print(f"welcome mail to {event.email}, attempt {context.attempt}")


@bus.subscribe(UserRegistrationSucceeded)
async def initialise_settings(event: UserRegistrationSucceeded, session: AsyncSession) -> None:
    await session.execute(text("INSERT INTO settings VALUES (:user)"), {"user": event.user_id.hex})


async def main() -> None:
    async with sessions.begin() as session:
        await session.execute(text("CREATE TABLE users (id TEXT, email TEXT)"))
        await session.execute(text("CREATE TABLE settings (user_id TEXT)"))
    async with bus:
        user_id, email = uuid4(), "ada@example.com"
        async with sessions.begin() as session:
            await session.execute(text("INSERT INTO users VALUES (:id, :email)"), {"id": user_id.hex, "email": email})
            await bus.publish(UserRegistrationSucceeded(user_id=user_id, email=email), session=session)
        # committed: both handlers run now, each by itself; leaving the block waits for them
    async with sessions() as session:
        print("rows of settings:", (await session.execute(text("SELECT count(*) FROM settings"))).scalar_one())
    await bus.engine.dispose()


if __name__ == "__main__":
    asyncio.run(main())
