"""Failures of one cause have one fingerprint, others another."""

from __future__ import annotations

import json
import traceback
from collections.abc import Callable
from uuid import UUID

import pytest

from whereupon.fingerprint import fingerprint_of

pytestmark = pytest.mark.unit


def print_of(fail: Callable[[], object]) -> str:
    try:
        fail()
    except Exception as error:
        return fingerprint_of(type(error).__name__, str(error), traceback.format_exc())
    raise AssertionError("it did not fail")


def refuse(message: str) -> None:
    raise ValueError(message)


def refuse_elsewhere(message: str) -> None:
    raise ValueError(message)


def break_type(message: str) -> None:
    raise TypeError(message)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("account 17 has 3 holds", "account 4711 has 29 holds"),
        (f"no user {UUID(int=1)}", f"no user {UUID(int=2**127)}"),
        ("can't reach 'smtp.one.example'", "can't reach 'mail.other.example'"),
        ("refused: ada@one.example", "refused: grace.h@other.example"),
        ("at 0xdeadbeef", "at 0x7f"),
        ("no\nthis varies", "no\nthat, too"),
    ],
)
def test_what_differs_from_case_to_case_does_not_count(one: str, other: str) -> None:
    assert print_of(lambda: refuse(one)) == print_of(lambda: refuse(other))


def test_another_type_another_place_or_another_message_is_another_cause() -> None:
    found = {
        print_of(lambda: refuse("no")),
        print_of(lambda: refuse("never")),
        print_of(lambda: refuse_elsewhere("no")),
        print_of(lambda: break_type("no")),
    }
    assert len(found) == 4


def test_where_a_library_was_called_from_counts() -> None:
    def here() -> None:
        json.loads("{")

    def there() -> None:
        json.loads("{")

    assert print_of(here) != print_of(there)
    assert print_of(here) == print_of(here)


def test_lines_and_folders_do_not_count() -> None:
    at = 'Traceback …\n  File "{}/app/mail.py", line {}, in send\n    connect()\n'
    one, other = at.format("/srv/releases/1", 10), at.format("C:\\releases\\2".replace("\\", "/"), 99)
    assert fingerprint_of("OSError", "no", one) == fingerprint_of("OSError", "no", other)
    windows = at.format("C:/srv", 1).replace("/", "\\")
    assert fingerprint_of("OSError", "no", windows) == fingerprint_of("OSError", "no", one)


def test_anything_has_a_fingerprint() -> None:
    for message in (None, "", "\ud800", "x" * 100_000, "'" * 5000, str(UUID(int=0))):
        assert len(fingerprint_of("ValueError", message, None)) == 12
