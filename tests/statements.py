"""The SQL that is executed while a block runs, as the drivers get it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import aiosqlite
import pytest
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
    """All that goes through this engine (or any: workers have pools of their own), but for BEGIN and COMMIT.

    Workers ask SQLite's driver past SQLAlchemy; on connections of the engine's pool that is seen as well.
    """
    seen: list[Statement] = []
    ours: set[int] = set()
    ask = aiosqlite.Connection.execute_fetchall

    def note(connection: Any, cursor: Any, statement: str, parameters: Any, *rest: Any) -> None:
        # on PostgreSQL these are the driver's, and not seen here
        if not statement.startswith(("BEGIN", "COMMIT", "PRAGMA data_version")):
            seen.append(Statement(" ".join(statement.split()), parameters))

    def asked(connection: aiosqlite.Connection, statement: str, parameters: Any = ()) -> Any:
        if engine is Engine or id(connection) in ours:
            note(connection, None, statement, parameters)
        return ask(connection, statement, parameters)

    def taken(_: Any, record: Any, __: Any) -> None:
        ours.add(id(record.driver_connection))

    event.listen(engine, "before_cursor_execute", note)
    event.listen(engine, "checkout", taken)
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(aiosqlite.Connection, "execute_fetchall", asked)
            yield seen
    finally:
        event.remove(engine, "before_cursor_execute", note)
        event.remove(engine, "checkout", taken)
