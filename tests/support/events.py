"""What Celery's workers tell whoever listens to their events."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from celery import Celery

from tests.support.waiting import PATIENCE, wait_for

__all__ = ["Events", "collected_events"]


@dataclass(slots=True)
class Events:
    """The events that have come, in their order."""

    seen: list[dict[str, Any]] = field(default_factory=list)

    def of(self, task_id: str) -> list[dict[str, Any]]:
        """Return the events about a task."""
        return [event for event in list(self.seen) if event.get("uuid") == task_id]

    def types(self) -> set[str]:
        """Return the types there have been."""
        return {event["type"] for event in list(self.seen)}

    def by_task(self, task_ids: Iterable[str], *, but: str = "") -> dict[str, list[str]]:
        """Return the types of the events about each of some tasks, one left out."""
        return {task_id: [e["type"] for e in self.of(task_id) if e["type"] != but] for task_id in task_ids}

    def wait_for(self, expected: Mapping[str, list[str]], *, but: str = "") -> None:
        """Wait until exactly these events about some tasks have come, one type left out."""
        try:
            wait_for(lambda: self.by_task(expected, but=but) == expected, PATIENCE)
        except AssertionError:
            raise AssertionError(f"seen {self.by_task(expected, but=but)}, expected {dict(expected)}") from None


@contextmanager
def collected_events(app: Celery, *, begun: bool = True) -> Iterator[Events]:
    """Collect events until the block ends; it begins when the first one, of whatever kind, has come, if ``begun``."""
    events = Events()
    connection = app.connection_for_read()
    # By default an event is lost that nobody has taken for five seconds.
    receiver = app.events.Receiver(connection, handlers={"*": events.seen.append}, queue_ttl=PATIENCE)

    def listen() -> None:
        with connection:
            # One consumer all the time: what Redis publishes while there is none is lost.
            for _ in receiver.consume(limit=None, wakeup=False, safety_interval=0.2):
                pass

    thread = threading.Thread(target=listen)
    thread.start()
    try:
        if begun:
            wait_for(lambda: events.seen, PATIENCE, "an event")
        yield events
    finally:
        receiver.should_stop = True
        thread.join()
