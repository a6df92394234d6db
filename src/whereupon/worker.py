"""The worker: reads the log for the subscriptions whose leases it holds, runs their handlers, settles the deliveries.

Each lane (a subscription's cursor) is served by one loop that reads pages and one that retries exceptions; both hand
what became of deliveries to the lane's settler, which commits whatever is ready in one transaction. A delivery keeps
its place among those in flight until that commit, so a crash repeats no more than `in_flight` calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
from asyncio import CancelledError, Event, Future, Semaphore, Task, TaskGroup
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from contextvars import Context
from datetime import UTC, datetime
from functools import partial
from typing import Any, Final, TypeVar
from uuid import uuid4

import msgspec
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, StatementError
from sqlalchemy.ext.asyncio import AsyncSession

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
from whereupon.logs import Logger, message_of, trace_of
from whereupon.store import DEAD, RETRYING, RUNNING, SKIPPED, WAITING, Cursor, Entry, Failure, Page, Row, Store
from whereupon.subscription import Delivery, Subscription

T = TypeVar("T")

PAGE: Final = 500
"""Events read at a time."""
LONG: Final = 1.0
"""Seconds after which a delivery becomes an exception, so that its page need not wait for it."""
UNKNOWN_WAIT: Final = 60.0
"""Seconds between two looks at an event that this build does not know; a newer worker may have come meanwhile."""
UNSAVED: Final = 60.0
"""Seconds for which a cursor that passed only what its subscription does not hear may stay unsaved."""
RERUNS: Final = 50
"""How often a transaction that lost a race (serialization, deadlock, SQLite's stale snapshot) is run again at once."""
LONGEST_PAUSE: Final = 5.0
"""Seconds between two tries to reach a database that is away, at most."""
LAST_WORDS: Final = 3.0
"""Seconds that a worker which was told to stop takes to write down what has ended."""


class _Delivery:
    """One event for one subscription, being delivered."""

    __slots__ = (
        "attempt", "cut_short", "ended", "exceptional", "failure", "in_doubt", "interrupted", "row", "seconds",
        "settled", "started_at", "stored", "task",
    )  # fmt: skip

    def __init__(self, row: Row, attempt: int, *, exceptional: bool, interrupted: bool = False) -> None:
        self.row = row
        self.attempt = attempt
        self.exceptional = exceptional
        """Whether it may have a row among the exceptions."""
        self.interrupted = interrupted
        """Whether the attempt before this one was begun by a worker that is gone."""
        self.cut_short = False
        """Whether this worker cancelled it, so that a CancelledError in it is none of the handler's."""
        self.ended = False
        """Whether the handler is done."""
        self.failure: Failure | None = None
        self.stored = False
        """Whether the handler's own transaction has recorded that it succeeded."""
        self.in_doubt = False
        """Whether that transaction may have committed though it looked as if it failed."""
        self.settled: Future[None] = asyncio.get_running_loop().create_future()
        """Done once what became of it is committed."""
        self.started_at = datetime.now(UTC)
        self.seconds = 0.0
        self.task: Task[None] | None = None

    def cancel(self) -> None:
        self.cut_short = True
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()


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
        self.connections = Semaphore(store.connections_for_handlers)
        """Handlers in transactions leave connections of the pool to the leases, and to settling."""
        self.lanes: dict[str, _Lane] = {}
        self.stopping = Event()
        self.settled = Event()
        """Set whenever something was settled; whoever waits for it clears it."""
        self._tasks: set[Task[None]] = set()
        self._claim_now = Event()
        self._claimed = Event()

    def start(self) -> None:
        for loop in (self._tend, self._watch):
            self.spawn(self._persist(loop))

    def spawn(self, coroutine: Coroutine[Any, Any, None]) -> Task[None]:
        # an empty context: what a request left in the starter's would otherwise be seen by every handler
        task = asyncio.get_running_loop().create_task(coroutine, context=Context())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def wake(self, types: Collection[str] | None = None) -> None:
        """Events of these stored types (None: any) were committed: have the lanes that hear them look."""
        for lane in self.lanes.values():
            if types is None or lane.types is None or not lane.types.isdisjoint(types):
                lane.look()

    async def drain(self) -> None:
        """Wait until every lane held here has found nothing left that can be delivered now."""
        await self._claimed.wait()
        for lane in list(self.lanes.values()):
            await lane.idle_again()

    async def stop(self, timeout: float) -> None:
        """Begin nothing more, let what runs end for `timeout` seconds, then cancel it and give the leases back."""
        self.stopping.set()
        self._claimed.set()
        lanes = list(self.lanes.values())
        for lane in lanes:
            lane.stop()
        await self._wait_for_deliveries(lanes, timeout)
        for lane in lanes:
            for delivery in lane.active:
                if not delivery.ended:
                    delivery.cancel()
        await self._wait_for_deliveries(lanes, LAST_WORDS)
        for lane in lanes:
            lane.cancel()
        for task in self._tasks:
            task.cancel()
        if self._tasks and (await asyncio.wait(set(self._tasks), timeout=LAST_WORDS))[1]:
            stuck = sorted(lane.subscription.name for lane in lanes if lane.active)
            self.log(
                "error",
                "worker_stop_incomplete",
                subscriptions=stuck,
                error_message="handlers ignore their cancellation; they are left behind",
            )
        with contextlib.suppress(LeaseLost, *self.store.errors):  # leases run out by themselves
            async with asyncio.timeout(LAST_WORDS):
                for lane in lanes:
                    await lane.save_place()
                await self.store.release(self.id)

    async def _wait_for_deliveries(self, lanes: Sequence[_Lane], timeout: float) -> None:
        if tasks := {d.task for lane in lanes for d in lane.active if d.task is not None}:
            await asyncio.wait(tasks, timeout=timeout)

    def log(self, level: str, name: str, **details: Any) -> None:
        """Log; a logger that raises does not decide what becomes of a delivery."""
        try:
            getattr(self.logger, level)(name, **details)
        except Exception:
            logging.getLogger("whereupon").exception("the logger given to the bus raised at %s %r", name, details)

    # --- keeping leases, hearing of events --------------------------------------------------------------------------

    async def _persist(self, loop: Callable[[], Awaitable[None]]) -> None:
        """Run a loop until cancelled; a database that is away is waited for, with backoff."""
        failures = 0
        while True:
            try:
                await loop()
                if failures:
                    self.log("info", "worker_database_back", database=self.store.shown_url)
                failures = 0
            except Exception as error:
                failures += 1
                await self.pause_after(error, failures)

    async def pause_after(self, error: Exception, failures: int) -> None:
        wait = random.uniform(0.5, 1) * min(LONGEST_PAUSE, 0.1 * 2 ** min(failures, 10))
        if failures == 1 or failures % 10 == 0:
            away = isinstance(error, self.store.errors) and not _is_refusal(error)
            self.log(
                "warning" if away else "error",
                "worker_database_unavailable" if away else "worker_database_refused",
                database=self.store.shown_url,
                error_type=type(error).__name__,
                error_message=message_of(getattr(error, "orig", None) or error)
                + ("" if away else ". Nothing is lost; `whereupon db status` says whether the tables are in order"),
                retry_in_seconds=round(wait, 2),
                exc_info=None if away else error,
            )
        await asyncio.sleep(wait)

    async def _tend(self) -> None:
        """Renew the leases held, take those that nobody holds."""
        if held := list(self.lanes.values()):
            for cursor in await self.store.renew([lane.cursor for lane in held], self.id, self.lease):
                lane = self.lanes.get(cursor.subscription)
                if lane is not None and lane.cursor is cursor:
                    self.lose(lane)
        missing = [name for name in self.subscriptions if name not in self.lanes]
        if missing and not self.stopping.is_set():
            for cursor in await self.store.claim(missing, self.id, self.lease):
                lane = _Lane(self, self.subscriptions[cursor.subscription], cursor)
                self.lanes[cursor.subscription] = lane
                lane.start()
            missing = [name for name in missing if name not in self.lanes]
        self._claimed.set()
        # another worker's leases are free when it stops, and at the latest one lease after it died
        wait = self.lease / 3 if not missing else min(self.lease / 3, 0.5)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._claim_now.wait(), wait)
        self._claim_now.clear()

    async def _watch(self) -> None:
        """Hear of what other processes published."""
        if await self.store.pulse():
            self.wake()
        await asyncio.sleep(self.poll_interval)

    def lose(self, lane: _Lane, error: Exception | None = None) -> None:
        """Give a lane up: another worker has it, or something unforeseen happened in it."""
        if lane.lost:
            return
        lane.lost = True
        lane.cancel()
        self.lanes.pop(lane.subscription.name, None)
        details = {"subscription": lane.subscription.name, "worker": str(self.id)}
        if error is None:
            self._claim_now.set()
            what = "another worker took over; what was not committed is delivered by that one"
            self.log("warning", "worker_lease_lost", **details, error_message=what)
        else:
            details["error_type"] = type(error).__name__
            what = f"{message_of(error)} (the lane is given up, and taken again)"
            self.log("error", "worker_lane_failed", **details, error_message=what, exc_info=error)


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
        self.lost = False
        self.active: set[_Delivery] = set()
        self._task: Task[None] | None = None
        self._stopping = False
        self._slots = Semaphore(subscription.concurrency)
        self._wake = Event()
        self._retry = Event()
        self._nothing_due = False
        self._ready: list[_Delivery] = []
        self._something_ready = Event()
        self._settling = asyncio.Lock()
        """Held while exceptions or the cursor are changed: each change sees what the one before it has settled."""
        self._saved_at = asyncio.get_running_loop().time()
        self._unsaved = False
        self._idle_rounds = 0
        self._idle_changed = asyncio.Condition()

    def start(self) -> None:
        self._task = self.worker.spawn(self._serve())

    def look(self) -> None:
        """There may be something new in the log."""
        self._wake.set()
        if self.subscription.delivery is Delivery.IN_TRANSACTION:
            self._retry.set()  # publishers write the exceptions of these

    def stop(self) -> None:
        self._stopping = True
        self._wake.set()
        self._retry.set()

    def cancel(self) -> None:
        self.stop()
        for delivery in list(self.active):
            delivery.cancel()
        if self._task is not None and self._task is not asyncio.current_task():
            self._task.cancel()

    async def idle_again(self) -> None:
        """Wait until a read that begins from now on finds nothing, with nothing in flight and no retry due."""
        async with self._idle_changed:
            seen = self._idle_rounds
            self.look()
            while not self._stopping and not self.lost and self._idle_rounds < seen + 2:
                self._wake.set()  # not the retries as well: asked for ever anew, they would never be seen to be over
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._idle_changed.wait(), 0.05)

    async def save_place(self) -> None:
        if self._unsaved and not self.lost:
            await self._move(self.cursor.place)

    async def _serve(self) -> None:
        try:
            async with TaskGroup() as group:
                for part in (self._pages, self._retries, self._settle):
                    group.create_task(part(), context=Context())
        except* LeaseLost:
            self.worker.lose(self)
        except* Exception as errors:
            self.worker.lose(self, errors.exceptions[0])
        finally:
            for delivery in list(self.active):  # nobody is left to settle them
                delivery.cancel()

    async def _with_database(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call until the database answers."""
        failures = 0
        while True:
            try:
                return await call()
            except self.store.errors as error:
                if self._stopping:
                    raise CancelledError from error
                failures += 1
                await self.worker.pause_after(error, failures)

    # --- new events -------------------------------------------------------------------------------------------------

    async def _pages(self) -> None:
        skip_ran = self.subscription.delivery is Delivery.IN_TRANSACTION
        types = None if self.types is None else sorted(self.types)
        while not self._stopping:
            self._wake.clear()
            page = await self._with_database(partial(self.store.read, self.cursor, types, skip_ran, PAGE))
            if page.rows:
                await self._deliver_page(page)
                continue
            unsaved_for = asyncio.get_running_loop().time() - self._saved_at
            if self.cursor.done or (self._unsaved and unsaved_for > UNSAVED):
                await self._with_database(partial(self._move, page.after))
            elif self.cursor.place != page.after:
                self.cursor.place = page.after  # nothing was to be done up to there: saved with the next move
                self._unsaved = True
            if not page.complete:
                continue
            if not self.active and self._nothing_due and not self._retry.is_set():
                async with self._idle_changed:
                    self._idle_rounds += 1
                    self._idle_changed.notify_all()
            await self._wake.wait()

    async def _deliver_page(self, page: Page) -> None:
        deliveries = []
        for row in page.rows:
            await self._slots.acquire()
            await self.worker.slots.acquire()
            if self._stopping:
                self._free_slots(1)
                return  # the cursor stays before what was not begun
            deliveries.append(self._begin(_Delivery(row, 1, exceptional=False)))
            if len(deliveries) % 50 == 0:
                await asyncio.sleep(0)
        await asyncio.wait([delivery.settled for delivery in deliveries], timeout=LONG)
        await self._with_database(partial(self._move, page.after, deliveries))

    async def _move(self, place: Any, deliveries: Sequence[_Delivery] = ()) -> None:
        """Move the cursor past a page; deliveries of it that are not settled go on as exceptions."""
        for delivery in deliveries:
            # Before the lock: a handler's transaction that comes after this one must know of the row.
            delivery.exceptional = delivery.exceptional or not delivery.settled.done()
        async with self._settling:
            async with self.store.writing() as connection:
                await self.store.fence(connection, self.cursor)
                if running := [delivery for delivery in deliveries if not delivery.settled.done()]:
                    done = await self.store.done_now(connection, self.cursor)
                    await self.store.keep_failures(
                        connection,
                        self.cursor,
                        [_unsettled(d) for d in running if d.row.position not in done],
                    )
                # whether a commit in doubt has happened is told by `done`, so what is not settled stays there
                keep = [delivery.row.position for delivery in self.active if not delivery.settled.done()]
                done = await self.store.move(connection, self.cursor, place, keep)
            self.cursor.place, self.cursor.done = place, done
            self._unsaved = False
            self._saved_at = asyncio.get_running_loop().time()

    # --- retries ----------------------------------------------------------------------------------------------------

    async def _retries(self) -> None:
        look, failures = True, 0  # an earlier owner may have left exceptions running
        while not self._stopping:
            self._retry.clear()
            wait = 0.0 if look else await self._with_database(partial(self.store.next_due, self.cursor))
            if wait is None or wait > 0:
                self._nothing_due = True
                with contextlib.suppress(TimeoutError):
                    # an operator's retry from elsewhere is found within a minute
                    await asyncio.wait_for(self._retry.wait(), 60.0 if wait is None else min(wait + 0.001, 60.0))
                self._nothing_due = False
                continue
            free = await self._take_slots()
            try:
                begun = await self._begin_due(free)
                look, failures = begun == free, 0
                free -= begun
            except self.store.errors as error:
                look, failures = True, failures + 1  # it may be committed: what it marked as running runs nowhere
                await self.worker.pause_after(error, failures)
            finally:
                self._free_slots(free)

    async def _begin_due(self, limit: int) -> int:
        async with self._settling:
            running = [delivery.row.position for delivery in self.active]
            due = await self.store.due(self.cursor, running, limit)
            for one in due:
                self._begin(_Delivery(one.row, one.attempt, exceptional=True, interrupted=one.interrupted))
        return len(due)

    async def _take_slots(self) -> int:
        """Take the slots that are free, one at least; return how many."""
        taken = 0
        while taken == 0 or (taken < PAGE and not self._slots.locked() and not self.worker.slots.locked()):
            await self._slots.acquire()
            try:
                await self.worker.slots.acquire()
            except CancelledError:
                self._slots.release()
                raise
            taken += 1
        return taken

    def _free_slots(self, number: int) -> None:
        for _ in range(number):
            self._slots.release()
            self.worker.slots.release()

    # --- one delivery -----------------------------------------------------------------------------------------------

    def _begin(self, delivery: _Delivery) -> _Delivery:
        self.active.add(delivery)
        delivery.task = self.worker.spawn(self._deliver(delivery))
        delivery.task.add_done_callback(partial(self._over, delivery))  # also of one that never got to its first step
        return delivery

    async def _deliver(self, delivery: _Delivery) -> None:
        started = asyncio.get_running_loop().time()
        delivery.started_at = datetime.now(UTC)
        try:
            delivery.failure = await self._attempt(delivery)
            delivery.seconds = asyncio.get_running_loop().time() - started
            delivery.ended = True
            self._ready.append(delivery)
            self._something_ready.set()
            await asyncio.shield(delivery.settled)
        except LeaseLost:
            self.worker.lose(self)
        except CancelledError:
            if not delivery.ended:
                await self._put_back(delivery)
            raise
        except Exception as error:
            self.worker.lose(self, error)

    def _over(self, delivery: _Delivery, _: Task[None]) -> None:
        self.active.discard(delivery)
        self._free_slots(1)

    async def _attempt(self, delivery: _Delivery) -> Failure | None:
        """Call the handler; return what went wrong. Raises `LeaseLost`, or CancelledError if the worker did."""
        if delivery.interrupted and delivery.attempt > self.subscription.retry.max_attempts:
            return self._crash_loop(delivery)
        try:
            event, context = self._decode(delivery)
        except UnknownEventError as error:
            self._report_unreadable(delivery, error, WAITING)
            return _failure(delivery, error, WAITING, UNKNOWN_WAIT, attempts=delivery.attempt - 1)
        except Exception as error:
            self._report_unreadable(delivery, error, DEAD)
            return _failure(delivery, error, DEAD, None)
        try:
            if self.subscription.session_parameter is None:
                await self._call(event, context, None)
            else:
                await self._call_in_transaction(delivery, event, context)
        except (LeaseLost, KeyboardInterrupt, GeneratorExit):
            raise
        except CancelledError as error:
            if delivery.cut_short:
                raise
            # raised by the handler, which may also have cancelled its own task
            task = asyncio.current_task()
            while task is not None and task.cancelling():
                task.uncancel()
            return self._judge(delivery, event, error)
        except BaseException as error:  # SystemExit, too: no handler ends the worker
            return self._judge(delivery, event, error)
        return None

    async def _put_back(self, delivery: _Delivery) -> None:
        """A stop cut the handler short: a retry goes back to its queue, its attempt not used."""
        if not delivery.exceptional or self.lost:
            return
        with contextlib.suppress(LeaseLost, *self.store.errors):  # the next owner finds it running, and retries
            async with self._settling, self.store.writing() as connection:
                await self.store.fence(connection, self.cursor)
                if delivery.row.position not in await self.store.done_now(connection, self.cursor):
                    await self.store.keep_failures(connection, self.cursor, [_unsettled(delivery)])

    def _decode(self, delivery: _Delivery) -> tuple[DomainEvent, EventContext]:
        row = delivery.row
        cls = self.worker.class_of(row.type)
        if cls is None:
            raise UnknownEventError(
                f"no event class of this process is stored as {row.type!r}: it waits for a worker that knows it. "
                "Import its module where the bus is made, or add the name to the aliases of its successor"
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
            delivery.in_doubt = False
            # what lost a race on SQLite would lose the next one as well, so it takes the write lock first
            engine = self.store.locking_engine if rerun else self.store.engine
            async with self.worker.connections, AsyncSession(engine, expire_on_commit=False) as session:
                try:
                    if rerun:
                        await self.store.take_lock(await session.connection())
                    with handed_out(session, self.subscription.name):
                        await self._call(event, context, session)
                    await session.flush()
                    connection = await session.connection()
                    await self.store.mark_done(connection, self.cursor, [position])
                    if delivery.exceptional:
                        await self.store.forget(connection, self.cursor, [position])
                    delivery.in_doubt = True
                    await session.commit()
                    delivery.stored = True
                    return
                except DBAPIError as error:
                    if rerun == RERUNS or not _lost_a_race(error):
                        raise
            await asyncio.sleep(random.uniform(0, 0.01 * min(rerun + 1, 20)))

    def _judge(self, delivery: _Delivery, event: DomainEvent, error: BaseException) -> Failure:
        """What follows from what a handler raised."""
        retry, attempt = self.subscription.retry, delivery.attempt
        details = {
            "event_type": type(event).__name__,
            "event_id": str(event.event_id),
            "handler_name": self.subscription.handler_name,
            "error_type": type(error).__name__,
            "error_message": message_of(error),
            "subscription": self.subscription.name,
            "attempt": attempt,
        }
        if isinstance(error, Discard):
            self.worker.log("info", "event_delivery_skipped", **details)
            return _failure(delivery, error, SKIPPED, None)
        dead = attempt >= retry.max_attempts
        wait = None if dead else error.delay if isinstance(error, RetryLater) else retry.wait(attempt)
        if wait is not None:
            details["retry_in_seconds"] = round(wait, 3)
        # a logger would take the trace of a CancelledError for its own task's end
        exc_info = None if isinstance(error, CancelledError) else error
        self.worker.log("warning", "event_handler_failed", **details, exc_info=exc_info)
        if dead:
            self.worker.log("error", "event_delivery_dead", **details)
        return _failure(delivery, error, DEAD if dead else RETRYING, wait)

    def _crash_loop(self, delivery: _Delivery) -> Failure:
        attempts = delivery.attempt - 1
        why = f"the worker ended while attempt {attempts} of {self.subscription.retry.max_attempts} ran: crash loop"
        self.worker.log(
            "error",
            "event_delivery_dead",
            event_type=delivery.row.type,
            event_id=str(delivery.row.event_id),
            handler_name=self.subscription.handler_name,
            error_type="Interrupted",
            error_message=why,
            subscription=self.subscription.name,
            attempt=attempts,
        )
        return Failure(delivery.row, DEAD, attempts, None, "Interrupted", why)

    def _report_unreadable(self, delivery: _Delivery, error: Exception, state: str) -> None:
        if state == WAITING and delivery.exceptional:
            return  # said when it was met first
        self.worker.log(
            "error" if state == DEAD else "warning",
            "event_undecodable" if state == DEAD else "event_unknown",
            event_type=delivery.row.type,
            event_id=str(delivery.row.event_id),
            subscription=self.subscription.name,
            error_type=type(error).__name__,
            error_message=message_of(error),
            state=state,
        )

    # --- settling ---------------------------------------------------------------------------------------------------

    async def _settle(self) -> None:
        while True:
            await self._something_ready.wait()
            self._something_ready.clear()
            batch, self._ready = self._ready, []
            if batch:
                await self._with_database(partial(self._commit, batch))
                if any(delivery.failure is not None for delivery in batch):
                    self._retry.set()
                self.worker.settled.set()

    async def _commit(self, batch: Sequence[_Delivery]) -> None:
        async with self._settling:
            async with self.store.writing() as connection:
                await self.store.fence(connection, self.cursor)
                if any(delivery.in_doubt and not delivery.stored for delivery in batch):
                    done = await self.store.done_now(connection, self.cursor)
                    for delivery in batch:
                        if delivery.in_doubt and delivery.row.position in done:  # only COMMIT's answer was lost
                            delivery.stored, delivery.failure = True, None
                succeeded = [d for d in batch if d.failure is None and not d.stored]
                if succeeded:
                    await self.store.mark_done(connection, self.cursor, [d.row.position for d in succeeded])
                await self.store.forget(connection, self.cursor, [d.row.position for d in succeeded if d.exceptional])
                failures = [d.failure for d in batch if d.failure is not None]
                await self.store.keep_failures(connection, self.cursor, failures)
                await self.store.remember(connection, self.cursor, self.worker.id, [_entry(d) for d in batch])
            self.cursor.done.update(d.row.position for d in batch if d.failure is None)
            for delivery in batch:
                delivery.settled.set_result(None)


def _entry(delivery: _Delivery) -> Entry:
    return Entry(
        delivery.row.position,
        delivery.row.event_id,
        delivery.started_at,
        round(delivery.seconds, 6),
        delivery.attempt,
        "succeeded" if delivery.failure is None else delivery.failure.state,
    )


def _unsettled(delivery: _Delivery) -> Failure:
    """The exception of a delivery that runs, or that a stop cut short: that attempt is not used."""
    if delivery.cut_short:
        return Failure(delivery.row, RETRYING, delivery.attempt - 1, 0.0, "Interrupted", "the worker was stopped")
    return Failure(delivery.row, RUNNING, delivery.attempt, None)


def _failure(
    delivery: _Delivery, error: BaseException, state: str, next_in: float | None, *, attempts: int | None = None
) -> Failure:
    used = delivery.attempt if attempts is None else attempts
    return Failure(delivery.row, state, used, next_in, type(error).__name__, message_of(error)[:4000], trace_of(error))


def _is_refusal(error: Exception) -> bool:
    """Whether the database answered, but will not do what was asked of it: waiting alone mends nothing."""
    if isinstance(error, (ProgrammingError, IntegrityError, DataError)):
        return True
    if isinstance(error, DBAPIError):
        # SQLite has one class for what will pass and for what will not
        return "sqlite" in type(error.orig).__module__ and not any(cause in str(error.orig) for cause in _PASSING)
    return isinstance(error, StatementError)


_PASSING: Final = ("locked", "full", "disk I/O", "unable to open", "interrupted")


def _lost_a_race(error: DBAPIError) -> bool:
    """Whether running the transaction again may succeed: serialization failure, deadlock, SQLite's busy states."""
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    if state in ("40001", "40P01"):
        return True
    return "database is locked" in str(error.orig)
