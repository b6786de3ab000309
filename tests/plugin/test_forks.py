"""A child is never given a lock that a thread of its parent held: no fork in the middle of a thread's work."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator

import pytest

from pgqrs_celery import forks
from pgqrs_celery.forks import NoFork
from tests.support.processes import in_child

#: Called when a process is about to be forked, before anything of the package is: hooks run in reverse.
_about_to_fork: list[Callable[[], object]] = []
os.register_at_fork(before=lambda: [call() for call in _about_to_fork])


@pytest.fixture
def about_to_fork() -> Iterator[list[Callable[[], object]]]:
    yield _about_to_fork
    _about_to_fork.clear()


class Work:
    """A thread in the middle of something that takes a lock, until it is told to go on."""

    def __init__(self) -> None:
        self.no_fork = NoFork()
        self.lock = threading.Lock()
        self.begun, self.may_end = threading.Event(), threading.Event()
        self.thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        with self.no_fork, self.lock:
            self.begun.set()
            self.may_end.wait()

    def __enter__(self) -> Work:
        self.thread.start()
        assert self.begun.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.may_end.set()
        self.thread.join()


def test_a_child_forked_while_a_thread_works_can_take_the_locks_of_that_work(
    about_to_fork: list[Callable[[], object]],
) -> None:
    with Work() as work:
        about_to_fork.append(work.may_end.set)
        assert in_child(lambda: work.lock.acquire(timeout=0)) == "True"


def test_a_thread_that_does_not_come_to_an_end_delays_a_fork_once_and_not_for_long(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with Work() as work:
        monkeypatch.setattr(forks, "PATIENCE", 0.05)
        assert in_child(lambda: work.lock.acquire(timeout=0)) == "False"
        monkeypatch.setattr(forks, "PATIENCE", 3600.0)
        assert in_child(lambda: "forked") == "'forked'"
        work.may_end.set()
        work.thread.join()
        assert in_child(lambda: work.lock.acquire(timeout=0)) == "True"


def test_work_may_begin_again_after_a_fork_in_the_parent_and_in_the_child() -> None:
    with Work() as work:
        work.may_end.set()
        work.thread.join()

        def works() -> bool:
            with work.no_fork:
                return True

        assert in_child(works) == "True"
        assert works()


def test_a_thread_may_fork_in_the_middle_of_its_own_work() -> None:
    with NoFork():
        assert in_child(lambda: 1) == "1"


def test_threads_that_fork_at_the_same_time_do_not_wait_for_each_other() -> None:
    blocks = [NoFork() for _ in range(5)]
    answers: list[str] = []

    def fork() -> None:
        for _ in range(5):
            answers.append(in_child(lambda: len(blocks)))

    threads = [threading.Thread(target=fork) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert answers == ["5"] * 20
