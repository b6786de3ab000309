"""Steps that are sent as tasks of their own: they are undone, and have transactions, as those called in line."""

from __future__ import annotations

import asyncio
import threading
from typing import Any

import pytest

from pgqrs_celery import Pgqrs, Status, StepMisused
from tests.functions.conftest import Working, ended
from tests.functions.test_effects import Boom, Inner, Shop, shop

__all__ = ["shop"]


class Bookings:
    """Steps that can be undone, and what became of them."""

    def __init__(self, pgqrs: Pgqrs) -> None:
        self.log: list[str] = []
        self.full = {"car"}

        def undo(ctx: Any, booked: str) -> Any:
            return ctx.step("note", self.log.append, f"undo {booked}")

        @pgqrs.step(compensate=undo)
        def book(ctx: Any, what: str) -> str:
            self.log.append(f"book {what}")
            if what in self.full:
                raise Boom(what)
            return what

        self.book = book

    @property
    def undone(self) -> list[str]:
        """What was undone, in order."""
        return [line.removeprefix("undo ") for line in self.log if line.startswith("undo ")]

    @property
    def booked(self) -> list[str]:
        """What was booked, sorted: parallel calls have no order."""
        return sorted(line.removeprefix("book ") for line in self.log if line.startswith("book "))


def test_gathered_steps_are_undone_in_reverse_order_of_their_places(
    pgqrs: Pgqrs, working: Working, inner: Inner
) -> None:
    bookings = Bookings(pgqrs)
    book = bookings.book

    @pgqrs.workflow
    def trip(ctx: Any) -> Any:
        first = book(ctx, "train")
        rest = ctx.gather(*(book.s(what) for what in ("flight", "hotel", "boat")))
        return [first, *rest, book(ctx, "car")]

    with working():
        run = ended(trip.delay())
        assert run.status is Status.FAILED
        with pytest.raises(Boom, match="car"):
            run.get(timeout=1)
        assert bookings.undone == ["boat", "hotel", "flight", "train"]
        statuses = {step: status for step, status in inner(run).items() if "/" not in step and step != "gather"}
        assert statuses == {
            "book": "CANCELLED", "book#2": "CANCELLED", "book#3": "CANCELLED", "book#4": "CANCELLED",
            "book#5": "FAILED",
        }  # fmt: skip


def test_of_gathered_steps_those_that_succeeded_are_undone_when_another_fails(pgqrs: Pgqrs, working: Working) -> None:
    bookings = Bookings(pgqrs)

    @pgqrs.workflow
    def trip(ctx: Any) -> Any:
        return ctx.gather(*(bookings.book.s(what) for what in ("flight", "car", "hotel")))

    with working():
        run = ended(trip.delay())
        assert run.status is Status.FAILED
    assert bookings.undone == ["hotel", "flight"]


def test_gathered_steps_that_were_undone_are_executed_and_undone_again_after_a_resume(
    pgqrs: Pgqrs, working: Working
) -> None:
    bookings = Bookings(pgqrs)

    @pgqrs.workflow
    def trip(ctx: Any) -> Any:
        first = bookings.book(ctx, "train")
        return [first, *ctx.gather(*(bookings.book.s(what) for what in ("flight", "hotel", "car")))]

    with working():
        run = ended(trip.delay())
        for _ in range(2):
            assert bookings.undone == ["hotel", "flight", "train"]
            assert bookings.booked == ["car", "flight", "hotel", "train"]
            bookings.log.clear()
            ended(run.resume())
        bookings.full.clear()
        bookings.log.clear()
        assert run.resume().get(timeout=60) == ["train", "flight", "hotel", "car"]
    assert bookings.booked == ["car", "flight", "hotel", "train"]
    assert bookings.undone == []


def test_a_step_that_was_started_is_undone_when_it_has_ended(pgqrs: Pgqrs, working: Working) -> None:
    log: list[str] = []
    go = threading.Event()

    @pgqrs.step(compensate=lambda ctx, value: log.append(f"undo {value}"))
    def book(ctx: Any, what: str) -> str:
        assert go.wait(60)
        log.append(what)
        return what

    @pgqrs.workflow
    def trip(ctx: Any) -> None:
        ctx.start(book.s("flight"))
        ctx.step("let go", go.set)
        raise Boom

    with working():
        assert ended(trip.delay()).status is Status.FAILED
    assert log == ["flight", "undo flight"]


