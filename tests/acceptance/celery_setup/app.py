"""The app of a pytest-celery worker that has a ledger; pytest-celery replaces the first three statements."""

from __future__ import annotations

from celery import Celery

from pgqrs_celery import Pgqrs

imports = None

app = Celery("celery_test_app")
config = None

if config:
    app.config_from_object(config)

Pgqrs(app)
