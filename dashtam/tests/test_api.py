"""What the API makes of requests that are not as they should be."""

import re
from collections.abc import AsyncIterator
from uuid import uuid4

import pytest
from guide.aftermath import published
from served import eventually, served
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import create_async_engine

pytestmark = [pytest.mark.integration, pytest.mark.tables_ready]

JSON = {"content-type": "application/json"}


@pytest.mark.parametrize(
    ("body", "status", "reason"),
    [
        (b"", 422, "invalid"),
        (b"{", 400, "malformed_json"),
        (b"\xff\xfe", 400, "malformed_json"),
        (b"[]", 422, "invalid"),
        (b"null", 422, "invalid"),
        (b'{"email": "ada@example.com"}', 422, "invalid"),
        (b'{"email": 7, "password": "tr0ub4dor and 3"}', 422, "invalid"),
        (b'{"email": "\\ud800@example.com", "password": "tr0ub4dor and 3"}', 422, "invalid"),
        (b'{"email": "' + b"a" * 300 + b'@example.com", "password": "tr0ub4dor and 3"}', 422, "invalid"),
        (b'{"email": "ada@example.com", "password": "' + b"tr0ub4dor" * 200 + b'"}', 422, "invalid"),
        (b'{"email": "ada@example.com", "password": "tr0ub4dor and 3", "admin": true}', 422, "invalid"),
        (b"[" * 30_000, 400, None),
    ],
)
async def test_a_body_that_is_no_registration_is_a_problem_and_no_attempt(
    sqlite_url: str, body: bytes, status: int, reason: str | None
) -> None:
    async with served(sqlite_url) as dashtam:
        response = await dashtam.http.post("/users", content=body, headers=JSON)

        assert response.status_code == status
        assert response.headers["content-type"] == "application/problem+json"
        problem = response.json()
        assert problem["status"] == status
        assert problem.get("reason") == reason
        assert "tr0ub4dor" not in response.text
        assert dashtam.output.getvalue() == ""


