"""Banks over HTTP: OAuth 2.0 (authorization code with PKCE), accounts and transactions.

Nothing that a bank says is believed until it was looked at, and none of it is repeated in an error: only where it was.
"""

import asyncio
import base64
import json
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from enum import StrEnum
from hashlib import sha256
from http.cookiejar import CookieJar, DefaultCookiePolicy
from typing import Annotated, Any, Final, TypeGuard, TypeVar
from urllib.parse import quote, quote_plus, urlencode, urlsplit
from uuid import UUID

import httpx
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, SecretStr

from dashtam.application.bank import Clock, TransactionsListed
from dashtam.domain.account import Account, AccountStatus, AccountType, InvalidMoney, ListedAccount, Money, Transaction
from dashtam.domain.connection import (
    AccessTokenRejected,
    CursorRejected,
    InvalidGrant,
    Provider,
    ProviderInvalidData,
    ProviderRefused,
    ProviderUnavailable,
    Tokens,
)

E = TypeVar("E", bound=StrEnum)

PATIENCE: Final = 10.0
"""Seconds for a connection, and between two pieces of an answer."""
LONGEST_ANSWER: Final = 20.0
"""Seconds for a whole answer: one that drips is one that hangs."""
LARGEST_ANSWER: Final = 1024 * 1024  # bytes
MOST_PAGES: Final = 1_000
PAGE: Final = 100
SCOPE: Final = "accounts transactions"
LONGEST_TEXT: Final = 1_000
LONGEST_ID: Final = 200
LONGEST_TOKEN: Final = 8_192


def _address(url: str) -> str:
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname or parts.fragment or parts.query:
        raise ValueError("an address begins with http:// or https:// and has no query: https://bank.example/token")
    return url


Address = Annotated[str, AfterValidator(_address)]


class ProviderSettings(BaseModel):
    """A bank, and who we are to it."""

    model_config = ConfigDict(extra="forbid", frozen=True, hide_input_in_errors=True)

    name: Annotated[str, Field(pattern="^[a-z][a-z0-9_-]{0,49}$")]
    id: UUID
    display_name: Annotated[str, Field(min_length=1, max_length=100)]
    authorize_url: Address
    token_url: Address
    revoke_url: Address
    api_url: Address
    client_id: Annotated[str, Field(min_length=1)]
    client_secret: SecretStr


SANDBOX: Final = ProviderSettings(
    name="sandbox",
    id=UUID("0199a5f4-5a4d-7000-8000-5a4db0c5a4db"),
    display_name="Sandbox Bank",
    authorize_url="http://127.0.0.1:8100/oauth/authorize",
    token_url="http://127.0.0.1:8100/oauth/token",
    revoke_url="http://127.0.0.1:8100/oauth/revoke",
    api_url="http://127.0.0.1:8100/api",
    client_id="dashtam",
    client_secret=SecretStr("sandbox-secret"),
)


class BankHttp:
    """The HTTP client that all banks share; made when it is first needed."""

    def __init__(self, transport: httpx.AsyncBaseTransport | None = None) -> None:
        self._transport = transport
        self._client: httpx.AsyncClient | None = None

    async def aclose(self) -> None:
        client, self._client = self._client, None
        if client is not None:
            await client.aclose()

    async def ask(self, method: str, url: str, **request: Any) -> tuple[httpx.Response, bytes]:
        """The answer and its body. Raises `ProviderUnavailable` or `ProviderInvalidData`."""
        if self._client is None:
            self._client = httpx.AsyncClient(
                transport=self._transport,
                timeout=PATIENCE,
                follow_redirects=False,
                trust_env=False,  # neither a proxy nor a .netrc has a say in whom we show tokens to
                # a cookie that a bank sets for one user would go along for the next
                cookies=CookieJar(DefaultCookiePolicy(allowed_domains=[])),
            )
        try:
            async with (
                asyncio.timeout(LONGEST_ANSWER),
                self._client.stream(method, url, **request) as response,
            ):
                return response, await _body(response)
        except TimeoutError as error:
            raise ProviderUnavailable(f"The bank takes more than {LONGEST_ANSWER:g} seconds to answer.") from error
        except httpx.HTTPError as error:
            # its message may name an address with a code in it; its type says enough
            raise ProviderUnavailable(f"The bank can't be reached: {type(error).__name__}.") from None


