-- define: enter a workflow's name, once.
INSERT INTO {schema}.pgqrs_definitions (app, name) VALUES (%(app)s, %(name)s) ON CONFLICT DO NOTHING;

-- defined: whether a workflow's name has been entered.
SELECT true FROM {schema}.pgqrs_definitions WHERE app = %(app)s AND name = %(name)s;

-- poison: fail runs whose consumers keep dying.
WITH due AS (
  SELECT s.task_id
    FROM {schema}.pgqrs_workflow_steps s
   WHERE s.app = %(app)s AND s.due_at IS NOT NULL AND s.due_at <= {schema}.pgqrs_now() AND s.queue = %(queue)s
     AND s.kind = 'function' AND s.message IS NULL AND s.status = 'RUNNING' AND s.lost + 1 >= %(max_lost)s
   LIMIT 100
     FOR UPDATE SKIP LOCKED
)
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'FAILED', open = false, due_at = NULL, lost = s.lost + 1, error = %(error)s::json, worker_id = NULL,
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
  FROM due
 WHERE s.task_id = due.task_id
RETURNING s.workflow_id;

-- claim: take runs that wait for a consumer, or whose consumer gave no sign of life for a whole lease.
WITH due AS (
  SELECT s.task_id, w.name, w.input
    FROM {schema}.pgqrs_workflow_steps s
         JOIN {schema}.pgqrs_workflows w ON w.workflow_id = s.workflow_id
   WHERE s.app = %(app)s AND s.due_at IS NOT NULL AND s.due_at <= {schema}.pgqrs_now() AND s.queue = %(queue)s
     AND s.kind = 'function' AND s.message IS NULL AND s.status IN ('QUEUED', 'RUNNING')
     AND w.paused_at IS NULL AND w.status IN ('QUEUED', 'RUNNING')
   ORDER BY s.due_at
   LIMIT %(batch)s
     FOR UPDATE OF s SKIP LOCKED
)
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'RUNNING', generation = s.generation + 1, fence = s.fence + 1, attempt = s.attempt + 1,
       lost = s.lost + CASE s.status WHEN 'RUNNING' THEN 1 ELSE 0 END,
       lease_token = gen_random_uuid(), worker_id = %(worker_id)s,
       due_at = {schema}.pgqrs_now() + make_interval(secs => %(lease)s),
       started_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
  FROM due
 WHERE s.task_id = due.task_id
RETURNING s.workflow_id, s.app, s.task_id, s.step_id, s.lease_token, s.generation, s.attempt, due.name, due.input,
          {schema}.pgqrs_now() AS claimed_at;

-- renew: a consumer is alive and still has these runs.
UPDATE {schema}.pgqrs_workflow_steps s
   SET due_at = {schema}.pgqrs_now() + make_interval(secs => %(lease)s), updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = ANY(%(task_ids)s) AND s.lease_token = ANY(%(lease_tokens)s) AND s.status = 'RUNNING'
RETURNING s.task_id;

-- archive: this run is not to be delivered again, whether it has ended or not.
UPDATE {schema}.pgqrs_workflow_steps s
   SET due_at = NULL, updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s
RETURNING s.workflow_id;

-- release: a consumer gives a run back; that was no attempt.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'QUEUED', due_at = {schema}.pgqrs_now(), attempt = s.attempt - 1, lease_token = NULL,
       worker_id = NULL, updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING'
RETURNING s.workflow_id;
