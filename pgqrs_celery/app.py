"""Pgqrs(app): the only installer."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cached_property
from typing import TYPE_CHECKING, Any, overload

import psycopg
from celery import Celery
from kombu.serialization import prepare_accept_content

from pgqrs_celery import aliases, ids, inline, lending, urls
from pgqrs_celery import envelope as envelopes
from pgqrs_celery.codec import Codec
from pgqrs_celery.completion import DurableChords
from pgqrs_celery.conf import DSN_VARIABLE, PREFIX, Settings, keys_of
from pgqrs_celery.databases import database_for
from pgqrs_celery.durability import BORROWED
from pgqrs_celery.envelope import MARKER, Envelope
from pgqrs_celery.exceptions import ConfigurationError
from pgqrs_celery.function import FunctionWorkflow, make_step, make_waits, make_workflow
from pgqrs_celery.inline import InlineContext
from pgqrs_celery.joint import own_broker, shares_ledger
from pgqrs_celery.ledger import Ledger
from pgqrs_celery.recorder import Recorder
from pgqrs_celery.send import SendSeam
from pgqrs_celery.session import Session
from pgqrs_celery.store import events, migrations, runs
from pgqrs_celery.task import BorrowedTask, DurableTask
from pgqrs_celery.transactional import transactional
from pgqrs_celery.transport.broker import Broker
from pgqrs_celery.worker import DurabilityStep, GiveBackStep
from pgqrs_celery.workflow import Workflow, WorkflowRun

if TYPE_CHECKING:
    from sqlalchemy.orm import Session as OrmSession

    from pgqrs_celery.monitor import Monitor

__all__ = ["Pgqrs"]

logger = logging.getLogger(__name__)


class Pgqrs:
    """Durable execution for one Celery app.

    Reads its settings from ``app.conf`` (prefix ``pgqrs_``) when they are first needed, so it may be made before the
    app is configured. Overrides sending attributes of the app *instance* and adds a worker bootstep; classes of
    Celery's are left alone, and tasks that are not durable behave as before.
    """

    def __init__(self, app: Celery) -> None:
        if getattr(app, "pgqrs", None) is not None:
            raise ConfigurationError(f"Pgqrs(app) was called twice for app {app.main!r}")
        self.app = app
        owner: Any = app
        owner.pgqrs = self
        recorder = self.recorder = Recorder(app, lambda: self.ledger)
        self.chords = DurableChords(app, lambda: self.ledger, recorder)
        recorder.chords_of = self.chords.taken
        dispatcher = recorder.dispatcher
        dispatcher.broker = lambda: self.broker
        recorder.has_chords = lambda: shares_ledger(app.backend, self.ledger)
        recorder.shared_broker = lambda: self.shared_broker
        self._seam = SendSeam(app, recorder, self.chords.leave_plain, dispatcher.broker)
        #: Waits as links of a canvas: ``pgqrs.sleep.si(hours=6)``, ``pgqrs.wait_for_event.si("approved")``.
        self.sleep, self.wait_for_event = make_waits(self)
        dispatcher.publish = self.publish = self._seam.publish
        dispatcher.own_producer = self._seam.own_producer
        self._seam.install()
        app.steps["worker"].add(DurabilityStep)
        app.steps["consumer"].add(GiveBackStep)
        app.on_after_configure.connect(self._configure_broker, weak=False)
        app.on_after_finalize.connect(self._borrow, weak=False)

    def task(self, *args: Any, **options: Any) -> Any:
        """Make a function a durable task; takes every option of ``app.task``.

        With ``transactional=True`` what the body writes on ``pgqrs.connection`` or ``pgqrs.session`` is committed
        together with its success.
        """
        if options.pop("transactional", False):
            return lambda function: self.task(**options)(transactional(self, function))
        options.setdefault("shared", False)  # in another app of the process there would be no ledger behind it
        base = options.setdefault("base", DurableTask)
        if not issubclass(base, DurableTask):
            raise ConfigurationError(f"the base of a durable task must derive from DurableTask; {base!r} does not")
        return self.app.task(*args, **options)

    def signature(self, name: str, *args: Any, **options: Any) -> Any:
        """Return a signature of a durable task that this service knows only by name."""
        signature = self.app.signature(name, *args, **options)
        signature.options["headers"] = {MARKER: 1, **(signature.options.get("headers") or {})}
        return signature

    @overload
    def workflow(self, name: str, canvas: Any, /) -> Workflow: ...
    @overload
    def workflow(self, function: Callable[..., Any], /) -> FunctionWorkflow: ...
    @overload
    def workflow(self, /, **options: Any) -> Callable[[Callable[..., Any]], FunctionWorkflow]: ...

    def workflow(self, name: Any = None, canvas: Any = None, /, **options: Any) -> Any:
        """Give a canvas a name, or make a function a workflow (as a decorator, bare or with a task's options).

        Its runs can be started with a key, followed, resumed and cancelled.
        """
        if callable(name):
            return make_workflow(self, name)
        if name is None:
            return lambda function: make_workflow(self, function, **options)
        return Workflow(self, name, canvas)

    def step(self, function: Callable[..., Any] | None = None, /, **options: Any) -> Any:
        """Make a function a step of workflow functions; bare, or with options.

        ``step_id``, ``compensate(ctx, value)``, ``transactional``, and those of the Celery task that executes the
        step where ``ctx.gather`` or ``ctx.start`` send it.
        """
        if function is None:
            return lambda decorated: make_step(self, decorated, **options)
        return make_step(self, function, **options)

    def context(
        self, workflow: str | Workflow | None = None, argument: Any = None, *, run: int | None = None, **options: Any
    ) -> InlineContext:
        """Return a context to execute a workflow function in this process: a new run's, or that of an existing one.

        ``pipeline(pgqrs.context("pipeline"), url)`` executes a new run; ``context(run=7)`` resumes run 7. The option
        ``workflow_key`` names the new run, and finds it again.
        """

        def outcome(workflow_id: int) -> Any:
            return self.run(workflow_id).get()

        if run is not None:
            return inline.reopen(self.ledger, run, outcome=outcome)
        if workflow is None:
            raise TypeError("context() needs the name of a workflow, or run=…")
        name = workflow if isinstance(workflow, str) else workflow.name
        return inline.create(self.ledger, name, argument, outcome=outcome, **options)

    def emit(self, run: WorkflowRun | int, name: str, payload: Any = None) -> bool:
        """Tell a run that something has happened; False where it has been told this before: the first payload stays.

        Raises ``RunNotFound``.
        """
        workflow_id = run if isinstance(run, int) else run.id
        text = self.ledger.values.dump(payload)
        return self.ledger.call(lambda session: events.emit(session, workflow_id, name, text), transaction=True)

    @property
    def connection(self) -> psycopg.Connection[Any]:
        """The connection of the transactional task or step that is being executed."""
        return lending.current().connection

    @property
    def session(self) -> OrmSession:
        """The same transaction as a SQLAlchemy session."""
        return lending.current().session

    def run(self, workflow_id: int) -> WorkflowRun:
        """Return the handle of a run by its id."""
        return WorkflowRun(self, workflow_id)

    def run_of(self, result: Any) -> WorkflowRun | None:
        """Return the run that a Celery result (or a root task id) started, None where it started none."""
        result_id = getattr(result, "id", result)
        while getattr(result, "parent", None) is not None:
            result = result.parent
            result_id = result.id
        found = self.ledger.call(lambda session: runs.find(session, root_id=str(result_id)))
        return WorkflowRun(self, found.workflow_id) if found else None

    def install(self) -> list[str]:
        """Install or upgrade the schema; returns the names of the migrations applied."""
        return migrations.install(self.ledger.database)

    @cached_property
    def settings(self) -> Settings:
        """The settings found in ``app.conf``; raises ``ConfigurationError``."""
        return Settings.read(self.app.conf)

    @cached_property
    def ledger(self) -> Ledger:
        """The app's ledger."""
        settings, conf = self.settings, self.app.conf
        namespace = settings.namespace or self.app.main or "celery"
        dsn = self._dsn()
        return Ledger(
            settings=settings,
            app=namespace,
            values=Codec(conf.result_serializer, conf.accept_content, settings.max_result_bytes),
            database=database_for(dsn, settings),
            channel=ids.relay_channel(settings.schema, namespace),
        )

    @cached_property
    def broker(self) -> Broker | None:
        """The broker where it is ours, else None."""
        # Another thread may be in the middle of configuring the app, at its first use.
        self._configure_broker()
        return own_broker(self.app)

    @cached_property
    def shared_broker(self) -> Broker | None:
        """The broker where it is ours and in the ledger's database, else None."""
        broker = self.broker
        return broker if broker is not None and broker.database is self.ledger.database else None

    @cached_property
    def monitor(self) -> Monitor:
        """The read side."""
        from pgqrs_celery.monitor import Monitor

        self.ledger.prepare()
        return Monitor(self.ledger.database)

    def _dsn(self) -> str:
        conf = self.app.conf
        return (
            self.settings.dsn
            or os.environ.get(DSN_VARIABLE)
            or urls.dsn_of(conf.result_backend)
            or self._broker_dsn()
            or ""
        )

    def _broker_dsn(self) -> str | None:
        """Return the DSN of the broker's URL, empty where that names none; None where the broker is not ours."""
        conf = self.app.conf
        if not aliases.names_transport(conf.broker_transport):
            return urls.dsn_of(conf.broker_url)
        return urls.parse(conf.broker_url.split(";", 1)[0]).dsn if conf.broker_url else ""

    def _configure_broker(self, **_: Any) -> None:
        """Let our own broker use the app's ``pgqrs_`` settings where its URL does not say otherwise."""
        conf = self.app.conf
        ours = {key: conf[key] for key in keys_of(conf) if key.startswith(PREFIX) and conf[key] is not None}
        if ours and self._broker_dsn() is not None:
            conf.broker_transport_options = {**ours, **(conf.broker_transport_options or {})}

    def _borrow(self, **_: Any) -> None:
        """Make Celery's own tasks durable where their messages are."""
        for name in BORROWED:
            task: Any = self.app.tasks[name]
            known = type(task)
            if not issubclass(known, BorrowedTask):
                task.__class__ = type(known.__name__, (BorrowedTask, known), {"__module__": known.__module__})

    def read_message(self, session: Session, workflow_id: int, message: str) -> Envelope:
        """Return a stored message of a run."""
        values = self.ledger.values
        plan = None
        if '"plan": [' in message:
            plan = envelopes.load_plan(runs.plan(session, workflow_id), values)
        return Envelope.load(message, set(prepare_accept_content(self.app.conf.accept_content) or ()), plan)

    #: Publishes one message with Celery's own sender.
    publish: Callable[..., Any]
