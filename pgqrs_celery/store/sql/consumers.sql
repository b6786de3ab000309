-- lock: hold a consumer's lock for as long as this session lives.
SELECT pg_advisory_lock(%(key)s);

-- register: enter a consumer, under the session lock taken just before, and end those it was before.
WITH former AS (
  INSERT INTO {schema}.pgqrs_consumers AS f (consumer_id, hostname, pid, dead_at)
  SELECT former, %(hostname)s, %(pid)s, {schema}.pgqrs_now()
    FROM unnest(%(formers)s::uuid[]) AS g (former)
      ON CONFLICT (consumer_id) DO UPDATE SET dead_at = excluded.dead_at
), entered AS (
  INSERT INTO {schema}.pgqrs_consumers AS c (consumer_id, lock_key, hostname, pid, queues, lease)
  VALUES (%(consumer_id)s, %(lock_key)s, %(hostname)s, %(pid)s, %(queues)s::text[], %(lease)s)
      ON CONFLICT (consumer_id) DO UPDATE SET queues = excluded.queues, seen_at = {schema}.pgqrs_now()
  RETURNING c.consumer_id, c.queues
)
SELECT pg_notify('pgqrs_' || replace(c.consumer_id::text, '-', ''), 'look')
  FROM entered e
       JOIN {schema}.pgqrs_consumers c ON c.queues && e.queues AND c.consumer_id <> e.consumer_id AND c.dead_at IS NULL;

-- remove: a consumer ended as it should. Where something may just have been handed to it, it counts as dead instead, so
-- that the others look for that.
WITH gone AS (
  DELETE FROM {schema}.pgqrs_consumers WHERE consumer_id = %(consumer_id)s AND NOT %(leasing)s
), dead AS (
  UPDATE {schema}.pgqrs_consumers
     SET dead_at = {schema}.pgqrs_now(), asleep = false
   WHERE consumer_id = %(consumer_id)s AND %(leasing)s
  RETURNING consumer_id, queues
)
SELECT pg_notify('pgqrs_' || replace(c.consumer_id::text, '-', ''), 'look')
  FROM dead d
       JOIN {schema}.pgqrs_consumers c ON c.queues && d.queues AND c.consumer_id <> d.consumer_id AND c.dead_at IS NULL;

-- doze: say that the consumer wants to be notified; returns whether there is something to do after all.
CALL {schema}.pgqrs_doze(%(consumer_id)s::uuid, %(queues)s::text[], %(nap)s::bigint, NULL);

-- wake: notify as many sleeping consumers of each queue as it has new messages, and all that must look at it.
WITH chosen AS MATERIALIZED (
  SELECT s.consumer_id
    FROM (SELECT set_config('synchronous_commit', 'off', true)) AS a,
         json_to_recordset(%(ready)s::json) AS w (queue text, ready int)
         CROSS JOIN LATERAL (
           SELECT c.consumer_id
             FROM {schema}.pgqrs_consumers c
            WHERE c.asleep AND w.queue = ANY(c.queues) AND c.dead_at IS NULL
              AND c.consumer_id IS DISTINCT FROM %(besides)s::uuid
            ORDER BY random()
            LIMIT w.ready
              FOR NO KEY UPDATE SKIP LOCKED) AS s
), woken AS (
  UPDATE {schema}.pgqrs_consumers c
     SET asleep = false
    FROM chosen
   WHERE c.consumer_id = chosen.consumer_id
  RETURNING pg_notify('pgqrs_' || replace(c.consumer_id::text, '-', ''), 'ready')
), told AS (
  SELECT pg_notify('pgqrs_' || replace(c.consumer_id::text, '-', ''), l.payload)
    FROM json_to_recordset(%(looks)s::json) AS l (queue text, payload text)
         JOIN {schema}.pgqrs_consumers c ON l.queue = ANY(c.queues) AND c.dead_at IS NULL
)
SELECT (SELECT count(*) FROM woken) + (SELECT count(*) FROM told);

-- tell: notify all consumers of these queues, from within somebody's transaction, when it commits.
SELECT pg_notify('pgqrs_' || replace(c.consumer_id::text, '-', ''), payload)
  FROM {schema}.pgqrs_consumers c, unnest(ARRAY['ready', 'arrived', 'look']) AS payload
 WHERE c.queues && %(queues)s::text[] AND c.dead_at IS NULL;

-- hail: tell every consumer to look.
SELECT pg_notify('pgqrs_' || replace(consumer_id::text, '-', ''), 'look')
  FROM {schema}.pgqrs_consumers
 WHERE dead_at IS NULL;

-- touch: a consumer lives. A statement of its own, before the consumer looks around: a publisher does not find a sleeper
-- whose row is locked, and what he has published is seen by that look.
UPDATE {schema}.pgqrs_consumers
   SET seen_at = {schema}.pgqrs_now()
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE consumer_id = %(consumer_id)s;

