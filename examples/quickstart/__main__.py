"""Start an order, wait for it, look at its steps.

Run it with ``python -m examples.quickstart``. Expected output (the numbers vary)::

    order 1700000000: run 1 started
    order 1700000000: parcel-1700000000 is on its way
    step     status   attempts
    reserve  SUCCESS  1
    charge   SUCCESS  2
    ship     SUCCESS  1
    the same order again: run 1, nothing starts twice
"""

from __future__ import annotations

import time

from examples.quickstart.app import app, fulfil
from examples.support import Worker


def main() -> None:
    order = int(time.time())
    with Worker(app):
        run = fulfil.apply_async((order,), workflow_key=f"order-{order}")
        print(f"order {order}: run {run.id} started")
        print(f"order {order}: {run.get(timeout=60)} is on its way")

        print(f"{'step':8} {'status':8} attempts")
        for step in run.steps():
            print(f"{step.step_id:8} {step.status:8} {step.attempt}")

        again = fulfil.apply_async((order,), workflow_key=f"order-{order}")
        print(f"the same order again: run {again.id}, nothing starts twice")


if __name__ == "__main__":
    main()
