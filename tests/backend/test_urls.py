"""URLs: which are ours, what goes to libpq and what to the settings, and that passwords stay secret."""

from __future__ import annotations

import pytest

from pgqrs_celery import urls
from pgqrs_celery.exceptions import ConfigurationError


@pytest.mark.parametrize(
    ("url", "dsn"),
    [
        ("pgqrs+postgresql://u:p@h:5433/d", "postgresql://u:p@h:5433/d"),
        ("pgqrs+postgres://h/d", "postgresql://h/d"),
        ("pgqrs+postgresql+psycopg://h/d", "postgresql://h/d"),
        ("pgqrs://h/d", "postgresql://h/d"),
        ("PGQRS+PostgreSQL://h/d", "postgresql://h/d"),
        (
            "pgqrs+postgresql://h1:1,h2:2/d?target_session_attrs=any",
            "postgresql://h1:1,h2:2/d?target_session_attrs=any",
        ),
        ("pgqrs+postgresql://h/d?sslmode=require&pgqrs_schema=jobs", "postgresql://h/d?sslmode=require"),
        ("pgqrs+postgresql:///d?host=%2Ftmp%2Fpg", "postgresql:///d?host=%2Ftmp%2Fpg"),
        ("pgqrs+postgresql://h/d?options=-c%20jit%3Doff", "postgresql://h/d?options=-c%20jit%3Doff"),
        ("pgqrs+postgresql://", "postgresql://"),
        ("pgqrs+postgresql://h1/d;pgqrs+postgresql://h2/d", "postgresql://h1/d"),
    ],
)
def test_the_dsn_of_a_url_of_ours_is_what_libpq_takes(url: str, dsn: str) -> None:
    assert urls.dsn_of(url) == dsn


@pytest.mark.parametrize("url", ["redis://h/0", "db+postgresql://h/d", "postgresql://h/d", "rpc://", "", None])
def test_other_urls_have_no_dsn_for_the_ledger(url: str | None) -> None:
    assert urls.dsn_of(url) is None


def test_parameters_with_our_prefix_are_settings() -> None:
    address = urls.parse(
        "postgresql://h/d?pgqrs_schema=jobs&pgqrs_pool_size=3&pgqrs_auto_install=true&pgqrs_patience=1.5&sslmode=prefer"
    )
    assert address.dsn == "postgresql://h/d?sslmode=prefer"
    assert address.settings == {
        "pgqrs_schema": "jobs",
        "pgqrs_pool_size": 3,
        "pgqrs_auto_install": True,
        "pgqrs_patience": 1.5,
    }


@pytest.mark.parametrize(
    ("url", "masked"),
    [
        ("pgqrs+postgresql://u:secret@h/d", "pgqrs+postgresql://u:**@h/d"),
        ("postgresql://u:se%40cret@h1,h2/d?sslmode=require", "postgresql://u:**@h1,h2/d?sslmode=require"),
        ("postgresql://u@h/d?password=secret&sslpassword=x", "postgresql://u@h/d?password=**&sslpassword=**"),
        ("postgresql://h:5432/d", "postgresql://h:5432/d"),
    ],
)
def test_masking_hides_every_password_and_nothing_else(url: str, masked: str) -> None:
    assert urls.mask(url) == masked


def test_a_url_of_another_kind_is_refused_without_showing_its_password() -> None:
    with pytest.raises(ConfigurationError, match="not one of ours") as caught:
        urls.parse("mysql://u:secret@h/d")
    assert "secret" not in str(caught.value)
