"""Run Celery's own integration suite against a broker and a result backend.

    python -m tests.conformance                                  Redis as the broker, this package's backend
    python -m tests.conformance --broker pgqrs://                everything on one embedded Postgres; kombu's suite, too
    python -m tests.conformance --broker URL --backend URL       any others
    python -m tests.conformance --baseline                       Redis and Redis first, then compare
    python -m tests.conformance -- -k chord -x                   with options for pytest

Servers that are not named are embedded ones of its own. Celery's tests keep notes in a Redis whatever the broker is,
so one always runs. Nothing is run a second time to make it pass. The exit code is 1 if a test fails, with
``--baseline`` only if it passes on Redis.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

from pgqrs_celery import embedded
from tests.conformance.suite import EXCLUDED, FILES, deselected, unpack
from tests.support.sdist import archive

#: Stands for the embedded Postgres that the results go to.
HERE = "pgqrs://"

ROOT = Path(__file__).resolve().parents[2]


@dataclass
class Report:
    """What one run said."""

    name: str
    tests: int = 0
    skipped: int = 0
    seconds: float = 0.0
    failed: set[str] = field(default_factory=set)

    @classmethod
    def read(cls, name: str, junit: Path) -> Report:
        """Return the report in a JUnit file; subtests count with their test."""
        report = cls(name)
        seen: set[str] = set()
        for case in ElementTree.parse(junit).iter("testcase"):
            test = f"{case.get('classname')}::{case.get('name')}"
            first = test not in seen
            seen.add(test)
            report.seconds += float(case.get("time", 0))
            report.tests += first
            report.skipped += first and case.find("skipped") is not None
            if case.find("failure") is not None or case.find("error") is not None:
                report.failed.add(test)
        return report

    def __str__(self) -> str:
        passed = self.tests - self.skipped - len(self.failed)
        counts = f"{passed} passed, {len(self.failed)} failed, {self.skipped} skipped or expected to fail"
        return f"{self.name}: {counts}, {self.seconds:.0f} s"


def run(broker: str, backend: str, notes: str, options: argparse.Namespace) -> Report:
    """Run the suite once; its output goes to the terminal."""
    address = urlsplit(notes)
    environment = {
        **os.environ,
        "TEST_BROKER": broker,
        "TEST_BACKEND": backend,
        "REDIS_HOST": address.hostname or "127.0.0.1",
        "REDIS_PORT": str(address.port),
        "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "WORKER_LOGLEVEL": "INFO",
    }
    with tempfile.TemporaryDirectory(prefix="pgqrs-conformance-") as directory:
        target = Path(directory)
        opened = unpack(archive("celery"), target)
        name = f"{broker.split(':')[0]} / {backend.split(':')[0]}"
        print(f"== {name}: {opened} conditions on the backend lifted", flush=True)
        command = [sys.executable, "-m", "pytest", "-q", "-rfE", "--timeout", str(options.timeout)]
        command += ["-p", "no:cacheprovider", "-p", "no:rerunfailures", f"--junitxml={target / 'report.xml'}"]
        command += ["-p", "pgqrs_celery"] if broker.startswith("pgqrs") else []
        command += deselected(backend) + [f"t/integration/{name}" for name in options.files] + options.pytest
        subprocess.run(command, cwd=target, env=environment, check=False)
        if not (target / "report.xml").exists():
            raise SystemExit("the suite did not run")
        return Report.read(name, target / "report.xml")


def main() -> int:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser("tests.conformance", description=__doc__.split("\n")[0])
    parser.add_argument("--broker", help="broker URL (default: an embedded Redis)")
    parser.add_argument("--backend", help="result backend URL (default: this package's, on an embedded Postgres)")
    parser.add_argument("--baseline", action="store_true", help="run with Redis and Redis first, and compare")
    parser.add_argument("--files", nargs="+", default=FILES, help="files of t/integration")
    parser.add_argument("--timeout", type=int, default=300, help="seconds a test may take")
    parser.add_argument("pytest", nargs="*", help="options for pytest, after --")
    options = parser.parse_args()
    home = embedded.new_directory("pgqrs-conformance-")
    reports = []
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, home, ignore_errors=True)
        redis = stack.enter_context(embedded.redis_server())
        if options.baseline:
            reports.append(run(redis.url, redis.url, redis.url, options))
        backend = options.backend
        if backend is None or backend == HERE:
            postgres = stack.enter_context(embedded.PostgresServer(home / "postgres")).start()
            stack.callback(postgres.stop)
            backend = f"pgqrs+{postgres.dsn()}&pgqrs_auto_install=true"
        broker = backend if options.broker == HERE else options.broker or redis.url
        if options.broker == HERE:
            reports.insert(0, run_kombu())
        reports.append(run(broker, backend, redis.url, options))
    return conclude(reports, baseline=options.baseline)


def run_kombu() -> Report:
    """Run kombu's integration tests for a transport against the Postgres broker."""
    with tempfile.TemporaryDirectory(prefix="pgqrs-conformance-") as directory:
        report = Path(directory) / "report.xml"
        command = [sys.executable, "-m", "pytest", "-q", f"--junitxml={report}", "tests/broker/test_kombu_suite.py"]
        print("== kombu's suite", flush=True)
        subprocess.run(command, cwd=ROOT, check=False)
        return Report.read("kombu's suite / the Postgres broker", report)


def conclude(reports: list[Report], *, baseline: bool) -> int:
    """Print the figures and the differences; return the exit code."""
    print()
    for report in reports:
        print(report)
    print(f"left out, because they look inside Redis: {', '.join(EXCLUDED)}")
    theirs = reports.pop(-2).failed if baseline else set()
    ours = set[str]().union(*(report.failed for report in reports))
    for test in sorted(ours - theirs):
        print(f"FAILED{' here only' if baseline else ''}: {test}")
    for test in sorted(ours & theirs):
        print(f"failed on Redis, too: {test}")
    for test in sorted(theirs - ours):
        print(f"failed on Redis only: {test}")
    return 1 if ours - theirs else 0


if __name__ == "__main__":
    sys.exit(main())
