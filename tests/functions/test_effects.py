"""What steps do to the world: transactions that commit with the checkpoint, and compensation of what has been done."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from typing import Any

import psycopg
import pytest
import sqlalchemy as sa
from psycopg import sql

from pgqrs_celery import Pgqrs, Status, StepMisused, WorkflowRun
from pgqrs_celery.transactions import in_transaction
from tests.functions.conftest import Working, ended

Inner = Callable[[WorkflowRun], dict[str, str]]


class Boom(Exception):
    """What these tests fail with."""


class Shop:
    """A table of the user's own, in the ledger's database."""

    def __init__(self, dsn: str, schema: str) -> None:
        self.connection = psycopg.connect(dsn, autocommit=True)
        self.table = sql.Identifier(schema, "orders")
        self.name = f"{schema}.orders"
        create = sql.SQL("CREATE TABLE {} (id int PRIMARY KEY, note json, CHECK (id >= 0))")
        self.connection.execute(create.format(self.table))

    def insert(self, connection: psycopg.Connection[Any], number: int) -> None:
        """Insert an order on somebody's connection."""
        connection.execute(sql.SQL("INSERT INTO {} VALUES (%s, '{{\"a\": 1}}')").format(self.table), [number])

    @property
    def orders(self) -> list[int]:
        """The orders that are committed."""
        return [row[0] for row in self.connection.execute(sql.SQL("SELECT id FROM {} ORDER BY id").format(self.table))]


@pytest.fixture
def shop(pgqrs: Pgqrs, database_dsn: str, installed_schema: str) -> Iterator[Shop]:
    """The user's table."""
    shop = Shop(database_dsn, installed_schema)
    yield shop
    shop.connection.close()


# Transactions


def test_a_transactional_step_commits_its_writes_with_its_checkpoint(pgqrs: Pgqrs, shop: Shop, inner: Inner) -> None:
    seen: list[Any] = []

    @pgqrs.step(transactional=True)
    def order(ctx: Any, number: int) -> int:
        shop.insert(ctx.connection, number)
        seen.append((shop.orders, inner(pgqrs.run(ctx.id))))
        return number

    @pgqrs.workflow
    def buy(ctx: Any) -> int:
        number = order(ctx, 1)
        if len(seen) == 1:
            seen.append("replayed")
            raise Boom
        return number

    ctx = pgqrs.context(buy)
    with pytest.raises(Boom):
        buy(ctx)
    assert buy(ctx) == 1
    assert seen == [([], {}), "replayed"]
    assert shop.orders == [1]


def test_a_transactional_step_that_fails_leaves_nothing_but_its_error(pgqrs: Pgqrs, shop: Shop, inner: Inner) -> None:
    @pgqrs.step(transactional=True)
    def order(ctx: Any, number: int) -> None:
        shop.insert(ctx.connection, number)
        raise Boom

    @pgqrs.workflow
    def buy(ctx: Any) -> None:
        order(ctx, 1)

    ctx = pgqrs.context(buy)
    with pytest.raises(Boom):
        buy(ctx)
    assert shop.orders == []
    assert inner(pgqrs.run(ctx.id)) == {"order": "FAILED"}


def test_what_the_database_refuses_at_the_commit_fails_the_step(pgqrs: Pgqrs, shop: Shop, inner: Inner) -> None:
    shop.connection.execute(
        sql.SQL("ALTER TABLE {} ADD COLUMN up int UNIQUE DEFERRABLE INITIALLY DEFERRED").format(shop.table)
    )

    @pgqrs.step(transactional=True)
    def order(ctx: Any, number: int) -> None:
        for offset in range(2):
            ctx.connection.execute(
                sql.SQL("INSERT INTO {} (id, up) VALUES (%s, 7)").format(shop.table), [number + offset]
            )

    @pgqrs.workflow
    def buy(ctx: Any) -> None:
        order(ctx, 1)

    ctx = pgqrs.context(buy)
    with pytest.raises(psycopg.errors.UniqueViolation):
        buy(ctx)
    assert shop.orders == []
    assert inner(pgqrs.run(ctx.id)) == {"order": "FAILED"}


def test_a_step_that_lost_its_function_commits_nothing(pgqrs: Pgqrs, shop: Shop) -> None:
    @pgqrs.step(transactional=True)
    def order(ctx: Any, number: int) -> None:
        shop.insert(ctx.connection, number)
        pgqrs.context(run=ctx.id).acquire_step("taken over")

    @pgqrs.workflow
    def buy(ctx: Any) -> None:
        order(ctx, 1)

    from pgqrs_celery.exceptions import LeaseLost

    with pytest.raises(LeaseLost):
        buy(pgqrs.context(buy))
    assert shop.orders == []


