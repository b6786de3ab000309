"""Values as JSON text, and back: what is stored in the ledger's ``json`` columns.

Values go through the kombu serializer the app configured, so that dates, decimals and UUIDs survive. What it writes is
stored as it is where it is valid JSON; anything else (pickle, msgpack, JSON with NaN in it) is wrapped::

    {"content_type": …, "content_encoding": …, "body": <base64>}

A value of the user's that looks like that wrapper is wrapped itself.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable
from typing import Any, Final

from kombu.exceptions import ContentDisallowed, DecodeError, EncodeError
from kombu.serialization import dumps, loads, prepare_accept_content
from kombu.utils import json as kombu_json

from pgqrs_celery.exceptions import ResultNotSerializable, ResultTooLarge, StepError
from pgqrs_celery.plain import PLAIN

__all__ = ["Codec"]

JSON: Final = "application/json"
WRAPPED: Final = '{"content_type":'

#: How kombu writes what JSON does not know: ``{"__type__": "decimal", "__value__": "1.10"}``.
MARK: Final = '"__type__"'
LOOKALIKE: Final = frozenset({"__type__", "__value__"})

#: What kombu's serializer "json" makes for each value; here they are made once.
ENCODER: Final = kombu_json.JSONEncoder()
DECODER: Final = json.JSONDecoder(object_hook=kombu_json.object_hook)


class Codec:
    """Writes and reads values with one serializer; reads only the content types the app accepts."""

    def __init__(self, serializer: str = "json", accept: Iterable[str] | None = None, max_bytes: int = 2**30) -> None:
        self.serializer = serializer
        self.accept = {JSON, *(prepare_accept_content(list(accept)) or ())} if accept else {JSON}
        self.max_bytes = max_bytes

    def dump(self, value: Any) -> str:
        """Return the value as JSON text; raises kombu's ``EncodeError`` where the serializer cannot write it."""
        if self.serializer == "json":
            plain = PLAIN.get(type(value))
            try:
                if plain is not None:
                    return plain(value)
                text = ENCODER.encode(value)
            except Exception as error:  # whatever a value's own __json__ or __repr__ raises, as kombu has it
                raise EncodeError(error) from error
            if MARK in text:
                refuse_lookalikes(value)
            if is_strict_json(text):
                return text
            return wrap(JSON, "utf-8", text.encode())
        content_type, encoding, data = dumps(value, serializer=self.serializer)
        if content_type == JSON and isinstance(data, str) and is_strict_json(data):
            return data
        body = data.encode(encoding if encoding not in ("binary", None) else "utf-8") if isinstance(data, str) else data
        return wrap(content_type, encoding, body)

    def dump_result(self, value: Any, step: str) -> str:
        """Return a step's result as JSON text.

        Raises ``ResultNotSerializable`` and ``ResultTooLarge``, both naming the step; the step stays unfinished.
        """
        try:
            text = self.dump(value)
        except (EncodeError, TypeError, ValueError) as error:
            raise ResultNotSerializable(
                f"step {step!r} returned a {type(value).__module__}.{type(value).__qualname__} that the serializer "
                f"{self.serializer!r} cannot write: {error}. Return something it can, or choose another "
                "result_serializer; the step can then be resumed."
            ) from error
        if len(text) > self.max_bytes:
            raise ResultTooLarge(
                f"step {step!r} returned {len(text)} bytes, more than pgqrs_max_result_bytes = {self.max_bytes}. "
                "Store the data elsewhere and return a key to it, or raise the limit; the step can then be resumed."
            )
        return text

    def load_again(self, text: str, value: Any) -> Any:
        """Return what ``load`` makes of the text that a value was just dumped as."""
        return value if type(value) in PLAIN and self.serializer == "json" else self.load(text)

    def load(self, text: str | None) -> Any:
        """Return the value that was stored as this text; None for nothing.

        Raises ``StepError`` where the payload cannot be read: damaged, or of a type the app does not accept.
        """
        if text is None:
            return None
        try:
            if text.startswith(WRAPPED):
                content_type, encoding, body = unwrap(text)
                return loads(body, content_type, encoding, accept=self.accept)
            return DECODER.decode(text)
        except (DecodeError, ContentDisallowed, ValueError, KeyError) as error:
            raise StepError(f"a recorded payload cannot be read: {error} ({text[:80]!r} …)") from error


def refuse_lookalikes(value: Any) -> None:
    """Raise ``EncodeError`` where a dict would be read back as something else: kombu writes other types like it."""
    waiting = [value]
    while waiting:
        one = waiting.pop()
        if isinstance(one, dict):
            if one.keys() == LOOKALIKE:
                raise EncodeError(
                    "a dict with just the keys '__type__' and '__value__' cannot be told from the form in which the "
                    "serializer writes dates, decimals and the like; rename one of the keys, or add a third"
                )
            waiting += one.values()
        elif isinstance(one, list | tuple):
            waiting += one


def is_strict_json(text: str) -> bool:
    """Return whether JSON text written by the serializer may be stored as it is."""
    if text.startswith(WRAPPED):
        return False
    if "NaN" in text or "Infinity" in text:
        try:
            json.loads(text, parse_constant=_refuse)
        except ValueError:
            return False
    return True


def _refuse(constant: str) -> None:
    raise ValueError(constant)


def wrap(content_type: str, encoding: str | None, body: bytes) -> str:
    """Return bytes of any content type as JSON text."""
    return json.dumps(
        {"content_type": content_type, "content_encoding": encoding, "body": base64.b64encode(body).decode("ascii")}
    )


def unwrap(text: str) -> tuple[str, str, bytes]:
    """Return content type, encoding and bytes of what ``wrap`` made."""
    parts = json.loads(text)
    return parts["content_type"], parts["content_encoding"], base64.b64decode(parts["body"])
