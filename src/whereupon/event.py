"""Domain events: what a class must be to be one, and what whereupon knows of it.

Rules are checked where a class is defined, so that a wrong event fails at import and not in production.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
import types
import typing
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from typing import Annotated, Any, ClassVar, Final, Literal, NoReturn, TypeVar, dataclass_transform
from uuid import UUID

from uuid_utils.compat import uuid7

from whereupon import _past_tense
from whereupon.errors import EventDefinitionError

__all__ = ["DomainEvent", "EventDefinition", "NotSecret", "Outcome"]


class Outcome(enum.StrEnum):
    """Where an event stands in its workflow: taken from the last word of its name unless declared."""

    ATTEMPTED = "attempted"
    SUCCEEDED = "succeeded"
    FAILED = "failed"


@dataclass(frozen=True)
class NotSecret:
    """`Annotated[str, NotSecret("why")]`: this field only looks like a secret."""

    reason: str


@dataclass(frozen=True, slots=True)
class EventDefinition:
    """What a class declares of its events; found as `SomeEvent.__event__`."""

    name: str
    """The name it is stored under."""
    version: int
    aliases: tuple[str, ...]
    """Names it was stored under before."""
    snake_name: str
    """The name that log records carry: `user_registration_succeeded`."""
    category: str | None
    outcome: Outcome
    audit: str | None
    """The audit action, or None for an event that is not audited."""
    resource: str | None
    resource_id: str | None
    """The field that holds the audited resource's id."""
    stands_alone: bool
    """Whether it may be published without a session, in a transaction of its own."""
    abstract: bool
    fields: tuple[str, ...]
    freezing: tuple[str, ...]
    """Fields that may hold containers, frozen when the event is made."""
    checking: tuple[str, ...]
    """Fields that may hold a naive datetime or a number that is not finite, looked at before storing."""
    resolved: bool
    """False while an annotation names a type that is not defined yet."""
    source: types.CodeType | None = field(repr=False)


_SCALARS: Final[frozenset[object]] = frozenset(
    {str, int, float, bool, bytes, UUID, datetime, date, time, timedelta, Decimal, type(None)}
)
_TO_CHECK: Final[frozenset[object]] = frozenset({float, datetime, time, Decimal})
_SECRET = re.compile(
    r"(?:^|_)(?:password|passwd|passphrase|secret|credentials?|api_?key|private_key|(?:access|refresh|auth|bearer"
    r"|id|session|reset|verification|csrf)?_?token|otp|pin|cvv|cvc|hashed_password|password_hash)$"
)
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")

_by_name: weakref.WeakValueDictionary[str, EventType] = weakref.WeakValueDictionary()
_undecorated: weakref.WeakKeyDictionary[EventType, tuple[dict[str, Any], frozenset[str]]] = weakref.WeakKeyDictionary()


def _now() -> datetime:
    return datetime.now(UTC)


