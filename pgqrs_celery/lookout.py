"""Who in this process looks after dead workers, and who wants to hear of one.

A worker's presence watches the other workers of its app. The broker's keepers beside it may rest meanwhile: they are
called when somebody is missed. The two have nothing else to do with each other, and each works without the other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import Final

__all__ = ["SETTLING", "Lookout", "lookout"]

#: Seconds for which somebody who has lost his session does not judge others: they may have lost theirs with it, and try
#: again every five seconds at least.
SETTLING: Final = 10.0


class Lookout:
    """Connects those who watch with those who want to be called; all methods may be called from any thread.

    Without a lock, which a fork could leave locked in the child: operations on a plain dict or list are atomic.
    """

    def __init__(self) -> None:
        self._watched: dict[str, float] = {}
        self._listeners: list[Callable[[], None]] = []

    def watching(self, app: str, seconds: float) -> None:
        """Say that somebody here watches the workers of an app, and will say so again within so many seconds.

        A promise with an end: a watch that hangs must not let others rely on it.
        """
        self._watched[app] = time.monotonic() + seconds

    def blind(self, app: str) -> None:
        """Say that nobody here watches the workers of an app any more."""
        self._watched.pop(app, None)

    def watched(self) -> list[str]:
        """Return the apps whose workers are watched from here."""
        now = time.monotonic()
        return [app for app, until in list(self._watched.items()) if until > now]

    def listen(self, listener: Callable[[], None]) -> None:
        """Have somebody called whenever a worker is missed."""
        self._listeners.append(listener)

    def leave(self, listener: Callable[[], None]) -> None:
        """Call somebody no more."""
        with suppress(ValueError):
            self._listeners.remove(listener)

    def alarm(self) -> None:
        """A worker is missed."""
        for listener in tuple(self._listeners):
            listener()


#: The process's own.
lookout = Lookout()
