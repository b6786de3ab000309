"""An event loop with nothing to do is woken by what concerns it."""

from __future__ import annotations

import threading
from collections.abc import Callable

import kombu
import pytest
from celery.signals import worker_shutting_down
from kombu.asynchronous import Hub

from pgqrs_celery.transport import keeper
from tests.support.waiting import wait_for


def test_an_idle_worker_that_is_told_to_stop_does_not_wait_for_its_next_timer(
    connect: Callable[..., kombu.Connection], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(keeper, "LOOK_INTERVAL", 3600.0)
    connection = connect(lease=3 * 3600.0)
    hub, rest = Hub(), threading.Event()
    hub.call_later(3600, lambda: None)
    monkeypatch.setattr(hub, "fire_timers", lambda **_: 3600.0)  # kombu would look every second or two
    stopped = threading.Event()

    def loop() -> None:
        connection.register_with_event_loop(hub)
        while not rest.is_set():
            hub.run_once()
        connection.transport.unregister_from_event_loop(connection, hub)
        stopped.set()

    with kombu.Consumer(connection, [kombu.Queue("idle", routing_key="idle")]):
        threading.Thread(target=loop, daemon=True).start()
        wait_for(lambda: connection.transport.receiver.sleep.since is not None, what="the consumer to sleep")
        rest.set()
        worker_shutting_down.send(sender="here", sig="SIGTERM", how="Warm", exitcode=0)
        assert stopped.wait(5), "the loop still waits"
