"""One lane of a subscription in a worker's hands: what may begin, what has ended, how far the cursor may move."""

from __future__ import annotations

import asyncio
import random
import time
from asyncio import CancelledError, Task
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import Context
from datetime import datetime
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, Final

import msgspec
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncSession

from whereupon._staging import handed_out, make_as_new, reuse_savepoint_names
from whereupon.context import NO_METADATA, EventContext, Metadata, decode_metadata, handling
from whereupon.errors import Discard, EventDecodingError, HandlerTimeout, LeaseLost, RetryLater, UnknownEventError
from whereupon.event import DomainEvent
from whereupon.logs import message_of, trace_of
from whereupon.observer import INTERRUPTED, SUCCEEDED, Run
from whereupon.store import (
    BLOCKING,
    DEAD,
    PARKED,
    RETRYING,
    RUNNING,
    SKIPPED,
    WAITING,
    Cursor,
    Due,
    Entry,
    Failure,
    Move,
    Row,
    key_in,
    lane_of,
    ran_in,
)
from whereupon.subscription import Subscription

if TYPE_CHECKING:
    from whereupon._dispatch import Errand, Seat
    from whereupon.worker import Worker

FULL: Final = 500
"""How many events may wait in a lane before no more are read for it."""
UNKNOWN_WAIT: Final = 60.0
"""Seconds between two looks at an event that this build does not know; a newer worker may have come meanwhile."""
EPOCH: Final = time.time() - time.perf_counter()
"""Seconds from 1970 to the zero of `time.perf_counter`."""
BATCHES: Final = 4
"""A shared transaction takes this part of `in_flight` at most: while one waits for the server, another computes."""
WITH_SAVEPOINTS: Final = 10
"""Shared transactions that are run with savepoints at once after one in which a handler failed."""
RERUNS: Final = 50
"""How often a transaction that lost a race (serialization, deadlock, SQLite's stale snapshot) is run again at once."""


class Logged(msgspec.Struct, gc=False, eq=False):
    """An event as it was read, decoded once for all subscriptions that hear it.

    Kept from the garbage collector, as `Delivery` is: of a backlog there are very many, and none is in a cycle.
    """

    row: Row
    window: Any = None
    opened: bool = False
    error: Exception | None = None
    event: Any = None
    metadata: Metadata = NO_METADATA
    context: Any = None
    """What handlers run in a copy of: nothing of whoever started the worker, and which event is being handled."""

    def open(self, worker: Worker) -> bool:
        """Decode it, unless that was done; False if it can't be, and `error` says why."""
        if not self.opened:
            self.opened = True
            try:
                self._decode(worker)
            except Exception as error:
                self.error = error.with_traceback(None)  # which would hold this object
        return self.error is None

    def _decode(self, worker: Worker) -> None:
        row = self.row
        cls = worker.class_of(row.type)
        if cls is None:
            raise UnknownEventError(
                f"no event class of this process is stored as {row.type!r}: it waits for a worker that knows it. "
                "Import its module where the bus is made, or add the name to the aliases of its successor"
            )
        self.event = worker.codec.decode(cls, row.version, row.payload)
        if row.headers != "{}":
            try:
                self.metadata = decode_metadata(row.headers)
            except (msgspec.MsgspecError, UnicodeError) as error:
                raise EventDecodingError(f"the headers of {row.type} at position {row.position}: {error}") from error
        self.context = Context()
        self.context.run(handling.set, (self.event.event_id, self.metadata))


class Delivery(msgspec.Struct, gc=False, eq=False):
    """One event for one subscription."""

    lane: Lane
    logged: Logged
    position: int
    key: str | None
    attempt: int = 1
    exceptional: bool = False
    """Whether it may have a row among the exceptions."""
    careful: bool = False
    """Whether it may have ended a worker before: it is run alone, and recorded before that."""
    alone: bool = False
    head: bool = False
    """Whether it is the one of its key that may run."""
    listed: bool = False
    """Whether it was read from the log, and the cursor is not past it."""
    over: bool = False
    """Whether the cursor may pass it: it has a row among the exceptions."""
    plan: int = 0
    """The number of the last plan that settles it."""
    settled: bool = False
    """Whether what became of it is committed."""
    entered: bool = False
    """Whether the task that runs its handler has made its first step."""
    ended: bool = False
    """Whether its handler is done."""
    shares_slot: bool = False
    """Whether it runs one after the other with those of its batch, which count as one of those that run at once."""
    parking: bool = False
    """Whether it is to wait among the exceptions for an earlier one of its key."""
    blocks: bool = False
    """Whether it is counted among what makes its key wait, until what became of it is committed."""
    cut_short: bool = False
    """Whether this worker cancelled it, so that a CancelledError in it is none of the handler's."""
    failure: Failure | None = None
    stored: bool = False
    """Whether the handler's own transaction has recorded that it succeeded."""
    in_doubt: bool = False
    """Whether that transaction may have committed though it looked as if it failed."""
    began: float = 0.0
    """When its handler was begun, by `time.perf_counter`."""
    microseconds: int = 0
    seat: Seat | None = None
    task: Task[None] | None = None
    waiter: asyncio.Future[None] | None = None
    run: Run | None = None
    """What observers were told of it, until they are told how it ended."""

    def cancel(self) -> None:
        self.cut_short = True
        if self.task is not None and self.task is not asyncio.current_task():
            self.task.cancel()
        elif self.seat is not None:
            self.seat.stop("the worker was stopped")

    def entry(self) -> Entry:
        outcome = "succeeded" if self.failure is None else self.failure.state
        return Entry(self.position, int((self.began + EPOCH) * 1e6), self.microseconds, self.attempt, outcome)

    def running(self) -> Failure:
        """Its exception while it runs on."""
        return Failure(self.logged.row, RUNNING, self.attempt, None, key=self.key, alone=self.alone)

    def put_back(self) -> Failure:
        """Its exception after a stop cut it short: that attempt is not used."""
        return Failure(
            self.logged.row, RETRYING, self.attempt - 1, 0.0, "Interrupted", "the worker was stopped", key=self.key
        )

    def parked(self) -> Failure:
        return Failure(self.logged.row, PARKED, 0, None, key=self.key)

    def failed(self, error: BaseException, state: str, next_in: float | None, attempts: int | None = None) -> Failure:
        return Failure(
            self.logged.row,
            state,
            self.attempt if attempts is None else attempts,
            next_in,
            type(error).__name__,
            message_of(error)[:4000],
            trace_of(error),
            self.key,
        )