def test_an_async_function_undoes_the_steps_it_has_sent(pgqrs: Pgqrs, working: Working) -> None:
    log: list[str] = []

    async def undo(ctx: Any, booked: str) -> None:
        await ctx.sleep("grace", seconds=0.1)
        await ctx.step("refund", log.append, f"undo {booked}")

    @pgqrs.step(compensate=undo)
    async def book(ctx: Any, what: str) -> str:
        await asyncio.sleep(0)
        return what

    @pgqrs.workflow
    async def trip(ctx: Any) -> None:
        await ctx.gather(book.s("flight"), book.s("hotel"))
        raise Boom

    with working():
        assert ended(trip.delay()).status is Status.FAILED
    assert log == ["undo hotel", "undo flight"]


def test_the_steps_of_a_sent_step_that_failed_are_executed_again_when_the_function_is_retried(
    pgqrs: Pgqrs, working: Working
) -> None:
    bookings = Bookings(pgqrs)

    @pgqrs.step
    def journey(ctx: Any) -> list[str]:
        try:
            return [bookings.book(ctx, "flight"), bookings.book(ctx, "car")]
        finally:
            bookings.full.clear()

    @pgqrs.workflow(autoretry_for=(Boom,), retry_kwargs={"countdown": 0.1, "max_retries": 1})
    def trip(ctx: Any) -> Any:
        return ctx.gather(journey.s())

    with working():
        assert trip.delay().get(timeout=60) == [["flight", "car"]]
    assert bookings.log == ["book flight", "book car", "undo flight", "book flight", "book car"]


# Transactions


def test_a_transactional_step_that_is_sent_commits_its_writes_with_its_success(
    pgqrs: Pgqrs, shop: Shop, working: Working
) -> None:
    seen: list[list[int]] = []

    @pgqrs.step(transactional=True)
    def order(ctx: Any, number: int) -> int:
        shop.insert(ctx.connection, number)
        seen.append(shop.orders)
        if number == 3:
            raise Boom
        return number

    @pgqrs.workflow
    def buy(ctx: Any, numbers: list[int]) -> Any:
        return ctx.gather(*(order.s(number) for number in numbers))

    with working():
        assert buy.delay([1]).get(timeout=60) == [1]
        assert (seen, shop.orders) == ([[]], [1])
        assert ended(buy.delay([2, 3])).status is Status.FAILED
    assert shop.orders == [1, 2]


def test_an_async_transactional_step_may_be_sent(pgqrs: Pgqrs, shop: Shop, working: Working) -> None:
    @pgqrs.step(transactional=True)
    async def order(ctx: Any, number: int) -> int:
        await asyncio.sleep(0)
        shop.insert(ctx.connection, number)
        return number

    @pgqrs.workflow
    def buy(ctx: Any) -> Any:
        return ctx.gather(order.s(1))

    with working():
        assert buy.delay().get(timeout=60) == [1]
    assert order.task.apply((2,)).get() == 2
    assert shop.orders == [1, 2]


def test_a_transactional_step_that_is_sent_cannot_wait_in_its_transaction(
    pgqrs: Pgqrs, shop: Shop, working: Working
) -> None:
    @pgqrs.step(transactional=True)
    def order(ctx: Any) -> None:
        shop.insert(ctx.connection, 1)
        ctx.sleep(1)

    @pgqrs.workflow
    def buy(ctx: Any) -> Any:
        return ctx.gather(order.s())

    with working():
        run = ended(buy.delay())
        with pytest.raises(StepMisused, match="cannot wait"):
            run.get(timeout=1)
    assert shop.orders == []


def test_a_transactional_step_executed_eagerly_is_a_transaction(pgqrs: Pgqrs, shop: Shop) -> None:
    @pgqrs.step(transactional=True)
    def order(ctx: Any, number: int) -> int:
        shop.insert(ctx.connection, number)
        if number == 2:
            raise Boom
        return number

    assert order.task.apply((1,)).get() == 1
    with pytest.raises(Boom):
        order.task.apply((2,)).get()
    assert shop.orders == [1]
