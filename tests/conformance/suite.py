"""The suite: fetched at run time, never kept here, and with the doors opened that are closed to all but Redis."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Final

from tests.support.sdist import extract

__all__ = ["EXCLUDED", "FILES", "deselected", "unpack"]

#: The parts of ``t/integration`` that are about results, canvases, tasks and workers.
FILES: Final = (
    "test_canvas.py",
    "test_tasks.py",
    "test_inspect.py",
    "test_group_chains.py",
    "test_serialization.py",
    "test_loader.py",
)

#: Tests that cannot say anything about another backend than Redis, because they look inside Redis.
EXCLUDED: Final = {
    "test_canvas.py::test_chord::test_chord_on_error": "counts the chord keys of the Redis backend",
    "test_canvas.py::test_chord::test_redis_subscribed_channels_leak": "counts the PUBSUB channels of Redis",
    "test_tasks.py::test_task_redis_result_backend": "counts the PUBSUB channels of Redis",
}

#: What upstream skips unless the backend is Redis: the condition as it is written there, and what takes its place.
DOORS: Final = (
    (
        re.compile(r"result_backend\.startswith\(\(?(?P<known>['\"]redis['\"](?:, ?'rpc')?)\)?\)"),
        r"result_backend.startswith((\g<known>, 'pgqrs'))",
    ),
    (re.compile(r"not isinstance\(manager\.app\.backend, BaseKeyValueStoreBackend\)"), "False"),
)


def unpack(sdist: Path, target: Path) -> int:
    """Unpack the tests into a directory and open the doors; return how many there were."""
    extract(sdist, target / "sdist")
    (source,) = (target / "sdist").iterdir()
    shutil.copytree(source / "t", target / "t")
    shutil.copy(source / "pyproject.toml", target)
    opened = 0
    for path in (target / "t" / "integration").glob("*.py"):
        text = path.read_text()
        for condition, replacement in DOORS:
            text, count = condition.subn(replacement, text)
            opened += count
        path.write_text(text)
    if not opened:
        raise SystemExit("no condition on the backend was found in Celery's suite: this version needs another look")
    return opened


def deselected(backend: str) -> list[str]:
    """Return the pytest options that leave out what is excluded for a backend."""
    if backend.startswith("redis"):
        return []
    return [option for test in EXCLUDED for option in ("--deselect", f"t/integration/{test}")]
