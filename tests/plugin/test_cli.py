"""``celery -A app pgqrs …``: invoked as Celery invokes it, on a real database and a real broker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psycopg
import pytest
from celery import Celery
from celery.bin.celery import celery
from click.testing import CliRunner, Result

from pgqrs_celery import Pgqrs, StepGuard, WorkflowRun
from pgqrs_celery.cli import output
from pgqrs_celery.cli import pgqrs as group
from pgqrs_celery.gate import error_text, hand_off
from pgqrs_celery.store import migrations

Invoke = Callable[..., Result]

ROOT = Path(__file__).parents[2]


@pytest.fixture
def app(database_dsn: str, schema: str, redis_url: str) -> Iterator[Celery]:
    """An app with two durable tasks; nothing is installed, no worker runs."""
    app = Celery("shop", broker=redis_url, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=schema)
    pgqrs = Pgqrs(app)
    pgqrs.task(reserve, name="reserve")
    pgqrs.task(charge, name="charge")
    yield app
    pgqrs.ledger.database.close()
    app.close()


def reserve(order: int) -> int:
    """Return the order."""
    return order


def charge(order: int) -> str:
    """Return a receipt."""
    return f"receipt {order}"


@pytest.fixture
def invoke(app: Celery) -> Invoke:
    """Run ``celery -A app pgqrs …`` in this process."""
    if "pgqrs" not in celery.commands:  # the package is not installed, only on the path
        celery.add_command(group)

    def run(*arguments: object, of: Any = app) -> Result:
        return CliRunner().invoke(celery, ["pgqrs", *map(str, arguments)], default_map={"app": of})

    return run


@pytest.fixture
def started(app: Celery) -> WorkflowRun:
    """A run of two steps, the first of which is queued."""
    app.pgqrs.install()
    fulfil = app.pgqrs.workflow("fulfil", app.tasks["reserve"].s() | app.tasks["charge"].s())
    return fulfil.apply_async((42,), workflow_key="order-42")


def fail_first_step(run: WorkflowRun, error: Exception) -> None:
    """Do what a worker does when the body of a run's first step raises."""
    ledger = run.pgqrs.ledger
    step = run.steps()[0]
    guard = StepGuard.acquire(ledger, step.task_id).guard
    assert guard is not None
    assert guard.fail(error_text(run.pgqrs.app.backend, error))
    hand_off(ledger, guard.task_id, guard.fence)


def rows(result: Result) -> list[dict[str, str]]:
    """Return a tab-separated table as dictionaries; fails where the command failed."""
    assert result.exit_code == 0, result.output
    names, *lines = (line.split("\t") for line in result.stdout.splitlines() if "\t" in line)
    return [dict(zip(names, line, strict=True)) for line in lines]


def error_line(result: Result) -> str:
    """Return the one line of an error; fails where there is more, or another exit code than 1."""
    assert result.exit_code == 1, result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1, result.stderr
    assert result.stdout == ""
    return lines[0]


# install


def test_install_says_what_it_applied_and_then_that_nothing_is_left(invoke: Invoke, schema: str) -> None:
    first, second = invoke("install"), invoke("install")
    applied = [f"schema {schema}: applied {migration.name}" for migration in migrations.available()]
    assert first.stdout.splitlines() == applied
    assert second.stdout == f"schema {schema}: up to date ({len(applied)} migrations)\n"


def test_the_printed_sql_installs_what_install_would(invoke: Invoke, app: Celery, database_dsn: str) -> None:
    script = invoke("install", "--sql").stdout
    with psycopg.connect(database_dsn, autocommit=True) as connection:
        connection.execute(script.encode())
    migrations.verify(app.pgqrs.ledger.database)
    assert app.pgqrs.install() == []


def test_the_sql_is_printed_without_a_database(invoke: Invoke, schema: str) -> None:
    nowhere = Celery("nowhere", set_as_current=False)
    nowhere.conf.update(pgqrs_dsn="postgresql://127.0.0.1:1/none", pgqrs_schema=schema)
    Pgqrs(nowhere)
    result = invoke("install", "--sql", of=nowhere)
    assert result.exit_code == 0
    assert "CREATE TABLE" in result.stdout


# runs and run


