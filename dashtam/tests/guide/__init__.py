"""The usage guide's code, block by block as it is printed there, and what must become of each.

A block is a file of this folder; nothing of it is edited. Before it runs, its import lines are replaced as
`imports.CHANGED` says, the imports that it leaves out are put before it (`imports.ADDED`), and a test gives it whatever
else it leaves to its surroundings.
"""

import ast
import enum
import inspect
import json
import re
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import CodeType
from typing import Any

from guide.imports import ADDED, CHANGED

FOLDER = Path(__file__).parent


class Becomes(enum.Enum):
    RUNS = "runs as it is printed"
    REFUSED = "raises, and the message names the way out"
    RUNS_THEN_REFUSED = "shows the right and the wrong way: the right one runs, the wrong one is refused"
    ELISION = "leaves bodies out, so it is no Python; with them filled in it runs"
    SHOWN = "is about no event of Dashtam: what it claims is checked, there is nothing to run"
    RECORD = "is a log record"


@dataclass(frozen=True)
class Block:
    name: str
    """Of its file, without the ending."""
    heading: str
    """What it stands under in the guide, without the guide's title."""
    becomes: Becomes
    tests: tuple[str, ...]
    """The tests that pin this."""

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.{'json' if self.becomes is Becomes.RECORD else 'txt'}"

    @property
    def printed(self) -> str:
        return self.path.read_text(encoding="utf-8")

    @property
    def source(self) -> str:
        """As printed, but for its import lines."""
        return "".join(_imported(line) for line in self.printed.splitlines(keepends=True))

    @property
    def record(self) -> dict[str, Any]:
        record: dict[str, Any] = json.loads(self.printed)
        return record

    def comments(self) -> str:
        """What its lines that are comments say, where it shows by a comment what must come of it."""
        lines = self.printed.splitlines()
        return "\n".join(line.removeprefix("#").strip() for line in lines if line.startswith("#"))

    def filled_in(self, fill: Callable[[str], str]) -> "Filled":
        """The block with `fill` applied to its source: what it leaves out is put in, every line of it stays."""
        return Filled(self.name, self.source, fill(self.source))

    def statements(self) -> list[CodeType]:
        return statements(self.source, str(self.path))

    def namespace(self, **surroundings: Any) -> dict[str, Any]:
        """Where it runs: its added imports, and what it leaves to its surroundings."""
        names: dict[str, Any] = {"__name__": f"guide_{self.name[:2]}"}
        exec("\n".join(ADDED.get(self.name, ())), names)
        return names | surroundings

    async def run(self, **surroundings: Any) -> dict[str, Any]:
        """Run it from the first line to the last; return the names it knows then."""
        return await run(self.statements(), self.namespace(**surroundings))

    def test(self, name: str) -> Callable[..., Coroutine[Any, Any, None]]:
        """The test that it defines, for pytest to collect."""
        names = self.namespace()
        for statement in self.statements():
            exec(statement, names)
        defined: Callable[..., Coroutine[Any, Any, None]] = names[name]
        return defined


@dataclass(frozen=True)
class Filled:
    """A block whose elisions are filled in."""

    name: str
    before: str
    source: str

    def __post_init__(self) -> None:
        kept = iter(self.source.splitlines())
        for line in self.before.splitlines():
            if "..." not in line and not any(line in later for later in kept):
                raise AssertionError(f"filling in {self.name} changed {line!r}")

    def statements(self) -> list[CodeType]:
        return statements(self.source, f"{self.name}, filled in")


async def run(statements: list[CodeType], namespace: dict[str, Any]) -> dict[str, Any]:
    for statement in statements:
        result = eval(statement, namespace)
        if inspect.iscoroutine(result):
            await result
    return namespace


