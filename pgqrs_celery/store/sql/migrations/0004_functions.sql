-- Workflows as functions: waits, events, and runs started by other runs.

ALTER TABLE {schema}.pgqrs_workflows ADD COLUMN parent_task_id text;

ALTER TABLE {schema}.pgqrs_workflow_steps
  ADD COLUMN wake_at timestamptz,
  ADD COLUMN awaits  text[];

COMMENT ON COLUMN {schema}.pgqrs_workflows.parent_task_id IS 'the function that started this run and is told of its end';
COMMENT ON COLUMN {schema}.pgqrs_workflow_steps.wake_at IS 'inner waits: the deadline of the first time';
COMMENT ON COLUMN {schema}.pgqrs_workflow_steps.awaits IS 'what a parked function waits for: task ids, and run:<root id>';

-- A row is made by whoever comes first, the one who emits or the one who waits: both lock it, so neither can miss
-- the other. The foreign key is cheap here: an event is rare, and the row it points to is not the hot one.
CREATE TABLE {schema}.pgqrs_events (
  workflow_id  bigint NOT NULL REFERENCES {schema}.pgqrs_workflows ON DELETE CASCADE,
  name         text NOT NULL,
  payload      json,
  emitted_at   timestamptz,
  waiters      text[] NOT NULL DEFAULT '{}',
  PRIMARY KEY (workflow_id, name)
);

COMMENT ON TABLE {schema}.pgqrs_events IS 'what runs are told from outside; the first write wins';
COMMENT ON COLUMN {schema}.pgqrs_events.emitted_at IS 'null: somebody waits for it, nobody has emitted it';
COMMENT ON COLUMN {schema}.pgqrs_events.waiters IS 'task ids of the functions that wait for it';

-- Wakes the relays of an app; the channel's name is the one that ids.relay_channel() computes.
CREATE FUNCTION {schema}.pgqrs_call_relays(app text) RETURNS void
LANGUAGE sql
AS $$ SELECT pg_notify('pgqrs_relay_' || left(encode(sha256(convert_to(
        btrim('{schema}', '"') || '/' || app, 'UTF8')), 'hex'), 24), '') $$;
