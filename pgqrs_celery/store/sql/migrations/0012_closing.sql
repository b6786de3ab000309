-- The last step of a run closes it in the same round trip: the unit of work goes on to the look at its run, and to the
-- close, as transactions of their own.

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

DROP PROCEDURE {schema}.pgqrs_finish_step;

-- As before (0005) but for its end.
CREATE PROCEDURE {schema}.pgqrs_finish_step(
  the_app text, the_task text, the_token uuid, the_output json,
  next_task text, next_step text, next_name text, next_kind text, next_generation bigint, next_envelope json,
  next_queue text, next_delay float8, next_sent boolean,
  own_message uuid, next_message uuid, message_queue text, next_priority int, next_ttl float8,
  next_headers text, next_properties text, next_body bytea,
  result_status text, result_data json, result_body bytea, result_format text, lifetime float8,
  INOUT run_status text, INOUT accepted boolean, INOUT recorded_at float8, INOUT quiet boolean, INOUT closed text)
LANGUAGE plpgsql
AS $$
DECLARE
  moment timestamptz := {schema}.pgqrs_now();
  the_run bigint;
  note text;
  waiter record;
BEGIN
  recorded_at := extract(epoch FROM moment);
  UPDATE {schema}.pgqrs_workflow_steps
     SET status = 'SUCCESS', output = the_output, error = NULL, open = false, due_at = NULL, message = NULL,
         completed_at = moment, updated_at = moment
   WHERE task_id = the_task AND lease_token = the_token AND status IN ('RUNNING', 'QUEUED')
  RETURNING workflow_id INTO the_run;
  IF own_message IS NOT NULL THEN
    DELETE FROM {schema}.pgqrs_messages WHERE message_id = own_message;
  END IF;
  IF the_run IS NULL THEN
    RETURN;
  END IF;
  SELECT w.status INTO run_status FROM {schema}.pgqrs_workflows w WHERE w.workflow_id = the_run;
  IF next_task IS NOT NULL AND run_status <> 'CANCELLED' THEN
    INSERT INTO {schema}.pgqrs_workflow_steps
           (workflow_id, step_id, app, task_id, task_name, kind, status, open, generation, message, queue, due_at, sent_at)
    VALUES (the_run, next_step, the_app, next_task, next_name, next_kind, 'QUEUED', true, next_generation, next_envelope,
            next_queue, moment + make_interval(secs => next_delay), CASE WHEN next_sent THEN moment END)
        ON CONFLICT DO NOTHING;
    accepted := FOUND;
    IF NOT accepted THEN  -- it may have been announced before, without its message
      UPDATE {schema}.pgqrs_workflow_steps s
         SET generation = next_generation, message = next_envelope, queue = next_queue, looks = 0,
             due_at = moment + make_interval(secs => next_delay), sent_at = CASE WHEN next_sent THEN moment END,
             updated_at = moment
       WHERE s.task_id = next_task AND s.status = 'QUEUED'
         AND (s.generation < next_generation
              OR s.generation = next_generation AND s.message IS NULL AND s.due_at IS NULL);
      accepted := FOUND;
    END IF;
    IF accepted AND next_message IS NOT NULL THEN
      INSERT INTO {schema}.pgqrs_messages (message_id, queue, priority, expires_at, headers, properties, body)
      VALUES (next_message, message_queue, next_priority, moment + make_interval(secs => next_ttl), next_headers,
              next_properties, next_body)
          ON CONFLICT (message_id) DO NOTHING;
    END IF;
  END IF;
  IF num_nonnulls(result_data, result_body) = 1 THEN
    INSERT INTO {schema}.pgqrs_task_results AS t (task_id, status, data, body, format, expires_at)
    VALUES (the_task, result_status, result_data, result_body, result_format,
            moment + make_interval(secs => lifetime))
        ON CONFLICT (task_id) DO UPDATE
       SET status = excluded.status, data = excluded.data, body = excluded.body, format = excluded.format,
           stored_at = excluded.stored_at, expires_at = excluded.expires_at
     WHERE t.status <> 'SUCCESS' OR t.expires_at <= moment;
  END IF;
  COMMIT;
  IF EXISTS (SELECT FROM {schema}.pgqrs_waiters WHERE task_id = the_task) THEN
    PERFORM set_config('synchronous_commit', 'off', true);
    FOR waiter IN DELETE FROM {schema}.pgqrs_waiters WHERE task_id = the_task RETURNING channel LOOP
      note := the_task || chr(31) || CASE WHEN octet_length(result_data::text) + octet_length(the_task) < 7900
                                          THEN result_data::text ELSE '' END;
      PERFORM pg_notify(waiter.channel, note);
    END LOOP;
    COMMIT;  -- who waits does not wait for what follows
  END IF;
  IF next_task IS NULL THEN
    CALL {schema}.pgqrs_close_if_quiet(the_run, quiet, closed);
  END IF;
END $$;
