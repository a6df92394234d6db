"""The board and the alert rules in a real Prometheus, and the metrics as it reads them."""

from __future__ import annotations

import asyncio
import itertools
import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import httpx
import pytest
from prometheus_client import CollectorRegistry
from sqlalchemy.ext.asyncio import AsyncSession

from tests.programs import program
from whereupon import DomainEvent, EventBus, Retry, Workflow
from whereupon.monitoring import board, rules
from whereupon.prometheus import Metrics

pytestmark = pytest.mark.integration

ODD: Final = 'odd "name" (a|b).* ✓'


class LockerEmptied(DomainEvent):
    number: int


class OpeningAttempted(DomainEvent):
    number: int


class OpeningSucceeded(DomainEvent):
    number: int


class OpeningFailed(DomainEvent):
    number: int
    reason: str


Opening = Workflow(OpeningAttempted, OpeningSucceeded, OpeningFailed)


def make_bus(url: str = "sqlite+aiosqlite:///:memory:") -> EventBus:
    bus = EventBus(url, create_tables=True, poll_interval=0.05)

    @bus.subscribe(LockerEmptied, name="tell the owner", within="30s")
    async def tell(event: LockerEmptied) -> None: ...

    @bus.subscribe(LockerEmptied, name="clean", retry=Retry(max_attempts=2, first=0))
    async def clean(event: LockerEmptied) -> None:
        if event.number % 3 == 0:
            raise ValueError("jammed")

    @bus.subscribe(LockerEmptied, name=ODD, within="1h")
    async def odd(event: LockerEmptied) -> None: ...

    return bus


# --- alert rules ------------------------------------------------------------------------------------------------------


def rule_of(alert: str, subscription: str | None) -> dict[str, Any]:
    """The rule of that name, of a promise that of the subscription."""
    of_it = json.dumps(subscription, ensure_ascii=False) if alert == "WhereuponPromiseBroken" and subscription else ""
    made = (rule for group in rules(list(make_bus().subscriptions))["groups"] for rule in group["rules"])
    return next(rule for rule in made if rule["alert"] == alert and of_it in rule["expr"])


