"""Schemas of the tests' own, used again by later tests: making one takes ten times as long as emptying one.

A schema is used again under a new name, so that whoever still writes to it under the old one gets an error, and only
if nothing in it differs from what the migrations made; any other is dropped.
"""

from __future__ import annotations

import uuid
from dataclasses import dataclass, field
from typing import Any, Final

from psycopg import sql

from pgqrs_celery.db import Database
from pgqrs_celery.store import migrations
from tests.support.asking import ask

__all__ = ["Schemas", "drop_schema", "new_name"]

#: Bytes of tables; dead rows would make the statements of a later test slower.
LARGEST: Final = 1 << 20

#: Everything that a test can have changed but rows: relations, columns, functions, triggers, constraints, what ANALYZE
#: has found, and the migrations themselves.
FINGERPRINT: Final = """
SELECT md5(string_agg(part, ',' ORDER BY part)) FROM (
  SELECT concat_ws('/', 'relation', oid, relkind::text, relpersistence::text, relnatts, reloptions, relacl,
                   reltuples > 0) AS part
  FROM pg_class WHERE relnamespace = %(schema)s::text::regnamespace
  UNION ALL
  SELECT concat_ws('/', 'function', oid, proacl, proconfig, md5(replace(prosrc, %(schema)s::text, ''))) FROM pg_proc
  WHERE pronamespace = %(schema)s::text::regnamespace
  UNION ALL
  SELECT concat_ws('/', 'trigger', t.oid, tgenabled::text) FROM pg_trigger t JOIN pg_class c ON c.oid = tgrelid
  WHERE relnamespace = %(schema)s::text::regnamespace
  UNION ALL
  SELECT concat_ws('/', 'constraint', oid, convalidated) FROM pg_constraint
  WHERE connamespace = %(schema)s::text::regnamespace
  UNION ALL
  SELECT concat_ws('/', 'migration', version, checksum) FROM {schema}.pgqrs_migrations
) AS parts
"""

SIZE: Final = """
SELECT sum(pg_relation_size(oid)) FROM pg_class WHERE relnamespace = %(schema)s::text::regnamespace AND relkind = 'r'
"""

#: Under locks that a connection forgotten by its test keeps from being had. The bodies of functions name the schema.
EMPTY: Final = """
DO $empty$ DECLARE
  tables text[] := ARRAY(
    SELECT oid::regclass::text FROM pg_class WHERE relnamespace = {text}::text::regnamespace AND relkind = 'r');
  one text;
BEGIN
  SET LOCAL lock_timeout = '10s';
  EXECUTE 'LOCK TABLE ' || array_to_string(tables, ', ');
  FOREACH one IN ARRAY tables LOOP
    CONTINUE WHEN one LIKE '%pgqrs_migrations';
    EXECUTE 'DELETE FROM ' || one;
  END LOOP;
  PERFORM setval(oid::regclass, 1, false) FROM pg_class
  WHERE relnamespace = {text}::text::regnamespace AND relkind = 'S';
  ALTER SCHEMA {schema} RENAME TO {new_schema};
  FOR one IN SELECT pg_get_functiondef(oid) FROM pg_proc WHERE pronamespace = {new_text}::text::regnamespace LOOP
    EXECUTE replace(one, {text}, {new_text});
  END LOOP;
END $empty$
"""


def new_name() -> str:
    """Return the name of a schema that does not exist."""
    return f"t_{uuid.uuid4().hex[:16]}"


def drop_schema(dsn: str, name: str) -> None:
    """Drop a schema with all it holds, if it is there; a connection that its test forgot is an error of the test."""
    ask(dsn, sql.SQL("SET lock_timeout = '10s'"))
    ask(dsn, sql.SQL("DROP SCHEMA IF EXISTS {} CASCADE").format(sql.Identifier(name)))


@dataclass(slots=True)
class Schemas:
    """The schemas of one process that no test uses now."""

    dsn: str
    #: Name and fingerprint.
    free: list[tuple[str, Any]] = field(default_factory=list)
    used: dict[str, Any] = field(default_factory=dict)

    def take(self) -> str:
        """Return the name of a schema that holds what the migrations make, and not one row."""
        if self.free:
            name, fingerprint = self.free.pop()
        else:
            name = new_name()
            database = Database(self.dsn, schema=name)
            migrations.install(database)
            database.close()
            fingerprint = self._ask(FINGERPRINT, name)
        self.used[name] = fingerprint
        return name

    def give_back(self, name: str) -> None:
        """Empty a schema for a later test, or drop it."""
        fingerprint = self.used.pop(name)
        exists = ask(self.dsn, sql.SQL("SELECT FROM pg_namespace WHERE nspname = %s"), [name])
        if exists and self._ask(SIZE, name) <= LARGEST and self._ask(FINGERPRINT, name) == fingerprint:
            new = new_name()
            names = {"schema": sql.Identifier(name), "text": name, "new_schema": sql.Identifier(new), "new_text": new}
            ask(self.dsn, sql.SQL(EMPTY).format(**names))
            self.free.append((new, fingerprint))
        else:
            drop_schema(self.dsn, name)

    def _ask(self, query: str, name: str) -> Any:
        ((answer,),) = ask(self.dsn, sql.SQL(query).format(schema=sql.Identifier(name)), {"schema": name})
        return answer
