"""Runs that ended long ago are removed, a little at a time."""

from __future__ import annotations

from pgqrs_celery.session import Session
from pgqrs_celery.store import retention
from tests.support.ledger import Ledger

DAY = 86400.0


def prune(ledger: Ledger, *, age: float = DAY, limit: int = 100, session: Session | None = None) -> int:
    session = session or ledger.session
    with session.connection.transaction():
        return retention.prune_runs(session, app=ledger.app, age=age, limit=limit)


def ended(ledger: Ledger) -> int:
    task_id = ledger.unique()
    workflow_id = ledger.start(task_id)
    ledger.finish(task_id)
    return workflow_id


def kept(ledger: Ledger) -> set[int]:
    runs = {row[0] for row in ledger.execute("SELECT workflow_id FROM {schema}.pgqrs_workflows")}
    steps = {row[0] for row in ledger.execute("SELECT workflow_id FROM {schema}.pgqrs_workflow_steps")}
    assert runs == steps
    return runs


def test_only_runs_that_ended_before_the_retention_are_removed_and_their_steps_with_them(ledger: Ledger) -> None:
    old = ended(ledger)
    waiting = ledger.start(ledger.unique())
    ledger.advance(DAY + 1)
    recent = ended(ledger)
    assert prune(ledger) == 1
    assert kept(ledger) == {waiting, recent}
    assert old not in kept(ledger)


def test_a_batch_is_bounded_and_the_oldest_go_first(ledger: Ledger) -> None:
    runs = []
    for _ in range(3):
        runs.append(ended(ledger))
        ledger.advance(1)
    ledger.advance(DAY)
    assert prune(ledger, limit=2) == 2
    assert kept(ledger) == {runs[2]}
    assert prune(ledger, limit=2) == 1
    assert prune(ledger, limit=2) == 0


def test_two_prunings_at_once_do_not_wait_for_each_other(ledger: Ledger) -> None:
    for _ in range(4):
        ended(ledger)
    ledger.advance(2 * DAY)
    other = ledger.connect()
    with ledger.session.connection.transaction():
        assert retention.prune_runs(ledger.session, app=ledger.app, age=DAY, limit=2) == 2
        other.connection.execute("SET statement_timeout = '10s'")
        assert prune(ledger, session=other) == 2
    assert kept(ledger) == set()


def test_another_apps_runs_are_not_touched(ledger: Ledger) -> None:
    ended(ledger)
    ledger.advance(2 * DAY)
    with ledger.session.connection.transaction():
        assert retention.prune_runs(ledger.session, app="someone-else", age=DAY) == 0
    assert len(kept(ledger)) == 1
