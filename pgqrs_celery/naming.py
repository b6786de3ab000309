"""What a native canvas is called in the ledger, and where its outcome appears."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pgqrs_celery import ids
from pgqrs_celery.outgoing import Outgoing

__all__ = ["canvas_name", "canvas_result"]

#: Most links that are part of a canvas' name.
NAME_LINKS: Final = 5


def canvas_name(batch: Sequence[Outgoing]) -> str:
    """Return a readable name for a native canvas: ``reserve | charge | ship``, ``group(resize)``."""
    first = batch[0]
    if len(batch) > 1:
        names = list(dict.fromkeys(ids.short_name(m.name) for m in batch))
        more = ", …" if len(names) > NAME_LINKS else ""
        return f"group({', '.join(names[:NAME_LINKS])}{more})"
    names = [ids.short_name(first.name)]
    for link in reversed(first.chain or ()):
        kind = link.get("subtask_type")
        names.append(str(kind) if kind in ("group", "chord", "chain") else ids.short_name(str(link.get("task"))))
    more = " | …" if len(names) > NAME_LINKS else ""
    return " | ".join(names[:NAME_LINKS]) + more


def canvas_result(batch: Sequence[Outgoing]) -> str | None:
    """Return where a native canvas' outcome appears, as ``AsyncResult.as_tuple()``; None where it is not one task."""
    if len(batch) != 1:
        return None
    last: Mapping[str, Any] | None = batch[0].chain[0] if batch[0].chain else None
    if last is None:
        return json.dumps([[batch[0].task_id, None], None])
    task_id = (last.get("options") or {}).get("task_id")
    return json.dumps([[task_id, None], None]) if task_id and not last.get("subtask_type") else None
