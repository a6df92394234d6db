"""What changed since a catalogue was kept, and whether anything that is stored or that runs can't live with it."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Decimal
from types import new_class
from typing import Any, Literal
from uuid import UUID

import pytest

from whereupon import DomainEvent, InMemoryEventBus
from whereupon.catalogue import Catalogue, CatalogueError, Change, Level

pytestmark = pytest.mark.unit


def paid(
    fields: dict[str, Any],
    *,
    called: str = "TollPaid",
    defaults: dict[str, Any] | None = None,
    doc: str = "",
    **said: Any,
) -> type[DomainEvent]:
    """A class of events with these fields, as a build has it that another one follows."""
    body = {
        "__module__": __name__,
        "__qualname__": f"paid.<locals>.{called}",
        "__annotations__": fields,
        "__doc__": doc or None,
        **(defaults or {}),
    }
    upcast = said.pop("upcast", None)
    if upcast is not None:
        body["upcast"] = classmethod(upcast)
    return new_class(called, (DomainEvent,), said, lambda namespace: namespace.update(body))


async def note(event: DomainEvent) -> None: ...


def kept_by(*classes: type[DomainEvent], **options: Any) -> Catalogue:
    bus = InMemoryEventBus()
    for cls in classes:
        bus.subscribe(cls, note, **{"name": "note", **options})
    return Catalogue.of(bus, packages=[])


def as_asyncapi(catalogue: Catalogue) -> Any:
    return json.loads(json.dumps(catalogue.asyncapi()))


def as_schema(catalogue: Catalogue) -> Any:
    return json.loads(json.dumps(catalogue.json_schema()))


@pytest.fixture(params=[as_asyncapi, as_schema])
def keep(request: pytest.FixtureRequest) -> Callable[[Catalogue], Any]:
    """Each test runs once for each format that a catalogue can be kept in."""
    return request.param  # type: ignore[no-any-return]


def change(
    keep: Callable[[Catalogue], Any], before: type[DomainEvent] | list[Any], *after: type[DomainEvent]
) -> list[Change]:
    classes = before if isinstance(before, list) else [before]
    return kept_by(*after).changes_since(keep(kept_by(*classes)))


def only(changes: list[Change]) -> Change:
    assert len(changes) == 1, [str(one) for one in changes]
    return changes[0]


@dataclass(frozen=True)
class Sum:
    amount: Decimal
    currency: str


class Other:
    @dataclass(frozen=True)
    class Sum:
        amount: Decimal


FIELDS = {"lorry_id": UUID, "lane": str}


def test_nothing_differs_from_itself(keep: Callable[[Catalogue], Any]) -> None:
    assert change(keep, paid(FIELDS), paid(FIELDS)) == []
    deep = {"sums": list[Sum], "by": dict[str, Sum | None]}
    assert change(keep, paid(deep), paid(deep)) == []


def test_what_the_catalogue_is_called_does_not_matter(keep: Callable[[Catalogue], Any]) -> None:
    cls = paid(FIELDS)
    bus = InMemoryEventBus()
    bus.subscribe(cls, note)
    named = Catalogue.of(bus, title="Tolls", version="7", packages=[])
    assert Catalogue.of(bus, packages=[]).changes_since(keep(named)) == []


def test_a_new_event_is_compatible(keep: Callable[[Catalogue], Any]) -> None:
    found = change(keep, paid(FIELDS), paid(FIELDS), paid(FIELDS, called="TollRefunded"))
    assert (only(found).level, only(found).event, str(only(found))) == (
        Level.COMPATIBLE, "TollRefunded", "TollRefunded: a new event",
    )  # fmt: skip


def test_an_event_that_is_gone_is_breaking(keep: Callable[[Catalogue], Any]) -> None:
    found = change(keep, [paid(FIELDS), paid(FIELDS, called="TollRefunded")], paid(FIELDS))
    assert (only(found).level, only(found).event) == (Level.BREAKING, "TollRefunded")
    assert "aliases=('TollRefunded',)" in only(found).text


def test_a_rename_that_keeps_the_name_is_compatible_and_its_fields_are_compared(
    keep: Callable[[Catalogue], Any],
) -> None:
    renamed = paid(FIELDS, called="ChargePaid", aliases=("TollPaid",))
    assert [one.level for one in change(keep, paid(FIELDS), renamed)] == [Level.COMPATIBLE]
    shorter = paid({"lorry_id": UUID}, called="ChargePaid", aliases=("TollPaid",))
    assert {(one.level, one.field) for one in change(keep, paid(FIELDS), shorter)} == {
        (Level.BREAKING, "lane"), (Level.COMPATIBLE, None),
    }  # fmt: skip


def test_an_alias_that_is_gone_is_breaking(keep: Callable[[Catalogue], Any]) -> None:
    found = change(keep, paid(FIELDS, aliases=("FeePaid",)), paid(FIELDS))
    assert only(found).level is Level.BREAKING
    assert "'FeePaid'" in only(found).text


@pytest.mark.parametrize(
    ("after", "defaults", "field", "said"),
    [
        ({"lorry_id": UUID}, {}, "lane", "the field is gone"),
        ({**FIELDS, "lane": int}, {}, "lane", "its type is integer (before: text)"),
        ({**FIELDS, "lane": str | None}, {}, "lane", "its type is text | null (before: text)"),
        ({**FIELDS, "lorry_id": str}, {}, "lorry_id", "its type is text (before: uuid)"),
        ({**FIELDS, "axles": int}, {}, "axles", "a new field without a default"),
    ],
)
def test_without_a_new_version_it_is_breaking(
    keep: Callable[[Catalogue], Any], after: dict[str, Any], defaults: dict[str, Any], field: str, said: str
) -> None:
    found = only(change(keep, paid(FIELDS), paid(after, defaults=defaults)))
    assert (found.level, found.event, found.field) == (Level.BREAKING, "TollPaid", field)
    assert str(found).startswith(f"TollPaid.{field}: {said}, and the version is still 1. Raise version=")


def test_a_new_field_with_a_default_is_compatible(keep: Callable[[Catalogue], Any]) -> None:
    found = only(change(keep, paid(FIELDS), paid({**FIELDS, "axles": int}, defaults={"axles": 2})))
    assert (found.level, found.field) == (Level.COMPATIBLE, "axles")


def test_a_default_that_is_gone_is_breaking_and_one_that_is_new_or_another_is_not(
    keep: Callable[[Catalogue], Any],
) -> None:
    plain, two, three = paid(FIELDS), paid(FIELDS, defaults={"lane": "2"}), paid(FIELDS, defaults={"lane": "3"})
    gone = only(change(keep, two, plain))
    assert (gone.level, gone.field) == (Level.BREAKING, "lane")
    assert "or give it a default" in gone.text
    assert only(change(keep, plain, two)).level is Level.COMPATIBLE
    other = only(change(keep, two, three))
    assert (other.level, other.field) == (Level.COMPATIBLE, "lane")
    assert 'its default is "3" (before: "2")' in other.text


def test_one_more_member_of_a_literal_is_breaking_since_older_builds_can_not_read_it(
    keep: Callable[[Catalogue], Any],
) -> None:
    two, three = Literal["cash", "card"], Literal["cash", "card", "app"]
    found = only(change(keep, paid({"by": two}), paid({"by": three})))
    assert found.level is Level.BREAKING
    assert 'its type is "app" | "card" | "cash" (before: "card" | "cash")' in found.text


def test_what_changes_within_a_value_names_the_field_within(keep: Callable[[Catalogue], Any]) -> None:
    cases: list[tuple[Any, Any, str]] = [
        (Sum, Other.Sum, "total.currency"),
        (list[Sum], list[Other.Sum], "total[].currency"),
        (Sum | None, Other.Sum | None, "total.currency"),
    ]
    for held, other, path in cases:
        found = only(change(keep, paid({"total": held}), paid({"total": other})))
        assert (found.level, found.event, found.field) == (Level.BREAKING, "TollPaid", path)
        assert "the field is gone" in found.text


def upcast(cls: Any, version: int, fields: dict[str, Any]) -> dict[str, Any]:
    return {"lane": "1", **fields, "axles": 2}


def test_what_a_new_version_declares_and_upcast_reads_is_compatible(keep: Callable[[Catalogue], Any]) -> None:
    after = paid({"lorry_id": UUID, "lane": str, "axles": int}, version=2, upcast=upcast)
    found = only(change(keep, paid(FIELDS), after))
    assert (found.level, found.field) == (Level.COMPATIBLE, "axles")


def test_a_new_required_field_is_breaking_where_the_version_was_raised_without_an_upcast(
    keep: Callable[[Catalogue], Any],
) -> None:
    found = only(change(keep, paid(FIELDS), paid({**FIELDS, "axles": int}, version=2)))
    assert (found.level, found.field) == (Level.BREAKING, "axles")
    assert "no upcast reads the older ones. Write upcast" in found.text


def test_an_upcast_that_does_not_make_the_new_field_is_breaking(keep: Callable[[Catalogue], Any]) -> None:
    def forgets(cls: Any, version: int, fields: dict[str, Any]) -> dict[str, Any]:
        return fields

    found = change(keep, paid(FIELDS), paid({**FIELDS, "axles": int}, version=2, upcast=forgets))
    assert [one.level for one in found] == [Level.BREAKING, Level.COMPATIBLE]
    assert "one as it was stored in version 1 can't be read" in found[0].text
    assert "axles" in found[0].text


def test_an_upcast_without_a_new_version_reads_nothing(keep: Callable[[Catalogue], Any]) -> None:
    found = change(keep, paid(FIELDS, upcast=upcast), paid({**FIELDS, "axles": int}, upcast=upcast))
    assert [(one.level, one.field) for one in found] == [(Level.BREAKING, "axles")]


def test_a_field_may_go_with_a_new_version(keep: Callable[[Catalogue], Any]) -> None:
    found = only(change(keep, paid(FIELDS), paid({"lorry_id": UUID}, version=2)))
    assert (found.level, found.field) == (Level.COMPATIBLE, "lane")


def test_a_version_that_goes_back_is_breaking(keep: Callable[[Catalogue], Any]) -> None:
    assert only(change(keep, paid(FIELDS, version=2), paid(FIELDS))).level is Level.BREAKING


def test_a_description_is_wording_and_an_audit_action_is_compatible(keep: Callable[[Catalogue], Any]) -> None:
    found = only(change(keep, paid(FIELDS, doc="A toll was paid."), paid(FIELDS, doc="Somebody paid a toll.")))
    assert (found.level, found.event) == (Level.WORDING, "TollPaid")
    found = only(change(keep, paid(FIELDS, audit="PAID"), paid(FIELDS, audit="TOLL_PAID")))
    assert found.level is Level.COMPATIBLE
    assert found.text == 'its audit is "TOLL_PAID" (before: "PAID")'


def test_a_subscription_that_is_gone_is_breaking_where_it_has_a_place_in_the_log() -> None:
    cls = paid(FIELDS)
    before = as_asyncapi(kept_by(cls, name="statements"))
    found = kept_by(cls, name="statement").changes_since(before)
    assert [(one.level, one.event) for one in found] == [(Level.BREAKING, None), (Level.COMPATIBLE, None)]
    assert "subscription statements is gone, and what it is owed is not delivered" in found[0].text
    after_commit = as_asyncapi(kept_by(cls, name="nudge", delivery="after_commit"))
    levels = [one.level for one in kept_by(cls, name="nudges", delivery="after_commit").changes_since(after_commit)]
    assert levels == [Level.COMPATIBLE, Level.COMPATIBLE]


def test_another_order_under_one_name_is_breaking_since_the_database_refuses_it() -> None:
    cls = paid(FIELDS)
    found = only(kept_by(cls, ordered_by="lane").changes_since(as_asyncapi(kept_by(cls, ordered_by="lorry_id"))))
    assert found.level is Level.BREAKING
    assert 'ordered_by is "lane" (before: "lorry_id")' in found.text
    assert only(kept_by(cls, timeout=7).changes_since(as_asyncapi(kept_by(cls)))).level is Level.COMPATIBLE


def test_who_hears_an_event_from_now_on_is_told_with_the_event() -> None:
    cls, other = paid(FIELDS), paid(FIELDS, called="TollRefunded")

    def heard(*classes: type[DomainEvent]) -> Catalogue:
        bus = InMemoryEventBus()
        bus.subscribe(other, note, name="all")
        for one in classes:
            bus.subscribe(one, note, name="note")
        return Catalogue.of(bus, packages=[])

    found = only(heard(cls, other).changes_since(as_asyncapi(heard(cls))))
    assert (found.level, str(found)) == (Level.COMPATIBLE, "TollRefunded: note hears it, too")
    found = only(heard(cls).changes_since(as_asyncapi(heard(cls, other))))
    assert str(found) == "TollRefunded: note does not hear it any more"


def test_what_differs_elsewhere_is_told_with_its_place() -> None:
    catalogue = kept_by(paid(FIELDS))
    document = as_asyncapi(catalogue)
    document["components"]["messages"]["TollPaid"]["tags"] = []
    found = only(catalogue.changes_since(document))
    assert found.level is Level.WORDING
    assert "/components/messages/TollPaid/tags" in found.text


@pytest.mark.parametrize(
    "document",
    [
        {},
        {"asyncapi": "2.6.0"},
        {"asyncapi": "3.0.0"},
        {"asyncapi": "3.0.0", "components": {"messages": {"a": {}}}},
        {"$schema": "https://json-schema.org/draft/2020-12/schema", "$defs": {"A": {"x-whereupon": {}}}},
    ],
)
def test_a_document_that_is_no_catalogue_is_refused(document: dict[str, Any]) -> None:
    with pytest.raises(CatalogueError):
        kept_by(paid(FIELDS)).changes_since(document)


def test_changes_are_sorted_with_what_breaks_first(keep: Callable[[Catalogue], Any]) -> None:
    found = change(
        keep, paid(FIELDS, doc="a"), paid({"axles": int, "lane": str}, doc="b"), paid({}, called="BarrierRaised")
    )
    assert [one.level for one in found] == [Level.BREAKING, Level.BREAKING, Level.COMPATIBLE, Level.WORDING]
