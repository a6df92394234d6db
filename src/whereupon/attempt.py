"""Attempts at workflows on the durable bus: a row each, whose one change, open to outcome, commits with the event.

*Succeeded* changes the row in the transaction of the work, and so holds it locked until that has ended, one way or the
other. *Failed* takes the same lock first: a COMMIT whose reply was lost is waited for, and if it happened there is
nothing left to do. The row belongs to a process, by its lease: of those whose process is gone any worker makes
*Interrupted* ones, and work that comes back after that finds the row closed, and can't commit.
"""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import random
from asyncio import Task
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager, suppress
from contextvars import Context
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Final, NoReturn
from uuid import UUID

import msgspec
from sqlalchemy import Connection, Transaction, exists, insert, select, update
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from whereupon import _staging
from whereupon.context import NO_METADATA, Metadata, decode_metadata, encode_metadata, metadata_for, request_metadata
from whereupon.errors import BusStateError, DatabaseError, PublishError, WorkflowClosedError
from whereupon.event import DomainEvent
from whereupon.lease import Lease
from whereupon.logs import message_of
from whereupon.schema import process, without_nul
from whereupon.schema import workflow as table
from whereupon.store import Record
from whereupon.workflow import INTERRUPTED, A, Attempt, S, State, Workflow, outside_attempts, reason_of

if TYPE_CHECKING:
    from whereupon.durable import DurableReceipt, EventBus

LONGEST_PAUSE: Final = 30.0
"""Seconds between two tries to write down a failure while the database is away, at most."""
SWEPT: Final = 100
"""Attempts looked at in one sweep; more wait for the next, which follows at once."""


