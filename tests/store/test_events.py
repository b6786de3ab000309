"""Events: the first write wins, one emitted before the wait is not lost, and no interleaving loses a wake-up."""

from __future__ import annotations

import json
import random
import threading
from dataclasses import dataclass
from functools import partial
from uuid import UUID, uuid4

import pytest

from pgqrs_celery.exceptions import RunNotFound
from pgqrs_celery.ids import relay_channel
from pgqrs_celery.session import Session
from pgqrs_celery.store import events, inner, runs
from pgqrs_celery.store.inner import NewInner, Owner, Waited
from tests.support.ledger import ERROR, Ledger, wait_until_blocked

TIMED_OUT = '{"exc_type": "EventTimeout"}'


@dataclass(slots=True)
class Function:
    """A run whose only task is a function, being executed."""

    ledger: Ledger
    workflow_id: int
    task_id: str
    owner: Owner

    @classmethod
    def start(cls, ledger: Ledger) -> Function:
        """Start a run and execute its function."""
        task_id = ledger.unique("f")
        workflow_id = ledger.start(task_id)
        return cls(ledger, workflow_id, task_id, cls.take(ledger, workflow_id, task_id))

    @staticmethod
    def take(ledger: Ledger, workflow_id: int, task_id: str) -> Owner:
        """Execute a queued function."""
        return Owner(workflow_id, ledger.app, task_id, str(ledger.acquire(task_id)), 0)

    def again(self) -> None:
        """Execute it once more, after it was woken."""
        self.owner = self.take(self.ledger, self.workflow_id, self.task_id)

    def wait(self, session: Session | None = None, *, timeout: float | None = None, name: str = "go") -> inner.Wait:
        """Wait for an event, as a worker does."""
        session = session or self.ledger.session
        with session.connection.transaction():
            return events.await_event(session, self.owner, name, name, timeout=timeout, on_timeout=TIMED_OUT, park=True)

    def emit(self, session: Session | None = None, payload: str = '"hello"', name: str = "go") -> bool:
        """Emit the event."""
        session = session or self.ledger.session
        with session.connection.transaction():
            return events.emit(session, self.workflow_id, name, payload)

    def status(self) -> str:
        """The status of the function's row."""
        return self.ledger.row(self.task_id).status


def test_emit_is_first_write_wins(ledger: Ledger) -> None:
    function = Function.start(ledger)
    assert [function.emit(payload="1"), function.emit(payload="2")] == [True, False]
    assert function.wait().output == "1"


def test_an_event_before_the_wait_is_not_lost(ledger: Ledger) -> None:
    function = Function.start(ledger)
    function.emit()
    wait = function.wait()
    assert (wait.waited, wait.output) == (Waited.DECIDED, '"hello"')
    assert function.status() == "RUNNING"


def test_a_wait_parks_without_an_owner_or_a_clock_and_an_emit_makes_it_due(ledger: Ledger) -> None:
    function = Function.start(ledger)
    assert function.wait().waited is Waited.PARKED
    parked = ledger.row(function.task_id)
    assert (parked.status, parked.due, parked.lease_token, parked.worker_id) == ("PAUSED", None, None, None)
    assert parked.attempt == 0
    assert ledger.claim() == []
    assert function.emit()
    woken = ledger.row(function.task_id)
    assert (woken.status, woken.due, woken.sent) == ("QUEUED", 0, False)
    assert [step.was for step in ledger.claim()] == ["QUEUED"]


def test_a_timeout_is_kept_from_the_first_wait_and_decided_by_the_databases_clock(ledger: Ledger) -> None:
    function = Function.start(ledger)
    assert function.wait(timeout=60).waited is Waited.PARKED
    assert ledger.row(function.task_id).due == 60
    ledger.advance(30)
    ledger.execute("UPDATE {schema}.pgqrs_workflow_steps SET status = 'QUEUED' WHERE task_id = %s", [function.task_id])
    function.again()
    assert function.wait(timeout=60).waited is Waited.PARKED, "woken too early, it sleeps on"
    assert ledger.row(function.task_id).due == 30
    ledger.advance(31)
    assert [(step.was, step.status) for step in ledger.claim()] == [("PAUSED", "QUEUED")]
    function.again()
    wait = function.wait(timeout=60)
    assert (wait.waited, wait.error) == (Waited.DECIDED, TIMED_OUT)


