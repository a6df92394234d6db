"""The board and the alert rules: that they are made from the promises, and ask only for metrics that there are."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import promql_parser
import pytest
from prometheus_client import CollectorRegistry

from whereupon import Delivery, DomainEvent, EventBus
from whereupon.monitoring import board, rules
from whereupon.prometheus import Metrics

pytestmark = pytest.mark.unit

OF_THE_SCRAPE: Final = {"instance", "job"}


class ParcelDropped(DomainEvent):
    number: int


def make_bus() -> EventBus:
    bus = EventBus("sqlite+aiosqlite:///:memory:")

    @bus.subscribe(ParcelDropped, name="tell the owner", within="30s")
    async def tell(event: ParcelDropped) -> None: ...

    @bus.subscribe(ParcelDropped, name='odd "name" (a|b).*', within="1h")
    async def odd(event: ParcelDropped) -> None: ...

    @bus.subscribe(ParcelDropped, name="tidy up")
    async def tidy(event: ParcelDropped) -> None: ...

    @bus.subscribe(ParcelDropped, name="at once", delivery=Delivery.AFTER_COMMIT)
    async def at_once(event: ParcelDropped) -> None: ...

    return bus


def known() -> dict[str, set[str]]:
    """The series that a registry has of these metrics, with their labels."""
    registry = CollectorRegistry()
    found: dict[str, set[str]] = {}
    for family in Metrics(make_bus(), registry=registry).describe():
        labels = set(family._labelnames)  # type: ignore[attr-defined]
        if family.type == "counter":
            found[f"{family.name}_total"] = labels
        elif family.type == "histogram":
            found |= {f"{family.name}_bucket": labels | {"le"}, f"{family.name}_sum": labels}
            found[f"{family.name}_count"] = labels
        else:
            found[family.name] = labels
    return found


def expressions_of(value: Any) -> Iterator[str]:
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "expr":
                yield item
            else:
                yield from expressions_of(item)
    elif isinstance(value, list):
        for item in value:
            yield from expressions_of(item)


def check(expression: str, series: dict[str, set[str]]) -> set[str]:
    """The metrics that an expression names, once parsed. Fails for one that there is not, and for labels it has not."""

    def look(node: Any) -> set[str]:
        kind = type(node).__name__
        if kind == "VectorSelector":
            assert node.name in series, f"there is no {node.name}: {expression}"
            for matcher in node.matchers.matchers:
                assert matcher.name in series[node.name], f"{node.name} has no label {matcher.name}"
            return {node.name}
        if kind == "MatrixSelector":
            return look(node.vector_selector)
        if kind == "AggregateExpr":
            below = look(node.expr)
            for name in below:
                wanted = set(node.modifier.labels if node.modifier is not None else ())
                assert wanted <= series[name] | OF_THE_SCRAPE, f"{name} has no {wanted - series[name]}: {expression}"
            return below
        if kind == "BinaryExpr":
            return look(node.lhs) | look(node.rhs)
        if kind == "Call":
            return set[str]().union(*(look(argument) for argument in node.args))
        if kind in ("ParenExpr", "SubqueryExpr", "UnaryExpr"):
            return look(node.expr)
        assert kind in ("NumberLiteral", "StringLiteral"), f"{kind} in {expression}"
        return set()

    named = look(promql_parser.parse(expression.replace("$__rate_interval", "5m").replace("$subscription", ".*")))
    assert named
    return named


def test_each_expression_is_promql_of_metrics_and_labels_that_there_are() -> None:
    series = known()
    subscriptions = list(make_bus().subscriptions)
    asked: set[str] = set()
    for expression in [*expressions_of(board(subscriptions)), *expressions_of(rules(subscriptions))]:
        asked |= check(expression, series)
    never = {name for name in series if not name.endswith(("_sum", "_count"))} - asked
    assert never == set(), "what is measured is shown"


@pytest.mark.parametrize(
    "wrong",
    ["max by (subscription) (whereupon_lost_total)", "sum by (event_id) (whereupon_dead_total)",
     'whereupon_dead_total{message="x"}'],
)  # fmt: skip
def test_an_expression_of_what_there_is_not_is_found(wrong: str) -> None:
    with pytest.raises(AssertionError):
        check(wrong, known())


def test_each_promise_has_its_rule_and_its_panel() -> None:
    subscriptions = list(make_bus().subscriptions)
    promises, general = rules(subscriptions)["groups"]
    assert [rule["expr"].rpartition(" > ")[2] for rule in promises["rules"]] == ["3600", "30"]
    matched = [re.findall(r"\{(.*)\}", rule["expr"])[0] for rule in promises["rules"]]
    assert [json.loads(text.removeprefix("subscription=")) for text in matched] == [
        'odd "name" (a|b).*', "tell the owner",
    ]  # fmt: skip
    assert {rule["alert"] for rule in general["rules"]} == {
        "WhereuponDeadLetters", "WhereuponNoWorker", "WhereuponUnserved", "WhereuponPaused",
        "WhereuponWorkflowOrphaned", "WhereuponDatabaseUnmeasured",
    }  # fmt: skip
    [unserved] = [rule for rule in general["rules"] if rule["alert"] == "WhereuponUnserved"]
    pattern = json.loads(re.findall(r"=~(\".*?[^\\]\")\}", unserved["expr"])[0])
    for name, serves in (('odd "name" (a|b).*', True), ("tidy up", True), ("at once", False), ("odd", False)):
        assert bool(re.fullmatch(pattern, name)) is serves
    lines = [
        step["value"]
        for panel in board(subscriptions)["panels"]
        if panel["title"].endswith(" s promised")
        for step in panel["fieldConfig"]["defaults"]["thresholds"]["steps"]
    ]
    assert lines == [None, 3600.0, None, 30.0]


def test_a_bus_without_promises_has_no_rules_of_promises() -> None:
    bus = EventBus("sqlite+aiosqlite:///:memory:")
    assert [group["name"] for group in rules(list(bus.subscriptions))["groups"]] == ["whereupon"]
    assert not [rule for rule in rules([])["groups"][0]["rules"] if rule["alert"] == "WhereuponUnserved"]
    titles = [panel["title"] for panel in board([])["panels"]]
    assert "Promises" not in titles


def test_panels_have_numbers_of_their_own_and_lie_beside_each_other() -> None:
    panels = board(list(make_bus().subscriptions))["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken: set[tuple[int, int]] = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        cells = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & taken, f"{panel['title']} lies on another"
        taken |= cells


APP: Final = """
from whereupon import DomainEvent, EventBus

