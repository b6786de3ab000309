"""Places inside Postgres where a transaction can be stopped: at its commit, or at a row that a test has locked.

A stopped transaction has done all its work and waits for a lock of the test's. Its client can be killed in the
meantime, and then the test decides what becomes of the transaction: it goes on and commits when the lock is released,
or it is rolled back with its session, as if the client's host had been lost a moment earlier.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, Final, Literal

import psycopg
from psycopg import sql

from tests.support.asking import ask

__all__ = ["FATES", "Fate", "Stops"]

Fate = Literal["commits", "rolls_back"]
FATES: Final[tuple[Fate, ...]] = ("commits", "rolls_back")

#: What can be stopped: tables, and how a row says which task it belongs to.
WATCHED: Final = {
    "message": ("pgqrs_messages", "INSERT", "NEW.headers::json->>'id'"),
    "row": ("pgqrs_workflow_steps", "INSERT", "NEW.task_id"),
    "part": ("pgqrs_chord_parts", "INSERT", "NEW.task_id"),
    "result": ("pgqrs_task_results", "INSERT OR UPDATE", "NEW.task_id"),
}


@dataclass(frozen=True, slots=True)
class Stops:
    """The stops in one schema."""

    dsn: str
    schema: str

    def install(self) -> None:
        """Let transactions be stopped at their commit, and have Postgres itself note what is committed from now on."""
        self._run(
            "CREATE TABLE {0}.committed (what text, task_id text, xid xid8 DEFAULT pg_current_xact_id(), "
            "begun timestamptz DEFAULT now(), at timestamptz DEFAULT clock_timestamp())"
        )
        for what, (table, events, task_id) in WATCHED.items():
            self._run(
                f"CREATE FUNCTION {{0}}.note_{what}() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN "
                f"PERFORM pg_advisory_xact_lock_shared(hashtextextended('{what} of ' || ({task_id}), 0)); "
                f"INSERT INTO {{0}}.committed (what, task_id) VALUES ('{what}', {task_id}); RETURN NULL; END $$"
            )
            self._run(
                f"CREATE CONSTRAINT TRIGGER note_{what} AFTER {events} ON {{0}}.{table} "
                f"DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION {{0}}.note_{what}()"
            )

    def count(self, what: str, task_id: str) -> int:
        """Return how many messages, rows, parts or versions of the result of a task have been committed."""
        ((count,),) = self._run("SELECT count(*) FROM {0}.committed WHERE what = %s AND task_id = %s", what, task_id)
        return int(count)

    def sent_with_its_row(self, task_id: str) -> int:
        """Return how many messages of a task were committed in the very transaction that entered its row.

        A copy that a relay sends later, because nobody has begun the task yet, is not among them.
        """
        ((count,),) = self._run(
            "SELECT count(*) FROM {0}.committed AS r JOIN {0}.committed AS m USING (task_id, xid) "
            "WHERE r.what = 'row' AND m.what = 'message' AND task_id = %s",
            task_id,
        )
        return int(count)

    def copies_after(self, task_id: str) -> list[timedelta]:
        """Return how long after a task's first message, as its transaction began, every further one was committed."""
        found = self._run(
            "SELECT at - min(begun) OVER () FROM {0}.committed WHERE what = 'message' AND task_id = %s "
            "ORDER BY at OFFSET 1",
            task_id,
        )
        return [after for (after,) in found]

    def at(self, what: str, task_id: str) -> AbstractContextManager[Callable[[], list[int]]]:
        """Stop every transaction at its commit that has written a message, row, part or result of a task.

        Yields a function that returns the server's pids of those that wait.
        """
        assert what in WATCHED
        return self.locking("SELECT pg_advisory_xact_lock(hashtextextended(%s, 0))", f"{what} of {task_id}")

    @contextmanager
    def locking(self, statement: str, *parameters: Any) -> Iterator[Callable[[], list[int]]]:
        """Keep the locks that a statement takes; yields a function that returns the server's pids of who waits."""
        with psycopg.connect(self.dsn) as connection:
            locked = connection.execute(self._named(statement), parameters).rowcount
            assert locked == 1, f"{statement} has found {locked} rows"
            waiting = "SELECT pid FROM pg_stat_activity WHERE %s = ANY(pg_blocking_pids(pid))"
            mine = connection.info.backend_pid
            yield lambda: [pid for (pid,) in self._run(waiting, mine)]

    def decide(self, fate: Fate, server_pid: int) -> None:
        """Roll a stopped transaction back, or leave it to commit when the stop ends."""
        if fate == "rolls_back":
            assert self._run("SELECT pg_terminate_backend(%s, 10000)", server_pid) == [(True,)]

    def _named(self, statement: str) -> sql.Composed:
        return sql.SQL(statement).format(sql.Identifier(self.schema))

    def _run(self, statement: str, *parameters: Any) -> list[tuple[Any, ...]]:
        return ask(self.dsn, self._named(statement), parameters)
