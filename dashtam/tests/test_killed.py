"""Dashtam is killed at the steps of each workflow, on both databases; `pytest -rP` shows what exists afterwards.

Somebody does what a workflow is for, in a process of their own (see `killed`), which is ended by SIGKILL at one step;
the next one, for somebody else, first finishes what that left. Its lease is taken back for it by a statement, as if
the lease's time had passed: only at the end of each workflow is it waited for.
"""

import asyncio
import base64
import json
import os
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any, Final
from urllib.parse import parse_qs, urlsplit
from uuid import UUID

import httpx
import msgspec
import pytest
from bank_visitor import sealed
from banked import CALLBACK, Clock
from killed import settings_of
from served import OPEN, PASSWORD, MailServer, Served, eventually, mail_server, served, settle
from sqlalchemy import func, make_url, select, update
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from test_sandbox_bank_process import address, banking

from dashtam.domain import events as domain_events
from dashtam.infrastructure.secret_keys import make_key
from dashtam.infrastructure.tables import (
    AccountModel,
    ConnectionModel,
    NotificationModel,
    OneTimeTokenModel,
    RevocationModel,
    SessionModel,
    TransactionModel,
    UserModel,
    UserSettingsModel,
)
from dashtam_sandbox_bank.people import Person as Customer
from whereupon import Delivery, DomainEvent
from whereupon.schema import audit_log, log, process, workflow

pytestmark = [pytest.mark.integration, pytest.mark.slow]

CHILD: Final = Path(__file__).parent / "killed.py"
EVERY: Final = {"sqlite": 15, "postgresql": 40}
"""One step of so many is tried, and chance says which; DASHTAM_KILL_EVERY=1 tries each, and takes long.

Odd, as every other step is one before something.
"""
NEW_PASSWORD: Final = "battery staple 8"
WELCOME, VERIFIED, CHANGED, RESET, CONNECTED = (
    "Welcome to Dashtam",
    "You are in",
    "Your password was changed",
    "Choose a new password",
    "Sandbox Bank is connected to Dashtam",
)
TOKEN: Final = 64  # characters of a one-time token, which begins with its id
UNHARMED: Final = "not killed"


@dataclass(kw_only=True)
class Somebody:
    number: int
    user_id: str = ""
    password: str = PASSWORD
    session: dict[str, Any] = field(default_factory=dict)
    other_session: str = ""
    token: str = ""
    back: dict[str, str] = field(default_factory=dict)
    """What the bank sent them back with."""
    before: Any = None
    """What the workflow is to change, as it was."""

    @property
    def email(self) -> str:
        return f"ada{self.number}@example.com"

    @property
    def name(self) -> str:
        """At the bank."""
        return f"Ada {CUSTOMERS[self.number]}"

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.session['access_token']}"} if self.session else {}


CUSTOMERS: Final = (
    *(2, 59, 68, 71, 77, 80, 87, 130, 137, 138, 164, 174, 188, 207, 219, 235, 246, 268, 285, 286, 313, 322, 324, 325),
    *(326, 334, 340, 411, 431, 443, 468, 470, 582, 601, 634, 652, 747, 834, 841, 884, 899, 907, 1006, 1018, 1050, 1062),
    *(1074, 1094, 1110, 1121, 1134, 1152, 1154, 1166, 1197, 1213, 1238, 1262, 1270, 1350, 1373, 1394, 1439, 1454, 1497),
)
"""Who has two accounts at the sandbox bank, and transactions for one page of each."""


Request = tuple[str, str, dict[str, Any] | None]


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """Something a person does. It changes `state`, if and only if the workflow succeeded."""

    name: str
    workflow: str
    ask: Callable[[Somebody], Request]
    state: Callable[[AsyncSession, Somebody], Awaitable[Any]]
    prepare: Callable[["World", Served, Somebody], Awaitable[None]]
    at_last: Callable[["World", Somebody], Awaitable[None]] | None = None
    """What has to be fresh."""
    afterwards: Callable[[Somebody], None] = lambda _: None
    """What a person remembers of a success."""
    later: float = 0
    """How much later it is for each than for the one before, in seconds."""
    begins_later: float = 0
    """How much later it is than when people got ready."""


