"""Shards and datasets: lossless, deterministic, in local folders and object stores."""

import hashlib
import json
import pickle
import uuid
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from crowdray import storage
from crowdray.data import shards
from crowdray.data.sample import SCHEMA, Sample
from crowdray.data.shards import INDEX, ROWS_PER_BATCH, Dataset, Index, write_index, write_shard
from crowdray.datasets import conversion
from crowdray.datasets.sources import Item
from crowdray.errors import UserError

from ..support.builders import samples


@pytest.fixture(params=["local", "memory"])
def root_uri(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "made") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


class ListSource:
    """A source of samples in memory."""

    name = "listed"
    depth_teacher = "none"
    teacher = None
    gpu = False

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        return [Item(sample.split, sample.name, number=n) for n, sample in enumerate(self.samples)]

    def load(self, item: Item) -> Sample:
        return self.samples[item.number]

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        return []


def mixed() -> list[Sample]:
    """More rows than one record batch, and a change of split inside a shard."""
    return samples(ROWS_PER_BATCH + 9) + samples(5, "test", seed=1)


def write(uri: str, listed: Sequence[Sample], rows: int = 40) -> Dataset:
    written = [write_shard(listed[k : k + rows], uri, k // rows) for k in range(0, len(listed), rows)]
    write_index(uri, written, source="listed", depth_teacher="none")
    return Dataset.open(uri)


def content(sample: Sample) -> tuple[object, ...]:
    own = pickle.loads(pickle.dumps(sample))
    return (
        *(own.name, own.split, own.scene, own.image, own.height, own.width, own.roi, own.depth, own.sha256),
        own.points.tobytes(),
        own.points.shape,
        own.points.dtype,
    )


@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_dataset_returns_the_written_samples_in_order(root_uri: str, rows: int) -> None:
    listed = mixed()[-12:] if rows == 1 else mixed()
    dataset = write(root_uri, listed, rows)
    assert len(dataset) == len(listed)
    for row, sample in enumerate(listed):
        assert content(dataset.sample(row)) == content(sample)


def test_dataset_columns_agree_with_its_rows(root_uri: str) -> None:
    listed = mixed()
    dataset = write(root_uri, listed)
    every = [dataset.rows(split) for split in ("train", "test")]
    np.testing.assert_array_equal(np.sort(np.concatenate(every)), np.arange(len(listed)))
    for split, rows in zip(("train", "test"), every, strict=True):
        these = [listed[row] for row in rows]
        assert all(sample.split == split for sample in these) and (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(dataset.sizes(split), [(s.height, s.width) for s in these])
        np.testing.assert_array_equal(dataset.counts(split), [len(s.points) for s in these])
        assert dataset.strings("name", split) == [s.name for s in these]
        assert dataset.strings("scene", split) == [s.scene for s in these]
        total = {"rows": len(these), "heads": sum(len(s.points) for s in these)}
        assert dataset.index.splits[split] == total


def test_sample_is_a_view_of_the_mapped_shard(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), mixed())
    one, again = dataset.sample(5), dataset.sample(5)
    assert isinstance(one.image, memoryview) and one.image.readonly
    assert not one.points.flags.writeable and not one.points.flags.owndata
    assert np.shares_memory(one.points, again.points)
    assert np.shares_memory(np.frombuffer(one.image, np.uint8), np.frombuffer(again.image, np.uint8))


def test_sample_is_valid_after_its_dataset_is_deleted(tmp_path: Path) -> None:
    sample = write(str(tmp_path), mixed()).sample(3)
    assert hashlib.sha256(sample.image).hexdigest() == sample.sha256


def test_shards_are_uncompressed_arrow_files_with_the_schema(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), mixed())
    tables = []
    for shard in dataset.index.shards:
        path = tmp_path / shard.path
        assert shard.bytes == path.stat().st_size and shard.sha256 == storage.hash_file(path)
        with pa.ipc.open_file(str(path)) as reader:
            assert reader.schema.equals(SCHEMA, check_metadata=True)
            tables.append(reader.read_all())
        images = b"".join(tables[-1].column("image").to_pylist())
        assert shard.bytes > len(images)
    names = pa.concat_tables(tables).column("name").to_pylist()
    assert names == [sample.name for sample in mixed()]


def test_record_batches_of_large_images_have_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = samples(20)
    sizes = [len(s.image) + len(s.roi or b"") + len(s.depth or b"") for s in listed]
    monkeypatch.setattr(shards, "BYTES_PER_BATCH", sum(sizes[:5]))
    dataset = write(str(tmp_path), listed)
    with pa.ipc.open_file(str(tmp_path / dataset.index.shards[0].path)) as reader:
        lengths = [len(reader.get_batch(number)) for number in range(reader.num_record_batches)]
    assert lengths[0] == 5 and sum(lengths) == 20 and len(lengths) > 2
    assert [content(dataset.sample(row)) for row in range(20)] == [content(sample) for sample in listed]


def test_write_shard_is_deterministic_and_digest_depends_on_samples(tmp_path: Path) -> None:
    one, two = write(str(tmp_path / "1"), mixed()), write(str(tmp_path / "2"), mixed())
    assert one.digest == two.digest
    for shard in one.index.shards:
        assert (tmp_path / "1" / shard.path).read_bytes() == (tmp_path / "2" / shard.path).read_bytes()
    assert (tmp_path / "1" / INDEX).read_bytes() == (tmp_path / "2" / INDEX).read_bytes()
    assert write(str(tmp_path / "3"), mixed()[:-1]).digest != one.digest
    assert write(str(tmp_path / "4"), mixed()[::-1]).digest != one.digest


def test_index_json_is_read_back(tmp_path: Path) -> None:
    index = write(str(tmp_path), mixed()).index
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["format"] == "crowdray" and content["digest"] == index.digest
    assert {"path", "rows", "bytes", "sha256"} <= content["shards"][0].keys()
    assert Index.from_json(index.to_json(), "index.json") == index


def test_pickled_dataset_is_small_and_returns_the_same_samples(root_uri: str) -> None:
    dataset = write(root_uri, mixed())
    dataset.sample(0)
    packed = pickle.dumps(dataset)
    assert len(packed) < 4000
    assert content(pickle.loads(packed).sample(7)) == content(dataset.sample(7))


def test_dataset_with_unknown_split_or_row_raises_user_error(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), mixed())
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        dataset.rows("val")
    for row in (-1, len(dataset)):
        with pytest.raises(UserError, match=f"row {row} is outside"):
            dataset.sample(row)


