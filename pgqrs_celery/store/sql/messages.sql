-- post: insert one message for the queue that its routing key names, commit, and hand it to one who sleeps.
CALL {schema}.pgqrs_put(%(message_id)s::uuid, %(routing_key)s, %(priority)s::int, %(visible_at)s::timestamptz,
                        %(ttl)s::float8, %(headers)s, %(properties)s, %(body)b::bytea, %(wake)s::boolean,
                        true, %(look_interval)s::float8, NULL);

-- put: insert one message for the queue that its routing key names; reports as publish does. A message that is there
-- already, because it is sent again, need not be on disk yet: something else is written that waits for it.
WITH place AS MATERIALIZED (
  SELECT coalesce(q.volatile, false) AS volatile,
         CASE WHEN %(visible_at)s::timestamptz > {schema}.pgqrs_now() THEN %(visible_at)s::timestamptz END AS visible_at,
         {schema}.pgqrs_now() + make_interval(secs => least(%(ttl)s::float8, q.message_ttl)) AS expires_at
    FROM (SELECT) AS one LEFT JOIN {schema}.pgqrs_queues q ON q.name = %(routing_key)s
), kept AS (
  INSERT INTO {schema}.pgqrs_messages
         (message_id, queue, priority, visible_at, expires_at, headers, properties, body)
  SELECT %(message_id)s::uuid, %(routing_key)s, %(priority)s::smallint, visible_at, expires_at,
         %(headers)s, %(properties)s, %(body)b::bytea
    FROM place
   WHERE NOT volatile
      ON CONFLICT (message_id) DO NOTHING
  RETURNING true
), again AS (
  SELECT {schema}.pgqrs_flush() FROM place WHERE NOT volatile AND NOT EXISTS (SELECT FROM kept)
), broadcast AS (
  INSERT INTO {schema}.pgqrs_broadcasts (message_id, queue, priority, expires_at, headers, properties, body)
  SELECT %(message_id)s::uuid, %(routing_key)s, %(priority)s::smallint, expires_at,
         %(headers)s, %(properties)s, %(body)b::bytea
    FROM place
   WHERE volatile
      ON CONFLICT (message_id) DO NOTHING
)
SELECT %(routing_key)s::text AS queue, volatile, (visible_at IS NULL AND NOT volatile)::int AS ready,
       extract(epoch FROM visible_at - {schema}.pgqrs_now())::float8 AS due_in
  FROM place, (SELECT count(*) FROM again) AS flushed;

