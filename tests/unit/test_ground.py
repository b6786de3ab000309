"""Holdings, statements, the error tree, and the names of the package."""

from __future__ import annotations

import ast
import importlib
import pkgutil
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest

import pgqrs_celery
from pgqrs_celery import exceptions
from pgqrs_celery.exceptions import LeaseLost, PgqrsError
from pgqrs_celery.holdings import Holdings
from pgqrs_celery.states import OPEN, TERMINAL, Status
from pgqrs_celery.store import statements

PACKAGE = Path(pgqrs_celery.__file__).parent
SOURCES = sorted(path for path in PACKAGE.rglob("*.py"))


# --- holdings


def test_what_is_entered_is_held_until_it_leaves() -> None:
    holdings = Holdings()
    holdings.enter(1, "a")
    holdings.enter(2, "b")
    assert [held.task_id for held in holdings.present()] == ["a", "b"]
    holdings.leave(1)
    assert [held.task_id for held in holdings.present()] == ["b"]
    holdings.leave(1)
    holdings.leave(99)


def test_a_duplicate_that_ends_does_not_drop_the_original() -> None:
    holdings = Holdings()
    holdings.enter(1, "a")
    holdings.enter(2, "a")
    holdings.leave(2)
    assert [held.task_id for held in holdings.present()] == ["a"]


def test_what_has_begun_is_marked() -> None:
    holdings = Holdings()
    holdings.enter(1, "a")
    holdings.accept(1)
    holdings.accept(99)
    assert [held.accepted for held in holdings.present()] == [True]


def test_the_watermark_of_a_queue_is_the_newest_send_time() -> None:
    holdings, early = Holdings(), datetime(2030, 1, 1, tzinfo=UTC)
    holdings.received("celery", early + timedelta(seconds=5))
    holdings.received("celery", early)
    holdings.received("slow", early)
    assert holdings.watermarks() == {"celery": early + timedelta(seconds=5), "slow": early}


def test_another_thread_may_look_while_messages_come_and_go() -> None:
    holdings, stop, errors = Holdings(), threading.Event(), []

    def look() -> None:
        while not stop.is_set():
            try:
                holdings.present()
                holdings.watermarks()
            except RuntimeError as error:
                errors.append(error)

    looker = threading.Thread(target=look)
    looker.start()
    for n in range(20_000):
        holdings.enter(n, str(n))
        holdings.received(str(n % 100), datetime(2030, 1, 1, tzinfo=UTC))
        if n % 3:
            holdings.leave(n)
    stop.set()
    looker.join()
    assert errors == []


# --- statements


def test_every_statement_that_the_code_names_exists_and_every_one_is_named() -> None:
    named = set()
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                named |= {node.value} & set(statements.sources())
                unknown = re.fullmatch(r"(steps|runs|workers|migrations)\.[a-z_]+", node.value)
                assert not unknown or node.value in statements.sources(), f"{path.name}: {node.value}"
    unused = {name for name in statements.sources() if name.partition(".")[0] in ("steps", "runs", "workers")} - named
    assert unused == set()


def test_every_statement_names_its_schema_and_says_what_it_does() -> None:
    for name, text in statements.sources().items():
        assert text, name
        for table in re.findall(r"(?<![\w.])(pgqrs_(?!now\b|relay)\w+)", re.sub(r"'[^']*'", "", text)):
            assert f"{{schema}}.{table}" in text, f"{name}: {table} without its schema"


def test_a_statement_may_be_part_of_another_of_its_file() -> None:
    found = statements.sources()
    assert found["steps.begin"] in found["steps.pass_on"]
    assert "{accepted}" in found["results.store_with_part"]  # which is none: the code fills that in


def test_every_placeholder_is_a_parameter() -> None:
    for name, text in statements.sources().items():
        assert not re.search(r"%(?!\(\w+\)[sbt])", text.replace("%%", "")), name
        assert not re.search(r"'%\(", text), f"{name}: a parameter inside quotes"


def test_rendering_puts_the_quoted_schema_everywhere() -> None:
    rendered = statements.render('odd "name"')
    assert rendered.keys() == statements.sources().keys()
    for name, text in rendered.items():
        assert "{schema}" not in text, name
    assert '"odd ""name""".pgqrs_workflow_steps' in rendered["steps.peek"]


def test_a_header_begins_a_statement_and_ends_the_one_before() -> None:
    sources = statements.sources()
    assert sources["workers.try_lock"] == "SELECT pg_try_advisory_xact_lock(%(key)s)"
    assert not [name for name, text in sources.items() if text.endswith(";")]


# --- errors


def drawn() -> dict[str, str]:
    """The tree in the docstring: every class with its base."""
    parents: dict[int, str] = {}
    found: dict[str, str] = {}
    for line in (exceptions.__doc__ or "").splitlines():
        match = re.match(r"^    ([│├└─ ]*)([A-Z]\w+)(?: \((\w+)\))?(?:\s{2,}|$)", line)
        if not match:
            continue
        depth = len(match[1])
        bases = [parents[d] for d in sorted(parents) if d < depth]
        found[match[2]] = match[3] or (bases[-1] if bases else "Exception")
        parents = {d: name for d, name in parents.items() if d < depth} | {depth: match[2]}
    return found


def test_the_drawn_error_tree_is_the_real_one() -> None:
    real = {
        name: value.__mro__[1].__name__
        for name, value in vars(exceptions).items()
        if isinstance(value, type) and issubclass(value, BaseException)
    }
    assert drawn() == real


def test_the_errors_are_listed_in_order() -> None:
    assert exceptions.__all__ == sorted(exceptions.__all__)
    assert set(exceptions.__all__) == set(drawn())


def test_a_lost_lease_cannot_be_swallowed_by_a_body() -> None:
    assert not issubclass(LeaseLost, Exception)
    assert issubclass(exceptions.RunTimeout, TimeoutError)
    assert issubclass(exceptions.RunTimeout, PgqrsError)


# --- names


def modules() -> Iterator[str]:
    for info in pkgutil.walk_packages([str(PACKAGE)], "pgqrs_celery."):
        yield info.name


def test_every_public_name_exists() -> None:
    for name in pgqrs_celery.__all__:
        assert hasattr(pgqrs_celery, name), name
    assert len(set(pgqrs_celery.__all__)) == len(pgqrs_celery.__all__)


@pytest.mark.parametrize("name", sorted(modules()))
def test_what_a_module_offers_exists_and_is_documented(name: str) -> None:
    module = importlib.import_module(name)
    assert module.__doc__, f"{name} does not say what it is"
    for offered in getattr(module, "__all__", ()):
        value = getattr(module, offered)
        if getattr(value, "__module__", None) == name and callable(value):
            assert value.__doc__, f"{name}.{offered} does not say what it is"


def test_nothing_inside_imports_from_the_top() -> None:
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module == "pgqrs_celery" and path.name != "__init__.py":
                submodules = {alias.name for alias in node.names}
                available = {p.stem for p in PACKAGE.glob("*.py")} | {p.name for p in PACKAGE.iterdir() if p.is_dir()}
                assert submodules <= available, f"{path.name} imports {submodules - available} from the top"


def test_every_status_is_open_or_terminal() -> None:
    assert set(Status) == OPEN | TERMINAL
    assert not OPEN & TERMINAL
    assert Status.SUCCESS == "SUCCESS"
