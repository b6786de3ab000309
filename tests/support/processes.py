"""Starting processes that do not outlive the tests."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

from pgqrs_celery.embedded import supervisor

__all__ = ["ROOT", "in_child", "start_process"]

#: The directory from which ``tests`` and the package under test can be imported.
ROOT: Final = Path(__file__).parents[2]


def start_process(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    """Start a program in a process group of its own; on Linux it gets a SIGTERM when this process ends, however."""
    leash = [sys.executable, "-I", "-S", supervisor.__file__, "leash", str(os.getpid())]
    return subprocess.Popen([*leash, *command], start_new_session=True, **options)


def in_child(work: Callable[[], Any]) -> str:
    """Run something in a forked child; returns what it returned, or its error, as text."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.write(writing, repr(work()).encode())
        except BaseException as error:  # noqa: BLE001 - told to the parent
            os.write(writing, f"raised {error!r}".encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read().decode()
    os.waitpid(child, 0)
    return answer
