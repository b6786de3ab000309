"""The Postgres broker as a kombu transport; ``broker_transport = "pgqrs_celery.transport:Transport"`` finds it here."""

from pgqrs_celery.transport.channel import Channel
from pgqrs_celery.transport.transport import Transport

__all__ = ["Channel", "Transport"]
