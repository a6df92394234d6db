"""A Grafana board and Prometheus alert rules for a bus, made from what its subscriptions declare and promise.

The text is the same for the same subscriptions, so it can be kept in a repository and compared there.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, Any, Final

import cyclopts
from cyclopts import Parameter

from whereupon.console import Refused, Target, answer, load_bus, say
from whereupon.durable import EventBus
from whereupon.subscription import Delivery, Subscription

app = cyclopts.App(
    name="monitoring",
    help="A Grafana board and Prometheus alert rules, from what a bus declares and promises. Written to stdout.",
)

Address = Annotated[
    str | None,
    Parameter(help="Answer Prometheus at HOST:PORT, or at this port of 127.0.0.1; needs whereupon[prometheus]."),
]

_OF: Final = '{subscription=~"$subscription"}'
_RATE: Final = "[$__rate_interval]"
_WIDTH: Final = 24


@contextlib.contextmanager
def metrics_at(bus: EventBus, address: str | None) -> Iterator[None]:
    """Have a bus's metrics answered there while the block runs, if an address is given."""
    if address is None:
        yield
        return
    try:
        from whereupon.prometheus import Metrics, address_of
    except ImportError as error:
        if (error.name or "").partition(".")[0] != "prometheus_client":
            raise
        raise Refused("--metrics needs prometheus-client: pip install 'whereupon[prometheus]'") from None
    host, port = address_of(address)
    metrics = Metrics.of(bus) or Metrics(bus)
    with metrics.serving(host, port) as url:
        say(f"metrics at {url}")
        yield


@app.command
def grafana(
    target: Target,
    /,
    *,
    title: Annotated[str, Parameter(help="The board's title; its uid is made of it.")] = "whereupon",
) -> int:
    """A Grafana board in JSON: import it, and choose the Prometheus that scrapes `whereupon worker … --metrics`.

    Lag against each promise, what is published, delivered, failed and dead, how long handlers take and events wait,
    workers and workflows.
    """
    answer(json.dumps(board(list(load_bus(target).subscriptions), title), indent=2, ensure_ascii=False))
    return 0


@app.command
def alerts(
    target: Target,
    /,
    *,
    paused_for: Annotated[str, Parameter(help="How long a subscription may be paused: 30m, 1h, 2d.")] = "1h",
) -> int:
    """Prometheus alert rules in YAML, for `rule_files`.

    A promise that is broken, for each subscription declared with within=; dead letters that grow; no worker, or none
    for a subscription; a pause that lasts; attempts whose process is gone; a database that can't be measured.
    """
    if not paused_for[:-1].isdecimal() or paused_for[-1] not in "smhdw":
        raise Refused(f"--paused-for {paused_for!r} is no duration: write a number and s, m, h, d or w, as in 1h")
    subscriptions = list(load_bus(target).subscriptions)
    without = sorted(s.name for s in _stored(subscriptions) if s.within is None)
    lines = [f"# Made by `whereupon monitoring alerts {target}`."]
    if without:
        lines.append(f"# Without a promise (within=), and so without a rule for their lag: {', '.join(without)}.")
    answer("\n".join([*lines, *_yaml(rules(subscriptions, paused_for=paused_for))]))
    return 0


def _stored(subscriptions: Sequence[Subscription]) -> list[Subscription]:
    """Those that the database knows, by name."""
    return sorted((s for s in subscriptions if s.delivery is not Delivery.AFTER_COMMIT), key=lambda s: s.name)


# --- alert rules ------------------------------------------------------------------------------------------------------


