"""What is logged of an event and of a handler that fails, by structlog and by the standard library."""

from __future__ import annotations

import io
import json
import logging
from dataclasses import dataclass
from datetime import UTC, date, datetime
from decimal import Decimal
from typing import Any, NoReturn
from unittest.mock import AsyncMock
from uuid import UUID, uuid4

import pytest
import structlog
from structlog.testing import LogCapture

from whereupon import DomainEvent, InMemoryEventBus, LoggingEventHandler
from whereupon.logs import logger_of

pytestmark = pytest.mark.unit


@dataclass(frozen=True)
class Institute:
    name: str
    founded: date


class BankConnectionSucceeded(DomainEvent, category="bank"):
    user_id: UUID
    bank_name: str


class BankConnectionFailed(DomainEvent, category="bank"):
    user_id: UUID
    reason: str


class BankConnectionAttempted(DomainEvent):
    user_id: UUID


class BankListed(DomainEvent):
    institutes: list[Institute]
    fees: dict[UUID, Decimal]
    logo: bytes
    note: str | None = None


class LevelMeasured(DomainEvent):
    event: str
    level: int
    timestamp: datetime
    logger: str
    exc_info: bool
    name: str
    msg: str
    args: tuple[int, ...]
    category: str = "of its own"


@pytest.fixture
def captured() -> LogCapture:
    return LogCapture()


@pytest.fixture
def logger(captured: LogCapture) -> Any:
    return structlog.wrap_logger(structlog.PrintLogger(), processors=[captured])


@pytest.fixture
def records(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO)
    return caplog


# Events


async def test_a_success_is_logged_under_its_name_with_its_fields(logger: Any, captured: LogCapture) -> None:
    bus = InMemoryEventBus()
    bus.register(LoggingEventHandler(logger))
    event = BankConnectionSucceeded(user_id=uuid4(), bank_name="schwab")
    await bus.publish(event)
    assert captured.entries == [
        {
            "event": "bank_connection_succeeded",
            "log_level": "info",
            "event_id": str(event.event_id),
            "occurred_at": event.occurred_at.isoformat().replace("+00:00", "Z"),
            "user_id": str(event.user_id),
            "bank_name": "schwab",
            "category": "bank",
        }
    ]


async def test_a_failure_is_logged_as_a_warning_and_an_attempt_is_not(logger: Any, captured: LogCapture) -> None:
    handler = LoggingEventHandler(logger)
    await handler.handle(BankConnectionAttempted(user_id=uuid4()))
    await handler.handle(BankConnectionFailed(user_id=uuid4(), reason="no answer"))
    assert [(entry["event"], entry["log_level"]) for entry in captured.entries] == [
        ("bank_connection_attempted", "info"),
        ("bank_connection_failed", "warning"),
    ]
    assert captured.entries[1]["reason"] == "no answer"
    assert "category" not in captured.entries[0]


async def test_an_event_becomes_a_line_of_json_as_in_the_guide() -> None:
    output = io.StringIO()
    logger = structlog.wrap_logger(
        structlog.WriteLogger(output),
        processors=[
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.JSONRenderer(),
        ],
    )
    event = BankListed(
        institutes=[Institute("a", date(1900, 1, 1))], fees={UUID(int=1): Decimal("1.10")}, logo=b"\0\xff"
    )
    await LoggingEventHandler(logger).handle(event)
    line = json.loads(output.getvalue())
    assert line | {"timestamp": "", "event_id": "", "occurred_at": ""} == {
        "event": "bank_listed",
        "level": "info",
        "timestamp": "",
        "event_id": "",
        "occurred_at": "",
        "institutes": [{"name": "a", "founded": "1900-01-01"}],
        "fees": {"00000000-0000-0000-0000-000000000001": "1.10"},
        "logo": "AP8=",
        "note": None,
    }
    assert datetime.fromisoformat(line["timestamp"]).tzinfo is not None


def level_measured() -> LevelMeasured:
    return LevelMeasured(
        event="e", level=5, timestamp=datetime(2025, 1, 1, tzinfo=UTC), logger="l", exc_info=True, name="n", msg="m",
        args=(1,),
    )  # fmt: skip


async def test_fields_that_a_logger_uses_itself_get_an_underscore(logger: Any, captured: LogCapture) -> None:
    await LoggingEventHandler(logger).handle(level_measured())
    (entry,) = captured.entries
    assert (entry["event"], entry["log_level"]) == ("level_measured", "info")
    assert (entry["event_"], entry["level_"], entry["timestamp_"]) == ("e", 5, "2025-01-01T00:00:00Z")
    assert (entry["logger_"], entry["exc_info_"], entry["name"]) == ("l", True, "n")
    assert entry["category"] == "of its own"


