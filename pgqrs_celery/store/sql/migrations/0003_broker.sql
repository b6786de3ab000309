-- The broker: queues, bindings, messages with leases, and who is listening.

CREATE TABLE {schema}.pgqrs_queues (
  name           text PRIMARY KEY,
  volatile       boolean NOT NULL DEFAULT false,
  auto_delete    boolean NOT NULL DEFAULT false,
  message_ttl    double precision,
  expires_after  double precision,
  arguments      jsonb NOT NULL DEFAULT '{}',
  declared_at    timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  used_at        timestamptz NOT NULL DEFAULT {schema}.pgqrs_now()
) WITH (fillfactor = 70);

COMMENT ON TABLE {schema}.pgqrs_queues IS 'declared queues; a message to a name that is not here is kept all the same';
COMMENT ON COLUMN {schema}.pgqrs_queues.volatile IS 'dies with its connection: its messages are in pgqrs_broadcasts';
COMMENT ON COLUMN {schema}.pgqrs_queues.message_ttl IS 'seconds a message may wait here (x-message-ttl)';
COMMENT ON COLUMN {schema}.pgqrs_queues.expires_after IS 'seconds without a consumer until the queue is deleted (x-expires)';

CREATE TABLE {schema}.pgqrs_bindings (
  exchange     text NOT NULL,
  queue        text NOT NULL,
  routing_key  text NOT NULL,
  kind         text NOT NULL CHECK (kind IN ('direct', 'topic', 'fanout')),
  pattern      text,
  PRIMARY KEY (exchange, queue, routing_key)
);

COMMENT ON COLUMN {schema}.pgqrs_bindings.pattern IS 'regular expression for the routing keys of a topic exchange';

CREATE INDEX pgqrs_bindings_queue ON {schema}.pgqrs_bindings (queue);

-- Half of each page stays free: a lease is an update of the row, and with room beside it no index is touched.
CREATE TABLE {schema}.pgqrs_messages (
  message_id    uuid PRIMARY KEY,
  position      bigint GENERATED ALWAYS AS IDENTITY,
  queue         text NOT NULL,
  priority      smallint NOT NULL DEFAULT 0,
  visible_at    timestamptz,
  expires_at    timestamptz,
  leased_until  timestamptz NOT NULL DEFAULT '-infinity',
  leased_by     uuid,
  deliveries    integer NOT NULL DEFAULT 0,
  lost          integer NOT NULL DEFAULT 0,
  sent_at       timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  headers       text NOT NULL,
  properties    text NOT NULL,
  body          bytea NOT NULL
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 2000,
        autovacuum_analyze_scale_factor = 0, autovacuum_analyze_threshold = 5000, autovacuum_vacuum_cost_delay = 0);

COMMENT ON TABLE {schema}.pgqrs_messages IS 'every message that is neither acknowledged nor expired';
COMMENT ON COLUMN {schema}.pgqrs_messages.message_id IS 'made by the sender: sending again what may have arrived is no duplicate';
COMMENT ON COLUMN {schema}.pgqrs_messages.visible_at IS 'an ETA that lies ahead; NULL once the message is ready';
COMMENT ON COLUMN {schema}.pgqrs_messages.leased_by IS 'the consumer that has the message';
COMMENT ON COLUMN {schema}.pgqrs_messages.lost IS 'consumers that died with it';

-- The claim's only question: the next messages of a queue. What is leased stays in, so that a claim touches no index.
CREATE INDEX pgqrs_messages_ready ON {schema}.pgqrs_messages (queue, priority DESC, position)
  WHERE visible_at IS NULL;
-- The clock's only question: which ETA has come?
CREATE INDEX pgqrs_messages_deferred ON {schema}.pgqrs_messages (queue, visible_at) WHERE visible_at IS NOT NULL;
CREATE INDEX pgqrs_messages_expiry ON {schema}.pgqrs_messages (expires_at) WHERE expires_at IS NOT NULL;

CREATE UNLOGGED TABLE {schema}.pgqrs_broadcasts (
  broadcast_id  bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  message_id    uuid NOT NULL UNIQUE,
  queue         text NOT NULL,
  priority      smallint NOT NULL DEFAULT 0,
  expires_at    timestamptz,
  sent_at       timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  headers       text NOT NULL,
  properties    text NOT NULL,
  body          bytea NOT NULL
) WITH (autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 1000);

COMMENT ON TABLE {schema}.pgqrs_broadcasts IS 'messages of volatile queues: remote control, replies, events';

CREATE INDEX pgqrs_broadcasts_queue ON {schema}.pgqrs_broadcasts (queue, priority DESC, broadcast_id);

