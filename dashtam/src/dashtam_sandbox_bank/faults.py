"""Faults and lies, switched on for one person at a time."""

import asyncio
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

from dashtam_sandbox_bank.refusals import Refused

Place = Literal["accounts", "transactions", "api", "token", "revoke"]
FaultStatus = Literal[401, 429, 500, 503]
LieKind = Literal[
    "float_amount", "nan", "huge", "unknown_currency", "missing_field", "not_json", "wrong_shape", "wrong_balance"
]

PLACES: Final[tuple[Place, ...]] = get_args(Place)
STATUSES: Final[tuple[FaultStatus, ...]] = get_args(FaultStatus)
LIES: Final[tuple[LieKind, ...]] = get_args(LieKind)

Times = Annotated[int, Field(ge=1, le=1_000_000)]


class Fault(BaseModel):
    """What goes wrong at one place; `api` is accounts and transactions both."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    at: Place
    status: FaultStatus | None = None
    """None: the right answer, after the delay."""
    retry_after: int | None = Field(default=None, ge=0, le=86_400)
    delay_seconds: float = Field(default=0, ge=0, le=60, allow_inf_nan=False)
    times: Times | None = None
    """How often; None: until it is ended."""

    @model_validator(mode="after")
    def _does_something(self) -> Self:
        if self.status is None and not self.delay_seconds:
            raise ValueError("a fault without status and delay_seconds does nothing: give one of them")
        if self.status is None and self.retry_after is not None:
            raise ValueError("retry_after goes with a status: give one, or leave it out")
        return self


class Lie(BaseModel):
    """An answer of status 200 that is not true, or not even an answer."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    lie: LieKind
    times: Times | None = None


def _kind(value: object) -> str:
    return "lie" if isinstance(value, Lie) or (isinstance(value, dict) and "lie" in value) else "fault"


FaultOrLie = Annotated[Annotated[Fault, Tag("fault")] | Annotated[Lie, Tag("lie")], Discriminator(_kind)]


@dataclass(slots=True)
class _Set:
    what: Fault | Lie
    left: int | None


class Faults:
    """Each person has one fault at each place, and one lie, at most."""

    def __init__(self) -> None:
        self._set: dict[str, dict[str, _Set]] = {}

    def put(self, name: str, what: Fault | Lie) -> None:
        """It takes the place of what was set there before."""
        slot = what.at if isinstance(what, Fault) else "lie"
        self._set.setdefault(name, {})[slot] = _Set(what, what.times)

    def end(self, name: str) -> None:
        self._set.pop(name, None)

    def of(self, name: str) -> list[Fault | Lie]:
        """Those still on; `times` is how often each of them is yet to come."""
        return [each.what.model_copy(update={"times": each.left}) for each in self._set.get(name, {}).values()]

    def take_fault(self, name: str, place: Place) -> Fault | None:
        for slot in (place, "api") if place in ("accounts", "transactions") else (place,):
            if (taken := self._take(name, slot)) is not None:
                assert isinstance(taken, Fault)
                return taken
        return None

    def take_lie(self, name: str, place: Place) -> LieKind | None:
        found = self._set.get(name, {}).get("lie")
        if found is None:
            return None
        assert isinstance(found.what, Lie)
        if found.what.lie == "wrong_balance" and place != "accounts":
            return None  # there is no balance to be wrong about
        self._take(name, "lie")
        return found.what.lie

    def _take(self, name: str, slot: str) -> Fault | Lie | None:
        sets = self._set.get(name, {})
        found = sets.get(slot)
        if found is None:
            return None
        if found.left is not None:
            found.left -= 1
            if found.left <= 0:
                del sets[slot]
                if not sets:
                    del self._set[name]
        return found.what


_ERRORS: Final[dict[FaultStatus, str]] = {
    401: "invalid_token",
    429: "too_many_requests",
    500: "server_error",
    503: "temporarily_unavailable",
}


async def suffer(fault: Fault | None) -> None:
    """Be as slow as the fault wants. Raises `Refused` with its status."""
    if fault is None:
        return
    if fault.delay_seconds:
        await asyncio.sleep(fault.delay_seconds)
    if fault.status is None:
        return
    error = _ERRORS[fault.status]
    headers = {}
    if fault.status == 401:
        scheme = "Basic" if fault.at in ("token", "revoke") else "Bearer"
        error = "invalid_client" if scheme == "Basic" else error
        headers["www-authenticate"] = f'{scheme} realm="sandbox bank", error="{error}"'
    if fault.retry_after is not None:
        headers["retry-after"] = str(fault.retry_after)
    raise Refused(fault.status, error, "A fault that was switched on in the sandbox.", headers=headers)


_HUGE = "9" * 40 + ".99"


def tell(lie: LieKind, page: dict[str, Any], listed: Literal["accounts", "transactions"]) -> Any:
    """The page as a bank with that disorder sends it; `not_json` is told by `NOT_JSON`."""
    items: list[dict[str, Any]] = page[listed]
    money = "balance" if listed == "accounts" else "amount"
    if lie == "wrong_shape":
        return items
    for item in items:
        if lie == "float_amount":
            item[money] = float(item[money])
        elif lie == "nan":
            item[money] = "NaN"
        elif lie == "huge":
            item[money] = _HUGE
        elif lie == "unknown_currency":
            item["currency"] = "QQQ"
        elif lie == "missing_field":
            del item[money]
        elif lie == "wrong_balance":
            item["balance"] = str(Decimal(item["balance"]) + 1)
    return page


NOT_JSON: Final = "<!doctype html><title>Maintenance</title><p>We are back soon."