def test_the_branch_taken_is_recorded_with_the_decision(ledger: Ledger) -> None:
    function = Function.start(ledger)
    function.wait(timeout=1)
    ledger.advance(2)
    ledger.claim()
    function.again()
    assert function.wait(timeout=1).error == TIMED_OUT
    assert function.emit()
    again = function.wait(timeout=1)
    assert (again.waited, again.error, again.output) == (Waited.DECIDED, TIMED_OUT, None)


def test_a_former_owner_can_neither_park_nor_decide(ledger: Ledger) -> None:
    function = Function.start(ledger)
    ledger.advance(31)
    owner = Function.take(ledger, function.workflow_id, function.task_id)
    function.emit()
    assert function.wait().waited is Waited.LOST
    assert function.status() == "RUNNING"
    function.owner = owner
    assert function.wait().waited is Waited.DECIDED


def test_an_emit_waits_for_an_uncommitted_park_and_wakes_it(live_ledger: Ledger) -> None:
    ledger = live_ledger
    function = Function.start(ledger)
    waiter, emitter, look = ledger.connect(), ledger.connect(), ledger.connect()
    with waiter.connection.transaction():
        wait = events.await_event(waiter, function.owner, "go", "go", timeout=None, on_timeout=TIMED_OUT, park=True)
        assert wait.waited is Waited.PARKED
        emitted = ledger.in_thread(lambda: function.emit(emitter))
        wait_until_blocked(look, emitter, waiter, emitted)
    assert emitted.result(30) is True
    assert function.status() == "QUEUED"


def test_a_wait_waits_for_an_uncommitted_emit_and_does_not_park(live_ledger: Ledger) -> None:
    ledger = live_ledger
    function = Function.start(ledger)
    waiter, emitter, look = ledger.connect(), ledger.connect(), ledger.connect()
    with emitter.connection.transaction():
        assert events.emit(emitter, function.workflow_id, "go", "1")
        waited = ledger.in_thread(lambda: function.wait(waiter))
        wait_until_blocked(look, waiter, emitter, waited)
    assert waited.result(30).output == "1"
    assert function.status() == "RUNNING"


def test_of_1000_interleavings_of_emit_and_wait_none_loses_the_wake_up(live_ledger: Ledger) -> None:
    ledger = live_ledger
    functions = [Function.start(ledger) for _ in range(1000)]
    sessions = [ledger.connect(), ledger.connect()]
    barrier = threading.Barrier(2, timeout=60)
    chance = random.Random(7)
    delays = [chance.random() * 0.0015 for _ in functions]

    def waits() -> None:
        for function, delay in zip(functions, delays, strict=True):
            barrier.wait()
            threading.Event().wait(delay if delay > 0.0007 else 0)
            function.wait(sessions[0])

    def emits() -> None:
        for function, delay in zip(functions, delays, strict=True):
            barrier.wait()
            threading.Event().wait(0.0015 - delay if delay <= 0.0007 else 0)
            function.emit(sessions[1])

    threads = [ledger.in_thread(waits), ledger.in_thread(emits)]
    for thread in threads:
        thread.result(110)
    outcomes = {"RUNNING": 0, "QUEUED": 0}
    for function in functions:
        status = function.status()
        assert status in outcomes, "parked, although the event is there"
        outcomes[status] += 1
        if status == "QUEUED":
            function.again()
        assert function.wait().output == '"hello"'
    assert min(outcomes.values()) > 0, f"both orders must have happened: {outcomes}"


