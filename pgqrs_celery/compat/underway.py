"""underway's model on this package's engine: typed steps in a row, and activities for their side effects.

::

    workflow = (
        Workflow.builder()
        .activity(LookupEmail)
        .step(greet)
        .name("greeting")
        .app(Pgqrs(app))
        .build()
    )
    workflow.enqueue(Signup(user_id=42))
    workflow.runtime().run()

What is deliberately different from the original says ``docs/compat.md``.
"""

from pgqrs_celery.compat.underway_activity import Activity, activity_id
from pgqrs_celery.compat.underway_builder import Workflow, WorkflowBuilder, app_for
from pgqrs_celery.compat.underway_cron import Cron
from pgqrs_celery.compat.underway_errors import ActivityError, TaskError
from pgqrs_celery.compat.underway_retries import RetryPolicy
from pgqrs_celery.compat.underway_runtime import Runtime, RuntimeHandle
from pgqrs_celery.compat.underway_step import StepContext, To
from pgqrs_celery.compat.underway_workflow import Enqueued
from pgqrs_celery.exceptions import InvalidInput

__all__ = [
    "Activity",
    "ActivityError",
    "Cron",
    "Enqueued",
    "InvalidInput",
    "RetryPolicy",
    "Runtime",
    "RuntimeHandle",
    "StepContext",
    "TaskError",
    "To",
    "Workflow",
    "WorkflowBuilder",
    "activity_id",
    "run_migrations",
]


def run_migrations(dsn: str, *, schema: str = "public") -> list[str]:
    """Install or upgrade the schema in a database; safe to repeat. Returns the names of the migrations applied."""
    return app_for(dsn, schema).install()
