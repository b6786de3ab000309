-- claim_due: take what is due; status and clock change together, so nobody else finds it due.
WITH due AS MATERIALIZED (
  SELECT s.workflow_id, s.step_id, s.status AS was, s.sent_at AS was_sent,
         s.status = 'RUNNING' AND s.lost + 1 >= %(max_lost)s AND s.undo IS DISTINCT FROM 'possible' AS fails,
         s.status = 'RUNNING' AND s.lost + 1 >= %(max_lost)s AND s.undo IS NOT DISTINCT FROM 'possible' AS undoes
    FROM {schema}.pgqrs_workflow_steps s
   WHERE s.app = %(app)s AND s.due_at <= {schema}.pgqrs_now()
     AND s.due_at > coalesce({schema}.pgqrs_now() - make_interval(secs => %(back)s), '-infinity')
     AND (s.status <> 'RUNNING' OR %(may_judge)s)
   ORDER BY s.due_at
   LIMIT %(batch)s
     FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = CASE WHEN d.was = 'PAUSED' THEN 'QUEUED'
                     WHEN d.fails THEN 'FAILED'
                     WHEN d.was = 'RUNNING' THEN 'QUEUED' ELSE s.status END,
       lost = CASE WHEN d.undoes THEN 0 ELSE s.lost + (d.was = 'RUNNING')::int END,
       undo = CASE WHEN d.undoes THEN 'due' ELSE s.undo END,
       worker_id = CASE WHEN d.was = 'RUNNING' AND NOT d.fails THEN NULL ELSE s.worker_id END,
       lease_token = CASE WHEN d.was IN ('QUEUED', 'PAUSED') OR d.was = 'RUNNING' AND NOT d.fails AND NOT d.undoes
                          THEN s.lease_token END,
       error = CASE WHEN d.fails OR d.undoes THEN %(poison)s::json ELSE s.error END,
       completed_at = CASE WHEN d.fails THEN {schema}.pgqrs_now() ELSE s.completed_at END,
       handoffs = s.handoffs + (d.was IN ('SUCCESS', 'FAILED', 'CANCELLED'))::int,
       looks = CASE WHEN d.was = 'QUEUED' AND d.was_sent IS NOT NULL THEN s.looks + 1 ELSE 0 END,
       sent_at = CASE WHEN d.was = 'QUEUED' AND d.was_sent IS NOT NULL THEN s.sent_at ELSE {schema}.pgqrs_now() END,
       due_at = {schema}.pgqrs_now() + make_interval(secs =>
                  least(%(interval_max)s,
                        %(interval)s * 2 ^ CASE WHEN d.was = 'QUEUED' AND d.was_sent IS NOT NULL
                                                THEN least(s.looks + 1, 20) ELSE 0 END)),
       updated_at = {schema}.pgqrs_now()
  FROM due d
 WHERE s.workflow_id = d.workflow_id AND s.step_id = d.step_id
RETURNING s.workflow_id, s.step_id, s.task_id, s.task_name, d.was, s.status, d.was_sent AS sent_at,
          {schema}.pgqrs_now() AS now, s.queue, s.message, s.looks, s.handoffs, s.lost, s.error, s.generation,
          s.fence, s.undo IS NOT DISTINCT FROM 'due' AS undoing;

-- resent: note that lost messages have been published again.
UPDATE {schema}.pgqrs_workflow_steps
   SET sent_at = {schema}.pgqrs_now()
 WHERE task_id = ANY(%(task_ids)s) AND status = 'QUEUED';

-- unsent: the broker did not take these; they are due again soon, as never published.
UPDATE {schema}.pgqrs_workflow_steps s
   SET sent_at = NULL, due_at = {schema}.pgqrs_now() + make_interval(secs => %(interval)s)
 WHERE s.task_id = ANY(%(task_ids)s) AND s.open::int = 1 AND s.status IN ('QUEUED', 'SUCCESS', 'FAILED', 'CANCELLED');

-- next_due: seconds until something is due; null when nothing ever is.
SELECT extract(epoch FROM min(d.due_at) - {schema}.pgqrs_now())::float8
  FROM (SELECT s.due_at
          FROM {schema}.pgqrs_workflow_steps s
         WHERE s.app = %(app)s
           AND s.due_at > coalesce({schema}.pgqrs_now() - make_interval(secs => %(back)s), '-infinity')
           AND (s.status <> 'RUNNING' OR %(may_judge)s)
         ORDER BY s.due_at
         LIMIT 1) AS d;
