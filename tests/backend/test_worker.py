"""Real workers, a real broker: chords, errors, callbacks, and children that are killed at every point of a chord."""

from __future__ import annotations

import os
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from celery import chain, chord, group
from celery.exceptions import ChordError

from pgqrs_celery.db import Database
from pgqrs_celery.embedded import RedisServer
from tests.backend.application import BACKEND, BROKER, CRASH, JOURNAL, make_app
from tests.backend.conftest import Spy, close
from tests.support.nursery import start_celery
from tests.support.schemas import Schemas
from tests.support.waiting import wait_for


class Site:
    """A broker, a schema, an app that sends, and the workers of one test or of this module."""

    def __init__(self, broker: str, dsn: str, schema: str, directory: Path, stack: ExitStack) -> None:
        self.directory = directory
        self.journal = directory / "journal"
        backend = f"pgqrs+{dsn}&pgqrs_schema={schema}&application_name={schema}"
        self.app = make_app(broker, backend)
        stack.callback(close, self.app)
        self.spy = Spy(dsn, schema)
        stack.callback(self.spy.connection.close)
        self.environment = {**os.environ, BROKER: broker, BACKEND: backend, JOURNAL: str(self.journal)}
        self._stack = stack

    def sig(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature of this site's app."""
        return self.app.signature(name, args, app=self.app, **options)

    def start(self, **environment: str) -> int:
        """Start a worker, wait until it answers, and return the pid of its main process."""
        return self._stack.enter_context(self._worker(environment))

    @contextmanager
    def _worker(self, environment: dict[str, str]) -> Iterator[int]:
        name = f"w{os.urandom(4).hex()}"
        command = ["-A", "tests.backend.application", "worker", "-c", "2", "-n", f"{name}@h"]
        command += ["--loglevel", "INFO", "--without-gossip", "--without-mingle"]
        output = self.directory / f"{name}.log"
        process = start_celery(command, env=self.environment | environment, output=output)
        try:
            wait_for(lambda: self.app.control.ping(timeout=0.5), timeout=40, what="the worker")
            yield process.pid
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()

    def notes(self) -> Counter[str]:
        """Return how often the tasks noted what."""
        return Counter(self.journal.read_text().splitlines()) if self.journal.exists() else Counter()

    def log(self) -> str:
        """Return what the workers have logged."""
        return "".join(path.read_text() for path in self.directory.glob("w*.log"))

    def closed(self) -> bool:
        """Whether no chord is open."""
        return not self.spy.rows("SELECT 1 FROM {}.pgqrs_chords WHERE open")


#: The numbered Redis database of the shared worker: nobody else's, or that one's worker would take its messages.
OWN_DATABASE = 4093


@pytest.fixture
def site(redis_url: str, database_dsn: str, database: Database, tmp_path: Path) -> Iterator[Site]:
    """A site of the test's own, without a worker."""
    with ExitStack() as stack:
        yield Site(redis_url, database_dsn, database.schema, tmp_path, stack)


@pytest.fixture(scope="module")
def shared(schemas: Schemas, redis_server: RedisServer, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """A site with one worker, for all tests that leave both as they find them."""
    schema, redis = schemas.take(), redis_server.database_url(OWN_DATABASE)
    with ExitStack() as stack:
        site = Site(redis, schemas.dsn, schema, tmp_path_factory.mktemp("site"), stack)
        site.start()
        yield site
    schemas.give_back(schema)


@pytest.fixture
def working(shared: Site) -> Site:
    """The shared site, with an empty journal."""
    shared.journal.unlink(missing_ok=True)
    return shared


def adds(site: Site, n: int) -> list[Any]:
    return [site.sig("add", k, k) for k in range(n)]


def test_what_canvases_return(working: Site) -> None:
    sig = working.sig
    pair = group(adds(working, 2), app=working.app)
    cases: list[tuple[Any, Any]] = [
        (sig("add", 1, 2), 3),
        (group(adds(working, 5), app=working.app), [0, 2, 4, 6, 8]),
        (chain(sig("add", 1, 2), sig("add", 3), sig("add", 4), app=working.app), 10),
        (chord(adds(working, 20), sig("total"), app=working.app), 380),
        (chord([pair, *adds(working, 3)], sig("total"), app=working.app), 8),
        (chord([sig("ignored", 1), sig("add", 1, 1)], sig("total"), app=working.app), 3),
        (chord([chain(sig("add", 1, 1), sig("add", 5)), sig("add", 1, 0)], sig("total"), app=working.app), 8),
        (
            chord([chord(adds(working, 3), sig("total")), chord(adds(working, 2), sig("total"))], sig("total")),
            8,
        ),
        (
            chain(sig("add", 1, 1), group(sig("add", 1), sig("add", 2)), sig("total"), sig("add", 10), app=working.app),
            17,
        ),
    ]
    for canvas, expected in cases:
        assert canvas.apply_async().get(timeout=30) == expected, canvas
    nested = group(chain(chord(adds(working, 2), sig("total")), sig("add", 1)), sig("add", 0, 0), app=working.app)
    assert nested.apply_async().get(timeout=30) == [3, 0]
    assert "chord_unlock" not in working.log()


def test_an_empty_header_runs_the_body_at_once(working: Site) -> None:
    assert chord([], working.sig("total"), app=working.app).apply_async().get(timeout=30) == 0


def test_states_of_a_task_can_be_followed(working: Site) -> None:
    seen: list[str] = []
    flag = working.directory / "flag"

    def on_message(meta: dict[str, Any]) -> None:
        seen.append(meta["status"])
        flag.touch()

    result = working.sig("hold", str(flag), 5).apply_async()
    wait_for(lambda: any(note.startswith("hold") for note in working.notes()), timeout=20)
    flag.touch()
    assert result.get(timeout=20, on_message=on_message) == 5
    assert seen[-1:] in ([], ["SUCCESS"])
    assert working.sig("started", 1).apply_async().get(timeout=20) == 1


def test_a_failing_header_fails_the_body_and_calls_its_errbacks_once(working: Site) -> None:
    body = working.sig("total").on_error(working.sig("errback"))
    result = chord([*adds(working, 2), working.sig("fail", "why")], body, app=working.app).apply_async()
    with pytest.raises(ChordError, match=r"Dependency .* raised ValueError\('why'\)"):
        working.app.AsyncResult(result.id).get(timeout=30)
    wait_for(lambda: working.notes()["errback ChordError"], timeout=20)
    wait_for(working.closed, timeout=20)
    assert working.notes() == {"errback ChordError": 1}


def test_the_failure_of_a_nested_chord_reaches_the_outer_body(working: Site) -> None:
    inner = chord([working.sig("fail"), *adds(working, 1)], working.sig("total"), app=working.app)
    result = chord([inner, *adds(working, 1)], working.sig("total"), app=working.app).apply_async()
    with pytest.raises(ChordError):
        working.app.AsyncResult(result.id).get(timeout=30)
    assert working.notes()["total"] == 0


def test_an_errback_linked_to_nested_chords_is_called_once(working: Site) -> None:
    """``link_error`` of the outer chord puts it on the inner one, too, and both fail."""
    inner = chord([working.sig("fail"), *adds(working, 1)], working.sig("total"), app=working.app)
    outer = chord([inner, *adds(working, 1)], working.sig("total"), app=working.app)
    outer.link_error(working.sig("errback"))
    result = outer.apply_async()
    with pytest.raises(ChordError):
        working.app.AsyncResult(result.id).get(timeout=30)
    wait_for(working.closed, timeout=20)
    assert working.notes() == {"errback ChordError": 1}


def test_the_members_of_a_group_after_a_failed_task_fail_too(working: Site) -> None:
    tail = group(adds(working, 2), app=working.app)
    result = chain(working.sig("add", 1, 1), working.sig("fail").set(immutable=True), tail, app=working.app)()
    with pytest.raises(ValueError, match="no"):
        result.get(timeout=30)


def test_a_chord_of_hundreds_is_exact(working: Site) -> None:
    assert chord(adds(working, 400), working.sig("total"), app=working.app).apply_async().get(timeout=60) == 159600
    assert working.notes() == {"total": 1}
    wait_for(working.closed, timeout=20)
    parts = "SELECT count(*) FROM {}.pgqrs_chord_parts JOIN {}.pgqrs_chords USING (chord_id) WHERE failed_at IS NULL"
    assert working.spy.value(parts) == 0


def test_workers_open_no_listening_connection(working: Site) -> None:
    assert chord(adds(working, 4), working.sig("total"), app=working.app).apply_async().get(timeout=30) == 12
    close(working.app)
    wait_for(working.spy.connections, timeout=5)
    assert working.spy.listeners() == []


def killed_child(working: Site) -> None:
    """Kill the child that holds a task."""
    note = wait_for(lambda: next((n for n in working.notes() if n.startswith("hold")), None), timeout=20)
    os.kill(int(note.split()[1]), signal.SIGKILL)


def test_a_child_killed_in_a_header_member_delays_the_chord_and_nothing_else(site: Site) -> None:
    site.start()
    flag = site.directory / "flag"
    header = [*adds(site, 3), site.sig("hold", str(flag), 10)]
    result = chord(header, site.sig("total"), app=site.app).apply_async()
    killed_child(site)
    flag.touch()
    assert result.get(timeout=90) == 16
    assert site.notes()["total"] == 1


@pytest.mark.parametrize(
    ("point", "body_runs"),
    [
        ("finish_chord", {1}),  # result and part are committed, nobody has looked
        ("look", {1}),  # before the row is locked
        ("claim", {1}),  # it is locked and all parts are in
        ("header_values", {1}),  # it is claimed, the body is not sent
        ("dispatched", {1, 2}),  # the body is sent, and nobody has said so: at least once
    ],
)
def test_a_child_killed_anywhere_between_the_last_part_and_the_body_loses_no_chord(
    site: Site, point: str, body_runs: set[int]
) -> None:
    crash = site.directory / "crash"
    site.start(**{CRASH: f"{point}:{crash}"})
    result = chord(adds(site, 6), site.sig("total"), app=site.app).apply_async()
    wait_for(crash.exists, timeout=30, what=f"a child to come to {point}")

    def revived() -> bool:
        site.sig("add", 1, 1).apply_async().get(timeout=30)
        return site.closed()

    wait_for(revived, timeout=40, what="the chord to be completed by another child")
    assert result.get(timeout=30) == 30
    assert site.notes()["total"] in body_runs


def test_a_task_that_ignores_its_result_stores_none(working: Site) -> None:
    assert working.sig("echo", 1).apply_async().get(timeout=30) == 1
    assert not working.sig("ignored", 1).apply_async().exists()
