"""The error tree: everything this package raises on purpose has one root.

::

    PgqrsError
    ├── ConfigurationError             a setting is wrong; the message names it
    ├── StoreError
    │   ├── StoreUnavailable           the database cannot be reached (try again later)
    │   ├── NotInstalled               the schema is missing
    │   └── SchemaOutdated             the schema is older (or newer) than this package
    ├── EmbeddedUnavailable            no embedded server can be started here
    ├── NotDurable                     a canvas cannot be made durable; the message says why
    │   └── PlainTaskInDurableCanvas   a plain task between durable ones, and the settings forbid it
    ├── WorkflowKeyConflict            the key belongs to a run with another workflow or other arguments
    ├── WorkflowNotDefined             a workflow is triggered that nobody has defined
    ├── InvalidInput                   a value is not of the type that a typed step or activity takes
    ├── RunNotFound                    no such run
    ├── RunStateError                  the run's status does not allow this operation
    ├── RunFailed                      the run ended FAILED and left no exception of its own
    ├── RunCancelled                   the run was cancelled
    ├── RunTimeout                     the run did not end in time (also a TimeoutError)
    └── StepError
        ├── ResultNotSerializable      a step returned what the serializer cannot write
        ├── ResultTooLarge             a step returned more bytes than ``pgqrs_max_result_bytes``
        ├── PoisonedStep               a step killed its worker too many times
        ├── HandOffFailed              what follows from a successful step could not be sent
        ├── StepFailed                 a recorded error whose class is not known here
        ├── StepMisused                the context of a function workflow was asked for what it cannot do
        ├── InputChanged               a step is called with other arguments than those it was recorded with
        └── EventTimeout               an event did not come in time (also a TimeoutError)

    LeaseLost (BaseException)          another owner has the step; nothing more may be written
    Suspended (BaseException)          the function waits, and its worker slot is free for others

The last two are control flow, not errors of the user's code, and so they do not derive from ``Exception``: a body that
says ``except Exception`` must not be able to swallow them.
"""

from __future__ import annotations

__all__ = [
    "ConfigurationError",
    "EmbeddedUnavailable",
    "EventTimeout",
    "HandOffFailed",
    "InputChanged",
    "InvalidInput",
    "LeaseLost",
    "NotDurable",
    "NotInstalled",
    "PgqrsError",
    "PlainTaskInDurableCanvas",
    "PoisonedStep",
    "ResultNotSerializable",
    "ResultTooLarge",
    "RunCancelled",
    "RunFailed",
    "RunNotFound",
    "RunStateError",
    "RunTimeout",
    "SchemaOutdated",
    "StepError",
    "StepFailed",
    "StepMisused",
    "StoreError",
    "StoreUnavailable",
    "Suspended",
    "WorkflowKeyConflict",
    "WorkflowNotDefined",
]


class PgqrsError(Exception):
    """The root of every error this package raises on purpose."""


class ConfigurationError(PgqrsError):
    """A setting is missing or wrong; the message names the setting and what it may be."""


class StoreError(PgqrsError):
    """The ledger in Postgres did not do what it was asked."""


class StoreUnavailable(StoreError):
    """The database cannot be reached, or hung up in mid-statement; the same call may succeed later."""


class NotInstalled(StoreError):
    """The schema has not been installed in this database."""


class SchemaOutdated(StoreError):
    """The installed schema is not the one this version of the package was written for."""


class EmbeddedUnavailable(PgqrsError):
    """An embedded server cannot be started on this machine; the message says what is missing."""


class NotDurable(PgqrsError):
    """A canvas cannot be recorded in the ledger as it stands; nothing was sent."""


class PlainTaskInDurableCanvas(NotDurable):
    """A plain task stands between durable ones while ``pgqrs_plain_links`` is ``"error"``."""


class WorkflowKeyConflict(PgqrsError):
    """The workflow key already belongs to a run that was started with something else."""


class WorkflowNotDefined(PgqrsError):
    """A workflow is triggered whose name was never defined: probably misspelt, nobody would execute it."""


class InvalidInput(PgqrsError, ValueError):
    """A value is not of the type that a step or an activity takes; the message says what is wrong with it."""


class RunNotFound(PgqrsError):
    """No run with this id (it may have been removed by retention)."""


class RunStateError(PgqrsError):
    """The run's present status does not allow what was asked."""


class RunFailed(PgqrsError):
    """The run ended FAILED without an exception that could be raised again."""


class RunCancelled(PgqrsError):
    """The run was cancelled before it produced a result."""


class RunTimeout(PgqrsError, TimeoutError):
    """The run did not reach a terminal status within the time the caller gave."""


class StepError(PgqrsError):
    """A step could not be carried out, for a reason that is not an exception of its body."""


class ResultNotSerializable(StepError):
    """The body's result cannot be written by the configured serializer; the attempt may be retried."""


class ResultTooLarge(StepError):
    """The body's result is larger than ``pgqrs_max_result_bytes``; store it elsewhere and return a key."""


class PoisonedStep(StepError):
    """The step's workers died so often that it was given up."""


class HandOffFailed(StepError):
    """A step succeeded, but what follows from it could not be sent; ``resume()`` tries that again."""


class StepFailed(StepError):
    """An error that was recorded: as a plain text, or of a class that this process does not know."""


class StepMisused(StepError):
    """The context of a function workflow was asked for something it cannot do here; the message says what."""


class InputChanged(StepError):
    """A step is called with other arguments than those it was recorded with (``pgqrs_on_input_change = "error"``)."""


class EventTimeout(StepError, TimeoutError):
    """The event a function waited for did not come in time; replays raise it again, even if it has come since."""


class LeaseLost(BaseException):
    """The step belongs to another owner now (or to nobody); its former owner must not write again."""


class Suspended(BaseException):
    """The function is asleep in the ledger and goes on from its beginning, past what is recorded, when it is woken."""
