"""The console script ``pgqrs``: the schema for those who have a database, and no Celery app (yet)."""

from __future__ import annotations

import click

from pgqrs_celery.conf import DSN_VARIABLE, Settings
from pgqrs_celery.databases import database_for
from pgqrs_celery.db import redact
from pgqrs_celery.exceptions import PgqrsError
from pgqrs_celery.store import migrations

__all__ = ["main"]

dsn_option = click.option("--dsn", envvar=DSN_VARIABLE, show_envvar=True, help="Where Postgres is: a URL or key=value.")
schema_option = click.option("--schema", help="The schema of the tables.  [default: public]")


@click.group()
@dsn_option
@schema_option
@click.pass_context
def main(ctx: click.Context, dsn: str | None, schema: str | None) -> None:
    """Durable workflows in Postgres. With a Celery app: celery -A app pgqrs …"""
    ctx.obj = (dsn, schema)


@main.command()
@dsn_option
@schema_option
@click.option("--sql", is_flag=True, help="Print what would be run, for psql; needs no database.")
@click.pass_context
def install(ctx: click.Context, dsn: str | None, schema: str | None, sql: bool) -> None:
    """Install or upgrade the tables.

    Safe to run again, and by several hosts at once.
    """
    try:
        settings = Settings.read({"pgqrs_schema": schema or ctx.obj[1]})
        if sql:
            click.echo(migrations.script(settings.schema), nl=False)
            return
        target = dsn or ctx.obj[0]
        if not target:
            raise click.UsageError(f"where is the database? Give --dsn postgresql://…, or set {DSN_VARIABLE}")
        done = migrations.install(database_for(target, settings))
    except PgqrsError as error:
        raise click.ClickException(" ".join(str(error).split())) from error
    for name in done:
        click.echo(f"schema {settings.schema} of {redact(target)}: applied {name}")
    if not done:
        click.echo(f"schema {settings.schema} of {redact(target)}: up to date")