def test_the_session_of_a_step_is_the_same_transaction(pgqrs: Pgqrs, shop: Shop) -> None:
    @pgqrs.step(transactional=True)
    def order(ctx: Any, numbers: list[int], fail: bool) -> list[Any]:
        for number in numbers:
            ctx.session.execute(sa.text(f"INSERT INTO {shop.name} (id) VALUES (:id)"), {"id": number})
            ctx.session.commit()
        shop.insert(ctx.connection, 9)
        found = ctx.session.execute(sa.text(f"SELECT id, note FROM {shop.name} ORDER BY id")).all()
        if fail:
            raise Boom
        return [list(row) for row in found]

    @pgqrs.workflow
    def buy(ctx: Any, fail: bool) -> Any:
        return order(ctx, [1, 2], fail)

    with pytest.raises(Boom):
        buy(pgqrs.context(buy), True)
    assert shop.orders == []
    assert buy(pgqrs.context(buy), False) == [[1, None], [2, None], [9, {"a": 1}]]
    assert shop.orders == [1, 2, 9]


def test_the_body_can_neither_end_its_transaction_nor_wait_in_it(pgqrs: Pgqrs, shop: Shop) -> None:
    @pgqrs.step(transactional=True)
    def order(ctx: Any) -> None:
        with pytest.raises(psycopg.ProgrammingError, match="forbidden"):
            ctx.connection.commit()
        with pytest.raises(StepMisused, match="cannot wait"):
            ctx.sleep(1)
        with pytest.raises(StepMisused, match="cannot call another"):
            order(ctx)
        with ctx.connection.transaction():
            shop.insert(ctx.connection, 1)

    @pgqrs.workflow
    def buy(ctx: Any) -> None:
        with pytest.raises(StepMisused, match="transactional=True"):
            ctx.connection.execute("SELECT 1")
        order(ctx)

    buy(pgqrs.context(buy))
    assert shop.orders == [1]


def test_more_transactional_steps_than_pooled_connections_do_not_block_each_other(
    new_pgqrs: Callable[..., Pgqrs], database_dsn: str, installed_schema: str
) -> None:
    pgqrs = new_pgqrs(pgqrs_pool_size=1)
    shop = Shop(database_dsn, installed_schema)

    @pgqrs.step(transactional=True)
    async def order(ctx: Any, number: int) -> int:
        shop.insert(ctx.connection, number)
        await both.wait()
        return await ctx.step("nested", lambda: number)

    @pgqrs.workflow
    async def buy(ctx: Any) -> Any:
        nonlocal both
        both = asyncio.Barrier(3)
        return await asyncio.gather(*(order(ctx, n) for n in range(3)))

    both: Any = None
    assert asyncio.run(buy(pgqrs.context(buy))) == [0, 1, 2]
    assert shop.orders == [0, 1, 2]
    shop.connection.close()


def test_a_transactional_task_commits_its_writes_with_its_success(pgqrs: Pgqrs, shop: Shop, working: Working) -> None:
    tries: list[int] = []

    @pgqrs.task(transactional=True, shared=False, autoretry_for=(Boom,), retry_kwargs={"countdown": 0.1})
    def order(number: int) -> int:
        tries.append(number)
        shop.insert(pgqrs.connection, number)
        pgqrs.session.execute(sa.text(f"UPDATE {shop.name} SET note = NULL"))
        assert shop.orders == []
        if len(tries) == 1:
            raise Boom
        return number

    @pgqrs.task(shared=False)
    def after(number: int) -> Any:
        return [number, shop.orders]

    with working():
        assert (order.s(5) | after.s()).delay().get(timeout=60) == [5, [5]]
    assert tries == [5, 5]


def test_a_retry_is_no_part_of_the_transaction_that_it_leaves(pgqrs: Pgqrs, shop: Shop, working: Working) -> None:
    @pgqrs.task(transactional=True, shared=False, bind=True, max_retries=1)
    def order(self: Any, number: int) -> int:
        with in_transaction(pgqrs.connection):
            shop.insert(pgqrs.connection, number)
            if self.request.retries == 0:
                raise self.retry(countdown=0.1)
            return number

    with working():
        assert order.delay(5).get(timeout=60) == 5
    assert shop.orders == [5]


def test_a_run_enqueued_in_a_steps_transaction_exists_only_if_that_commits(
    pgqrs: Pgqrs, shop: Shop, working: Working
) -> None:
    @pgqrs.task(shared=False)
    def ship(number: int) -> int:
        return number

    parcel = pgqrs.workflow("parcel", ship.s())

    @pgqrs.step(transactional=True)
    def order(ctx: Any, number: int) -> int:
        shop.insert(ctx.connection, number)
        run = parcel.enqueue_using(ctx.connection, number)
        if number == 1:
            raise Boom
        return run.id

    @pgqrs.workflow
    def buy(ctx: Any, number: int) -> int:
        return order(ctx, number)

    with working():
        assert ended(buy.delay(1)).status is Status.FAILED
        kept = buy.delay(2).get(timeout=60)
        assert pgqrs.run(kept).get(timeout=60) == 2
    assert [run.workflow_id for run in pgqrs.monitor.runs(name="parcel")] == [kept]
    assert shop.orders == [2]


