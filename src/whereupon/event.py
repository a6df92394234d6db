"""Domain events: what a class must be to be one, and what whereupon knows of it.

Rules are checked where a class is defined, so that a wrong event fails at import and not in production.
"""

from __future__ import annotations

import dataclasses
import enum
import inspect
import re
import sys
import typing
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from types import CodeType, FrameType, FunctionType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Literal, NoReturn, TypeVar, dataclass_transform
from uuid import UUID

import msgspec
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
    types: Mapping[str, Any] = field(repr=False, compare=False)
    """The type of each field; empty while `resolved` is False."""
    source: CodeType | None = field(repr=False)


_SCALARS: Final[frozenset[object]] = frozenset(
    {str, int, float, bool, bytes, UUID, datetime, date, time, timedelta, Decimal, type(None)}
)
_TO_CHECK: Final[frozenset[object]] = frozenset({float, datetime, time, Decimal})
_SECRET = re.compile(
    r"(?:^|_)(?:password|passwd|passphrase|password_hash|hashed_password|secret|credential|jwt|cookie|otp|pin|cvv|cvc"
    r"|api_?key|(?:private|secret|signing|encryption)_?key"
    r"|(?:access|refresh|auth|bearer|id|session|reset|verification|csrf)?_?token)s?$"
)
_WORDS = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z]+|[A-Z]+|[0-9]+")

_by_name: weakref.WeakValueDictionary[str, EventType] = weakref.WeakValueDictionary()
_local_by_name: weakref.WeakValueDictionary[str, EventType] = weakref.WeakValueDictionary()
"""Classes defined within a function, as tests do: they take no name away, and the latest of a name counts."""
_undecorated: weakref.WeakKeyDictionary[EventType, tuple[dict[str, Any], frozenset[str]]] = weakref.WeakKeyDictionary()
"""Classes that no explicit decorator has taken over: the defaults of their fields, and what they held before ours."""

