-- What every write of a step pays for. A CHECK of a table is read from the catalogue and compiled by every statement
-- (some 5 µs each); that of a domain once in a session. And a call inside a function has no task: the index on task ids
-- needs no entry for it.

CREATE DOMAIN {schema}.pgqrs_step_status AS text
  CHECK (VALUE IN ('QUEUED', 'RUNNING', 'PAUSED', 'SUCCESS', 'FAILED', 'CANCELLED'));
CREATE DOMAIN {schema}.pgqrs_step_kind AS text
  CHECK (VALUE IN ('canvas', 'function', 'inner'));
CREATE DOMAIN {schema}.pgqrs_step_undo AS text
  CHECK (VALUE IN ('possible', 'due'));

ALTER TABLE {schema}.pgqrs_workflow_steps
  DROP CONSTRAINT pgqrs_workflow_steps_status_check,
  DROP CONSTRAINT pgqrs_workflow_steps_kind_check,
  DROP CONSTRAINT pgqrs_workflow_steps_undo_check,
  ALTER COLUMN status TYPE {schema}.pgqrs_step_status,
  ALTER COLUMN kind TYPE {schema}.pgqrs_step_kind,
  ALTER COLUMN undo TYPE {schema}.pgqrs_step_undo,
  DROP CONSTRAINT pgqrs_workflow_steps_task_id_key;

CREATE UNIQUE INDEX pgqrs_workflow_steps_task_id ON {schema}.pgqrs_workflow_steps (task_id) WHERE task_id IS NOT NULL;
