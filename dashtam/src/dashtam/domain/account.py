"""Accounts at banks, what was booked on them, and money."""

import re
from dataclasses import dataclass, field
from datetime import datetime
from decimal import Decimal
from enum import StrEnum
from typing import Final, Protocol
from uuid import UUID

from uuid_utils.compat import uuid7

from dashtam.domain.result import Error

# ISO 4217, without metals, funds and test codes: how many decimals the amounts of each currency have.
_DECIMALS: Final = {
    0: "BIF CLP DJF GNF ISK JPY KMF KRW PYG RWF UGX VND VUV XAF XOF XPF",
    2: "AED AFN ALL AMD ANG AOA ARS AUD AWG AZN BAM BBD BDT BGN BMD BND BOB BRL BSD BTN BWP BYN BZD CAD CDF CHF CNY "
    "COP CRC CUP CVE CZK DKK DOP DZD EGP ERN ETB EUR FJD FKP GBP GEL GHS GIP GMD GTQ GYD HKD HNL HTG HUF IDR ILS INR "
    "IRR JMD KES KGS KHR KPW KYD KZT LAK LBP LKR LRD LSL MAD MDL MGA MKD MMK MNT MOP MRU MUR MVR MWK MXN MYR MZN NAD "
    "NGN NIO NOK NPR NZD PAB PEN PGK PHP PKR PLN QAR RON RSD RUB SAR SBD SCR SDG SEK SGD SHP SLE SOS SRD SSP STN SVC "
    "SYP SZL THB TJS TMT TOP TRY TTD TWD TZS UAH USD UYU UZS VED VES WST XCD XCG YER ZAR ZMW ZWG",
    3: "BHD IQD JOD KWD LYD OMR TND",
}
DECIMALS: Final = {code: decimals for decimals, codes in _DECIMALS.items() for code in codes.split()}
LONGEST_AMOUNT: Final = 15
"""Digits before the point. No account has more, and everything that reads our events can hold as many."""

_AMOUNT = re.compile(r"-?([0-9]+)(?:\.([0-9]+))?")


class InvalidMoney(Error):
    """Not an amount of money. The message says why and never repeats it."""

    reason = "invalid_money"


class AccountNotFound(Error):
    """The user has no account of this id."""

    reason = "account_not_found"

    def __init__(self) -> None:
        super().__init__("There is no such account.")


class TransactionNotFound(Error):
    """The account has no transaction of this id."""

    reason = "transaction_not_found"

    def __init__(self) -> None:
        super().__init__("There is no such transaction on this account, so nothing after it. Begin without `after`.")


@dataclass(frozen=True, slots=True)
class Money:
    """An amount with all the decimals of its currency, and no more. Raises `InvalidMoney`."""

    amount: Decimal
    currency: str

    def __post_init__(self) -> None:
        amount: object = self.amount
        if not isinstance(amount, Decimal):
            raise InvalidMoney(f"an amount is a Decimal, and this is of type {type(amount).__name__}")
        decimals = DECIMALS.get(self.currency)
        if decimals is None:
            raise InvalidMoney("the currency is none of ISO 4217")
        if not amount.is_finite():
            raise InvalidMoney("the amount is not a finite number")
        if amount.adjusted() >= LONGEST_AMOUNT:
            raise InvalidMoney(f"the amount has more than {LONGEST_AMOUNT} digits before the point")
        exact = amount.quantize(Decimal(1).scaleb(-decimals))
        if exact != amount:
            raise InvalidMoney(f"the amount has more than the {decimals} decimals of its currency")
        object.__setattr__(self, "amount", exact if exact else abs(exact))  # there is no -0.00

    @classmethod
    def parse(cls, text: object, currency: object) -> "Money":
        """From what a bank wrote: text, as a number in JSON may have been through a float."""
        if not isinstance(currency, str):
            raise InvalidMoney("the currency is not text")
        if not isinstance(text, str):
            raise InvalidMoney("the amount is not text")
        found = _AMOUNT.fullmatch(text)
        if found is None:
            raise InvalidMoney('the amount is not written as "-1234.56"')
        if len(found[1]) > LONGEST_AMOUNT or len(found[2] or "") > LONGEST_AMOUNT:
            raise InvalidMoney(f"the amount has more than {LONGEST_AMOUNT} digits before or after the point")
        return cls(Decimal(text), currency)

    def __str__(self) -> str:
        return f"{self.amount} {self.currency}"


class AccountType(StrEnum):
    CHECKING = "checking"
    SAVINGS = "savings"
    CREDIT_CARD = "credit_card"
    INVESTMENT = "investment"


class AccountStatus(StrEnum):
    OPEN = "open"
    CLOSED = "closed"


@dataclass(frozen=True, slots=True, kw_only=True)
class ListedAccount:
    """An account as its bank lists it."""

    provider_account_id: str
    name: str
    type: AccountType
    balance: Money
    status: AccountStatus


@dataclass(slots=True, kw_only=True)
class Account:
    id: UUID = field(default_factory=uuid7)
    user_id: UUID
    connection_id: UUID
    provider_id: UUID
    provider_account_id: str
    name: str
    type: AccountType
    balance: Money
    status: AccountStatus = AccountStatus.OPEN
    updated_at: datetime
    """When something of it last changed here."""
    cursor: str | None = None
    """The bank's word for the place up to which we have the transactions."""
    complete: bool = False
    """Closed at the bank, and we have every transaction that there will ever be."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Transaction:
    id: UUID = field(default_factory=uuid7)
    account_id: UUID
    provider_transaction_id: str
    booked_at: datetime
    money: Money
    description: str
    counterparty: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionPage:
    transactions: list[Transaction]
    after: UUID | None
    """Where the next page begins, if there is one."""


class AccountRepository(Protocol):
    """Accounts as they are stored; each call joins the database session of its caller."""

    async def find_by_id(self, account_id: UUID, *, for_update: bool = False) -> Account | None:
        """`for_update`: nobody else changes it or its transactions until the caller's transaction ends."""
        ...

    async def of_user(self, user_id: UUID) -> list[Account]: ...

    async def of_connection(self, connection_id: UUID) -> list[Account]:
        """Whoever wants to change them has found the connection for update."""
        ...

    async def save(self, account: Account) -> None:
        """All of it but the cursor, which moves while an account is synced."""
        ...

    async def move_cursor(self, account: Account) -> None:
        """And whether it is complete."""
        ...


class TransactionRepository(Protocol):
    """Transactions as they are stored; each call joins the database session of its caller."""

    async def save(self, account: Account, transactions: list[Transaction]) -> int:
        """Those that the bank has named before are changed, the others added; returns how many were added.

        The account was found for update.
        """
        ...

    async def page(self, account_id: UUID, *, after: UUID | None, limit: int) -> TransactionPage:
        """The newest first. Raises `TransactionNotFound` for an `after` that is not on the account."""
        ...
