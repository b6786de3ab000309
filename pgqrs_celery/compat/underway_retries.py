"""Retry policies: how often and when a step or an activity is tried again."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any, NoReturn

from pgqrs_celery.exceptions import ConfigurationError

__all__ = ["RetryPolicy"]


@dataclass(frozen=True, slots=True)
class RetryPolicy:
    """How often something is executed at most, and the pauses in between, in seconds.

    A pause is ``initial_interval * backoff_coefficient ** n``, at most ``max_interval``, less up to ``jitter_factor``
    of it by chance.
    """

    max_attempts: int = 5
    initial_interval: float = 1.0
    max_interval: float = 60.0
    backoff_coefficient: float = 2.0
    jitter_factor: float = 0.5

    def __post_init__(self) -> None:
        if self.max_attempts < 1 or self.initial_interval < 0 or not 0 <= self.jitter_factor <= 1:
            raise ConfigurationError(f"{self}: at least one attempt, no negative pause, a jitter from 0 to 1")

    def pause(self, retries: int) -> float:
        """Return the pause before the retry that comes after this many."""
        longest = min(self.max_interval, self.initial_interval * self.backoff_coefficient**retries)
        return longest * (1 - random.uniform(0, self.jitter_factor))

    def again(self, task: Any, error: Exception) -> NoReturn:
        """Let a task be executed again after a pause, or raise its error where it was the last attempt."""
        retries: int = task.request.retries or 0
        if retries + 1 >= self.max_attempts:
            raise error
        raise task.retry(exc=error, countdown=self.pause(retries), max_retries=None)
