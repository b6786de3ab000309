-- record: insert a chord before its header is sent; a plain one that has already run starts anew.
WITH again AS (
  SELECT chord_id FROM {schema}.pgqrs_chords
   WHERE chord_id = %(chord_id)s AND NOT open AND %(workflow_id)s::bigint IS NULL
     FOR UPDATE
), parts AS (
  DELETE FROM {schema}.pgqrs_chord_parts p USING again a WHERE p.chord_id = a.chord_id
), tallies AS (
  DELETE FROM {schema}.pgqrs_chord_tallies t USING again a WHERE t.chord_id = a.chord_id
)
INSERT INTO {schema}.pgqrs_chords AS c
       (chord_id, app, workflow_id, body_id, data, body, format, size, expires_at)
VALUES (%(chord_id)s, %(app)s, %(workflow_id)s, %(body_id)s, %(data)s::json, %(body)b::bytea, %(format)s, %(size)s,
        {schema}.pgqrs_now() + make_interval(secs => %(expires)s::float8))
    ON CONFLICT (chord_id) DO UPDATE
   SET body_id = excluded.body_id, data = excluded.data, body = excluded.body, format = excluded.format,
       workflow_id = excluded.workflow_id, app = excluded.app,
       size = CASE WHEN c.open THEN coalesce(excluded.size, c.size) ELSE excluded.size END,
       extra = CASE WHEN c.open THEN c.extra ELSE 0 END,
       open = true, dispatched_at = NULL, failed_at = NULL, claims = 0, claimed_until = NULL,
       created_at = excluded.created_at, expires_at = excluded.expires_at
 WHERE c.workflow_id IS NULL AND (excluded.workflow_id IS NULL OR num_nonnulls(c.data, c.body) = 0);

-- place: make sure that there is a row for a chord whose member has returned; "record" comes first as a rule.
INSERT INTO {schema}.pgqrs_chords (chord_id, app, size, expires_at)
VALUES (%(chord_id)s, %(app)s, %(size)s, {schema}.pgqrs_now() + make_interval(secs => %(expires)s::float8))
    ON CONFLICT (chord_id) DO NOTHING;

-- resize: set how many members the header has, known when the last of them is being sent.
INSERT INTO {schema}.pgqrs_chords AS c (chord_id, app, size, expires_at)
VALUES (%(chord_id)s, %(app)s, %(size)s, {schema}.pgqrs_now() + make_interval(secs => %(expires)s::float8))
    ON CONFLICT (chord_id) DO UPDATE SET size = excluded.size WHERE c.open;

-- known: whether there is a row for a chord.
SELECT 1 FROM {schema}.pgqrs_chords WHERE chord_id = %(chord_id)s;

-- extend: one member more, added by a member that runs.
UPDATE {schema}.pgqrs_chords SET extra = extra + 1 WHERE chord_id = %(chord_id)s AND open;

-- peek: whether all parts of a chord seem to be in; takes no lock.
SELECT coalesce((SELECT sum(t.parts) FROM {schema}.pgqrs_chord_tallies t WHERE t.chord_id = c.chord_id), 0)
       >= c.size + c.extra
  FROM {schema}.pgqrs_chords c
 WHERE c.chord_id = %(chord_id)s AND c.open;

-- lock: take an open chord, so that one finisher at a time decides about it.
SELECT c.chord_id, c.workflow_id, c.body_id, c.data, c.body, c.format, c.size + c.extra AS size,
       c.claimed_until > {schema}.pgqrs_now() AS claimed
  FROM {schema}.pgqrs_chords c
 WHERE c.chord_id = %(chord_id)s AND c.open
   FOR NO KEY UPDATE;

-- cancelled: whether the run of a chord was cancelled.
SELECT EXISTS (SELECT FROM {schema}.pgqrs_workflows
                WHERE workflow_id = %(workflow_id)s AND status = 'CANCELLED');

-- parts: what the members of a header have returned, in the header's order.
SELECT idx, task_id, status, data, body, format, told
  FROM {schema}.pgqrs_chord_parts
 WHERE chord_id = %(chord_id)s
 ORDER BY idx, created_at, task_id;

-- claim: take the right to send a plain chord's body, for so many seconds.
UPDATE {schema}.pgqrs_chords
   SET claims = claims + 1, claimed_until = {schema}.pgqrs_now() + make_interval(secs => %(seconds)s)
 WHERE chord_id = %(chord_id)s;

