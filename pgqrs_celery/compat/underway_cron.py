"""Cron expressions with a time zone: ``0 2 * * *[Europe/Berlin]``.

5 fields (minute first), 6 (second first) or 7 (with the year at the end), and ``@yearly`` … ``@hourly``; Sunday is 0
or 7. The fields are croniter's; what happens when clocks are changed is decided here, as Debian's cron does it: a time
of the day fires once a day, also where the clock shows it twice or never (then as much later as the clock was put
forward); what fires every hour goes on in real time.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from pgqrs_celery.exceptions import ConfigurationError

try:
    from croniter import CroniterBadDateError, CroniterError, croniter
except ImportError as error:
    raise ConfigurationError("schedules need croniter: pip install 'pgqrs-celery[underway]'") from error

__all__ = ["Cron"]


@dataclass(frozen=True, slots=True)
class Cron:
    """A parsed expression."""

    fields: str
    zone: str = "UTC"

    @classmethod
    def parse(cls, text: str) -> Cron:
        """Return what a text like ``0 2 * * *[UTC]`` says; raises ``ConfigurationError``."""
        match = re.fullmatch(r"\s*([^\[\]]+?)\s*(?:\[([^\[\]]+)\])?\s*", text)
        if match is None:
            raise ConfigurationError(f"schedule {text!r}: it must look like '0 2 * * *[Europe/Berlin]'")
        fields, zone = " ".join(match[1].split()), match[2] or "UTC"
        if not fields.startswith("@") and len(fields.split()) not in (5, 6, 7):
            raise ConfigurationError(
                f"schedule {text!r}: 5 fields (minute, hour, day, month, weekday), 6 (second first) or 7 (and year)"
            )
        try:
            ZoneInfo(zone)
        except (ZoneInfoNotFoundError, ValueError, OSError) as error:
            raise ConfigurationError(f"schedule {text!r}: there is no time zone {zone!r}") from error
        try:
            croniter(fields, datetime(2000, 1, 1), second_at_beginning=True)
        except (CroniterError, ValueError) as error:
            raise ConfigurationError(f"schedule {text!r}: {error}") from error
        return cls(fields, zone)

    def __str__(self) -> str:
        return f"{self.fields}[{self.zone}]"

    def after(self, moment: datetime) -> datetime | None:
        """Return the first time after a moment, in UTC; None where there is none any more."""
        try:
            return self._every_hour(moment) if self._is_hourly else self._at_a_time(moment)
        except CroniterBadDateError:
            return None

    @property
    def _is_hourly(self) -> bool:
        if self.fields.startswith("@"):
            return self.fields == "@hourly"
        parts = self.fields.split()
        return parts[1 if len(parts) == 5 else 2].startswith("*")

    def _next(self, wall: datetime) -> datetime:
        found: datetime = croniter(self.fields, wall, second_at_beginning=True).get_next(datetime)
        return found

    def _at_a_time(self, moment: datetime) -> datetime:
        zone = ZoneInfo(self.zone)
        wall = moment.astimezone(zone).replace(tzinfo=None)
        while True:
            wall = self._next(wall)
            found = wall.replace(tzinfo=zone).astimezone(UTC)
            if found > moment:
                return found

    def _every_hour(self, moment: datetime) -> datetime:
        zone = ZoneInfo(self.zone)
        local = moment.astimezone(zone)
        wall, offset = local.replace(tzinfo=None), local.utcoffset() or timedelta()
        while True:
            found = (self._next(wall) - offset).replace(tzinfo=UTC)
            there = found.astimezone(zone)
            shown, now_offset = there.replace(tzinfo=None), there.utcoffset() or timedelta()
            if now_offset == offset:
                return found
            # The clock is changed in between: look again, from there on as the clock shows it then.
            wall, offset = shown - timedelta(seconds=1), now_offset
