"""``@workflow`` and ``@step`` as the guides import them: for functions executed in the calling process.

For functions that Celery workers execute, use ``Pgqrs(app).workflow`` and ``Pgqrs(app).step``.
"""

from pgqrs_celery.compat.pgqrs_decorators import step, workflow

__all__ = ["step", "workflow"]
