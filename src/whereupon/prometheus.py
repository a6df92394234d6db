"""Prometheus metrics of a bus: what it publishes and delivers here, and how far the database's subscriptions are.

    metrics = Metrics(bus)                        # before the bus starts
    api.mount("/metrics", metrics.app())          # or: whereupon worker app.main:bus --metrics 127.0.0.1:9464

Counters and histograms tell what this process did: add them up over all processes. Gauges that begin with
`whereupon_database_` tell of the database and are the same wherever they are asked for: take the maximum. They are
measured when somebody scrapes, for `timeout` seconds at most and not again within `fresh_for` seconds.

Labels are the names of subscriptions, of event types and of workflows, and of each no more than `most_labels`: what
comes after those is `other`. No id and no message is ever a label.

Counters start at 0 with the process. What a process had delivered and not told when it was killed is not counted, and
what another delivers again is counted there: over crashes the sums are near the truth, and the database is exact.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from bisect import bisect_left
from collections.abc import Awaitable, Callable, Iterable, Iterator, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Final

from prometheus_client import REGISTRY, CollectorRegistry, start_http_server
from prometheus_client.exposition import choose_encoder
from prometheus_client.metrics_core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector
from sqlalchemy import exists, func, literal_column, select

from whereupon.durable import EventBus
from whereupon.errors import WhereuponError
from whereupon.event import DomainEvent
from whereupon.lag import Lag
from whereupon.logs import message_of
from whereupon.memory import InMemoryEventBus
from whereupon.observer import FAILED, SUCCEEDED, Observer, Run
from whereupon.registry import alive, registered
from whereupon.schema import exception, process, workflow
from whereupon.store import DEAD, RETRYING, SKIPPED

OTHER: Final = "other"
COUNTED: Final = 10_000
"""Dead letters of a subscription, and open attempts of all workflows, are counted up to here."""
HANDLER_SECONDS: Final = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)
DELAY_SECONDS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0, 1800.0)
_MULTIPROCESS: Final = ("PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir")


class MetricsError(WhereuponError):
    """Metrics can't be told the way they were asked for; the message says why, and what to do."""


class _Names:
    """The values of a label, so many at most."""

    def __init__(self, most: int) -> None:
        self._most = most
        self._known: set[str] = set()

    def __call__(self, name: str) -> str:
        if name in self._known:
            return name
        if len(self._known) >= self._most:
            return OTHER
        self._known.add(name)
        return name

    def known(self) -> tuple[str, ...]:
        """The labels that there are: those of their own, and, once there is no room for more, that of all others."""
        return (*self._known, OTHER) if len(self._known) >= self._most else tuple(self._known)


class _Histogram:
    __slots__ = ("_bounds", "_counts", "_sum")

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    def add(self, value: float) -> None:
        self._counts[bisect_left(self._bounds, value)] += 1
        self._sum += value

    def told(self) -> tuple[list[tuple[str, float]], float]:
        total, buckets = 0, []
        for bound, count in zip((*self._bounds, float("inf")), self._counts, strict=True):
            total += count
            buckets.append(("+Inf" if bound == float("inf") else str(bound), float(total)))
        return buckets, self._sum


class _Cell:
    """What became of the events of one type for one subscription."""

    __slots__ = ("dead", "delivered", "failed", "retried", "skipped")

    def __init__(self) -> None:
        self.delivered = self.failed = self.retried = self.dead = self.skipped = 0


@dataclass(frozen=True, slots=True)
class _Measured:
    """The database, at one moment."""

    at: float = 0.0
    """By `time.monotonic`."""
    error: str | None = "it was not measured yet"
    seconds: float = 0.0
    lags: Sequence[Lag] = ()
    dead: dict[str, int] = field(default_factory=dict)
    workers: dict[str, int] = field(default_factory=dict)
    all_workers: int = 0
    open: dict[str, int] = field(default_factory=dict)
    orphaned: dict[str, int] = field(default_factory=dict)


