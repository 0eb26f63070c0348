"""Git revision of the code."""

import os
import subprocess
from pathlib import Path

UNKNOWN = "unknown"


def git_revision(folder: Path) -> str:
    """Return the commit of the repository of `folder`, with "+dirty" if tracked files differ from it.

    Without a repository, as on a cluster that received the working tree only, it is $CROWDRAY_GIT_REVISION, else
    "unknown".
    """
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return os.environ.get("CROWDRAY_GIT_REVISION") or UNKNOWN
    return f"{commit}+dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str:
    try:
        result = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return result.stdout.strip() if result.returncode == 0 else ""
