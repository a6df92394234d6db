"""The worker: takes lanes of the bus's subscriptions, reads the log for them, settles what their handlers have ended.

Lanes that stand at the same place are read together: each event is fetched and decoded once. A lane that falls behind
reads by itself until it has caught up. Whatever has ended is settled in one statement for all lanes; a delivery keeps
its place among those in flight until that is committed, so a crash repeats no more than `in_flight` calls.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from asyncio import CancelledError, Event, Semaphore, Task
from collections import deque
from collections.abc import Awaitable, Callable, Collection, Coroutine, Iterable, Sequence
from contextvars import Context
from datetime import timedelta
from functools import partial
from typing import Any, Final, TypeVar
from uuid import UUID

from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, ProgrammingError, StatementError
from sqlalchemy.ext.asyncio import AsyncConnection

from whereupon._dispatch import Runner
from whereupon.codec import Codec
from whereupon.errors import LeaseLost, PlaceLost
from whereupon.event import DomainEvent
from whereupon.lane import FULL, Delivery, Lane, Logged, Share
from whereupon.lease import Lease
from whereupon.logs import Logger, message_of
from whereupon.observer import Observing
from whereupon.retention import MINUTE, Upkeep
from whereupon.store import Cursor, LaneKey, LaneState, Layout, Move, Page, Remembered, Row, Store
from whereupon.subscription import Subscription

T = TypeVar("T")

PAGE: Final = 500
"""Events read at a time."""
TURN: Final = 64
"""Handlers begun in one turn of the event loop, at most."""
LONG: Final = 1.0
"""Seconds after which a delivery becomes an exception, so that the cursor need not wait for it."""
UNSAVED: Final = 60.0
"""Seconds for which a cursor that passed only what its subscription does not hear may stay unsaved."""
LONGEST_PAUSE: Final = 5.0
"""Seconds between two tries to reach a database that is away, at most."""
LAST_WORDS: Final = 3.0
"""Seconds that a worker which was told to stop takes to write down what has ended."""
PATIENCE: Final = 0.1
"""Seconds that the reading of all waits for a lane that is full, before it goes on without that."""
RECENT: Final = 4
"""Pages kept for lanes that are about to catch up."""


class Worker:
    """Delivers for the subscriptions of one bus, on one event loop, under the identity of its lease."""

    def __init__(
        self,
        store: Store,
        subscriptions: Iterable[Subscription],
        *,
        lanes: dict[str, int],
        codec: Codec,
        class_of: Callable[[str], type[DomainEvent] | None],
        logger: Logger,
        handler_logger: Any,
        in_flight: int,
        lease: float,
        poll_interval: float,
        retain: timedelta | None = None,
        observing: Observing | None = None,
    ) -> None:
        self.store = store
        self.observing = observing
        """Who is told what becomes of deliveries, if anybody is."""
        self.shares = {subscription.name: Share(subscription) for subscription in subscriptions}
        for name, share in self.shares.items():
            share.count = lanes[name]
        self.replays: dict[tuple[str, int], Share] = {}
        """What the lanes of a replay share, by subscription and generation."""
        self._superseded: set[str] = set()
        """Subscriptions that a newer build has defined otherwise."""
        self.codec = codec
        self.class_of = class_of
        self.logger = logger
        self.handler_logger = handler_logger
        self.in_flight = in_flight
        self.free = in_flight
        """How many more deliveries may be in flight: begun and not settled."""
        self.poll_interval = poll_interval
        self.runner = Runner(contain_exits=True)
        self.connections = Semaphore(store.connections_for_handlers)
        """Handlers in transactions take turns for the connections of the application's pool."""
        self.lanes: dict[LaneKey, Lane] = {}
        self.stopping = False
        self.settled = Event()
        """Set whenever something was settled; whoever waits for it clears it."""
        self.lease = Lease(
            store.engine,
            lease,
            in_flight=in_flight,
            autocommit=store.may_autocommit,
            log=self.log,
            on_lost=self._lease_was_lost,
        )
        limits = [share.subscription.timeout for share in self.shares.values()]
        self.lease.allow(
            max((limit for limit in limits if limit is not None), default=0.0) if None not in limits else None
        )
        self._seconds = lease
        self.types = _types(self.shares.values())
        self._elsewhere: frozenset[str] | None = None
        """The subscriptions that other workers serve, too; None while that is not known."""
        self._heard: dict[str, list[Share]] = {}
        self.place: Any = None
        """How far the log was read for the lanes that are read together."""
        self._recent: deque[tuple[Any, Page, list[Logged]]] = deque(maxlen=RECENT)
        self._looks = 0
        """How often somebody said that there may be something new in the log."""
        self._seen = 0
        """How many of these looks the reading has answered to the end of the log."""
        self._wake = Event()
        self._moved = Event()
        self._tend_now = Event()
        self._tended = Event()
        self.following: list[Lane] = []
        """Lanes with parked deliveries that are to begin now."""
        self._ready: list[Lane] = []
        self._something_ready = Event()
        self._pump_due = False
        self._halting: set[str] = set()
        self._let_pass: set[tuple[str, int]] = set()
        """Events that a subscription was stopped in front of, until an operator had it go on."""
        self._careful: deque[tuple[Lane, Delivery]] = deque()
        self._careful_one: Task[None] | None = None
        self._suspected = 0
        """How many deliveries were put off to be run carefully."""
        self._turns = 0
        """Of `_pump`: each begins with another subscription and lane."""
        self.marked_alone = self._unmarking = False
        """Whether the process is stored as one that runs deliveries alone, and whether that is being taken back."""
        self._upkeep = Upkeep(store, retain=retain, log=self.log)
        self._unsure = False
        """Whether the lease had run out, and nobody has looked since which lanes are still held here."""
        self._waits_for_lease = False
        self._turn = asyncio.Lock()
        """Held while cursors are moved for handlers that don't do it themselves: never two of them at once."""
        self._tasks: set[Task[None]] = set()
        self._loops: list[Task[None]] = []

    @property
    def id(self) -> UUID:
        return self.lease.id

    async def start(self) -> None:
        self.store.separate()
        await self.lease.start()
        await self.store.serve(self.id, list(self.shares))
        for loop in (self._tend, self._watch, self._read, self._settle, self._sweep, self._keep_up):
            self._loops.append(self.spawn(self._persist(loop)))

    def spawn(self, coroutine: Coroutine[Any, Any, None], context: Context | None = None) -> Task[None]:
        # an empty context: what a request left in the starter's would otherwise be seen by every handler
        task = asyncio.get_running_loop().create_task(coroutine, context=Context() if context is None else context)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    def log(self, level: str, name: str, **details: Any) -> None:
        """Log; a logger that raises does not decide what becomes of a delivery."""
        try:
            getattr(self.logger, level)(name, **details)
        except Exception:
            logging.getLogger("whereupon").exception("the logger given to the bus raised at %s %r", name, details)

    # --- starting, draining, stopping -------------------------------------------------------------------------------

    def wake(self, types: Collection[str] | None = None, failed: Collection[str] | None = None) -> None:
        """Events of these stored types (None: any) were committed: look whether there is something new in the log.

        With them publishers write the exceptions of handlers that failed inside their transaction; `failed` are the
        names of those subscriptions, None where the publisher is another process.
        """
        if types is None or self.types is None or not self.types.isdisjoint(types):
            self.look()
            for lane in self.lanes.values():
                if lane.subscription.delivery == "in_transaction" and (failed is None or lane.name in failed):
                    lane.due = True
            self.pump()

    def others_wait(self, types: Collection[str]) -> bool:
        """Whether another worker may have to deliver events of these stored types."""
        if self._elsewhere is None:
            return True
        for name in self._elsewhere:
            share = self.shares.get(name)
            if share is None:  # a name that only they know
                return True
            hears = _types([share])
            if (hears is None or not hears.isdisjoint(types)) and len(share.lanes) < share.count:
                return True
        return False

    def look(self) -> None:
        self._looks += 1
        self._wake.set()

    async def drain(self) -> None:
        """Wait until every lane held here has found nothing left that can be delivered now."""
        await self._tended.wait()
        while not self.stopping:
            self.look()
            looks = self._looks
            while not self._drained(looks):  # noqa: ASYNC110 - it is made of too much for one event
                await asyncio.sleep(0.005)
            held = [lane.cursor for lane in self.lanes.values()]
            due = await self._with_database(partial(self.store.next_due, held)) if held else None
            if due is None or due > 0:
                if self._quiet():
                    return
            else:
                for lane in self.lanes.values():
                    lane.due = True
                self.pump()

    def _drained(self, looks: int) -> bool:
        return self.stopping or (self._seen >= looks and self._quiet())

    def _quiet(self) -> bool:
        return (
            not self._ready
            and not self._careful
            and self._careful_one is None
            and all(lane.quiet and lane.caught_up for lane in self.lanes.values())
        )

    async def stop(self, timeout: float) -> None:
        """Begin nothing more, let what runs end for `timeout` seconds, then cancel it and give the lanes back."""
        self.stopping = True
        for event in (self._tended, self._wake, self._moved, self._tend_now):
            event.set()
        await self._wait_for_deliveries(timeout)
        for lane in self.lanes.values():
            for delivery in list(lane.active):
                if not delivery.ended:
                    delivery.cancel()
        await self._wait_for_deliveries(LAST_WORDS)
        stuck = sorted(
            {lane.name for lane in self.lanes.values() if any(not (d.ended or d.parking) for d in lane.active)}
        )
        for task in [*self._loops, *self._tasks]:
            task.cancel()
        if self._tasks:
            _, left = await asyncio.wait(set(self._tasks), timeout=LAST_WORDS)
            if left or stuck:
                self.log(
                    "error",
                    "worker_stop_incomplete",
                    subscriptions=stuck,
                    error_message="handlers ignore their cancellation; they are left behind",
                )
        with contextlib.suppress(LeaseLost, *self.store.errors):  # leases run out by themselves
            async with asyncio.timeout(LAST_WORDS):
                await self._save_all()
                await self.store.release(self.id)
        await self.lease.stop()
        why = "the worker was stopped"
        self.runner.stop(why)
        self.runner.abandon(why)
        self.runner.close()
        self.lanes.clear()

    async def _save_all(self) -> None:
        """Write down how far the lanes are settled: one statement for all but those of handlers left behind."""
        lanes = list(self.lanes.values())
        free = [lane for lane in lanes if lane.idle and not lane.settling.locked()]
        async with contextlib.AsyncExitStack() as held:
            moves = []
            for lane in free:
                if (move := lane.unsaved()) is not None:
                    await held.enter_async_context(lane.settling)
                    moves.append(move)
            if moves:
                await self.store.settle(moves, self.id, [])
        for lane in lanes:
            if lane not in free:
                await lane.save()

    async def _wait_for_deliveries(self, timeout: float) -> None:
        """Wait until nothing is in flight, for so long at most."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and any(lane.active for lane in self.lanes.values()):
            self.settled.clear()
            await happens(self.settled, min(0.05, max(0.0, deadline - time.monotonic())))

    # --- the database -----------------------------------------------------------------------------------------------

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

    async def _with_database(self, call: Callable[[], Awaitable[T]]) -> T:
        """Repeat a call until the database answers."""
        failures = 0
        while True:
            try:
                return await call()
            except self.store.errors as error:
                failures += 1
                if self.stopping and failures > 3:
                    raise CancelledError from error
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

    # --- which lanes are ours ---------------------------------------------------------------------------------------

    def _lease_was_lost(self) -> None:
        self._unsure = True
        self._tend_now.set()

    async def _tend(self) -> None:
        """Take the lanes that are ours to serve and free, give up those that are others'."""
        unsure = self._unsure
        layout = await self.store.layout(list(self.shares))
        self._elsewhere = frozenset().union(*(names for worker, names in layout.workers if worker != self.id))
        if not self.stopping:
            await self._balance(layout)
        if unsure and any(worker == self.id for worker, _ in layout.workers):
            self._unsure = False
            self.pump()
        self._tended.set()
        # alone there is nothing to wait for
        alone = all(worker == self.id for worker, _ in layout.workers) and len(self.lanes) == len(layout.lanes)
        seldom = alone or self.store.hears_of_deaths
        await happens(self._tend_now, self._seconds / 3 if seldom else min(self._seconds / 3, 1.0))
        self._tend_now.clear()

    async def _balance(self, layout: Layout) -> None:
        mine = [worker for worker in layout.workers if worker[0] == self.id]
        if not mine:  # the lease ran out while this process stood still: it is being made anew
            return
        current = {state.key.subscription: self._is_current(state) for state in layout.lanes}
        serves = sorted(name for name, ours in current.items() if ours)
        if mine[0][1] != serves:  # the others leave room for those who serve a subscription, and only for them
            await self.store.serve(self.id, serves)
        known = {state.key for state in layout.lanes}
        for gone in [lane for key, lane in self.lanes.items() if key not in known]:
            self.lose(gone)  # its subscription was retired
        wanted: list[LaneState] = []
        groups: dict[tuple[str, int], list[LaneState]] = {}
        for state in layout.lanes:
            groups.setdefault((state.key.subscription, state.key.generation), []).append(state)
        for (name, generation), lanes in groups.items():
            share = self._share_of(lanes[0].key, lanes[0].rate)
            # an operator changes their number while nobody holds one; none of the new ones has a token seen before
            share.count, share.registered_at = len(lanes), lanes[0].registered_at
            held = []
            for state in lanes:
                lane = self.lanes.get(state.key)
                if lane is None:
                    continue
                if state.token != lane.cursor.token:
                    self.lose(lane)
                elif state.paused:
                    self._release(lane)
                else:
                    held.append(lane)
            if not current[name]:
                continue
            serving = [worker for worker, serves in layout.workers if name in serves or worker == self.id]
            ours = _fair_share(f"{name}{generation or ''}", len(lanes), serving, self.id)
            for lane in held[ours:]:
                self._release(lane)
            missing = ours - len(held)
            free = [
                lane
                for lane in lanes
                if not lane.paused and lane.key not in self.lanes and (lane.owner in (None, self.id) or not lane.alive)
            ]
            if missing > 0:
                wanted += free[:missing]
        if wanted:
            await self._claim(wanted)

    def _share_of(self, key: LaneKey, rate: float | None = None) -> Share:
        live = self.shares[key.subscription]
        if not key.generation:
            return live
        share = self.replays.get((key.subscription, key.generation))
        if share is None:
            share = self.replays[key.subscription, key.generation] = Share(live.subscription, rate)
        return share

    def _is_current(self, state: LaneState) -> bool:
        """Whether no newer build has defined the subscription otherwise; else its lanes are left to that."""
        name = state.key.subscription
        share = self.shares[name]
        if state.definition == share.definition:
            self._superseded.discard(name)
            return True
        if name not in self._superseded:
            self._superseded.add(name)
            self.log(
                "error",
                "subscription_superseded",
                subscription=name,
                worker=str(self.id),
                error_message=f"another build serves it as {state.definition}, this one knows it as "
                f"{share.definition}: its events wait for a worker of that build. If this is the build to go on with, "
                f"run `whereupon handlers adopt`",
            )
        return False

    async def _claim(self, wanted: Sequence[LaneState]) -> None:
        seen = {lane.key: lane for lane in wanted}
        for cursor in await self.store.claim(wanted, self.id):
            before = seen[cursor.key]
            suspects = 0
            if cursor.crashes and not before.alone:
                # what ended it was in flight; where those of a key wait behind each other it may be far behind the
                # cursor, so that each time it is not found among the first, more of them are run carefully
                suspects = min((before.in_flight or self.in_flight) * 2 ** (cursor.crashes - 1), FULL + PAGE)
            self._take(cursor, suspects, before)

    def _take(self, cursor: Cursor, careful: int, before: LaneState) -> None:
        share = self._share_of(cursor.key)
        lane = self.lanes[cursor.key] = share.lanes[cursor.key.lane] = Lane(self, share, cursor, careful)
        if careful or before.alone:
            self._look_for_due(lane)  # what an earlier owner has recorded as running is looked at first
        if before.last is not None:
            lane.last, lane.gathering = before.last, False
            lane.start_reading()
            self.pump()
            return
        if self.place is None or not any(other.attached for other in self.lanes.values()):
            self.place = cursor.place if self.place is None else max_place(self.store, self.place, cursor.place)
            self._recent.clear()
        if not self._attach(lane):
            lane.start_reading()
        self.look()
        self.pump()

    def _release(self, lane: Lane) -> None:
        """Give a lane up for another worker, once nothing of it is in flight."""
        if not lane.releasing:
            lane.releasing = True
            lane.attached = False
            lane.share.lanes.pop(lane.cursor.key.lane, None)
            lane.share.withdraw(lane)
            self._careful = deque(one for one in self._careful if one[0] is not lane)
            self.spawn(self._hand_over(lane))

    async def _hand_over(self, lane: Lane) -> None:
        while not (lane.idle or lane.lost):
            self.settled.clear()
            await happens(self.settled, 0.05)
        if lane.lost:
            return
        try:
            async with self._turn:
                await self._with_database(lane.save)
            await self._with_database(lambda: self.store.release(self.id, [lane.cursor.key]))
        except LeaseLost:
            self.lose(lane)
            return
        except Exception as error:
            self.lose(lane, error)
            return
        lane.end()
        if self.lanes.get(lane.cursor.key) is lane:  # and not what was claimed anew while this was told
            del self.lanes[lane.cursor.key]

    def lose(self, lane: Lane, error: BaseException | None = None) -> None:
        """Give a lane up: another worker has it, or something unforeseen happened in it."""
        if lane.lost:
            return
        lane.end()
        lane.attached = False
        if self.lanes.get(lane.cursor.key) is lane:
            del self.lanes[lane.cursor.key]
        if lane.share.lanes.get(lane.cursor.key.lane) is lane:
            del lane.share.lanes[lane.cursor.key.lane]
        self._ready = [other for other in self._ready if other is not lane]
        self._careful = deque(one for one in self._careful if one[0] is not lane)
        self._tend_now.set()
        self.pump()
        details = {"subscription": lane.name, "lane": lane.cursor.key.lane, "worker": str(self.id)}
        if error is None:
            what = "another worker took over; what was not committed is delivered by that one"
            self.log("warning", "worker_lease_lost", **details, error_message=what)
        elif isinstance(error, PlaceLost):
            self.log("warning", "worker_place_lost", **details, error_message=message_of(error))
        else:
            details["error_type"] = type(error).__name__
            what = f"{message_of(error)} (the lane is given up, and taken again)"
            self.log("error", "worker_lane_failed", **details, error_message=what, exc_info=error)

    # --- reading ----------------------------------------------------------------------------------------------------

    async def _watch(self) -> None:
        """Hear of what other processes published, of exceptions that are due, of workers that come and go."""
        pulse = await self.store.pulse(self.id, list(self.shares))
        if pulse.restless:
            self._tend_now.set()
        for key in pulse.due:
            if (lane := self.lanes.get(key)) is not None:
                lane.due = True
                self.pump()
        if pulse.grown:
            self.look()
        await asyncio.sleep(self.poll_interval)

    async def _read(self) -> None:
        """Read for all lanes that stand at the same place."""
        self._wake.clear()
        if self.place is None or self.stopping or not any(lane.attached for lane in self.lanes.values()):
            if not self.lanes and self._tended.is_set():
                self._seen = self._looks
            await self._wake.wait()
            if self.stopping:
                await asyncio.Event().wait()
            if self.place is None or not any(lane.attached for lane in self.lanes.values()):
                await asyncio.sleep(0.01)
            return
        await self._gather()
        looks = self._looks
        before = self.place
        try:
            page = await self.store.read(before, None if self.types is None else sorted(self.types), PAGE)
        except PlaceLost as error:
            self._begin_again(error)
            return
        logged = [Logged(row, page.window) for row in page.rows]
        await self._make_room()
        if self.place != before:  # taken elsewhere meanwhile, by the first of new lanes
            return
        self._distribute(before, page, logged)
        if page.complete:
            self._seen = looks
            if self._looks == looks and not self.stopping:
                await self._wake.wait()

    async def _gather(self) -> None:
        """Give new lanes a moment to come to the place that the others are read from."""
        deadline = time.monotonic() + PATIENCE
        while time.monotonic() < deadline and any(lane.gathering for lane in self.lanes.values()):  # noqa: ASYNC110
            await asyncio.sleep(0.002)

    async def _make_room(self) -> None:
        """Wait for lanes that are full; those that stay so read by themselves from here on."""
        deadline = time.monotonic() + PATIENCE
        while not self.stopping:
            full = [lane for lane in self.lanes.values() if lane.attached and len(lane.order) >= FULL]
            if not full:
                return
            rest = [lane for lane in self.lanes.values() if lane.attached and len(lane.order) < FULL]
            if rest and time.monotonic() >= deadline:
                for lane in full:
                    lane.start_reading()
                return
            full[0].room.clear()
            await happens(full[0].room, 0.02)

    def _distribute(self, before: Any, page: Page, logged: list[Logged]) -> None:
        """Offer what was read to the lanes that are read together, and move them on."""
        for one in logged:
            for share in self._hearing(one.row.type):
                if share.subscription.ordered_by is None:
                    lane = share.lanes.get(one.row.position % share.count)
                    if lane is not None and lane.attached:
                        lane.offer(one, None)
                elif share.lanes and (found := self._lane_for(share, one)) is not None and found[0].attached:
                    found[0].offer(one, found[1])
        self.place = page.after
        for lane in self.lanes.values():
            if lane.attached:
                lane.read_to(page.after)
        if logged:
            self._recent.append((before, page, logged))
            self.pump()
        else:
            self._recent.clear()
        self._moved.set()

    def _lane_for(self, share: Share, logged: Logged, reader: Lane | None = None) -> tuple[Lane, str | None] | None:
        """The lane held here that an event belongs to, with its key; `reader` reads it alone, else all attached do.

        Where the key can't be read, what follows could be of the same one: the subscription stops in front of it.
        """
        try:
            key = share.key_of(logged, self)
            number = share.lane_for(logged, key)
        except Exception as error:
            live = share is self.shares.get(share.subscription.name)
            if live and (share.subscription.name, logged.row.position) not in self._let_pass:
                self._halt(share, logged, error, reader)
                return None
            # an operator had it go on: the first lane keeps the event as a dead letter
            key, number = None, 0
        lane = share.lanes.get(number)
        return None if lane is None else (lane, key)

    def _halt(self, share: Share, logged: Logged, error: Exception, reader: Lane | None) -> None:
        """Stop in front of an event; the subscription is paused, so that somebody looks at it."""
        # of one that reads alone the others are somewhere else: to say that they had read up to here would lose events
        at_it = [lane for lane in share.lanes.values() if (lane.attached if reader is None else lane is reader)]
        if not at_it:
            return  # they are still on their way
        for lane in list(share.lanes.values()):
            if lane in at_it:
                lane.read_to(self.store.within(logged.window, logged.row.position - 1))
            self._release(lane)
        if share.subscription.name not in self._halting:
            self._halting.add(share.subscription.name)
            self.spawn(self._pause_before(share.subscription, logged.row, error))

    async def _pause_before(self, subscription: Subscription, row: Row, error: Exception) -> None:
        name = subscription.name
        reason = (
            f"{row.type} {row.event_id} at position {row.position} can't be read, and nothing else tells which "
            f"{subscription.ordered_by} it is of, so what follows could pass it ({message_of(error)}). Deploy a build "
            "that can read it and resume; resumed without one, it becomes a dead letter and the rest goes on"
        )
        try:
            if await self._with_database(lambda: self.store.halt(name, row, reason)):
                self.log("error", "subscription_halted", subscription=name, worker=str(self.id), error_message=reason)
            else:
                self._let_pass.add((name, row.position))
        finally:
            self._halting.discard(name)
            self._tend_now.set()

    def _hearing(self, stored_type: str) -> list[Share]:
        found = self._heard.get(stored_type)
        if found is None:
            found = self._heard[stored_type] = [
                share for share in self.shares.values() if (types := _types([share])) is None or stored_type in types
            ]
        return found

    def _attach(self, lane: Lane) -> bool:
        """Have it read with the others, if it stands where they do or did a moment ago."""
        if lane.read_place == self.place:
            lane.attached = True
        else:
            for number, (before, _, _) in enumerate(self._recent):
                if before == lane.read_place:
                    for _, page, logged in list(self._recent)[number:]:
                        self._offer_mine(lane, logged)
                        if lane.releasing:
                            return False
                        lane.read_to(page.after)
                    lane.attached = True
                    break
        if lane.attached:
            lane.gathering = False
        return lane.attached

    def _offer_mine(self, lane: Lane, logged: Iterable[Logged]) -> None:
        for one in logged:
            if self.shares[lane.name] in self._hearing(one.row.type):
                found = self._lane_for(lane.share, one, lane)
                if lane.releasing:
                    return
                if found is not None and found[0] is lane:
                    lane.offer(one, found[1])
        self.pump()

    def _goes_on(self, lane: Lane) -> bool:
        return not (self.stopping or lane.lost or lane.releasing)

    async def catch_up(self, lane: Lane) -> None:
        """Read for one lane until it stands where the others do."""
        types = self._types_of(lane)
        failures = 0
        while self._goes_on(lane):
            if self._attach(lane):
                self.look()
                return
            if len(lane.order) >= FULL:
                lane.gathering = False
                lane.room.clear()
                await lane.room.wait()
                continue
            toward = self._place_beyond(lane)
            if toward is None and not lane.gathering:  # it is ahead of the others: they come here soon, as a rule
                self._moved.clear()
                self.look()
                await happens(self._moved, self.poll_interval)
                toward = self._place_beyond(lane)
                if self._attach(lane):
                    return
            try:
                page = await self.store.read(lane.read_place, types, PAGE, toward=toward)
            except PlaceLost as error:
                self._begin_again(error)
                return
            except self.store.errors as error:
                failures += 1
                await self.pause_after(error, failures)
                continue
            failures = 0
            if not self._goes_on(lane):
                return
            self._offer_mine(lane, [Logged(row, page.window) for row in page.rows])
            if lane.releasing:
                return
            lane.read_to(page.after)
            lane.gathering = False

    def _place_beyond(self, lane: Lane) -> Any:
        """Where the others are, if that is further than this lane is."""
        return self.place if self.place is not None and self.store.is_later(self.place, lane.read_place) else None

    def _begin_again(self, error: PlaceLost) -> None:
        """Nothing that was read is good any more: take all lanes anew, from where they are settled."""
        self.place = None
        self._recent.clear()
        for lane in list(self.lanes.values()):
            self.lose(lane, error)

    async def replay(self, lane: Lane) -> None:
        """Read for a lane of a replay up to its last event."""
        assert lane.last is not None
        failures = 0
        while self._goes_on(lane) and lane.read_place != self.store.finished:
            if len(lane.order) >= FULL:
                lane.room.clear()
                await lane.room.wait()
                continue
            try:
                page = await self.store.read(lane.read_place, self._types_of(lane), PAGE)
            except PlaceLost as error:
                self._begin_again(error)
                return
            except self.store.errors as error:
                failures += 1
                await self.pause_after(error, failures)
                continue
            failures = 0
            if not self._goes_on(lane):
                return
            self._offer_mine(lane, [Logged(row, page.window) for row in page.rows if row.position <= lane.last])
            over = self.store.reaches(page.after, lane.last)
            lane.read_to(self.store.finished if over else page.after)
        self.settled.set()

    @staticmethod
    def _types_of(lane: Lane) -> list[str] | None:
        types = _types([lane.share])
        return None if types is None else sorted(types)

    # --- running ----------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Begin what may begin, with the next turn of the loop."""
        if not self._pump_due:
            self._pump_due = True
            asyncio.get_running_loop().call_soon(self._pump, context=Context())

    def pump_in(self, seconds: float) -> None:
        asyncio.get_running_loop().call_later(seconds, self.pump)

    def _pump(self) -> None:
        self._pump_due = False
        if self.stopping:
            if self.lease.is_held and not self._unsure:
                self._begin_followers()
            return
        if self._unsure or not self.lease.is_held:
            # after standing still: what waits here may have been begun, and done, by another worker
            if not self._waits_for_lease:
                self._waits_for_lease = True
                asyncio.get_running_loop().call_later(0.05, self._look_at_the_lease)
            return
        if self.following:
            self._begin_followers()
        if self.is_careful:
            self._begin_careful()
            return
        if self.marked_alone:
            if not self._unmarking:
                self._unmarking = True
                self.spawn(self._unmark_alone())
            return
        # where there is more to do than can be done, each subscription is the first to be served in its turn; and of
        # suspects those of each in turn: whichever has the culprit, it is found soon
        self._turns += 1
        for lane in _in_turn(list(self.lanes.values()), self._turns):
            if self.free <= 0:
                break
            if lane.due:
                self._look_for_due(lane)
        left = TURN
        begun = True
        shares = _in_turn([*self.shares.values(), *self.replays.values()], self._turns + self._suspected)
        while begun and left > 0 and self.free > 0 and not self._careful:
            begun = False
            for share in shares:
                if share.queue:
                    number = share.begin_some(self, min(16, left))
                    left -= number
                    begun = begun or number > 0
                    if left <= 0 or self.free <= 0 or self._careful:
                        break
        if left <= 0 and self.free > 0:
            self.pump()

    def _begin_followers(self) -> None:
        lanes, self.following = self.following, []
        for lane in lanes:
            lane.begin_followers()

    def _look_for_due(self, lane: Lane) -> None:
        if room := lane.room_for_due():
            self.spawn(self._take_due(lane, room))

    async def _take_due(self, lane: Lane, room: int) -> None:
        try:
            await lane.take_due(room)
        except LeaseLost:
            self.lose(lane)
        except self.store.errors as error:
            lane.due = True
            await self.pause_after(error, 1)
            self.pump()
        except Exception as error:
            self.lose(lane, error)
        else:
            self.pump()  # for lanes that found no room left, and for this one if something has come due meanwhile
            if not (lane.due or lane.active):
                self.settled.set()

    def _look_at_the_lease(self) -> None:
        self._waits_for_lease = False
        self.pump()

    # --- carefully --------------------------------------------------------------------------------------------------

    def later_carefully(self, lane: Lane, delivery: Delivery) -> None:
        """Take over a delivery that may have ended a worker before."""
        lane.set_aside.add(delivery.position)
        self._suspected += 1
        if delivery.exceptional:  # it was recorded as running: the first to be suspected
            self._careful.insert(sum(one.exceptional for _, one in self._careful), (lane, delivery))
        else:
            self._careful.append((lane, delivery))
        self.pump()

    @property
    def is_careful(self) -> bool:
        """Whether deliveries are run one at a time."""
        return self._careful_one is not None or bool(self._careful)

    async def mark_alone(self, connection: AsyncConnection) -> None:
        """Store, in this transaction, that nothing runs here but what is recorded as running alone."""
        if not self.marked_alone:
            await self.store.mark_alone(connection, self.id, True)

    async def _unmark_alone(self) -> None:
        async def unmark() -> None:
            async with self.store.writing() as connection:
                await self.store.mark_alone(connection, self.id, False)

        try:
            await self._with_database(unmark)
            self.marked_alone = False
        finally:
            self._unmarking = False
            self.pump()

    def _begin_careful(self) -> None:
        """Run the next of them once nothing else runs: an attempt that ran alone is to blame if the process ends."""
        if self._careful_one is None and self.free == self.in_flight:
            lane, delivery = self._careful.popleft()
            self._careful_one = self.spawn(self._carefully(lane, delivery))

    async def _carefully(self, lane: Lane, delivery: Delivery) -> None:
        try:
            await self._with_database(lambda: lane.record_alone(delivery))
            if not lane.lost and not self.stopping:
                delivery.waiter = asyncio.get_running_loop().create_future()
                lane.begin_now(delivery)
                await delivery.waiter
        except LeaseLost:
            self.lose(lane)
        except Exception as error:
            self.lose(lane, error)
        finally:
            self._careful_one = None
            self.pump()

    # --- settling ---------------------------------------------------------------------------------------------------

    def to_settle(self, lane: Lane) -> None:
        """The first delivery of this lane has ended since it was settled."""
        self._ready.append(lane)
        self._something_ready.set()

    def has_stored(self) -> None:
        """Deliveries were settled by their own transactions."""
        self.settled.set()
        self.pump()

    async def _settle(self) -> None:
        await self._something_ready.wait()
        async with self._turn:
            await self._settle_ready()
        self.settled.set()
        self.pump()

    async def _settle_ready(self) -> None:
        self._something_ready.clear()
        ready, self._ready = self._ready, []
        plain = {lane: lane.take_ready() for lane in ready if lane.plain and not lane.lost}
        if plain:
            await self._settle_plain(plain)
        for lane in ready:
            if lane not in plain:
                await self._settle_lane(lane, lane.take_ready())

    async def _settle_plain(self, ended: dict[Lane, list[Delivery]]) -> None:
        """Settle what has succeeded at the first attempt, for all lanes in one statement."""
        failures = 0
        held: set[LaneKey] | None = None
        moves: list[Move] = []
        while held is None:
            ended = {lane: batch for lane, batch in ended.items() if not lane.lost}
            if not ended:
                return
            moves = [lane.plan(batch) for lane, batch in ended.items()]
            try:
                held = await self.store.settle(moves, self.id, self.remembered(ended.items()))
            except self.store.errors as error:
                failures += 1
                if self.stopping and failures > 3:
                    raise CancelledError from error
                await self.pause_after(error, failures)
            except Exception as error:
                for lane in ended:  # else nobody would settle these any more, nor give their places back
                    self.lose(lane, error)
                return
        for (lane, batch), move in zip(ended.items(), moves, strict=True):
            if lane.lost:
                continue
            if lane.cursor.key in held:
                lane.settle(batch, move)
            else:
                self.lose(lane)

    async def _settle_lane(self, lane: Lane, batch: list[Delivery], running: Sequence[Delivery] = ()) -> None:
        if lane.lost:
            return
        try:
            await self._with_database(lambda: lane.commit(batch, running))
        except LeaseLost:
            self.lose(lane)
            return
        except CancelledError:
            raise
        except Exception as error:
            self.lose(lane, error)
            return
        for delivery in batch:
            if delivery.failure is not None and delivery.failure.next_in is not None:
                self._due_in(lane, delivery.failure.next_in)
        if lane.due:
            self.pump()

    def _due_in(self, lane: Lane, seconds: float) -> None:
        def now() -> None:
            lane.due = True
            self.pump()

        asyncio.get_running_loop().call_later(min(seconds + 0.001, 3600.0), now)

    def remembered(self, ended: Iterable[tuple[Lane, Sequence[Delivery]]]) -> list[Remembered]:
        """What was done, for the history: one row for each subscription."""
        entries: dict[tuple[str, int], list[Any]] = {}
        for lane, batch in ended:
            calls = [d.entry() for d in batch if not d.parking and not d.stored]
            if calls:
                entries.setdefault((lane.name, lane.cursor.key.generation), []).extend(calls)
        return [Remembered(*key, calls) for key, calls in entries.items()]

    async def _sweep(self) -> None:
        """What is not urgent: exceptions for what runs long, idle cursors."""
        await asyncio.sleep(LONG / 4)
        async with self._turn:
            await self._sweep_lanes()

    async def _sweep_lanes(self) -> None:
        now = time.perf_counter()
        for lane in list(self.lanes.values()):
            if not lane.lost and (running := lane.long_running(now, LONG)):
                await self._settle_lane(lane, [], running)
        for lane in list(self.lanes.values()):
            if lane.cursor.crashes and self._has_outlived_suspects(lane):
                await self.store.calm(lane.cursor)
                lane.cursor.crashes = lane.careful = 0
        for lane in list(self.lanes.values()):
            if lane.unsaved_since is not None and time.monotonic() - lane.unsaved_since > UNSAVED:
                try:
                    await lane.save()
                except LeaseLost:
                    self.lose(lane)

    def _has_outlived_suspects(self, lane: Lane) -> bool:
        """Whether what may have ended earlier owners of a lane was run, or was nothing of it."""
        if time.monotonic() - lane.since <= self._seconds or self.is_careful:
            return False
        return not lane.order or not (lane.careful or any(delivery.careful for delivery in lane.share.queue))

    async def _keep_up(self) -> None:
        await self._upkeep.turn()
        await asyncio.sleep(MINUTE)


