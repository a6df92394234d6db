"""Writer processes and worker processes side by side for some seconds: then everything is counted.

Each writer notes in its own transaction what it publishes, so what was committed is known from the database itself.
`make soak` lets it run for longer.
"""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from whereupon import EventBus

pytestmark = [pytest.mark.integration, pytest.mark.slow]

SECONDS = float(os.environ.get("WHEREUPON_SOAK", "4"))
"""For how long they write."""

APP = """
import asyncio, os, random, sys, time
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from whereupon import DomainEvent, EventBus

bus = EventBus(os.environ["DATABASE"], lease=5, poll_interval=0.05, deliver="writer" not in sys.argv)
sqlite = bus.engine.dialect.name == "sqlite"

class BarrelFilled(DomainEvent):
    cellar: str
    number: int

@bus.subscribe(BarrelFilled, name="once")
async def once(event: BarrelFilled, session: AsyncSession) -> None:
    await session.execute(
        text("INSERT INTO effect (of, cellar, number) VALUES ('once', :cellar, :number)"),
        {"cellar": event.cellar, "number": event.number},
    )

@bus.subscribe(BarrelFilled, name="ordered", ordered_by="cellar")
async def ordered(event: BarrelFilled, session: AsyncSession) -> None:
    await session.execute(
        text("INSERT INTO effect (of, cellar, number) VALUES ('ordered', :cellar, :number)"),
        {"cellar": event.cellar, "number": event.number},
    )

@bus.subscribe(BarrelFilled, name="batched", batch=20, concurrency=40)
async def batched(event: BarrelFilled, session: AsyncSession) -> None:
    await session.execute(
        text("INSERT INTO effect (of, cellar, number) VALUES ('batched', :cellar, :number)"),
        {"cellar": event.cellar, "number": event.number},
    )

@bus.subscribe(BarrelFilled, name="outside", concurrency=20)
async def outside(event: BarrelFilled) -> None:
    os.write(heard, f"{event.cellar} {event.number}\\n".encode())  # one call appends it as a whole

heard = os.open(os.environ["HEARD"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

async def write(cellar, until):
    chance, number = random.Random(cellar), 0
    while time.time() < until:
        async with AsyncSession(bus.engine) as session:
            # a row lock taken before publishing: transactions of one cellar keep their order
            await session.execute(text("UPDATE cellar SET barrels = barrels + 1 WHERE name = :name"), {"name": cellar})
            if not sqlite:
                await asyncio.sleep(chance.expovariate(200))
            made = []
            for _ in range(chance.randint(1, 4)):
                number += 1
                made.append(number)
                await bus.publish(BarrelFilled(cellar=cellar, number=number), session=session)
            savepoint = await session.begin_nested()
            await bus.publish(BarrelFilled(cellar=cellar, number=-number), session=session)
            await savepoint.rollback()
            if chance.random() < 0.1:
                await session.rollback()
                continue
            await session.execute(
                text("INSERT INTO fact VALUES (:cellar, :number)"), [{"cellar": cellar, "number": n} for n in made]
            )
            await session.commit()
        await asyncio.sleep(chance.expovariate(100))

async def main():
    async with bus:
        until = time.time() + float(os.environ["SECONDS"])
        await asyncio.gather(*(write(cellar, until) for cellar in sys.argv[2:]))

if __name__ == "__main__":
    asyncio.run(main())
"""

CELLARS = [["a", "b", "c"], ["d", "e", "f"]]
"""Of each writer process those that it writes for, one task each."""


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    bus = EventBus(database_url, create_tables=True, deliver=False)
    await bus.create_tables()
    async with bus.engine.begin() as connection:
        await connection.execute(text("CREATE TABLE cellar (name TEXT PRIMARY KEY, barrels INTEGER NOT NULL)"))
        await connection.execute(text("CREATE TABLE fact (cellar TEXT NOT NULL, number INTEGER NOT NULL)"))
        serial = "SERIAL" if bus.engine.dialect.name == "postgresql" else "INTEGER"
        columns = f"of TEXT NOT NULL, cellar TEXT NOT NULL, number INTEGER NOT NULL, ran {serial}"
        await connection.execute(text(f"CREATE TABLE effect ({columns})"))
        for cellar in [cellar for cellars in CELLARS for cellar in cellars]:
            await connection.execute(text("INSERT INTO cellar VALUES (:name, 0)"), {"name": cellar})
    yield bus
    await bus.engine.dispose()


@pytest.fixture
def processes() -> Iterator[list[subprocess.Popen[str]]]:
    running: list[subprocess.Popen[str]] = []
    yield running
    for process in running:
        process.kill()
        process.communicate()


async def counted(bus: EventBus, query: str) -> Counter[tuple[str, int]]:
    async with bus.engine.connect() as connection:
        return Counter((row[0], row[1]) for row in await connection.execute(text(query)))


async def effects(bus: EventBus) -> int:
    async with bus.engine.connect() as connection:
        return int(await connection.scalar(text("SELECT count(*) FROM effect")) or 0)


async def test_writers_and_workers_in_processes_of_their_own_lose_and_double_nothing(
    bus: EventBus, database_url: str, tmp_path: Path, processes: list[subprocess.Popen[str]]
) -> None:
    (tmp_path / "cellars.py").write_text(APP)
    heard = tmp_path / "heard"
    environment = {**os.environ, "DATABASE": database_url, "HEARD": str(heard), "SECONDS": str(SECONDS)}

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, *arguments], cwd=tmp_path, env=environment, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        processes.append(process)
        return process

    async with AsyncSession(bus.engine) as open_for_long:
        if bus.engine.dialect.name == "postgresql":  # it would hold SQLite's only write lock
            await open_for_long.execute(text("INSERT INTO fact VALUES ('open', 0)"))
        workers = [start("-m", "whereupon.cli", "worker", "cellars:bus") for _ in range(2)]
        writers = [start("cellars.py", "writer", *cellars) for cellars in CELLARS]
        for writer in writers:
            _, errors = await asyncio.to_thread(writer.communicate, timeout=SECONDS + 60)
            assert writer.returncode == 0, errors
        committed = await counted(bus, "SELECT cellar, number FROM fact")
        assert committed.total() > 100
        give_up = asyncio.get_running_loop().time() + 60 + 5 * SECONDS
        while (done := await effects(bus)) < 3 * committed.total():
            assert asyncio.get_running_loop().time() < give_up, f"{done} of {3 * committed.total()} effects are there"
            await asyncio.sleep(0.1)
        await open_for_long.rollback()
    for worker in workers:
        worker.terminate()
        _, errors = await asyncio.to_thread(worker.communicate, timeout=60)
        assert worker.returncode == 0, errors
    for name in ("once", "ordered", "batched"):
        assert await counted(bus, f"SELECT cellar, number FROM effect WHERE of = '{name}'") == committed
    lines = (line.split() for line in heard.read_text().splitlines())
    assert Counter((cellar, int(number)) for cellar, number in lines) == committed
    async with bus.engine.connect() as connection:
        order = "ran" if bus.engine.dialect.name == "postgresql" else "rowid"
        rows = await connection.execute(
            text(f"SELECT cellar, number FROM effect WHERE of = 'ordered' ORDER BY {order}")
        )
        ran: dict[str, list[int]] = {}
        for row in rows:
            ran.setdefault(row.cellar, []).append(row.number)
    assert ran == {cellar: sorted(numbers) for cellar, numbers in ran.items()}