def test_runs_are_listed_newest_first_with_their_keys(invoke: Invoke, started: WorkflowRun) -> None:
    later = started.pgqrs.app.tasks["reserve"].delay(7)
    found = rows(invoke("runs"))
    assert [(row["workflow"], row["key"], row["status"]) for row in found] == [
        ("reserve", "", "QUEUED"),
        ("fulfil", "order-42", "QUEUED"),
    ]
    assert found[0]["run"] == str(started.pgqrs.run_of(later).id)


def test_runs_are_filtered_by_status_and_name_and_limited(invoke: Invoke, started: WorkflowRun) -> None:
    for number in range(3):
        started.pgqrs.app.tasks["reserve"].delay(number)
    fail_first_step(started, ValueError("no"))
    assert [row["run"] for row in rows(invoke("runs", "--status", "failed"))] == [str(started.id)]
    assert [row["run"] for row in rows(invoke("runs", "--name", "fulfil"))] == [str(started.id)]
    assert len(rows(invoke("runs", "--limit", 2))) == 2
    assert rows(invoke("runs", "--status", "SUCCESS")) == []


def test_runs_of_another_app_in_the_same_schema_are_not_listed(
    invoke: Invoke, started: WorkflowRun, database_dsn: str, schema: str
) -> None:
    other = Celery("another", set_as_current=False)
    other.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=schema)
    pgqrs = Pgqrs(other)
    assert rows(invoke("runs", of=other)) == []
    pgqrs.ledger.database.close()


def test_a_run_is_shown_with_its_steps(invoke: Invoke, started: WorkflowRun) -> None:
    result = invoke("run", started.id)
    assert "workflow:  fulfil" in result.stdout
    assert 'input:     {"args": [42], "kwargs": {}}' in result.stdout
    (step,) = rows(result)
    assert (step["step"], step["status"], step["attempts"], step["queue"]) == ("reserve", "QUEUED", "0", "celery")
    assert step["note"].startswith("due ")


def test_an_error_of_several_lines_stays_one_row(invoke: Invoke, started: WorkflowRun) -> None:
    fail_first_step(started, ValueError("card\trefused\nby the bank"))
    (run,) = rows(invoke("runs"))
    assert run["error"] == "reserve: ValueError: card refused by the bank"
    (step,) = rows(invoke("run", started.id))
    assert step["note"] == "ValueError: card refused by the bank"


def test_json_holds_the_payloads_as_json(invoke: Invoke, started: WorkflowRun) -> None:
    run = json.loads(invoke("run", started.id, "--json").stdout)
    assert run["input"] == {"args": [42], "kwargs": {}}
    assert [step["step_id"] for step in run["steps"]] == ["reserve"]
    assert [r["workflow_id"] for r in json.loads(invoke("runs", "--json").stdout)] == [started.id]


@pytest.mark.skipif(not output.RICH, reason="rich is not installed")
def test_a_terminal_gets_a_drawn_table(started: WorkflowRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "120")
    with CliRunner().isolation() as (out, *_):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        output.print_table(("run", "status"), [("1", "[FAILED]"), ("2", "SUCCESS")], color=False)
        sys.stdout.flush()
        text = out.getvalue().decode()
    assert "\t" not in text
    assert "[FAILED]" in text  # not taken for markup
    assert "─" in text


# resume, cancel, pause


def test_a_failed_run_is_resumed(invoke: Invoke, started: WorkflowRun) -> None:
    fail_first_step(started, ValueError("no"))
    assert started.status == "FAILED"
    assert invoke("resume", started.id).stdout == f"run {started.id} (fulfil): resumed\n"
    assert started.status == "RUNNING"


def test_cancelling_leaves_nothing_to_execute(invoke: Invoke, started: WorkflowRun) -> None:
    assert invoke("cancel", started.id).stdout == f"run {started.id} (fulfil): cancelled\n"
    assert started.status == "CANCELLED"
    assert [step.status for step in started.steps()] == ["CANCELLED"]


def test_a_paused_run_says_so_until_it_is_unpaused(invoke: Invoke, started: WorkflowRun) -> None:
    invoke("pause", started.id)
    assert rows(invoke("runs"))[0]["status"] == "QUEUED (paused)"
    assert invoke("unpause", started.id).stdout == f"run {started.id} (fulfil): unpaused\n"
    assert rows(invoke("runs"))[0]["status"] == "QUEUED"


