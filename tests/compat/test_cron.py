"""Cron expressions: their forms, and what happens to them when clocks are changed."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest

from pgqrs_celery import ConfigurationError
from pgqrs_celery.compat.underway_cron import Cron

BERLIN = ZoneInfo("Europe/Berlin")


def times(text: str, start: datetime, count: int) -> list[str]:
    """Return the next times, as a clock on the wall of the schedule's zone shows them."""
    cron, moment, found = Cron.parse(text), start, []
    for _ in range(count):
        following = cron.after(moment)
        assert following is not None
        assert following > moment
        moment = following
        found.append(moment.astimezone(ZoneInfo(cron.zone)).strftime("%d %H:%M:%S"))
    return found


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0 2 * * *[UTC]", ["21 02:00:00", "22 02:00:00"]),
        ("0 2 * * *", ["21 02:00:00", "22 02:00:00"]),
        ("30 0 2 * * *", ["21 02:00:30", "22 02:00:30"]),
        ("*/20 0 2 * * * 2026", ["21 02:00:00", "21 02:00:20"]),
        ("0 12 * * 0 [UTC]", ["22 12:00:00", "29 12:00:00"]),
        ("0 12 * * 7[UTC]", ["22 12:00:00", "29 12:00:00"]),
        ("@daily[Asia/Kolkata]", ["21 00:00:00", "22 00:00:00"]),
        ("@hourly", ["20 15:00:00", "20 16:00:00"]),
        ("@weekly", ["22 00:00:00", "29 00:00:00"]),
        ("@monthly", ["01 00:00:00", "01 00:00:00"]),
    ],
)
def test_every_form_of_an_expression_is_read(text: str, expected: list[str]) -> None:
    assert times(text, datetime(2026, 11, 20, 14, 30, tzinfo=UTC), 2) == expected


@pytest.mark.parametrize(
    "text", ["", "0 2 * *", "61 2 * * *", "0 2 * * *[Mars/Olympus]", "@sometimes", "0 2 * * *[UTC", "1 2 3 4 5 6 7 8"]
)
def test_what_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(ConfigurationError, match="schedule"):
        Cron.parse(text)


def test_an_expression_may_have_an_end() -> None:
    assert Cron.parse("0 0 2 * * * 2020").after(datetime(2026, 1, 1, tzinfo=UTC)) is None


def test_a_time_that_the_clock_skips_comes_once_as_much_later() -> None:
    # On 29 March 2026 clocks go from 02:00 to 03:00.
    start = datetime(2026, 3, 28, 12, 0, tzinfo=BERLIN)
    assert times("30 2 * * *[Europe/Berlin]", start, 3) == ["29 03:30:00", "30 02:30:00", "31 02:30:00"]


def test_a_time_that_the_clock_shows_twice_comes_once() -> None:
    # On 25 October 2026 clocks go from 03:00 back to 02:00.
    start = datetime(2026, 10, 24, 12, 0, tzinfo=BERLIN)
    assert times("30 2 * * *[Europe/Berlin]", start, 3) == ["25 02:30:00", "26 02:30:00", "27 02:30:00"]


@pytest.mark.parametrize("day", [datetime(2026, 3, 29, tzinfo=BERLIN), datetime(2026, 10, 25, tzinfo=BERLIN)])
@pytest.mark.parametrize("text", ["*/15 * * * *[Europe/Berlin]", "0 */15 * * * *[Europe/Berlin]"])
def test_what_comes_every_quarter_of_an_hour_comes_so_also_while_clocks_are_changed(day: datetime, text: str) -> None:
    cron, moment = Cron.parse(text), day
    for _ in range(40):
        following = cron.after(moment)
        assert following is not None
        assert following.astimezone(UTC) - moment.astimezone(UTC) == timedelta(minutes=15)
        moment = following


def test_a_change_by_half_an_hour_is_a_change() -> None:
    # On 4 October 2026 clocks on Lord Howe Island go from 02:00 to 02:30.
    start = datetime(2026, 10, 4, 0, 30, tzinfo=ZoneInfo("Australia/Lord_Howe"))
    assert times("0 * * * *[Australia/Lord_Howe]", start, 3) == ["04 01:00:00", "04 03:00:00", "04 04:00:00"]