async def happens(event: Event, within: float) -> None:
    """Wait for it, so many seconds at most. (`wait_for` of Python 3.11 may swallow a cancellation.)"""
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(within):
            await event.wait()


def max_place(store: Store, one: Any, other: Any) -> Any:
    return one if store.is_later(one, other) else other


def _in_turn(all_: list[T], turn: int) -> list[T]:
    """The same, but another one each time comes first."""
    if not all_:
        return all_
    first = turn % len(all_)
    return all_[first:] + all_[:first]


def _types(shares: Iterable[Share]) -> frozenset[str] | None:
    """The stored types that these subscriptions hear; None for all."""
    names: set[str] = set()
    for share in shares:
        if DomainEvent in share.subscription.event_types:
            return None
        for cls in share.subscription.event_types:
            names.update((cls.__event__.name, *cls.__event__.aliases))
    return frozenset(names)


def _fair_share(name: str, lanes: int, workers: Sequence[UUID], me: UUID) -> int:
    """How many lanes of a subscription are mine: they are dealt out, from a worker on that depends on its name."""
    order = sorted(workers)
    turn = (order.index(me) + sum(name.encode())) % len(order)
    return lanes // len(order) + (turn < lanes % len(order))


def _is_refusal(error: Exception) -> bool:
    """Whether the database answered, but will not do what was asked of it: waiting alone mends nothing."""
    if isinstance(error, (ProgrammingError, IntegrityError, DataError)):
        return True
    cause = error.orig if isinstance(error, DBAPIError) else error
    if "sqlite" in type(cause).__module__:  # which has one class for what will pass and for what will not
        return not any(passing in str(cause) for passing in _PASSING)
    return isinstance(error, StatementError)


_PASSING: Final = ("locked", "full", "disk I/O", "unable to open", "interrupted")
