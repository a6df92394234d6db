"""Faults of the fault table, inflicted a few times; `make faults` inflicts all, at length, and prints the figures."""

from __future__ import annotations

import pytest

from tests import faults
from tests.faults import Effect, Figures, Row

SHORT = [
    ("kills", "postgresql"), ("kills", "sqlite"), ("terminations", "postgresql"), ("outages", "own server"),
    ("stops", "postgresql"), ("blocks", "sqlite"), ("steals", "postgresql"), ("garbage", "sqlite"),
]  # fmt: skip
"""Those that take some ten seconds each; `make faults` runs all of them, on all databases."""


@pytest.mark.integration
@pytest.mark.slow
@pytest.mark.parametrize(("name", "database"), SHORT, ids=[f"{name}-{database}" for name, database in SHORT])
def test_nothing_is_lost_doubled_or_out_of_order_under(
    name: str, database: str, request: pytest.FixtureRequest
) -> None:
    postgres = request.getfixturevalue("postgres_server") if database == "postgresql" else None
    try:
        report = faults.run(name, database, postgres=postgres, short=True)
    except faults.NotHere as error:
        pytest.skip(str(error))
    assert report.figures.broken() == [], report.said


def figures(**changes: object) -> Figures:
    fine = {
        "fault": "none", "database": "sqlite", "hits": 1, "committed": 10, "delivered": {"mail": 10, "book": 10},
        "invented": 0, "doubled": 0, "repeated": 3, "allowed": 3, "disordered": 0, "dead": 0, "dead_expected": 0,
        "given_up": 0, "unsettled": 0, "recovery": 0.5, "notes": [],
    }  # fmt: skip
    return Figures(**{**fine, **changes})  # type: ignore[arg-type]


@pytest.mark.unit
@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"committed": 0, "delivered": {"mail": 0}}, "nothing was committed"),
        ({"delivered": {"mail": 10, "book": 9}}, "1 deliveries lost"),
        ({"invented": 1}, "never committed"),
        ({"doubled": 1}, "1 effects in the database doubled"),
        ({"repeated": 4}, "4 outside effects repeated, where 3"),
        ({"disordered": 2}, "2 events out of their account's order"),
        ({"dead": 1}, "1 dead letters instead of 0"),
        ({"unsettled": 1}, "1 exceptions left open"),
        ({"notes": ["a worker ended with 70"]}, "a worker ended with 70"),
    ],
)
def test_figures_that_break_a_promise_say_which(changes: dict[str, object], said: str) -> None:
    assert figures().broken() == []
    [broken] = figures(**changes).broken()
    assert said in broken


@pytest.mark.unit
def test_order_counts_the_first_time_of_each_event_alone() -> None:
    def effect(sequence: int, at: int) -> Effect:
        return Effect("letters", f"key {sequence}", f"event {sequence}", 7, sequence, at)

    assert faults.disordered_effects([effect(1, 1), effect(2, 2), effect(1, 3), effect(3, 4)]) == 0
    assert faults.disordered_effects([effect(1, 1), effect(3, 2), effect(2, 3), effect(4, 4)]) == 3
    assert faults.disordered_effects([Effect("mail", "key", "event", 7, 5, 1)]) == 0


@pytest.mark.unit
def test_order_of_rows_is_told_by_what_the_handler_saw_before_it() -> None:
    rows = [Row("ledger", "a", 7, 1, None), Row("ledger", "b", 7, 2, 1), Row("ledger", "c", 7, 3, 1)]
    assert faults.disordered_rows(rows) == 1
    assert faults.disordered_rows([Row("book", "c", 7, 3, 1)]) == 0
