"""The tasks of the demo: a data pipeline (fetch, transform, save), and a report in twenty parts.

``countries.csv`` lists the countries of ISO 3166 as the IANA time zone database does (public domain). Every record gets
a key that is slow to compute on purpose (PBKDF2), so that there is a middle of a step to be killed in.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from pathlib import Path
from typing import Any

from celery import Celery

from examples.support import Journal
from pgqrs_celery import Pgqrs

app = Celery("examples.demo.app", broker="pgqrs://", backend="pgqrs://")
app.conf.update(
    broker_connection_retry_on_startup=True,
    # A worker holds what it executes and nothing else: nobody has to find out what a dead one had in reserve.
    task_acks_late=True,
    worker_prefetch_multiplier=1,
)
pgqrs = Pgqrs(app)

#: Work per record; some ten milliseconds.
ITERATIONS = 15_000

Record = dict[str, str]


@pgqrs.task
def fetch(source: str) -> dict[str, Any]:
    """Read the records."""
    journal = Journal.of_environment()
    journal.write("fetch begins")
    with open(source, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))
    journal.write("fetch ends", f"{len(records)} records")
    return {"source": source, "records": records}


@pgqrs.task
def transform(data: dict[str, Any]) -> dict[str, Any]:
    """Compute what is to be saved of every record."""
    journal = Journal.of_environment()
    journal.write("transform begins")
    records = []
    for record in data["records"]:
        records.append(transformed(record))
        journal.write("record", record["code"])
    journal.write("transform ends")
    return {"records": records, "count": len(records)}


def transformed(record: Record, iterations: int = ITERATIONS) -> Record:
    """Return a record with its name in capitals and a key derived from it."""
    key = hashlib.pbkdf2_hmac("sha256", record["name"].encode(), record["code"].encode(), iterations)
    return {"code": record["code"], "name": record["name"].upper(), "key": key.hex()[:16]}


@pgqrs.task
def save(results: dict[str, Any], destination: str) -> str:
    """Write the results; the file appears whole or not at all."""
    journal = Journal.of_environment()
    journal.write("save begins")
    unfinished = Path(destination).with_suffix(".new")
    unfinished.write_text(json.dumps(results["records"], indent=1), encoding="utf-8")
    os.replace(unfinished, destination)
    journal.write("save ends")
    return f"Saved {results['count']} records successfully"


class Unreadable(Exception):
    """A part of the source cannot be read."""


@pgqrs.task
def part(source: str, number: int, parts: int, iterations: int) -> list[Record]:
    """Transform one part of the records; fails as long as a file beside the journal says so."""
    journal = Journal.of_environment()
    journal.write("part begins", str(number))
    if journal.path.with_name(f"unreadable-{number}").exists():
        raise Unreadable(f"part {number}")
    with open(source, encoding="utf-8", newline="") as file:
        records = list(csv.DictReader(file))[number::parts]
    result = [transformed(record, iterations) for record in records]
    journal.write("part ends", str(number))
    return result


@pgqrs.task
def collect(results: list[list[Record]]) -> int:
    """Count what all parts returned."""
    Journal.of_environment().write("collect")
    return sum(len(records) for records in results)
