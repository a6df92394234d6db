"""The metrics of a bus: that they say what happened, that they stay few, and how they are asked for."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
import sys
import threading
import urllib.request
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any, Final

import httpx
import pytest
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from tests.log_records import Records
from whereupon import Delivery, Discard, DomainEvent, EventBus, EventContext, InMemoryEventBus, Retry, Workflow
from whereupon.monitoring import metrics_at
from whereupon.prometheus import Metrics, MetricsError, address_of

pytestmark = pytest.mark.integration

AT_ONCE: Final = Retry(max_attempts=3, first=0)


class BreadBaked(DomainEvent):
    number: int


class BakingAttempted(DomainEvent):
    number: int


class BakingSucceeded(DomainEvent):
    number: int


class BakingFailed(DomainEvent):
    number: int
    reason: str


Baking = Workflow(BakingAttempted, BakingSucceeded, BakingFailed)

Told = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(page: str) -> Told:
    """What a scrape tells, by name and labels."""
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(page)
        for sample in family.samples
    }


def value(told: Told, name: str, **labels: str) -> float | None:
    return told.get((name, frozenset(labels.items())))


def of(told: Told, name: str, label: str = "subscription") -> dict[str, float]:
    """All values of a metric that has this label, added up over its others."""
    found: dict[str, float] = {}
    for (metric, labels), number in told.items():
        if metric == name:
            found[dict(labels)[label]] = found.get(dict(labels)[label], 0) + number
    return found


class Bakery:
    def __init__(self, bus: EventBus, **options: Any) -> None:
        self.bus = bus
        self.registry = CollectorRegistry()
        self.metrics = Metrics(bus, registry=self.registry, fresh_for=0.001, **options)
        self.client = httpx.AsyncClient(transport=httpx.ASGITransport(self.metrics.app()), base_url="http://bakery")

    async def bake(self, *numbers: int) -> list[BreadBaked]:
        events = [BreadBaked(number=number) for number in numbers]
        async with AsyncSession(self.bus.engine) as session, session.begin():
            await self.bus.publish(*events, session=session)
        return events

    async def scrape(self) -> Told:
        answer = await self.client.get("/metrics")
        assert answer.status_code == 200
        return read(answer.text)


@asynccontextmanager
async def bakery(url: str, *, deliver: bool = True, **options: Any) -> AsyncIterator[Bakery]:
    """Not entered: subscribe first."""
    bus = EventBus(url, logger=Records(), create_tables=True, poll_interval=0.05, deliver=deliver)
    here = Bakery(bus, **options)
    yield here
    await here.client.aclose()
    await bus.engine.dispose()


def subscribe(bus: EventBus) -> None:
    @bus.subscribe(BreadBaked, name="shop", within="30s")
    async def shop(event: BreadBaked) -> None: ...

    @bus.subscribe(BreadBaked, name="flaky", retry=AT_ONCE)
    async def flaky(event: BreadBaked, context: EventContext) -> None:
        if event.number % 3 == 0 and context.attempt == 1:
            raise ConnectionError("not yet")

    @bus.subscribe(BreadBaked, name="broken", retry=AT_ONCE)
    async def broken(event: BreadBaked, session: AsyncSession) -> None:
        if event.number % 4 == 0:
            raise LookupError("never")
        if event.number % 4 == 1:
            raise Discard("not ours")

    @bus.subscribe(BreadBaked, name="at once", delivery=Delivery.AFTER_COMMIT)
    async def at_once(event: BreadBaked) -> None: ...


async def test_counters_are_what_was_published_and_what_became_of_it(database_url: str) -> None:
    async with bakery(database_url) as here:
        subscribe(here.bus)
        async with here.bus:
            await here.bake(*range(12))
            async with AsyncSession(here.bus.engine) as session:
                await here.bus.publish(BreadBaked(number=99), session=session)
                await session.rollback()
            await here.bus.drain(30)
            told = await here.scrape()
            async with here.bus.engine.connect() as connection:
                logged = await connection.scalar(text("SELECT count(*) FROM whereupon_log"))
                dead = await connection.scalar(text("SELECT count(*) FROM whereupon_exception WHERE state = 'dead'"))
        assert of(told, "whereupon_published_total", "event_type") == {"BreadBaked": logged} == {"BreadBaked": 12}
        assert of(told, "whereupon_delivered_total") == {"shop": 12, "flaky": 12, "broken": 6, "at once": 12}
        assert of(told, "whereupon_failed_total") == {"shop": 0, "flaky": 4, "broken": 9, "at once": 0}
        assert of(told, "whereupon_retried_total") == {"shop": 0, "flaky": 4, "broken": 6, "at once": 0}
        assert of(told, "whereupon_dead_total") == {"shop": 0, "flaky": 0, "broken": dead, "at once": 0}
        assert of(told, "whereupon_skipped_total") == {"shop": 0, "flaky": 0, "broken": 3, "at once": 0}
        assert dead == 3
        ended = {
            name: delivered + of(told, "whereupon_dead_total")[name] + of(told, "whereupon_skipped_total")[name]
            for name, delivered in of(told, "whereupon_delivered_total").items()
        }
        assert ended == dict.fromkeys(("shop", "flaky", "broken", "at once"), 12), "nothing was killed here"
        calls = of(told, "whereupon_handler_seconds_count")
        assert calls == {"shop": 12, "flaky": 16, "broken": 18, "at once": 12}
        assert of(told, "whereupon_delay_seconds_count") == {"shop": 12, "flaky": 12, "broken": 12}
        bucket = value(told, "whereupon_handler_seconds_bucket", subscription="shop", le="+Inf")
        assert bucket == value(told, "whereupon_handler_seconds_count", subscription="shop")
        assert of(told, "whereupon_in_flight") == {"shop": 0, "flaky": 0, "broken": 0}


async def test_gauges_of_the_database_say_how_far_each_subscription_is(database_url: str) -> None:
    async with bakery(database_url, deliver=False) as here:
        subscribe(here.bus)
        async with here.bus:
            idle = await here.scrape()
            assert of(idle, "whereupon_database_lag_seconds") == {"shop": 0, "flaky": 0, "broken": 0}
            assert value(idle, "whereupon_database_workers") == 0
            await here.bake(1)
            zone = "" if here.bus.engine.dialect.name == "sqlite" else "+00"
            async with here.bus.engine.begin() as connection:
                await connection.execute(text(f"UPDATE whereupon_log SET recorded_at = '2026-01-01 00:00:00{zone}'"))
            await here.bus.operator.pause("flaky", "flour is short")
            told = await here.scrape()
        assert value(told, "whereupon_database_up") == 1
        assert all(age > 86400 for age in of(told, "whereupon_database_lag_seconds").values())
        stamps = of(told, "whereupon_database_oldest_owed_timestamp_seconds")
        assert stamps == dict.fromkeys(("shop", "flaky", "broken"), 1767225600)
        assert of(told, "whereupon_database_promise_seconds") == {"shop": 30}
        assert of(told, "whereupon_database_paused") == {"shop": 0, "flaky": 1, "broken": 0}
        assert of(told, "whereupon_database_subscription_workers") == {"shop": 0, "flaky": 0, "broken": 0}


async def test_dead_letters_workers_and_open_attempts_are_counted_in_the_database(database_url: str) -> None:
    async with bakery(database_url) as here:
        subscribe(here.bus)
        async with here.bus:
            await here.bake(0, 4, 8)
            await here.bus.drain(30)
            attempt = here.bus.workflow(Baking, number=1)
            await attempt.__aenter__()
            lost = here.bus.workflow(Baking, number=2)
            await lost.__aenter__()
            async with here.bus.engine.begin() as connection:
                await connection.execute(
                    text("UPDATE whereupon_workflow SET process = :nobody WHERE id = :id"),
                    {"nobody": "0" * 32, "id": lost.id.hex if here.bus.engine.dialect.name == "sqlite" else lost.id},
                )
            told = await here.scrape()
            await attempt.__aexit__(None, None, None)
        assert of(told, "whereupon_database_dead_letters") == {"shop": 0, "flaky": 0, "broken": 3}
        assert value(told, "whereupon_database_workers") == 1
        assert of(told, "whereupon_database_subscription_workers") == {"shop": 1, "flaky": 1, "broken": 1}
        assert of(told, "whereupon_database_workflows_open", "workflow") == {"Baking": 2}
        assert of(told, "whereupon_database_workflows_orphaned", "workflow") == {"Baking": 1}
        async with here.bus.engine.begin() as connection:
            await connection.execute(text("UPDATE whereupon_workflow SET state = 'interrupted'"))
        ended = await here.scrape()
        for name in ("whereupon_database_workflows_open", "whereupon_database_workflows_orphaned"):
            assert of(ended, name, "workflow") == {"Baking": 0}, "what has ended is told as 0, and not left out"
        after = await here.scrape()
        assert value(after, "whereupon_workflows_closed_total", workflow="Baking", outcome="failed") == 1
        assert value(after, "whereupon_workflows_opened_total", workflow="Baking") == 2


async def test_what_runs_is_in_flight(sqlite_url: str) -> None:
    async with bakery(sqlite_url) as here:
        go = asyncio.Event()

        @here.bus.subscribe(BreadBaked, name="slow", concurrency=5)
        async def slow(event: BreadBaked) -> None:
            await go.wait()

        async with here.bus:
            await here.bake(*range(8))
            async with asyncio.timeout(20):
                while (found := of(await here.scrape(), "whereupon_in_flight")) != {"slow": 5}:  # noqa: ASYNC110
                    await asyncio.sleep(0.01)
            go.set()
            await here.bus.drain(20)
            assert found == {"slow": 5}
            assert of(await here.scrape(), "whereupon_in_flight") == {"slow": 0}


async def test_labels_are_bounded_and_what_comes_after_the_bound_is_other(sqlite_url: str) -> None:
    async with bakery(sqlite_url, most_labels=3) as here:
        for number in range(6):

            async def handle(event: BreadBaked) -> None: ...

            here.bus.subscribe(BreadBaked, handle, name=f"handler {number}")
        async with here.bus:
            await here.bake(*range(10))
            await here.bus.drain(20)
            told = await here.scrape()
        delivered = of(told, "whereupon_delivered_total")
        assert len(delivered) == 4
        assert delivered["other"] == 30
        assert sum(delivered.values()) == 60
        assert of(told, "whereupon_handler_seconds_count")["other"] == 30
        assert "other" not in of(told, "whereupon_database_lag_seconds"), "a sum of lags says nothing"


async def test_no_id_and_no_message_is_a_label(sqlite_url: str) -> None:
    async with bakery(sqlite_url) as here:
        subscribe(here.bus)
        async with here.bus:
            events = await here.bake(*range(12))
            await here.bus.drain(20)
            answer = await here.client.get("/")
        page = answer.text
        assert not re.search(r"[0-9a-f]{8}-[0-9a-f]{4}", page)
        assert not any(str(event.event_id) in page for event in events)
        assert "never" not in page
        labels = set(re.findall(r'(\w+)="', page))
        assert labels == {"subscription", "event_type", "le"}


async def test_a_measurement_is_shared_and_kept_for_a_while(sqlite_url: str) -> None:
    async with bakery(sqlite_url) as here:
        here.metrics._fresh_for = 60
        looks: list[None] = []
        look = here.metrics._look

        async def counted() -> dict[str, Any]:
            looks.append(None)
            return await look()

        here.metrics._look = counted  # type: ignore[method-assign]
        async with here.bus:
            await asyncio.gather(*(here.scrape() for _ in range(5)))
            await here.scrape()
        assert len(looks) == 1


async def test_a_database_that_does_not_answer_costs_a_scrape_no_more_than_its_timeout(sqlite_url: str) -> None:
    async with bakery(sqlite_url, timeout=0.05) as here:
        subscribe(here.bus)

        async def never() -> dict[str, Any]:
            await asyncio.sleep(3600)
            return {}

        async with here.bus:
            look, here.metrics._look = here.metrics._look, never  # type: ignore[method-assign]
            told = await here.scrape()
            await here.scrape()
            assert value(told, "whereupon_database_up") == 0
            assert of(told, "whereupon_database_lag_seconds") == {}
            assert of(told, "whereupon_delivered_total"), "what is known without it is told"
            records = here.bus._raw_logger.named("metrics_database_unmeasured")
            assert [record["error_message"].partition(".")[0] for record in records] == ["it took longer than 0"]
            here.metrics._look = look  # type: ignore[method-assign]
            here.metrics._timeout = 10
            assert value(await here.scrape(), "whereupon_database_up") == 1


async def test_a_scrape_of_another_thread_waits_for_the_bus_s_loop_to_measure(sqlite_url: str) -> None:
    async with bakery(sqlite_url) as here:
        subscribe(here.bus)
        async with here.bus:
            page = await asyncio.to_thread(generate_latest, here.registry)
        told = read(page.decode())
        assert value(told, "whereupon_database_up") == 1
        assert of(told, "whereupon_database_lag_seconds") == {"shop": 0, "flaky": 0, "broken": 0}
    page = await asyncio.to_thread(generate_latest, here.registry)
    assert value(read(page.decode()), "whereupon_database_up") == 0, "the bus is closed, and its loop does not run"


async def test_scrapes_of_many_threads_disturb_no_delivery(sqlite_url: str) -> None:
    async with bakery(sqlite_url) as here:
        subscribe(here.bus)
        over, failures = threading.Event(), list[BaseException]()

        def scrape() -> None:
            while not over.is_set():
                try:
                    generate_latest(here.registry)
                except BaseException as error:
                    failures.append(error)
                    return

        async with here.bus:
            threads = [threading.Thread(target=scrape) for _ in range(3)]
            for thread in threads:
                thread.start()
            for start in range(0, 200, 20):
                await here.bake(*range(start, start + 20))
            await here.bus.drain(60)
            over.set()
            for thread in threads:
                await asyncio.to_thread(thread.join, 20)
            told = await here.scrape()
        assert failures == []
        assert of(told, "whereupon_delivered_total")["shop"] == 200
        assert of(told, "whereupon_dead_total")["broken"] == 50


def test_a_second_bus_in_one_registry_is_refused_and_in_its_own_counted_apart(sqlite_url: str) -> None:
    first, registry = EventBus(sqlite_url), CollectorRegistry()
    Metrics(first, registry=registry)
    with pytest.raises(MetricsError, match=r"Give each bus its own: Metrics\(bus, registry=CollectorRegistry\(\)\)"):
        Metrics(EventBus("sqlite+aiosqlite:///:memory:"), registry=registry)
    Metrics(InMemoryEventBus(), registry=CollectorRegistry())


async def test_the_bus_in_memory_has_counters_and_no_gauges_of_a_database() -> None:
    bus, registry = InMemoryEventBus(logger=Records()), CollectorRegistry()
    Metrics(bus, registry=registry)

    @bus.subscribe(BreadBaked, name="shop")
    async def shop(event: BreadBaked) -> None: ...

    await bus.publish(BreadBaked(number=1))
    told = read(generate_latest(registry).decode())
    assert of(told, "whereupon_delivered_total") == {"shop": 1}
    assert of(told, "whereupon_published_total", "event_type") == {"BreadBaked": 1}
    assert not [name for name, _ in told if name.startswith("whereupon_database")]


@pytest.mark.parametrize("variable", ["PROMETHEUS_MULTIPROC_DIR", "prometheus_multiproc_dir"])
def test_the_multiprocess_mode_of_the_client_is_refused(
    sqlite_url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, variable: str
) -> None:
    monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(MetricsError, match=r"is set, and in prometheus_client's multiprocess mode"):
        Metrics(EventBus(sqlite_url), registry=CollectorRegistry())


@pytest.mark.parametrize("option", ["most_labels", "fresh_for", "timeout"])
def test_options_that_mean_nothing_are_refused(sqlite_url: str, option: str) -> None:
    wrong: dict[str, Any] = {option: 0}
    with pytest.raises(ValueError, match="more than 0"):
        Metrics(EventBus(sqlite_url), registry=CollectorRegistry(), **wrong)


async def test_the_route_answers_in_the_form_that_is_asked_for_and_to_get_alone(sqlite_url: str) -> None:
    async with bakery(sqlite_url) as here, here.bus:
        plain = await here.client.get("/")
        opened = await here.client.get("/", headers={"accept": "application/openmetrics-text; version=1.0.0"})
        assert plain.headers["content-type"].startswith("text/plain; version=")
        assert opened.headers["content-type"].startswith("application/openmetrics-text")
        assert opened.text.endswith("# EOF\n")
        assert (await here.client.head("/")).text == ""
        assert (await here.client.post("/")).status_code == 405


@pytest.mark.parametrize(
    ("given", "address"),
    [
        ("9464", ("127.0.0.1", 9464)),
        (":9464", ("127.0.0.1", 9464)),
        ("0.0.0.0:1", ("0.0.0.0", 1)),
        ("[::1]:2", ("::1", 2)),
    ],
)
def test_an_address_is_of_this_machine_alone_unless_it_says_otherwise(given: str, address: tuple[str, int]) -> None:
    assert address_of(given) == address


@pytest.mark.parametrize("given", ["", "here", "here:", "1.2.3.4:x", "1:99999", ":-1"])
def test_what_is_no_address_is_refused(given: str) -> None:
    with pytest.raises(MetricsError, match="write HOST:PORT"):
        address_of(given)


def test_metrics_that_the_application_has_made_are_the_ones_that_are_answered(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url)
    metrics = Metrics(bus, registry=CollectorRegistry())
    assert Metrics.of(bus) is metrics
    with metrics_at(bus, "0"):
        pass


WORKER: Final = """
import os
from whereupon import DomainEvent, EventBus