@dataclass(kw_only=True)
class Killed:
    """What a process did until it was killed."""

    who: Somebody
    where: str
    steps: list[str]
    since: int
    """The position in the log before anything of it."""
    left: dict[UUID, tuple[str, str]]
    """Of each attempt its workflow and its state, when the process was gone."""
    now: dict[UUID, tuple[str, str]] = field(default_factory=dict)
    """The same once all was recovered."""
    changed: bool = False


@dataclass(kw_only=True)
class World:
    engine: AsyncEngine
    mail: MailServer
    browser: httpx.AsyncClient
    child: asyncio.subprocess.Process
    settings: dict[str, Any]
    every: int
    seed: int
    clock: Clock = field(default_factory=Clock)
    people: list[Somebody] = field(default_factory=list)
    spent: Counter[str] = field(default_factory=Counter)
    """What people did at the bank after they were known there."""
    since: int = 0
    """Everything up to this position is settled."""
    unseen: tuple[Scenario, list[Killed]] | None = None
    """What was played since everything was recovered."""
    lines: list[str] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)
    forks: int = 0

    @asynccontextmanager
    async def recovered(self, **settings: Any) -> AsyncIterator[Served]:
        """Dashtam in this process, once it has finished what others left."""
        given = settings_of(**self.settings) | settings
        url, _ = given.pop("database_url"), given.pop("smtp_port")
        async with served(url, self.mail, parts={"clock": self.clock}, **given) as dashtam:
            await settle(dashtam.bus, self.since)
            yield dashtam
            await settle(dashtam.bus, self.since)
            async with dashtam.bus.engine.connect() as connection:
                self.since = await connection.scalar(select(func.max(log.c.position))) or 0

    # --- what people do that is not killed -----------------------------------------------------------------------

    async def sign_up(self, dashtam: Served, who: Somebody) -> None:
        async with dashtam.application.database.get_session():
            user = await dashtam.application.users.find_by_email(who.email)
        if user is None:
            assert (await dashtam.register(who.email, who.password)).status_code == 202
        if user is None or user.email_verified_at is None:
            assert (await dashtam.verify(who.email)).status_code == 204

    async def log_in(self, dashtam: Served, who: Somebody) -> None:
        await self.sign_up(dashtam, who)
        who.session = (await dashtam.person(who.email, who.password)).tokens

    async def log_in_twice(self, dashtam: Served, who: Somebody) -> None:
        await self.log_in(dashtam, who)
        who.other_session = (await dashtam.person(who.email, who.password)).tokens["session_id"]

    async def be_welcomed(self, dashtam: Served, who: Somebody) -> None:
        """Have a link to verify the address by, and not have used it."""
        async with dashtam.application.database.get_session():
            user = await dashtam.application.users.find_by_email(who.email)
        if user is None:
            assert (await dashtam.register(who.email, who.password)).status_code == 202
        who.token = await dashtam.token(who.email, WELCOME)

    async def forget_password(self, dashtam: Served, who: Somebody) -> None:
        await self.sign_up(dashtam, who)
        before = self.mails(who, RESET)
        assert (await dashtam.http.post("/password-resets", json={"email": who.email})).status_code == 202

        async def look() -> bool:
            return self.mails(who, RESET) > before

        await eventually(look)
        who.token = await dashtam.token(who.email, RESET)

    def mails(self, who: Somebody, subject: str) -> int:
        return sum(who.email in str(mail["To"]) and mail["Subject"] == subject for mail in self.mail.accepted)

    async def begin_to_connect(self, dashtam: Served, who: Somebody) -> None:
        await self.log_in(dashtam, who)
        asked = {"provider_name": "sandbox"}
        answer = await dashtam.http.post("/connections", json=asked, headers=who.headers)
        assert answer.status_code == 201, answer.text
        who.token = answer.json()["authorization_url"]

    async def consent(self, who: Somebody) -> None:
        form = {"seal": sealed(await self.browser.get(who.token)), "name": who.name, "password": "sandbox"}
        answer = await self.browser.post(who.token, data=form | {"decision": "allow"})
        assert answer.status_code == 303, answer.text
        back = parse_qs(urlsplit(answer.headers["location"]).query)
        who.back = {key: back[key][0] for key in ("state", "code")}

    async def connect(self, dashtam: Served, who: Somebody) -> None:
        await self.log_in(dashtam, who)
        (here,) = (await dashtam.http.get("/connections", headers=who.headers)).json() or [{"status": "none"}]
        if here["status"] != "active":
            await self.begin_to_connect(dashtam, who)
            await self.consent(who)
            answer = await dashtam.http.post("/connections/callback", json=who.back, headers=who.headers)
            assert answer.status_code == 201, answer.text
            here = answer.json()
        who.token = here["id"]

    async def spend(self, who: Somebody) -> None:
        answer = await self.browser.post(f"/sandbox/people/{who.name}/activity", json={"transactions": 4})
        assert answer.status_code == 200, answer.text
        self.spent[who.name] += 4

    async def catch_up(self) -> None:
        """Whoever died before their request for a sync was stored asks once more."""
        async with self.recovered() as dashtam:
            await self.look_again(dashtam)
            for who in self.people:
                if self.spent[who.name]:
                    answer = await dashtam.http.post(f"/connections/{who.token}/sync", headers=who.headers)
                    assert answer.status_code == 202, answer.text

    # --- killing -----------------------------------------------------------------------------------------------------

    async def play(self, scenario: Scenario) -> None:
        """Let it happen once, then kill somebody at each step of it."""
        ready = max(1, len(self.people))
        async with self.recovered() as dashtam:
            await self.look_again(dashtam)
            await self.make_ready(scenario, dashtam, range(ready))
        self.clock.advance(seconds=scenario.begins_later)
        played = [await self.perform(scenario, self.people[0], None)]
        steps = played[0].steps
        chance = random.Random(f"{self.seed} {scenario.name}")
        fatal = range(1 + chance.randrange(min(self.every, len(steps))), len(steps) + 1, self.every)
        if len(fatal) >= ready:
            async with self.recovered() as dashtam:
                await self.make_ready(scenario, dashtam, range(ready, len(fatal) + 1))
            self.clock.advance(seconds=scenario.begins_later)
        for step, who in zip(fatal, self.people[1:], strict=False):
            played.append(await self.perform(scenario, who, step, last=step == fatal[-1]))
        self.unseen = (scenario, played)
        self.lines.append(f"\n{scenario.name}: {len(steps)} steps")

    async def make_ready(self, scenario: Scenario, dashtam: Served, numbers: range) -> None:
        self.people.extend(Somebody(number=number) for number in range(len(self.people), numbers.stop))
        people = self.people[numbers.start : numbers.stop]
        turns = asyncio.Semaphore(4)

        async def prepared(who: Somebody) -> None:
            async with turns:
                await scenario.prepare(self, dashtam, who)

        await asyncio.gather(*(prepared(who) for who in people))
        await settle(dashtam.bus, self.since)
        async with dashtam.application.database.get_session() as session:
            for who in people:
                who.before = await scenario.state(session, who)

    async def perform(self, scenario: Scenario, who: Somebody, step: int | None, *, last: bool = False) -> Killed:
        if scenario.at_last is not None:
            await scenario.at_last(self, who)
        self.clock.advance(seconds=scenario.later)
        method, path, body = scenario.ask(who)
        done = await self.fork(step=step, method=method, path=path, json=body, headers=who.headers)
        died = done["status"] == -signal.SIGKILL
        if died:
            where = done["steps"][-1]
        else:
            where = UNHARMED if step is None else f"{UNHARMED}, as step {step} never came"
        left = await self.attempts(who, self.since)
        one = Killed(who=who, where=where, steps=done["steps"], since=self.since, left=left)
        stood_still = any(state == "interrupted" for _, state in one.left.values())  # for longer than its short lease
        if (done["errors"] and not stood_still) or not (died or done["status"] == 0):
            self.faults.append(f"{scenario.name}, {where}: {done['status']} {done['errors']}")
        if died and not last:
            await self.end_lease(done["process"])
        return one

    async def fork(self, **job: Any) -> dict[str, Any]:
        self.forks += 1
        assert self.child.stdin is not None
        assert self.child.stdout is not None
        told = job | {"since": self.since, "later": self.clock.later.total_seconds()}
        self.child.stdin.write(json.dumps(told).encode() + b"\n")
        async with asyncio.timeout(120):
            answer = await self.child.stdout.readline()
        assert answer, "the process that forks has ended; what it said is on stderr"
        done: dict[str, Any] = json.loads(answer)
        return done

    async def end_lease(self, dead: int) -> None:
        """As if its time had passed."""
        async with self.engine.begin() as connection:
            long_ago = datetime(2000, 1, 1, tzinfo=UTC)
            await connection.execute(update(process).where(process.c.pid == dead).values(lease_until=long_ago))

    async def attempts(self, who: Somebody, since: int) -> dict[UUID, tuple[str, str]]:
        """The attempts of a scenario that somebody has made."""
        found = {}
        async with self.engine.connect() as connection:
            rows = await connection.execute(
                select(workflow.c.id, workflow.c.name, workflow.c.state, log.c.payload)
                .join(log, log.c.event_id == workflow.c.id)
                .where(log.c.position > since)
                .order_by(log.c.position)
            )
            for id_, name, state, payload in rows:
                if any(known.encode() in payload for known in self.known_as(who)):
                    found[id_] = (name, state)
        return found

    def known_as(self, who: Somebody) -> list[str]:
        """What the events of an attempt call them."""
        tokens = [str(UUID(bytes=base64.urlsafe_b64decode(who.token)[:16]))] if len(who.token) == TOKEN else []
        return [f'"{who.email}"', *tokens, *([who.user_id] if who.user_id else [])]

    async def look_again(self, dashtam: Served) -> None:
        """What became of those who were killed."""
        if self.unseen is None:
            return
        scenario, played = self.unseen
        self.unseen = None
        for one in played:
            one.now = await self.attempts(one.who, one.since)
            async with dashtam.application.database.get_session() as session:
                one.changed = await scenario.state(session, one.who) != one.who.before
            states = [state for name, state in one.now.values() if name == scenario.workflow]
            if one.changed:
                scenario.afterwards(one.who)
            if one.changed != ("succeeded" in states) or states.count("succeeded") > 1 or "open" in states:
                self.faults.append(f"{scenario.name}, {one.where}: changed {one.changed}, and {told(one.now)}")
            if one.where.startswith(UNHARMED) and not one.changed and "interrupted" not in states:
                self.faults.append(f"{scenario.name}, {one.where}: nothing changed")
        self.tell(played)

    def tell(self, played: Iterable[Killed]) -> None:
        for one in played:
            exists = "changed" if one.changed else "as before"
            self.lines.append(f"  {one.where:<64} {told(one.left):<44} → {told(one.now):<44} {exists}")


