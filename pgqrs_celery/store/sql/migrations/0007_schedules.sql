-- Schedules: what is to be started when; any number of workers may look at them.

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
