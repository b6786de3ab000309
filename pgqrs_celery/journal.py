"""The journal of one execution of a function: what is recorded of its calls, and the only way to add to it.

Everything finished is read once, at the beginning; a call that is found there is not made again. A call that is made
costs one round trip, the INSERT of its outcome, fenced by the lease of the function's row: it needs no acquire.

Step ids are names with an occurrence number per execution (``fetch``, ``fetch#2``), below the id of the step they are
called in. The journal keeps no values: what has been asked for once is forgotten.
"""

from __future__ import annotations

import logging
import re
import threading
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any, Final, NoReturn, TypeVar

from pgqrs_celery import ids
from pgqrs_celery.bodies import Bodies
from pgqrs_celery.exceptions import InputChanged, LeaseLost, StepMisused, StoreUnavailable, Suspended
from pgqrs_celery.failures import dump_error, load_error
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.session import Session
from pgqrs_celery.states import Status
from pgqrs_celery.store import inner, runs
from pgqrs_celery.store.inner import Inner, NewInner, Owner

__all__ = ["Journal", "current_step", "executing"]

logger = logging.getLogger(__name__)

T = TypeVar("T")

#: How often a run's ``updated_at`` moves while one function of it makes progress.
TOUCH_INTERVAL: Final = 60.0

#: Longest name of a step; step ids are part of a primary key.
MAX_NAME: Final = 512

#: What separates the parts of a step id is not left in names.
SEPARATORS: Final = re.compile(r"[%/#]")

#: The journal and the id of the step being executed in this thread or task.
executing: ContextVar[tuple[Journal, str] | None] = ContextVar("pgqrs_executing", default=None)


def current_step() -> str | None:
    """Return the id of the step being executed in this thread or task."""
    inside = executing.get()
    return inside[1] if inside else None


