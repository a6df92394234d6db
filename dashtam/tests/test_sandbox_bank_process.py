"""The sandbox bank as a process of its own."""

import asyncio
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import grimp
import httpx
import pytest
from bank_visitor import CALLBACK, CREDENTIALS, VERIFIER, question, sealed, told

pytestmark = pytest.mark.integration


@contextmanager
def banking(*arguments: str) -> Iterator[subprocess.Popen[str]]:
    command = [sys.executable, "-m", "dashtam_sandbox_bank", *arguments]
    with subprocess.Popen(command, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def address(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    line = process.stdout.readline()
    found = re.search(r"http://127\.0\.0\.1:\d+", line)
    assert found is not None, line + process.communicate(timeout=30)[0]
    return found[0]


@pytest.mark.parametrize("asked", [signal.SIGINT, signal.SIGTERM])
def test_the_bank_serves_and_stops_when_asked_to(asked: signal.Signals) -> None:
    with banking("--port", "0", "--client-secret", "top-secret", "--redirect-uri", CALLBACK) as process:
        url = address(process)
        with httpx.Client(base_url=url) as http:
            metadata = http.get("/.well-known/oauth-authorization-server").json()
            assert metadata["issuer"] == url
            form = {"seal": sealed(http.get(question())), "name": "Ada", "password": "sandbox", "decision": "allow"}
            code = told(http.post(question(), data=form))["code"]
            exchange = {"grant_type": "authorization_code", "code": code, "redirect_uri": CALLBACK}
            tokens = http.post(
                metadata["token_endpoint"], data=exchange | {"code_verifier": VERIFIER}, auth=CREDENTIALS
            ).json()
            bearer = {"authorization": f"Bearer {tokens['access_token']}"}
            assert http.get("/api/accounts", headers=bearer).json()["accounts"]
            assert http.get("/nowhere/", headers={"host": "["}).status_code in (400, 404)
            process.send_signal(asked)
            output, _ = process.communicate(timeout=30)
    assert process.returncode == 0, output
    assert output == ""


@pytest.mark.parametrize("milliseconds", [0, 1, 2, 4])
def test_a_bank_that_is_stopped_as_it_starts_says_nothing_of_it(milliseconds: int) -> None:
    with banking("--port", "0") as process:
        address(process)
        time.sleep(milliseconds / 1000)
        process.send_signal(signal.SIGTERM)
        output, _ = process.communicate(timeout=30)
    assert (process.returncode, output) == (0, "")


async def test_an_answer_that_is_late_does_not_keep_the_bank_from_stopping() -> None:
    with banking("--port", "0", "--client-secret", "top-secret", "--redirect-uri", CALLBACK) as process:
        async with httpx.AsyncClient(base_url=address(process)) as http:
            late = {"at": "token", "delay_seconds": 60}
            assert (await http.put("/sandbox/people/Ada")).status_code == 200
            assert (await http.put("/sandbox/people/Ada/faults", json=late)).status_code == 200
            form = {"seal": sealed(await http.get(question())), "name": "Ada", "password": "sandbox"}
            code = told(await http.post(question(), data=form | {"decision": "allow"}))["code"]
            waiting = asyncio.create_task(http.post("/oauth/token", data={"code": code}, timeout=50))
            await asyncio.sleep(0.5)
            assert not waiting.done()
            process.send_signal(signal.SIGTERM)
            await asyncio.gather(waiting, return_exceptions=True)  # how it ends is not ours to say
        await asyncio.to_thread(process.wait, 30)
    assert process.returncode == 0


def test_a_port_that_is_taken_is_an_error() -> None:
    with banking("--port", "0") as process:
        port = address(process).rpartition(":")[2]
        with banking("--port", port) as other:
            output, _ = other.communicate(timeout=30)
    assert other.returncode == 1
    assert "Address already in use" in output


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--redirect-uri", "/callback"], "redirect_uris has '/callback'"),
        (["--access-token-seconds", "0"], "access_token_seconds is 0"),
        (["--client-secret", ""], "client_secret"),
        (["--port", "70000"], "--port is 70000"),
    ],
)
def test_an_option_that_can_not_work_is_an_error(arguments: list[str], named: str) -> None:
    with banking(*(["--port", "0"] if "--port" not in arguments else []), *arguments) as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert named in output
    assert "Traceback" not in output


def test_help_names_every_option() -> None:
    with banking("--help") as process:
        output, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    for option in ("--host", "--port", "--client-id", "--client-secret", "--redirect-uri", "--access-token-seconds"):
        assert option in output


def test_the_bank_knows_nothing_of_dashtam_or_whereupon() -> None:
    graph = grimp.build_graph("dashtam_sandbox_bank", "dashtam", "whereupon", cache_dir=None)
    known = graph.find_upstream_modules("dashtam_sandbox_bank", as_package=True)
    assert not {module for module in known if module.partition(".")[0] in ("dashtam", "whereupon")}
    users = graph.find_downstream_modules("dashtam_sandbox_bank", as_package=True)
    assert not {module for module in users if module.partition(".")[0] == "dashtam"}
