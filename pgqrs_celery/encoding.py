"""Values as payloads of the result backend, and back: serializers, compression, and what a reader accepts."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Final

from celery.backends import base
from kombu.serialization import dumps, loads

from pgqrs_celery.store.payloads import Payload

__all__ = ["pack", "unpack"]

JSON: Final = "application/json"


def pack(value: Any, serializer: str, compression: str | None = None) -> Payload:
    """Return the value as a payload; raises kombu's ``EncodeError`` where the serializer cannot write it.

    JSON is kept as text unless it is compressed, or holds NaN or Infinity, which are not JSON to Postgres.
    """
    content_type, encoding, written = dumps(value, serializer=serializer)
    if not compression and content_type == JSON and "NaN" not in written and "Infinity" not in written:
        return Payload(data=written)
    body = written.encode("utf-8") if isinstance(written, str) else bytes(written)
    if compression:
        body = base.compress_payload(body, compression)  # type: ignore[attr-defined]
    return Payload(body=body, format=f"{content_type};{encoding}")


def unpack(payload: Payload, accept: Collection[str] | None) -> Any:
    """Return the value of a payload.

    Raises kombu's ``ContentDisallowed`` for a content type that is not accepted and ``DecodeError`` (or what the
    serializer raises) for one that is damaged.
    """
    if payload.data is not None:
        return loads(payload.data, JSON, "utf-8", accept=accept)
    content_type, _, encoding = (payload.format or "").partition(";")
    body: Any = payload.body
    decompress = getattr(base, "decompress_payload", None)
    if decompress is not None:
        body = decompress(body)
    return loads(body, content_type, encoding, accept=accept)
