"""The stored message: what a row of the ledger keeps so that its task can be sent again.

It holds the *serialized* body, the headers and properties, and of the routing only what the caller chose; everything
else is routed anew when the message is sent again, so that a change of routes reaches it.

Of a chain longer than ``LONG`` links only the first message stores the tail, once, in the run's ``plan``; later
rows keep its length, because the chain of a later link is always a prefix (Celery keeps it in reverse and pops the
end).
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from kombu import serialization
from kombu.serialization import dumps, loads

from pgqrs_celery.exceptions import StepError
from pgqrs_celery.ledger import Values

__all__ = ["LONG", "MARKER", "PLAN", "SENT", "UNDOING", "WAITER", "Content", "Envelope", "Plan", "split_plan"]

#: Header that makes a message durable where its task's class is not known; a string is the step's id.
MARKER: Final = "pgqrs"
#: Header with the database's time when the message was recorded or sent again.
SENT: Final = "pgqrs-sent"
#: Header naming the task id under which the run's plan keeps the tail of this message's chain.
PLAN: Final = "pgqrs-plan"
#: Header naming the task of the function that has sent this message and is woken at its end.
WAITER: Final = "pgqrs-waiter"
#: Header of a function's message that is sent to undo what the function has done: it can be neither revoked nor expire.
UNDOING: Final = "pgqrs-undoing"

#: Chains with more remaining links than this are stored once per run.
LONG: Final = 20

#: The character no text in Postgres may hold, as JSON writes it.
NUL: Final = "\\u0000"

CHOSEN: Final = ("queue", "exchange", "routing_key", "priority", "exchange_type", "delivery_mode", "compression")


#: Content type, encoding and text of a serialized body.
Content = tuple[str, str, Any]


@dataclass(frozen=True, slots=True)
class Plan:
    """A reference to the first ``length`` links of the chain stored in the run's plan under ``owner``."""

    owner: str
    length: int


@dataclass(frozen=True, slots=True)
class Envelope:
    """A task message without a broker: enough to publish it, or to rebuild its request."""

    name: str
    headers: Mapping[str, Any]
    properties: Mapping[str, Any]
    body: tuple[Any, Any, Any]
    options: Mapping[str, Any]
    plan: Plan | None = None
    serializer: str = "json"

    def dump(self, serializer: str, content: Content | None = None) -> str:
        """Return the envelope as JSON text; raises kombu's ``EncodeError`` where the body cannot be written.

        ``content`` is the body, where it has been serialized before.
        """
        if content is None:
            args, kwargs, embed = self.body
            content = dumps((args, kwargs, {**embed, "chain": None} if self.plan else embed), serializer=serializer)
        content_type, encoding, data = content
        binary = isinstance(data, bytes)
        headers: Any = {k: v for k, v in self.headers.items() if v is not None and k not in (SENT, PLAN)}
        parts = {
            "name": self.name,
            "headers": headers,
            "properties": dict(self.properties),
            "options": dict(self.options),
            "content_type": content_type,
            "content_encoding": encoding,
            "body": base64.b64encode(data).decode("ascii") if isinstance(data, bytes) else data,
            **({"base64": True} if binary else {}),
            **({"plan": [self.plan.owner, self.plan.length]} if self.plan else {}),
        }
        text = json.dumps(parts, default=str)
        if NUL in text:  # Postgres takes it out of JSON only where it is quoted twice, as it is in the body
            text = json.dumps({**parts, "headers": json.dumps(headers, default=str)}, default=str)
        return text

    @classmethod
    def load(cls, text: str, accept: set[str], plan: Mapping[str, Any] | None = None) -> Envelope:
        """Return the envelope that was stored as this text; ``plan`` is its run's, where it refers to one.

        Raises ``StepError`` where the plan is missing, kombu's errors where the body cannot be read.
        """
        stored = json.loads(text)
        data = base64.b64decode(stored["body"]) if stored.get("base64") else stored["body"]
        args, kwargs, embed = loads(data, stored["content_type"], stored["content_encoding"], accept=accept)
        headers = json.loads(stored["headers"]) if isinstance(stored["headers"], str) else stored["headers"]
        reference = Plan(*stored["plan"]) if stored.get("plan") else None
        if reference:
            if not plan or reference.owner not in plan:
                raise StepError(f"the chain of task {headers.get('id')} is not in its run's plan any more")
            embed = {**embed, "chain": list(plan[reference.owner][: reference.length])}
            headers = {**headers, PLAN: reference.owner}
        registry: Any = serialization.registry  # type: ignore[attr-defined]
        name = registry.type_to_name.get(stored["content_type"], "json")
        return cls(
            stored["name"], headers, stored["properties"], (args, kwargs, embed), stored["options"], reference, name
        )


def chosen(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return of a caller's options the routing that he chose himself, in a form that can be stored."""
    kept = {}
    for key in CHOSEN:
        value = options.get(key)
        if value is not None:
            kept[key] = getattr(value, "name", value)
    return kept


def split_plan(
    task_id: str, chain: Sequence[Any] | None, parent_chain: Sequence[Any] | None, parent_plan: str | None
) -> tuple[Plan | None, bool]:
    """Return where a message's chain is stored, and whether it has to be added to the run's plan.

    ``parent_chain`` and ``parent_plan`` are those of the request that sends the message: a link sent by Celery's
    tracer carries the very same objects, minus the last.
    """
    if not chain or len(chain) <= LONG:
        return None, False
    if (
        parent_plan
        and parent_chain
        and len(chain) <= len(parent_chain)
        and all(mine is theirs for mine, theirs in zip(chain, parent_chain, strict=False))
    ):
        return Plan(parent_plan, len(chain)), False
    return Plan(task_id, len(chain)), True


def dump_plan(owner: str, chain: Sequence[Any], values: Values) -> str:
    """Return a plan that holds one chain, as JSON text."""
    return json.dumps({owner: json.loads(values.dump(list(chain)))})


def load_plan(text: str | None, values: Values) -> dict[str, Any]:
    """Return a run's plan: chains by the task id of their owner."""
    if text is None:
        return {}
    return {owner: values.load(json.dumps(chain)) for owner, chain in json.loads(text).items()}
