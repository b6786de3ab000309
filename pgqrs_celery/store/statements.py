"""The named SQL statements: read once from ``store/sql/*.sql`` and rendered for one schema.

A file holds the statements of one noun. Each begins with a header line ``-- name: what it does`` and ends at the
next header; ``{schema}`` stands for the quoted schema name, and the name of another statement of the file for that. The
statement ``acquire`` of ``steps.sql`` is called ``steps.acquire``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import cache
from importlib import resources
from typing import Final

__all__ = ["quote_identifier", "render", "sources"]

HEADER: Final = re.compile(r"^-- (?P<name>[a-z_0-9]+): .+$", re.MULTILINE)
PART: Final = re.compile(r"\{(?P<name>[a-z_0-9]+)\}")


def quote_identifier(name: str) -> str:
    """Return the name as a quoted SQL identifier."""
    return '"' + name.replace('"', '""') + '"'


@cache
def sources() -> Mapping[str, str]:
    """Return the text of every statement by its full name, with ``{schema}`` still in it."""
    found: dict[str, str] = {}
    for file in sorted(resources.files(__package__).joinpath("sql").iterdir(), key=lambda f: f.name):
        if not file.name.endswith(".sql"):
            continue
        noun = file.name.removesuffix(".sql")
        text = file.read_text("utf-8")
        headers = list(HEADER.finditer(text))
        bodies: dict[str, str] = {}
        for header, following in zip(headers, [*headers[1:], None], strict=True):
            body = text[header.end() : following.start() if following else len(text)]
            bodies[header["name"]] = body.strip().rstrip(";")
        for name, body in bodies.items():
            found[f"{noun}.{name}"] = _whole(body, bodies)
    return found


def _whole(body: str, others: Mapping[str, str]) -> str:
    """Return a statement with the others that are parts of it; any other placeholder is left as it is."""
    return PART.sub(lambda part: others.get(part["name"], part[0]), body)


@cache
def render(schema: str) -> Mapping[str, str]:
    """Return every statement, ready to be executed in the given schema."""
    quoted = quote_identifier(schema)
    return {name: text.replace("{schema}", quoted) for name, text in sources().items()}
