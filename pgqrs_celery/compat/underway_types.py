"""Typed values on their way through JSON: checked where they are given, rebuilt where they are taken."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from typing import Any, Final

from pgqrs_celery.exceptions import ConfigurationError, InvalidInput

try:
    from pydantic import PydanticUserError, TypeAdapter, ValidationError
except ImportError as error:
    raise ConfigurationError("typed steps need pydantic: pip install 'pgqrs-celery[underway]'") from error

__all__ = ["Typed", "input_of"]

#: Errors that are shown of one value.
SHOWN: Final = 5


class Typed:
    """One type that values have: a dataclass, a pydantic model, or anything else that pydantic can check."""

    __slots__ = ("_adapter", "_what", "type")

    def __init__(self, type_: Any, what: str) -> None:
        self.type = type_
        self._what = what
        try:
            self._adapter: TypeAdapter[Any] = TypeAdapter(type_)
        except PydanticUserError as error:
            raise ConfigurationError(f"{what}: {name_of(type_)} cannot be checked: {error}") from error

    def dump(self, value: Any) -> Any:
        """Return a value as plain JSON; raises ``InvalidInput`` naming what is wrong with it.

        What comes out is checked, not what goes in: a dataclass instance does not check its fields.
        """
        plain = self._adapter.dump_python(value, mode="json", warnings=False, fallback=repr_refused)
        checked = self.load(plain, given=value)
        return self._adapter.dump_python(checked, mode="json")

    def load(self, plain: Any, *, given: Any = None) -> Any:
        """Return the value that plain JSON stands for; raises ``InvalidInput``."""
        try:
            return self._adapter.validate_python(plain)
        except ValidationError as error:
            found = given if given is not None else plain
            problems = "; ".join(described(one) for one in error.errors()[:SHOWN])
            raise InvalidInput(
                f"{self._what} takes {name_of(self.type)}; it was given {shortened(found)}: {problems}"
            ) from error


def repr_refused(value: Any) -> Any:
    """Leave what pydantic cannot write as it is: the check that follows says where it is."""
    return repr(value)


def described(problem: Any) -> str:
    """Return one problem of a value, with its place."""
    place = ".".join(str(part) for part in problem["loc"])
    return f"{place}: {problem['msg']}" if place else str(problem["msg"])


def shortened(value: Any) -> str:
    """Return a value as it may stand in a message."""
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def name_of(type_: Any) -> str:
    """Return a type as its author wrote it."""
    return type_.__qualname__ if isinstance(type_, type) else str(type_)


def input_of(function: Callable[..., Any], what: str) -> Any:
    """Return the type of a step's second parameter, ``Any`` where it has no annotation.

    Raises ``ConfigurationError`` where the function does not take a context and an input, or where the annotation
    names something that its module does not know.
    """
    parameters = list(inspect.signature(function).parameters.values())
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p for p in positional if p.default is p.empty]
    if len(positional) < 2 or len(required) > 2:
        raise ConfigurationError(f"{what} must take the context and its input, as in def step(cx, order): …")
    try:
        hints = typing.get_type_hints(function, include_extras=True)
    except NameError as error:
        raise ConfigurationError(
            f"{what}: the type of its input cannot be found ({error}); define it at the module's top level"
        ) from error
    return hints.get(positional[1].name, Any)
