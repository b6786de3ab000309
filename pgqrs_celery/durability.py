"""What is durable: tasks, messages and signatures, judged by class or by the marker header."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final

from celery import Celery

from pgqrs_celery import ids
from pgqrs_celery.envelope import MARKER, WAITER

__all__ = ["durable_heads", "has_durable_task", "heads", "is_durable", "kind_of", "links", "signature_ids"]

#: Attribute that marks durable task classes; looked at instead of the class, which lies above this module.
ATTRIBUTE: Final = "pgqrs_durable"

#: Attribute with the kind of step that a durable task class makes.
KIND: Final = "pgqrs_kind"

#: Celery's own tasks that are durable only where their message says so, or the task they apply is.
BORROWED: Final = frozenset({"celery.accumulate", "celery.map", "celery.starmap", "celery.chunks"})


def is_durable(
    app: Celery, name: str, headers: Mapping[str, Any] | None = None, kwargs: Mapping[str, Any] | None = None
) -> bool:
    """Return whether a message with this task name, headers and arguments belongs in the ledger."""
    if headers and headers.get(MARKER):
        return True
    if name in BORROWED:
        applied = (kwargs or {}).get("task")
        return isinstance(applied, Mapping) and has_durable_task(app, applied)
    owner: Any = app
    task = owner._tasks.get(name)
    if task is None and owner.autofinalize:
        task = owner.tasks.get(name)  # declared, perhaps, but not registered before the app is finalized
    return bool(getattr(task, ATTRIBUTE, False))


def kind_of(app: Celery, name: str, headers: Mapping[str, Any]) -> str:
    """Return the kind of a message's step: sent by a function that waits for it, a function itself, or a link."""
    if headers.get(WAITER):
        return "inner"
    tasks: Any = app._tasks  # type: ignore[attr-defined]
    return str(getattr(tasks.get(name), KIND, "canvas"))


def _options(signature: Mapping[str, Any]) -> Mapping[str, Any]:
    return signature.get("options") or {}


def has_durable_task(app: Celery, signature: Mapping[str, Any]) -> bool:
    """Return whether a simple signature's task is durable."""
    return is_durable(
        app, str(signature.get("task")), _options(signature).get("headers"), signature.get("kwargs") or {}
    )


def links(signature: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the simple signatures a canvas is made of, in canvas order."""
    subtask, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
    if subtask in ("chain", "group"):
        for member in kwargs.get("tasks") or ():
            yield from links(member)
    elif subtask == "chord":
        header = kwargs.get("header")
        members = header.get("kwargs", {}).get("tasks", ()) if isinstance(header, Mapping) else header or ()
        for member in members:
            yield from links(member)
        if kwargs.get("body"):
            yield from links(kwargs["body"])
    else:
        yield signature


def heads(signature: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """Yield the tasks that a signature starts with."""
    kind, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
    if kind == "group":
        for member in kwargs.get("tasks") or ():
            yield from heads(member)
    elif kind == "chain":
        yield from heads((kwargs.get("tasks") or ({},))[0])
    elif kind == "chord":
        header = kwargs.get("header")
        for member in header["kwargs"]["tasks"] if isinstance(header, Mapping) else header or ():
            yield from heads(member)
    else:
        yield signature


def durable_heads(app: Celery, signature: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """Return task id, step id and name of the durable tasks a frozen link starts with; empty where it starts plain."""
    subtask, kwargs = signature.get("subtask_type"), signature.get("kwargs") or {}
    if subtask == "group":
        return [head for member in kwargs.get("tasks") or () for head in durable_heads(app, member)]
    if subtask == "chain":
        members = kwargs.get("tasks") or ()
        return durable_heads(app, members[0]) if members else []
    task_id = _options(signature).get("task_id")
    if subtask or not task_id or not has_durable_task(app, signature):
        return []
    name, marker = str(signature["task"]), (_options(signature).get("headers") or {}).get(MARKER)
    return [(str(task_id), marker if isinstance(marker, str) else ids.step_id_for(name, str(task_id)), name)]


def signature_ids(signature: Any) -> set[str]:
    """Return every task id that is fixed in a signature."""
    if not isinstance(signature, Mapping):
        return set()
    found = {str(t) for link in links(signature) if (t := _options(link).get("task_id"))}
    own = _options(signature).get("task_id")
    return found | {str(own)} if own else found