def told(attempts: dict[UUID, tuple[str, str]]) -> str:
    found = Counter(f"{name} {state}" for name, state in attempts.values())
    return ", ".join(each if number == 1 else f"{number} × {each}" for each, number in found.items()) or "no attempt"


# --- what people do ---------------------------------------------------------------------------------------------------


async def user_of(session: AsyncSession, who: Somebody) -> UserModel | None:
    user: UserModel | None = await session.scalar(select(UserModel).where(UserModel.email_key == who.email))
    if user is not None:
        who.user_id = str(user.id)
    return user


async def registered(session: AsyncSession, who: Somebody) -> bool:
    return await user_of(session, who) is not None


async def verified(session: AsyncSession, who: Somebody) -> bool:
    user = await user_of(session, who)
    return user is not None and user.email_verified_at is not None


async def password_hash(session: AsyncSession, who: Somebody) -> str | None:
    user = await user_of(session, who)
    return None if user is None else user.password_hash


async def sessions(session: AsyncSession, who: Somebody) -> int:
    await user_of(session, who)
    here = select(func.count()).select_from(SessionModel).where(SessionModel.user_id == UUID(who.user_id))
    return await session.scalar(here) or 0


async def open_sessions(session: AsyncSession, who: Somebody) -> set[UUID]:
    await user_of(session, who)
    here = SessionModel.user_id == UUID(who.user_id)
    return set(await session.scalars(select(SessionModel.id).where(here, SessionModel.closed_at.is_(None))))


