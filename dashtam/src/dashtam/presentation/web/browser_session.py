"""Who a browser is logged in as, and whether a form comes from a page that it was shown."""

import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from hmac import compare_digest, new
from typing import Final
from urllib.parse import parse_qsl
from uuid import UUID

from starlette.requests import Request
from starlette.responses import Response

from dashtam.application.sessions import Sessions
from dashtam.domain.result import Error
from dashtam.domain.session import NotLoggedIn, OpenedSession, Session
from whereupon import acting_as

SESSION_COOKIE: Final = "dashtam_session"
VISITOR_COOKIE: Final = "dashtam_visitor"
"""Something random, which the forms of those are bound to who are not logged in."""
FORM_TOKEN: Final = "form_token"
MOST_FIELDS: Final = 50
"""Of a form; ours have fewer."""
LIFETIME: Final = 30 * 24 * 60 * 60
"""Seconds; as long as a session is open that nobody renews."""

_VISITOR = re.compile(r"[A-Za-z0-9_-]{43}")


class FormRefused(Error):
    """A form that this browser was not shown, or not in this session."""

    reason = "form_refused"

    def __init__(self) -> None:
        super().__init__(
            "This form was not sent from a page that we showed you, or you have logged in or out since, or your "
            "browser takes no cookies. Nothing was changed. Open the page again and send the form from there."
        )


class FieldInvalid(Error):
    """What was written into a field can't be taken as it is."""

    reason = "invalid"


@dataclass(frozen=True, slots=True, kw_only=True)
class Visit:
    """A request, and who makes it."""

    request: Request
    session: Session | None
    bound_to: str
    """What the browser's forms are bound to."""
    form_token: str = field(repr=False)
    fields: Mapping[str, str] = field(default_factory=dict, repr=False)

    @property
    def is_fragment(self) -> bool:
        """Whether it is a part of a page that is asked for."""
        return "hx-request" in self.request.headers

    @property
    def user(self) -> Session:
        """The session of somebody who is logged in; raises `NotLoggedIn`."""
        if self.session is None:
            raise NotLoggedIn
        return self.session

    @property
    def user_id(self) -> UUID:
        return self.user.user_id

    def field(self, name: str, label: str, longest: int) -> str:
        """Raises `FieldInvalid`."""
        value = self.fields.get(name, "")
        if not value:
            raise FieldInvalid(f"{label} is missing.")
        if len(value) > longest:
            raise FieldInvalid(f"{label} has {longest:,} characters at most.")
        if "\0" in value or "\ufffd" in value:  # which also stands for what was not UTF-8
            raise FieldInvalid(f"{label} has a character in it that nobody can type.")
        return value


class BrowserSessions:
    """Cookies and form tokens.

    The session's cookie holds its refresh token, which is never renewed for a browser: it is looked up at every
    request, so a session that was closed is over with the next one.
    """

    def __init__(self, sessions: Sessions, keys: Sequence[bytes], *, over_https: bool) -> None:
        """The first of the keys makes form tokens, all of them are taken."""
        self._sessions = sessions
        self._keys = keys
        self._over_https = over_https

    async def anybody(self, request: Request) -> Visit:
        """A dependency: whoever it is, with the fields of a form that is theirs. Raises `FormRefused`."""
        visit = await self.visit(request)
        if visit.session is not None:
            acting_as(visit.user_id)
        return await self._with_form(visit)

    async def logged_in(self, request: Request) -> Visit:
        """A dependency: as `anybody`, but raises `NotLoggedIn` first for those who are not."""
        visit = await self.visit(request)
        acting_as(visit.user_id)
        return await self._with_form(visit)

    def remember(self, opened: OpenedSession, response: Response) -> None:
        self._set(response, SESSION_COOKIE, opened.refresh_token, LIFETIME)

    def forget(self, response: Response) -> None:
        response.delete_cookie(SESSION_COOKIE, path="/", secure=self._over_https, httponly=True, samesite="lax")

    def keep_visitor(self, visit: Visit, response: Response) -> None:
        """Have the browser know what the forms that it is shown are bound to."""
        if visit.session is None and visit.request.cookies.get(VISITOR_COOKIE) != visit.bound_to:
            self._set(response, VISITOR_COOKIE, visit.bound_to, None)

    def _set(self, response: Response, name: str, value: str, max_age: int | None) -> None:
        response.set_cookie(
            name, value, max_age=max_age, path="/", secure=self._over_https, httponly=True, samesite="lax"
        )

    async def visit(self, request: Request) -> Visit:
        """Who it is, without a look at what they send."""
        session = None
        if SESSION_COOKIE in request.cookies:
            try:
                session = await self._sessions.authenticate_secret(request.cookies[SESSION_COOKIE])
            except NotLoggedIn:
                session = None
        if session is not None:
            bound_to = f"session {session.id}"
        else:
            known = request.cookies.get(VISITOR_COOKIE, "")
            bound_to = known if _VISITOR.fullmatch(known) else secrets.token_urlsafe(32)
        visit = Visit(request=request, session=session, bound_to=bound_to, form_token=_mac(self._keys[0], bound_to))
        request.state.visit = visit  # for the page that an error becomes
        return visit

    async def _with_form(self, visit: Visit) -> Visit:
        if visit.request.method != "POST":
            return visit
        fields = await _fields_of(visit.request)
        given = fields.pop(FORM_TOKEN, "").encode("utf-8", "replace")
        if not any(compare_digest(given, _mac(key, visit.bound_to).encode()) for key in self._keys):
            raise FormRefused
        return Visit(
            request=visit.request,
            session=visit.session,
            bound_to=visit.bound_to,
            form_token=visit.form_token,
            fields=fields,
        )


async def _fields_of(request: Request) -> dict[str, str]:
    """Of a form as our pages send it; none of anything else. Its body was limited before it got here."""
    content_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if content_type != "application/x-www-form-urlencoded":
        return {}
    body = (await request.body()).decode("utf-8", "replace")
    try:
        return dict(parse_qsl(body, keep_blank_values=True, max_num_fields=MOST_FIELDS, errors="replace"))
    except ValueError:
        return {}


def _mac(key: bytes, bound_to: str) -> str:
    return new(key, bound_to.encode(), sha256).hexdigest()