@dataclass_transform(kw_only_default=True, frozen_default=True, field_specifiers=(field,))
class EventType(type):
    """The class of event classes: it applies `@dataclass(frozen=True, kw_only=True)` and checks the rules.

    An explicit decorator is taken over: `dataclass` announces itself by setting `__dataclass_params__`
    before anything else, whereupon the class is put back as its body left it.
    """

    __event__: EventDefinition

    def __new__(
        mcls,
        clsname: str,
        bases: tuple[type, ...],
        namespace: dict[str, Any],
        /,
        *,
        name: str | None = None,
        version: int = 1,
        aliases: Iterable[str] = (),
        participle: str | None = None,
        abstract: bool = False,
        category: str | None = None,
        outcome: Outcome | None = None,
        audit: str | enum.Enum | None = None,
        resource: str | None = None,
        resource_id: str | None = None,
        stands_alone: bool | None = None,
        **kwargs: Any,
    ) -> EventType:
        body = dict(namespace)
        cls = super().__new__(mcls, clsname, bases, namespace, **kwargs)
        if "__dataclass_fields__" in body:  # dataclass(slots=True) makes the class anew: the rules were checked
            if not cls.__event__.abstract:
                _register(cls, frame=None)
            return cls
        frame = sys._getframe(1)
        parent = next((base.__event__ for base in bases if isinstance(base, EventType)), None)
        if parent is None:
            _define(cls, _definition(clsname, abstract=True))
            return dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)(cls)
        if not abstract:
            problem = _past_tense.problem_with(clsname, participle)
            if problem is not None:
                raise EventDefinitionError(problem)
        _check_stored_name(clsname, name, version, tuple(aliases))
        if outcome is None:
            outcome = _outcome_of(clsname)
        hints = _resolve(cls, frame)
        freezing, checking = _check_fields(cls, hints)
        _define(
            cls,
            _definition(
                name or clsname,
                version=version,
                aliases=tuple(aliases),
                category=category if category is not None else parent.category,
                outcome=outcome,
                audit=str(audit.value) if isinstance(audit, enum.Enum) else audit,
                resource=resource if resource is not None else parent.resource,
                resource_id=resource_id if resource_id is not None else parent.resource_id,
                stands_alone=outcome is not Outcome.SUCCEEDED if stands_alone is None else stands_alone,
                abstract=abstract,
                freezing=freezing,
                checking=checking,
                resolved=hints is not None,
                source=frame.f_code,
            ),
        )
        if not abstract:
            _register(cls, frame=frame)
        if freezing or hints is None:
            _freeze_after_init(cls)
        before = frozenset(cls.__dict__)
        dataclass(frozen=True, kw_only=True)(cls)
        _finish(cls)
        _undecorated[cls] = (body, before)
        return cls

    def __init__(cls, clsname: str, bases: tuple[type, ...], namespace: dict[str, Any], /, **_: Any) -> None:
        super().__init__(clsname, bases, namespace)

    def __setattr__(cls, key: str, value: Any) -> None:
        if key == "__dataclass_params__" and cls in _undecorated:
            if not value.frozen:
                raise EventDefinitionError(
                    f"{cls.__name__} is mutable: an event is a fact and never changes. Write "
                    "@dataclass(frozen=True, kw_only=True), or leave the decorator out: DomainEvent applies it"
                )
            if not value.eq:
                raise EventDefinitionError(
                    f"{cls.__name__} is decorated with eq=False: events are compared by their fields. Leave eq out"
                )
            _undo_dataclass(cls)
        elif key == "__dataclass_fields__" and "__event__" in cls.__dict__:
            positional = [f.name for f in value.values() if not f.kw_only]
            if positional:
                raise EventDefinitionError(
                    f"{cls.__name__} takes {', '.join(positional)} by position: two fields of one type are soon "
                    "swapped. Write @dataclass(frozen=True, kw_only=True), or leave the decorator out"
                )
        super().__setattr__(key, value)


class FrozenList(list[Any]):
    """A list that can't be changed, equal to a list of the same items."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the list belongs to an event, which never changes: copy it with list(…) first")

    append = extend = insert = remove = pop = clear = sort = reverse = _refuse
    __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenList, (list(self),)


class FrozenDict(dict[Any, Any]):
    """A dict that can't be changed, equal to a dict of the same items."""

    __slots__ = ()

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the dict belongs to an event, which never changes: copy it with dict(…) first")

    pop = popitem = clear = update = setdefault = _refuse
    __setitem__ = __delitem__ = __ior__ = _refuse

    def __hash__(self) -> int:  # type: ignore[override]
        return hash(frozenset(self.items()))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenDict, (dict(self),)