async def _body(response: httpx.Response) -> bytes:
    if response.headers.get("content-encoding", "identity") != "identity":
        raise ProviderInvalidData("The bank's answer is compressed, which it was asked not to be.")
    body = bytearray()
    async for piece in response.aiter_raw():
        body += piece
        if len(body) > LARGEST_ANSWER:
            raise ProviderInvalidData(f"The bank's answer has more than {LARGEST_ANSWER:,} bytes.")
    return bytes(body)


class OAuthBank:
    def __init__(self, settings: ProviderSettings, http: BankHttp, *, redirect_uri: str, clock: Clock) -> None:
        self.provider = Provider(id=settings.id, name=settings.name, display_name=settings.display_name)
        self._settings = settings
        self._http = http
        self._redirect_uri = redirect_uri
        self._clock = clock

    def authorization_url(self, *, state: str, verifier: str) -> str:
        challenge = base64.urlsafe_b64encode(sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        return f"{self._settings.authorize_url}?" + urlencode(
            {
                "response_type": "code",
                "client_id": self._settings.client_id,
                "redirect_uri": self._redirect_uri,
                "scope": SCOPE,
                "state": state,
                "code_challenge": challenge,
                "code_challenge_method": "S256",
            }
        )

    async def exchange(self, code: str, verifier: str) -> Tokens:
        return await self._tokens(
            {
                "grant_type": "authorization_code",
                "code": code,
                "redirect_uri": self._redirect_uri,
                "code_verifier": verifier,
            },
            before=None,
        )

    async def refresh(self, tokens: Tokens) -> Tokens:
        assert tokens.refresh is not None
        return await self._tokens({"grant_type": "refresh_token", "refresh_token": tokens.refresh}, before=tokens)

    async def revoke(self, tokens: Tokens) -> None:
        # the refresh token first: a bank that follows RFC 7009 ends the access token with it
        for token, hint in ((tokens.refresh, "refresh_token"), (tokens.access, "access_token")):
            if token is not None:
                response, body = await self._post(self._settings.revoke_url, {"token": token, "token_type_hint": hint})
                if response.status_code != 200:
                    raise _oauth_error(response, body)

    async def accounts(self, access_token: str) -> list[ListedAccount]:
        found: dict[str, ListedAccount] = {}
        cursor: str | None = None
        for _ in range(MOST_PAGES):
            page = await self._get("/accounts", access_token, cursor)
            for number, record in enumerate(_records(page, "accounts"), len(found) + 1):
                account = _account(record, number)
                if account.provider_account_id in found:
                    raise ProviderInvalidData(f"account {account.provider_account_id}: it is listed twice")
                found[account.provider_account_id] = account
            cursor = _next(page, cursor)
            if cursor is None:
                return list(found.values())
        raise ProviderInvalidData(f"The bank lists more than {MOST_PAGES:,} pages of accounts.")

    async def transactions(self, access_token: str, account: Account) -> TransactionsListed:
        path = f"/accounts/{quote(account.provider_account_id, safe='')}/transactions"
        page = await self._get(path, access_token, account.cursor, CursorRejected if account.cursor else None)
        records = _records(page, "transactions")
        following = _next(page, account.cursor)
        return TransactionsListed(
            transactions=[_transaction(record, number, account) for number, record in enumerate(records, 1)],
            cursor=following if following is not None else _cursor(page, "cursor"),
            more=following is not None,
        )

    async def _get(
        self, path: str, access_token: str, cursor: str | None, on_400: type[CursorRejected] | None = None
    ) -> Mapping[str, Any]:
        headers = {"Authorization": f"Bearer {access_token}", "Accept": "application/json"}
        asked = {"limit": str(PAGE)} | ({} if cursor is None else {"cursor": cursor})
        response, body = await self._ask("GET", self._settings.api_url + path, headers=headers, params=asked)
        if response.status_code == 401:
            raise AccessTokenRejected
        if response.status_code == 400 and on_400 is not None:
            raise on_400
        if response.status_code != 200:
            raise _error(response)
        return _object(body)

    async def _post(self, url: str, form: dict[str, str]) -> tuple[httpx.Response, bytes]:
        # RFC 6749, 2.3.1: both are form-encoded before they become the name and password of Basic
        name = quote_plus(self._settings.client_id)
        secret = quote_plus(self._settings.client_secret.get_secret_value())
        return await self._ask(
            "POST", url, data=form, auth=httpx.BasicAuth(name, secret), headers={"Accept": "application/json"}
        )

    async def _ask(
        self, method: str, url: str, *, headers: dict[str, str], **request: Any
    ) -> tuple[httpx.Response, bytes]:
        # uncompressed: what unfolds to gigabytes is not noticed before it has
        return await self._http.ask(method, url, headers={"Accept-Encoding": "identity", **headers}, **request)

    async def _tokens(self, form: dict[str, str], before: Tokens | None) -> Tokens:
        asked_at = self._clock()
        response, body = await self._post(self._settings.token_url, form)
        if response.status_code != 200:
            raise _oauth_error(response, body)
        answer = _object(body)
        access, refresh = answer.get("access_token"), answer.get("refresh_token")
        if str(answer.get("token_type")).lower() != "bearer":
            raise ProviderInvalidData("tokens: token_type: it is not Bearer")
        if not _is_token(access):
            raise ProviderInvalidData("tokens: access_token: it is no token")
        if refresh is None and before is not None:
            refresh = before.refresh  # RFC 6749, 6: the old one stays good
        if refresh is not None and not _is_token(refresh):
            raise ProviderInvalidData("tokens: refresh_token: it is no token")
        lifetime = answer.get("expires_in")
        if lifetime is not None and (type(lifetime) is not int or not 0 < lifetime < 10**9):
            raise ProviderInvalidData("tokens: expires_in: it is no number of seconds")
        expires_at = None if lifetime is None else asked_at + timedelta(seconds=lifetime)
        return Tokens(access=access, refresh=refresh, expires_at=expires_at)


def _error(response: httpx.Response) -> Exception:
    status = response.status_code
    if status == 429 or status >= 500:
        return ProviderUnavailable(f"The bank answers {status}.", _retry_after(response))
    return ProviderRefused(f"The bank answers {status}.")


def _oauth_error(response: httpx.Response, body: bytes) -> Exception:
    if response.status_code in (400, 401):
        try:
            error = _object(body).get("error")
        except ProviderInvalidData:
            error = None
        if error == "invalid_grant":
            return InvalidGrant()
    return _error(response)


def _retry_after(response: httpx.Response) -> timedelta | None:
    """RFC 9110, 10.2.3: seconds, or a date."""
    said = response.headers.get("retry-after", "").strip()
    if said.isascii() and said.isdecimal() and len(said) < 10:
        return timedelta(seconds=int(said))
    try:
        until = parsedate_to_datetime(said)
        return max(until - datetime.now(UTC), timedelta()) if until.tzinfo is not None else None
    except (ValueError, OverflowError):
        return None


def _object(body: bytes) -> Mapping[str, Any]:
    try:
        document = json.loads(body)
    except (ValueError, RecursionError):
        raise ProviderInvalidData("The bank's answer is not JSON.") from None
    if not isinstance(document, dict):
        raise ProviderInvalidData("The bank's answer is not a JSON object.")
    return document


def _records(page: Mapping[str, Any], name: str) -> list[Mapping[str, Any]]:
    records = page.get(name)
    if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
        raise ProviderInvalidData(f"{name}: it is not a list of objects")
    return records


def _cursor(page: Mapping[str, Any], name: str) -> str | None:
    cursor = page.get(name)
    if cursor is None:
        return None
    return _text(page, name, "page", longest=LONGEST_TEXT)


def _next(page: Mapping[str, Any], asked: str | None) -> str | None:
    following = _cursor(page, "next")
    if following is not None and following == asked:
        raise ProviderInvalidData("next: it is the page that it comes with")
    return following


def _account(record: Mapping[str, Any], number: int) -> ListedAccount:
    id_ = _text(record, "id", f"account number {number}", longest=LONGEST_ID, printable=True)
    if id_ in (".", ".."):
        raise ProviderInvalidData(f"account number {number}: id: it is no part of an address")
    where = f"account {id_}"
    return ListedAccount(
        provider_account_id=id_,
        name=_text(record, "name", where, longest=LONGEST_ID),
        type=_one_of(AccountType, record, "type", where),
        balance=_money(record, "balance", where),
        status=_one_of(AccountStatus, record, "status", where),
    )


def _transaction(record: Mapping[str, Any], number: int, account: Account) -> Transaction:
    where = f"account {account.provider_account_id}: transaction number {number}"
    id_ = _text(record, "id", where, longest=LONGEST_ID, printable=True)
    where = f"account {account.provider_account_id}: transaction {id_}"
    money = _money(record, "amount", where)
    if money.currency != account.balance.currency:
        raise ProviderInvalidData(f"{where}: currency: it is not the account's")
    return Transaction(
        account_id=account.id,
        provider_transaction_id=id_,
        booked_at=_time(record, "booked_at", where),
        money=money,
        description=_text(record, "description", where, longest=LONGEST_TEXT, shortest=0),
        counterparty=_text(record, "counterparty", where, longest=LONGEST_TEXT, shortest=0),
    )


def _text(
    record: Mapping[str, Any], name: str, where: str, *, longest: int, shortest: int = 1, printable: bool = False
) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise ProviderInvalidData(f"{where}: {name}: it is not text")
    if not shortest <= len(value) <= longest:
        raise ProviderInvalidData(f"{where}: {name}: it has not {shortest} to {longest} characters")
    # half a surrogate pair, or NUL, is what databases refuse
    if "\x00" in value or any(0xD800 <= ord(c) <= 0xDFFF for c in value) or (printable and not value.isprintable()):
        raise ProviderInvalidData(f"{where}: {name}: it has characters that have no place there")
    return value


def _one_of(kind: type[E], record: Mapping[str, Any], name: str, where: str) -> E:
    try:
        return kind(str(record.get(name)))
    except ValueError:
        raise ProviderInvalidData(f"{where}: {name}: it is none of {', '.join(kind)}") from None


def _money(record: Mapping[str, Any], name: str, where: str) -> Money:
    try:
        return Money.parse(record.get(name), record.get("currency"))
    except InvalidMoney as error:
        raise ProviderInvalidData(f"{where}: {name}: {error}") from None


def _time(record: Mapping[str, Any], name: str, where: str) -> datetime:
    wrong = ProviderInvalidData(f"{where}: {name}: it is not a time with its offset from UTC")
    try:
        time = datetime.fromisoformat(_text(record, name, where, longest=50))
        if time.tzinfo is None:
            raise wrong
        return time.astimezone(UTC)
    except (ValueError, OverflowError):
        raise wrong from None


def _is_token(value: object) -> TypeGuard[str]:
    return (
        isinstance(value, str)
        and 0 < len(value) <= LONGEST_TOKEN
        and all("\x20" < character < "\x7f" for character in value)  # it goes into a header
    )
