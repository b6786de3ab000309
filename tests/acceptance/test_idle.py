"""What a worker costs that has nothing to do: by the log of the server, with the settings as they come."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any, Final

import psycopg
import pytest
from celery import Celery

from pgqrs_celery import embedded
from pgqrs_celery.db import Database
from pgqrs_celery.store import migrations
from pgqrs_celery.store.messages import LONGEST_LOOK
from tests.support.processes import ROOT, start_process
from tests.support.waiting import wait_for

#: A broker's keeper looks: the only statement that asks for this.
LOOK: Final = "AS registered"
#: Looks of each keeper that are measured over, and the seconds between two of them at which it certainly rests.
ROUNDS: Final = 3
RESTING: Final = 5.0
#: Seconds; statements that are not further apart are of one look.
TOGETHER: Final = 0.5
#: The settings' lease, after which nobody has to be given time to come back; then some looks.
PATIENCE: Final = 100.0

# A test waits for several things, one after the other.
pytestmark = [pytest.mark.long, pytest.mark.timeout(300)]


class Server:
    """A server that logs every statement, with the time and the process it served."""

    def __init__(self, server: embedded.PostgresServer) -> None:
        self.server = server
        self.url = f"pgqrs+{server.dsn()}"
        database = Database(server.dsn())
        migrations.install(database)
        with database.session() as session:
            for setting in ("log_statement = 'all'", "log_line_prefix = '@%n %p '"):
                session.connection.execute(f"ALTER SYSTEM SET {setting}".encode())
            session.connection.execute("SELECT pg_reload_conf()")
        database.close()

    def log(self) -> str:
        """What the server has logged."""
        return "".join(path.read_text(errors="replace") for path in self.server.directory.glob("*.log"))

    def statements(self) -> list[tuple[float, str]]:
        """When each statement began, and its text."""
        lines = re.split(r"^@(?=[\d.]+ \d+ )", self.log(), flags=re.MULTILINE)[1:]
        return [
            (float(line.split(" ", 1)[0]), line)
            for line in lines
            if re.match(r"[\d.]+ \d+ LOG:  (?:statement|execute \S+): ", line)
        ]

    def rests_until(self, consumer: str) -> float | None:
        """Until when a consumer's keeper certainly does not look by itself, if it rests and has looked just now."""
        looks = self.looks_of(consumer)
        rests = len(looks) > 1 and looks[-1] - looks[-2] > RESTING and time.time() - looks[-1] < 1.0
        return looks[-1] + LONGEST_LOOK - 1.0 if rests else None

    def rests_at_all(self, consumer: str) -> bool:
        """Whether a consumer's keeper has rested."""
        looks = self.looks_of(consumer)
        return any(other - one > RESTING for one, other in pairwise(looks))

    def looks_of(self, consumer: str) -> list[float]:
        """When statements were sent that name a consumer: while it sleeps its keeper says that it lives, and looks."""
        found = re.findall(rf"^@([\d.]+) \d+ DETAIL:  .*{consumer}", self.log(), re.MULTILINE)
        moments = [float(at) for at in found]
        return [at for before, at in pairwise([0.0, *moments]) if at - before > TOGETHER]

    def consumer(self, pid: int) -> str:
        """The consumer of a worker."""
        with psycopg.connect(self.server.dsn()) as connection:
            row = connection.execute("SELECT consumer_id::text FROM pgqrs_consumers WHERE pid = %s", [pid]).fetchone()
        assert row is not None
        found: str = row[0]
        return found

    def quiet_stretch(self, workers: int) -> list[float]:
        """When statements began, over the last rounds of keepers that rest; empty while they do not."""
        logged = self.statements()
        looks = [at for at, line in logged if LOOK in line][-ROUNDS * workers - 1 :]
        if len(looks) <= ROUNDS * workers or looks[-1] - looks[0] < ROUNDS * RESTING:
            return []
        return [at for at, _ in logged if looks[0] <= at < looks[-1]] + [looks[-1]]


@pytest.fixture
def server(own_postgres: embedded.PostgresServer) -> Server:
    """A server that logs every statement."""
    return Server(own_postgres)


