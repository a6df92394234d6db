"""What a request leaves for the events that are published while it is served."""

from __future__ import annotations

import asyncio
from collections.abc import Iterable
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whereupon import DomainEvent, EventContext, InMemoryEventBus, Metadata, request_metadata
from whereupon.asgi import RequestContextMiddleware, Scope
from whereupon.context import NO_METADATA, metadata_for

pytestmark = pytest.mark.unit

TRUSTED = ("10.0.0.0/8", "fd00::/8")
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
REQUEST_ID = UUID("12345678-1234-5678-1234-567812345678")


class PageRequested(DomainEvent):
    number: int


async def receive() -> dict[str, Any]:
    raise AssertionError("nobody reads the body")


async def send(message: Any) -> None:
    raise AssertionError("nobody answers")


async def served(
    *headers: tuple[bytes, bytes],
    client: Any = ("10.0.0.1", 5000),
    trusted: Iterable[str] = TRUSTED,
    kind: str = "http",
) -> Metadata:
    """The metadata that an event would have while a request with these headers is served."""
    found: list[Metadata] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        found.append(metadata_for(None))

    await RequestContextMiddleware(app, trusted_proxies=trusted)(
        {"type": kind, "headers": list(headers), "client": client}, receive, send
    )
    (metadata,) = found
    return metadata


async def address(forwarded: bytes, **options: Any) -> str | None:
    return (await served((b"x-forwarded-for", forwarded), **options)).ip_address