def test_convert_publishes_the_samples_of_the_source(root_uri: str) -> None:
    listed = mixed()
    seen: list[int] = []
    index = conversion.convert(ListSource(listed), root_uri, on_slice=lambda result: seen.append(result.number))
    dataset = Dataset.open(root_uri)
    assert dataset.index == index and seen == list(range(len(index.shards)))
    assert [content(dataset.sample(row)) for row in range(len(dataset))] == [content(s) for s in listed]
    names = sorted(uri.rsplit("/", 1)[1] for uri in storage.list_files(root_uri))
    assert names == sorted([INDEX, *(shard.path for shard in index.shards)])


def test_slices_converted_in_any_order_result_in_the_same_dataset(tmp_path: Path) -> None:
    source = ListSource(mixed())
    parts = list(enumerate(conversion.split_into_slices(source.items(), 20)))
    digests = []
    for name, order in (("ahead", parts), ("back", parts[::-1])):
        dest = str(tmp_path / name)
        results = [conversion.convert_slice(source, items, dest, number) for number, items in order]
        digests.append(conversion.publish(dest, source, pickle.loads(pickle.dumps(results))).digest)
    assert digests[0] == digests[1]


def test_convert_replaces_a_dataset_only_with_overwrite(root_uri: str) -> None:
    old = conversion.convert(ListSource(samples(3)), root_uri)
    with pytest.raises(UserError, match=r"already contains a dataset.*--overwrite"):
        conversion.convert(ListSource(samples(4)), root_uri)
    assert Dataset.open(root_uri).index == old
    new = conversion.convert(ListSource(samples(4)), root_uri, overwrite=True)
    assert Dataset.open(root_uri).index == new and new.digest != old.digest
    assert len(storage.list_files(root_uri)) == 1 + len(new.shards)


def test_convert_rejects_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis\.tex.*another --dest"):
            conversion.convert(ListSource(samples(3)), str(tmp_path), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_convert_removes_leftovers_of_an_interrupted_conversion(root_uri: str) -> None:
    source = ListSource(samples(6))
    conversion.convert_slice(source, source.items()[:2], root_uri, 7)
    if storage.is_local(root_uri):
        storage.write_bytes(storage.join(root_uri, f"{storage.PARTIAL}123-shard-00000.arrow"), b"half")
    with pytest.raises(UserError, match="its conversion is unfinished"):
        Dataset.open(root_uri)
    index = conversion.convert(source, root_uri)
    assert len(storage.list_files(root_uri)) == 1 + len(index.shards)


def test_convert_notes_repeated_images_and_images_without_heads(tmp_path: Path) -> None:
    index = conversion.convert(ListSource([*samples(3), *samples(2, "test")]), str(tmp_path / "made"))
    assert any("train/000 = test/000; train/001 = test/001" in note for note in index.notes)
    assert any(note.startswith("2 images without heads: ") for note in index.notes)


def test_convert_without_images_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        conversion.convert(ListSource([]), str(tmp_path / "made"))
