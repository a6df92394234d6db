"""The audit trail: one row for each event that declares an audit action, in the transaction of what it tells."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from sqlalchemy import Connection, insert
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from whereupon.context import EventContext, Metadata
from whereupon.event import DomainEvent
from whereupon.schema import audit_log, without_nul
from whereupon.subscription import Delivery

__all__ = ["AuditEventHandler", "audit_log"]


class AuditEventHandler:
    """Writes the audit trail from each event's own declaration: `audit`, `resource`, `category`, `outcome`.

    `bus.register(AuditEventHandler())` is all it takes. On an `EventBus` its rows are written together with the log, so
    an audited event that commits has its row, and one that doesn't has none; the table refuses UPDATE and DELETE.
    On an `InMemoryEventBus` it writes in the publisher's session.
    """

    delivery = Delivery.IN_TRANSACTION

    async def handle(self, event: DomainEvent, context: EventContext, session: AsyncSession) -> None:
        row = self.prepare(event, context.metadata)
        if row is not None:
            await session.execute(insert(audit_log), [row])

    def prepare(self, event: DomainEvent, metadata: Metadata) -> dict[str, Any] | None:
        """The row of an event that is being published; the bus writes it with `record`."""
        return None if type(event).__event__.audit is None else _row(event, metadata)

    def record(self, connection: Connection, rows: Sequence[dict[str, Any]]) -> None:
        """Write rows in the connection's transaction; called by the bus just before the commit."""
        connection.execute(insert(audit_log), rows)


def _row(event: DomainEvent, metadata: Metadata) -> dict[str, Any]:
    definition = type(event).__event__
    user_id = getattr(event, "user_id", None)
    resource_id = getattr(event, definition.resource_id) if definition.resource_id is not None else None
    return {
        "id": uuid7(),
        "event_id": event.event_id,
        "event_type": definition.name,
        "action": definition.audit,
        "category": definition.category,
        "outcome": str(definition.outcome),
        "user_id": user_id if isinstance(user_id, UUID) else None,
        "resource_type": definition.resource,
        "resource_id": None if resource_id is None else without_nul(str(resource_id)),
        "context": without_nul(msgspec.to_builtins(dict(event.audit_context()), str_keys=True)),
        "actor": without_nul(metadata.actor),
        "ip_address": without_nul(metadata.ip_address),
        "user_agent": without_nul(metadata.user_agent),
        "correlation_id": metadata.correlation_id or event.event_id,
        "occurred_at": event.occurred_at,
        "recorded_at": datetime.now(UTC),
    }
