"""A workflow: one attempt at something, and its one outcome.

*Attempted* is there before the work starts; *Succeeded* is published with the work, in its transaction; *Failed* says
that nothing came of it. What a workflow is made of is written down once, and checked then.
"""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import enum
import sys
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextvars import ContextVar
from types import TracebackType
from typing import Any, Final, Generic, ParamSpec, TypeVar, overload
from uuid import UUID

import msgspec

from whereupon.context import handling
from whereupon.errors import EventDefinitionError, PublishError
from whereupon.event import DomainEvent, Outcome, ensure_resolved, is_event_class
from whereupon.observer import Observing

if typing.TYPE_CHECKING:
    from typing import Self

P = ParamSpec("P")
A = TypeVar("A", bound=DomainEvent)
S = TypeVar("S", bound=DomainEvent)

INTERRUPTED: Final = "interrupted"
"""The reason of an attempt whose process died, or stood still for longer than its lease."""
NOT_COMPLETED: Final = "not_completed"
"""The reason of an attempt whose block was left without an outcome, and without an exception."""
_LONGEST_REASON: Final = 200
_NOT_CARRIED: Final = ("event_id", "occurred_at", "reason")


class State(enum.StrEnum):
    """Where an attempt stands; all but OPEN are final."""

    OPEN = "open"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    INTERRUPTED = "interrupted"


class Workflow(Generic[P, A, S]):
    """The events of one attempt at something, made once, beside their classes.

        UserRegistration = Workflow(UserRegistrationAttempted, UserRegistrationSucceeded, UserRegistrationFailed)

    `failed` has a field `reason: str`; its other fields are taken from *Attempted*. `interrupted` is the class of the
    event that closes an attempt whose process died; by default it is `failed`, with the reason "interrupted".
    `unforeseen` is the reason for exceptions that have no `reason` of their own, by default the name of their type;
    what their message says is never stored. `name` is what operators see. Raises `EventDefinitionError` for classes
    that don't belong together.
    """

    def __init__(
        self,
        attempted: Callable[P, A],
        succeeded: type[S],
        failed: type[DomainEvent],
        *,
        interrupted: type[DomainEvent] | None = None,
        unforeseen: str | None = None,
        name: str | None = None,
    ) -> None:
        self._made = attempted
        self.attempted = typing.cast("type[A]", _checked(attempted, "first", Outcome.ATTEMPTED))
        self.succeeded = typing.cast("type[S]", _checked(succeeded, "second", Outcome.SUCCEEDED))
        self.failed = _checked(failed, "third", Outcome.FAILED)
        self.interrupted = self.failed if interrupted is None else _checked(interrupted, "interrupted=", Outcome.FAILED)
        stem = _stem(self.attempted)
        for cls in (self.succeeded, self.failed):
            if stem is not None and (other := _stem(cls)) is not None and other != stem:
                raise EventDefinitionError(
                    f"{self.attempted.__name__} and {cls.__name__} are of two workflows: an attempt has the outcomes "
                    f"{stem}Succeeded and {stem}Failed"
                )
        self.unforeseen = unforeseen
        self.name = name or stem or self.attempted.__event__.name
        _check_reason(self.failed)
        self._failed_fields = _carried(self.attempted, self.failed)
        self._interrupted_fields = _carried(self.attempted, self.interrupted)
        theirs, ours = ensure_resolved(self.attempted).types, ensure_resolved(self.succeeded).types
        self._succeeded_fields = [f for f, hint in theirs.items() if f not in _NOT_CARRIED[:2] and ours.get(f) == hint]
        self._interrupted_reason = "reason" in self.interrupted.__event__.fields
        if self._interrupted_reason:
            _check_reason(self.interrupted)
        _made.add(self)

    def __repr__(self) -> str:
        return f"<Workflow {self.name}>"

    def attempt_with(self, *args: P.args, **fields: P.kwargs) -> A:
        """*Attempted*, of these fields."""
        return self._made(*args, **fields)

    def success(self, attempted: A, fields: dict[str, Any]) -> S:
        """The *Succeeded* of an attempt; what it shares with *Attempted* is as it was there, unless given."""
        return self.succeeded(**_taken(attempted, self._succeeded_fields, **fields))

    def failure(self, attempted: A, reason: str) -> DomainEvent:
        return self.failed(**_taken(attempted, self._failed_fields, reason=reason))

    def interruption(self, attempted: A) -> DomainEvent:
        """The event that closes the attempt if its process dies."""
        reason = {"reason": INTERRUPTED} if self._interrupted_reason else {}
        return self.interrupted(**_taken(attempted, self._interrupted_fields, **reason))

    def state_of(self, event: DomainEvent) -> State | None:
        """The state that publishing this event brings an attempt to, or None for one that is no outcome of it."""
        if type(event) is self.succeeded:
            return State.SUCCEEDED
        return State.FAILED if type(event) is self.failed else None


