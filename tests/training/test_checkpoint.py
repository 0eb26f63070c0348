"""A full disk while a checkpoint is written."""

import errno
import os

import pytest

from crowdray.errors import UserError
from crowdray.training.checkpoint import disk_full_as_user_error


def test_disk_full_as_user_error_translates_a_full_disk_only() -> None:
    with (
        pytest.raises(UserError, match=r"no space left for s3://b/run, or in .*; free some, try again"),
        disk_full_as_user_error("s3://b/run", "try again"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(OSError, match="refused"), disk_full_as_user_error("s3://b/run", "try again"):
        raise OSError(errno.ECONNREFUSED, "refused")
