-- renew: extend the leases of what this worker holds (also of what it has only received, which is noted as its own), and
-- say which of its running steps belong to others now. A finished step that has no token was given up, if it is due (the
-- process that was handing it off is gone) or not sent (its hand-off has failed): its time must stay as it is.
WITH held AS MATERIALIZED (
  SELECT s.workflow_id, s.step_id, s.task_id, s.due_at, s.status
    FROM {schema}.pgqrs_workflow_steps s
   WHERE s.task_id = ANY(%(task_ids)s)
     AND (s.worker_id = %(worker_id)s
          AND (s.status = 'RUNNING'
               OR s.open::int = 1 AND s.status IN ('SUCCESS', 'FAILED')
                  AND (s.lease_token IS NOT NULL
                       OR s.due_at > {schema}.pgqrs_now() AND s.sent_at IS NOT NULL))
          OR s.status = 'QUEUED' AND s.sent_at IS NOT NULL)
     FOR NO KEY UPDATE SKIP LOCKED
), renewed AS (
  UPDATE {schema}.pgqrs_workflow_steps s
     SET due_at = greatest(s.due_at, {schema}.pgqrs_now() + make_interval(secs => %(lease)s)),
         worker_id = %(worker_id)s
    FROM held h, (SELECT set_config('synchronous_commit', 'off', true)) AS c
   WHERE s.workflow_id = h.workflow_id AND s.step_id = h.step_id
     AND h.due_at < {schema}.pgqrs_now() + make_interval(secs => %(lease)s * 2 / 3)
)
SELECT s.task_id
  FROM {schema}.pgqrs_workflow_steps s
 WHERE s.task_id = ANY(%(task_ids)s)
   AND s.status = 'RUNNING' AND s.worker_id IS DISTINCT FROM %(worker_id)s;

-- release: a worker that stops gives everything back that it was executing, handing off or had at hand, uncounted.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = CASE WHEN s.status = 'RUNNING' THEN 'QUEUED' ELSE s.status END,
       worker_id = CASE WHEN s.status IN ('RUNNING', 'QUEUED') THEN NULL ELSE s.worker_id END,
       lease_token = NULL,
       sent_at = CASE WHEN s.status IN ('RUNNING', 'QUEUED') THEN NULL ELSE s.sent_at END,
       due_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE s.app = %(app)s AND s.due_at > '-infinity' AND s.worker_id = %(worker_id)s
   AND (s.status IN ('RUNNING', 'SUCCESS', 'FAILED') OR s.status = 'QUEUED' AND s.sent_at IS NOT NULL);

-- requeue: what a stopping worker had received but not begun is due at once.
UPDATE {schema}.pgqrs_workflow_steps s
   SET sent_at = NULL, due_at = {schema}.pgqrs_now()
 WHERE s.task_id = ANY(%(task_ids)s) AND s.status = 'QUEUED' AND s.sent_at IS NOT NULL;

-- expire: a worker is known to be dead; what it was executing is queued again (or, at the limit, failed), what it was
-- handing off or had received is due; never what it had put to sleep. Nobody has to judge a lease any more.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = CASE WHEN s.status <> 'RUNNING' THEN s.status
                     WHEN s.lost + 1 >= %(max_lost)s AND s.undo IS DISTINCT FROM 'possible' THEN 'FAILED'
                     ELSE 'QUEUED' END,
       lost = CASE WHEN s.status = 'RUNNING' AND s.lost + 1 >= %(max_lost)s AND s.undo = 'possible' THEN 0
                   ELSE s.lost + (s.status = 'RUNNING')::int END,
       undo = CASE WHEN s.status = 'RUNNING' AND s.lost + 1 >= %(max_lost)s AND s.undo = 'possible' THEN 'due'
                   ELSE s.undo END,
       error = CASE WHEN s.status = 'RUNNING' AND s.lost + 1 >= %(max_lost)s THEN %(poison)s::json ELSE s.error END,
       completed_at = CASE WHEN s.status = 'RUNNING' AND s.lost + 1 >= %(max_lost)s
                                AND s.undo IS DISTINCT FROM 'possible'
                           THEN {schema}.pgqrs_now() ELSE s.completed_at END,
       worker_id = CASE WHEN s.status = 'QUEUED' THEN NULL
                        WHEN s.status = 'RUNNING' AND (s.lost + 1 < %(max_lost)s OR s.undo = 'possible') THEN NULL
                        ELSE s.worker_id END,
       lease_token = CASE WHEN s.status = 'QUEUED' OR s.status = 'RUNNING' AND s.lost + 1 < %(max_lost)s
                          THEN s.lease_token END,
       sent_at = CASE WHEN s.status NOT IN ('RUNNING', 'QUEUED') THEN s.sent_at END,
       due_at = {schema}.pgqrs_now() - interval '1 microsecond', updated_at = {schema}.pgqrs_now()
 WHERE s.app = %(app)s AND s.due_at > '-infinity' AND s.worker_id = %(worker_id)s
   AND (s.status IN ('RUNNING', 'SUCCESS', 'FAILED') OR s.status = 'QUEUED' AND s.sent_at IS NOT NULL);

-- move_owner: a worker with a new incarnation takes along what it was executing under the old one.
UPDATE {schema}.pgqrs_workflow_steps s
   SET worker_id = %(new_id)s
 WHERE s.app = %(app)s AND s.due_at > '-infinity' AND s.worker_id = %(old_id)s;
