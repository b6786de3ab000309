"""Ids and names come out the same whenever they are computed again, and differ where they must."""

from __future__ import annotations

import random
import subprocess
import sys
from decimal import Decimal
from enum import StrEnum
from uuid import UUID, uuid4

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pgqrs_celery import ids

PARENT = "6f1c1f86-4a0d-4b3c-9c3a-111111111111"

values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@given(values, values)
def test_equal_arguments_have_equal_digests_and_others_do_not(one: object, other: object) -> None:
    assert ids.digest(one) == ids.digest(one)
    if repr(one) != repr(other) and one != other:
        assert ids.digest(one) != ids.digest(other)


class Colour(StrEnum):
    RED = "red"


arguments = st.lists(
    values | st.sampled_from([1, 1.0, True, "1", None, "None", "\x00", "\ud800", "red", Colour.RED, 10**30]), max_size=3
)


@given(arguments)
def test_the_short_way_to_a_digest_leads_to_the_same(args: list[object]) -> None:
    assert ids.digest_of_call(args, {}) == ids.digest_of_call(tuple(args), {}) == ids.digest([args, {}])
    assert ids.digest_of_call((), {"a": args}) == ids.digest([(), {"a": args}])


def test_a_value_of_another_type_is_another_argument() -> None:
    digests = {ids.digest_of_call([value], {}) for value in (1, 1.0, True, "1", "true", None, "null")}
    assert len(digests) == 7
    assert ids.digest_of_call([Colour.RED], {}) == ids.digest_of_call(["red"], {}), "what arrives from a broker is this"


def test_the_order_of_keys_does_not_matter() -> None:
    assert ids.digest({"a": 1, "b": 2}) == ids.digest({"b": 2, "a": 1})
    assert ids.digest({"b", "a", "c"}) == ids.digest({"c", "b", "a"})


def test_what_json_cannot_write_has_a_digest_too() -> None:
    value = [Decimal("1.50"), UUID(int=7), b"x", {1, 2}, ("t",)]
    assert ids.digest(value) == ids.digest([Decimal("1.50"), UUID(int=7), b"x", {2, 1}, ("t",)])
    assert ids.digest([Decimal("1.5")]) != ids.digest([Decimal("1.50")])


def test_keys_of_any_kind_have_a_digest() -> None:
    one = [{1: "a", "b": 2}, {(1, 2): [{None: 0, "x": 1}]}]
    assert ids.digest(one) == ids.digest([{"b": 2, 1: "a"}, {(1, 2): [{"x": 1, None: 0}]}])
    assert ids.digest(one) != ids.digest([{"b": 2, 1: "a"}, {(1, 3): [{"x": 1, None: 0}]}])
    assert ids.digest({1: {"a", "b"}, "x": 0}) == ids.digest({"x": 0, 1: {"b", "a"}})


def test_an_object_s_address_is_not_in_its_digest() -> None:
    class Thing:
        pass

    assert ids.digest([Thing()]) == ids.digest([Thing()])


def test_another_process_computes_the_same_id() -> None:
    code = f"from pgqrs_celery import ids; print(ids.child_id({PARENT!r}, 'shop.pack', [[1, {{'a'}}], {{}}], 0))"
    out = [
        subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env={"PYTHONHASHSEED": seed}
        ).stdout.strip()
        for seed in ("1", "2")
    ]
    assert out == [ids.child_id(PARENT, "shop.pack", [[1, {"a"}], {}], 0)] * 2


def test_what_a_body_sends_is_told_apart_by_name_arguments_and_count() -> None:
    reference = ids.child_id(PARENT, "shop.pack", [[1], {}], 0)
    others = {
        ids.child_id(str(uuid4()), "shop.pack", [[1], {}], 0),
        ids.child_id(PARENT, "shop.ship", [[1], {}], 0),
        ids.child_id(PARENT, "shop.pack", [[2], {}], 0),
        ids.child_id(PARENT, "shop.pack", [[1], {}], 1),
    }
    assert len(others | {reference}) == 5


