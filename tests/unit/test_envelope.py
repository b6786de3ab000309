"""The stored message: everything that is needed to send it again, and long chains once."""

from __future__ import annotations

import json
import math
from decimal import Decimal
from types import SimpleNamespace
from typing import Any

import pytest
from kombu.exceptions import ContentDisallowed, EncodeError

from pgqrs_celery import envelope
from pgqrs_celery.codec import Codec
from pgqrs_celery.envelope import LONG, MARKER, PLAN, SENT, Envelope, Plan, chosen, split_plan
from pgqrs_celery.exceptions import StepError

JSON = {"application/json"}
HEADERS = {"id": "t1", "root_id": "r", MARKER: 1, "retries": 0, "eta": None}


def message(args: Any = (1,), chain: list[Any] | None = None, **headers: Any) -> Envelope:
    body = (list(args), {"k": "v"}, {"chain": chain, "callbacks": None, "errbacks": None, "chord": None})
    return Envelope("shop.pack", {**HEADERS, **headers}, {"reply_to": "me"}, body, {"queue": "slow"})


def test_an_envelope_comes_back_as_it_was() -> None:
    loaded = Envelope.load(message([1, "ü", 1e16, Decimal("1.5")]).dump("json"), JSON)
    assert loaded.name == "shop.pack"
    assert loaded.body[:2] == ([1, "ü", 1e16, Decimal("1.5")], {"k": "v"})
    assert loaded.properties == {"reply_to": "me"}
    assert loaded.options == {"queue": "slow"}
    assert loaded.serializer == "json"


def test_send_times_and_empty_headers_are_not_kept() -> None:
    loaded = Envelope.load(
        Envelope("t", {**HEADERS, SENT: "2030-01-01", PLAN: "x"}, {}, ([], {}, {}), {}).dump("json"), JSON
    )
    assert loaded.headers == {"id": "t1", "root_id": "r", MARKER: 1, "retries": 0}


@pytest.mark.parametrize("serializer", ["json", "pickle", "yaml"])
def test_a_body_is_kept_in_the_caller_s_serializer(serializer: str) -> None:
    text = message([1, "ü", b"\x00"] if serializer != "yaml" else [1, "ü"]).dump(serializer)
    json.loads(text, parse_constant=pytest.fail)
    accept = {"application/json", "application/x-python-serialize", "application/x-yaml"}
    loaded = Envelope.load(text, accept)
    assert loaded.serializer == serializer
    assert loaded.body[0][:2] == [1, "ü"]


def test_not_a_number_in_the_arguments_survives() -> None:
    text = message([math.nan]).dump("json")
    json.loads(text, parse_constant=pytest.fail)
    assert math.isnan(Envelope.load(text, JSON).body[0][0])


def test_a_character_postgres_does_not_take_comes_back_too() -> None:
    text = message(["a\x00b"], shadow="x\x00y").dump("json")
    assert "\\u0000" not in text.replace("\\\\", "")
    loaded = Envelope.load(text, JSON)
    assert (loaded.body[0], loaded.headers["shadow"]) == (["a\x00b"], "x\x00y")


def test_what_the_app_does_not_accept_is_not_read() -> None:
    with pytest.raises(ContentDisallowed):
        Envelope.load(message().dump("pickle"), JSON)


def test_arguments_that_cannot_be_written_are_an_error() -> None:
    with pytest.raises(EncodeError):
        message([object()]).dump("json")


def test_only_the_routing_the_caller_chose_is_kept() -> None:
    queue, exchange = SimpleNamespace(name="slow"), SimpleNamespace(name="ex")
    options = {"queue": queue, "exchange": exchange, "routing_key": "rk", "priority": 3, "retry": True, "expires": 5}
    assert chosen(options) == {"queue": "slow", "exchange": "ex", "routing_key": "rk", "priority": 3}
    assert chosen({"queue": None, "routing_key": ""}) == {"routing_key": ""}
    json.dumps(chosen(options))


# --- plans

LINKS = [{"task": f"t{n}", "options": {"task_id": str(n)}} for n in range(LONG + 5)]


def test_a_short_chain_is_kept_in_the_message() -> None:
    assert split_plan("t", None, None, None) == (None, False)
    assert split_plan("t", LINKS[:LONG], None, None) == (None, False)


def test_a_long_chain_becomes_the_run_s_plan() -> None:
    assert split_plan("t", LINKS, None, None) == (Plan("t", len(LINKS)), True)


def test_the_next_link_of_a_long_chain_refers_to_the_plan() -> None:
    assert split_plan("t2", LINKS[:-1], LINKS, "t") == (Plan("t", len(LINKS) - 1), False)
    assert split_plan("t2", LINKS, LINKS, "t") == (Plan("t", len(LINKS)), False), "a retry"


def test_a_long_chain_of_something_else_does_not() -> None:
    equal_but_other = [dict(link) for link in LINKS[:-1]]
    assert split_plan("t2", equal_but_other, LINKS, "t") == (Plan("t2", len(LINKS) - 1), True)
    assert split_plan("t2", LINKS, LINKS[:-1], "t")[1]
    assert split_plan("t2", LINKS[:-1], LINKS, None)[1]


def plan_text(owner: str) -> str:
    return envelope.dump_plan(owner, LINKS, Codec())


def test_a_message_with_a_plan_is_small_and_comes_back_whole() -> None:
    text = Envelope(
        "shop.pack", HEADERS, {}, ([], {}, {"chain": LINKS[:22]}), {}, Plan("t", 22)
    ).dump("json")  # fmt: skip
    assert len(text) < len(json.dumps(LINKS))
    plan = envelope.load_plan(plan_text("t"), Codec())
    loaded = Envelope.load(text, JSON, plan)
    assert loaded.body[2]["chain"] == LINKS[:22]
    assert loaded.plan == Plan("t", 22)
    assert loaded.headers[PLAN] == "t"


@pytest.mark.parametrize("plan", [None, {}, {"other": []}])
def test_a_message_whose_plan_is_gone_is_an_error_naming_it(plan: Any) -> None:
    text = Envelope("shop.pack", HEADERS, {}, ([], {}, {}), {}, Plan("t", 22)).dump("json")
    with pytest.raises(StepError, match="the chain of task t1 is not in its run's plan"):
        Envelope.load(text, JSON, plan)


def test_no_plan_is_an_empty_one() -> None:
    assert envelope.load_plan(None, Codec()) == {}
