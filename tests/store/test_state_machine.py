"""The real SQL against the transition table, driven at random by two workers, a relay, a broker and a user.

The run is ``a -> (b, c)`` and ``b -> d``: every step is recorded by its predecessor's owner. Whoever executes a step
may stop at any point, come back after his lease has ended, say a thing twice, or never say it. After every step of
the machine the rows are compared with the model. In the end all faults are switched off, and the run has to close.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from functools import partial
from typing import Any
from uuid import UUID, uuid5

import hypothesis.strategies as st
import pytest
from hypothesis import HealthCheck, Phase, note, settings
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    rule,
    run_state_machine_as_test,
)

from pgqrs_celery.db import Database
from pgqrs_celery.store import leases, recording, runs, steps, units
from pgqrs_celery.store.recording import Finished
from pgqrs_celery.store.results import Outcome
from pgqrs_celery.store.units import Taking
from tests.support.ledger import LEASE, Ledger
from tests.support.model import OPEN_RUN, Model

FOLLOWERS = {"a": ("b", "c"), "b": ("d",), "c": (), "d": ()}
WORKERS = (UUID(int=1), UUID(int=2))
TOKENS = UUID("00000000-0000-5000-8000-000000000000")
BEGINNING = datetime(2030, 1, 1, tzinfo=UTC)

#: The same choices every time, as long as the same modules are loaded: Hypothesis also tries numbers it finds in them.
#: A longer search is one setting away.
SETTINGS = settings(
    max_examples=150,
    stateful_step_count=40,
    derandomize=True,
    database=None,
    deadline=None,
    print_blob=True,
    report_multiple_bugs=False,
    phases=(Phase.explicit, Phase.generate, Phase.shrink),
    suppress_health_check=list(HealthCheck),
)

#: What may happen: its weight, what it is, how it is done.
Choice = tuple[int, str, Callable[[], Any]]

_numbers = itertools.count()


@dataclass(frozen=True, slots=True, order=True)
class Message:
    """A message in the broker."""

    step: str
    generation: int

    def __str__(self) -> str:
        return f"message {self.step}/{self.generation}"


@dataclass(slots=True, eq=False)
class Owner:
    """Somebody who was told EXECUTE or REPLAY; he may have been replaced since."""

    step: str
    generation: int
    token: UUID
    worker: UUID
    fence: int
    said: str | None = None  # the outcome he has committed, or was told

    def __str__(self) -> str:
        return f"owner of {self.step}/{self.generation} at worker {self.worker.int} ({self.said or 'in the body'})"


@dataclass(slots=True)
class World:
    """What is not in the database."""

    broker: list[Message] = field(default_factory=list)
    owners: list[Owner] = field(default_factory=list)
    commits: dict[str, list[str]] = field(default_factory=lambda: {name: [] for name in FOLLOWERS})
    tokens: Any = field(default_factory=itertools.count)


class LedgerMachine(RuleBasedStateMachine):
    """See the module."""

    database: Database
    ledger: Ledger

    @initialize()
    def start(self) -> None:
        number = next(_numbers)
        self.ledger.app = f"shop{number}"
        self.model, self.world = Model(), World()
        self.ledger.set_clock(BEGINNING)
        self.prefix = f"{number}-"
        self.workflow_id = self.ledger.start(self.id("a"))
        assert self.model.record("a") == "SEND"
        self.send("a", 0, True)

    # --- helpers

    def id(self, step: str) -> str:
        return self.prefix + step

    def send(self, step: str, generation: int, publish: bool) -> None:
        if publish:
            self.world.broker.append(Message(step, generation))

    def token(self) -> UUID:
        return uuid5(TOKENS, f"{self.prefix}{next(self.world.tokens)}")

    def record(self, owner: Owner | None, step: str, *, publish: bool, **given: Any) -> str:
        """Record one step; what the statement answers is what the model does."""
        generation, delay = given.pop("generation", 0), given.pop("delay", None)
        token = owner.token if owner else None
        finished, hand_off = given.pop("finished", None), given.pop("hand_off", False)
        new = self.ledger.step(
            self.id(step), generation=generation, delay=delay if delay is not None else 10.0, sent=delay is None
        )
        outcome = self.ledger.record(
            self.workflow_id,
            new,
            lease_token=token,
            finished=Finished(self.id(finished), "1", hand_off) if finished else None,
        )
        expected = self.model.record(
            step, generation=generation, delay=delay, token=token, finished=finished, hand_off=hand_off
        )
        assert outcome == expected, f"record {step}: {outcome}, not {expected}"
        if outcome == "SEND" and delay is None:
            self.send(step, generation, publish)
        return outcome

    def commit(self, owner: Owner, outcome: str) -> None:
        """Somebody's outcome was accepted: nobody else's may have been."""
        if owner.said != outcome:
            self.world.commits[owner.step].append(outcome)
        owner.said = outcome

    # --- the menu

    @rule(choice=st.integers(min_value=0, max_value=2**20))
    def something_happens(self, choice: int) -> None:
        """One of the things that can happen now, the likelier the greater its weight."""
        menu = [*self.of_owners(), *self.of_broker(), *self.of_time(), *self.of_user()]
        number = choice % sum(weight for weight, _, _ in menu)
        for weight, name, act in menu:
            if number < weight:
                note(f"{self.model.now:g} s: {name}")
                act()
                return
            number -= weight

    def of_owners(self) -> Iterator[Choice]:
        for owner in self.world.owners[-4:]:
            for weight, name, act in self.of_owner(owner):
                yield weight, f"{owner}: {name}", act

    def of_owner(self, owner: Owner) -> Iterator[Choice]:
        yield 2, "dies", partial(self.world.owners.remove, owner)
        if owner.said is not None:
            followers = FOLLOWERS[owner.step] if owner.said == "SUCCESS" else ()
            for step in followers:
                yield 2, f"records {step}", partial(self.record, owner, step, publish=True)
                yield 1, f"records {step}, does not send it", partial(self.record, owner, step, publish=False)
            yield 6, "hands off and looks", partial(self.hand_off, owner, close=True)
            yield 2, "hands off", partial(self.hand_off, owner, close=False)
            yield 1, "says it again", partial(self.succeed if owner.said == "SUCCESS" else self.fail, owner)
            return
        yield 3, "succeeds", partial(self.succeed, owner)
        for step in FOLLOWERS[owner.step]:
            for publish in (True, False):
                name = f"succeeds with {step}" + ("" if publish else ", does not send it")
                yield 2, name, partial(self.succeed_with, owner, step, publish)
        if len(FOLLOWERS[owner.step]) == 1:
            (step,) = FOLLOWERS[owner.step]
            yield 2, f"succeeds with {step} and hands off", partial(self.succeed_with, owner, step, True, hand_off=True)
            yield 20, f"succeeds and goes on with {step}", partial(self.go_on, owner, step)
        yield 2, "fails", partial(self.fail, owner)
        for delay in (None, 5.0, 60.0):
            yield 1, f"retries after {delay}", partial(self.retry, owner, delay)
        yield 1, "is replaced", partial(self.replace, owner)
        yield 1, "gives back", partial(self.give_back, owner)
        yield 1, "asks to be ignored", partial(self.drop, owner)
        yield 1, "asks again", partial(self.ask_again, owner)

    def of_broker(self) -> Iterator[Choice]:
        for message in sorted(set(self.world.broker)):
            yield 1, f"{message} is lost", partial(self.world.broker.remove, message)
            yield 3, f"{message} is treated", partial(self.treat, message)
            for worker in WORKERS:
                for keep in (False, True):
                    name = f"{message} comes to worker {worker.int}" + (", and stays" if keep else "")
                    yield 2, name, partial(self.deliver, message, worker, keep)
                name = f"{message} comes to worker {worker.int}, who may not judge"
                yield 1, name, partial(self.deliver, message, worker, True, may_judge=False)

    def of_time(self) -> Iterator[Choice]:
        for seconds in (1.0, 9.0, LEASE / 2, LEASE + 1, 600.0):
            yield 1, f"{seconds:g} s pass", partial(self.time_passes, seconds)
        yield 3, "all leases end, and the relay sends", self.expire_all
        yield 4, "the relay sends", partial(self.relay, publish=True)
        yield 1, "the relay claims and dies", partial(self.relay, publish=False)
        yield 1, "a relay that may not judge sends", partial(self.relay, publish=True, may_judge=False)
        yield 1, "somebody looks whether the run is quiet", self.close_if_quiet
        for worker in WORKERS if self.world.owners else ():
            name = f"worker {worker.int}"
            yield 1, f"{name} renews", partial(self.renew, worker)
            yield (
                1,
                f"{name} is declared dead, but lives",
                partial(self.declare_dead, worker, really=False),
            )
            yield 1, f"{name} dies", partial(self.declare_dead, worker, really=True)
            yield 1, f"{name} stops", partial(self.stop, worker)

    def of_user(self) -> Iterator[Choice]:
        if self.model.status == "FAILED":
            yield 8, "the user resumes", self.resume
        if self.model.status == "CANCELLED":
            yield 4, "the user's cancel goes on", self.cancel_steps
        elif len(self.model.steps) > 1:
            yield 1, "the user cancels", self.cancel
        if self.model.paused:
            yield 8, "the user continues", self.unpause
        else:
            yield 1, "the user pauses", self.pause

    # --- the broker and the workers

    def deliver(self, message: Message, worker: UUID, keep: bool, may_judge: bool = True) -> None:
        if not keep:
            self.world.broker.remove(message)
        self.ask(message, worker, self.token(), may_judge)

    def ask(self, message: Message, worker: UUID, token: UUID, may_judge: bool = True) -> str:
        before = self.model.steps[message.step].status
        got = steps.acquire(
            self.ledger.session,
            self.id(message.step),
            generation=message.generation,
            lease_token=token,
            worker_id=worker,
            lease=LEASE,
            max_lost=self.model.max_lost,
            poison="{}",
            may_judge=may_judge,
        )
        assert got is not None
        expected = self.model.acquire(message.step, message.generation, token, worker, may_judge)
        assert got.verdict == expected, f"acquire {message}: {got.verdict}, not {expected}"
        note(f"  {got.verdict}")
        fence = got.fence if got.fence is not None else -1
        if got.verdict == "EXECUTE":
            assert before in ("QUEUED", "RUNNING"), f"{message} was {before} and is executed"
            assert "SUCCESS" not in self.world.commits[message.step], f"{message} was committed and is executed"
            if got.touch:
                runs.touch(self.ledger.session, self.workflow_id)
                self.model.begin()
            self.world.owners.append(Owner(message.step, message.generation, token, worker, fence))
        elif got.verdict in ("REPLAY", "POISONED"):
            said = self.model.steps[message.step].status
            self.world.owners.append(Owner(message.step, message.generation, token, worker, fence, said))
        elif got.verdict == "PAUSED":
            assert self.ledger.park(self.id(message.step), self.workflow_id) == self.model.park(message.step)
        elif got.verdict == "CANCELLED":
            self.end(message.step, fence)
        return got.verdict

    def ask_again(self, owner: Owner) -> None:
        """The answer was lost."""
        if self.model.steps[owner.step].token == owner.token:
            count = len(self.world.owners)
            self.ask(Message(owner.step, owner.generation), owner.worker, owner.token)
            del self.world.owners[count:]

    def treat(self, message: Message) -> None:
        """Everything goes as it should."""
        self.world.broker.remove(message)
        count = len(self.world.owners)
        self.ask(message, WORKERS[0], self.token())
        if len(self.world.owners) == count:
            return
        owner = self.world.owners.pop()
        if owner.said is None:
            self.succeed(owner)
        for follower in FOLLOWERS[owner.step] if owner.said == "SUCCESS" else ():
            self.record(owner, follower, publish=True)
        self.end(owner.step, owner.fence)

    # --- what an owner says; it is accepted if the table accepts it

    def succeed(self, owner: Owner) -> None:
        accepted = self.ledger.succeed(self.id(owner.step), owner.token)
        assert accepted == self.model.succeed(owner.step, owner.token)
        if accepted:
            self.commit(owner, "SUCCESS")

    def succeed_with(self, owner: Owner, step: str, publish: bool, *, hand_off: bool = False) -> None:
        """One statement for the success and a step that follows."""
        if self.record(owner, step, publish=publish, finished=owner.step, hand_off=hand_off) != "LOST":
            self.commit(owner, "SUCCESS")

    def go_on(self, owner: Owner, step: str) -> None:
        """Whoever ends a step takes the next one himself."""
        taking = Taking(self.token(), owner.worker, LEASE)
        done, taken = units.go_on(
            self.ledger.session,
            app=self.ledger.app,
            lease_token=owner.token,
            output="1",
            outcome=Outcome(self.id(owner.step), "SUCCESS"),
            following=self.ledger.step(self.id(step)),
            taking=taking,
            own_message_id=None,
        )
        expected = self.model.go_on(owner.step, step, owner.token, taking.lease_token, taking.worker_id)
        answer = "TAKEN" if taken else str(done.recorded[0].outcome)
        note(f"  {answer}")
        assert answer == expected, f"go on with {step}: {answer}, not {expected}"
        if done.accepted:
            self.commit(owner, "SUCCESS")
        if taken:
            assert not self.world.commits[step], f"{step} was committed and is taken"
            self.world.owners.append(Owner(step, 0, taking.lease_token, taking.worker_id, fence=1))

    def fail(self, owner: Owner) -> None:
        accepted = self.ledger.fail(self.id(owner.step), owner.token)
        assert accepted == self.model.fail(owner.step, owner.token)
        if accepted:
            self.commit(owner, "FAILED")

    def retry(self, owner: Owner, delay: float | None) -> None:
        self.record(owner, owner.step, publish=True, generation=owner.generation + 1, delay=delay)

    def replace(self, owner: Owner) -> None:
        """The step is replaced by one that stands for its last link: same id, next nesting."""
        generation = ((owner.generation >> 32) + 1) << 32
        with self.ledger.session.connection.transaction():
            accepted = recording.await_replacement(
                self.ledger.session, self.id(owner.step), lease_token=owner.token, generation=generation
            )
            assert accepted == self.model.await_replacement(owner.step, owner.token, generation)
            if accepted:
                self.record(owner, owner.step, publish=True, generation=generation)

    def give_back(self, owner: Owner) -> None:
        accepted = steps.give_back(self.ledger.session, self.id(owner.step), lease_token=owner.token)
        assert accepted == self.model.give_back(owner.step, owner.token)

    def drop(self, owner: Owner) -> None:
        accepted = steps.drop(self.ledger.session, self.id(owner.step), lease_token=owner.token, error="{}")
        assert (accepted is not None) == self.model.drop(owner.step, owner.token)

    def hand_off(self, owner: Owner, *, close: bool) -> None:
        """A step is handed off by whoever committed or replays it, after what follows was recorded."""
        for step in FOLLOWERS[owner.step] if owner.said == "SUCCESS" else ():
            self.record(owner, step, publish=True)
        self.end(owner.step, owner.fence, close)

    def end(self, step: str, fence: int, close: bool = True) -> None:
        handed = steps.hand_off(self.ledger.session, self.id(step), fence=fence)
        assert (handed is not None) == self.model.hand_off(step, fence)
        if close:
            self.close_if_quiet()

    def close_if_quiet(self) -> None:
        closed = self.ledger.close_if_quiet(self.workflow_id)
        assert closed == self.model.close_if_quiet()

    # --- time, relay, keeper, judges

    def time_passes(self, seconds: float) -> None:
        self.model.now += seconds
        self.ledger.set_clock(BEGINNING + timedelta(seconds=self.model.now))

    def relay(self, *, publish: bool, may_judge: bool = True) -> None:
        claimed = self.ledger.claim(may_judge=may_judge, max_lost=self.model.max_lost)
        found = sorted((c.task_id.removeprefix(self.prefix), c.was, c.status) for c in claimed)
        assert found == sorted(self.model.claim(may_judge))
        for step in claimed if publish else ():
            name = step.task_id.removeprefix(self.prefix)
            if (step.was, step.status) == ("RUNNING", "FAILED") or step.status == "CANCELLED":
                self.end(name, step.fence)  # the relay announces it itself
            else:
                self.send(name, step.generation, True)

    def expire_all(self) -> None:
        self.time_passes(LEASE + 1)
        self.relay(publish=True)

    def renew(self, worker: UUID) -> None:
        held = sorted({owner.step for owner in self.world.owners if owner.worker == worker})
        lost = leases.renew(self.ledger.session, map(self.id, held), worker_id=worker, lease=LEASE)
        assert {task_id.removeprefix(self.prefix) for task_id in lost} == self.model.renew(worker, held)

    def declare_dead(self, worker: UUID, *, really: bool) -> None:
        expired = leases.expire(
            self.ledger.session, app=self.ledger.app, worker_id=worker, max_lost=self.model.max_lost, poison="{}"
        )
        assert expired == self.model.expire(worker)
        if really:
            self.world.owners = [owner for owner in self.world.owners if owner.worker != worker]

    def stop(self, worker: UUID) -> None:
        released = leases.release(self.ledger.session, app=self.ledger.app, worker_id=worker)
        assert released == self.model.release(worker)
        self.world.owners = [owner for owner in self.world.owners if owner.worker != worker]

    # --- the user

    def cancel(self) -> None:
        assert runs.cancel(self.ledger.session, self.workflow_id) == self.model.cancel()

    def cancel_steps(self) -> None:
        cancelled = steps.cancel_batch(self.ledger.session, self.workflow_id, batch=10)
        found = {task_id.removeprefix(self.prefix) for task_id, _ in cancelled}
        assert found == self.model.cancel_steps()

    def resume(self) -> None:
        with self.ledger.session.connection.transaction():
            resumed, _ = runs.resume(self.ledger.session, self.workflow_id)
        found = {task_id.removeprefix(self.prefix) for task_id, _, _ in resumed}
        assert found == self.model.resume()
        for step in found:
            self.world.commits[step].clear()

    def pause(self) -> None:
        assert runs.pause(self.ledger.session, self.workflow_id) == self.model.pause()

    def unpause(self) -> None:
        with self.ledger.session.connection.transaction():
            assert runs.unpause(self.ledger.session, self.workflow_id) == self.model.unpause()

    # --- what always holds

    @invariant()
    def sound(self) -> None:
        self.the_rows_are_what_the_table_says_and_none_is_forgotten()
        self.a_step_is_committed_at_most_once()
        self.a_closed_run_has_nothing_open_and_the_right_verdict()
        self.nobody_follows_a_step_that_was_not_committed()

    def the_rows_are_what_the_table_says_and_none_is_forgotten(self) -> None:
        for step, row in self.ledger.rows(self.workflow_id).items():
            name = step.removeprefix(self.prefix)
            seen = replace(
                row,
                due=None if row.due is None else round(row.due, 3),
                message=row.message and "message",
                output=row.output and "output",
                error=row.error and "error",
            )
            expected = self.model.expected(name)
            expected = replace(expected, due=None if expected.due is None else round(expected.due, 3))
            assert seen == expected, f"{name}: {seen} instead of {expected}"
            waits = row.status == "QUEUED" and (self.model.paused or self.model.status == "CANCELLED")
            assert row.due is not None or not row.open or waits, f"{name} is forgotten: {row}"
        status = self.ledger.run_status(self.workflow_id)
        assert status == self.model.status

    def a_step_is_committed_at_most_once(self) -> None:
        for step, commits in self.world.commits.items():
            assert len(commits) <= 1, f"{step} was committed by several: {commits}"

    def a_closed_run_has_nothing_open_and_the_right_verdict(self) -> None:
        if self.model.status in ("SUCCESS", "FAILED"):
            assert self.model.quiet
            assert self.model.status == self.model.verdict

    def nobody_follows_a_step_that_was_not_committed(self) -> None:
        for step, followers in FOLLOWERS.items():
            if any(follower in self.model.steps for follower in followers):
                assert self.model.steps[step].status == "SUCCESS"

    # --- and in the end

    def teardown(self) -> None:
        """With all faults off, relay and workers bring the run to its end."""
        if not hasattr(self, "model"):
            return
        if self.model.paused:
            self.unpause()
        self.world.owners.clear()
        self.world.broker.clear()
        if self.model.status == "CANCELLED":
            self.cancel_steps()  # whoever cancelled may have died half-way; he says it again
        for _ in range(60):
            if self.ended():
                break
            self.time_passes(601.0)
            self.relay(publish=True)
            while self.world.broker:
                self.treat(self.world.broker[0])
            self.back_up()
        assert self.ended(), f"the run is {self.model.status} for ever: {self.model.steps}"
        if self.model.status == "SUCCESS":
            assert {step for step, s in self.model.steps.items() if s.status == "SUCCESS"} == set(FOLLOWERS)

    def ended(self) -> bool:
        return self.model.status not in OPEN_RUN and self.model.quiet

    def back_up(self) -> None:
        found, _ = runs.stuck(self.ledger.session, app=self.ledger.app, after=0, age=2.0, batch=10)
        for workflow_id in found:
            assert workflow_id == self.workflow_id
            self.close_if_quiet()


@pytest.mark.long
def test_the_sql_does_what_the_transition_table_says_and_every_run_ends(database: Database) -> None:
    ledger = Ledger(database)
    machine = type("Machine", (LedgerMachine,), {"database": database, "ledger": ledger})
    try:
        run_state_machine_as_test(machine, settings=SETTINGS)
    finally:
        ledger.close()