_made: weakref.WeakSet[Workflow[Any, Any, Any]] = weakref.WeakSet()


def workflows() -> list[Workflow[Any, Any, Any]]:
    """The workflows that were made so far in this process, by name."""
    return sorted(_made, key=lambda workflow: (workflow.name, workflow.attempted.__event__.name))


class Attempt(abc.ABC, Generic[A, S]):
    """One attempt under way: what `async with bus.workflow(…) as attempt` gives. It is entered once."""

    def __init__(self, workflow: Workflow[Any, A, S], attempted: A) -> None:
        self.workflow = workflow
        self.attempted = attempted
        self._outer: Attempt[Any, Any] | None = None
        self._cause: object = None
        self._reason: str | None = None
        """Why it failed, once somebody said so."""
        self._observing: Observing | None = None
        self._watched: list[Any] = []

    def __repr__(self) -> str:
        return f"<Attempt {self.id} at {self.workflow.name}>"

    @property
    def id(self) -> UUID:
        """The id of the *Attempted* event, too."""
        return self.attempted.event_id

    @overload
    async def succeeded(self, event: S, /, *, session: Any = None) -> None: ...

    @overload
    async def succeeded(self, /, *, session: Any = None, **fields: Any) -> None: ...

    async def succeeded(self, event: S | None = None, /, *, session: Any = None, **fields: Any) -> None:
        """Publish *Succeeded* in the transaction of `session`: the attempt has succeeded if that commits.

        Takes the event, or its fields, less those that are as they were in *Attempted*. Raises `WorkflowClosedError`
        if the attempt has an outcome already; the session's transaction can't be committed then.
        """
        if event is None:
            event = self.workflow.success(self.attempted, fields)
        elif fields or type(event) is not self.workflow.succeeded:
            raise PublishError(
                f"succeeded takes one {self.workflow.succeeded.__name__}, or its fields: "
                f"attempt.succeeded(user_id=…, session=session), not {type(event).__name__}"
            )
        await self.publish_outcome((event,), session, None)

    async def failed(self, reason: str, *, session: Any = None) -> None:
        """Publish *Failed*, at once or in the transaction of `session`, and go on.

        If that transaction is rolled back, *Failed* is published with this reason when the block is left. The reason
        is stored and read by many: one word for machines, and no secret. Raises `WorkflowClosedError` if the attempt
        has an outcome already.
        """
        event = self.workflow.failure(self.attempted, reason)
        self._reason = reason
        await self.publish_outcome((event,), session, None)

    @abc.abstractmethod
    async def publish_outcome(self, events: tuple[DomainEvent, ...], session: Any, metadata: Any) -> Any:
        """Publish events of which one is this attempt's outcome; return the receipt."""

    @abc.abstractmethod
    async def _open(self) -> None:
        """Publish *Attempted*; once this has returned, the attempt comes to an outcome."""

    @abc.abstractmethod
    async def _leave(self, reason: str) -> None:
        """The block is left: publish *Failed*, unless there is an outcome."""

    def outcome_among(self, events: tuple[DomainEvent, ...]) -> tuple[DomainEvent, State] | None:
        """The event of these that closes this attempt, and the state that it closes it in."""
        found = [(event, state) for event in events if (state := self.workflow.state_of(event)) is not None]
        if len(found) > 1:
            raise PublishError(f"an attempt at {self.workflow.name} has one outcome, and here are {len(found)}")
        return found[0] if found else None

    async def __aenter__(self) -> Self:
        if self._observing is not None:
            self._watched = self._observing.attempting(self)
        try:
            await self._open()
        except BaseException as error:
            self._tell_left(error)
            raise
        self._outer, self._cause = _current.get(), handling.get()
        _current.set(self)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None, /
    ) -> None:
        _current.set(self._outer)
        try:
            await self._leave(
                self._reason or (NOT_COMPLETED if error is None else reason_of(error, self.workflow.unforeseen))
            )
        finally:
            self._tell_left(error)

    def _tell_left(self, error: BaseException | None) -> None:
        if self._observing is not None:
            self._observing.left(self, error, self._watched)


