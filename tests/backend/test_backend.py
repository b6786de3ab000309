"""The backend as Celery uses it, without a worker: what is stored is what comes back."""

from __future__ import annotations

import datetime
import decimal
import os
import pickle
import socket
import time
import uuid
from collections.abc import Callable
from typing import Any

import pytest
from celery import Celery, states
from celery.app.task import Context
from celery.exceptions import BackendGetMetaError, ImproperlyConfigured
from celery.exceptions import TimeoutError as CeleryTimeout
from kombu.exceptions import ContentDisallowed

from pgqrs_celery.backend import PostgresBackend
from pgqrs_celery.db import Database
from pgqrs_celery.exceptions import ConfigurationError, NotInstalled, StoreUnavailable
from pgqrs_celery.store import chords, results
from tests.backend.conftest import Spy

NewApp = Callable[..., Celery]

SERIALIZERS = ["json", "pickle", "yaml", "msgpack"]


class CustomError(Exception):
    """An exception with two arguments, to be found again by its module and name."""


def done(backend: PostgresBackend, value: Any, task_id: str = "t") -> Any:
    backend.mark_as_done(task_id, value)
    return backend.app.AsyncResult(task_id)


def test_celery_finds_the_backend_by_its_entry_point_without_an_import(new_app: NewApp, backend_url: str) -> None:
    assert type(new_app().backend) is PostgresBackend
    assert type(new_app(backend_url.replace("postgresql:", "postgresql+psycopg:")).backend) is PostgresBackend


def test_an_unknown_task_is_pending_and_does_not_exist(app: Celery) -> None:
    result = app.AsyncResult(str(uuid.uuid4()))
    assert (result.state, result.result, result.exists(), result.ready()) == ("PENDING", None, False, False)


def test_every_state_can_be_read(backend: PostgresBackend) -> None:
    result = backend.app.AsyncResult("t")
    backend.mark_as_started("t", pid=1, hostname="h")
    assert (result.state, result.info) == ("STARTED", {"pid": 1, "hostname": "h"})
    backend.mark_as_retry("t", ValueError("later"), traceback="tb")
    assert result.state == "RETRY"
    assert isinstance(result.result, ValueError)
    backend.store_result("t", {"done": 3}, "PROGRESS")
    assert (result.state, result.info) == ("PROGRESS", {"done": 3})
    backend.store_result("u", None, "PENDING")
    assert backend.app.AsyncResult("u").exists()
    backend.mark_as_revoked("v", "expired")
    assert backend.app.AsyncResult("v").state == "REVOKED"
    backend.mark_as_done("t", 7)
    assert (result.state, result.get()) == ("SUCCESS", 7)


def test_the_first_success_wins(backend: PostgresBackend) -> None:
    done(backend, 1)
    backend.mark_as_failure("t", ValueError("late"))
    backend.mark_as_done("t", 2)
    assert backend.app.AsyncResult("t").get() == 1


@pytest.mark.parametrize("serializer", SERIALIZERS)
def test_values_survive_every_serializer(new_app: NewApp, serializer: str) -> None:
    app = new_app(result_serializer=serializer, result_accept_content=[serializer])
    value = {"a": [1, 2.5, None, True, "ü\u2028"], "big": 2**62}
    assert done(app.backend, value).get() == value


def test_json_keeps_what_kombu_keeps(new_app: NewApp) -> None:
    value = {
        "decimal": decimal.Decimal("1.10"),
        "uuid": uuid.UUID(int=7),
        "time": datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC),
        "bytes": b"\x00\xff",
        "float": 1e16,
        "int": 2**70,
        "nul": "a\x00b",
    }
    read = done(new_app().backend, value).get()
    assert read == value
    assert type(read["float"]) is float


def test_not_a_number_is_stored_although_postgres_does_not_take_it_for_json(backend: PostgresBackend) -> None:
    read = done(backend, [float("inf"), float("nan")]).get()
    assert read[0] == float("inf")
    assert read[1] != read[1]


