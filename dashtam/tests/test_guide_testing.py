"""The tests that the guide shows, collected and run as they are printed there."""

from collections.abc import AsyncIterator

import pytest
from guide import block
from served import mail_server

from dashtam.bootstrap import forget, get_application, get_database, get_event_bus
from dashtam.infrastructure import schema
from dashtam.infrastructure.database import Database
from dashtam.infrastructure.secret_keys import make_key
from whereupon.testing import own_transactions

test_register_user_publishes_event = block("13-unit-test").test("test_register_user_publishes_event")

test_user_registration_creates_audit_record = block("14-integration-test").test(
    "test_user_registration_creates_audit_record"
)


@pytest.fixture(name="test_database")
async def _test_database(database_url: str, monkeypatch: pytest.MonkeyPatch) -> AsyncIterator[Database]:
    """Dashtam as its composition root wires it, running on a new database, where events may stand alone."""
    async with mail_server() as mail:
        monkeypatch.setenv("DASHTAM_DATABASE_URL", database_url)
        monkeypatch.setenv("DASHTAM_SMTP_PORT", str(mail.port))
        monkeypatch.setenv("DASHTAM_SECRET_KEYS", f'["{make_key()}"]')
        forget()
        try:
            await schema.upgrade(get_database().engine)
            async with get_application().running():
                with own_transactions(get_event_bus()):
                    yield get_database()
        finally:
            await get_database().engine.dispose()
            forget()
