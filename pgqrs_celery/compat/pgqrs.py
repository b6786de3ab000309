"""The API of pgqrs' guides, on this package's engine; ``pgqrs_celery`` exports it, too.

What is preferred where the guides disagree, and what is deliberately different, says ``docs/compat.md``.
"""

from pgqrs_celery.calls import AcquiredStep
from pgqrs_celery.compat import pgqrs_decorators as decorators
from pgqrs_celery.compat.pgqrs_admin import Admin, admin
from pgqrs_celery.compat.pgqrs_consumer import Consumer, Message
from pgqrs_celery.compat.pgqrs_context import PyWorkflow, StepGuard
from pgqrs_celery.compat.pgqrs_poll import consumer
from pgqrs_celery.compat.pgqrs_runs import run, workflow
from pgqrs_celery.compat.pgqrs_store import RunResult, Store, connect

__all__ = [
    "AcquiredStep",
    "Admin",
    "Consumer",
    "Message",
    "PyWorkflow",
    "RunResult",
    "StepGuard",
    "Store",
    "admin",
    "connect",
    "consumer",
    "decorators",
    "run",
    "workflow",
]
