"""start, join and record: what becomes a row, and what a duplicate cannot do."""

from __future__ import annotations

from uuid import uuid4

import pytest

from pgqrs_celery.exceptions import StoreError
from pgqrs_celery.store import recording, runs, steps
from pgqrs_celery.store.recording import Finished
from pgqrs_celery.store.runs import NewRun
from tests.support.ledger import INTERVAL, LEASE, MESSAGE, Ledger, Worker


def retry(ledger: Ledger, task_id: str, generation: int, delay: float | None = 60.0) -> recording.NewStep:
    return ledger.step(task_id, generation=generation, delay=delay, sent=delay is None, message='{"retry": true}')


def test_a_started_run_has_its_first_steps_queued_and_due_again_later(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b")
    for task_id in ("a", "b"):
        row = ledger.row(task_id)
        assert (row.status, row.open, row.sent, row.due, row.message) == ("QUEUED", True, True, INTERVAL, MESSAGE)
        assert (row.attempt, row.fence, row.lost, row.lease_token) == (0, 0, 0, None)
    assert ledger.run_status(workflow_id) == "QUEUED"


def test_a_held_step_is_not_sent_and_due_at_its_eta(ledger: Ledger) -> None:
    run = NewRun(ledger.app, "a", "pack")
    assert runs.start(ledger.session, run, [ledger.step("a", delay=3600, sent=False)]) is not None
    row = ledger.row("a")
    assert (row.sent, row.due) == (False, 3600.0)
    ledger.advance(3599)
    assert ledger.claim() == []
    ledger.advance(1)
    assert [step.task_id for step in ledger.claim()] == ["a"]


def test_a_root_id_starts_one_run(ledger: Ledger) -> None:
    ledger.start("a", root_id="r")
    assert runs.start(ledger.session, NewRun(ledger.app, "r", "pack"), [ledger.step("b")]) is None
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]


def test_a_workflow_key_starts_one_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", workflow_key="order-42")
    run = NewRun(ledger.app, "b", "pack", workflow_key="order-42")
    assert runs.start(ledger.session, run, [ledger.step("b")]) is None
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workflows") == [(1,)]
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]
    found = runs.find(ledger.session, key=(ledger.app, "order-42"))
    assert found is not None
    assert found.workflow_id == workflow_id


def test_two_apps_may_use_the_same_workflow_key(ledger: Ledger) -> None:
    first = ledger.start("a", workflow_key="order-42")
    second = ledger.start("b", workflow_key="order-42", app="bank")
    assert first != second
    found = runs.find(ledger.session, key=("bank", "order-42"))
    assert found is not None
    assert found.workflow_id == second


def test_a_task_id_belongs_to_one_run(ledger: Ledger) -> None:
    ledger.start("a")
    with pytest.raises(Exception, match="duplicate key"):
        runs.start(ledger.session, NewRun(ledger.app, "other", "pack"), [ledger.step("b"), ledger.step("a")])
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workflows") == [(1,)]
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]


def test_the_driver_s_error_for_it_is_ours(ledger: Ledger) -> None:
    ledger.start("a")
    with pytest.raises(StoreError, match="duplicate key"), ledger.database.session() as session:
        runs.start(session, NewRun(ledger.app, "other", "pack"), [ledger.step("a")])


