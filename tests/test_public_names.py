"""The public surface, written by hand: what is added or taken away is a decision, and shows here."""

from __future__ import annotations

import pytest

import whereupon
import whereupon.errors as errors_module

pytestmark = pytest.mark.unit

PUBLIC = {
    # events
    "DomainEvent", "EventDefinition", "NotSecret", "Outcome",
    # buses
    "EventBus", "EventBusProtocol", "InMemoryEventBus", "Receipt",
    # subscriptions
    "Delivery", "DeliveryState", "Discard", "EventContext", "Retry", "RetryLater", "Subscription",
    # workflows
    "Attempt", "Workflow",
    # who and what caused an event
    "Metadata", "acting_as", "current_metadata", "request_metadata",
    # handlers of every event
    "AuditEventHandler", "LoggingEventHandler",
    # storing
    "Codec", "JsonCodec",
    # what operators do
    "Action", "DeadLetter", "HandlerState", "Operator",
    # errors
    "ActionRefused",
    "BusStateError", "DatabaseError", "DatabaseUnavailableError", "DuplicateSubscriptionError", "EventDecodingError",
    "EventDefinitionError", "EventEncodingError", "ForeignClusterError", "ForeignSessionError", "HandlerSessionError",
    "HandlerTimeout", "LeaseLost", "PublishError", "SchemaError", "SessionRequiredError", "SubscriptionConflictError",
    "SubscriptionError", "UnknownEventError", "UnsupportedDatabaseError", "WhereuponError", "WorkflowClosedError",
}  # fmt: skip


def test_the_public_names_are_those_written_here() -> None:
    assert set(whereupon.__all__) == PUBLIC


def test_the_public_names_are_sorted_and_listed_by_dir() -> None:
    assert list(whereupon.__all__) == sorted(set(whereupon.__all__))
    assert dir(whereupon) == list(whereupon.__all__)


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_can_be_imported(name: str) -> None:
    assert getattr(whereupon, name).__module__.partition(".")[0] == "whereupon"


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'whereupon' has no attribute 'EventBuss'"):
        whereupon.EventBuss  # type: ignore[attr-defined]  # noqa: B018 # pyright: ignore[reportAttributeAccessIssue]
    with pytest.raises(ImportError, match="EventBuss"):
        from whereupon import EventBuss  # type: ignore[attr-defined]  # noqa: F401 # pyright: ignore[reportAttributeAccessIssue]


def test_every_error_is_in_the_one_tree_and_has_its_place_in_the_picture() -> None:
    errors = {
        name for name in PUBLIC if isinstance(found := getattr(whereupon, name), type) and issubclass(found, Exception)
    }
    assert len(errors) > 15
    picture = errors_module.__doc__ or ""
    for name in errors:
        assert issubclass(getattr(whereupon, name), whereupon.WhereuponError)
        assert name in picture