def test_several_functions_wait_for_one_event(ledger: Ledger) -> None:
    first = Function.start(ledger)
    other_id = ledger.unique("f")
    ledger.record(first.workflow_id, other_id)
    other = Function(ledger, first.workflow_id, other_id, Function.take(ledger, first.workflow_id, other_id))
    inner_names = ("a/go", "b/go")
    for function, step_id in zip((first, other), inner_names, strict=True):
        with ledger.session.connection.transaction():
            events.await_event(
                ledger.session, function.owner, step_id, "go", timeout=None, on_timeout=TIMED_OUT, park=True
            )
    first.emit()
    assert [first.status(), other.status()] == ["QUEUED", "QUEUED"]


def test_an_event_of_a_run_that_does_not_exist_is_refused(ledger: Ledger) -> None:
    with pytest.raises(RunNotFound), ledger.session.connection.transaction():
        events.emit(ledger.session, 4711, "go", "1")


def test_events_go_with_their_run(ledger: Ledger) -> None:
    function = Function.start(ledger)
    function.emit()
    ledger.execute("DELETE FROM {schema}.pgqrs_workflows WHERE workflow_id = %s", [function.workflow_id])
    assert ledger.execute("SELECT count(*) FROM {schema}.pgqrs_events") == [(0,)]


def test_a_wake_up_calls_the_relays_of_the_app(ledger: Ledger) -> None:
    function = Function.start(ledger)
    function.wait()
    listener = ledger.connect()
    channel = relay_channel(ledger.database.schema, ledger.app)
    listener.connection.execute(f"LISTEN {channel}".encode())
    function.emit()
    assert [n.channel for n in listener.connection.notifies(timeout=10, stop_after=1)] == [channel]


def test_an_inner_step_is_recorded_by_the_owner_only_and_once(ledger: Ledger) -> None:
    function = Function.start(ledger)
    zombie = function.owner

    def record(owner: Owner, status: str = "SUCCESS", output: str | None = "1") -> bool:
        error = ERROR if status == "FAILED" else None
        return inner.record(ledger.session, owner, NewInner("s", "s", status, output, error, None, 0.5))

    assert record(zombie, "FAILED", None)
    ledger.advance(31)
    function.again()
    assert not record(zombie)
    assert not record(zombie, "FAILED", None)
    assert record(function.owner)
    assert not record(function.owner, output="2")
    found = inner.find(ledger.session, function.workflow_id, "s")
    assert found is not None
    assert (found.status, found.output) == ("SUCCESS", "1")
    assert not record(Owner(function.workflow_id, ledger.app, function.task_id, str(uuid4()), 0))


def test_a_taker_over_waits_for_an_uncommitted_inner_step_and_then_sees_it(live_ledger: Ledger) -> None:
    ledger = live_ledger
    function = Function.start(ledger)
    former, taker, look = ledger.connect(), ledger.connect(), ledger.connect()
    ledger.execute(
        "UPDATE {schema}.pgqrs_workflow_steps SET due_at = now() - interval '1 s' WHERE task_id = %s",
        [function.task_id],
    )
    with former.connection.transaction():
        new = NewInner("s", "s", "SUCCESS", "1", None, None, 0)
        assert inner.record(former, function.owner, new, again=True)
        token = uuid4()
        taken = ledger.in_thread(lambda: ledger.ask(function.task_id, token=token, session=taker))
        wait_until_blocked(look, taker, former, taken)
    assert taken.result(30).verdict == "EXECUTE"
    assert [row.step_id for row in inner.load(taker, function.workflow_id, "")] == ["s"]
    assert not inner.record(former, function.owner, NewInner("t", "t", "SUCCESS", "1", None, None, 0))


def test_inner_steps_are_never_due_and_keep_no_run_open(ledger: Ledger) -> None:
    function = Function.start(ledger)
    inner.record(ledger.session, function.owner, NewInner("bad", "bad", "FAILED", None, ERROR, None, 0))
    function.wait(timeout=5)
    function.emit()
    ledger.claim()
    function.again()
    function.wait(timeout=5)
    ledger.advance(100_000)
    assert {step.task_id for step in ledger.claim()} == {function.task_id}
    ledger.finish(function.task_id)
    assert ledger.run_status(function.workflow_id) == "SUCCESS"


