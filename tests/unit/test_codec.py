"""What goes into the ledger comes out equal, and is JSON that Postgres takes."""

from __future__ import annotations

import json
import math
import uuid
from datetime import UTC, date, datetime, time, timedelta, timezone
from decimal import Decimal
from typing import Any

import psycopg
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pgqrs_celery.codec import Codec
from pgqrs_celery.exceptions import ResultNotSerializable, ResultTooLarge, StepError

SERIALIZERS = ["json", "pickle", "yaml"]

VALUES: list[Any] = [
    None,
    True,
    0,
    -1,
    2**63,
    2**200,
    -(2**64),
    0.1,
    1e16,
    1e300,
    -0.0,
    5e-324,
    "",
    "ünïcode ☃ \U0001f600",
    "NaN and Infinity, in words",
    'quotes " and \\ and \x1f',
    [],
    [[[]]],
    {},
    {"a": {"b": [1, None]}},
    {"z": 1, "a": 2},
    datetime(2024, 2, 29, 12, 30, 15, 123456),
    datetime(2024, 2, 29, 12, 30, tzinfo=UTC),
    datetime(2024, 2, 29, 12, 30, tzinfo=timezone(timedelta(hours=5, minutes=30))),
    date(2024, 2, 29),
    Decimal("1.50"),
    Decimal("123456789012345678901234567890.1"),
    uuid.UUID(int=7),
    b"\x00\xff binary",
    {"content_type": "application/json", "content_encoding": "utf-8", "body": "e30="},
    {"content_type": "evil"},
    {"content_type": None, "body": 3},
    {"__type__": "x"},
    [{"content_type": "application/json"}],
]


def codec(serializer: str = "json", **options: Any) -> Codec:
    return Codec(serializer, ["json", "pickle", "yaml"], **options)


@pytest.mark.parametrize("serializer", ["json", "pickle"])
@pytest.mark.parametrize("value", [*VALUES, (1, 2), {1: 2}], ids=repr)
def test_the_first_execution_sees_what_a_replay_will(value: Any, serializer: str) -> None:
    text = codec(serializer).dump(value)
    assert codec(serializer).load_again(text, value) == codec(serializer).load(text)
    assert type(codec(serializer).load_again(text, value)) is type(codec(serializer).load(text))


def test_a_number_that_python_does_not_write_is_refused() -> None:
    with pytest.raises(ResultNotSerializable, match=r"s' returned a builtins\.int"):
        codec().dump_result(10**5000, "s")


@pytest.mark.parametrize("value", VALUES, ids=repr)
def test_json_returns_what_it_was_given(value: Any) -> None:
    text = codec().dump(value)
    loaded = codec().load(text)
    assert loaded == value
    assert type(loaded) is type(value)
    json.loads(text, parse_constant=pytest.fail)


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
@pytest.mark.parametrize("value", [v for v in VALUES if not isinstance(v, Decimal | uuid.UUID | timezone)], ids=repr)
def test_other_serializers_return_what_they_were_given(serializer: str, value: Any) -> None:
    assert codec(serializer).load(codec(serializer).dump(value)) == value


@pytest.mark.parametrize("value", [math.inf, -math.inf, [1, math.inf], {"a": -math.inf}])
def test_an_infinite_number_survives(value: Any) -> None:
    text = codec().dump(value)
    assert codec().load(text) == value
    json.loads(text, parse_constant=pytest.fail)


def test_not_a_number_stays_not_a_number() -> None:
    text = codec().dump({"x": [math.nan]})
    assert math.isnan(codec().load(text)["x"][0])
    json.loads(text, parse_constant=pytest.fail)


def test_the_order_of_keys_is_kept() -> None:
    assert list(codec().load(codec().dump({"z": 1, "a": 2}))) == ["z", "a"]


def test_a_tuple_comes_back_as_a_list() -> None:
    assert codec().load(codec().dump((1, (2,)))) == [1, [2]]


def test_times_and_sets_are_what_kombu_makes_of_them() -> None:
    assert codec().load(codec().dump(time(12, 30))) in (time(12, 30), "12:30:00")


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary(),
        lambda children: st.lists(children) | st.dictionaries(st.text(), children),
        max_leaves=10,
    )
)
@settings(derandomize=True, database=None, suppress_health_check=list(HealthCheck))
def test_any_value_of_json_s_kind_comes_back_equal(value: Any) -> None:
    assert codec().load(codec().dump(value)) == value


