"""Temporary folders that only their user can enter, and that a later process removes if their owner was killed.

    crowdray-XXXXXXXX/.crowdray-owner     id of the process that owns the folder, which keeps this file locked
    crowdray-XXXXXXXX/<purpose>/          its files

The lock is the operating system's, so it ends with the owner and its forks, however they end.
"""

import contextlib
import fcntl
import functools
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from crowdray.storage.process import process_id

PARENT = "CROWDRAY_SCRATCH"
"""Environment variable: where to create such folders instead of the system's folder for temporary files."""

_PREFIX, _OWNER = "crowdray-", ".crowdray-owner"
_ATTEMPTS, _DELAY_S = 25, 0.2
"""Attempts to remove a folder, as processes that are ending may still write into it."""


@contextlib.contextmanager
def scratch_folder(purpose: str, parent: str | None = None) -> Iterator[Path]:
    """Yield an empty folder named `purpose`, which is removed afterwards.

    The first one of a process in each parent folder also removes those of killed processes there.
    """
    above = Path(parent or os.environ.get(PARENT) or tempfile.gettempdir())
    _clean_once(above)
    folder, owner = _create(above)
    try:
        (folder / purpose).mkdir()
        yield folder / purpose
    finally:
        _remove(folder)
        os.close(owner)


def remove_orphans(parent: Path) -> None:
    """Remove this user's folders whose owner has ended."""
    for marker in parent.glob(f"{_PREFIX}*/{_OWNER}"):
        with contextlib.suppress(OSError):  # another user's, removed meanwhile, or in use
            owner = os.open(marker, os.O_RDWR | os.O_NOFOLLOW)
            try:
                fcntl.flock(owner, fcntl.LOCK_EX | fcntl.LOCK_NB)
                status = marker.parent.lstat()
                if stat.S_ISDIR(status.st_mode) and status.st_uid == os.getuid():  # neither a link nor another user's
                    _remove(marker.parent)
            finally:
                os.close(owner)


_clean_once = functools.cache(remove_orphans)


def _create(parent: Path) -> tuple[Path, int]:
    """Create a folder, and return it with the descriptor that keeps its marker locked."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=_PREFIX, dir=parent))  # with mode 0700
        owner = os.open(folder / _OWNER, os.O_CREAT | os.O_RDWR, 0o600)
        with contextlib.suppress(OSError):  # a file system without locks, on which no folder is removed
            fcntl.flock(owner, fcntl.LOCK_EX)
        if (folder / _OWNER).exists():  # else it was removed before it was locked
            os.write(owner, f"{process_id(os.getpid()) or os.getpid()}\n".encode())
            return folder, owner
        os.close(owner)


def _remove(folder: Path) -> None:
    for _ in range(_ATTEMPTS):
        # The marker goes last: what this process cannot finish, the next one does.
        for entry in list(folder.iterdir()) if folder.exists() else []:
            if entry.name != _OWNER:
                shutil.rmtree(entry, ignore_errors=True)
        shutil.rmtree(folder, ignore_errors=True)
        if not folder.exists():
            return
        time.sleep(_DELAY_S)
