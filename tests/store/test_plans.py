"""The hot statements read a handful of pages, however many finished and waiting steps there are.

Every statement is executed with the generic plan that a session of ours gives it.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from uuid import uuid4

import pytest

from benchmarks.support.volume import analyze, fill
from pgqrs_celery import embedded
from pgqrs_celery.db import Database
from pgqrs_celery.store import migrations, recording, runs, steps, units, workers
from pgqrs_celery.store.recording import Finished, NewStep
from pgqrs_celery.store.results import Outcome
from tests.support.ledger import INTERVAL, INTERVAL_MAX, LEASE, MAX_LOST, MESSAGE, POISON, Ledger
from tests.support.schemas import drop_schema, new_name
from tests.support.volume import Plan, explain

STEPS = "pgqrs_workflow_steps"
KEY, TASK, DUE, OPEN = (f"{STEPS}_{suffix}" for suffix in ("pkey", "task_id", "due", "open"))
RUN, ROOT, OPEN_RUNS = (f"pgqrs_workflows_{suffix}" for suffix in ("pkey", "root_id_key", "open"))

#: More than any statement by key needs, and far less than a scan would read.
PAGES = 150


@pytest.fixture
def database(database_dsn: str, schema: str) -> Iterator[Database]:
    """Tables that were never used: what has been read of them is counted."""
    database = Database(database_dsn, schema=schema)
    migrations.install(database)
    yield database
    database.close()


@pytest.fixture(scope="module")
def large(postgres_server: embedded.PostgresServer) -> Iterator[Database]:
    """100 000 finished and 20 000 waiting steps."""
    schema = new_name()
    database = Database(postgres_server.start().dsn(), schema=schema)
    migrations.install(database)
    with database.session() as session:
        fill(session, schema, prefix="d", runs=10_000, steps=10, finished=True)
        fill(session, schema, prefix="w", runs=2_000, steps=10, finished=False)
        analyze(session, schema)
    yield database
    database.close()
    drop_schema(database.dsn, schema)


@pytest.fixture
def ledger(large: Database) -> Iterator[Ledger]:
    """The large ledger, inside a transaction that is rolled back, on a clock that stands still."""
    ledger = Ledger(large)
    now = ledger.execute("SELECT {schema}.pgqrs_now()")[0][0]
    ledger.set_clock(now)
    with ledger.session.connection.transaction(force_rollback=True):
        yield ledger
    ledger.close()


def claim_parameters(back: float | None = None) -> dict[str, Any]:
    return {
        "app": "shop", "may_judge": True, "batch": 100, "max_lost": MAX_LOST, "poison": POISON, "interval": INTERVAL,
        "interval_max": INTERVAL_MAX, "back": back,
    }  # fmt: skip


def record_parameters(workflow_id: int, task_id: str) -> dict[str, Any]:
    step = NewStep(task_id, task_id, "shop.pack", 0, MESSAGE, "celery", INTERVAL, True)
    return {
        "messages": recording.rows([step]), "finished_id": None, "output": None, "hand_off": False,
        "workflow_id": workflow_id, "app": "shop", "lease_token": None, "commit": "on",
    }  # fmt: skip


def start_parameters(task_id: str) -> dict[str, Any]:
    step = NewStep(task_id, task_id, "shop.pack", 0, MESSAGE, "celery", INTERVAL, True)
    run = runs.NewRun("shop", task_id, "pack")
    return {**run.params(), "messages": recording.rows([step])}


def acquire_parameters(task_id: str) -> dict[str, Any]:
    return {
        "task_id": task_id, "generation": 0, "lease_token": uuid4(), "worker_id": uuid4(), "lease": LEASE,
        "max_lost": MAX_LOST, "poison": POISON, "may_judge": True,
    }  # fmt: skip


def workflow_of(ledger: Ledger, task_id: str) -> int:
    row = steps.peek(ledger.session, task_id)
    assert row is not None
    return row.workflow_id


def no_waste(plan: Plan, *scans: str) -> None:
    """The plan reads through these indexes only, few pages, and throws nothing away."""
    assert plan.scans == {f"Index Scan on {scan}" for scan in scans} | {s for s in plan.scans if "Only" in s}
    assert not [scan for scan in plan.scans if "Seq" in scan or "Bitmap" in scan]
    assert plan.pages <= PAGES
    assert plan.removed <= 5


def test_record_finds_everything_by_key(ledger: Ledger) -> None:
    workflow_id = workflow_of(ledger, "w7-1")
    no_waste(explain(ledger.session, "recording.record", record_parameters(workflow_id, "new")), TASK, RUN)


def test_record_with_the_sender_s_success_finds_everything_by_key(ledger: Ledger) -> None:
    token = ledger.acquire("w7-1")
    workflow_id = workflow_of(ledger, "w7-1")
    parameters = record_parameters(workflow_id, "new")
    parameters.update(finished_id="w7-1", output="1", hand_off=True, lease_token=token)
    no_waste(explain(ledger.session, "recording.record", parameters), TASK, RUN)
    assert ledger.row("w7-1").status == "SUCCESS"


def test_start_inserts_and_looks_at_nothing(ledger: Ledger) -> None:
    plan = explain(ledger.session, "runs.start", start_parameters("new"))
    no_waste(plan)
    assert plan.scans == set()


def test_acquire_finds_its_step_by_task_id(ledger: Ledger) -> None:
    plan = explain(ledger.session, "steps.acquire", acquire_parameters("w7-1"))
    no_waste(plan, TASK, RUN, KEY)


def test_begin_finds_its_step_by_task_id_and_the_run_by_its_key(ledger: Ledger) -> None:
    ledger.execute("UPDATE {schema}.pgqrs_workflows SET status = 'RUNNING', updated_at = {schema}.pgqrs_now()")
    plan = explain(ledger.session, "steps.begin", acquire_parameters("w7-1"))
    no_waste(plan, TASK, RUN)
    assert ledger.row("w7-1").status == "RUNNING"


@pytest.mark.parametrize("name", ["succeed", "fail", "hand_off", "succeed_and_hand_off", "give_back", "peek"])
def test_an_outcome_finds_its_step_by_task_id(ledger: Ledger, name: str) -> None:
    token = ledger.acquire("w7-1")
    if name == "hand_off":
        ledger.succeed("w7-1", token)
    parameters = {
        "task_id": "w7-1", "lease_token": token, "output": "1", "error": "{}", "lease": LEASE, "worker_id": None,
        "generation": 0, "undoing": False, "fence": 1,
    }  # fmt: skip
    plan = explain(ledger.session, f"steps.{name}", parameters)
    no_waste(plan, TASK, *((RUN,) if name == "peek" else ()))
    assert max(node["Actual Rows"] for node in plan.nodes) == 1


def test_the_closing_look_reads_the_index_of_what_is_open(ledger: Ledger) -> None:
    for task_id, quiet in (("d7-1", True), ("w7-1", False)):
        workflow_id = workflow_of(ledger, task_id)
        plan = explain(ledger.session, "runs.quiet", {"workflow_id": workflow_id})
        chords = {"Index Scan on pgqrs_chords_of_run"} if quiet else set()
        assert plan.scans == {f"Index Only Scan on {OPEN}"} | chords
        assert plan.pages <= 10
        row = ledger.session.row("runs.quiet", {"workflow_id": workflow_id})
        assert row == (quiet,)


def test_closing_reads_its_own_run_only(ledger: Ledger) -> None:
    ledger.execute("UPDATE {schema}.pgqrs_workflow_steps SET open = false WHERE workflow_id = %s", [
        workflow_of(ledger, "w7-1")
    ])  # fmt: skip
    plan = explain(ledger.session, "runs.close", {"workflow_id": workflow_of(ledger, "w7-1")})
    assert plan.pages <= 2 * PAGES


def test_touch_locks_one_row(ledger: Ledger) -> None:
    no_waste(explain(ledger.session, "runs.touch", {"workflow_id": workflow_of(ledger, "w7-1")}), RUN)


def make_due(ledger: Ledger, count: int) -> None:
    ledger.execute(
        "UPDATE {schema}.pgqrs_workflow_steps SET due_at = {schema}.pgqrs_now() - interval '1 s' WHERE task_id IN "
        "(SELECT 'w' || n || '-1' FROM generate_series(1, %s::int) AS n)",
        [count],
    )


@pytest.mark.parametrize("back", [None, 5.0])
def test_the_relay_finds_what_is_due_among_20_000_that_wait(ledger: Ledger, back: float | None) -> None:
    make_due(ledger, 3)
    plan = explain(ledger.session, "clock.claim_due", claim_parameters(back))
    no_waste(plan, DUE, KEY)


@pytest.mark.parametrize("back", [None, 5.0])
def test_the_next_due_time_is_the_first_entry_of_the_index(ledger: Ledger, back: float | None) -> None:
    plan = explain(ledger.session, "clock.next_due", {"app": "shop", "may_judge": True, "back": back})
    no_waste(plan, DUE)
    assert plan.pages <= 10


def test_the_keeper_finds_what_it_holds_by_task_id(ledger: Ledger) -> None:
    held = [f"w{n}-1" for n in range(1, 9)]
    for task_id in held:
        ledger.acquire(task_id)
    parameters = {"task_ids": held, "worker_id": uuid4(), "lease": LEASE}
    plan = explain(ledger.session, "leases.renew", parameters)
    assert {scan for scan in plan.scans if "Only" not in scan} <= {f"Index Scan on {TASK}", f"Index Scan on {KEY}"}
    assert plan.pages <= PAGES * 2


@pytest.mark.parametrize("name", ["release", "move_owner", "expire"])
def test_a_worker_s_steps_are_found_among_what_is_due_some_day(ledger: Ledger, name: str) -> None:
    worker_id = uuid4()
    parameters = {
        "app": "shop", "worker_id": worker_id, "old_id": worker_id, "new_id": uuid4(), "max_lost": MAX_LOST,
        "poison": POISON,
    }  # fmt: skip
    plan = explain(ledger.session, f"leases.{name}", parameters)
    assert {scan.rpartition(" ")[2] for scan in plan.scans} <= {DUE, STEPS}
    assert not [scan for scan in plan.scans if "Seq" in scan], "the finished steps are not looked at"


def test_the_backstop_reads_a_bounded_number_of_open_runs(ledger: Ledger) -> None:
    parameters = {"app": "shop", "after": 0, "age": 2.0, "batch": 500}
    plan = explain(ledger.session, "runs.stuck", parameters)
    assert f"Index Scan on {OPEN_RUNS}" in plan.scans
    assert plan.removed == 0, "closed runs are not looked at"
    assert plan.pages <= 500 * 5
    found, last = runs.stuck(ledger.session, app="shop", after=0, age=2.0, batch=500)
    assert found == []
    assert last is not None


def test_a_dead_worker_s_neighbours_are_found_by_index(ledger: Ledger) -> None:
    plan = explain(ledger.session, "workers.neighbours", {"app": "shop", "worker_id": uuid4(), "limit": 8})
    assert not [scan for scan in plan.scans if "Seq" in scan]
    assert workers.neighbours(ledger.session, uuid4(), app="shop", limit=8) == []


# --- an old snapshot


@pytest.fixture
def churned(large: Database) -> Iterator[Ledger]:
    """A snapshot is open that is older than 60 000 changes of due times that are over."""
    ledger = Ledger(large)
    old = large.connect()
    old.execute("BEGIN ISOLATION LEVEL REPEATABLE READ")
    old.execute(f"SELECT count(*) FROM {large.schema}.pgqrs_workers".encode())
    for due in ("- interval '3 hours'", "- interval '2 hours'", "- interval '1 hour'", "+ interval '30 minutes'"):
        ledger.execute(f"UPDATE {{schema}}.pgqrs_workflow_steps SET due_at = {{schema}}.pgqrs_now() {due} WHERE open")
    yield ledger
    old.execute("COMMIT")
    old.close()
    ledger.execute("VACUUM {schema}.pgqrs_workflow_steps")
    ledger.close()


def test_with_an_old_snapshot_open_the_relay_s_look_takes_less_than_5_ms(churned: Ledger) -> None:
    churned.set_clock(churned.execute("SELECT {schema}.pgqrs_now()")[0][0])
    full = explain(churned.session, "clock.next_due", {"app": "shop", "may_judge": True, "back": None})
    assert full.pages > 10_000, "the old snapshot kept nothing: this test tests nothing"
    for name, parameters in (
        ("clock.claim_due", claim_parameters(back=5.0)),
        ("clock.next_due", {"app": "shop", "may_judge": True, "back": 5.0}),
    ):
        looks = [explain(churned.session, name, parameters) for _ in range(5)]
        assert looks[0].pages <= PAGES, name
        assert min(look.milliseconds for look in looks) < 5.0, name
    assert churned.claim(back=5.0) == []


# --- a fresh installation


@pytest.mark.parametrize("how", ["statements", "unit of work"])
def test_plans_made_while_the_tables_were_empty_find_their_rows_by_key(database: Database, how: str) -> None:
    """Nobody has analyzed the tables yet, and the connection keeps the plans it made first."""
    ledger, lives = Ledger(database), 300
    for n in range(lives):
        workflow_id = ledger.start(f"{n}-a")
        token = ledger.acquire(f"{n}-a")
        follower = ledger.step(f"{n}-b")
        if how == "statements":
            finished = Finished(f"{n}-a", "1", hand_off=True)
            assert ledger.record(workflow_id, follower, lease_token=token, finished=finished) == "SEND"
            ledger.finish(f"{n}-b")
            assert ledger.claim() == []
        else:
            unit = units.finish(
                ledger.session,
                app=ledger.app,
                lease_token=token,
                output="1",
                outcome=Outcome(f"{n}-a", "SUCCESS"),
                following=follower,
                message=None,
                own_message_id=None,
            )
            assert [str(r.outcome) for r in unit.recorded] == ["SEND"]
    ledger.execute("SELECT pg_stat_force_next_flush()")
    other = ledger.connect()
    row = other.connection.execute(
        "SELECT sum(idx_tup_read)::int FROM pg_stat_user_indexes WHERE schemaname = %s", [database.schema]
    ).fetchone()
    assert row is not None
    ledger.close()
    assert row[0] < lives * 60, f"{row[0] / lives:.0f} index entries read for a life of two steps"
