-- register: a new incarnation of a worker, under the session lock taken just before.
WITH session AS (
  INSERT INTO {schema}.pgqrs_sessions (worker_id) SELECT %(worker_id)s::uuid WHERE %(locked)s
)
INSERT INTO {schema}.pgqrs_workers (worker_id, app, hostname, pid, locked)
VALUES (%(worker_id)s, %(app)s, %(hostname)s, %(pid)s, %(locked)s);

-- lock: hold the incarnation's lock for as long as this session lives.
SELECT pg_advisory_lock(%(key)s);

-- beat: the worker is alive; keep its watermarks.
UPDATE {schema}.pgqrs_workers
   SET seen_at = {schema}.pgqrs_now(), watermarks = %(watermarks)s::jsonb
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE worker_id = %(worker_id)s;

-- stop: the worker ended, or is somebody else now.
WITH session AS (
  DELETE FROM {schema}.pgqrs_sessions WHERE worker_id = %(worker_id)s
)
UPDATE {schema}.pgqrs_workers
   SET stopped_at = coalesce(stopped_at, {schema}.pgqrs_now())
 WHERE worker_id = %(worker_id)s;

-- neighbours: the next few workers of the app in ring order, whether each one's session lock is free, and whether that
-- is certain to mean that the session has ended.
SELECT n.worker_id, n.lock_key, pg_try_advisory_xact_lock_shared(n.lock_key) AS free,
       EXISTS (SELECT FROM {schema}.pgqrs_sessions s
                WHERE s.worker_id = n.worker_id AND s.server_started_at = pg_postmaster_start_time()) AS certain
  FROM (SELECT w.worker_id, ('x' || substr(w.worker_id::text, 1, 8) || substr(w.worker_id::text, 10, 4)
                             || substr(w.worker_id::text, 15, 4))::bit(64)::bigint AS lock_key
          FROM {schema}.pgqrs_workers w
         WHERE w.app = %(app)s AND w.stopped_at IS NULL AND w.locked AND w.worker_id <> %(worker_id)s
         ORDER BY w.worker_id <= %(worker_id)s, w.worker_id
         LIMIT %(limit)s) AS n;

-- try_lock: whether a worker's session lock is free; ours until the end of the transaction if so.
SELECT pg_try_advisory_xact_lock(%(key)s);

-- watermarks: per queue, the newest send time any living worker has received.
SELECT m.key, max(m.value::timestamptz)
  FROM {schema}.pgqrs_workers w, jsonb_each_text(w.watermarks) AS m
 WHERE w.app = %(app)s AND w.seen_at > {schema}.pgqrs_now() - interval '1 day'
 GROUP BY m.key;

-- forget: remove incarnations that ended long ago, and those that nobody watches and nobody has heard of.
DELETE FROM {schema}.pgqrs_workers
 WHERE app = %(app)s
   AND (stopped_at < {schema}.pgqrs_now() - interval '7 days'
        OR NOT locked AND seen_at < {schema}.pgqrs_now() - interval '7 days');
