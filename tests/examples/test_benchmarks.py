"""The benchmarks work; what they measure is no matter for a test."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def bench(name: str, *arguments: str) -> str:
    """Run a benchmark as ``dev.py bench`` does and return what it prints."""
    command = [sys.executable, "-m", f"benchmarks.{name}", *arguments]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def test_the_chains_benchmark_counts_what_it_ran_and_compares_the_sides() -> None:
    sides = ("--sides", "plain", "durable", "one-postgres")
    output = bench("chains", *sides, "--rounds", "1", "--chains", "3", "--singles", "2", "--links", "4", "--profile")
    # three at once, and twice two singles: to warm up, and measured
    assert "durable: 7 runs and 28 steps are SUCCESS, 0 executed more than once" in output
    assert re.search(r"^plain Celery, Redis \+ Redis +\d+ \(\d+-\d+\) +1\.00 ", output, re.MULTILINE)
    assert re.search(r"^durable, Redis \+ Redis +\d+ \(\d+-\d+\) +\d+\.\d+ ", output, re.MULTILINE)
    assert "one-postgres: 7 runs and 28 steps are SUCCESS, 0 executed more than once" in output
    assert "2 processes of the pool" in output


def test_the_time_from_a_kill_to_the_resumption_is_measured() -> None:
    output = bench("chains", "--kill", "1", "--victim", "child")
    assert re.search(r"SIGKILL of a child -> begun again: \d+\.\d+ ", output)


def test_the_hot_statements_are_measured_with_and_without_a_past() -> None:
    output = bench("hot_statements", "--finished", "200", "--waiting", "50", "--rounds", "20")
    assert "200 finished runs and 50 waiting steps entered" in output
    assert len(re.findall(r"^[a-z].* +\d+ +\d+ +\d+\.\d\d", output, re.MULTILINE)) == 10
