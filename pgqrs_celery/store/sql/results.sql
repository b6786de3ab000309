-- store: keep a result, unless the task already has a SUCCESS.
INSERT INTO {schema}.pgqrs_task_results AS t (task_id, status, data, body, format, expires_at)
VALUES (%(task_id)s, %(status)s, %(data)s::json, %(body)b::bytea, %(format)s,
        {schema}.pgqrs_now() + make_interval(secs => %(expires)s::float8))
    ON CONFLICT (task_id) DO UPDATE
   SET status = excluded.status, data = excluded.data, body = excluded.body, format = excluded.format,
       stored_at = excluded.stored_at, expires_at = excluded.expires_at
 WHERE t.status <> 'SUCCESS' OR t.expires_at <= {schema}.pgqrs_now();

-- store_and_wake: keep a result, commit, then tell its waiters; not inside a transaction.
CALL {schema}.pgqrs_store_result(%(task_id)s, %(status)s, %(data)s::json, %(body)b::bytea, %(format)s,
                                 %(expires)s::float8, %(final)s);

-- store_with_part: keep a result and the chord part that goes with it, both or neither, where "accepted" has a row.
WITH accepted AS MATERIALIZED (
  {accepted}
), stored AS (
  INSERT INTO {schema}.pgqrs_task_results AS t (task_id, status, data, body, format, expires_at)
  SELECT %(task_id)s, %(status)s, %(data)s::json, %(body)b::bytea, %(format)s,
         {schema}.pgqrs_now() + make_interval(secs => %(expires)s::float8)
    FROM accepted
   WHERE num_nonnulls(%(data)s::text, %(body)b::bytea) = 1
      ON CONFLICT (task_id) DO UPDATE
     SET status = excluded.status, data = excluded.data, body = excluded.body, format = excluded.format,
         stored_at = excluded.stored_at, expires_at = excluded.expires_at
   WHERE t.status <> 'SUCCESS' OR t.expires_at <= {schema}.pgqrs_now()
), part AS (
  INSERT INTO {schema}.pgqrs_chord_parts AS p (chord_id, idx, task_id, status, data, body, format, told)
  SELECT c.chord_id, %(part_idx)s, %(task_id)s, %(part_status)s, %(part_data)s::json, %(part_body)b::bytea,
         %(part_format)s, %(part_told)s::json
    FROM accepted, {schema}.pgqrs_chords c
   WHERE c.chord_id = %(chord_id)s AND c.dispatched_at IS NULL
      ON CONFLICT (chord_id, idx, task_id) DO UPDATE
     SET status = excluded.status, data = excluded.data, body = excluded.body, format = excluded.format
   WHERE p.status IN ('FAILURE', 'REVOKED') AND excluded.status NOT IN ('FAILURE', 'REVOKED')
  RETURNING xmax = 0 AS fresh
), tally AS (
  INSERT INTO {schema}.pgqrs_chord_tallies AS t (chord_id, slot, parts)
  SELECT %(chord_id)s, pg_backend_pid() %% 32, 1 FROM part WHERE fresh
      ON CONFLICT (chord_id, slot) DO UPDATE SET parts = t.parts + 1
)
SELECT EXISTS (SELECT FROM accepted);

-- fetch: the result of one task, unless it has expired.
SELECT status, data, body, format
  FROM {schema}.pgqrs_task_results
 WHERE task_id = %(task_id)s AND (expires_at IS NULL OR expires_at > {schema}.pgqrs_now());

-- fetch_many: the results of several tasks, without those that have expired.
SELECT task_id, status, data, body, format
  FROM {schema}.pgqrs_task_results
 WHERE task_id = ANY(%(task_ids)s) AND (expires_at IS NULL OR expires_at > {schema}.pgqrs_now());

-- forget: remove the result of one task.
DELETE FROM {schema}.pgqrs_task_results WHERE task_id = %(task_id)s;

-- forget_many: remove the results of tasks and groups, whatever their lifetime is.
WITH results AS (
  DELETE FROM {schema}.pgqrs_task_results WHERE task_id = ANY(%(ids)s)
)
DELETE FROM {schema}.pgqrs_groups WHERE group_id = ANY(%(ids)s);

-- forget_failures: remove what tasks that will run again have failed with.
DELETE FROM {schema}.pgqrs_task_results
 WHERE task_id = ANY(%(task_ids)s) AND status IN ('FAILURE', 'REVOKED');

-- save_group: keep a GroupResult.
INSERT INTO {schema}.pgqrs_groups (group_id, data, body, format, expires_at)
VALUES (%(group_id)s, %(data)s::json, %(body)b::bytea, %(format)s,
        {schema}.pgqrs_now() + make_interval(secs => %(expires)s::float8))
    ON CONFLICT (group_id) DO UPDATE
   SET data = excluded.data, body = excluded.body, format = excluded.format,
       stored_at = excluded.stored_at, expires_at = excluded.expires_at;

-- fetch_group: a saved GroupResult, unless it has expired.
SELECT data, body, format
  FROM {schema}.pgqrs_groups
 WHERE group_id = %(group_id)s AND (expires_at IS NULL OR expires_at > {schema}.pgqrs_now());

-- forget_group: remove a saved GroupResult.
DELETE FROM {schema}.pgqrs_groups WHERE group_id = %(group_id)s;

-- prune: remove a batch of expired results, past those that others are removing.
WITH gone AS MATERIALIZED (
  SELECT task_id FROM {schema}.pgqrs_task_results
   WHERE expires_at <= {schema}.pgqrs_now()
   ORDER BY expires_at LIMIT %(limit)s
     FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.pgqrs_task_results r USING gone WHERE r.task_id = gone.task_id;

-- prune_groups: remove a batch of expired groups.
WITH gone AS MATERIALIZED (
  SELECT group_id FROM {schema}.pgqrs_groups
   WHERE expires_at <= {schema}.pgqrs_now()
   ORDER BY expires_at LIMIT %(limit)s
     FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.pgqrs_groups g USING gone WHERE g.group_id = gone.group_id;
