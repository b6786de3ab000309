-- load: what is recorded of a function's calls; the finished ones above all.
SELECT s.step_id, s.status, s.generation, s.task_id, s.output, s.error, s.input_hash
  FROM {schema}.pgqrs_workflow_steps s
 WHERE s.workflow_id = %(workflow_id)s AND s.kind = 'inner' AND starts_with(s.step_id, %(prefix)s);

-- find: what is recorded of one call.
SELECT s.step_id, s.status, s.generation, s.task_id, s.output, s.error, s.input_hash
  FROM {schema}.pgqrs_workflow_steps s
 WHERE s.workflow_id = %(workflow_id)s AND s.step_id = %(step_id)s;

-- record: enter the outcome of a call, as the owner of the function; the lock keeps a taker-over waiting.
INSERT INTO {schema}.pgqrs_workflow_steps
       (workflow_id, step_id, app, task_name, kind, status, open, generation, attempt, worker_id,
        output, error, input_hash, started_at, completed_at)
SELECT s.workflow_id, %(step_id)s, s.app, %(name)s, 'inner', %(status)s, false, s.generation, 1, s.worker_id,
       %(output)s::json, %(error)s::json, %(input_hash)s,
       {schema}.pgqrs_now() - make_interval(secs => %(elapsed)s), {schema}.pgqrs_now()
  FROM {schema}.pgqrs_workflow_steps s
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING'
   FOR SHARE;

-- record_again: the same, where the call may have been recorded before; a success stays as it is.
WITH owner AS MATERIALIZED (
  SELECT s.workflow_id, s.app, s.generation, s.worker_id
    FROM {schema}.pgqrs_workflow_steps s
   WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING'
     FOR SHARE
)
INSERT INTO {schema}.pgqrs_workflow_steps AS i
       (workflow_id, step_id, app, task_name, kind, status, open, generation, attempt, worker_id,
        output, error, input_hash, started_at, completed_at)
SELECT o.workflow_id, %(step_id)s, o.app, %(name)s, 'inner', %(status)s, false, o.generation, 1, o.worker_id,
       %(output)s::json, %(error)s::json, %(input_hash)s,
       {schema}.pgqrs_now() - make_interval(secs => %(elapsed)s), {schema}.pgqrs_now()
  FROM owner o
    ON CONFLICT (workflow_id, step_id) DO UPDATE
   SET status = excluded.status, generation = excluded.generation, attempt = i.attempt + 1,
       worker_id = excluded.worker_id, output = excluded.output, error = excluded.error,
       input_hash = excluded.input_hash, started_at = excluded.started_at, completed_at = excluded.completed_at,
       updated_at = {schema}.pgqrs_now()
 WHERE i.kind = 'inner' AND i.task_id IS NULL AND i.status <> 'SUCCESS';

-- owns: whether a function is still executed under this token.
SELECT true
  FROM {schema}.pgqrs_workflow_steps s
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING';

-- own: the same, and nobody can take it over before the end of the transaction.
SELECT true
  FROM {schema}.pgqrs_workflow_steps s
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING'
   FOR NO KEY UPDATE;

-- can_undo: a function is about to do what can be undone.
UPDATE {schema}.pgqrs_workflow_steps s
   SET undo = 'possible', updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING' AND s.undo IS NULL;

-- undo: the effect of a successful call has been compensated; when the function runs anew, the call is made again.
WITH owner AS MATERIALIZED (
  SELECT s.workflow_id, s.generation
    FROM {schema}.pgqrs_workflow_steps s
   WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING'
     FOR SHARE
)
UPDATE {schema}.pgqrs_workflow_steps i
   SET status = 'CANCELLED', updated_at = {schema}.pgqrs_now(),
       generation = CASE WHEN i.task_id IS NULL THEN o.generation ELSE i.generation END
  FROM owner o
 WHERE i.workflow_id = o.workflow_id AND i.step_id = %(step_id)s AND i.kind = 'inner'
RETURNING i.attempt;

-- wait: enter a wait; a wait entered before keeps its deadline.
INSERT INTO {schema}.pgqrs_workflow_steps AS i
       (workflow_id, step_id, app, task_name, kind, status, open, generation, attempt, wake_at, started_at)
VALUES (%(workflow_id)s, %(step_id)s, %(app)s, %(name)s, 'inner', 'PAUSED', false, %(generation)s, 1,
        coalesce(%(until)s, {schema}.pgqrs_now() + make_interval(secs => %(seconds)s)), {schema}.pgqrs_now())
    ON CONFLICT (workflow_id, step_id) DO UPDATE
   SET updated_at = {schema}.pgqrs_now()
 WHERE i.kind = 'inner' AND i.task_id IS NULL