class ParcelDropped(DomainEvent):
    number: int

bus = EventBus("postgresql+asyncpg://nobody@127.0.0.1:1/nowhere")

@bus.subscribe(ParcelDropped, name="tell the owner", within="30s")
async def tell(event: ParcelDropped) -> None: ...

@bus.subscribe(ParcelDropped, name="tidy up")
async def tidy(event: ParcelDropped) -> None: ...
"""


def command(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    (folder / "parcels.py").write_text(APP)
    return subprocess.run(
        [sys.executable, "-m", "whereupon.cli", "monitoring", *arguments],
        cwd=folder, capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip


@pytest.mark.integration
def test_the_commands_write_the_same_text_each_time_and_ask_no_database(tmp_path: Path) -> None:
    yaml: Any = importlib.import_module("yaml")
    subscriptions: Any = None
    for arguments in (("alerts", "parcels:bus"), ("grafana", "parcels:bus", "--title", "Parcels")):
        first, second = command(tmp_path, *arguments), command(tmp_path, *arguments)
        assert (first.returncode, first.stderr) == (0, "")
        assert first.stdout == second.stdout
        if arguments[0] == "alerts":
            assert "# Without a promise (within=), and so without a rule for their lag: tidy up." in first.stdout
            told = yaml.safe_load(first.stdout)
            subscriptions = [rule["expr"] for rule in told["groups"][0]["rules"]]
            for rule in (rule for group in told["groups"] for rule in group["rules"]):
                assert set(rule) <= {"alert", "expr", "for", "labels", "annotations"}
                assert re.fullmatch(r"[0-9]+[smhdw]", rule.get("for", "1m"))
                check(rule["expr"], known())
        else:
            told = json.loads(first.stdout)
            assert (told["title"], told["uid"]) == ("Parcels", "parcels")
    assert subscriptions == [
        'max by (subscription) (whereupon_database_lag_seconds{subscription="tell the owner"}) > 30'
    ]


@pytest.mark.integration
def test_a_duration_that_is_none_is_refused(tmp_path: Path) -> None:
    done = command(tmp_path, "alerts", "parcels:bus", "--paused-for", "long")
    assert (done.returncode, done.stdout) == (2, "")
    assert "write a number and s, m, h, d or w, as in 1h" in done.stderr
