-- now: the database's time; every moment of a schedule is reckoned from it.
SELECT {schema}.pgqrs_now();

-- put: enter a schedule, or change it.
INSERT INTO {schema}.pgqrs_schedules AS s (app, name, workflow, cron, zone, args, catch_up, overlap, next_fire_at)
VALUES (%(app)s, %(name)s, %(workflow)s, %(cron)s, %(zone)s, %(args)s::json, %(catch_up)s, %(overlap)s,
        %(next_fire_at)s)
    ON CONFLICT (app, name) DO UPDATE
   SET workflow = excluded.workflow, cron = excluded.cron, zone = excluded.zone, args = excluded.args, enabled = true,
       catch_up = excluded.catch_up, overlap = excluded.overlap, updated_at = {schema}.pgqrs_now(),
       -- The same times as before: one that is due already is not lost.
       next_fire_at = CASE WHEN s.enabled AND s.cron = excluded.cron AND s.zone = excluded.zone
                           THEN s.next_fire_at ELSE excluded.next_fire_at END;

-- remove: forget a schedule.
DELETE FROM {schema}.pgqrs_schedules WHERE app = %(app)s AND name = %(name)s RETURNING name;

-- claim: lock one schedule that is due, of a workflow that this worker knows.
SELECT s.name, s.workflow, s.cron, s.zone, s.args, s.catch_up, s.overlap, s.next_fire_at, s.last_run,
       {schema}.pgqrs_now() AS now,
       EXISTS (SELECT FROM {schema}.pgqrs_workflows w
                WHERE w.workflow_id = s.last_run AND w.status IN ('QUEUED', 'RUNNING', 'PAUSED')) AS busy
  FROM {schema}.pgqrs_schedules s
 WHERE s.app = %(app)s AND s.enabled AND s.next_fire_at IS NOT NULL AND s.next_fire_at <= {schema}.pgqrs_now()
   AND s.workflow = ANY(%(workflows)s)
 ORDER BY s.next_fire_at
 LIMIT 1
   FOR NO KEY UPDATE SKIP LOCKED;

-- advance: a locked schedule has fired (or was passed over: then it keeps its last run).
UPDATE {schema}.pgqrs_schedules s
   SET next_fire_at = %(next_fire_at)s, last_fire_at = %(fired_at)s, last_run = coalesce(%(run)s, s.last_run),
       updated_at = {schema}.pgqrs_now()
 WHERE s.app = %(app)s AND s.name = %(name)s;

-- next_due: seconds until a schedule is due; null when none ever is.
SELECT extract(epoch FROM min(s.next_fire_at) - {schema}.pgqrs_now())::float8
  FROM {schema}.pgqrs_schedules s
 WHERE s.app = %(app)s AND s.enabled AND s.next_fire_at IS NOT NULL AND s.workflow = ANY(%(workflows)s);

-- forget_runs: these runs are being removed.
UPDATE {schema}.pgqrs_schedules SET last_run = NULL WHERE app = %(app)s AND last_run = ANY(%(workflow_ids)s);