_OF_EVERY_EVENT: Final = {"event_id": UUID, "occurred_at": datetime}
_KEYWORDS: Final = (
    "name", "version", "aliases", "participle", "abstract", "category", "outcome", "audit", "resource", "resource_id",
    "stands_alone",
)  # fmt: skip
_MADE_BY_KEYWORD: Final = "an event is made by keyword, from its fields"


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
        if kwargs and not any("__init_subclass__" in vars(above) for base in bases for above in base.__mro__[:-1]):
            raise EventDefinitionError(
                f"{clsname} is defined with {', '.join(f'{key}=' for key in kwargs)}, which means nothing: "
                f"an event class takes {', '.join(f'{key}=' for key in _KEYWORDS)}"
            )
        cls = super().__new__(mcls, clsname, bases, namespace, **kwargs)
        if "__dataclass_fields__" in body:  # dataclass(slots=True) makes the class anew: the rules were checked
            _take_over(cls, body)
            return cls
        if not bases:  # _Root
            return cls
        frame = sys._getframe(1)
        parent = next((base.__event__ for base in bases if hasattr(base, "__event__")), None)
        if parent is None:
            _define(cls, _definition(clsname, abstract=True))
            made: Any = dataclass(frozen=True, kw_only=True, slots=True, weakref_slot=True)
            return typing.cast("EventType", made(cls))
        if not abstract:
            problem = _past_tense.problem_with(clsname, participle)
            if problem is not None:
                raise EventDefinitionError(problem)
        aliases = _checked_names(clsname, name, version, aliases)
        outcome = _checked_outcome(clsname, outcome)
        _check_texts(clsname, category=category, resource=resource, resource_id=resource_id)
        if "__init__" in body:
            raise EventDefinitionError(
                f"{clsname} writes its own __init__: {_MADE_BY_KEYWORD}, and read back from the log without it. "
                "Give it a classmethod that computes the fields and returns cls(…), or a __post_init__ that checks them"
            )
        resolved = _resolved(cls, frame)
        _define(
            cls,
            _definition(
                name or clsname,
                version=version,
                aliases=aliases,
                category=category if category is not None else parent.category,
                outcome=outcome,
                audit=_checked_audit(clsname, audit),
                resource=resource if resource is not None else parent.resource,
                resource_id=resource_id if resource_id is not None else parent.resource_id,
                stands_alone=outcome is not Outcome.SUCCEEDED if stands_alone is None else stands_alone,
                abstract=abstract,
                freezing=resolved.freezing if resolved else (),
                checking=resolved.checking if resolved else (),
                types=resolved.types if resolved else {},
                resolved=resolved is not None,
                source=frame.f_code,
            ),
        )
        if resolved is None or resolved.freezing:
            _freeze_after_init(cls)
        before = frozenset(cls.__dict__)
        immutable: Any = dataclass(frozen=True, kw_only=True)
        try:
            immutable(cls)
        except (TypeError, ValueError) as error:
            if isinstance(error, EventDefinitionError):
                raise
            raise EventDefinitionError(f"{clsname} can't be made a frozen dataclass: {error}") from error
        _finish(cls, declared=resource_id is not None)
        _undecorated[cls] = ({key: body[key] for key in _own_annotations(cls) if key in body}, before)
        if not abstract:
            _register(cls, frame)
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
            if not value.init:
                raise EventDefinitionError(
                    f"{cls.__name__} is decorated with init=False: {_MADE_BY_KEYWORD}. Leave init out"
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

    def __new__(cls, items: Iterable[Any] = ()) -> FrozenList:
        self = super().__new__(cls)
        list.extend(self, items)
        return self

    def __init__(self, items: Iterable[Any] = ()) -> None:
        """Nothing is left to do, and calling it again must do nothing."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the list belongs to an event, which never changes: copy it with list(…) first")

    if not TYPE_CHECKING:  # what is refused keeps list's signature for type checkers
        append = extend = insert = remove = pop = clear = sort = reverse = _refuse
        __setitem__ = __delitem__ = __iadd__ = __imul__ = _refuse

        def __hash__(self) -> int:
            return hash(tuple(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return FrozenList, (list(self),)


class FrozenDict(dict[Any, Any]):
    """A dict that can't be changed, equal to a dict of the same items."""

    __slots__ = ()

    def __new__(cls, items: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> FrozenDict:
        self = super().__new__(cls)
        dict.update(self, items)
        return self

    def __init__(self, items: Mapping[Any, Any] | Iterable[tuple[Any, Any]] = ()) -> None:
        """Nothing is left to do, and calling it again must do nothing."""

    def _refuse(self, *_: object, **__: object) -> NoReturn:
        raise TypeError("the dict belongs to an event, which never changes: copy it with dict(…) first")

    if not TYPE_CHECKING:
        pop = popitem = clear = update = setdefault = _refuse
        __setitem__ = __delitem__ = __ior__ = _refuse

        def __hash__(self) -> int:
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
    types: Mapping[str, Any] | None = None,
    resolved: bool = True,
    source: CodeType | None = None,
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
        types=types or {},
        resolved=resolved,
        source=source,
    )


def _define(cls: EventType, definition: EventDefinition) -> None:
    if "__dataclass_fields__" in cls.__dict__:
        names = tuple(f.name for f in dataclasses.fields(cls))  # type: ignore[arg-type]
        definition = dataclasses.replace(definition, fields=names)
    type.__setattr__(cls, "__event__", definition)


def _finish(cls: EventType, *, declared: bool) -> None:
    """Complete what is only known once `dataclass` has run; `declared`: the class itself names a `resource_id`."""
    definition = cls.__event__
    _define(cls, definition)
    if definition.abstract:
        return
    names = cls.__event__.fields
    wanted = definition.resource_id
    if wanted is None:
        guessed = f"{definition.resource}_id"
        if definition.resource is not None and guessed in names:
            _define(cls, dataclasses.replace(definition, resource_id=guessed))
    elif wanted not in names and (declared or definition.audit is not None):
        raise EventDefinitionError(
            f"{cls.__name__} declares resource_id={wanted!r}, but has no such field: it has {', '.join(names)}"
        )


def _checked_outcome(clsname: str, declared: Outcome | str | None) -> Outcome:
    if declared is not None:
        try:
            return Outcome(declared)
        except ValueError:
            raise EventDefinitionError(
                f"{clsname} has outcome={declared!r}: an outcome is {', '.join(f'Outcome.{o.name}' for o in Outcome)}"
            ) from None
    for outcome in (Outcome.ATTEMPTED, Outcome.FAILED):
        if clsname.endswith(outcome.capitalize()):
            return outcome
    return Outcome.SUCCEEDED


def _checked_audit(clsname: str, audit: str | enum.Enum | None) -> str | None:
    value = audit.value if isinstance(audit, enum.Enum) else audit
    _check_texts(clsname, audit=value)
    return value


def _check_texts(clsname: str, **declared: Any) -> None:
    for key, value in declared.items():
        if value is not None and not _is_name(value):
            raise EventDefinitionError(f"{clsname} has {key}={value!r}: it is text of 1 to 200 characters")


def _is_name(text: object) -> bool:
    return isinstance(text, str) and bool(text.strip()) and len(text) <= 200 and text.isprintable()


def _checked_names(clsname: str, name: str | None, version: Any, aliases: Iterable[str]) -> tuple[str, ...]:
    if isinstance(aliases, str):
        raise EventDefinitionError(f"{clsname} has aliases={aliases!r}: write aliases=({aliases!r},), with a comma")
    aliases = tuple(aliases)
    for stored in (name, *aliases):
        if stored is not None and not _is_name(stored):
            raise EventDefinitionError(
                f"{clsname} would be stored as {stored!r}: a name is printable text of 1 to 200 characters"
            )
    if not isinstance(version, int) or isinstance(version, bool) or not 1 <= version < 2**31:
        raise EventDefinitionError(f"{clsname} has version={version!r}: a version is a whole number from 1 up")
    return aliases


def _register(cls: EventType, frame: FrameType) -> None:
    """Note the names it is stored under, or refuse it if one of them is another's."""
    definition = cls.__event__
    names = (definition.name, *definition.aliases)
    registry = _local_by_name if _is_local(cls) else _by_name
    for stored in names:
        other = registry.get(stored)
        if other is not None and not _replaces(cls, other, frame):
            raise EventDefinitionError(
                f"{_place(cls)} would be stored as {stored!r}, as {_place(other)} already is: whoever reads the log "
                f"could not tell them apart. Rename one, or give it a name of its own: "
                f"class {cls.__name__}(DomainEvent, name={cls.__module__.split('.')[0] + '.' + cls.__name__!r})"
            )
    for stored in names:
        registry[stored] = cls


def _is_local(cls: type) -> bool:
    return "<locals>" in cls.__qualname__


def _replaces(cls: EventType, other: EventType, frame: FrameType) -> bool:
    """Whether `cls` is `other` made anew: a module reloaded, a function or a cell of a notebook run again."""
    if _is_local(cls):
        return True
    same_place = (cls.__module__, cls.__qualname__) == (other.__module__, other.__qualname__)
    return same_place and frame.f_code is not other.__event__.source


def _place(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _take_over(cls: EventType, body: dict[str, Any]) -> None:
    """Put `cls`, made by dataclass(slots=True) from the class whose namespace is `body`, in that one's place."""
    definition: EventDefinition = body["__event__"]
    for registry in (_by_name, _local_by_name):
        for stored in (definition.name, *definition.aliases):
            known = registry.get(stored)
            if known is not None and known.__event__ is definition:
                registry[stored] = cls
    for function in _functions(
        body.values()
    ):  # super() without arguments knows its class by a cell, all of them by one
        if "__class__" in function.__code__.co_freevars:
            cell = (function.__closure__ or ())[function.__code__.co_freevars.index("__class__")]
            if getattr(cell.cell_contents, "__event__", None) is definition:
                cell.cell_contents = cls


def _functions(values: Iterable[Any]) -> Iterator[FunctionType]:
    for value in values:
        if isinstance(value, FunctionType):
            yield value
            if wrapped := getattr(value, "__wrapped__", None):
                yield from _functions([wrapped])
        elif isinstance(value, (classmethod, staticmethod)):
            yield from _functions([value.__func__])
        elif isinstance(value, property):
            yield from _functions([value.fget, value.fset, value.fdel])


def _undo_dataclass(cls: EventType) -> None:
    defaults, before = _undecorated.pop(cls)
    for name in set(cls.__dict__) - before:
        type.__delattr__(cls, name)
    for name, default in defaults.items():
        type.__setattr__(cls, name, default)


def _freeze_after_init(cls: EventType) -> None:
    user: Callable[[Any], None] | None = getattr(cls, "__post_init__", None)
    if hasattr(user, "freezes"):
        return  # inherited, and it asks the class of the event which fields to freeze

    def __post_init__(self: DomainEvent) -> None:
        if user is not None:
            user(self)
        definition = type(self).__event__
        if not definition.resolved:
            definition = ensure_resolved(type(self))
        for name in definition.freezing:
            try:
                object.__setattr__(self, name, freeze(getattr(self, name)))
            except RecursionError:
                raise ValueError(f"{type(self).__name__}.{name} contains itself, or is nested too deeply") from None

    __post_init__.freezes = True  # type: ignore[attr-defined]
    if user is not None:
        __post_init__.__wrapped__ = user  # type: ignore[attr-defined]
    type.__setattr__(cls, "__post_init__", __post_init__)


class _Resolved(typing.NamedTuple):
    types: dict[str, Any]
    freezing: tuple[str, ...]
    checking: tuple[str, ...]


def _resolved(cls: EventType, frame: FrameType | None) -> _Resolved | None:
    """The type of every field, checked; None while one names something undefined, an error without a `frame`."""
    local = _names_in_sight(frame, cls.__module__) if frame is not None else {}
    local.setdefault(cls.__name__, cls)
    try:
        return _checked_fields(cls, typing.get_type_hints(cls, localns=local, include_extras=True), local)
    except NameError as error:
        if frame is not None:
            for name, annotation in _own_annotations(cls).items():
                _check_name(cls, name, says_why="NotSecret" in str(annotation))
            return None
        raise EventDefinitionError(
            f"{cls.__name__} has a field of a type that can't be found: {error}. Import it at run time "
            "(not under TYPE_CHECKING), or define it in the same module or function, before the event"
        ) from None
    except EventDefinitionError:
        raise
    except (TypeError, SyntaxError, AttributeError) as error:
        raise EventDefinitionError(f"{cls.__name__} has an annotation that is no type: {error}") from error


def _names_in_sight(frame: FrameType, module: str) -> dict[str, Any]:
    """What an annotation written as text may mean: names of the functions around it, which `typing` can't see."""
    found: list[dict[str, Any]] = []
    top = frame.f_globals
    at: FrameType | None = frame
    while at is not None and at.f_globals is top:
        if at.f_locals is not top:
            found.append(at.f_locals)
        at = at.f_back
    if getattr(sys.modules.get(module), "__dict__", None) is not top:
        found.append(top)
    names: dict[str, Any] = {}
    for scope in reversed(found):
        names.update(scope)
    return names


def _own_annotations(cls: type) -> dict[str, Any]:
    """Annotations of the class itself, as they are: text, types, or what stands for one that is not defined yet."""
    if sys.version_info >= (3, 14):
        import annotationlib

        return annotationlib.get_annotations(cls, format=annotationlib.Format.FORWARDREF)
    return inspect.get_annotations(cls)


def _checked_fields(cls: EventType, hints: dict[str, Any], local: dict[str, Any]) -> _Resolved:
    freezing, checking, types = [], [], {}
    for name, hint in hints.items():
        if typing.get_origin(hint) is ClassVar or hint is ClassVar or not _is_field(cls, name):
            continue
        _check_name(cls, name, says_why=_says_why(hint))
        if name in _OF_EVERY_EVENT and _scalar(hint) is not _OF_EVERY_EVENT[name]:
            raise EventDefinitionError(
                f"{cls.__name__}.{name} is a {_OF_EVERY_EVENT[name].__name__} in every event. "
                "Give the field another name"
            )
        look = _Look(f"{cls.__name__}.{name}", local)
        look.at(hint)
        look.confirm(hint)
        types[name] = hint
        if look.containers:
            freezing.append(name)
        if look.checks:
            checking.append(name)
    _write_back(cls, hints)
    return _Resolved(types, tuple(freezing), tuple(checking))


def _write_back(cls: type, hints: Mapping[str, Any]) -> None:
    """Put types where annotations are text: msgspec reads those by itself, but doesn't see a function's names."""
    own = _own_annotations(cls)
    if any(not isinstance(annotation, type) for annotation in own.values()):
        cls.__annotations__ = {name: hints.get(name, annotation) for name, annotation in own.items()}


def _is_field(cls: type, name: str) -> bool:
    """Whether a class that is an event or a dataclass annotates it: a plain mixin's annotations make no fields."""
    return any(
        name in _own_annotations(base)
        for base in cls.__mro__
        if isinstance(base, EventType) or dataclasses.is_dataclass(base)
    )


def _check_name(cls: EventType, name: str, *, says_why: bool) -> None:
    if name.startswith("__"):
        return
    if name.startswith("_"):
        raise EventDefinitionError(f"{cls.__name__}.{name} is private: an event is read by others. Rename it")
    if _SECRET.search(name) and not says_why:
        raise EventDefinitionError(_secret(f"{cls.__name__}.{name}", name))


def _secret(where: str, name: str) -> str:
    return (
        f"{where} looks like a secret: events are stored for long and read by many. Publish an "
        f'id instead, or say why it is none: {name}: Annotated[…, NotSecret("…")]'
    )


def _says_why(hint: Any) -> bool:
    return typing.get_origin(hint) is Annotated and any(
        isinstance(extra, NotSecret) and extra.reason.strip() for extra in hint.__metadata__
    )


class _Look:
    """Walks one field's type: refuses what can't be stored, notes what must be frozen or checked.

    Raises `NameError` where a nested dataclass names something that is not defined yet.
    """

    def __init__(self, where: str, local: dict[str, Any]) -> None:
        self.where = where
        self.containers = False
        self.checks = False
        self._local = local
        self._seen: set[type] = set()

    def refuse(self, hint: Any, way_out: str) -> NoReturn:
        shown = hint.__qualname__ if isinstance(hint, type) and typing.get_origin(hint) is None else str(hint)
        raise EventDefinitionError(
            f"{self.where} is of type {shown.replace('typing.', '')}, which can't be stored: {way_out}"
        )

    def confirm(self, hint: Any) -> None:
        """Have the codec's library agree: it knows more about what JSON can tell apart than we do."""
        try:
            msgspec.json.Decoder(hint)
        except NameError:
            raise
        except (TypeError, ValueError) as error:
            self.refuse(hint, f"{error}")

    def at(self, hint: Any) -> None:
        if hint is None or hint in _SCALARS:
            self.checks = self.checks or hint in _TO_CHECK
            return
        origin = typing.get_origin(hint)
        if origin is Annotated:
            self.at(hint.__origin__)
        elif origin in (typing.Union, UnionType):
            self.union(hint)
        elif origin is Literal:
            if not all(value is None or type(value) in (str, int) for value in typing.get_args(hint)):
                self.refuse(hint, "a Literal of an event holds strings, whole numbers and None")
        elif origin is typing.Final:
            self.refuse(hint, "no field of an event changes. Leave Final out")
        elif hint in _SAY_WHAT or (origin in _SAY_WHAT and not typing.get_args(hint) and hint != tuple[()]):
            self.refuse(hint, f"say what it holds: {_SAY_WHAT[origin or hint]} or the like")
        elif origin is not None:
            self.container(hint, origin)
        elif isinstance(hint, typing.NewType):
            self.at(hint.__supertype__)
        elif isinstance(hint, dataclasses.InitVar):
            self.refuse(hint, "it is gone once the event was made, so a stored event could not be read")
        elif type(hint).__name__ == "TypeAliasType":  # `type Name = …`, from Python 3.12 on
            self.at(hint.__value__)
        elif isinstance(hint, type):
            self.plain_class(hint)
        else:
            self.refuse(hint, _USE)

    def union(self, hint: Any) -> None:
        members = [member for member in typing.get_args(hint) if member is not type(None)]
        for member in members:
            self.at(member)
        for kind, alike in (
            ("text", [m for m in members if _is_text(m)]),
            ("an array", [m for m in members if typing.get_origin(_scalar(m)) in (list, tuple, frozenset)]),
            ("an object", [m for m in members if typing.get_origin(_scalar(m)) is dict or _is_dataclass(m)]),
        ):
            if len(alike) > 1:
                names = ", ".join(getattr(m, "__name__", str(m)) for m in alike)
                self.refuse(
                    hint,
                    f"{names} are all stored as {kind}, and a reader could not tell which it was. "
                    "Use one of them, or a field or an event for each",
                )

    def container(self, hint: Any, origin: Any) -> None:
        arguments = [argument for argument in typing.get_args(hint) if argument is not Ellipsis]
        if origin is set:
            self.refuse(hint, "a set can be changed. Use frozenset")
        if origin not in (list, dict, tuple, frozenset):
            way_out = "use list[…], dict[…, …], tuple[…] or frozenset[…]"
            if isinstance(origin, type) and dataclasses.is_dataclass(origin):
                way_out = "generic dataclasses are not supported. Write the class out"
            self.refuse(hint, way_out)
        if origin is dict and not _is_key(arguments[0]):
            self.refuse(hint, "a key is stored as text: use one scalar type, like str, int, UUID or an Enum")
        if origin is frozenset:
            within = _Look(self.where, self._local)
            within.at(arguments[0])
            self.checks = self.checks or within.checks
            if within.containers and typing.get_origin(_scalar(arguments[0])) is not tuple:
                self.refuse(hint, "a frozenset holds what never changes: scalars, tuples and dataclasses of scalars")
            return
        self.containers = True
        for argument in arguments:
            self.at(argument)

    def plain_class(self, hint: type) -> None:
        if isinstance(hint, EventType):
            self.refuse(hint, "an event holds no other event. Use its event_id")
        elif issubclass(hint, enum.Enum):
            values = [member.value for member in hint]
            if not values or not (all(type(v) is str for v in values) or all(type(v) is int for v in values)):
                self.refuse(hint, "the members of an Enum are stored by value, so all are strings or all whole numbers")
        elif dataclasses.is_dataclass(hint):
            self.nested(hint)
        elif hint is object:
            self.refuse(hint, "a reader would not know what comes back. Name the type")
        else:
            self.refuse(hint, _USE)

    def nested(self, hint: type) -> None:
        if hint in self._seen:
            return
        self._seen.add(hint)
        params = getattr(hint, "__dataclass_params__")  # noqa: B009 (no stub declares it)
        if not params.frozen or not params.eq:
            self.refuse(hint, f"events never change. Decorate {hint.__name__} with @dataclass(frozen=True)")
        hints = typing.get_type_hints(hint, localns=self._local, include_extras=True)
        if "<locals>" in hint.__qualname__:
            _write_back(hint, hints)
        where = self.where
        for part in dataclasses.fields(hint):
            self.where = f"{where}.{part.name}"
            if _SECRET.search(part.name) and not _says_why(hints[part.name]):
                raise EventDefinitionError(_secret(self.where, part.name))
            self.at(hints[part.name])
        self.where = where


_USE: Final = "use a scalar, an Enum, a frozen dataclass, or a list, dict or tuple of those"
_SAY_WHAT: Final[Mapping[object, str]] = {
    list: "list[str]",
    dict: "dict[str, int]",
    tuple: "tuple[str, ...]",
    frozenset: "frozenset[str]",
    set: "frozenset[str]",
}
_TEXT: Final = frozenset({str, bytes, UUID, datetime, date, time, timedelta, Decimal})


def _is_text(hint: Any) -> bool:
    """Whether its values are JSON strings."""
    hint = _scalar(hint)
    if typing.get_origin(hint) is Literal:
        return any(isinstance(value, str) for value in typing.get_args(hint))
    if isinstance(hint, type) and issubclass(hint, enum.Enum):
        return any(isinstance(member.value, str) for member in hint)
    return hint in _TEXT


def _is_key(hint: Any) -> bool:
    hint = _scalar(hint)
    if typing.get_origin(hint) is Literal:
        return len(
            {type(value) for value in typing.get_args(hint)} - {type(None)}
        ) == 1 and None not in typing.get_args(hint)
    return hint in _SCALARS - {bool, type(None)} or (isinstance(hint, type) and issubclass(hint, enum.Enum))


def _is_dataclass(hint: Any) -> bool:
    return dataclasses.is_dataclass(_scalar(hint))


def _scalar(hint: Any) -> Any:
    """Without what says more of a type than which values it has."""
    while True:
        if typing.get_origin(hint) is Annotated:
            hint = hint.__origin__
        elif isinstance(hint, typing.NewType):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":
            hint = hint.__value__
        else:
            return hint


class _Root(metaclass=EventType):
    """Type checkers take a class that names such a metaclass itself for not frozen; so `DomainEvent` doesn't."""

    __slots__ = ()


class DomainEvent(_Root):
    """A fact: typed, immutable, named in the past tense, with an id (UUIDv7) and the time it happened (UTC).

    Subclasses become frozen keyword-only dataclasses by themselves; the explicit decorator is fine too.
    Class keywords: `name`, `version`, `aliases` say how it is stored; `category`, `outcome`, `audit`,
    `resource`, `resource_id` what the audit and the log say of it; `stands_alone` whether it may be published
    without a session (default: *Attempted* and *Failed* may); `participle` names a past participle that the
    rule for names doesn't know; `abstract` makes a class that only others derive from.

    A class that breaks a rule raises `EventDefinitionError` where it is defined.
    """

    __event__: ClassVar[EventDefinition]  # pyright: ignore[reportIncompatibleVariableOverride]

    event_id: UUID = field(default_factory=uuid7)
    """A UUIDv7, made with the event."""
    occurred_at: datetime = field(default_factory=_now)
    """When it happened: when the event was made, in UTC, unless it was told another time."""

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


def event_class(stored_name: str, beside: object = None) -> type[DomainEvent] | None:
    """The class stored under this name or alias in this process, if one was imported.

    A class within a function comes second, but first for what is defined `beside` it, in a function of that module.
    """
    found, local = _by_name.get(stored_name), _local_by_name.get(stored_name)
    if local is not None and "<locals>" in getattr(beside, "__qualname__", ""):
        found = local if local.__module__ == getattr(beside, "__module__", None) else found
    return typing.cast("type[DomainEvent] | None", found or local)


def event_classes() -> list[type[DomainEvent]]:
    """The classes of events that this process has imported so far, less those within functions; by stored name."""
    return sorted(
        typing.cast("set[type[DomainEvent]]", set(_by_name.values())), key=lambda cls: (cls.__event__.name, _place(cls))
    )


def ensure_resolved(cls: type[DomainEvent]) -> EventDefinition:
    """The definition, with annotations that could not be resolved earlier looked at now.

    Raises `EventDefinitionError` when an annotation still names something undefined, or a field breaks a rule.
    """
    definition = cls.__event__
    if not definition.resolved:
        resolved = _resolved(typing.cast("EventType", cls), None)
        assert resolved is not None, "without a frame it raises"
        definition = dataclasses.replace(
            definition,
            freezing=resolved.freezing,
            checking=resolved.checking,
            types=resolved.types,
            resolved=True,
        )
        _define(cls, definition)
    return definition
