"""``celery -A app pgqrs …``: install the schema, look at runs, and act on them.

Celery imports this module for every one of its commands, so it imports nothing but click; the commands themselves are
in ``commands`` and are loaded when one of them is used.
"""

from __future__ import annotations

import importlib
from typing import Any

import click
from click_didyoumean import DYMGroup  # type: ignore[import-untyped]

__all__ = ["pgqrs"]

#: The names of the commands, and of the functions in ``commands`` that they are.
COMMANDS = {
    "install": "install",
    "runs": "list_runs",
    "run": "show_run",
    "resume": "resume",
    "cancel": "cancel",
    "pause": "pause",
    "unpause": "unpause",
    "workers": "list_workers",
    "prune": "prune",
}


class LazyGroup(DYMGroup):  # type: ignore[misc]
    """A group whose commands are imported when they are looked up; our own errors end it in one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of ``COMMANDS``."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        """Return a command by its name."""
        if name not in COMMANDS:
            return None
        commands = importlib.import_module("pgqrs_celery.cli.commands")
        command: click.Command = getattr(commands, COMMANDS[name])
        return command

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command; an error of ours becomes ``Error: …`` and exit code 1."""
        errors = importlib.import_module("pgqrs_celery.exceptions")
        try:
            return super().invoke(ctx)
        except errors.PgqrsError as error:
            raise click.ClickException(" ".join(str(error).split())) from error


@click.group(cls=LazyGroup)
def pgqrs(**preload_options: Any) -> None:
    """Durable runs: install the schema, list, resume, cancel."""
