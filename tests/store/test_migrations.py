"""The schema: installed once by whoever comes first, never twice, and never guessed at."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import psycopg
import pytest
from psycopg import sql

from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import NotInstalled, SchemaOutdated
from pgqrs_celery.store import migrations


@pytest.fixture
def empty(database_dsn: str, schema: str) -> Iterator[Database]:
    """A database without our schema."""
    database = Database(database_dsn, schema=schema)
    yield database
    database.close()


def tables(database: Database) -> list[str]:
    with database.session() as session:
        rows = session.connection.execute(
            "SELECT table_name FROM information_schema.tables WHERE table_schema = %s ORDER BY 1", [database.schema]
        ).fetchall()
    return [row[0] for row in rows]


def change(database: Database, statement: str) -> None:
    with database.session() as session:
        session.connection.execute(sql.SQL(statement).format(sql.Identifier(database.schema)))


def test_installing_applies_everything_in_order_and_again_nothing(empty: Database) -> None:
    names = [migration.name for migration in migrations.available()]
    assert names == sorted(names)
    assert migrations.install(empty) == names
    assert migrations.install(empty) == []
    migrations.verify(empty)


def test_the_tables_have_the_names_and_columns_that_monitoring_queries_use(empty: Database) -> None:
    migrations.install(empty)
    assert {"pgqrs_workflows", "pgqrs_workflow_steps", "pgqrs_workers", "pgqrs_migrations"} <= set(tables(empty))
    change(empty, "SELECT workflow_id, name, status, created_at, updated_at FROM {}.pgqrs_workflows")
    change(empty, "SELECT workflow_id, step_id, status, completed_at FROM {}.pgqrs_workflow_steps")


def test_versions_are_numbered_without_gaps_and_names_say_them() -> None:
    available = migrations.available()
    assert [migration.version for migration in available] == list(range(1, len(available) + 1))
    for migration in available:
        assert migration.name.startswith(f"{migration.version:04}_")
        assert "search_path" not in migration.text


def test_many_that_install_at_the_same_time_install_once(database_dsn: str, schema: str) -> None:
    databases = [Database(database_dsn, schema=schema) for _ in range(6)]
    with ThreadPoolExecutor(6) as threads:
        done = list(threads.map(migrations.install, databases))
    assert sorted(done) == [[]] * 5 + [[migration.name for migration in migrations.available()]]
    for database in databases:
        migrations.verify(database)
        database.close()


def test_two_schemas_are_installed_independently(database_dsn: str, schema: str, empty: Database) -> None:
    other = Database(database_dsn, schema=schema + "_b")
    with empty.session() as session:
        session.connection.execute("SELECT pg_advisory_lock(%s)", [migrations._lock_key(schema)])
        assert migrations.install(other)
        session.connection.execute("SELECT pg_advisory_unlock_all()")
    change(other, "DROP SCHEMA {} CASCADE")
    other.close()


def test_an_installed_schema_takes_no_lock(empty: Database, database_dsn: str, schema: str) -> None:
    migrations.install(empty)
    with psycopg.connect(database_dsn, autocommit=True) as other:
        other.execute("SELECT pg_advisory_lock(%s)", [migrations._lock_key(schema)])
        other.execute("SET default_transaction_read_only = on")
        assert migrations.install(empty) == []
        migrations.verify(empty)


def test_an_empty_database_says_what_to_run(empty: Database) -> None:
    with pytest.raises(NotInstalled, match=r"holds no pgqrs tables; run `celery -A your_app pgqrs install`"):
        migrations.verify(empty)


def test_an_older_schema_is_named_with_what_it_lacks(empty: Database) -> None:
    migrations.install(empty)
    last = migrations.available()[-1]
    change(empty, f"DELETE FROM {{}}.pgqrs_migrations WHERE version = {last.version}")
    with pytest.raises(SchemaOutdated, match=rf"lacks {last.name}; run `celery"):
        migrations.verify(empty)


@pytest.mark.parametrize("how", ["verify", "install"])
def test_a_changed_migration_is_refused(empty: Database, how: str) -> None:
    migrations.install(empty)
    change(empty, "UPDATE {}.pgqrs_migrations SET checksum = 'other' WHERE version = 1")
    with pytest.raises(SchemaOutdated, match=r"0001_ledger\.sql.*is not the file of this version"):
        migrations.verify(empty) if how == "verify" else migrations.install(empty)


def test_a_schema_of_a_newer_release_is_left_alone(empty: Database) -> None:
    migrations.install(empty)
    change(empty, "INSERT INTO {}.pgqrs_migrations (version, name, checksum) VALUES (9999, '9999_new.sql', 'x')")
    assert migrations.install(empty) == []
    migrations.verify(empty)


def test_a_migration_that_fails_leaves_nothing_of_itself(empty: Database) -> None:
    migrations.install(empty)
    before = tables(empty)
    change(empty, "DELETE FROM {}.pgqrs_migrations WHERE version = 1")
    with pytest.raises(Exception, match="already exists"):
        migrations.install(empty)
    assert tables(empty) == before
    with empty.session() as session:
        assert 1 not in migrations.applied(session)
        row = session.connection.execute("SELECT count(*) FROM pg_locks WHERE locktype = 'advisory'").fetchone()
        held = session.connection.execute(
            "SELECT pg_try_advisory_lock(%s)", [migrations._lock_key(empty.schema)]
        ).fetchone()
        session.connection.execute("SELECT pg_advisory_unlock_all()")
    assert row is not None
    assert held == (True,), "the lock was not given back"


def test_an_odd_but_legal_schema_name_works(database_dsn: str, schema: str) -> None:
    name = f"{schema}_Odd$1"
    database = Database(database_dsn, schema=name)
    assert migrations.install(database)
    migrations.verify(database)
    change(database, "DROP SCHEMA {} CASCADE")
    database.close()


def test_the_script_is_what_install_does(empty: Database, database_dsn: str) -> None:
    with psycopg.connect(database_dsn, autocommit=True) as connection:
        connection.execute(migrations.script(empty.schema).encode())
    migrations.verify(empty)
    assert migrations.install(empty) == []
