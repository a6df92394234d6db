"""How type checkers see `whereupon.fastapi`. Checked, never run: each `type: ignore` is an error that must be found.

mypy reports an ignore that hides nothing, and so does pyright by the line below: a check that is lost fails.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from typing import Annotated, assert_type
from uuid import UUID

from fastapi import APIRouter, FastAPI
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request

from whereupon import DomainEvent, EventBus, EventBusProtocol, InMemoryEventBus, Receipt, acting_as
from whereupon.asgi import RequestContextMiddleware
from whereupon.fastapi import Bus, bus_of, in_transaction, install


class DoorPainted(DomainEvent):
    door: int


sessions = async_sessionmaker[AsyncSession]()
Session = Annotated[AsyncSession, in_transaction()]
OwnSession = Annotated[AsyncSession, in_transaction(sessions)]


def user_of(connection: HTTPConnection) -> UUID | None:
    return None


async def user_in_a_while(connection: HTTPConnection) -> UUID:
    return UUID(int=1)


def installing(api: FastAPI, plain: Starlette, durable: EventBus, memory: InMemoryEventBus, router: APIRouter) -> None:
    install(api, durable)
    install(plain, memory, trusted_proxies=["10.0.0.0/8"], actor=user_of)
    install(api, durable, actor=lambda connection: connection.headers.get("x-user"))
    plain.add_middleware(RequestContextMiddleware, trusted_proxies=(), actor=lambda scope: scope.get("user_id"))

    install(router, durable)  # type: ignore[arg-type]
    install(api, "sqlite+aiosqlite:///app.db")  # type: ignore[arg-type]
    install(api, durable, actor=user_in_a_while)  # type: ignore[arg-type]
    install(api, durable, trusted_proxies=5)  # type: ignore[arg-type]


def app_with_routes(app: FastAPI) -> None:
    @app.post("/doors/{door}")
    async def paint(door: int, bus: Bus, session: Session, own: OwnSession) -> None:
        assert_type(bus, EventBusProtocol)
        assert_type(session, AsyncSession)
        assert_type(own, AsyncSession)
        assert_type(await bus.publish(DoorPainted(door=door), session=session), Receipt)
        assert_type(bus.is_running, bool)
        await bus.publish(door)  # type: ignore[arg-type]
        bus.is_running = True  # type: ignore[misc]

    in_transaction(5)  # type: ignore[arg-type]


def acting(request: Request) -> None:
    assert_type(bus_of(request), EventBusProtocol)
    acting_as("ada")
    acting_as(5)
    acting_as(UUID(int=1))
    acting_as(None)
    acting_as(request.user)
    acting_as(b"ada")  # type: ignore[arg-type]
    acting_as()  # type: ignore[call-arg]
