"""A restart of Postgres triggers nothing: whoever is at work renews his lease before anybody judges him."""

from __future__ import annotations

import json

import pytest
from celery import chain, group

from pgqrs_celery import Status, embedded
from tests.support.fleet import Fleet
from tests.support.scenario import Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE, wait_for

STEPS = 50

#: A worker takes one more message than it has threads, which then has to wait: let there be more threads than steps.
THREADS = {"pool": "threads", "concurrency": STEPS}

#: Seconds; no step waits for the end of one, and so many threads may keep a busy machine from renewing for some.
LEASE = 10.0

#: How often a worker tries to renew the leases of `QUICK` while they last: one of three seconds, twice a second.
RENEWALS = 6


def wait_until_on_disk(scenario: Scenario) -> None:
    """Wait until every commit so far would survive a crash (an acquire does not wait for the disk)."""
    ((present,),) = scenario.execute("SELECT pg_current_wal_insert_lsn()::text")
    flushed = "SELECT WHERE pg_current_wal_flush_lsn() >= %s::pg_lsn"
    wait_for(lambda: scenario.execute(flushed, present), PATIENCE, "the log to be written")


def test_no_running_step_is_executed_twice_when_postgres_restarts(
    scenario: Scenario, own_postgres: embedded.PostgresServer
) -> None:
    # Broker, results and ledger. A step is not sent again before a slow worker has begun it: the copy would wait for a
    # thread, and be leased, until one is free.
    scenario = scenario.elsewhere(own_postgres.dsn()).with_conf(pgqrs_lease=LEASE, pgqrs_resend_interval=LEASE)
    with Fleet(scenario, options=THREADS) as fleet:
        # Half of them are acknowledged when they begin; the messages of the others are leased until they end.
        tasks = [fleet.tasks.step, fleet.tasks.late] * (STEPS // 2)
        pairs = [(named(task.s([], "a")), named(task.s("b"))) for task in tasks]
        traps = [fleet.scenario.points.arm("in_body", first.id) for first, _ in pairs]
        result = group(chain(*pair) for pair in pairs).delay()
        for trap in traps:
            trap.wait()
        leased = "SELECT FROM {}.pgqrs_messages WHERE leased_by IS NOT NULL HAVING count(*) = %s"
        run = fleet.run_of(result.id)
        fleet.wait_for(run, lambda: bool(scenario.execute(leased, STEPS // 2)), "have half its messages acknowledged")
        wait_until_on_disk(scenario)
        own_postgres.restart(immediate=True)
        # Whoever has free locks judged would have done so by then: that is looked at five times a second.
        ((judged_at,),) = scenario.execute("SELECT now() + make_interval(secs => %s)", LEASE + 3)
        renewed = "SELECT FROM {}.pgqrs_workflow_steps WHERE status = 'RUNNING' HAVING min(due_at) > %s"
        wait_for(lambda: scenario.execute(renewed, judged_at), PATIENCE, "every lease to be renewed since")
        for trap in traps:
            trap.release()
        # ... and once more, while they commit and hand off.
        succeeded = "SELECT FROM {}.pgqrs_workflow_steps WHERE status = 'SUCCESS'"
        wait_for(lambda: scenario.execute(succeeded), PATIENCE, "the first step to succeed")
        own_postgres.restart(immediate=True)
        run = fleet.ended(result.id)
        assert run.status is Status.SUCCESS
        steps = run.steps()
        assert [(s.status, s.lost) for s in steps] == [("SUCCESS", 0)] * 2 * STEPS
        fleet.expect({first.id: 1 for first, _ in pairs})
        assert all(scenario.log.count(second.id) >= 1 for _, second in pairs)
        wait_for(lambda: not scenario.execute("SELECT FROM {}.pgqrs_messages"), PATIENCE, "every message to be over")


@pytest.mark.parametrize("what", ["link", "link, for longer than a lease", "link and callback", "replacement"])
def test_what_a_step_has_done_is_kept_while_postgres_is_away(
    scenario: Scenario, own_postgres: embedded.PostgresServer, what: str
) -> None:
    # The process that has done it has not sent anything before.
    with Fleet(scenario.elsewhere(own_postgres.dsn()), size=1, options={"concurrency": 1}) as fleet:
        step = fleet.tasks.step
        first, last = named(step.s([], "a")), named(step.s("b"))
        if what == "link and callback":
            first.link(named(step.s("callback")))
        if what == "replacement":
            first = named(fleet.tasks.replacer.s([], [json.loads(json.dumps(step.s(["a"], "x")))]))
        with fleet.scenario.points.arm("in_body", first.id) as trap:
            result = chain(first, last).delay()
            trap.wait()
            own_postgres.stop()
            trap.release()
            wait_for(lambda: fleet.logged("trying again for"), PATIENCE, "the process to wait for Postgres")
            if what == "link, for longer than a lease":
                wait_for(lambda: fleet.occurrences("cannot renew leases") > RENEWALS, PATIENCE, "the lease to end")
            own_postgres.start()
            assert result.get(timeout=PATIENCE) == ["a", *(["x"] if what == "replacement" else []), "b"]
        assert fleet.ended(first.id).status is Status.SUCCESS
        assert not fleet.logged("raised unexpected")
        # The link that its process goes on with is its own from the answer on, however long that took to come.
        assert not fleet.logged("stalled longer than its lease")
        fleet.expect({first.id: 1 + (what == "replacement"), last.id: 1})
