"""The test split is read once for a protocol."""

from pathlib import Path

import pytest

from crowdray.ablation.reads import TEST_READ_FILE, Read, ReadLog, reads_by_others
from crowdray.errors import DataError, UserError

FIRST = ReadLog("digest", (Read("2026-01-01T00:00:00+00:00", "abc", "ablate", ("none_1", "all_1")),))


def test_check_allows_first_read_and_completion_of_interrupted_one() -> None:
    assert ReadLog("digest").check(["none_1", "all_1"], "", "runs/a")
    assert not FIRST.check(["all_1", "none_1"], "", "runs/a")
    assert not FIRST.check(["all_1", "none_1"], "curiosity", "runs/a")


def test_check_refuses_second_read_without_reason() -> None:
    with pytest.raises(UserError, match=r"already read for runs/a.*2 more, such as all_2.*--read-test-again"):
        FIRST.check(["none_1", "all_1", "none_2", "all_2"], "", "runs/a")
    assert FIRST.check(["none_1", "all_1", "none_2", "all_2"], "a reviewer asked for two seeds", "runs/a")


def test_check_refuses_some_of_the_cells_that_were_read() -> None:
    with pytest.raises(UserError, match="all_1"):
        FIRST.check(["none_1"], "a reason", "runs/a")


def test_read_log_loads_what_was_saved(tmp_path: Path) -> None:
    uri = str(tmp_path / TEST_READ_FILE)
    assert ReadLog.load(uri, "digest") == ReadLog("digest")
    FIRST.save(uri)
    assert ReadLog.load(uri, "digest") == FIRST
    Path(uri).write_text(Path(uri).read_text().replace("none_1", "none_9"))
    with pytest.raises(DataError, match="damaged"):
        ReadLog.load(uri, "digest")


def test_reads_by_others_counts_protocols_of_same_dataset(tmp_path: Path) -> None:
    for name, digest in (("own", "digest"), ("a", "digest"), ("b", "digest"), ("c", "other")):
        ReadLog(digest, FIRST.reads).save(str(tmp_path / name / TEST_READ_FILE))
    assert reads_by_others(str(tmp_path), "own", "digest") == 2
