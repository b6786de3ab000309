"""Durable tasks as a module of an application declares them; pytest-celery copies it into its workers."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from celery import shared_task

from pgqrs_celery import DurableTask
from tests.support.effects import EffectLog
from tests.support.points import Points

#: The environment variable with the directory in which a worker's effects are noted and its crash points are.
DIRECTORY = "PGQRS_TEST_DIRECTORY"


@shared_task(base=DurableTask, bind=True, name="celery_setup.append")
def append(self: Any, value: list[str], label: str) -> list[str]:
    """Add a label, and note that."""
    directory = Path(os.environ[DIRECTORY])
    EffectLog(directory / "effects.log").add("body", self.request.id, self.name)
    Points(directory).reach("in_body", self.request.id)
    return [*value, label]
