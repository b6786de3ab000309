"""AMQP's manners: its errors, its limits on names, and its topic patterns."""

from __future__ import annotations

import re
from typing import Final

from kombu.exceptions import ChannelError

__all__ = ["checked_name", "not_found", "not_implemented", "precondition_failed", "topic_pattern"]

#: Bytes in a name; an index entry of Postgres ends at 2 700, AMQP's names at 255.
MAX_NAME: Final = 1000


def not_found(what: str, method: str) -> ChannelError:
    """Return the error for something that was never declared."""
    return ChannelError(f"NOT_FOUND - {what}", (50, 10), method, 404)


def precondition_failed(what: str, method: str) -> ChannelError:
    """Return the error for a declaration that cannot be accepted."""
    return ChannelError(f"PRECONDITION_FAILED - {what}", (50, 10), method, 406)


def not_implemented(what: str, method: str) -> ChannelError:
    """Return the error for what this broker does not have."""
    return ChannelError(f"NOT_IMPLEMENTED - {what}", (40, 10), method, 540)


def checked_name(name: str, what: str) -> str:
    """Return the name of a queue, an exchange or a routing key; raises ``ChannelError`` where it cannot be stored."""
    if len(name) > MAX_NAME // 4 and len(name.encode()) > MAX_NAME:
        raise precondition_failed(
            f"the {what} {name[:60]!r}… has {len(name.encode())} bytes; at most {MAX_NAME} are possible", "Channel"
        )
    if "\x00" in name:
        raise precondition_failed(f"the {what} {name!r} has a NUL in it", "Channel")
    return name


def topic_pattern(key: str) -> str:
    """Return a topic binding's regular expression: ``*`` stands for one word, ``#`` for any number of words."""
    pattern, separate = "", False
    words = key.split(".")
    for position, word in enumerate(words):
        if word == "#":
            if separate:
                pattern += r"(\.[^.]*)*"
            elif position == len(words) - 1:
                pattern += ".*"
            else:
                pattern += r"([^.]*\.)*"
            continue
        pattern += (r"\." if separate else "") + ("[^.]+" if word == "*" else re.escape(word))
        separate = True
    return f"^{pattern}$"
