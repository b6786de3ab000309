-- Local continuation: the process that has finished a step has the next one at once, without a message in between.

-- A unit of work (0012) whose next step is not sent, but taken by its sender in the same transaction: RUNNING under a
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
    IF NOT accepted THEN  -- it may have been announced before, without its message
      taken := false;
      UPDATE {schema}.pgqrs_workflow_steps s
         SET generation = next_generation, message = next_envelope, queue = next_queue, looks = 0,
             due_at = moment, sent_at = NULL, updated_at = moment
       WHERE s.task_id = next_task AND s.status = 'QUEUED'
         AND (s.generation < next_generation
              OR s.generation = next_generation AND s.message IS NULL AND s.due_at IS NULL);
      accepted := FOUND;
    END IF;
    IF accepted AND NOT taken THEN
      PERFORM {schema}.pgqrs_call_relays(the_app);
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
  END IF;
END $$;
