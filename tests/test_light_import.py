"""`import whereupon` costs what the core needs; drivers and frameworks are loaded by whoever uses them."""

import json
import subprocess
import sys

import pytest

LISTS_WHAT_IT_LOADED = """
import json, sys
before = set(sys.modules)
import whereupon
print(json.dumps(sorted({name.partition(".")[0] for name in set(sys.modules) - before})))
"""

LISTS_OBSERVERS = """
import json, sys
from whereupon import DomainEvent, EventBus, InMemoryEventBus
from whereupon import audit, doctor, durable, monitoring, story
EventBus("sqlite+aiosqlite:///:memory:")
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""

pytestmark = pytest.mark.integration


def test_importing_whereupon_loads_the_standard_library_msgspec_and_uuid_utils_only() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LISTS_WHAT_IT_LOADED], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(ran.stdout))
    assert "whereupon" in loaded
    # msgspec takes typing_extensions where it happens to be installed, and does without it elsewhere.
    assert loaded - sys.stdlib_module_names <= {"whereupon", "msgspec", "uuid_utils", "typing_extensions"}


def test_a_bus_that_nobody_observes_loads_neither_opentelemetry_nor_prometheus() -> None:
    ran = subprocess.run(
        [sys.executable, "-c", LISTS_OBSERVERS], capture_output=True, text=True, check=True, timeout=60
    )
    loaded = set(json.loads(ran.stdout))
    assert {"whereupon", "sqlalchemy"} <= loaded
    assert loaded.isdisjoint({"opentelemetry", "prometheus_client"})
