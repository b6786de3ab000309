"""The relay and the connections it is lent."""

from __future__ import annotations

from typing import Any

import pytest
from celery import Celery

from pgqrs_celery import Pgqrs
from pgqrs_celery.relay import Relay


def test_a_lost_message_is_sent_again_on_a_connection_that_an_error_has_closed(
    database_dsn: str, installed_schema: str, redis_url: str
) -> None:
    app = Celery("relayed", broker=redis_url, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema)
    pgqrs = Pgqrs(app)

    @pgqrs.task(shared=False)
    def step() -> None:
        """Do nothing."""

    def waiting() -> int:
        with app.connection_for_read() as connection:
            try:
                return int(connection.default_channel.queue_declare("celery", passive=True).message_count)
            except connection.channel_errors:
                return 0

    step.delay()
    app.control.purge()
    assert waiting() == 0
    with pytest.raises(LookupError), app.amqp.producer_pool.acquire(block=True):
        raise LookupError("kombu closes the connection of a block that ends with an error")
    make_due: Any = f'UPDATE "{installed_schema}".pgqrs_workflow_steps SET due_at = now()'
    pgqrs.ledger.call(lambda session: session.connection.execute(make_due))
    relay = Relay(app, pgqrs.ledger, pgqrs.publish, pgqrs.chords.revive)
    relay.work()
    assert waiting() == 1
    pgqrs.ledger.database.close()
    app.close()


def test_a_relay_that_nobody_calls_looks_first_and_sends_what_it_has_seen_to_be_due(
    database_dsn: str, installed_schema: str, redis_url: str
) -> None:
    app = Celery("quiet", broker=redis_url, set_as_current=False)
    app.conf.update(pgqrs_dsn=database_dsn, pgqrs_schema=installed_schema)
    pgqrs = Pgqrs(app)

    @pgqrs.task(shared=False)
    def step() -> None:
        """Do nothing."""

    def status() -> tuple[Any, ...]:
        query: Any = f'SELECT looks, due_at > now() FROM "{installed_schema}".pgqrs_workflow_steps'
        return pgqrs.ledger.call(lambda session: session.connection.execute(query).fetchone()) or ()

    relay = Relay(app, pgqrs.ledger, pgqrs.publish, pgqrs.chords.revive)
    step.delay()
    assert relay.work(called=False) > 0
    make_due: Any = f'UPDATE "{installed_schema}".pgqrs_workflow_steps SET due_at = now()'
    pgqrs.ledger.call(lambda session: session.connection.execute(make_due))
    assert relay.work(called=False) == 0
    assert status() == (0, False)
    assert relay.work(called=False) > 0
    assert status() == (1, True)
    pgqrs.ledger.database.close()
    app.close()