def freeze(value: Any) -> Any:
    """A deep copy of containers that nobody can change; everything else as it is."""
    if isinstance(value, list):
        return FrozenList([freeze(item) for item in value])
    if isinstance(value, dict):
        return FrozenDict({key: freeze(item) for key, item in value.items()})
    if isinstance(value, tuple):
        items = [freeze(item) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else tuple(items)
    if isinstance(value, (set, frozenset)):
        return frozenset(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        copy = object.__new__(type(value))
        for part in dataclasses.fields(value):
            object.__setattr__(copy, part.name, freeze(getattr(value, part.name)))
        return copy
    return value


def _definition(
    name: str,
    *,
    version: int = 1,
    aliases: tuple[str, ...] = (),
    category: str | None = None,
    outcome: Outcome = Outcome.SUCCEEDED,
    audit: str | None = None,
    resource: str | None = None,
    resource_id: str | None = None,
    stands_alone: bool = False,
    abstract: bool = False,
    freezing: tuple[str, ...] = (),
    checking: tuple[str, ...] = (),
    resolved: bool = True,
    source: types.CodeType | None = None,
) -> EventDefinition:
    return EventDefinition(
        name=name,
        version=version,
        aliases=aliases,
        snake_name="_".join(word.lower() for word in _WORDS.findall(name)),
        category=category,
        outcome=outcome,
        audit=audit,
        resource=resource,
        resource_id=resource_id,
        stands_alone=stands_alone,
        abstract=abstract,
        fields=(),
        freezing=freezing,
        checking=checking,
        resolved=resolved,
        source=source,
    )


def _define(cls: EventType, definition: EventDefinition) -> None:
    if "__dataclass_fields__" in cls.__dict__:
        names = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        definition = dataclasses.replace(definition, fields=names)
    type.__setattr__(cls, "__event__", definition)


def _finish(cls: EventType) -> None:
    """Complete what is only known once `dataclass` has run."""
    definition = cls.__event__
    _define(cls, definition)
    if definition.audit is None or definition.abstract:
        return
    names = cls.__event__.fields
    wanted = definition.resource_id
    if wanted is None and definition.resource is not None and f"{definition.resource}_id" in names:
        wanted = f"{definition.resource}_id"
        _define(cls, dataclasses.replace(definition, resource_id=wanted))
    elif wanted is not None and wanted not in names:
        raise EventDefinitionError(
            f"{cls.__name__} declares resource_id={wanted!r}, but has no such field: it has {', '.join(names)}"
        )


def _outcome_of(clsname: str) -> Outcome:
    for outcome in (Outcome.ATTEMPTED, Outcome.FAILED):
        if clsname.endswith(outcome.capitalize()):
            return outcome
    return Outcome.SUCCEEDED


def _check_stored_name(clsname: str, name: str | None, version: int, aliases: tuple[str, ...]) -> None:
    for stored in (name, *aliases):
        if stored is not None and (not isinstance(stored, str) or not stored.strip() or len(stored) > 200):
            raise EventDefinitionError(
                f"{clsname} would be stored as {stored!r}: a name is text of 1 to 200 characters"
            )
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise EventDefinitionError(f"{clsname} has version={version!r}: a version is a whole number from 1 up")


def _register(cls: EventType, frame: types.FrameType | None) -> None:
    definition = cls.__event__
    for stored in (definition.name, *definition.aliases):
        other = _by_name.get(stored)
        if other is not None and other is not cls and not _replaces(cls, other, frame):
            raise EventDefinitionError(
                f"{_place(cls)} would be stored as {stored!r}, as {_place(other)} already is: whoever reads the log "
                f"could not tell them apart. Rename one, or give it a name of its own: "
                f"class {cls.__name__}(DomainEvent, name={cls.__module__.split('.')[0] + '.' + cls.__name__!r})"
            )
        _by_name[stored] = cls


def _replaces(cls: EventType, other: EventType, frame: types.FrameType | None) -> bool:
    """Whether `cls` is `other` made anew: rebuilt for slots, a module reloaded, a function or cell run again."""
    if (cls.__module__, cls.__qualname__) != (other.__module__, other.__qualname__):
        return "<locals>" in cls.__qualname__ and "<locals>" in other.__qualname__
    if frame is None or "<locals>" in cls.__qualname__:
        return True
    return frame.f_code is not other.__event__.source


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _undo_dataclass(cls: EventType) -> None:
    body, before = _undecorated.pop(cls)
    for name in set(cls.__dict__) - before:
        type.__delattr__(cls, name)
    for name in inspect.get_annotations(cls):
        if name in body:
            type.__setattr__(cls, name, body[name])


def _freeze_after_init(cls: EventType) -> None:
    own = cls.__dict__.get("__post_init__")
    inherited = None if own else getattr(cls, "__post_init__", None)
    user: Callable[[Any], None] | None = own or inherited

    def __post_init__(self: DomainEvent) -> None:
        if user is not None:
            user(self)
        definition = type(self).__event__
        if not definition.resolved:
            definition = ensure_resolved(type(self))
        for name in definition.freezing:
            object.__setattr__(self, name, freeze(getattr(self, name)))

    type.__setattr__(cls, "__post_init__", __post_init__)


def _resolve(cls: EventType, frame: types.FrameType | None, *, final: bool = False) -> dict[str, Any] | None:
    """The type of every field, or None while one is not defined yet (an error when `final`)."""
    local = dict(frame.f_locals) if frame is not None else {}
    local.setdefault(cls.__name__, cls)
    try:
        hints = typing.get_type_hints(cls, localns=local, include_extras=True)
    except NameError as error:
        if not final:
            return None
        raise EventDefinitionError(
            f"{cls.__name__} has a field of a type that can't be found: {error}. Import it at run time "
            "(not under TYPE_CHECKING), or define it in the same module"
        ) from None
    except (TypeError, SyntaxError) as error:
        raise EventDefinitionError(f"{cls.__name__} has an annotation that is no type: {error}") from error
    own = inspect.get_annotations(cls)
    if own:  # msgspec resolves annotations by itself, but can't see a function's locals
        cls.__annotations__ = {name: hints.get(name, hint) for name, hint in own.items()}
    return hints


def _check_fields(cls: EventType, hints: dict[str, Any] | None) -> tuple[tuple[str, ...], tuple[str, ...]]:
    if hints is None:
        return (), ()
    freezing, checking = [], []
    for name, hint in hints.items():
        if typing.get_origin(hint) is ClassVar or hint is ClassVar or name == "__event__":
            continue
        if name.startswith("_"):
            raise EventDefinitionError(f"{cls.__name__}.{name} is private: an event is read by others. Rename it")
        if _SECRET.search(name) and not _says_why(hint):
            raise EventDefinitionError(
                f"{cls.__name__}.{name} looks like a secret: events are stored for long and read by many. Publish an "
                f'id instead, or say why it is none: {name}: Annotated[…, NotSecret("…")]'
            )
        look = _Look(cls.__name__, name)
        look.at(hint)
        if look.containers:
            freezing.append(name)
        if look.checks:
            checking.append(name)
    return tuple(freezing), tuple(checking)


def _says_why(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated and any(
        isinstance(extra, NotSecret) and extra.reason.strip() for extra in hint.__metadata__
    )


class _Look:
    """Walks one field's type: refuses what can't be stored, notes what must be frozen or checked."""

    def __init__(self, event: str, name: str) -> None:
        self.where = f"{event}.{name}"
        self.containers = False
        self.checks = False
        self._seen: set[type] = set()

    def refuse(self, hint: Any, way_out: str) -> NoReturn:
        shown = getattr(hint, "__name__", None) or str(hint)
        raise EventDefinitionError(f"{self.where} is of type {shown}, which can't be stored: {way_out}")

    def at(self, hint: Any) -> None:
        if hint is None or hint in _SCALARS:
            self.checks = self.checks or hint in _TO_CHECK
            return
        origin = typing.get_origin(hint)
        if origin is Annotated:
            self.at(hint.__origin__)
        elif origin in (typing.Union, types.UnionType):
            self.union(hint)
        elif origin is Literal:
            if not all(value is None or isinstance(value, (str, int)) for value in typing.get_args(hint)):
                self.refuse(hint, "a Literal of an event holds strings, whole numbers and None")
        elif origin is not None:
            self.container(hint, origin)
        elif hint in (list, dict, tuple, frozenset):
            self.refuse(hint, f"say what it holds: {hint.__name__}[str] or the like")
        elif isinstance(hint, typing.NewType):
            self.at(hint.__supertype__)
        elif isinstance(hint, type):
            self.type(hint)
        else:
            self.refuse(hint, "use a scalar, a frozen dataclass, or a list, dict or tuple of those")

    def union(self, hint: Any) -> None:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        if sum(1 for member in members if dataclasses.is_dataclass(member)) > 1:
            self.refuse(hint, "a reader can't tell which of the dataclasses it was. Use one class, or one event each")
        for member in members:
            self.at(member)

    def container(self, hint: Any, origin: Any) -> None:
        if origin is set:
            self.refuse(hint, "a set can be changed. Use frozenset")
        if origin is dataclasses.InitVar:
            self.refuse(hint, "it is gone once the event was made, so a stored event can't be read")
        if origin not in (list, dict, tuple, frozenset):
            way_out = "use list[…], dict[…, …], tuple[…] or frozenset[…]"
            if isinstance(origin, type) and dataclasses.is_dataclass(origin):
                way_out = "generic dataclasses are not supported. Write the class out"
            self.refuse(hint, way_out)
        self.containers = self.containers or origin is not frozenset
        for argument in typing.get_args(hint):
            if argument is not Ellipsis:
                self.at(argument)

    def type(self, hint: type) -> None:
        if isinstance(hint, EventType):
            self.refuse(hint, "an event holds no other event. Use its event_id")
        if issubclass(hint, enum.Enum):
            return
        if dataclasses.is_dataclass(hint):
            self.nested(hint)
        elif hint in (list, dict, tuple, set):
            self.refuse(hint, f"say what it holds: {hint.__name__}[str] or the like")
        elif hint is object:
            self.refuse(hint, "a reader would not know what comes back. Name the type")
        else:
            self.refuse(hint, "use a scalar, a frozen dataclass, or a list, dict or tuple of those")

    def nested(self, hint: type) -> None:
        if hint in self._seen:
            return
        self._seen.add(hint)
        params = getattr(hint, "__dataclass_params__")  # noqa: B009 (no stub declares it)
        if not params.frozen or not params.eq:
            self.refuse(hint, f"events never change. Decorate {hint.__name__} with @dataclass(frozen=True)")
        try:
            hints = typing.get_type_hints(hint, include_extras=True)
        except NameError as error:
            self.refuse(hint, f"{error}")
        before = self.containers
        for part in dataclasses.fields(hint):
            _Look.at(self, hints[part.name])
        self.containers = before or self.containers


class DomainEvent(metaclass=EventType):
    """A fact: typed, immutable, named in the past tense, with an id (UUIDv7) and the time it happened (UTC).

    Subclasses become frozen keyword-only dataclasses by themselves; the explicit decorator is fine too.
    Class keywords: `name`, `version`, `aliases` say how it is stored; `category`, `outcome`, `audit`,
    `resource`, `resource_id` what the audit and the log say of it; `stands_alone` whether it may be published
    without a session (default: *Attempted* and *Failed* may); `participle` names a past participle that the
    rule for names doesn't know; `abstract` makes a class that only others derive from.

    A class that breaks a rule raises `EventDefinitionError` where it is defined.
    """

    __event__: ClassVar[EventDefinition]

    event_id: UUID = field(default_factory=uuid7)
    occurred_at: datetime = field(default_factory=_now)

    def audit_context(self) -> Mapping[str, object]:
        """What the audit record says beside action, user and resource; override it to add what follows from those."""
        return {
            name: getattr(self, name)
            for name in type(self).__event__.fields
            if name not in ("event_id", "occurred_at", "user_id")
        }

    @classmethod
    def upcast(cls, version: int, fields: dict[str, Any]) -> dict[str, Any]:
        """Turn the stored fields of an older version into those of this one; override it when a version changes.

        `fields` is the decoded JSON object, owned by the callee. Called wherever a stored event is read.
        """
        return fields


E = TypeVar("E", bound=DomainEvent)


def is_event_class(candidate: object) -> typing.TypeGuard[type[DomainEvent]]:
    return isinstance(candidate, EventType)


def event_class(stored_name: str) -> type[DomainEvent] | None:
    """The class stored under this name or alias in this process, if one was imported."""
    return typing.cast("type[DomainEvent] | None", _by_name.get(stored_name))


def ensure_resolved(cls: type[DomainEvent]) -> EventDefinition:
    """The definition, with annotations that could not be resolved earlier looked at now.

    Raises `EventDefinitionError` when an annotation still names something undefined, or a field breaks a rule.
    """
    definition = cls.__event__
    if not definition.resolved:
        hints = _resolve(cls, None, final=True)
        freezing, checking = _check_fields(cls, hints)
        definition = dataclasses.replace(definition, freezing=freezing, checking=checking, resolved=True)
        _define(cls, definition)
    return definition