@pytest.mark.parametrize("serializer", SERIALIZERS)
@pytest.mark.parametrize("error", [ValueError("no", 1), KeyError("k"), CustomError("a", 2)], ids=repr)
def test_exceptions_survive_every_serializer(new_app: NewApp, serializer: str, error: Exception) -> None:
    app = new_app(result_serializer=serializer, result_accept_content=[serializer])
    app.backend.mark_as_failure("t", error, traceback="Traceback: here")
    result = app.AsyncResult("t")
    with pytest.raises(type(error)) as caught:
        result.get()
    assert caught.value.args == error.args
    assert result.traceback == "Traceback: here"


def test_a_reader_refuses_content_it_does_not_accept(new_app: NewApp) -> None:
    done(new_app(result_serializer="pickle", result_accept_content=["pickle"]).backend, 1)
    with pytest.raises(ContentDisallowed):
        new_app(result_accept_content=["json"]).AsyncResult("t").get(timeout=5)


def test_a_reader_with_another_serializer_reads_what_it_accepts(new_app: NewApp) -> None:
    done(new_app(result_serializer="yaml", result_accept_content=["yaml"]).backend, {"a": 1})
    assert new_app(result_serializer="json", result_accept_content=["json", "yaml"]).AsyncResult("t").get() == {"a": 1}


@pytest.mark.parametrize("serializer", ["json", "pickle"])
def test_compressed_results_are_small_and_readable_without_the_setting(
    new_app: NewApp, spy: Spy, serializer: str
) -> None:
    app = new_app(result_compression="gzip", result_serializer=serializer, result_accept_content=[serializer])
    text = "long" * 10_000
    done(app.backend, text)
    assert spy.value("SELECT octet_length(body) FROM {}.pgqrs_task_results") < 1_000
    reader = new_app(result_serializer=serializer, result_accept_content=[serializer])
    assert reader.AsyncResult("t").get() == text


def test_an_unknown_compression_is_named(new_app: NewApp) -> None:
    app = new_app(result_compression="zipp")
    with pytest.raises(ImproperlyConfigured, match="zipp"):
        _ = app.backend


def test_extended_results_tell_the_call(new_app: NewApp) -> None:
    app = new_app(result_extended=True)
    request = Context(
        id="t",
        task="add",
        args=[1, 2],
        kwargs={"k": 1},
        hostname="w@h",
        retries=2,
        delivery_info={"routing_key": "q"},
        stamps={"tenant": "x"},
        stamped_headers=["tenant"],
        group="g",
        parent_id="p",
    )
    app.backend.mark_as_done("t", 3, request)
    result = app.AsyncResult("t")
    assert (result.name, result.args, result.kwargs, result.worker, result.retries, result.queue) == (
        "add",
        [1, 2],
        {"k": 1},
        "w@h",
        2,
        "q",
    )
    meta = app.backend.get_task_meta("t")
    assert (meta["tenant"], meta["group_id"], meta["parent_id"], meta["task_id"]) == ("x", "g", "p", "t")
    assert result.date_done is not None


def test_sql_can_read_a_result(backend: PostgresBackend, spy: Spy) -> None:
    done(backend, {"answer": 42})
    assert spy.value("SELECT data -> 'result' ->> 'answer' FROM {}.pgqrs_task_results") == "42"


@pytest.mark.parametrize(
    ("conf", "state", "seconds"),
    [
        ({}, "SUCCESS", 86400),
        ({"result_expires": 60}, "SUCCESS", 60),
        ({"result_expires": datetime.timedelta(minutes=2)}, "SUCCESS", 120),
        ({"result_expires": None}, "SUCCESS", None),
        ({"result_expires": 0}, "SUCCESS", None),
        ({"result_expires": 60, "result_failure_expires": 600}, "FAILURE", 600),
        ({"result_expires": 60, "result_failure_expires": 0}, "FAILURE", None),
        ({"result_expires": 60, "result_failure_expires": 600}, "SUCCESS", 60),
        ({"result_expires": 60}, "FAILURE", 60),
        ({"result_expires": 60}, "STARTED", 60),
    ],
)
def test_results_expire_as_configured(
    new_app: NewApp, spy: Spy, conf: dict[str, Any], state: str, seconds: float | None
) -> None:
    new_app(**conf).backend.store_result("t", ValueError() if state == "FAILURE" else 1, state)
    lifetime = "SELECT extract(epoch FROM expires_at - stored_at)::float8 FROM {}.pgqrs_task_results"
    assert spy.value(lifetime) == seconds


