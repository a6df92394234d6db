"""A form is taken only from the browser it was shown to, and only for what it was shown for."""

import re
import secrets
from collections.abc import Callable
from datetime import datetime, timedelta
from hashlib import sha256
from hmac import compare_digest, new
from typing import Final

from starlette.requests import Request
from starlette.responses import Response

LIFETIME: Final = timedelta(hours=1)

_COOKIE = "sandbox_bank_browser"
_BROWSER = re.compile(r"[A-Za-z0-9_-]{43}")
_SEAL = re.compile(r"([0-9]{1,12})\.([0-9a-f]{64})")


class FormSeals:
    """A cookie that other sites can't send with their forms, and a hidden field that they can't read."""

    def __init__(self, clock: Callable[[], datetime], *, over_https: bool) -> None:
        self._clock = clock
        self._over_https = over_https
        self._key = secrets.token_bytes(32)

    def browser(self, request: Request) -> str:
        """What this browser is known by; something new, if it isn't yet."""
        known = request.cookies.get(_COOKIE, "")
        return known if _BROWSER.fullmatch(known) else secrets.token_urlsafe(32)

    def remember(self, browser: str, response: Response) -> None:
        response.set_cookie(_COOKIE, browser, httponly=True, samesite="lax", secure=self._over_https, path="/")

    def seal(self, browser: str, purpose: str) -> str:
        until = int((self._clock() + LIFETIME).timestamp())
        return f"{until}.{self._mac(browser, purpose, until)}"

    def holds(self, request: Request, purpose: str, seal: str | None) -> bool:
        found = _SEAL.fullmatch(seal or "")
        if found is None:
            return False
        until = int(found[1])
        expected = self._mac(request.cookies.get(_COOKIE, ""), purpose, until)
        return compare_digest(found[2], expected) and self._clock().timestamp() <= until

    def _mac(self, browser: str, purpose: str, until: int) -> str:
        told = "\0".join((browser, purpose, str(until)))
        return new(self._key, told.encode("utf-8", "surrogatepass"), sha256).hexdigest()
