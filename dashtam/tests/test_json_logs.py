import io
import json
import logging

import pytest

from dashtam.infrastructure.logs import forward_standard_logging, make_logger


@pytest.fixture
def stream() -> io.StringIO:
    return io.StringIO()


def test_a_record_is_one_line_of_json(stream: io.StringIO) -> None:
    make_logger("json", stream=stream).info("user_registration_succeeded", email="a\nb\x1b[2J@example.com")
    (line,) = stream.getvalue().splitlines()
    record = json.loads(line)
    assert record.pop("timestamp").endswith("Z")
    assert record == {
        "event": "user_registration_succeeded",
        "level": "info",
        "email": "a\nb\x1b[2J@example.com",
    }
    assert "\x1b" not in line


def test_nothing_that_was_typed_moves_the_cursor_of_a_terminal(stream: io.StringIO) -> None:
    make_logger("console", stream=stream).info("attempted", email="a\nb\x1b[2J@example.com", name="Bücher")
    (line,) = stream.getvalue().splitlines()
    assert "\x1b" not in line
    assert r"a\nb\x1b[2J@example.com" in line.replace("\\\\", "\\")
    assert "Bücher" in line


@pytest.mark.parametrize("form", ["json", "console"])
def test_a_traceback_shows_no_local_variables(form: str, stream: io.StringIO) -> None:
    logger = make_logger(form, stream=stream)  # type: ignore[arg-type]
    password = "".join(("tr0ub", "4dor"))
    try:
        raise OSError(f"disk full after {len(password)} bytes")
    except OSError as error:
        logger.error("request_failed", exc_info=error)
    assert "disk full after 9 bytes" in stream.getvalue()
    assert "tr0ub4dor" not in stream.getvalue()


def test_what_is_below_the_level_is_not_written(stream: io.StringIO) -> None:
    logger = make_logger("json", "WARNING", stream)
    logger.info("quiet")
    logger.warning("loud")
    assert [json.loads(line)["event"] for line in stream.getvalue().splitlines()] == ["loud"]


def test_records_of_the_standard_library_come_in_the_same_form(stream: io.StringIO) -> None:
    root = logging.getLogger()
    before, level = root.handlers[:], root.level
    try:
        forward_standard_logging(make_logger("json", stream=stream))
        logging.getLogger("uvicorn.error").warning("%s is %s", "tea", "ready")
    finally:
        root.handlers[:] = before
        root.setLevel(level)
    record = json.loads(stream.getvalue())
    assert (record["event"], record["level"], record["logger"]) == ("tea is ready", "warning", "uvicorn.error")
