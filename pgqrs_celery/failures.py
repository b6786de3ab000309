"""Errors as JSON text, and back: how the outcome of a failed step is recorded.

The form is that of Celery's result backends, so that the errors of functions and of tasks can be read alike, with the
error's attributes in addition::

    {"exc_type": …, "exc_module": …, "exc_message": [arguments], "exc_state": {attributes}, "traceback": …}

A function must take the same way on a replay as the first time, so an error has the same class both times: one whose
class a replay could not find is a ``StepFailed`` the first time already.
"""

from __future__ import annotations

import json
import logging
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any, Final

from pgqrs_celery.exceptions import StepFailed

__all__ = ["as_replayed", "dump_error", "load_error"]

logger = logging.getLogger(__name__)

#: The flag of classes that Python code has made.
HEAP_TYPE: Final = 1 << 9


def dump_error(error: BaseException) -> str:
    """Return an exception as JSON text.

    Arguments that JSON does not know are kept as their ``repr``, such attributes are left out.
    """
    return json.dumps(
        {
            "exc_type": type(error).__qualname__,
            "exc_module": type(error).__module__,
            "exc_message": [argument if _is_plain(argument) else repr(argument) for argument in _arguments(error)],
            "exc_state": {name: value for name, value in vars(error).items() if _is_plain(value)},
            "traceback": "".join(traceback.format_exception(error)),
        }
    )


def _arguments(error: BaseException) -> Sequence[object]:
    """Return what the builtin constructor of an error took; ``args`` of an ``OSError`` lack its file's name."""
    if isinstance(error, OSError) and error.filename is not None and len(error.args) == 2:
        return (*error.args, error.filename)
    return error.args


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True


def as_replayed(error: Exception) -> Exception:
    """Return the error itself if a replay can raise one of its class, else the ``StepFailed`` that it would raise."""
    kind = type(error)
    return error if _class(kind.__module__, kind.__qualname__) is kind else load_error(dump_error(error))


def load_error(text: str | None) -> Exception:
    """Return the exception recorded as this text, of its own class where that is loaded, else a ``StepFailed``.

    Only classes of loaded modules that are exceptions are looked up; a text from the database imports nothing.
    """
    recorded = json.loads(text) if text else {}
    name, message, state = recorded.get("exc_type"), recorded.get("exc_message"), recorded.get("exc_state")
    arguments = list(message) if isinstance(message, list | tuple) else [message]
    kind = _class(str(recorded.get("exc_module")), str(name))
    error = _made(kind, arguments) if kind is not None else None
    if error is None:
        return StepFailed(f"{name}: {', '.join(map(str, arguments))}" if name else "the step failed")
    if isinstance(state, Mapping):
        vars(error).update(state)
    return error


def _class(module: str, name: str) -> type[Exception] | None:
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) and issubclass(found, Exception) else None


def _made(kind: type[Exception], arguments: Sequence[Any]) -> Exception | None:
    """Return an exception of this class with these ``args``.

    If its constructor does not take what it passed on as its arguments, or does not pass on what it takes, the
    exception is made past it: its attributes are recorded.
    """
    try:
        error = kind(*arguments)
        if list(error.args) == list(arguments):
            return error
    except Exception as refused:  # noqa: BLE001 - a constructor that is given what it does not expect may raise anything
        logger.debug("%s is made past its constructor: %r", kind, refused)
    builtin: Any = next(base for base in kind.__mro__ if not base.__flags__ & HEAP_TYPE)
    try:
        made: Exception = builtin.__new__(kind, *arguments)
        builtin.__init__(made, *arguments)
    except TypeError:
        return None
    return made
