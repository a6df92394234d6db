"""The dashboard over HTTP: what its pages show, who may see them, and what its forms do."""

from __future__ import annotations

import asyncio
import html
import json
import re
from collections.abc import AsyncIterator, MutableMapping
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from types import SimpleNamespace
from typing import Any
from uuid import UUID, uuid4

import httpx
import pytest
from sqlalchemy import func, insert, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse
from starlette.routing import Mount

from tests.lighthouse import (
    HOSTILE,
    FogRose,
    Lighthouse,
    ShipGuiding,
    ShipGuidingSucceeded,
    ShipMoored,
    ShipSighted,
    fields_in,
    lighthouse,
    lit,
)
from tests.notebook import Records, until
from whereupon import EventBus, board, gate, gauges, livestream, lookback
from whereupon import dashboard as module
from whereupon.dashboard import Dashboard, dashboard
from whereupon.gate import Visitor
from whereupon.schema import action, exception, history, log

pytestmark = pytest.mark.integration

PAGES = (
    "", "events", "map", "handlers", "dead", "workflows", "catalogue", "audit", "actions", "checkup", "canaries",
)  # fmt: skip
ACTIONS = ("pause", "resume", "replay", "retry", "skip", "edit", "canary", "stop")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No page leaves its figures to the next look, however busy the machine is."""
    monkeypatch.setattr(gauges, "PATIENCE", 60.0)


@pytest.fixture
async def house(database_url: str) -> AsyncIterator[Lighthouse]:
    async with lighthouse(database_url) as running:
        yield running


@pytest.fixture
async def small(sqlite_url: str) -> AsyncIterator[Lighthouse]:
    """Where the database makes no difference."""
    async with lighthouse(sqlite_url) as running:
        yield running


async def done(house: Lighthouse) -> list[tuple[str, str, str, str]]:
    """What was done, as it is kept: by whom, what, to what, and why."""
    return [(a.author, a.action, a.subscription, a.reason) for a in await house.bus.operator.actions()]


async def group_of(house: Lighthouse) -> dict[str, Any]:
    [group] = await house.bus.operator.groups("answer_signal")
    return {"subscription": group.subscription, "fingerprint": group.fingerprint}


# --- what is shown --------------------------------------------------------------------------------------------------


async def test_every_page_shows_what_there_is(house: Lighthouse) -> None:
    [wreck] = await house.wreck("Mary")
    ship = ShipSighted(name="Ada")
    await house.publish(ship, ShipMoored(name="Ada"), FogRose(metres=40), actor="keeper", ip_address="10.1.2.3")
    await house.bus.wait_settled([ship], 20)
    async with (
        house.bus.workflow(ShipGuiding, name="Ada") as attempt,
        AsyncSession(house.bus.engine) as session,
        session.begin(),
    ):
        await attempt.succeeded(ShipGuidingSucceeded(name="Ada"), session=session)

    overview = await house.page("")
    assert re.search(r"Dead letters</dt><dd class=\"large bad\">1<", overview)
    assert "30 s" in overview  # what answer_signal promises
    assert "answer_signal" in overview
    events = await house.page("events")
    assert events.index("FogRose") < events.index("ShipMoored") < events.index(str(wreck.event_id))
    assert "keeper" in events
    story = await house.page("event", id=wreck.event_id)
    assert "attempt 1 dead" in story
    assert "LookupError" in story
    assert "&#34;wrecked&#34;: true" in story
    drawn = await house.page("map")
    assert drawn.count("<path") == 2  # what hears everything has no line
    assert "keep_log" in drawn
    assert "of the newest" in drawn
    handlers = await house.page("handlers")
    assert "ordered by name" in handlers
    dead = await house.page("dead")
    assert "LookupError" in dead
    letters = await house.page("group", **await group_of(house))
    assert str(wreck.event_id) in letters
    letter = await house.page("letter", subscription="answer_signal", event=wreck.event_id)
    assert "in answer_signal" in letter  # the traceback
    assert "&#34;name&#34;: &#34;Mary&#34;" in letter
    workflows = await house.page("workflows")
    assert "ShipGuiding" in workflows
    assert "succeeded" in workflows
    catalogue = await house.page("catalogue")
    assert "A ship came into sight." in catalogue
    assert "FogRose" in catalogue  # nobody but keep_log hears it, and it is in the log
    kind = await house.page("type", name="ShipSighted")
    assert "with or without a glass" in kind
    assert "SHIP_SIGHTED" in kind
    shown = re.search(r'aria-label="JSON Schema">(.*?)</pre>', kind, re.DOTALL)
    assert shown is not None
    schema = json.loads(html.unescape(shown[1]))
    assert {"event_id", "occurred_at", "name"} <= set(schema["required"]) <= set(schema["properties"])
    audit = await house.page("audit")
    assert "10.1.2.3" in audit
    assert "ship:Ada" in audit
    assert "answer_signal has 1 dead letter" in await house.page("checkup")


async def test_of_an_empty_database_every_page_says_so(house: Lighthouse) -> None:
    for path in PAGES:
        page = await house.page(path)
        assert "<h1>" in page
    assert "There are none." in await house.page("dead")
    assert "Nobody has done anything yet." in await house.page("actions")
    assert "Every handler has settled what it was owed." in await house.page("")


async def test_what_somebody_typed_is_text_wherever_it_is_shown(house: Lighthouse) -> None:
    [wreck] = await house.wreck(HOSTILE)
    await house.publish(
        ShipSighted(name=HOSTILE), actor=HOSTILE, user_agent=HOSTILE, ip_address=HOSTILE, extra={HOSTILE: HOSTILE}
    )
    async with house.bus.engine.begin() as connection:
        values = {"type": HOSTILE, "version": 1, "event_id": uuid4(), "payload": b"\xff<b>", "headers": "{}"}
        await connection.execute(insert(log).values(**values, recorded_at=datetime.now(UTC)))
        await connection.execute(update(exception).values(traceback=HOSTILE, key=HOSTILE, error_type=HOSTILE))
    await house.bus.operator.pause("answer_signal", HOSTILE, author=HOSTILE)
    house.role = Visitor(name=HOSTILE, role="actor")
    where: dict[str, Any] = {"subscription": "answer_signal", "event": wreck.event_id}
    group = await group_of(house)
    asked: list[tuple[str, dict[str, Any]]] = [
        *((path, {}) for path in PAGES),
        ("event", {"id": wreck.event_id}), ("event", {"id": values["event_id"]}), ("letter", where),
        ("group", dict(group)), ("type", {"name": HOSTILE}), ("resume", {"name": "answer_signal"}), ("edit", where),
        ("retry", dict(group)), ("skip", where), ("canary", dict(group)),
        ("events", {"type": HOSTILE}), ("events", {"actor": HOSTILE}), ("audit", {"action": HOSTILE}),
    ]  # fmt: skip
    for path, query in asked:
        page = await house.page(path, **query)
        assert "<script>alert" not in page, path
        assert "<img" not in page, path
    for path, name in (("events", "id"), ("workflows", "state"), ("audit", "user")):
        page = await house.page(path, 422, **{name: HOSTILE})
        assert "<script>alert" not in page
    assert "&lt;script&gt;" in await house.page("actions")
    assert "&lt;script&gt;" in await house.page("event", id=wreck.event_id)


async def test_lists_are_searched_in_bounded_steps_that_lead_to_the_end(
    house: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lookback, "LOOKED_AT", 10)
    first = ShipMoored(name="first")
    await house.publish(first, actor="keeper")
    await house.publish(*(FogRose(metres=n) for n in range(25)))
    await house.publish(*(ShipSighted(name=f"ship {n}") for n in range(12)))
    for page, what, wanted in (
        ("events", {"actor": "keeper"}, str(first.event_id)),
        ("audit", {"ip": "1.1.1.1"}, None),
    ):
        path, seen = f"{page}?{next(iter(what))}={next(iter(what.values()))}", 0
        while True:
            shown = (await house.client.get(f"/{path}")).text
            found = wanted is not None and wanted in shown
            on = re.search(rf'href="({page}\?[^"]*before=[^"]*)"', shown)
            seen += 1
            assert seen < 10
            if on is None:
                assert found is (wanted is not None)
                assert "That is all there is." in shown
                break
            assert not found
            assert "Looked through 10" in shown
            path = on[1].replace("&amp;", "&")
        assert seen > 1


async def test_lists_are_paged_and_leave_nothing_out(house: Lighthouse) -> None:
    ships = [ShipSighted(name=f"ship {n:03}") for n in range(120)]
    await house.publish(*ships)
    for page in ("events", "audit"):
        path, seen = page, ""
        for _ in range(3):
            shown = (await house.client.get(f"/{path}")).text
            seen += shown
            on = re.search(rf'href="({page}\?before=[^"]*)"', shown)
            path = on[1].replace("&amp;", "&") if on else ""
        assert path == ""
        for ship in ships:
            assert seen.count(f'"event?id={ship.event_id}"') == 1, page


async def test_events_are_found_by_type_correlation_actor_and_id(house: Lighthouse) -> None:
    root = uuid4()
    ship, other = ShipSighted(name="Ada"), ShipSighted(name="Eve")
    await house.publish(ship, actor='the "keeper" 100%', correlation_id=root)
    await house.publish(other, actor="somebody")
    await house.publish(FogRose(metres=1))
    searches: list[dict[str, Any]] = [{"actor": 'the "keeper" 100%'}, {"correlation": root}]
    for asked in searches:
        page = await house.page("events", **asked)
        assert str(ship.event_id) in page
        assert str(other.event_id) not in page
    assert "No event of the kind" in await house.page("events", actor="the _keeper_ 100%")
    by_type = await house.page("events", type="ShipSighted")
    assert by_type.count('scope="row"') == 2
    response = await house.client.get("/events", params={"id": str(ship.event_id)})
    assert response.status_code == 303
    assert response.headers["location"] == f"event?id={ship.event_id}"
    assert "there is no event" in await house.page("event", 404, id=uuid4())
    assert "is not the id of an event" in await house.page("event", 422, id="nonsense")


async def test_the_audit_trail_is_searched_by_each_of_its_columns(house: Lighthouse) -> None:
    ada, eve = ShipSighted(name="Ada"), ShipSighted(name="Eve")
    await house.publish(ada, ip_address="10.0.0.1")
    await house.publish(eve, ip_address="10.0.0.2")
    searches: list[tuple[dict[str, Any], list[ShipSighted]]] = [
        ({"resource": "ship:Ada"}, [ada]), ({"ip": "10.0.0.2"}, [eve]), ({"event": ada.event_id}, [ada]),
        ({"correlation": eve.event_id}, [eve]), ({"action": "SHIP_SIGHTED"}, [ada, eve]), ({"action": "OTHER"}, []),
        ({"user": uuid4()}, []), ({"until": "2020-01-01"}, []), ({"until": "2100-01-01T00:00"}, [ada, eve]),
    ]  # fmt: skip
    for asked, found in searches:
        page = await house.page("audit", **asked)
        assert {event for event in (ada, eve) if str(event.event_id) in page} == set(found), asked
    assert "names no resource" in await house.page("audit", 422, resource="ship")
    assert "is no time" in await house.page("audit", 422, until="yesterday")
    assert "search anew" in await house.page("audit", 422, before="nonsense")


async def test_attempts_are_listed_by_state_the_oldest_open_one_first(house: Lighthouse) -> None:
    async with house.bus.workflow(ShipGuiding, name="Ada"), house.bus.workflow(ShipGuiding, name="Eve"):
        pass_ = await house.page("workflows", state="open")
        assert pass_.count('<span class="state open">') == 2
        assert "No attempt of the kind" in await house.page("workflows", state="interrupted")
    failed = await house.page("workflows", state="failed", name="ShipGuiding")
    assert failed.count('<span class="state failed">') == 2


# --- figures --------------------------------------------------------------------------------------------------------


async def reading_of(bus: EventBus) -> gauges.Reading:
    """What a dashboard that starts now finds out."""
    board = dashboard(bus, authorize=lambda _: "reader")
    try:
        return await board._gauges._measured()
    finally:
        await board.close()


async def test_events_are_counted_by_the_minute_without_being_counted(database_url: str) -> None:
    async with lit(database_url, Records(), deliver=False) as bus:
        now = datetime.now(UTC).replace(microsecond=0)
        minute = now.replace(second=0)
        wanted = {0: 3, 1: 5, 2: 0, 7: 40, 59: 2, 60: 6, 500: 9}  # by how many minutes ago
        async with bus.engine.begin() as connection:
            for ago in sorted(wanted, reverse=True):
                at = min(minute - timedelta(minutes=ago) + timedelta(seconds=1), now)
                for _ in range(wanted[ago]):
                    await connection.execute(
                        insert(log).values(
                            event_id=uuid4(), type="FogRose", version=1, payload=b"{}", headers="{}", recorded_at=at
                        )
                    )
        reading = await reading_of(bus)
    shift = (reading.at.replace(second=0, microsecond=0) - minute) // timedelta(minutes=1)
    for ago, number in wanted.items():
        if ago + shift < gauges.MINUTES:
            assert reading.published[gauges.MINUTES - 1 - ago - shift] == number, ago
    assert sum(reading.published) == sum(number for ago, number in wanted.items() if ago + shift < gauges.MINUTES)
    assert reading.types == {"FogRose": sum(wanted.values())}


async def test_calls_are_counted_as_the_history_grows(house: Lighthouse) -> None:
    ships = [ShipSighted(name="Ada") for _ in range(7)]
    await house.publish(*ships)
    await house.bus.wait_settled(ships, 20)
    await house.wreck("Mary", "Rose")
    measured = house.board._gauges
    first = await measured._measured()
    calls = first.calls["answer_signal"]
    assert (sum(one.succeeded for one in calls), sum(one.failed for one in calls)) == (7, 2)
    assert first.since is None
    await house.wreck("Vasa")
    second = await measured._measured()
    calls = second.calls["answer_signal"]
    assert (sum(one.succeeded for one in calls), sum(one.failed for one in calls)) == (7, 3)
    assert second.workers == 1
    assert second.dead_of("answer_signal") == 3


async def test_of_a_history_that_is_too_long_the_newest_calls_are_counted(
    database_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "CHARACTERS", 1_000)
    monkeypatch.setattr(gauges, "CHUNK", 10)
    async with lit(database_url, Records(), deliver=False) as bus:
        now = datetime.now(UTC)
        entry = '[1,1,1,1,"succeeded"]'
        rows = [
            {
                "subscription": "keep_log", "generation": 0, "worker": uuid4(), "first_position": n,
                "last_position": n, "entries": f"[{entry}]", "recorded_at": now - timedelta(seconds=(200 - n) / 10),
            }
            for n in range(200)
        ]  # fmt: skip
        async with bus.engine.begin() as connection:
            await connection.execute(insert(history), rows)
        reading = await reading_of(bus)
    counted = sum(one.succeeded for one in reading.calls["keep_log"])
    assert 1_000 / (len(entry) + 2) <= counted < 100
    assert reading.since == rows[-counted]["recorded_at"]


# --- who may come in ------------------------------------------------------------------------------------------------


async def test_without_authorize_there_is_no_dashboard(sqlite_url: str) -> None:
    bus = EventBus(sqlite_url)
    with pytest.raises(TypeError):
        dashboard(bus)  # type: ignore[call-arg]
    with pytest.raises(TypeError, match="authorize=lambda request"):
        dashboard(bus, authorize=None)  # type: ignore[arg-type]
    await bus.engine.dispose()


async def test_who_is_not_let_in_sees_nothing(small: Lighthouse) -> None:
    await small.wreck("Mary")
    small.role = None
    for path in (*PAGES, *ACTIONS, "event", "stream", "nowhere"):
        page = await small.page(path, 403)
        assert "not let in" in page
        assert "Mary" not in page
        assert "answer_signal" not in page
    assert (await small.client.post("/pause", data={"name": "keep_log"})).status_code == 403
    assert (await small.client.get("/static/dashboard.css")).status_code == 200  # which tells nothing


async def test_authorize_may_wait_redirect_refuse_in_its_own_way_or_be_wrong(small: Lighthouse) -> None:
    async def later() -> Visitor:
        await asyncio.sleep(0)
        return Visitor(name="Ada", role="reader")

    small.role = later()
    assert "Ada, who may look" in await small.page("events")
    small.role = RedirectResponse("/login", 303)
    response = await small.client.get("/dead")
    assert (response.status_code, response.headers["location"]) == (303, "/login")
    assert response.headers["x-frame-options"] == "DENY"
    for wrong in ("admin", 7, SimpleNamespace(name="", role="actor"), SimpleNamespace(name="Ada", role="boss")):
        small.role = wrong
        assert "fault of the dashboard" in await small.page("dead", 500)
    assert len(small.logger.of("dashboard_failed")) == 4
    small.board._gate._authorize = lambda _: (_ for _ in ()).throw(HTTPException(401, "Log in first."))
    assert "Log in first." in await small.page("dead", 401)


async def test_a_reader_may_look_and_not_act(house: Lighthouse) -> None:
    [wreck] = await house.wreck("Mary")
    where: dict[str, Any] = {"subscription": "answer_signal", "event": str(wreck.event_id)}
    group = await group_of(house)
    token = await house.token()
    house.role = "reader"
    for path, query in (("handlers", {}), ("dead", {}), ("group", group), ("letter", where)):
        assert "…</a>" not in await house.page(path, **query)
    asked: dict[str, dict[str, Any]] = {
        "pause": {"name": "keep_log"}, "resume": {"name": "keep_log"}, "replay": {"name": "keep_log"},
        "retry": group, "skip": where, "edit": where, "canary": group,
    }  # fmt: skip
    for path, query in asked.items():
        assert "may look and not act" in await house.page(path, 403, **query)
        own = {"form_token": gate._seal(await house.board._signing_key(), await _visit(house))}
        for given in ({"form_token": token}, own):
            response = await house.client.post(f"/{path}", data={**given, **query, "reason": "because", "limit": "1"})
            assert response.status_code == 403
    assert await done(house) == []


async def _visit(house: Lighthouse) -> gate.Visit:
    """A visit of the reader, for a token of their own: even with that they may not act."""
    [cookie] = [value for name, value in house.client.cookies.items() if name == gate.FORM_COOKIE]
    request = Request({"type": "http", "headers": [], "method": "POST", "path": "/"})
    visitor = Visitor(name="reader", role="reader")
    return gate.Visit(request=request, visitor=visitor, bound_to=cookie, form_token="", base="")


async def test_a_form_counts_only_from_the_page_that_it_was_on(small: Lighthouse) -> None:
    token = await small.token()
    fields = {"name": "keep_log", "reason": "because"}
    other = httpx.AsyncClient(transport=httpx.ASGITransport(app=small.board), base_url="http://lighthouse")
    async with other:
        theirs = fields_in((await other.get("/pause?name=keep_log")).text)["form_token"]
        assert theirs != token
        attempts: list[tuple[httpx.AsyncClient, dict[str, str], dict[str, str]]] = [
            (small.client, {}, {}),
            (small.client, {"form_token": theirs}, {}),
            (small.client, {"form_token": "ü" * 64}, {}),
            (other, {"form_token": token}, {}),
            (small.client, {"form_token": token}, {"sec-fetch-site": "cross-site"}),
            (small.client, {"form_token": token}, {"sec-fetch-site": "same-site"}),
            (small.client, {"form_token": token}, {"content-type": "text/plain"}),
            (small.client, {"form_token": token}, {"cookie": "whereupon_form=short"}),
        ]
        for client, given, headers in attempts:
            response = await client.post("/pause", data={**fields, **given}, headers=headers)
            assert response.status_code == 403, (given, headers)
            assert "Nothing was done" in response.text
    small.role = Visitor(name="Eve", role="actor")  # who has logged in meanwhile, in the same browser
    assert (await small.client.post("/pause", data={**fields, "form_token": token})).status_code == 403
    assert await done(small) == []
    small.role = "actor"
    response = await small.client.post(
        "/pause", data={**fields, "form_token": token}, headers={"sec-fetch-site": "same-origin"}
    )
    assert response.status_code == 303


async def test_every_answer_keeps_the_browser_from_doing_what_it_must_not(small: Lighthouse) -> None:
    for path in ("", "events", "nowhere", "a/b/c", "event?id=1", "static/dashboard.js", "static/none", "pause"):
        headers = (await small.client.get(f"/{path}")).headers
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self'")
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["x-frame-options"] == "DENY"
        kept = "immutable" if path == "static/dashboard.js" else "no-store"
        assert kept in headers["cache-control"], path
    response = await small.client.get("/events")
    cookie = (
        await httpx.AsyncClient(transport=httpx.ASGITransport(app=small.board), base_url="https://lighthouse").get(
            "/events"
        )
    ).headers["set-cookie"]
    assert "HttpOnly" in cookie
    assert "SameSite=strict" in cookie
    assert "Secure" in cookie
    assert "Path" not in cookie
    for page in (response.text, await small.page(""), await small.page("map")):
        assert not re.search(r"<script(?! src=)|<style| style=| on[a-z]+=|https?://(?!www\.w3)", page)


async def test_by_itself_it_answers_to_this_machine_s_names_alone(sqlite_url: str) -> None:
    async with lighthouse(sqlite_url, made=lambda bus, _: module.on_this_machine(bus)) as house:
        for host in ("127.0.0.1:8050", "localhost:8050", "localhost", "[::1]:8050", "127.9.9.9"):
            assert (await house.client.get("/", headers={"host": host})).status_code == 200
        for host in ("evil.example:8050", "lighthouse", "127.0.0.1.evil.example", "localhost.", "", "[", "10.0.0.1"):
            response = await house.client.get("/", headers={"host": host})
            assert response.status_code == 421, host
            assert "mount it in your application" in response.text


async def test_a_form_has_a_largest_size_and_a_most_of_fields(small: Lighthouse) -> None:
    response = await small.client.post("/pause", data={"reason": "x" * (gate.LARGEST_BODY + 1)})
    assert response.status_code == 413
    token = await small.token()
    many = {f"field{n}": "x" for n in range(100)}
    assert (await small.client.post("/pause", data={"form_token": token, **many})).status_code == 403
    assert (await small.client.put("/pause")).status_code == 405
    assert (await small.client.post("/events")).status_code == 405


# --- what can be done -----------------------------------------------------------------------------------------------


async def test_pausing_shows_a_plan_takes_a_reason_and_keeps_the_author(house: Lighthouse) -> None:
    house.role = SimpleNamespace(name="Ada Lovelace", role="actor")
    plan = await house.page("pause", name="cast_off")
    assert "Pause cast_off" in plan
    assert "of its 4 lanes" in plan
    assert await done(house) == []
    for reason in ("", "   "):
        response = await house.send("pause", name="cast_off", reason=reason)
        assert response.status_code == 409
        assert "Say why" in response.text
    response = await house.send("pause", name="cast_off", reason="the harbour is closed")
    assert response.headers["location"] == "handlers?done=pause"
    page = (await house.client.get("/handlers?done=pause")).text
    assert "the harbour is closed" in page
    assert "Paused. What runs ends" in page
    assert (await house.send("pause", name="cast_off", reason="again")).headers["location"] == "handlers?done=unchanged"
    assert "the harbour is closed" in await house.page("resume", name="cast_off")
    assert (await house.send("resume", name="cast_off", reason="it is open")).status_code == 303
    assert await done(house) == [
        ("Ada Lovelace", "pause", "cast_off", "the harbour is closed"),
        ("Ada Lovelace", "resume", "cast_off", "it is open"),
    ]
    assert "Ada Lovelace" in await house.page("actions", subscription="cast_off")
    assert "no subscription" in await house.page("pause", 404, name="nobody")


async def test_dead_letters_of_one_cause_are_retried_together(house: Lighthouse) -> None:
    events = await house.wreck("Mary", "Rose", "Vasa")
    group = await group_of(house)
    plan = await house.page("retry", **group)
    assert "3 died of LookupError" in plan
    assert str(events[0].event_id) in plan
    for limit in ("0", "-1", "none", "10001", "9" * 30):
        assert (await house.send("retry", **group, limit=limit, reason="because")).status_code == 409
    assert await done(house) == []
    response = await house.send("retry", **group, limit="2", reason="they have wireless now")
    assert response.status_code == 303
    assert response.headers["location"].endswith("&done=retry&number=2")
    assert "Delivered again: 2." in (await house.client.get(f"/{response.headers['location']}")).text
    assert await done(house) == [("actor", "retry", "answer_signal", "they have wireless now")] * 2
    await house.bus.wait_settled(events, 20)


async def test_one_dead_letter_is_skipped_retried_or_edited(house: Lighthouse) -> None:
    mary, rose, vasa = await house.wreck("Mary", "Rose", "Vasa")
    one: dict[str, Any] = {"subscription": "answer_signal", "generation": "0"}
    assert "for ever" in await house.page("skip", **one, event=mary.event_id)
    assert (await house.send("skip", **one, event=mary.event_id, reason="it sank")).status_code == 303
    again = await house.send("skip", **one, event=mary.event_id, reason="it sank")
    assert again.status_code == 409
    assert "is skipped, and skip is for one that is" in again.text
    assert "…</a>" not in await house.page("letter", **one, event=mary.event_id)
    assert (await house.send("retry", **one, event=rose.event_id, reason="once more")).status_code == 303

    form = await house.page("edit", **one, event=vasa.event_id)
    assert "&#34;wrecked&#34;: true" in form
    for wrong, why in (
        ("{", "no JSON object"), ("[]", "no JSON object"), ('{"nonsense": 1}', "has no field nonsense"),
        (json.dumps({"name": "Vasa", "event_id": str(uuid4())}), "keeps its id"),
    ):  # fmt: skip
        response = await house.client.post(
            "/edit",
            data={
                "form_token": await house.token(), **one, "event": str(vasa.event_id), "reason": "raised",
                "payload": wrong,
            },
        )  # fmt: skip
        assert response.status_code == 409
        assert why in re.findall(r"role=.alert.[^>]*>([^<]*)", response.text)[0]
        assert 'value="raised"' in response.text  # what was typed is there still
    payload = json.dumps({"name": "Vasa", "wrecked": False})
    response = await house.send("edit", **one, event=vasa.event_id, reason="raised", payload=payload)
    assert response.status_code == 303
    await house.bus.wait_settled([vasa], 20)
    [state] = [s for s in await house.bus.deliveries(vasa.event_id) if s.subscription == "answer_signal"]
    assert state.state == "succeeded"
    assert [(what, why) for _, what, _, why in await done(house)] == [
        ("skip", "it sank"), ("retry", "once more"), ("edit", "raised"),
    ]  # fmt: skip


async def test_a_replay_says_how_much_it_is_and_begins(house: Lighthouse) -> None:
    ships = [ShipSighted(name="Ada") for _ in range(3)]
    await house.publish(*ships)
    await house.bus.wait_settled(ships, 20)
    assert "the log has 3 events at most" in await house.page("replay", name="answer_signal")
    assert "the log has 0 events at most" in await house.page("replay", name="answer_signal", since="2100-01-01")
    assert "is no time" in await house.page("replay", 422, name="answer_signal", since="soon")
    for wrong in ({"rate": "fast"}, {"since": "soon"}, {"rate": "-1"}, {"since": "2100-01-01"}):
        response = await house.send("replay", name="answer_signal", reason="because", **wrong)
        assert response.status_code in (409, 422), wrong
    response = await house.send("replay", name="answer_signal", reason="the book was lost", rate="")
    assert response.headers["location"] == "handlers?done=replay&number=1"
    assert await done(house) == [("actor", "replay", "answer_signal", "the book was lost")]
    assert (await house.send("replay", name="nobody", reason="because")).status_code == 404


async def test_dead_letters_are_retried_a_few_first_while_the_page_tells(house: Lighthouse) -> None:
    await house.wreck("Mary", "Rose")
    group = await group_of(house)
    assert "then 10, then 100" in await house.page("canary", **group)
    response = await house.send("canary", **group, reason="one at a time")
    assert response.status_code == 303
    address = response.headers["location"]
    [canary] = house.board._steering._canaries.values()
    await until(lambda: canary.over is not None, 30)
    page = (await house.client.get(f"/{address}")).text
    assert "one at a time" in page
    assert canary.over is not None
    assert canary.over in page
    assert len(canary.steps) >= 1
    assert "one at a time" in await house.page("canaries")
    assert {(who, why) for who, _, _, why in await done(house)} == {("actor", "one at a time")}
    assert "knows no such canary" in await house.page("canary-run", 404, id=uuid4())


async def test_a_canary_is_stopped_by_a_form_and_by_the_end_of_the_dashboard(
    small: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def for_ever(*_: Any, **__: Any) -> AsyncIterator[Any]:
        await asyncio.Event().wait()
        yield

    await small.wreck("Mary")
    group = await group_of(small)
    monkeypatch.setattr(small.bus.operator, "canary", for_ever)  # the outcome of the first is long in coming
    address = (await small.send("canary", **group, reason="because")).headers["location"]
    twice = await small.send("canary", **group, reason="because")
    assert twice.status_code == 409
    assert "retried already" in twice.text
    id_ = address.partition("=")[2]
    stopped = await small.send("stop", id=id_)
    assert stopped.headers["location"] == f"{address}&done=stop"
    assert small.board._steering._canaries[UUID(id_)].over is not None
    await small.send("canary", **group, reason="because")
    await small.board.close()
    assert all(canary.over for canary in small.board._steering._canaries.values())


# --- the stream -----------------------------------------------------------------------------------------------------


@asynccontextmanager
async def streaming(
    app: Any, query: str = "", headers: dict[str, str] | None = None
) -> AsyncIterator[tuple[list[str], asyncio.Task[None], asyncio.Event]]:
    """What a stream sends, its task, and an event that disconnects it. httpx would wait for the end of it."""
    parts: list[str] = []
    gone = asyncio.Event()

    async def receive() -> MutableMapping[str, Any]:
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message: MutableMapping[str, Any]) -> None:
        if message["type"] == "http.response.start":
            parts.append(str(message["status"]))
        else:
            parts.append(message.get("body", b"").decode())

    scope = {
        "type": "http", "method": "GET", "path": "/stream", "query_string": query.encode(), "scheme": "http",
        "headers": [(name.encode(), value.encode()) for name, value in {"host": "x", **(headers or {})}.items()],
        "asgi": {"version": "3.0", "spec_version": "2.3"}, "root_path": "", "server": ("x", 80),
    }  # fmt: skip
    task = asyncio.create_task(app(scope, receive, send))
    try:
        yield parts, task, gone
    finally:
        gone.set()
        await asyncio.wait([task], timeout=5)
        assert task.done()


def told(parts: list[str]) -> str:
    return "".join(parts)


async def test_the_stream_shows_what_is_committed_meanwhile_and_only_what_was_asked_for(
    house: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livestream, "EVERY", 0.05)
    async with streaming(house.board, "type=ShipSighted&actor=keeper") as (parts, task, gone):
        await until(lambda: "retry:" in told(parts))
        await asyncio.sleep(0.3)  # it has begun to watch
        await house.publish(ShipSighted(name="Eve"), FogRose(metres=3))
        ship = ShipSighted(name="Ada")
        await house.publish(ship, actor="keeper")
        await until(lambda: str(ship.event_id) in told(parts))
        assert told(parts).count("event: event") == 1
        assert re.search(r"id: \d+\n", told(parts))
        gone.set()
        await asyncio.wait([task], timeout=5)
        assert task.done()
    await until(lambda: not house.board._livestream._viewers)


async def test_many_viewers_cost_the_database_what_one_does(small: Lighthouse, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(livestream, "EVERY", 0.05)
    reads = 0
    read = small.bus._store.read

    async def counted(*args: Any, **options: Any) -> Any:
        nonlocal reads
        reads += 1
        return await read(*args, **options)

    monkeypatch.setattr(small.board._livestream._store, "read", counted)
    async with streaming(small.board) as (first, *_), streaming(small.board) as (second, *_):
        await until(lambda: "retry:" in told(first) and "retry:" in told(second))
        await asyncio.sleep(0.2)
        await small.publish(FogRose(metres=1))
        await until(lambda: "FogRose" in told(first) and "FogRose" in told(second))
        tasks = [task for task in asyncio.all_tasks() if "_watch" in str(task.get_coro())]
        assert len(tasks) == 1
        assert reads > 0


async def test_a_page_that_comes_back_gets_what_it_missed_once(
    house: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livestream, "EVERY", 0.05)
    await house.publish(FogRose(metres=1))
    async with streaming(house.board) as (parts, *_):
        await until(lambda: "retry:" in told(parts))
        await asyncio.sleep(0.3)
        await house.publish(FogRose(metres=2))
        await until(lambda: "id: " in told(parts))
    seen = re.findall(r"id: (\d+)\n", told(parts))[-1]
    missed = FogRose(metres=3)
    await house.publish(missed)
    async with streaming(house.board, headers={"last-event-id": seen}) as (parts, *_):
        await until(lambda: str(missed.event_id) in told(parts))
        await asyncio.sleep(0.3)
        later = FogRose(metres=4)
        await house.publish(later)
        await until(lambda: str(later.event_id) in told(parts))
        assert told(parts).count("event: event") == 2
        # one that comes back while others watch gets it out of memory
        position = re.findall(r"id: (\d+)\n", told(parts))[0]
        async with streaming(house.board, headers={"last-event-id": position}) as (again, *_):
            await until(lambda: str(later.event_id) in told(again))
            assert str(missed.event_id) not in told(again)


async def test_a_slow_viewer_and_a_flood_are_told_what_is_left_out(
    small: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livestream, "EVERY", 0.05)
    monkeypatch.setattr(livestream, "AT_ONCE", 10)
    async with streaming(small.board) as (parts, *_):
        await until(lambda: "retry:" in told(parts))
        await asyncio.sleep(0.3)
        await small.publish(*(FogRose(metres=n) for n in range(500)))
        await until(lambda: "left out" in told(parts))
        assert told(parts).count("event: event") <= 20
        last = FogRose(metres=7)
        await asyncio.sleep(0.3)
        await small.publish(last)
        await until(lambda: str(last.event_id) in told(parts))
    viewer = livestream.Viewer(owner="x", accepts=lambda _: True)
    event = lookback.listed(
        SimpleNamespace(position=1, event_id=uuid4(), type="FogRose", recorded_at=datetime.now(UTC), headers="{}")
    )
    for _ in range(livestream.WAITING + 3):
        viewer.offer(event)
    assert (len(viewer.waiting), viewer.left_out) == (livestream.WAITING, 3)


async def test_streams_are_bounded_and_of_one_browser_the_oldest_ends(
    small: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livestream, "EVERY", 0.05)
    monkeypatch.setattr(livestream, "MOST_OF_ONE", 2)
    monkeypatch.setattr(livestream, "MOST_VIEWERS", 3)
    mine = {"cookie": f"whereupon_form={'a' * 43}"}
    viewers = small.board._livestream._viewers
    async with streaming(small.board, headers=mine) as (_, first, _g):
        await until(lambda: len(viewers) == 1)
        async with (
            streaming(small.board, headers=mine) as (_, second, _g2),
            streaming(small.board, headers=mine) as (_, third, _g3),
        ):
            await until(first.done)
            assert not second.done()
            assert not third.done()
            async with streaming(small.board) as (_, fourth, _g4):
                await until(lambda: len(small.board._livestream._viewers) == 3)
                async with streaming(small.board) as (parts, fifth, _g5):
                    await until(fifth.done)
                    assert parts[0] == "503"
                assert not fourth.done()


async def test_a_stream_gives_signs_of_life_and_ends_with_the_server(
    small: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(livestream, "EVERY", 0.02)
    monkeypatch.setattr(livestream, "HEARTBEAT", 0.05)
    stops = False
    small.board._livestream._stopping = lambda: stops
    async with streaming(small.board) as (parts, task, _):
        await until(lambda: told(parts).count(": still here") > 1)
        stops = True
        await until(task.done)
    stops = False
    async with streaming(small.board) as (_, task, _):
        await until(lambda: bool(small.board._livestream._viewers))
        await small.board.close()
        await until(task.done)


# --- where it is mounted --------------------------------------------------------------------------------------------


async def test_it_works_under_any_path_and_several_times_in_one_application(sqlite_url: str, tmp_path: Any) -> None:
    async with lighthouse(sqlite_url) as one, lighthouse(f"sqlite+aiosqlite:///{tmp_path}/two.db") as two:
        await one.wreck("Mary")
        app = Starlette(routes=[Mount("/deep/one", one.board), Mount("/two", two.board)])
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
            response = await client.get("/deep/one")
            assert response.status_code == 307
            assert response.headers["location"].endswith("/deep/one/")
            page = (await client.get("/deep/one/dead")).text
            assert "LookupError" in page
            assert "LookupError" not in (await client.get("/two/dead")).text
            style = re.search(r'href="(static/dashboard.css[^"]*)"', page)
            assert style is not None
            assert (await client.get(f"/deep/one/{style[1]}")).status_code == 200
            assert 'href="../../static/' in (await client.get("/deep/one/no/such/page")).text
            assert not re.search(r'(?:href|action|src|hx-get|sse-connect)="/', page)
            token = fields_in((await client.get("/deep/one/pause?name=keep_log")).text)["form_token"]
            sent = await client.post(
                "/deep/one/pause", data={"form_token": token, "name": "keep_log", "reason": "because"}
            )
            assert (sent.status_code, sent.headers["location"]) == (303, "handlers?done=pause")
        assert [why for *_, why in await done(one)] == ["because"]
        assert await done(two) == []
        # a proxy that takes the path away, whether it tells so or not
        for root in ("", "/elsewhere"):
            transport = httpx.ASGITransport(app=one.board, root_path=root)
            async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
                assert "LookupError" in (await client.get("/dead")).text


async def test_a_bare_mount_is_led_to_the_page_with_the_slash(small: Lighthouse) -> None:
    transport = httpx.ASGITransport(app=small.board, root_path="/a/whereupon")
    async with httpx.AsyncClient(transport=transport, base_url="http://x") as client:
        response = await client.get("/a/whereupon")
        assert (response.status_code, response.headers["location"]) == (307, "whereupon/")


async def test_of_a_database_that_is_down_a_page_tells_with_a_way_out(tmp_path: Any) -> None:
    for url, said in (
        ("postgresql+asyncpg://nobody:verysecret@127.0.0.1:1/nothing", "Check that it runs"),
        (f"sqlite+aiosqlite:///{tmp_path}/nothing.db", "whereupon db upgrade"),
    ):
        bus = EventBus(url, create_tables=False)
        app = dashboard(bus, authorize=lambda _: "actor")
        async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
            for path in (*PAGES, "event?id=01a223ae-7842-73f0-8499-6bab4699b8e1", "pause?name=x"):
                response = await client.get(f"/{path}")
                assert response.status_code == 503, path
                assert said in response.text
                assert "Traceback" not in response.text
                assert "verysecret" not in response.text
                assert 'href="./"' in response.text
        await app.close()
        await bus.engine.dispose()


async def test_a_database_that_accepts_and_does_not_answer_is_given_up_on(
    small: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "LONGEST", 0.05)

    async def never(*_: Any, **__: Any) -> Any:
        await asyncio.Event().wait()

    monkeypatch.setattr(small.bus.operator, "groups", never)
    assert "has not answered within" in await small.page("dead", 503)


async def test_figures_that_are_long_in_coming_are_left_to_the_next_look(
    small: Lighthouse, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gauges, "PATIENCE", 0.02)
    wait = asyncio.Event()
    measured = small.board._gauges._measured

    async def slowly() -> gauges.Reading:
        await wait.wait()
        return await measured()

    monkeypatch.setattr(small.board._gauges, "_measured", slowly)
    assert "The figures are being read" in await small.page("")
    assert "The figures are being read" in await small.page("map")
    assert "<h1>Handlers" in await small.page("handlers")
    assert "<h1>Catalogue" in await small.page("catalogue")
    wait.set()
    await until(lambda: small.board._gauges._reading is not None)
    assert "Waits longest" in await small.page("")


async def test_readings_are_shared_and_a_failed_one_is_told(small: Lighthouse, monkeypatch: pytest.MonkeyPatch) -> None:
    measurements = 0
    measured = small.board._gauges._measured

    async def counted() -> gauges.Reading:
        nonlocal measurements
        measurements += 1
        return await measured()

    monkeypatch.setattr(small.board._gauges, "_measured", counted)
    await asyncio.gather(*(small.page(path) for path in ("", "map", "", "catalogue")))
    assert measurements == 1

    async def broken() -> gauges.Reading:
        raise RuntimeError("a fuse has blown")

    monkeypatch.setattr(small.board._gauges, "_measured", broken)
    monkeypatch.setattr(gauges, "FRESH", -1.0)
    monkeypatch.setattr(gauges, "STALE", -1.0)
    assert "fault of the dashboard" in await small.page("", 500)
    assert small.logger.of("dashboard_failed")


def test_payloads_are_made_readable_whatever_they_are() -> None:
    assert board.pretty(b'{"a":[1]}') == '{\n  "a": [\n    1\n  ]\n}'
    assert board.pretty(b"\xff\xfe") == "\\xff\\xfe"
    deep = "[" * 100_000
    assert board.pretty(deep) == deep


async def _rows(bus: EventBus) -> int:
    async with bus.engine.connect() as connection:
        return int(await connection.scalar(select(func.count()).select_from(action)) or 0)


async def test_looking_leaves_no_trace(database_url: str) -> None:
    """No subscription is registered, no lease is taken, by a dashboard of a process that does nothing else."""
    async with lit(database_url, Records(), deliver=False):
        pass
    bus = EventBus(database_url, create_tables=False)
    bus.subscribe(FogRose, _hoot, name="hoot")
    app = dashboard(bus, authorize=lambda _: "reader")
    async with httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://x") as client:
        for path in PAGES:
            assert (await client.get(f"/{path}")).status_code == 200
    await app.close()
    assert isinstance(app, Dashboard)
    async with bus.engine.connect() as connection:
        names = set(await connection.scalars(text("SELECT name FROM whereupon_subscription")))
        workers = await connection.scalar(text("SELECT count(*) FROM whereupon_process WHERE in_flight > 0"))
    assert "hoot" not in names
    assert not workers
    assert await _rows(bus) == 0
    await bus.engine.dispose()


async def _hoot(_: FogRose) -> None: ...