# workers


def test_a_worker_that_ended_is_listed_only_on_demand(invoke: Invoke, app: Celery, schema: str) -> None:
    app.pgqrs.install()
    with psycopg.connect(app.pgqrs.settings.dsn, autocommit=True) as connection:
        connection.execute(
            f'INSERT INTO "{schema}".pgqrs_workers (worker_id, app, hostname, pid, seen_at, stopped_at) '.encode()
            + b"VALUES (gen_random_uuid(), 'shop', 'w1@here', 11, now() - interval '90 s', NULL), "
            b"(gen_random_uuid(), 'shop', 'w2@here', 12, now(), now())"
        )
    (alive,) = rows(invoke("workers"))
    assert (alive["worker"], alive["pid"], alive["running"]) == ("w1@here", "11", "0")
    assert alive["last sign"].startswith("0:01:3")
    assert {row["worker"] for row in rows(invoke("workers", "--all"))} == {"w1@here", "w2@here"}
    assert [worker["pid"] for worker in json.loads(invoke("workers", "--json").stdout)] == [11]


# errors


@pytest.mark.parametrize("command", ["run", "resume", "cancel", "pause", "unpause"])
def test_an_unknown_run_is_one_line(invoke: Invoke, app: Celery, command: str) -> None:
    app.pgqrs.install()
    assert error_line(invoke(command, 4711)) == "Error: run 4711 does not exist (or was removed by retention)"


def test_a_run_that_cannot_be_resumed_says_how_it_stands(invoke: Invoke, started: WorkflowRun) -> None:
    assert error_line(invoke("resume", started.id)) == (
        f"Error: run {started.id} is QUEUED; only a FAILED run can be resumed"
    )


def test_a_missing_schema_is_one_line_that_says_what_to_run(invoke: Invoke) -> None:
    assert "celery -A your_app pgqrs install" in error_line(invoke("runs"))


def test_an_unreachable_database_is_one_line(invoke: Invoke) -> None:
    away = Celery("away", set_as_current=False)
    away.conf.update(pgqrs_dsn="postgresql://127.0.0.1:1/none")
    Pgqrs(away)
    assert error_line(invoke("runs", of=away)).startswith("Error: cannot connect to ")


def test_an_app_without_a_ledger_is_told_apart_from_an_empty_one(invoke: Invoke) -> None:
    assert "Pgqrs(app) is called" in error_line(invoke("runs", of=Celery("plain", set_as_current=False)))


def test_a_misspelt_setting_is_one_line(invoke: Invoke) -> None:
    wrong = Celery("wrong", set_as_current=False)
    wrong.conf.update(pgqrs_leese=5)
    Pgqrs(wrong)
    assert error_line(invoke("runs", of=wrong)) == "Error: unknown setting pgqrs_leese; did you mean pgqrs_lease?"


# the entry point


def test_celery_finds_the_commands_and_loads_them_only_when_used(tmp_path: Path) -> None:
    """Run in a process in which the package is installed as pyproject.toml says."""
    points = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    info = tmp_path / "pgqrs_celery-0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: pgqrs-celery\nVersion: 0\n")
    entries = [f"[{kind}]\n" + "".join(f"{k} = {v}\n" for k, v in named.items()) for kind, named in points.items()]
    (info / "entry_points.txt").write_text("\n".join(entries))
    script = (
        "import sys\n"
        "from celery.bin.celery import celery\n"
        "celery(['--help'], standalone_mode=False)\n"
        "print('loaded:', *sorted(m for m in sys.modules if m.startswith(('pgqrs_celery.cli', 'rich.'))))\n"
        "celery(['pgqrs', '--help'], standalone_mode=False)\n"
    )
    path = os.pathsep.join([str(tmp_path), str(ROOT), *sys.path])
    answer = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "PYTHONPATH": path, "COLUMNS": "120"},
        capture_output=True,
        text=True,
        check=True,
    )
    lines = answer.stdout.splitlines()
    assert any(line.split()[:2] == ["pgqrs", "Durable"] for line in lines)
    assert "loaded: pgqrs_celery.cli" in lines
    for command in ("install", "runs", "run", "resume", "cancel", "pause", "unpause", "workers"):
        assert any(line.split()[:1] == [command] for line in lines), command