def promtool(folder: Path, *arguments: str) -> None:
    tool = Path(program("prometheus")).with_name("promtool")
    done = subprocess.run([tool, *arguments], check=False, capture_output=True, text=True, cwd=folder, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_prometheus_takes_the_rules_that_the_command_writes(tmp_path: Path) -> None:
    with (tmp_path / "rules.yml").open("w") as output:
        command = [
            sys.executable,
            "-m",
            "whereupon.cli",
            "monitoring",
            "alerts",
            "tests.test_prometheus_server:make_bus",
        ]
        subprocess.run(command, check=True, stdout=output, timeout=60)
    promtool(tmp_path, "check", "rules", "rules.yml")


@pytest.mark.parametrize(
    ("alert", "series", "minute", "labels", "summary"),
    [
        (
            "WhereuponPromiseBroken",
            {'whereupon_database_lag_seconds{subscription="tell the owner"}': "29 31 40 40"},
            2, {"subscription": "tell the owner"}, "tell the owner is 40s behind",
        ),
        (
            "WhereuponPromiseBroken",
            {f"whereupon_database_lag_seconds{{subscription={json.dumps(ODD, ensure_ascii=False)}}}": "3700 3700 3700"},
            2, {"subscription": ODD}, f"{ODD} is 1h 1m 40s behind",
        ),
        ("WhereuponPromiseBroken", {'whereupon_database_lag_seconds{subscription="clean"}': "9999x5"}, 4, None, ""),
        (
            "WhereuponPromiseBroken",
            {'whereupon_database_lag_seconds{subscription="tell the owner"}': "29 31 29 31 29"},
            3, None, "",
        ),
        (
            "WhereuponDeadLetters",
            {
                'whereupon_database_dead_letters{subscription="clean",instance="a"}': "3 3 3 4 4",
                'whereupon_database_dead_letters{subscription="clean",instance="b"}': "3 3 3 4 4",
            },
            4, {"subscription": "clean"}, "clean has new dead letters",
        ),
        ("WhereuponDeadLetters", {'whereupon_database_dead_letters{subscription="clean"}': "3x10"}, 9, None, ""),
        ("WhereuponNoWorker", {"whereupon_database_workers": "1 1 0 0 0 0"}, 5, {}, "No worker delivers"),
        ("WhereuponNoWorker", {"up": "1x5"}, 4, {}, "No worker delivers"),
        ("WhereuponNoWorker", {"whereupon_database_workers": "1 0 1 0 1 1"}, 5, None, ""),
        (
            "WhereuponUnserved",
            {
                f"whereupon_database_subscription_workers{{subscription={json.dumps(ODD, ensure_ascii=False)}}}": "0x9",
                "whereupon_database_workers": "2x9",
            },
            8, {"subscription": ODD}, f"No live worker serves {ODD}",
        ),
        (
            "WhereuponPaused",
            {'whereupon_database_paused{subscription="clean"}': "1x70"},
            65, {"subscription": "clean"}, "clean has been paused for long",
        ),
        ("WhereuponPaused", {'whereupon_database_paused{subscription="clean"}': "1x50 0 1x20"}, 70, None, ""),
        (
            "WhereuponWorkflowOrphaned",
            {'whereupon_database_workflows_orphaned{workflow="Opening"}': "2x9"},
            8, {"workflow": "Opening"}, "2 attempts at Opening are open, and their process is gone",
        ),
        (
            "WhereuponDatabaseUnmeasured",
            {'whereupon_database_up{instance="a"}': "0x9", 'whereupon_database_up{instance="b"}': "0x9"},
            8, {}, "No process can measure the database of the bus",
        ),
        (
            "WhereuponDatabaseUnmeasured",
            {'whereupon_database_up{instance="a"}': "0x9", 'whereupon_database_up{instance="b"}': "1x9"},
            8, None, "",
        ),
    ],
)  # fmt: skip
def test_an_alert_is_raised_when_it_should_be_and_not_else(
    tmp_path: Path, alert: str, series: dict[str, str], minute: int, labels: dict[str, str] | None, summary: str
) -> None:
    rule = rule_of(alert, (labels or {}).get("subscription"))
    raised = {
        "exp_labels": {**(labels or {}), **rule["labels"]},
        "exp_annotations": {"summary": summary, "description": rule["annotations"]["description"]},
    }
    (tmp_path / "rules.yml").write_text(json.dumps(rules(list(make_bus().subscriptions))))
    (tmp_path / "test.yml").write_text(
        json.dumps(
            {
                "rule_files": ["rules.yml"],
                "evaluation_interval": "1m",
                "tests": [
                    {
                        "interval": "1m",
                        "input_series": [{"series": name, "values": values} for name, values in series.items()],
                        "alert_rule_test": [
                            {
                                "eval_time": f"{minute}m",
                                "alertname": alert,
                                "exp_alerts": [] if labels is None else [raised],
                            }
                        ],
                    }
                ],
            }
        )
    )
    promtool(tmp_path, "test", "rules", "test.yml")


# --- a server that scrapes --------------------------------------------------------------------------------------------


@contextmanager
def prometheus(folder: Path, scraped: str) -> Iterator[httpx.Client]:
    """A server with our rules that scrapes one address each second; a client of its API."""
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    (folder / "rules.yml").write_text(json.dumps(rules(list(make_bus().subscriptions))))
    config = {
        "global": {"scrape_interval": "2s", "scrape_timeout": "2s", "evaluation_interval": "1s"},
        "rule_files": ["rules.yml"],
        "scrape_configs": [{"job_name": "lockers", "static_configs": [{"targets": [scraped]}]}],
    }
    (folder / "prometheus.yml").write_text(json.dumps(config))
    with (folder / "prometheus.log").open("wb") as output:
        server = subprocess.Popen(
            [
                program("prometheus"), f"--config.file={folder}/prometheus.yml", f"--storage.tsdb.path={folder}/data",
                f"--web.listen-address=127.0.0.1:{port}",
            ],
            stdout=output, stderr=subprocess.STDOUT,
        )  # fmt: skip
    try:
        with httpx.Client(base_url=f"http://127.0.0.1:{port}/api/v1/", timeout=10) as client:
            yield client
    finally:
        server.terminate()
        server.wait(30)


async def asked(client: httpx.Client, path: str, **parameters: str) -> Any:
    """What the server answers once it does: it starts meanwhile."""
    async with asyncio.timeout(60):
        while True:
            try:
                answer = await asyncio.to_thread(client.get, path, params=parameters)
                assert answer.status_code in (200, 503), answer.text
                if answer.status_code == 200:
                    return answer.json()["data"]
            except httpx.TransportError:
                pass  # not there yet: the timeout above ends it
            await asyncio.sleep(0.2)


def panels() -> list[tuple[str, str]]:
    """Title and expression of each panel, as Grafana would ask with all subscriptions chosen."""
    made = board(list(make_bus().subscriptions))
    return [
        (panel["title"], target["expr"].replace("$subscription", ".*").replace("$__rate_interval", "1m"))
        for panel in made["panels"]
        for target in panel.get("targets", ())
    ]


def has_values(answer: Any) -> bool:
    """Whether there is something to draw: quantiles of what nobody calls are NaN."""
    return any(sample["value"][1] != "NaN" for sample in answer["result"])


async def test_each_panel_of_the_board_has_something_to_show_and_each_rule_is_evaluated(
    database_url: str, tmp_path: Path
) -> None:
    program("prometheus")
    bus = make_bus(database_url)
    metrics = Metrics(bus, registry=CollectorRegistry())

    async def work(numbers: range) -> None:
        async with AsyncSession(bus.engine) as session, session.begin():
            await bus.publish(*(LockerEmptied(number=number) for number in numbers), session=session)
        async with (
            bus.workflow(Opening, number=numbers[0]) as opening,
            AsyncSession(bus.engine) as session,
            session.begin(),
        ):
            await opening.succeeded(session=session)

    async with bus, bus.workflow(Opening, number=-1) as stuck:
        await bus.operator.pause(ODD, "so that it owes something")
        with metrics.serving("127.0.0.1", 0) as url, prometheus(tmp_path, urlsplit(url).netloc) as client:
            gives_up = time.monotonic() + 120
            for turn in itertools.count():
                await work(range(turn * 6, turn * 6 + 6))
                empty = [
                    title for title, query in panels() if not has_values(await asked(client, "query", query=query))
                ]
                if not empty:
                    break
                assert time.monotonic() < gives_up, f"nothing to show in {empty}"
                await asyncio.sleep(1)
            values = {
                sample["metric"]["subscription"]: float(sample["value"][1])
                for sample in (await asked(client, "query", query="whereupon_dead_total"))["result"]
            }
            assert values["clean"] > 0
            [target] = (await asked(client, "targets"))["activeTargets"]
            assert (target["health"], target["lastError"]) == ("up", "")
            groups = (await asked(client, "rules"))["groups"]
            evaluated = [rule for group in groups for rule in group["rules"]]
            assert {rule["name"] for rule in evaluated} == {
                rule["alert"] for group in rules(list(bus.subscriptions))["groups"] for rule in group["rules"]
            }
            assert {rule["health"] for rule in evaluated} <= {"ok", "unknown"}, evaluated
        await stuck.failed(reason="jammed")
