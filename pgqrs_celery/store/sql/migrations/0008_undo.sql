-- Compensation of functions that end where their code cannot see it.

ALTER TABLE {schema}.pgqrs_workflow_steps
  ADD COLUMN undo text CHECK (undo IN ('possible', 'due'));

COMMENT ON COLUMN {schema}.pgqrs_workflow_steps.undo IS
  'possible: a function has called steps with a compensation; due: it has ended (see error) and is executed to undo them';

-- What a function ends with that undoes what it has done because its run was cancelled.
CREATE FUNCTION {schema}.pgqrs_cancelled() RETURNS json
LANGUAGE sql IMMUTABLE PARALLEL SAFE
AS $$ SELECT '{"exc_type": "TaskRevokedError", "exc_module": "celery.exceptions", "exc_message": ["the run was cancelled"]}'::json $$;