@pytest.mark.parametrize("kind", ["http", "websocket"])
async def test_an_event_carries_what_the_request_says(kind: str) -> None:
    metadata = await served(
        (b"User-Agent", b"curl/8"),
        (b"traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode()),
        (b"x-request-id", str(REQUEST_ID).encode()),
        client=("192.0.2.7", 5000),
        kind=kind,
    )
    assert metadata == Metadata(
        ip_address="192.0.2.7", user_agent="curl/8", trace_id=TRACE, correlation_id=REQUEST_ID
    )  # fmt: skip


async def test_nothing_is_left_once_the_request_is_served() -> None:
    await served()
    assert metadata_for(None) == NO_METADATA

    async def broken(scope: Scope, receive: Any, send: Any) -> None:
        raise LookupError("gone")

    with pytest.raises(LookupError, match="gone"):
        await RequestContextMiddleware(broken)({"type": "http", "headers": [], "client": None}, receive, send)
    assert metadata_for(None) == NO_METADATA


async def test_the_lifespan_passes_untouched() -> None:
    scope: Scope = {"type": "lifespan", "asgi": {}}
    seen: list[tuple[Any, ...]] = []

    async def app(*arguments: Any) -> None:
        seen.append((*arguments, metadata_for(None)))

    await RequestContextMiddleware(app)(scope, receive, send)
    assert seen == [(scope, receive, send, NO_METADATA)]
    assert seen[0][0] is scope


# The address


@pytest.mark.parametrize(
    ("client", "told"),
    [
        (("192.0.2.7", 5000), "192.0.2.7"),
        (["192.0.2.7", 5000], "192.0.2.7"),
        (("2001:DB8:0::1", 5000), "2001:db8::1"),
        (("::ffff:192.0.2.7", 5000), "192.0.2.7"),
        (("fe80::1%eth0", 5000), "fe80::1"),
        (("testclient", 5000), None),
        (("", 0), None),
        (None, None),
    ],
)
async def test_the_address_is_that_of_the_peer(client: Any, told: str | None) -> None:
    assert (await served(client=client)).ip_address == told


async def test_a_peer_that_is_no_trusted_proxy_is_not_believed() -> None:
    assert await address(b"192.0.2.7", client=("203.0.113.5", 1)) == "203.0.113.5"
    assert await address(b"192.0.2.7", trusted=()) == "10.0.0.1"
    assert await address(b"192.0.2.7", client=None) is None


@pytest.mark.parametrize(
    ("forwarded", "told"),
    [
        (b"192.0.2.7", "192.0.2.7"),
        (b"192.0.2.7:4711", "192.0.2.7"),
        (b" 192.0.2.7 ", "192.0.2.7"),
        (b"2001:db8::7", "2001:db8::7"),
        (b"[2001:db8::7]", "2001:db8::7"),
        (b"[2001:db8::7]:4711", "2001:db8::7"),
        (b"::ffff:192.0.2.7", "192.0.2.7"),
        (b"fe80::1%\xff\x00anything", "fe80::1"),
        (b"192.0.2.7, 10.0.0.3, 10.0.0.2", "192.0.2.7"),
        (b"192.0.2.7, fd00::5", "192.0.2.7"),
        (b"6.6.6.6, 192.0.2.7", "192.0.2.7"),  # what a client writes itself stands further left
        (b"6.6.6.6, 192.0.2.7, 10.0.0.2", "192.0.2.7"),
        (b"10.0.0.9, 10.0.0.8", "10.0.0.9"),
        (b"192.0.2.7,", "192.0.2.7"),
        (b"192.0.2.7, , ,10.0.0.2,,", "192.0.2.7"),
        (b"192.0.2.7, unknown", "10.0.0.1"),  # left of what can't be read is what nobody vouches for
        (b"192.0.2.7, garbage, 10.0.0.2", "10.0.0.2"),
        (b"garbage, 192.0.2.7", "192.0.2.7"),
        (b"", "10.0.0.1"),
        (b",,,", "10.0.0.1"),
        (b"\xff\x00", "10.0.0.1"),
        (b"1.2.3", "10.0.0.1"),
        (b"0x7f000001", "10.0.0.1"),
        (b"192.0.2.007", "10.0.0.1"),
        (b"6.6.6.6," + b"10.0.0.2," * 100_000, "10.0.0.2"),
    ],
)  # fmt: skip
async def test_behind_a_proxy_it_is_the_last_address_that_is_no_proxy(forwarded: bytes, told: str) -> None:
    assert await address(forwarded) == told


async def test_several_headers_are_one_list() -> None:
    metadata = await served((b"x-forwarded-for", b"6.6.6.6"), (b"X-Forwarded-For", b"192.0.2.7, 10.0.0.2"))
    assert metadata.ip_address == "192.0.2.7"


@pytest.mark.parametrize(
    ("trusted", "told"),
    [
        ("10.0.0.0/8", r"write trusted_proxies=\('10\.0\.0\.0/8',\)"),
        (["proxy.local"], r"trusted_proxies has 'proxy\.local': .*Write it as 10\.0\.0\.0/8 or 10\.0\.0\.1"),
        (["10.0.0.1/8"], r"has '10\.0\.0\.1/8': .*host bits"),
        (["10.0.0.0/33"], "10"),
        ([""], "trusted_proxies has ''"),
    ],
)
def test_a_proxy_that_is_no_network_is_refused(trusted: Any, told: str) -> None:
    async def app(scope: Scope, receive: Any, send: Any) -> None: ...

    with pytest.raises(ValueError, match=told):
        RequestContextMiddleware(app, trusted_proxies=trusted)


# The other headers


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (f"00-{TRACE}-00f067aa0ba902b7-00", TRACE),
        (f"cc-{TRACE}-00f067aa0ba902b7-01-what-the-future-will-be-like", TRACE),
        (f"00-{TRACE}-00f067aa0ba902b7-01-extra", None),
        (f"ff-{TRACE}-00f067aa0ba902b7-01", None),
        (f"00-{'0' * 32}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-{'0' * 16}-01", None),
        (f"00-{TRACE.upper()}-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-00f067aa0ba902b7", None),
        (f"00-{TRACE}x-00f067aa0ba902b7-01", None),
        (f"00-{TRACE}-00f067aa0ba902b7-01\n", None),
        ("", None),
        ("x" * 100_000, None),
    ],
)
async def test_a_trace_id_is_taken_from_a_valid_traceparent_only(header: str, told: str | None) -> None:
    assert (await served((b"traceparent", header.encode()))).trace_id == told


async def test_two_traceparents_are_none() -> None:
    header = (b"traceparent", f"00-{TRACE}-00f067aa0ba902b7-01".encode())
    assert (await served(header, header)).trace_id is None