async def reset_links(session: AsyncSession, who: Somebody) -> int:
    """A link is made by the handler that mails it."""
    await user_of(session, who)
    here = (OneTimeTokenModel.user_id == UUID(who.user_id), OneTimeTokenModel.purpose == "password_reset")
    return await session.scalar(select(func.count()).select_from(OneTimeTokenModel).where(*here)) or 0


async def connection_of(session: AsyncSession, who: Somebody) -> ConnectionModel | None:
    await user_of(session, who)
    here = ConnectionModel.user_id == UUID(who.user_id)
    found: ConnectionModel | None = await session.scalar(select(ConnectionModel).where(here))
    return found


async def status(session: AsyncSession, who: Somebody) -> str | None:
    found = await connection_of(session, who)
    return None if found is None else found.status


async def token_version(session: AsyncSession, who: Somebody) -> int | None:
    found = await connection_of(session, who)
    return None if found is None else found.token_version


async def booked(session: AsyncSession, who: Somebody) -> int:
    await user_of(session, who)
    here = select(func.count()).select_from(TransactionModel).join(AccountModel)
    return await session.scalar(here.where(AccountModel.user_id == UUID(who.user_id))) or 0


async def nothing(_world: World, _dashtam: Served, _who: Somebody) -> None:
    """Somebody whom nobody knows yet."""


