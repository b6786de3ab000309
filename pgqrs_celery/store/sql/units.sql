-- finish: a step's success, the row and the message of what follows, its result, its hand-off and its own message's end.
CALL {schema}.pgqrs_finish_step(
  %(app)s, %(task_id)s, %(lease_token)s, %(output)s::json, %(hand_off)s::boolean,
  %(next_task)s, %(next_step)s, %(next_name)s, %(next_kind)s, %(next_generation)s::bigint, %(next_envelope)s::json,
  %(next_queue)s, %(next_delay)s::float8, %(next_sent)s::boolean, %(next_worker)s::uuid,
  %(own_message_id)s::uuid, %(message_id)s::uuid, %(queue)s, %(priority)s::int, %(ttl)s::float8,
  %(headers)s, %(properties)s, %(message_body)b::bytea,
  %(status)s, %(data)s::json, %(body)b::bytea, %(format)s, %(expires)s::float8,
  NULL, NULL, NULL, NULL, NULL);

-- go_on: the same where the process that has finished the step takes the next one itself instead of sending it.
CALL {schema}.pgqrs_go_on(
  %(app)s, %(task_id)s, %(lease_token)s, %(output)s::json,
  %(next_task)s, %(next_step)s, %(next_name)s, %(next_kind)s, %(next_generation)s::bigint, %(next_envelope)s::json,
  %(next_queue)s, %(next_token)s::uuid, %(worker_id)s::uuid, %(lease)s::float8, %(own_message_id)s::uuid,
  %(status)s, %(data)s::json, %(body)b::bytea, %(format)s, %(expires)s::float8,
  NULL, NULL, NULL, NULL);

-- start: a new run with one step and its message, which a consumer that sleeps is handed.
CALL {schema}.pgqrs_start(
  %(app)s, %(root_id)s, %(name)s, %(input)s::json, %(result)s::json, %(plan)s::json, %(labels)s::jsonb,
  %(parent_task_id)s,
  %(next_task)s, %(next_step)s, %(next_name)s, %(next_kind)s, %(next_generation)s::bigint, %(next_envelope)s::json,
  %(next_queue)s, %(next_delay)s::float8,
  %(message_id)s::uuid, %(queue)s, %(priority)s::int, %(ttl)s::float8, %(headers)s, %(sent_header)s,
  %(properties)s, %(message_body)b::bytea, %(wake)s::boolean, %(look_interval)s::float8, NULL, NULL);
