"""A Celery worker in this process: for programs that enqueue and execute at once.

It executes every task of the app, not only one workflow's. A fleet is better started with ``celery worker``, which has
processes instead of threads.
"""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any, Final

from celery import Celery, signals
from celery._state import _set_task_join_will_block, task_join_will_block  # type: ignore[attr-defined]
from celery.worker import WorkController, state

from pgqrs_celery.exceptions import RunStateError

__all__ = ["Runtime", "RuntimeHandle"]

#: Celery stops its workers by a flag of the process, so there can be one runtime at a time.
_running: Final = threading.Lock()


class Worker(WorkController):
    """A worker that handles no signals and says when it takes messages."""

    ready: threading.Event

    def on_consumer_ready(self, consumer: Any) -> None:
        """Tell those who wait for it."""
        self.ready.set()
        signals.worker_ready.send(sender=consumer)


class RuntimeHandle:
    """A worker that is running."""

    def __init__(self, app: Celery, options: dict[str, Any]) -> None:
        # What Celery's own worker does: the threads of the pool find the app as the process's default.
        app.finalize()
        app.set_default()
        self._ready = threading.Event()
        self._ended = threading.Event()
        self._error: BaseException | None = None
        forbidden = task_join_will_block()
        self._worker = Worker(app=app, **options)
        # The pool forbids waiting for results in the whole process, of which tasks are only a part here.
        _set_task_join_will_block(forbidden)
        self._worker.ready = self._ready
        self._thread = threading.Thread(target=self._work, name="pgqrs-runtime", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            self._worker.start()
        except BaseException as error:  # noqa: BLE001 - kept for whoever waits for the end
            self._error = error
        finally:
            flags: Any = state
            flags.should_stop = None
            self._ended.set()
            _running.release()

    @property
    def has_ended(self) -> bool:
        """Whether the worker has stopped, for whatever reason."""
        return self._ended.is_set()

    def wait_until_ready(self, timeout: float | None = None) -> bool:
        """Wait until the worker takes messages; False after ``timeout`` seconds."""
        return self._ready.wait(timeout)

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until the worker has ended; False after ``timeout`` seconds. Raises what has ended it."""
        ended = self._ended.wait(timeout)
        if self._error is not None and not isinstance(self._error, SystemExit):
            raise self._error
        return ended

    def request_shutdown(self) -> None:
        """Let the worker take nothing more and finish what it executes; returns at once."""
        if not self._ended.is_set():
            flags: Any = state
            flags.should_stop = 0

    def shutdown(self, timeout: float | None = None) -> bool:
        """Do that and wait for the end; what waits in the ledger goes on in other workers.

        Returns False where the end has not come after ``timeout`` seconds.
        """
        self.request_shutdown()
        return self.wait(timeout)


class Runtime:
    """``run()`` executes until it is told to stop, ``start()`` does so in the background."""

    def __init__(self, app: Celery, **options: Any) -> None:
        self._app = app
        self._options = {"pool": "threads", "concurrency": 4, "without_gossip": True, "without_mingle": True, **options}

    def start(self) -> RuntimeHandle:
        """Start a worker in threads of this process and return its handle.

        Raises ``RunStateError`` where this process has one already.
        """
        if not _running.acquire(blocking=False):
            raise RunStateError("a runtime is running in this process already; shut it down first")
        try:
            return RuntimeHandle(self._app, self._options)
        except BaseException:
            _running.release()
            raise

    def run(self) -> None:
        """Execute until the process gets SIGINT or SIGTERM; what is executed then is finished first."""
        handle = self.start()
        with Interrupted(handle):
            while not handle.wait(3600.0):
                pass


class Interrupted:
    """Turns SIGINT and SIGTERM into a shutdown, where the main thread says so."""

    SIGNALS = (signal.SIGINT, signal.SIGTERM)

    def __init__(self, handle: RuntimeHandle) -> None:
        self._handle = handle
        self._before: dict[int, Any] = {}

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._stop) for number in self.SIGNALS}

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _stop(self, number: int, frame: FrameType | None) -> None:
        self._handle.request_shutdown()