@pytest.fixture
def start(server: Server, tmp_path: Path) -> Iterator[Callable[[str], int]]:
    """Start workers that end with the test; returns their pids."""
    started: list[subprocess.Popen[bytes]] = []

    def begin(name: str) -> int:
        log = tmp_path / f"{name}.log"
        command = [sys.executable, "-m", "celery", "-A", "tests.support.idle_app", "worker", "-l", "INFO"]
        environment = {**os.environ, "IDLE_TEST_URL": server.url}
        with log.open("wb") as output:
            process = start_process(
                [*command, "-c", "1", "-n", f"{name}@%h"], stdout=output, stderr=output, cwd=ROOT, env=environment
            )
        started.append(process)
        wait_for(lambda: "ready." in log.read_text(), 60, f"worker {name}: {log.read_text()}")
        return process.pid

    yield begin
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.parametrize("workers", [2])
def test_a_worker_with_nothing_to_do_sends_at_most_one_statement_a_second(
    workers: int, server: Server, start: Callable[[str], int]
) -> None:
    for number in range(workers):
        start(f"w{number}")
    rates: list[float] = []

    def economical() -> bool:
        # Housekeeping comes in bursts minutes apart: a stretch that has one in it is not what a worker always costs.
        moments = server.quiet_stretch(workers)
        if moments:
            rates.append((len(moments) - 1) / (moments[-1] - moments[0]) / workers)
        return bool(rates) and rates[-1] <= 1.0

    try:
        wait_for(economical, PATIENCE, "keepers that rest")
    except AssertionError as error:
        seen = Counter(line.split(": ", 1)[1][:60] for _, line in server.statements())
        raise AssertionError(f"{error}; statements per second: {rates[-5:]}; {seen}") from None
    assert rates[-1] > 0.3


@pytest.fixture
def client(server: Server) -> Iterator[Celery]:
    """An app that sends tasks by their names, and listens."""
    app = Celery("client", broker=server.url, backend=server.url, set_as_current=False)
    yield app
    app.close()


def test_a_worker_at_rest_hears_of_a_listener_and_of_an_eta_at_once(
    server: Server, start: Callable[[str], int], client: Celery
) -> None:
    consumer = server.consumer(start("w"))
    until = wait_for(lambda: server.rests_until(consumer), PATIENCE, "a keeper that rests")
    events: list[str] = []

    def on_event(event: dict[str, Any]) -> None:
        events.append(event["type"])
        receiver.should_stop = True

    with client.connection_for_read() as connection:
        receiver = client.events.Receiver(connection, handlers={"*": on_event})
        receiver.capture(limit=None, timeout=until - time.time(), wakeup=False)  # TimeoutError where nothing comes
    assert events == ["worker-heartbeat"]
    assert time.time() < until  # the receiver counts whole seconds
    until = wait_for(lambda: server.rests_until(consumer), PATIENCE, "a keeper that rests again")
    result: Any = client.send_task("tests.support.idle_app.plain", ["x"], countdown=2.0)
    assert result.get(timeout=until - time.time()) == "x"


def test_a_worker_at_rest_takes_over_at_once_from_one_that_is_killed(
    server: Server, start: Callable[[str], int], client: Celery, tmp_path: Path
) -> None:
    pids = [start("w1"), start("w2")]
    consumers = [server.consumer(pid) for pid in pids]
    journal = tmp_path / "journal"

    def begun() -> list[int]:
        return [int(pid) for pid in journal.read_text().split()] if journal.exists() else []

    wait_for(lambda: all(map(server.rests_at_all, consumers)), PATIENCE, "keepers that rest")
    client.send_task("tests.support.idle_app.hold", [str(journal)])
    ((victim,),) = [wait_for(begun, 20, "the task to begin")]
    survivor = consumers[1 - pids.index(victim)]
    until = wait_for(lambda: server.rests_until(survivor), PATIENCE, "the other worker to rest")
    os.killpg(victim, signal.SIGKILL)
    wait_for(lambda: len(begun()) == 2, until - time.time(), "the task to begin again")
