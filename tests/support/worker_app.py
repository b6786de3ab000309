"""What ``celery -A`` loads in a worker process of the acceptance tests."""

from __future__ import annotations

from tests.support.scenario import Application, Scenario

application = Application(Scenario.from_environment())
application.watch()
app = application.celery