-- publish: route and insert messages; reports per queue how many there are and when the first is due.
WITH given AS (
  SELECT *
    FROM unnest(%(message_id)s::uuid[], %(exchange)s::text[], %(routing_key)s::text[], %(priority)s::int[],
                %(visible_at)s::timestamptz[], %(ttl)s::float8[], %(headers)b::text[], %(properties)b::text[],
                %(body)b::bytea[])
         WITH ORDINALITY
         AS g (message_id, exchange, routing_key, priority, visible_at, ttl, headers, properties, body, nth)
), routed AS (
  SELECT g.nth, g.message_id, g.routing_key AS queue
    FROM given g
   WHERE g.exchange = ''
  UNION ALL
  SELECT DISTINCT g.nth, md5(g.message_id::text || b.queue)::uuid, b.queue
    FROM given g JOIN {schema}.pgqrs_bindings b ON b.exchange = g.exchange
   WHERE g.exchange <> ''
     AND CASE b.kind WHEN 'direct' THEN b.routing_key = g.routing_key
                     WHEN 'topic' THEN g.routing_key ~ b.pattern
                     ELSE true END
), placed AS MATERIALIZED (
  SELECT g.nth, r.message_id, r.queue, coalesce(q.volatile, false) AS volatile, g.priority,
         CASE WHEN g.visible_at > {schema}.pgqrs_now() THEN g.visible_at END AS visible_at,
         {schema}.pgqrs_now() + make_interval(secs => least(g.ttl, q.message_ttl)) AS expires_at,
         g.headers, g.properties, g.body
    FROM routed r JOIN given g USING (nth) LEFT JOIN {schema}.pgqrs_queues q ON q.name = r.queue
), kept AS (
  INSERT INTO {schema}.pgqrs_messages
         (message_id, queue, priority, visible_at, expires_at, headers, properties, body)
  SELECT message_id, queue, priority, visible_at, expires_at, headers, properties, body
    FROM placed
   WHERE NOT volatile
   ORDER BY nth
      ON CONFLICT (message_id) DO NOTHING
  RETURNING true
), again AS (
  SELECT {schema}.pgqrs_flush()
   WHERE EXISTS (SELECT FROM placed WHERE NOT volatile) AND NOT EXISTS (SELECT FROM kept)
), broadcast AS (
  INSERT INTO {schema}.pgqrs_broadcasts (message_id, queue, priority, expires_at, headers, properties, body)
  SELECT message_id, queue, priority, expires_at, headers, properties, body
    FROM placed
   WHERE volatile
   ORDER BY nth
      ON CONFLICT (message_id) DO NOTHING
)
SELECT queue, volatile, count(*) FILTER (WHERE visible_at IS NULL AND NOT volatile)::int AS ready,
       extract(epoch FROM min(visible_at) - {schema}.pgqrs_now())::float8 AS due_in
  FROM placed, (SELECT count(*) FROM again) AS flushed
 GROUP BY queue, volatile;

-- claim: delete what was acknowledged and lease what is ready, queue after queue in the order given.
WITH done AS (
  DELETE FROM {schema}.pgqrs_messages WHERE message_id = ANY(%(done)s::uuid[])
), awake AS (
  UPDATE {schema}.pgqrs_consumers SET asleep = false
   WHERE consumer_id = %(consumer_id)s::uuid AND asleep AND %(awake)s::boolean
), taken AS MATERIALIZED (
  SELECT m.message_id
    FROM unnest(%(queues)s::text[]) WITH ORDINALITY AS q (name, nth)
         CROSS JOIN LATERAL (
           SELECT c.message_id
             FROM {schema}.pgqrs_messages c
            WHERE c.queue = q.name
              AND c.visible_at IS NULL
              AND (c.leased_until <= {schema}.pgqrs_now() OR c.leased_by = ANY(%(dead)s::uuid[]))
              AND (c.expires_at IS NULL OR c.expires_at > {schema}.pgqrs_now())
              AND c.message_id <> ALL(%(done)s::uuid[])
            ORDER BY c.priority DESC, c.position
            LIMIT 100
              FOR NO KEY UPDATE SKIP LOCKED) AS m
   LIMIT %(count)s::int
)
UPDATE {schema}.pgqrs_messages m
   SET leased_until = {schema}.pgqrs_now() + make_interval(secs => %(lease)s::float8),
       leased_by = %(consumer_id)s::uuid,
       deliveries = m.deliveries + 1,
       lost = m.lost + (m.leased_by IS NOT NULL)::int
  FROM taken
 WHERE m.message_id = taken.message_id
RETURNING m.message_id, m.position, m.queue, m.priority, m.deliveries, m.lost, m.headers, m.properties, m.body;

-- delete: remove acknowledged messages, whoever has them now: their work is done.
DELETE FROM {schema}.pgqrs_messages
 WHERE message_id = ANY(%(message_ids)s::uuid[])
RETURNING message_id;

-- release: give leased messages back to their queues, at their old places.
UPDATE {schema}.pgqrs_messages
   SET leased_until = '-infinity', leased_by = NULL
 WHERE message_id = ANY(%(message_ids)s::uuid[]) AND leased_by = %(consumer_id)s
RETURNING queue;

