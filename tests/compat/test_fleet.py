"""Typed steps in a fleet: real workers with processes, one of which is killed as a lost machine is."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from examples.support import JOURNAL, Journal, Worker, wait_for
from pgqrs_celery.conf import DSN_VARIABLE
from pgqrs_celery.states import TERMINAL
from tests.compat import fleet_app


@pytest.fixture
def journal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own_database_dsn: str, redis_url: str) -> Journal:
    monkeypatch.setenv(JOURNAL, str(tmp_path / "journal"))
    monkeypatch.setenv(DSN_VARIABLE, own_database_dsn)
    monkeypatch.setenv("CELERY_BROKER_URL", redis_url)
    return Journal(Path(os.environ[JOURNAL]))


def test_an_activity_whose_worker_is_lost_is_executed_by_another_and_its_step_goes_on_there(journal: Journal) -> None:
    fleet_app.pgqrs.install()
    with Worker(fleet_app.app, name="first", concurrency=2) as first:
        run = fleet_app.trip.enqueue(fleet_app.Trip("Rome", nights=2))
        wait_for(lambda: journal.read("book Rome"), "the activity to begin")
        with Worker(fleet_app.app, name="second", concurrency=2) as second:
            first.kill()
            wait_for(lambda: len(journal.read("book Rome")) == 2, "the activity to begin again")
            fleet_app.release(journal)
            assert run.get(timeout=60) == "Rome: booked, 2 nights"
            wait_for(lambda: run.status in TERMINAL, "what was emitted to be done")
            assert journal.read("book Rome")[1].worker == second.pid
    assert len(journal.read("plan Rome")) == 1  # the first step had succeeded
    assert len(journal.read("thank Rome")) == 1
    steps = {step.step_id: step for step in run.steps()}
    assert (steps["plan"].attempt, steps["reserve"].attempt) == (1, 1)
    assert steps["reserve/book"].lost == 1
