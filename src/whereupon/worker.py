"""The worker: reads the log for the subscriptions whose leases it holds, runs their handlers, settles the deliveries.

Each lane (a subscription's cursor) is served by a task that reads pages and one that retries exceptions; both hand what
became of deliveries to the lane's settler, which commits whatever is ready in one transaction. A delivery keeps its place
among those in flight until that commit, so a crash repeats no more than `in_flight` calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import traceback
from asyncio import CancelledError, Event, Future, Semaphore, Task
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable
from contextvars import Context
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar
from uuid import uuid4

import msgspec
from sqlalchemy.exc import DBAPIError, IntegrityError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from whereupon._staging import handed_out
from whereupon.codec import Codec
from whereupon.context import EventContext, decode_metadata, handling
from whereupon.errors import (
    Discard,
    EventDecodingError,
    HandlerTimeout,
    LeaseLost,
    RetryLater,
    UnknownEventError,
)
from whereupon.event import DomainEvent
from whereupon.logs import Logger
from whereupon.store import DEAD, RETRYING, RUNNING, SKIPPED, WAITING, Cursor, Entry, Failure, Page, Row, Store
from whereupon.subscription import Delivery, Subscription

T = TypeVar("T")

PAGE: Final = 500
"""Events read at a time."""
LONG: Final = 1.0
"""Seconds after which a delivery becomes an exception, so that its page need not wait for it."""
UNKNOWN_WAIT: Final = 60.0
"""Seconds between two looks at an event that this build does not know; a newer worker may have come meanwhile."""
RERUNS: Final = 50
"""How often a transaction that lost a race (serialization, deadlock, SQLite's stale snapshot) is run again at once."""


class _Delivery:
    """One event for one subscription, being delivered."""

    __slots__ = ("attempt", "exceptional", "row", "seconds", "started", "started_at", "task")

    def __init__(self, row: Row, attempt: int, *, exceptional: bool) -> None:
        self.row = row
        self.attempt = attempt
        self.exceptional = exceptional
        """Whether it has a row among the exceptions."""
        self.started = 0.0
        self.started_at = datetime.now(UTC)
        self.seconds = 0.0
        self.task: Task[None] | None = None


class _Settlement:
    """What became of a delivery, on its way into the database."""

    __slots__ = ("committed", "delivery", "failure", "in_doubt", "stored")

    def __init__(self, delivery: _Delivery, failure: Failure | None, *, stored: bool, in_doubt: bool) -> None:
        self.delivery = delivery
        self.failure = failure
        self.stored = stored
        """Whether the handler's own transaction has recorded it already."""
        self.in_doubt = in_doubt
        """Whether that transaction may have committed though it looked as if it failed."""
        self.committed: Future[None] = asyncio.get_running_loop().create_future()


class Worker:
    """Delivers for the subscriptions of one bus, on one event loop, under an identity of its own."""

    def __init__(
        self,
        store: Store,
        subscriptions: Iterable[Subscription],
        *,
        codec: Codec,
        class_of: Callable[[str], type[DomainEvent] | None],
        logger: Logger,
        handler_logger: Any,
        in_flight: int,
        lease: float,
        poll_interval: float,
    ) -> None:
        self.id = uuid4()
        self.store = store
        self.subscriptions = {subscription.name: subscription for subscription in subscriptions}
        self.codec = codec
        self.class_of = class_of
        self.logger = logger
        self.handler_logger = handler_logger
        self.lease = lease
        self.poll_interval = poll_interval
        self.slots = Semaphore(in_flight)
        self.lanes: dict[str, _Lane] = {}
        self.stopping = Event()
        self.settled = Event()
        """Set whenever something was settled; whoever waits for it clears it."""
        self._tasks: set[Task[None]] = set()
        self._claim_now = Event()

    @property
    def handler_engine(self) -> AsyncEngine:
        return self.store.engine

    def start(self) -> None:
        for loop in (self._tend, self._watch):
            self._spawn(self._persist(loop))

    def _spawn(self, coroutine: Coroutine[Any, Any, None]) -> Task[None]:
        # an empty context: what a request left in the starter's would otherwise be seen by every handler
        task = asyncio.get_running_loop().create_task(coroutine, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def wake(self, types: Collection[str] | None = None) -> None:
        """Events of these stored types (None: any) were committed: have the lanes that hear them look."""
        for lane in self.lanes.values():
            if types is None or lane.types is None or not lane.types.isdisjoint(types):
                lane.wake.set()

    async def drain(self) -> None:
        """Wait until every lane held here has found nothing left that can be delivered now."""
        await self._first_claim()
        for lane in list(self.lanes.values()):
            await lane.idle_again()

    async def _first_claim(self) -> None:
        while not self._claimed_once and not self.stopping.is_set():
            await asyncio.sleep(0.005)

    _claimed_once = False

    async def stop(self, timeout: float) -> None:
        """Begin nothing more, let what runs end for `timeout` seconds, then cancel it and give the leases back."""
        self.stopping.set()
        lanes = list(self.lanes.values())
        for lane in lanes:
            lane.stop()
        running = {d.task for lane in lanes for d in lane.active if d.task is not None}
        if running:
            await asyncio.wait(running, timeout=timeout)
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks)
        with contextlib.suppress(SQLAlchemyError, OSError):  # leases run out by themselves
            await self.store.release([lane.cursor for lane in lanes if not lane.lost])

    async def run(self) -> None:
        """Deliver until stopped."""
        self.start()
        await self.stopping.wait()

    # --- keeping leases, hearing of events --------------------------------------------------------------------------

    async def _persist(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop for ever; a database that is away is waited for, with backoff."""
        failures = 0
        while not self.stopping.is_set():
            try:
                await loop()
                if failures:
                    self.logger.info("worker_database_back", database=self.store.shown_url)
                failures = 0
            except (SQLAlchemyError, OSError) as error:
                failures += 1
                await self.pause_after(error, failures)

    async def pause_after(self, error: Exception, failures: int) -> None:
        if self.stopping.is_set():
            return
        wait = random.uniform(0.5, 1) * min(30.0, 0.1 * 2 ** min(failures, 10))
        if failures == 1 or failures % 10 == 0:
            self.logger.warning(
                "worker_database_unavailable",
                database=self.store.shown_url,
                error_type=type(error).__name__,
                error_message=str(getattr(error, "orig", None) or error),
                retry_in_seconds=round(wait, 2),
            )
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self.stopping.wait(), wait)

    async def _tend(self) -> None:
        """Renew the leases held, take those that nobody holds."""
        held = [lane for lane in self.lanes.values() if not lane.lost]
        if held:
            gone = await self.store.renew([lane.cursor for lane in held], self.lease)
            for cursor in gone:
                self._lose(self.lanes[cursor.subscription])
        missing = [name for name in self.subscriptions if name not in self.lanes]
        if missing:
            for cursor in await self.store.claim(missing, self.id, self.lease):
                lane = self.lanes[cursor.subscription] = _Lane(self, self.subscriptions[cursor.subscription], cursor)
                lane.start()
        self._claimed_once = True
        # those held by another worker are free at the latest one lease after it died
        wait = self.lease / 3 if self.lanes.keys() == self.subscriptions.keys() else min(self.lease / 3, 1.0)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._claim_now.wait(), wait)
        self._claim_now.clear()

    async def _watch(self) -> None:
        """Hear of what other processes published."""
        if await self.store.pulse():
            self.wake()
        await asyncio.sleep(self.poll_interval)

    def _lose(self, lane: _Lane) -> None:
        if lane.lost:
            return
        lane.lost = True
        lane.cancel()
        self.lanes.pop(lane.subscription.name, None)
        self._claim_now.set()
        self.logger.warning(
            "worker_lease_lost",
            subscription=lane.subscription.name,
            worker=str(self.id),
            error_message="another worker took over; what was not committed is delivered by that one",
        )


class _Lane:
    """One subscription's cursor, in this worker's hands."""

    def __init__(self, worker: Worker, subscription: Subscription, cursor: Cursor) -> None:
        self.worker = worker
        self.store = worker.store
        self.subscription = subscription
        self.cursor = cursor
        everything = DomainEvent in subscription.event_types
        self.types: frozenset[str] | None = (
            None
            if everything
            else frozenset(
                name for cls in subscription.event_types for name in (cls.__event__.name, *cls.__event__.aliases)
            )
        )
        self.wake = Event()
        self.lost = False
        self.active: set[_Delivery] = set()
        self._stopping = False
        self._slots = Semaphore(subscription.concurrency)
        self._ready: list[_Settlement] = []
        self._ready_event = Event()
        self._settling = asyncio.Lock()
        self._retry_event = Event()
        self._idle_rounds = 0
        self._idle_changed = asyncio.Condition()
        self._tasks: list[Task[None]] = []

    def start(self) -> None:
        spawn = self.worker._spawn
        self._tasks = [
            spawn(self._keep(self._pages())),
            spawn(self._keep(self._retries())),
            spawn(self._keep(self._settle())),
        ]

    def stop(self) -> None:
        self._stopping = True
        self.wake.set()
        self._retry_event.set()

    def cancel(self) -> None:
        self.stop()
        current = asyncio.current_task()
        for task in [*self._tasks, *(d.task for d in self.active if d.task is not None)]:
            if task is not current:
                task.cancel()

    async def idle_again(self) -> None:
        """Wait until a read that begins from now on finds nothing, with nothing in flight."""
        async with self._idle_changed:
            round_before = self._idle_rounds
            while not self._stopping and not self.lost and self._idle_rounds < round_before + 2:
                self.wake.set()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle_changed.wait(), 0.05)

    async def _keep(self, part: Coroutine[Any, Any, None]) -> None:
        try:
            await part
        except LeaseLost:
            self.worker._lose(self)
        except Exception as error:
            self.worker.logger.error(
                "worker_lane_failed",
                subscription=self.subscription.name,
                error_type=type(error).__name__,
                error_message=f"{error} (the lane is given up, and taken again)",
                exc_info=error,
            )
            self.worker._lose(self)

    async def _with_database(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call until the database answers."""
        failures = 0
        while True:
            try:
                return await call()
            except IntegrityError:
                raise
            except (SQLAlchemyError, OSError) as error:
                failures += 1
                await self.worker.pause_after(error, failures)
                if self.worker.stopping.is_set():
                    raise CancelledError from error

    # --- new events -------------------------------------------------------------------------------------------------

    async def _pages(self) -> None:
        skip_ran = self.subscription.delivery is Delivery.IN_TRANSACTION
        types = None if self.types is None else sorted(self.types)
        while not self._stopping:
            self.wake.clear()
            page = await self._with_database(partial(self.store.read, self.cursor, types, skip_ran, PAGE))
            if page.rows:
                await self._deliver_page(page)
                continue
            if self.cursor.done:
                await self._move(page.after, [])
            else:
                self.cursor.place = page.after  # nothing was to be done up to there: saved with the next move
            if not page.complete:
                continue
            if not self.active:
                async with self._idle_changed:
                    self._idle_rounds += 1
                    self._idle_changed.notify_all()
                await self.wake.wait()
            else:
                await self._wake_or(self.active)

    async def _wake_or(self, active: set[_Delivery]) -> None:
        """Wait until something is published or a long delivery ends."""
        waker = asyncio.ensure_future(self.wake.wait())
        try:
            tasks = {d.task for d in active if d.task is not None}
            await asyncio.wait({waker, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            waker.cancel()

    async def _deliver_page(self, page: Page) -> None:
        deliveries = []
        for row in page.rows:
            await self._slots.acquire()
            await self.worker.slots.acquire()
            if self._stopping:
                self._slots.release()
                self.worker.slots.release()
                return  # the cursor stays before what was not begun
            delivery = _Delivery(row, 1, exceptional=False)
            deliveries.append(delivery)
            self._begin(delivery)
            if len(deliveries) % 50 == 0:
                await asyncio.sleep(0)
        tasks = [d.task for d in deliveries if d.task is not None and not d.task.done()]
        if tasks:
            await asyncio.wait(tasks, timeout=LONG)
        running = [d for d in deliveries if d.task is not None and not d.task.done()]
        await self._move(page.after, running)

    async def _move(self, place: Any, running: list[_Delivery]) -> None:
        """Move the cursor past a page; deliveries of it that still run go on as exceptions."""
        for delivery in running:
            delivery.exceptional = True  # before the lock: whoever holds it either sees this or is seen by `done_now`

        async def move() -> None:
            async with self._settling, self.store.writing() as connection:
                await self.store.fence(connection, self.cursor)
                if running:
                    done = await self.store.done_now(connection, self.cursor)
                    await self.store.add_failures(
                        connection,
                        self.cursor,
                        [
                            Failure(delivery.row, RUNNING, delivery.attempt, None)
                            for delivery in running
                            if delivery.row.position not in done and delivery.seconds == 0.0
                        ],
                    )
                await self.store.move(connection, self.cursor, place)
            self.cursor.place = place
            self.cursor.done.clear()

        await self._with_database(move)
        self._unsaved = False

    # --- retries ----------------------------------------------------------------------------------------------------

    async def _retries(self) -> None:
        await self._take_over()
        while not self._stopping:
            self._retry_event.clear()
            free = max(1, min(PAGE, self.subscription.concurrency))
            for due in await self._with_database(partial(self.store.due, self.cursor, free)):
                await self._slots.acquire()
                await self.worker.slots.acquire()
                self._begin(_Delivery(due.row, due.attempt, exceptional=True))
            wait = await self._with_database(partial(self.store.next_due, self.cursor))
            with contextlib.suppress(TimeoutError):
                # an operator's retry from elsewhere is found within a minute
                await asyncio.wait_for(self._retry_event.wait(), 60.0 if wait is None else min(wait + 0.001, 60.0))

    async def _take_over(self) -> None:
        """Deal with deliveries that an earlier owner began and did not finish: each call was an attempt."""
        interrupted = await self._with_database(partial(self.store.interrupted, self.cursor))
        if not interrupted:
            return
        failures = []
        for due in interrupted:
            used_up = due.attempt >= self.subscription.retry.max_attempts
            failures.append(
                Failure(
                    due.row,
                    DEAD if used_up else RETRYING,
                    due.attempt,
                    None if used_up else 0.0,
                    "Interrupted",
                    f"the worker ended while attempt {due.attempt} ran"
                    + (": crash loop, all attempts used" if used_up else ""),
                )
            )

        async def change() -> None:
            async with self.store.writing() as connection:
                await self.store.fence(connection, self.cursor)
                await self.store.change_failures(connection, self.cursor, failures)

        await self._with_database(change)

    # --- one delivery -----------------------------------------------------------------------------------------------

    def _begin(self, delivery: _Delivery) -> None:
        self.active.add(delivery)
        delivery.task = self.worker._spawn(self._deliver(delivery))

    async def _deliver(self, delivery: _Delivery) -> None:
        try:
            await self._attempt(delivery)
        except LeaseLost:
            self.worker._lose(self)
        finally:
            self.active.discard(delivery)
            self._slots.release()
            self.worker.slots.release()

    async def _attempt(self, delivery: _Delivery) -> None:
        loop = asyncio.get_running_loop()
        delivery.started = loop.time()
        delivery.started_at = datetime.now(UTC)
        failure: Failure | None = None
        stored = in_doubt = False
        try:
            event, context = self._decode(delivery)
        except UnknownEventError as error:
            failure = self._failure(delivery, error, WAITING, delivery.attempt - 1, UNKNOWN_WAIT)
        except EventDecodingError as error:
            failure = self._failure(delivery, error, DEAD, delivery.attempt, None)
        else:
            try:
                if self.subscription.session_parameter is None:
                    await self._call(event, context, None)
                else:
                    in_doubt = True
                    await self._call_in_transaction(delivery, event, context)
                    stored = True
            except LeaseLost:
                raise
            except CancelledError as error:
                task = asyncio.current_task()
                if task is not None and task.cancelling():
                    await self._interrupted(delivery)
                    raise
                failure = self._judge(delivery, event, error)
            except Exception as error:
                failure = self._judge(delivery, event, error)
        delivery.seconds = max(loop.time() - delivery.started, 1e-9)
        settlement = _Settlement(delivery, failure, stored=stored, in_doubt=in_doubt and failure is not None)
        self._ready.append(settlement)
        self._ready_event.set()
        await settlement.committed

    async def _interrupted(self, delivery: _Delivery) -> None:
        """A stop cut the handler short: a retry goes back to its queue, its attempt not used."""
        if not delivery.exceptional or self.lost:
            return
        failure = Failure(delivery.row, RETRYING, delivery.attempt - 1, 0.0, "Interrupted", "the worker was stopped")
        with contextlib.suppress(SQLAlchemyError, OSError, LeaseLost):  # the next owner finds it running, and retries
            async with self.store.writing() as connection:
                await self.store.fence(connection, self.cursor)
                await self.store.change_failures(connection, self.cursor, [failure])

    def _decode(self, delivery: _Delivery) -> tuple[DomainEvent, EventContext]:
        row = delivery.row
        cls = self.worker.class_of(row.type)
        if cls is None:
            raise UnknownEventError(
                f"no event class of this process is stored as {row.type!r}: it waits for a worker that knows it. Import its "
                "module where the bus is made, or add the name to the aliases of its successor"
            )
        event = self.worker.codec.decode(cls, row.version, row.payload)
        try:
            metadata = decode_metadata(row.headers)
        except (msgspec.MsgspecError, UnicodeError) as error:
            raise EventDecodingError(f"the headers of {row.type} at position {row.position}: {error}") from error
        context = EventContext(
            event_id=event.event_id,
            event_type=row.type,
            subscription=self.subscription.name,
            attempt=delivery.attempt,
            metadata=metadata,
            log=self.worker.handler_logger,
        )
        return event, context

    async def _call(self, event: DomainEvent, context: EventContext, session: AsyncSession | None) -> None:
        handling.set((event.event_id, context.metadata))
        limit = asyncio.timeout(self.subscription.timeout)
        try:
            async with limit:
                await self.subscription.call(event, context, session)
        except TimeoutError as error:
            if limit.expired():
                raise HandlerTimeout(
                    f"it ran longer than its {self.subscription.timeout:g} s and was cancelled"
                ) from error
            raise

    async def _call_in_transaction(self, delivery: _Delivery, event: DomainEvent, context: EventContext) -> None:
        """Run the handler; commit what it wrote together with the record that it ran."""
        position = delivery.row.position
        for rerun in range(RERUNS + 1):
            async with AsyncSession(self.worker.handler_engine, expire_on_commit=False) as session:
                try:
                    with handed_out(session, self.subscription.name):
                        await self._call(event, context, session)
                    await session.flush()
                    connection = await session.connection()
                    await self.store.mark_done(connection, self.cursor, [position])
                    if delivery.exceptional:
                        await self.store.forget(connection, self.cursor, [position])
                    await session.commit()
                    self.cursor.done.add(position)
                    return
                except DBAPIError as error:
                    if rerun == RERUNS or not _lost_a_race(error):
                        raise
            await asyncio.sleep(random.uniform(0, 0.01 * min(rerun + 1, 20)))

    def _judge(self, delivery: _Delivery, event: DomainEvent, error: BaseException) -> Failure:
        """What follows from what a handler raised."""
        retry, attempt = self.subscription.retry, delivery.attempt
        if isinstance(error, Discard):
            return self._failure(delivery, error, SKIPPED, attempt, None)
        last = attempt >= retry.max_attempts
        wait = error.delay if isinstance(error, RetryLater) else retry.wait(attempt)
        details = {
            "event_type": type(event).__name__,
            "event_id": str(event.event_id),
            "handler_name": self.subscription.handler_name,
            "error_type": type(error).__name__,
            "error_message": str(error),
            "subscription": self.subscription.name,
            "attempt": attempt,
        }
        if last:
            self.worker.logger.error("event_delivery_dead", **details)
        else:
            details["retry_in_seconds"] = round(wait, 3)
        self.worker.logger.warning(
            "event_handler_failed", **details, exc_info=None if isinstance(error, CancelledError) else error
        )
        return self._failure(delivery, error, DEAD if last else RETRYING, attempt, None if last else wait)

    def _failure(
        self, delivery: _Delivery, error: BaseException, state: str, attempts: int, next_in: float | None
    ) -> Failure:
        if isinstance(error, EventDecodingError):
            self.worker.logger.error(
                "event_undecodable",
                event_type=delivery.row.type,
                event_id=str(delivery.row.event_id),
                subscription=self.subscription.name,
                error_type=type(error).__name__,
                error_message=str(error),
                state=state,
            )
        text = "".join(traceback.format_exception(error))
        return Failure(delivery.row, state, attempts, next_in, type(error).__name__, str(error)[:4000], text[-16000:])

    # --- settling ---------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        while True:
            await self._ready_event.wait()
            self._ready_event.clear()
            batch, self._ready = self._ready, []
            if not batch:
                continue
            await self._with_database(partial(self._commit, batch))
            for settlement in batch:
                if not settlement.committed.done():
                    settlement.committed.set_result(None)
            if any(settlement.failure is not None for settlement in batch):
                self._retry_event.set()
            self.worker.settled.set()

    async def _commit(self, batch: list[_Settlement]) -> None:
        done, forget, new, changed = [], [], [], []
        entries = []
        async with self._settling, self.store.writing() as connection:
            await self.store.fence(connection, self.cursor)
            known: set[int] | None = None
            for settlement in batch:
                delivery, failure = settlement.delivery, settlement.failure
                position = delivery.row.position
                if settlement.in_doubt and not delivery.exceptional:
                    if known is None:
                        known = await self.store.done_now(connection, self.cursor)
                    if position in known:  # its COMMIT did succeed; only the answer was lost
                        failure = None
                entries.append(
                    Entry(
                        position,
                        delivery.row.event_id,
                        delivery.started_at,
                        round(delivery.seconds, 6),
                        delivery.attempt,
                        "succeeded" if failure is None else failure.state,
                    )
                )
                if settlement.stored:
                    continue
                if failure is None:
                    done.append(position)
                    if delivery.exceptional:
                        forget.append(position)
                elif delivery.exceptional:
                    changed.append(failure)
                else:
                    new.append(failure)
            if done:
                await self.store.mark_done(connection, self.cursor, done)
            await self.store.forget(connection, self.cursor, forget)
            await self.store.add_failures(connection, self.cursor, new)
            await self.store.change_failures(connection, self.cursor, changed)
            await self.store.remember(connection, self.cursor, self.worker.id, entries)
        self.cursor.done.update(done)


def _lost_a_race(error: DBAPIError) -> bool:
    """Whether running the transaction again may succeed: serialization failure, deadlock, SQLite's busy states."""
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    if state in ("40001", "40P01"):
        return True
    return "database is locked" in str(error.orig)