bus = EventBus(os.environ["DATABASE"], poll_interval=0.05)

class BreadBaked(DomainEvent):
    number: int

@bus.subscribe(BreadBaked, name="shop")
async def shop(event: BreadBaked) -> None: ...
"""


async def test_a_worker_answers_prometheus_and_refuses_a_port_that_is_taken(database_url: str, tmp_path: Path) -> None:
    (tmp_path / "bakeries.py").write_text(WORKER)

    async def start(*arguments: str) -> asyncio.subprocess.Process:
        return await asyncio.create_subprocess_exec(
            sys.executable, "-m", "whereupon.cli", "worker", "bakeries:bus", *arguments,
            cwd=tmp_path,
            env={**os.environ, "DATABASE": database_url},
            stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip

    async with bakery(database_url, deliver=False) as here:

        @here.bus.subscribe(BreadBaked, name="shop")
        async def shop(event: BreadBaked) -> None: ...

        async with here.bus:
            events = await here.bake(*range(20))
            worker = await start("--metrics", "0")
            try:
                assert worker.stderr is not None
                said = (await asyncio.wait_for(worker.stderr.readline(), 60)).decode()
                url = said.strip().rpartition(" ")[2]
                assert url.startswith("http://127.0.0.1:")
                await here.bus.wait_settled(events, 60)
                page = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=20).read().decode())
                told = read(page)
                assert of(told, "whereupon_delivered_total") == {"shop": 20}
                assert value(told, "whereupon_database_workers") == 1
                taken = await start("--metrics", url.split("/")[2])
                _, errors = await asyncio.wait_for(taken.communicate(), 60)
                assert taken.returncode == 1
                assert "each worker on a host needs a port of its own" in errors.decode()
                assert "Traceback" not in errors.decode()
            finally:
                worker.send_signal(signal.SIGTERM)
                await asyncio.wait_for(worker.communicate(), 60)
            assert worker.returncode == 0
            told = await here.scrape()
            assert of(told, "whereupon_published_total", "event_type") == {"BreadBaked": 20}
            assert value(told, "whereupon_database_workers") == 0


async def test_a_port_that_is_taken_is_told(sqlite_url: str) -> None:
    metrics = Metrics(EventBus(sqlite_url), registry=CollectorRegistry())
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with (
            pytest.raises(MetricsError, match=f"127.0.0.1:{port}.*Name another address"),
            metrics.serving("127.0.0.1", port),
        ):
            pass