def test_recording_the_same_message_twice_sends_it_once(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    assert ledger.record(workflow_id, "b") == "SEND"
    before = ledger.row("b")
    ledger.advance(5)
    assert ledger.record(workflow_id, "b") == "SUPPRESS"
    assert ledger.row("b").due == before.due - 5.0 if before.due else False


@pytest.mark.parametrize(
    "state", ["QUEUED", "RUNNING", "SUCCESS open", "SUCCESS", "FAILED open", "FAILED", "CANCELLED"]
)
def test_an_equal_generation_changes_nothing_whatever_the_status(ledger: Ledger, state: str) -> None:
    workflow_id = ledger.start("a", "keep-open")
    token = uuid4() if state == "QUEUED" else ledger.acquire("a")
    if state.startswith("SUCCESS"):
        ledger.succeed("a", token)
    if state.startswith("FAILED"):
        ledger.fail("a", token)
    if state in ("SUCCESS", "FAILED"):
        ledger.hand_off("a")
    if state == "CANCELLED":
        steps.drop(ledger.session, "a", lease_token=token, error="{}")
    before = ledger.row("a")
    assert before.status == state.removesuffix(" open")
    assert ledger.record(workflow_id, "a", lease_token=token) == "SUPPRESS"
    assert ledger.row("a") == before


def test_the_owner_s_retry_queues_its_step_with_the_greater_generation(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=token) == "SEND"
    row = ledger.row("a")
    assert (row.status, row.generation, row.due, row.sent, row.message) == ("QUEUED", 1, 60.0, False, '{"retry": true}')
    assert (row.lease_token, row.worker_id, row.attempt, row.fence, row.lost) == (None, None, 1, 1, 0)


def test_a_retry_said_twice_is_recorded_once(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=token) == "SEND"
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=token) == "SUPPRESS"


def test_a_message_of_before_the_retry_does_not_start_it_early(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=ledger.acquire("a"))
    before = ledger.row("a")
    assert ledger.ask("a", generation=0).verdict == "STALE"
    assert ledger.row("a") == before
    assert ledger.ask("a", generation=1).verdict == "EXECUTE"


def test_a_retry_by_somebody_else_changes_nothing(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.acquire("a", Worker())
    before = ledger.row("a")
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=uuid4()) == "SUPPRESS"
    assert ledger.record(workflow_id, retry(ledger, "a", 1)) == "SUPPRESS"
    assert ledger.row("a") == before


def test_zombie_cannot_retry_a_reclaimed_step(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    owner = ledger.acquire("a", Worker())
    before = ledger.row("a")
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=zombie) == "SUPPRESS"
    assert ledger.row("a") == before
    assert ledger.succeed("a", owner)


def test_zombie_in_the_new_owner_s_worker_cannot_retry_a_reclaimed_step(ledger: Ledger) -> None:
    worker = Worker()
    workflow_id = ledger.start("a")
    zombie = ledger.acquire("a", worker)
    ledger.advance(LEASE + 1)
    owner = ledger.acquire("a", worker)
    before = ledger.row("a")
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=zombie) == "SUPPRESS"
    assert ledger.row("a") == before
    assert ledger.succeed("a", owner)


def test_an_owner_that_was_only_slow_may_still_retry(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    assert [step.was for step in ledger.claim()] == ["RUNNING"]
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=token) == "SEND"
    assert ledger.row("a").generation == 1


def test_a_finished_step_takes_no_further_generation(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "keep-open")
    token = ledger.acquire("a")
    ledger.succeed("a", token)
    before = ledger.row("a")
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=token) == "SUPPRESS"
    assert ledger.row("a") == before


def test_a_cancelled_run_takes_no_step(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    assert runs.cancel(ledger.session, workflow_id)
    assert ledger.record(workflow_id, "b") == "CANCELLED"
    assert ledger.record(workflow_id, retry(ledger, "a", 1), lease_token=token) == "CANCELLED"
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]
    assert ledger.row("a").generation == 0


def test_a_record_into_a_run_that_was_removed_sends_nothing(ledger: Ledger) -> None:
    assert ledger.record(4711, "a") == "LOST"
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_workflow_steps") == [(0,)]


