"""The broker as one process sees it: a pool of connections, the settings, and what is known about queues.

All kombu connections of a process with the same URL share one ``Broker``, so that ten pooled producers need one
connection to Postgres and not ten.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import fields
from typing import Any, Final, TypeVar
from urllib.parse import quote

import psycopg

from pgqrs_celery import outbox
from pgqrs_celery.conf import PREFIX, Settings
from pgqrs_celery.databases import database_for
from pgqrs_celery.db import translate
from pgqrs_celery.listener import KEEPALIVE
from pgqrs_celery.session import Connection, Session
from pgqrs_celery.store import consumers, messages, migrations
from pgqrs_celery.store.messages import NewMessage, Published
from pgqrs_celery.transport import bell
from pgqrs_celery.urls import parse

__all__ = ["Broker", "broker_for"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: What a transport chosen by its name alone connects to: the database of the settings or the environment.
NOWHERE: Final = "pgqrs://"


class Broker:
    """Publishes, and lends sessions."""

    def __init__(self, dsn: str, settings: Settings) -> None:
        self.settings = settings
        self.database = database_for(dsn, settings)
        #: Exchanges that have a binding, as a consumer of this process saw a moment ago; None where nobody looks.
        self.bound_exchanges: frozenset[str] | None = None
        #: The queues that senders of this process have declared, by their ids; kept, so that no id is another's. A
        #: queue is a row, which outlives connections and forks.
        self.declared: dict[int, Any] = {}
        self._checked = False
        self._checking = threading.Lock()

    def check(self) -> None:
        """Raise unless the database answers and holds the schema; the answer is remembered."""
        with self._checking:
            if self._checked:
                self.call(lambda session: session.connection.execute(""))
                return
            if self.database.auto_install:
                migrations.install(self.database)
            else:
                migrations.verify(self.database)
            self._checked = True

    def forget_inherited(self) -> None:
        """Start afresh in a forked child."""
        self._checking = threading.Lock()

    def call(self, work: Callable[[Session], T], *, transaction: bool = False) -> T:
        """Return ``work(session)``; tried twice, because a pooled connection may be left from before a restart."""
        return self.database.call(work, transaction=transaction)

    def connect(self) -> Connection:
        """Return a connection of the caller's own that reaches Postgres as directly as the settings allow."""
        return self.database.connect(self.settings.direct_dsn, **KEEPALIVE)

    @contextmanager
    def borrowed(self, connection: Connection) -> Iterator[Session]:
        """Use a connection of the caller's own as a session, with this package's errors."""
        try:
            yield Session(connection, self.database.texts)
        except psycopg.Error as error:
            raise translate(error, self.settings.schema) from error

    def address(self, queue: str) -> str:
        """Return a name for the queue that is unique over all brokers of this process."""
        return f"{self.database.dsn}|{self.settings.schema}|{queue}"

    @property
    def schema(self) -> str:
        """The schema of the broker's tables."""
        return self.settings.schema

    def publish(self, new: Sequence[NewMessage]) -> None:
        """Send messages: into the collector that is open here, else at once."""
        collector = outbox.current()
        if collector is None:
            self.publish_now(new)
            return
        for message in new:
            collector.add_message(message, self)

    def publish_one(self, new: NewMessage) -> None:
        """Send one message; see ``publish``."""
        self.publish([new])

    def publish_now(self, new: Sequence[NewMessage]) -> None:
        """Insert messages in one statement and wake who waits for them."""
        if len(new) != 1 or new[0].exchange:
            self.wake(self.call(lambda session: messages.publish(session, new)))
            return
        (one,) = new
        near = self.near(one.routing_key) if one.visible_at is None else None
        self.call(lambda session: messages.post(session, one, wake=near is None))
        if near is not None:
            near.ring(news=True)

    def wake(self, published: Iterable[Published]) -> None:
        """After a publication's commit, wake whoever is needed: this worker itself, or others through the database."""
        remote = []
        for entry in published:
            near = self.near(entry.queue)
            if near is not None and not entry.volatile and entry.due_in is None:
                near.ring(news=True)
            else:
                remote.append(entry)
        if remote:
            self.call(lambda session: consumers.wake(session, remote))

    def near(self, queue: str) -> bell.Bell | None:
        """Return the bell of a consumer of the queue in this process or its parent."""
        address = self.address(queue)
        return next((b for b in (bell.inherited(), bell.own()) if b is not None and b.hears(address)), None)


_brokers: dict[tuple[str, Settings], Broker] = {}
_making = threading.Lock()


def broker_for(client: Any) -> Broker:
    """Return the process's broker for a kombu connection; raises ``ConfigurationError`` where it cannot be one."""
    address = parse(_url_of(client))
    settings = Settings.read(_settings(client.transport_options or {}) | address.settings)
    with _making:
        key = (address.dsn, settings)
        if key not in _brokers:
            _brokers[key] = Broker(*key)
        return _brokers[key]


def _after_fork() -> None:
    """Make locks anew in a forked child: a thread of the parent's may have held them."""
    global _making  # noqa: PLW0603
    _making = threading.Lock()
    for broker in _brokers.values():
        broker.forget_inherited()


os.register_at_fork(after_in_child=_after_fork)


def _settings(options: Mapping[str, Any]) -> dict[str, Any]:
    known = {f.name for f in fields(Settings)}
    found = {PREFIX + key: value for key, value in options.items() if key in known}
    found |= {key: value for key, value in options.items() if str(key).lower().startswith(PREFIX)}
    if "listen_dsn" in options:
        found.setdefault(PREFIX + "direct_dsn", options["listen_dsn"])
    return found


def _url_of(client: Any) -> str:
    host = client.hostname or ""
    if not host and not client.virtual_host.strip("/"):
        return NOWHERE
    if "://" in host:
        return str(host)
    # After a failover kombu has taken the URL to pieces.
    user = quote(client.userid or "", safe="") + (f":{quote(client.password, safe='')}" if client.password else "")
    port = f":{client.port}" if client.port else ""
    database = quote(client.virtual_host or "", safe="")
    return f"postgresql://{user + '@' if user else ''}{quote(host, safe='')}{port}/{database}"
