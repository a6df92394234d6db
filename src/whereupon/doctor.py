"""What is wrong with a bus and its database, looked for where experience says it is; each finding with a way out.

Nothing is changed, and nothing registered: whoever only looks leaves no trace.
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon import cluster, schema
from whereupon.errors import ForeignClusterError, SchemaError
from whereupon.event import DomainEvent
from whereupon.lag import Lags
from whereupon.registry import alive, registered, with_aliases
from whereupon.schema import definition as definition_table
from whereupon.schema import exception, log, process, workflow
from whereupon.store import DEAD, PARKED, RETRYING, WAITING, Store
from whereupon.subscription import Delivery, Subscription, Subscriptions

LATE: Final = timedelta(seconds=60)
"""From which age on an event that waits, or a transaction that is open, is worth a word."""
SKEW: Final = 1.0
"""Seconds between two clocks from which on they are told to differ."""
LOOKED_AT: Final = 10_000
"""The newest events of the log, whose types are compared with what is heard."""
SHOWN: Final = 5


class Level(StrEnum):
    FAULT = "fault"
    """Something is not delivered, or will not be."""
    WARNING = "warning"
    """Somebody should look."""
    NOTE = "note"
    """As it may well be meant."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    check: str
    level: Level
    what: str
    way_out: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """What was looked at, and what was found."""

    name: str
    question: str
    findings: Sequence[Finding]


_Found = AsyncIterator[Finding]


