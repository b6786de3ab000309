"""Several apps: one run that goes through two services, and two services that share a schema."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from celery import chain

from pgqrs_celery import Status
from pgqrs_celery.embedded import RedisServer
from tests.support.fleet import Fleet
from tests.support.scenario import Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for
from tests.support.worker_process import WorkerProcess

#: The numbered database of this session's Redis that the second app uses.
BETA_DATABASE = 4094


@pytest.mark.parametrize("marked", [True, False], ids=["marked", "by-name-only"])
def test_a_chain_over_a_task_the_sender_does_not_know_is_one_run(scenario: Scenario, marked: bool) -> None:
    with (
        Fleet(scenario, size=1) as fleet,
        WorkerProcess(scenario, "other", app="tests.support.other_app"),
    ):
        step, application = fleet.tasks.step, fleet.application
        signature: Any = application.pgqrs.signature if marked else application.celery.signature
        wrap = named(signature("elsewhere.wrap", args=("b",), queue="other"))
        links = [named(step.s([], "a")), wrap, named(step.s("c").set(queue=fleet.queue))]
        result = chain(*links).delay()
        assert result.get(timeout=PATIENCE) == ["a", "b", "c"]
        run = fleet.ended(links[0].id)
        assert run.status is Status.SUCCESS
        assert {(s.task_id, s.status) for s in run.steps()} == {(link.id, "SUCCESS") for link in links}
        assert scenario.execute("SELECT count(*) FROM {}.pgqrs_workflows") == [(1,)]
        fleet.expect({link.id: 1 for link in links})


def test_two_apps_in_one_schema_leave_each_other_s_work_alone(scenario: Scenario, redis_server: RedisServer) -> None:
    beta = replace(scenario, name="beta", broker=redis_server.database_url(BETA_DATABASE))
    with Fleet(scenario, size=1) as alphas, Fleet(beta, size=1) as betas:
        step = named(alphas.tasks.step.s([], "a"))
        waiting = named(alphas.tasks.step.s([], "b"))
        with scenario.points.arm("in_body", step.id) as trap:
            step.delay()
            trap.wait()
            alphas.size = 0
            alphas.workers.pop().kill()
        waiting.delay()
        # Handed to the dead worker, which nobody has missed yet, or still in the queue: gone in any case.
        lost = "DELETE FROM {}.pgqrs_messages WHERE headers::json->>'id' = %s"
        assert len(scenario.execute(lost, waiting.id)) == 1
        # Both of alpha's steps become due, one by its lease, one by its loss, while only beta's worker is there.
        due = "SELECT FROM {}.pgqrs_workflow_steps WHERE due_at < now() - interval '1 second' HAVING count(*) = 2"
        wait_for(lambda: scenario.execute(due), PATIENCE, "alpha's steps to be due")
        own = named(betas.tasks.step.s([], "c"))
        assert own.delay().get(timeout=PATIENCE) == ["c"]
        assert sorted(
            scenario.execute("SELECT status, lost FROM {}.pgqrs_workflow_steps WHERE app = 'acceptance'")
        ) == [
            ("QUEUED", 0),
            ("RUNNING", 0),
        ]
        alphas.size = 1
        alphas.fill()
        assert {alphas.ended(each.id).status for each in (step, waiting)} == {Status.SUCCESS}
        alphas.expect({step.id: 2, waiting.id: 1, own.id: 1})