-- watch: what a consumer has to know: is there work, when is the next ETA due, who has died, who listens.
WITH judged AS NOT MATERIALIZED (
  SELECT c.consumer_id, c.lock_key
    FROM {schema}.pgqrs_consumers c
   WHERE c.dead_at IS NULL AND (%(judge)s OR %(settled)s AND c.server_started_at = pg_postmaster_start_time())
), near AS MATERIALIZED (
  SELECT c.consumer_id, c.lock_key
    FROM judged c
   WHERE c.lock_key IS NOT NULL AND c.consumer_id <> %(consumer_id)s
   ORDER BY c.consumer_id <= %(consumer_id)s, c.consumer_id
   LIMIT %(near)s
), free AS MATERIALIZED (
  SELECT consumer_id
    FROM (SELECT consumer_id, lock_key FROM near
          UNION
          SELECT c.consumer_id, c.lock_key FROM judged c WHERE c.consumer_id = ANY(%(suspects)s::uuid[])) AS n
   WHERE pg_try_advisory_xact_lock_shared(lock_key)
), buried AS (
  UPDATE {schema}.pgqrs_consumers c
     SET dead_at = {schema}.pgqrs_now()
    FROM free
   WHERE c.consumer_id = free.consumer_id AND c.consumer_id = ANY(%(suspects)s::uuid[])
  RETURNING c.consumer_id, c.queues
), told AS (
  SELECT pg_notify('pgqrs_' || replace(c.consumer_id::text, '-', ''), 'look')
    FROM {schema}.pgqrs_consumers c
   WHERE c.dead_at IS NULL AND c.consumer_id <> %(consumer_id)s
     AND EXISTS (SELECT FROM buried b WHERE b.queues && c.queues AND b.consumer_id <> c.consumer_id)
)
SELECT EXISTS (SELECT
                 FROM unnest(%(queues)s::text[]) AS q (name)
                WHERE EXISTS (SELECT
                                FROM {schema}.pgqrs_messages m
                               WHERE m.queue = q.name AND m.visible_at IS NULL
                                 AND (m.leased_until <= {schema}.pgqrs_now()
                                      OR m.leased_by IN (SELECT consumer_id FROM {schema}.pgqrs_consumers
                                                          WHERE dead_at IS NOT NULL))
                                 AND (m.expires_at IS NULL OR m.expires_at > {schema}.pgqrs_now()))) AS ready,
       EXISTS (SELECT FROM {schema}.pgqrs_broadcasts WHERE queue = ANY(%(volatile)s::text[])) AS arrived,
       (SELECT extract(epoch FROM min(d.visible_at) - {schema}.pgqrs_now())::float8
          FROM unnest(%(queues)s::text[]) AS q (name)
               CROSS JOIN LATERAL (SELECT visible_at
                                     FROM {schema}.pgqrs_messages m
                                    WHERE m.queue = q.name AND m.visible_at IS NOT NULL
                                    ORDER BY visible_at
                                    LIMIT 1) AS d) AS due_in,
       ARRAY(SELECT consumer_id FROM {schema}.pgqrs_consumers WHERE dead_at IS NOT NULL
             UNION SELECT consumer_id FROM buried) AS dead,
       ARRAY(SELECT consumer_id FROM free EXCEPT SELECT consumer_id FROM buried) AS suspects,
       EXISTS (SELECT FROM {schema}.pgqrs_consumers
                WHERE queues && %(queues)s::text[] AND dead_at IS NULL AND consumer_id <> %(consumer_id)s) AS shared,
       EXISTS (SELECT FROM {schema}.pgqrs_consumers
                WHERE consumer_id = %(consumer_id)s AND dead_at IS NULL) AS registered,
       ARRAY(SELECT DISTINCT b.exchange
               FROM {schema}.pgqrs_bindings b) AS bound,
       (SELECT count(*) FROM told) = 0
       AND (%(judge)s OR %(settled)s AND NOT EXISTS (
             SELECT FROM {schema}.pgqrs_consumers c
              WHERE c.dead_at IS NULL AND c.server_started_at IS DISTINCT FROM pg_postmaster_start_time()))
       AND cardinality(%(apps)s::text[]) > 0
       AND NOT EXISTS (SELECT
                         FROM {schema}.pgqrs_consumers c
                        WHERE c.dead_at IS NULL AND c.consumer_id <> %(consumer_id)s
                          AND (c.queues && %(queues)s::text[] OR c.consumer_id IN (SELECT consumer_id FROM near))
                          AND NOT EXISTS (SELECT
                                            FROM {schema}.pgqrs_workers w
                                           WHERE w.app = ANY(%(apps)s::text[]) AND w.stopped_at IS NULL AND w.locked
                                             AND w.pid = c.pid AND split_part(w.hostname, '@', 2) = c.hostname)
                      ) AS watched;
