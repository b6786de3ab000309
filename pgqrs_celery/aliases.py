"""The names under which kombu finds the broker, and what workers need for it, entered without importing them."""

from __future__ import annotations

from importlib import import_module
from typing import Any, Final

from celery.signals import worker_init
from kombu.transport import TRANSPORT_ALIASES

__all__ = ["TRANSPORT", "names_transport", "register"]

TRANSPORT: Final = "pgqrs_celery.transport:Transport"
#: The same, in the ways in which Celery takes a path.
PATHS: Final = frozenset({"pgqrs_celery.transport.Transport", "pgqrs_celery.transport.transport.Transport"})
#: kombu asks for what stands before the first "+", but for the whole scheme when it fails over to another URL.
SCHEMES: Final = ("pgqrs", "pgqrs+postgresql", "pgqrs+postgres", "pgqrs+postgresql+psycopg")


def register() -> None:
    """Let ``broker_url = "pgqrs+postgresql://…"`` find the transport."""
    for scheme in SCHEMES:
        TRANSPORT_ALIASES.setdefault(scheme, TRANSPORT)
    worker_init.connect(_extend_worker, weak=False)


def names_transport(transport: Any) -> bool:
    """Return whether a ``broker_transport`` is ours: by an alias, by its path, or itself."""
    if not isinstance(transport, str):
        path = f"{getattr(transport, '__module__', '')}:{getattr(transport, '__qualname__', '')}"
        return path == "pgqrs_celery.transport.transport:Transport"
    return transport in SCHEMES or transport.replace(":", ".") in PATHS


def _extend_worker(**_: Any) -> None:
    # Only here: a client must not load the worker.
    import_module("pgqrs_celery.inspection")
