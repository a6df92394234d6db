"""Log records: the small protocol that whereupon logs by, and the handler that logs every event."""

from __future__ import annotations

import logging
import traceback
from types import ModuleType
from typing import Any, Final, Protocol, cast

import msgspec

from whereupon.event import DomainEvent, Outcome

_RESERVED: Final = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime"}
_OF_LOGGERS: Final = frozenset(
    {"self", "event", "level", "timestamp", "logger", "exc_info", "stack_info", "positional_args"}
)
"""Keywords that structlog and its processors use themselves."""


class Logger(Protocol):
    """What structlog's loggers offer: an event's name, and its details as keywords."""

    def info(self, event: str, /, **details: Any) -> Any: ...
    def warning(self, event: str, /, **details: Any) -> Any: ...
    def error(self, event: str, /, **details: Any) -> Any: ...


class _StandardLogger:
    """Gives a logger of the standard library the form above: details become attributes of the record."""

    def __init__(self, logger: logging.Logger | logging.LoggerAdapter[Any]) -> None:
        self._logger = logger

    def _log(self, level: int, event: str, details: dict[str, Any]) -> None:
        if not self._logger.isEnabledFor(level):
            return
        exc_info = details.pop("exc_info", None)
        extra = {f"{key}_" if key in _RESERVED else key: value for key, value in details.items()}
        shown = " ".join(f"{key}={value!r}" for key, value in details.items())
        self._logger.log(level, "%s %s", event, shown, extra=extra, exc_info=exc_info, stacklevel=3)

    def info(self, event: str, /, **details: Any) -> None:
        self._log(logging.INFO, event, details)

    def warning(self, event: str, /, **details: Any) -> None:
        self._log(logging.WARNING, event, details)

    def error(self, event: str, /, **details: Any) -> None:
        self._log(logging.ERROR, event, details)


def logger_of(logger: Any) -> Logger:
    """`logger` as whereupon calls it; None is the standard library's `whereupon` logger.

    Raises `TypeError` for what is no logger.
    """
    if logger is None:
        logger = logging.getLogger("whereupon")
    if isinstance(logger, (logging.Logger, logging.LoggerAdapter)):
        return _StandardLogger(logger)
    if isinstance(logger, ModuleType) or not all(
        callable(getattr(logger, level, None)) for level in ("info", "warning", "error")
    ):
        raise TypeError(
            f"logger={logger!r} is no logger: give structlog.get_logger(), logging.getLogger(…), or an object with "
            "info, warning and error that take a name and keywords"
        )
    return cast("Logger", logger)


def message_of(error: BaseException) -> str:
    """What an error says; an exception may do anything in its own `__str__`."""
    try:
        return str(error)
    except Exception as broken:
        return f"its message can't be shown: str() of it raised {type(broken).__name__}"


def trace_of(error: BaseException) -> str:
    """The end of its traceback."""
    try:
        return "".join(traceback.format_exception(error))[-16000:]
    except Exception as broken:
        return f"its traceback can't be shown: {type(broken).__name__}"


class LoggingEventHandler:
    """Logs each event under its name in snake case, with its fields; *Failed* ones as warnings.

    Subscribe it with `bus.register(LoggingEventHandler(logger))`; what it logs is the event's own declaration.
    """

    def __init__(self, logger: Any = None) -> None:
        self._logger = logger_of(logger)

    async def handle(self, event: DomainEvent) -> None:
        definition = type(event).__event__
        details = {
            f"{name}_" if name in _OF_LOGGERS else name: _plain(getattr(event, name)) for name in definition.fields
        }
        if definition.category is not None:
            details.setdefault("category", definition.category)
        log = self._logger.warning if definition.outcome is Outcome.FAILED else self._logger.info
        log(definition.snake_name, **details)


def _plain(value: Any) -> Any:
    return msgspec.to_builtins(value, str_keys=True, enc_hook=repr)
