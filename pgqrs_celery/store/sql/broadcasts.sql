-- take: remove and return what has arrived for a consumer's volatile queues.
WITH t AS MATERIALIZED (
  SELECT broadcast_id
    FROM {schema}.pgqrs_broadcasts
   WHERE queue = ANY(%(queues)s::text[])
   ORDER BY priority DESC, broadcast_id
   LIMIT %(count)s::int
     FOR UPDATE SKIP LOCKED
)
DELETE FROM {schema}.pgqrs_broadcasts b
 USING t
 WHERE b.broadcast_id = t.broadcast_id
RETURNING b.message_id, b.broadcast_id AS position, b.queue, b.priority, b.expires_at <= {schema}.pgqrs_now() AS expired,
          b.headers, b.properties, b.body;
