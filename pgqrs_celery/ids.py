"""Names and numbers that must come out the same whenever they are computed again.

Celery leaves the ids of callbacks, of errbacks and of what a body sends to chance. A ledger can only recognise a
duplicate by its id, so those are derived here from what caused them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Final
from urllib.parse import unquote
from uuid import UUID, uuid5

from pgqrs_celery.plain import PLAIN

__all__ = [
    "call_id",
    "child_id",
    "digest",
    "generation",
    "link_id",
    "plain_name",
    "relay_channel",
    "root_of",
    "short_name",
    "step_id_for",
    "step_names",
]

NAMESPACE: Final = UUID("6f7c1c5e-0f0b-5d53-9a53-7d2b0a9c1e44")

#: Characters of the task id in a step id: with 8, a group of 10 000 would collide about once in 90 runs.
SUFFIX: Final = 12

OBJECT_ADDRESS: Final = re.compile(r" at 0x[0-9a-f]+")


def short_name(task_name: str) -> str:
    """Return the function's name out of a task's full name."""
    return task_name.rpartition(".")[2] or task_name


def step_id_for(task_name: str, task_id: str) -> str:
    """Return the step id of a message that was not given one: readable, and unique in its run."""
    compact = task_id.replace("-", "")
    suffix = compact if len(compact) <= SUFFIX else compact[:SUFFIX]
    if not re.fullmatch(r"[0-9a-f]{32}", compact):
        suffix = task_id if len(task_id) <= 64 else digest([task_id])[:SUFFIX]
    return f"{short_name(task_name)}#{suffix}"


def step_names(task_names: Iterable[str]) -> list[str]:
    """Return step ids for a whole canvas in its order: ``charge``, ``charge#2``, …"""
    seen: Counter[str] = Counter()
    names = []
    for task_name in task_names:
        name = short_name(task_name)
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}#{seen[name]}")
    return names


def plain_name(step_id: str) -> str:
    """Return the name out of a step id: without the path above it and without its occurrence number."""
    return unquote(step_id.rpartition("/")[2].partition("#")[0])


def call_id(owner: str, step_id: str) -> str:
    """Return the id of a task that a function sends under a step id."""
    return str(uuid5(NAMESPACE, f"{owner}/call/{step_id}"))


def digest_of_call(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Return ``digest([args, kwargs])``; a short way there for the few plain values that most calls have."""
    if not kwargs:
        written = [_WRITE[type(value)](value) for value in args if type(value) in _WRITE]
        if len(written) == len(args):
            return _hash(f"[[{', '.join(written)}], {{}}]")
    return digest([args, kwargs])


def digest(value: Any) -> str:
    """Return a digest of arguments; equal arguments have equal digests, in any process."""
    try:
        text = _sorted.encode(value)
    except TypeError:  # keys that JSON does not know, or that have no order
        text = json.dumps(_keyed(value), default=_plain)
    return _hash(text)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=32).hexdigest()


def _keyed(value: Any) -> Any:
    if isinstance(value, Mapping):
        return sorted(([OBJECT_ADDRESS.sub("", repr(key)), _keyed(item)] for key, item in value.items()), key=repr)
    return list(map(_keyed, value)) if isinstance(value, list | tuple) else value


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return dict(value)
    if isinstance(value, set | frozenset):
        return sorted(map(repr, value))
    return OBJECT_ADDRESS.sub("", repr(value))


_sorted: Final = json.JSONEncoder(sort_keys=True, default=_plain)
_WRITE: Final = {**PLAIN, str: _sorted.encode}


def child_id(parent_task_id: str, name: str, arguments: Any, nth: int) -> str:
    """Return the id of what a body sends: the same when the same attempt of work is executed again.

    The digest of the arguments is in it because a body that sends something else on its second attempt must not be
    silenced; ``nth`` counts equal sends within one execution.
    """
    return str(uuid5(NAMESPACE, f"{parent_task_id}/{name}/{digest(arguments)}/{nth}"))


def link_id(owner: str, kind: str, position: int) -> str:
    """Return the id of a callback or errback of a message."""
    return str(uuid5(NAMESPACE, f"{owner}/{kind}/{position}"))


def generation(nesting: int | None, retries: int | None) -> int:
    """Return the generation of a message: replacements count before retries."""
    return ((nesting or 0) << 32) | (retries or 0)


def root_of(headers: Mapping[str, Any], chain: Sequence[Any] | None, chord: Any) -> str:
    """Return the root task id a message should have.

    Celery gives every member of a top-level group or chord its own id as root, and the body of a chord inherits the
    root of whichever member finished last. Here the outermost group's id is the root of all of them.
    """
    task_id, root_id = str(headers["id"]), headers.get("root_id")
    if headers.get("parent_id") or (root_id and root_id != task_id):
        return str(root_id or task_id)
    candidates = [headers.get("group")]
    if chain:
        candidates.append(_option(chain[0], "group_id"))
    while chord:
        candidates.insert(0, _option(chord, "group_id"))
        chord = _option(chord, "chord")
    return str(next((c for c in candidates if c), task_id))


def _option(signature: Any, name: str) -> Any:
    return (signature.get("options") or {}).get(name) if isinstance(signature, Mapping) else None


def relay_channel(schema: str, app: str) -> str:
    """Return the NOTIFY channel of an app's relays; at most 63 characters whatever the names."""
    return "pgqrs_relay_" + hashlib.sha256(f"{schema}/{app}".encode()).hexdigest()[:24]
