"""The bank as a web application."""

from collections.abc import Callable
from datetime import datetime

from fastapi import FastAPI

from dashtam_sandbox_bank.accounts_api import account_routes
from dashtam_sandbox_bank.bank import Bank, wall_clock
from dashtam_sandbox_bank.consent import oauth_routes
from dashtam_sandbox_bank.control import control_routes
from dashtam_sandbox_bank.form_seals import FormSeals
from dashtam_sandbox_bank.pages import Pages
from dashtam_sandbox_bank.refusals import answer_refusals
from dashtam_sandbox_bank.settings import BankSettings
from dashtam_sandbox_bank.start_page import start_routes

LARGEST_BODY = 64 * 1024  # bytes


def create_bank(settings: BankSettings | None = None, *, clock: Callable[[], datetime] = wall_clock) -> FastAPI:
    """An ASGI application; `app.state.bank` is its `Bank`. By `clock`, which tells aware times, tokens expire."""
    settings = settings or BankSettings()
    bank = Bank(settings, clock)
    pages = Pages(FormSeals(clock, over_https=settings.issuer.startswith("https:")))
    app = FastAPI(
        title="Sandbox bank",
        summary="A bank to try Dashtam with: OAuth 2.0, accounts, transactions, and faults on demand.",
        max_body_size=LARGEST_BODY,
        redirect_slashes=False,  # it would build its answer from the Host header
    )
    app.state.bank = bank
    app.include_router(oauth_routes(bank, pages))
    app.include_router(account_routes(bank))
    app.include_router(control_routes(bank))
    app.include_router(start_routes(bank, pages))
    app.include_router(pages.routes)
    answer_refusals(app)
    return app
