"""Kill workers and watch their work go on.

    python -m examples.demo [--plain] [--act N]

Starts a Postgres and two ``celery worker`` processes of its own, kills a worker with SIGKILL in the middle of
a step, and shows that the other one takes over without repeating what was done. Each act ends with its claims,
checked against a journal that the tasks write independently of the ledger. Exit code 0 only if every claim held.
"""

from __future__ import annotations

import argparse
import signal
import sys
import time
from collections.abc import Sequence
from types import ModuleType

from examples.demo import pipeline, report
from examples.demo.screen import Screen
from examples.demo.screen import screen as best_screen
from examples.demo.stage import Claim, stage

ACTS: list[ModuleType] = [pipeline, report]


def main() -> int:
    parser = argparse.ArgumentParser("examples.demo", description="Kill workers and watch their work go on.")
    parser.add_argument("--plain", action="store_true", help="lines of text, also on a terminal")
    parser.add_argument("--act", type=int, choices=range(1, len(ACTS) + 1), help="only this act")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the servers are stopped
    screen, began = best_screen(plain=arguments.plain), time.monotonic()
    claims: list[Claim] = []
    with stage(screen) as the_stage:
        for number, act in enumerate(ACTS, 1):
            if arguments.act in (None, number):
                screen.title(f"Act {number}: {act.TITLE}")
                claims += act.play(the_stage)
    return verdict(screen, claims, time.monotonic() - began)


def verdict(screen: Screen, claims: Sequence[Claim], seconds: float) -> int:
    """Show every claim, and return the exit code: 0 where there were some and all of them held."""
    screen.title("What was claimed")
    for claim in claims:
        screen.claim(claim.held, claim.text, claim.evidence)
    held = sum(claim.held for claim in claims)
    print(f"{held} of {len(claims)} claims held; {seconds:.0f} s in all")
    return 0 if claims and held == len(claims) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
