-- What functions wait for, what is defined before it is triggered, and what is started when.

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

CREATE TABLE {schema}.pgqrs_definitions (
  app         text NOT NULL,
  name        text NOT NULL,
  created_at  timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  PRIMARY KEY (app, name)
);

COMMENT ON TABLE {schema}.pgqrs_definitions IS 'names under which runs may be triggered for consumers';

CREATE TABLE {schema}.pgqrs_schedules (
  app           text NOT NULL,
  name          text NOT NULL,
  workflow      text NOT NULL,
  cron          text NOT NULL,
  zone          text NOT NULL,
  args          json NOT NULL,
  enabled       boolean NOT NULL DEFAULT true,
  catch_up      boolean NOT NULL DEFAULT false,
  overlap       boolean NOT NULL DEFAULT true,
  next_fire_at  timestamptz,
  last_fire_at  timestamptz,
  last_run      bigint,
  created_at    timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  updated_at    timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  PRIMARY KEY (app, name)
);

COMMENT ON TABLE {schema}.pgqrs_schedules IS 'recurring runs; a tick inserts the run and advances in one transaction';
COMMENT ON COLUMN {schema}.pgqrs_schedules.zone IS 'the IANA time zone in which cron is read';
COMMENT ON COLUMN {schema}.pgqrs_schedules.catch_up IS 'whether each missed time gets a run, or all of them one';
COMMENT ON COLUMN {schema}.pgqrs_schedules.overlap IS 'whether a run may start while the last one has not ended';
COMMENT ON COLUMN {schema}.pgqrs_schedules.next_fire_at IS 'null: never again';

CREATE INDEX pgqrs_schedules_due ON {schema}.pgqrs_schedules (app, next_fire_at)
  WHERE enabled AND next_fire_at IS NOT NULL;
