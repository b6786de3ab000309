"""What the demo shows: live tables where rich and a terminal are there, plain lines otherwise."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Protocol

try:
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress_bar import ProgressBar
    from rich.table import Table
    from rich.text import Text
except ImportError:
    RICH = False
else:
    RICH = True

__all__ = ["COLUMNS", "Plain", "Progress", "Row", "Screen", "View", "screen"]

COLUMNS = ("step", "status", "attempts", "worker", "seconds")
STYLES = {"QUEUED": "cyan", "RUNNING": "blue", "SUCCESS": "green", "FAILED": "red"}


@dataclass(frozen=True, slots=True)
class Row:
    """One step as it stands."""

    step: str
    status: str
    attempts: int
    worker: str
    seconds: float | None

    def cells(self) -> tuple[str, ...]:
        """Return the row as text."""
        took = f"{self.seconds:.1f}" if self.seconds is not None else ""
        return self.step, self.status, str(self.attempts), self.worker, took


@dataclass(frozen=True, slots=True)
class Progress:
    """How far one execution of a long step has come."""

    name: str
    done: int
    total: int
    unit: str


@dataclass(frozen=True, slots=True)
class View:
    """What is to be seen at one moment."""

    rows: Sequence[Row] = ()
    progress: Sequence[Progress] = field(default=())


class Screen(Protocol):
    """Where the demo speaks."""

    def title(self, text: str) -> None:
        """Begin an act."""

    def say(self, text: str) -> None:
        """Tell something that happened now."""

    @contextmanager
    def live(self) -> Iterator[None]:
        """Show what ``update`` is given until the end of the block."""

    def update(self, view: View) -> None:
        """Show the present state."""

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Show a table that stays."""

    def claim(self, held: bool, text: str, evidence: str) -> None:
        """Show whether a claim held, and why one should believe it."""


class Plain:
    """One line per change, with the seconds since the beginning."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._shown: dict[str, tuple[str, ...]] = {}
        self._steps: dict[str, int] = {}

    def _line(self, text: str) -> None:
        print(f"{time.monotonic() - self._began:6.1f} s  {text}", flush=True)

    def title(self, text: str) -> None:
        """Begin an act."""
        print(f"\n== {text} ==", flush=True)

    def say(self, text: str) -> None:
        """Tell something that happened now."""
        self._line(text)

    @contextmanager
    def live(self) -> Iterator[None]:
        """Forget what was shown before."""
        self._shown.clear()
        self._steps.clear()
        yield

    def update(self, view: View) -> None:
        """Print the steps that changed, and every quarter of a long one."""
        for row in view.rows:
            if self._shown.get(row.step) != row.cells():
                self._shown[row.step] = row.cells()
                where = f" on {row.worker}" if row.worker else ""
                self._line(f"{row.step}: {row.status}{where}, attempt {row.attempts}")
        for progress in view.progress:
            quarter = 4 * progress.done // max(progress.total, 1)
            if self._steps.get(progress.name, 0) < quarter:
                self._steps[progress.name] = quarter
                self._line(f"  {progress.name}: {progress.done} of {progress.total} {progress.unit}")

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Print a table in columns."""
        widths = [max(len(row[i]) for row in [columns, *rows]) for i in range(len(columns))]
        for row in [columns, *rows]:
            print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip(), flush=True)

    def claim(self, held: bool, text: str, evidence: str) -> None:
        """Print a verdict."""
        print(f"[{'ok' if held else 'NO'}] {text} ({evidence})", flush=True)


class Rich:
    """Live tables on a terminal."""

    def __init__(self) -> None:
        self._console = Console(highlight=False)
        self._began = time.monotonic()
        self._live: Live | None = None

    def title(self, text: str) -> None:
        """Begin an act."""
        self._console.rule(f"[bold]{text}")

    def say(self, text: str) -> None:
        """Tell something that happened now; during ``live`` it appears above the table."""
        self._console.print(Text(f"{time.monotonic() - self._began:6.1f} s  ", style="dim") + Text(text))

    @contextmanager
    def live(self) -> Iterator[None]:
        """Redraw in place what ``update`` is given."""
        with Live(console=self._console, refresh_per_second=12, transient=True) as self._live:
            yield
        self._live = None

    def update(self, view: View) -> None:
        """Redraw."""
        if self._live is None:
            return
        bars = Table.grid(padding=(0, 2))
        for progress in view.progress:
            bar = ProgressBar(total=progress.total, completed=progress.done, width=40)
            bars.add_row(progress.name, bar, f"{progress.done}/{progress.total} {progress.unit}")
        self._live.update(Group(self._drawn(COLUMNS, [row.cells() for row in view.rows]), bars))

    @staticmethod
    def _drawn(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
        table = Table(*columns)
        for row in rows:
            table.add_row(*(Text(cell, style=STYLES.get(cell, "")) for cell in row))
        return table

    def table(self, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Draw a table that stays."""
        self._console.print(self._drawn(columns, rows))

    def claim(self, held: bool, text: str, evidence: str) -> None:
        """Print a verdict."""
        mark = Text("✓ ", style="bold green") if held else Text("✗ ", style="bold red")
        self._console.print(mark + Text(text) + Text(f"  ({evidence})", style="dim"))


def screen(*, plain: bool) -> Screen:
    """Return the best screen there is."""
    return Rich() if RICH and sys.stdout.isatty() and not plain else Plain()
