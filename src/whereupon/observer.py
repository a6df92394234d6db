"""What others are told of a bus: one small interface, on which metrics and traces are built, and whatever you need.

A bus without an observer asks once whether there is one. What an observer raises is logged once for each kind of error
and otherwise ignored: it decides nothing about a delivery. It is called on the event loop, between handlers, so it must
not wait for anything.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final
from uuid import UUID

import msgspec

from whereupon.context import Metadata
from whereupon.errors import Discard
from whereupon.event import DomainEvent
from whereupon.logs import Logger, message_of, trace_of
from whereupon.subscription import Subscription

if TYPE_CHECKING:
    from whereupon.workflow import Attempt

SUCCEEDED: Final = "succeeded"
FAILED: Final = "failed"
"""It raised, and is not tried again: AFTER_COMMIT, the bus in memory, and a required handler that refuses a change."""
INTERRUPTED: Final = "interrupted"
"""Cut short by a stop, or by the loss of its lease; another worker begins it again, and no attempt is used."""


class Publication(msgspec.Struct, eq=False):
    """An event on its way into the log."""

    event: DomainEvent
    metadata: Metadata
    """What is stored beside the event; an observer may replace it in `publishing`."""
    error: BaseException | None = None
    """What `publish` raises, once that is known."""
    states: list[Any] = []


class Run(msgspec.Struct, eq=False):
    """One call of a handler, or the end of a delivery that came without one."""

    subscription: Subscription
    event_id: UUID
    event_type: str
    """The name the event is stored under."""
    metadata: Metadata
    attempt: int = 1
    generation: int = 0
    """0, or the number of the replay that it belongs to."""
    recorded_at: datetime | None = None
    """When the event was written into the log, by the database's clock; None where it was not read from there."""
    inline: bool = False
    """Whether it runs in the context of whoever calls it, and not in one of its own."""
    together: int = 1
    """How many deliveries share its transaction."""
    called: bool = True
    """Whether the handler was called: not for an event that can't be read, a crash loop, an audit record."""
    began: float = 0.0
    """Seconds from 1970, by this machine's clock."""
    seconds: float = 0.0
    outcome: str = ""
    """`succeeded`, `failed`, `interrupted`, or the state of an exception: retrying, waiting, dead, skipped."""
    error_type: str | None = None
    error_message: str | None = None
    traceback: str | None = None
    states: list[Any] = []

    def failed(self, error: BaseException, outcome: str) -> None:
        self.outcome = outcome
        self.error_type, self.error_message, self.traceback = type(error).__name__, message_of(error), trace_of(error)


class Observer:
    """Made to be inherited from: each method does nothing. Give it to a bus with `bus.observe(observer)`.

    Only methods that are overridden are called. `ended` is called as soon as a call is over and its outcome is known,
    `settled` for what is committed, many at once: an outcome that was told by `ended` alone may happen again.
    """

    def publishing(self, publication: Publication) -> Any:
        """`publish` is called with this event, and has not encoded it yet; what is returned `staged` gets."""

    def staged(self, publication: Publication, state: Any) -> None:
        """The event is part of the transaction now, or `publication.error` says why it is not."""

    def published(self, events: Sequence[DomainEvent]) -> None:
        """The transaction that these were staged in is known to be committed. May be called on any thread."""

    def started(self, run: Run) -> Any:
        """A handler is about to be called, in the context that this runs in; what is returned `ended` gets."""

    def ended(self, run: Run, state: Any) -> None:
        """The call is over."""

    def settled(self, runs: Sequence[Run]) -> None:
        """What became of these deliveries is committed."""

    def attempting(self, attempt: Attempt[Any, Any]) -> Any:
        """The block of a workflow is entered, in this context; what is returned `left` gets."""

    def left(self, attempt: Attempt[Any, Any], error: BaseException | None, state: Any) -> None:
        """The block of a workflow was left."""

    def opened(self, workflow: str) -> None:
        """*Attempted* is committed."""

    def closed(self, workflow: str, outcome: str) -> None:
        """An attempt's outcome is committed: `succeeded`, `failed` or `interrupted`."""


