"""Clients that send to the one Postgres: from many threads, with few connections, and over its restarts."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from celery import group
from kombu.exceptions import OperationalError

from pgqrs_celery import embedded
from pgqrs_celery.exceptions import StoreUnavailable
from tests.support.scenario import Application, Scenario
from tests.support.waiting import PATIENCE, wait_for

THREADS = 12


@pytest.mark.parametrize("pool_size", [1, 4])
def test_who_sends_needs_no_connection_that_others_wait_with(scenario: Scenario, pool_size: int) -> None:
    application = Application(scenario.with_conf(pgqrs_pool_size=pool_size))
    step, everybody = application.tasks.step, threading.Barrier(THREADS)

    def send(number: int) -> None:
        everybody.wait(PATIENCE)
        group(step.s([], f"{number}/{member}") for member in range(2)).delay()

    # Daemons: where they wait for each other for ever, the test still ends.
    threads = [threading.Thread(target=send, args=(number,), daemon=True) for number in range(THREADS)]
    for thread in threads:
        thread.start()
    wait_for(lambda: not any(thread.is_alive() for thread in threads), PATIENCE, "every thread to have sent")
    assert scenario.execute("SELECT count(*) FROM {}.pgqrs_messages") == [(2 * THREADS,)]


def test_whatever_happens_to_postgres_rows_and_messages_are_one_and_threads_can_send_again(
    scenario: Scenario, own_postgres: embedded.PostgresServer
) -> None:
    scenario = scenario.elsewhere(own_postgres.dsn())
    Application(scenario).pgqrs.install()
    everybody = threading.Barrier(THREADS + 1)

    def send(step: Any, number: int, back: threading.Event) -> int:
        everybody.wait(PATIENCE)
        sent, again = 0, False
        while not again:
            again = back.is_set()
            try:
                step.delay([], str(number))
                sent += 1
            except (StoreUnavailable, OperationalError):
                if again:
                    raise
        return sent

    accepted = 0
    with ThreadPoolExecutor(THREADS) as threads:
        for _ in range(5):
            step, back = Application(scenario).tasks.step, threading.Event()  # it has not sent anything yet
            senders = [threads.submit(send, step, number, back) for number in range(THREADS)]
            everybody.wait(PATIENCE)
            own_postgres.stop()
            own_postgres.start()
            back.set()
            accepted += sum(sender.result(PATIENCE) for sender in senders)
    rows = scenario.execute("SELECT task_id FROM {}.pgqrs_workflow_steps")
    messages = scenario.execute("SELECT headers::json->>'id' FROM {}.pgqrs_messages")
    assert sorted(messages) == sorted(rows)
    assert len(rows) >= accepted


@pytest.mark.parametrize("before", ["install", "send", "send in another thread"])
def test_a_sender_does_not_notice_that_postgres_was_restarted(
    scenario: Scenario, own_postgres: embedded.PostgresServer, before: str
) -> None:
    application = Application(scenario.elsewhere(own_postgres.dsn()))
    application.pgqrs.install()

    def send() -> None:
        application.tasks.step.delay([], "a")

    if before == "send":
        send()
    elif before == "send in another thread":
        with ThreadPoolExecutor(1) as threads:
            threads.submit(send).result(PATIENCE)
    own_postgres.restart()  # every connection of this process is a dead one now
    send()
    application.celery.close()
