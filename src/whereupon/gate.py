"""Who may look at a dashboard and who may act, and whether a form comes from a page that it has shown them."""

from __future__ import annotations

import hmac
import inspect
import re
import secrets
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from ipaddress import ip_address
from typing import Any, Final, Literal, TypeAlias
from urllib.parse import parse_qsl, urlsplit

from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response

Role: TypeAlias = Literal["reader", "actor"]
Authorize: TypeAlias = Callable[[Request], Any]
"""Gives None, "reader", "actor", an object with a name and a role, or a Response to answer with; may be async."""

FORM_COOKIE: Final = "whereupon_form"
FORM_TOKEN: Final = "form_token"
LARGEST_BODY: Final = 1024 * 1024
"""Bytes of a form: an event that is edited may be long."""
MOST_FIELDS: Final = 50
LONGEST_NAME: Final = 200

_COOKIE: Final = re.compile(r"[A-Za-z0-9_-]{43}")
_HEADERS: Final = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'; base-uri 'none'",
    "x-frame-options": "DENY",
    "x-content-type-options": "nosniff",
    "referrer-policy": "same-origin",
    "cross-origin-opener-policy": "same-origin",
    "cross-origin-resource-policy": "same-origin",
}
NEVER_KEPT: Final = "no-store"


class Refusal(Exception):
    """A request that is answered with a page that says why; `status` is that of HTTP."""

    def __init__(self, status: int, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Instead(Exception):
    """What `authorize` wants to be answered: a way to the login, as a rule."""

    def __init__(self, response: Response) -> None:
        super().__init__()
        self.response = response


@dataclass(frozen=True, slots=True, kw_only=True)
class Visitor:
    """Somebody who was let in. `name` is kept with what they do."""

    name: str
    role: Role


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """One request of somebody who was let in."""

    request: Request
    visitor: Visitor
    bound_to: str
    """What the forms of this browser are bound to: the value of its cookie."""
    form_token: str = field(repr=False)
    base: str
    """What leads from the address of this page to that of the dashboard: "" or "../", as often as it takes."""
    fields: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def may_act(self) -> bool:
        return self.visitor.role == "actor"

    @property
    def is_fragment(self) -> bool:
        """Whether a part of a page is asked for."""
        return "hx-request" in self.request.headers


class Gate:
    def __init__(self, authorize: Authorize, key: Callable[[], Awaitable[bytes]], *, local: bool) -> None:
        """`key` signs form tokens. `local`: only requests that name this machine by a loopback address are answered."""
        self._authorize = authorize
        self._key = key
        self._local = local

    def check_host(self, request: Request) -> None:
        """Whoever has only a browser's help may let a name of theirs lead here; then that is the name it gives."""
        if self._local and not is_loopback(_name_of(request.headers.get("host", ""))):
            raise Refusal(
                421,
                "This dashboard answers on this machine alone, and under no other name than localhost or 127.0.0.1. "
                "To show it to others, mount it in your application: dashboard(bus, authorize=…).",
            )

    async def admit(self, request: Request, base: str) -> Visit:
        """Raises `Refusal` or `Instead`."""
        found = self._authorize(request)
        if inspect.isawaitable(found):
            found = await found
        visitor = _visitor(found)
        kept = request.cookies.get(FORM_COOKIE, "")
        bound_to = kept if _COOKIE.fullmatch(kept) else secrets.token_urlsafe(32)
        return Visit(request=request, visitor=visitor, bound_to=bound_to, form_token="", base=base)

    async def with_token(self, visit: Visit) -> Visit:
        """With the token that this browser's forms carry; the key of it may have to be asked from the database."""
        return _replaced(visit, form_token=_seal(await self._key(), visit))

    async def with_form(self, visit: Visit) -> Visit:
        """With the fields of a form that was shown to this browser. Raises `Refusal`, before anything is done."""
        site = visit.request.headers.get("sec-fetch-site")
        fields = await _fields_of(visit.request)
        given = fields.pop(FORM_TOKEN, "")
        sealed = hmac.compare_digest(given.encode("utf-8", "replace"), _seal(await self._key(), visit).encode())
        if not sealed or site not in (None, "same-origin"):
            raise Refusal(
                403,
                "This form was not sent from a page of this dashboard, or your browser keeps no cookies, or somebody "
                "else is logged in now. Nothing was done. Open the page again and send the form from there.",
            )
        if not visit.may_act:
            raise Refusal(403, f"{visit.visitor.name} may look and not act here. Nothing was done.")
        return _replaced(visit, fields=fields)

    def keep(self, visit: Visit, response: Response) -> None:
        """Have the browser know what its forms are bound to."""
        if visit.request.cookies.get(FORM_COOKIE) != visit.bound_to:
            # without a path it is that of the page: of this dashboard, whatever stands before it in the address
            response.set_cookie(
                FORM_COOKIE,
                visit.bound_to,
                path=None,
                secure=visit.request.url.scheme == "https",
                httponly=True,
                samesite="strict",
            )


def secured(headers: MutableHeaders) -> None:
    """What every answer says to the browser, errors too."""
    for name, value in _HEADERS.items():
        headers[name] = value
    headers.setdefault("cache-control", NEVER_KEPT)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches what is bound to this host."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


def _name_of(host: str) -> str:
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""


def _visitor(found: Any) -> Visitor:
    if isinstance(found, Response):
        raise Instead(found)
    if found is None:
        raise Refusal(403, "You are not let in here. Log in as somebody who may look at the events, and come back.")
    name, role = (
        (found, found) if isinstance(found, str) else (getattr(found, "name", None), getattr(found, "role", None))
    )
    if role not in ("reader", "actor") or not isinstance(name, str) or not name.strip():
        raise TypeError(
            f"authorize gave {found!r}: it gives None, 'reader', 'actor', an object with a name and one of these as "
            "its role, such as whereupon.gate.Visitor, or a Response"
        )
    return Visitor(name=name.strip()[:LONGEST_NAME], role="actor" if role == "actor" else "reader")


def _seal(key: bytes, visit: Visit) -> str:
    return hmac.new(key, f"{visit.bound_to}\0{visit.visitor.name}".encode("utf-8", "replace"), sha256).hexdigest()


def _replaced(visit: Visit, *, form_token: str | None = None, fields: Mapping[str, str] | None = None) -> Visit:
    return Visit(
        request=visit.request,
        visitor=visit.visitor,
        bound_to=visit.bound_to,
        form_token=visit.form_token if form_token is None else form_token,
        base=visit.base,
        fields=visit.fields if fields is None else fields,
    )


async def _fields_of(request: Request) -> dict[str, str]:
    """Of a form as our pages send it; none of anything else."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/x-www-form-urlencoded":
        return {}
    body = bytearray()
    async for part in request.stream():
        body += part
        if len(body) > LARGEST_BODY:
            raise Refusal(413, f"That is too long: a form may have {LARGEST_BODY:,} bytes.")
    try:
        return dict(
            parse_qsl(
                body.decode("utf-8", "replace"), keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace"
            )
        )
    except ValueError:
        return {}
