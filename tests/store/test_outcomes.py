"""The outcomes of a step, from succeed to hand_off: only the present owner's word counts, and it counts once."""

from __future__ import annotations

from collections.abc import Callable
from uuid import UUID, uuid4

import pytest

from pgqrs_celery.store import recording, steps
from pgqrs_celery.store.recording import Finished
from tests.support.ledger import ERROR, LEASE, MAX_LOST, MESSAGE, POISON, Ledger, Worker

#: Everything an owner can write about his step; returns whether it was accepted.
WRITES: dict[str, Callable[[Ledger, UUID], bool]] = {
    "succeed": lambda ledger, token: ledger.succeed("a", token, "666"),
    "fail": lambda ledger, token: ledger.fail("a", token, '"zombie"'),
    "give_back": lambda ledger, token: steps.give_back(ledger.session, "a", lease_token=token),
    "drop": lambda ledger, token: steps.drop(ledger.session, "a", lease_token=token, error="{}") is not None,
    "revoke": lambda ledger, token: (
        steps.revoke(ledger.session, "a", error="{}", lease=LEASE, generation=0, lease_token=token) is not None
    ),
}


def bereave(ledger: Ledger, worker: Worker, *, counted: bool = True) -> bool:
    return steps.bereave(
        ledger.session, "a", worker_id=worker.worker_id, max_lost=MAX_LOST, poison=POISON, counted=counted
    )


def test_a_success_is_committed_and_its_hand_off_is_open(ledger: Ledger) -> None:
    ledger.start("a")
    token = ledger.acquire("a")
    ledger.advance(3)
    assert ledger.succeed("a", token, '{"b": 1,  "a": 1e16}')
    row = ledger.row("a")
    assert (row.status, row.open, row.output, row.error) == ("SUCCESS", True, '{"b": 1,  "a": 1e16}', None)
    assert (row.due, row.message) == (LEASE - 3, MESSAGE)


def test_a_failure_is_committed_and_its_hand_off_is_open(ledger: Ledger) -> None:
    ledger.start("a")
    token = ledger.acquire("a")
    ledger.advance(3)
    assert ledger.fail("a", token)
    row = ledger.row("a")
    assert (row.status, row.open, row.error, row.due, row.message) == ("FAILED", True, ERROR, LEASE, MESSAGE)


@pytest.mark.parametrize("write", WRITES)
def test_zombie_cannot_overwrite_a_reclaimed_step(ledger: Ledger, write: str) -> None:
    ledger.start("a")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    owner = ledger.acquire("a", Worker())
    before = ledger.row("a")
    assert not WRITES[write](ledger, zombie)
    assert ledger.row("a") == before
    assert ledger.succeed("a", owner)


@pytest.mark.parametrize("write", WRITES)
def test_zombie_cannot_overwrite_a_step_its_successor_has_finished(ledger: Ledger, write: str) -> None:
    ledger.start("a", "keep-open")
    zombie = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    ledger.succeed_and_hand_off("a", "1") if write in ("fail", "revoke") else ledger.fail_and_hand_off("a")
    before = ledger.row("a")
    assert not WRITES[write](ledger, zombie)
    assert ledger.row("a") == before


@pytest.mark.parametrize("write", WRITES)
def test_zombie_of_the_same_worker_is_a_zombie_all_the_same(ledger: Ledger, write: str) -> None:
    worker = Worker()
    ledger.start("a")
    zombie = ledger.acquire("a", worker)
    ledger.advance(LEASE + 1)
    ledger.acquire("a", worker)
    before = ledger.row("a")
    assert not WRITES[write](ledger, zombie)
    assert ledger.row("a") == before


@pytest.mark.parametrize("write", ["succeed", "fail"])
def test_an_owner_that_was_only_slow_keeps_its_work(ledger: Ledger, write: str) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    ledger.advance(LEASE + 1)
    assert [step.status for step in ledger.claim()] == ["QUEUED"]
    assert WRITES[write](ledger, token)
    assert ledger.row("a").status == ("SUCCESS" if write == "succeed" else "FAILED")
    assert ledger.ask("a").verdict == "HELD"


