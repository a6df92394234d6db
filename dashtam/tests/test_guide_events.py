"""The guide's blocks on events: how they are named, defined and kept from changing."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from guide import Becomes, block
from guide.alone import ALONE

import dashtam.domain.events
from whereupon import DomainEvent, EventDefinitionError

pytestmark = pytest.mark.unit


async def test_names_in_the_past_tense_are_events_of_dashtam() -> None:
    printed = block("01-correct-names")
    names = await printed.run()
    named = [node.id for node in ast.walk(ast.parse(printed.source)) if isinstance(node, ast.Name)]
    assert len(named) == 4
    for name in named:
        assert names[name] is getattr(dashtam.domain.events, name)
        assert issubclass(names[name], DomainEvent)


@pytest.mark.parametrize(
    ("name", "why", "instead"),
    [
        ("RegisterUser", "reads as a command", "UserRegistered"),
        ("UserRegistering", "is in the present progressive", "UserRegistered"),
        ("ChangePassword", "reads as a command", "PasswordChanged"),
        ("ConnectProvider", "reads as a command", "ProviderConnected"),
    ],
)
async def test_no_event_can_be_given_a_name_that_the_guide_calls_incorrect(name: str, why: str, instead: str) -> None:
    printed = block("02-incorrect-names")
    assert name in printed.printed.split()
    with pytest.raises(EventDefinitionError, match=f'^{name} {why}.*what has happened.*Call it "{instead}"'):
        exec(f"class {name}(DomainEvent): ...", {"__name__": "guide_02", "DomainEvent": DomainEvent})
    assert not hasattr(dashtam.domain.events, name)
    # As they are printed, the names mean nothing.
    with pytest.raises(NameError):
        await printed.run()


@pytest.mark.parametrize("name", ALONE)
def test_what_dashtam_defines_too_runs_where_dashtam_is_not_imported(name: str) -> None:
    ran = subprocess.run(
        [sys.executable, "-W", "error", "-m", "guide.alone", name],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr


@pytest.mark.parametrize("name", ["25-past-tense", "27-immutable-event"])
async def test_a_second_event_of_a_name_of_dashtam_s_is_refused_beside_it(name: str) -> None:
    with pytest.raises(
        EventDefinitionError,
        match=r"would be stored as 'UserRegistrationSucceeded', as dashtam\.domain\.events\.\w+ already is.*name=",
    ):
        await block(name).run()


def test_a_module_of_events_with_their_bodies_left_out_is_no_python() -> None:
    printed = block("04-events-module")
    assert printed.becomes is Becomes.ELISION
    with pytest.raises(IndentationError, match="expected an indented block after class definition"):
        printed.statements()


async def test_the_events_that_the_guide_exports_can_be_imported_from_dashtam() -> None:
    names = await block("05-events-exported").run()
    assert len(names["__all__"]) == 4
    for name in names["__all__"]:
        assert issubclass(names[name], DomainEvent)


@pytest.mark.parametrize(
    ("nth", "name", "instead"),
    [(0, "SendWelcomeEmail", "WelcomeEmailSent"), (1, "CreateAuditLog", "AuditLogCreated")],
)
async def test_an_event_that_is_named_like_a_command_is_refused(nth: int, name: str, instead: str) -> None:
    printed = block("24-imperative-names")
    namespace = printed.namespace()
    with pytest.raises(EventDefinitionError, match=f'^{name} reads as a command.*Call it "{instead}"'):
        eval(printed.statements()[nth], namespace)
    assert name not in namespace


async def test_a_mutable_event_is_refused_where_it_is_defined() -> None:
    with pytest.raises(
        EventDefinitionError,
        match=r"^UserRegistered is mutable.*never changes.*@dataclass\(frozen=True, kw_only=True\)",
    ):
        await block("26-mutable-event").run()
