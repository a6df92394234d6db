"""Tells events which request they come from: one ASGI middleware, for any framework."""

from __future__ import annotations

import re
from collections.abc import Awaitable, Callable, Iterable, MutableMapping
from functools import partial
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Any, Final, TypeAlias
from uuid import UUID

from whereupon.context import Metadata, request_block

Scope: TypeAlias = MutableMapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[MutableMapping[str, Any]]]
Send: TypeAlias = Callable[[MutableMapping[str, Any]], Awaitable[None]]
Application: TypeAlias = Callable[[Scope, Receive, Send], Awaitable[None]]

_LONGEST_USER_AGENT: Final = 512
_MOST_PROXIES: Final = 32
_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-(?!0{32})([0-9a-f]{32})-(?!0{16})[0-9a-f]{16}-[0-9a-f]{2}(-.*)?")


class RequestContextMiddleware:
    """Events published while a request is served carry its IP address, user agent, trace and correlation id.

    The address is the peer's; only for a peer within `trusted_proxies` (networks in CIDR notation) is it taken from
    X-Forwarded-For, as the last entry there that is no trusted proxy itself. The trace id comes from a valid W3C
    `traceparent`, the correlation id from X-Correlation-ID or X-Request-ID where that is a UUID.

    `actor` is asked with the request's scope whenever an event is published, so it may look at what routes and
    middlewares inside have left there; what `acting_as` said comes first. Raises `ValueError` for a proxy that is no
    network.
    """

    def __init__(
        self,
        app: Application,
        trusted_proxies: Iterable[str] = (),
        actor: Callable[[Scope], str | int | UUID | None] | None = None,
    ) -> None:
        self._app = app
        self._actor = actor
        if isinstance(trusted_proxies, str):
            raise ValueError(f"trusted_proxies={trusted_proxies!r}: write trusted_proxies=({trusted_proxies!r},)")
        self._trusted = [_network(proxy) for proxy in trusted_proxies]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self._app(scope, receive, send)
            return
        with request_block(self._metadata(scope), None if self._actor is None else partial(self._actor, scope)):
            await self._app(scope, receive, send)

    def _metadata(self, scope: Scope) -> Metadata:
        headers: dict[bytes, list[str]] = {}
        for name, value in scope.get("headers") or ():
            headers.setdefault(name.lower(), []).append(value.decode("latin-1"))
        user_agent = _first(headers, b"user-agent")
        return Metadata(
            ip_address=self._address(scope, headers.get(b"x-forwarded-for", [])),
            user_agent=_printable(user_agent[:_LONGEST_USER_AGENT]) if user_agent else None,
            trace_id=_trace_id(headers.get(b"traceparent", [])),
            correlation_id=_uuid(_first(headers, b"x-correlation-id")) or _uuid(_first(headers, b"x-request-id")),
        )

    def _address(self, scope: Scope, forwarded: list[str]) -> str | None:
        client = scope.get("client")
        peer = _parsed(str(client[0])) if client else None
        if peer is None:
            return None
        if not self._is_trusted(peer):
            return str(peer)
        nearest = peer
        entries = [entry.strip() for entry in ",".join(forwarded).rsplit(",", _MOST_PROXIES)[-_MOST_PROXIES:]]
        for entry in reversed(list(filter(None, entries))):
            address = _parsed(entry)
            if address is None:
                break  # what stands left of garbage was vouched for by nobody
            nearest = address
            if not self._is_trusted(address):
                break
        return str(nearest)

    def _is_trusted(self, address: IPv4Address | IPv6Address) -> bool:
        return any(address.version == network.version and address in network for network in self._trusted)


def _network(proxy: str) -> IPv4Network | IPv6Network:
    try:
        return ip_network(proxy)
    except ValueError as error:
        raise ValueError(f"trusted_proxies has {proxy!r}: {error}. Write it as 10.0.0.0/8 or 10.0.0.1") from None


def _trace_id(headers: list[str]) -> str | None:
    """The trace id of a `traceparent` as W3C's Trace Context has it; version 00 ends after the flags."""
    found = _TRACEPARENT.fullmatch(headers[0]) if len(headers) == 1 else None
    if found is None or (found[1] == "00" and found[3] is not None):
        return None
    return found[2]


def _printable(text: str) -> str:
    return "".join(character if character.isprintable() else " " for character in text)


def _first(headers: dict[bytes, list[str]], name: bytes) -> str | None:
    return headers[name][0] if name in headers else None


def _uuid(text: str | None) -> UUID | None:
    try:
        return UUID(text) if text else None
    except ValueError:
        return None


def _parsed(text: str) -> IPv4Address | IPv6Address | None:
    """The address in `1.2.3.4`, `1.2.3.4:5678`, `::1` or `[::1]:5678`; None for anything else."""
    if text.startswith("["):
        text = text[1:].partition("]")[0]
    elif text.count(":") == 1:
        text = text.partition(":")[0]
    try:
        address = ip_address(text.partition("%")[0])  # a zone means something on its own machine only
    except ValueError:
        return None
    return address.ipv4_mapped or address if isinstance(address, IPv6Address) else address
