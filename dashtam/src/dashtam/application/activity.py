"""Whether something happened that a page which is open should show."""

from collections.abc import Hashable
from typing import Final
from uuid import UUID

from dashtam.application.connections import ConnectionQueries
from dashtam.application.database import DatabaseProtocol
from dashtam.application.users import AuditTrail
from dashtam.domain.notification import NotificationInbox

RECORDS: Final = 50
"""So many audit records a page shows."""
NOTIFICATIONS: Final = 10


class Activity:
    """Tells what a page shows from what it showed before, without reading all of it.

    By the newest records themselves and not by the highest id: one that was committed late counts too.
    """

    def __init__(
        self,
        audit: AuditTrail,
        notifications: NotificationInbox,
        connections: ConnectionQueries,
        database: DatabaseProtocol,
    ) -> None:
        self._audit = audit
        self._notifications = notifications
        self._connections = connections
        self._database = database

    async def of_user(self, user_id: UUID) -> Hashable:
        """Equal as long as nothing happened to this user."""
        # handlers change these after the event that they react to was recorded
        connections = tuple((each.id, each.status, each.synced_at) for each in await self._connections.of_user(user_id))
        async with self._database.get_session():
            records = tuple(await self._audit.newest_ids(user_id, RECORDS))
            notifications = tuple(each.key for each in await self._notifications.of_user(user_id, NOTIFICATIONS))
        return connections, records, notifications

    async def of_everybody(self) -> Hashable:
        async with self._database.get_session():
            return tuple(await self._audit.newest_ids(None, RECORDS))
