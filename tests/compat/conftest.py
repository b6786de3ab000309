"""A store of the test's own, and programs in processes of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from pgqrs_celery.compat.pgqrs import Store
from pgqrs_celery.embedded.binaries import find_postgres

ROOT = Path(__file__).parents[2]

Program = Callable[..., "subprocess.Popen[str]"]


@pytest.fixture
def store(database_dsn: str, installed_schema: str) -> Iterator[Store]:
    """A store whose schema is installed."""
    made = Store(database_dsn, installed_schema)
    yield made
    made.ledger.database.close()


@pytest.fixture
def program(tmp_path: Path) -> Iterator[Program]:
    """Start a program's text in a process of its own, with arguments; killed at the end if it is still there."""
    started: list[subprocess.Popen[str]] = []

    def start(text: str, *arguments: str) -> subprocess.Popen[str]:
        path = tmp_path / "program.py"
        path.write_text(text, "utf-8")
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8", "PYTHONUNBUFFERED": "1"}
        process = subprocess.Popen(
            [sys.executable, str(path), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            encoding="utf-8",
            env=environment,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def output(process: subprocess.Popen[str]) -> str:
    """Return what a program printed; it must end well."""
    stdout, stderr = process.communicate(timeout=90)
    assert process.returncode == 0, stderr
    return stdout


def psql(dsn: str, text: str) -> list[str]:
    """Return the rows that the server's own psql prints."""
    answer = subprocess.run(
        [find_postgres().program("psql"), "-X", "-q", "-A", "-t", "-v", "ON_ERROR_STOP=1", "-d", dsn],
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    return answer.stdout.splitlines()
