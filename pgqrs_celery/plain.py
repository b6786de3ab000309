"""Plain values: what JSON writes of them, without asking a serializer, and what reading that makes of it: the same.

Most arguments and results are plain, and each step writes two or three of them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Final

__all__ = ["PLAIN"]

#: How JSON writes values of these very types (not of types derived from them).
PLAIN: Final[Mapping[type, Callable[[Any], str]]] = {
    int: int.__repr__,
    bool: {True: "true", False: "false"}.__getitem__,
    type(None): lambda _: "null",
}