class Share:
    """What the lanes of one subscription share in this process: those that go on for ever, or those of one replay."""

    def __init__(self, subscription: Subscription, rate: float | None = None) -> None:
        self.subscription = subscription
        self.definition = subscription.definition
        self.rate = subscription.rate if rate is None else rate
        self.registered_at: datetime | None = None
        """When the subscription was; what was published before that is caught up on at its `backfill_rate`."""
        self.free = subscription.concurrency
        """How many more of its handlers may run now."""
        self.lanes: dict[int, Lane] = {}
        """The lanes of the live generation that are held here and read with the others."""
        self.count = 1
        """How many lanes there are in all."""
        self.queue: deque[Delivery] = deque()
        """What may begin, in the order of the log as far as the lanes were read together."""
        self.with_savepoints = 0
        """How many more shared transactions are run with a savepoint for each delivery, since one has failed."""
        self._begun = 0
        self._current: Delivery | None = None
        """The one whose handler was called last."""
        self._allowance, self._allowed_at = 1.0, 0.0

    def key_of(self, logged: Logged, worker: Worker) -> str | None:
        """The value that this subscription orders the event by. Raises what decoding raises, if it must be decoded."""
        field = self.subscription.ordered_by
        if field is None:
            return None
        key = key_in(logged.row.keys, field)
        if key is None:
            if not logged.open(worker):
                assert logged.error is not None
                raise logged.error
            key = key_of(logged.event, field)
        return key

    def lane_for(self, logged: Logged, key: str | None) -> int:
        return lane_of(key, logged.row.position, self.count)

    def begin_some(self, worker: Worker, limit: int) -> int:
        """Begin what may begin, at most `limit`; return how many have."""
        self._begun = 0
        if self.subscription.session_parameter is not None:
            while (delivery := self._next(worker, limit)) is not None:
                self._begun += delivery.lane.begin_transaction(delivery)
            return self._begun
        self.begin(worker, iter(partial(self._next, worker, limit), None))
        return self._begun

    def begin(self, worker: Worker, deliveries: Iterator[Delivery]) -> None:
        """Call the handler for each of these, in place as far as it gets without waiting."""
        try:
            worker.runner.start_each(self._errands(worker, deliveries), _raised, _over, _waits)
        except SystemExit as error:  # no handler ends the worker
            assert self._current is not None
            self._current.lane.finish(self._current, error)

    def _next(self, worker: Worker, limit: int) -> Delivery | None:
        """Take the next that may begin out of the queue."""
        while self.queue and self._begun < limit and worker.free > 0 and self.free > 0:
            delivery = self.queue[0]
            if delivery.key is not None and not delivery.head:
                self.queue.popleft()
                delivery.lane.line_up(delivery)
                continue
            if delivery.careful:
                self.queue.popleft()
                worker.later_carefully(delivery.lane, delivery)
                self._begun += 1
                return None
            rate = self._rate_of(delivery)
            if rate is not None and not self._allowed(worker, rate):
                return None
            self.queue.popleft()
            return delivery
        return None

    def _errands(self, worker: Worker, deliveries: Iterator[Delivery]) -> Iterator[Errand]:
        """What is to be called, one after the other; a call that is done has ended once the next is asked for."""
        handler, timeout = self.subscription.handler, self.subscription.timeout
        parameter = self.subscription.context_parameter
        watched = worker.observing is not None and worker.observing.watching
        for delivery in deliveries:
            lane, logged = delivery.lane, delivery.logged
            self._begun += 1
            lane.take_slot(delivery)
            if not (logged.opened and logged.error is None) and not lane.readable(delivery):
                continue
            self._current = delivery
            call = handler if parameter is None else partial(handler, **{parameter: lane.context_of(delivery)})
            context = logged.context
            if watched:
                context = context.copy()
                context.run(lane.begins, delivery)
            yield call, logged.event, context, timeout, delivery
            if delivery.seat is None and not delivery.ended:
                lane.end_of(delivery)

    def _rate_of(self, delivery: Delivery) -> float | None:
        slower = self.subscription.backfill_rate
        if slower is None or self.registered_at is None or delivery.logged.row.recorded_at >= self.registered_at:
            return self.rate
        return slower if self.rate is None else min(self.rate, slower)

    def _allowed(self, worker: Worker, rate: float) -> bool:
        """Whether the subscription's rate lets another one begin."""
        if self._allowed_now(worker, rate) < 1:
            return False
        self._allowance -= 1
        return True

    def _allowed_now(self, worker: Worker, rate: float) -> int:
        """How many its rate lets begin now, of which each lane has its part; if none, it pumps again later."""
        rate *= len(self.lanes) / self.count
        now = time.monotonic()
        self._allowance = min(max(1.0, rate), self._allowance + (now - self._allowed_at) * rate)
        self._allowed_at = now
        if self._allowance < 1 and rate > 0:
            worker.pump_in((1 - self._allowance) / rate)
        return int(self._allowance)

    def retries_allowed(self, worker: Worker) -> int:
        """How many retries the subscription's rate lets begin now."""
        return FULL if self.rate is None else self._allowed_now(worker, self.rate)

    def count_retries(self, number: int) -> None:
        self._allowance -= number

    def neighbours(self, worker: Worker, first: Delivery, most: int) -> list[Delivery]:
        """Take more of its lane out of the queue, which may share its transaction."""
        taken: list[Delivery] = []
        left: list[Delivery] = []
        while self.queue and len(taken) < most and not self.queue[0].careful:
            delivery = self.queue[0]
            if delivery.lane is first.lane:
                rate = self._rate_of(delivery)
                if rate is not None and not self._allowed(worker, rate):
                    break
                taken.append(delivery)
            else:
                left.append(delivery)
            self.queue.popleft()
        self.queue.extendleft(reversed(left))
        return taken

    def withdraw(self, lane: Lane) -> None:
        """Begin no more of this lane."""
        self.queue = deque(delivery for delivery in self.queue if delivery.lane is not lane)