class Attempts:
    """The attempts of one bus: its process's lease, outcomes that are still to be written, those of dead processes."""

    def __init__(self, bus: EventBus) -> None:
        self.bus = bus
        self._lease: Lease | None = None
        """Of a process that has no worker; a worker has one already."""
        self._tasks: set[Task[None]] = set()
        self._sweeping: Task[None] | None = None

    @property
    def away(self) -> tuple[type[Exception], ...]:
        """What is raised where the database does not answer, or not as asked."""
        return (*self.bus._store.errors, DatabaseError)

    def log(self, level: str, name: str, **details: Any) -> None:
        try:
            getattr(self.bus.logger, level)(name, **details)
        except Exception:
            logging.getLogger("whereupon").exception("the logger given to the bus raised at %s %r", name, details)

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> Task[None]:
        """Run it to its end, whatever becomes of the caller."""
        task = asyncio.get_running_loop().create_task(coroutine)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    # --- the life of the bus ----------------------------------------------------------------------------------------

    async def process(self) -> UUID:
        """The process that attempts belong to, its lease taken. Raises what the database raises."""
        bus = self.bus
        if bus._worker is not None:
            return bus._worker.id
        assert bus._preparing is not None
        async with bus._preparing:
            if self._lease is None:
                lease = Lease(
                    bus.engine,
                    bus._lease,
                    in_flight=0,
                    autocommit=bus._store.may_autocommit,
                    log=self.log,
                    on_lost=lambda: None,
                )
                lease.allow(None)  # an event loop that stands still is no reason to end a process that is no worker
                await lease.start()
                self._lease = lease
            return self._lease.id

    def start_sweeping(self) -> None:
        # an empty context: what a request left in the starter's is none of these events' business
        self._sweeping = asyncio.get_running_loop().create_task(self._sweep_on(), context=Context())

    async def finish(self, timeout: float) -> None:
        """Wait until the outcomes of attempts that have ended are written, for so many seconds at most."""
        with suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                while tasks := self._here():  # one that can't reach the database is followed by another
                    await asyncio.wait(tasks)

    async def stop(self) -> None:
        """Stop, and give the lease up: what is open then is closed by others, as *Interrupted*."""
        tasks = self._here()
        if self._sweeping is not None:
            tasks.add(self._sweeping)
            self._sweeping = None
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        lease, self._lease = self._lease, None
        if lease is not None:
            await lease.stop()

    def _here(self) -> set[Task[None]]:
        """What still runs on this loop, less the one that asks."""
        asking, loop = asyncio.current_task(), asyncio.get_running_loop()
        return {task for task in self._tasks if task is not asking and task.get_loop() is loop}

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[AsyncSession]:
        """One of our own; on SQLite it holds the write lock from the start."""
        store = self.bus._store
        async with AsyncSession(store.locking_engine, expire_on_commit=False) as session, session.begin():
            await store.take_lock(await session.connection())
            yield session

    # --- writing down a failure -------------------------------------------------------------------------------------

    async def fail(self, attempt: DurableAttempt[Any, Any], reason: str, *, wait: bool) -> None:
        """Publish *Failed* unless there is an outcome; without the database, go on trying in the background."""
        task = self.spawn(self._fail(attempt, reason))
        if wait:
            # the lock of a COMMIT that nobody hears of may be held for long; no caller is
            await asyncio.wait([task], timeout=self.bus._lease)

    async def _fail(self, attempt: DurableAttempt[Any, Any], reason: str) -> None:
        try:
            await self._try_to_fail(attempt, reason)
        except self.away as error:
            self.spawn(self._keep_trying_to_fail(attempt, reason, error))
        except Exception as error:
            self._refused(attempt, error, _LEFT_TO_OTHERS)

    async def _keep_trying_to_fail(self, attempt: DurableAttempt[Any, Any], reason: str, error: Exception) -> None:
        failures = 0
        while True:
            failures += 1
            wait = random.uniform(0.5, 1) * min(LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))
            if failures == 1 or failures % 10 == 0:
                self.log(
                    "warning",
                    "workflow_outcome_delayed",
                    **attempt.shown,
                    error_type=type(error).__name__,
                    error_message=f"{message_of(getattr(error, 'orig', None) or error)}. Tried again until this "
                    "process ends; after that a worker closes the attempt as interrupted",
                    retry_in_seconds=round(wait, 2),
                )
            await asyncio.sleep(wait)
            try:
                await self._try_to_fail(attempt, reason)
            except self.away as again:
                error = again
            except Exception as refusal:
                self._refused(
                    attempt, refusal, "A worker closes the attempt as interrupted once this process has ended"
                )
                return
            else:
                return

    def _refused(self, attempt: DurableAttempt[Any, Any], error: Exception, what_now: str) -> None:
        self.log(
            "error",
            "workflow_failure_refused",
            **attempt.shown,
            error_type=type(error).__name__,
            error_message=f"{message_of(error)}. {what_now}",
            exc_info=error,
        )

    async def _try_to_fail(self, attempt: DurableAttempt[Any, Any], reason: str) -> None:
        if not attempt.opened and not await self._was_opened(attempt):
            return
        self.bus._check_loop()
        try:
            async with self.transaction() as session:
                # waits for an in-doubt COMMIT of the work
                state = await session.scalar(select(table.c.state).where(table.c.id == attempt.id).with_for_update())
                if state == State.OPEN:
                    event = attempt.workflow.failure(attempt.attempted, reason)
                    await attempt.close_in(session, (event,), None, (event, State.FAILED))
                elif state == State.INTERRUPTED:
                    self.log("warning", "workflow_was_interrupted", **attempt.shown, error_message=_AWAY_TOO_LONG)
        except self.away:
            raise
        except Exception as error:
            # the event can't be made or stored, or a required handler refused it: not for the lack of another try
            self._refused(attempt, error, "The attempt is closed as interrupted instead")
            await self._interrupt(attempt.id, abandoned=False, plainly=True)

    async def _was_opened(self, attempt: DurableAttempt[Any, Any]) -> bool:
        """Whether the row is there, or will be: nobody heard how its COMMIT ended, so the database has us wait."""
        store = self.bus._store
        statement = store.upsert(table).values(attempt.row).on_conflict_do_nothing().returning(table.c.id)
        async with AsyncSession(store.locking_engine) as session:
            await store.take_lock(await session.connection())
            conflict = (await session.execute(statement)).first() is None
            await session.rollback()
        return conflict

    # --- closing what others left behind ----------------------------------------------------------------------------

    async def _sweep_on(self) -> None:
        failures = 0
        while True:
            # workers don't all look at the same moment
            await asyncio.sleep(random.uniform(0.8, 1) * self.bus._lease / 3)
            try:
                while await self.sweep() == SWEPT:
                    pass
                failures = 0
            except Exception as error:
                failures += 1
                if failures == 1 or failures % 100 == 0:
                    self.log(
                        "warning" if isinstance(error, self.away) else "error",
                        "workflow_sweep_failed",
                        error_type=type(error).__name__,
                        error_message=message_of(getattr(error, "orig", None) or error),
                        exc_info=None if isinstance(error, self.away) else error,
                    )

    async def sweep(self) -> int:
        """Close open attempts of processes whose lease has run out, by the database's clock; return how many they were.

        Several workers may do so at once: each attempt is closed by one of them.
        """
        query = select(table.c.id).where(table.c.state == State.OPEN, self._abandoned).limit(SWEPT)
        async with self.bus._store.reading() as connection:
            found = list(await connection.scalars(query))
        for id_ in found:
            try:
                await self._interrupt(id_)
            except self.away:
                raise
            except Exception as error:
                # its class reads it no more, or a required handler refuses it: it is written as it was stored
                self.log(
                    "error",
                    "workflow_interruption_refused",
                    workflow_id=str(id_),
                    error_type=type(error).__name__,
                    error_message=f"{message_of(error)}. The event goes into the log as it was stored",
                    exc_info=error,
                )
                await self._interrupt(id_, plainly=True)
        return len(found)

    @property
    def _abandoned(self) -> Any:
        return ~exists().where(process.c.id == table.c.process, process.c.lease_until > self.bus._store.now)

    async def _interrupt(self, id_: UUID, *, abandoned: bool = True, plainly: bool = False) -> None:
        """Publish the event that was stored for this when the attempt began, and close the attempt with it.

        `plainly` writes it as it is stored: its IN_TRANSACTION handlers are served from the log then.
        """
        query = select(table).where(table.c.id == id_, table.c.state == State.OPEN)
        if abandoned:
            query = query.where(self._abandoned).with_for_update(of=table, skip_locked=True)
        async with self.transaction() as session:
            row = (await session.execute(query if abandoned else query.with_for_update())).first()
            if row is None:
                return
            cls = None if plainly else self.bus.class_of(row.type)
            if cls is None:
                await session.run_sync(self._write_plainly, row)
            else:
                stored = self.bus._codec.decode(cls, row.version, row.payload)
                event = dataclasses.replace(stored, occurred_at=datetime.now(UTC))
                with outside_attempts():
                    await self.bus.publish(event, session=session, metadata=decode_metadata(row.headers))
            await session.execute(_closing(id_, State.INTERRUPTED, row.outcome_id, INTERRUPTED, self.bus._store.now))
        self.log("warning", "workflow_interrupted", workflow=row.name, workflow_id=str(id_), process=str(row.process))
        if self.bus._observing is not None:
            self.bus._observing.closed(row.name, State.INTERRUPTED)

    def _write_plainly(self, session: Session, row: Any) -> None:
        payload = _dated_now(row.payload)
        record = Record(row.outcome_id, row.type, row.version, payload, row.headers, None, None)
        self.bus._store.append(session.connection(), [record], positions=False)


