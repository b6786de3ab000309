"""Workflow functions as Celery tasks: one durable task per execution, its steps recorded in its run.

A function that waits is parked in the ledger and its message ends as *ignored*; the relay sends it again when the wait
is over, and the function runs from its beginning past everything that is recorded.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Final, NoReturn

from celery import _state
from celery.exceptions import Ignore

from pgqrs_celery import execution, inline
from pgqrs_celery.bodies import first_task
from pgqrs_celery.calls import Call
from pgqrs_celery.circumstances import starting
from pgqrs_celery.context import Context
from pgqrs_celery.envelope import MARKER, WAITER
from pgqrs_celery.exceptions import ConfigurationError, LeaseLost, StepMisused, StoreUnavailable, Suspended
from pgqrs_celery.execution import Execution, Phase
from pgqrs_celery.inline import InlineContext, prepared
from pgqrs_celery.journal import Journal
from pgqrs_celery.step import Step, StepCall
from pgqrs_celery.store import inner
from pgqrs_celery.store.inner import Owner
from pgqrs_celery.task import DurableTask
from pgqrs_celery.transactional import committed
from pgqrs_celery.waits import Pending
from pgqrs_celery.workflow import Workflow, WorkflowRun

if TYPE_CHECKING:
    from pgqrs_celery.app import Pgqrs

__all__ = ["FunctionTask", "FunctionWorkflow", "make_step", "make_waits", "make_workflow"]

logger = logging.getLogger(__name__)

#: Seconds that is waited for what runs beside a function that has come to the end of what is recorded.
LOOKING_BACK: Final = 10.0


class FunctionTask(DurableTask):
    """A durable task whose body gets a context as its first argument."""

    abstract = True
    pgqrs_kind = "function"
    #: The function itself, which the task's body calls with a context.
    pgqrs_function: Callable[..., Any]

    def undo(self, running: Execution, error: Exception, args: Any, kwargs: Any) -> None:
        """Undo what former executions of the function have done."""
        undo(self.pgqrs_function, self, running, error, args, kwargs)


class WorkerHost:
    """A worker as the place where a function is executed."""

    sends = True

    def __init__(self, task: FunctionTask, running: Execution) -> None:
        self.task = task
        self.running = running
        self.request = running.request

    def open(self) -> Journal:
        """Read what is recorded; nothing is, the first time the function is executed."""
        guard = self.running.guard
        owner = Owner(guard.workflow_id, guard.ledger.app, guard.task_id, str(guard.lease_token), guard.generation)
        prefix = "" if self._is_whole_run() else f"{guard.step_id}/"
        recorded: Sequence[inner.Inner] = ()
        if guard.fence > 1:
            recorded = guard.ledger.call(
                lambda session: inner.load(session, guard.workflow_id, prefix), patience=guard.ledger.settings.patience
            )
        return Journal(guard.ledger, owner, prefix, recorded, reserved=guard.step_id, parks=True)

    def _is_whole_run(self) -> bool:
        """Whether the function is all there is to its run: then its steps need no prefix to be told apart."""
        followed = self.request.chain or self.request.chord or self.request.callbacks
        return self.running.guard.task_id == self.running.guard.root_id and not followed

    def prepared(self, call: Any) -> Call:
        """Return a call as it would be made here; its name is what matters."""
        return prepared(call)

    def send(self, calls: Sequence[tuple[Any, Pending]]) -> None:
        """Send calls as tasks of the run, recorded together before the first is published."""
        with self.task.app.producer_or_acquire():
            for call, pending in calls:
                signature = signature_of(call)
                headers = {
                    **(signature.options.get("headers") or {}),
                    MARKER: pending.step_id,
                    WAITER: self.running.guard.task_id,
                }
                signature.apply_async(task_id=pending.key, headers=headers, add_to_parent=False)

    def start(self, workflow: Any, args: Sequence[Any], kwargs: Mapping[str, Any], key: str) -> tuple[int, str]:
        """Start a run of another workflow that wakes this function when it ends."""
        task_id = self.running.guard.task_id
        started: tuple[int, str] = workflow.start_child(args, kwargs, workflow_key=key, parent_task_id=task_id)
        return started

    def outcome(self, workflow_id: int) -> Any:
        """Return the result of a run that has ended."""
        return WorkflowRun(self.task.app.pgqrs, workflow_id).get(timeout=0)  # type: ignore[attr-defined]

    @contextmanager
    def in_thread(self) -> Iterator[None]:
        """Let Celery see, in another thread, which task is being executed."""
        if _state.get_current_worker_task() is not None:
            yield
            return
        _state._task_stack.push(self.task)  # type: ignore[attr-defined]
        self.task.request_stack.push(self.request)
        try:
            yield
        finally:
            self.task.request_stack.pop()
            _state._task_stack.pop()  # type: ignore[attr-defined]


def signature_of(call: Any) -> Any:
    """Return the signature of what is to be sent; raises ``StepMisused`` where there is none."""
    if not isinstance(call, StepCall):
        return call
    if call.step.task is None:
        raise StepMisused(f"step {call.step.name!r} has no Celery task: decorate it with the @step of a Pgqrs(app)")
    return call.step.task.s(*call.args, **call.kwargs)


def body_of(function: Callable[..., Any], *, transactional: bool = False) -> Callable[..., Any]:
    """Return the body of the Celery task that executes a function with a context."""

    @functools.wraps(function)
    def run(self: FunctionTask, *args: Any, **kwargs: Any) -> Any:
        running = execution.of_request(self.request)
        if running is not None:
            return execute(function, self, running, args, kwargs, transactional=transactional)
        # Eager: there is no worker whose lease this could be, so the calling process executes a run of its own.
        context = eager_context(self, function.__name__, {"args": args, "kwargs": kwargs})
        work = in_transaction(function) if transactional else function
        return settled(inline.call(work, context, args, kwargs))

    return run


def eager_context(task: FunctionTask, name: str, argument: Any) -> InlineContext:
    """Return the context of the run that a named workflow is starting, or of a new one; of the same in a retry."""
    pgqrs: Pgqrs = task.app.pgqrs  # type: ignore[attr-defined]
    spec = starting.get()
    if spec is None or (task.request.headers or {}).get(MARKER) != whole(spec.name):
        return pgqrs.context(name, argument)
    if spec.workflow_id is None:
        context = pgqrs.context(spec.name, argument, workflow_key=spec.workflow_key)
        spec.workflow_id = context.id
        return context
    return pgqrs.context(run=spec.workflow_id)


def whole(name: str) -> str:
    """Return the step id of a function that is a whole workflow: no step can have it, for "()" is not in a name."""
    return f"{name}()"


def in_transaction(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that calls another as its only, transactional, step."""

    def step(ctx: Context, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        call = Call(function.__name__, functools.partial(function, ctx), args, kwargs, transactional=True)
        return ctx.perform(call)

    async def async_work(ctx: Context, *args: Any, **kwargs: Any) -> Any:
        return await step(ctx, args, kwargs)

    def work(ctx: Context, *args: Any, **kwargs: Any) -> Any:
        return step(ctx, args, kwargs)

    return async_work if inspect.iscoroutinefunction(function) else work


def settled(value: Any) -> Any:
    """Return a value, or what an awaitable comes to."""
    if not inspect.isawaitable(value):
        return value

    async def awaited() -> Any:
        first_task.set(asyncio.current_task())
        return await value

    return asyncio.run(awaited())


def execute(
    function: Callable[..., Any],
    task: FunctionTask,
    running: Execution,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
    *,
    transactional: bool = False,
) -> Any:
    """Execute a function in a worker; ends as *ignored* where it was parked or lost."""
    guard = running.guard
    context, journal = opened(function, task, running)
    ended: BaseException | None
    running.give_up = functools.partial(give_up, running, context)

    def body() -> Any:
        return settled(function(context, *args, **kwargs))

    try:
        value = committed(guard.ledger.database, running, body) if transactional else body()
    except BaseException as error:
        ended = journal.ended
        if ended is None:
            raise
        logger.debug("%s ends with %r", guard, error)
    else:
        ended = journal.ended
        if ended is None:
            return value
    leave(running, ended)


def opened(function: Callable[..., Any], task: FunctionTask, running: Execution) -> tuple[Context, Journal]:
    """Return the context for an execution, and its journal."""
    guard = running.guard
    is_async = inspect.iscoroutinefunction(function)
    context = Context(guard.workflow_id, guard.workflow_name, WorkerHost(task, running), is_async=is_async)
    try:
        return context, context.journal
    except StoreUnavailable as error:
        leave(running, error)


def undo(
    function: Callable[..., Any],
    task: FunctionTask,
    running: Execution,
    error: Exception,
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> None:
    """Compensate what is recorded of a function that has ended outside of its own code.

    What there is to undo, only the function knows: it is executed past everything recorded, and nothing more.
    """
    context, journal = opened(function, task, running)
    journal.looks_back = True
    try:
        settled(looking_back(function, context, args, kwargs))
    except (Exception, Suspended, LeaseLost) as end:  # noqa: BLE001 - how the function ended was decided before
        if isinstance(journal.ended, LeaseLost | StoreUnavailable):
            leave(running, journal.ended)
        logger.debug("%s: looking back ends with %r", running.guard, end)
    journal.turn()
    give_up(running, context, error)


def looking_back(function: Callable[..., Any], context: Context, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """Call a function; what runs beside it in its event loop comes to its end, too, before it is cut off."""
    if not context.is_async:
        return function(context, *args, **kwargs)

    async def to_the_end() -> None:
        first = asyncio.ensure_future(function(context, *args, **kwargs))
        await asyncio.wait([first])
        beside = asyncio.all_tasks() - {asyncio.current_task(), first}
        if beside:
            await asyncio.wait(beside, timeout=LOOKING_BACK)
        await first

    return to_the_end()


def leave(running: Execution, ended: BaseException) -> NoReturn:
    """End an execution that is not the function's end."""
    if isinstance(ended, LeaseLost):
        raise ended
    running.phase = Phase.SUPERSEDED
    if isinstance(ended, Suspended):
        logger.info("%s: %s", running.guard, ended)
    else:
        logger.error("%s: it goes on when its lease has ended and the database is back: %s", running.guard, ended)
    raise Ignore(str(ended)) from ended


def give_up(running: Execution, context: Context, error: Exception) -> None:
    """The function has failed for good: compensate what it has done."""
    try:
        settled(context.compensate(error))
    except (Suspended, LeaseLost, StoreUnavailable) as ended:
        if isinstance(ended, LeaseLost):
            running.lose()
            raise Ignore(str(ended)) from ended
        leave(running, ended)


class FunctionWorkflow(Workflow):
    """A function under a name: ``delay()`` starts a run in the workers, a call with a context executes it here."""

    def __init__(self, pgqrs: Pgqrs, name: str, function: Callable[..., Any], task: Any) -> None:
        self.pgqrs = pgqrs
        self.name = name
        self.function = function
        #: The Celery task; its signatures are links of canvases like any other's.
        self.task = task
        functools.update_wrapper(self, function)

    def __repr__(self) -> str:
        return f"<FunctionWorkflow {self.name}>"

    @property
    def canvas(self) -> Any:
        """The canvas that a run executes: the function's task."""
        return self.task.s()

    def named(self) -> Any:
        """Return the canvas with its step id."""
        signature = self.task.s()
        signature.options["headers"] = {MARKER: whole(self.name)}
        return signature

    def __call__(self, ctx: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Execute the function in this process; with the context of another function, as a part of it."""
        if isinstance(ctx, InlineContext):
            return inline.call(self.function, ctx, args, kwargs)
        if isinstance(ctx, Context):
            return self.function(ctx, *args, **kwargs)
        raise StepMisused(
            f"workflow {self.name!r} is called with a context, as in {self.name}(pgqrs.context({self.name!r}), …); "
            f"{self.name}.delay(…) starts a run in the workers"
        )

    def s(self, *args: Any, **kwargs: Any) -> Any:
        """Return a signature: the function as a link of a canvas."""
        return self.task.s(*args, **kwargs)

    def si(self, *args: Any, **kwargs: Any) -> Any:
        """Return an immutable signature."""
        return self.task.si(*args, **kwargs)


def make_task(
    pgqrs: Pgqrs, function: Callable[..., Any], options: dict[str, Any], *, transactional: bool = False
) -> Any:
    """Register the Celery task of a function that takes a context."""
    base = options.setdefault("base", FunctionTask)
    options.setdefault("shared", False)
    if not issubclass(base, FunctionTask):
        raise ConfigurationError(f"the base of a workflow's task must derive from FunctionTask; {base!r} does not")
    app: Any = pgqrs.app
    header = app.type_checker(function, bound=True)
    options["pgqrs_function"] = staticmethod(function)
    return app.task(bind=True, __header__=header, **options)(body_of(function, transactional=transactional))


def make_workflow(pgqrs: Pgqrs, function: Callable[..., Any], **options: Any) -> FunctionWorkflow:
    """Make a function a workflow; options are those of a Celery task."""
    name = options.get("name") or function.__name__
    return FunctionWorkflow(pgqrs, name, function, make_task(pgqrs, function, options))


def make_step(
    pgqrs: Pgqrs,
    function: Callable[..., Any],
    *,
    step_id: str | None = None,
    compensate: Callable[..., Any] | None = None,
    transactional: bool = False,
    **options: Any,
) -> Step:
    """Make a function a step that can also be executed as a Celery task of its own; further options are that task's."""
    step = Step(function, step_id=step_id, compensate=compensate, transactional=transactional)
    step.task = make_task(pgqrs, function, options, transactional=transactional)
    return step


def make_waits(pgqrs: Pgqrs) -> tuple[Any, Any]:
    """Register the waits that are links of a canvas: a sleep that passes its argument on, and an event's payload."""

    def sleep(ctx: Context, value: Any = None, **length: float) -> Any:
        ctx.sleep("sleep", **length)
        return value

    def wait_for_event(ctx: Context, *arguments: Any, timeout: float | None = None) -> Any:
        return ctx.wait_for_event(arguments[-1], timeout)

    return (
        make_task(pgqrs, sleep, {"name": "pgqrs.sleep"}),
        make_task(pgqrs, wait_for_event, {"name": "pgqrs.wait_for_event"}),
    )