def end_child(function: Function, barrier: threading.Barrier, child: str, token: UUID, session: Session) -> bool:
    """Finish a child, as a worker does; returns whether that has woken the function."""
    barrier.wait()
    assert function.ledger.succeed(child, token, session=session)
    with session.connection.transaction():
        return inner.wake_waiter(session, function.task_id)


def test_children_that_end_at_the_same_time_wake_their_function(live_ledger: Ledger) -> None:
    ledger = live_ledger
    for _ in range(50):
        function = Function.start(ledger)
        children = [ledger.unique("c") for _ in range(2)]
        for child in children:
            ledger.record(function.workflow_id, ledger.step(child, kind="inner"))
        with ledger.session.connection.transaction():
            assert inner.await_children(ledger.session, function.owner, task_ids=children, park=True) is Waited.PARKED
        tokens = [ledger.acquire(child) for child in children]
        sessions = [ledger.connect() for _ in children]
        barrier = threading.Barrier(2, timeout=30)

        ends = [
            ledger.in_thread(partial(end_child, function, barrier, *given))
            for given in zip(children, tokens, sessions, strict=True)
        ]
        assert sum(end.result(30) for end in ends) >= 1
        assert function.status() == "QUEUED"
        for session in sessions:
            session.connection.close()


def test_a_function_that_waits_for_something_else_is_not_woken_by_a_child(ledger: Ledger) -> None:
    function = Function.start(ledger)
    child = ledger.unique("c")
    ledger.record(function.workflow_id, ledger.step(child, kind="inner"))
    with ledger.session.connection.transaction():
        wait = inner.sleep(ledger.session, function.owner, "nap", seconds=60, park=True)
    assert wait.waited is Waited.PARKED
    ledger.succeed(child, ledger.acquire(child))
    with ledger.session.connection.transaction():
        assert not inner.wake_waiter(ledger.session, function.task_id)
    assert function.status() == "PAUSED"


def test_payloads_are_kept_verbatim(ledger: Ledger) -> None:
    function = Function.start(ledger)
    text = json.dumps({"b": 1e16, "a": 2**70})
    function.emit(payload=text)
    assert function.wait().output == text


def test_the_end_of_a_child_waits_for_an_uncommitted_park_and_wakes_it(live_ledger: Ledger) -> None:
    ledger = live_ledger
    function = Function.start(ledger)
    child = ledger.unique("c")
    ledger.record(function.workflow_id, ledger.step(child, kind="inner"))
    token = ledger.acquire(child)
    waiter, ending, look = ledger.connect(), ledger.connect(), ledger.connect()
    alone = threading.Barrier(1)
    with waiter.connection.transaction():
        assert inner.await_children(waiter, function.owner, task_ids=[child], park=True) is Waited.PARKED
        ended = ledger.in_thread(lambda: end_child(function, alone, child, token, ending))
        wait_until_blocked(look, ending, waiter, ended)
    assert ended.result(30) is True
    assert function.status() == "QUEUED"


def test_the_end_of_a_child_run_wakes_its_parent_in_the_transaction_that_closes_it(ledger: Ledger) -> None:
    for end in ("finish", "cancel"):
        function = Function.start(ledger)
        child = ledger.unique("c")
        child_run = ledger.start(child, parent_task_id=function.task_id)
        with ledger.session.connection.transaction():
            assert inner.await_children(ledger.session, function.owner, root_ids=[child], park=True) is Waited.PARKED
        if end == "finish":
            workflow_id = ledger.succeed_and_hand_off(child)
            assert function.status() == "PAUSED"
            runs.close_if_quiet(ledger.session, workflow_id)
        else:
            assert runs.cancel(ledger.session, child_run)
            ledger.execute(
                "UPDATE {schema}.pgqrs_workflow_steps SET status = 'CANCELLED', open = false WHERE task_id = %s",
                [child],
            )
            with ledger.session.connection.transaction():
                inner.wake_waiter(ledger.session, function.task_id)
        assert function.status() == "QUEUED"
