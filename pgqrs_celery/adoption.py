"""Adoption: what to enter for a step whose message was sent without this package.

Its message is rebuilt from the request, so that the relay can send it again.
"""

from __future__ import annotations

from typing import Any

from celery import Task

from pgqrs_celery import ids
from pgqrs_celery.durability import kind_of
from pgqrs_celery.envelope import MARKER
from pgqrs_celery.guard import Adoption
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.outgoing import Outgoing, fix_links
from pgqrs_celery.store.recording import NewStep
from pgqrs_celery.store.runs import NewRun

__all__ = ["adoption"]


def adoption(task: Task[Any, Any], request: Any, ledger: Ledger) -> Adoption:
    """Return the run and step to enter for a request that has no row."""
    embed = fix_links(
        {
            "callbacks": request.callbacks,
            "errbacks": request.errbacks,
            "chain": request.chain,
            "chord": request.chord,
        },
        request.id,
    )
    headers = {
        "lang": "py",
        "task": task.name,
        "id": request.id,
        "shadow": request.shadow,
        "expires": request.expires,
        "group": request.group,
        "group_index": request.group_index,
        "retries": request.retries,
        "timelimit": request.timelimit,
        "root_id": request.root_id,
        "parent_id": request.parent_id,
        "argsrepr": request.get("argsrepr"),
        "kwargsrepr": request.get("kwargsrepr"),
        "origin": request.origin,
        "ignore_result": request.ignore_result,
        "replaced_task_nesting": request.replaced_task_nesting,
        "stamped_headers": request.stamped_headers,
        "stamps": request.stamps,
        MARKER: 1,
    }
    headers["root_id"] = ids.root_of(headers, request.chain, request.chord)
    properties = {"correlation_id": request.correlation_id or request.id, "reply_to": request.reply_to or ""}
    body = (list(request.args or ()), dict(request.kwargs or {}), embed)
    delivery = request.delivery_info or {}
    exchange, key = delivery.get("exchange"), delivery.get("routing_key")
    queue = f"{exchange}/{key}" if exchange else key
    outgoing = Outgoing(None, task.name, headers, properties, body, None, {"priority": delivery.get("priority")})
    step = NewStep(
        task_id=request.id,
        step_id=ids.step_id_for(task.name, request.id),
        task_name=task.name,
        generation=outgoing.generation,
        message=outgoing.envelope(None, task.serializer or "json"),
        queue=queue,
        delay=None,
        sent=True,
        kind=kind_of(task.app, task.name, headers),
    )
    return Adoption(NewRun(ledger.app, outgoing.root_id, ids.short_name(task.name)), step)
