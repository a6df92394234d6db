"""`python -m dashtam_sandbox_bank`."""

import argparse
import os
import signal
import socket
import sys

import uvicorn

from dashtam_sandbox_bank.app import create_bank
from dashtam_sandbox_bank.settings import BankSettings, InvalidSetting

SECONDS_TO_STOP = 3  # answers that a fault delays for longer are cut off


def main(arguments: list[str] | None = None) -> int:
    defaults = BankSettings()
    parser = argparse.ArgumentParser(
        prog="dashtam-sandbox-bank",
        description="A bank to try Dashtam with: OAuth 2.0, accounts, transactions, and faults on demand. "
        'It keeps everything in memory. Log in with any name and the password "sandbox".',
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--host", default="127.0.0.1", help="where to listen")
    parser.add_argument("--port", type=int, default=8100, help="0: one that is free")
    parser.add_argument("--client-id", default=defaults.client_id, help="the client that is known")
    parser.add_argument(
        "--client-secret", default=defaults.client_secret, help="its secret; other processes can see it"
    )
    parser.add_argument(
        "--redirect-uri",
        action="append",
        metavar="URI",
        help=f"where a person may be sent back to; repeatable (default: {defaults.redirect_uris[0]})",
        default=argparse.SUPPRESS,
    )
    parser.add_argument(
        "--issuer", metavar="URL", default=argparse.SUPPRESS, help="the address others use (default: http://HOST:PORT)"
    )
    parser.add_argument("--access-token-seconds", type=int, default=defaults.access_token_seconds, help="lifetime")
    parser.add_argument("--refresh-token-seconds", type=int, default=defaults.refresh_token_seconds, help="lifetime")
    chosen = parser.parse_args(arguments)
    if not 0 <= chosen.port <= 65_535:
        parser.error(f"--port is {chosen.port}: give one from 0 to 65535.")

    try:
        family = socket.AF_INET6 if ":" in chosen.host else socket.AF_INET
        door = socket.create_server((chosen.host, chosen.port), family=family)
    except OSError as error:
        print(f"dashtam-sandbox-bank: {chosen.host}:{chosen.port}: {error}", file=sys.stderr)
        return 1
    with door:
        host = f"[{chosen.host}]" if family == socket.AF_INET6 else chosen.host
        address = f"http://{host}:{door.getsockname()[1]}"
        try:
            settings = BankSettings(
                client_id=chosen.client_id,
                client_secret=chosen.client_secret,
                redirect_uris=tuple(getattr(chosen, "redirect_uri", defaults.redirect_uris)),
                issuer=getattr(chosen, "issuer", address),
                access_token_seconds=chosen.access_token_seconds,
                refresh_token_seconds=chosen.refresh_token_seconds,
            )
        except InvalidSetting as error:
            print(f"dashtam-sandbox-bank: {error}", file=sys.stderr)
            return 2
        return _serve(settings, door, address)


def _serve(settings: BankSettings, door: socket.socket, address: str) -> int:
    config = uvicorn.Config(
        create_bank(settings),
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=SECONDS_TO_STOP,
    )
    server = uvicorn.Server(config)
    # uvicorn stops in order, and then raises the signal again: asked to stop, we did. Nor is there anything to tidy up
    # before uvicorn has begun: an exception amid the making of the event loop would tell of a loop that is half made
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    print(f"The sandbox bank is at {address}", flush=True)
    try:
        server.run(sockets=[door])
    except KeyboardInterrupt:
        return 0
    return 0 if server.started else 1


if __name__ == "__main__":
    sys.exit(main())
