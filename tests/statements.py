"""The SQL that is executed while a block runs, as the drivers get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from sqlalchemy import event
from sqlalchemy.engine import Engine


class Statement(NamedTuple):
    sql: str
    parameters: Any

    @property
    def writes(self) -> bool:
        first = self.sql.lstrip().split(None, 1)[0].upper()
        return first in ("INSERT", "UPDATE", "DELETE") or (first == "WITH" and " UPDATE " in self.sql)


@contextmanager
def statements(engine: type[Engine] | Engine = Engine) -> Iterator[list[Statement]]:
    """All that goes through this engine (or any: workers have pools of their own), but for BEGIN."""
    seen: list[Statement] = []

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        if not statement.startswith("BEGIN"):  # on PostgreSQL it is the driver's, and not seen here
            seen.append(Statement(" ".join(statement.split()), parameters))

    event.listen(engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)
