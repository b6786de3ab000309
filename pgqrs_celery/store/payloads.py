"""Payloads of the result backend: a value as the three columns ``data``, ``body`` and ``format``."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["NOTHING", "Payload"]


@dataclass(frozen=True, slots=True)
class Payload:
    """A serialized value: ``data`` where it is JSON text, else ``body``; ``format`` is content type and encoding."""

    data: str | None = None
    body: bytes | None = None
    format: str | None = None

    def __bool__(self) -> bool:
        return self.data is not None or self.body is not None

    def columns(self, prefix: str = "") -> dict[str, object]:
        """Return the columns as statement parameters."""
        return {prefix + "data": self.data, prefix + "body": self.body, prefix + "format": self.format}


NOTHING = Payload()
