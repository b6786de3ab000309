"""Where a function is executed: what its context asks of the place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

from pgqrs_celery.calls import Call
from pgqrs_celery.journal import Journal
from pgqrs_celery.waits import Pending

__all__ = ["Host"]


class Host(Protocol):
    """Where a function is executed: in a worker, or in the calling process."""

    #: Whether children are sent to workers; otherwise they are executed here.
    sends: bool

    def open(self) -> Journal:
        """Return the journal of this execution; called once, at the first use of the context."""

    def prepared(self, call: Any) -> Call:
        """Return a call that is executed here instead of being sent; ``hidden`` arguments are still missing."""

    def send(self, calls: Sequence[tuple[Any, Pending]]) -> None:
        """Send calls as tasks of the run, under the ids and step ids given."""

    def start(self, workflow: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: str) -> tuple[int, str]:
        """Start a run of another workflow under a key; returns its id and root id."""

    def outcome(self, workflow_id: int) -> Any:
        """Return the result of a run that has ended, or raise its error."""

    def in_thread(self) -> AbstractContextManager[None]:
        """Make another thread part of this execution, as far as sending from it goes."""
