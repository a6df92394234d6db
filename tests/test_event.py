"""What a class must be to be an event, what it declares, and what its instances are."""

from __future__ import annotations

import copy
import dataclasses
import enum
import importlib
import pickle
import subprocess
import sys
import textwrap
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import FrozenInstanceError, InitVar, dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from decimal import Decimal
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Generic, Literal, NamedTuple, NewType, TypeVar
from uuid import UUID, uuid4

import pytest

from whereupon import DomainEvent, EventDefinitionError, InMemoryEventBus, NotSecret, Outcome
from whereupon.event import EventType, FrozenDict, FrozenList, ensure_resolved, event_class

if TYPE_CHECKING:
    from collections import OrderedDict

pytestmark = pytest.mark.unit


class Channel(enum.StrEnum):
    WEB = "web"
    PHONE = "phone"


class Priority(enum.Enum):
    LOW = 1
    HIGH = 2


@dataclass(frozen=True)
class Line:
    article: str
    amount: Decimal
    remarks: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Box:
    content: str
    inside: Box | None = None


@dataclass
class Draft:
    text: str


@dataclass(frozen=True)
class Login:
    name: str
    password: str


Cents = NewType("Cents", int)
T = TypeVar("T")


@dataclass(frozen=True)
class Pair(Generic[T]):
    left: T


class Point(NamedTuple):
    x: int


class Weight(enum.Enum):
    LIGHT = 0.5


class Nothing(enum.Enum):
    pass


class OrderEntered(DomainEvent):
    order_id: int
    lines: list[Line] = field(default_factory=list)
    labels: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class OrderDispatched(DomainEvent, version=3, aliases=("OrderSentOff",), category="shop"):
    order_id: int
    parcels: tuple[str, ...] = ()

    def audit_context(self) -> Mapping[str, object]:
        return {**super().audit_context(), "count": len(self.parcels)}