RETURNING i.status, i.output, i.error, coalesce(i.wake_at <= {schema}.pgqrs_now(), false) AS over,
          extract(epoch FROM i.wake_at - {schema}.pgqrs_now())::float8 AS seconds_left;

-- decide: enter how a wait ended, in the transaction that has decided it.
UPDATE {schema}.pgqrs_workflow_steps i
   SET status = 'SUCCESS', output = %(output)s::json, error = %(error)s::json,
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE i.workflow_id = %(workflow_id)s AND i.step_id = %(step_id)s AND i.kind = 'inner';

-- park: put a running function to sleep until its wait's deadline or until it is woken; that was no attempt.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'PAUSED', awaits = %(awaits)s, lease_token = NULL, worker_id = NULL, sent_at = NULL, looks = 0,
       attempt = s.attempt - 1, updated_at = {schema}.pgqrs_now(),
       due_at = (SELECT i.wake_at FROM {schema}.pgqrs_workflow_steps i
                  WHERE i.workflow_id = s.workflow_id AND i.step_id = %(step_id)s AND i.kind = 'inner')
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status = 'RUNNING'
RETURNING {schema}.pgqrs_call_relays(s.app);

-- tasks: how the tasks stand that a function has sent.
SELECT s.task_id, s.step_id, s.status, s.output, s.error
  FROM {schema}.pgqrs_workflow_steps s
 WHERE s.task_id = ANY(%(task_ids)s);

-- forget_undone: what was undone and will be sent again, and how it was undone, is as if it had never been.
WITH undone AS MATERIALIZED (
  SELECT i.step_id, i.task_id
    FROM {schema}.pgqrs_workflow_steps i
   WHERE i.workflow_id = %(workflow_id)s AND i.kind = 'inner' AND starts_with(i.step_id, %(prefix)s)
     AND i.status = 'CANCELLED' AND i.output IS NOT NULL
)
DELETE FROM {schema}.pgqrs_workflow_steps s
 USING undone u
 WHERE s.workflow_id = %(workflow_id)s AND s.kind = 'inner'
   AND (starts_with(s.step_id, u.step_id || '/undo/')
        OR u.task_id IS NOT NULL AND (s.step_id = u.step_id OR starts_with(s.step_id, u.step_id || '/')))
RETURNING s.task_id, s.task_name;

-- calls_again: calls of functions that failed, or were undone, are made again when the functions are executed again.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = 'QUEUED', error = NULL, completed_at = NULL, updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s AND kind = 'inner' AND task_id IS NULL AND status IN ('FAILED', 'CANCELLED')
   AND starts_with(step_id, %(prefix)s);

-- tasks_again: queue a failed task of a function again, with those that it has sent itself.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'QUEUED', open = true, fence = s.fence + 1, lost = 0, handoffs = 0, looks = 0,
       lease_token = NULL, worker_id = NULL, undo = CASE WHEN s.undo IS NOT NULL THEN 'possible' END,
       error = NULL, sent_at = NULL, completed_at = NULL, due_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE s.workflow_id = %(workflow_id)s AND (s.task_id = %(task_id)s OR starts_with(s.step_id, %(prefix)s))
   AND s.kind = 'inner' AND s.status = 'FAILED' AND s.message IS NOT NULL
RETURNING {schema}.pgqrs_call_relays(s.app);

-- runs: how the runs stand that a function has started.
SELECT w.root_id, w.workflow_id, w.status
  FROM {schema}.pgqrs_workflows w
 WHERE w.root_id = ANY(%(root_ids)s);

-- lock_waiter: lock a function that may be waiting; whether it is, is looked at in the next statement.
SELECT true FROM {schema}.pgqrs_workflow_steps s WHERE s.task_id = %(task_id)s FOR NO KEY UPDATE;

-- wake_waiter: queue a locked function that waits for tasks or runs, if none of them is unfinished any more.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'QUEUED', due_at = {schema}.pgqrs_now(), sent_at = NULL, looks = 0, awaits = NULL,
       updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.status = 'PAUSED' AND s.awaits IS NOT NULL
   AND NOT EXISTS (SELECT FROM {schema}.pgqrs_workflow_steps t
                    WHERE t.task_id = ANY(s.awaits) AND t.status IN ('QUEUED', 'RUNNING', 'PAUSED'))
   AND NOT EXISTS (SELECT FROM {schema}.pgqrs_workflows w
                    WHERE w.root_id IN (SELECT split_part(a, ':', 2) FROM unnest(s.awaits) AS a WHERE a LIKE 'run:%%')
                      AND w.status IN ('QUEUED', 'RUNNING', 'PAUSED'))
RETURNING {schema}.pgqrs_call_relays(s.app);