class Observing:
    """The observers of one bus."""

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._all: list[Observer] = []
        self._seen: set[tuple[type, str, type]] = set()
        self.watching = False
        """Whether somebody wants to know before each call of a handler."""
        self._settled: list[Observer] = []
        self._watching: list[Observer] = []
        self._publishing: list[Observer] = []
        self._published: list[Observer] = []

    def add(self, observer: Observer) -> None:
        if not isinstance(observer, Observer):
            raise TypeError(
                f"observe takes a whereupon.observer.Observer, not {observer!r}: inherit from it, and override what "
                "you want to be told"
            )
        self._all.append(observer)
        self._settled = self._who("settled")
        self._watching = self._who("started", "ended")
        self._publishing = self._who("publishing", "staged")
        self._published = self._who("published")
        self.watching = bool(self._watching)

    def __iter__(self) -> Iterator[Observer]:
        return iter(self._all)

    def _who(self, *names: str) -> list[Observer]:
        return [
            observer
            for observer in self._all
            if any(getattr(type(observer), name) is not getattr(Observer, name) for name in names)
        ]

    def _tell(self, observer: Observer, hook: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return hook(*arguments)
        except KeyboardInterrupt:
            raise
        except BaseException as error:
            self._failed(observer, hook.__name__, error)
            return None

    def _failed(self, observer: Observer, hook: str, error: BaseException) -> None:
        kind = (type(observer), hook, type(error))
        if kind in self._seen:
            return
        self._seen.add(kind)
        details = {
            "observer": type(observer).__name__,
            "hook": hook,
            "error_type": type(error).__name__,
            "error_message": f"{message_of(error)} (said once; what it missed is not made up for)",
        }
        try:
            self._logger.error("observer_failed", **details, exc_info=error if isinstance(error, Exception) else None)
        except Exception:
            logging.getLogger("whereupon").exception("the logger given to the bus raised at observer_failed")

    # --- publishing -------------------------------------------------------------------------------------------------

    def publishing(self, events: Sequence[DomainEvent], metadata: Metadata) -> list[Publication]:
        publications = []
        for event in events:
            publication = Publication(event, metadata)
            for observer in self._publishing:
                before = publication.metadata
                publication.states.append(self._tell(observer, observer.publishing, publication))
                if type(publication.metadata) is not Metadata:
                    self._failed(
                        observer,
                        "publishing",
                        TypeError(f"it left {type(publication.metadata).__name__} as metadata, which can't be stored"),
                    )
                    publication.metadata = before
            publications.append(publication)
        return publications

    def staged(self, publications: Sequence[Publication], error: BaseException | None = None) -> None:
        for publication in reversed(publications):
            publication.error = error
            for observer, state in zip(self._publishing, publication.states, strict=True):
                self._tell(observer, observer.staged, publication, state)

    def published(self, events: Sequence[DomainEvent]) -> None:
        for observer in self._published:
            self._tell(observer, observer.published, events)

    # --- handlers ---------------------------------------------------------------------------------------------------

    def start(self, run: Run) -> None:
        """Tell who watches; to be called in the context that the handler is to run in."""
        run.states = [self._tell(observer, observer.started, run) for observer in self._watching]

    def end(self, run: Run) -> None:
        """The counterpart of `start`."""
        for observer, state in zip(self._watching, run.states, strict=False):
            self._tell(observer, observer.ended, run, state)
        run.states = []

    def settle(self, runs: Sequence[Run]) -> None:
        if runs:
            for observer in self._settled:
                self._tell(observer, observer.settled, runs)

    @contextmanager
    def calling(self, run: Run) -> Iterator[None]:
        """A call in the current context. Whoever knows better than this what became of it says so in the block."""
        run.inline = True
        run.began = time.time()
        began = time.perf_counter()
        self.start(run)
        try:
            yield
        except BaseException as error:
            if not run.outcome:
                run.failed(error, "skipped" if isinstance(error, Discard) else FAILED)
            raise
        finally:
            run.outcome = run.outcome or SUCCEEDED
            run.seconds = time.perf_counter() - began
            self.end(run)

    # --- workflows --------------------------------------------------------------------------------------------------

    def attempting(self, attempt: Attempt[Any, Any]) -> list[Any]:
        return [self._tell(observer, observer.attempting, attempt) for observer in self._all]

    def left(self, attempt: Attempt[Any, Any], error: BaseException | None, states: list[Any]) -> None:
        for observer, state in zip(reversed(self._all), reversed(states), strict=False):
            self._tell(observer, observer.left, attempt, error, state)

    def opened(self, workflow: str) -> None:
        for observer in self._all:
            self._tell(observer, observer.opened, workflow)

    def closed(self, workflow: str, outcome: str) -> None:
        for observer in self._all:
            self._tell(observer, observer.closed, workflow, outcome)