CREATE UNLOGGED TABLE {schema}.pgqrs_consumers (
  consumer_id        uuid PRIMARY KEY,
  lock_key           bigint,
  hostname           text NOT NULL,
  pid                integer NOT NULL,
  queues             text[] NOT NULL DEFAULT '{}',
  asleep             boolean NOT NULL DEFAULT false,
  started_at         timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  seen_at            timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  dead_at            timestamptz,
  server_started_at  timestamptz DEFAULT pg_postmaster_start_time(),
  lease              double precision NOT NULL DEFAULT 30,
  nap                bigint NOT NULL DEFAULT 0
) WITH (fillfactor = 50, autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 500);

COMMENT ON TABLE {schema}.pgqrs_consumers IS 'one row per connection that consumes; gone after a crash of the server, and made anew';
COMMENT ON COLUMN {schema}.pgqrs_consumers.lock_key IS 'the advisory lock its session holds; NULL behind a pooler';
COMMENT ON COLUMN {schema}.pgqrs_consumers.asleep IS 'it has seen nothing to do and wants to be notified';
COMMENT ON COLUMN {schema}.pgqrs_consumers.server_started_at IS 'when the server was started that the consumer registered with';
COMMENT ON COLUMN {schema}.pgqrs_consumers.lease IS 'seconds for which it leases a message';
COMMENT ON COLUMN {schema}.pgqrs_consumers.nap IS 'how often it has fallen asleep, by its own count';

-- Naps are numbered by the consumer, and a message handed to a sleeper says in which nap it was found. A notification may
-- come late, when the consumer has looked, found nothing and fallen asleep again: then it knows that it passes for asleep.
--
-- One message, one round trip: insert it, commit, and only then look who sleeps. The look needs a snapshot taken after the
-- commit: a consumer that says it sleeps, and then looks once more, sees the message or is seen.
-- Where somebody sleeps (in_early), he is handed the message while it is written to disk: the answer waits for that, and
-- with it for everything before it, but the consumer need not. A crash in between takes the message back from both. So
-- a message that is there already, because it is sent again, need not be on disk yet: its sender waits for that, too.
-- A notification holds 7999 bytes at most, and behind a pooler (no lock) none arrives: such messages are claimed as ever.
CREATE PROCEDURE {schema}.pgqrs_put(
  in_message_id uuid, in_queue text, in_priority integer, in_visible_at timestamptz, in_ttl double precision,
  in_headers text, in_properties text, in_body bytea, in_wake boolean, in_early boolean,
  in_look_interval double precision, INOUT volatile boolean)
LANGUAGE plpgsql
AS $$
DECLARE
  waits_until timestamptz := CASE WHEN in_visible_at > {schema}.pgqrs_now() THEN in_visible_at END;
  ttl double precision;
  early boolean;
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
    IF NOT FOUND THEN
      PERFORM {schema}.pgqrs_flush();
    END IF;
  END IF;
  early := in_early AND in_wake AND volatile IS NOT TRUE AND waits_until IS NULL
       AND current_setting('synchronous_commit') <> 'off'
       AND EXISTS (SELECT FROM {schema}.pgqrs_consumers c
                    WHERE c.asleep AND in_queue = ANY(c.queues) AND c.dead_at IS NULL);
  IF early THEN
    PERFORM set_config('synchronous_commit', 'off', true);
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
  IF sleeper IS NOT NULL THEN
    PERFORM pg_notify('pgqrs_' || replace(sleeper::text, '-', ''), coalesce(handed, 'ready'));
  END IF;
  IF early THEN
    COMMIT;
    PERFORM {schema}.pgqrs_flush();
  END IF;
END $$;

-- Let the transaction's commit wait until everything before it is on disk, though it has nothing else to write.
CREATE FUNCTION {schema}.pgqrs_flush() RETURNS pg_lsn
LANGUAGE sql
AS $$
  SELECT pg_logical_emit_message(true, 'pgqrs', '');
$$;

-- Up to so many sleepers of a queue, not asleep any more.
CREATE FUNCTION {schema}.pgqrs_rouse(in_queue text, in_count integer) RETURNS TABLE (consumer_id uuid)
LANGUAGE sql
AS $$
  WITH s AS MATERIALIZED (
    SELECT c.consumer_id
      FROM {schema}.pgqrs_consumers c
     WHERE c.asleep AND in_queue = ANY(c.queues) AND c.dead_at IS NULL
     ORDER BY random()
     LIMIT in_count
       FOR NO KEY UPDATE SKIP LOCKED
  )
  UPDATE {schema}.pgqrs_consumers u
     SET asleep = false
    FROM s
   WHERE u.consumer_id = s.consumer_id
  RETURNING u.consumer_id;
$$;

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
