"""The pages on the broker and on functions are sessions: they are run, and answer what is written there."""

from __future__ import annotations

import collections
import datetime
import decimal
import enum
import importlib.util
import json
import os
import re
import subprocess
import sys
import uuid
import zoneinfo
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict

from pgqrs_celery.codec import Codec
from pgqrs_celery.conf import DSN_VARIABLE
from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import ResultNotSerializable
from pgqrs_celery.store import messages, migrations
from pgqrs_celery.store.messages import NewMessage
from tests.tooling.test_docs import DOCS, ROOT, blocks

START = """\
import doctest
import sys

from examples.support import Worker
from {module} import app, pgqrs

pgqrs.install()
with Worker(app, concurrency=2):
    failed, attempted = doctest.testfile("session.txt", module_relative=False)
sys.exit(failed > 0 or attempted == 0)
"""

#: What a project that uses Django brings along.
DJANGO = """\
import json
import sys

import django
from django.conf import settings
from django.db import connection

settings.configure(DATABASES={{"default": {{"ENGINE": "django.db.backends.postgresql", **json.loads(sys.argv[1])}}}})
django.setup()

{block}

class Order:
    number = 12

    def save(self):
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO orders VALUES (%s)", [self.number])


pay(Order())
"""


def modules(page: Path) -> dict[str, str]:
    """Return the modules of a page: blocks that begin with the same file name belong together."""
    found: dict[str, str] = {}
    for block in blocks(page, "python"):
        first, _, rest = block.partition("\n")
        if first.startswith("# ") and first.endswith(".py"):
            found[first[2:-3]] = found.get(first[2:-3], "") + rest + "\n\n"
    return found


def executed(directory: Path, dsn: str, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a directory, with a database and no other place to send to."""
    environment: Mapping[str, str] = {k: v for k, v in os.environ.items() if k != "CELERY_BROKER_URL"}
    path = os.pathsep.join([str(directory), str(ROOT), os.environ.get("PYTHONPATH", "")])
    return subprocess.run(
        [sys.executable, *command],
        cwd=directory,
        env={**environment, DSN_VARIABLE: dsn, "DATABASE_URL": dsn, "PYTHONPATH": path, **more},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )


def session(page: Path, module: str, directory: Path, dsn: str) -> None:
    """Run the sessions of a page, in order, with its modules and a worker."""
    for name, text in modules(page).items():
        (directory / f"{name}.py").write_text(text)
    (directory / "session.txt").write_text("\n".join(blocks(page, "pycon")))
    answer = executed(directory, dsn, "-c", START.format(module=module))
    assert answer.returncode == 0, answer.stdout + answer.stderr


def rows(dsn: str, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(dsn, autocommit=True) as connection:
        return connection.execute(query.encode()).fetchall()


@pytest.fixture
def orders(own_database_dsn: str) -> str:
    """The DSN of a database with the tables of the package and a table of the user's own."""
    database = Database(own_database_dsn)
    migrations.install(database)
    database.close()
    with psycopg.connect(own_database_dsn, autocommit=True) as connection:
        connection.execute("CREATE TABLE orders (number integer PRIMARY KEY)")
    return own_database_dsn


def test_the_session_of_the_broker_s_page(tmp_path: Path, orders: str) -> None:
    session(DOCS / "broker.md", "shop", tmp_path, orders)
    assert rows(orders, "SELECT number FROM orders") == [(9,)]
    results = {row[0] for row in rows(orders, "SELECT data ->> 'result' FROM pgqrs_task_results")}
    assert {"receipt for 9", "receipt for 0"} <= results
    assert "receipt for 10" not in results


def test_the_session_of_the_functions_page(tmp_path: Path, orders: str) -> None:
    session(DOCS / "functions.md", "orders", tmp_path, orders)


VALUES = (DOCS / "functions.md").read_text("utf-8").partition("\n## Values\n")[2].partition("\n## ")[0]


@dataclass
class Item:
    """A value that JSON does not know."""

    name: str


#: What the names in the table mean.
NAMES = {
    **vars(collections),
    **vars(datetime),
    **vars(decimal),
    **vars(uuid),
    **vars(zoneinfo),
    "Point": collections.namedtuple("Point", "x y"),
    "Level": enum.IntEnum("Level", {"HIGH": 3}),
    "Color": enum.Enum("Color", "RED"),
    "Item": Item,
}


@pytest.mark.parametrize(("returned", "seen"), re.findall(r"^\| `(.*?)`.*? \| `?(.*?)`? \|$", VALUES, re.MULTILINE))
def test_a_value_comes_back_as_the_page_says(returned: str, seen: str) -> None:
    codec, value = Codec("json", ["json"]), eval(returned, NAMES)
    if seen == "refused":
        with pytest.raises(ResultNotSerializable):
            codec.dump_result(value, "step")
    else:
        assert repr(codec.load(codec.dump_result(value, "step"))) == repr(eval(seen, NAMES))


def test_a_sender_needs_no_import(tmp_path: Path, orders: str) -> None:
    text = modules(DOCS / "broker.md")["sender"]
    assert "import pgqrs_celery" not in text
    (tmp_path / "sender.py").write_text(text)
    answer = executed(tmp_path, orders, "sender.py")
    assert answer.returncode == 0, answer.stderr
    assert rows(orders, "SELECT queue, headers::json ->> 'task' FROM pgqrs_messages") == [("celery", "shop.receipt")]


def test_the_view_sends_in_the_transaction_of_django(tmp_path: Path, orders: str) -> None:
    if importlib.util.find_spec("django") is None:
        pytest.skip("Django is NOT INSTALLED: what this test checks stays unchecked")
    (block,) = (block for block in blocks(DOCS / "broker.md", "python") if block.startswith("# django\n"))
    (tmp_path / "shop.py").write_text(modules(DOCS / "broker.md")["shop"])
    (tmp_path / "project.py").write_text(DJANGO.format(block=block))
    parts = conninfo_to_dict(orders)
    names = {"NAME": "dbname", "USER": "user", "HOST": "host", "PORT": "port"}
    place = {name: parts.get(key, "") for name, key in names.items()}
    answer = executed(tmp_path, orders, "project.py", json.dumps(place))
    assert answer.returncode == 0, answer.stderr
    assert rows(orders, "SELECT number FROM orders") == [(12,)]
    assert rows(orders, "SELECT headers::json ->> 'argsrepr' FROM pgqrs_messages") == [("(12,)",)]


def test_a_dead_letter_is_put_back(orders: str) -> None:
    queries = [query for block in blocks(DOCS / "broker.md", "sql") for query in block.split(";\n")]
    (shown,) = (query for query in queries if query.startswith("-- What was given up"))
    (back,) = (query for query in queries if query.startswith("-- Put back"))
    database = Database(orders)
    headers = '{"task": "shop.receipt", "argsrepr": "(7,)", "x-death": [{"queue": "celery", "reason": "11 died"}]}'
    with database.session() as found:
        messages.publish(found, [NewMessage(messages.new_id(), "", "pgqrs.dead", headers, "{}", b"[]", ttl=60.0)])
    database.close()
    assert [row[2:] for row in rows(orders, shown)] == [("shop.receipt", "(7,)", "celery", "11 died")]
    assert len(rows(orders, back)) == 1
    assert rows(orders, "SELECT queue, expires_at FROM pgqrs_messages") == [("celery", None)]
