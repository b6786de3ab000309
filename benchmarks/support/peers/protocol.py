"""How the benchmark talks to a peer's client process: a line in, the seconds of each measurement out.

Runs with the peer's own interpreter, so nothing but the standard library may be imported here.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

__all__ = ["arguments", "serve"]


def arguments() -> argparse.Namespace:
    """Return what the benchmark has asked of this process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("role", choices=["setup", "worker", "client"])
    parser.add_argument("dsn")
    parser.add_argument("--tuned", action="store_true", help="the settings that are fastest, instead of the defaults")
    parser.add_argument("--connections", type=int, default=1)
    parser.add_argument("--name", default="worker")
    return parser.parse_args()


def serve(run: Callable[[int, int], None]) -> None:
    """Answer ``many 200 10`` and ``singles 20 10``; ``run(count, steps)`` starts workflows and waits for all."""
    print("ready", flush=True)
    for line in sys.stdin:
        kind, count, steps = line.split()[0], *map(int, line.split()[1:])
        seconds = []
        for size in [count] if kind == "many" else [1] * count:
            began = time.perf_counter()
            run(size, steps)
            seconds.append(time.perf_counter() - began)
        print(json.dumps(seconds), flush=True)
