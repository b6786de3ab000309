"""What steps and activities raise to say whether trying again makes sense; the classes survive being recorded.

An error of any other class is tried again, as long as the retry policy allows.
"""

from __future__ import annotations

from pgqrs_celery.exceptions import StepError

__all__ = ["ActivityError", "FatalActivityError", "FatalTaskError", "RetryableActivityError", "TaskError"]


class TaskError(StepError):
    """An error of a step: ``raise TaskError.retryable(message)`` or ``TaskError.fatal(message)``."""

    @staticmethod
    def retryable(message: str) -> TaskError:
        """Return an error after which the step is tried again, until its retry policy says no."""
        return TaskError(message)

    @staticmethod
    def fatal(message: str) -> TaskError:
        """Return an error that ends the run at once."""
        return FatalTaskError(message)


class FatalTaskError(TaskError):
    """The step is not tried again; the run is FAILED."""


class ActivityError(StepError):
    """An error of an activity, with a code for programs and a message for people.

    ``ctx.call`` raises it in the step once the activity is not tried any more; left alone there, it ends the run.
    """

    def __init__(self, code: str, message: str) -> None:
        super().__init__(code, message)
        self.code = code
        self.message = message

    def __str__(self) -> str:
        return f"{self.code}: {self.message}"

    @staticmethod
    def retryable(code: str, message: str) -> ActivityError:
        """Return an error after which the activity is tried again, until its retry policy says no."""
        return RetryableActivityError(code, message)

    @staticmethod
    def fatal(code: str, message: str) -> ActivityError:
        """Return an error after which the activity is not tried again."""
        return FatalActivityError(code, message)


class RetryableActivityError(ActivityError):
    """Trying again may help."""


class FatalActivityError(ActivityError):
    """Trying again cannot help."""
