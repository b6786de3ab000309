"""What the documentation says is so: its example runs, its tables are complete, its queries and links work."""

from __future__ import annotations

import dataclasses
import os
import re
import subprocess
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

from pgqrs_celery import embedded, exceptions
from pgqrs_celery.conf import DSN_VARIABLE, PREFIX, Settings
from pgqrs_celery.db import Database
from pgqrs_celery.store import migrations, statements

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = [ROOT / name for name in ("README.md", "CHANGELOG.md", "CONTRIBUTING.md")] + sorted(DOCS.glob("*.md"))

#: The monitoring queries of the guide to durable workflows, which run here as they stand there.
GUIDE = """\
-- Check workflow status
SELECT workflow_id, name, status, created_at, updated_at
FROM pgqrs_workflows
WHERE name = 'data_pipeline'
ORDER BY created_at DESC;

-- Check step progress
SELECT w.workflow_id, w.name, w.status as wf_status,
       s.step_id, s.status as step_status, s.completed_at
FROM pgqrs_workflows w
LEFT JOIN pgqrs_workflow_steps s ON w.workflow_id = s.workflow_id
WHERE w.workflow_id = 1;

-- Find stuck workflows (running for too long)
SELECT * FROM pgqrs_workflows
WHERE status = 'RUNNING'
AND updated_at < NOW() - INTERVAL '1 hour';
"""

START = """\
from examples.support import Worker
from shop import app

with Worker(app):
    exec(open("use.py").read())
"""


def blocks(page: Path, language: str) -> list[str]:
    """Return the fenced blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```$", page.read_text("utf-8"), re.DOTALL | re.MULTILINE)


def rows(page: Path) -> list[list[str]]:
    """Return the rows of all tables."""
    lines = [line for line in page.read_text("utf-8").splitlines() if line.startswith("| ")]
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))] for line in lines]


def test_the_example_of_the_readme_prints_what_it_says(
    tmp_path: Path, postgres_server: embedded.PostgresServer
) -> None:
    shop, use = blocks(ROOT / "README.md", "python")
    (expected,) = (block for block in blocks(ROOT / "README.md", "") if block.startswith("parcel-"))
    (tmp_path / "shop.py").write_text(shop)
    (tmp_path / "use.py").write_text(use)
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    environment = {k: v for k, v in os.environ.items() if k not in (DSN_VARIABLE, "CELERY_BROKER_URL")}
    answer = subprocess.run(
        [sys.executable, "-c", START],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout == expected


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {row[0].strip("`"): row[1].strip("`") for row in rows(DOCS / "configuration.md")}
    settings = {PREFIX + field.name: field.default for field in dataclasses.fields(Settings)}
    shown = {name: f'"{value}"' if isinstance(value, str) else repr(value) for name, value in settings.items()}
    assert {name: value for name, value in documented.items() if name.startswith(PREFIX)} == shown


def test_every_error_is_documented() -> None:
    text = (DOCS / "errors.md").read_text("utf-8")
    assert [name for name in exceptions.__all__ if not re.search(rf"\b{name}\b", text)] == []


#: The files whose statements change the status of a canvas's step.
LEDGER = ("recording", "steps", "leases", "clock", "units")


def test_every_statement_of_the_transition_table_exists() -> None:
    text = (DOCS / "architecture.md").read_text("utf-8")
    table = text.partition("## The transitions")[2].partition("## One clock")[0]
    named = {name for row in re.findall(r"^\| (`.*?`) \|", table, re.MULTILINE) for name in re.findall(r"`(\w+)`", row)}
    assert len(named) > 10
    known = {name.rpartition(".")[2] for name in statements.sources() if name.split(".")[0] in LEDGER}
    assert sorted(named - known) == []


def test_the_guide_s_queries_stand_in_the_documentation_word_for_word() -> None:
    assert GUIDE in blocks(DOCS / "operations.md", "sql")


QUERIES = [query for page in PAGES for block in blocks(page, "sql") for query in block.split(";\n") if query.strip()]


@pytest.fixture(scope="module")
def installed(postgres_server: embedded.PostgresServer) -> Iterator[psycopg.Connection[tuple[object, ...]]]:
    """A connection that finds an empty, installed schema on its search path."""
    schema = f"docs_{uuid.uuid4().hex[:12]}"
    database = Database(postgres_server.start().dsn(), schema=schema)
    migrations.install(database)
    database.close()
    with psycopg.connect(postgres_server.dsn(), autocommit=True) as connection:
        connection.execute(f"SET search_path = {schema}".encode())
        yield connection
        connection.execute(f"DROP SCHEMA {schema} CASCADE".encode())


@pytest.mark.parametrize("query", QUERIES, ids=lambda query: query.strip().splitlines()[0])
def test_every_query_runs(query: str, installed: psycopg.Connection[tuple[object, ...]]) -> None:
    assert installed.execute(query.encode()).fetchall() == []


LINKS = [
    pytest.param(page, target, id=f"{page.name}-{target}")
    for page in PAGES
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text("utf-8"))
    if "://" not in target
]


@pytest.mark.parametrize(("page", "target"), LINKS)
def test_every_link_leads_somewhere(page: Path, target: str) -> None:
    name, _, anchor = target.partition("#")
    file = (page.parent / name) if name else page
    assert file.exists()
    if anchor:
        headings = re.findall(r"^#+ (.*)$", file.read_text("utf-8"), re.MULTILINE)
        assert anchor in {re.sub(r"[^\w\- ]", "", heading).strip().lower().replace(" ", "-") for heading in headings}


def test_every_python_block_is_python() -> None:
    found = [block for page in PAGES for block in blocks(page, "python")]
    assert len(found) > 5
    for block in found:
        compile(block, "documentation", "exec")
