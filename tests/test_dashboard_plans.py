"""However long the log is, no page of the dashboard walks through a large table, and each takes a bounded number of
statements. Asked of the statements that the pages really execute, with their own values."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any
from uuid import uuid4

import psycopg
import pytest
from psycopg.sql import Literal
from sqlalchemy import text
from sqlalchemy.engine import make_url

from tests.lighthouse import Lighthouse, lighthouse
from tests.statements import Statement, statements
from tests.test_query_plans import analyze, fill
from whereupon import gauges

pytestmark = [pytest.mark.integration, pytest.mark.slow]

LARGE = ("whereupon_log", "whereupon_exception", "whereupon_history", "whereupon_audit", "whereupon_workflow")
MOST_STATEMENTS = 40
"""For a page; the measuring of lags, which is shared and in the background, takes some for each lane."""


@pytest.fixture
async def long(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[tuple[Lighthouse, dict[str, Any]]]:
    """A lighthouse that has been in use for long, and what there is to be asked for."""
    monkeypatch.setattr(gauges, "PATIENCE", 60.0)
    async with lighthouse(database_url, deliver=False) as house:
        store = house.bus._store
        await fill(store)
        sqlite = house.bus.engine.dialect.name == "sqlite"
        n, new_id = ("value", "lower(hex(randomblob(16)))") if sqlite else ("n", "gen_random_uuid()")
        series = (
            "WITH RECURSIVE s (value) AS (SELECT 1 UNION ALL SELECT value + 1 FROM s WHERE value < 30000) "
            "SELECT {} FROM s"
            if sqlite
            else "SELECT {} FROM generate_series(1, 30000) AS n"
        )
        now = "'2026-01-01 00:00:00.000000'" if sqlite else "now()"
        async with store.writing() as connection:
            for table, name in (("subscription", "name"), ("cursor", "subscription")):
                await connection.execute(text(f"DELETE FROM whereupon_{table} WHERE {name} LIKE 'other-%'"))
            await connection.execute(text("UPDATE whereupon_exception SET fingerprint = 'cause' || (id % 7)"))
            done = f"CASE WHEN {n} % 20 = 0 THEN 'DONE' ELSE 'OTHER' END"
            audit = f"{new_id}, {new_id}, 'A', {done}, 'success', '{{}}', '10.0.0.1', {now}, {now}"
            await connection.execute(
                text(
                    "INSERT INTO whereupon_audit (id, event_id, event_type, action, outcome, context, ip_address, "
                    f"occurred_at, recorded_at) {series.format(audit)}"
                )
            )
            attempt = f"{new_id}, 'W', CASE WHEN {n} % 1000 = 0 THEN 'open' ELSE 'failed' END, {new_id}, 'A', 1, '{{}}'"
            await connection.execute(
                text(
                    "INSERT INTO whereupon_workflow (id, name, state, process, type, version, headers) "
                    f"{series.format(attempt)}"
                )
            )
            row = (await connection.execute(text("SELECT event_id FROM whereupon_exception WHERE id = 500"))).one()
        await analyze(store)
        yield house, {"event": row.event_id, "subscription": "one"}


def pages(known: dict[str, Any]) -> dict[str, dict[str, Any]]:
    group = {"subscription": "one", "fingerprint": "cause1"}
    return {
        "": {}, "map": {}, "events": {}, "events?before=20000": {}, "events?type=None": {}, "events?actor=nobody": {},
        f"events?correlation={uuid4()}": {}, f"event?id={known['event']}": {}, "handlers": {}, "dead": {},
        "dead?subscription=one": {}, "group": group, "group?after=9000": group,
        f"letter?event={known['event']}": {"subscription": "one"}, "retry": group, "skip": group, "canary": group,
        "replay?name=one": {}, "workflows": {}, "workflows?state=open": {}, "workflows?state=interrupted": {},
        "workflows?name=none": {}, "catalogue": {}, "audit": {}, "audit?ip=192.0.2.1": {}, "audit?action=DONE": {},
        f"audit?user={uuid4()}": {}, f"audit?event={uuid4()}": {}, "audit?until=2025-12-31": {}, "actions": {},
        "actions?subscription=one": {},
    }  # fmt: skip


async def test_no_page_walks_through_a_large_table_nor_takes_many_statements(
    long: tuple[Lighthouse, dict[str, Any]], database_url: str
) -> None:
    house, known = long
    for path, asked in pages(known).items():
        page, _, query = path.partition("?")
        given = dict(part.split("=", 1) for part in query.split("&")) if query else {}
        with statements() as seen:
            await house.page(page, **{**given, **asked})
        house.board._gauges._read_at = float("inf")  # the figures, which all pages share, stay as they were read
        assert len(seen) <= MOST_STATEMENTS or path == "", (path, len(seen))
        for statement in seen:
            await _check(house, statement, path, database_url)


async def _check(house: Lighthouse, statement: Statement, path: str, url: str) -> None:
    if not statement.sql.lstrip().upper().startswith(("SELECT", "WITH")):
        return
    if house.bus.engine.dialect.name == "sqlite":
        async with house.bus.engine.connect() as connection:
            rows = (await connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {statement.sql}", statement.parameters)).all()
        plan = [str(row.detail) for row in rows]
        for step in plan:
            if step.startswith("SCAN whereupon_") and step.split()[1] in LARGE:
                # a walk in the order that is asked for ends at its limit
                assert "LIMIT" in statement.sql, (path, plan, statement)
                assert "USE TEMP B-TREE FOR ORDER BY" not in plan or "anon_1" in statement.sql, (path, plan, statement)
        return
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    with psycopg.connect(plain, autocommit=True) as connection_:
        arguments = ", ".join(Literal(value).as_string(connection_) for value in statement.parameters or ())
        connection_.execute(f"PREPARE asked AS {statement.sql}".encode())
        call = f"EXPLAIN (FORMAT JSON) EXECUTE asked{f' ({arguments})' if arguments else ''}"
        row = connection_.execute(call.encode()).fetchone()
    assert row is not None
    for node in _nodes(row[0][0]["Plan"]):
        if node["Node Type"] == "Seq Scan" and node["Plan Rows"] > 1000:
            assert not node["Relation Name"].startswith(LARGE), (path, statement.sql, json.dumps(node))


def _nodes(plan: dict[str, Any]) -> list[dict[str, Any]]:
    return [plan, *(node for part in plan.get("Plans", ()) for node in _nodes(part))]
