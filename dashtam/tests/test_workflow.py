"""Attempts and their outcomes, on a bus that keeps nothing."""

import asyncio
from uuid import UUID, uuid4

import pytest

from dashtam.application.workflow import attempt
from dashtam.domain.events import UserRegistrationAttempted, UserRegistrationFailed
from dashtam.domain.result import Failure, Result, Success
from dashtam.domain.user import EmailTaken
from whereupon import DomainEvent, InMemoryEventBus


class Heard:
    def __init__(self) -> None:
        self.events: list[DomainEvent] = []

    async def handle(self, event: DomainEvent) -> None:
        await asyncio.sleep(0)
        self.events.append(event)

    @property
    def outcomes(self) -> list[str]:
        return [getattr(event, "reason", "attempted") for event in self.events]


@pytest.fixture
def heard() -> Heard:
    return Heard()


@pytest.fixture
def bus(heard: Heard) -> InMemoryEventBus:
    bus = InMemoryEventBus()
    bus.register(heard)
    return bus


ATTEMPTED = UserRegistrationAttempted(email="ada@example.com")


def failed(reason: str) -> UserRegistrationFailed:
    return UserRegistrationFailed(email="ada@example.com", reason=reason)


async def test_the_attempt_is_published_before_the_work_starts(bus: InMemoryEventBus, heard: Heard) -> None:
    user_id = uuid4()

    async def work() -> Result[UUID, EmailTaken]:
        assert heard.events == [ATTEMPTED]
        return Success(user_id)

    assert await attempt(bus, ATTEMPTED, work, failed=failed) == Success(user_id)
    assert heard.events == [ATTEMPTED]


async def test_an_expected_failure_is_published_with_its_reason(bus: InMemoryEventBus, heard: Heard) -> None:
    async def work() -> Result[UUID, EmailTaken]:
        return Failure(EmailTaken())

    result = await attempt(bus, ATTEMPTED, work, failed=failed)
    assert not result.is_success()
    assert heard.outcomes == ["attempted", "email_taken"]


async def test_a_fault_of_ours_is_published_without_its_details_and_raised(bus: InMemoryEventBus, heard: Heard) -> None:
    async def work() -> Result[UUID, EmailTaken]:
        raise OSError("disk full, password=correct horse 7")

    with pytest.raises(OSError, match="disk full"):
        await attempt(bus, ATTEMPTED, work, failed=failed)
    assert heard.outcomes == ["attempted", "internal_error"]


async def test_an_expected_error_that_is_raised_keeps_its_reason(bus: InMemoryEventBus, heard: Heard) -> None:
    async def work() -> Result[UUID, EmailTaken]:
        raise EmailTaken

    with pytest.raises(EmailTaken):
        await attempt(bus, ATTEMPTED, work, failed=failed)
    assert heard.outcomes == ["attempted", "email_taken"]


@pytest.mark.parametrize("succeeds", [True, False])
async def test_work_whose_caller_is_cancelled_comes_to_its_one_outcome(
    bus: InMemoryEventBus, heard: Heard, succeeds: bool
) -> None:
    started, may_end = asyncio.Event(), asyncio.Event()
    ended = False

    async def work() -> Result[UUID, EmailTaken]:
        nonlocal ended
        started.set()
        await may_end.wait()
        ended = True
        return Success(uuid4()) if succeeds else Failure(EmailTaken())

    caller = asyncio.create_task(attempt(bus, ATTEMPTED, work, failed=failed))
    await started.wait()
    caller.cancel()
    await asyncio.sleep(0)
    may_end.set()
    with pytest.raises(asyncio.CancelledError):
        await caller
    assert ended
    assert heard.outcomes == (["attempted"] if succeeds else ["attempted", "email_taken"])


async def test_nothing_is_tried_when_the_attempt_can_t_be_published(bus: InMemoryEventBus) -> None:
    async def work() -> Result[UUID, EmailTaken]:
        pytest.fail("the work ran")

    async with bus:
        pass
    with pytest.raises(RuntimeError, match="closed"):
        await attempt(bus, ATTEMPTED, work, failed=failed)
