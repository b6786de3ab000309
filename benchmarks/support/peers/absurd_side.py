"""Absurd: two worker processes with one connection each, or several; its schema comes with ``absurdctl``.

Defaults: workers look for tasks every 250 ms when there are none; a result is looked for after 50 ms, then twice as
late each time. Tuned: every 20 ms and every 5 ms, and four threads share each connection.
"""

from __future__ import annotations

import threading
import time

import psycopg
from absurd_sdk import Absurd
from absurdctl import BUNDLED_SCHEMA_SQL
from protocol import arguments, serve

QUEUE = "bench"


def main() -> None:
    given = arguments()
    if given.role == "setup":
        with psycopg.connect(given.dsn, autocommit=True) as connection:
            connection.execute(BUNDLED_SCHEMA_SQL.encode())
        app = Absurd(given.dsn, queue_name=QUEUE)
        app.create_queue()
        app.close()
        return
    if given.role == "worker":
        options = {"concurrency": 4, "poll_interval": 0.02} if given.tuned else {}
        for number in range(given.connections):
            app = worker(given.dsn)
            named = {"worker_id": f"{given.name}-{number}", **options}
            threading.Thread(target=app.start_worker, kwargs=named, daemon=True).start()
        print("ready", flush=True)
        threading.Event().wait()
    client = Absurd(given.dsn, queue_name=QUEUE)

    def result(task_id: str) -> object:
        if not given.tuned:
            return client.await_task_result(task_id).result
        while True:
            found = client.fetch_task_result(task_id)
            if found is not None and found.state == "completed":
                return found.result
            time.sleep(0.005)

    def run(count: int, steps: int) -> None:
        ids = [client.spawn("count_up", {"steps": steps}, queue=QUEUE)["task_id"] for _ in range(count)]
        assert [result(task_id) for task_id in ids] == [steps] * count

    serve(run)


def worker(dsn: str) -> Absurd:
    app = Absurd(dsn, queue_name=QUEUE)

    @app.register_task(name="count_up")
    def count_up(params, ctx):
        number = 0
        for n in range(params["steps"]):
            number = ctx.step(f"increment-{n}", lambda number=number: number + 1)
        return number

    return app


main()
