"""What Postgres does for a statement."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

from psycopg import sql

from pgqrs_celery.session import Session


@dataclass(frozen=True, slots=True)
class Plan:
    """What Postgres did for one statement: its nodes, milliseconds, pages."""

    nodes: list[dict[str, Any]]
    milliseconds: float
    pages: int

    @property
    def scans(self) -> set[str]:
        """The scans that took place, as ``kind on index`` or ``kind on table``."""
        found = set()
        for node in self.nodes:
            if not node.get("Actual Loops"):
                continue
            if "Scan" in node["Node Type"] and node["Node Type"] not in ("CTE Scan", "Function Scan", "Subquery Scan"):
                found.add(f"{node['Node Type']} on {node.get('Index Name') or node.get('Relation Name')}")
        return found

    @property
    def blind(self) -> list[str]:
        """The scans that read a whole index for want of a key."""
        return [
            str(node["Index Name"])
            for node in self.nodes
            if node["Node Type"] in ("Index Scan", "Index Only Scan", "Bitmap Index Scan") and "Index Cond" not in node
        ]

    @property
    def removed(self) -> int:
        """Rows that were read and thrown away."""
        return int(sum(node.get("Rows Removed by Filter", 0) * node.get("Actual Loops", 1) for node in self.nodes))


def explain(session: Session, name: str, params: dict[str, Any]) -> Plan:
    """Execute a named statement with the generic plan that a prepared statement gets, and return that plan."""
    order: list[str] = []

    def number(match: re.Match[str]) -> str:
        if match[1] not in order:
            order.append(match[1])
        return f"${order.index(match[1]) + 1}"

    text = re.sub(r"%\((\w+)\)s", number, session.text(name)).replace("%%", "%")
    arguments = sql.SQL(", ").join(sql.Literal(params[key]) for key in order)
    with session.connection.transaction(force_rollback=True):  # the first time, catalogues are read as well
        _explain_once(session, text, arguments)
    document = _explain_once(session, text, arguments)
    root = document[0]["Plan"]
    pages = root.get("Shared Hit Blocks", 0) + root.get("Shared Read Blocks", 0)
    return Plan(_flat(root), document[0]["Execution Time"], pages)


def _explain_once(session: Session, text: str, arguments: sql.Composed) -> Any:
    explained = sql.SQL("EXPLAIN (ANALYZE, BUFFERS, FORMAT JSON) EXECUTE explained({})").format(arguments)
    session.connection.execute(f"PREPARE explained AS {text}".encode(), prepare=False)
    row = session.connection.execute(explained, prepare=False).fetchone()
    session.connection.execute("DEALLOCATE explained", prepare=False)
    assert row is not None
    return json.loads(row[0]) if isinstance(row[0], str) else row[0]


def _flat(node: dict[str, Any]) -> list[dict[str, Any]]:
    return [node, *(below for child in node.get("Plans", ()) for below in _flat(child))]
