"""How type checkers see events. Checked, never run: each `type: ignore` is an error that must be found.

mypy reports an ignore that hides nothing, and so does pyright by the line below: a check that is lost fails.
"""

# pyright: reportUnnecessaryTypeIgnoreComment=true

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from decimal import Decimal
from enum import Enum
from typing import Annotated, assert_type
from uuid import UUID

from whereupon import DomainEvent, EventDefinition, NotSecret, Outcome


class AuditAction(Enum):
    ORDERED = "ORDERED"


@dataclass(frozen=True, kw_only=True)
class OrderPlaced(DomainEvent):
    order_id: UUID
    amount: Decimal = Decimal(0)


class OrderPaid(
    DomainEvent,
    name="order.paid",
    version=2,
    aliases=("OrderSettled",),
    category="shop",
    audit=AuditAction.ORDERED,
    resource="order",
    resource_id="order_id",
    outcome=Outcome.SUCCEEDED,
    stands_alone=False,
):
    order_id: UUID
    lines: list[str] = field(default_factory=list)
    pin_count: Annotated[int, NotSecret("a number of pins")] = 0

    def audit_context(self) -> Mapping[str, object]:
        return {**super().audit_context(), "lines": len(self.lines)}


class AboutAnAccount(DomainEvent, abstract=True, category="account"):
    account_id: UUID


@dataclass(frozen=True, kw_only=True, slots=True)
class AccountOpened(AboutAnAccount):
    owner: str


def right_usage(order_id: UUID) -> None:
    event = OrderPlaced(order_id=order_id)
    assert_type(event, OrderPlaced)
    assert_type(event.order_id, UUID)
    assert_type(event.event_id, UUID)
    assert_type(event.occurred_at, datetime)
    assert_type(event.amount, Decimal)
    OrderPlaced(order_id=order_id, amount=Decimal(1), event_id=order_id, occurred_at=datetime.now(UTC))
    paid = OrderPaid(order_id=order_id, lines=["a"], pin_count=4)
    assert_type(paid.lines, list[str])
    assert_type(replace(paid, lines=[]), OrderPaid)
    assert_type(AccountOpened(account_id=order_id, owner="x").account_id, UUID)
    assert_type(OrderPaid.__event__, EventDefinition)
    assert_type(paid.__event__.outcome, Outcome)
    print(paid == replace(paid, lines=[]), hash(event), {event: paid})


def wrong_usage(order_id: UUID) -> None:
    OrderPlaced(order_id)  # type: ignore[call-arg]
    OrderPaid(order_id)  # type: ignore[call-arg]
    OrderPlaced()  # type: ignore[call-arg]
    OrderPaid()  # type: ignore[call-arg]
    OrderPlaced(order_id="5")  # type: ignore[arg-type]
    OrderPaid(order_id=order_id, lines=[5])  # type: ignore[list-item]
    OrderPlaced(order_id=order_id, colour="red")  # type: ignore[call-arg]
    OrderPlaced(order_id=order_id, occurred_at="now")  # type: ignore[arg-type]
    AccountOpened(owner="x")  # type: ignore[call-arg]
    event, paid = OrderPlaced(order_id=order_id), OrderPaid(order_id=order_id)
    event.order_id = order_id  # type: ignore[misc]
    paid.order_id = order_id  # type: ignore[misc]
    paid.occurred_at = datetime.now(UTC)  # type: ignore[misc]
    print(paid.colour)  # type: ignore[attr-defined]
    print(paid < paid)  # type: ignore[operator]
