-- declare: enter a queue, or note that it is in use.
INSERT INTO {schema}.pgqrs_queues AS q (name, volatile, auto_delete, message_ttl, expires_after, arguments)
VALUES (%(name)s, %(volatile)s, %(auto_delete)s, %(message_ttl)s, %(expires_after)s, %(arguments)s::jsonb)
    ON CONFLICT (name) DO UPDATE
   SET used_at = {schema}.pgqrs_now(), message_ttl = excluded.message_ttl, expires_after = excluded.expires_after,
       arguments = excluded.arguments, auto_delete = excluded.auto_delete
 WHERE (q.message_ttl, q.expires_after, q.arguments, q.auto_delete)
       IS DISTINCT FROM (excluded.message_ttl, excluded.expires_after, excluded.arguments, excluded.auto_delete)
    OR q.expires_after IS NOT NULL;

-- find: a queue as it was declared.
SELECT name, volatile, auto_delete, arguments::text AS arguments FROM {schema}.pgqrs_queues WHERE name = %(name)s;

-- holds_messages: whether there is anything in a queue.
SELECT EXISTS (SELECT FROM {schema}.pgqrs_messages WHERE queue = %(name)s AND visible_at IS NULL)
    OR EXISTS (SELECT FROM {schema}.pgqrs_messages WHERE queue = %(name)s AND visible_at IS NOT NULL)
    OR EXISTS (SELECT FROM {schema}.pgqrs_broadcasts WHERE queue = %(name)s);

-- consumers: how many consumers a queue has.
SELECT count(*) FROM {schema}.pgqrs_consumers WHERE %(name)s = ANY(queues) AND dead_at IS NULL;

-- delete: remove queues with their bindings and messages; returns how many messages were thrown away.
WITH gone AS (
  DELETE FROM {schema}.pgqrs_queues WHERE name = ANY(%(names)s::text[])
), unbound AS (
  DELETE FROM {schema}.pgqrs_bindings WHERE queue = ANY(%(names)s::text[])
), kept AS (
  DELETE FROM {schema}.pgqrs_messages WHERE queue = ANY(%(names)s::text[]) RETURNING 1
), broadcast AS (
  DELETE FROM {schema}.pgqrs_broadcasts WHERE queue = ANY(%(names)s::text[]) RETURNING 1
)
SELECT (SELECT count(*) FROM kept) + (SELECT count(*) FROM broadcast);

-- deserted: of these queues, those that end with their last consumer and have none but this one.
SELECT q.name
  FROM {schema}.pgqrs_queues q
 WHERE q.name = ANY(%(names)s::text[])
   AND q.auto_delete
   AND NOT EXISTS (SELECT FROM {schema}.pgqrs_consumers c
                    WHERE q.name = ANY(c.queues) AND c.dead_at IS NULL
                      AND c.consumer_id IS DISTINCT FROM %(consumer_id)s::uuid);

-- sweep: note which queues are used; remove a batch of expired messages and long dead consumers; name expired queues.
WITH used AS (
  UPDATE {schema}.pgqrs_queues
     SET used_at = {schema}.pgqrs_now()
    FROM (SELECT set_config('synchronous_commit', 'off', true)) AS c
   WHERE name = ANY(%(names)s::text[])
), late AS (
  SELECT message_id
    FROM {schema}.pgqrs_messages
   WHERE expires_at <= {schema}.pgqrs_now() AND leased_until <= {schema}.pgqrs_now()
   ORDER BY expires_at
   LIMIT 1000
     FOR UPDATE SKIP LOCKED
), gone AS (
  DELETE FROM {schema}.pgqrs_messages m USING late WHERE m.message_id = late.message_id RETURNING 1
), stale AS (
  DELETE FROM {schema}.pgqrs_broadcasts WHERE expires_at <= {schema}.pgqrs_now()
), forgotten AS (
  DELETE FROM {schema}.pgqrs_consumers
   WHERE dead_at < {schema}.pgqrs_now() - make_interval(secs => 2 * %(lease)s)
      OR lock_key IS NULL AND seen_at < {schema}.pgqrs_now() - make_interval(secs => 2 * %(lease)s)
)
SELECT (SELECT count(*) FROM gone)::int AS expired,
       ARRAY(SELECT q.name
               FROM {schema}.pgqrs_queues q
              WHERE q.used_at + make_interval(secs => coalesce(q.expires_after, 600)) <= {schema}.pgqrs_now()
                AND (q.expires_after IS NOT NULL OR q.auto_delete)
                AND NOT q.name = ANY(%(names)s::text[])
                AND NOT EXISTS (SELECT FROM {schema}.pgqrs_consumers c
                                 WHERE q.name = ANY(c.queues) AND c.dead_at IS NULL)) AS deserted;

-- bind: let an exchange route to a queue.
INSERT INTO {schema}.pgqrs_bindings (exchange, queue, routing_key, kind, pattern)
VALUES (%(exchange)s, %(queue)s, %(routing_key)s, %(kind)s, %(pattern)s)
    ON CONFLICT (exchange, queue, routing_key) DO UPDATE
   SET kind = excluded.kind, pattern = excluded.pattern
 WHERE {schema}.pgqrs_bindings.kind <> excluded.kind;

-- unbind: end a binding.
DELETE FROM {schema}.pgqrs_bindings
 WHERE exchange = %(exchange)s AND queue = %(queue)s AND routing_key = %(routing_key)s;

-- bindings: all bindings, or those of one exchange.
SELECT queue, exchange, routing_key
  FROM {schema}.pgqrs_bindings
 WHERE %(exchange)s::text IS NULL OR exchange = %(exchange)s
 ORDER BY exchange, queue, routing_key;

-- delete_exchange: remove all bindings of an exchange.
DELETE FROM {schema}.pgqrs_bindings WHERE exchange = %(exchange)s;

-- listed: every queue with its waiting and leased messages, for people.
SELECT q.name, q.volatile,
       (SELECT count(*) FROM {schema}.pgqrs_messages m
         WHERE m.queue = q.name AND m.visible_at IS NULL AND m.leased_until <= {schema}.pgqrs_now()) AS ready,
       (SELECT count(*) FROM {schema}.pgqrs_messages m
         WHERE m.queue = q.name AND m.visible_at IS NOT NULL) AS deferred,
       (SELECT count(*) FROM {schema}.pgqrs_messages m
         WHERE m.queue = q.name AND m.visible_at IS NULL AND m.leased_until > {schema}.pgqrs_now()) AS leased,
       (SELECT count(*) FROM {schema}.pgqrs_consumers c WHERE q.name = ANY(c.queues) AND c.dead_at IS NULL) AS consumers
  FROM {schema}.pgqrs_queues q
 ORDER BY q.name;