def remembers_new_password(who: Somebody) -> None:
    who.password = {PASSWORD: NEW_PASSWORD, NEW_PASSWORD: PASSWORD}[who.password]


def other_password(who: Somebody) -> str:
    return {PASSWORD: NEW_PASSWORD, NEW_PASSWORD: PASSWORD}[who.password]


def changes_password(who: Somebody) -> Request:
    return "PUT", "/users/me/password", {"current_password": who.password, "new_password": other_password(who)}


def confirms_reset(who: Somebody) -> Request:
    return "POST", "/password-resets/confirmation", {"token": who.token, "new_password": other_password(who)}


SCENARIOS: Final = (
    Scenario(
        name="registration",
        workflow="UserRegistration",
        prepare=nothing,
        ask=lambda who: ("POST", "/users", {"email": who.email, "password": who.password}),
        state=registered,
    ),
    Scenario(
        name="email verification",
        workflow="EmailVerification",
        prepare=World.be_welcomed,
        ask=lambda who: ("POST", "/email-verifications", {"token": who.token}),
        state=verified,
    ),
    Scenario(
        name="login",
        workflow="UserLogin",
        prepare=World.sign_up,
        ask=lambda who: ("POST", "/sessions", {"email": who.email, "password": who.password}),
        state=sessions,
    ),
    Scenario(
        name="logout",
        workflow="UserLogout",
        prepare=World.log_in,
        ask=lambda _: ("DELETE", "/sessions/current", None),
        state=open_sessions,
    ),
    Scenario(
        name="revocation of one session",
        workflow="SessionRevocation",
        prepare=World.log_in_twice,
        ask=lambda who: ("DELETE", f"/sessions/{who.other_session}", None),
        state=open_sessions,
    ),
    Scenario(
        name="revocation of all sessions",
        workflow="AllSessionsRevocation",
        prepare=World.log_in_twice,
        ask=lambda _: ("DELETE", "/sessions", None),
        state=open_sessions,
    ),
    Scenario(
        name="password change",
        workflow="UserPasswordChange",
        prepare=World.log_in,
        ask=changes_password,
        state=password_hash,
        afterwards=remembers_new_password,
    ),
    Scenario(
        name="password reset, request",
        workflow="PasswordResetRequest",
        prepare=World.sign_up,
        ask=lambda who: ("POST", "/password-resets", {"email": who.email}),
        state=reset_links,
    ),
    Scenario(
        name="password reset, confirmation",
        workflow="PasswordResetConfirm",
        prepare=World.forget_password,
        ask=confirms_reset,
        state=password_hash,
        afterwards=remembers_new_password,
    ),
    Scenario(
        name="connection of a bank",
        workflow="ProviderConnection",
        prepare=World.begin_to_connect,
        at_last=World.consent,  # the bank's code is good for a minute
        ask=lambda who: ("POST", "/connections/callback", who.back),
        state=status,
    ),
    Scenario(
        name="sync of accounts and transactions",
        workflow="AccountSync",
        prepare=World.connect,
        at_last=World.spend,
        ask=lambda who: ("POST", f"/connections/{who.token}/sync", None),
        state=booked,
    ),
    Scenario(
        name="token refresh",
        workflow="TokenRefresh",
        prepare=World.connect,
        begins_later=900,  # tokens have ended by then
        later=31,  # who died in a refresh holds it for 30 s
        ask=lambda who: ("POST", f"/connections/{who.token}/sync", None),
        state=token_version,
    ),
    Scenario(
        name="disconnection",
        workflow="ProviderDisconnection",
        prepare=World.connect,
        ask=lambda who: ("DELETE", f"/connections/{who.token}", None),
        state=status,
    ),
)