def test_postgres_takes_and_returns_every_text_verbatim(database_dsn: str) -> None:
    texts = [codec(serializer).dump(value) for serializer in SERIALIZERS for value in VALUES[:-9]]
    texts += [codec().dump(value) for value in [math.nan, math.inf, "\x00", "\ud7ff", *VALUES]]
    with psycopg.connect(database_dsn) as connection:
        found = [connection.execute("SELECT %s::json::text", [text]).fetchone() for text in texts]
    assert [row and row[0] for row in found] == texts


def test_nothing_is_nothing() -> None:
    assert codec().load(None) is None
    assert codec().dump(None) == "null"
    assert codec().load("null") is None


def test_a_value_that_cannot_be_written_is_an_error_naming_step_and_type() -> None:
    with pytest.raises(ResultNotSerializable) as caught:
        codec().dump_result(object(), "charge#2")
    message = str(caught.value)
    assert "step 'charge#2' returned a builtins.object that the serializer 'json' cannot write" in message
    assert "resumed" in message


@pytest.mark.parametrize("value", [{("a",): 1}, {1, 2}, lambda: None, [object()]], ids=["key", "set", "lambda", "deep"])
def test_every_kind_of_unwritable_value_is_that_error_or_comes_back(value: Any) -> None:
    try:
        text = codec().dump_result(value, "charge")
    except ResultNotSerializable:
        return
    assert codec().load(text) is not None


def test_a_cycle_is_that_error() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(ResultNotSerializable, match=r"step 'charge' returned a builtins\.list"):
        codec().dump_result(value, "charge")


def test_a_value_nested_too_deep_is_that_error() -> None:
    value: Any = 1
    for _ in range(100_000):
        value = [value]
    with pytest.raises(ResultNotSerializable, match="step 'charge'"):
        codec().dump_result(value, "charge")


def test_a_result_may_be_as_large_as_the_limit_and_no_larger() -> None:
    limited = codec(max_bytes=10)
    assert limited.dump_result("x" * 8, "charge") == '"xxxxxxxx"'
    with pytest.raises(ResultTooLarge, match=r"step 'charge' returned 11 bytes, more than pgqrs_max_result_bytes = 10"):
        limited.dump_result("x" * 9, "charge")


def test_the_limit_counts_bytes() -> None:
    with pytest.raises(ResultTooLarge):
        codec("yaml", max_bytes=10).dump_result("ä" * 8, "charge")
    large = "☃" * 8
    assert len(codec().dump(large).encode()) > 10
    with pytest.raises(ResultTooLarge):
        codec(max_bytes=10).dump_result(large, "charge")


def test_a_content_type_the_app_does_not_accept_is_not_read() -> None:
    text = Codec("pickle", ["pickle"]).dump([1])
    with pytest.raises(StepError, match="a recorded payload cannot be read"):
        Codec("json", ["json"]).load(text)


@pytest.mark.parametrize("text", ["{", '{"content_type": "application/json"}', '{"content_type": 3, "body": 4}'])
def test_a_damaged_payload_is_an_error_that_shows_it(text: str) -> None:
    with pytest.raises(StepError, match="a recorded payload cannot be read"):
        codec().load(text)


def test_the_wrapper_is_readable_in_sql() -> None:
    wrapped = json.loads(codec("pickle").dump([1]))
    assert wrapped["content_type"] == "application/x-python-serialize"
    assert set(wrapped) == {"content_type", "content_encoding", "body"}


@pytest.mark.parametrize(
    "value",
    [
        {"__type__": "x", "__value__": 1},
        {"__value__": "1.5", "__type__": "decimal"},
        [({"a": {"__type__": None, "__value__": None}},)],
    ],
)
def test_what_would_be_read_back_as_something_else_is_refused_when_it_is_written(value: Any) -> None:
    with pytest.raises(ResultNotSerializable, match=r"step 'charge'.*'__type__' and '__value__'.*rename"):
        codec().dump_result(value, "charge")
    for other in ("pickle", "yaml"):
        assert codec(other).load(codec(other).dump(value)) is not None


@pytest.mark.parametrize(
    "value",
    [
        {"__type__": "x", "__value__": 1, "third": 2},
        {"__type__": Decimal("1.5")},
        ['{"__type__": "x", "__value__": 1}', {"__value__": date(2024, 2, 29)}],
    ],
)
def test_what_only_resembles_another_type_comes_back(value: Any) -> None:
    assert codec().load(codec().dump_result(value, "charge")) == value