class Journal:
    """What is recorded of one execution of a function."""

    def __init__(
        self,
        ledger: Ledger,
        owner: Owner,
        prefix: str,
        recorded: Iterable[Inner],
        *,
        reserved: str,
        parks: bool,
    ) -> None:
        self.ledger = ledger
        self.owner = owner
        self.prefix = prefix
        #: Whether a wait puts the function to sleep in the ledger; otherwise its process waits.
        self.parks = parks
        self.bodies = Bodies()
        #: Whether this execution only looks back: at the first call that is not recorded, it is over.
        self.looks_back = False
        #: Why nothing more can be asked: the function is suspended, or not ours, or the database is away.
        self.ended: BaseException | None = None
        self._recorded = {row.step_id: row for row in recorded}
        self._sent: dict[str, Inner] = {}
        #: Calls that something is recorded of, but no success.
        self._again = {row.step_id for row in self._recorded.values() if row.status != Status.SUCCESS}
        #: How often each path was called.
        self._called = {reserved: 1}
        self._lock = threading.Lock()
        self._confirmed = self._touched = time.monotonic()
        self._noted_undo = not parks

    # -- names ---------------------------------------------------------------------------------------------------------

    def name(self, name: str) -> str:
        """Return the step id of the next call under this name."""
        return self._numbered(self.path(name))

    def path(self, name: str) -> str:
        """Return a name's full path, without an occurrence number."""
        inside = executing.get()
        base = self.prefix if inside is None or inside[0] is not self else f"{inside[1]}/"
        return base + escaped(name)

    def _numbered(self, path: str) -> str:
        with self._lock:
            nth = self._called[path] = self._called.get(path, 0) + 1
        return path if nth == 1 else f"{path}#{nth}"

    @contextmanager
    def inside(self, step_id: str) -> Iterator[None]:
        """Execute a step's body: what it calls is named below it."""
        token = executing.set((self, step_id))
        try:
            yield
        finally:
            executing.reset(token)

    def digest(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> str | None:
        """Return the hash of a call's arguments; None where there are none, or nobody wants to know."""
        if (not args and not kwargs) or self.ledger.settings.on_input_change == "ignore":
            return None
        return ids.digest_of_call(args, kwargs)

    # -- reading -------------------------------------------------------------------------------------------------------

    @property
    def is_replaying(self) -> bool:
        """Whether calls are recorded, at this level, that have not been asked for yet.

        What is below a call that is over is never asked for: the steps called in it, or in a task it has sent.
        """
        level = self.path(".")[:-1]
        return any(step_id.startswith(level) and "/" not in step_id[len(level) :] for step_id in self._recorded)

    def recall(self, step_id: str, input_hash: str | None = None) -> Inner | None:
        """Return the recorded success of a call, once; None where the call is to be made.

        An error recorded by this very attempt of the function is raised again: whoever caught it then must see it on
        a replay, too. One recorded before the function failed, or was retried, is not: the call is made again.
        """
        self.check()
        found = self._recorded.pop(step_id, None)
        if found is None or found.task_id is not None:
            return None
        current = found.generation == self.owner.generation
        if found.status == Status.FAILED and current:
            raise load_error(found.error)
        if found.status == Status.SUCCESS or (found.is_undone and current):
            self._compare(found, input_hash)
            return found
        return None

    def take(self, step_id: str) -> Inner | None:
        """Return what is recorded under a step id, once, whatever it is."""
        self.check()
        return self._recorded.pop(step_id, None)

    def sent(self, step_id: str) -> Inner | None:
        """Return the task that was sent under a step id, as it stood at the beginning."""
        found = self._recorded.get(step_id)
        if found is not None and found.task_id is not None:
            self._sent[step_id] = self._recorded.pop(step_id)
        return self._sent.get(step_id)

    def find(self, step_id: str) -> Inner | None:
        """Return what is recorded under a step id at this moment."""
        return self.call(lambda session: inner.find(session, self.owner.workflow_id, step_id))

    def value(self, found: Inner) -> Any:
        """Return the value of a recorded success."""
        return self.ledger.values.load(found.output)

    def _compare(self, found: Inner, input_hash: str | None) -> None:
        policy = self.ledger.settings.on_input_change
        if policy == "ignore" or found.input_hash == input_hash or found.input_hash is None:
            return
        text = (
            f"step {found.step_id!r} of run {self.owner.workflow_id} is called with other arguments than those its "
            "result was recorded with; the recorded result is used (pgqrs_on_input_change)"
        )
        if policy == "error":
            raise InputChanged(text.replace("the recorded result is used", "it is not used"))
        warnings.warn(text, stacklevel=2)
        logger.warning("%s", text)

    # -- writing -------------------------------------------------------------------------------------------------------

    def succeed(
        self,
        step_id: str,
        value: Any,
        *,
        name: str | None = None,
        input_hash: str | None = None,
        elapsed: float = 0.0,
        session: Session | None = None,
    ) -> Any:
        """Commit the result of a call and return it as a replay would see it.

        With a ``session`` it is written in that transaction. Raises ``ResultNotSerializable`` and ``ResultTooLarge``.
        """
        values = self.ledger.values
        text = values.dump_result(value, step_id)
        new = NewInner(step_id, name or ids.plain_name(step_id), Status.SUCCESS, text, None, input_hash, elapsed)
        if session is not None:
            if not inner.record(session, self.owner, new, again=True):
                self.lose()
            return values.load_again(text, value)
        found = self._write(new)
        return values.load_again(text, value) if found is None else self.value(found)

    def fail(
        self, step_id: str, error: BaseException, *, input_hash: str | None = None, elapsed: float = 0.0
    ) -> Inner | None:
        """Commit the error of a call; returns its success instead where that was committed after all."""
        text = dump_error(error)
        new = NewInner(step_id, ids.plain_name(step_id), Status.FAILED, None, text, input_hash, elapsed)
        return self._write(new)

    def _write(self, new: NewInner) -> Inner | None:
        """Commit an outcome; returns what was recorded before, if that was a success, else None."""
        self.go_beyond(new.step_id)
        again = new.step_id in self._again
        try:
            with self.ledger.database.session() as session:
                accepted = inner.record(session, self.owner, new, again=again)
        except StoreUnavailable:
            accepted = self.call(lambda session: inner.record(session, self.owner, new, again=True))
        now = self._confirmed = time.monotonic()
        if now - self._touched >= TOUCH_INTERVAL:
            self._touched = now
            self.call(lambda session: runs.touch(session, self.owner.workflow_id))
        if new.status != Status.SUCCESS:
            self._again.add(new.step_id)
        return None if accepted else self._refused(new.step_id)

    def _refused(self, step_id: str) -> Inner:
        """An outcome was not accepted: because another owner has the function, or because there is one already."""
        if not self.call(lambda session: inner.owns(session, self.owner)):
            self.lose()
        found = self.find(step_id)
        if found is None or found.task_id is not None or found.status != Status.SUCCESS:
            raise StepMisused(
                f"step id {step_id!r} of run {self.owner.workflow_id} belongs to a task of its canvas; "
                "give the step another name"
            )
        return found

    @property
    def must_note_undo(self) -> bool:
        """Whether the ledger has not been told yet that this execution does what can be undone."""
        return not self._noted_undo

    def note_undo(self) -> None:
        """Tell the ledger that there will be something to undo, whoever ends the function."""
        if not self._noted_undo:
            self.call(lambda session: inner.can_undo(session, self.owner))
            self._noted_undo = True

    def undo(self, step_id: str) -> None:
        """Note that the effect of a step has been compensated."""
        if not self.call(lambda session: inner.undo(session, self.owner, step_id)):
            self.lose()

    # -- ownership -----------------------------------------------------------------------------------------------------

    def call(self, work: Callable[[Session], T], *, transaction: bool = False) -> T:
        """Return ``work(session)``; a database that stays away ends this execution with ``StoreUnavailable``."""
        settings = self.ledger.settings
        try:
            return self.ledger.call(work, patience=max(settings.patience, settings.lease), transaction=transaction)
        except StoreUnavailable as error:
            self.ended = self.ended or error
            raise

    def check(self) -> None:
        """Raise again what ended this execution, if anything did."""
        if self.ended is not None:
            raise type(self.ended)(*self.ended.args)

    @property
    def is_confirmed(self) -> bool:
        """Whether less than a lease has passed since it was certain that the function is ours."""
        return time.monotonic() - self._confirmed < self.ledger.settings.lease

    def confirm(self) -> None:
        """Ask whether the function is still ours, if a whole lease has passed since that was certain.

        Called before each body; narrows a window that no ledger can close: a process that stalls between its last
        statement and the next body's first line.
        """
        self.check()
        self.go_beyond("the end of what is recorded")
        if self.is_confirmed:
            return
        if not self.call(lambda session: inner.owns(session, self.owner)):
            self.lose()
        self._confirmed = time.monotonic()

    def go_beyond(self, step_id: str) -> None:
        """Cut off what comes after it in an execution that only looks back: the next thing to do is not recorded.

        What runs beside it may still find things that are.
        """
        if self.looks_back:
            raise Suspended(f"run {self.owner.workflow_id}: nothing is recorded beyond {step_id!r}")

    def turn(self) -> None:
        """End looking back: from now on calls are made."""
        self.looks_back, self.ended = False, None

    def lose(self) -> NoReturn:
        """Another owner has the function, or this execution has parked it: raise that, now and at every later call."""
        self.bodies.settle()
        self.check()
        self.ended = LeaseLost(
            f"run {self.owner.workflow_id}: the function (task {self.owner.task_id}) was cancelled, or belongs to "
            "another process by now"
        )
        raise self.ended

    def suspend(self, step_id: str) -> NoReturn:
        """The function has been parked: raise that, now and at every later call."""
        self.ended = Suspended(f"run {self.owner.workflow_id} waits at {step_id!r}")
        raise self.ended


@lru_cache(maxsize=256)
def escaped(name: str) -> str:
    """Return a name as a part of a step id; raises ``StepMisused`` for one that is too long, or empty."""
    if not name or len(name) > MAX_NAME:
        raise StepMisused(f"a step's name must have 1 to {MAX_NAME} characters, not {len(name)}: {name[:80]!r}")
    return SEPARATORS.sub(lambda found: f"%{ord(found[0]):02X}", name)
