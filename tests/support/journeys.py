"""The workflow functions of the acceptance tests: they note every effect, and can be stopped around every wait."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from pgqrs_celery import Pgqrs
from tests.support.effects import EffectLog
from tests.support.points import Points

__all__ = ["Journeys"]


class Journeys:
    """A function that waits in every way there is, and two that do not succeed and undo what they have done.

    Effects and points are named after a key that the test chooses, so it can know them before anything starts.
    """

    def __init__(self, pgqrs: Pgqrs, log: EffectLog, points: Points) -> None:
        self.pgqrs, self.log, self.points = pgqrs, log, points
        self._steps()
        self._journey()
        self._doomed()

    def effect(self, key: str, name: str) -> None:
        """Note an effect; the process can be stopped before it, and after it, when nothing of it is recorded."""
        self.points.reach(f"before_{name}", key)
        self.log.add("body", f"{key}/{name}", name)
        self.points.reach(f"in_{name}", key)

    def around(self, key: str, name: str, wait: Callable[[], Any]) -> Any:
        """Wait for something; the process can be stopped before, when the wait is parked, and after it."""
        self.points.reach(f"before_{name}", key)
        try:
            value = wait()
        except BaseException:
            self.points.reach(f"parked_at_{name}", key)
            raise
        self.points.reach(f"after_{name}", key)
        return value

    def _steps(self) -> None:
        @self.pgqrs.step(name="pack")
        def pack(ctx: Any, key: str) -> str:
            self.effect(key, "pack")
            return "packed"

        @self.pgqrs.step(name="parcel")
        def parcel(ctx: Any, key: str, number: int) -> int:
            self.effect(key, f"parcel_{number}")
            return number

        self.pack, self.parcel = pack, parcel

    def _journey(self) -> None:
        pgqrs, effect, around, points = self.pgqrs, self.effect, self.around, self.points

        @pgqrs.workflow(name="leg")
        def leg(ctx: Any, key: str) -> str:
            ctx.step("fly", effect, key, "fly")
            return "landed"

        @pgqrs.workflow(name="journey")
        def journey(ctx: Any, key: str) -> list[Any]:
            seen = [self.pack(ctx, key)]
            points.reach("after_pack", key)
            around(key, "nap", lambda: ctx.sleep("nap", seconds=0.2))
            seen.append(around(key, "event", lambda: ctx.wait_for_event("go")))
            parcels = [self.parcel.s(key, number) for number in (1, 2)]
            seen.append(around(key, "gather", lambda: ctx.gather(*parcels)))
            child = around(key, "start", lambda: ctx.start_child(leg, key))
            seen.append(around(key, "child", lambda: ctx.wait(child)))
            points.reach("before_end", key)
            return seen

        self.leg, self.journey = leg, journey

    def _doomed(self) -> None:
        effect = self.effect

        def undo(ctx: Any, booked: list[str]) -> None:
            key, name = booked
            effect(key, f"undo_{name}")

        @self.pgqrs.step(name="book", compensate=undo)
        def book(ctx: Any, key: str, name: str) -> list[str]:
            effect(key, name)
            return [key, name]

        @self.pgqrs.workflow(name="doomed")
        def doomed(ctx: Any, key: str) -> None:
            book(ctx, key, "flight")
            book(ctx, key, "hotel")
            raise ValueError("as the test asked for")

        @self.pgqrs.workflow(name="trip")
        def trip(ctx: Any, key: str) -> None:
            book(ctx, key, "flight")
            ctx.gather(book.s(key, "hotel"), book.s(key, "boat"))
            book(ctx, key, "car")
            ctx.step("think", effect, key, "think")
            self.around(key, "answer", lambda: ctx.wait_for_event("answer"))

        self.doomed, self.trip = doomed, trip
