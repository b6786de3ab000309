"""dev.py: what it installs, and when. A tiny project stands in for this one, so that no index is needed."""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import dev

ROOT = Path(__file__).parents[2]

PYPROJECT = """
[build-system]
requires = []
build-backend = "backend"
backend-path = ["."]

[project]
name = "tiny"
version = "1"
"""

# Just enough of a build backend for `pip install --editable`; it counts its builds.
BACKEND = """
import zipfile

def build_editable(directory, config_settings=None, metadata_directory=None):
    with open("builds.log", "a") as log:
        log.write("built\\n")
    name = "tiny-1-py3-none-any.whl"
    extras = "".join(f"Provides-Extra: {extra}\\n" for extra in ("bench", "cli", "embedded", "redis", "test"))
    files = {
        "tiny.py": "answer = 42\\n",
        "tiny-1.dist-info/METADATA": "Metadata-Version: 2.1\\nName: tiny\\nVersion: 1\\n" + extras,
        "tiny-1.dist-info/WHEEL": "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n",
    }
    record = "tiny-1.dist-info/RECORD"
    with zipfile.ZipFile(f"{directory}/{name}", "w") as wheel:
        for path, content in files.items():
            wheel.writestr(path, content)
        wheel.writestr(record, "".join(f"{path},,\\n" for path in [*files, record]))
    return name

build_wheel = build_editable
"""


class Project:
    """A tiny project with our dev.py in it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        shutil.copy(ROOT / "dev.py", root)
        (root / "pyproject.toml").write_text(PYPROJECT)
        (root / "backend.py").write_text(BACKEND)
        (root / "benchmarks").mkdir()
        (root / "benchmarks" / "answers.py").write_text(
            "import sys, tiny; print(sys.prefix, tiny.answer, *sys.argv[1:])"
        )

    def dev(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": os.defpath, "HOME": str(self.root), "PIP_NO_INDEX": "1"}
        command = [sys.executable, "dev.py", *arguments]
        return subprocess.run(command, cwd=self.root, env=environment, capture_output=True, text=True, check=False)

    @property
    def builds(self) -> int:
        log = self.root / "builds.log"
        return len(log.read_text().splitlines()) if log.exists() else 0


def test_a_bare_checkout_sets_itself_up_once_and_again_when_it_failed_or_pyproject_or_python_changed(
    tmp_path: Path,
) -> None:
    project = Project(tmp_path)
    (tmp_path / "backend.py").write_text("raise RuntimeError('broken backend')")
    failed = project.dev("bench", "answers")
    assert failed.returncode != 0
    assert "the installation failed" in failed.stderr

    (tmp_path / "backend.py").write_text(BACKEND)
    first = project.dev("bench", "answers", "--rounds", "3")
    assert first.stdout == f"{tmp_path / '.venv'} 42 --rounds 3\n", first.stderr
    assert project.builds == 1

    again = project.dev("bench", "answers")
    assert (again.stdout, again.stderr) == (f"{tmp_path / '.venv'} 42\n", "")
    assert project.builds == 1

    with (tmp_path / "pyproject.toml").open("a") as pyproject:
        pyproject.write("description = 'changed'\n")
    assert project.dev("bench", "answers").returncode == 0
    assert project.builds == 2

    interpreter = tmp_path / ".venv" / "bin" / "python"
    interpreter.unlink()
    interpreter.symlink_to("/nonexistent/python3")
    repaired = project.dev("bench", "answers")
    assert repaired.stdout == f"{tmp_path / '.venv'} 42\n", repaired.stderr
    assert project.builds == 3


def test_a_further_command_adds_its_extras_and_keeps_the_others(tmp_path: Path) -> None:
    stamp = dev.Stamp(tmp_path / "stamp.json")
    assert stamp.missing(["redis"], "a") == ["redis"]
    stamp.write(["redis"], "a")
    assert stamp.missing(["redis"], "a") == []
    assert stamp.missing(["test"], "a") == ["redis", "test"]
    assert stamp.missing(["redis"], "b") == ["redis"]
    stamp.path.write_text("half a st")
    assert stamp.missing(["redis"], "a") == ["redis"]


def test_the_extras_exist() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert {extra for extras in dev.EXTRAS.values() for extra in extras} <= set(project["optional-dependencies"])


def test_options_reach_the_command_untouched_and_in_order() -> None:
    arguments = ["-k", "redis and not slow", "tests/store", "-x"]
    assert dev.command_line("test", arguments) == ["-m", "pytest", *dev.PARALLEL, *arguments]
    assert dev.command_line("conformance", ["--broker", "redis://"])[-2:] == ["--broker", "redis://"]


def test_an_unknown_benchmark_is_answered_with_the_known_ones(tmp_path: Path) -> None:
    answer = Project(tmp_path).dev("bench", "nonsense")
    assert answer.returncode == 1
    assert "one of: answers" in answer.stderr
    assert not (tmp_path / ".venv").exists()


def test_an_old_python_is_told_so_and_pointed_to_a_newer_one() -> None:
    with pytest.raises(dev.Stop, match=r"3\.11 or newer is needed; this is 3\.9 .*Try: python3\.12 dev\.py"):
        dev.check_version((3, 9), which={"python3.12": "/usr/bin/python3.12"}.get)
    with pytest.raises(dev.Stop, match="Install a newer one"):
        dev.check_version((3, 10), which=lambda name: None)
    dev.check_version((3, 11))
    ast.parse((ROOT / "dev.py").read_text(), feature_version=(3, 7))  # or it would be told of a syntax error


@pytest.mark.parametrize("command", sorted(dev.EXTRAS))
def test_make_only_aliases(command: str) -> None:
    rules = (ROOT / "Makefile").read_text()
    assert command in rules.partition(".PHONY:")[2].split("\n")[0].split()
