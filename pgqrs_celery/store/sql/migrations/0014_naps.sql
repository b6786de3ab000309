-- Naps are numbered by the consumer, and a message handed to a sleeper says in which nap it was found. A notification may
-- come late, when the consumer has looked, found nothing and fallen asleep again: then it knows that it passes for asleep.

ALTER TABLE {schema}.pgqrs_consumers ADD COLUMN nap bigint NOT NULL DEFAULT 0;

COMMENT ON COLUMN {schema}.pgqrs_consumers.nap IS 'how often it has fallen asleep, by its own count';

DROP PROCEDURE {schema}.pgqrs_doze;

-- Falling asleep: say so, commit, and only then look once more whether there is something to do.
CREATE PROCEDURE {schema}.pgqrs_doze(in_consumer_id uuid, in_queues text[], in_nap bigint, INOUT ready boolean)
LANGUAGE plpgsql
AS $$
BEGIN
  PERFORM set_config('synchronous_commit', 'off', true);
  UPDATE {schema}.pgqrs_consumers SET asleep = true, nap = in_nap WHERE consumer_id = in_consumer_id;
  COMMIT;
  SELECT EXISTS (SELECT
                   FROM unnest(in_queues) AS q (name)
                  WHERE EXISTS (SELECT
                                  FROM {schema}.pgqrs_messages m
                                 WHERE m.queue = q.name AND m.visible_at IS NULL
                                   AND m.leased_until <= {schema}.pgqrs_now()
                                   AND (m.expires_at IS NULL OR m.expires_at > {schema}.pgqrs_now())))
    INTO ready;
END $$;

DROP PROCEDURE {schema}.pgqrs_put;

-- As before (0013) but for the nap.
CREATE PROCEDURE {schema}.pgqrs_put(
  in_message_id uuid, in_queue text, in_priority integer, in_visible_at timestamptz, in_ttl double precision,
  in_headers text, in_properties text, in_body bytea, in_wake boolean, in_look_interval double precision,
  INOUT volatile boolean)
LANGUAGE plpgsql
AS $$
DECLARE
  waits_until timestamptz := CASE WHEN in_visible_at > {schema}.pgqrs_now() THEN in_visible_at END;
  ttl double precision;
  sleeper uuid;
  listens boolean;
  its_lease double precision;
  its_nap bigint;
  handed text;
BEGIN
  SELECT q.volatile, q.message_ttl INTO volatile, ttl FROM {schema}.pgqrs_queues q WHERE q.name = in_queue;
  ttl := least(in_ttl, ttl);
  IF volatile THEN
    INSERT INTO {schema}.pgqrs_broadcasts (message_id, queue, priority, expires_at, headers, properties, body)
    VALUES (in_message_id, in_queue, in_priority, {schema}.pgqrs_now() + make_interval(secs => ttl),
            in_headers, in_properties, in_body)
        ON CONFLICT (message_id) DO NOTHING;
  ELSE
    INSERT INTO {schema}.pgqrs_messages (message_id, queue, priority, visible_at, expires_at, headers, properties, body)
    VALUES (in_message_id, in_queue, in_priority, waits_until, {schema}.pgqrs_now() + make_interval(secs => ttl),
            in_headers, in_properties, in_body)
        ON CONFLICT (message_id) DO NOTHING;
  END IF;
  COMMIT;
  IF NOT in_wake THEN
    RETURN;
  END IF;
  PERFORM set_config('synchronous_commit', 'off', true);
  IF volatile OR waits_until IS NOT NULL THEN
    IF volatile OR waits_until < {schema}.pgqrs_now() + make_interval(secs => in_look_interval) THEN
      PERFORM pg_notify('pgqrs_' || replace(c.consumer_id::text, '-', ''),
                        CASE WHEN volatile THEN 'arrived' ELSE 'look' END)
         FROM {schema}.pgqrs_consumers c
        WHERE in_queue = ANY(c.queues) AND c.dead_at IS NULL;
    END IF;
    RETURN;
  END IF;
  SELECT s.consumer_id, c.lock_key IS NOT NULL, c.lease, c.nap
    INTO sleeper, listens, its_lease, its_nap
    FROM {schema}.pgqrs_rouse(in_queue, 1) AS s JOIN {schema}.pgqrs_consumers c USING (consumer_id);
  IF sleeper IS NULL THEN
    RETURN;
  END IF;
  IF listens AND octet_length(in_queue) + octet_length(in_headers) + octet_length(in_properties)
     + octet_length(in_body) / 54 * 73 + 300 < 7999 AND strpos(in_queue, chr(31)) = 0 THEN
    UPDATE {schema}.pgqrs_messages m
       SET leased_until = {schema}.pgqrs_now() + make_interval(secs => its_lease), leased_by = sleeper,
           deliveries = m.deliveries + 1
      FROM (SELECT c.message_id
              FROM {schema}.pgqrs_messages c
             WHERE c.message_id = in_message_id AND c.visible_at IS NULL AND c.leased_by IS NULL
               FOR NO KEY UPDATE SKIP LOCKED) AS free
     WHERE m.message_id = free.message_id
    RETURNING concat_ws(chr(31), its_nap, m.message_id, m.position, m.queue, m.priority, m.deliveries, m.lost,
                        m.headers, m.properties, encode(m.body, 'base64'))
      INTO handed;
  END IF;
  PERFORM pg_notify('pgqrs_' || replace(sleeper::text, '-', ''), coalesce(handed, 'ready'));
END $$;
