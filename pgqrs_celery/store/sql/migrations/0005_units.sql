-- The unit of work: what belongs together is one transaction, and one round trip.

-- Close a locked run, unless something of it is open after all; canvas and function steps decide how it has ended.
CREATE FUNCTION {schema}.pgqrs_close(the_run bigint) RETURNS text
LANGUAGE plpgsql
AS $$
DECLARE
  verdict text;
  cause json;
  value json;
BEGIN
  IF EXISTS (SELECT FROM {schema}.pgqrs_workflow_steps WHERE workflow_id = the_run AND open)
     OR EXISTS (SELECT FROM {schema}.pgqrs_chords WHERE workflow_id = the_run AND open) THEN
    RETURN NULL;
  END IF;
  SELECT CASE WHEN bool_or(s.status = 'FAILED' OR s.status = 'SUCCESS' AND s.error IS NOT NULL) THEN 'FAILED'
              WHEN bool_or(s.status = 'CANCELLED') THEN 'CANCELLED'
              ELSE 'SUCCESS' END
    INTO verdict
    FROM {schema}.pgqrs_workflow_steps s
   WHERE s.workflow_id = the_run AND s.kind <> 'inner';
  IF verdict = 'FAILED' THEN
    SELECT json_build_object('step_id', s.step_id, 'task_id', s.task_id,
                             'hand_off', s.status = 'SUCCESS', 'error', s.error)
      INTO cause
      FROM {schema}.pgqrs_workflow_steps s
     WHERE s.workflow_id = the_run AND s.kind <> 'inner'
       AND (s.status = 'FAILED' OR s.status = 'SUCCESS' AND s.error IS NOT NULL)
     ORDER BY s.completed_at
     LIMIT 1;
  ELSIF verdict = 'SUCCESS' THEN
    SELECT s.output
      INTO value
      FROM {schema}.pgqrs_workflows w
           JOIN {schema}.pgqrs_workflow_steps s ON s.task_id = w.result -> 0 ->> 0
     WHERE w.workflow_id = the_run AND s.workflow_id = the_run AND s.kind <> 'inner';
  END IF;
  UPDATE {schema}.pgqrs_workflows w
     SET status = verdict, error = cause, output = value, completed_at = {schema}.pgqrs_now(),
         updated_at = {schema}.pgqrs_now(), started_at = coalesce(w.started_at, {schema}.pgqrs_now())
   WHERE w.workflow_id = the_run;
  RETURN verdict;
END $$;

-- Close a run nothing of which is open, after a look without a lock: lock it, then look again in the next statement.
-- Nobody waits for the disk: a close that is lost is made again by a relay. A run that somebody waits for (parent_task_id)
-- is left open: closing it and waking who waits is one transaction, the caller's next.
CREATE PROCEDURE {schema}.pgqrs_close_if_quiet(the_run bigint, INOUT quiet boolean, INOUT closed text)
LANGUAGE plpgsql
AS $$
BEGIN
  quiet := NOT EXISTS (SELECT FROM {schema}.pgqrs_workflow_steps WHERE workflow_id = the_run AND open)
       AND NOT EXISTS (SELECT FROM {schema}.pgqrs_chords WHERE workflow_id = the_run AND open);
  IF NOT quiet THEN
    RETURN;
  END IF;
  PERFORM set_config('synchronous_commit', 'off', true);
  PERFORM FROM {schema}.pgqrs_workflows w
    WHERE w.workflow_id = the_run AND w.status IN ('QUEUED', 'RUNNING') AND w.parent_task_id IS NULL
      FOR NO KEY UPDATE;
  IF FOUND THEN
    closed := {schema}.pgqrs_close(the_run);
  END IF;
END $$;

-- How both units of work begin: the step succeeds, where the token is still its own, and is handed off unless its result
-- is still to be stored elsewhere; its own message ends in any case. Returns the run, null where somebody else has the
-- step.
CREATE FUNCTION {schema}.pgqrs_succeed(
  the_task text, the_token uuid, the_output json, hand_off boolean, own_message uuid, moment timestamptz) RETURNS bigint
LANGUAGE plpgsql
AS $$
DECLARE
  the_run bigint;
BEGIN
  UPDATE {schema}.pgqrs_workflow_steps
     SET status = 'SUCCESS', output = the_output, error = NULL, open = NOT hand_off,
         due_at = CASE WHEN NOT hand_off THEN due_at END, message = CASE WHEN NOT hand_off THEN message END,
         completed_at = moment, updated_at = moment
   WHERE task_id = the_task AND lease_token = the_token AND status IN ('RUNNING', 'QUEUED')
  RETURNING workflow_id INTO the_run;
  IF own_message IS NOT NULL THEN
    DELETE FROM {schema}.pgqrs_messages WHERE message_id = own_message;
  END IF;
  RETURN the_run;
