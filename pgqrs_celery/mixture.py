"""Canvases that are not durable from end to end: what is refused, and what plain links mean."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

from celery import Celery

from pgqrs_celery.durability import durable_heads, has_durable_task, links
from pgqrs_celery.envelope import SENT
from pgqrs_celery.exceptions import NotDurable, PlainTaskInDurableCanvas
from pgqrs_celery.execution import Execution
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.session import Session
from pgqrs_celery.store import recording
from pgqrs_celery.store.recording import NewStep

__all__ = ["await_links", "refuse"]


def refuse(
    app: Celery, ledger: Ledger, message: Outgoing, running: Execution | None, *, chords: Callable[[], bool]
) -> None:
    """Raise where a canvas cannot be durable; nothing has been recorded or sent yet.

    The rest of a chain was looked at when its first link was sent.
    """
    if message.body[2].get("chord") and not chords():
        raise NotDurable(
            f"task {message.name}[{message.task_id}] belongs to a chord, and the result backend "
            f"{type(app.backend).__name__} cannot complete a durable one; use "
            'backend="pgqrs+postgresql://…" with the ledger\'s own database and schema'
        )
    policy = ledger.settings.plain_links
    if policy == "allow" or not message.chain or (running is not None and _is_rest(message.chain, running)):
        return
    for link in message.chain:
        for simple in links(link):
            name = str(simple.get("task"))
            if name.startswith("celery.") or name not in app.tasks or has_durable_task(app, simple):
                continue
            text = (
                f"{name} follows the durable task {message.name} in a canvas, but is not durable itself: if its "
                "message is lost, the run stops there. Make it a @pgqrs.task, or set pgqrs_plain_links = 'allow'"
            )
            if policy == "error":
                raise PlainTaskInDurableCanvas(text)
            warnings.warn(text, stacklevel=2)


def _is_rest(chain: Sequence[Any], running: Execution) -> bool:
    """Whether a chain is what Celery's tracer leaves of that of the request: the very same objects but the last."""
    whole = running.request.chain
    return bool(whole and running.request.get(SENT)) and len(chain) == len(whole) - 1 and chain[-1] is whole[-2]


def await_links(app: Celery, ledger: Ledger, passing: Outgoing, running: Execution | None) -> None:
    """A plain link is sent on by a durable step: the next durable link keeps the run open until it arrives."""
    if running is None or not passing.chain or passing.headers.get("root_id") != running.guard.root_id:
        return
    guard = running.guard
    for link in reversed(passing.chain):
        heads = durable_heads(app, link)
        if not heads:
            continue

        def work(session: Session, heads: Sequence[tuple[str, str, str]] = heads) -> None:
            for task_id, step_id, name in heads:
                row = NewStep(task_id, step_id, name, 0, None, None, None, False)
                recording.await_link(session, row, workflow_id=guard.workflow_id, app=ledger.app)

        ledger.call(work, patience=ledger.settings.patience)
        return
