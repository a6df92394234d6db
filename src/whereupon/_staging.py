"""Ties events to the SQL transaction that they are published in.

Staged events live with the *connection*, not with the session: its savepoints, its commit and its rollback decide what
becomes of them. So a session with a transaction of its own, one that joined a connection's transaction and one that
joined by a savepoint all mean the same thing by "commit". Just before the outermost COMMIT each bus writes what was
staged; once it is known to have happened, each bus is told.

SQLAlchemy reports a commit before it happens, on the connection, and after it, on the session. For a session that does
not own its transaction nobody reports the end; it is concluded once the connection is no longer in that transaction.
"""

from __future__ import annotations

import asyncio
import contextlib
import enum
import weakref
from asyncio import CancelledError
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from typing import Any, NamedTuple, Protocol
from uuid import UUID

from sqlalchemy import Connection, Engine, Transaction, event
from sqlalchemy.engine import ExceptionContext
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_scoped_session
from sqlalchemy.orm import Session, scoped_session
from sqlalchemy.pool import ConnectionPoolEntry, PoolProxiedConnection, PoolResetState

from whereupon.context import Metadata, handling
from whereupon.errors import HandlerSessionError, HandlerTimeout, PublishError
from whereupon.subscription import Subscription

_KEY = "whereupon"


class Participant(Protocol):
    """A bus, as the transaction sees it."""

    def write_staged(self, connection: Connection, staged: list[Any]) -> None:
        """Write into the transaction that commits next; an error makes that commit fail."""
        ...

    def committed(self, staged: list[Any], *, certain: bool) -> None:
        """The transaction is over. Must not raise. `certain` is False where only the database knows how it ended."""
        ...


class _Phase(enum.Enum):
    OPEN = enum.auto()
    PREPARED = enum.auto()
    COMMITTING = enum.auto()
    OVER = enum.auto()


class _Transaction:
    """What is staged in one transaction of one connection."""

    __slots__ = ("owned", "phase", "savepoints", "staged")

    def __init__(self) -> None:
        self.phase = _Phase.OPEN
        self.staged: list[tuple[Participant, Any]] = []
        self.savepoints: dict[str, int] = {}
        """Open savepoints, in the order they were made, and how much was staged by then."""
        self.owned = False
        """Whether a session that owns the transaction staged here, and so will tell when it is committed."""

    def forget_savepoint(self, name: str) -> None:
        """It is released or rolled back, and with it those made after it."""
        names = list(self.savepoints)
        for later in names[names.index(name) :] if name in self.savepoints else ():
            del self.savepoints[later]

    def by_participant(self) -> list[tuple[Participant, list[Any]]]:
        grouped: dict[int, tuple[Participant, list[Any]]] = {}
        for participant, item in self.staged:
            grouped.setdefault(id(participant), (participant, []))[1].append(item)
        return list(grouped.values())

    def write(self, connection: Connection) -> None:
        for participant, items in self.by_participant():
            participant.write_staged(connection, items)

    def end(self, *, certain: bool) -> None:
        self.phase = _Phase.OVER
        for participant, items in self.by_participant():
            participant.committed(items, certain=certain)


def async_session(session: Any) -> AsyncSession:
    """The AsyncSession that was meant. Raises `PublishError` for anything that is none."""
    if isinstance(session, async_scoped_session):
        session = session()
    if isinstance(session, AsyncSession):
        return session
    if isinstance(session, (Session, scoped_session)):
        raise PublishError(
            "publish got a Session, which can't be awaited: call bus.stage(event, session=session), its sync form"
        )
    raise PublishError(
        f"publish takes an AsyncSession of SQLAlchemy as session, not {type(session).__name__}: pass the session whose "
        "transaction changes what the event tells of"
    )


def sync_session(session: Any) -> Session:
    if isinstance(session, scoped_session):
        session = session()
    if isinstance(session, Session):
        return session
    if isinstance(session, (AsyncSession, async_scoped_session)):
        raise PublishError("stage got an AsyncSession: await bus.publish(event, session=session) instead")
    raise PublishError(f"stage takes a Session of SQLAlchemy as session, not {type(session).__name__}")


def connection_of(session: Session) -> Connection:
    """The session's connection, in a transaction, with that transaction watched. Runs in SQLAlchemy's greenlet."""
    connection = session.connection()
    level = connection.get_execution_options().get("isolation_level", connection.dialect._on_connect_isolation_level)
    if level == "AUTOCOMMIT":
        raise PublishError(
            "the session's connection is in AUTOCOMMIT: each statement commits by itself, so no event could commit "
            "together with the change. Publish on a session of an engine with transactions"
        )
    watch(connection.engine)
    _begin_on_sqlite(connection)
    return connection


