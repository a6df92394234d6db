"""Each attempt to register has one outcome, whoever publishes it."""

import asyncio
import contextlib

import msgspec
import pytest
from served import Served, eventually, served
from sqlalchemy import select

from whereupon.schema import log, workflow

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ADA = "ada@example.com"


async def attempts(dashtam: Served) -> list[str]:
    """Their states."""
    async with dashtam.bus.engine.connect() as connection:
        return list(await connection.scalars(select(workflow.c.state)))


async def outcomes(dashtam: Served) -> list[tuple[str, str | None]]:
    """What the log says of registrations; none may be open."""
    assert "open" not in await attempts(dashtam)
    async with dashtam.bus.engine.connect() as connection:
        rows = (await connection.execute(select(log.c.type, log.c.payload).order_by(log.c.position))).all()
    return [
        (row.type.removeprefix("UserRegistration"), msgspec.json.decode(row.payload).get("reason"))
        for row in rows
        if row.type.startswith("UserRegistration")
    ]


async def test_what_the_handler_publishes_is_the_outcome_of_the_attempt(database_url: str) -> None:
    async with served(database_url) as dashtam:
        assert (await dashtam.register(ADA)).status_code == 202
        assert (await dashtam.register(ADA)).status_code == 202
        assert await outcomes(dashtam) == [
            ("Attempted", None),
            ("Succeeded", None),
            ("Attempted", None),
            ("Failed", "email_taken"),
        ]


async def test_a_request_that_is_cancelled_comes_to_one_outcome(database_url: str) -> None:
    async with served(database_url) as dashtam:
        request = asyncio.create_task(dashtam.register(ADA))
        await eventually(lambda: attempts(dashtam))
        request.cancel()
        with contextlib.suppress(asyncio.CancelledError):  # it may have been answered before it could be cancelled
            await request

        async def closed() -> bool:
            return "open" not in await attempts(dashtam)

        await eventually(closed)
        found = [type_ for type_, _ in await outcomes(dashtam)]
        assert found in (["Attempted", "Succeeded"], ["Attempted", "Failed"])