class Metrics(Observer, Collector):
    """The metrics of one bus, as a collector of a registry of `prometheus_client`; for `app()` see there.

    Make it before the bus starts: it observes the bus. A registry has the metrics of one bus; give a second bus a
    registry of its own. Raises `MetricsError` where that has one already, and in prometheus_client's multiprocess mode,
    whose files know nothing of what is measured at the time of a scrape.
    """

    def __init__(
        self,
        bus: EventBus | InMemoryEventBus,
        *,
        registry: CollectorRegistry = REGISTRY,
        most_labels: int = 500,
        fresh_for: float = 5.0,
        timeout: float = 5.0,
    ) -> None:
        for name, value in (("most_labels", most_labels), ("fresh_for", fresh_for), ("timeout", timeout)):
            if not value > 0:
                raise ValueError(f"Metrics({name}={value}): it is more than 0")
        if (variable := next((name for name in _MULTIPROCESS if name in os.environ), None)) is not None:
            raise MetricsError(
                f"{variable} is set, and in prometheus_client's multiprocess mode a scrape is answered from files that "
                "these metrics are not kept in. Have each process scraped by itself: unset the variable, and start "
                "workers with `whereupon worker … --metrics 127.0.0.1:PORT`, each with a port of its own"
            )
        self._bus = bus
        self._registry = registry
        self._fresh_for = fresh_for
        self._timeout = timeout
        self._lock = threading.Lock()
        self._types = _Names(most_labels)
        self._subscriptions = _Names(most_labels)
        self._workflows = _Names(most_labels)
        self._published: dict[str, int] = {}
        self._cells: dict[tuple[str, str], _Cell] = {}
        self._durations: dict[str, _Histogram] = {}
        self._delays: dict[str, _Histogram] = {}
        self._opened: dict[str, int] = {}
        self._closed: dict[tuple[str, str], int] = {}
        self._loop: asyncio.AbstractEventLoop | None = None
        self._measuring: asyncio.Task[None] | None = None
        self._measured = _Measured()
        bus.observe(self)
        try:
            registry.register(self)
        except ValueError:
            raise MetricsError(
                "this registry has the metrics of a bus already. Give each bus its own: "
                "Metrics(bus, registry=CollectorRegistry())"
            ) from None

    # --- what the bus tells -----------------------------------------------------------------------------------------

    def published(self, events: Sequence[DomainEvent]) -> None:
        with self._lock:
            for event in events:
                name = self._types(type(event).__event__.name)
                self._published[name] = self._published.get(name, 0) + 1

    def settled(self, runs: Sequence[Run]) -> None:
        with self._lock:
            for run in runs:
                name = run.subscription.name
                cell = self._cells.get((name, run.event_type))
                if cell is None:
                    cell = self._cell(name, run.event_type)
                outcome = run.outcome
                if outcome == SUCCEEDED:
                    cell.delivered += 1
                elif outcome == RETRYING:
                    cell.failed += 1
                    cell.retried += 1
                elif outcome == DEAD:
                    cell.failed += 1
                    cell.dead += 1
                elif outcome == FAILED:
                    cell.failed += 1
                elif outcome == SKIPPED:
                    cell.skipped += 1
                else:
                    continue
                if run.called:
                    durations = self._durations.get(name)
                    if durations is None:
                        durations = self._durations.setdefault(self._subscriptions(name), _Histogram(HANDLER_SECONDS))
                    durations.add(run.seconds)
                    if run.attempt == 1 and not run.generation and run.recorded_at is not None:
                        delays = self._delays.get(name)
                        if delays is None:
                            delays = self._delays.setdefault(self._subscriptions(name), _Histogram(DELAY_SECONDS))
                        delays.add(max(0.0, run.began - run.recorded_at.timestamp()))

    def _cell(self, subscription: str, event_type: str) -> _Cell:
        key = (self._subscriptions(subscription), self._types(event_type))
        return self._cells.setdefault(key, _Cell())

    def opened(self, workflow: str) -> None:
        with self._lock:
            name = self._workflows(workflow)
            self._opened[name] = self._opened.get(name, 0) + 1

    def closed(self, workflow: str, outcome: str) -> None:
        with self._lock:
            key = (self._workflows(workflow), str(outcome))
            self._closed[key] = self._closed.get(key, 0) + 1

    # --- what a registry collects -----------------------------------------------------------------------------------

    def describe(self) -> Iterable[Metric]:
        """The families, without a value: registering measures nothing."""
        return [*self._counted(), *self._gauges(_Measured(error=None))]

    def collect(self) -> Iterable[Metric]:
        """Called by the registry. On another thread it waits for a measurement, on the bus's loop it begins one."""
        self._refresh()
        with self._lock:
            self._from_zero()
            counted = list(self._counted())
        return [*counted, *self._gauges(self._measured)]

    def _from_zero(self) -> None:
        """What was never counted is 0 and not missing: so that its first increase is seen as one."""
        for subscription in self._bus.subscriptions:
            for cls in subscription.event_types:
                if cls is not DomainEvent:
                    self._cell(subscription.name, cls.__event__.name)
                    self._published.setdefault(self._types(cls.__event__.name), 0)

    def _counted(self) -> Iterator[Metric]:
        published = CounterMetricFamily(
            "whereupon_published", "Events whose transaction was committed.", labels=["event_type"]
        )
        for name, number in sorted(self._published.items()):
            published.add_metric([name], number)
        yield published
        for attribute, text in (
            ("delivered", "Deliveries that succeeded."),
            ("failed", "Calls of handlers that failed, and events that could not be read."),
            ("retried", "Failures after which the delivery is tried again."),
            ("dead", "Deliveries that used up their attempts."),
            ("skipped", "Deliveries that their handler discarded."),
        ):
            family = CounterMetricFamily(f"whereupon_{attribute}", text, labels=["subscription", "event_type"])
            for key, cell in sorted(self._cells.items()):
                family.add_metric(key, getattr(cell, attribute))
            yield family
        for attribute, text, histograms in (
            ("handler_seconds", "How long calls of handlers took.", self._durations),
            ("delay_seconds", "From when an event was recorded to the first call of a handler.", self._delays),
        ):
            histogram = HistogramMetricFamily(f"whereupon_{attribute}", text, labels=["subscription"])
            for name, one in sorted(histograms.items()):
                buckets, total = one.told()
                histogram.add_metric([name], buckets=buckets, sum_value=total)
            yield histogram
        in_flight = GaugeMetricFamily(
            "whereupon_in_flight", "Deliveries begun in this process and not settled.", labels=["subscription"]
        )
        if isinstance(self._bus, EventBus):
            flying: dict[str, int] = {}
            for name, number in self._bus.in_flight().items():
                label = self._subscriptions(name)
                flying[label] = flying.get(label, 0) + number
            for name, number in sorted(flying.items()):
                in_flight.add_metric([name], number)
        yield in_flight
        opened = CounterMetricFamily("whereupon_workflows_opened", "Attempts at workflows.", labels=["workflow"])
        for name, number in sorted(self._opened.items()):
            opened.add_metric([name], number)
        yield opened
        closed = CounterMetricFamily(
            "whereupon_workflows_closed", "Attempts that came to their outcome.", labels=["workflow", "outcome"]
        )
        for key, number in sorted(self._closed.items()):
            closed.add_metric(key, number)
        yield closed

    def _gauges(self, found: _Measured) -> Iterator[Metric]:
        if not isinstance(self._bus, EventBus):
            return
        yield GaugeMetricFamily(
            "whereupon_database_up",
            "Whether the database could be measured; where it could not, its other gauges are missing.",
            value=float(found.error is None),
        )
        families = [
            _gauge(
                "lag_seconds", "Age of the oldest event that a subscription has not settled; 0: none.", "subscription"
            ),
            _gauge("oldest_owed_timestamp_seconds", "When that event was recorded, from 1970.", "subscription"),
            _gauge("promise_seconds", "What the subscription promises by within=.", "subscription"),
            _gauge("paused", "Whether an operator, or an event that can't be read, has paused it.", "subscription"),
            _gauge("dead_letters", f"Dead letters of a subscription, counted up to {COUNTED}.", "subscription"),
            _gauge("subscription_workers", "Live workers that serve a subscription.", "subscription"),
            _gauge("workflows_open", f"Attempts under way, counted up to {COUNTED} in all.", "workflow"),
            _gauge("workflows_orphaned", "Those of them whose process is gone.", "workflow"),
        ]
        workers = GaugeMetricFamily("whereupon_database_workers", "Live workers of all processes.")
        measured = GaugeMetricFamily("whereupon_database_measure_seconds", "How long the measurement took.")
        if found.error is None and found.at:
            lag, oldest, promise, paused, dead, serving, open_, orphaned = families
            for one in found.lags:
                label = [self._subscriptions(one.subscription)]
                if label == [OTHER]:
                    continue  # a sum or a mean of several lags would say nothing
                lag.add_metric(label, one.age)
                if one.oldest is not None:
                    oldest.add_metric(label, one.oldest.recorded_at.timestamp())
                if one.within is not None:
                    promise.add_metric(label, one.within)
                paused.add_metric(label, one.paused)
                dead.add_metric(label, found.dead.get(one.subscription, 0))
                serving.add_metric(label, found.workers.get(one.subscription, 0))
            for family, numbers in ((open_, found.open), (orphaned, found.orphaned)):
                for name in found.open:
                    self._workflows(name)
                named = dict.fromkeys(self._workflows.known(), 0)  # what has ended is 0, and no gap
                for name, number in numbers.items():
                    named[self._workflows(name)] = named.get(self._workflows(name), 0) + number
                for name, number in sorted(named.items()):
                    family.add_metric([name], number)
            workers.add_metric([], found.all_workers)
            measured.add_metric([], found.seconds)
        yield from (*families, workers, measured)

    # --- the database -----------------------------------------------------------------------------------------------

    def _stale(self) -> bool:
        return not self._measured.at or time.monotonic() - self._measured.at > self._fresh_for

    def _refresh(self) -> None:
        """Measure, if that is due: here and now where this is another thread than the bus's loop."""
        bus = self._bus
        if not isinstance(bus, EventBus) or not self._stale():
            return
        try:
            here: asyncio.AbstractEventLoop | None = asyncio.get_running_loop()
        except RuntimeError:
            here = None
        loop = bus._loop or here
        if loop is None or not loop.is_running():
            self._measured = _Measured(error="the bus has no event loop that runs")
        elif loop is here:
            self._begin()
        else:
            waiting = asyncio.run_coroutine_threadsafe(self.measure(), loop)
            try:
                waiting.result(self._timeout + 1)
            except TimeoutError:
                waiting.cancel()
                self._unmeasured("the event loop of the bus did not get to it in time")

    def _begin(self) -> asyncio.Task[None]:
        """The measurement under way; those that come while it runs share it."""
        loop = asyncio.get_running_loop()
        if self._measuring is None or self._measuring.done() or self._loop is not loop:
            self._loop = loop
            self._measuring = loop.create_task(self._measure())
        return self._measuring

    async def measure(self) -> None:
        """Measure the database, unless that was done within `fresh_for` seconds; on the loop of the bus."""
        if self._stale():
            await asyncio.shield(self._begin())

    async def _measure(self) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(self._timeout):
                found = await self._look()
        except Exception as error:
            self._unmeasured(
                f"it took longer than {self._timeout:g} s" if isinstance(error, TimeoutError) else message_of(error)
            )
            return
        self._measured = _Measured(time.monotonic(), None, time.monotonic() - began, **found)

    def _unmeasured(self, why: str) -> None:
        if self._measured.error is None or not self._measured.at:  # said once, until it succeeds again
            self._bus.logger.warning(
                "metrics_database_unmeasured",
                error_message=f"{why}. Until it can be measured again, the gauges of the database are missing",
            )
        self._measured = _Measured(time.monotonic(), why)

    async def _look(self) -> dict[str, Any]:
        bus = self._bus
        assert isinstance(bus, EventBus)
        lags = await bus.lags()
        store = bus._store
        found: dict[str, Any] = {"lags": lags, "dead": {}, "workers": {}}
        async with store.reading() as connection:
            for one in await registered(connection):
                some: Any = (
                    select(literal_column("1"))
                    .select_from(exception)
                    .where(exception.c.subscription == one.name, exception.c.state == DEAD)
                    .limit(COUNTED)
                )
                number = await connection.scalar(select(func.count()).select_from(some.subquery()))
                found["dead"][one.name] = number or 0
            serving = await alive(connection, store)
            found["all_workers"] = len(serving)
            for names in serving:
                for name in names:
                    found["workers"][name] = found["workers"].get(name, 0) + 1
            gone = ~exists().where(process.c.id == workflow.c.process, process.c.lease_until > store.now)
            under_way = select(workflow.c.name).where(workflow.c.state == "open")
            for key, query in (("open", under_way), ("orphaned", under_way.where(gone))):
                names_of = query.limit(COUNTED).subquery()
                rows = await connection.execute(select(names_of.c.name, func.count()).group_by(names_of.c.name))
                found[key] = {row[0]: row[1] for row in rows}
        return found

    # --- ways out ---------------------------------------------------------------------------------------------------

    @staticmethod
    def of(bus: EventBus) -> Metrics | None:
        """Those that the application has made for its bus, if it has."""
        observing = bus._observing
        return None if observing is None else next((one for one in observing if isinstance(one, Metrics)), None)

    def app(self) -> Callable[..., Awaitable[None]]:
        """An ASGI application that answers every GET with the metrics of the registry, for mounting in another one.

        It has no access control of its own: names of handlers and events are in it, so keep it where only Prometheus
        comes, as you would any metrics.
        """
        return self._answer

    async def _answer(
        self,
        scope: MutableMapping[str, Any],
        receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
        send: Callable[[MutableMapping[str, Any]], Awaitable[None]],
    ) -> None:
        if scope["type"] != "http":
            raise RuntimeError(f"the metrics are asked for by HTTP, not {scope['type']}")
        status, kind, body = 200, "text/plain", b"GET, and nothing else\n"
        if scope["method"] not in ("GET", "HEAD"):
            status = 405
        else:
            if isinstance(self._bus, EventBus):
                await self.measure()
            accept = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"accept"), "")
            encode, kind = choose_encoder(accept)
            body = encode(self._registry)
        headers = [(b"content-type", kind.encode()), (b"content-length", str(len(body)).encode())]
        await send({"type": "http.response.start", "status": status, "headers": headers})
        await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else body})

    @contextmanager
    def serving(self, host: str, port: int) -> Iterator[str]:
        """Answer at `http://host:port/metrics`, in a thread, while the block runs; port 0 is one that is free.

        Gives the URL. Raises `MetricsError` where nobody can listen there.
        """
        try:
            server, thread = start_http_server(port, host, self._registry)
        except (OSError, OverflowError) as error:
            raise MetricsError(
                f"nobody can be told the metrics at {host}:{port}: {error}. Name another address; each worker on a "
                "host needs a port of its own"
            ) from error
        try:
            shown = f"[{host}]" if ":" in host else host
            yield f"http://{shown}:{server.server_port}/metrics"
        finally:
            server.shutdown()
            server.server_close()
            thread.join(5)


def _gauge(name: str, text: str, label: str) -> GaugeMetricFamily:
    return GaugeMetricFamily(f"whereupon_database_{name}", text, labels=[label])


def address_of(text: str) -> tuple[str, int]:
    """Host and port of `HOST:PORT`, `:PORT` or `PORT`; without a host it is 127.0.0.1. Raises `MetricsError`."""
    host, _, port = text.rpartition(":")
    if not port.isdecimal() or int(port) > 65535:
        raise MetricsError(f"{text!r} is no address: write HOST:PORT, as 127.0.0.1:9464, or the port alone")
    return host.strip("[]") or "127.0.0.1", int(port)
