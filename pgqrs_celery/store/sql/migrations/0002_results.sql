-- The result backend: results, groups, chords, and who waits for what.

-- A payload is three columns: JSON text is kept verbatim in "data", where SQL can read it; anything else (pickle,
-- msgpack, compressed, JSON with NaN in it) is "body", and "format" says what it is: content type; encoding.

CREATE TABLE {schema}.pgqrs_task_results (
  task_id     text PRIMARY KEY,
  status      text NOT NULL,
  data        json,
  body        bytea,
  format      text,
  stored_at   timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  expires_at  timestamptz,
  CHECK (num_nonnulls(data, body) = 1)
) WITH (fillfactor = 85, autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_insert_scale_factor = 0.05);

COMMENT ON TABLE {schema}.pgqrs_task_results IS 'Celery''s result meta, one row per task; the first SUCCESS wins';

CREATE INDEX pgqrs_task_results_expiry ON {schema}.pgqrs_task_results (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE {schema}.pgqrs_groups (
  group_id    text PRIMARY KEY,
  data        json,
  body        bytea,
  format      text,
  stored_at   timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  expires_at  timestamptz,
  CHECK (num_nonnulls(data, body) = 1)
);

COMMENT ON TABLE {schema}.pgqrs_groups IS 'saved GroupResults';

CREATE INDEX pgqrs_groups_expiry ON {schema}.pgqrs_groups (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE {schema}.pgqrs_chords (
  chord_id       text PRIMARY KEY,
  app            text NOT NULL,
  workflow_id    bigint,
  body_id        text,
  data           json,
  body           bytea,
  format         text,
  size           integer,
  extra          integer NOT NULL DEFAULT 0,
  open           boolean NOT NULL DEFAULT true,
  claims         integer NOT NULL DEFAULT 0,
  claimed_until  timestamptz,
  created_at     timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  dispatched_at  timestamptz,
  failed_at      timestamptz,
  expires_at     timestamptz,
  CHECK (open = (dispatched_at IS NULL AND failed_at IS NULL))
) WITH (fillfactor = 70, autovacuum_vacuum_scale_factor = 0.02);

COMMENT ON TABLE {schema}.pgqrs_chords IS 'one row per chord, inserted before its header is sent';
COMMENT ON COLUMN {schema}.pgqrs_chords.chord_id IS 'the group id of the header';
COMMENT ON COLUMN {schema}.pgqrs_chords.workflow_id IS 'the run of a durable chord; null for plain tasks';
COMMENT ON COLUMN {schema}.pgqrs_chords.data IS 'the signature of the body and, where it is nested, the header''s shape';
COMMENT ON COLUMN {schema}.pgqrs_chords.size IS 'members of the header; null until the last of them is being sent';
COMMENT ON COLUMN {schema}.pgqrs_chords.extra IS 'members added while it ran (add_to_chord)';
COMMENT ON COLUMN {schema}.pgqrs_chords.open IS 'until the body is dispatched, or failed with its header';
COMMENT ON COLUMN {schema}.pgqrs_chords.claimed_until IS 'until when one process has the right to send a plain body';

-- A run may close when none of its chords is open.
CREATE INDEX pgqrs_chords_of_run ON {schema}.pgqrs_chords (workflow_id) WHERE workflow_id IS NOT NULL;
-- The backstop's question: which open chords might be complete?
CREATE INDEX pgqrs_chords_open ON {schema}.pgqrs_chords (app, created_at) WHERE open;
CREATE INDEX pgqrs_chords_expiry ON {schema}.pgqrs_chords (expires_at) WHERE expires_at IS NOT NULL;

CREATE TABLE {schema}.pgqrs_chord_parts (
  chord_id    text NOT NULL,
  idx         integer NOT NULL,
  task_id     text NOT NULL,
  status      text NOT NULL,
  data        json,
  body        bytea,
  format      text,
  told        json,
  created_at  timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  PRIMARY KEY (chord_id, idx, task_id),
  CHECK (num_nonnulls(data, body) = 1)
);

COMMENT ON TABLE {schema}.pgqrs_chord_parts IS 'what the members of a header returned; removed once the body is sent';
COMMENT ON COLUMN {schema}.pgqrs_chord_parts.told IS 'errbacks that have been called because of this failure';

-- How many parts a chord has, spread over slots: a finisher adds to the slot of its own session and so waits for
-- nobody, and the look after its commit reads a few rows, whether the header has ten members or a hundred thousand.
CREATE TABLE {schema}.pgqrs_chord_tallies (
  chord_id  text NOT NULL,
  slot      smallint NOT NULL,
  parts     integer NOT NULL,
  PRIMARY KEY (chord_id, slot)
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0.02);

-- Not logged: it holds only who is waiting at this moment, and whoever waits registers again after a crash.
CREATE UNLOGGED TABLE {schema}.pgqrs_waiters (
  task_id  text NOT NULL,
  channel  text NOT NULL,
  seen_at  timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  PRIMARY KEY (task_id, channel)
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000);

COMMENT ON TABLE {schema}.pgqrs_waiters IS 'which LISTEN channel wants to hear of which result';

CREATE INDEX pgqrs_waiters_channel ON {schema}.pgqrs_waiters (channel);

-- Store a task's result, commit, then tell who waits for it: one statement of the client's, two transactions. The
-- look for waiters needs a snapshot taken after the commit, and no NOTIFY may be in the transaction that waits for the
-- disk (see store/waiters.py).
CREATE PROCEDURE {schema}.pgqrs_store_result(
  the_task text, the_status text, the_data json, the_body bytea, the_format text, lifetime float8, final boolean)
LANGUAGE plpgsql
AS $$
DECLARE
  note text;
  waiter record;
BEGIN
  INSERT INTO {schema}.pgqrs_task_results AS t (task_id, status, data, body, format, expires_at)
  VALUES (the_task, the_status, the_data, the_body, the_format,
          {schema}.pgqrs_now() + make_interval(secs => lifetime))
      ON CONFLICT (task_id) DO UPDATE
     SET status = excluded.status, data = excluded.data, body = excluded.body, format = excluded.format,
         stored_at = excluded.stored_at, expires_at = excluded.expires_at
   WHERE t.status <> 'SUCCESS' OR t.expires_at <= {schema}.pgqrs_now();
  IF NOT FOUND THEN
    RETURN;
  END IF;
  COMMIT;
  PERFORM set_config('synchronous_commit', 'off', true);  -- the result is on disk; what follows is lost with its waiter
  note := the_task || chr(31) || CASE WHEN octet_length(the_data::text) + octet_length(the_task) < 7900
                                      THEN the_data::text ELSE '' END;
  IF final THEN
    FOR waiter IN DELETE FROM {schema}.pgqrs_waiters WHERE task_id = the_task RETURNING channel LOOP
      PERFORM pg_notify(waiter.channel, note);
    END LOOP;
  ELSE
    PERFORM pg_notify(w.channel, note) FROM {schema}.pgqrs_waiters w WHERE w.task_id = the_task;
  END IF;
END $$;