def rules(subscriptions: Sequence[Subscription], *, paused_for: str = "1h") -> dict[str, Any]:
    """A Prometheus rule file, as data."""
    stored = _stored(subscriptions)
    promised = [
        _rule(
            "WhereuponPromiseBroken",
            f"max by (subscription) (whereupon_database_lag_seconds{{subscription={_quoted(s.name)}}}) "
            f"> {s.within:.15g}",
            "1m",
            "critical",
            "{{ $labels.subscription }} is {{ $value | humanizeDuration }} behind",
            f"It promises to settle each event within {s.within:g} s. `whereupon doctor` tells what it owes and why.",
        )
        for s in stored
        if s.within is not None
    ]
    names = "|".join(_escaped(s.name) for s in stored)
    general = [
        _rule(
            "WhereuponDeadLetters",
            "delta(max by (subscription) (whereupon_database_dead_letters)[10m:1m]) > 0 "
            "or sum by (subscription) (increase(whereupon_dead_total[10m])) > 0",
            None,
            "warning",
            "{{ $labels.subscription }} has new dead letters",
            "Deliveries used up their attempts. `whereupon dead list` shows them, by cause.",
        ),
        _rule(
            "WhereuponNoWorker",
            "max(whereupon_database_workers) == 0 or absent(whereupon_database_workers)",
            "2m",
            "critical",
            "No worker delivers",
            "No process holds a lease, or nobody who knows is scraped. Events are stored, and wait.",
        ),
        _rule(
            "WhereuponPaused",
            "max by (subscription) (whereupon_database_paused) == 1",
            paused_for,
            "warning",
            "{{ $labels.subscription }} has been paused for long",
            "`whereupon handlers list` says why; `whereupon handlers resume` has it go on where it stopped.",
        ),
        _rule(
            "WhereuponWorkflowOrphaned",
            "max by (workflow) (whereupon_database_workflows_orphaned) > 0",
            "5m",
            "warning",
            "{{ $value }} attempts at {{ $labels.workflow }} are open, and their process is gone",
            "Workers close such attempts as interrupted, and none does so. `whereupon workflows` lists them.",
        ),
        _rule(
            "WhereuponDatabaseUnmeasured",
            "max(whereupon_database_up) == 0",
            "5m",
            "warning",
            "No process can measure the database of the bus",
            "Lag, pauses and dead letters are not known meanwhile. The log of the processes says what it answers.",
        ),
    ]
    if names:
        general.insert(
            2,
            _rule(
                "WhereuponUnserved",
                f"max by (subscription) (whereupon_database_subscription_workers{{subscription=~{_quoted(names)}}}) "
                "== 0 and on () max(whereupon_database_workers) > 0",
                "5m",
                "critical",
                "No live worker serves {{ $labels.subscription }}",
                "There are workers, but their builds don't declare it, or do so otherwise. See `whereupon doctor`.",
            ),
        )
    groups = [{"name": "whereupon", "rules": general}]
    if promised:
        groups.insert(0, {"name": "whereupon promises", "rules": promised})
    return {"groups": groups}


def _rule(
    name: str, expression: str, lasting: str | None, severity: str, summary: str, description: str
) -> dict[str, Any]:
    rule: dict[str, Any] = {"alert": name, "expr": expression}
    if lasting is not None:
        rule["for"] = lasting
    return rule | {
        "labels": {"severity": severity},
        "annotations": {"summary": summary, "description": description},
    }


def _quoted(text: str) -> str:
    return json.dumps(text, ensure_ascii=False)


def _escaped(name: str) -> str:
    """A name as a part of an RE2 expression."""
    return "".join(c if c.isalnum() or c in "_- :<>," or not c.isascii() else f"\\{c}" for c in name)


def _yaml(value: Any, indent: int = 0) -> Iterator[str]:
    """Lines of YAML: mappings and lists in block style, texts as JSON has them, which YAML reads as well."""
    space = " " * indent
    if isinstance(value, Mapping):
        for key, item in value.items():
            if isinstance(item, (Mapping, list)):
                yield f"{space}{key}:"
                yield from _yaml(item, indent + 2)
            else:
                yield f"{space}{key}: {_quoted(item)}"
    else:
        for item in value:
            first, *rest = _yaml(item, indent + 2)
            yield f"{space}- {first.lstrip()}"
            yield from rest


# --- a board ----------------------------------------------------------------------------------------------------------


