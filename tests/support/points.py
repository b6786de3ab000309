"""Crash points: a test names a point in the life of one task; the first process that gets there stops and waits.

A point is a file that the test holds locked. The process that reaches it takes it by renaming it (so there is only
one), leaves its pid in the name, and then waits for the lock: for ever if the test kills it, until `Trap.release()`
otherwise. There is no clock in it.
"""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from types import TracebackType
from typing import Self

from tests.support.waiting import wait_for

__all__ = ["Points", "Trap"]

REACHED = ".reached-"


class Points:
    """The armed points in one directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def arm(self, point: str, task_id: str) -> Trap:
        """Let the next process that comes to this point of this task stop there."""
        return Trap(self.directory / f"{point}@{task_id}")

    def reach(self, point: str, task_id: str) -> None:
        """Stop here if somebody armed this point (the processes under test call it)."""
        armed = self.directory / f"{point}@{task_id}"
        taken = self.directory / f"{armed.name}{REACHED}{os.getpid()}"
        try:
            armed.rename(taken)
        except FileNotFoundError:
            return
        with taken.open() as file:
            fcntl.flock(file, fcntl.LOCK_SH)


class Trap:
    """One armed point, for as long as the ``with`` block lasts."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._before = self._reached()
        unarmed = path.with_name(f"{path.name}.unarmed")
        self._file = unarmed.open("w")
        fcntl.flock(self._file, fcntl.LOCK_EX)
        unarmed.rename(path)  # it must not be found before it is locked

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
        self._path.unlink(missing_ok=True)

    def wait(self, timeout: float = 60.0) -> int:
        """Wait until a process has come to the point, and return its pid."""
        (pid,) = wait_for(lambda: self._reached() - self._before, timeout, f"a process at {self._path.name}")
        return pid

    def _reached(self) -> set[int]:
        """Return the pids of the processes that have come to this point, this time and before."""
        found = self._path.parent.glob(f"{self._path.name}{REACHED}*")
        return {int(taken.name.rpartition(REACHED)[2]) for taken in found}

    def release(self) -> None:
        """Let the process at the point go on."""
        self._file.close()
