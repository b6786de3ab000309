"""Which app sends a workflow, and what a run needs of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from celery import Celery, chain, group
from celery.canvas import Signature

from pgqrs_celery import Pgqrs
from pgqrs_celery.durability import links
from pgqrs_celery.workflow import bound, named_copy


@pytest.fixture
def app(database_dsn: str, installed_schema: str, redis_url: str) -> Iterator[Celery]:
    """An app that is not the current one."""
    app = Celery("shop", broker=redis_url, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema)
    pgqrs = Pgqrs(app)
    pgqrs.task(echo, name="shop.echo")
    yield app
    pgqrs.ledger.database.close()
    app.close()


def echo(value: int) -> int:
    """Return the argument."""
    return value


def test_a_workflow_is_sent_by_its_own_app_not_by_the_current_one(app: Celery) -> None:
    task = app.tasks["shop.echo"]
    run = app.pgqrs.workflow("two", task.s() | task.s()).delay(1)
    with app.connection_for_read() as connection:
        assert connection.default_channel.queue_declare("celery", passive=True).message_count == 1
    assert [step.status for step in run.steps()] == ["QUEUED"]


def test_every_member_of_a_nested_canvas_belongs_to_the_workflows_app(app: Celery) -> None:
    task = app.tasks["shop.echo"]
    nested = chain(task.s(1), group(task.s(), chain(task.s(), group(task.s(), task.s()))))
    canvas = bound(named_copy(nested, app), app)
    members = list(links(canvas))
    assert len(members) == 5
    assert all(isinstance(member, Signature) and member._app is app for member in members)


def test_a_durable_task_is_no_task_of_other_apps(app: Celery) -> None:
    other = Celery("other", set_as_current=False)
    assert "shop.echo" in app.tasks
    assert "shop.echo" not in other.tasks
