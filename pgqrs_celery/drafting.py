"""Drafting: from a finished message to the row that stands for it, and to the run it may begin."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from celery import Celery

from pgqrs_celery import ids
from pgqrs_celery.durability import kind_of, signature_ids
from pgqrs_celery.envelope import PLAN, dump_plan, split_plan
from pgqrs_celery.execution import Execution
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.naming import canvas_name, canvas_result
from pgqrs_celery.outgoing import Outgoing
from pgqrs_celery.store.recording import NewStep
from pgqrs_celery.store.runs import NewRun

__all__ = ["Drafter", "RunSpec"]


@dataclass(slots=True)
class RunSpec:
    """What a named workflow says about the run its canvas starts; ``workflow_id`` is filled in."""

    name: str
    workflow_key: str | None = None
    input: str | None = None
    result: str | None = None
    labels: str | None = None
    parent_task_id: str | None = None
    workflow_id: int | None = None


class Drafter:
    """Makes rows of messages."""

    def __init__(self, app: Celery) -> None:
        self.app = app

    def new_run(self, ledger: Ledger, root_id: str, batch: Sequence[Outgoing], spec: RunSpec | None) -> NewRun:
        plans = {}
        for message in batch:
            if message.plan_owner == message.task_id and message.chain:
                plans.update(json.loads(dump_plan(message.task_id, message.chain, ledger.values)))
        plan = json.dumps(plans) if plans else None
        if spec is not None:
            return NewRun(
                ledger.app,
                root_id,
                spec.name,
                spec.workflow_key,
                spec.input,
                spec.result,
                plan,
                spec.labels,
                spec.parent_task_id,
            )
        return NewRun(ledger.app, root_id, canvas_name(batch), result=canvas_result(batch), plan=plan)

    def rows(
        self, ledger: Ledger, batch: Sequence[Outgoing], running: Execution | None, interval: float
    ) -> list[NewStep]:
        fixed = self._fixed_ids(running)
        return [self._row(message, running, fixed, interval) for message in batch]

    def _row(self, message: Outgoing, running: Execution | None, fixed: set[str], interval: float) -> NewStep:
        request = self._request(running)
        plan, new = split_plan(
            message.task_id, message.chain, getattr(request, "chain", None), message.plan_owner if running else None
        )
        if new and running is not None:
            plan = None
        message.plan_owner = plan.owner if plan else None
        if plan:
            message.headers[PLAN] = plan.owner
        held = message.held
        serializer = message.options.get("serializer") or self.app.conf.task_serializer
        return NewStep(
            task_id=message.task_id,
            step_id=self._step_id(message, running, fixed),
            task_name=message.name,
            generation=message.generation,
            message=message.envelope(plan, serializer),
            queue=message.queue or self.app.conf.task_default_queue,
            delay=message.delay if held else interval,
            sent=not held,
            kind=kind_of(self.app, message.name, message.headers),
        )

    @staticmethod
    def _step_id(message: Outgoing, running: Execution | None, fixed: set[str]) -> str:
        if message.given_step_id:
            return message.given_step_id
        if running is None or message.task_id in fixed:
            return ids.step_id_for(message.name, message.task_id)
        # Sent by a body, or by a callback that is a canvas: Celery made the id by chance, but executed again the
        # same things are sent. A step id derived from what is sent stops them at the primary key.
        arguments = [message.body[0], message.body[1]]
        key = f"{message.name}/{ids.digest(arguments)}/canvas"
        derived = ids.child_id(running.guard.task_id, message.name, arguments, running.nth(key))
        return ids.step_id_for(message.name, derived)

    @staticmethod
    def _request(running: Execution | None) -> Any:
        return running.request if running is not None else None

    @staticmethod
    def _fixed_ids(running: Execution | None) -> set[str]:
        """The ids that a replayed hand-off sends again: the step's own, the next link's, the callbacks'."""
        if running is None:
            return set()
        request = running.request
        fixed = {running.guard.task_id}
        for signature in [*(request.chain or ())[-1:], *(request.callbacks or ()), *(request.errbacks or ())]:
            fixed |= signature_ids(signature)
        if request.chord:
            fixed |= signature_ids(request.chord)
        return fixed
