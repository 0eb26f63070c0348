"""Expected errors: a job prints their message without a traceback and exits with status 2 or 1."""

import re
import shlex
import sys
import unicodedata
from pathlib import Path

from crowdray.credentials import redacted

_DISTRIBUTIONS = {
    "azure": "azure-storage-blob azure-identity",
    "google": "google-cloud-storage",
    "MySQLdb": "mysqlclient",
    "psycopg": "'psycopg[binary]'",
    "psycopg2": "psycopg2-binary",
}
"""Packages whose distribution has another name."""

RESUME_HINT = "run the same command again to resume"


class UserError(ValueError):
    """Invalid input from the user; the message shows the value, its location and the fix (exit status 2)."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


class InfeasibleConfigError(UserError):
    """A configuration that cannot be trained; a search fails the trial that sampled it and continues."""


class DataError(UserError):
    """Unusable data: a corrupt file, a wrong hash, an annotation that does not fit its image."""


class JobFailed(RuntimeError):
    """A job that could not finish although its input was valid (exit status 1)."""

    def __init__(self, message: object = "") -> None:
        super().__init__(redacted(str(message)))


def missing_package(error: ImportError) -> str:
    """Return which package an import needs, and the command that installs it."""
    if not error.name:
        return first_line(error)
    name = error.name.partition(".")[0]
    python = shell_path(Path(sys.executable))
    return f"it needs the package {name}: {python} -m pip install {_DISTRIBUTIONS.get(name, name)}"


def shell_path(path: Path) -> str:
    """Return a path for a shell in the current folder, relative to it where it is below."""
    folder = Path.cwd()
    return shlex.quote(str(path.relative_to(folder) if path.is_relative_to(folder) else path))


def first_line(error: BaseException) -> str:
    """The first line of an exception's message, or its type; the same in every process, so without addresses."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, MemoryError):
        lines = lines or ["out of memory"]
    return re.sub(r" at 0x[0-9a-fA-F]+", "", lines[0]) if lines else type(error).__name__


def escaped(text: str) -> str:
    """Text on one line without control characters, which would act on a terminal: "\\n" for a line break."""
    return "".join(
        c if c.isprintable() or unicodedata.category(c) == "Zs" else c.encode("unicode_escape").decode() for c in text
    )