@pytest.mark.parametrize(
    ("headers", "told"),
    [
        ({b"x-correlation-id": str(REQUEST_ID)}, REQUEST_ID),
        ({b"x-request-id": REQUEST_ID.hex}, REQUEST_ID),
        ({b"x-correlation-id": str(REQUEST_ID), b"x-request-id": str(UUID(int=1))}, REQUEST_ID),
        ({b"x-correlation-id": "order-5", b"x-request-id": str(REQUEST_ID)}, REQUEST_ID),
        ({b"x-request-id": "order-5"}, None),
        ({b"x-request-id": ""}, None),
        ({b"x-request-id": "1" * 100_000}, None),
        ({b"x-request-id": "\xff\x00"}, None),
    ],
)
async def test_a_correlation_id_is_taken_where_it_is_a_uuid(headers: dict[bytes, str], told: UUID | None) -> None:
    metadata = await served(*((name, value.encode("latin-1")) for name, value in headers.items()))
    assert metadata.correlation_id == told


@pytest.mark.parametrize(
    ("header", "told"),
    [
        (b"Mozilla/5.0 (X11)", "Mozilla/5.0 (X11)"),
        (b"caf\xe9", "caf\xe9"),
        (b"a\0b\x1b[31m\r\nc", "a b [31m  c"),
        (b"", None),
        (b"x" * 1_000_000, "x" * 512),
    ],
)
async def test_a_user_agent_is_cut_and_holds_no_control_characters(header: bytes, told: str | None) -> None:
    assert (await served((b"user-agent", header))).user_agent == told


NAMES = [b"user-agent", b"x-forwarded-for", b"traceparent", b"x-request-id", b"x-correlation-id", b"Host"]


@given(st.lists(st.tuples(st.sampled_from(NAMES), st.binary()), max_size=6), st.text() | st.none())
def test_no_header_breaks_a_request(headers: list[tuple[bytes, bytes]], peer: str | None) -> None:
    for client in (("10.0.0.1", 1), None if peer is None else (peer, 1)):
        metadata = asyncio.run(served(*headers, client=client))
        assert len(metadata.user_agent or "") <= 512


async def test_who_is_acting_is_asked_when_an_event_is_published() -> None:
    found: list[str | None] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        found.append(metadata_for(None).actor)
        scope["user"] = "ada"
        found.append(metadata_for(None).actor)
        with request_metadata({"ip_address": "192.0.2.7"}):
            found.append(metadata_for(None).actor)

    middleware = RequestContextMiddleware(app, actor=lambda scope: scope.get("user"))
    await middleware({"type": "http"}, receive, send)
    assert found == [None, "ada", "ada"]


async def test_a_scope_without_headers_or_client_is_served() -> None:
    found: list[Metadata] = []

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        found.append(metadata_for(None))

    await RequestContextMiddleware(app)({"type": "http"}, receive, send)
    assert found == [NO_METADATA]


async def test_concurrent_requests_are_never_mixed() -> None:
    bus, seen = InMemoryEventBus(), list[tuple[int, str | None, str | None]]()

    @bus.subscribe(PageRequested)
    async def note(event: PageRequested, context: EventContext) -> None:
        await asyncio.sleep(0.001 * (event.number % 3))
        seen.append((event.number, context.ip_address, context.user_agent))

    async def app(scope: Scope, receive: Any, send: Any) -> None:
        number = scope["number"]
        await asyncio.sleep(0.001 * (number % 7))
        await asyncio.create_task(bus.publish(PageRequested(number=number)))

    middleware = RequestContextMiddleware(app)
    async with asyncio.TaskGroup() as group:
        for number in range(100):
            scope = {
                "type": "http",
                "number": number,
                "client": (f"192.0.2.{number}", 1),
                "headers": [(b"user-agent", f"agent {number}".encode())],
            }
            group.create_task(middleware(scope, receive, send))
    assert sorted(seen) == [(n, f"192.0.2.{n}", f"agent {n}") for n in range(100)]
