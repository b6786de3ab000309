"""Typed steps, activities, and a worker in this process.

Run it with ``python -m examples.typed_steps``. Expected output (the numbers vary)::

    refused: step 'find' of workflow 'signup' takes Signup; it was given Signup(user_id='ada')
    run 1 enqueued
    [lookup-email] user 42 found, asked 2 times
    [welcome] ada@example.org
    [track-signup] ada@example.org
    result: {'welcomed': 'ada@example.org'}
    run 2 enqueued
    missing_user: no user 7

The step ``find`` was suspended while the address was looked up, and the workflow slept between its steps; neither held
a slot of the worker.
"""

from __future__ import annotations

from typing import Any

from examples.support import wait_for
from examples.typed_steps.app import Signup, signup
from pgqrs_celery.compat.underway import ActivityError, InvalidInput
from pgqrs_celery.states import TERMINAL


def main() -> None:
    wrong: Any = "ada"
    signup.pgqrs.install()
    try:
        signup.enqueue(Signup(wrong))
    except InvalidInput as error:
        print(f"refused: {str(error).partition(': ')[0]}")

    handle = signup.runtime(concurrency=2).start()
    try:
        run = signup.enqueue(Signup(42))
        print(f"run {run.id} enqueued")
        wait_for(lambda: run.status in TERMINAL, "the run to end, with what it has emitted")
        print(f"result: {run.get()}")

        run = signup.enqueue(Signup(7))
        print(f"run {run.id} enqueued")
        try:
            run.get(timeout=60)
        except ActivityError as error:
            print(error)
    finally:
        handle.shutdown()


if __name__ == "__main__":
    main()
