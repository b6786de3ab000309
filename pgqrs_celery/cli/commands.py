"""The commands of ``celery -A app pgqrs``."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import click
from celery.bin.base import CeleryCommand, CeleryOption
from kombu.exceptions import OperationalError

from pgqrs_celery.app import Pgqrs
from pgqrs_celery.cli.output import ago, as_json, moment, print_fields, print_table, took
from pgqrs_celery.exceptions import ConfigurationError
from pgqrs_celery.housekeeping import Housekeeping
from pgqrs_celery.records import RunRecord, StepRecord
from pgqrs_celery.states import Status
from pgqrs_celery.store import migrations

__all__ = ["cancel", "install", "list_runs", "list_workers", "pause", "prune", "resume", "show_run", "unpause"]

json_option = click.option(
    "--json", "as_text", is_flag=True, cls=CeleryOption, help_group="Output Options", help="Print JSON."
)


def option(*names: str, **options: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Return a decorator for an option that is listed as Celery lists its own."""
    return click.option(*names, cls=CeleryOption, help_group="Filter Options", **options)


def on_pgqrs(command: Callable[..., None]) -> Callable[..., None]:
    """Call a command with the ledger of the app that ``-A`` named."""

    @wraps(command)
    @click.pass_context
    def wrapper(ctx: click.Context, /, **options: Any) -> None:
        app = ctx.obj.app
        pgqrs = getattr(app, "pgqrs", None)
        if pgqrs is None:
            raise ConfigurationError(
                f"app {app.main or 'default'!r} has no ledger; use `celery -A your_app pgqrs …` with an app for which "
                "Pgqrs(app) is called"
            )
        command(pgqrs, color=not ctx.obj.no_color, **options)

    return wrapper


@click.command(cls=CeleryCommand)
@click.option("--sql", is_flag=True, cls=CeleryOption, help="Print what would be run, for psql; needs no database.")
@on_pgqrs
def install(pgqrs: Pgqrs, *, sql: bool, color: bool) -> None:
    """Install or upgrade the tables.

    Safe to run again, and by several hosts at once.
    """
    schema = pgqrs.settings.schema
    if sql:
        click.echo(migrations.script(schema), nl=False)
        return
    done = pgqrs.install()
    for name in done:
        click.echo(f"schema {schema}: applied {name}")
    if not done:
        click.echo(f"schema {schema}: up to date ({len(migrations.available())} migrations)")


@click.command(cls=CeleryCommand)
@option("--status", type=click.Choice([str(s) for s in Status], case_sensitive=False), help="Only runs that stand so.")
@option("--name", help="Only runs of this workflow.")
@option("--limit", type=click.IntRange(min=1), default=20, show_default=True, help="How many, newest first.")
@json_option
@on_pgqrs
def list_runs(pgqrs: Pgqrs, *, status: str | None, name: str | None, limit: int, as_text: bool, color: bool) -> None:
    """List runs, newest first."""
    wanted = status.upper() if status else None
    found = pgqrs.monitor.runs(app=pgqrs.ledger.app, status=wanted, name=name, limit=limit)
    if as_text:
        click.echo(json.dumps([as_json(run) for run in found], indent=2))
        return
    names = ("run", "workflow", "key", "status", "created", "took", "error")
    print_table(names, (_run_row(run) for run in found), color=color)


def _run_row(run: RunRecord) -> tuple[str, ...]:
    took_text = took(run.started_at, run.completed_at)
    return (
        str(run.workflow_id),
        run.name,
        run.workflow_key or "",
        _standing(run),
        moment(run.created_at),
        took_text,
        _run_error(run.error),
    )


def _standing(run: RunRecord) -> str:
    return f"{run.status} (paused)" if run.paused_at and not run.completed_at else run.status


def _run_error(text: str | None) -> str:
    """Return what ended a run: the step and its exception."""
    if not text:
        return ""
    cause = json.loads(text)
    where = f"hand-off of {cause['step_id']}" if cause.get("hand_off") else str(cause.get("step_id"))
    return f"{where}: {_exception(cause.get('error'))}"


def _exception(error: Any) -> str:
    """Return a recorded exception as one line."""
    if not isinstance(error, dict):
        return str(error or "")
    message = error.get("exc_message")
    parts = message if isinstance(message, list) else [message]
    text = ", ".join(str(part) for part in parts if part not in (None, ""))
    return f"{error.get('exc_type')}: {text}" if text else str(error.get("exc_type"))