# --- what exists at last ----------------------------------------------------------------------------------------------


async def everything(world: World, dashtam: Served) -> AsyncIterator[tuple[str, Any, Any]]:
    """What is compared: what it is, what there is, and what there should be by the log."""
    async with world.engine.connect() as connection:
        events = [
            (type_, id_, msgspec.json.decode(payload))
            for type_, id_, payload in await connection.execute(select(log.c.type, log.c.event_id, log.c.payload))
        ]
        attempts = list(await connection.execute(select(workflow)))
        audited = list(await connection.scalars(select(audit_log.c.event_id)))
    ids = {id_: type_ for type_, id_, _ in events}

    def of(type_: str, name: str) -> list[Any]:
        return sorted(fields[name] for each, _, fields in events if each == type_)

    yield "events that are in the log twice", len(events) - len(ids), 0
    yield "attempts that are open", [row for row in attempts if row.state == "open"], []
    ends = {"succeeded": "Succeeded", "failed": "Failed", "interrupted": "Failed"}
    yield (
        "outcomes that are not in the log, or are others",
        [row for row in attempts if ids.get(row.outcome_id) != row.name + ends[row.state]],
        [],
    )
    yield "outcomes of two attempts", len(attempts) - len({row.outcome_id for row in attempts}), 0
    count = Counter(ids.values())
    for name in sorted({row.name for row in attempts}):
        outcomes = count[f"{name}Succeeded"] + count[f"{name}Failed"]
        yield f"attempts at {name}, and their outcomes", count[f"{name}Attempted"], outcomes
        made = sum(row.name == name for row in attempts)
        if name != "AllSessionsRevocation":  # a new password revokes them, too, attempt and outcome in one transaction
            yield f"attempts at {name} with a row", made, outcomes
    deliveries = await dashtam.bus.deliveries(*ids)
    yield "deliveries that are not settled", [each for each in deliveries if each.state in ("dead", *OPEN)], []
    yield "deliveries that were given up", [each for each in deliveries if each.state == "skipped"], []
    yield (
        "deliveries that are told of twice",
        len(deliveries) - len({(d.event_id, d.subscription) for d in deliveries}),
        0,
    )
    classes = [
        each for each in vars(domain_events).values() if isinstance(each, type) and issubclass(each, DomainEvent)
    ]
    audits = {cls.__event__.name for cls in classes if cls.__event__.audit is not None}
    yield "audit records", sorted(audited), sorted(id_ for id_, type_ in ids.items() if type_ in audits)

    async with dashtam.application.database.get_session() as session:

        async def rows(*wanted: Any) -> list[Any]:
            return list(await session.execute(select(*wanted)))

        async def shown(column: Any, *where: Any) -> list[str]:
            return sorted(str(value) for value in await session.scalars(select(column).where(*where)))

        yield "users", await shown(UserModel.id), of("UserRegistrationSucceeded", "user_id")
        yield "settings", await shown(UserSettingsModel.user_id), of("UserRegistrationSucceeded", "user_id")
        proven = of("EmailVerificationSucceeded", "user_id") + of("PasswordResetConfirmSucceeded", "user_id")
        yield "verified", await shown(UserModel.id, UserModel.email_verified_at.is_not(None)), sorted(set(proven))
        yield "sessions", await shown(SessionModel.id), of("UserLoginSucceeded", "session_id")
        logged_out = await shown(SessionModel.id, SessionModel.closed_because == "logout")
        yield "sessions closed by logging out", logged_out, of("UserLogoutSucceeded", "session_id")
        closed = len(await shown(SessionModel.id, SessionModel.closed_at.is_not(None)))
        told_of = count["UserLogoutSucceeded"] + count["SessionRevocationSucceeded"]
        yield "closed sessions", closed, told_of + sum(of("AllSessionsRevocationSucceeded", "session_count"))
        connected = sorted(set(of("ProviderConnectionSucceeded", "connection_id")))
        yield "connections", await shown(ConnectionModel.id), connected
        gone = await shown(ConnectionModel.id, ConnectionModel.status == "disconnected")
        yield "disconnected", gone, of("ProviderDisconnectionSucceeded", "connection_id")
        sealed_away = await shown(ConnectionModel.id, ConnectionModel.sealed_tokens.is_(None))
        yield "connections without tokens", sealed_away, gone
        yield "tokens that are still to be revoked", await shown(RevocationModel.id), []
        yield "accounts", await shown(AccountModel.id), of("AccountCreated", "account_id")
        closed_accounts = await shown(AccountModel.id, AccountModel.status == "closed")
        yield "closed accounts", closed_accounts, of("AccountClosed", "account_id")
        facts = ("AccountCreated", "AccountUpdated", "AccountClosed", "AccountBalanceUpdated")
        yield "notifications", len(await shown(NotificationModel.key)), sum(count[fact] for fact in facts)

        owners = {str(row.id): row.email for row in await rows(UserModel.id, UserModel.email)}
        names = {who.email: who.name for who in world.people}
        ours: dict[tuple[str, str], tuple[Decimal, int, Decimal]] = {}
        here = await rows(AccountModel.id, AccountModel.user_id, AccountModel.provider_account_id, AccountModel.balance)
        amounts: dict[UUID, list[Decimal]] = {}
        for row in await rows(TransactionModel.account_id, TransactionModel.amount):
            amounts.setdefault(row.account_id, []).append(row.amount)
        for row in here:
            mine = amounts.get(row.id, [])
            ours[names[owners[str(row.user_id)]], row.provider_account_id] = (
                row.balance,
                len(mine),
                sum(mine, Decimal()),
            )
        theirs: dict[tuple[str, str], tuple[Decimal, int, Decimal]] = {}
        for name in sorted({name for name, _ in ours}):
            customer = Customer(name, lambda: datetime.now(UTC))
            if world.spent[name]:
                customer.act(world.spent[name])
            for account in customer.accounts:
                theirs[name, account.id] = (account.balance, len(account.transactions), account.balance)
        yield "accounts and transactions as at the bank", ours, theirs

    owed: Counter[tuple[str, str]] = Counter()
    subjects = {
        "UserRegistrationSucceeded": WELCOME,
        "EmailVerificationSucceeded": VERIFIED,
        "UserPasswordChangeSucceeded": CHANGED,
        "PasswordResetConfirmSucceeded": CHANGED,
        "PasswordResetRequestSucceeded": RESET,
        "ProviderConnectionSucceeded": CONNECTED,
    }
    for type_, _, fields in events:
        if type_ in subjects:
            owed[fields.get("email") or owners[fields["user_id"]], subjects[type_]] += 1
    arrived = {(str(mail["To"]), str(mail["Subject"]), str(mail["Message-ID"])) for mail in world.mail.accepted}
    yield "mails, those with one Message-ID counted once", Counter((to, subject) for to, subject, _ in arrived), owed