def board(subscriptions: Sequence[Subscription], title: str = "whereupon") -> dict[str, Any]:
    """A Grafana board, as data."""
    lag, promise = "whereupon_database_lag_seconds", "whereupon_database_promise_seconds"
    promised = [s for s in _stored(subscriptions) if s.within is not None]
    rows: list[tuple[str, list[dict[str, Any]]]] = [
        (
            "Now",
            [
                _stat("Workers", "max(whereupon_database_workers)", alarm_below=1),
                _stat("Dead letters", "sum(max by (subscription) (whereupon_database_dead_letters))", alarm_from=1),
                _stat("Paused", "sum(max by (subscription) (whereupon_database_paused))", alarm_from=1),
                _stat(
                    "Lag, of what was promised",
                    f"max(max by (subscription) ({lag}) / max by (subscription) ({promise}))",
                    alarm_from=1,
                    unit="percentunit",
                ),
            ],
        ),
        (
            "Behind",
            [
                _graph(
                    "Lag", "s", _most("lag_seconds"), "{{subscription}}",
                    text="Age of the oldest event that is not settled.",
                ),
                _graph(
                    "Oldest owed since", "dateTimeFromNow",
                    f"1000 * {_most('oldest_owed_timestamp_seconds')}", "{{subscription}}",
                ),
                _graph("Dead letters", "short", _most("dead_letters"), "{{subscription}}"),
                _graph("In flight", "short", f"sum by (subscription) (whereupon_in_flight{_OF})", "{{subscription}}"),
            ],
        ),
        ("Promises", [_promise(s) for s in promised]),
        (
            "Rates",
            [
                _graph("Published", "ops", _rate("published", "event_type"), "{{event_type}}"),
                _graph("Delivered", "ops", _summed("delivered"), "{{subscription}}"),
                _graph("Failed", "ops", _summed("failed"), "{{subscription}}", text="Calls that raised."),
                _graph("Retried", "ops", _summed("retried"), "{{subscription}}"),
                _graph("Dead", "ops", _summed("dead"), "{{subscription}}"),
                _graph("Skipped", "ops", _summed("skipped"), "{{subscription}}"),
            ],
        ),
        (
            "Times",
            [
                *(_graph(f"Commit to call, p{p}", "s", _quantile("delay", p), "{{subscription}}") for p in (50, 99)),
                *(_graph(f"Handlers, p{p}", "s", _quantile("handler", p), "{{subscription}}") for p in (50, 99)),
            ],
        ),
        (
            "Workflows",
            [
                _graph("Opened", "ops", _rate("workflows_opened", "workflow"), "{{workflow}}"),
                _graph(
                    "Closed", "ops", _rate("workflows_closed", "workflow, outcome"),
                    "{{workflow}} {{outcome}}",
                ),
                _graph("Open", "short", "max by (workflow) (whereupon_database_workflows_open)", "{{workflow}}"),
                _graph(
                    "Open, and their process is gone", "short",
                    "max by (workflow) (whereupon_database_workflows_orphaned)", "{{workflow}}",
                ),
            ],
        ),
        (
            "Measuring",
            [
                _graph("Workers of a subscription", "short", _most("subscription_workers"), "{{subscription}}"),
                _graph("Time to measure the database", "s", "whereupon_database_measure_seconds", "{{instance}}"),
                _graph("Database measured", "bool_yes_no", "whereupon_database_up", "{{instance}}"),
            ],
        ),
    ]  # fmt: skip
    return {
        "uid": "".join(c if c.isalnum() else "-" for c in title.lower())[:40],
        "title": title,
        "tags": ["whereupon"],
        "timezone": "browser",
        "schemaVersion": 39,
        "editable": True,
        "refresh": "30s",
        "time": {"from": "now-3h", "to": "now"},
        "templating": {
            "list": [
                {"name": "datasource", "label": "Prometheus", "type": "datasource", "query": "prometheus"},
                {
                    "name": "subscription",
                    "label": "Subscription",
                    "type": "query",
                    "datasource": _SOURCE,
                    "query": "label_values(whereupon_database_lag_seconds, subscription)",
                    "refresh": 2,
                    "sort": 1,
                    "multi": True,
                    "includeAll": True,
                    "allValue": ".*",
                    "current": {"text": "All", "value": "$__all"},
                },
            ]
        },
        "panels": list(_placed([row for row in rows if row[1]])),
    }


