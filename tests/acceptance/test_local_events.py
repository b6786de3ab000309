"""The task events of links that a process has gone on with itself, which its worker's main process does not send."""

from __future__ import annotations

import json
from typing import Any

import pytest
from celery import chain

from pgqrs_celery import Status
from tests.acceptance.test_local_continuation import abc, sent
from tests.support.events import collected_events
from tests.support.fleet import Fleet
from tests.support.scenario import LOCAL, LONG_LEASE, Scenario
from tests.support.vocabulary import named
from tests.support.waiting import PATIENCE

#: No ``task-sent`` event gets into a queue: whoever sends one is told that the database is busy.
NO_EVENTS = """
CREATE FUNCTION {0}.refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  IF position(convert_to('task-sent', 'UTF8') IN NEW.body) > 0 THEN
    RAISE 'a deadlock' USING ERRCODE = 'deadlock_detected';
  END IF;
  RETURN NEW;
END $$;
CREATE TRIGGER refuse BEFORE INSERT ON {0}.pgqrs_broadcasts FOR EACH ROW EXECUTE FUNCTION {0}.refuse();
"""

#: Keeps every message about an event, of any kind.
KEEP_EVENTS = """
CREATE TABLE {0}.kept (body text);
CREATE FUNCTION {0}.keep() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
  INSERT INTO {0}.kept VALUES (convert_from(NEW.body, 'UTF8'));
  RETURN NEW;
END $$;
CREATE TRIGGER keep BEFORE INSERT ON {0}.pgqrs_broadcasts FOR EACH ROW EXECUTE FUNCTION {0}.keep();
"""


def watched(fleet: Fleet, statement: str) -> list[Any]:
    """Execute a chain while its events are collected, after a statement of SQL; returns its links, all ended."""
    links = abc(fleet)
    with collected_events(fleet.application.celery) as events:
        fleet.scenario.execute(statement)
        assert chain(*links).delay().get(timeout=PATIENCE) == ["a", "b", "c"]
        events.wait_for({link.id: ["task-received", "task-started", "task-succeeded"] for link in links})
    return links


@pytest.mark.parametrize("each_scenario", ["postgres", "redis"], indirect=True)
def test_task_events_tell_of_every_link(each_scenario: Scenario) -> None:
    conf = {**LOCAL, **LONG_LEASE, "task_send_sent_event": True}
    with Fleet(each_scenario.with_conf(**conf), size=1, options={"arguments": ["-E"]}) as fleet:
        links = [*abc(fleet)[:2], named(fleet.tasks.fickle.s("c", first="retry"))]
        failing = [named(fleet.tasks.step.s([], "a")), named(fleet.tasks.fail.s())]
        with collected_events(fleet.application.celery) as events:
            assert chain(*links).delay().get(timeout=PATIENCE) == ["a", "b", "c"]
            with pytest.raises(ValueError, match="as the test asked for"):
                chain(*failing).delay().get(timeout=PATIENCE)
            begun = ["task-received", "task-started"]
            expected = {
                **{link.id: [*begun, "task-succeeded"] for link in [*links[:2], failing[0]]},
                links[2].id: [*begun, "task-retried", *begun, "task-succeeded"],
                failing[1].id: [*begun, "task-failed"],
            }
            events.wait_for(expected, but="task-sent")
        sendings = {link.id: 1 + (link is links[2]) for link in [*links, *failing]}
        assert {task_id: types.count("task-sent") for task_id, types in events.by_task(sendings).items()} == sendings
        sent_by = {event["hostname"] for event in events.of(links[1].id) if event["type"] != "task-sent"}
        assert sent_by == {fleet.workers[0].hostname}
        assert sent(fleet, *links[:2], *failing) == [1, 0, 1, 0]


def test_the_events_between_two_links_are_one_message(scenario: Scenario) -> None:
    with Fleet(scenario.with_conf(**LOCAL, **LONG_LEASE), size=1, options={"arguments": ["-E"]}) as fleet:
        links = watched(fleet, KEEP_EVENTS)
        kept = [json.loads(body) for (body,) in scenario.execute("SELECT body FROM {}.kept")]
        about = {link.id: "bc"[nth] for nth, link in enumerate(links[1:])}
        ours = [
            [f"{event['type']} {about[event['uuid']]}" for event in message]
            for message in kept
            if isinstance(message, list) and message[0].get("uuid") in about
        ]
        assert ours == [
            ["task-received b", "task-started b"],
            ["task-succeeded b", "task-received c", "task-started c"],
            ["task-succeeded c"],
        ]


def test_an_event_that_cannot_be_sent_stops_no_link(scenario: Scenario) -> None:
    conf = {**LOCAL, **LONG_LEASE, "task_send_sent_event": True}
    with Fleet(scenario.with_conf(**conf), size=1, options={"arguments": ["-E"]}) as fleet:
        links = watched(fleet, NO_EVENTS)
        assert fleet.ended(links[0].id).status is Status.SUCCESS
        assert sent(fleet, *links) == [1, 0, 0]
        assert fleet.logged("the broker does not take a task-sent event")
        fleet.expect({link.id: 1 for link in links})
