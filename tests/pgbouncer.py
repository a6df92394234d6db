"""A PgBouncer for tests: transactions of many clients share a few sessions of the server."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg
from sqlalchemy.engine import make_url

from tests.programs import program

_START_WITHIN = 20.0  # seconds
_NOBODY = "65534"


@contextmanager
def pooler(url: str, folder: Path, *, sessions: int = 4, mode: str = "transaction") -> Iterator[str]:
    """The URL of the same database through a PgBouncer with so many sessions; it ends with the block."""
    pgbouncer = program("pgbouncer")
    direct = make_url(url)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    (folder / "users.txt").write_text(f'"{direct.username}" "{direct.password or ""}"\n')
    (folder / "pgbouncer.ini").write_text(
        "[databases]\n"
        f"{direct.database} = host={direct.host} port={direct.port} dbname={direct.database} user={direct.username}\n"
        "[pgbouncer]\n"
        f"listen_addr = 127.0.0.1\nlisten_port = {port}\nunix_socket_dir =\n"
        f"auth_type = any\nauth_file = {folder}/users.txt\n"
        f"pool_mode = {mode}\ndefault_pool_size = {sessions}\nmax_client_conn = 300\n"
        "ignore_startup_parameters = extra_float_digits\nserver_round_robin = 1\n"
    )
    # it refuses to run as root; in a user namespace of its own it is nobody, and its files stay ours
    as_nobody = ["unshare", "--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}"] if os.geteuid() == 0 else []
    with (folder / "pgbouncer.log").open("wb") as output:
        process = subprocess.Popen(
            [*as_nobody, pgbouncer, str(folder / "pgbouncer.ini")],
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        )
    try:
        shown = direct.set(host="127.0.0.1", port=port)
        _wait_for(process, shown.set(drivername="postgresql").render_as_string(hide_password=False), folder)
        yield shown.render_as_string(hide_password=False)
    finally:
        process.send_signal(signal.SIGTERM)  # at once
        process.wait(10)


def _wait_for(process: subprocess.Popen[bytes], url: str, folder: Path) -> None:
    give_up = time.monotonic() + _START_WITHIN
    while True:
        try:
            with psycopg.connect(url, connect_timeout=3, prepare_threshold=None):
                return
        except psycopg.OperationalError as error:
            if process.poll() is not None or time.monotonic() > give_up:
                said = (folder / "pgbouncer.log").read_text(errors="replace")
                raise AssertionError(f"pgbouncer gives no answer: {error}; it said: {said}") from error
        time.sleep(0.05)
