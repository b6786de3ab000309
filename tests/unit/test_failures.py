"""Errors come back with their class, arguments and attributes."""

from __future__ import annotations

import json
from pathlib import PurePath
from typing import Any

import psycopg
import pytest

from pgqrs_celery.exceptions import StepFailed
from pgqrs_celery.failures import as_replayed, dump_error, load_error


class Coded(Exception):
    """Says something else than it was told."""

    def __init__(self, code: int, *, path: Any = None) -> None:
        super().__init__(f"code {code}")
        self.code = code
        self.path = path


class Two(Exception):
    """Takes more than it passes on."""

    def __init__(self, one: int, two: int) -> None:
        super().__init__(one)
        self.two = two


class Picky(ValueError):
    """Refuses what it does not expect."""

    def __init__(self, options: dict[str, int]) -> None:
        if not isinstance(options, dict):
            raise RuntimeError("no options")
        super().__init__("picky")


class Missing(FileNotFoundError):
    """Derives from an error with fields of its own."""

    def __init__(self, name: str) -> None:
        super().__init__(2, "No such file", name)
        self.name = name


class Outer:
    """Holds a class."""

    class Inner(Exception):
        """Is held."""


ERRORS = [
    ValueError("a", 1),
    KeyError("k"),
    OSError(2, "No such file"),
    Coded(5),
    Two(1, 2),
    Picky({}),
    Missing("a.txt"),
    Outer.Inner("x"),
    psycopg.errors.UniqueViolation("duplicate"),
]


@pytest.mark.parametrize("error", ERRORS, ids=repr)
def test_an_error_comes_back_as_it_was(error: Exception) -> None:
    back = load_error(dump_error(error))
    assert type(back) is type(error)
    assert (str(back), list(back.args)) == (str(error), list(error.args))
    assert {k: v for k, v in vars(error).items() if not k.startswith("_")} == {
        k: v for k, v in vars(back).items() if not k.startswith("_")
    }
    assert as_replayed(error) is error


def test_notes_and_later_attributes_come_back_and_what_json_does_not_know_is_left_out() -> None:
    error = Coded(5, path=PurePath("x"))
    error.add_note("noted")
    back = load_error(dump_error(error))
    assert isinstance(back, Coded)
    assert (back.code, back.__notes__) == (5, ["noted"])
    assert not hasattr(back, "path")


def test_fields_of_builtin_errors_come_back() -> None:
    back = load_error(dump_error(Missing("a.txt")))
    assert isinstance(back, Missing)
    assert (back.errno, back.filename, back.name) == (2, "a.txt", "a.txt")
    assert load_error(dump_error(psycopg.errors.UniqueViolation("duplicate"))).diag.sqlstate is None  # type: ignore[attr-defined]


def test_a_class_that_nobody_can_find_is_a_step_failed_the_first_time_already() -> None:
    class Local(Exception):
        pass

    error = Local("x")
    assert isinstance(as_replayed(error), StepFailed)
    assert str(as_replayed(error)) == str(load_error(dump_error(error)))


@pytest.mark.parametrize(
    "recorded",
    [
        {},
        {"exc_type": "system", "exc_module": "os", "exc_message": ["true"]},
        {"exc_type": "SystemExit", "exc_module": "builtins", "exc_message": [3]},
        {"exc_type": "Nothing", "exc_module": "not.loaded", "exc_message": "text"},
    ],
)
def test_what_is_no_exception_of_a_loaded_module_is_not_made(recorded: dict[str, Any]) -> None:
    assert type(load_error(json.dumps(recorded))) is StepFailed
