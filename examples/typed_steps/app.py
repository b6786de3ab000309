"""The workflow: what you would write, and what ``celery -A examples.typed_steps.app worker`` would execute."""

from __future__ import annotations

from dataclasses import dataclass

from celery import Celery

from pgqrs_celery import Pgqrs
from pgqrs_celery.compat.underway import Activity, ActivityError, RetryPolicy, StepContext, To, Workflow

app = Celery("examples.typed_steps.app", broker="pgqrs://", backend="pgqrs://")
pgqrs = Pgqrs(app)


@dataclass
class Signup:
    """Somebody wants an account."""

    user_id: int


@dataclass
class Welcome:
    """Somebody is to be welcomed."""

    user_id: int
    email: str


class LookupEmail(Activity):
    """Ask the directory, which is busy the first time."""

    NAME = "lookup-email"
    Input = int
    Output = str
    RETRY = RetryPolicy(max_attempts=3, initial_interval=0.1)

    def __init__(self, directory: dict[int, str]) -> None:
        self.directory = directory
        self.asked = 0

    def execute(self, user_id: int) -> str:
        """Return the address; raises ``ActivityError``."""
        self.asked += 1
        if self.asked == 1:
            raise ActivityError.retryable("busy", "the directory does not answer")
        if user_id not in self.directory:
            raise ActivityError.fatal("missing_user", f"no user {user_id}")
        print(f"[lookup-email] user {user_id} found, asked {self.asked} times")
        return self.directory[user_id]


class TrackSignup(Activity):
    """Count it; nobody waits for that."""

    NAME = "track-signup"
    Input = str
    Output = None

    async def execute(self, email: str) -> None:
        """Print what would be counted."""
        print(f"[track-signup] {email}")


def find(cx: StepContext, signup: Signup) -> To:
    """Find the address. The step is suspended during the call, and executed again after it."""
    email = cx.call(LookupEmail, "lookup", signup.user_id)
    return To.next(Welcome(signup.user_id, email), delay=0.2)


async def welcome(cx: StepContext, letter: Welcome) -> To:
    """Write the letter, and have the signup counted."""
    print(f"[welcome] {letter.email}")
    await cx.emit(TrackSignup, "track", letter.email)
    return To.done({"welcomed": letter.email})


signup = (
    Workflow.builder()
    .activity(LookupEmail({42: "ada@example.org"}))
    .activity(TrackSignup)
    .step(find)
    .step(welcome)
    .name("signup")
    .app(pgqrs)
    .build()
)
