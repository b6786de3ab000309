-- emit: tell a run something; nothing at all where it has been told this before (or does not exist).
INSERT INTO {schema}.pgqrs_events AS e (workflow_id, name, payload, emitted_at)
SELECT w.workflow_id, %(name)s, %(payload)s::json, {schema}.pgqrs_now()
  FROM {schema}.pgqrs_workflows w
 WHERE w.workflow_id = %(workflow_id)s
    ON CONFLICT (workflow_id, name) DO UPDATE
   SET payload = excluded.payload, emitted_at = excluded.emitted_at
 WHERE e.emitted_at IS NULL
RETURNING e.waiters;

-- wake: queue the functions that wait for an event just emitted, whatever else they wait for.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = CASE s.status WHEN 'PAUSED' THEN 'QUEUED' ELSE s.status END,
       due_at = CASE s.status WHEN 'PAUSED' THEN {schema}.pgqrs_now() ELSE s.due_at END,
       sent_at = CASE s.status WHEN 'PAUSED' THEN NULL ELSE s.sent_at END,
       looks = CASE s.status WHEN 'PAUSED' THEN 0 ELSE s.looks END
 WHERE s.task_id = ANY(%(waiters)s)
RETURNING {schema}.pgqrs_call_relays(s.app);

-- await: say that a function waits for an event, and learn whether it has come; the row is locked from here on.
INSERT INTO {schema}.pgqrs_events AS e (workflow_id, name, waiters)
VALUES (%(workflow_id)s, %(name)s, ARRAY[%(waiter)s::text])
    ON CONFLICT (workflow_id, name) DO UPDATE
   SET waiters = CASE WHEN e.emitted_at IS NOT NULL OR %(waiter)s = ANY(e.waiters) THEN e.waiters
                      ELSE e.waiters || %(waiter)s::text END
RETURNING e.emitted_at IS NOT NULL AS emitted, e.payload;

-- leave: a function does not wait for an event any more.
UPDATE {schema}.pgqrs_events e
   SET waiters = array_remove(e.waiters, %(waiter)s)
 WHERE e.workflow_id = %(workflow_id)s AND e.name = %(name)s;