@pytest.mark.parametrize("write", ["succeed", "fail"])
def test_an_outcome_whose_answer_was_lost_may_be_said_again(ledger: Ledger, write: str) -> None:
    ledger.start("a")
    token = ledger.acquire("a")
    assert WRITES[write](ledger, token)
    before = ledger.row("a")
    assert WRITES[write](ledger, token)
    assert ledger.row("a") == before


def test_a_step_has_one_outcome(ledger: Ledger) -> None:
    ledger.start("a")
    token = ledger.acquire("a")
    assert ledger.succeed("a", token, "1")
    before = ledger.row("a")
    assert not ledger.fail("a", token)
    assert ledger.row("a") == before


def test_the_main_process_fails_only_what_its_own_worker_runs(ledger: Ledger) -> None:
    mine, other = Worker(), Worker()
    ledger.start("a")
    ledger.acquire("a", mine)

    def fail(worker: Worker, generation: int = 0) -> bool:
        fence = steps.fail(
            ledger.session, "a", error=ERROR, lease=LEASE, worker_id=worker.worker_id, generation=generation
        )
        return fence is not None

    assert not fail(other)
    assert not fail(mine, generation=1)
    assert ledger.row("a").status == "RUNNING"
    assert fail(mine)
    assert ledger.row("a").status == "FAILED"
    assert not fail(mine)


def test_the_main_process_may_fail_what_nobody_runs(ledger: Ledger) -> None:
    ledger.start("a")
    assert steps.fail(ledger.session, "a", error=ERROR, lease=LEASE, worker_id=Worker().worker_id) is not None
    assert ledger.row("a").status == "FAILED"


def test_after_the_main_process_failed_a_step_its_child_can_no_longer_finish_it(ledger: Ledger) -> None:
    mine = Worker()
    ledger.start("a")
    token = ledger.acquire("a", mine)
    assert steps.fail(ledger.session, "a", error=ERROR, lease=LEASE, worker_id=mine.worker_id) is not None
    assert not ledger.succeed("a", token)
    assert ledger.row("a").error == ERROR


def test_a_step_that_is_given_back_is_due_at_once_and_not_lost(ledger: Ledger) -> None:
    ledger.start("a")
    token = ledger.acquire("a", Worker())
    assert steps.give_back(ledger.session, "a", lease_token=token)
    row = ledger.row("a")
    assert (row.status, row.due, row.sent, row.lost, row.lease_token, row.worker_id) == (
        "QUEUED", 0.0, False, 0, None, None
    )  # fmt: skip
    assert not ledger.succeed("a", token)


@pytest.mark.parametrize("counted", [True, False])
def test_a_step_whose_process_died_is_due_at_once(ledger: Ledger, counted: bool) -> None:
    worker = Worker()
    ledger.start("a")
    token = ledger.acquire("a", worker)
    assert bereave(ledger, worker, counted=counted)
    row = ledger.row("a")
    assert (row.status, row.due, row.sent, row.lost, row.worker_id) == ("QUEUED", 0.0, False, int(counted), None)
    assert not ledger.succeed("a", token)
    assert ledger.ask("a").verdict == "EXECUTE"


