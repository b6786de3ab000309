"""Source distributions of the packages under us, for the test suites that are only in them."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from functools import cache
from importlib.metadata import version
from pathlib import Path

import pytest

from pgqrs_celery.embedded.locks import FileLock
from tests.support.waiting import wait_for


@cache
def unpacked(project: str) -> Path:
    """The unpacked source distribution of the installed version of ``project``, fetched once per machine."""
    name = f"{project}-{version(project)}"
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgqrs-celery" / "sdists"
    home.mkdir(parents=True, exist_ok=True)
    lock = wait_for(lambda: FileLock.try_exclusive(home / f"{name}.lock"), 120, f"another process to fetch {name}")
    try:
        if not (home / name).is_dir():
            _fetch(project, name, home)
    finally:
        lock.close()
    return home / name


def _fetch(project: str, name: str, home: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:"]
    pinned = name.replace(f"{project}-", f"{project}==")
    done = subprocess.run([*command, "--dest", str(home), pinned], capture_output=True, text=True, check=False)
    if done.returncode:
        reason = f"the sources of {name} cannot be fetched: {done.stderr.strip().splitlines()[-1]}"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason, allow_module_level=True)
    with tarfile.open(home / f"{name}.tar.gz") as archive:
        archive.extractall(home, filter="data")