def test_a_success_and_what_follows_it_are_recorded_together(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    assert ledger.record(workflow_id, "b", lease_token=token, finished=Finished("a", "41")) == "SEND"
    row = ledger.row("a")
    assert (row.status, row.open, row.output, row.due, row.lease_token) == ("SUCCESS", True, "41", LEASE, token)
    assert ledger.row("b").status == "QUEUED"


def test_zombie_records_neither_its_success_nor_what_would_follow(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    ledger.acquire("a", Worker())
    before = ledger.row("a")
    assert ledger.record(workflow_id, "b", lease_token=zombie, finished=Finished("a", "41")) == "LOST"
    assert ledger.row("a") == before
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]


def test_a_success_whose_answer_was_lost_can_be_recorded_again_in_two_steps(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    assert ledger.record(workflow_id, "b", lease_token=token, finished=Finished("a", "41")) == "SEND"
    assert ledger.record(workflow_id, "b", lease_token=token, finished=Finished("a", "41")) == "LOST"
    assert ledger.succeed("a", token, "41")
    assert ledger.record(workflow_id, "b", lease_token=token) == "SUPPRESS"


def test_a_success_in_a_cancelled_run_counts_but_nothing_follows_it(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    runs.cancel(ledger.session, workflow_id)
    assert ledger.record(workflow_id, "b", lease_token=token, finished=Finished("a", "41")) == "CANCELLED"
    assert ledger.row("a").status == "SUCCESS"
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]


def test_a_group_is_recorded_as_a_whole(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.record(workflow_id, "m2")
    found = recording.record(
        ledger.session, [ledger.step(f"m{n}") for n in range(4)], workflow_id=workflow_id, app=ledger.app
    )
    assert {r.task_id: str(r.outcome) for r in found} == {"m0": "SEND", "m1": "SEND", "m2": "SUPPRESS", "m3": "SEND"}


def test_an_awaited_link_keeps_its_run_open_and_takes_its_message_when_it_comes(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    recording.await_link(ledger.session, ledger.step("b"), workflow_id=workflow_id, app=ledger.app)
    ledger.finish("a")
    assert ledger.run_status(workflow_id) in ("QUEUED", "RUNNING")
    row = ledger.row("b")
    assert (row.status, row.open, row.message, row.due) == ("QUEUED", True, None, None)
    ledger.advance(10_000)
    assert ledger.claim() == []
    assert ledger.record(workflow_id, "b") == "SEND"
    assert ledger.record(workflow_id, "b") == "SUPPRESS"
    row = ledger.row("b")
    assert (row.status, row.message, row.due, row.sent) == ("QUEUED", MESSAGE, INTERVAL, True)


def test_awaiting_a_link_that_is_there_changes_nothing(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "b")
    ledger.acquire("b")
    before = ledger.row("b")
    recording.await_link(ledger.session, ledger.step("b"), workflow_id=workflow_id, app=ledger.app)
    assert ledger.row("b") == before


def test_a_replaced_step_waits_for_the_message_of_its_replacement_s_last_link(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a", Worker())
    assert recording.await_replacement(ledger.session, "a", lease_token=token, generation=1 << 32)
    row = ledger.row("a")
    assert (row.status, row.open, row.generation, row.due, row.message) == ("QUEUED", True, 1 << 32, None, None)
    assert not ledger.succeed("a", token)
    assert ledger.ask("a", generation=0).verdict == "STALE"
    assert ledger.record(workflow_id, ledger.step("a", generation=1 << 32)) == "SEND"
    assert ledger.ask("a", generation=1 << 32).verdict == "EXECUTE"


def test_zombie_cannot_replace_a_reclaimed_step(ledger: Ledger) -> None:
    ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    ledger.acquire("a", Worker())
    before = ledger.row("a")
    assert not recording.await_replacement(ledger.session, "a", lease_token=zombie, generation=1 << 32)
    assert ledger.row("a") == before


def test_a_replacement_is_recorded_with_its_inner_steps_or_not_at_all(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    ledger.acquire("a", Worker())

    class Refused(Exception):
        pass

    def replace() -> None:
        with ledger.session.connection.transaction():
            if not recording.await_replacement(ledger.session, "a", lease_token=zombie, generation=1 << 32):
                raise Refused
            ledger.record(workflow_id, "inner")

    with pytest.raises(Refused):
        replace()
    assert ledger.execute("SELECT task_id FROM {schema}.pgqrs_workflow_steps") == [("a",)]


def test_a_step_added_from_outside_reopens_a_closed_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.finish("a")
    assert ledger.run_status(workflow_id) == "SUCCESS"
    with ledger.session.connection.transaction():
        joined, recorded = runs.join(ledger.session, NewRun(ledger.app, "a", "pack"), [ledger.step("b")])
    assert joined == workflow_id
    assert [str(r.outcome) for r in recorded] == ["SEND"]
    assert ledger.run_status(workflow_id) == "RUNNING"
    ledger.finish("b")
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_a_duplicate_from_outside_leaves_a_closed_run_closed(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.finish("a")
    with ledger.session.connection.transaction():
        _, recorded = runs.join(ledger.session, NewRun(ledger.app, "a", "pack"), [ledger.step("a")])
    assert [str(r.outcome) for r in recorded] == ["SUPPRESS"]
    assert ledger.run_status(workflow_id) == "SUCCESS"


def test_a_step_added_from_outside_does_not_revive_a_cancelled_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    runs.cancel(ledger.session, workflow_id)
    with ledger.session.connection.transaction():
        _, recorded = runs.join(ledger.session, NewRun(ledger.app, "a", "pack"), [ledger.step("b")])
    assert [str(r.outcome) for r in recorded] == ["CANCELLED"]
    assert ledger.run_status(workflow_id) == "CANCELLED"


def test_a_run_joined_before_it_exists_is_entered(ledger: Ledger) -> None:
    with ledger.session.connection.transaction():
        workflow_id, _ = runs.join(
            ledger.session, NewRun(ledger.app, "r", "pack", labels='{"a": 1}'), [ledger.step("b")]
        )
    found = runs.find(ledger.session, root_id="r")
    assert found is not None
    assert found.workflow_id == workflow_id


def test_a_step_sent_without_this_package_is_adopted_as_running(ledger: Ledger) -> None:
    worker, token = Worker(), uuid4()
    with ledger.session.connection.transaction():
        workflow_id, _ = runs.join(ledger.session, NewRun(ledger.app, "a", "pack"), [])
        assert adopt(ledger, workflow_id, token, worker)
        runs.begin(ledger.session, workflow_id)
    row = ledger.row("a")
    assert (row.status, row.fence, row.attempt, row.lease_token, row.worker_id) == (
        "RUNNING", 1, 1, token, worker.worker_id
    )  # fmt: skip
    assert (row.due, row.message) == (LEASE, MESSAGE)
    assert ledger.run_status(workflow_id) == "RUNNING"
    assert ledger.succeed("a", token)


def adopt(ledger: Ledger, workflow_id: int, token: object, worker: Worker) -> bool:
    return steps.adopt(
        ledger.session,
        ledger.step("a"),
        workflow_id=workflow_id,
        app=ledger.app,
        lease_token=token,  # type: ignore[arg-type]
        worker_id=worker.worker_id,
        lease=LEASE,
    )


def test_a_step_is_adopted_once(ledger: Ledger) -> None:
    with ledger.session.connection.transaction():
        workflow_id, _ = runs.join(ledger.session, NewRun(ledger.app, "a", "pack"), [])
        assert adopt(ledger, workflow_id, uuid4(), Worker())
    before = ledger.row("a")
    assert not adopt(ledger, workflow_id, uuid4(), Worker())
    assert ledger.row("a") == before


def test_nothing_is_adopted_into_a_cancelled_run(ledger: Ledger) -> None:
    workflow_id = ledger.start("keep")
    runs.cancel(ledger.session, workflow_id)
    assert not adopt(ledger, workflow_id, uuid4(), Worker())


def test_an_unknown_task_is_no_row(ledger: Ledger) -> None:
    assert steps.peek(ledger.session, "nobody") is None
    assert runs.find(ledger.session, workflow_id=4711) is None
    with pytest.raises(TypeError, match="workflow_id, root_id or key"):
        runs.find(ledger.session)