_current: ContextVar[Attempt[Any, Any] | None] = ContextVar("whereupon_attempt", default=None)


def attempt_closed_by(events: tuple[DomainEvent, ...]) -> Attempt[Any, Any] | None:
    """The attempt in whose block this runs, if one of these events is its outcome, whoever publishes it."""
    attempt = _current.get()
    while attempt is not None:
        # a handler that runs meanwhile is no part of the block, though it inherits its context
        if attempt._cause is handling.get() and attempt.outcome_among(events) is not None:
            return attempt
        attempt = attempt._outer
    return None


@contextlib.contextmanager
def outside_attempts() -> Iterator[None]:
    """In this block publishing an outcome is plain publishing."""
    token = _current.set(None)
    try:
        yield
    finally:
        _current.reset(token)


def reason_of(error: BaseException, unforeseen: str | None = None) -> str:
    """What a *Failed* may say of an exception: its own `reason`, or its type. Its message may hold anything.

    What the standard library calls the reason of an exception is a message, too.
    """
    reason = getattr(error, "reason", None)
    ours = type(error).__module__.partition(".")[0] not in sys.stdlib_module_names
    if ours and isinstance(reason, str) and reason.strip():
        return reason[:_LONGEST_REASON].replace("\x00", "\ufffd").encode("utf-8", "replace").decode()
    return unforeseen or type(error).__name__


def _taken(attempted: DomainEvent, names: Iterable[str], /, **given: Any) -> dict[str, Any]:
    return {name: getattr(attempted, name) for name in names} | given


def _checked(candidate: Any, place: str, outcome: Outcome) -> type[DomainEvent]:
    if not is_event_class(candidate) or candidate.__event__.abstract:
        raise EventDefinitionError(
            f"Workflow takes classes of events, and {candidate!r} ({place}) is none that can be published: "
            "Workflow(UserRegistrationAttempted, UserRegistrationSucceeded, UserRegistrationFailed)"
        )
    if candidate.__event__.outcome is not outcome:
        raise EventDefinitionError(
            f"{candidate.__name__} ({place}) stands for {candidate.__event__.outcome.value}, where a workflow needs "
            f"what stands for {outcome.value}: name it …{outcome.value.capitalize()}, or say "
            f"class {candidate.__name__}(DomainEvent, outcome=Outcome.{outcome.name})"
        )
    if outcome is not Outcome.SUCCEEDED and not candidate.__event__.stands_alone:
        raise EventDefinitionError(
            f"{candidate.__name__} is defined with stands_alone=False, but a workflow publishes it in a transaction "
            "of its own: leave that out"
        )
    return candidate


def _stem(cls: type[DomainEvent]) -> str | None:
    word = cls.__event__.outcome.value.capitalize()
    return cls.__name__.removesuffix(word) if cls.__name__.endswith(word) else None


def _check_reason(cls: type[DomainEvent]) -> None:
    hint = ensure_resolved(cls).types.get("reason")
    try:
        accepts = hint is not None and msgspec.convert("x" * _LONGEST_REASON, hint) == "x" * _LONGEST_REASON
    except msgspec.ValidationError:
        accepts = False
    if not accepts:
        raise EventDefinitionError(
            f"{cls.__name__} needs a field `reason: str`: an attempt may fail for reasons that nobody foresaw"
        )


def _carried(attempted: type[DomainEvent], cls: type[DomainEvent]) -> list[str]:
    """The fields that `cls` takes from *Attempted*; it must need no others."""
    theirs, ours = ensure_resolved(attempted).types, ensure_resolved(cls).types
    required = {
        field.name
        for field in dataclasses.fields(cls)
        if field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING
    }
    carried = []
    for name, hint in ours.items():
        if name in _NOT_CARRIED:
            continue
        if theirs.get(name) == hint:
            carried.append(name)
        elif name in required:
            why = "which has another type" if name in theirs else "which has no such field"
            raise EventDefinitionError(
                f"{cls.__name__}.{name} can't be taken from {attempted.__name__}, {why}: what happens after a failure "
                "or a crash knows the attempt alone. Give both the same field, or this one a default"
            )
    return carried