class DurableAttempt(Attempt[A, S]):
    """An attempt on an `EventBus`."""

    def __init__(self, attempts: Attempts, workflow: Workflow[Any, A, S], attempted: A) -> None:
        super().__init__(workflow, attempted)
        self._attempts = attempts
        self._bus = attempts.bus
        self._observing = attempts.bus._observing
        self.row: dict[str, Any] = {}
        """What is stored of it when it is opened."""
        self.opened = False
        """Whether it is known to be stored."""
        self._metadata: Metadata = NO_METADATA
        self._told = _Told(self)
        self._pending: tuple[Connection, Transaction | None] | None = None
        """The transaction that an outcome was last published in."""
        self.committed = False
        """Whether the transaction of an outcome is known to be committed."""

    @property
    def shown(self) -> dict[str, str]:
        """What log records say of it."""
        return {"workflow": self.workflow.name, "workflow_id": str(self.id)}

    async def _open(self) -> None:
        if self.row:
            raise BusStateError(f"{self!r} was entered before: an attempt is made once. Call bus.workflow(…) for each")
        bus = self._bus
        bus._check_loop()
        bus._refuse_deadlock()
        await bus._ready()
        given = metadata_for(None)
        self._metadata = dataclasses.replace(given, correlation_id=given.correlation_id or self.id)
        interruption = self.workflow.interruption(self.attempted)
        definition = type(interruption).__event__
        self.row = {
            "id": self.id,
            "name": self.workflow.name,
            "state": State.OPEN,
            "type": definition.name,
            "version": definition.version,
            "payload": bus._codec.encode(interruption),
            "headers": encode_metadata(self._metadata),
            "outcome_id": interruption.event_id,
            "process": await self._attempts.process(),
        }
        opening = self._attempts.spawn(self._store_attempted(given))
        try:
            await asyncio.wait([opening])
            opening.result()
        except BaseException as error:
            self._attempts.spawn(self._abandon(opening, error))
            raise
        self.opened = True
        if self._observing is not None:
            self._observing.opened(self.workflow.name)

    async def _store_attempted(self, metadata: Metadata) -> None:
        async with self._attempts.transaction() as session:
            await self._bus.publish(self.attempted, session=session, metadata=metadata)
            await session.execute(insert(table).values(self.row))

    async def _abandon(self, opening: Task[None], error: BaseException) -> None:
        """Nobody enters the block, and the attempt may be stored, or not."""
        await asyncio.wait([opening])
        if opening.cancelled() or isinstance(opening.exception(), (*self._attempts.away, type(None))):
            await self._attempts.fail(self, reason_of(error, self.workflow.unforeseen), wait=False)

    async def publish_outcome(self, events: tuple[DomainEvent, ...], session: Any, metadata: Any) -> DurableReceipt:
        outcome = self.outcome_among(events)
        assert outcome is not None
        bus = self._bus
        if session is None:
            bus._check_alone(events)
            bus._check_loop()
            bus._refuse_deadlock()
            self._refuse_second(None)
            async with self._attempts.transaction() as own:
                return await self.close_in(own, events, metadata, outcome)
        owner = _staging.async_session(session)
        bus._check_loop()
        self._refuse_second((await owner.run_sync(bus._connect)).get_transaction())
        return await self.close_in(owner, events, metadata, outcome)

    def _refuse_second(self, transaction: Transaction | None) -> None:
        """Another transaction with an outcome of this attempt would wait for the first one's end, perhaps for ever."""
        if self._in_transaction() and self._pending is not None and self._pending[1] is not transaction:
            raise WorkflowClosedError(
                f"{self!r} has an outcome already, in a transaction that has not ended. An attempt has one outcome"
            )

    def _in_transaction(self) -> bool:
        """Whether the transaction of an outcome is still going on, as far as this side of the connection knows."""
        return self._pending is not None and _staging.goes_on(*self._pending)

    async def close_in(
        self, session: AsyncSession, events: tuple[DomainEvent, ...], metadata: Any, outcome: tuple[DomainEvent, State]
    ) -> DurableReceipt:
        """Publish in the transaction of `session`, and close the row with it: both commit, or neither does."""
        with outside_attempts(), request_metadata(self._metadata):
            receipt = await self._bus.publish(*events, session=session, metadata=metadata)
        try:
            await session.run_sync(self._close_row, *outcome)
        except BaseException as error:
            # whoever carries on with the session regardless must not commit one without the other
            await session.run_sync(_refuse_to_commit, error)
            raise
        return receipt

    def _close_row(self, session: Session, event: DomainEvent, state: State) -> None:
        connection = session.connection()
        reason = getattr(event, "reason", None) if state is State.FAILED else None
        if not connection.execute(_closing(self.id, state, event.event_id, reason, self._bus._store.now)).rowcount:
            self._refuse(connection.scalar(select(table.c.state).where(table.c.id == self.id)))
        _staging.stage(session, connection, self._told, [state])
        self._pending = connection, connection.get_transaction()

    def _refuse(self, state: str | None) -> NoReturn:
        if state is None:
            raise WorkflowClosedError(f"{self!r} is not open: publish its outcome inside `async with bus.workflow(…)`")
        why = f": {_AWAY_TOO_LONG}" if state == State.INTERRUPTED else ". An attempt has one outcome"
        raise WorkflowClosedError(f"{self!r} has {state} already{why}")

    async def _leave(self, reason: str) -> None:
        if self.committed:
            return
        # in the midst of a transaction that holds the lock, this task would wait for itself
        inside = self._in_transaction() or self._bus._transaction_is_open(writing=True)
        await self._attempts.fail(self, reason, wait=not inside)


