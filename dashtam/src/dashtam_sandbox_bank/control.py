"""What tests, the demo and a person who plays can make happen: /sandbox. Nobody has to log in for it."""

from typing import Annotated

from fastapi import APIRouter, Body, Depends
from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request

from dashtam_sandbox_bank.accounts_api import AccountShown, TransactionShown, show_account, show_transaction
from dashtam_sandbox_bank.bank import Bank
from dashtam_sandbox_bank.faults import Fault, FaultOrLie, Lie
from dashtam_sandbox_bank.grants import TokenKind
from dashtam_sandbox_bank.people import AccountType, Currency, Person
from dashtam_sandbox_bank.refusals import Refused


class PersonShown(BaseModel):
    name: str
    accounts: list[AccountShown]
    grants: int
    """How many clients they allow to see their accounts, each consent counted."""
    faults: list[Fault | Lie]


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Activity(Strict):
    transactions: int = Field(ge=1, le=500)
    account_id: str | None = Field(default=None, max_length=100)
    """None: each open account in turn."""


class NewAccount(Strict):
    type: AccountType = "savings"
    currency: Currency | None = None
    """None: that of the first account."""
    name: str | None = Field(default=None, min_length=1, max_length=100, pattern=r"^[^\x00-\x1f\x7f]+$")


class Booked(BaseModel):
    account_id: str
    transaction: TransactionShown


class Ended(BaseModel):
    ended: int


def _not_from_elsewhere(request: Request) -> None:
    """A page of another site can't press these buttons in a person's browser."""
    if request.headers.get("sec-fetch-site", "none") not in ("none", "same-origin"):
        raise Refused(403, "cross_site", "Another site asked your browser for this. Ask from here, or from a program.")


def control_routes(bank: Bank) -> APIRouter:
    routes = APIRouter(prefix="/sandbox/people", tags=["sandbox"], dependencies=[Depends(_not_from_elsewhere)])

    @routes.get("")
    async def list_people() -> list[PersonShown]:
        return [show_person(bank, person) for person in bank.people]

    @routes.put("/{name}")
    async def welcome(name: str) -> PersonShown:
        """Let somebody be known who has not logged in yet."""
        return show_person(bank, bank.people.welcome(name))

    @routes.get("/{name}")
    async def show(name: str) -> PersonShown:
        return show_person(bank, bank.people.find(name))

    @routes.get("/{name}/faults")
    async def list_faults(name: str) -> list[Fault | Lie]:
        return bank.faults.of(bank.people.find(name).name)

    @routes.put("/{name}/faults")
    async def put_fault(name: str, fault: Annotated[FaultOrLie, Body()]) -> list[Fault | Lie]:
        """In the place of what was set at the same place before; the answer is all that is set."""
        person = bank.people.find(name)
        bank.faults.put(person.name, fault)
        return bank.faults.of(person.name)

    @routes.delete("/{name}/faults", status_code=204)
    async def end_faults(name: str) -> None:
        bank.faults.end(bank.people.find(name).name)

    @routes.post("/{name}/refresh-token/expire")
    async def expire_refresh_token(name: str) -> Ended:
        return Ended(ended=expire(bank, bank.people.find(name), "refresh"))

    @routes.post("/{name}/access-token/expire")
    async def expire_access_token(name: str) -> Ended:
        return Ended(ended=expire(bank, bank.people.find(name), "access"))

    @routes.post("/{name}/grant/revoke")
    async def revoke_grant(name: str) -> Ended:
        return Ended(ended=revoke(bank, bank.people.find(name)))

    @routes.post("/{name}/activity")
    async def act(name: str, activity: Activity) -> list[Booked]:
        booked = bank.people.find(name).act(activity.transactions, activity.account_id)
        return [Booked(account_id=account.id, transaction=show_transaction(done)) for account, done in booked]

    @routes.post("/{name}/accounts", status_code=201)
    async def open_account(name: str, wanted: NewAccount | None = None) -> AccountShown:
        wanted = wanted or NewAccount()
        return show_account(bank.people.find(name).open(wanted.type, wanted.currency, wanted.name))

    @routes.post("/{name}/accounts/{account_id}/close")
    async def close_account(name: str, account_id: str) -> AccountShown:
        return show_account(bank.people.find(name).close(account_id))

    return routes


def show_person(bank: Bank, person: Person) -> PersonShown:
    return PersonShown(
        name=person.name,
        accounts=[show_account(account) for account in person.accounts],
        grants=len(bank.grants.of(person.name)),
        faults=bank.faults.of(person.name),
    )


def expire(bank: Bank, person: Person, kind: TokenKind) -> int:
    _need_grant(bank, person)
    return bank.grants.expire(person.name, kind)


def revoke(bank: Bank, person: Person) -> int:
    _need_grant(bank, person)
    grants = bank.grants.of(person.name)
    for grant in grants:
        bank.grants.revoke(grant)
    return len(grants)


def _need_grant(bank: Bank, person: Person) -> None:
    if not bank.grants.of(person.name):
        raise Refused(
            409, "no_grant", f"{person.name!r} allows nobody anything at the moment. Consent at /oauth/authorize first."
        )