def _begin_on_sqlite(connection: Connection) -> None:
    """Begin what SQLAlchemy has begun, where the driver would wait for the first write.

    A SAVEPOINT before that would be the outermost transaction, and its RELEASE a commit.
    """
    if connection.dialect.name == "sqlite" and not _driver_of(connection).in_transaction:
        connection.exec_driver_sql("BEGIN")


def _driver_of(connection: Connection) -> Any:
    """The connection of sqlite3 or aiosqlite; both say `in_transaction` and `total_changes`."""
    return connection.connection.driver_connection


def stage(session: Session, connection: Connection, participant: Participant, items: list[Any]) -> None:
    """Stage `items` in the transaction that `connection` is in."""
    transaction = _transaction_of(connection)
    if transaction.phase is not _Phase.OPEN:
        raise PublishError(
            "the transaction is being committed: publish before the commit, or in a transaction after it"
        )
    transaction.staged.extend((participant, item) for item in items)
    if not isinstance(session.get_bind(), Connection):
        transaction.owned = True
    open_transactions = session.info.setdefault(_KEY, [])
    if transaction not in open_transactions:
        open_transactions[:] = [one for one in open_transactions if one.phase is not _Phase.OVER]
        open_transactions.append(transaction)


def _transaction_of(connection: Connection) -> _Transaction:
    transaction = _current(connection)
    if transaction is None or transaction.phase is _Phase.OVER:
        transaction = connection.info[_KEY] = _Transaction()
    return transaction


def goes_on(connection: Connection, transaction: Transaction | None) -> bool:
    """Whether a connection is still in this transaction, as far as is known on this side of it."""
    return not connection.closed and not connection.invalidated and connection.get_transaction() is transaction


def root_of(engine: Engine) -> Engine:
    """The engine that all those made by `execution_options` share their events with."""
    while (proxied := getattr(engine, "_proxied", None)) is not None:
        engine = proxied
    return engine


def watch(engine: Engine) -> None:
    """Have savepoints, commits and rollbacks on this engine reported; once per engine."""
    engine = root_of(engine)
    if event.contains(engine, "commit", _commit):
        return
    event.listen(engine, "savepoint", _savepoint)
    event.listen(engine, "rollback_savepoint", _rollback_savepoint)
    event.listen(engine, "release_savepoint", _release_savepoint)
    event.listen(engine, "begin", _begin, insert=True)  # before a listener that sends BEGIN, and waits for it
    event.listen(engine, "rollback", _rollback)
    event.listen(engine, "prepare_twophase", _prepare_twophase)
    event.listen(engine, "commit_twophase", _commit_twophase)
    event.listen(engine, "rollback_twophase", _rollback_twophase)
    event.listen(engine, "handle_error", _handle_error)
    event.listen(engine, "checkin", _checkin)
    if engine.dialect.name == "sqlite" and engine.dialect.is_async:
        event.listen(engine, "checkin", _forget_writer)
        event.listen(engine, "reset", _roll_back_on_sqlite)
    event.listen(engine, "commit", _commit)


def _roll_back_on_sqlite(driver: Any, record: Any, state: PoolResetState) -> None:
    """A COMMIT that SQLite refuses leaves its transaction open, and SQLAlchemy takes it for ended.

    The next one to get the connection could begin none.
    """
    if state.asyncio_safe and not state.terminate_only and driver.driver_connection.in_transaction:
        driver.rollback()


def _savepoint(connection: Connection, name: str | None) -> None:
    _begin_on_sqlite(connection)
    transaction = _transaction_of(connection)
    if name is None:  # reported before SQLAlchemy has named it, after the number that it takes next
        name = f"sa_savepoint_{connection._Connection__savepoint_seq + 1}"  # type: ignore[attr-defined]
    transaction.savepoints[name] = len(transaction.staged)


def reuse_savepoint_names(connection: Connection) -> None:
    """Where no savepoint is open: name the next one as the first was, so that the driver need not prepare it anew."""
    connection._Connection__savepoint_seq = 0  # type: ignore[attr-defined]


def _current(connection: Connection) -> _Transaction | None:
    """What is staged on a connection; a connection that broke has lost it, and says no more."""
    return None if connection.invalidated else connection.info.get(_KEY)


