-- A new run in its common form, one step with one message for our own broker, is one round trip: run, step and message in
-- one transaction, which then goes on to hand the message to a consumer that sleeps (pgqrs_put).

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
  CALL {schema}.pgqrs_put(message, message_queue, priority, NULL, ttl, headers, properties, body, wake, look_interval,
                          volatile);
END $$;