@click.command(cls=CeleryCommand)
@click.argument("run_id", type=int)
@json_option
@on_pgqrs
def show_run(pgqrs: Pgqrs, *, run_id: int, as_text: bool, color: bool) -> None:
    """Show one run and its steps."""
    run = pgqrs.run(run_id).record
    steps = pgqrs.monitor.steps(run_id)
    if as_text:
        click.echo(json.dumps(as_json(run, steps=[as_json(step) for step in steps]), indent=2))
        return
    print_fields(
        (
            ("run", str(run.workflow_id)),
            ("workflow", run.name),
            ("key", run.workflow_key or ""),
            ("status", _standing(run)),
            ("root task", run.root_id),
            ("created", moment(run.created_at)),
            ("completed", moment(run.completed_at)),
            ("took", took(run.started_at, run.completed_at)),
            ("input", run.input or ""),
            ("output", run.output or ""),
            ("error", _run_error(run.error)),
        )
    )
    names = ("step", "status", "attempts", "lost", "worker", "queue", "started", "took", "note")
    print_table(names, (_step_row(step) for step in steps), color=color)


def _step_row(step: StepRecord) -> tuple[str, ...]:
    return (
        step.step_id,
        step.status,
        str(step.attempt),
        str(step.lost),
        step.worker or "",
        step.queue or "",
        moment(step.started_at),
        took(step.started_at, step.completed_at),
        _note(step),
    )


def _note(step: StepRecord) -> str:
    """Return what is worth knowing about a step beyond its status."""
    if step.error:
        return _exception(json.loads(step.error))
    if step.status == Status.QUEUED and step.due_at:
        return f"due {moment(step.due_at)}"
    return "hand-off open" if step.open and step.completed_at else ""


@contextmanager
def broker_in_one_line() -> Iterator[None]:
    """Turn a broker that cannot be reached into one line and exit code 1."""
    try:
        yield
    except OperationalError as error:
        raise click.ClickException(f"the broker cannot be reached: {error}") from error


def _run_command(name: str, done: str, help_text: str) -> click.Command:
    """Return a command that calls one method of a run's handle."""

    @click.command(name=name, cls=CeleryCommand, help=help_text)
    @click.argument("run_id", type=int)
    @on_pgqrs
    def command(pgqrs: Pgqrs, *, run_id: int, color: bool) -> None:
        run = pgqrs.run(run_id)
        workflow = run.record.name
        getattr(run, name)()
        click.echo(f"run {run_id} ({workflow}): {done}")

    return command


resume = _run_command("resume", "resumed", "Set a FAILED run going again; completed steps are not run again.")
pause = _run_command("pause", "paused", "Let no further step of a run begin; steps that run go on.")
unpause = _run_command("unpause", "unpaused", "Let the steps of a paused run begin again.")


@click.command(cls=CeleryCommand)
@click.argument("run_id", type=int)
@click.option("--terminate", is_flag=True, cls=CeleryOption, help="Kill the processes that execute its steps, too.")
@on_pgqrs
def cancel(pgqrs: Pgqrs, *, run_id: int, terminate: bool, color: bool) -> None:
    """Cancel a run: nothing of it begins any more, what has not finished is REVOKED."""
    run = pgqrs.run(run_id)
    workflow = run.record.name
    with broker_in_one_line():
        run.cancel(terminate=terminate)
    click.echo(f"run {run_id} ({workflow}): cancelled")


@click.command(cls=CeleryCommand)
@option("--all", "ended", is_flag=True, help="Also those that ended, as long as they are remembered.")
@json_option
@on_pgqrs
def list_workers(pgqrs: Pgqrs, *, ended: bool, as_text: bool, color: bool) -> None:
    """List the workers that have registered with the ledger."""
    found = pgqrs.monitor.workers(app=pgqrs.ledger.app, ended=ended)
    if as_text:
        click.echo(json.dumps([as_json(worker) for worker in found], indent=2))
        return
    names = ("worker", "pid", "started", "last sign", "running", "ended", "incarnation")
    rows = (
        (
            worker.hostname,
            str(worker.pid),
            moment(worker.started_at),
            f"{ago(worker.seen_ago)} ago",
            str(worker.running),
            moment(worker.stopped_at),
            str(worker.worker_id),
        )
        for worker in found
    )
    print_table(names, rows, color=color)


@click.command(cls=CeleryCommand)
@option(
    "--older-than",
    type=click.FloatRange(min=0),
    help="Seconds since a run ended; default: pgqrs_retention.",
)
@on_pgqrs
def prune(pgqrs: Pgqrs, *, older_than: float | None, color: bool) -> None:
    """Remove runs that ended long ago, and expired results, batch by batch."""
    age = older_than if older_than is not None else pgqrs.settings.retention
    housekeeping, removed = Housekeeping(pgqrs.ledger), 0
    while batch := housekeeping.batch(age):
        removed += batch
    kept = "" if age is not None else " (runs are kept: neither --older-than nor pgqrs_retention is given)"
    click.echo(f"{removed} rows removed{kept}")
