"""Broker and backend URLs: which are ours, the DSN in them, and the settings they carry.

``pgqrs+postgresql://user:secret@host1,host2/db?sslmode=require&pgqrs_schema=jobs`` is an ordinary libpq URL behind a
prefix. Query parameters that begin with ``pgqrs_`` are settings of this package and taken out; all others are libpq's.
Celery and kombu strip ``pgqrs+`` before they hand a URL on, so that part is optional here.

``pgqrs://`` names no place: it is the database of ``pgqrs_dsn`` or ``PGQRS_CELERY_DSN``, or else an embedded server.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any, Final
from urllib.parse import parse_qsl, quote, urlencode

from pgqrs_celery.exceptions import ConfigurationError

__all__ = ["Address", "dsn_of", "mask", "parse"]

PREFIX: Final = "pgqrs"
SCHEMES: Final = frozenset({"postgresql", "postgres", "postgresql+psycopg", "postgres+psycopg"})
OPTION: Final = "pgqrs_"
SECRETS: Final = frozenset({"password", "sslpassword"})
USERINFO: Final = re.compile(r"(?P<user>//[^/?#@:]*):[^/?#@]*@")
NUMBER: Final = re.compile(r"-?\d+(\.\d+)?")


@dataclass(frozen=True, slots=True)
class Address:
    """What a URL says: the DSN as libpq takes it, and settings by their full names (``pgqrs_schema``).

    The DSN is empty where the URL names no place.
    """

    dsn: str
    settings: dict[str, Any] = field(default_factory=dict)


def split(url: str) -> tuple[str, str]:
    """Return the scheme without our prefix, in lower case, and what follows ``://``."""
    scheme, separator, rest = url.partition("://")
    scheme = scheme.lower()
    if not separator:
        scheme, rest = "", ""
    elif scheme == PREFIX:
        scheme = "postgresql"
    return scheme.removeprefix(PREFIX + "+"), rest


def parse(url: str) -> Address:
    """Return what the URL says; raises ``ConfigurationError`` where its scheme is not Postgres'."""
    scheme, rest = split(url)
    if scheme not in SCHEMES:
        raise ConfigurationError(
            f"the URL {mask(url)!r} is not one of ours: it must look like pgqrs+postgresql://user@host:5432/database"
        )
    location, _, query = rest.partition("?")
    libpq, settings = [], {}
    for key, value in parse_qsl(query, keep_blank_values=True):
        if key.startswith(OPTION):
            settings[key] = literal(value)
        else:
            libpq.append((key, value))
    if not location and not libpq and url.partition(":")[0].lower() == PREFIX:
        return Address("", settings)
    encoded = "?" + urlencode(libpq, quote_via=quote) if libpq else ""
    return Address(f"postgresql://{location}{encoded}", settings)


def dsn_of(url: object) -> str | None:
    """Return the DSN of a broker or backend URL of ours (of the first, where several are joined by ``;``), else None.

    It is empty for ``pgqrs://``. Only URLs that still have their ``pgqrs`` prefix count: a ``redis://`` or
    ``db+postgresql://`` has no ledger in it.
    """
    if not isinstance(url, str):
        return None
    first = url.split(";", 1)[0]
    scheme = first.partition("://")[0].lower()
    if scheme != PREFIX and not scheme.startswith(PREFIX + "+"):
        return None
    return parse(first).dsn


def literal(text: str) -> Any:
    """Return a setting's value: true and false, numbers, or the text itself."""
    if text.lower() in {"true", "false"}:
        return text.lower() == "true"
    if NUMBER.fullmatch(text):
        return float(text) if "." in text else int(text)
    return text


def mask(url: str) -> str:
    """Return the URL with every password in it replaced by ``**``, fit for a log line."""
    location, mark, query = USERINFO.sub(r"\g<user>:**@", url, count=1).partition("?")
    if not mark:
        return location
    parts = (part.partition("=") for part in query.split("&"))
    return location + "?" + "&".join(k + e + ("**" if k in SECRETS else v) for k, e, v in parts)
