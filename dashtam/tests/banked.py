"""Dashtam beside the sandbox bank, and what a person does at both."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any
from unittest.mock import patch
from urllib.parse import parse_qs, urlsplit

import httpx
import msgspec
from bank_visitor import sealed
from served import MailServer, Person, Served, eventually, served
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from dashtam.application import bank
from dashtam.infrastructure.tables import AccountModel, TransactionModel
from dashtam_sandbox_bank import Bank, BankSettings, create_bank
from whereupon.schema import log, workflow

CALLBACK = "http://127.0.0.1:8000/connect/callback"


@dataclass
class Clock:
    """The time on the wall, and as much later as a test says."""

    later: timedelta = field(default_factory=timedelta)

    def __call__(self) -> datetime:
        return datetime.now(UTC) + self.later

    def advance(self, **delta: float) -> None:
        self.later += timedelta(**delta)


class Wire(httpx.AsyncBaseTransport):
    """Counts what goes over it; an answer that is `cut` does not arrive, one that is `held` only once it is let go."""

    def __init__(self, inner: httpx.AsyncBaseTransport) -> None:
        self.inner = inner
        self.requests: list[httpx.Request] = []
        self.cut: list[str] = []
        """Paths whose next answer gets lost, after the bank has done as it was asked."""
        self.held: dict[str, asyncio.Event] = {}
        """Paths whose next answer waits."""

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        response = await self.inner.handle_async_request(request)
        if (let_go := self.held.pop(request.url.path, None)) is not None:
            await let_go.wait()
        if request.url.path in self.cut:
            self.cut.remove(request.url.path)
            raise httpx.ReadError("the line went dead")
        return response

    def asked(self, path: str) -> int:
        return sum(path in request.url.path for request in self.requests)


@dataclass
class Banked:
    dashtam: Served
    bank: Bank
    at_bank: httpx.AsyncClient
    """A browser, and whoever plays with the bank."""
    wire: Wire
    clock: Clock

    async def consent(self, url: str, name: str = "Ada", decision: str = "allow") -> dict[str, str]:
        """What the bank sends the browser back with."""
        page = await self.at_bank.get(url)
        form = {"seal": sealed(page), "name": name, "password": "sandbox", "decision": decision}
        answer = await self.at_bank.post(url, data=form)
        assert answer.status_code == 303, answer.text
        location = urlsplit(answer.headers["location"])
        assert location._replace(query="").geturl() == CALLBACK
        back = {key: values[0] for key, values in parse_qs(location.query).items()}
        return {key: back[key] for key in ("state", "code", "error") if key in back}

    async def start(self, person: Person) -> str:
        answer = await person("POST", "/connections", json={"provider_name": "sandbox"})
        assert answer.status_code == 201, answer.text
        url: str = answer.json()["authorization_url"]
        return url

    async def connect(self, person: Person, name: str = "Ada") -> str:
        """The connection's id."""
        back = await self.consent(await self.start(person), name)
        answer = await person("POST", "/connections/callback", json=back)
        assert answer.status_code == 201, answer.text
        connection_id: str = answer.json()["id"]
        return connection_id

    async def connected(self, person: Person, name: str = "Ada") -> str:
        """As `connect`, with everything fetched."""
        before = await self.count("TransactionSyncSucceeded")
        connection_id = await self.connect(person, name)
        accounts = self.bank.people.find(name).accounts
        await self.until("TransactionSyncSucceeded", before + sum(account.open for account in accounts))
        return connection_id

    async def fault(self, name: str = "Ada", **fault: Any) -> None:
        answer = await self.at_bank.put(f"/sandbox/people/{name}/faults", json=fault)
        assert answer.status_code == 200, answer.text

    async def tell(self, what: str, person: str = "Ada", **body: Any) -> Any:
        answer = await self.at_bank.post(f"/sandbox/people/{person}/{what}", json=body or None)
        assert answer.is_success, answer.text
        return answer.json()

    async def sync(self, person: Person, connection_id: str, name: str = "Ada") -> None:
        """A sync that a user asks for, with all transactions of all accounts that were open at its beginning."""
        before = await self.count("AccountSyncSucceeded"), await self.count("TransactionSyncSucceeded")
        async with self.dashtam.application.database.get_session() as session:
            ours = await session.scalars(
                select(AccountModel.provider_account_id).where(
                    AccountModel.status == "open", AccountModel.user_id == person.user_id
                )
            )
            fetched = set(ours) | {account.id for account in self.bank.people.find(name).accounts if account.open}
        assert (await person("POST", f"/connections/{connection_id}/sync")).status_code == 202
        await self.until("AccountSyncSucceeded", before[0] + 1)
        await self.until("TransactionSyncSucceeded", before[1] + len(fetched))

    async def count(self, event: str) -> int:
        async with self.dashtam.bus.engine.connect() as connection:
            return await connection.scalar(select(func.count()).where(log.c.type == event)) or 0

    async def until(self, event: str, count: int = 1) -> None:
        """Until it was published so often."""

        async def look() -> bool:
            return await self.count(event) >= count

        await eventually(look)
        assert await self.count(event) == count

    async def reasons(self, event: str) -> list[str]:
        async with self.dashtam.bus.engine.connect() as connection:
            rows = await connection.scalars(select(log.c.payload).where(log.c.type == event).order_by(log.c.position))
            return [msgspec.json.decode(row)["reason"] for row in rows]

    async def open_attempts(self) -> int:
        async with self.dashtam.bus.engine.connect() as connection:
            return await connection.scalar(select(func.count()).where(workflow.c.state == "open")) or 0

    async def transactions(self, session: AsyncSession) -> dict[str, list[tuple[str, str]]]:
        """Of each of the bank's accounts: id at the bank and amount, the oldest first."""
        found: dict[str, list[tuple[str, str]]] = {}
        rows = await session.execute(
            select(AccountModel.provider_account_id, TransactionModel.provider_transaction_id, TransactionModel.amount)
            .join(TransactionModel, TransactionModel.account_id == AccountModel.id)
            .order_by(TransactionModel.booked_at, TransactionModel.id)
        )
        for account_id, transaction_id, amount in rows:
            found.setdefault(account_id, []).append((transaction_id, str(amount)))
        return found

    async def assert_same_as_bank(self, name: str = "Ada") -> None:
        """Nothing twice, nothing lost, every amount to the last digit."""
        async with self.dashtam.application.database.get_session() as session:
            ours = await self.transactions(session)
            accounts = {
                row.provider_account_id: (str(row.balance), row.currency, row.status)
                for row in await session.scalars(select(AccountModel))
            }
        theirs = self.bank.people.find(name).accounts
        assert ours == {
            account.id: [(each.id, f"{each.amount:f}") for each in account.transactions]
            for account in theirs
            if account.transactions
        }
        assert accounts == {
            account.id: (f"{account.balance:f}", account.currency, "open" if account.open else "closed")
            for account in theirs
        }


@asynccontextmanager
async def impatient() -> AsyncIterator[None]:
    """A bank that failed is asked again soon, unless it has said when."""
    with patch.object(bank, "FIRST_PAUSE", timedelta(milliseconds=100)):
        yield


@asynccontextmanager
async def banked(database_url: str, mail: MailServer | None = None, **settings: Any) -> AsyncIterator[Banked]:
    clock = Clock()
    app = create_bank(BankSettings(redirect_uris=(CALLBACK,)), clock=clock)
    wire = Wire(httpx.ASGITransport(app))
    async with (
        impatient(),
        served(database_url, mail, parts={"bank_transport": wire, "clock": clock}, **settings) as dashtam,
        httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://127.0.0.1:8100") as at_bank,
    ):
        yield Banked(dashtam, app.state.bank, at_bank, wire, clock)
