"""Whatever is sent to the API, it is answered as its OpenAPI document says, and never by a fault of ours."""

import asyncio
from typing import Any

import httpx
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)
from served import PASSWORD, served

from dashtam.bootstrap import api_of
from dashtam.serving import serving

pytestmark = [pytest.mark.integration, pytest.mark.slow, pytest.mark.tables_ready]

UNHEALTHY = [HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large]
EXAMPLES = 10  # of each operation, on each database
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]


def try_it(operation: Any, headers: dict[str, str]) -> None:
    @given(case=operation.as_strategy())
    @settings(
        max_examples=EXAMPLES,
        deadline=None,
        database=None,
        derandomize=True,
        phases=[Phase.explicit, Phase.generate],
        suppress_health_check=UNHEALTHY,
    )
    def any_case(case: Any) -> None:
        case.call_and_validate(headers=headers, checks=CHECKS, timeout=30)

    any_case()


def try_all(address: str, email: str) -> list[str]:
    """Every operation, each as somebody who has just logged in: the one before may have been logging out."""
    tried = []
    for result in schemathesis.openapi.from_url(f"{address}/openapi.json").get_all_operations():
        operation: Any = result.ok()  # type: ignore[union-attr] # pyright: ignore[reportAttributeAccessIssue]
        tokens = httpx.post(f"{address}/sessions", json={"email": email, "password": PASSWORD}).json()
        try_it(operation, {"Authorization": f"Bearer {tokens['access_token']}"})
        tried.append(f"{operation.method.upper()} {operation.path}")
    return tried


# Hypothesis minds that `random` is used while it makes examples: by Dashtam, which runs beside it in another thread.
@pytest.mark.filterwarnings("ignore::hypothesis.errors.HypothesisDeprecationWarning")
async def test_no_input_is_answered_by_a_fault_or_otherwise_than_described(database_url: str) -> None:
    async with served(database_url, raise_faults=False, rate_limit_factor=1e6) as dashtam:
        ada = await dashtam.sign_up("ada@example.com")
        await dashtam.make_admin("ada@example.com")
        async with serving(api_of(dashtam.application), lifespan="off") as address:
            tried = await asyncio.to_thread(try_all, address, ada.email)
        assert len(tried) == len(set(tried)) > 15
        assert not [record for record in dashtam.log if record["event"] == "request_failed"]