class _Told:
    """Hears of the commit of an attempt's outcome."""

    def __init__(self, attempt: DurableAttempt[Any, Any]) -> None:
        self._attempt = attempt

    def write_staged(self, connection: Connection, staged: list[Any]) -> None:
        """The row is changed already."""

    def committed(self, staged: list[Any], *, certain: bool) -> None:
        attempt = self._attempt
        attempt.committed = attempt.committed or certain
        if certain and attempt._observing is not None:
            attempt._observing.closed(attempt.workflow.name, staged[-1])


class _Refusing:
    """Lets no commit happen in the transaction that it is staged in."""

    def __init__(self, error: BaseException) -> None:
        self._why = f"{type(error).__name__}: {message_of(error)}" if isinstance(error, Exception) else repr(error)

    def write_staged(self, connection: Connection, staged: list[Any]) -> None:
        raise WorkflowClosedError(f"the outcome of an attempt could not be published in this transaction ({self._why})")

    def committed(self, staged: list[Any], *, certain: bool) -> None:
        """Never called: it was not committed."""


def _refuse_to_commit(session: Session, error: BaseException) -> None:
    with suppress(PublishError, SQLAlchemyError):  # it is over, or can't be committed anyway
        connection = session.connection()
        if not connection.invalidated:
            _staging.stage(session, connection, _Refusing(error), [None])


def _closing(id_: UUID, state: State, outcome_id: UUID, reason: str | None, now: Any) -> Any:
    """The one change of an attempt's row. What was kept for its interruption is of no use any more."""
    return (
        update(table)
        .where(table.c.id == id_, table.c.state == State.OPEN)
        .values(state=state, outcome_id=outcome_id, reason=without_nul(reason), payload=None, closed_at=now)
    )


def _dated_now(payload: bytes) -> bytes:
    """A stored event with the time that it happened, if it is JSON; of what it is else only its class knows."""
    try:
        fields = msgspec.json.decode(payload, type=dict[str, msgspec.Raw])
    except msgspec.MsgspecError:
        return payload
    if "occurred_at" not in fields:
        return payload
    fields["occurred_at"] = msgspec.Raw(msgspec.json.encode(datetime.now(UTC)))
    return msgspec.json.encode(fields)


_LEFT_TO_OTHERS: Final = "A worker closes the attempt as interrupted once this process has ended"
_AWAY_TOO_LONG: Final = (
    "its process was away for longer than its lease, or was closed, so another one closed the attempt. What the work "
    "did since is rolled back"
)
