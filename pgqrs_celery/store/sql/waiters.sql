-- register: say that a channel wants to hear of these tasks' results, or still does; after a crash it says so again.
INSERT INTO {schema}.pgqrs_waiters (task_id, channel)
SELECT DISTINCT t.task_id, %(channel)s
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS c, unnest(%(task_ids)s::text[]) AS t (task_id)
    ON CONFLICT (task_id, channel) DO UPDATE SET seen_at = {schema}.pgqrs_now();

-- cancel: a channel no longer cares for these tasks.
DELETE FROM {schema}.pgqrs_waiters WHERE task_id = ANY(%(task_ids)s) AND channel = %(channel)s;

-- forget: nobody will hear of these tasks any more.
DELETE FROM {schema}.pgqrs_waiters WHERE task_id = ANY(%(task_ids)s);

-- wake: tell whoever waits for a task that its final result is there; nobody needs to wait for it after that. Nor does
-- it wait for the disk, which the result is on: a NOTIFY would keep all others waiting for that, too.
WITH woken AS (
  DELETE FROM {schema}.pgqrs_waiters WHERE task_id = %(task_id)s RETURNING channel
)
SELECT pg_notify(w.channel, %(task_id)s::text || chr(31)
                            || CASE WHEN octet_length(r.data::text) + octet_length(%(task_id)s::text) < 7900
                                 THEN r.data::text ELSE '' END)
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS c,
       woken w LEFT JOIN {schema}.pgqrs_task_results r ON r.task_id = %(task_id)s;

-- nudge: tell whoever waits for a task that its state has changed.
SELECT pg_notify(w.channel, %(task_id)s::text || chr(31)
                            || CASE WHEN octet_length(r.data::text) + octet_length(%(task_id)s::text) < 7900
                                 THEN r.data::text ELSE '' END)
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS c,
       {schema}.pgqrs_waiters w LEFT JOIN {schema}.pgqrs_task_results r ON r.task_id = %(task_id)s
 WHERE w.task_id = %(task_id)s;

-- ping: send a channel an empty notification, to learn whether any arrive.
SELECT pg_notify(%(channel)s, '');

-- prune: remove what processes that died while waiting have left.
WITH gone AS MATERIALIZED (
  SELECT task_id, channel FROM {schema}.pgqrs_waiters
   WHERE seen_at < {schema}.pgqrs_now() - make_interval(secs => %(age)s)
   LIMIT %(limit)s
     FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.pgqrs_waiters w USING gone WHERE (w.task_id, w.channel) = (gone.task_id, gone.channel);
