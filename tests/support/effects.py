"""The independent witness: an append-only file in which processes note what they did, one line per effect.

It knows nothing of the ledger under test. A line is written with one ``write`` on a descriptor opened with O_APPEND,
so lines of processes that are killed at any moment are either whole or not there.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

__all__ = ["Effect", "EffectLog"]


@dataclass(frozen=True, slots=True)
class Effect:
    """One thing that happened: a ``kind`` (``body``, ``sent``, …), the task it belongs to, and who did it."""

    kind: str
    task_id: str
    name: str
    pid: int
    detail: str = ""


class EffectLog:
    """The effects noted in one file, by any number of processes."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def add(self, kind: str, task_id: str, name: str, detail: str = "") -> None:
        """Note an effect of this process."""
        line = json.dumps(asdict(Effect(kind, task_id, name, os.getpid(), detail))) + "\n"
        descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            os.write(descriptor, line.encode())
        finally:
            os.close(descriptor)

    def read(self, kind: str | None = None) -> list[Effect]:
        """Return the effects so far, in the order they were noted."""
        text = self.path.read_text() if self.path.exists() else ""
        # A write may be seen before all of it is there: what has no end yet counts the next time.
        effects = [Effect(**json.loads(line)) for line in text[: text.rfind("\n") + 1].splitlines()]
        return [effect for effect in effects if kind in (None, effect.kind)]

    def count(self, task_id: str, kind: str = "body") -> int:
        """Return how often a task had an effect of this kind."""
        return sum(effect.task_id == task_id for effect in self.read(kind))