_SOURCE: Final = {"type": "prometheus", "uid": "${datasource}"}


def _placed(rows: Sequence[tuple[str, list[dict[str, Any]]]]) -> Iterator[dict[str, Any]]:
    number = y = 0
    for title, panels in rows:
        number += 1
        yield {
            "id": number, "type": "row", "title": title, "collapsed": False, "panels": [],
            "gridPos": {"x": 0, "y": y, "w": _WIDTH, "h": 1},
        }  # fmt: skip
        y += 1
        width, height = (6, 4) if panels[0]["type"] == "stat" else (12, 8)
        for place, panel in enumerate(panels):
            number += 1
            x = place * width % _WIDTH
            if place and x == 0:
                y += height
            yield {"id": number, **panel, "gridPos": {"x": x, "y": y, "w": width, "h": height}}
        y += height


def _panel(kind: str, title: str, unit: str, expression: str, legend: str, text: str) -> dict[str, Any]:
    return {
        "type": kind,
        "title": title,
        "description": text,
        "datasource": _SOURCE,
        "targets": [{"refId": "A", "datasource": _SOURCE, "expr": expression, "legendFormat": legend}],
        "fieldConfig": {"defaults": {"unit": unit, "min": 0}, "overrides": []},
    }


def _graph(title: str, unit: str, expression: str, legend: str, *, text: str = "") -> dict[str, Any]:
    panel = _panel("timeseries", title, unit, expression, legend, text)
    if unit.startswith("dateTime"):
        panel["type"] = "bargauge"
        del panel["fieldConfig"]["defaults"]["min"]
    return panel


def _stat(
    title: str,
    expression: str,
    *,
    alarm_from: float | None = None,
    alarm_below: float | None = None,
    unit: str = "short",
) -> dict[str, Any]:
    panel = _panel("stat", title, unit, expression, "", "")
    if alarm_from is not None:
        panel["fieldConfig"]["defaults"]["thresholds"] = _thresholds("green", alarm_from, "red")
    elif alarm_below is not None:
        panel["fieldConfig"]["defaults"]["thresholds"] = _thresholds("red", alarm_below, "green")
    return panel


def _thresholds(below: str, at: float, above: str) -> dict[str, Any]:
    return {"mode": "absolute", "steps": [{"color": below, "value": None}, {"color": above, "value": at}]}


def _promise(subscription: Subscription) -> dict[str, Any]:
    """Its lag, with a line at what it promises."""
    within = subscription.within
    assert within is not None
    expression = f"max by (subscription) (whereupon_database_lag_seconds{{subscription={_quoted(subscription.name)}}})"
    panel = _graph(f"{subscription.name}: lag, {within:g} s promised", "s", expression, "lag")
    panel["fieldConfig"]["defaults"] |= {
        "thresholds": _thresholds("green", within, "red"),
        "custom": {"thresholdsStyle": {"mode": "line"}},
    }
    return panel


def _most(name: str) -> str:
    return f"max by (subscription) (whereupon_database_{name}{_OF})"


def _rate(name: str, labels: str) -> str:
    return f"sum by ({labels}) (rate(whereupon_{name}_total{_RATE}))"


def _summed(name: str) -> str:
    return f"sum by (subscription) (rate(whereupon_{name}_total{_OF}{_RATE}))"


def _quantile(name: str, percent: int) -> str:
    buckets = f"sum by (le, subscription) (rate(whereupon_{name}_seconds_bucket{_OF}{_RATE}))"
    return f"histogram_quantile({percent / 100:g}, {buckets})"
