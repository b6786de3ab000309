"""Waiting for conditions, as tests must not sleep."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Final, TypeVar

Value = TypeVar("Value")

#: Seconds for what takes one or two on a machine that has nothing else to do.
PATIENCE: Final = 60.0
#: Seconds between two looks: the first, a tenth of the time waited so far, and the longest.
PAUSES: Final = (0.005, 0.05)


def wait_for(condition: Callable[[], Value | None], timeout: float = 10.0, what: str = "") -> Value:
    """Call ``condition`` until it returns something true, and return that; AssertionError after ``timeout``."""
    began = time.monotonic()
    while True:
        value = condition()
        if value:
            return value
        waited = time.monotonic() - began
        if waited > timeout:
            raise AssertionError(f"waited {timeout:g} s in vain for {what or condition}")
        shortest, longest = PAUSES
        time.sleep(min(longest, max(shortest, waited / 10)))
