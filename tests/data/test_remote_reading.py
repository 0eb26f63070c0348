"""Reading datasets larger than the node's cache: remote rows equal local ones, in one request each."""

import logging
import uuid
from pathlib import Path
from typing import Any

import fsspec
import pytest

from crowdray import storage
from crowdray.data.shards import INDEX, Dataset
from crowdray.errors import DataError
from crowdray.storage import paths

from ..support.builders import sample_fields, samples, write_dataset

MEMORY = type(fsspec.filesystem("memory"))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache."""
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "RETRY_DELAYS_S", (0.0, 0.0))
    return tmp_path / "cache"


@pytest.fixture
def twins(tmp_path: Path) -> tuple[Dataset, Dataset]:
    """The same two shards, the first of two record batches, in a local folder and in a remote one."""
    listed = [*samples(70), *samples(30, "test", seed=1)]
    local, remote = (
        write_dataset(uri, listed, 66) for uri in (str(tmp_path / "local"), f"memory://{uuid.uuid4().hex}")
    )
    return local, remote


def contents(dataset: Dataset) -> list[Any]:
    """All values of a dataset."""
    found: list[Any] = []
    for split in ("train", "test"):
        rows = dataset.rows(split).tolist()
        found += [rows, dataset.sizes(split).tolist(), dataset.counts(split).tolist(), dataset.strings("name", split)]
        found += [sample_fields(dataset.sample(row)) for row in rows]
        assert not any(dataset.sample(row).points.flags.writeable for row in rows)
    return found


@pytest.mark.parametrize(("fraction", "remote"), [(1.0, 0), (0.5, 1), (0.0, 2)], ids=["all", "some", "none"])
def test_dataset_larger_than_the_cache_is_read_remotely_to_the_same_bits(
    twins: tuple[Dataset, Dataset],
    cache: Path,
    fraction: float,
    remote: int,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    local, stored = twins
    total = sum(shard.bytes for shard in local.index.shards)
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", str(fraction * total / 2**30))
    with caplog.at_level(logging.WARNING):
        assert contents(stored) == contents(local)
    assert len([path for path in cache.glob("??/*") if path.suffix != ".lock"]) == 2 - remote
    assert len(caplog.records) == min(remote, 1)


def test_remote_row_is_one_round_trip_for_its_own_bytes(
    twins: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    local, stored = twins
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", "0")
    stored.sample(0)
    requested: list[int] = []
    cat_ranges = MEMORY.cat_ranges

    def counted(self: Any, paths: Any, starts: Any, ends: Any, **options: Any) -> Any:
        requested.append(sum(ends) - sum(starts))
        return cat_ranges(self, paths, starts, ends, **options)

    monkeypatch.setattr(MEMORY, "cat_ranges", counted)
    for row in (64, 1, 65):
        stored.sample(row)
        sample = local.sample(row)
        contents = (sample.image, sample.roi or b"", sample.depth or b"", sample.points.tobytes())
        assert requested.pop() == sum(map(len, contents))
    assert not requested


@pytest.mark.parametrize("damage", ["cut", "image"])
def test_remote_reading_detects_damage(
    twins: tuple[Dataset, Dataset], monkeypatch: pytest.MonkeyPatch, damage: str
) -> None:
    local, stored = twins
    monkeypatch.setenv("CROWDRAY_CACHE_GIB", "0")
    uri = storage.join(stored.uri, stored.index.shards[0].path)
    whole = storage.read_bytes(uri)
    image = bytes(local.sample(5).image)
    other = image[:-40] + bytes([image[-40] ^ 1]) + image[-39:]
    storage.write_bytes(uri, whole[:-200] if damage == "cut" else whole.replace(image, other))
    with pytest.raises(DataError, match=rf"{uri} is (truncated or was replaced|damaged).*convert"):
        stored.sample(5)
    assert storage.exists(storage.join(stored.uri, INDEX))