async def test_a_problem_points_at_what_is_wrong(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        response = await dashtam.http.post("/users", json={"password": "tr0ub4dor and 3"})
        assert response.json()["invalid"] == [{"pointer": "/email", "detail": "Field required"}]


async def chunks(size: int) -> AsyncIterator[bytes]:
    for _ in range(size // 1024):
        yield b"x" * 1024


async def test_a_body_that_is_too_large_is_refused_however_it_comes(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        for content in (b"x" * (64 * 1024 + 1), chunks(128 * 1024)):
            response = await dashtam.http.post("/users", content=content, headers=JSON)
            assert response.status_code == 413
            assert response.headers["content-type"] == "application/problem+json"
        fits = b'{"email": "ada@example.com", "password": "correct horse 7"}'.ljust(64 * 1024)
        assert (await dashtam.http.post("/users", content=fits, headers=JSON)).status_code == 202


@pytest.mark.parametrize("what", ["", "/audit"])
async def test_only_an_administrator_asks_for_anybody_else(sqlite_url: str, what: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up("ada@example.com")
        await dashtam.register("grace@example.com")
        grace = await dashtam.user_id("grace@example.com")

        assert (await ada("GET", f"/users/{ada.user_id}{what}")).status_code == 200
        for user_id in (grace, uuid4()):  # the same for somebody as for nobody
            refused = await ada("GET", f"/users/{user_id}{what}")
            assert (refused.status_code, refused.json()["reason"]) == (403, "forbidden")

        await dashtam.make_admin("ada@example.com")
        assert (await ada("GET", f"/users/{grace}{what}")).status_code == 200
        unknown = await ada("GET", f"/users/{uuid4()}{what}")
        assert (unknown.status_code, unknown.json()["reason"]) == (404, "user_not_found")
        no_id = await ada("GET", f"/users/ada{what}")
        assert (no_id.status_code, no_id.json()["invalid"][0]["pointer"]) == (422, "user_id")


async def test_an_administrator_sees_who_registered_last(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up("ada@example.com")
        assert (await ada("GET", "/users")).status_code == 403
        await dashtam.register("grace@example.com")
        await dashtam.make_admin("ada@example.com")
        assert [user["email"] for user in await ada.get("/users")] == ["grace@example.com", "ada@example.com"]
        assert [user["email"] for user in await ada.get("/users?limit=1")] == ["grace@example.com"]


OPEN_TO_ALL = {
    ("GET", "/health"),
    ("GET", "/providers"),  # which banks there are is no secret
    ("POST", "/users"),
    ("POST", "/email-verifications"),
    ("POST", "/sessions"),
    ("POST", "/sessions/renewal"),
    ("POST", "/password-resets"),
    ("POST", "/password-resets/confirmation"),
}


async def test_nothing_else_is_answered_to_somebody_who_is_not_logged_in(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        paths = (await dashtam.http.get("/openapi.json")).json()["paths"]
        routes = {(method.upper(), path) for path, methods in paths.items() for method in methods}
        assert routes > OPEN_TO_ALL
        for method, path in sorted(routes - OPEN_TO_ALL):
            path = re.sub(r"\{\w+\}", str(uuid4()), path)
            for headers in ({}, {"Authorization": "Bearer nothing.of.ours"}, {"Authorization": "Basic YTpi"}):
                answer = await dashtam.http.request(method, path, headers=headers)
                assert (answer.status_code, answer.headers.get("www-authenticate")) == (401, "Bearer"), (method, path)
                assert answer.json()["reason"] == "not_logged_in"


async def test_settings_are_changed_without_an_event(database_url: str) -> None:
    async with served(database_url) as dashtam:
        ada = await dashtam.sign_up("ada@example.com")
        await eventually(lambda: ada.answers("/users/me/settings"))
        before = await published(dashtam.application.database)
        chosen = {"currency": "USD", "language": "de", "notifications": False}
        assert (await ada("PUT", "/users/me/settings", json=chosen)).json() == chosen
        assert await ada.get("/users/me/settings") == chosen
        assert await published(dashtam.application.database) == before
        for wrong in ({"currency": "dollars"}, {"language": "1"}, {"notifications": "sometimes"}, {"colour": "red"}):
            assert (await ada("PUT", "/users/me/settings", json=chosen | wrong)).status_code == 422


async def test_an_unknown_path_is_a_problem_too(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        for response in (await dashtam.http.get("/nowhere"), await dashtam.http.delete("/users")):
            assert response.status_code in (404, 405)
            assert response.headers["content-type"] == "application/problem+json"


async def test_lists_are_as_long_as_asked_for(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        ada = await dashtam.sign_up("ada@example.com")
        assert len(await ada.get("/users/me/audit?limit=1")) == 1
        for limit in ("0", "1001", "many"):
            assert (await ada("GET", f"/users/me/audit?limit={limit}")).status_code == 422


async def test_dashtam_is_healthy_while_its_database_answers(postgres_url: str) -> None:
    url = make_url(postgres_url)
    elsewhere = create_async_engine(url.set(database="postgres"), isolation_level="AUTOCOMMIT")
    cut_off = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = :name"
    try:
        async with served(postgres_url) as dashtam, elsewhere.connect() as server:
            assert (await dashtam.http.get("/health")).json() == {"status": "ok"}

            await server.execute(text(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS false'))
            await server.execute(text(cut_off), {"name": url.database})
            ill = await dashtam.http.get("/health")
            assert (ill.status_code, ill.json()["reason"]) == (503, "database_unavailable")

            await server.execute(text(f'ALTER DATABASE "{url.database}" ALLOW_CONNECTIONS true'))
            assert (await dashtam.http.get("/health")).status_code == 200
            assert (await dashtam.register("ada@example.com")).status_code == 202
            await dashtam.mail.message_to("ada@example.com")
    finally:
        await elsewhere.dispose()


async def test_the_api_describes_itself_and_its_problems(sqlite_url: str) -> None:
    async with served(sqlite_url) as dashtam:
        document = (await dashtam.http.get("/openapi.json")).json()
        responses = document["paths"]["/users"]["post"]["responses"]
        assert set(responses) == {"202", "400", "413", "422", "429"}
        assert all("application/problem+json" in responses[status]["content"] for status in ("400", "422", "429"))
        assert (await dashtam.http.get("/docs")).status_code == 200