async def test_the_standard_library_gets_a_line_and_the_fields_as_attributes(records: pytest.LogCaptureFixture) -> None:
    event = BankConnectionFailed(user_id=uuid4(), reason="100 % gone\nERROR forged")
    await LoggingEventHandler(logging.getLogger("shop")).handle(event)
    (record,) = records.records
    assert (record.name, record.levelno) == ("shop", logging.WARNING)
    assert record.getMessage().startswith("bank_connection_failed event_id='")
    assert r"reason='100 % gone\nERROR forged'" in record.getMessage()
    assert "\n" not in record.getMessage(), "an event's text can't forge a line"
    assert vars(record)["user_id"] == str(event.user_id)


async def test_fields_that_a_log_record_has_itself_get_an_underscore(records: pytest.LogCaptureFixture) -> None:
    await LoggingEventHandler(logging.getLogger("shop")).handle(level_measured())
    (record,) = records.records
    assert (record.name, record.msg) == ("shop", "%s %s")
    assert (vars(record)["name_"], vars(record)["msg_"], vars(record)["args_"]) == ("n", "m", (1,))
    assert record.exc_info is None


async def test_what_can_not_be_put_into_json_is_logged_as_it_prints(logger: Any, captured: LogCapture) -> None:
    wrong: Any = object
    await LoggingEventHandler(logger).handle(BankConnectionFailed(user_id=wrong, reason="\ud800"))
    assert captured.entries[0]["user_id"] == "<class 'object'>"


async def test_nothing_is_made_of_a_record_that_nobody_takes(records: pytest.LogCaptureFixture) -> None:
    records.set_level(logging.ERROR, logger="shop")
    await LoggingEventHandler(logging.getLogger("shop")).handle(BankConnectionFailed(user_id=uuid4(), reason="x"))
    assert records.records == []


async def test_without_a_logger_it_is_the_librarys(records: pytest.LogCaptureFixture) -> None:
    await LoggingEventHandler().handle(BankConnectionFailed(user_id=uuid4(), reason="x"))
    assert [record.name for record in records.records] == ["whereupon"]


# Failures


async def fail(event: BankConnectionSucceeded) -> NoReturn:
    raise ValueError("Invalid email format")


async def test_a_failing_handler_is_logged_as_the_guide_has_it(logger: Any, captured: LogCapture) -> None:
    bus = InMemoryEventBus(logger=logger)
    other = AsyncMock()
    bus.subscribe(BankConnectionSucceeded, fail)
    bus.subscribe(BankConnectionSucceeded, other)
    event = BankConnectionSucceeded(user_id=uuid4(), bank_name="x")
    await bus.publish(event)
    (entry,) = captured.entries
    assert isinstance(entry.pop("exc_info"), ValueError)
    assert entry == {
        "event": "event_handler_failed",
        "log_level": "warning",
        "event_type": "BankConnectionSucceeded",
        "event_id": str(event.event_id),
        "handler_name": "fail",
        "subscription": "fail",
        "error_type": "ValueError",
        "error_message": "Invalid email format",
    }
    other.assert_awaited_once_with(event)


async def test_a_failing_handler_is_logged_with_its_traceback(records: pytest.LogCaptureFixture) -> None:
    bus = InMemoryEventBus()
    bus.subscribe(BankConnectionSucceeded, fail)
    await bus.publish(BankConnectionSucceeded(user_id=uuid4(), bank_name="x"))
    (record,) = records.records
    assert (record.name, record.levelno) == ("whereupon", logging.WARNING)
    assert "handler_name='fail'" in record.getMessage()
    assert vars(record)["error_type"] == "ValueError"
    assert record.exc_info is not None
    assert isinstance(record.exc_info[1], ValueError)


# Loggers


def test_an_adapter_of_the_standard_library_is_taken(records: pytest.LogCaptureFixture) -> None:
    logger_of(logging.LoggerAdapter(logging.getLogger("shop"), {"shop": 5})).warning("closed", door=1)
    (record,) = records.records
    assert record.getMessage() == "closed door=1"
    assert vars(record)["shop"] == 5


def test_a_record_names_the_line_that_logged() -> None:
    output = io.StringIO()
    handler = logging.StreamHandler(output)
    handler.setFormatter(logging.Formatter("%(funcName)s %(message)s"))
    logger = logging.Logger("shop")
    logger.addHandler(handler)
    for level in ("info", "warning", "error"):
        getattr(logger_of(logger), level)("said", level=level)
    name = "test_a_record_names_the_line_that_logged"
    assert output.getvalue().splitlines() == [f"{name} said level={level!r}" for level in ("info", "warning", "error")]


@pytest.mark.parametrize("logger", ["shop", 5, object(), logging, print])
def test_what_is_no_logger_is_refused(logger: Any) -> None:
    with pytest.raises(TypeError, match=r"is no logger: give structlog\.get_logger\(\), logging\.getLogger\(…\)"):
        InMemoryEventBus(logger=logger)
