"""A FastAPI application that publishes. Run it: python examples/web.py (it asks itself), or uvicorn examples.web:app"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID, uuid4

import httpx
from fastapi import Depends, FastAPI, Header, HTTPException
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import DomainEvent, EventBus, EventContext, acting_as
from whereupon.fastapi import Bus, in_transaction, install


class OrderPlaced(DomainEvent):
    order_id: UUID
    article: str


bus = EventBus("sqlite+aiosqlite:///:memory:")  # a private file; in an application: app.db, or postgresql+asyncpg://…


@bus.subscribe(OrderPlaced)
async def send_confirmation(event: OrderPlaced, context: EventContext) -> None:
    print(f"mail to {context.actor} at {context.ip_address}: {event.article} is on its way")


@asynccontextmanager
async def lifespan(_: FastAPI) -> AsyncIterator[None]:
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE orders (id TEXT, article TEXT)"))
    yield  # the bus runs within this: what is set up above is there for handlers until the last of them is done


async def customer(authorization: Annotated[str, Header()]) -> str:
    name = authorization.removeprefix("Bearer ")  # in an application: whoever the token says
    acting_as(name)
    return name


Session = Annotated[AsyncSession, in_transaction()]

app = FastAPI(lifespan=lifespan)


@app.post("/orders/{article}", status_code=201, dependencies=[Depends(customer)])
async def place_order(article: str, session: Session, bus: Bus) -> UUID:
    order_id = uuid4()
    await session.execute(text("INSERT INTO orders VALUES (:id, :article)"), {"id": order_id.hex, "article": article})
    await bus.publish(OrderPlaced(order_id=order_id, article=article), session=session)
    if article == "unicorn":
        raise HTTPException(409, "sold out")  # rolls back: no order, no event
    return order_id  # committed before the response is sent


install(app, bus, trusted_proxies=("127.0.0.1",))


async def main() -> None:
    headers = {"authorization": "Bearer ada", "x-forwarded-for": "192.0.2.7"}
    client = httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://shop", headers=headers)
    async with app.router.lifespan_context(app), client:
        for article in ("kettle", "unicorn"):
            print(article, (await client.post(f"/orders/{article}")).status_code)


if __name__ == "__main__":
    asyncio.run(main())
