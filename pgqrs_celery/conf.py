"""The settings: read from ``app.conf`` under the prefix ``pgqrs_``, checked once, then immutable.

A wrong value raises ``ConfigurationError`` naming the setting, what it was given and what it takes; an unknown
``pgqrs_…`` setting does, too, because a misspelt one would otherwise be silently without effect.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from pgqrs_celery.exceptions import ConfigurationError

__all__ = ["PREFIX", "Settings", "keys_of"]

PREFIX: Final = "pgqrs_"

#: Environment variable with the DSN to use where no setting names one.
DSN_VARIABLE: Final = "PGQRS_CELERY_DSN"

#: How often a configuration may change while its keys are read.
CHANGES: Final = 100

Check = Callable[[Any], Any]


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise ValueError("a non-empty string")
    return value


def _schema(value: Any) -> str:
    if not isinstance(value, str) or not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_$]{0,62}", value):
        raise ValueError("a schema name: a letter or underscore, then letters, digits, _ or $, at most 63")
    return value


def _number(low: float, high: float = float("inf")) -> Check:
    def check(value: Any) -> float:
        numeric = isinstance(value, int | float) and not isinstance(value, bool)
        if not numeric or not math.isfinite(value) or not low <= value <= high:
            raise ValueError(f"a number >= {low:g}" + (f" and <= {high:g}" if high != float("inf") else ""))
        return float(value)

    return check


def _count(low: int) -> Check:
    def check(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise ValueError(f"a whole number >= {low}")
        return value

    return check


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise ValueError("True or False")
    return value


def _one_of(*choices: str) -> Check:
    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError("one of " + ", ".join(map(repr, choices)))
        return str(value)

    return check


def _setting(default: Any, check: Check) -> Any:
    return field(default=default, metadata={"check": check})


@dataclass(frozen=True, slots=True)
class Settings:
    """Every setting with its default; durations are seconds, sizes are bytes.

    The attribute ``lease`` is the Celery setting ``pgqrs_lease`` and so on.
    """

    #: Where the ledger lives. Unset: ``PGQRS_CELERY_DSN``, the Postgres of the result backend or broker,
    #: an embedded server.
    dsn: str | None = _setting(None, _text)
    #: A DSN that reaches Postgres itself, for LISTEN and session locks, where ``dsn`` goes through a
    #: transaction pooler such as pgbouncer.
    direct_dsn: str | None = _setting(None, _text)
    #: The schema of the ``pgqrs_`` tables.
    schema: str = _setting("public", _schema)
    #: Separates applications that share a database; the app's ``main`` name where unset.
    namespace: str | None = _setting(None, _text)
    #: How long a step stays with its worker without a sign of life.
    lease: float = _setting(30.0, _number(1))
    #: A step whose worker died this many times is FAILED instead of tried again.
    max_lost: int = _setting(5, _count(1))
    #: A hand-off that failed this many times fails the run.
    max_handoffs: int = _setting(5, _count(1))
    #: First interval after which a published but not started step is looked at; it doubles up to the maximum.
    resend_interval: float = _setting(10.0, _number(0.05))
    resend_interval_max: float = _setting(600.0, _number(0.05))
    #: What to do with a task that is not durable between durable ones.
    plain_links: str = _setting("warn", _one_of("warn", "error", "allow"))
    #: What to do when a step's input is not what it was recorded with.
    on_input_change: str = _setting("warn", _one_of("warn", "error", "ignore"))
    #: The largest result a step may return.
    max_result_bytes: int = _setting(16 * 1024 * 1024, _count(1))
    #: Connections a process keeps at most.
    pool_size: int = _setting(8, _count(1))
    connect_timeout: float = _setting(5.0, _number(1))
    #: How long a worker process waits for an unreachable database before it gives a message back.
    patience: float = _setting(30.0, _number(0))
    #: False where a pooler does not support prepared statements.
    prepared_statements: bool = _setting(True, _flag)
    #: Commit without waiting for the disk: faster, but a crash of Postgres may lose the last half second
    #: of steps (they run again).
    synchronous_commit: bool = _setting(True, _flag)
    #: For how long the process that has finished a link of a chain may go on with the next one itself, without a
    #: message in between; 0 never.
    local_continuation: float = _setting(1.0, _number(0, 30))
    #: Whether workers send again what is due; switch it off only where other workers of the app do it.
    relay: bool = _setting(True, _flag)
    relay_batch: int = _setting(100, _count(1))
    #: The longest time a relay sleeps without looking.
    relay_interval: float = _setting(10.0, _number(0.05))
    #: How often a worker looks whether its neighbours are alive.
    watch_interval: float = _setting(1.75, _number(0.05))
    #: Install or upgrade the schema when it is first used; meant for development (an embedded server
    #: always is).
    auto_install: bool = _setting(False, _flag)
    #: The broker gives a message up when this many workers have died with it.
    delivery_limit: int = _setting(10, _count(1))
    #: The queue for messages that were given up or cannot be decoded, and for how long they are kept there.
    dead_letter_queue: str = _setting("pgqrs.dead", _text)
    dead_letter_retention: float = _setting(7 * 86400.0, _number(0))
    #: How often the broker looks for messages where it cannot be notified (behind a transaction pooler).
    poll_interval: float = _setting(0.5, _number(0.01))
    #: How long terminal runs are kept; None keeps them until somebody prunes.
    retention: float | None = _setting(None, _number(0))

    @classmethod
    def read(cls, conf: Mapping[str, Any]) -> Settings:
        """Return the settings found in a Celery configuration (``app.conf``)."""
        fields = {f.name: f for f in dataclasses.fields(cls)}
        present = given(conf)
        refuse_unknown(present, fields)
        values: dict[str, Any] = {}
        for name, setting in fields.items():
            value = conf.get(PREFIX + name)
            if value is None and PREFIX + name in present:
                value = conf[present[PREFIX + name]]
            if value is None:
                continue
            try:
                values[name] = setting.metadata["check"](value)
            except ValueError as expected:
                raise ConfigurationError(f"setting {PREFIX}{name} = {value!r}: must be {expected}") from None
        settings = cls(**values)
        if settings.resend_interval_max < settings.resend_interval:
            raise ConfigurationError(
                f"setting {PREFIX}resend_interval_max = {settings.resend_interval_max:g}: must not be less than "
                f"{PREFIX}resend_interval = {settings.resend_interval:g}"
            )
        return settings


def keys_of(conf: Mapping[str, Any]) -> list[str]:
    """Return the keys of a configuration, which another thread may be completing: Celery does that at its first use."""
    for _ in range(CHANGES):
        try:
            return [str(key) for key in conf]
        except RuntimeError:  # it has changed meanwhile
            continue
    return [str(key) for key in conf]


def given(conf: Mapping[str, Any]) -> dict[str, str]:
    """Return the keys of a configuration that are settings of this package: as we spell them, and as they are spelt.

    Celery takes settings in capitals from Django, and behind a namespace that the application chose.
    """
    keys = keys_of(conf)  # first: a lazy configuration learns its namespace by being read
    namespace = str(getattr(conf, "prefix", None) or "").lower()
    names = {key.lower().removeprefix(namespace): key for key in keys}
    return {name: key for name, key in names.items() if name.startswith(PREFIX)}


def refuse_unknown(present: Mapping[str, str], known: Mapping[str, Any]) -> None:
    """Raise ``ConfigurationError`` for the first ``pgqrs_…`` key that names no setting."""
    for name, key in present.items():
        if name.removeprefix(PREFIX) in known:
            continue
        near = difflib.get_close_matches(name, [PREFIX + name for name in known], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise ConfigurationError(f"unknown setting {key}{hint}")
