"""However a worker is told to stop, what it has not finished is given back at once and not counted as lost."""

from __future__ import annotations

import signal
from dataclasses import dataclass

import pytest

from pgqrs_celery import Status
from tests.acceptance.test_dead_workers import SLOW
from tests.support.fleet import Fleet
from tests.support.scenario import Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for


@dataclass(frozen=True, slots=True)
class Stop:
    """A way to stop a worker: the signal, the settings it needs, and whether a running body may end."""

    name: str
    signal: signal.Signals
    soft: float = 0.0
    finishes: bool = False

    def __str__(self) -> str:
        return self.name


STOPS = [
    Stop("warm", signal.SIGTERM, finishes=True),
    Stop("soft", signal.SIGQUIT, soft=1.0),
    Stop("cold", signal.SIGQUIT),
]


ROWS = [
    pytest.param(broker, stop, task, id=f"{broker}-{stop}-{task}")
    for broker, tasks in (("postgres", ("step", "late")), ("redis", ("late",)))
    for stop in STOPS
    for task in tasks
]


@pytest.mark.parametrize(("each_scenario", "stop", "task"), ROWS, indirect=["each_scenario"])
def test_a_stopping_worker_gives_back_what_it_has(each_scenario: Scenario, stop: Stop, task: str) -> None:
    slow = each_scenario.with_conf(**SLOW, worker_soft_shutdown_timeout=stop.soft, worker_prefetch_multiplier=2)
    with Fleet(slow, size=1, options={"concurrency": 1}) as fleet:
        task = getattr(fleet.tasks, task)
        running, waiting = named(task.s([], "a")), named(task.s([], "b"))
        with slow.points.arm("in_body", running.id) as trap:
            running.delay()
            trap.wait()
            waiting.delay()
            (worker,) = fleet.workers
            received = f"[{waiting.id}] received"
            wait_for(lambda: received in worker.output(), PATIENCE, "the second message to be received")
            worker.signal(stop.signal)
            if stop.finishes:
                wait_for(lambda: "hutdown" in worker.output(), PATIENCE, "the worker to begin to stop")
                trap.release()
            worker.wait_exit()
        unfinished = "SELECT task_id, status, lost FROM {}.pgqrs_workflow_steps WHERE status <> 'SUCCESS'"
        left = [waiting] if stop.finishes else [running, waiting]
        assert sorted(slow.execute(unfinished)) == sorted((each.id, "QUEUED", 0) for each in left)
        if stop.finishes:
            # Celery has put the message it had not begun back into its queue. The ledger does not depend on that.
            assert fleet.lose_messages() == 1
        fleet.fill()
        assert {fleet.ended(each.id).status for each in (running, waiting)} == {Status.SUCCESS}
        fleet.expect({running.id: 1 if stop.finishes else 2, waiting.id: 1})