-- dispatched: close a chord whose body is on its way; its parts are needed no longer.
WITH chord AS (
  UPDATE {schema}.pgqrs_chords
     SET open = false, dispatched_at = {schema}.pgqrs_now(), claimed_until = NULL
   WHERE chord_id = %(chord_id)s AND open
  RETURNING chord_id
), parts AS (
  DELETE FROM {schema}.pgqrs_chord_parts p USING chord c WHERE p.chord_id = c.chord_id
), tallies AS (
  DELETE FROM {schema}.pgqrs_chord_tallies t USING chord c WHERE t.chord_id = c.chord_id
)
SELECT chord_id FROM chord;

-- failed: close a chord whose header failed; its parts stay, for a resume.
UPDATE {schema}.pgqrs_chords
   SET open = false, failed_at = {schema}.pgqrs_now(), claimed_until = NULL
 WHERE chord_id = %(chord_id)s AND open
RETURNING chord_id;

-- lock_run: take the chords of a run that have not been dispatched.
SELECT chord_id, body_id
  FROM {schema}.pgqrs_chords
 WHERE workflow_id = %(workflow_id)s AND dispatched_at IS NULL
 ORDER BY chord_id
   FOR NO KEY UPDATE;

-- reopen: let the failed members of these chords return once more.
WITH gone AS (
  DELETE FROM {schema}.pgqrs_chord_parts
   WHERE chord_id = ANY(%(chord_ids)s) AND status IN ('FAILURE', 'REVOKED')
  RETURNING chord_id
), tally AS (
  INSERT INTO {schema}.pgqrs_chord_tallies AS t (chord_id, slot, parts)
  SELECT chord_id, -1, -count(*) FROM gone GROUP BY chord_id
      ON CONFLICT (chord_id, slot) DO UPDATE SET parts = t.parts + excluded.parts
)
UPDATE {schema}.pgqrs_chords SET open = true, failed_at = NULL, claimed_until = NULL
 WHERE chord_id = ANY(%(chord_ids)s) AND dispatched_at IS NULL;

-- ripe: open chords that seem complete although nobody has closed them.
SELECT c.chord_id, c.workflow_id
  FROM {schema}.pgqrs_chords c
 WHERE c.app = %(app)s AND c.open AND c.size IS NOT NULL
   AND (c.workflow_id IS NULL OR %(durable)s)
   AND c.created_at <= {schema}.pgqrs_now() - make_interval(secs => %(age)s)
   AND (c.claimed_until IS NULL OR c.claimed_until <= {schema}.pgqrs_now())
   AND (SELECT sum(t.parts) FROM {schema}.pgqrs_chord_tallies t WHERE t.chord_id = c.chord_id) >= c.size + c.extra
 ORDER BY c.created_at
 LIMIT %(limit)s;

-- delete: remove the chords of runs that are being removed.
WITH chord AS (
  DELETE FROM {schema}.pgqrs_chords WHERE workflow_id = ANY(%(workflow_ids)s) RETURNING chord_id
), parts AS (
  DELETE FROM {schema}.pgqrs_chord_parts p USING chord c WHERE p.chord_id = c.chord_id
), tallies AS (
  DELETE FROM {schema}.pgqrs_chord_tallies t USING chord c WHERE t.chord_id = c.chord_id
), groups AS (
  DELETE FROM {schema}.pgqrs_groups g USING chord c WHERE g.group_id = c.chord_id
)
SELECT count(*) FROM chord;

-- prune: remove a batch of plain chords whose time is over and to which no part came for as long.
WITH gone AS (
  SELECT c.chord_id
    FROM {schema}.pgqrs_chords c
   WHERE c.expires_at <= {schema}.pgqrs_now() AND c.workflow_id IS NULL
     AND NOT (c.open AND EXISTS (SELECT FROM {schema}.pgqrs_chord_parts p
                                  WHERE p.chord_id = c.chord_id
                                    AND p.created_at > {schema}.pgqrs_now() - (c.expires_at - c.created_at)))
   ORDER BY c.expires_at LIMIT %(limit)s
     FOR UPDATE SKIP LOCKED
), chord AS (
  DELETE FROM {schema}.pgqrs_chords c USING gone g WHERE c.chord_id = g.chord_id
), parts AS (
  DELETE FROM {schema}.pgqrs_chord_parts p USING gone g WHERE p.chord_id = g.chord_id
), tallies AS (
  DELETE FROM {schema}.pgqrs_chord_tallies t USING gone g WHERE t.chord_id = g.chord_id
)
SELECT count(*) FROM gone;
