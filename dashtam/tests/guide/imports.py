"""What is changed of the guide's blocks: where they import from, and nothing else."""

from collections.abc import Mapping
from typing import Final

CHANGED: Final[Mapping[str, str]] = {
    "from src.domain.events.base_event import DomainEvent": "from whereupon import DomainEvent",
    "from src.domain.events.account_events import (": "from dashtam.domain.events import (",
    "from src.domain.events.auth_events import (": "from dashtam.domain.events import (",
    "from src.domain.events.account_events import AccountCreated": ("from dashtam.domain.events import AccountCreated"),
    "from src.domain.events.auth_events import UserRegistrationSucceeded": (
        "from dashtam.domain.events import UserRegistrationSucceeded"
    ),
    "from src.core.container import get_event_bus": "from dashtam.bootstrap import get_event_bus",
    "from src.domain.protocols.logger_protocol import LoggerProtocol": (
        "from dashtam.application.logger import LoggerProtocol"
    ),
    "from src.infrastructure.events.handlers.notification_event_handler import NotificationEventHandler": (
        "from dashtam.application.notifications import NotificationEventHandler"
    ),
    "from src.application.commands.register_user import RegisterUserHandler": (
        "from dashtam.application.registration import RegisterUserHandler"
    ),
}
"""Import lines as they are printed, and as they are with the packages that exist."""

_AFTER_A_PASSWORD: Final = (
    "from uuid import UUID",
    "from dashtam.application.database import DatabaseProtocol",
    "from dashtam.domain.result import Error, Failure, Result, Success",
    "from dashtam.domain.user import User, UserNotFound, UserRepository",
    "from whereupon import EventBusProtocol",
)

ADDED: Final[Mapping[str, tuple[str, ...]]] = {
    "01-correct-names": (
        "from dashtam.domain.events import ProviderConnectionFailed, TokenRefreshAttempted",
        "from dashtam.domain.events import UserPasswordChangeSucceeded, UserRegistrationSucceeded",
    ),
    "06-session-required": ("from dashtam.domain.events import UserRegistrationSucceeded",),
    "07-command-handler": (
        *_AFTER_A_PASSWORD,
        "from dashtam.application.registration import RegisterUser",
    ),
    "08-domain-service": (
        *_AFTER_A_PASSWORD,
        "from dashtam.domain.events import UserPasswordChangeSucceeded",
    ),
    "10-container": (
        "from functools import lru_cache",
        "from dashtam.bootstrap import get_logger",
        "from dashtam.domain.events import AccountCreated",
        "from whereupon import InMemoryEventBus",
    ),
    "11-audit-trail": ("from dashtam.domain.events import UserPasswordChangeSucceeded",),
    "12-structured-log": ("from dashtam.domain.events import ProviderConnectionSucceeded",),
    "13-unit-test": ("from dashtam.application.registration import RegisterUser",),
    "14-integration-test": (
        "from sqlalchemy import select",
        "from uuid_utils.compat import uuid7",
        "from dashtam.domain.audit import AuditAction",
        "from dashtam.domain.events import UserRegistrationSucceeded",
        "from dashtam.infrastructure.tables import AuditLogModel",
    ),
    "16-check-event-type": ("from dashtam.domain.events import UserRegistrationSucceeded",),
    "22-dependent-handlers": ("from dashtam.domain.events import UserRegistrationSucceeded",),
    "23-independent-handlers": ("from dashtam.domain.events import UserRegistrationSucceeded",),
    "24-imperative-names": ("from dataclasses import dataclass", "from whereupon import DomainEvent"),
    "25-past-tense": (
        "from dataclasses import dataclass",
        "from uuid import UUID",
        "from whereupon import DomainEvent",
    ),
    "26-mutable-event": (
        "from dataclasses import dataclass",
        "from uuid import UUID",
        "from whereupon import DomainEvent",
    ),
    "27-immutable-event": (
        "from dataclasses import dataclass",
        "from uuid import UUID",
        "from whereupon import DomainEvent",
    ),
    "28-published-before-save": (
        *_AFTER_A_PASSWORD,
        "from dashtam.domain.events import UserRegistrationSucceeded",
    ),
    "29-published-after-save": (
        *_AFTER_A_PASSWORD,
        "from dashtam.domain.events import UserRegistrationSucceeded",
    ),
}
"""Imports that a block leaves out, by the block's name."""
