"""What pages that are open hear, over a real connection."""

import asyncio
import os
import re
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager

import httpx
import pytest
from browsed import Town, town
from served import PASSWORD, eventually, mail_server
from sqlalchemy import QueuePool

from dashtam.presentation.web.live import LOOKED_EVERY, MOST_STREAMS

pytestmark = pytest.mark.integration

ADA = "ada@example.com"


async def form_token(http: httpx.AsyncClient, path: str) -> str:
    found = re.search(r'name="form_token" value="([0-9a-f]+)"', (await http.get(path)).text)
    assert found is not None
    return found[1]


@asynccontextmanager
async def logged_in(url: str, email: str = ADA) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=url, timeout=20) as http:
        fields = {"form_token": await form_token(http, "/login"), "email": email, "password": PASSWORD}
        answer = await http.post("/login", data=fields)
        assert answer.headers.get("location") == "/home", answer.text
        yield http


class Listener:
    """The messages of a stream, as they come."""

    def __init__(self, response: httpx.Response) -> None:
        self.heard: list[str] = []
        self._task = asyncio.create_task(self._listen(response))

    async def _listen(self, response: httpx.Response) -> None:
        async for line in response.aiter_lines():
            if line.startswith("event: "):
                self.heard.append(line.removeprefix("event: "))

    async def ended(self) -> None:
        async with asyncio.timeout(20):
            await asyncio.gather(self._task, return_exceptions=True)

    async def hears(self, count: int, what: str = "changed") -> None:
        async def look() -> bool:
            return self.heard.count(what) >= count

        await eventually(look)

    def close(self) -> None:
        self._task.cancel()


@asynccontextmanager
async def listening(http: httpx.AsyncClient, path: str = "/live") -> AsyncIterator[Listener]:
    async with http.stream("GET", path) as response:
        assert response.status_code == 200
        assert response.headers["content-type"].startswith("text/event-stream")
        listener = Listener(response)
        try:
            yield listener
        finally:
            listener.close()
            await listener.ended()


@pytest.fixture
async def here(sqlite_url: str) -> AsyncIterator[Town]:
    async with town(sqlite_url) as running:
        yield running


async def test_a_stream_tells_its_user_what_concerns_them_and_an_administrator_of_everybody(here: Town) -> None:
    for email in (ADA, "eve@example.com"):
        await here.sign_up(email)
    await here.dashtam.make_admin("eve@example.com")
    async with logged_in(here.url) as ada, logged_in(here.url, "eve@example.com") as eve:
        assert (await ada.get("/live?of=everybody")).status_code == 403
        async with listening(ada) as hers, listening(eve) as eves, listening(eve, "/live?of=everybody") as everybodys:
            for each in (hers, eves, everybodys):
                await each.hears(1)
            await asyncio.sleep(LOOKED_EVERY + 0.5)  # whatever still followed was told
            before = len(hers.heard), len(eves.heard), len(everybodys.heard)
            await here.dashtam.log_in(ADA)
            await hers.hears(before[0] + 1)
            await everybodys.hears(before[2] + 1)
            await asyncio.sleep(LOOKED_EVERY + 0.5)
            assert len(eves.heard) == before[1]


async def test_a_stream_holds_no_connection_to_the_database_while_it_waits(here: Town) -> None:
    await here.sign_up(ADA)
    async with logged_in(here.url) as ada, listening(ada) as stream:
        await stream.hears(1)
        pool = here.dashtam.bus.engine.sync_engine.pool

        assert isinstance(pool, QueuePool)

        async def nothing_is_held() -> bool:
            return pool.checkedout() == 0

        await eventually(nothing_is_held)


async def test_a_stream_ends_with_its_session(here: Town) -> None:
    await here.sign_up(ADA)
    async with logged_in(here.url) as ada, logged_in(here.url) as other, listening(ada) as stream:
        await stream.hears(1)
        answer = await other.post("/devices/revoke", data={"form_token": await form_token(other, "/devices")})
        assert answer.status_code == 303
        await stream.ended()
        assert stream.heard[-1] == "over"
        assert (await ada.get("/live")).headers["location"] == "/login"


async def test_of_too_many_streams_of_one_session_the_oldest_ends(here: Town) -> None:
    await here.sign_up(ADA)
    async with logged_in(here.url) as ada, listening(ada) as oldest:
        await oldest.hears(1)
        async with listening(ada) as second:
            await second.hears(1)
            async with listening(ada) as third, listening(ada) as fourth, listening(ada) as fifth:
                assert MOST_STREAMS == 4
                await fifth.hears(1)
                await oldest.ended()
                assert oldest.heard[-1] == "over"
                for each in (second, third, fourth, fifth):
                    assert "over" not in each.heard


@contextmanager
def process_of(port: int, **environment: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dashtam", "serve", "--port", str(port)]
    with subprocess.Popen(
        command, env=os.environ | environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    ) as process:
        try:
            yield process
        finally:
            process.kill()


async def test_dashtam_stops_when_asked_to_though_pages_are_open(sqlite_url: str, unused_tcp_port: int) -> None:
    url = f"http://127.0.0.1:{unused_tcp_port}"
    async with mail_server() as mail, httpx.AsyncClient(base_url=url, timeout=20) as http:
        settings = {"DASHTAM_DATABASE_URL": sqlite_url, "DASHTAM_SMTP_PORT": str(mail.port)}
        with process_of(unused_tcp_port, **settings) as process:

            async def up() -> bool:
                assert process.poll() is None, process.communicate()[0]
                try:
                    return (await http.get("/health")).status_code == 200
                except httpx.TransportError:
                    return False

            async def mailed() -> list[str]:
                bodies = [each.get_body(("plain",)) for each in mail.accepted]
                return re.findall(r"token=([\w=-]+)", "".join(each.get_content() for each in bodies if each))

            await eventually(up)
            assert (await http.post("/users", json={"email": ADA, "password": PASSWORD})).status_code == 202
            (token,) = await eventually(mailed)
            assert (await http.post("/email-verifications", json={"token": token})).status_code == 204
            async with logged_in(url) as ada, listening(ada) as stream:
                await stream.hears(1)
                process.send_signal(signal.SIGTERM)
                await stream.ended()
                output, _ = await asyncio.to_thread(process.communicate, timeout=10)
    assert process.returncode == 0, output
    assert "Traceback" not in output
    assert "request_failed" not in output