def key_of(event: DomainEvent, field: str) -> str:
    """The text that stands for the value of a field that subscriptions order by."""
    return str(getattr(event, field))


class Lane:
    """One cursor, held by this worker under its token."""

    def __init__(self, worker: Worker, share: Share, cursor: Cursor, careful: int) -> None:
        self.worker = worker
        self.store = worker.store
        self.share = share
        self.subscription = share.subscription
        self.cursor = cursor
        self.careful = careful
        """How many of the first deliveries may have been in flight in a worker that died."""
        self.read_place = cursor.place
        """How far the log was read for this lane."""
        self.last: int | None = None
        """The last position of a replay."""
        self.attached = False
        """Whether it is read together with the others that stand at the same place."""
        self.gathering = True
        """Whether it has not tried yet to come to where the others are."""
        self.done = cursor.done
        self.exceptions = cursor.exceptions
        """Positions not passed yet that have, or had, a row among the exceptions."""
        self.order: deque[Delivery] = deque()
        """What was read and is not passed, in the order of the log."""
        self.active: set[Delivery] = set()
        """What has begun and is not settled."""
        self.chains: dict[str, deque[Delivery]] = {}
        """For each key of which a delivery is queued or runs: those that follow it."""
        self.since = time.monotonic()
        self.blocked = cursor.blocked
        self.blocking: dict[str, int] = {}
        """As `blocked`, of what has ended and is not committed yet."""
        self.due = cursor.left
        self.followers: list[Due] = []
        """Parked deliveries recorded as begun, to begin with the worker's next turn."""
        self.set_aside: set[int] = set()
        """Positions of what waits to be run carefully."""
        self.lost = False
        self.releasing = False
        self.unsaved_since: float | None = None
        self.settling = asyncio.Lock()
        """Held while the cursor is changed: each change sees what the one before it has settled.

        Whatever lock the database has for all writers comes before it.
        """
        self.room = asyncio.Event()
        self._low: Any = cursor.place
        """How far it is settled, as far as that is committed; see `low`."""
        self._passed: Delivery | None = None
        """The last that was passed since `_low` was."""
        self._passed_done: set[int] = set()
        """Positions in `done` that are passed, and need not be there any more."""
        self._solo: Task[None] | None = None
        self._taking_due = False
        self._recording = False
        self.ready: list[Delivery] = []
        """What has ended, and is to be settled."""
        self.plain = True
        """Whether all that is ready has succeeded at the first attempt: then the cursor's row is all that changes."""
        self._plans = 0

    @property
    def name(self) -> str:
        return self.subscription.name

    @property
    def transactional(self) -> bool:
        return self.subscription.session_parameter is not None

    @property
    def idle(self) -> bool:
        """Whether nothing of it is in flight, nor about to be."""
        return not (self.active or self.followers or self._taking_due or self._recording)

    @property
    def quiet(self) -> bool:
        """Whether nothing is left to be done of what was read."""
        return not (self.active or self.followers or self.due or self.order or self.set_aside or self._taking_due)

    # --- from the log -----------------------------------------------------------------------------------------------

    def offer(self, logged: Logged, key: str | None) -> None:
        """Take an event of this lane that was read, in the order of the log."""
        row = logged.row
        if row.ran is not None and not self.cursor.key.generation and self.name in ran_in(row.ran):
            self.exceptions.discard(row.position)
            if row.position in self.done:
                self._passed_done.add(row.position)
            return
        delivery = Delivery(self, logged, row.position, key, listed=True)
        self.order.append(delivery)
        if row.position in self.done:
            delivery.settled = True
        elif row.position in self.exceptions:
            delivery.over = True
        else:
            if self.careful:
                self.careful -= 1
                delivery.careful = True
            self.share.queue.append(delivery)

    def start_reading(self) -> None:
        """Read by itself until it stands where the others are, or at the end of its replay."""
        self.attached = False
        read = self.worker.catch_up if self.last is None else self.worker.replay
        self._solo = self.worker.spawn(self._read_alone(read))

    async def _read_alone(self, read: Callable[[Lane], Awaitable[None]]) -> None:
        try:
            await read(self)
        except Exception as error:  # else nobody would read for it any more
            self.worker.lose(self, error)

    @property
    def caught_up(self) -> bool:
        return self.attached or self.read_place == self.store.finished

    # --- what begins ------------------------------------------------------------------------------------------------

    def line_up(self, delivery: Delivery) -> None:
        """Make it the head of its key, or have it wait behind that."""
        key = delivery.key
        assert key is not None
        if (chain := self.chains.get(key)) is not None:
            chain.append(delivery)
        elif self.blocked.get(key) or self.blocking.get(key):
            self._park(delivery)
        else:
            self.chains[key] = deque()
            delivery.head = True
            self.share.queue.appendleft(delivery)

    def _park(self, delivery: Delivery) -> None:
        assert delivery.key is not None
        delivery.parking = delivery.blocks = True
        delivery.failure = delivery.parked()
        self.blocking[delivery.key] = self.blocking.get(delivery.key, 0) + 1
        self.worker.free -= 1
        self.active.add(delivery)
        self.to_settle(delivery)

    def _next_of(self, delivery: Delivery) -> None:
        """Its handler is done: the next of its key may begin, or must wait among the exceptions."""
        key = delivery.key
        if key is None:
            return
        delivery.blocks = delivery.failure is not None and delivery.failure.state in BLOCKING
        if delivery.blocks:
            self.blocking[key] = self.blocking.get(key, 0) + 1
        chain = self.chains.pop(key, None)
        if not chain or self.releasing:  # the next owner reads them again
            return
        if self.blocked.get(key) or self.blocking.get(key):  # by itself, or by what was parked while it ran
            for follower in chain:
                self._park(follower)
        else:
            follower = chain.popleft()
            self.chains[key] = chain
            follower.head = True
            self.share.queue.appendleft(follower)

    def begin_now(self, delivery: Delivery) -> None:
        """Begin it whatever waits."""
        if self.transactional:
            self.begin_transaction(delivery)
            return
        self.share.begin(self.worker, iter((delivery,)))

    def take_slot(self, delivery: Delivery) -> None:
        self.worker.free -= 1
        self.share.free -= not delivery.shares_slot
        self.active.add(delivery)
        if self.set_aside:
            self.set_aside.discard(delivery.position)
        delivery.began = time.perf_counter()

    def readable(self, delivery: Delivery) -> bool:
        """Decode it; what can't be decoded has ended with that."""
        if delivery.logged.open(self.worker):
            return True
        error = delivery.logged.error
        assert error is not None
        unknown = isinstance(error, UnknownEventError)
        if not (unknown and delivery.exceptional):  # said when it was met first
            self.worker.log(
                "warning" if unknown else "error",
                "event_unknown" if unknown else "event_undecodable",
                event_type=delivery.logged.row.type,
                event_id=str(delivery.logged.row.event_id),
                subscription=self.name,
                error_type=type(error).__name__,
                error_message=message_of(error),
                state=WAITING if unknown else DEAD,
            )
        if unknown:
            delivery.failure = delivery.failed(error, WAITING, UNKNOWN_WAIT, delivery.attempt - 1)
        else:
            delivery.failure = delivery.failed(error, DEAD, None)
        self.end_of(delivery)
        return False

    def context_of(self, delivery: Delivery) -> EventContext:
        logged = delivery.logged
        return EventContext(
            event_id=logged.event.event_id,
            event_type=logged.row.type,
            subscription=self.name,
            attempt=delivery.attempt,
            generation=self.cursor.key.generation,
            metadata=logged.metadata,
            log=self.worker.handler_logger,
        )

    def finish(self, delivery: Delivery, error: BaseException | None) -> None:
        """Its handler has returned, or raised."""
        if error is not None:
            if delivery.cut_short:
                self._put_back(delivery)
                return
            delivery.failure = self._judge(delivery, error)
        self.end_of(delivery)

    def end_of(self, delivery: Delivery) -> None:
        delivery.ended = True
        delivery.microseconds = int((time.perf_counter() - delivery.began) * 1e6)
        self.share.free += not delivery.shares_slot
        self.to_settle(delivery)  # before those that are to wait for it: the head of a key is the first to arrive
        if delivery.key is not None:
            self._next_of(delivery)

    def to_settle(self, delivery: Delivery) -> None:
        """It has ended, and what became of it is to be committed."""
        if self.lost:  # it was begun while the lane was being lost: nobody settles it here, but its place is needed
            self.let_go(delivery)
            return
        if not self.ready:
            self.plain = not self.transactional
            self.worker.to_settle(self)
        self.ready.append(delivery)
        if delivery.exceptional or delivery.failure is not None:
            self.plain = False

    def take_ready(self) -> list[Delivery]:
        ready, self.ready = self.ready, []
        return ready

    def _put_back(self, delivery: Delivery) -> None:
        """A stop cut the handler short: the cursor stays before it, and a retry goes back among the exceptions."""
        delivery.ended = True
        self.share.free += not delivery.shares_slot
        if delivery.exceptional and not self.lost:
            delivery.failure = delivery.put_back()
            self.to_settle(delivery)
        else:
            self.let_go(delivery)

    def let_go(self, delivery: Delivery) -> None:
        """It is over for this worker."""
        if delivery.run is not None:
            self._not_told(delivery)
        if delivery in self.active:
            self.active.discard(delivery)
            self.worker.free += 1
        if delivery.waiter is not None and not delivery.waiter.done():
            delivery.waiter.set_result(None)
        delivery.seat = delivery.task = None  # they hold it in turn, and no garbage collector would see that

    # --- what observers are told ------------------------------------------------------------------------------------

    def begins(self, delivery: Delivery, together: int = 1) -> None:
        """Tell whoever watches, in the context that the handler is about to run in."""
        assert self.worker.observing is not None
        if delivery.run is not None:  # it lost a race, and is called once more
            self._not_told(delivery)
        run = delivery.run = self._run_of(delivery)
        run.began, run.together = time.time(), together
        self.worker.observing.start(run)

    def _run_of(self, delivery: Delivery) -> Run:
        row = delivery.logged.row
        return Run(
            self.subscription,
            row.event_id,
            row.type,
            delivery.logged.metadata,
            delivery.attempt,
            self.cursor.key.generation,
            row.recorded_at,
            False,
            1,
            delivery.logged.event is not None,
        )

    def _told(self, deliveries: Iterable[Delivery]) -> None:
        """What became of these is committed."""
        observing = self.worker.observing
        assert observing is not None
        runs = []
        epoch = time.time() - time.perf_counter()  # asked anew, since clocks are set while processes run
        for delivery in deliveries:
            if delivery.parking:
                continue
            run = delivery.run
            if run is None:
                run = self._run_of(delivery)
                run.began = delivery.began + epoch
            run.seconds = delivery.microseconds / 1e6
            if (failure := delivery.failure) is None:
                run.outcome = SUCCEEDED
            else:
                run.outcome = INTERRUPTED if delivery.cut_short else failure.state
                run.error_type, run.error_message = failure.error_type, failure.error_message
                run.traceback = failure.traceback
            if delivery.run is not None:
                delivery.run = None
                observing.end(run)
            runs.append(run)
        observing.settle(runs)

    def _not_told(self, delivery: Delivery) -> None:
        """Nothing became of a call that observers know of: it happens again, here or elsewhere."""
        assert self.worker.observing is not None
        assert delivery.run is not None
        run, delivery.run = delivery.run, None
        run.outcome, run.seconds = INTERRUPTED, time.perf_counter() - delivery.began
        self.worker.observing.end(run)

    # --- its failure ------------------------------------------------------------------------------------------------

    def _judge(self, delivery: Delivery, error: BaseException) -> Failure:
        """What follows from what a handler raised."""
        retry, attempt = self.subscription.retry, delivery.attempt
        details = {
            "event_type": type(delivery.logged.event).__name__,
            "event_id": str(delivery.logged.event.event_id),
            "handler_name": self.subscription.handler_name,
            "error_type": type(error).__name__,
            "error_message": message_of(error),
            "subscription": self.name,
            "attempt": attempt,
        }
        if isinstance(error, Discard):
            self.worker.log("info", "event_delivery_skipped", **details)
            return delivery.failed(error, SKIPPED, None)
        dead = attempt >= retry.max_attempts
        wait = None if dead else error.delay if isinstance(error, RetryLater) else retry.wait(attempt)
        if wait is not None:
            details["retry_in_seconds"] = round(wait, 3)
        # a logger would take the trace of a CancelledError for its own task's end
        exc_info = None if isinstance(error, CancelledError) else error
        self.worker.log("warning", "event_handler_failed", **details, exc_info=exc_info)
        if dead:
            self.worker.log("error", "event_delivery_dead", **details)
        return delivery.failed(error, DEAD if dead else RETRYING, wait)

    def crash_loop(self, delivery: Delivery) -> None:
        """It ended its worker as often as it may: it is not begun again."""
        attempts = delivery.attempt - 1
        why = f"the worker ended while attempt {attempts} of {self.subscription.retry.max_attempts} ran: crash loop"
        self.worker.log(
            "error",
            "event_delivery_dead",
            event_type=delivery.logged.row.type,
            event_id=str(delivery.logged.row.event_id),
            handler_name=self.subscription.handler_name,
            error_type="Interrupted",
            error_message=why,
            subscription=self.name,
            attempt=attempts,
        )
        delivery.attempt = attempts
        delivery.failure = Failure(
            delivery.logged.row, DEAD, attempts, None, "Interrupted", why, key=delivery.key, alone=True
        )
        self.take_slot(delivery)
        self.end_of(delivery)

    # --- in a transaction -------------------------------------------------------------------------------------------

    def begin_transaction(self, first: Delivery) -> int:
        """Run the handler in a task, with those that may share its transaction; return how many."""
        together = [first]
        if self.subscription.batch > 1 and not (first.careful or first.exceptional):
            most = min(self.subscription.batch, self.worker.free, max(2, self.worker.in_flight // BATCHES))
            together += self.share.neighbours(self.worker, first, most - 1)
        readable = []
        for delivery in together:
            delivery.shares_slot = delivery is not first
            self.take_slot(delivery)
            if self.readable(delivery):
                readable.append(delivery)
        if readable:
            context = readable[0].logged.context.copy()
            if len(readable) == 1 and self.worker.observing is not None and self.worker.observing.watching:
                context.run(self.begins, readable[0])
            task = self.worker.spawn(self._transact(readable), context)
            for delivery in readable:
                delivery.task = task
        return len(together)

    async def _transact(self, deliveries: Sequence[Delivery]) -> None:
        for delivery in deliveries:
            delivery.entered = True
        try:
            if len(deliveries) == 1:
                await self._alone_in_transaction(deliveries[0])
            else:
                await self._together_in_transaction(deliveries)
        except LeaseLost:
            for delivery in deliveries:
                delivery.cut_short = True
                self._put_back(delivery)
            self.worker.lose(self)
        except CancelledError as error:
            for delivery in deliveries:
                if not delivery.ended:
                    if not delivery.cut_short:
                        _clear_cancellation()
                    self.finish(delivery, error)
            if any(delivery.cut_short for delivery in deliveries):
                raise
        except BaseException as error:  # SystemExit, too: no handler ends the worker
            for delivery in deliveries:
                if not delivery.ended:
                    self.finish(delivery, error)
            if isinstance(error, (KeyboardInterrupt, GeneratorExit)):
                raise

    async def _alone_in_transaction(self, delivery: Delivery) -> None:
        """Run the handler; commit what it wrote together with the record that it ran."""
        for rerun in range(RERUNS + 1):
            delivery.in_doubt = False
            # what lost a race on SQLite would lose the next one as well, so it takes the write lock first
            engine = self.store.locking_engine if rerun else self.store.engine
            async with self.worker.connections, AsyncSession(engine, expire_on_commit=False) as session:
                try:
                    if rerun:
                        await self.store.take_lock(await session.connection())
                    with handed_out(session, self.name):
                        await self._call_with(delivery, session)
                    await session.flush()
                    await self._commit([delivery], session, session.commit)
                except DBAPIError as error:
                    if rerun == RERUNS or not lost_a_race(error):
                        raise
                else:
                    self._stored([delivery])
                    return
            await asyncio.sleep(random.uniform(0, 0.01 * min(rerun + 1, 20)))

    async def _together_in_transaction(self, deliveries: Sequence[Delivery]) -> None:
        """Run the handler for each, and commit what they wrote at once.

        A savepoint for each would be as many round trips to the server as a transaction for each has. So there are none
        as long as nothing fails; where something does, all is rolled back, and run again with savepoints.
        """
        rerun = 0
        try:
            if self.share.with_savepoints > 0:
                self.share.with_savepoints -= 1
            elif (missed := await self._without_savepoints(deliveries)) is None:
                return
            elif isinstance(missed, DBAPIError) and lost_a_race(missed):
                rerun = 1
            else:
                self.share.with_savepoints = WITH_SAVEPOINTS
            await self._with_savepoints(deliveries, rerun)
        except _CommitRefused as refused:  # for the sake of one of them, and nobody knows of which
            async with self.store.reading() as connection:
                done = await self.store.done_now(connection, self.cursor)
            for delivery in deliveries:
                if delivery.ended:
                    continue
                if self.lost:
                    delivery.cut_short = True
                    self._put_back(delivery)
                elif delivery.position in done:  # it was committed all the same, and what raised came after that
                    self.finish(delivery, refused.__cause__)
                else:
                    await self._transact([delivery])

    async def _without_savepoints(self, deliveries: Sequence[Delivery]) -> BaseException | None:
        """Run the handler for each, and commit if none fails; else what one has raised, and nothing was written."""
        async with self.worker.connections, AsyncSession(self.store.engine, expire_on_commit=False) as session:
            try:
                with handed_out(session, self.name):
                    for delivery in deliveries:
                        await self._call_in(session, delivery, len(deliveries))
                        make_as_new(session)
            except BaseException as error:
                if not _is_its_own(error, deliveries):
                    raise
                return error
            try:
                await self._commit_together(deliveries, session)
            except DBAPIError as error:
                if lost_a_race(error):
                    return error
                raise
        self._stored(deliveries)
        return None

    async def _with_savepoints(self, deliveries: Sequence[Delivery], rerun: int) -> None:
        """Run the handler for each, in a savepoint; commit all that succeeded at once."""
        gone: list[tuple[Delivery, BaseException]] = []
        left = list(deliveries)
        while left:
            succeeded, failed = [], []
            engine = self.store.locking_engine if rerun else self.store.engine
            async with self.worker.connections, engine.connect() as connection:
                try:
                    await connection.begin()
                    if rerun:
                        await self.store.take_lock(connection)
                    for delivery in left:
                        if connection.sync_connection is not None:
                            reuse_savepoint_names(connection.sync_connection)
                        savepoint = await connection.begin_nested()
                        returned = False
                        try:
                            async with AsyncSession(
                                connection, expire_on_commit=False, join_transaction_mode="rollback_only"
                            ) as session:
                                with handed_out(session, self.name):
                                    await self._call_in(session, delivery, len(left))
                                await session.commit()  # of savepoints that it has left open, and of nothing else
                            returned = True
                            await savepoint.commit()
                        except BaseException as error:
                            if not _is_its_own(error, deliveries) or (
                                isinstance(error, DBAPIError) and lost_a_race(error)
                            ):
                                raise
                            failed.append((delivery, error))
                            if returned or connection.invalidated:
                                break
                            if savepoint.is_active:  # a flush that fails rolls back to it by itself
                                await savepoint.rollback()
                        else:
                            succeeded.append(delivery)
                    else:
                        if succeeded:
                            await self._commit_together(succeeded, connection)
                        for delivery, reason in (*gone, *failed):
                            self.finish(delivery, reason)
                        self._stored(succeeded)
                        return
                    # The last one has cost the connection, as it was cancelled amid a statement, or the transaction, as
                    # it said nothing of an error: the others go on without it.
                    gone.append(failed[-1])
                    left.remove(failed[-1][0])
                except DBAPIError as error:
                    if rerun == RERUNS or not lost_a_race(error):
                        raise
                    rerun += 1
            await asyncio.sleep(random.uniform(0, 0.01 * min(rerun, 20)))
        for delivery, reason in gone:
            self.finish(delivery, reason)

    async def _call_in(self, session: AsyncSession, delivery: Delivery, together: int) -> None:
        """Call the handler for one of several in a transaction, and have what it wrote sent in its name."""
        delivery.in_doubt = False
        handling.set((delivery.logged.event.event_id, delivery.logged.metadata))
        delivery.began = time.perf_counter()
        if self.worker.observing is not None and self.worker.observing.watching:
            self.begins(delivery, together)
        await self._call_with(delivery, session)
        if session.new or session.dirty or session.deleted:
            await session.flush()
        if (task := asyncio.current_task()) is not None and task.cancelling():
            await asyncio.sleep(0)  # what it has cancelled is its own call, not what comes next
        delivery.microseconds = int((time.perf_counter() - delivery.began) * 1e6)

    async def _commit_together(self, deliveries: Sequence[Delivery], on: AsyncSession | AsyncConnection) -> None:
        """Raises `_CommitRefused` where what they have written is refused, though nothing failed before."""
        try:
            await self._commit(deliveries, on, on.commit)
        except LeaseLost:
            raise
        except Exception as error:
            if isinstance(error, DBAPIError) and (error.connection_invalidated or lost_a_race(error)):
                raise
            raise _CommitRefused from error

    async def _call_with(self, delivery: Delivery, session: AsyncSession) -> None:
        context = self.context_of(delivery) if self.subscription.context_parameter is not None else None
        limit = asyncio.timeout(self.subscription.timeout)
        try:
            async with limit:
                await self.subscription.call(delivery.logged.event, context, session)
        except TimeoutError as error:
            if limit.expired():
                raise HandlerTimeout(
                    f"it ran longer than its {self.subscription.timeout:g} s and was cancelled"
                ) from error
            raise

    async def _commit(self, deliveries: Sequence[Delivery], on: Any, commit: Callable[[], Any]) -> None:
        """Record in the handler's transaction that it ran, as its last statement, and commit."""
        connection = await on.connection() if isinstance(on, AsyncSession) else on
        await self.store.take_turn(connection, self.cursor)
        async with self.settling:
            counts: dict[str, int] = {}
            begun: list[Due] = []
            if exceptional := [d for d in deliveries if d.exceptional]:
                # the cursor's row first, as operators do: what blocks the key is counted while it is locked
                await self.store.fence(connection, self.cursor)
                found = await self.store.forget(connection, self.cursor, [d.position for d in exceptional])
                if found < sum(not d.listed for d in exceptional):
                    raise LeaseLost(f"a delivery of {self.name} was settled by somebody else while it ran here")
                counts, begun = await self._follow(connection, {d.key for d in exceptional if d.key})
            self._pass_settled()
            add = [d.position for d in deliveries if d.listed or d.position in self.exceptions]
            place, drop = self.low, list(self._passed_done)
            for delivery in deliveries:
                delivery.microseconds = delivery.microseconds or int((time.perf_counter() - delivery.began) * 1e6)
            remembered = self.worker.remembered([(self, deliveries)])
            await self.store.move(connection, Move(self.cursor, place, add, drop), self.worker.id, remembered)
            for delivery in deliveries:
                delivery.in_doubt = True
            with self._committing(begun):
                await commit()
            self._moved(place, add, drop)
            self._count_blocking(counts)

    def _count_blocking(self, counts: dict[str, int]) -> None:
        for key, number in counts.items():
            if number:
                self.blocked[key] = number
            else:
                self.blocked.pop(key, None)

    async def _follow(self, connection: Any, keys: Iterable[str]) -> tuple[dict[str, int], list[Due]]:
        """Begin the next of each key, or make it due, where nothing blocks it any more.

        Returns how many block each key now, and what is begun once this transaction has committed: a key with much
        that waits goes on at a transaction for each, not two.
        """
        worker = self.worker
        begin = not (self.releasing or worker.stopping or worker.is_careful or self.share.rate)
        counts, begun = {}, []
        for key in keys:
            following = await self.store.follow(connection, self.cursor, key, begin=begin)
            counts[key] = following.blocking
            if following.begun is not None:
                begun.append(following.begun)
            elif following.released:
                self.due = True
        return counts, begun

    @contextmanager
    def _committing(self, begun: list[Due]) -> Iterator[None]:
        """These are begun with the worker's next turn if the commit succeeds; where nobody knows, it is looked at."""
        try:
            yield
        except BaseException:
            self.due = self.due or bool(begun)
            raise
        if begun:
            self.followers += begun
            self.worker.following.append(self)
            self.worker.pump()

    def begin_followers(self) -> None:
        """Begin what was recorded as begun when those before it were settled."""
        followers, self.followers = self.followers, []
        for one in followers:
            self._begin_due(one)

    def _stored(self, deliveries: Sequence[Delivery]) -> None:
        """Their transaction has committed, and with it the record that they ran."""
        if self.worker.observing is not None:
            self._told(deliveries)
        for delivery in deliveries:
            delivery.stored = delivery.settled = delivery.ended = True
            self.share.free += not delivery.shares_slot
            self._next_of(delivery)
            self.let_go(delivery)
        self._pass_settled()
        self.worker.has_stored()

    # --- how far the cursor may move --------------------------------------------------------------------------------

    def read_to(self, place: Any) -> None:
        """The log was read for this lane up to there, and what it has of that was offered."""
        self.read_place = place
        if not self.order:
            self._low, self._passed = place, None
            if self.unsaved_since is None and place != self.cursor.place:
                self.unsaved_since = time.monotonic()

    def _pass_settled(self) -> None:
        """Let go of what is settled at the beginning of `order`, as far as is committed."""
        order, exceptions, done = self.order, self.exceptions, self.done
        passed: Delivery | None = None
        while order and (order[0].settled or order[0].over):
            passed = order.popleft()
            passed.listed = False
            if exceptions:
                exceptions.discard(passed.position)
            if done and passed.position in done:
                self._passed_done.add(passed.position)
        if passed is not None:
            self._passed = passed
        if not order:
            self._low, self._passed = self.read_place, None
        if not self.room.is_set() and len(order) < FULL:
            self.room.set()

    @property
    def low(self) -> Any:
        """How far it is settled, as far as that is committed."""
        if self._passed is not None:
            self._low, self._passed = self.store.within(self._passed.logged.window, self._passed.position), None
        return self._low

    def _moved(self, place: Any, add: Sequence[int], drop: Sequence[int]) -> None:
        """The cursor's row was changed so, and that is committed."""
        self.cursor.place, self.unsaved_since = place, None
        self.done.update(add)
        self.done.difference_update(drop)
        self._passed_done.difference_update(drop)

    def plan(self, batch: Sequence[Delivery], running: Sequence[Delivery] = ()) -> Move:
        """How the cursor is to move in the transaction that settles `batch`."""
        self._plans = number = self._plans + 1
        for delivery in batch:
            delivery.plan = number
        for delivery in running:
            delivery.plan = number
        place, passing, missing = self.low, 0, len(batch) + len(running)
        last = None
        for delivery in self.order:
            if delivery.plan == number:
                missing -= 1
            elif not (delivery.settled or delivery.over):
                place = place if last is None else self.store.within(last.logged.window, last.position)
                break
            last = delivery
            passing += 1
        else:
            place = self.read_place
        drop, add = list(self._passed_done), []
        if self.done:
            drop += [d.position for d in islice(self.order, passing) if d.position in self.done]
        if missing > 0:  # else the place passes all of it
            passed = {d.position for d in islice(self.order, passing)}
            add = [
                d.position
                for d in batch
                if d.failure is None
                and not d.stored
                and d.position not in passed
                and (d.listed or d.position in self.exceptions)
            ]
        return Move(self.cursor, place, add, drop)

    def settle(self, batch: Sequence[Delivery], move: Move) -> None:
        """The transaction that settles `batch` has committed."""
        if self.worker.observing is not None:
            self._told(batch)
        for delivery in batch:
            if delivery.failure is None:
                delivery.settled = True
            else:
                delivery.over = True
                if delivery.listed:
                    self.exceptions.add(delivery.position)
            self.let_go(delivery)
        self._moved(move.place, move.add, move.drop)
        self._pass_settled()

    async def commit(self, batch: Sequence[Delivery], running: Sequence[Delivery] = ()) -> None:
        """Settle a batch in a transaction of this lane; make exceptions of what is `running` still.

        Raises `LeaseLost`, or what the database raises: then it may be called again with the same.
        """
        for delivery in running:
            # Before the lock: a handler's transaction that comes after this one must know of the row.
            delivery.exceptional = True
        async with self.store.writing() as connection, self.settling:
            if self.lost:
                return
            running = [d for d in running if not d.settled and not d.ended]
            await self.store.fence(connection, self.cursor)
            if any(delivery.in_doubt and not delivery.stored for delivery in (*batch, *running)):
                done = await self.store.done_now(connection, self.cursor)
                kept = await self.store.kept(connection, self.cursor, [d.position for d in batch if d.in_doubt])
                for delivery in batch:
                    position = delivery.position
                    vanished = delivery.exceptional and not delivery.listed and position not in kept
                    if delivery.in_doubt and (position in done or vanished):  # only COMMIT's answer was lost
                        delivery.stored, delivery.failure = True, None
                        if position in done:
                            self.done.add(position)
                            if not delivery.listed and position not in self.exceptions:
                                self._passed_done.add(position)
                running = [d for d in running if d.position not in done]
            await self.store.forget(
                connection, self.cursor, [d.position for d in batch if d.failure is None and d.exceptional]
            )
            failures = [d.failure for d in batch if d.failure is not None] + [d.running() for d in running]
            # the first row of a key is its head, also where those behind it were parked while it ran still
            failures.sort(key=lambda failure: failure.state == PARKED)
            await self.store.keep_failures(connection, self.cursor, failures)
            counts, begun = await self._follow(
                connection,
                {d.key for d in batch if d.key is not None and (d.failure is not None or d.exceptional)}
                | {d.key for d in running if d.key is not None},
            )
            move = self.plan(batch, running)
            await self.store.move(connection, move, self.worker.id, self.worker.remembered([(self, batch)]))
            with self._committing(begun):
                await connection.commit()
            for delivery in batch:
                if delivery.blocks:
                    self._unblocking(delivery)
            self._count_blocking(counts)
            for delivery in running:
                delivery.over = True
                if delivery.listed:
                    self.exceptions.add(delivery.position)
            self.settle(batch, move)

    def _unblocking(self, delivery: Delivery) -> None:
        """What became of it is committed; if it blocks its key still, it is counted among the exceptions."""
        delivery.blocks = False
        key = delivery.key
        assert key is not None
        left = self.blocking.get(key, 0) - 1
        if left > 0:
            self.blocking[key] = left
        else:
            self.blocking.pop(key, None)

    def long_running(self, now: float, longest: float) -> list[Delivery]:
        """Deliveries that hold the cursor up for longer than that, and what waits behind them in order of a key."""
        found = []
        for delivery in [d for d in self.active if not (d.ended or d.parking) and now - d.began >= longest]:
            if not delivery.exceptional:
                found.append(delivery)
            if delivery.head and delivery.key is not None and (chain := self.chains.get(delivery.key)):
                self.chains[delivery.key] = deque()  # what arrives while it runs is parked after these
                for follower in chain:
                    self._park(follower)
        return found

    # --- retries ----------------------------------------------------------------------------------------------------

    @property
    def may_take_due(self) -> bool:
        return not (self._taking_due or self.releasing or self.lost or self.share.free <= 0)

    def room_for_due(self) -> int:
        """Reserve places for exceptions whose time has come, and tell how many; `take_due` gives them back.

        Before the database is asked: what is new would take all of them meanwhile, as long as there is more of that
        than can be done, and other lanes ask at the same time.
        """
        worker = self.worker
        if not self.may_take_due:
            return 0
        most = max(1, worker.in_flight // 4)  # since nobody knows how many are due
        room = min(worker.free, self.share.free, self.share.retries_allowed(worker), most)
        if room <= 0:
            return 0
        self._taking_due = True
        self._reserve(room)
        return room

    async def take_due(self, room: int) -> None:
        """Begin the exceptions whose time has come, as many as were reserved."""
        try:
            async with self.store.writing() as connection, self.settling:
                if self.releasing or self.lost:
                    return
                self.due = False
                held = {delivery.position for delivery in self.active} | self.set_aside
                held.update(one.row.position for one in self.followers)
                try:
                    found = await self.store.due(connection, self.cursor, held, room)
                    await connection.commit()
                    self.due = self.due or len(found) == room
                except BaseException:
                    self.due = True
                    raise
                self.share.count_retries(len(found))
                self._reserve(-room)
                room = 0
                self._begin_all_due(found)
        finally:
            self._reserve(-room)
            self._taking_due = False

    def _reserve(self, number: int) -> None:
        self.worker.free -= number
        self.share.free -= number

    def _begin_all_due(self, found: Sequence[Due]) -> None:
        if self.lost:  # meanwhile: whoever has the lane now finds them recorded as begun
            return
        for one in found:
            self._begin_due(one)

    def _begin_due(self, one: Due) -> None:
        delivery = Delivery(self, Logged(one.row), one.row.position, one.key, one.attempt, exceptional=True)
        if one.interrupted and one.alone and one.attempt > self.subscription.retry.max_attempts:
            self.crash_loop(delivery)
        elif one.interrupted or self.worker.is_careful:
            self.worker.later_carefully(self, delivery)
        else:
            self.begin_now(delivery)

    async def record_alone(self, delivery: Delivery) -> None:
        """Record that it is about to run with nothing beside it, so that it is to blame if this process ends."""
        delivery.alone = delivery.exceptional = True
        self._recording = True
        try:
            async with self.store.writing() as connection, self.settling:
                await self.store.fence(connection, self.cursor)
                await self.store.keep_failures(connection, self.cursor, [delivery.running()])
                await self.worker.mark_alone(connection)
                await connection.commit()
                self.worker.marked_alone = True
                if delivery.listed:
                    self.exceptions.add(delivery.position)
                    delivery.over = True
        finally:
            self._recording = False

    # --- its end ----------------------------------------------------------------------------------------------------

    def unsaved(self) -> Move | None:
        """How the cursor is to move where only foreign events were passed since it last was; None: not at all."""
        if self.lost:
            return None
        self._pass_settled()
        if self.low == self.cursor.place and not self._passed_done:
            return None
        return Move(self.cursor, self.low, [], list(self._passed_done))

    async def save(self) -> None:
        """Move the cursor so. Raises `LeaseLost`."""
        if self.unsaved() is None:
            return
        async with self.store.writing() as connection, self.settling:
            if (move := self.unsaved()) is None:
                return
            await self.store.move(connection, move, self.worker.id)
            await connection.commit()
            self._moved(move.place, move.add, move.drop)

    def end(self) -> None:
        """It is another's now: what runs is cancelled, and nothing of it is settled here."""
        self.lost = True
        self.followers = []
        self.share.withdraw(self)
        if self._solo is not None and self._solo is not asyncio.current_task():
            self._solo.cancel()
        for delivery in list(self.active):
            if not delivery.ended:
                delivery.cancel()
                if delivery.task is not None and not delivery.entered:  # it never gets to give its place back
                    delivery.ended = True
                    self.share.free += not delivery.shares_slot
            self.let_go(delivery)
        self.room.set()


def _raised(delivery: Delivery, _: Any, error: BaseException) -> None:
    delivery.lane.finish(delivery, error)


def _waits(delivery: Delivery, seat: Seat) -> None:
    delivery.seat = seat


def _over(seat: Seat, error: BaseException | None) -> None:
    delivery: Delivery = seat.label
    delivery.lane.finish(delivery, error)


def _clear_cancellation() -> None:
    """A handler cancelled its own task: that is its failure, and not the worker's end."""
    task = asyncio.current_task()
    while task is not None and task.cancelling():
        task.uncancel()


class _CommitRefused(Exception):
    """A transaction with several deliveries could not be committed, as for a constraint that is checked then."""


def _is_its_own(error: BaseException, deliveries: Iterable[Delivery]) -> bool:
    """Whether a handler has failed, and nothing has become of the connection or the task that it shares with others."""
    if isinstance(error, CancelledError):
        if any(delivery.cut_short for delivery in deliveries):
            return False
        _clear_cancellation()
    if isinstance(error, DBAPIError):
        return not error.connection_invalidated
    return not isinstance(error, (KeyboardInterrupt, GeneratorExit))


def lost_a_race(error: DBAPIError) -> bool:
    """Whether running the transaction again may succeed: serialization failure, deadlock, SQLite's busy states."""
    state = getattr(error.orig, "sqlstate", None) or getattr(error.orig, "pgcode", None)
    if state in ("40001", "40P01"):
        return True
    return "database is locked" in str(error.orig)
