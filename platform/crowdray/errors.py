"""Expected errors: a job prints their message without a traceback and exits with status 2 or 1."""

RESUME_HINT = "run the same command again to resume"


class UserError(ValueError):
    """Invalid input from the user; the message shows the value, its location and the fix (exit status 2)."""


class InfeasibleConfigError(UserError):
    """A configuration that cannot be trained; a search fails the trial that sampled it and continues."""


class DataError(UserError):
    """Unusable data: a corrupt file, a wrong hash, an annotation that does not fit its image."""


class JobFailed(RuntimeError):
    """A job that could not finish although its input was valid (exit status 1)."""
