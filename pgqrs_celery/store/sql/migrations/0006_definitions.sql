-- Workflows that were defined before they are triggered, and consumed without a Celery worker.

CREATE TABLE {schema}.pgqrs_definitions (
  app         text NOT NULL,
  name        text NOT NULL,
  created_at  timestamptz NOT NULL DEFAULT {schema}.pgqrs_now(),
  PRIMARY KEY (app, name)
);

COMMENT ON TABLE {schema}.pgqrs_definitions IS 'names under which runs may be triggered for consumers';
