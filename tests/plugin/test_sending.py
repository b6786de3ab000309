"""The send seam: what becomes a row, what is sent, and what is not. No worker runs: messages are read back."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from celery import chain, chord, group
from kombu.exceptions import EncodeError

from pgqrs_celery import embedded, ids
from pgqrs_celery.envelope import LONG, MARKER, SENT
from pgqrs_celery.exceptions import (
    NotDurable,
    NotInstalled,
    PlainTaskInDurableCanvas,
    StoreUnavailable,
)
from tests.support.shop import Shop


@pytest.fixture
def add(shop: Shop) -> Any:
    return shop.task(adding, name="shop.add")


@pytest.fixture
def pack(shop: Shop) -> Any:
    return shop.task(packing, name="shop.pack")


@pytest.fixture
def plain(shop: Shop) -> Any:
    return shop.plain(packing, name="shop.plain")


def adding(x: int, y: int = 0) -> int:
    return x + y


def packing(*args: Any, **kwargs: Any) -> Any:
    return args


# --- one message


def test_a_durable_task_is_one_row_and_one_message(shop: Shop, add: Any) -> None:
    result = add.delay(1, 2)
    (step,) = shop.steps()
    assert (step.task_id, step.task_name, step.status, step.open) == (result.id, "shop.add", "QUEUED", True)
    assert step.step_id == ids.step_id_for("shop.add", result.id)
    assert (step.sent, step.queue, step.root_id, step.generation) == (True, "celery", result.id, 0)
    message = shop.message()
    assert (message.name, message.id, message.args, message.kwargs) == ("shop.add", result.id, [1, 2], {})
    assert message.headers["root_id"] == result.id
    assert message.headers[MARKER]
    assert datetime.fromisoformat(message.headers[SENT]).tzinfo is not None
    (run,) = shop.runs()
    assert (run.name, run.status, run.root_id) == ("add", "QUEUED", result.id)


def test_an_ordinary_task_is_no_row(shop: Shop, plain: Any) -> None:
    plain.delay(1)
    message = shop.message()
    assert message.name == "shop.plain"
    assert MARKER not in message.headers
    assert shop.runs() == []


def test_arguments_with_characters_no_database_likes_are_stored(shop: Shop, pack: Any) -> None:
    pack.delay("a\x00b", key="\ud7ff\u2603 \\u0000", **{"ключ": float("nan")})
    assert len(shop.steps()) == 1
    (message,) = shop.messages()
    assert message.args == ["a\x00b"]
    shop.make_due()
    shop.relay().work()
    assert shop.message().args == message.args


def test_the_same_id_is_sent_once(shop: Shop, add: Any) -> None:
    first = add.apply_async((1, 2), task_id="order-1")
    second = add.apply_async((1, 2), task_id="order-1")
    assert first.id == second.id == "order-1"
    assert len(shop.messages()) == 1
    assert len(shop.steps()) == 1


def test_a_task_sent_by_name_is_durable_if_it_is_one_here(shop: Shop, add: Any) -> None:
    shop.app.send_task("shop.add", (1,), {"y": 2})
    assert shop.message().kwargs == {"y": 2}
    assert [step.task_name for step in shop.steps()] == ["shop.add"]


def test_a_task_this_service_does_not_know_is_durable_if_it_is_marked(shop: Shop) -> None:
    shop.app.send_task("elsewhere.ship", (1,))
    assert shop.steps() == []
    shop.pgqrs.signature("elsewhere.ship", (1,)).delay()
    assert [step.step_id.partition("#")[0] for step in shop.steps()] == ["ship"]
    assert len(shop.messages()) == 2


def test_a_signature_made_elsewhere_is_recorded_by_a_service_that_lacks_the_class(
    shop: Shop, add: Any, redis_url: str, database_dsn: str, installed_schema: str
) -> None:
    travelled = json.loads(json.dumps(add.s(1, 2) | add.s(3)))
    other = Shop(redis_url, database_dsn, installed_schema)
    try:
        other.app.signature(travelled).delay()
        assert [step.task_name for step in shop.steps()] == ["shop.add"]
        assert len(shop.message().embed["chain"]) == 1
    finally:
        other.close()


def test_what_the_caller_chose_is_kept_and_the_rest_is_routed_anew(shop: Shop, add: Any) -> None:
    add.apply_async((1,), queue="slow", priority=3)
    add.apply_async((2,))
    stored = {json.loads(step.message or "")["headers"]["argsrepr"]: step for step in shop.steps()}
    assert json.loads(stored["(1,)"].message or "")["options"] == {"queue": "slow", "priority": 3}
    assert json.loads(stored["(2,)"].message or "")["options"] == {}
    assert (stored["(1,)"].queue, stored["(2,)"].queue) == ("slow", "celery")
    assert shop.message("slow").properties["priority"] == 3
    assert len(shop.messages()) == 1
    shop.app.conf.task_routes = {"shop.add": {"queue": "rerouted"}}
    shop.app.amqp.flush_routes()
    amqp: Any = shop.app.amqp
    amqp.router = amqp.Router()
    shop.make_due()
    shop.relay().work()
    assert shop.message("slow").args == [1]
    assert shop.message("rerouted").args == [2]


@pytest.mark.parametrize("serializer", ["pickle", "yaml"])
def test_a_message_keeps_the_serializer_it_was_sent_with(shop: Shop, add: Any, serializer: str) -> None:
    shop.app.conf.accept_content = ["json", "pickle", "yaml"]
    add.apply_async((1,), serializer=serializer)
    first = shop.message()
    shop.make_due()
    shop.relay().work()
    again = shop.message()
    assert again.content_type == first.content_type
    assert serializer in first.content_type or first.content_type == "application/x-python-serialize"
    assert again.args[0] == first.args[0] == 1


# --- groups and scopes


def test_a_group_is_recorded_in_one_transaction_as_one_run(shop: Shop, add: Any) -> None:
    result = group(add.s(n) for n in range(5)).apply_async()
    steps = shop.steps()
    assert len(steps) == 5
    assert len(shop.execute("SELECT DISTINCT xmin FROM {schema}.pgqrs_workflow_steps")) == 1
    (run,) = shop.runs()
    assert (run.root_id, run.name) == (result.id, "group(add)")
    messages = shop.messages()
    assert {message.headers["root_id"] for message in messages} == {result.id}
    assert {message.headers["group"] for message in messages} == {result.id}
    assert [message.args for message in messages] == [[n] for n in range(5)]


def test_a_member_that_cannot_be_sent_leaves_nothing_of_its_group(shop: Shop, add: Any) -> None:
    with pytest.raises(EncodeError):
        group(add.s(1), add.s(object()), add.s(3)).apply_async()
    assert shop.runs() == []
    assert shop.steps() == []
    assert shop.messages() == []


def test_an_exception_in_the_scope_records_and_sends_nothing(shop: Shop, add: Any) -> None:
    class Stop(Exception):
        pass

    def scope() -> None:
        with shop.app.producer_or_acquire():
            add.delay(1)
            raise Stop

    with pytest.raises(Stop):
        scope()
    assert shop.steps() == []
    assert shop.messages() == []
    add.delay(2)
    assert shop.message().args == [2]


def test_what_is_sent_in_a_scope_is_recorded_and_sent_at_its_end(shop: Shop, add: Any) -> None:
    with shop.app.producer_or_acquire():
        add.delay(1)
        with shop.app.producer_or_acquire():
            add.delay(2)
        assert shop.steps() == []
    assert [message.args for message in shop.messages()] == [[1], [2]]
    assert len(shop.execute("SELECT DISTINCT xmin FROM {schema}.pgqrs_workflow_steps")) == 1


@pytest.mark.parametrize("canvas", ["group of groups", "group of chains", "group in a chain"])
def test_a_nested_canvas_is_one_run(shop: Shop, add: Any, canvas: str) -> None:
    made = {
        "group of groups": lambda: group(group(add.s(1), add.s(2)), add.s(3), group(add.s(4))),
        "group of chains": lambda: group(add.s(1) | add.s(2), add.s(3) | add.s(4)),
        "group in a chain": lambda: chain(add.s(1), group(add.s(2), add.s(3))),
    }[canvas]()
    made.apply_async()
    (run,) = shop.runs()
    messages = shop.messages()
    assert {message.headers["root_id"] for message in messages} == {run.root_id}
    assert {step.workflow_id for step in shop.steps()} == {run.workflow_id}
    assert (
        len(messages)
        == len(shop.steps())
        == {"group of groups": 4, "group of chains": 2, "group in a chain": 1}[canvas]
    )


def test_a_chord_over_a_foreign_backend_is_refused_with_the_reason(shop: Shop, add: Any, pack: Any) -> None:
    with pytest.raises(NotDurable, match=r"belongs to a chord, and the result backend RedisBackend cannot"):
        chord([add.s(1), add.s(2)], pack.s()).delay()
    assert shop.runs() == []
    assert shop.messages() == []


def test_a_durable_task_in_a_plain_chord_is_refused_as_well(shop: Shop, add: Any, plain: Any) -> None:
    with pytest.raises(NotDurable):
        chord([add.s(1), add.s(2)], plain.s()).delay()
    assert shop.runs() == []


def test_a_chain_records_its_first_link_and_keeps_the_rest_in_it(shop: Shop, add: Any, pack: Any) -> None:
    result = chain(add.s(1), pack.s(2), add.s(3)).apply_async()
    (step,) = shop.steps()
    (run,) = shop.runs()
    assert run.name == "add | pack | add"
    message = shop.message()
    assert message.id == step.task_id == run.root_id
    assert [link["task"] for link in message.embed["chain"]] == ["shop.add", "shop.pack"]
    assert message.embed["chain"][0]["options"]["task_id"] == result.id


def test_two_tasks_of_one_name_have_their_own_step_ids(shop: Shop, add: Any) -> None:
    group(add.s(1), add.s(1)).apply_async()
    assert len({step.step_id for step in shop.steps()}) == 2


def test_a_long_chain_is_stored_once(shop: Shop, add: Any) -> None:
    chain(add.s(1), *(add.s(n) for n in range(LONG + 10))).apply_async()
    (step,) = shop.steps()
    (run,) = shop.runs()
    assert len(json.loads(run.plan or "")[step.task_id]) == LONG + 10
    assert json.loads(step.message or "")["plan"] == [step.task_id, LONG + 10]
    first = shop.message()
    assert len(first.embed["chain"]) == LONG + 10
    shop.make_due()
    shop.relay().work()
    again = shop.message()
    assert again.embed["chain"] == first.embed["chain"]


def test_a_short_chain_needs_no_plan(shop: Shop, add: Any) -> None:
    chain(add.s(1), *(add.s(n) for n in range(LONG))).apply_async()
    assert shop.runs()[0].plan is None


# --- ids of callbacks


def test_callbacks_and_errbacks_get_ids_of_their_own(shop: Shop, add: Any, pack: Any) -> None:
    callback, errback = pack.s("callback"), pack.si("errback")
    result = add.apply_async((1,), link=[callback, pack.s()], link_error=errback)
    embed = shop.message().embed
    assert [link["options"]["task_id"] for link in embed["callbacks"]] == [
        ids.link_id(result.id, "link", 0),
        ids.link_id(result.id, "link", 1),
    ]
    assert embed["errbacks"][0]["options"]["task_id"] == ids.link_id(result.id, "link_error", 0)
    assert "task_id" not in callback.options
    assert "task_id" not in errback.options
    stored = json.loads(json.loads(shop.steps()[0].message or "")["body"])[2]
    assert stored["callbacks"] == embed["callbacks"]
    assert stored["errbacks"] == embed["errbacks"]


def test_one_errback_for_all_members_of_a_group_is_called_once_for_each(shop: Shop, add: Any, pack: Any) -> None:
    members = group(add.s(1), add.s(2))
    members.link_error(pack.si("failed"))
    members.apply_async()
    found = [message.embed["errbacks"][0]["options"]["task_id"] for message in shop.messages()]
    assert len(set(found)) == 2


def test_an_id_the_user_gave_a_callback_stays(shop: Shop, add: Any, pack: Any) -> None:
    add.apply_async((1,), link=pack.s().set(task_id="mine"))
    assert shop.message().embed["callbacks"][0]["options"]["task_id"] == "mine"


# --- time


@pytest.mark.parametrize("how", ["countdown", "eta", "naive eta", "eta in words"])
def test_an_eta_is_held_in_the_ledger(shop: Shop, add: Any, how: str) -> None:
    at = datetime.now(UTC) + timedelta(seconds=100)
    options: dict[str, Any] = {
        "countdown": {"countdown": 100},
        "eta": {"eta": at},
        "naive eta": {"eta": at.replace(tzinfo=None)},
        "eta in words": {"eta": at.isoformat()},
    }[how]
    result = add.apply_async((1,), **options)
    assert shop.messages() == []
    step = shop.step(result.id)
    assert (step.status, step.sent) == ("QUEUED", False)
    assert step.due == pytest.approx(100, abs=20)
    shop.relay().work()
    assert shop.messages() == []
    shop.make_due()
    shop.relay().work()
    message = shop.message()
    assert message.headers.get("eta") is None
    assert message.id == result.id


@pytest.mark.parametrize("options", [{"countdown": 0}, {"countdown": -5}, {"eta": datetime(2020, 1, 1, tzinfo=UTC)}])
def test_an_eta_that_is_over_is_sent_at_once(shop: Shop, add: Any, options: dict[str, Any]) -> None:
    add.apply_async((1,), **options)
    message = shop.message()
    assert message.headers.get("eta") is None
    assert shop.steps()[0].sent


def test_a_held_message_s_expiry_is_computed_when_it_is_sent(shop: Shop, add: Any) -> None:
    add.apply_async((1,), countdown=100, expires=1000)
    shop.make_due()
    shop.relay().work()
    message = shop.message()
    assert datetime.fromisoformat(message.headers["expires"]) > datetime.now(UTC)
    assert 900_000 < int(message.properties["expiration"]) <= 1_000_000


def test_a_group_may_be_delayed_as_a_whole(shop: Shop, add: Any) -> None:
    group(add.s(1), add.s(2)).apply_async(countdown=100)
    assert shop.messages() == []
    assert [step.sent for step in shop.steps()] == [False, False]


# --- plain links


def test_a_plain_link_in_a_durable_chain_is_warned_about(shop: Shop, add: Any, plain: Any) -> None:
    with pytest.warns(UserWarning, match=r"shop\.plain follows the durable task shop\.add"):
        chain(add.s(1), plain.s(), add.s(2)).delay()
    assert len(shop.messages()) == 1


def test_a_plain_link_can_be_forbidden(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(pgqrs_plain_links="error")
    add, plain = shop.task(adding, name="shop.add"), shop.plain(packing, name="shop.plain")
    with pytest.raises(PlainTaskInDurableCanvas, match=r"shop\.plain follows the durable task shop\.add.*pgqrs\.task"):
        chain(add.s(1), group(add.s(2), plain.s())).delay()
    assert shop.runs() == []
    assert shop.messages() == []


#: No warning at all, but for what another test has left to be collected just now.
silently = pytest.mark.filterwarnings(
    "error", "ignore::ResourceWarning", "default::pytest.PytestUnraisableExceptionWarning"
)


@silently
def test_a_plain_link_can_be_allowed(make_shop: Callable[..., Shop]) -> None:
    shop = make_shop(pgqrs_plain_links="allow")
    add, plain = shop.task(adding, name="shop.add"), shop.plain(packing, name="shop.plain")
    chain(add.s(1), plain.s(), add.s(2)).delay()
    assert len(shop.messages()) == 1


@silently
def test_a_task_of_another_service_is_not_called_plain(shop: Shop, add: Any) -> None:
    chain(add.s(1), shop.app.signature("elsewhere.ship")).delay()
    assert len(shop.messages()) == 1


@silently
def test_a_plain_chain_is_left_alone(shop: Shop, plain: Any) -> None:
    chain(plain.s(1), plain.s()).delay()
    assert shop.runs() == []
    assert len(shop.messages()) == 1


# --- Celery's own tasks


def test_map_starmap_and_chunks_of_a_durable_task_are_durable(shop: Shop, add: Any) -> None:
    add.map([1, 2]).delay()
    add.starmap([(1, 2), (3, 4)]).delay()
    add.chunks([(n, n) for n in range(6)], 3).apply_async()
    assert sorted(step.task_name for step in shop.steps()) == [
        "celery.map",
        "celery.starmap",
        "celery.starmap",
        "celery.starmap",
    ]
    assert len(shop.runs()) == 3
    assert len(shop.messages()) == 4


def test_map_of_an_ordinary_task_is_not(shop: Shop, plain: Any) -> None:
    plain.map([1, 2]).delay()
    plain.starmap([(1, 2)]).delay()
    assert shop.steps() == []
    assert len(shop.messages()) == 2


# --- faults


def test_without_a_database_sending_is_a_clear_error_and_nothing_is_sent(redis_url: str, schema: str) -> None:
    shop = Shop(redis_url, "host=127.0.0.1 port=1 dbname=x user=x password=secret", schema)
    add = shop.task(adding, name="shop.add")
    with pytest.raises(StoreUnavailable, match="cannot connect to") as caught:
        add.delay(1)
    assert "secret" not in str(caught.value)
    assert "port=1" in str(caught.value)
    assert shop.messages() == []
    shop.app.close()


@pytest.mark.parametrize("options", [{}, {"retry": False}], ids=["as usual", "without a retry"])
def test_without_the_one_database_sending_is_a_clear_error_at_once(
    schema: str, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    dsn = "postgresql://x:secret@127.0.0.1:1/x"
    shop = Shop(f"pgqrs+{dsn}", dsn, schema)
    add = shop.task(adding, name="shop.add")
    # kombu's connections try again by themselves for some twelve seconds, which are slept here.
    monkeypatch.setattr("kombu.utils.functional.sleep", lambda seconds: pytest.fail(f"slept for {seconds} s"))
    for _ in range(2):
        with pytest.raises(StoreUnavailable, match="cannot connect to") as caught:
            add.apply_async((1,), **options)
        assert "secret" not in str(caught.value)
    shop.app.close()


def test_without_the_schema_sending_says_what_to_run_and_nothing_is_sent(
    redis_url: str, database_dsn: str, schema: str
) -> None:
    shop = Shop(redis_url, database_dsn, schema)
    add = shop.task(adding, name="shop.add")
    with pytest.raises(NotInstalled, match=rf"{schema}.*celery -A your_app pgqrs install"):
        add.delay(1)
    assert shop.messages() == []
    shop.close()


def test_with_auto_install_the_first_send_installs_the_schema(redis_url: str, database_dsn: str, schema: str) -> None:
    shop = Shop(redis_url, database_dsn, schema, pgqrs_auto_install=True)
    add = shop.task(adding, name="shop.add")
    add.delay(1)
    assert len(shop.steps()) == 1
    assert len(shop.messages()) == 1
    shop.close()


@pytest.fixture
def broken(own_redis: embedded.RedisServer, database_dsn: str, schema: str) -> Iterator[Shop]:
    """An app whose broker can be killed."""
    shop = Shop(own_redis.url, database_dsn, schema, broker_transport_options={"socket_connect_timeout": 1})
    shop.pgqrs.install()
    yield shop
    shop.close()


def test_without_a_broker_a_task_is_accepted_and_sent_later(
    broken: Shop, own_redis: embedded.RedisServer, caplog: pytest.LogCaptureFixture
) -> None:
    add = broken.task(adding, name="shop.add")
    own_redis.kill()
    with caplog.at_level(logging.WARNING, "pgqrs_celery"):
        result = add.delay(1)
    assert "the broker does not take messages" in caplog.text
    assert result.id in caplog.text
    step = broken.step(result.id)
    assert (step.status, step.sent) == ("QUEUED", False)
    assert step.due is not None
    assert step.due <= 1.0
    own_redis.start()
    broken.make_due()
    broken.relay().work()
    assert broken.message().id == result.id


def test_without_a_broker_a_whole_group_is_accepted(broken: Shop, own_redis: embedded.RedisServer) -> None:
    add = broken.task(adding, name="shop.add")
    own_redis.kill()
    group(add.s(n) for n in range(3)).apply_async()
    assert [step.sent for step in broken.steps()] == [False] * 3
    own_redis.start()
    broken.make_due()
    broken.relay().work()
    assert sorted(message.args for message in broken.messages()) == [[0], [1], [2]]


# --- no ledger needed


def test_a_direct_call_is_an_ordinary_call(redis_url: str) -> None:
    shop = Shop(redis_url, "host=127.0.0.1 port=1 dbname=x", "public")
    add = shop.task(adding, name="shop.add")
    assert add(1, 2) == 3
    assert add.run(1, 2) == 3
    shop.app.close()


def test_an_eager_call_needs_no_ledger(redis_url: str) -> None:
    shop = Shop(redis_url, "host=127.0.0.1 port=1 dbname=x", "public", task_always_eager=True)
    add = shop.task(adding, name="shop.add")
    fails = shop.task(failing, name="shop.fails")
    assert add.apply((1, 2)).get() == 3
    assert add.delay(1, 2).get() == 3
    assert chain(add.s(1), add.s(2)).delay().get() == 3
    assert group(add.s(1), add.s(2)).delay().get() == [1, 2]
    with pytest.raises(ValueError, match="no"):
        fails.delay().get()
    shop.app.close()


def failing() -> None:
    raise ValueError("no")


def test_an_eager_retry_is_an_ordinary_retry(redis_url: str) -> None:
    shop = Shop(redis_url, "host=127.0.0.1 port=1 dbname=x", "public", task_always_eager=True)
    tries = []

    def flaky(self: Any) -> int:
        tries.append(self.request.retries)
        if len(tries) < 3:
            raise self.retry(countdown=0)
        return 7

    task = shop.task(flaky, name="shop.flaky", bind=True)
    assert task.delay().get() == 7
    assert tries == [0, 1, 2]
    shop.app.close()
