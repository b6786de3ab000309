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

__all__ = ["SourceMissing", "archive", "extract", "unpacked"]


class SourceMissing(Exception):
    """A source distribution cannot be had; the message says why."""


def archive(project: str) -> Path:
    """Return the source distribution of the installed version of ``project``, downloaded once per machine.

    Raises ``SourceMissing``.
    """
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "pgqrs-celery" / "sdists"
    home.mkdir(parents=True, exist_ok=True)
    release = version(project)
    path = home / f"{project}-{release}.tar.gz"
    lock = wait_for(lambda: FileLock.try_exclusive(path.with_suffix(".lock")), 120, f"another process to fetch {path}")
    try:
        if not path.is_file():
            _download(f"{project}=={release}", home)
    finally:
        lock.close()
    return path


def _download(requirement: str, directory: Path) -> None:
    command = ["-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest", str(directory)]
    done = subprocess.run(
        [_python_with_pip(), *command, requirement], capture_output=True, text=True, check=False, cwd=directory
    )
    if done.returncode:
        raise SourceMissing(f"the sources of {requirement} cannot be fetched: {done.stderr.strip()[-500:]}")


def _python_with_pip() -> str:
    """Return an interpreter that has pip: this one, or the one its virtual environment was made from."""
    for python in (sys.executable, getattr(sys, "_base_executable", sys.executable)):
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            return python
    raise SourceMissing(f"{sys.executable} has no pip to fetch sources with; python3 -m ensurepip would install it")


def extract(sdist: Path, target: Path) -> None:
    """Extract a source distribution into a directory."""
    trust = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}  # Python 3.11.4 and newer have it
    with tarfile.open(sdist) as archived:
        archived.extractall(target, **trust)


@cache
def unpacked(project: str) -> Path:
    """Return the unpacked source distribution of a project; skips the module that asks where it cannot be had."""
    try:
        path = archive(project)
    except SourceMissing as error:
        if os.environ.get("CI"):
            pytest.fail(str(error))
        pytest.skip(str(error), allow_module_level=True)
    directory = path.with_name(path.name.removesuffix(".tar.gz"))
    lock = wait_for(lambda: FileLock.try_exclusive(path.with_suffix(".lock")), 120, f"another process to unpack {path}")
    try:
        if not directory.is_dir():
            extract(path, path.parent)
    finally:
        lock.close()
    return directory
