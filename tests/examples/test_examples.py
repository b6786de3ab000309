"""Every example prints what its documentation says, on a bare checkout: nothing is given to it but a directory."""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from pgqrs_celery import embedded
from pgqrs_celery.conf import DSN_VARIABLE

ROOT = Path(__file__).parents[2]
EXAMPLES = ["quickstart", "crash_and_resume", "guide_api", "typed_steps"]


def normalized(text: str) -> list[str]:
    """Return the lines of an output without what differs from one execution to the next."""
    text = re.sub(r"\brun \d+", "run N", text)
    text = re.sub(r"\b\d{10}\b", "ORDER", text)
    return [line.rstrip() for line in text.strip().splitlines()]


def documented(example: str) -> list[str]:
    """Return the indented block after ``Expected output`` in the example's docstring."""
    tree = ast.parse((ROOT / "examples" / example / "__main__.py").read_text())
    text = ast.get_docstring(tree) or ""
    _, found, rest = text.partition("Expected output")
    assert found, f"examples.{example} does not document its output"
    block = re.search(r"::\n\n((?:    .*\n|\n)+)", rest + "\n")
    assert block, f"examples.{example} does not document its output"
    return normalized(textwrap.dedent(block[1]))


@pytest.fixture
def home() -> Iterator[Path]:
    """A place for an embedded Postgres of the example's own: apps that share a broker share its queues."""
    directory = embedded.new_directory(f"pgqrs-example-{os.getpid()}-")
    yield directory
    embedded.PostgresServer(directory / "postgres").stop()
    shutil.rmtree(directory)


@pytest.mark.parametrize("example", EXAMPLES)
def test_an_example_prints_what_it_documents(example: str, home: Path) -> None:
    environment = {k: v for k, v in os.environ.items() if k not in (DSN_VARIABLE, "CELERY_BROKER_URL")}
    environment[embedded.HOME_VARIABLE] = str(home)
    answer = subprocess.run(
        [sys.executable, "-m", f"examples.{example}"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert normalized(answer.stdout) == documented(example)


def test_every_example_is_tested() -> None:
    programs = {path.parent.name for path in (ROOT / "examples").glob("*/__main__.py")}
    assert programs - {"demo"} == set(EXAMPLES)