def test_callbacks_are_told_apart_by_owner_kind_and_position() -> None:
    found = {ids.link_id(owner, kind, n) for owner in ("a", "b") for kind in ("link", "link_error") for n in range(3)}
    assert len(found) == 12
    assert ids.link_id("a", "link", 0) == ids.link_id("a", "link", 0)


@pytest.mark.parametrize(
    ("name", "task_id", "step_id"),
    [
        ("shop.tasks.pack", "6f1c1f86-4a0d-4b3c-9c3a-111111111111", "pack#6f1c1f864a0d"),
        ("pack", "6f1c1f86-4a0d-4b3c-9c3a-111111111111", "pack#6f1c1f864a0d"),
        ("shop.pack", "my-own-id", "pack#my-own-id"),
        ("shop.pack", "order-2024-01", "pack#order-2024-01"),
        ("shop.", "my-own-id", "shop.#my-own-id"),
    ],
)
def test_a_step_id_is_readable(name: str, task_id: str, step_id: str) -> None:
    assert ids.step_id_for(name, task_id) == step_id


def test_a_long_id_of_the_user_s_is_cut_without_losing_its_identity() -> None:
    one, other = "x" * 70 + "1", "x" * 70 + "2"
    assert ids.step_id_for("pack", one) != ids.step_id_for("pack", other)
    assert len(ids.step_id_for("pack", one)) < 40


def test_of_10_000_members_of_a_group_no_two_share_a_step_id() -> None:
    numbers = random.Random(1)
    found = {ids.step_id_for("shop.resize", str(UUID(int=numbers.getrandbits(128)))) for _ in range(10_000)}
    assert len(found) == 10_000


def test_step_names_number_what_occurs_again() -> None:
    names = ["shop.charge", "shop.ship", "bank.charge", "shop.charge"]
    assert ids.step_names(names) == ["charge", "ship", "charge#2", "charge#3"]
    assert ids.step_names([]) == []


def test_a_replacement_counts_before_every_retry() -> None:
    assert ids.generation(None, None) == 0
    assert ids.generation(0, 3) == 3
    assert ids.generation(1, 0) > ids.generation(0, 2**32 - 1)
    assert ids.generation(2, 5) > ids.generation(2, 4) > ids.generation(1, 9)


def sig(**options: object) -> dict[str, object]:
    return {"task": "t", "options": options}


@pytest.mark.parametrize(
    ("headers", "chain", "chord", "root"),
    [
        ({"id": "t"}, None, None, "t"),
        ({"id": "t", "root_id": "t"}, None, None, "t"),
        ({"id": "t", "root_id": "r"}, None, None, "r"),
        ({"id": "t", "root_id": "t", "group": "g"}, None, None, "g"),
        ({"id": "t", "root_id": "r", "group": "g"}, None, None, "r"),
        ({"id": "t", "root_id": "t", "parent_id": "p", "group": "g"}, None, None, "t"),
        ({"id": "t", "root_id": "t"}, [sig(group_id="g"), sig()], None, "g"),
        ({"id": "t", "root_id": "t", "group": "inner"}, None, sig(group_id="outer"), "outer"),
        ({"id": "t", "root_id": "t", "group": "a"}, None, sig(group_id="b", chord=sig(group_id="c")), "c"),
        ({"id": "t", "root_id": "t", "group": "a"}, None, sig(), "a"),
    ],
)
def test_the_root_of_a_top_level_group_is_the_outermost_group(
    headers: dict[str, str], chain: list[object] | None, chord: object, root: str
) -> None:
    assert ids.root_of(headers, chain, chord) == root


def test_a_relay_channel_is_a_name_postgres_takes_whatever_the_app_is_called() -> None:
    channels = {ids.relay_channel(schema, app) for schema in ("public", "s" * 63) for app in ("shop", "ä" * 200, "")}
    assert len(channels) == 6
    assert all(len(channel) <= 63 and channel.isidentifier() for channel in channels)
