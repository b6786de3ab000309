-- record: add steps to a run, or accept a greater generation of them; returns the run's status and what was accepted.
WITH finished AS (
  UPDATE {schema}.pgqrs_workflow_steps
     SET status = 'SUCCESS', output = %(output)s::json, error = NULL,
         open = NOT %(hand_off)s,
         due_at = CASE WHEN NOT %(hand_off)s THEN due_at END,
         message = CASE WHEN NOT %(hand_off)s THEN message END,
         completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
   WHERE task_id = %(finished_id)s AND lease_token = %(lease_token)s AND status IN ('RUNNING', 'QUEUED')
  RETURNING 1
), run AS MATERIALIZED (
  SELECT w.workflow_id, w.status
    FROM {schema}.pgqrs_workflows w, (SELECT set_config('synchronous_commit', %(commit)s, true)) AS c
   WHERE w.workflow_id = %(workflow_id)s
     AND (%(finished_id)s::text IS NULL OR EXISTS (SELECT FROM finished))
), message AS MATERIALIZED (
  SELECT *, {schema}.pgqrs_now() + make_interval(secs => delay) AS due_at
    FROM json_to_recordset(%(messages)s::json)
         AS m (task_id text, step_id text, task_name text, generation bigint, message json, queue text,
               delay float8, sent boolean, kind text)
   -- Always true. It takes Postgres from a hundred rows to one, which most often is the truth: planned for a hundred
   -- on a table that is new, the update below would read the whole of it, and go on doing so when it has grown.
   WHERE m.task_id = m.task_id || ''
), inserted AS (
  INSERT INTO {schema}.pgqrs_workflow_steps
         (workflow_id, step_id, app, task_id, task_name, kind, status, open, generation, message, queue, due_at,
          sent_at)
  SELECT r.workflow_id, m.step_id, %(app)s, m.task_id, m.task_name, m.kind, 'QUEUED', true, m.generation, m.message,
         m.queue, m.due_at, CASE WHEN m.sent THEN {schema}.pgqrs_now() END
    FROM message m, run r
   WHERE r.status <> 'CANCELLED'
      ON CONFLICT DO NOTHING
  RETURNING task_id
), updated AS (
  UPDATE {schema}.pgqrs_workflow_steps s
     SET status = 'QUEUED', generation = m.generation, message = m.message, queue = m.queue, due_at = m.due_at,
         sent_at = CASE WHEN m.sent THEN {schema}.pgqrs_now() END, looks = 0,
         lease_token = NULL, worker_id = NULL, updated_at = {schema}.pgqrs_now()
    FROM message m, run r
   WHERE s.task_id = m.task_id
     AND r.status <> 'CANCELLED'
     AND (s.status = 'QUEUED' OR s.status = 'RUNNING' AND s.lease_token = %(lease_token)s)
     AND (s.generation < m.generation
          OR s.generation = m.generation AND s.status = 'QUEUED' AND s.message IS NULL AND s.due_at IS NULL)
  RETURNING s.task_id
)
SELECT NULL AS task_id, status, {schema}.pgqrs_now() AS sent_at FROM run
UNION ALL
SELECT task_id, NULL, {schema}.pgqrs_now() FROM inserted
UNION ALL
SELECT task_id, NULL, {schema}.pgqrs_now() FROM updated;

-- await_link: insert a durable link that follows a plain one, so that its run stays open until it arrives.
INSERT INTO {schema}.pgqrs_workflow_steps
       (workflow_id, step_id, app, task_id, task_name, status, open, generation)
SELECT %(workflow_id)s, %(step_id)s, %(app)s, %(task_id)s, %(task_name)s, 'QUEUED', true, %(generation)s
    ON CONFLICT DO NOTHING;

-- await_replacement: the owner of a running step hands its id to the last link of what replaces it.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = 'QUEUED', generation = %(generation)s, message = NULL, due_at = NULL, sent_at = NULL,
       lease_token = NULL, worker_id = NULL, updated_at = {schema}.pgqrs_now()
 WHERE task_id = %(task_id)s AND lease_token = %(lease_token)s AND status = 'RUNNING'
RETURNING workflow_id;
