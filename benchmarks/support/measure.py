"""Processor time of process trees, and statistics."""

from __future__ import annotations

import os
import platform
import statistics
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version

import psutil

__all__ = ["Meter", "Usage", "machine", "spread"]


def tree_seconds(root: int) -> float:
    """Return the processor seconds a process, its living descendants and the ended ones have used."""
    total = 0.0
    with suppress(psutil.NoSuchProcess):
        process = psutil.Process(root)
        for member in [process, *process.children(recursive=True)]:
            with suppress(psutil.NoSuchProcess):
                times = member.cpu_times()
                total += times.user + times.system + times.children_user + times.children_system
    return total


def process_seconds(pid: int) -> float:
    """Return the processor seconds a process has used itself."""
    times = psutil.Process(pid).cpu_times()
    return float(times.user + times.system)


def own_seconds() -> float:
    """Return the processor seconds of this process alone, without the servers it has started."""
    times = os.times()
    return times.user + times.system


def machine_seconds() -> float:
    """Return the processor seconds the whole machine has spent on anything."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


@dataclass(frozen=True, slots=True)
class Usage:
    """Processor seconds by part, and what everybody else on the machine used meanwhile."""

    parts: Mapping[str, float]
    others: float

    @property
    def total(self) -> float:
        """The seconds of all parts."""
        return sum(self.parts.values())


class Meter:
    """Reads the processor time of this process, of a worker's two parts and of some process trees, twice.

    A worker's ``main`` process and its ``pool`` are two parts: one receives messages, the other executes them.
    """

    def __init__(self, worker: int, trees: Mapping[str, int]) -> None:
        self._worker = worker
        self._trees = trees
        self._before = self._read()
        self._machine = machine_seconds()

    def _read(self) -> dict[str, float]:
        main = process_seconds(self._worker)
        parts = {"client": own_seconds(), "main": main, "pool": tree_seconds(self._worker) - main}
        return {**parts, **{name: tree_seconds(root) for name, root in self._trees.items()}}

    def stop(self) -> Usage:
        """Return what was used since this meter was made."""
        now = self._read()
        parts = {name: now[name] - before for name, before in self._before.items()}
        return Usage(parts, max(0.0, machine_seconds() - self._machine - sum(parts.values())))


def spread(values: Sequence[float], digits: int = 0) -> str:
    """Return median, minimum and maximum as text."""
    median, low, high = statistics.median(values), min(values), max(values)
    return f"{median:.{digits}f} ({low:.{digits}f}-{high:.{digits}f})"


def machine() -> str:
    """Return what a figure of this machine should be quoted with."""
    packages = ", ".join(f"{name} {version(name)}" for name in ("celery", "kombu", "psycopg", "redis"))
    load = os.getloadavg()[0]
    return f"Python {platform.python_version()}, {packages}, {os.cpu_count()} cores, load {load:.1f} at the start"
