-- begin: take a step that waits for just this message, in a run that goes on: what acquire says to nearly everybody.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'RUNNING', generation = %(generation)s, fence = s.fence + 1, lease_token = %(lease_token)s,
       attempt = s.attempt + (s.lease_token IS DISTINCT FROM %(lease_token)s)::int,
       worker_id = %(worker_id)s, due_at = {schema}.pgqrs_now() + make_interval(secs => %(lease)s),
       started_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
  FROM {schema}.pgqrs_workflows w, (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE s.task_id = %(task_id)s AND s.status = 'QUEUED' AND s.generation = %(generation)s AND s.undo IS NULL
   AND w.workflow_id = s.workflow_id
   -- A CASE, because the bare conditions would have the run looked for in the index of the open ones.
   AND CASE w.status WHEN 'RUNNING' THEN w.paused_at IS NULL
                                         AND w.updated_at >= {schema}.pgqrs_now() - interval '1 minute' END
RETURNING 'EXECUTE' AS verdict, s.workflow_id, s.step_id, 'QUEUED' AS status, NULL AS output, s.error,
          w.name AS workflow_name, w.root_id, false AS touch, s.generation, s.fence, s.attempt, s.lost,
          extract(epoch FROM {schema}.pgqrs_now()) AS now;

-- pass_on: end a step's hand-off, and begin the one that follows from it, in one statement.
WITH handed_off AS (
  UPDATE {schema}.pgqrs_workflow_steps f
     SET open = false, due_at = NULL, message = NULL, error = NULL, updated_at = {schema}.pgqrs_now()
   WHERE f.task_id = %(finished_id)s AND f.open::int = 1 AND f.status = 'SUCCESS' AND f.fence = %(finished_fence)s
)
{begin};

-- acquire: ask for the right to execute a step; takes it where the verdict is EXECUTE.
WITH step AS MATERIALIZED (
  SELECT s.workflow_id, s.step_id, s.status, s.open, s.generation, s.lease_token, s.due_at, s.lost, s.undo,
         s.output, s.error, w.status AS run_status, w.paused_at, w.name AS workflow_name, w.root_id,
         w.updated_at < {schema}.pgqrs_now() - interval '1 minute' AS stale
    FROM {schema}.pgqrs_workflow_steps s
         JOIN {schema}.pgqrs_workflows w ON w.workflow_id = s.workflow_id,
         (SELECT set_config('synchronous_commit', 'off', true)) AS c
   WHERE s.task_id = %(task_id)s
     FOR NO KEY UPDATE OF s
), verdict AS MATERIALIZED (
  SELECT *, CASE
      WHEN status IN ('SUCCESS', 'FAILED') AND open THEN
        CASE WHEN lease_token IS NULL OR lease_token = %(lease_token)s OR due_at <= {schema}.pgqrs_now()
             THEN 'REPLAY' ELSE 'HELD' END
      WHEN status = 'CANCELLED' AND open THEN 'CANCELLED'
      WHEN status NOT IN ('QUEUED', 'RUNNING') THEN 'DONE'
      WHEN generation > %(generation)s THEN 'STALE'
      WHEN run_status = 'CANCELLED' AND undo IS NULL THEN 'CANCELLED'
      WHEN run_status = 'CANCELLED' AND undo = 'possible' THEN 'UNDO'
      WHEN paused_at IS NOT NULL AND status = 'QUEUED' AND run_status <> 'CANCELLED' THEN 'PAUSED'
      WHEN status = 'QUEUED' OR lease_token = %(lease_token)s THEN CASE undo WHEN 'due' THEN 'UNDO' ELSE 'EXECUTE' END
      WHEN due_at > {schema}.pgqrs_now() OR NOT %(may_judge)s THEN 'HELD'
      WHEN lost + 1 >= %(max_lost)s THEN CASE undo WHEN 'possible' THEN 'UNDO' ELSE 'POISONED' END
      ELSE CASE undo WHEN 'due' THEN 'UNDO' ELSE 'EXECUTE' END END AS verdict
    FROM step
), taken AS (
  UPDATE {schema}.pgqrs_workflow_steps s
     SET status = CASE v.verdict WHEN 'EXECUTE' THEN 'RUNNING' WHEN 'UNDO' THEN 'RUNNING'
                                 WHEN 'CANCELLED' THEN 'CANCELLED' WHEN 'POISONED' THEN 'FAILED' ELSE s.status END,
         fence = s.fence + (v.verdict IN ('EXECUTE', 'UNDO'))::int,
         lease_token = CASE WHEN v.verdict IN ('EXECUTE', 'UNDO', 'REPLAY', 'POISONED') THEN %(lease_token)s END,
         worker_id = CASE v.verdict WHEN 'REPLAY' THEN s.worker_id ELSE %(worker_id)s END,
         generation = CASE WHEN v.verdict IN ('EXECUTE', 'UNDO') THEN %(generation)s ELSE s.generation END,
         attempt = s.attempt + (v.verdict IN ('EXECUTE', 'UNDO')
                                AND s.lease_token IS DISTINCT FROM %(lease_token)s)::int,
         lost = CASE WHEN v.verdict = 'UNDO' AND v.undo = 'possible' THEN 0
                     ELSE s.lost + (s.status = 'RUNNING' AND v.verdict IN ('EXECUTE', 'UNDO', 'POISONED')
                                    AND s.lease_token IS DISTINCT FROM %(lease_token)s)::int END,
         error = CASE WHEN v.verdict = 'UNDO' AND v.undo = 'possible' AND v.run_status = 'CANCELLED'
                      THEN {schema}.pgqrs_cancelled()
                      WHEN v.verdict = 'POISONED' OR v.verdict = 'UNDO' AND v.undo = 'possible' THEN %(poison)s::json
                      ELSE s.error END,
         undo = CASE v.verdict WHEN 'UNDO' THEN 'due' ELSE s.undo END,
         due_at = {schema}.pgqrs_now() + make_interval(secs => %(lease)s),
         started_at = CASE WHEN v.verdict IN ('EXECUTE', 'UNDO') THEN {schema}.pgqrs_now() ELSE s.started_at END,
         completed_at = CASE WHEN v.verdict IN ('CANCELLED', 'POISONED') THEN {schema}.pgqrs_now()
                             ELSE s.completed_at END,
         updated_at = {schema}.pgqrs_now()
    FROM verdict v
   WHERE s.workflow_id = v.workflow_id AND s.step_id = v.step_id
     AND v.verdict IN ('EXECUTE', 'UNDO', 'REPLAY', 'CANCELLED', 'POISONED')
  RETURNING s.fence, s.attempt, s.lost, s.error
)
SELECT v.verdict, v.workflow_id, v.step_id, v.status, v.output, coalesce(t.error, v.error) AS error,
       v.workflow_name, v.root_id, v.run_status = 'QUEUED' OR v.stale AS touch, v.generation,
       t.fence, t.attempt, t.lost, extract(epoch FROM {schema}.pgqrs_now()) AS now
  FROM verdict v LEFT JOIN taken t ON true;

-- adopt: enter a step that was sent without this package, as running here; committed before the body starts.
INSERT INTO {schema}.pgqrs_workflow_steps
       (workflow_id, step_id, app, task_id, task_name, kind, status, open, generation, message, queue, sent_at,
        attempt, fence, lease_token, worker_id, due_at, started_at)
SELECT w.workflow_id, %(step_id)s, %(app)s, %(task_id)s, %(task_name)s, %(kind)s, 'RUNNING', true, %(generation)s,
       %(message)s::json, %(queue)s, {schema}.pgqrs_now(), 1, 1, %(lease_token)s, %(worker_id)s,
       {schema}.pgqrs_now() + make_interval(secs => %(lease)s), {schema}.pgqrs_now()
  FROM {schema}.pgqrs_workflows w
 WHERE w.workflow_id = %(workflow_id)s AND w.status <> 'CANCELLED'
    ON CONFLICT DO NOTHING
RETURNING workflow_id, step_id, fence, attempt;

-- succeed: commit a step's result; the one commit whose disk write its owner waits for.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = 'SUCCESS', output = %(output)s::json, error = NULL,
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE task_id = %(task_id)s AND lease_token = %(lease_token)s AND status IN ('RUNNING', 'QUEUED')
RETURNING fence;

-- fail: commit a step's final error, as its owner or as the main process of the worker that has it.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = 'FAILED', error = CASE undo WHEN 'due' THEN error ELSE %(error)s::json END,
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now(),
       due_at = {schema}.pgqrs_now() + make_interval(secs => %(lease)s)
 WHERE task_id = %(task_id)s AND status IN ('RUNNING', 'QUEUED')
   AND (lease_token = %(lease_token)s
        OR %(lease_token)s::uuid IS NULL AND generation = %(generation)s
           AND (status = 'QUEUED' OR worker_id = %(worker_id)s)
           AND (undo IS DISTINCT FROM 'due' OR %(undoing)s))
RETURNING fence;

-- undo_first: a function has ended outside of its body, says the worker that has it (or could have it): it is executed
-- once more, to undo what it has done, and ends with this error after that.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'QUEUED', undo = 'due', error = %(error)s::json, lost = 0, looks = 0, lease_token = NULL,
       worker_id = NULL, sent_at = NULL, due_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.undo = 'possible' AND s.message IS NOT NULL
   AND (s.status = 'QUEUED' AND s.generation <= %(generation)s
        OR s.status = 'RUNNING' AND s.generation = %(generation)s AND s.worker_id = %(worker_id)s)
RETURNING {schema}.pgqrs_call_relays(s.app);

-- give_back: put a running step back into the queue, as its owner.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = 'QUEUED', worker_id = NULL, lease_token = NULL, sent_at = NULL,
       due_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE task_id = %(task_id)s AND lease_token = %(lease_token)s AND status = 'RUNNING'
RETURNING lost;

-- bereave: the process that had a step is gone, says the worker it belonged to; the step is due at once.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = CASE WHEN s.status NOT IN ('RUNNING', 'QUEUED') THEN s.status
                     WHEN s.lost + %(count)s >= %(max_lost)s AND s.undo IS DISTINCT FROM 'possible' THEN 'FAILED'
                     ELSE 'QUEUED' END,
       error = CASE WHEN s.status IN ('RUNNING', 'QUEUED') AND s.lost + %(count)s >= %(max_lost)s THEN %(poison)s::json
                    ELSE s.error END,
       completed_at = CASE WHEN s.status IN ('RUNNING', 'QUEUED') AND s.lost + %(count)s >= %(max_lost)s
                                AND s.undo IS DISTINCT FROM 'possible'
                           THEN {schema}.pgqrs_now() ELSE s.completed_at END,
       lost = CASE WHEN s.status NOT IN ('RUNNING', 'QUEUED') THEN s.lost
                   WHEN s.lost + %(count)s >= %(max_lost)s AND s.undo = 'possible' THEN 0
                   ELSE s.lost + %(count)s END,
       undo = CASE WHEN s.status IN ('RUNNING', 'QUEUED') AND s.lost + %(count)s >= %(max_lost)s AND s.undo = 'possible'
                   THEN 'due' ELSE s.undo END,
       worker_id = CASE s.status WHEN 'RUNNING' THEN NULL ELSE s.worker_id END,
       sent_at = CASE WHEN s.status NOT IN ('RUNNING', 'QUEUED') THEN s.sent_at END,
       lease_token = NULL, due_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.open::int = 1
   AND (s.worker_id = %(worker_id)s AND s.status IN ('RUNNING', 'SUCCESS', 'FAILED')
        AND (%(pid)s::text IS NULL OR right(s.lease_token::text, 8) = %(pid)s::text)
        OR s.status = 'QUEUED' AND s.generation = %(generation)s AND s.sent_at IS NOT NULL)
RETURNING s.lost;

-- drop: cancel a step whose body asked to be ignored.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = 'CANCELLED', open = false, due_at = NULL, message = NULL, error = %(error)s::json,
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE task_id = %(task_id)s AND lease_token = %(lease_token)s AND status = 'RUNNING'
RETURNING workflow_id;

-- revoke: cancel a step that has not started, or that this worker is executing.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = 'CANCELLED', error = %(error)s::json, lease_token = NULL,
       due_at = {schema}.pgqrs_now() + make_interval(secs => %(lease)s),
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE task_id = %(task_id)s
   AND (status = 'QUEUED' AND generation <= %(generation)s
        OR status = 'RUNNING' AND (worker_id = %(worker_id)s OR lease_token = %(lease_token)s)
        OR status = 'CANCELLED' AND open)
   -- Nobody but its owner ends the execution that undoes a function.
   AND (undo IS DISTINCT FROM 'due' OR status = 'CANCELLED' OR lease_token = %(lease_token)s)
RETURNING fence;

-- hand_off: everything that follows from a step that was finished under this fence has happened.
UPDATE {schema}.pgqrs_workflow_steps s
   SET open = false, due_at = NULL,
       message = CASE WHEN s.status = 'SUCCESS' THEN NULL ELSE s.message END,
       error = CASE WHEN s.status = 'SUCCESS' THEN NULL ELSE s.error END,
       updated_at = {schema}.pgqrs_now()
  FROM (SELECT set_config('synchronous_commit', 'off', true)) AS c
 WHERE s.task_id = %(task_id)s AND s.open::int = 1 AND s.status IN ('SUCCESS', 'FAILED', 'CANCELLED')
   AND s.fence = %(fence)s
RETURNING s.workflow_id;

-- succeed_and_hand_off: commit a step's result when nothing durable follows from it, and end its hand-off with that.
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = 'SUCCESS', output = %(output)s::json, error = NULL, open = false, due_at = NULL, message = NULL,
       completed_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.lease_token = %(lease_token)s AND s.status IN ('RUNNING', 'QUEUED')
RETURNING s.workflow_id;

-- finished_by: whether a step is finished under a token; the condition for what belongs to its success.
SELECT workflow_id FROM {schema}.pgqrs_workflow_steps
 WHERE task_id = %(task_id)s AND lease_token = %(lease_token)s AND status = 'SUCCESS';

-- hand_off_failed: note why the hand-off of a successful step did not work; the relay counts the tries.
UPDATE {schema}.pgqrs_workflow_steps
   SET error = %(error)s::json, updated_at = {schema}.pgqrs_now(), lease_token = NULL, sent_at = NULL,
       due_at = {schema}.pgqrs_now() + make_interval(secs => %(interval)s)
 WHERE task_id = %(task_id)s AND status = 'SUCCESS' AND open::int = 1 AND fence = %(fence)s
RETURNING workflow_id, step_id, fence, handoffs + 1, output;

-- give_up_hand_off: what follows from a successful step cannot happen; the step stays as it is, to be resumed.
UPDATE {schema}.pgqrs_workflow_steps s
   SET open = false, due_at = NULL, updated_at = {schema}.pgqrs_now()
 WHERE s.task_id = %(task_id)s AND s.open::int = 1 AND s.status = 'SUCCESS' AND s.fence = %(fence)s
RETURNING s.workflow_id;

-- peek: the present state of one step.
SELECT s.workflow_id, s.step_id, s.status, s.open, s.generation, s.fence, s.lease_token, s.output, s.error,
       w.status AS run_status
  FROM {schema}.pgqrs_workflow_steps s JOIN {schema}.pgqrs_workflows w ON w.workflow_id = s.workflow_id
 WHERE s.task_id = %(task_id)s;

-- cancel_batch: cancel some unfinished steps of a cancelled run; their revocation is still to be announced. A function
-- that has something to undo does that first.
WITH open AS MATERIALIZED (
  SELECT s.workflow_id, s.step_id
    FROM {schema}.pgqrs_workflow_steps s
   WHERE s.workflow_id = %(workflow_id)s AND s.status IN ('QUEUED', 'RUNNING', 'PAUSED')
     AND s.undo IS DISTINCT FROM 'due'
   LIMIT %(batch)s
     FOR NO KEY UPDATE SKIP LOCKED
)
UPDATE {schema}.pgqrs_workflow_steps s
   SET status = CASE s.undo WHEN 'possible' THEN 'QUEUED' ELSE 'CANCELLED' END,
       undo = CASE s.undo WHEN 'possible' THEN 'due' END,
       error = CASE s.undo WHEN 'possible' THEN {schema}.pgqrs_cancelled() ELSE s.error END,
       lost = CASE s.undo WHEN 'possible' THEN 0 ELSE s.lost END,
       awaits = NULL, lease_token = NULL,
       worker_id = CASE s.undo WHEN 'possible' THEN NULL ELSE s.worker_id END,
       sent_at = CASE s.undo WHEN 'possible' THEN NULL ELSE s.sent_at END,
       open = s.open AND (s.kind = 'canvas' OR s.message IS NOT NULL),
       due_at = CASE WHEN s.kind = 'canvas' OR s.message IS NOT NULL THEN {schema}.pgqrs_now() END,
       completed_at = CASE s.undo WHEN 'possible' THEN NULL ELSE {schema}.pgqrs_now() END,
       updated_at = {schema}.pgqrs_now()
  FROM open o
 WHERE s.workflow_id = o.workflow_id AND s.step_id = o.step_id
RETURNING s.task_id, s.message;

-- unfinished: how many steps of a run are neither finished nor cancelled, nor undoing what they have done.
SELECT count(*) FROM {schema}.pgqrs_workflow_steps
 WHERE workflow_id = %(workflow_id)s AND status IN ('QUEUED', 'RUNNING', 'PAUSED') AND undo IS DISTINCT FROM 'due';

-- resume: queue again what failed, and repeat the hand-offs that were given up. Whoever was about to end a hand-off of
-- before ends none of after: the fence is another one.
UPDATE {schema}.pgqrs_workflow_steps
   SET status = CASE status WHEN 'SUCCESS' THEN 'SUCCESS' ELSE 'QUEUED' END,
       open = true, fence = fence + 1, lost = 0, handoffs = 0, looks = 0,
       lease_token = NULL, worker_id = NULL, error = NULL,
       undo = CASE WHEN undo IS NOT NULL THEN 'possible' END,
       sent_at = NULL, completed_at = CASE status WHEN 'SUCCESS' THEN completed_at END,
       due_at = {schema}.pgqrs_now(), updated_at = {schema}.pgqrs_now()
 WHERE workflow_id = %(workflow_id)s AND message IS NOT NULL
   AND (status = 'FAILED' OR status = 'SUCCESS' AND error IS NOT NULL)
RETURNING task_id, step_id, message;
