"""Notifications beyond the inbox: whatever channel Apprise knows an address for."""

import asyncio
from collections.abc import Sequence
from typing import Protocol

from pydantic import SecretStr

from dashtam.domain.notification import Notification


class NotDelivered(RuntimeError):
    """A channel did not take a notification. It may later."""


class Inbox(Protocol):
    async def notify(self, notification: Notification) -> bool: ...

    async def to_push(self, key: str) -> bool:
        """Whether it is in the inbox, and was not yet brought further."""
        ...

    async def pushed(self, key: str) -> None: ...


class AppriseNotifier:
    """Puts a notification into the inbox first, and then brings it to the given addresses.

    The inbox knows what was brought: sent again, a notification is brought further only if it was not. It may come
    twice where the process ends between the two.
    """

    def __init__(self, inbox: Inbox, urls: Sequence[SecretStr]) -> None:
        self._inbox = inbox
        self._urls = [url.get_secret_value() for url in urls]

    async def notify(self, notification: Notification) -> bool:
        await self._inbox.notify(notification)
        if not await self._inbox.to_push(notification.key):
            return False
        await asyncio.to_thread(self._push, notification)
        await self._inbox.pushed(notification.key)
        return True

    def _push(self, notification: Notification) -> None:
        import apprise  # takes a third of a second, and few have a channel

        channels = apprise.Apprise()
        for number, url in enumerate(self._urls, 1):
            if not channels.add(url):
                raise NotDelivered(
                    f"address {number} of DASHTAM_NOTIFICATION_URLS is none that Apprise knows a channel for"
                )
        if not channels.notify(title="Dashtam", body=notification.message, body_format=apprise.NotifyFormat.TEXT):
            raise NotDelivered(f"a channel did not take the notification {notification.key}")