def test_a_worker_speaks_only_for_its_own_dead_processes(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.acquire("a", Worker())
    before = ledger.row("a")
    assert not bereave(ledger, Worker())
    assert ledger.row("a") == before


def test_a_step_whose_processes_keep_dying_is_failed_and_due(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a")
    for _ in range(MAX_LOST):
        ledger.acquire("a", worker)
        assert bereave(ledger, worker)
    row = ledger.row("a")
    assert (row.status, row.open, row.lost, row.error, row.due) == ("FAILED", True, MAX_LOST, POISON, 0.0)
    assert ledger.ask("a").verdict == "REPLAY"


def test_uncounted_returns_never_poison_a_step(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a")
    for _ in range(MAX_LOST * 3):
        ledger.acquire("a", worker)
        assert bereave(ledger, worker, counted=False)
    assert ledger.row("a").status == "QUEUED"


def test_a_process_that_died_in_its_hand_off_leaves_it_to_be_repeated_at_once(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a")
    assert ledger.succeed("a", ledger.acquire("a", worker))
    assert bereave(ledger, worker)
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.lost) == ("SUCCESS", True, 0.0, 0)
    assert ledger.ask("a").verdict == "REPLAY"


def test_nothing_is_bereaved_that_is_handed_off(ledger: Ledger) -> None:
    worker = Worker()
    ledger.start("a", "keep-open")
    ledger.succeed("a", ledger.acquire("a", worker))
    ledger.hand_off("a")
    before = ledger.row("a")
    assert not bereave(ledger, worker)
    assert ledger.row("a") == before


def test_a_dropped_step_is_cancelled_and_nothing_of_it_is_open(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    assert steps.drop(ledger.session, "a", lease_token=token, error="{}") == workflow_id
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.message) == ("CANCELLED", False, None, None)
    assert ledger.close_if_quiet(workflow_id) == "CANCELLED"


def test_a_revoked_step_is_cancelled_and_to_be_announced(ledger: Ledger) -> None:
    ledger.start("a")
    assert steps.revoke(ledger.session, "a", error="{}", lease=LEASE, generation=0) is not None
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.message) == ("CANCELLED", True, LEASE, MESSAGE)


def test_an_old_message_s_revocation_does_not_cancel_its_retry(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    ledger.record(workflow_id, ledger.step("a", generation=1), lease_token=token)
    before = ledger.row("a")
    assert steps.revoke(ledger.session, "a", error="{}", lease=LEASE, generation=0) is None
    assert ledger.row("a") == before
    assert steps.revoke(ledger.session, "a", error="{}", lease=LEASE, generation=1) is not None


def test_a_worker_revokes_what_it_runs_itself_but_not_what_another_runs(ledger: Ledger) -> None:
    mine, other = Worker(), Worker()
    ledger.start("a")
    token = ledger.acquire("a", mine)

    def revoke(worker: Worker) -> bool:
        fence = steps.revoke(ledger.session, "a", error="{}", lease=LEASE, generation=0, worker_id=worker.worker_id)
        return fence is not None

    assert not revoke(other)
    assert revoke(mine)
    assert revoke(mine)
    assert not ledger.succeed("a", token)


@pytest.mark.parametrize("status", ["SUCCESS", "FAILED"])
def test_a_finished_step_is_not_revoked(ledger: Ledger, status: str) -> None:
    mine = Worker()
    ledger.start("a")
    token = ledger.acquire("a", mine)
    assert ledger.succeed("a", token) if status == "SUCCESS" else ledger.fail("a", token)
    assert (
        steps.revoke(
            ledger.session, "a", error="{}", lease=LEASE, generation=0, worker_id=mine.worker_id, lease_token=token
        )
        is None
    )
    assert ledger.row("a").status == status


def test_a_success_is_handed_off_once_and_lets_its_message_go(ledger: Ledger) -> None:
    workflow_id = ledger.start("a", "keep-open")
    ledger.succeed("a", ledger.acquire("a"), "1")
    assert ledger.hand_off("a") == workflow_id
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.message, row.output) == ("SUCCESS", False, None, None, "1")
    assert ledger.hand_off("a") is None
    assert ledger.row("a") == row


def test_a_failure_that_is_handed_off_keeps_its_message_and_error_for_resume(ledger: Ledger) -> None:
    ledger.start("a", "keep-open")
    ledger.fail_and_hand_off("a")
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.message, row.error) == ("FAILED", False, None, MESSAGE, ERROR)


@pytest.mark.parametrize("running", [False, True])
def test_an_unfinished_step_cannot_be_handed_off(ledger: Ledger, running: bool) -> None:
    ledger.start("a")
    if running:
        ledger.acquire("a")
    before = ledger.row("a")
    assert ledger.hand_off("a") is None
    assert ledger.row("a") == before


def test_a_broken_hand_off_is_repeated_later_and_counted_by_the_relay(ledger: Ledger) -> None:
    ledger.start("a")
    ledger.succeed("a", ledger.acquire("a"), "5")
    for tries in (1, 2, 3):
        broken = ledger.break_hand_off("a", interval=7)
        assert broken is not None
        assert (broken.step_id, broken.tries, broken.output) == ("a", tries, "5")
        row = ledger.row("a")
        assert (row.status, row.open, row.error, row.due) == ("SUCCESS", True, ERROR, 7.0)
        ledger.advance(7)
        assert [step.handoffs for step in ledger.claim()] == [tries]
        assert ledger.ask("a").verdict == "REPLAY"


def test_a_hand_off_that_works_in_the_end_leaves_no_error(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed("a", ledger.acquire("a"))
    ledger.break_hand_off("a", interval=7)
    assert ledger.hand_off("a") == workflow_id
    assert ledger.row("a").error is None
    assert ledger.close_if_quiet(workflow_id) == "SUCCESS"


def test_a_hand_off_that_is_given_up_fails_the_run_and_keeps_the_success(ledger: Ledger) -> None:
    workflow_id = ledger.start("a")
    ledger.succeed("a", ledger.acquire("a"), "5")
    ledger.break_hand_off("a", interval=7)
    assert ledger.give_up_hand_off("a") == workflow_id
    assert ledger.give_up_hand_off("a") is None
    row = ledger.row("a")
    assert (row.status, row.open, row.due, row.output, row.message) == ("SUCCESS", False, None, "5", MESSAGE)
    assert ledger.close_if_quiet(workflow_id) == "FAILED"


def test_only_a_success_that_is_not_handed_off_can_have_a_broken_hand_off(ledger: Ledger) -> None:
    ledger.start("a", "b", "keep-open")
    ledger.fail("a", ledger.acquire("a"))
    ledger.succeed_and_hand_off("b")
    for task_id in ("a", "b", "keep-open"):
        before = ledger.row(task_id)
        assert ledger.break_hand_off(task_id) is None
        assert ledger.give_up_hand_off(task_id) is None
        assert ledger.row(task_id) == before


def test_a_token_is_needed_to_write_at_all(ledger: Ledger) -> None:
    ledger.start("a")
    before = ledger.row("a")
    for write in ("succeed", "fail", "give_back", "drop"):
        assert not WRITES[write](ledger, uuid4())
    assert ledger.row("a") == before


# --- what waits for the disk


def committing(ledger: Ledger) -> str:
    """What the transaction that is open will do at its commit."""
    row = ledger.session.connection.execute("SHOW synchronous_commit").fetchone()
    assert row is not None
    return str(row[0])


@pytest.mark.parametrize(
    ("finished", "durable", "expected"), [(True, False, "on"), (False, True, "on"), (False, False, "off")]
)
def test_a_record_waits_for_the_disk_if_it_holds_a_success_or_nothing_else_has_it(
    ledger: Ledger, finished: bool, durable: bool, expected: str
) -> None:
    workflow_id = ledger.start("a")
    token = ledger.acquire("a")
    with ledger.session.connection.transaction():
        recording.record(
            ledger.session,
            [ledger.step("b")],
            workflow_id=workflow_id,
            app=ledger.app,
            lease_token=token,
            finished=Finished("a", "1") if finished else None,
            durable=durable,
        )
        assert committing(ledger) == expected


def test_outcomes_wait_for_the_disk_and_what_can_be_repeated_does_not(ledger: Ledger) -> None:
    ledger.start("a", "b")
    with ledger.session.connection.transaction():
        token = ledger.acquire("a")
        assert committing(ledger) == "off"
    with ledger.session.connection.transaction():
        assert steps.succeed(ledger.session, "a", lease_token=token, output="1")
        assert committing(ledger) == "on"
    with ledger.session.connection.transaction():
        assert ledger.hand_off("a") is not None
        assert committing(ledger) == "off"
    token = ledger.acquire("b")
    with ledger.session.connection.transaction():
        assert steps.fail(ledger.session, "b", error="{}", lease=LEASE, lease_token=token) is not None
        assert committing(ledger) == "on"
