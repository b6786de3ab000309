"""The read side: what it costs whoever looks at runs, and whoever does not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pgqrs_celery.db import Database
from tests.support.bench import Bench

ROOT = Path(__file__).parents[2]

#: Prints whether SQLAlchemy has been imported: with the package and a task, and with something transactional.
WHEN = """
import sys
from celery import Celery
from pgqrs_celery import Pgqrs, step
pgqrs = Pgqrs(Celery("a", broker="memory://"))
pgqrs.task(lambda: None, name="plain")
print("sqlalchemy" in sys.modules)
{then}
print("sqlalchemy" in sys.modules)
"""


def test_who_looks_at_a_run_again_and_again_opens_no_connection(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    run = bench.run_of(bench.add.delay(1, 2))
    bench.ended(run)
    opened: list[Any] = []
    connect = Database.connect
    monkeypatch.setattr(Database, "connect", lambda self, *a, **k: opened.append(self) or connect(self, *a, **k))
    for _ in range(5):
        assert run.status == "SUCCESS"
        assert [step.status for step in run.steps()] == ["SUCCESS"]
    assert opened == []


@pytest.mark.parametrize(
    "then",
    [
        "@pgqrs.task(transactional=True, name='t')\ndef t(): pass",
        "@pgqrs.step(transactional=True)\ndef s(ctx): pass",
        "@step(transactional=True)\ndef s(ctx): pass",
    ],
    ids=["task", "step of an app", "step"],
)
def test_sqlalchemy_is_imported_where_a_transaction_is_declared_and_not_before(then: str) -> None:
    command = [sys.executable, "-c", WHEN.format(then=then)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert answer.stdout.split() == ["False", "True"], answer.stderr