def statements(source: str, file: str) -> list[CodeType]:
    return [
        compile(ast.Module([node], []), file, "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT, dont_inherit=True)
        for node in ast.parse(source).body
    ]


def _imported(line: str) -> str:
    text = line.rstrip("\n")
    if re.match(r"(from|import)\s+src\b", text):
        return CHANGED[text] + "\n"
    return line


def printed_in(markdown: str) -> Iterator[tuple[str, str, str]]:
    """Language, heading and text of each block of a guide, in order."""
    headings: list[str] = []
    fence: re.Match[str] | None = None
    lines: list[str] = []
    for line in markdown.splitlines():
        if fence is not None:
            if line.strip() == "```":
                yield fence["language"], " › ".join(headings[1:]), "".join(f"{one}\n" for one in lines)
                fence = None
            else:
                lines.append(line.removeprefix(fence["indent"]))
        elif found := re.fullmatch(r"(?P<indent> *)```(?P<language>\w*)", line):
            fence, lines = found, []
        elif heading := re.fullmatch(r"(#+) (.*)", line):
            headings[len(heading[1]) - 1 :] = [heading[2]]


BLOCKS = (
    Block(
        "01-correct-names",
        "Event Naming Conventions › ✅ Correct Naming",
        Becomes.RUNS,
        ("test_names_in_the_past_tense_are_events_of_dashtam",),
    ),
    Block(
        "02-incorrect-names",
        "Event Naming Conventions › ❌ Incorrect Naming",
        Becomes.REFUSED,
        ("test_no_event_can_be_given_a_name_that_the_guide_calls_incorrect",),
    ),
    Block(
        "03-event-dataclass",
        "Defining New Events › Step 1: Create Event Dataclass",
        Becomes.RUNS,
        ("test_what_dashtam_defines_too_runs_where_dashtam_is_not_imported",),
    ),
    Block(
        "04-events-module",
        "Defining New Events › Step 2: Add to Events Module",
        Becomes.ELISION,
        (
            "test_a_module_of_events_with_their_bodies_left_out_is_no_python",
            "test_what_dashtam_defines_too_runs_where_dashtam_is_not_imported",
        ),
    ),
    Block(
        "05-events-exported",
        "Defining New Events › Step 3: Export from `__init__.py`",
        Becomes.RUNS,
        ("test_the_events_that_the_guide_exports_can_be_imported_from_dashtam",),
    ),
    Block(
        "06-session-required",
        "Publishing Events › Session Requirement (CRITICAL)",
        Becomes.RUNS_THEN_REFUSED,
        (
            "test_a_forgotten_session_is_refused_in_the_guide_s_words_and_the_published_event_stays",
            "test_an_event_made_of_an_ellipsis_is_refused",
        ),
    ),
    Block(
        "07-command-handler",
        "Publishing Events › From Command Handlers (Application Layer)",
        Becomes.RUNS,
        (
            "test_the_guide_s_command_handler_registers_a_user_and_everything_follows",
            "test_the_guide_s_command_handler_leaves_no_event_of_a_registration_that_failed",
        ),
    ),
    Block(
        "08-domain-service",
        "Publishing Events › From Domain Services",
        Becomes.RUNS,
        ("test_the_guide_s_domain_service_resets_a_password",),
    ),
    Block(
        "09-handler-class",
        "Creating Event Handlers › Step 1: Create Handler Class",
        Becomes.RUNS,
        ("test_the_guide_s_handler_class_logs_a_notification_once_the_account_is_committed",),
    ),
    Block(
        "10-container",
        "Creating Event Handlers › Step 2: Wire Handler in Container",
        Becomes.RUNS,
        ("test_the_guide_s_container_makes_one_bus_that_has_its_handler",),
    ),
    Block(
        "11-audit-trail",
        "Integration with Audit and Logging › Automatic Audit Trail",
        Becomes.RUNS,
        (
            "test_the_audit_record_is_the_one_that_the_guide_shows",
            "test_publishing_without_a_session_outside_a_test_says_what_to_do",
        ),
    ),
    Block(
        "12-structured-log",
        "Integration with Audit and Logging › Automatic Structured Logging",
        Becomes.RUNS,
        (
            "test_the_log_record_is_the_one_that_the_guide_shows",
            "test_publishing_without_a_session_outside_a_test_says_what_to_do",
        ),
    ),
    Block(
        "13-unit-test",
        "Testing Event-Driven Code › Unit Testing Event Publication",
        Becomes.RUNS,
        ("test_register_user_publishes_event",),
    ),
    Block(
        "14-integration-test",
        "Testing Event-Driven Code › Integration Testing Event Flow",
        Becomes.RUNS,
        ("test_user_registration_creates_audit_record",),
    ),
    Block(
        "15-check-subscription",
        "Troubleshooting › Handler Not Executing",
        Becomes.RUNS,
        ("test_a_subscribed_handler_is_executed",),
    ),
    Block(
        "16-check-event-type",
        "Troubleshooting › Handler Not Executing",
        Becomes.RUNS_THEN_REFUSED,
        ("test_a_handler_of_another_event_type_is_refused_and_of_the_exact_type_executed",),
    ),
    Block(
        "17-check-signature",
        "Troubleshooting › Handler Not Executing",
        Becomes.ELISION,
        (
            "test_signatures_without_a_body_are_no_python",
            "test_a_handler_that_is_not_async_is_refused_and_the_async_one_executed",
        ),
    ),
    Block(
        "18-failed-handler",
        "Troubleshooting › Handler Failure Breaking Event Bus",
        Becomes.RECORD,
        ("test_a_handler_that_fails_is_logged_as_the_guide_shows_and_the_others_run",),
    ),
    Block(
        "19-closed-loop",
        "Troubleshooting › Audit Records Not Created (Integration Tests)",
        Becomes.RECORD,
        (
            "test_one_bus_serves_one_event_loop_after_the_other",
            "test_a_bus_that_only_publishes_audits_on_one_event_loop_after_the_other",
        ),
    ),
    Block(
        "20-events-for-everything",
        "Anti-Patterns › ❌ Anti-Pattern 1: Events for Everything",
        Becomes.SHOWN,
        ("test_dashtam_has_no_event_for_what_is_only_read",),
    ),
    Block(
        "21-direct-calls",
        "Anti-Patterns › ❌ Anti-Pattern 1: Events for Everything",
        Becomes.SHOWN,
        ("test_what_is_only_read_is_read_without_the_bus",),
    ),
    Block(
        "22-dependent-handlers",
        "Anti-Patterns › ❌ Anti-Pattern 2: Synchronous Handler Dependencies",
        Becomes.RUNS,
        ("test_two_concerns_in_one_handler_share_the_failure_of_the_first",),
    ),
    Block(
        "23-independent-handlers",
        "Anti-Patterns › ❌ Anti-Pattern 2: Synchronous Handler Dependencies",
        Becomes.RUNS,
        ("test_a_concern_with_a_handler_of_its_own_does_not_share_the_failure_of_another",),
    ),
    Block(
        "24-imperative-names",
        "Anti-Patterns › ❌ Anti-Pattern 3: Imperative Event Names",
        Becomes.REFUSED,
        ("test_an_event_that_is_named_like_a_command_is_refused",),
    ),
    Block(
        "25-past-tense",
        "Anti-Patterns › ❌ Anti-Pattern 3: Imperative Event Names",
        Becomes.RUNS,
        ("test_what_dashtam_defines_too_runs_where_dashtam_is_not_imported",),
    ),
    Block(
        "26-mutable-event",
        "Anti-Patterns › ❌ Anti-Pattern 4: Mutable Events",
        Becomes.REFUSED,
        ("test_a_mutable_event_is_refused_where_it_is_defined",),
    ),
    Block(
        "27-immutable-event",
        "Anti-Patterns › ❌ Anti-Pattern 4: Mutable Events",
        Becomes.RUNS_THEN_REFUSED,
        ("test_what_dashtam_defines_too_runs_where_dashtam_is_not_imported",),
    ),
    Block(
        "28-published-before-save",
        "Anti-Patterns › ❌ Anti-Pattern 5: Publishing Before Commit",
        Becomes.REFUSED,
        ("test_publishing_before_the_user_is_saved_is_refused_and_nothing_follows",),
    ),
    Block(
        "29-published-after-save",
        "Anti-Patterns › ❌ Anti-Pattern 5: Publishing Before Commit",
        Becomes.RUNS,
        ("test_publishing_after_the_user_is_saved_is_followed_by_everything",),
    ),
)


def block(name: str) -> Block:
    (found,) = (one for one in BLOCKS if one.name == name)
    return found
