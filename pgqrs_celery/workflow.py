"""Named workflows: a canvas with a name, started with a key."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from typing import TYPE_CHECKING, Any

from celery import Celery
from celery.canvas import Signature
from celery.result import GroupResult

from pgqrs_celery import execution, ids
from pgqrs_celery.circumstances import ExistingRun, starting
from pgqrs_celery.drafting import RunSpec
from pgqrs_celery.durability import has_durable_task, heads, links
from pgqrs_celery.enqueue import enqueueing
from pgqrs_celery.envelope import MARKER
from pgqrs_celery.exceptions import NotDurable, WorkflowKeyConflict
from pgqrs_celery.handle import EagerRun, WorkflowRun
from pgqrs_celery.store.runs import Run

if TYPE_CHECKING:
    from pgqrs_celery.app import Pgqrs

__all__ = ["Workflow", "WorkflowRun"]


class Workflow:
    """A canvas under a name; calling it starts a run."""

    def __init__(self, pgqrs: Pgqrs, name: str, canvas: Any) -> None:
        self.pgqrs = pgqrs
        self.name = name
        self.canvas = canvas

    def __repr__(self) -> str:
        return f"<Workflow {self.name}: {self.canvas!r}>"

    def named(self) -> Any:
        """Return the canvas as signatures of the app, in which every durable task carries its step id.

        Raises ``NotDurable`` where it begins with ordinary tasks only: nothing of it would be recorded.
        """
        app = self.pgqrs.app
        if not any(has_durable_task(app, head) for head in heads(self.canvas)):
            raise NotDurable(f"workflow {self.name!r} begins with a task that is not durable; make it a @pgqrs.task")
        return bound(named_copy(self.canvas, app), app)

    def delay(self, *args: Any, **kwargs: Any) -> WorkflowRun:
        """Start a run with these arguments."""
        return self.apply_async(args, kwargs)

    def apply_async(
        self,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
        *,
        workflow_key: str | None = None,
        labels: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> WorkflowRun:
        """Start a run and return its handle.

        With a ``workflow_key`` that a run has already, that run is returned and nothing starts, whatever its status;
        a failed one is set going again with its ``resume()``. Raises ``WorkflowKeyConflict`` where the key's run is
        one of another workflow, or was started with other arguments. Further options are Celery's.

        The run is one of its own also where a task starts it. With ``task_always_eager`` it is executed here and now: a
        function's is recorded like any run in the calling process, a canvas's is not recorded at all (``EagerRun``).
        """
        spec = RunSpec(self.name, workflow_key, labels=json.dumps(dict(labels)) if labels else None)
        return outside(lambda: self._start(spec, args, kwargs or {}, options))

    def start_child(
        self, args: Sequence[Any], kwargs: Mapping[str, Any], *, workflow_key: str, parent_task_id: str | None
    ) -> tuple[int, str]:
        """Start a run, once per key, at whose end a task is woken; returns its id and root id."""
        spec = RunSpec(self.name, workflow_key, parent_task_id=parent_task_id)
        run = outside(lambda: self._start(spec, args, kwargs, {}))
        if isinstance(run, EagerRun):
            raise NotDurable(
                f"workflow {self.name!r} was executed with task_always_eager, and is not recorded: nobody can wait for "
                "it as a child; give a function workflow, or call run.get() in a step"
            )
        return run.id, run.record.root_id

    def _start(
        self, spec: RunSpec, args: Sequence[Any], kwargs: Mapping[str, Any], options: Mapping[str, Any]
    ) -> WorkflowRun:
        values = self.pgqrs.ledger.values
        arguments = values.dump({"args": list(args), "kwargs": dict(kwargs)})
        canvas = self.named()
        spec.input, spec.result = arguments, json.dumps(result_tuple(canvas.freeze(options.get("task_id"))))
        token = starting.set(spec)
        try:
            result = canvas.apply_async(args=tuple(args), kwargs=dict(kwargs), **options)
        except ExistingRun as existing:
            return self._existing(existing.run, str(spec.workflow_key), arguments)
        finally:
            starting.reset(token)
        if spec.workflow_id is None and self.pgqrs.app.conf.task_always_eager:
            return EagerRun(self.pgqrs, self.name, result)
        if spec.workflow_id is None:
            raise NotDurable(f"workflow {self.name!r} was not recorded: none of its messages came by Pgqrs(app)")
        return WorkflowRun(self.pgqrs, spec.workflow_id)

    def enqueue_using(self, connection: Any, *args: Any, workflow_key: str | None = None, **kwargs: Any) -> WorkflowRun:
        """Start a run in the caller's own transaction: it exists, and is sent, if and only if that commits.

        ``connection`` is a psycopg connection, a SQLAlchemy connection or session, or a Django connection or alias,
        to the ledger's database.
        """
        with enqueueing(connection, self.pgqrs.ledger.database.texts):
            return self.apply_async(args, kwargs, workflow_key=workflow_key)

    def _existing(self, run: Run, key: str, arguments: str) -> WorkflowRun:
        if run.name != self.name or run.input != arguments:
            raise WorkflowKeyConflict(
                f"workflow key {key!r} belongs to run {run.workflow_id} of workflow {run.name!r}, started with "
                f"{run.input}; it cannot start workflow {self.name!r} with {arguments}"
            )
        return WorkflowRun(self.pgqrs, run.workflow_id)


def outside(start: Callable[[], WorkflowRun]) -> WorkflowRun:
    """Start a run as a client would, also from within a task: Celery makes what a task sends a part of the task's run.

    That is looked up by thread, so a thread of its own is outside. The context goes along: it may name a transaction of
    the user's that the run is to be part of.
    """
    if execution.current() is None:
        return start()
    with ThreadPoolExecutor(1, thread_name_prefix="pgqrs-start") as thread:
        return thread.submit(copy_context().run, start).result()


def named_copy(canvas: Any, app: Celery) -> dict[str, Any]:
    """Return a canvas as plain dictionaries in which every durable task carries its step id."""
    copied = _copied(canvas)
    simple: list[Any] = [link for link in links(copied) if has_durable_task(app, link)]
    for link, name in zip(simple, ids.step_names(str(link["task"]) for link in simple), strict=True):
        link["options"]["headers"] = {**(link["options"].get("headers") or {}), MARKER: name}
    return copied


def _copied(signature: Mapping[str, Any]) -> dict[str, Any]:
    kwargs = dict(signature.get("kwargs") or {})
    if signature.get("subtask_type") in ("chain", "group"):
        kwargs["tasks"] = [_copied(member) for member in kwargs.get("tasks") or ()]
    elif signature.get("subtask_type") == "chord":
        header = kwargs.get("header")
        kwargs["header"] = _copied(header) if isinstance(header, Mapping) else [_copied(m) for m in header or ()]
        if kwargs.get("body"):
            kwargs["body"] = _copied(kwargs["body"])
    return {**signature, "kwargs": kwargs, "options": dict(signature.get("options") or {})}


def bound(signature: Mapping[str, Any], app: Any) -> Any:
    """Return a canvas of plain dictionaries as signatures of an app.

    Celery's ``maybe_signature`` gives the app to the outermost signature only; the members would be sent by whatever
    app is the current one.
    """
    kwargs = dict(signature.get("kwargs") or {})
    if signature.get("subtask_type") in ("chain", "group"):
        kwargs["tasks"] = [bound(member, app) for member in kwargs.get("tasks") or ()]
    elif signature.get("subtask_type") == "chord":
        header = kwargs["header"]
        kwargs["header"] = bound(header, app) if isinstance(header, Mapping) else [bound(m, app) for m in header]
        if kwargs.get("body"):
            kwargs["body"] = bound(kwargs["body"], app)
    return Signature.from_dict({**signature, "kwargs": kwargs}, app=app)


def result_tuple(result: Any) -> Any:
    """Return ``as_tuple()`` of a result without its parents, which may be as many as a chain has links."""
    if isinstance(result, GroupResult):
        return [[result.id, None], [result_tuple(child) for child in result.results or ()]]
    return [[result.id, None], None]