def test_cleanup_removes_all_that_has_expired(backend: PostgresBackend, spy: Spy) -> None:
    for n in range(1203):
        backend.store_result(f"t{n}", n, "SUCCESS")
    backend.cleanup()
    assert spy.value("SELECT count(*) FROM {}.pgqrs_task_results") == 1203
    spy.rows("UPDATE {}.pgqrs_task_results SET expires_at = now() - interval '1 s' RETURNING 1")
    assert not backend.app.AsyncResult("t1").exists()
    backend.cleanup()
    assert spy.value("SELECT count(*) FROM {}.pgqrs_task_results") == 0


def test_a_busy_worker_removes_what_has_expired_by_itself(
    backend: PostgresBackend, spy: Spy, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend.store_result("t", 1, "SUCCESS")
    spy.rows("UPDATE {}.pgqrs_task_results SET expires_at = now() - interval '1 s' RETURNING 1")
    backend.process_cleanup()
    assert spy.value("SELECT count(*) FROM {}.pgqrs_task_results") == 1
    monkeypatch.setattr(backend, "_tidy_at", 0.0)
    backend.process_cleanup()
    assert spy.value("SELECT count(*) FROM {}.pgqrs_task_results") == 0


def test_groups_are_saved_restored_and_deleted(app: Celery) -> None:
    inner = app.GroupResult("inner", [app.AsyncResult("c")])
    group = app.GroupResult("g", [app.AsyncResult("a", parent=app.AsyncResult("p")), inner])
    group.save()
    restored = app.GroupResult.restore("g", app=app)
    assert restored == group
    assert restored.as_tuple() == group.as_tuple()
    restored.delete()
    assert app.backend.restore_group("g") is None


def test_get_many_is_one_statement_for_all(backend: PostgresBackend, monkeypatch: pytest.MonkeyPatch) -> None:
    for n in range(50):
        done(backend, n, f"t{n}")
    looks = []
    read = backend.read_metas
    monkeypatch.setattr(backend, "read_metas", lambda ids, **kw: looks.append(len(ids)) or read(ids, **kw))
    seen = []
    metas = dict(backend.get_many({f"t{n}" for n in range(50)}, on_message=seen.append))
    assert {task_id: meta["result"] for task_id, meta in metas.items()} == {f"t{n}": n for n in range(50)}
    assert looks == [50]
    assert len(seen) == 50
    assert list(backend.get_many(["nobody"], max_iterations=1)) == []
    started = time.monotonic()
    with pytest.raises(CeleryTimeout):
        list(backend.get_many(["nobody"], timeout=0.2))
    assert 0.2 <= time.monotonic() - started < 2


def test_a_result_can_be_forgotten_and_stored_again(backend: PostgresBackend) -> None:
    result = done(backend, 1)
    assert result.get() == 1
    result.forget()
    assert (result.state, result.exists()) == ("PENDING", False)
    backend.mark_as_done("t", 2)
    assert backend.app.AsyncResult("t").get() == 2


def test_a_damaged_payload_is_an_error_that_names_the_task(backend: PostgresBackend, spy: Spy) -> None:
    done(backend, 1, "good")
    done(backend, 1, "bad")
    done(backend, 1, "worse")
    spy.rows(
        "UPDATE {}.pgqrs_task_results SET data = NULL, body = 'x', format = 'application/json;utf-8' "
        "WHERE task_id = 'bad' RETURNING 1"
    )
    spy.rows("UPDATE {}.pgqrs_task_results SET data = '[]' WHERE task_id = 'worse' RETURNING 1")
    for task_id in ("bad", "worse"):
        with pytest.raises(BackendGetMetaError, match=f"task {task_id} cannot be read") as caught:
            _ = backend.app.AsyncResult(task_id).state
        assert caught.value.task_id == task_id
    group = backend.app.GroupResult("g", [backend.app.AsyncResult(i) for i in ("good", "bad")])
    values = group.get(timeout=5, propagate=False)
    assert values[0] == 1
    assert isinstance(values[1], BackendGetMetaError)


def test_results_can_be_pickled_and_bring_no_connections_along(app: Celery) -> None:
    done(app.backend, 5)
    app.set_current()
    result = pickle.loads(pickle.dumps(app.AsyncResult("t")))
    assert result.get(timeout=5) == 5
    assert result.backend is app.backend


def test_the_uri_shows_no_password(new_app: NewApp, backend_url: str) -> None:
    url = backend_url.replace("postgres@", "postgres:secret@")
    backend = new_app(url).backend
    assert backend.as_uri() == url.replace("secret", "**")
    assert backend.as_uri(include_password=True) == url


def test_a_wrong_url_is_refused_at_once(new_app: NewApp) -> None:
    app = new_app("pgqrs+mysql://u:secret@h/d")
    with pytest.raises(ConfigurationError, match="not one of ours") as caught:
        _ = app.backend
    assert "secret" not in str(caught.value)
    app = new_app("pgqrs+postgresql://h/d?no_such_parameter=1")
    with pytest.raises(ConfigurationError, match="no_such_parameter"):
        _ = app.backend
    app = new_app("pgqrs+postgresql://h/d?pgqrs_pool_sise=1")
    with pytest.raises(ConfigurationError, match="pgqrs_pool_sise"):
        _ = app.backend


def test_a_server_nobody_runs_is_an_error_and_no_endless_wait(new_app: NewApp) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        app = new_app(f"pgqrs+postgresql://u:secret@127.0.0.1:{taken.getsockname()[1]}/d")
        with pytest.raises(StoreUnavailable, match="cannot connect") as caught:
            app.AsyncResult("t").get(timeout=30)
    assert "secret" not in str(caught.value)


def test_a_user_the_server_does_not_know_is_an_error(new_app: NewApp, backend_url: str) -> None:
    app = new_app(backend_url.replace("postgres@", "nobody_of_that_name:secret@"))
    with pytest.raises(StoreUnavailable, match="nobody_of_that_name") as caught:
        app.AsyncResult("t").get(timeout=30)
    assert "secret" not in str(caught.value)


def test_a_database_without_the_tables_says_what_to_run(
    new_app: NewApp, backend_url: str, installed_schema: str
) -> None:
    app = new_app(backend_url.replace(f"pgqrs_schema={installed_schema}", "pgqrs_schema=nothing_here"))
    with pytest.raises(NotInstalled, match="celery -A your_app pgqrs install"):
        app.AsyncResult("t").get(timeout=30)


def test_the_tables_are_made_at_first_use_where_that_is_allowed(
    new_app: NewApp, database_dsn: str, schema: str
) -> None:
    url = f"pgqrs+{database_dsn}&pgqrs_schema={schema}&pgqrs_auto_install=true"
    assert done(new_app(url).backend, 3).get(timeout=5) == 3


def test_a_forked_child_uses_connections_of_its_own(backend: PostgresBackend, spy: Spy) -> None:
    done(backend, 1)
    mine = {pid for pid, _ in spy.connections()}
    assert mine
    child = os.fork()
    if child == 0:
        try:
            backend.mark_as_done("child", os.getpid())
            os._exit(0 if backend.app.AsyncResult("t").get(timeout=5) == 1 else 1)
        finally:
            os._exit(2)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert backend.app.AsyncResult("child").get(timeout=5) == child
    assert {pid for pid, _ in spy.connections()} >= mine


def test_the_durable_core_can_store_an_outcome_in_its_own_transaction(
    backend: PostgresBackend, database: Database
) -> None:
    request = Context(id="t", chord={"task": "total"}, group="c", group_index=0)
    outcome = backend.outcome("t", 5, states.SUCCESS, request=request)
    with database.transaction() as session:
        chords.record(session, chords.Chord("c", "app", size=1))
        assert results.store_with_part(session, outcome)
        assert chords.peek(session, "c")
    assert backend.app.AsyncResult("t").get(timeout=5) == 5
    ignoring = backend.outcome("u", 5, states.SUCCESS, request=Context(id="u", ignore_result=True))
    assert not ignoring.result
    assert ignoring.part is None
