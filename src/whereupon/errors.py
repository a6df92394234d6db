"""Everything whereupon raises, in one tree.

WhereuponError
├── EventDefinitionError (TypeError)        an event class breaks a rule
├── SubscriptionError (TypeError)           a handler can't be subscribed
│   ├── DuplicateSubscriptionError          two handlers under one name
│   └── SubscriptionConflictError           the database has it with another order
├── PublishError                            nothing was published
│   ├── SessionRequiredError (RuntimeError) no session, and the event may not stand alone
│   ├── ForeignSessionError                 the session is on another database
│   ├── WorkflowClosedError (RuntimeError)  the attempt has its outcome already
│   └── EventEncodingError (ValueError)     a field holds what can't be stored
├── EventDecodingError (ValueError)         a stored event can't be read
│   └── UnknownEventError                   this build knows no such event or version
├── DatabaseError                           the bus's database
│   ├── UnsupportedDatabaseError (ValueError)
│   ├── DatabaseUnavailableError (ConnectionError)
│   ├── ForeignClusterError                 restored or replicated elsewhere, and not rebased
│   └── SchemaError                         tables missing, or of another version
├── BusStateError (RuntimeError)            the bus is closed, not running, or on another loop
├── HandlerSessionError (RuntimeError)      a handler tried to end a transaction that is not its own
├── HandlerTimeout (TimeoutError)           a handler ran longer than its subscription allows
├── ActionRefused                           what an operator asked for can't be done
├── CatalogueError (ValueError)             no catalogue can be written there, or compared with that
├── LeaseLost                               another worker owns the subscription now
└── Discard, RetryLater                     raised *by* handlers, to say what should happen next
"""

from __future__ import annotations

from datetime import timedelta


class WhereuponError(Exception):
    """Something that whereupon reports; every error below is one."""


class EventDefinitionError(WhereuponError, TypeError):
    """An event class breaks a rule of its definition; raised where the class is defined or decorated."""


class SubscriptionError(WhereuponError, TypeError):
    """A handler can't be subscribed as asked; raised by `subscribe` and `register`, never later."""


class DuplicateSubscriptionError(SubscriptionError):
    """A subscription of this name exists, with another handler or other options."""


class SubscriptionConflictError(SubscriptionError):
    """The database knows this subscription with an order that can't be changed; raised where the bus starts."""


class PublishError(WhereuponError):
    """The event was not published, and no handler ran."""


class SessionRequiredError(PublishError, RuntimeError):
    """The event was published without the session of the change that it describes."""


class ForeignSessionError(PublishError, ValueError):
    """The session belongs to another database than the bus, so both can't commit together."""


class WorkflowClosedError(PublishError, RuntimeError):
    """The attempt has an outcome already; the work that should have been another is rolled back."""


class EventEncodingError(PublishError, ValueError):
    """A field holds a value that could not be read back as it is."""


class EventDecodingError(WhereuponError, ValueError):
    """A stored event does not fit its class."""


class UnknownEventError(EventDecodingError):
    """No class of this build is stored under that name, or only one of another version."""


class DatabaseError(WhereuponError):
    """The bus can't work with its database."""


class UnsupportedDatabaseError(DatabaseError, ValueError):
    """No store exists for this URL, or its driver is not installed."""


class DatabaseUnavailableError(DatabaseError, ConnectionError):
    """The database can't be reached."""


class ForeignClusterError(DatabaseError):
    """The database was moved to another PostgreSQL cluster; `whereupon db rebase` is to be run there."""


class SchemaError(DatabaseError):
    """whereupon's tables are missing, or belong to another version."""


class BusStateError(WhereuponError, RuntimeError):
    """The bus can't do this in the state it is in."""


class HandlerSessionError(WhereuponError, RuntimeError):
    """A handler tried to commit, roll back or close the session it was handed."""


class HandlerTimeout(WhereuponError, TimeoutError):
    """A handler ran longer than its subscription's timeout and was cancelled."""


class ActionRefused(WhereuponError):
    """An operator's action can't be carried out as asked; nothing was changed."""


class CatalogueError(WhereuponError, ValueError):
    """The folder is not the catalogue's to write, or the document is none of a catalogue's."""


class LeaseLost(WhereuponError):
    """The subscription's lease went to another worker; what was not committed is rolled back."""


class PlaceLost(LeaseLost):
    """The server crashed since this place in the log was read, and transaction ids below it may be handed out again."""


class Discard(WhereuponError):
    """Raise it in a handler to settle the delivery as skipped, with a reason, and without a retry."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


class RetryLater(WhereuponError):
    """Raise it in a handler to be called again after `delay` (seconds or a `timedelta`).

    It counts as an attempt: a handler that says so for ever ends as a dead letter too.
    """

    def __init__(self, delay: float | timedelta, reason: str = "the handler asked to be called later") -> None:
        super().__init__(reason)
        self.delay = delay.total_seconds() if isinstance(delay, timedelta) else float(delay)
        if not 0 <= self.delay < float("inf"):
            raise ValueError(f"RetryLater takes seconds from 0 up, not {delay!r}")
        self.reason = reason