class Doctor:
    def __init__(
        self,
        store: Store,
        subscriptions: Subscriptions,
        class_of: Callable[[str], type[DomainEvent] | None],
        lags: Lags,
    ) -> None:
        self._store = store
        self._subscriptions = subscriptions
        self._class_of = class_of
        self._lags = lags

    async def examine(self) -> AsyncIterator[Check]:
        """Each check as it is done; after tables or a cluster that can't be used none follows.

        Raises `DatabaseUnavailableError`.
        """
        checks: list[tuple[str, str, Callable[[], _Found]]] = [
            ("tables", "are whereupon's tables there, as this build needs them?", self._tables),
            ("cluster", "is it the PostgreSQL cluster that transaction ids are from?", self._cluster),
            ("clock", "do this machine and the database agree on the time?", self._clock),
            ("transactions", "does a transaction stay open?", self._transactions),
            ("workers", "does somebody deliver?", self._workers),
            ("subscriptions", "does a running worker serve each, as this build declares it?", self._served),
            ("lag", "does something wait longer than it should?", self._lag),
            ("failures", "is something dead, or overdue?", self._failures),
            ("hearing", "is each event heard, and does each handler hear something?", self._hearing),
            ("workflows", "is each attempt closed?", self._workflows),
        ]
        for name, question, check in checks:
            findings = [finding async for finding in check()]
            yield Check(name=name, question=question, findings=findings)
            if name in ("tables", "cluster") and findings:
                return

    async def _tables(self) -> _Found:
        try:
            schema.check_revision(await self._store.revision(), self._store.shown_url)
        except SchemaError as error:
            yield Finding(check="tables", level=Level.FAULT, what=str(error), way_out="whereupon db upgrade")
            return
        with self._store.reaching():  # what follows asks in the store's own way
            await self._store.prepare(create=False)

    async def _cluster(self) -> _Found:
        try:
            await cluster.check(self._store)
        except ForeignClusterError as error:
            yield Finding(check="cluster", level=Level.FAULT, what=str(error), way_out="whereupon db rebase")

    async def _clock(self) -> _Found:
        shortest, skew = float("inf"), 0.0
        async with self._store.reading() as connection:
            for _ in range(3):  # the shortest trip tells best
                began, here = time.monotonic(), time.time()
                theirs = await self._now(connection)
                took = time.monotonic() - began
                if took < shortest:
                    shortest, skew = took, here + took / 2 - theirs.timestamp()
        if abs(skew) > SKEW + shortest:
            yield Finding(
                check="clock",
                level=Level.WARNING,
                what=f"this machine's clock is {abs(skew):.1f} s {'ahead of' if skew > 0 else 'behind'} the "
                "database's. Leases and retries go by the database's, so nothing is lost; occurred_at goes by this",
                way_out="let both be set by NTP",
            )

    async def _transactions(self) -> _Found:
        if self._store.engine.dialect.name != "postgresql":
            return
        async with self._store.reading() as connection:
            rows = await connection.execute(
                text(
                    "SELECT pid, usename, application_name, state, clock_timestamp() - xact_start AS age "
                    "FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
                    "AND backend_type = 'client backend' AND xact_start < clock_timestamp() - CAST(:late AS interval) "
                    "ORDER BY xact_start LIMIT :limit"
                ),
                {"late": LATE, "limit": SHOWN},
            )
            for row in rows:
                who = f"{row.usename or 'somebody'}{f' ({row.application_name})' if row.application_name else ''}"
                yield Finding(
                    check="transactions",
                    level=Level.WARNING,
                    what=f"backend {row.pid} of {who} has had a transaction open for {_age(row.age)} ({row.state}). "
                    "What it published nobody sees before it commits; others' events go on, old rows stay",
                    way_out=f"end it where it was begun, or SELECT pg_terminate_backend({row.pid})",
                )
            prepared = await connection.execute(
                text(
                    "SELECT gid, clock_timestamp() - prepared AS age FROM pg_prepared_xacts "
                    "WHERE database = current_database() AND prepared < clock_timestamp() - CAST(:late AS interval) "
                    "ORDER BY prepared LIMIT :limit"
                ),
                {"late": LATE, "limit": SHOWN},
            )
            for row in prepared:
                yield Finding(
                    check="transactions",
                    level=Level.WARNING,
                    what=f"the prepared transaction {row.gid!r} has been open for {_age(row.age)}",
                    way_out=f"COMMIT PREPARED or ROLLBACK PREPARED {row.gid!r}",
                )

    async def _now(self, connection: AsyncConnection) -> datetime:
        now: datetime = (await connection.execute(select(self._store.now_as_time))).scalar_one()
        return now

    def _declared(self) -> dict[str, Subscription]:
        return {s.name: s for s in self._subscriptions if s.delivery is not Delivery.AFTER_COMMIT}

    async def _workers(self) -> _Found:
        async with self._store.reading() as connection:
            serving, known = await alive(connection, self._store), await registered(connection)
        if known and not serving:
            yield Finding(
                check="workers",
                level=Level.FAULT,
                what=f"no worker runs on {self._store.shown_url}: what is published waits in the log",
                way_out="start one: `whereupon worker module:bus`, or `async with bus` in the application",
            )

    async def _served(self) -> _Found:
        async with self._store.reading() as connection:
            serving, known = await alive(connection, self._store), await registered(connection)
            revisions = {
                (row.subscription, row.definition): row.revision
                for row in await connection.execute(select(definition_table))
            }
        declared = self._declared()
        for one in known:
            if one.paused:
                yield Finding(
                    check="subscriptions",
                    level=Level.WARNING,
                    what=f"{one.name} is paused",
                    way_out=f"`whereupon handlers list` says why; `whereupon handlers resume {one.name}`",
                )
            elif serving and not any(one.name in serves for serves in serving):
                here = one.name in declared
                yield Finding(
                    check="subscriptions",
                    level=Level.FAULT if here else Level.WARNING,
                    what=f"no running worker knows {one.name}"
                    + ("" if here or not declared else ", nor does this build"),
                    way_out="start a worker of a build that declares it"
                    + ("" if here else f", or, if no build does any more, `whereupon handlers retire {one.name}`"),
                )
            mine = declared.get(one.name)
            if mine is not None and mine.definition != one.definition:
                older = (one.name, mine.definition) in revisions
                yield Finding(
                    check="subscriptions",
                    level=Level.WARNING,
                    what=f"this build declares {one.name} otherwise than the one that serves it: "
                    + ("it is an older build" if older else "the first process of it that starts takes over"),
                    way_out=f"deploy the newer build, or `whereupon handlers adopt {one.name}` to go on with this one"
                    if older
                    else "nothing, if it is about to be deployed",
                )
        names = {one.name for one in known}
        for name in sorted(set(declared) - names):
            yield Finding(
                check="subscriptions",
                level=Level.NOTE,
                what=f"{name} is declared by this build, and no process that does has started here yet: it will hear "
                "what is published from then on",
                way_out="start it; start='beginning' gives it the past, too",
            )

    async def _lag(self) -> _Found:
        for lag in await self._lags.measure():
            limit = LATE.total_seconds() if lag.within is None else lag.within
            if lag.oldest is None or lag.age <= limit or lag.paused:
                continue
            promised = "" if lag.within is None else f", and promises to settle within {_age(timedelta(seconds=limit))}"
            yield Finding(
                check="lag",
                level=Level.FAULT,
                what=f"{lag.subscription} owes {lag.oldest.event_type} {lag.oldest.event_id}, which was published "
                f"{_age(timedelta(seconds=lag.age))} ago{promised}",
                way_out=f"`whereupon explain {lag.oldest.event_id}` says what it waits for; more workers, a higher "
                "concurrency or a timeout help if its handler is slow",
            )

    async def _failures(self) -> _Found:
        async with self._store.reading() as connection:
            counts: dict[str, dict[str, int]] = {}
            for name, state, number in await connection.execute(
                select(exception.c.subscription, exception.c.state, func.count()).group_by(
                    exception.c.subscription, exception.c.state
                )
            ):
                counts.setdefault(name, {})[state] = number
            late = select(exception.c.subscription, func.min(exception.c.next_at), self._store.now_as_time).where(
                exception.c.state.in_([RETRYING, WAITING]), exception.c.next_at.is_not(None)
            )
            overdue = [
                (name, now - at)
                for name, at, now in await connection.execute(late.group_by(exception.c.subscription))
                if now - at > LATE
            ]
        for name in sorted(counts):
            dead, parked = counts[name].get(DEAD, 0), counts[name].get(PARKED, 0)
            if dead:
                behind = f", and {parked} wait behind them" if parked else ""
                yield Finding(
                    check="failures",
                    level=Level.WARNING,
                    what=f"{name} has {dead} dead {'letter' if dead == 1 else 'letters'}{behind}",
                    way_out=f"`whereupon dead list --subscription {name}`, then dead retry, edit or skip",
                )
        for name, age in overdue:
            yield Finding(
                check="failures",
                level=Level.FAULT,
                what=f"a delivery of {name} has been due for {_age(age)}, and nobody tries it",
                way_out="see what was found about workers and subscriptions; its concurrency may be used up",
            )

    async def _hearing(self) -> _Found:
        async with self._store.reading() as connection:
            known = await registered(connection)
            newest = select(log.c.type, log.c.version).order_by(log.c.position.desc()).limit(LOOKED_AT).subquery()
            seen: dict[str, int] = {}
            versions: dict[str, int] = {}
            for name, version, number in await connection.execute(
                select(newest.c.type, func.max(newest.c.version), func.count()).group_by(newest.c.type)
            ):
                seen[name], versions[name] = number, version
        reacting: set[str] = set()
        for one in known:
            reacting.update(with_aliases(one.types, self._class_of) if one.types is not None else ())
        reacting.update(
            cls.__event__.name
            for s in self._subscriptions
            if s.delivery is Delivery.AFTER_COMMIT
            for cls in s.event_types
            if cls is not DomainEvent
        )
        everything = any(one.types is None for one in known)
        for name in sorted(set(seen) - reacting):
            yield Finding(
                check="hearing",
                level=Level.NOTE if everything else Level.WARNING,
                what=f"nobody reacts to {name} ({seen[name]} of the last {sum(seen.values())} events)"
                + (": only what hears everything hears it" if everything else ""),
                way_out="subscribe a handler, or leave it, if it is published for the record",
            )
        for one in known:
            if seen and one.types is not None and not seen.keys() & set(with_aliases(one.types, self._class_of)):
                yield Finding(
                    check="hearing",
                    level=Level.NOTE,
                    what=f"{one.name} heard nothing among the last {sum(seen.values())} events: "
                    f"it hears {', '.join(sorted(one.types))}",
                    way_out="is it published under that name? `whereupon explain NAME` shows near misses",
                )
        if len(self._subscriptions):
            for finding in self._unreadable(versions):
                yield finding

    def _unreadable(self, versions: Mapping[str, int]) -> list[Finding]:
        findings = []
        for name, version in sorted(versions.items()):
            cls = self._class_of(name)
            if cls is None:
                what = f"this build knows no class for {name}, which is in the log"
            elif version > cls.__event__.version:
                what = f"{name} is in the log in version {version}, and this build knows {cls.__event__.version}"
            else:
                continue
            findings.append(
                Finding(
                    check="hearing",
                    level=Level.WARNING,
                    what=f"{what}: a handler of it that hears them gets dead letters",
                    way_out="import the module that defines it, keep its old name in aliases=, or deploy a newer build",
                )
            )
        return findings

    async def _workflows(self) -> _Found:
        async with self._store.reading() as connection:
            gone = ~(
                select(process.c.id)
                .where(process.c.id == workflow.c.process, process.c.lease_until > self._store.now)
                .exists()
            )
            rows = (
                await connection.execute(
                    select(workflow.c.id, workflow.c.name, workflow.c.opened_at, self._store.now_as_time.label("now"))
                    .where(workflow.c.state == "open", gone)
                    .order_by(workflow.c.opened_at)
                    .limit(SHOWN)
                )
            ).all()
        for row in rows:
            if row.now - row.opened_at > LATE:
                yield Finding(
                    check="workflows",
                    level=Level.FAULT,
                    what=f"an attempt at {row.name} ({row.id}) has been open for {_age(row.now - row.opened_at)}, and "
                    "its process is gone",
                    way_out="a worker closes it as Interrupted: start one",
                )


def _age(span: timedelta) -> str:
    seconds = max(0, round(span.total_seconds()))
    for unit, size in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * size:
            return f"{seconds // size} {unit}"
    return f"{seconds} s"
