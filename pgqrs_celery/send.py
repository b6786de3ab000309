"""The send seam: every durable message is one row, written before it is published.

Three public attributes of the app *instance* are overridden; no class of Celery's is patched:

* ``app.send_task`` keeps what the caller himself chose, takes ETAs out, and gives what a body sends a fixed id;
* ``app.producer_or_acquire`` opens the **publish scope**: its outermost use in a thread collects messages (a group is
  one scope) and, at its end, records them in one transaction and then publishes them;
* ``app.amqp.send_task_message`` sees every finished message and puts the durable ones into the scope.

An exception inside the scope records and publishes nothing. A broker that does not answer after the rows are committed
is not an error: the relay sends them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from celery import Celery
from celery.app.amqp import AMQP
from celery.utils.time import maybe_iso8601, maybe_make_aware
from kombu.utils.objects import cached_property

from pgqrs_celery import execution, ids, outbox, transactions
from pgqrs_celery.circumstances import Box
from pgqrs_celery.connecting import connect_once
from pgqrs_celery.dispatch import TOGETHER
from pgqrs_celery.durability import is_durable
from pgqrs_celery.envelope import MARKER, PLAN, SENT, chosen
from pgqrs_celery.exceptions import ConfigurationError
from pgqrs_celery.execution import Execution, Phase
from pgqrs_celery.outgoing import Outgoing, fix_links
from pgqrs_celery.posting import Poster
from pgqrs_celery.recorder import Recorder
from pgqrs_celery.transport.broker import Broker

__all__ = ["SendSeam"]


@dataclass(slots=True)
class Scope:
    """Messages of one publish scope, in order, and the producer that will publish them."""

    producer: Any
    messages: list[Outgoing] = field(default_factory=list)
    #: Members of a group that are not durable, for our own broker: (name, message, options).
    plain: list[tuple[str, Any, dict[str, Any]]] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Caller:
    """What the caller of ``send_task`` said himself."""

    options: dict[str, Any]
    delay: float | None


_scope: ContextVar[Scope | None] = ContextVar("pgqrs_scope", default=None)
_caller: ContextVar[Caller | None] = ContextVar("pgqrs_caller", default=None)


class SendSeam:
    """The overridden sending attributes of one app."""

    def __init__(
        self,
        app: Celery,
        recorder: Recorder,
        leave_plain: Callable[[str | None], None],
        broker: Callable[[], Broker | None],
    ) -> None:
        self.app = app
        self.record = recorder
        self.broker = broker
        self._leave_plain = leave_plain
        self._send_task = app.send_task
        self._producer_or_acquire = app.producer_or_acquire
        self._send_message: Callable[..., Any] | None = None
        self._own = threading.local()

    def install(self) -> None:
        """Override the app's sending attributes, without finalizing its configuration."""
        seam, app = self, self.app
        base = app.amqp.__class__ if "amqp" in app.__dict__ else _class_of(app.amqp_cls)

        class DurableAMQP(base):  # type: ignore[misc,valid-type]
            @cached_property
            def send_task_message(self) -> Callable[..., Any]:
                seam._send_message = super()._create_task_sender()
                return seam.send_task_message

        app.amqp_cls = DurableAMQP  # type: ignore[assignment]
        if "amqp" in app.__dict__:
            del app.__dict__["amqp"]
        overridden: Any = app
        overridden.send_task = self.send_task
        overridden.producer_or_acquire = overridden.default_producer = self.producer_or_acquire

    def publish(self, message: Outgoing, producer: Any = None) -> Any:
        """Publish one message with Celery's own sender."""
        if self._send_message is None:
            self.app.amqp.send_task_message  # noqa: B018 - creates the sender
        assert self._send_message is not None
        return self._send_message(
            producer or message.producer,
            message.name,
            message.as_tuple(),
            **message.options,
        )

    @contextmanager
    def producer_or_acquire(self, producer: Any = None) -> Iterator[Any]:
        """Lend a producer; at the end of the outermost use, record and publish what was collected."""
        outer = _scope.get()
        if outer is not None:
            # Messages are published when the outermost use ends; a producer acquired here would be gone by then.
            yield producer if producer is not None else outer.producer
            return
        own = self.own_producer() if producer is None else None
        with self._producer_or_acquire(producer) if own is None else nullcontext(own) as lent:
            scope = Scope(lent)
            token = _scope.set(scope)
            try:
                yield lent
            finally:
                _scope.reset(token)
            if scope.messages:
                self.record(scope.messages, execution.current())
            if scope.plain:
                self._publish_together(scope)

    def own_producer(self) -> Any:
        """Return this thread's producer for our own broker: it has no connection to Postgres of its own.

        A pool of producers, made for brokers that have one, costs more per message than the message. One for all
        threads would be taken apart by whoever meets an error while the others use it. Whoever uses it tries again by
        himself while Postgres is away, and would wait for seconds if kombu's connection did so before him.
        """
        if self.broker() is None:
            return None
        producer = getattr(self._own, "producer", None)
        if producer is None:
            producer = self._own.producer = self.app.amqp.Producer(connect_once(self.app))
        return producer

    def _publish_together(self, scope: Scope) -> None:
        """Publish the members of a plain group to our own broker, many with one statement."""
        broker = self.broker()
        assert broker is not None
        assert self._send_message is not None
        for start in range(0, len(scope.plain), TOGETHER):
            box = Box()
            poster = Poster(broker, scope.producer, box.messages.append)
            with outbox.collecting(box):
                for name, message, options in scope.plain[start : start + TOGETHER]:
                    self._send_message(poster, name, message, **options)
            broker.publish(box.messages)

    def send_task(
        self,
        name: str,
        args: Any = None,
        kwargs: Any = None,
        countdown: float | None = None,
        eta: Any = None,
        task_id: str | None = None,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Send a task by name; see ``Celery.send_task``."""
        if not is_durable(self.app, name, options.get("headers"), kwargs):
            return self._send_task(name, args, kwargs, countdown, eta, task_id, *rest, **options)
        running = execution.current()
        if task_id is None and running is not None and running.phase is Phase.BODY:
            key = f"{name}/{ids.digest([args or (), kwargs or {}])}"
            task_id = ids.child_id(running.guard.task_id, name, [args or (), kwargs or {}], running.nth(key))
        token = _caller.set(Caller(chosen(options), self._delay(countdown, eta)))
        try:
            return self._send_task(name, args, kwargs, None, None, task_id, *rest, **options)
        finally:
            _caller.reset(token)

    def _delay(self, countdown: float | None, eta: Any) -> float | None:
        if countdown:
            return float(countdown)
        if not eta:
            return None
        moment = maybe_iso8601(eta) if isinstance(eta, str) else eta
        assert isinstance(moment, datetime)
        return float((maybe_make_aware(moment, self.app.timezone) - self.app.now()).total_seconds())

    def send_task_message(self, producer: Any, name: str, message: Any, **options: Any) -> Any:
        """Put a durable message into the scope; send any other at once."""
        headers, properties, body, sent_event = message
        merged = {**headers, **(options.get("headers") or {})}
        running = execution.current()
        if not isinstance(body, tuple) or not is_durable(self.app, name, merged, body[1]):
            return self._send_plain(producer, name, message, merged.get("group"), running, options)
        caller = _caller.get() or Caller(chosen(options), None)
        merged.pop(SENT, None)
        merged[MARKER] = merged.get(MARKER) or 1
        plan = merged.pop(PLAN, None)
        args, kwargs, embed = body
        if running is not None and running.guard.task_id in (merged.get("parent_id"), merged["id"]):
            merged["root_id"] = running.guard.root_id
        else:
            merged["root_id"] = ids.root_of(merged, embed.get("chain"), embed.get("chord"))
        if sent_event:
            sent_event = {**sent_event, "root_id": merged["root_id"]}
        outgoing = Outgoing(
            producer=producer,
            name=name,
            headers=merged,
            properties=dict(properties),
            body=(args, kwargs, fix_links(embed, str(merged["id"]))),
            sent_event=sent_event,
            options={k: v for k, v in options.items() if k != "headers"},
            chosen=caller.options,
            delay=caller.delay,
            plan_owner=plan,
        )
        scope = _scope.get()
        if scope is None:
            self.record([outgoing], running)
        else:
            scope.messages.append(outgoing)
        return None

    def _send_plain(
        self,
        producer: Any,
        name: str,
        message: Any,
        group: str | None,
        running: Execution | None,
        options: dict[str, Any],
    ) -> Any:
        """Send a message that is not durable, with the other members of its group where our own broker takes it."""
        headers, _, body, _ = message
        assert self._send_message is not None
        if transactions.current() is not None and self.broker() is None:
            raise ConfigurationError(
                f"task {name!r} cannot be sent in a transaction (in_transaction): it is not durable, and the "
                "broker is not Postgres. It was not sent; make it a @pgqrs.task, or send it after the commit"
            )
        if running is not None and not running.settle():
            return None
        if isinstance(body, tuple) and body[2].get("chord"):
            self._leave_plain(group)
        if running is not None and isinstance(body, tuple):
            self.record([Outgoing.plain(name, headers, body)], running)
        collected, broker = _scope.get(), self.broker()
        if collected is not None and group and broker is not None:
            collected.plain.append((name, message, options))
            return None
        if broker is not None and producer is getattr(self._own, "producer", None):
            producer = Poster(broker, producer, broker.publish_one)
        return self._send_message(producer, name, message, **options)


def _class_of(name: Any) -> type[AMQP]:
    if isinstance(name, str):
        from celery.utils.imports import symbol_by_name

        return symbol_by_name(name)  # type: ignore[no-any-return]
    return name  # type: ignore[no-any-return]