async def test_every_workflow_has_one_outcome_and_all_that_follows_wherever_its_process_is_killed(
    database_url: str,
) -> None:
    database = make_url(database_url).get_backend_name()
    every = int(os.environ.get("DASHTAM_KILL_EVERY", EVERY[database]))
    seed = int(os.environ.get("DASHTAM_KILL_SEED", random.randrange(1000)))
    print(f"{database}: every {every}. step, DASHTAM_KILL_SEED={seed}")
    async with world_on(database_url, every, seed) as world:
        try:
            for scenario in SCENARIOS:
                if scenario.name == "disconnection":
                    await world.catch_up()
                await world.play(scenario)
            async with world.recovered() as dashtam:
                await world.look_again(dashtam)
                async for what, there_is, there_should_be in everything(world, dashtam):
                    if there_is != there_should_be:
                        world.faults.append(f"{what}: {difference(there_is, there_should_be)}")
        finally:
            print("\n".join(world.lines), f"\n{world.forks} processes", flush=True)
    assert not world.faults, "\n".join(world.faults)


def difference(there_is: Any, there_should_be: Any) -> str:
    if isinstance(there_is, dict) and isinstance(there_should_be, dict):
        keys = [key for key in {*there_is, *there_should_be} if there_is.get(key) != there_should_be.get(key)]
        return "; ".join(f"{key}: {there_is.get(key)}, and not {there_should_be.get(key)}" for key in keys)
    if isinstance(there_is, list) and isinstance(there_should_be, list):
        more, less = Counter(map(str, there_is)), Counter(map(str, there_should_be))
        return f"too much: {sorted((more - less).elements())}, too little: {sorted((less - more).elements())}"
    return f"{there_is}, and not {there_should_be}"