SHOP = """
from whereupon import DomainEvent

class {name}(DomainEvent{keywords}):
    number: int
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    """Write a module and import it; gone after the test, as if it had never been there."""
    monkeypatch.syspath_prepend(str(tmp_path))
    written: set[str] = set()

    def write(module: str, source: str) -> ModuleType:
        (tmp_path / f"{module}.py").write_text(textwrap.dedent(source))
        written.add(module)
        importlib.invalidate_caches()
        return importlib.import_module(module)

    yield write
    for module in written:
        sys.modules.pop(module, None)


# What an event is


def test_an_event_gets_a_version_7_id_and_the_time_in_utc_by_itself() -> None:
    before = datetime.now(UTC)
    first, second = OrderEntered(order_id=1), OrderEntered(order_id=1)
    assert first.event_id.version == 7
    assert type(first.event_id) is UUID
    assert first.event_id < second.event_id
    assert before <= first.occurred_at <= second.occurred_at <= datetime.now(UTC)
    assert first.occurred_at.tzinfo is UTC


def test_id_and_time_may_be_given() -> None:
    event_id, then = uuid4(), datetime(2025, 1, 1, tzinfo=UTC)
    event = OrderEntered(order_id=1, event_id=event_id, occurred_at=then)
    assert (event.event_id, event.occurred_at) == (event_id, then)


def test_the_decorator_makes_no_difference() -> None:
    @dataclass(frozen=True, kw_only=True)
    class InvoiceSent(DomainEvent):
        number: int
        note: str = "none"

    class InvoiceForwarded(DomainEvent):
        number: int
        note: str = "none"

    for cls in (InvoiceSent, InvoiceForwarded):
        event = cls(number=1)
        assert (event.number, event.note) == (1, "none")
        assert event == cls(number=1, event_id=event.event_id, occurred_at=event.occurred_at)
        assert hash(event) == hash(copy.deepcopy(event))
        assert [f.name for f in dataclasses.fields(cls)] == ["event_id", "occurred_at", "number", "note"]
        with pytest.raises(TypeError, match="positional"):
            cls(1)  # type: ignore[call-arg, arg-type]
        with pytest.raises(FrozenInstanceError):
            event.number = 2  # type: ignore[misc]
        with pytest.raises(TypeError, match="nonsense"):
            cls(number=1, nonsense=2)  # type: ignore[call-arg]
        with pytest.raises(TypeError, match="number"):
            cls()  # type: ignore[call-arg]


def test_a_decorator_with_slots_makes_events_without_a_dict() -> None:
    event = OrderDispatched(order_id=1)
    assert not hasattr(event, "__dict__")
    assert OrderDispatched.__event__.name == "OrderDispatched"
    assert event_class("OrderDispatched") is event_class("OrderSentOff") is OrderDispatched


def test_super_without_arguments_works_in_a_class_with_slots() -> None:
    event = OrderDispatched(order_id=7, parcels=("a", "b"))
    assert event.audit_context() == {"order_id": 7, "parcels": ("a", "b"), "count": 2}


def test_super_works_in_properties_and_classmethods_of_a_class_with_slots() -> None:
    class Parent(DomainEvent, abstract=True):
        number: int

        @property
        def shown(self) -> str:
            return f"#{self.number}"

        @classmethod
        def of(cls, number: int) -> typing.Self:
            return cls(number=number)

    @dataclass(frozen=True, kw_only=True, slots=True)
    class InvoicePaid(Parent):
        tags: list[str] = field(default_factory=list)

        def __post_init__(self) -> None:
            assert super().shown

        @property
        def shown(self) -> str:
            return f"invoice {super().shown}"

        @classmethod
        def of(cls, number: int) -> typing.Self:
            return super().of(number + 1)

    assert InvoicePaid.of(1).shown == "invoice #2"


def test_a_class_with_slots_may_be_local_to_a_function() -> None:
    @dataclass(frozen=True, kw_only=True, slots=True)
    class ParcelLost(DomainEvent, name="parcel.lost"):
        parcels: list[str]

    event = ParcelLost(parcels=["a"])
    assert event_class("parcel.lost") is ParcelLost
    assert isinstance(event.parcels, FrozenList)


def test_other_options_of_the_decorator_are_kept() -> None:
    @dataclass(frozen=True, kw_only=True, order=True, repr=False)
    class TicketSold(DomainEvent):
        number: int

    then = datetime(2025, 1, 1, tzinfo=UTC)
    first, second = (TicketSold(number=n, event_id=UUID(int=1), occurred_at=then) for n in (1, 2))
    assert first < second  # pyright: ignore[reportOperatorIssue]
    assert "number" not in repr(first)


def test_events_pickle_and_copy_with_frozen_containers() -> None:
    events: list[DomainEvent] = [
        OrderEntered(order_id=1, lines=[Line("a", Decimal(1), ["x"])], labels={"k": ["v"]}),
        OrderDispatched(order_id=1, parcels=("p",)),
    ]
    for event in events:
        for twin in (pickle.loads(pickle.dumps(event)), copy.copy(event), copy.deepcopy(event)):
            assert twin == event
            assert hash(twin) == hash(event)
            assert type(twin) is type(event)
    twin = pickle.loads(pickle.dumps(events[0]))
    with pytest.raises(TypeError, match="never changes"):
        twin.labels["k"].append("w")
    with pytest.raises(TypeError, match="never changes"):
        twin.lines[0].remarks.append("y")


def test_replace_makes_another_event_with_frozen_containers() -> None:
    event = dataclasses.replace(OrderEntered(order_id=1), labels={"k": ["v"]})
    with pytest.raises(TypeError, match="never changes"):
        event.labels["k"].append("w")


def test_events_of_two_classes_are_never_equal() -> None:
    then, event_id = datetime.now(UTC), uuid4()
    placed = OrderEntered(order_id=1, event_id=event_id, occurred_at=then)
    shipped = OrderDispatched(order_id=1, event_id=event_id, occurred_at=then)
    assert placed != shipped  # type: ignore[comparison-overlap]


def test_an_event_can_be_referred_to_weakly() -> None:
    import weakref

    event = OrderDispatched(order_id=1)
    assert weakref.ref(event)() is event


# Containers


def test_a_container_is_a_copy_of_the_callers() -> None:
    remarks, lines, labels = ["x"], list[Line](), {"k": ["v"]}
    lines.append(Line("a", Decimal(1), remarks))
    event = OrderEntered(order_id=1, lines=lines, labels=labels)
    remarks.append("y")
    lines.clear()
    labels["k"].append("w")
    labels["new"] = []
    assert event.lines == [Line("a", Decimal(1), ["x"])]
    assert event.labels == {"k": ["v"]}


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.append(3),
        lambda f: f.extend([3]),
        lambda f: f.insert(0, 3),
        lambda f: f.remove(1),
        lambda f: f.pop(),
        lambda f: f.clear(),
        lambda f: f.sort(),
        lambda f: f.reverse(),
        lambda f: f.__setitem__(0, 3),
        lambda f: f.__setitem__(slice(0, 1), []),
        lambda f: f.__delitem__(0),
        lambda f: f.__iadd__([3]),
        lambda f: f.__imul__(2),
        lambda f: setattr(f, "extra", 1),
    ],
)
def test_no_method_changes_a_frozen_list(change: Callable[[Any], Any]) -> None:
    frozen = FrozenList([2, 1])
    with pytest.raises((TypeError, AttributeError)):
        change(frozen)
    assert frozen == [2, 1]


@pytest.mark.parametrize(
    "change",
    [
        lambda f: f.__setitem__("a", 2),
        lambda f: f.__delitem__("a"),
        lambda f: f.pop("a"),
        lambda f: f.popitem(),
        lambda f: f.clear(),
        lambda f: f.update(b=1),
        lambda f: f.setdefault("b", 1),
        lambda f: f.__ior__({"b": 1}),
        lambda f: setattr(f, "extra", 1),
    ],
)
def test_no_method_changes_a_frozen_dict(change: Callable[[Any], Any]) -> None:
    frozen = FrozenDict({"a": 1})
    with pytest.raises((TypeError, AttributeError)):
        change(frozen)
    assert frozen == {"a": 1}


def test_calling_init_again_changes_no_frozen_container() -> None:
    frozen_list, frozen_dict = FrozenList([1]), FrozenDict({"a": 1})
    frozen_list.__init__([2, 3])  # type: ignore[misc]
    frozen_dict.__init__({"b": 2})  # type: ignore[misc]
    assert (frozen_list, frozen_dict) == ([1], {"a": 1})


def test_frozen_containers_read_like_their_kind() -> None:
    frozen_list, frozen_dict = FrozenList([1, 2]), FrozenDict({"a": 1})
    assert isinstance(frozen_list, list)
    assert isinstance(frozen_dict, dict)
    assert frozen_list + frozen_list == [1, 2, 1, 2]
    assert frozen_dict | {"b": 2} == {"a": 1, "b": 2}
    assert list(frozen_list) == [1, 2]
    assert hash(frozen_list) == hash(FrozenList([1, 2]))
    assert hash(frozen_dict) == hash(FrozenDict({"a": 1}))
    assert repr(frozen_list) == "[1, 2]"
    free = frozen_list.copy()
    free.append(3)
    assert free == [1, 2, 3]


def test_a_default_container_is_frozen_too() -> None:
    with pytest.raises(TypeError, match="copy it with list"):
        OrderEntered(order_id=1).lines.append(Line("a", Decimal(1)))


def test_ones_own_post_init_runs_before_containers_are_frozen() -> None:
    class CartFilled(DomainEvent):
        articles: list[str]

        def __post_init__(self) -> None:
            if not self.articles:
                raise ValueError("a filled cart holds something")
            self.articles.sort()

    assert CartFilled(articles=["b", "a"]).articles == ["a", "b"]
    with pytest.raises(ValueError, match="holds something"):
        CartFilled(articles=[])


def test_a_subclass_freezes_what_its_parent_declares() -> None:
    class Tagged(DomainEvent, abstract=True):
        tags: list[str]

    class PageTagged(Tagged):
        page: int

    class PageLinked(Tagged):
        links: list[str]

    with pytest.raises(TypeError, match="never changes"):
        PageTagged(page=1, tags=["a"]).tags.append("b")
    with pytest.raises(TypeError, match="never changes"):
        PageLinked(links=["l"], tags=["a"]).links.append("m")
    with pytest.raises(TypeError, match="never changes"):
        PageLinked(links=["l"], tags=["a"]).tags.append("b")


def test_a_container_within_itself_is_refused_by_name() -> None:
    endless: list[Any] = []
    endless.append(endless)
    with pytest.raises(ValueError, match=r"OrderEntered\.lines contains itself"):
        OrderEntered(order_id=1, lines=endless)


# What is refused where it is defined


def test_a_mutable_dataclass_is_refused() -> None:
    with pytest.raises(
        EventDefinitionError, match=r"UserRegistered is mutable.*@dataclass\(frozen=True, kw_only=True\)"
    ):

        @dataclass(kw_only=True)  # pyright: ignore[reportGeneralTypeIssues]
        class UserRegistered(DomainEvent):  # type: ignore[misc]
            email: str

    with pytest.raises(EventDefinitionError, match="leave the decorator out"):

        @dataclass  # pyright: ignore[reportGeneralTypeIssues]
        class UserBlocked(DomainEvent):  # type: ignore[misc]
            email: str


def test_positional_fields_are_refused() -> None:
    with pytest.raises(EventDefinitionError, match=r"takes email, name by position.*kw_only=True"):

        @dataclass(frozen=True)
        class UserRegistered(DomainEvent):
            email: str
            name: str

    with pytest.raises(EventDefinitionError, match="takes name by position"):

        class UserRenamed(DomainEvent):
            email: str
            name: str = field(kw_only=False)


@pytest.mark.parametrize(("option", "told"), [("eq", "compared by their fields"), ("init", "made by keyword")])
def test_a_decorator_that_takes_equality_or_init_away_is_refused(option: str, told: str) -> None:
    class UserRegistered(DomainEvent):
        email: str

    with pytest.raises(EventDefinitionError, match=f"{option}=False.*{told}.*Leave {option} out"):
        dataclass(**{"frozen": True, "kw_only": True, option: False})(UserRegistered)


def test_an_init_of_ones_own_is_refused() -> None:
    with pytest.raises(EventDefinitionError, match=r"UserRegistered writes its own __init__.*classmethod"):

        class UserRegistered(DomainEvent):
            email: str

            def __init__(self, email: str) -> None: ...


def test_what_dataclass_refuses_names_the_class() -> None:
    with pytest.raises(EventDefinitionError, match="OrderPaid can't be made a frozen dataclass: mutable default"):

        class OrderPaid(DomainEvent):
            tags: list[str] = []  # noqa: RUF012

    with pytest.raises(EventDefinitionError, match="OrderRefunded can't be made a frozen dataclass"):

        class OrderRefunded(DomainEvent):
            def __setattr__(self, name: str, value: object) -> None: ...


@pytest.mark.parametrize(
    "name", ["RegisterUser", "UserRegistering", "ChangePassword", "ConnectProvider", "SendWelcomeEmail"]
)
def test_a_name_that_tells_of_no_past_is_refused(name: str) -> None:
    with pytest.raises(EventDefinitionError, match=name):
        EventType(name, (DomainEvent,), {"__module__": __name__})


def test_a_participle_can_be_declared() -> None:
    with pytest.raises(EventDefinitionError):

        class ReportFaxgesendet(DomainEvent): ...

    class ReportGefaxt(DomainEvent, participle="gefaxt"): ...

    assert ReportGefaxt.__event__.name == "ReportGefaxt"


def test_an_abstract_class_may_have_any_name_and_is_stored_under_none() -> None:
    class AboutAnAccount(DomainEvent, abstract=True):
        account_id: int

    assert event_class("AboutAnAccount") is None
    assert AboutAnAccount.__event__.abstract


REFUSED: list[tuple[Any, str]] = [
    (Any, "use a scalar"),
    (object, "Name the type"),
    (complex, "use a scalar"),
    (bytearray, "use a scalar"),
    (type, "use a scalar"),
    (Point, "frozen dataclass"),
    (T, "use a scalar"),
    (list, r"say what it holds: list\[str\]"),
    (dict, r"say what it holds: dict\[str, int\]"),
    (tuple, r"say what it holds: tuple\[str, \.\.\.\]"),
    (typing.List, r"say what it holds: list\[str\]"),  # noqa: UP006
    (set[int], "Use frozenset"),
    (frozenset[list[int]], "a frozenset holds what never changes"),
    (Sequence[int], r"use list\[…\]"),
    (Mapping[str, int], r"dict\[…, …\]"),
    (Callable[[], None], r"use list\[…\]"),
    (list[Any], "use a scalar"),
    (dict[str, Any], "use a scalar"),
    (dict[bool, int], "a key is stored as text"),
    (dict[tuple[int, int], int], "a key is stored as text"),
    (dict[int | str, int], "a key is stored as text"),
    (dict[str | None, int], "a key is stored as text"),
    (dict[Literal["a", 1], int], "a key is stored as text"),
    (dict[Line, int], "a key is stored as text"),
    (Draft, r"Decorate Draft with @dataclass\(frozen=True\)"),
    (list[Draft], "Decorate Draft"),
    (Pair[int], "generic dataclasses are not supported"),
    (OrderEntered, "Use its event_id"),
    (Weight, "all are strings or all whole numbers"),
    (Nothing, "all are strings or all whole numbers"),
    (enum.Enum, "all are strings or all whole numbers"),
    (Literal[b"x"], "a Literal of an event holds"),
    (Literal[True], "a Literal of an event holds"),
    (Literal[Channel.WEB], "a Literal of an event holds"),
    (str | UUID, "str, UUID are all stored as text"),
    (Annotated[str, "x"] | Cents | date, "stored as text"),
    (Channel | str, "stored as text"),
    (Literal["a"] | UUID, "stored as text"),
    (list[int] | tuple[str, ...], "stored as an array"),
    (Line | Box, "stored as an object"),
    (Line | dict[str, int], "stored as an object"),
    (Final[int], "Leave Final out"),
    (InitVar[int], "gone once the event was made"),
    ("OrderedDict[str, int]", "can't be found"),
]


@pytest.mark.parametrize(("hint", "told"), REFUSED, ids=lambda value: str(value)[:40])
def test_a_field_that_can_not_be_stored_is_refused_with_the_way_out(hint: Any, told: str) -> None:
    with pytest.raises(EventDefinitionError, match=told) as caught:
        ensure_resolved(event_with(hint))
    assert "OrderCounted" in str(caught.value)


STORED: list[Any] = [
    str, int, float, bool, bytes, UUID, datetime, date, time, timedelta, Decimal, None, Channel, Priority, Line, Box,
    Cents, str | None, int | str, bool | int | float, Line | str | None, list[int] | dict[str, int], list[str],
    list[list[int]], dict[str, int], dict[UUID, Line], dict[Priority, int], dict[Cents, int], tuple[int, ...],
    tuple[()],
    dict[Literal["a", "b"], int], tuple[int, str], frozenset[str], frozenset[tuple[int, int]],
    Literal["a", "b"], Literal["a", 1, None], Annotated[int, "cents"], Annotated[list[Annotated[str, "x"]], "y"],
    "Line", "list[Box] | None", "typing.Optional[typing.List[int]]", "typing.Dict[str, typing.Tuple[int, ...]]",
]  # fmt: skip


@pytest.mark.parametrize("hint", STORED, ids=lambda value: str(value)[:40])
def test_a_field_that_can_be_stored_is_taken(hint: Any) -> None:
    definition = ensure_resolved(event_with(hint))
    assert definition.resolved
    assert "it" in definition.types


@pytest.mark.skipif(sys.version_info < (3, 12), reason="`type X = …` is of Python 3.12")
def test_an_alias_of_a_type_stands_for_it() -> None:
    alias = typing.TypeAliasType("alias", list[int])  # type: ignore[attr-defined, unused-ignore]
    cls = event_with(alias)
    assert isinstance(cls(it=[1]).it, FrozenList)
    with pytest.raises(EventDefinitionError, match="can't be stored"):
        event_with(typing.TypeAliasType("alias", set[int]))  # type: ignore[attr-defined, unused-ignore]


def event_with(hint: Any, name: str = "it") -> type[Any]:
    body = {"__module__": __name__, "__qualname__": "f.<locals>.OrderCounted", "__annotations__": {name: hint}}
    return EventType("OrderCounted", (DomainEvent,), body)


def test_class_variables_methods_and_properties_are_no_fields() -> None:
    class OrderCounted(DomainEvent):
        unit: ClassVar[str] = "piece"
        password: ClassVar[Any] = object()
        many = 12
        amount: int

        @property
        def dozens(self) -> int:
            return self.amount // self.many

    assert OrderCounted.__event__.fields == ("event_id", "occurred_at", "amount")
    assert OrderCounted(amount=25).dozens == 2


def test_annotations_of_a_plain_mixin_are_no_fields() -> None:
    class Greets:
        greeting: Any = "hello"

    class OrderCounted(Greets, DomainEvent):
        amount: int

    assert OrderCounted.__event__.fields == ("event_id", "occurred_at", "amount")


def test_a_private_field_is_refused() -> None:
    with pytest.raises(EventDefinitionError, match=r"OrderCounted\._amount is private.*Rename it"):

        class OrderCounted(DomainEvent):
            _amount: int


def test_id_and_time_keep_their_types() -> None:
    with pytest.raises(EventDefinitionError, match=r"OrderCounted\.event_id is a UUID in every event"):

        class OrderCounted(DomainEvent):
            event_id: str  # type: ignore[assignment]


@pytest.mark.parametrize(
    "name",
    [
        "password", "new_password", "password_hash", "hashed_password", "passwords", "token", "tokens", "access_token",
        "refresh_token", "reset_token", "verification_token", "session_token", "client_secret", "api_key", "apikey",
        "private_key", "secret_key", "credentials", "otp", "pin", "cvv", "jwt", "cookie", "passphrase",
    ],
)  # fmt: skip
def test_a_field_that_looks_like_a_secret_is_refused_unless_it_says_why(name: str) -> None:
    with pytest.raises(
        EventDefinitionError, match=rf"OrderCounted\.{name} looks like a secret.*Publish an id.*NotSecret"
    ):
        event_with(str, name)
    with pytest.raises(EventDefinitionError, match="looks like a secret"):
        event_with(Annotated[str, NotSecret(" ")], name)
    assert name in event_with(Annotated[str, NotSecret("it is one letter of it")], name).__event__.fields


@pytest.mark.parametrize(
    "name", ["token_id", "password_changed_at", "pinned", "token_count", "spin", "keyboard", "secretary"]
)
def test_a_field_that_only_contains_such_a_word_is_taken(name: str) -> None:
    assert name in event_with(int, name).__event__.fields


def test_a_secret_in_a_nested_dataclass_is_found() -> None:
    with pytest.raises(EventDefinitionError, match=r"UserInvited\.login\.password looks like a secret"):

        class UserInvited(DomainEvent):
            login: list[Login] | None


def test_a_secret_is_found_beside_a_type_that_is_not_defined_yet() -> None:
    with pytest.raises(EventDefinitionError, match=r"UserInvited\.password looks like a secret"):

        class UserInvited(DomainEvent):
            at: DefinedNowhere  # type: ignore[name-defined]  # noqa: F821
            password: str


# Types that are defined elsewhere or later


class TreePlanted(DomainEvent):
    tree: Tree
    trees: list[Tree]


@dataclass(frozen=True)
class Forest:
    trees: list[Tree]


class ForestPlanted(DomainEvent):
    forest: Forest


UNRESOLVED_AT_FIRST = TreePlanted.__event__.resolved, ForestPlanted.__event__.resolved


@dataclass(frozen=True)
class Tree:
    rings: list[int]


def test_a_type_may_be_defined_later_in_the_module() -> None:
    assert UNRESOLVED_AT_FIRST == (False, False)
    event = TreePlanted(tree=Tree([1]), trees=[Tree([2])])
    assert TreePlanted.__event__.resolved
    with pytest.raises(TypeError, match="never changes"):
        event.tree.rings.append(2)
    with pytest.raises(TypeError, match="never changes"):
        event.trees[0].rings.append(2)
    with pytest.raises(TypeError, match="never changes"):
        ForestPlanted(forest=Forest([Tree([1])])).forest.trees[0].rings.append(2)


def test_types_local_to_the_function_are_found() -> None:
    @dataclass(frozen=True)
    class Leaf:
        colours: list[str]

    @dataclass(frozen=True)
    class Twig:
        leaves: list[Leaf]

    class TwigBroken(DomainEvent):
        twig: Twig
        leaf: Leaf | None = None

    class Around:
        class TwigGrown(DomainEvent):
            twig: Twig

    event = TwigBroken(twig=Twig([Leaf(["green"])]))
    with pytest.raises(TypeError, match="never changes"):
        event.twig.leaves[0].colours.append("red")
    assert Around.TwigGrown.__event__.resolved


def test_a_type_known_to_type_checkers_only_is_an_error_at_first_use() -> None:
    class OrderSorted(DomainEvent):
        parts: OrderedDict[str, int]

    told = r"OrderSorted has a field of a type that can't be found: name 'OrderedDict'.*not under TYPE_CHECKING"
    with pytest.raises(EventDefinitionError, match=told):
        OrderSorted(parts={})  # type: ignore[arg-type]

    async def handler(event: OrderSorted) -> None: ...

    with pytest.raises(EventDefinitionError, match=told):
        InMemoryEventBus().subscribe(OrderSorted, handler)


def test_a_field_that_turns_out_wrong_later_is_refused_at_first_use(write: Callable[[str, str], ModuleType]) -> None:
    module = write(
        "late_shop",
        """
        from __future__ import annotations
        from whereupon import DomainEvent

        class CrateFilled(DomainEvent):
            content: Content

        class Content: ...
        """,
    )
    with pytest.raises(EventDefinitionError, match=r"CrateFilled\.content is of type Content, which can't be stored"):
        module.CrateFilled(content=module.Content())


def test_an_annotation_that_is_no_type_is_refused() -> None:
    with pytest.raises(EventDefinitionError, match="OrderCounted has an annotation that is no type"):
        event_with("1 +")


# Declarations


def test_declarations_are_read_from_the_class_keywords() -> None:
    class Action(enum.Enum):
        SENT = "INVOICE_SENT"

    class InvoiceMailed(
        DomainEvent,
        name="invoice.mailed",
        version=2,
        aliases=["InvoicePosted"],
        category="billing",
        audit=Action.SENT,
        resource="invoice",
    ):
        invoice_id: int

    definition = InvoiceMailed.__event__
    assert (definition.name, definition.version, definition.aliases) == ("invoice.mailed", 2, ("InvoicePosted",))
    assert (definition.category, definition.audit) == ("billing", "INVOICE_SENT")
    assert (definition.resource, definition.resource_id) == ("invoice", "invoice_id")
    assert definition.snake_name == "invoice_mailed"
    assert definition.fields == ("event_id", "occurred_at", "invoice_id")
    assert event_class("invoice.mailed") is event_class("InvoicePosted") is InvoiceMailed
    assert event_class("InvoiceMailed") is None


@pytest.mark.parametrize(
    ("name", "outcome", "alone", "snake"),
    [
        ("UserRegistrationAttempted", Outcome.ATTEMPTED, True, "user_registration_attempted"),
        ("UserRegistrationFailed", Outcome.FAILED, True, "user_registration_failed"),
        ("UserRegistrationSucceeded", Outcome.SUCCEEDED, False, "user_registration_succeeded"),
        ("OAuthTokenRevoked", Outcome.SUCCEEDED, False, "o_auth_token_revoked"),
        ("HTTPCallFailed", Outcome.FAILED, True, "http_call_failed"),
    ],
)
def test_the_outcome_follows_from_the_name(name: str, outcome: Outcome, alone: bool, snake: str) -> None:
    definition = EventType(name, (DomainEvent,), {"__module__": "m", "__qualname__": "f.<locals>.x"}).__event__
    assert (definition.outcome, definition.stands_alone, definition.snake_name) == (outcome, alone, snake)


def test_outcome_and_standing_alone_can_be_declared() -> None:
    class CardRejected(DomainEvent, outcome=Outcome.FAILED): ...

    class ClockStruck(DomainEvent, stands_alone=True): ...

    assert CardRejected.__event__.stands_alone
    assert CardRejected.__event__.outcome is Outcome.FAILED
    assert ClockStruck.__event__.stands_alone


def test_a_parent_gives_fields_category_and_resource_but_neither_name_nor_audit_action() -> None:
    class AboutAnAccount(DomainEvent, abstract=True, category="account", resource="account", audit="IGNORED"):
        account_id: int

    class AccountOpened(AboutAnAccount, audit="ACCOUNT_OPENED"):
        owner: str

    class AccountFrozen(AboutAnAccount, category="risk"): ...

    opened, frozen = AccountOpened.__event__, AccountFrozen.__event__
    assert (opened.name, opened.category, opened.resource, opened.resource_id) == (
        "AccountOpened", "account", "account", "account_id",
    )  # fmt: skip
    assert opened.fields == ("event_id", "occurred_at", "account_id", "owner")
    assert (frozen.category, frozen.audit, frozen.abstract) == ("risk", None, False)
    assert AccountOpened(account_id=1, owner="x").account_id == 1


def test_a_resource_id_that_is_no_field_is_refused() -> None:
    with pytest.raises(
        EventDefinitionError, match=r"resource_id='invoice'.*has no such field: it has event_id, occurred"
    ):

        class InvoicePaid(DomainEvent, audit="PAID", resource="invoice", resource_id="invoice"):
            invoice_id: int

    with pytest.raises(EventDefinitionError, match="InvoiceLost declares resource_id='nothing'"):

        class InvoiceLost(DomainEvent, resource_id="nothing"):
            invoice_id: int


def test_an_abstract_parent_may_name_a_resource_id_that_its_children_bring() -> None:
    class AboutAnInvoice(DomainEvent, abstract=True, resource="invoice", resource_id="number"): ...

    class InvoicePaid(AboutAnInvoice, audit="PAID"):
        number: int

    assert InvoicePaid.__event__.resource_id == "number"
    with pytest.raises(EventDefinitionError, match="InvoiceLost declares resource_id='number'"):

        class InvoiceLost(AboutAnInvoice, audit="LOST"): ...


@pytest.mark.parametrize(
    ("keywords", "told"),
    [
        ({"version": 0}, "version=0: a version is a whole number from 1 up"),
        ({"version": True}, "version=True"),
        ({"version": "2"}, "version='2'"),
        ({"version": 1.5}, "version=1.5"),
        ({"version": 2**31}, "whole number"),
        ({"name": ""}, "stored as ''"),
        ({"name": "  "}, "stored as"),
        ({"name": 5}, "stored as 5"),
        ({"name": "x" * 201}, "1 to 200 characters"),
        ({"name": "a\0b"}, "printable"),
        ({"name": "a\nb"}, "printable"),
        ({"name": "\ud800"}, "printable"),
        ({"aliases": "InvoiceSent"}, r"write aliases=\('InvoiceSent',\)"),
        ({"aliases": ["ok", ""]}, "stored as ''"),
        ({"category": 5}, "category=5: it is text"),
        ({"audit": 5}, "audit=5: it is text"),
        ({"audit": ""}, "audit='': it is text"),
        ({"resource": b"x"}, "resource=b'x'"),
        ({"resource_id": 1}, "resource_id=1"),
        ({"outcome": "unsure"}, "outcome='unsure': an outcome is Outcome.ATTEMPTED"),
        ({"catgory": "x", "nme": "y"}, "defined with catgory=, nme=, which means nothing.*name=, version="),
    ],
)
def test_a_declaration_that_means_nothing_is_refused(keywords: dict[str, Any], told: str) -> None:
    with pytest.raises(EventDefinitionError, match=f"(?s)InvoiceMislaid.*{told}"):

        class InvoiceMislaid(DomainEvent, **keywords): ...

    assert event_class("InvoiceMislaid") is None


def test_a_parent_may_take_class_keywords_of_its_own() -> None:
    class Priced(DomainEvent, abstract=True):
        currency: ClassVar[str]

        def __init_subclass__(cls, *, currency: str = "EUR") -> None:
            cls.currency = currency

    class BreadSold(Priced, currency="CHF"): ...

    assert BreadSold.currency == "CHF"


# Names that are taken


def test_one_class_defined_twice_in_a_module_is_refused(write: Callable[[str, str], ModuleType]) -> None:
    source = SHOP.format(name="CrateOpened", keywords="")
    with pytest.raises(
        EventDefinitionError,
        match=r"twice_shop\.CrateOpened would be stored as 'CrateOpened', as twice_shop\.CrateOpened already is",
    ):
        write("twice_shop", source + source)


def test_one_name_in_two_modules_is_refused_with_a_way_out(write: Callable[[str, str], ModuleType]) -> None:
    first = write("near_shop", SHOP.format(name="CrateClosed", keywords=""))
    with pytest.raises(
        EventDefinitionError, match=r"far_shop\.CrateClosed would be.*near_shop\.CrateClosed.*name='far_shop"
    ):
        write("far_shop", SHOP.format(name="CrateClosed", keywords=""))
    assert event_class("CrateClosed") is first.CrateClosed
    other = write("third_shop", SHOP.format(name="CrateClosed", keywords=", name='third_shop.CrateClosed'"))
    assert event_class("third_shop.CrateClosed") is other.CrateClosed


def test_an_alias_that_another_class_has_as_its_name_is_refused(write: Callable[[str, str], ModuleType]) -> None:
    first = write("old_shop", SHOP.format(name="CrateMoved", keywords=""))
    with pytest.raises(EventDefinitionError, match=r"stored as 'CrateMoved', as old_shop\.CrateMoved already is"):
        write("new_shop", SHOP.format(name="CrateShifted", keywords=", aliases=['CrateMoved']"))
    assert event_class("CrateShifted") is None, "a class that was refused keeps no name"
    assert event_class("CrateMoved") is first.CrateMoved


def test_a_module_may_be_reloaded(write: Callable[[str, str], ModuleType]) -> None:
    source = SHOP.format(name="CrateSold", keywords="")
    slots = source.replace(
        "class", "from dataclasses import dataclass\n@dataclass(frozen=True, kw_only=True, slots=True)\nclass"
    )
    module = write("reloaded_shop", source + slots.replace("CrateSold", "CrateKept"))
    before = module.CrateSold
    importlib.reload(module)
    assert module.CrateSold is not before
    assert event_class("CrateSold") is module.CrateSold
    assert event_class("CrateKept") is module.CrateKept


def test_a_class_local_to_a_function_may_be_defined_again() -> None:
    def define() -> type[DomainEvent]:
        class CrateFound(DomainEvent):
            number: int

        return CrateFound

    first, second = define(), define()
    assert first is not second
    assert event_class("CrateFound") is second


def test_a_class_local_to_a_function_takes_no_name_from_a_module(write: Callable[[str, str], ModuleType]) -> None:
    def define() -> type[DomainEvent]:
        @dataclass(frozen=True, kw_only=True, slots=True)
        class CrateStored(DomainEvent):
            number: int

        return CrateStored

    first = define()
    assert event_class("CrateStored") is first
    module = write("local_shop", SHOP.format(name="CrateStored", keywords=""))
    assert event_class("CrateStored") is module.CrateStored
    again = define()
    assert event_class("CrateStored") is module.CrateStored
    assert event_class("CrateStored", beside=event_with) is module.CrateStored, (
        "only what is in a function sees those in one"
    )

    async def handler(event: Any) -> None: ...

    assert event_class("CrateStored", beside=handler) is again


def test_one_bus_never_knows_two_classes_of_one_name(write: Callable[[str, str], ModuleType]) -> None:
    module = write("one_shop", SHOP.format(name="CrateWeighed", keywords=""))

    class CrateWeighed(DomainEvent):
        number: int

    async def handler(event: Any) -> None: ...

    bus = InMemoryEventBus()
    bus.subscribe(module.CrateWeighed, handler)
    with pytest.raises(EventDefinitionError, match=r"this bus knows one_shop\.CrateWeighed as 'CrateWeighed', and"):
        bus.subscribe(CrateWeighed, handler)
    assert [s.event_types for s in bus.subscriptions] == [{module.CrateWeighed}]


def test_a_class_that_was_refused_leaves_no_trace(write: Callable[[str, str], ModuleType]) -> None:
    with pytest.raises(EventDefinitionError, match="private"):
        write("wrong_shop", SHOP.format(name="CrateLost", keywords="").replace("number", "_number"))
    assert event_class("CrateLost") is None


def test_events_pickle_across_processes(write: Callable[[str, str], ModuleType], tmp_path: Path) -> None:
    module = write("sent_shop", SHOP.format(name="CrateSent", keywords="").replace("int", "list[int]"))
    stored = tmp_path / "event"
    stored.write_bytes(pickle.dumps(module.CrateSent(number=[1, 2])))
    reading = f"import pickle; it = pickle.load(open({str(stored)!r}, 'rb')).number; print(type(it).__name__, it)"
    ran = subprocess.run(
        [sys.executable, "-c", reading], cwd=tmp_path, capture_output=True, text=True, check=True, timeout=60
    )
    assert ran.stdout == "FrozenList [1, 2]\n"


# What the audit sees


def test_the_audit_context_is_every_field_that_has_no_column_of_its_own() -> None:
    class PasswordChanged(DomainEvent):
        user_id: UUID
        initiated_by: Literal["user", "admin"]

        def audit_context(self) -> Mapping[str, object]:
            method = "self_service" if self.initiated_by == "user" else "administrative"
            return {**super().audit_context(), "method": method}

    event = PasswordChanged(user_id=uuid4(), initiated_by="user")
    assert event.audit_context() == {"initiated_by": "user", "method": "self_service"}
