"""Which code a run was made with."""

import os
import subprocess
from pathlib import Path

UNKNOWN = "unknown"


def git_revision(folder: Path) -> str:
    """The commit of the repository that holds `folder`, with "+dirty" if tracked files differ from it.

    Where there is no repository, as on a cluster that got the working tree without its history, this is
    $CROWDRAY_GIT_REVISION, else "unknown".
    """
    told = os.environ.get("CROWDRAY_GIT_REVISION", "")
    commit = _git(folder, "rev-parse", "HEAD")
    if not commit:
        return told or UNKNOWN
    return f"{commit}+dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else commit


def _git(folder: Path, *arguments: str) -> str:
    try:
        done = subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
