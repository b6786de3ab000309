-- Since when the server has kept everybody's session locks: a lock that was taken under this very server and is free now
-- was given up. After a clean restart the start time differs; after a crash or a failover the unlogged rows are gone.

CREATE UNLOGGED TABLE {schema}.pgqrs_sessions (
  worker_id          uuid PRIMARY KEY,
  server_started_at  timestamptz NOT NULL DEFAULT pg_postmaster_start_time()
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

COMMENT ON TABLE {schema}.pgqrs_sessions IS 'one row per incarnation of a worker whose session lock the server has not forgotten';

-- Rows that exist already say nothing: they may be older than the server's last start.
ALTER TABLE {schema}.pgqrs_consumers ADD COLUMN server_started_at timestamptz;
ALTER TABLE {schema}.pgqrs_consumers ALTER COLUMN server_started_at SET DEFAULT pg_postmaster_start_time();

COMMENT ON COLUMN {schema}.pgqrs_consumers.server_started_at IS 'when the server was started that the consumer registered with';
