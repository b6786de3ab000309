"""The board: what the processes of a worker's pool have gone on with by themselves, for its main process to see.

A page of memory shared over forks, and a dict for the threads of the main process itself. The main process says whether
they may; each process has a place, by its number in the pool, where it writes what it is at and what it is about to
take. Nobody waits for anybody: an id that is read while it is written belongs to no step, and is read again at the next
look.
"""

from __future__ import annotations

import mmap
import os
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final, Protocol

__all__ = ["LONGEST", "Board", "Entry", "Place"]

#: The longest task id, and how much of a task's name is kept.
LONGEST: Final = 60

PLACE: Final = struct.Struct(f"=I{LONGEST}s{LONGEST}s{LONGEST}s")

#: Places of each process: one that has died keeps its own until the main process has taken note, while its successor
#: has another.
SPARE: Final = 4
#: Processes of a pool that may go on; further ones never do.
PROCESSES: Final = 128

#: The main process' flags, before the places.
PERMITTED, REPORTED, FLAGS = 0, 1, 8


@dataclass(frozen=True, slots=True)
class Entry:
    """What one process is at, and what it takes next; empty texts for nothing."""

    pid: int
    task_id: str
    name: str
    next_id: str

    @property
    def task_ids(self) -> list[str]:
        """The steps the process may own."""
        return [task_id for task_id in (self.task_id, self.next_id) if task_id]


class Place(Protocol):
    """Where one process, or one thread of the main process, writes."""

    def write(self, task_id: str = "", name: str = "", next_id: str = "") -> None:
        """Say what it is at, and what it is about to take."""


class SharedPlace:
    """A process' place on the page."""

    __slots__ = ("_offset", "_page", "_pid")

    def __init__(self, page: mmap.mmap, offset: int) -> None:
        self._page = page
        self._offset = offset
        self._pid = os.getpid()

    def write(self, task_id: str = "", name: str = "", next_id: str = "") -> None:
        """Say what it is at, and what it is about to take."""
        texts = (text.encode()[:LONGEST] for text in (task_id, name, next_id))
        PLACE.pack_into(self._page, self._offset, self._pid, *texts)


class OwnPlace:
    """The place of a thread of the main process; operations on a plain dict are atomic."""

    __slots__ = ("_entries",)

    def __init__(self, entries: dict[int, Entry]) -> None:
        self._entries = entries

    def write(self, task_id: str = "", name: str = "", next_id: str = "") -> None:
        """Say what it is at, and what it is about to take."""
        thread = threading.get_ident()
        if task_id or next_id:
            self._entries[thread] = Entry(os.getpid(), task_id, name, next_id)
        else:
            self._entries.pop(thread, None)


class Board:
    """The board of one worker, made before its pool forks."""

    def __init__(self) -> None:
        self._page = mmap.mmap(-1, FLAGS + PROCESSES * SPARE * PLACE.size)
        self._owner = os.getpid()
        self._threads: dict[int, Entry] = {}

    @property
    def permitted(self) -> bool:
        """Whether processes may go on by themselves."""
        return bool(self._page[PERMITTED])

    @permitted.setter
    def permitted(self, value: bool) -> None:
        self._page[PERMITTED] = value

    @property
    def reported(self) -> bool:
        """Whether processes send Celery's task events about what they go on with."""
        return bool(self._page[REPORTED])

    @reported.setter
    def reported(self, value: bool) -> None:
        self._page[REPORTED] = value

    def place(self, number: int) -> Place | None:
        """Return where to write, for the process with this number in the pool; None where there is no place left."""
        if os.getpid() == self._owner:
            return OwnPlace(self._threads)
        if not 0 <= number < PROCESSES:
            return None
        for spare in range(SPARE):
            offset = FLAGS + (number * SPARE + spare) * PLACE.size
            if self._read(offset)[0] in (0, os.getpid()):
                return SharedPlace(self._page, offset)
        return None

    def entries(self) -> list[Entry]:
        """Return what processes have gone on with; also what those had that have died, until ``forget``."""
        return [*self._shared(), *self._threads.values()]

    def entry(self, pid: int | None) -> Entry | None:
        """Return what a process of the pool has gone on with."""
        return next((entry for entry in self._shared() if entry.pid == pid and entry.task_id), None)

    def forget(self, pid: int) -> None:
        """Free the place of a process that has died."""
        for offset in self._offsets():
            if self._read(offset)[0] == pid:
                PLACE.pack_into(self._page, offset, 0, b"", b"", b"")

    def _shared(self) -> list[Entry]:
        places = (self._read(offset) for offset in self._offsets())
        taken = (Entry(pid, *map(_text, texts)) for pid, *texts in places if pid)
        return [entry for entry in taken if entry.task_ids]

    def _read(self, offset: int) -> tuple[Any, ...]:
        return PLACE.unpack_from(self._page, offset)

    @staticmethod
    def _offsets() -> Iterator[int]:
        return iter(range(FLAGS, FLAGS + PROCESSES * SPARE * PLACE.size, PLACE.size))


def _text(raw: bytes) -> str:
    return raw.rstrip(b"\0").decode(errors="replace")