@asynccontextmanager
async def world_on(database_url: str, every: int, seed: int) -> AsyncIterator[World]:
    command = [sys.executable, str(CHILD)]
    pipe = subprocess.PIPE
    engine = create_async_engine(database_url)
    with banking("--port", "0", "--redirect-uri", CALLBACK) as bank:
        bank_url = await asyncio.to_thread(address, bank)
        async with mail_server() as mail, httpx.AsyncClient(base_url=bank_url) as browser:
            settings = {"database_url": database_url, "smtp_port": mail.port, "bank_url": bank_url}
            settings["secret_key"] = make_key()
            child = await asyncio.create_subprocess_exec(*command, stdin=pipe, stdout=pipe)
            try:
                assert child.stdin is not None
                child.stdin.write(json.dumps(settings).encode() + b"\n")
                world = World(
                    engine=engine,
                    mail=mail,
                    browser=browser,
                    child=child,
                    settings=settings,
                    every=every,
                    seed=seed,
                )
                async with world.recovered(deliver=False) as dashtam:
                    for each in dashtam.bus.subscriptions:  # whoever takes over from the dead has less to take over
                        if each.delivery in (Delivery.DURABLE, Delivery.TRANSACTIONAL):
                            await dashtam.bus.operator.lanes(each.name, 1, "a test takes over often")
                yield world
            finally:
                if child.returncode is None:
                    child.kill()
                await child.communicate()
                await engine.dispose()
