"""Which parts of a process share a database, and what a DSN shows of itself."""

from __future__ import annotations

import pytest

from pgqrs_celery.conf import Settings
from pgqrs_celery.databases import database_for
from pgqrs_celery.db import redact
from pgqrs_celery.exceptions import ConfigurationError


@pytest.mark.parametrize(
    "other",
    [
        "postgresql://shop:secret@h:5432/d",
        "host=h port=5432 dbname=d user=shop password=secret",
        "dbname=d host=h user=shop password='secret'",
        "postgres://shop@h/d?password=secret",
        "postgresql:///d?host=h&user=shop&password=secret",
    ],
)
def test_a_database_is_the_same_however_its_dsn_is_spelt(other: str) -> None:
    assert database_for("postgresql://shop:secret@h/d", Settings()) is database_for(other, Settings())


def test_a_socket_directory_may_be_quoted_or_not() -> None:
    quoted, plain = "postgresql://u@/d?host=%2Frun%2Fpg", "postgresql://u@/d?host=/run/pg"
    assert database_for(quoted, Settings()) is database_for(plain, Settings())


@pytest.mark.parametrize("other", ["postgresql://shop@h/e", "postgresql://shop@h:5433/d", "postgresql://shop@i/d"])
def test_another_database_is_another(other: str) -> None:
    assert database_for("postgresql://shop@h/d", Settings()) is not database_for(other, Settings())


def test_another_schema_is_another() -> None:
    dsn = "postgresql://shop@h/d"
    assert database_for(dsn, Settings()) is not database_for(dsn, Settings(schema="jobs"))


def test_the_port_of_the_environment_counts_where_none_is_given(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PGPORT", "6543")
    assert database_for("postgresql://u@env/d", Settings()) is database_for("postgresql://u@env:6543/d", Settings())
    assert database_for("postgresql://u@env/d", Settings()) is not database_for("postgresql://u@env:5432/d", Settings())


def test_a_dsn_that_cannot_be_read_is_a_configuration_error() -> None:
    with pytest.raises(ConfigurationError, match="the DSN cannot be read"):
        database_for("host = = 3", Settings())


@pytest.mark.parametrize("dsn", ["postgresql://u:secret@h/d", "host=h password=secret sslpassword=secret", "secret ="])
def test_a_password_is_never_shown(dsn: str) -> None:
    assert "secret" not in redact(dsn)
