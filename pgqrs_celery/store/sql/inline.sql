-- take: execute a function in the calling process, from now on as its only owner.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'RUNNING', open = true, generation = s.generation + 1, fence = s.fence + 1, attempt = s.attempt + 1,
       lease_token = %(lease_token)s, worker_id = NULL, due_at = NULL, output = NULL, error = NULL,
       started_at = {schema}.pgqrs_now(), completed_at = NULL, updated_at = {schema}.pgqrs_now()
 WHERE s.workflow_id = %(workflow_id)s AND s.kind = 'function' AND s.message IS NULL
   AND s.status IN ('QUEUED', 'RUNNING', 'FAILED')
RETURNING s.app, s.task_id, s.step_id, s.generation;

-- settle: end the execution of a function, as its owner.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = %(status)s, output = %(output)s::json, error = %(error)s::json, open = false, due_at = NULL,
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING'
RETURNING s.workflow_id;

-- function: the function that a run executes in the calling process.
SELECT w.status AS run_status, w.name, s.task_id, s.step_id, s.status, s.output, s.error
  FROM {schema}.pgqrs_workflows w
       LEFT JOIN {schema}.pgqrs_workflow_steps s
              ON s.workflow_id = w.workflow_id AND s.kind = 'function' AND s.message IS NULL
                 AND s.task_id = w.root_id
 WHERE w.workflow_id = %(workflow_id)s;
