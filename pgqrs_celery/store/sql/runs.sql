-- start: enter a new run with its first steps; nothing at all where the root id or the key is taken.
WITH run AS (
  INSERT INTO {schema}.pgqrs_workflows (app, root_id, workflow_key, name, input, result, plan, labels, parent_task_id)
  VALUES (%(app)s, %(root_id)s, %(workflow_key)s, %(name)s, %(input)s::json, %(result)s::json, %(plan)s::json,
          coalesce(%(labels)s::jsonb, '{}'), %(parent_task_id)s)
      ON CONFLICT DO NOTHING
  RETURNING workflow_id
), message AS MATERIALIZED (
  SELECT *
    FROM json_to_recordset(%(messages)s::json)
         AS m (task_id text, step_id text, task_name text, generation bigint, message json, queue text,
               delay float8, sent boolean, kind text)
)
INSERT INTO {schema}.pgqrs_workflow_steps
       (workflow_id, step_id, app, task_id, task_name, kind, status, open, generation, message, queue, due_at, sent_at)
SELECT r.workflow_id, m.step_id, %(app)s, m.task_id, m.task_name, m.kind, 'QUEUED', true, m.generation, m.message,
       m.queue, {schema}.pgqrs_now() + make_interval(secs => m.delay),
       CASE WHEN m.sent THEN {schema}.pgqrs_now() END
  FROM run r, message m
RETURNING workflow_id, task_id, created_at;

-- ensure: the run with this root id, entered where it is missing, locked in either case.
INSERT INTO {schema}.pgqrs_workflows AS w
       (app, root_id, workflow_key, name, input, result, plan, labels, parent_task_id)
VALUES (%(app)s, %(root_id)s, %(workflow_key)s, %(name)s, %(input)s::json, %(result)s::json, %(plan)s::json,
        coalesce(%(labels)s::jsonb, '{}'), %(parent_task_id)s)
    ON CONFLICT (root_id) DO UPDATE SET updated_at = {schema}.pgqrs_now()
RETURNING workflow_id, status;

-- by_key: the run that owns a workflow key.
SELECT workflow_id, root_id, name, status, input, result, output, error
  FROM {schema}.pgqrs_workflows
 WHERE app = %(app)s AND workflow_key = %(workflow_key)s;

-- by_id: one run.
SELECT workflow_id, root_id, name, status, input, result, output, error
  FROM {schema}.pgqrs_workflows
 WHERE workflow_id = %(workflow_id)s;

-- by_root: the run of a root task id.
SELECT workflow_id, root_id, name, status, input, result, output, error
  FROM {schema}.pgqrs_workflows
 WHERE root_id = %(root_id)s;

