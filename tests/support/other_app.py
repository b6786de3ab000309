"""Another service: an app of its own, with one task that nobody else knows, on a queue of its own."""

from __future__ import annotations

from typing import Any, Final

from celery import Celery

from pgqrs_celery import Pgqrs
from tests.support.scenario import Scenario

#: The queue this service reads.
QUEUE: Final = "other"

scenario = Scenario.from_environment()
app = Celery("other", broker=scenario.broker, backend=scenario.backend)
app.conf.update({**scenario.settings(), "task_default_queue": QUEUE})
pgqrs = Pgqrs(app)


@pgqrs.task(bind=True, name="elsewhere.wrap")
def wrap(self: Any, value: list[str], label: str) -> list[str]:
    """Add a label, as this service does it."""
    scenario.log.add("body", self.request.id, self.name)
    return [*value, label]
