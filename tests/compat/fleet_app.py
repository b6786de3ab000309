"""The app of the fleet's workers: a workflow whose activity waits for a file to appear."""

from __future__ import annotations

import threading
from dataclasses import dataclass

from celery import Celery

from examples.support import Journal
from pgqrs_celery import Pgqrs
from pgqrs_celery.compat.underway import Activity, StepContext, To, Workflow

app = Celery("tests.compat.fleet_app", broker="redis://localhost", set_as_current=False)
pgqrs = Pgqrs(app)


def release(journal: Journal) -> None:
    """Let the activity come to its end."""
    journal.path.with_suffix(".release").touch()


@dataclass
class Trip:
    city: str
    nights: int


class Book(Activity):
    NAME = "book"
    Input = str
    Output = str

    def execute(self, city: str) -> str:
        journal = Journal.of_environment()
        journal.write(f"book {city}")
        pause = threading.Event()
        while not journal.path.with_suffix(".release").exists():
            pause.wait(0.05)
        return "booked"


class Thank(Activity):
    NAME = "thank"
    Input = str
    Output = None

    def execute(self, city: str) -> None:
        Journal.of_environment().write(f"thank {city}")


def plan(cx: StepContext, trip: Trip) -> To:
    Journal.of_environment().write(f"plan {trip.city}")
    return To.next(trip)


def reserve(cx: StepContext, trip: Trip) -> To:
    cx.emit(Thank, "thank", trip.city)
    booked = cx.call(Book, "book", trip.city)
    return To.done(f"{trip.city}: {booked}, {trip.nights} nights")


trip = Workflow.builder().activity(Book).activity(Thank).step(plan).step(reserve).name("trip").app(pgqrs).build()
