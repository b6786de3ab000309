"""One durable message on its way out: what Celery built, and what the ledger has to know about it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from celery import signals
from kombu.serialization import dumps

from pgqrs_celery import ids
from pgqrs_celery.envelope import MARKER, Content, Envelope, Plan

__all__ = ["Outgoing", "fix_links"]


@dataclass(slots=True)
class Outgoing:
    """A finished message that has not been published.

    ``options`` is the complete routing, ``chosen`` what of it the caller chose himself; ``delay`` is in seconds.
    """

    producer: Any
    name: str
    headers: dict[str, Any]
    properties: dict[str, Any]
    body: tuple[Any, Any, dict[str, Any]]
    sent_event: dict[str, Any] | None
    options: dict[str, Any]
    chosen: dict[str, Any] = field(default_factory=dict)
    delay: float | None = None
    plan_owner: str | None = None
    durable: bool = True
    #: The serialized body: the row and the message hold the same text.
    _content: tuple[str, Content] | None = None

    @classmethod
    def plain(cls, name: str, headers: Mapping[str, Any], body: tuple[Any, Any, dict[str, Any]]) -> Outgoing:
        """Return a message that only passes by: it is not recorded, but durable links may follow it."""
        return cls(None, name, dict(headers), {}, body, None, {}, durable=False)

    @property
    def task_id(self) -> str:
        """The id of the message's task."""
        return str(self.headers["id"])

    @property
    def root_id(self) -> str:
        """The root task id: the run the message belongs to."""
        return str(self.headers["root_id"])

    @property
    def generation(self) -> int:
        """The message's generation."""
        return ids.generation(self.headers.get("replaced_task_nesting"), self.headers.get("retries"))

    @property
    def held(self) -> bool:
        """Whether the message is to be sent later."""
        return self.delay is not None and self.delay > 0

    @property
    def chain(self) -> Sequence[Any] | None:
        """The links that follow, in reverse."""
        return self.body[2].get("chain")

    @property
    def given_step_id(self) -> str | None:
        """The step id the message was given when its canvas was laid out."""
        marker = self.headers.get(MARKER)
        return marker if isinstance(marker, str) else None

    @property
    def queue(self) -> str | None:
        """Where the message goes: a queue's name, else exchange and routing key."""
        queue = self.options.get("queue")
        if queue is not None:
            return str(getattr(queue, "name", queue))
        exchange = self.options.get("exchange")
        if exchange is None:
            return None
        return f"{getattr(exchange, 'name', exchange)}/{self.options.get('routing_key') or ''}"

    @property
    def is_routed(self) -> bool:
        """Whether an exchange decides where the message goes; else it goes to one queue, by its name."""
        options = self.options
        kind = options.get("exchange_type") or getattr(getattr(options.get("queue"), "exchange", None), "type", None)
        return kind not in (None, "direct") or bool(options.get("exchange") and options.get("routing_key"))

    def content(self, serializer: str) -> Content:
        """Return content type, encoding and text of the body; raises kombu's ``EncodeError`` where it has none."""
        if signals.before_task_publish.receivers:  # which may change what is in the body
            return dumps(self.body, serializer=serializer)
        if self._content is None or self._content[0] != serializer:
            self._content = (serializer, dumps(self.body, serializer=serializer))
        return self._content[1]

    def as_tuple(self) -> tuple[dict[str, Any], dict[str, Any], Any, Any]:
        """Return the message as Celery's sender takes it."""
        return self.headers, self.properties, self.body, self.sent_event

    def envelope(self, plan: Plan | None, serializer: str) -> str:
        """Return what the ledger stores: an envelope as JSON text."""
        properties = {k: v for k, v in self.properties.items() if k != "expiration"}
        envelope = Envelope(self.name, self.headers, properties, self.body, self.chosen, plan)
        return envelope.dump(serializer, None if plan else self.content(serializer))


def fix_links(embed: Mapping[str, Any], owner: str) -> dict[str, Any]:
    """Return the embedded canvas with a fixed id for every callback and errback that has none.

    The signatures are copied: Celery shares one errback object between all the tasks of a chain.
    """
    fixed = dict(embed)
    for key, kind in (("callbacks", "link"), ("errbacks", "link_error")):
        if fixed.get(key):
            fixed[key] = [_with_id(sig, ids.link_id(owner, kind, n)) for n, sig in enumerate(fixed[key])]
    return fixed


def _with_id(signature: Any, task_id: str) -> Any:
    if not isinstance(signature, Mapping) or (signature.get("options") or {}).get("task_id"):
        return signature
    return {**signature, "options": {**(signature.get("options") or {}), "task_id": task_id}}
