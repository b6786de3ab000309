"""Finishing a step outside the tracer: the consequences of a terminal status that was decided in SQL.

A step that killed its workers too often, or whose run was cancelled, has no execution in which Celery could store its
result, tell its chord or call its errbacks. Its request is rebuilt from the stored message and goes through the same
doors of the wrapped backend.
"""

from __future__ import annotations

from typing import Any, Final

from celery import Celery, states
from celery.app.task import Context

from pgqrs_celery.durability import signature_ids
from pgqrs_celery.envelope import Envelope
from pgqrs_celery.exceptions import HandOffFailed
from pgqrs_celery.gate import error_text, give_up_hand_off, hand_off, recorded_error, tell_waiter
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.store import steps
from pgqrs_celery.store.clock import DueStep

__all__ = ["finish", "finish_awaited", "request_of"]

CANCELLED: Final = "the run was cancelled"


def request_of(envelope: Envelope) -> Context:
    """Return the request that a worker would have made of a message."""
    args, kwargs, embed = envelope.body
    headers = dict(envelope.headers)
    return Context(
        headers,
        args=args,
        kwargs=kwargs,
        callbacks=embed.get("callbacks"),
        errbacks=embed.get("errbacks"),
        chain=embed.get("chain"),
        chord=embed.get("chord"),
        properties=dict(envelope.properties),
        reply_to=envelope.properties.get("reply_to"),
        correlation_id=envelope.properties.get("correlation_id"),
        delivery_info={},
        called_directly=False,
    )


def backend_for(app: Celery, task_name: str) -> Any:
    """Return the result backend, without the gate, that a task reports to."""
    return getattr(app.tasks.get(task_name), "raw_backend", None) or app.backend


def finish(app: Celery, ledger: Ledger, step: DueStep, envelope: Envelope) -> None:
    """Tell the result backend, chord, tail and errbacks how a step ended, then hand it off.

    Repeating it after a crash in the middle is harmless but for plain errbacks, which may be called again.
    """
    request = request_of(envelope)
    backend = backend_for(app, step.task_name)
    stored = not request.ignore_result
    if not tell_waiter(ledger, request):
        return
    if step.status == "CANCELLED":
        backend.mark_as_revoked(step.task_id, CANCELLED, request=request, store_result=stored)
        for link in request.chain or ():
            for follower in signature_ids(link):
                backend.mark_as_revoked(follower, CANCELLED, store_result=stored, state=states.REVOKED)
    elif step.status == "FAILED":
        error = recorded_error(backend, step.error)
        backend.mark_as_failure(step.task_id, error, request=request, store_result=stored)
    else:
        _give_up(ledger, backend, step, request)
        return
    hand_off(ledger, step.task_id, step.fence)


def finish_awaited(app: Celery, ledger: Ledger, step: DueStep) -> None:
    """Tell the result backend that a step was cancelled whose message had not come yet, then hand it off."""
    backend_for(app, step.task_name).mark_as_revoked(step.task_id, CANCELLED)
    hand_off(ledger, step.task_id, step.fence)


def _give_up(ledger: Ledger, backend: Any, step: DueStep, request: Context) -> None:
    """The hand-off of a successful step killed its worker time and again."""
    error = HandOffFailed(
        f"the hand-off of step {step.step_id!r} was begun {step.handoffs} times and never completed "
        "(pgqrs_max_handoffs); resume the run to try again"
    )
    text = error_text(backend, error)
    broken = ledger.call(
        lambda session: steps.hand_off_failed(
            session, step.task_id, fence=step.fence, error=text, interval=ledger.settings.resend_interval
        )
    )
    if broken is not None:
        give_up_hand_off(ledger, backend, step.task_id, error, request, broken)