def _rollback_savepoint(connection: Connection, name: str, context: Any) -> None:
    transaction = _current(connection)
    if transaction is not None:
        # a savepoint older than our watching is older than anything staged, too
        del transaction.staged[transaction.savepoints.get(name, 0) :]
        transaction.forget_savepoint(name)


def _release_savepoint(connection: Connection, name: str, context: Any) -> None:
    transaction = _current(connection)
    if transaction is not None:
        transaction.forget_savepoint(name)


def _commit(connection: Connection) -> None:
    transaction = _current(connection)
    if transaction is not None and transaction.phase is _Phase.OPEN:
        try:
            transaction.write(connection)
        except BaseException:
            transaction.phase = _Phase.OVER
            # SQLAlchemy takes a commit that failed for one that was tried: it would never roll the change back
            if not connection.invalidated:
                connection.dialect.do_rollback(connection.connection)
            raise
        transaction.phase = _Phase.COMMITTING
        if transaction.staged and not transaction.owned:
            with contextlib.suppress(RuntimeError):  # without a loop there is nobody to tell early
                asyncio.get_running_loop().call_soon(
                    _look, connection, connection.get_transaction(), transaction, 0.001
                )


def _look(connection: Connection, committing: Any, transaction: _Transaction, wait: float) -> None:
    """Conclude a commit that no session tells of, soon after it has happened."""
    if transaction.phase is _Phase.COMMITTING:
        if connection.get_transaction() is not committing:  # it stays, where the commit failed
            transaction.end(certain=True)
        else:
            asyncio.get_running_loop().call_later(wait, _look, connection, committing, transaction, min(2 * wait, 0.05))


def _prepare_twophase(connection: Connection, xid: Any) -> None:
    transaction = _current(connection)
    if transaction is not None and transaction.phase is _Phase.OPEN:
        transaction.write(connection)
        transaction.phase = _Phase.PREPARED


def _commit_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    transaction = _current(connection)
    if transaction is None:
        return
    if not is_prepared and transaction.phase is _Phase.OPEN:
        transaction.write(connection)
    transaction.phase = _Phase.COMMITTING


def _rollback_twophase(connection: Connection, xid: Any, is_prepared: bool) -> None:
    _rollback(connection)


def _rollback(connection: Connection) -> None:
    transaction = _current(connection)
    if transaction is not None:
        transaction.phase = _Phase.OVER


def _begin(connection: Connection) -> None:
    _conclude(connection.info)
    if connection.dialect.name == "sqlite" and connection.dialect.is_async:  # a bus's own engine is async
        _note_writer(connection)


def _checkin(dbapi_connection: Any, record: ConnectionPoolEntry | PoolProxiedConnection) -> None:
    _conclude(record.info)


def _forget_writer(dbapi_connection: Any, record: ConnectionPoolEntry | PoolProxiedConnection) -> None:
    if (driver := record.driver_connection) is not None:
        _begun.pop(driver, None)  # whoever takes it from the pool has begun nothing yet


class _Begun(NamedTuple):
    """Who began the latest transaction on a connection, and how many rows that had changed by then."""

    task: weakref.ref[asyncio.Task[Any]]
    engine: weakref.ref[Engine]
    changes: int


# By the driver's connection, so that one that goes from task to task tells of its latest transaction only.
_begun: weakref.WeakKeyDictionary[Any, _Begun] = weakref.WeakKeyDictionary()


def _note_writer(connection: Connection) -> None:
    try:
        task = asyncio.current_task()
    except RuntimeError:
        return
    if task is not None:
        driver = _driver_of(connection)
        _begun[driver] = _Begun(weakref.ref(task), weakref.ref(root_of(connection.engine)), driver.total_changes)


def _is_open(driver: Any) -> bool:
    try:
        return bool(driver.in_transaction)
    except ValueError:  # it was closed
        return False


def task_has_transaction(engine: Engine, *, writing: bool) -> bool:
    """Whether the current task has a transaction open on this SQLite engine, or one that has changed something."""
    task = asyncio.current_task()
    root = root_of(engine)
    return task is not None and any(
        begun.task() is task
        and begun.engine() is root
        and _is_open(driver)
        and (not writing or driver.total_changes != begun.changes)
        for driver, begun in list(_begun.items())
    )