-- extend: keep leases; returns the messages that are still the consumer's. Rows are locked in the order in which the
-- consumer's own acknowledgements lock them, that of the ids: the two may meet.
WITH mine AS MATERIALIZED (
  SELECT message_id
    FROM {schema}.pgqrs_messages
   WHERE message_id = ANY(%(message_ids)s::uuid[]) AND leased_by = %(consumer_id)s
   ORDER BY message_id
     FOR NO KEY UPDATE
)
UPDATE {schema}.pgqrs_messages m
   SET leased_until = {schema}.pgqrs_now() + make_interval(secs => %(lease)s)
  FROM mine,
       (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE m.message_id = mine.message_id
RETURNING m.message_id;

-- adopt: hand the leases of consumers to the one they have become; returns what it still has.
UPDATE {schema}.pgqrs_messages
   SET leased_by = %(consumer_id)s, leased_until = {schema}.pgqrs_now() + make_interval(secs => %(lease)s)
 WHERE message_id = ANY(%(message_ids)s::uuid[]) AND leased_by = ANY(%(formers)s::uuid[])
RETURNING message_id;

-- promote: make a batch of messages ready whose time has come; returns their queues.
WITH due AS MATERIALIZED (
  SELECT d.message_id
    FROM unnest(%(queues)s::text[]) AS q (name)
         CROSS JOIN LATERAL (
           SELECT c.message_id
             FROM {schema}.pgqrs_messages c
            WHERE c.queue = q.name AND c.visible_at IS NOT NULL AND c.visible_at <= {schema}.pgqrs_now()
            ORDER BY c.visible_at
            LIMIT 500
              FOR NO KEY UPDATE SKIP LOCKED) AS d
   LIMIT 500
)
UPDATE {schema}.pgqrs_messages m
   SET visible_at = NULL
  FROM due,
       (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE m.message_id = due.message_id
RETURNING m.queue;

-- deferred: the messages that wait for their ETA, those due first.
SELECT message_id, headers, properties, body
  FROM {schema}.pgqrs_messages
 WHERE queue = ANY(%(queues)s::text[]) AND visible_at IS NOT NULL
 ORDER BY visible_at
 LIMIT %(limit)s;

-- bury: move messages to the dead-letter queue, with the reason in their headers.
UPDATE {schema}.pgqrs_messages m
   SET queue = g.queue, headers = g.headers, leased_until = '-infinity', leased_by = NULL, deliveries = 0, lost = 0,
       visible_at = NULL, expires_at = {schema}.pgqrs_now() + make_interval(secs => %(retention)s)
  FROM unnest(%(message_id)s::uuid[], %(queue)s::text[], %(headers)s::text[]) AS g (message_id, queue, headers)
 WHERE m.message_id = g.message_id AND m.leased_by = %(consumer_id)s
RETURNING m.message_id;

-- size: how many messages a queue holds that nobody has leased, waiting ETAs included.
SELECT (SELECT count(*) FROM {schema}.pgqrs_messages
         WHERE queue = %(queue)s AND visible_at IS NULL
           AND (leased_until <= {schema}.pgqrs_now())
           AND (expires_at IS NULL OR expires_at > {schema}.pgqrs_now()))
     + (SELECT count(*) FROM {schema}.pgqrs_messages WHERE queue = %(queue)s AND visible_at IS NOT NULL)
     + (SELECT count(*) FROM {schema}.pgqrs_broadcasts WHERE queue = %(queue)s);

-- purge: remove every message of a queue that nobody has leased; returns how many.
WITH kept AS (
  DELETE FROM {schema}.pgqrs_messages
   WHERE queue = %(queue)s AND leased_until <= {schema}.pgqrs_now()
  RETURNING 1
), broadcast AS (
  DELETE FROM {schema}.pgqrs_broadcasts WHERE queue = %(queue)s RETURNING 1
)
SELECT (SELECT count(*) FROM kept) + (SELECT count(*) FROM broadcast);
