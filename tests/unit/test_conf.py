"""Settings: every one is checked, every error names the setting, none is silently without effect."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from celery import Celery

from pgqrs_celery.conf import PREFIX, Settings, keys_of
from pgqrs_celery.exceptions import ConfigurationError

FIELDS = {f.name: f for f in dataclasses.fields(Settings)}

#: For every kind of default, values that no setting of that kind takes.
NEVER: dict[str, list[Any]] = {
    "str": [1, b"x", [], ""],
    "str | None": [1, b"x", [], ""],
    "float": ["1", -1, True, [], float("nan"), float("inf")],
    "float | None": ["1", -1, True, [], float("inf")],
    "int": ["1", 1.5, -1, 0, True],
    "bool": ["yes", 1, 0, "False"],
}


def read(**conf: Any) -> Settings:
    return Settings.read({PREFIX + name: value for name, value in conf.items()})


def test_without_settings_everything_has_a_default() -> None:
    assert Settings.read({}) == Settings()


@pytest.mark.parametrize("name", FIELDS)
def test_the_default_of_every_setting_passes_its_own_check(name: str) -> None:
    default = FIELDS[name].default
    if default is not None:
        assert getattr(read(**{name: default}), name) == default


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, f in FIELDS.items() for value in NEVER[str(f.type)]]
)
def test_a_wrong_value_is_refused_by_the_setting_s_name(name: str, value: Any) -> None:
    with pytest.raises(ConfigurationError) as caught:
        read(**{name: value})
    assert f"setting {PREFIX}{name} = {value!r}: must be" in str(caught.value)


def test_none_means_unset() -> None:
    assert read(lease=None, dsn=None) == Settings()


@pytest.mark.parametrize("schema", ["public", "_x", "Sales2", "a$b", "x" * 63])
def test_a_schema_name_is_one(schema: str) -> None:
    assert read(schema=schema).schema == schema


@pytest.mark.parametrize("schema", ["", "1x", "a-b", 'a"b', "a b", "x" * 64, "a;drop"])
def test_what_is_not_a_schema_name_is_refused(schema: str) -> None:
    with pytest.raises(ConfigurationError, match="pgqrs_schema"):
        read(schema=schema)


@pytest.mark.parametrize("name", ["plain_links", "on_input_change"])
def test_a_choice_names_the_choices(name: str) -> None:
    with pytest.raises(ConfigurationError, match=rf"pgqrs_{name} = 'nonsense': must be one of 'warn', 'error', '"):
        read(**{name: "nonsense"})


def test_the_intervals_must_be_in_order() -> None:
    with pytest.raises(ConfigurationError, match="pgqrs_resend_interval_max = 5: must not be less than"):
        read(resend_interval=6, resend_interval_max=5)


def test_settings_are_immutable() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().lease = 1.0  # type: ignore[misc]


def test_a_misspelt_setting_is_refused_with_what_was_meant() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting pgqrs_leese; did you mean pgqrs_lease\?"):
        Settings.read({"pgqrs_leese": 3})


def test_a_setting_without_resemblance_is_refused_without_a_guess() -> None:
    with pytest.raises(ConfigurationError, match=r"unknown setting pgqrs_zzzzzzzz$"):
        Settings.read({"pgqrs_zzzzzzzz": 3})


def test_other_settings_are_none_of_our_business() -> None:
    assert Settings.read({"task_serializer": "json", "pgq": 1, "my_pgqrs_lease": 2}) == Settings()


def configured(namespace: str | None = None, **settings: Any) -> Any:
    app = Celery("shop", set_as_current=False)
    app.config_from_object(SimpleNamespace(**settings), namespace=namespace)
    return app.conf


def test_settings_are_read_from_a_celery_configuration_however_it_was_made() -> None:
    assert Settings.read(Celery("shop", set_as_current=False, pgqrs_lease=7).conf).lease == 7
    assert Settings.read(configured(pgqrs_lease=7)).lease == 7
    assert Settings.read(configured(PGQRS_LEASE=7)).lease == 7
    assert Settings.read(configured("CELERY", CELERY_PGQRS_LEASE=7)).lease == 7
    changed = Celery("shop", set_as_current=False).conf
    changed.update(PGQRS_LEASE=7)
    assert Settings.read(changed).lease == 7


def test_what_was_said_later_counts() -> None:
    conf = configured(pgqrs_lease=7)
    conf.pgqrs_lease = 8
    assert Settings.read(conf).lease == 8


@pytest.mark.parametrize("namespace", [None, "CELERY"])
def test_a_misspelt_setting_is_found_in_every_spelling(namespace: str | None) -> None:
    key = f"{namespace}_PGQRS_LEESE" if namespace else "PGQRS_LEESE"
    with pytest.raises(ConfigurationError, match=rf"unknown setting {key}; did you mean pgqrs_lease\?"):
        Settings.read(configured(namespace, **{key: 7}))


class Busy(dict[str, Any]):
    """A configuration that another thread completes while its keys are read."""

    def __iter__(self) -> Iterator[str]:
        for key in super().__iter__():
            yield key
            self.setdefault("broker_transport_options", {})


def test_a_configuration_may_be_completed_while_it_is_read() -> None:
    assert keys_of(Busy(pgqrs_schema="jobs", task_serializer="json")) == [
        "pgqrs_schema", "task_serializer", "broker_transport_options",
    ]  # fmt: skip
    settings = Settings.read(Busy(pgqrs_schema="jobs", task_serializer="json"))
    assert settings.schema == "jobs"