END $$;

-- What follows may have been announced before, without its message: then it gets that now. Returns whether it was so.
CREATE FUNCTION {schema}.pgqrs_supply(
  next_task text, next_generation bigint, next_envelope json, next_queue text, next_due timestamptz,
  next_sent timestamptz, moment timestamptz) RETURNS boolean
LANGUAGE plpgsql
AS $$
BEGIN
  UPDATE {schema}.pgqrs_workflow_steps s
     SET generation = next_generation, message = next_envelope, queue = next_queue, looks = 0,
         due_at = next_due, sent_at = next_sent, updated_at = moment
   WHERE s.task_id = next_task AND s.status = 'QUEUED'
     AND (s.generation < next_generation
          OR s.generation = next_generation AND s.message IS NULL AND s.due_at IS NULL);
  RETURN FOUND;
END $$;

-- One statement of the client's, several transactions. The first one holds everything that belongs to the success: the step's
-- result and hand-off, the row and the message of what follows, the task result, the end of the step's own message. It all
-- hangs on the step's lease token. What comes after needs a snapshot taken after that commit (pgqrs_store_result makes it):
-- who waits for the result, and whether the run is quiet now. That does not wait for the disk.
--
-- Plain statements one after the other: each has a small plan of its own, which costs less to execute than one statement
-- with a dozen parts, and what follows is passed as scalars, so nothing has to be parsed.
CREATE PROCEDURE {schema}.pgqrs_finish_step(
  the_app text, the_task text, the_token uuid, the_output json, hand_off boolean,
  next_task text, next_step text, next_name text, next_kind text, next_generation bigint, next_envelope json,
  next_queue text, next_delay float8, next_sent boolean, next_worker uuid,
  own_message uuid, next_message uuid, message_queue text, next_priority int, next_ttl float8,
  next_headers text, next_properties text, next_body bytea,
  result_status text, result_data json, result_body bytea, result_format text, lifetime float8,
  INOUT run_status text, INOUT accepted boolean, INOUT recorded_at float8, INOUT quiet boolean, INOUT closed text)
LANGUAGE plpgsql
AS $$
DECLARE
  moment timestamptz := {schema}.pgqrs_now();
  the_run bigint;
BEGIN
  recorded_at := extract(epoch FROM moment);
  the_run := {schema}.pgqrs_succeed(the_task, the_token, the_output, hand_off, own_message, moment);
  IF the_run IS NULL THEN
    RETURN;
  END IF;
  SELECT w.status INTO run_status FROM {schema}.pgqrs_workflows w WHERE w.workflow_id = the_run;
  IF next_task IS NOT NULL AND run_status <> 'CANCELLED' THEN
    INSERT INTO {schema}.pgqrs_workflow_steps
           (workflow_id, step_id, app, task_id, task_name, kind, status, open, generation, message, queue, due_at, sent_at,
            worker_id)
    VALUES (the_run, next_step, the_app, next_task, next_name, next_kind, 'QUEUED', true, next_generation, next_envelope,
            next_queue, moment + make_interval(secs => next_delay), CASE WHEN next_sent THEN moment END, next_worker)
        ON CONFLICT DO NOTHING;
    accepted := FOUND;
    IF NOT accepted THEN
      accepted := {schema}.pgqrs_supply(
        next_task, next_generation, next_envelope, next_queue, moment + make_interval(secs => next_delay),
        CASE WHEN next_sent THEN moment END, moment);
    END IF;
    IF accepted AND next_message IS NOT NULL THEN
      INSERT INTO {schema}.pgqrs_messages (message_id, queue, priority, expires_at, headers, properties, body)
      VALUES (next_message, message_queue, next_priority, moment + make_interval(secs => next_ttl), next_headers,
              next_properties, next_body)
          ON CONFLICT (message_id) DO NOTHING;
    END IF;
  END IF;
  IF num_nonnulls(result_data, result_body) = 1 THEN
    CALL {schema}.pgqrs_store_result(the_task, result_status, result_data, result_body, result_format, lifetime, true);
  END IF;
  COMMIT;  -- who waits does not wait for what follows
  IF next_task IS NULL AND hand_off THEN
    CALL {schema}.pgqrs_close_if_quiet(the_run, quiet, closed);
  END IF;
END $$;

