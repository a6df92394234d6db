"""Logs by structlog: JSON for machines, or readable in a terminal."""

import logging
import sys
from typing import Any, Literal, TextIO

import structlog
from structlog.typing import EventDict

from dashtam.application.logger import LoggerProtocol

LogFormat = Literal["json", "console"]


def make_logger(form: LogFormat, level: str = "INFO", stream: TextIO | None = None) -> LoggerProtocol:
    """A logger that writes one line for each record to `stream` (default: standard output)."""
    processors: list[Any] = [
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
    ]
    # Tracebacks as plain text: structlog's own show local variables, a password among them.
    if form == "json":
        processors += [structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    else:
        processors += [
            _printable,
            structlog.dev.ConsoleRenderer(
                colors=(stream or sys.stdout).isatty(), exception_formatter=structlog.dev.plain_traceback
            ),
        ]
    logger: LoggerProtocol = structlog.wrap_logger(
        structlog.PrintLogger(stream),
        processors=processors,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level]),
    )
    return logger


def _printable(_logger: Any, _method: str, record: EventDict) -> EventDict:
    """What somebody typed into a form must not move the reader's cursor."""
    return {
        key: value.encode("unicode_escape").decode()
        if isinstance(value, str) and any(not part.isprintable() for part in value)
        else value
        for key, value in record.items()
    }


class _Forwarding(logging.Handler):
    def __init__(self, logger: Any) -> None:
        super().__init__()
        self._logger = logger

    def emit(self, record: logging.LogRecord) -> None:
        try:
            self._logger.log(record.levelno, record.getMessage(), logger=record.name, exc_info=record.exc_info)
        except Exception:
            self.handleError(record)


def forward_standard_logging(logger: LoggerProtocol, level: str = "INFO") -> None:
    """Have records of the standard library's loggers, those of the web server among them, written by `logger`."""
    root = logging.getLogger()
    root.handlers[:] = [_Forwarding(logger)]
    root.setLevel(level)
    for name in ("aiosqlite", "httpx", "httpcore"):  # they tell statements with their values, and a bank's account ids
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))
