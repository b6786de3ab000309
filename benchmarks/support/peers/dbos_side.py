"""DBOS Transact: a queue, two worker processes, a client.

Defaults: queues are looked at once a second, and so are results. Tuned: every 20 ms and every 5 ms.
"""

from __future__ import annotations

import logging
import os
import threading

from protocol import arguments, serve

QUEUE = "bench"


def main() -> None:
    given = arguments()
    os.environ["DBOS__APPVERSION"] = "bench"
    from dbos import DBOS, DBOSClient

    queue_options = {"worker_concurrency": 8, "polling_interval_sec": 0.02} if given.tuned else {}
    if given.role == "setup":
        DBOS.migrate(given.dsn)
        client = DBOSClient(system_database_url=given.dsn)
        client.register_queue(QUEUE, on_conflict="always_update", **queue_options)
        client.destroy()
        return
    if given.role == "worker":
        config = {"name": "bench", "system_database_url": given.dsn, "executor_id": given.name, "log_level": "WARNING"}
        DBOS(config={**config, "application_version": "bench", "run_migrations": False})

        @DBOS.step(name="increment")
        def increment(number: int) -> int:
            return number + 1

        @DBOS.workflow(name="count_up")
        def count_up(steps: int) -> int:
            number = 0
            for _ in range(steps):
                number = increment(number)
            return number

        DBOS.listen_queues([QUEUE])
        DBOS.launch()
        print("ready", flush=True)
        threading.Event().wait()
    logging.disable(logging.INFO)
    client = DBOSClient(system_database_url=given.dsn)
    waiting = {"polling_interval_sec": 0.005} if given.tuned else {}

    def run(count: int, steps: int) -> None:
        enqueued = {"workflow_name": "count_up", "queue_name": QUEUE, "app_version": "bench"}
        handles = [client.enqueue(enqueued, steps) for _ in range(count)]
        assert [handle.get_result(**waiting) for handle in handles] == [steps] * count

    serve(run)


main()
