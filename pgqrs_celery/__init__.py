"""Durable execution for Celery: keep Celery, add Postgres."""

from pgqrs_celery import aliases
from pgqrs_celery.app import Pgqrs
from pgqrs_celery.compat.pgqrs import Admin, PyWorkflow, admin, connect, consumer, run, workflow
from pgqrs_celery.context import Context
from pgqrs_celery.exceptions import (
    ConfigurationError,
    EmbeddedUnavailable,
    EventTimeout,
    HandOffFailed,
    InputChanged,
    NotDurable,
    NotInstalled,
    PgqrsError,
    PlainTaskInDurableCanvas,
    PoisonedStep,
    ResultNotSerializable,
    ResultTooLarge,
    RunCancelled,
    RunFailed,
    RunNotFound,
    RunStateError,
    RunTimeout,
    SchemaOutdated,
    StepError,
    StepFailed,
    StepMisused,
    StoreError,
    StoreUnavailable,
    WorkflowKeyConflict,
    WorkflowNotDefined,
)
from pgqrs_celery.function import FunctionWorkflow
from pgqrs_celery.guard import StepGuard
from pgqrs_celery.states import Status
from pgqrs_celery.step import Step, step
from pgqrs_celery.task import DurableTask
from pgqrs_celery.workflow import Workflow, WorkflowRun

__version__ = "0.1.0"

aliases.register()

__all__ = [
    # what an application uses
    "Pgqrs",
    "DurableTask",
    "Workflow",
    "WorkflowRun",
    "FunctionWorkflow",
    "Context",
    "Step",
    "step",
    "StepGuard",
    "Status",
    # the API of pgqrs' guides
    "Admin",
    "PyWorkflow",
    "admin",
    "connect",
    "consumer",
    "run",
    "workflow",
    # what it may catch
    "PgqrsError",
    "ConfigurationError",
    "EmbeddedUnavailable",
    "NotDurable",
    "PlainTaskInDurableCanvas",
    "RunCancelled",
    "RunFailed",
    "RunNotFound",
    "RunStateError",
    "RunTimeout",
    "WorkflowKeyConflict",
    "WorkflowNotDefined",
    "StepError",
    "EventTimeout",
    "HandOffFailed",
    "InputChanged",
    "PoisonedStep",
    "ResultNotSerializable",
    "ResultTooLarge",
    "StepFailed",
    "StepMisused",
    "StoreError",
    "NotInstalled",
    "SchemaOutdated",
    "StoreUnavailable",
    "__version__",
]