-- A unit of work whose next step is not sent, but taken by its sender in the same transaction: RUNNING under a
-- token of the same process. Where the run is paused or was cancelled meanwhile, or the step was announced before, it is
-- queued instead, due at once, for a relay to send.
CREATE PROCEDURE {schema}.pgqrs_go_on(
  the_app text, the_task text, the_token uuid, the_output json,
  next_task text, next_step text, next_name text, next_kind text, next_generation bigint, next_envelope json,
  next_queue text, next_token uuid, the_worker uuid, the_lease float8, own_message uuid,
  result_status text, result_data json, result_body bytea, result_format text, lifetime float8,
  INOUT run_status text, INOUT accepted boolean, INOUT recorded_at float8, INOUT taken boolean)
LANGUAGE plpgsql
AS $$
DECLARE
  moment timestamptz := {schema}.pgqrs_now();
  the_run bigint;
  unpaused boolean;
BEGIN
  recorded_at := extract(epoch FROM moment);
  the_run := {schema}.pgqrs_succeed(the_task, the_token, the_output, true, own_message, moment);
  IF the_run IS NULL THEN
    RETURN;
  END IF;
  SELECT w.status, w.paused_at IS NULL INTO run_status, unpaused
    FROM {schema}.pgqrs_workflows w WHERE w.workflow_id = the_run;
  taken := run_status = 'RUNNING' AND unpaused;
  IF run_status <> 'CANCELLED' THEN
    INSERT INTO {schema}.pgqrs_workflow_steps
           (workflow_id, step_id, app, task_id, task_name, kind, open, generation, message, queue,
            status, attempt, fence, lease_token, worker_id, due_at, sent_at, started_at)
    SELECT the_run, next_step, the_app, next_task, next_name, next_kind, true, next_generation, next_envelope, next_queue,
           t.status, t.begun, t.begun, t.lease_token, t.worker_id, t.due_at, t.at, t.at
      FROM (SELECT 'RUNNING' AS status, 1 AS begun, next_token AS lease_token, the_worker AS worker_id,
                   moment + make_interval(secs => the_lease) AS due_at, moment AS at
             WHERE taken
             UNION ALL
            SELECT 'QUEUED', 0, NULL, NULL, moment, NULL WHERE NOT taken) AS t
        ON CONFLICT DO NOTHING;
    accepted := FOUND;
    IF NOT accepted THEN
      taken := false;
      accepted := {schema}.pgqrs_supply(
        next_task, next_generation, next_envelope, next_queue, moment, NULL, moment);
    END IF;
    IF accepted AND NOT taken THEN
      PERFORM {schema}.pgqrs_call_relays(the_app);
    END IF;
  END IF;
  IF num_nonnulls(result_data, result_body) = 1 THEN
    CALL {schema}.pgqrs_store_result(the_task, result_status, result_data, result_body, result_format, lifetime, true);
  END IF;
END $$;

-- A new run in its common form, one step with one message for our own broker, is one round trip: run, step and message in
-- one transaction, which then goes on to hand the message to a consumer that sleeps (pgqrs_put), once it is on disk.
-- Does nothing where the root id is taken (the_run stays null). The moment of recording is added to the message's headers
-- under the name sent_header.
CREATE PROCEDURE {schema}.pgqrs_start(
  the_app text, the_root text, the_name text, the_input json, the_result json, the_plan json, the_labels jsonb,
  the_parent text,
  the_task text, the_step text, the_task_name text, the_kind text, the_generation bigint, the_envelope json,
  the_queue text, the_delay float8,
  message uuid, message_queue text, priority int, ttl float8, headers text, sent_header text, properties text, body bytea,
  wake boolean, look_interval float8,
  INOUT the_run bigint, INOUT volatile boolean)
LANGUAGE plpgsql
AS $$
DECLARE
  moment timestamptz := {schema}.pgqrs_now();
BEGIN
  INSERT INTO {schema}.pgqrs_workflows (app, root_id, name, input, result, plan, labels, parent_task_id)
  VALUES (the_app, the_root, the_name, the_input, the_result, the_plan, coalesce(the_labels, '{}'), the_parent)
      ON CONFLICT DO NOTHING
  RETURNING workflow_id INTO the_run;
  IF the_run IS NULL THEN
    RETURN;
  END IF;
  INSERT INTO {schema}.pgqrs_workflow_steps
         (workflow_id, step_id, app, task_id, task_name, kind, status, open, generation, message, queue, due_at, sent_at)
  VALUES (the_run, the_step, the_app, the_task, the_task_name, the_kind, 'QUEUED', true, the_generation, the_envelope,
          the_queue, moment + make_interval(secs => the_delay), moment);
  headers := format('{%s:%s,%s', to_json(sent_header),
                    to_json(to_char(moment AT TIME ZONE 'UTC', 'YYYY-MM-DD"T"HH24:MI:SS.US"+00:00"')),
                    substr(headers, 2));
  CALL {schema}.pgqrs_put(message, message_queue, priority, NULL, ttl, headers, properties, body, wake, false,
                          look_interval, volatile);
END $$;
