"""Tables for people and for pipes.

On a terminal, and where rich is installed (the extra ``cli``), a table is drawn; otherwise it is tab-separated lines
under a line of names, so that ``cut`` and ``awk`` can be used on it.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timedelta
from typing import Any, Final
from uuid import UUID

import click

try:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text
except ImportError:
    RICH = False
else:
    RICH = True

__all__ = ["ago", "as_json", "moment", "print_fields", "print_table", "took"]

#: The colours of statuses.
COLORS: Final[Mapping[str, str]] = {
    "QUEUED": "cyan",
    "RUNNING": "blue",
    "PAUSED": "yellow",
    "SUCCESS": "green",
    "FAILED": "red",
    "CANCELLED": "magenta",
}


def print_table(names: Sequence[str], rows: Iterable[Sequence[str]], *, color: bool = True) -> None:
    """Print rows of text under their names."""
    if not (RICH and sys.stdout.isatty()):
        click.echo("\t".join(names))
        for row in rows:
            click.echo("\t".join(_one_line(cell) for cell in row))
        return
    table = Table(*names, box=SIMPLE_HEAD, pad_edge=False)
    for row in rows:
        table.add_row(*(Text(cell, style=COLORS.get(cell, "")) for cell in row))
    Console(no_color=not color or None, highlight=False).print(table)


def print_fields(fields: Iterable[tuple[str, str]]) -> None:
    """Print names and values, one pair a line; empty values are left out."""
    shown = [(name, value) for name, value in fields if value]
    width = max((len(name) for name, _ in shown), default=0)
    for name, value in shown:
        click.echo(f"{name + ':':<{width + 1}} {_one_line(value)}")


def as_json(record: Any, **payloads: Any) -> dict[str, Any]:
    """Return a record as what ``json`` can write; payload columns are shown as the JSON they hold."""
    fields = {name: _plain(name, value) for name, value in asdict(record).items()}
    return {**fields, **payloads}


def moment(at: datetime | None) -> str:
    """Return a time to the second, in the local zone."""
    return at.astimezone().strftime("%Y-%m-%d %H:%M:%S") if at else ""


def took(begin: datetime | None, end: datetime | None) -> str:
    """Return the time between two moments."""
    return ago((end - begin).total_seconds()) if begin and end else ""


def ago(seconds: float) -> str:
    """Return a duration: ``0.25 s``, ``12.0 s``, or hours, minutes and seconds."""
    if seconds < 1:
        return f"{max(seconds, 0.0):.2f} s"
    return f"{seconds:.1f} s" if seconds < 60 else str(timedelta(seconds=round(seconds)))


def _one_line(cell: str) -> str:
    return " ".join(cell.split())


def _plain(name: str, value: Any) -> Any:
    if isinstance(value, datetime):
        return value.isoformat()
    if isinstance(value, UUID):
        return str(value)
    if name in ("input", "output", "error", "result") and value is not None:
        return json.loads(value)
    return value