-- touch: a run whose step begins is running; where somebody else writes the row at this moment, he says so as well.
WITH run AS (
  SELECT workflow_id FROM {schema}.pgqrs_workflows
   WHERE workflow_id = %(workflow_id)s AND status IN ('QUEUED', 'RUNNING')
     FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.pgqrs_workflows w
   SET status = 'RUNNING', started_at = coalesce(w.started_at, {schema}.pgqrs_now()),
       updated_at = {schema}.pgqrs_now()
  FROM run, (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE w.workflow_id = run.workflow_id;

-- reopen: a closed run that has unfinished steps again (added from outside) is running.
UPDATE {schema}.pgqrs_workflows
   SET status = 'RUNNING', completed_at = NULL, error = NULL, updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s AND status IN ('SUCCESS', 'FAILED');

-- begin: a locked run has a running step.
UPDATE {schema}.pgqrs_workflows
   SET status = 'RUNNING', started_at = coalesce(started_at, {schema}.pgqrs_now()), completed_at = NULL, error = NULL,
       updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s AND status <> 'CANCELLED';

-- quiet: an unlocked look whether nothing of a run is open any more.
SELECT NOT EXISTS (SELECT FROM {schema}.pgqrs_workflow_steps WHERE workflow_id = %(workflow_id)s AND open)
   AND NOT EXISTS (SELECT FROM {schema}.pgqrs_chords WHERE workflow_id = %(workflow_id)s AND open);

-- close_if_quiet: look without a lock, lock, look again, close; a run that somebody waits for is left open.
CALL {schema}.pgqrs_close_if_quiet(%(workflow_id)s::bigint, NULL, NULL);

-- lock_open: lock a run that may be closed. Nobody waits for the disk: a close that is lost is made again by a relay.
SELECT w.parent_task_id
  FROM {schema}.pgqrs_workflows w, (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE w.workflow_id = %(workflow_id)s AND w.status IN ('QUEUED', 'RUNNING')
   FOR NO KEY UPDATE OF w;

-- close: close a locked run, unless something of it is open after all; returns how it has ended.
SELECT {schema}.pgqrs_close(%(workflow_id)s::bigint);

-- stuck: of the next open runs, those nothing of which is open: their last worker died before its look.
SELECT w.workflow_id, w.updated_at < {schema}.pgqrs_now() - make_interval(secs => %(age)s)
       AND NOT EXISTS (SELECT FROM {schema}.pgqrs_workflow_steps s WHERE s.workflow_id = w.workflow_id AND s.open)
       AND NOT EXISTS (SELECT FROM {schema}.pgqrs_chords c WHERE c.workflow_id = w.workflow_id AND c.open)
  FROM {schema}.pgqrs_workflows w
 -- Written so that only the index of the open runs has this order: the primary key would lead through all closed ones.
 WHERE (w.app, w.workflow_id) > (%(app)s, %(after)s) AND w.app <= %(app)s AND w.status IN ('QUEUED', 'RUNNING')
 ORDER BY w.app, w.workflow_id
 LIMIT %(batch)s;

-- cancel: the run's status comes first; acquire and record read it.
UPDATE {schema}.pgqrs_workflows
   SET status = 'CANCELLED', completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s AND status IN ('QUEUED', 'RUNNING', 'PAUSED', 'CANCELLED')
RETURNING status, parent_task_id;

-- lock_failed: lock a run that is to be resumed, and say how it stands.
SELECT status FROM {schema}.pgqrs_workflows WHERE workflow_id = %(workflow_id)s FOR NO KEY UPDATE;

-- resume: a failed run is running again.
UPDATE {schema}.pgqrs_workflows
   SET status = 'RUNNING', error = NULL, output = NULL, completed_at = NULL, updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s;

-- in_process: a run whose function has no message, because the process that calls it executes it.
SELECT w.name, w.workflow_key
  FROM {schema}.pgqrs_workflows w
       JOIN {schema}.pgqrs_workflow_steps s ON s.workflow_id = w.workflow_id AND s.task_id = w.root_id
 WHERE w.workflow_id = %(workflow_id)s AND s.kind = 'function' AND s.message IS NULL AND s.queue IS NULL;

-- pause: no further step of the run begins until it is continued.
UPDATE {schema}.pgqrs_workflows
   SET paused_at = coalesce(paused_at, {schema}.pgqrs_now()), updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s AND status IN ('QUEUED', 'RUNNING', 'PAUSED')
RETURNING status;

-- lock_paused: lock a paused run, so that it is not continued while one of its steps is parked.
SELECT workflow_id FROM {schema}.pgqrs_workflows
 WHERE workflow_id = %(workflow_id)s AND paused_at IS NOT NULL
   FOR NO KEY UPDATE;

-- park: a step of a locked, paused run is not due until the run goes on.
UPDATE {schema}.pgqrs_workflow_steps
   SET due_at = NULL, lease_token = NULL, worker_id = NULL, updated_at = {schema}.pgqrs_now()
 WHERE task_id = %(task_id)s AND status = 'QUEUED';

-- unpause: steps may begin again.
UPDATE {schema}.pgqrs_workflows
   SET paused_at = NULL, updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s AND paused_at IS NOT NULL
RETURNING status;

-- wake_parked: steps that came while the run was paused are due.
UPDATE {schema}.pgqrs_workflow_steps
   SET due_at = {schema}.pgqrs_now(), sent_at = NULL
 WHERE workflow_id = %(workflow_id)s AND status = 'QUEUED' AND due_at IS NULL AND message IS NOT NULL;

-- plan: the stored tail of a long chain.
SELECT plan FROM {schema}.pgqrs_workflows WHERE workflow_id = %(workflow_id)s;

-- notify: wake the relays of an app.
SELECT pg_notify(%(channel)s, '');

-- prune: remove a batch of runs that ended long ago, with their steps, past those that others are removing; returns the
-- runs, and the task and root ids under which other tables may know them.
WITH old AS MATERIALIZED (
  SELECT workflow_id, root_id
    FROM {schema}.pgqrs_workflows
   WHERE app = %(app)s AND completed_at < {schema}.pgqrs_now() - make_interval(secs => %(age)s)
     AND status IN ('SUCCESS', 'FAILED', 'CANCELLED')
   ORDER BY completed_at
   LIMIT %(limit)s
     FOR UPDATE SKIP LOCKED
), steps AS (
  DELETE FROM {schema}.pgqrs_workflow_steps s USING old WHERE s.workflow_id = old.workflow_id
  RETURNING s.task_id
), runs AS (
  DELETE FROM {schema}.pgqrs_workflows w USING old WHERE w.workflow_id = old.workflow_id
)
SELECT old.workflow_id, old.root_id AS id FROM old
UNION ALL
SELECT NULL, steps.task_id FROM steps WHERE steps.task_id IS NOT NULL;

-- whereabouts: which database of which server this is.
SELECT current_database(), pg_postmaster_start_time();
