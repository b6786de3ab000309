-- table_exists: whether the ledger of migrations is there.
SELECT to_regclass('{schema}.pgqrs_migrations') IS NOT NULL;

-- applied: the migrations applied so far.
SELECT version, checksum FROM {schema}.pgqrs_migrations;

-- try_lock: become the one process that migrates; released with the session.
SELECT pg_try_advisory_lock(%(key)s);

-- unlock: let the next one in.
SELECT pg_advisory_unlock(%(key)s);

-- create_schema: make the schema where it is missing.
CREATE SCHEMA IF NOT EXISTS {schema};

-- create_table: make the ledger of migrations where it is missing.
CREATE TABLE IF NOT EXISTS {schema}.pgqrs_migrations (
  version int PRIMARY KEY,
  name text NOT NULL,
  checksum text NOT NULL,
  applied_at timestamptz NOT NULL DEFAULT now()
);

-- record: note that a migration was applied.
INSERT INTO {schema}.pgqrs_migrations (version, name, checksum) VALUES (%(version)s, %(name)s, %(checksum)s);