def test_a_transactional_task_called_directly_is_a_transaction_as_well(pgqrs: Pgqrs, shop: Shop) -> None:
    @pgqrs.task(transactional=True, shared=False)
    def order(number: int, fail: bool) -> int:
        shop.insert(pgqrs.connection, number)
        if fail:
            raise Boom
        return number

    assert order(1, False) == 1
    with pytest.raises(Boom):
        order(2, True)
    assert shop.orders == [1]


# Compensation


class Trip:
    """Bookings that can be undone, and what became of them."""

    def __init__(self, pgqrs: Pgqrs) -> None:
        self.log: list[str] = []
        self.fails = {"car"}
        self.cannot_undo: set[str] = set()

        def undo(ctx: Any, booked: str) -> None:
            self.log.append(f"undo {booked}")
            if booked in self.cannot_undo:
                raise Boom(f"no way back from {booked}")

        @pgqrs.step(compensate=undo)
        def book(ctx: Any, what: str) -> str:
            self.log.append(f"book {what}")
            if what in self.fails:
                raise Boom(what)
            return what

        @pgqrs.workflow
        def trip(ctx: Any) -> list[str]:
            return [book(ctx, "flight"), book(ctx, "hotel"), book(ctx, "car")]

        self.book, self.trip = book, trip


def test_a_final_failure_undoes_what_was_done_in_reverse_order(pgqrs: Pgqrs, working: Working, inner: Inner) -> None:
    trip = Trip(pgqrs)
    with working():
        run = ended(trip.trip.delay())
        assert run.status is Status.FAILED
        with pytest.raises(Boom, match="car"):
            run.get(timeout=1)
        assert trip.log == ["book flight", "book hotel", "book car", "undo hotel", "undo flight"]
        assert inner(run) == {"book": "CANCELLED", "book#2": "CANCELLED", "book#3": "FAILED"}
        trip.fails.clear()
        trip.log.clear()
        assert run.resume().get(timeout=60) == ["flight", "hotel", "car"]
    assert trip.log == ["book flight", "book hotel", "book car"]


def test_a_failure_that_is_retried_undoes_nothing(pgqrs: Pgqrs, working: Working) -> None:
    log: list[str] = []

    @pgqrs.step(compensate=lambda ctx, value: log.append(f"undo {value}"))
    def book(ctx: Any, what: str) -> str:
        log.append(what)
        if what == "car" and log.count("car") < 2:
            raise Boom
        return what

    @pgqrs.workflow(autoretry_for=(Boom,), retry_kwargs={"countdown": 0.1, "max_retries": 1})
    def trip(ctx: Any, last: str) -> None:
        book(ctx, "flight")
        book(ctx, "car")
        if last:
            raise Boom(last)

    with working():
        trip.delay("").get(timeout=60)
        assert log == ["flight", "car", "car"]
        log.clear()
        assert ended(trip.delay("final")).status is Status.FAILED
    assert log == ["flight", "car", "car", "undo car", "undo flight"]


def test_a_compensation_that_fails_is_noted_and_the_others_go_on(pgqrs: Pgqrs, inner: Inner) -> None:
    trip = Trip(pgqrs)
    trip.cannot_undo = {"hotel"}
    ctx = pgqrs.context("trip")
    with pytest.raises(Boom, match="car") as failure:
        trip.trip(ctx)
    assert trip.log[-2:] == ["undo hotel", "undo flight"]
    assert failure.value.__notes__ == ["step 'book#2' could not be undone: Boom('no way back from hotel')"]
    assert inner(pgqrs.run(ctx.id)) == {"book": "CANCELLED", "book#2": "SUCCESS", "book#3": "FAILED"}


def test_an_async_function_undoes_what_it_has_done(pgqrs: Pgqrs) -> None:
    log: list[str] = []

    async def undo(ctx: Any, booked: str) -> None:
        await ctx.step("refund", log.append, f"undo {booked}")

    @pgqrs.step(compensate=undo)
    async def book(ctx: Any, what: str) -> str:
        return what

    @pgqrs.workflow
    async def trip(ctx: Any) -> None:
        await book(ctx, "flight")
        await book(ctx, "hotel")
        raise Boom

    with pytest.raises(Boom):
        asyncio.run(trip(pgqrs.context(trip)))
    assert log == ["undo hotel", "undo flight"]


def test_a_compensation_may_sleep_and_undoes_everything_once(pgqrs: Pgqrs, working: Working) -> None:
    log: list[str] = []

    def undo(ctx: Any, booked: str) -> None:
        ctx.sleep("grace", seconds=0.1)
        log.append(f"undo {booked}")

    @pgqrs.step(compensate=undo)
    def book(ctx: Any, what: str) -> str:
        log.append(f"book {what}")
        return what

    @pgqrs.workflow
    def trip(ctx: Any) -> None:
        book(ctx, "flight")
        book(ctx, "hotel")
        ctx.step("fail", fail)

    def fail() -> None:
        log.append("fail")
        raise Boom("full")

    with working():
        run = ended(trip.delay())
        with pytest.raises(Boom, match="full"):
            run.get(timeout=1)
    assert log == ["book flight", "book hotel", "fail", "undo hotel", "undo flight"]
