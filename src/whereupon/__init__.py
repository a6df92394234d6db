"""Domain events for asyncio services: published in your transaction, delivered whereupon it commits."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, Final

from whereupon.bus import EventBusProtocol, Receipt
from whereupon.codec import Codec, JsonCodec
from whereupon.context import EventContext, Metadata, acting_as, current_metadata, request_metadata
from whereupon.errors import (
    ActionRefused,
    BusStateError,
    DatabaseError,
    DatabaseUnavailableError,
    Discard,
    DuplicateSubscriptionError,
    EventDecodingError,
    EventDefinitionError,
    EventEncodingError,
    ForeignClusterError,
    ForeignSessionError,
    HandlerSessionError,
    HandlerTimeout,
    LeaseLost,
    PublishError,
    RetryLater,
    SchemaError,
    SessionRequiredError,
    SubscriptionConflictError,
    SubscriptionError,
    UnknownEventError,
    UnsupportedDatabaseError,
    WhereuponError,
    WorkflowClosedError,
)
from whereupon.event import DomainEvent, EventDefinition, NotSecret, Outcome
from whereupon.logs import LoggingEventHandler
from whereupon.memory import InMemoryEventBus
from whereupon.subscription import Delivery, Retry, Subscription
from whereupon.workflow import Attempt, Workflow

if TYPE_CHECKING:
    from whereupon.action import Action, DeadLetter, HandlerState, Operator
    from whereupon.audit import AuditEventHandler
    from whereupon.durable import EventBus
    from whereupon.store import DeliveryState

__all__ = [
    "Action",
    "ActionRefused",
    "Attempt",
    "AuditEventHandler",
    "BusStateError",
    "Codec",
    "DatabaseError",
    "DatabaseUnavailableError",
    "DeadLetter",
    "Delivery",
    "DeliveryState",
    "Discard",
    "DomainEvent",
    "DuplicateSubscriptionError",
    "EventBus",
    "EventBusProtocol",
    "EventContext",
    "EventDecodingError",
    "EventDefinition",
    "EventDefinitionError",
    "EventEncodingError",
    "ForeignClusterError",
    "ForeignSessionError",
    "HandlerSessionError",
    "HandlerState",
    "HandlerTimeout",
    "InMemoryEventBus",
    "JsonCodec",
    "LeaseLost",
    "LoggingEventHandler",
    "Metadata",
    "NotSecret",
    "Operator",
    "Outcome",
    "PublishError",
    "Receipt",
    "Retry",
    "RetryLater",
    "SchemaError",
    "SessionRequiredError",
    "Subscription",
    "SubscriptionConflictError",
    "SubscriptionError",
    "UnknownEventError",
    "UnsupportedDatabaseError",
    "WhereuponError",
    "Workflow",
    "WorkflowClosedError",
    "acting_as",
    "current_metadata",
    "request_metadata",
]


_LAZY: Final = {
    "EventBus": "durable",
    "AuditEventHandler": "audit",
    "DeliveryState": "store",
    **dict.fromkeys(("Action", "DeadLetter", "HandlerState", "Operator"), "action"),
}


if not TYPE_CHECKING:  # to a type checker every name would be one of this module's

    def __getattr__(name: str) -> Any:
        """Load what needs SQLAlchemy when it is first asked for."""
        module = _LAZY.get(name)
        if module is None:
            raise AttributeError(f"module 'whereupon' has no attribute {name!r}")
        return getattr(importlib.import_module(f"whereupon.{module}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
