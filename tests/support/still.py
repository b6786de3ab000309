"""Imported last by the nursery: what it has loaded is left out of every later garbage collection.

Billiard collects before it forks a pool process, and with all those libraries that takes a tenth of a second.
"""

from __future__ import annotations

import gc

gc.collect()
gc.freeze()
