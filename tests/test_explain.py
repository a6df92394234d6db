"""Why something did (not) happen: an event's story, a type's, lists of events, attempts and the audit trail."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from sqlalchemy import text, update
from sqlalchemy.ext.asyncio import AsyncSession
from uuid_utils.compat import uuid7

from tests.notebook import until
from tests.statements import statements
from whereupon import (
    ActionRefused,
    AuditEventHandler,
    Delivery,
    Discard,
    DomainEvent,
    EventBus,
    Outcome,
    Retry,
    Workflow,
    request_metadata,
    schema,
)
from whereupon.story import DeliveryStory, EventStory
from whereupon.workflow import State

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

ONCE = Retry(max_attempts=1)
POLL = 0.05


class CardMailed(DomainEvent, audit="card_mailed", resource="letter", resource_id="number"):
    road: str
    number: int
    flaw: str = ""


class CardMislaid(DomainEvent):
    number: int


class CardPerused(DomainEvent, name="CardViewed", aliases=("CardUnfolded",)):
    number: int


class PostRoundAttempted(DomainEvent, outcome=Outcome.ATTEMPTED):
    road: str


class PostRoundSucceeded(DomainEvent):
    road: str


class PostRoundFailed(DomainEvent, outcome=Outcome.FAILED):
    road: str
    reason: str


PostRound = Workflow(PostRoundAttempted, PostRoundSucceeded, PostRoundFailed)


async def note(_: CardMailed) -> None: ...


async def deliver(event: CardMailed) -> None:
    if event.flaw == "torn":
        raise ValueError("the letter\nis torn")
    if event.flaw == "junk":
        raise Discard("nobody reads that")


async def stamp(_: CardMailed, session: AsyncSession) -> None:
    await session.execute(text("SELECT 1"))


async def seek(_: CardMislaid) -> None: ...


async def hurry(_: CardMailed) -> None: ...


def office(url: str, *, deliver_here: bool = False) -> EventBus:
    bus = EventBus(url, create_tables=True, deliver=deliver_here, poll_interval=POLL, lease=2)
    bus.register(AuditEventHandler())
    bus.subscribe(CardMailed, deliver, name="deliver", ordered_by="road", retry=ONCE)
    bus.subscribe(CardMailed, note, name="note", retry=Retry(max_attempts=3, first=60, longest=100))
    bus.subscribe(CardMailed, stamp, name="stamp", delivery=Delivery.IN_TRANSACTION)
    bus.subscribe(CardMailed, hurry, name="hurry", delivery=Delivery.AFTER_COMMIT)
    bus.subscribe(CardMislaid, seek, name="seek")
    return bus


@pytest.fixture
async def bus(database_url: str) -> AsyncIterator[EventBus]:
    bus = office(database_url)
    async with bus:
        yield bus
    await bus.engine.dispose()


async def post(bus: EventBus, *events: DomainEvent) -> None:
    async with AsyncSession(bus.engine) as session, session.begin():
        await bus.publish(*events, session=session)


def letter(number: int = 1, road: str = "long", flaw: str = "") -> CardMailed:
    return CardMailed(road=road, number=number, flaw=flaw)


def of(story: EventStory, name: str) -> DeliveryStory:
    (found,) = (one for one in story.deliveries if one.subscription == name)
    return found


async def told(bus: EventBus, event: DomainEvent, name: str, state: str) -> DeliveryStory:
    """What is told of one delivery, once it is in this state."""
    found: list[DeliveryStory] = []

    async def reached() -> bool:
        found[:] = [of(await bus.explain(event.event_id), name)]
        return found[0].state == state

    for _ in range(300):
        if await reached():
            return found[0]
        await asyncio.sleep(0.05)
    raise AssertionError(f"{name} never became {state}: {found}")


async def test_a_story_says_who_published_an_event_when_and_what_became_of_it(database_url: str) -> None:
    bus = office(database_url, deliver_here=True)
    request = {"actor": "ada", "ip_address": "192.0.2.7", "user_agent": "curl", "trace_id": "4bf92f"}
    async with bus:
        event = letter()
        with request_metadata(request):
            await post(bus, event)
        delivered = await told(bus, event, "deliver", "succeeded")
        story = await bus.explain(event.event_id)
    assert (story.event_type, story.version) == ("CardMailed", 1)
    assert (story.metadata.actor, story.metadata.ip_address) == ("ada", "192.0.2.7")
    assert '"road":"long"' in story.payload
    assert story.made_at is not None
    assert abs(story.made_at - event.occurred_at) < timedelta(seconds=1)
    assert story.position is not None
    [call] = delivered.calls
    assert (call.attempt, call.outcome) == (1, "succeeded")
    assert 0 <= call.seconds < 10
    assert call.worker.rpartition(":")[2].isdigit()
    assert of(story, "stamp").state == "in publish"
    assert of(story, "AuditEventHandler").state == "in publish"
    assert of(story, "hurry").state == "after commit"
    assert story.deaf == 1
    assert [(miss.subscription, miss.hears) for miss in story.near_misses] == [("seek", "CardMislaid")]


async def test_a_story_says_what_a_delivery_waits_for(bus: EventBus, database_url: str) -> None:
    event = letter()
    await post(bus, event)
    assert "No worker runs" in (await told(bus, event, "note", "waiting")).why
    await bus.operator.pause("note", "the ink is wet", author="ada")
    assert "paused (the ink is wet)" in (await told(bus, event, "note", "waiting")).why
    await bus.operator.resume("note", "dry", author="ada")

    other = EventBus(database_url, poll_interval=POLL)
    other.subscribe(CardMislaid, seek, name="seek")
    async with other:
        await until(lambda: other._worker is not None)
        why = (await told(bus, event, "note", "waiting")).why
    assert "1 worker runs, and none of them knows note" in why


async def test_a_story_tells_of_failures_of_what_waits_behind_them_and_of_what_was_discarded(
    database_url: str,
) -> None:
    bus = office(database_url, deliver_here=True)
    async with bus:
        torn, behind, junk = letter(1, flaw="torn"), letter(2), letter(3, road="short", flaw="junk")
        await post(bus, torn, behind, junk)
        dead = await told(bus, torn, "deliver", "dead")
        parked = await told(bus, behind, "deliver", "parked")
        skipped = await told(bus, junk, "deliver", "skipped")
        assert (dead.attempts, dead.error_type, dead.error_message) == (1, "ValueError", "the letter\nis torn")
        assert dead.traceback is not None
        assert "raise ValueError" in dead.traceback
        assert parked.behind is not None
        assert parked.behind.event_id == torn.event_id
        assert parked.key == "long"
        assert "discarded" in skipped.why
        await bus.operator.skip("deliver", torn.event_id, reason="it is gone", author="ada")
        settled = await told(bus, torn, "deliver", "skipped")
        assert settled.why == "ada skipped it: it is gone"
        assert [(act.action, act.author) for act in settled.actions] == [("skip", "ada")]
        await told(bus, behind, "deliver", "succeeded")


async def test_a_story_tells_when_a_failed_delivery_is_tried_again(database_url: str) -> None:
    bus = EventBus(database_url, create_tables=True, poll_interval=POLL)

    async def fail(_: CardMailed) -> None:
        raise TimeoutError("nobody at home")

    bus.subscribe(CardMailed, fail, name="ring", retry=Retry(max_attempts=3, first=1000, longest=1000))
    async with bus:
        event = letter()
        await post(bus, event)
        retrying = await told(bus, event, "ring", "retrying")
    assert retrying.why.startswith("Attempt 1 of 3 failed; the next begins at")
    assert retrying.next_at is not None
    assert retrying.error_type == "TimeoutError"


async def test_a_story_knows_what_caused_an_event_and_what_it_caused(database_url: str) -> None:
    bus = EventBus(database_url, create_tables=True, poll_interval=POLL)

    async def lose(event: CardMailed, session: AsyncSession) -> None:
        await bus.publish(CardMislaid(number=event.number), session=session)

    bus.subscribe(CardMailed, lose, name="lose")
    bus.subscribe(CardMislaid, seek, name="seek")
    async with bus:
        event, other = letter(), letter(2)
        await post(bus, other)
        await post(bus, event)
        await told(bus, event, "lose", "succeeded")
        story = await bus.explain(event.event_id)
        assert [caused.event_type for caused in story.caused] == ["CardMislaid"]
        assert story.searched_all
        lost = await bus.explain(story.caused[0].event_id)
        assert lost.cause is not None
        assert (lost.cause.event_id, lost.cause.event_type) == (event.event_id, "CardMailed")
        related = await bus.stories.events(related_to=lost.event_id)
        assert [one.event_id for one in related] == [lost.event_id, event.event_id]


async def test_a_subscription_that_came_later_is_told_as_not_owed(bus: EventBus, database_url: str) -> None:
    event = letter()
    await post(bus, event)
    async with bus.engine.begin() as connection:  # so that it is older by any clock
        await connection.execute(update(schema.log).values(recorded_at=datetime.now(UTC) - timedelta(hours=1)))
    declared = office(database_url)
    declared.subscribe(CardMailed, note, name="newcomer")
    story = of(await declared.explain(event.event_id), "newcomer")
    assert (story.state, "has ever started" in story.why) == ("not owed", True)
    async with declared:
        story = of(await declared.explain(event.event_id), "newcomer")
    assert (story.state, "after this event was published" in story.why) == ("not owed", True)
    await declared.engine.dispose()


async def test_a_database_alone_tells_the_story_too(bus: EventBus, database_url: str) -> None:
    event = letter()
    await post(bus, event)
    other = EventBus(database_url, create_tables=False)
    try:
        story = await other.explain(event.event_id)
    finally:
        await other.engine.dispose()
    assert {one.subscription for one in story.deliveries} == {"AuditEventHandler", "deliver", "note", "stamp"}
    assert of(story, "note").state == "waiting"


async def test_of_an_event_that_was_pruned_its_dead_letter_and_the_audit_trail_tell(database_url: str) -> None:
    bus = office(database_url, deliver_here=True)
    async with bus:
        torn, well = letter(1, flaw="torn"), letter(2, road="short")
        await post(bus, torn, well)
        await told(bus, torn, "deliver", "dead")
        for event in (torn, well):
            await told(bus, event, "note", "succeeded")
        await told(bus, well, "deliver", "succeeded")
        async with bus.engine.begin() as connection:
            await connection.execute(text("DELETE FROM whereupon_log"))
        story = await bus.explain(torn.event_id)
        assert story.position is None
        assert of(story, "deliver").state == "dead"
        with pytest.raises(ActionRefused, match=r"any more: the audit trail knows it as CardMailed of"):
            await bus.explain(well.event_id)


async def test_an_event_without_a_trace_is_told_by_what_its_id_says(bus: EventBus) -> None:
    made = uuid7()
    with pytest.raises(ActionRefused, match="its log is empty"):
        await bus.explain(made)
    await post(bus, letter())
    with pytest.raises(ActionRefused, match=r"by its id it was made at .* it was pruned"):
        await bus.explain(made)
    with pytest.raises(ActionRefused, match="rolled back, or is still open, or it was published in another database"):
        await bus.explain(uuid7())
    with pytest.raises(ActionRefused, match=r"is it the id of an event"):
        await bus.explain(uuid4())


async def test_headers_and_payloads_that_somebody_broke_do_not_keep_the_rest_from_being_told(bus: EventBus) -> None:
    event = letter()
    await post(bus, event)
    async with bus.engine.begin() as connection:
        await connection.execute(update(schema.log).values(headers="{broken", payload=b"\xff{", keys="["))
    story = await bus.explain(event.event_id)
    assert story.metadata.actor is None
    assert story.payload == "\\xff{"
    assert of(story, "note").state == "waiting"


async def test_an_attempt_is_part_of_the_story_of_both_its_events(database_url: str) -> None:
    bus = office(database_url)
    async with bus:
        attempt = bus.workflow(PostRound, road="long")
        with pytest.raises(RuntimeError):
            async with attempt:
                raise RuntimeError("the van broke down")
        async with (
            bus.workflow(PostRound, road="short") as other,
            AsyncSession(bus.engine) as session,
            session.begin(),
        ):
            await other.succeeded(session=session)
        first = (await bus.explain(attempt.attempted.event_id)).attempt
        assert first is not None
        assert (first.workflow, first.state) == ("PostRound", "failed")
        assert first.outcome_id is not None
        outcome = await bus.explain(first.outcome_id)
        assert outcome.event_type == "PostRoundFailed"
        assert outcome.attempt == first
        found = await bus.stories.attempts()
        assert [one.state for one in found] == ["succeeded", "failed"]
        assert [one.state for one in await bus.stories.attempts(state=State.FAILED)] == ["failed"]
        assert [one.state for one in await bus.stories.attempts(opened_before=found[0].opened_at)] == ["failed"]
        assert await bus.stories.attempts(name="Other") == []


async def test_a_type_s_story_tells_its_handlers_and_when_they_give_up(bus: EventBus) -> None:
    story = bus.explain_type("CardMailed")
    assert story.fields == {"road": "str", "number": "int", "flaw": "str"}
    assert story.audit == "card_mailed"
    handlers = {handler.subscription: handler for handler in story.handlers}
    assert [(each.attempt, each.after) for each in handlers["note"].tries] == [(1, 0), (2, 60), (3, 160)]
    assert handlers["deliver"].ordered_by == "road"
    assert handlers["AuditEventHandler"].hears_everything
    assert handlers["hurry"].tries == ()
    assert [miss.subscription for miss in story.near_misses] == ["seek"]
    assert bus.explain_type("CardUnfolded").event_type == "CardViewed"
    with pytest.raises(ActionRefused, match=r"no event 'CardMaile': is it CardMailed"):
        bus.explain_type("CardMaile")


@pytest.mark.parametrize(("event", "counted"), [(letter(), 4), (CardMislaid(number=1), 1)])
async def test_a_type_s_story_tells_how_many_statements_a_publish_takes(
    bus: EventBus, event: DomainEvent, counted: int
) -> None:
    assert bus.explain_type(type(event).__event__.name).statements == counted
    await post(bus, CardMislaid(number=0))  # what a first publish asks once is asked
    async with AsyncSession(bus.engine) as session, session.begin():
        await session.execute(text("SELECT 1"))
        with statements(bus.engine.sync_engine) as seen:
            await bus.publish(event, session=session)
            await session.commit()
    own = [one.sql for one in seen if one.sql != "SELECT 1"]
    assert len(own) == counted, own


async def test_events_are_listed_the_newest_first_by_type_time_and_position(bus: EventBus) -> None:
    letters = [letter(number) for number in range(5)]
    for event in letters:
        await post(bus, event)
    await post(bus, CardMislaid(number=9))
    found = await bus.stories.events(types=["CardMailed"], limit=3)
    assert [one.event_id for one in found] == [event.event_id for event in letters[:1:-1]]
    rest = await bus.stories.events(types=["CardMailed"], before=found[-1].position)
    assert [one.event_id for one in rest] == [event.event_id for event in letters[1::-1]]
    assert await bus.stories.events(until=rest[-1].recorded_at) == []
    assert len(await bus.stories.events(since=rest[-1].recorded_at)) == 6


async def test_who_follows_the_log_sees_each_event_once_however_late_it_commits(bus: EventBus) -> None:
    await post(bus, letter(0))
    seen: list[UUID] = []

    async def follow() -> None:
        async for event in bus.stories.follow(["CardMailed"], every=0.02):
            seen.append(event.event_id)

    following = asyncio.create_task(follow())
    await asyncio.sleep(0.3)
    late, early = letter(1), letter(2)
    try:
        if bus.engine.dialect.name == "postgresql":
            async with AsyncSession(bus.engine) as session, session.begin():
                await bus.publish(late, session=session)
                await session.flush()
                await session.connection()
                await post(bus, early)
                await until(lambda: seen == [early.event_id])
            expected = [early.event_id, late.event_id]
        else:
            await post(bus, late)
            await post(bus, CardMislaid(number=1))
            await post(bus, early)
            expected = [late.event_id, early.event_id]
        await until(lambda: len(seen) >= 2)
        await asyncio.sleep(0.1)
        assert seen == expected
    finally:
        following.cancel()


async def test_the_audit_trail_is_searched_by_what_an_auditor_asks_for(bus: EventBus) -> None:
    with request_metadata({"actor": "ada", "ip_address": "192.0.2.7"}):
        await post(bus, letter(1))
    await post(bus, letter(2))
    newest, oldest = await bus.stories.audit()
    assert (newest.resource_id, oldest.resource_id) == ("2", "1")
    assert [one.id for one in await bus.stories.audit(ip_address="192.0.2.7")] == [oldest.id]
    assert [one.id for one in await bus.stories.audit(resource=("letter", "2"))] == [newest.id]
    assert [one.id for one in await bus.stories.audit(event_id=oldest.event_id)] == [oldest.id]
    assert [one.id for one in await bus.stories.audit(until=newest.occurred_at)] == [oldest.id]
    assert await bus.stories.audit(action="letter_burnt") == []
    assert await bus.stories.audit(user_id=uuid4()) == []
    assert await bus.stories.audit(correlation_id=uuid4()) == []
    assert await bus.stories.audit(since=datetime.now(UTC) + timedelta(hours=1)) == []
