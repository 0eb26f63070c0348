"""Damaged files of every stored kind end in a UserError or in a right result.

`python -m tests.fuzz --mutations 200000` runs many more cases, in processes with limited memory and time.
"""

import time
from pathlib import Path

import pytest

from crowdray.errors import UserError

from .support.fuzz_targets import TARGETS
from .support.mutations import damage

pytestmark = pytest.mark.slow


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TARGETS)
def test_reading_damaged_files_raises_user_error_or_is_right(
    name: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    target = TARGETS[name]
    (tmp_path / "made").mkdir()
    files = target.make(tmp_path / "made")
    target.check(files, tmp_path / "valid")
    until = time.monotonic() + request.config.getoption("--fuzz-seconds")
    case = rejected = 0
    while case < 5 or time.monotonic() < until:
        damaged = damage(name, files, case)
        try:
            target.check(damaged, tmp_path / "damaged")
        except UserError as error:
            assert str(error)
            rejected += 1
        except Exception as error:
            pytest.fail(f"{name}, case {case}: {type(error).__name__}: {error}")
        case += 1
    assert rejected or case < 50
