"""A lighthouse, whose events and handlers the tests of the dashboard show."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from html.parser import HTMLParser
from typing import Any
from urllib.parse import urlencode

import httpx
from sqlalchemy.ext.asyncio import AsyncSession

from tests.notebook import Records
from whereupon import AuditEventHandler, DomainEvent, EventBus, Outcome, Retry, Workflow, request_metadata
from whereupon.dashboard import Dashboard, dashboard

HOSTILE = """<script>alert("'gotcha'")</script><img src=x onerror=alert(1)>"""


class ShipSighted(DomainEvent, audit="SHIP_SIGHTED", resource="ship", resource_id="name"):
    """A ship came into sight.

    From the tower, with or without a glass.
    """

    name: str
    wrecked: bool = False


class ShipMoored(DomainEvent):
    name: str


class FogRose(DomainEvent):
    metres: int


class ShipGuidingAttempted(DomainEvent, outcome=Outcome.ATTEMPTED):
    name: str


class ShipGuidingSucceeded(DomainEvent):
    name: str


class ShipGuidingFailed(DomainEvent, outcome=Outcome.FAILED):
    name: str
    reason: str


ShipGuiding = Workflow(ShipGuidingAttempted, ShipGuidingSucceeded, ShipGuidingFailed)


async def answer_signal(event: ShipSighted) -> None:
    if event.wrecked:
        raise LookupError(f"no answer from '{event.name}', {HOSTILE}")


async def keep_log(_: DomainEvent) -> None: ...


async def cast_off(_: ShipMoored) -> None: ...


@dataclass
class Lighthouse:
    bus: EventBus
    logger: Records
    role: Any = "actor"
    """What `authorize` gives."""
    board: Dashboard = field(init=False)
    client: httpx.AsyncClient = field(init=False)

    async def publish(self, *events: DomainEvent, **metadata: Any) -> None:
        with request_metadata(metadata):
            async with AsyncSession(self.bus.engine) as session, session.begin():
                await self.bus.publish(*events, session=session)

    async def wreck(self, *names: str) -> list[ShipSighted]:
        """Have deliveries to `answer_signal` die."""
        events = [ShipSighted(name=name, wrecked=True) for name in names]
        await self.publish(*events)
        await self.bus.wait_settled(events, 20)
        return events

    async def page(self, path: str, status: int = 200, **asked: object) -> str:
        response = await self.client.get(f"/{path}{'?' if asked else ''}{urlencode(asked)}")
        assert response.status_code == status, response.text
        return response.text

    async def token(self) -> str:
        """That the forms of this client carry."""
        return fields_in(await self.page("pause", name="answer_signal"))["form_token"]

    async def send(self, action: str, **fields: object) -> httpx.Response:
        """A form as a browser would send it."""
        return await self.client.post(f"/{action}", data={"form_token": await self.token(), **fields})


class _Fields(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, str] = {}

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        of = dict(attrs)
        if tag == "input" and of.get("name"):
            self.found[str(of["name"])] = of.get("value") or ""


def fields_in(page: str) -> dict[str, str]:
    """The inputs of a page with their values."""
    parser = _Fields()
    parser.feed(page)
    return parser.found


def lit(url: str, logger: Records, *, deliver: bool = True) -> EventBus:
    bus = EventBus(url, create_tables=True, deliver=deliver, poll_interval=0.05, logger=logger)
    bus.subscribe(ShipSighted, answer_signal, name="answer_signal", retry=Retry(max_attempts=1), within="30s")
    bus.subscribe(ShipMoored, cast_off, name="cast_off", ordered_by="name")
    bus.subscribe(DomainEvent, keep_log, name="keep_log")
    bus.register(AuditEventHandler())
    return bus


@asynccontextmanager
async def lighthouse(
    url: str, *, deliver: bool = True, made: Callable[[EventBus, Any], Dashboard] | None = None
) -> AsyncIterator[Lighthouse]:
    logger = Records()
    async with lit(url, logger, deliver=deliver) as bus:
        house = Lighthouse(bus, logger)

        def authorize(_: Any) -> Any:
            return house.role

        house.board = made(bus, authorize) if made is not None else dashboard(bus, authorize=authorize)
        transport = httpx.ASGITransport(app=house.board)
        async with httpx.AsyncClient(transport=transport, base_url="http://lighthouse") as client:
            house.client = client
            try:
                yield house
            finally:
                await house.board.close()
