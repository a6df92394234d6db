"""The bank's customers: who they are, what they own and what they did, all of it made up from their names.

The same name has the same accounts, ids and history in every run. What happens later (`act`, `open`, `close`) is lost
when the bank ends.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from hashlib import sha256
from typing import Final, Literal, TypeVar, get_args

from dashtam_sandbox_bank.refusals import Refused

T = TypeVar("T")

AccountType = Literal["checking", "savings", "credit_card", "investment"]
Currency = Literal["EUR", "USD", "GBP", "JPY"]

CURRENCIES: Final[tuple[Currency, ...]] = get_args(Currency)
DECIMALS: Final[dict[Currency, int]] = {"EUR": 2, "USD": 2, "GBP": 2, "JPY": 0}
MOST_PEOPLE: Final = 1_000
MOST_ACCOUNTS: Final = 50
"""Of one person."""
MOST_TRANSACTIONS: Final = 10_000
"""Of one account."""

# Fixed, not "until now": a client that comes back after the bank was started anew finds what it knows.
_HISTORY_BEGINS = datetime(2025, 1, 1, tzinfo=UTC)
_HISTORY = timedelta(days=365)

_NAME = re.compile(r"\w[\w .'@+-]{0,99}")

_LABELS: Final[dict[AccountType, str]] = {
    "checking": "Everyday account",
    "savings": "Savings",
    "credit_card": "Credit card",
    "investment": "Investments",
}
# description, counterparty, smallest and largest amount in whole units; money comes in where they are positive
_HABITS: Final[dict[AccountType, tuple[tuple[str, str, int, int], ...]]] = {
    "checking": (
        ("Salary", "Northwind Works", 1_900, 3_600),
        ("Groceries", "Corner Market", -120, -8),
        ("Rent", "Hillside Homes", -1_100, -700),
        ("Coffee", "The Daily Bean", -12, -2),
        ("Train ticket", "City Railways", -90, -3),
        ("Refund", "Paper & Pen", 5, 60),
        ("Electricity", "Brightside Power", -140, -40),
    ),
    "savings": (
        ("Transfer from everyday account", "Own account", 50, 800),
        ("Interest", "Sandbox Bank", 1, 25),
        ("Transfer to everyday account", "Own account", -300, -20),
    ),
    "credit_card": (
        ("Restaurant", "Lemon & Thyme", -110, -15),
        ("Books", "Paper & Pen", -70, -6),
        ("Flight", "Kite Airways", -640, -80),
        ("Payment received", "Own account", 100, 900),
    ),
    "investment": (
        ("Bought world index fund", "Sandbox Brokerage", 80, 1_200),
        ("Dividend", "World Index Fund", 2, 90),
        ("Custody fee", "Sandbox Brokerage", -15, -1),
        ("Sold world index fund", "Sandbox Brokerage", -700, -50),
    ),
}


class UnusableName(Refused):
    """Nobody can be called that here."""

    def __init__(self) -> None:
        super().__init__(
            422,
            "invalid_name",
            "A name has 1 to 100 characters: letters, digits, blanks and . ' @ + - _, a letter or digit first.",
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class Transaction:
    id: str
    booked_at: datetime
    amount: Decimal
    currency: Currency
    description: str
    counterparty: str


@dataclass(kw_only=True, slots=True)
class Account:
    id: str
    number: int
    """Its place among the accounts of its owner."""
    name: str
    type: AccountType
    currency: Currency
    updated_at: datetime
    open: bool = True
    balance: Decimal = field(init=False)
    transactions: list[Transaction] = field(default_factory=list, repr=False)
    """The oldest first."""

    def __post_init__(self) -> None:
        self.balance = _amount(0, self.currency)

    def book(self, seed: str, at: datetime) -> Transaction:
        """Make up the next transaction. Raises `Refused` where there are `MOST_TRANSACTIONS`."""
        if len(self.transactions) >= MOST_TRANSACTIONS:
            raise Refused(
                409,
                "account_full",
                f"Account {self.id} has {MOST_TRANSACTIONS:,} transactions, the most it can have. Use another one.",
            )
        dice = _Dice(f"{seed}/{len(self.transactions)}")
        # the first one brings money in, so that not every history begins in debt
        habits = _HABITS[self.type]
        description, counterparty, least, most = habits[0] if not self.transactions else dice.choose(habits)
        unit = 10 ** DECIMALS[self.currency]
        worth = 100 if self.currency == "JPY" else 1
        minor = least * worth * unit + dice.below((most - least) * worth * unit + 1)
        if self.transactions:  # a clock that was set back does not change what is oldest
            at = max(at, self.transactions[-1].booked_at)
        transaction = Transaction(
            id=f"tx_{dice.label}",
            booked_at=at,
            amount=_amount(minor, self.currency),
            currency=self.currency,
            description=description,
            counterparty=counterparty,
        )
        self.transactions.append(transaction)
        self.balance += transaction.amount
        self.updated_at = max(self.updated_at, at)
        return transaction


class Person:
    def __init__(self, name: str, clock: Callable[[], datetime]) -> None:
        self.name = name
        self.accounts: list[Account] = []
        self._clock = clock
        dice = _Dice(name)
        home: Currency = dice.choose(CURRENCIES)
        for number in range(2 + dice.below(3)):
            kind: AccountType = tuple(_LABELS)[number]
            abroad = number > 0 and dice.below(4) == 0
            currency: Currency = home
            if abroad:
                currency = dice.choose(CURRENCIES)
            account = self._add(kind, currency, _LABELS[kind], _HISTORY_BEGINS)
            count = 40 + dice.below(161)
            step = _HISTORY / count
            for n in range(count):
                account.book(self._seed(account), _HISTORY_BEGINS + (n + dice.below(1_000) / 1_000) * step)

    def account(self, account_id: str) -> Account:
        """Raises `Refused` where this person has no such account."""
        for account in self.accounts:
            if account.id == account_id:
                return account
        raise Refused(404, "unknown_account", "There is no such account. GET /api/accounts lists those there are.")

    def act(self, count: int, account_id: str | None = None) -> list[tuple[Account, Transaction]]:
        """Book new transactions now, on one account or on each open one in turn."""
        candidates = [account for account in self.accounts if account.open]
        if account_id is not None:
            chosen = self.account(account_id)
            candidates = [chosen] if chosen.open else []
        if not candidates:
            raise Refused(
                409, "account_closed", f"No account to book on is open. POST /sandbox/people/{self.name}/accounts."
            )
        done: list[tuple[Account, Transaction]] = []
        for n in range(count):
            account = candidates[n % len(candidates)]
            done.append((account, account.book(self._seed(account), self._clock())))
        return done

    def open(self, kind: AccountType = "savings", currency: Currency | None = None, name: str | None = None) -> Account:
        """A new account, without a transaction."""
        if len(self.accounts) >= MOST_ACCOUNTS:
            reason = f"{self.name!r} has {MOST_ACCOUNTS} accounts, the most one can have. Use one of them."
            raise Refused(409, "too_many_accounts", reason)
        currency = currency or self.accounts[0].currency
        return self._add(kind, currency, name or f"{_LABELS[kind]} {len(self.accounts) + 1}", self._clock())

    def close(self, account_id: str) -> Account:
        """Closing it again changes nothing."""
        account = self.account(account_id)
        if account.open:
            account.open = False
            account.updated_at = max(account.updated_at, self._clock())
        return account

    def _add(self, kind: AccountType, currency: Currency, name: str, at: datetime) -> Account:
        number = len(self.accounts)
        label = _Dice(f"{self.name}/{number}").label
        account = Account(id=f"acc_{label}", number=number, name=name, type=kind, currency=currency, updated_at=at)
        self.accounts.append(account)
        return account

    def _seed(self, account: Account) -> str:
        return f"{self.name}/{account.number}"


class People:
    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._people: dict[str, Person] = {}

    def welcome(self, name: str) -> Person:
        """The person of this name, from now on if not before. Raises `UnusableName`, or `Refused` by a full bank."""
        name = _normal(name)
        person = self._people.get(name)
        if person is None:
            if _NAME.fullmatch(name) is None:
                raise UnusableName
            if len(self._people) >= MOST_PEOPLE:
                raise Refused(
                    503, "bank_full", f"There are {MOST_PEOPLE:,} people, the most there can be. Start the bank anew."
                )
            person = self._people[name] = Person(name, self._clock)
        return person

    def find(self, name: str) -> Person:
        """Raises `Refused` where nobody has that name."""
        person = self._people.get(_normal(name))
        if person is None:
            raise Refused(
                404,
                "unknown_person",
                "Nobody of this name has logged in. Log in at /oauth/authorize, or PUT /sandbox/people/{name}, first.",
            )
        return person

    def __iter__(self) -> Iterator[Person]:
        return iter(self._people.values())

    def __len__(self) -> int:
        return len(self._people)


class _Dice:
    """Numbers that depend on the seed alone, whichever Python is running."""

    def __init__(self, seed: str) -> None:
        digest = sha256(seed.encode()).digest()
        self.label = sha256(digest).hexdigest()[:20]
        self._seed = digest
        self._throws = 0

    def below(self, end: int) -> int:
        self._throws += 1
        thrown = sha256(self._seed + self._throws.to_bytes(4, "big")).digest()
        return int.from_bytes(thrown, "big") % end

    def choose(self, options: tuple[T, ...]) -> T:
        return options[self.below(len(options))]


def _normal(name: str) -> str:
    return unicodedata.normalize("NFC", name.strip())


def _amount(minor: int, currency: Currency) -> Decimal:
    return Decimal(minor).scaleb(-DECIMALS[currency])
