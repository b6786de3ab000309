#!/usr/bin/env python3
"""Everything a developer needs, with nothing installed but Python 3.11 or newer and pip.

    python3 dev.py demo                    kill workers and watch their work go on
    python3 dev.py test [pytest options]   the test suite
    python3 dev.py lint                    ruff, mypy, import-linter
    python3 dev.py bench [name] [options]  a benchmark; without a name, which ones there are
    python3 dev.py conformance [options]   Celery's own integration suite against this package

The first use of a command makes .venv and installs this package and what the command needs into it; after that it
takes no time. No other Python is touched: that works as root, as a normal user, where the system's Python is
"externally managed", and without the packages python3-venv and ensurepip. pip's own settings (pip.conf,
PIP_INDEX_URL, PIP_CERT ...) are respected.
"""

# Written so that an older Python gets as far as the message that it is too old.

import argparse
import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

OLDEST = (3, 11)
ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"

#: The extras of pyproject.toml each command needs.
EXTRAS = {
    "demo": ["cli", "embedded"],
    "test": ["test"],
    "lint": ["test"],
    "bench": ["bench"],
    "conformance": ["conformance"],
}

#: Six at a time on two cores: tests of whole workers wait as much as they compute.
PARALLEL = ["-n", "6", "--dist", "worksteal"]

LINTERS = [["ruff", "check", "."], ["ruff", "format", "--check", "."], ["mypy"], ["lint-imports"]]


class Stop(Exception):
    """Ends the program with a message."""


def check_version(version=sys.version_info, which=shutil.which):
    """Raise `Stop` if this Python is too old, naming a newer one if there is one."""
    if tuple(version[:2]) >= OLDEST:
        return
    newer = next((name for name in (f"python3.{minor}" for minor in range(14, 10, -1)) if which(name)), None)
    raise Stop(
        f"Python 3.11 or newer is needed; this is {version[0]}.{version[1]} ({sys.executable}). "
        + (f"Try: {newer} dev.py" if newer else "Install a newer one and run it as: python3.11 dev.py")
    )


def fingerprint():
    """What the content of .venv depends on."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes())
    digest.update(str(ROOT).encode())  # an editable installation names its place
    return digest.hexdigest()


class Stamp:
    """What has been installed into .venv: the fingerprint it was made from, and the extras."""

    def __init__(self, path):
        self.path = path

    def missing(self, extras, current):
        """The extras to install now: none, or all there have ever been with the wanted ones."""
        try:
            known = json.loads(self.path.read_text())
        except (FileNotFoundError, ValueError):
            known = {"fingerprint": None, "extras": []}
        wanted = sorted({*known["extras"], *extras})
        if known["fingerprint"] == current and wanted == known["extras"]:
            return []
        return wanted

    def write(self, extras, current):
        self.path.write_text(json.dumps({"fingerprint": current, "extras": extras}))


@contextmanager
def only_one():
    """Let one process at a time work on .venv."""
    import fcntl

    VENV.mkdir(exist_ok=True)
    directory = os.open(str(VENV), os.O_RDONLY)
    try:
        fcntl.flock(directory, fcntl.LOCK_EX)
        yield
    finally:
        os.close(directory)


def run(command, what, **options):
    """Run ``command``; raise `Stop` saying ``what`` failed."""
    if subprocess.run([str(part) for part in command], check=False, **options).returncode != 0:
        raise Stop(f"{what} failed; the command was: {' '.join(map(str, command))}")


def find_pip():
    """The command of a pip that can install into .venv."""
    base = getattr(sys, "_base_executable", None) or sys.executable
    for python in dict.fromkeys([sys.executable, base, str(PYTHON)]):
        if subprocess.run([python, "-m", "pip", "--version"], capture_output=True, check=False).returncode == 0:
            return [python, "-m", "pip", "--python", str(PYTHON)]
    if importlib.util.find_spec("ensurepip"):
        run([PYTHON, "-m", "ensurepip"], "installing pip into .venv", stdout=subprocess.DEVNULL)
        return [str(PYTHON), "-m", "pip"]
    raise Stop(f"{sys.executable} has no pip; install it (Debian, Ubuntu: apt install python3-pip) and try again")


def working(python):
    """Whether .venv has an interpreter that runs: the one it was made with may have been removed since."""
    try:
        return subprocess.run([str(python), "-c", ""], check=False).returncode == 0
    except OSError:
        return False


def set_up(extras):
    """Make .venv, or bring it up to date, if it lacks something."""
    if os.name != "posix":
        raise Stop("dev.py needs Linux or macOS (on Windows: the Linux subsystem)")
    current = fingerprint()
    stamp = Stamp(VENV / "dev.json")
    if PYTHON.exists() and not stamp.missing(extras, current):
        return
    with only_one():
        if not working(PYTHON):
            stamp.path.unlink(missing_ok=True)
            print("Making .venv (only once) ...", file=sys.stderr, flush=True)
            run([sys.executable, "-m", "venv", "--clear", "--without-pip", VENV], "making .venv")
        wanted = stamp.missing(extras, current)
        if not wanted:  # another process was faster
            return
        requirement = f".[{','.join(wanted)}]"
        print(f"Installing {requirement} into .venv ...", file=sys.stderr, flush=True)
        options = ["--disable-pip-version-check", "--quiet", "install", "--editable", requirement]
        environment = dict(os.environ, PIP_ROOT_USER_ACTION="ignore")
        run([*find_pip(), *options], "the installation", cwd=str(ROOT), env=environment)
        stamp.write(wanted, current)


def benchmarks():
    """The names of the benchmarks."""
    return sorted(path.stem for path in (ROOT / "benchmarks").glob("[!_]*.py"))


def command_line(command, arguments):
    """What the interpreter in .venv is to run."""
    if command == "demo":
        return ["-m", "examples.demo", *arguments]
    if command == "test":
        return ["-m", "pytest", *PARALLEL, *arguments]
    if command == "conformance":
        return ["-m", "tests.conformance", *arguments]
    name = arguments[0] if arguments else ""
    if name not in benchmarks():
        raise Stop("python3 dev.py bench NAME, where NAME is one of: " + ", ".join(benchmarks()))
    return ["-m", "benchmarks." + name, *arguments[1:]]


def lint():
    """Run every linter, whatever the others say; 1 if one of them complains."""
    failed = []
    for linter in LINTERS:
        print("$", *linter, flush=True)
        if subprocess.run([str(VENV / "bin" / linter[0]), *linter[1:]], check=False).returncode != 0:
            failed.append(" ".join(linter))
    print("failed: " + ", ".join(failed) if failed else "all clean", flush=True)
    return 1 if failed else 0


def main(argv):
    parser = argparse.ArgumentParser(
        "dev.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, usage=argparse.SUPPRESS
    )
    parser.add_argument("command", choices=sorted(EXTRAS))
    # Only the first argument is ours; the others belong to the command.
    command, arguments = parser.parse_args(argv[:1]).command, argv[1:]
    check_version()
    program = [] if command == "lint" else command_line(command, arguments)
    set_up(EXTRAS[command])
    os.chdir(str(ROOT))
    os.environ["VIRTUAL_ENV"] = str(VENV)
    os.environ["PATH"] = str(VENV / "bin") + os.pathsep + os.environ.get("PATH", os.defpath)
    # The tests start hundreds of processes; without bytecode each of them would compile what it imports.
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if command == "lint":
        return lint()
    sys.stdout.flush()
    os.execv(str(PYTHON), [str(PYTHON), *program])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except Stop as stop:
        sys.exit(str(stop))
    except KeyboardInterrupt:
        sys.exit(130)