def _conclude(info: dict[Any, Any]) -> None:
    """The connection is free again: a commit begun on it and not known to have failed has happened."""
    transaction = info.pop(_KEY, None)
    if transaction is None or transaction.phase is _Phase.OVER:
        return
    if transaction.phase is _Phase.COMMITTING:
        # a session that owned it would have told: its commit was interrupted, and only the database knows
        transaction.end(certain=not transaction.owned)
    transaction.phase = _Phase.OVER


def _handle_error(context: ExceptionContext) -> None:
    if context.connection is None:
        return
    try:
        info = context.connection.info
    except Exception:
        return  # an invalidated connection has lost its info, and what was staged with it
    transaction = info.get(_KEY)
    if transaction is not None and transaction.phase is _Phase.COMMITTING:
        info.pop(_KEY)
        if isinstance(context.sqlalchemy_exception, DBAPIError) and not context.is_disconnect:
            transaction.phase = _Phase.OVER  # the database itself refused
        else:
            transaction.end(certain=False)


@event.listens_for(Session, "after_commit")
def _after_commit(session: Session) -> None:
    transactions = session.info.get(_KEY)
    if not transactions:
        return
    for transaction in [one for one in transactions if one.phase is _Phase.COMMITTING]:
        transactions.remove(transaction)
        transaction.end(certain=True)


_ENDING = ("commit", "rollback", "close", "reset", "invalidate", "prepare")


@contextlib.contextmanager
def handed_out(session: AsyncSession, handler: str) -> Iterator[None]:
    """While a handler has this session, ending its transaction raises `HandlerSessionError`."""

    def refusing(verb: str) -> Any:
        def refuse(*_: object, **__: object) -> Any:
            raise HandlerSessionError(
                f"{handler} called session.{verb}(), but the transaction is not its own: whereupon commits what the "
                "handler wrote together with the record that it ran. Just return; raise to have it rolled back"
            )

        return refuse

    def begin(nested: bool = False) -> Any:
        return beginning(nested=True) if nested else refusing("begin")()  # leaving `begin` would commit

    parts: tuple[AsyncSession | Session, ...] = (session, session.sync_session)
    before = [dict(part.__dict__) for part in parts]  # another handler may be in its midst, and this one a part of it
    beginning = session.sync_session.begin
    for part in parts:
        part.__dict__.update({verb: refusing(verb) for verb in _ENDING if hasattr(type(part), verb)})
    session.sync_session.__dict__["begin"] = begin
    try:
        yield
    finally:
        for part, attributes in zip(parts, before, strict=True):
            for verb in (*_ENDING, "begin"):
                part.__dict__.pop(verb, None)
                if verb in attributes:
                    part.__dict__[verb] = attributes[verb]


def make_as_new(session: AsyncSession) -> None:
    """For the next handler in its transaction: without what the one before has left in it, once that is sent.

    Faster than a new session on the same connection. Its `info` stays: hooks may keep there what they do at the commit.
    """
    session.expunge_all()
    session.autoflush = True


@contextlib.asynccontextmanager
async def own_session(engine: Engine) -> AsyncIterator[AsyncSession]:
    """A session for one delivery, on an engine with an async driver."""
    async with AsyncSession(AsyncEngine(engine), expire_on_commit=False) as session:
        yield session


async def run_inside(
    session: AsyncSession,
    subscription: Subscription,
    call: Callable[[], Awaitable[None]],
    handled: tuple[UUID, Metadata],
) -> Exception | CancelledError | None:
    """Run a handler in a savepoint of the publisher's transaction; return what it raised, with its writes rolled back.

    The caller has flushed: whatever fails in here is the handler's. A cancellation of the publisher passes through.
    """
    task = asyncio.current_task()
    cancelling = task.cancelling() if task is not None else 0
    limit = asyncio.timeout(subscription.timeout)
    token = handling.set(handled)
    failure: Exception | CancelledError
    try:
        async with session.begin_nested():
            with handed_out(session, subscription.name):
                async with limit:
                    await call()
    except CancelledError as error:
        if task is not None and task.cancelling() > cancelling:
            raise
        failure = error
    except Exception as error:
        failure = error
        if isinstance(error, TimeoutError) and limit.expired():
            failure = HandlerTimeout(
                f"{subscription.name} ran longer than its {subscription.timeout:g} s, and was cancelled"
            )
    else:
        return None
    finally:
        handling.reset(token)
    if not session.is_active or (await session.connection()).invalidated:
        raise failure  # cut off in the midst of a statement, it took the connection and the whole transaction along
    return failure
