"""Shards: what goes in comes out, byte for byte, wherever it lies and however often it is written."""

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
def place(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("CROWDRAY_CACHE", str(tmp_path / "cache"))
    return str(tmp_path / "made") if request.param == "local" else f"memory://{uuid.uuid4().hex}"


class Listed:
    """A source over samples in memory."""

    name = "listed"
    depth_teacher = "none"
    teacher = None
    gpu = False

    def __init__(self, listed: Sequence[Sample]) -> None:
        self.listed = listed

    def items(self, splits: Sequence[str] = ()) -> list[Item]:
        return [Item(sample.split, sample.name, number=n) for n, sample in enumerate(self.listed)]

    def load(self, item: Item) -> Sample:
        return self.listed[item.number]

    def notes(self, splits: Sequence[str] = ()) -> list[str]:
        return []


def mixed() -> list[Sample]:
    """More rows than one record batch, two splits, one change of split in the middle of a shard."""
    return samples(ROWS_PER_BATCH + 9) + samples(5, "test", seed=1)


def write(place: str, listed: Sequence[Sample], rows: int = 40) -> Dataset:
    written = [write_shard(listed[k : k + rows], place, k // rows) for k in range(0, len(listed), rows)]
    write_index(place, written, source="listed", depth_teacher="none")
    return Dataset.open(place)


def content(sample: Sample) -> tuple[object, ...]:
    own = pickle.loads(pickle.dumps(sample))
    return (
        *(own.name, own.split, own.scene, own.image, own.height, own.width, own.roi, own.depth, own.sha256),
        own.points.tobytes(),
        own.points.shape,
        own.points.dtype,
    )


@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_every_row_comes_back_in_order(place: str, rows: int) -> None:
    listed = mixed()[-12:] if rows == 1 else mixed()
    dataset = write(place, listed, rows)
    assert len(dataset) == len(listed)
    for row, sample in enumerate(listed):
        assert content(dataset.sample(row)) == content(sample)


def test_columns_agree_with_the_rows_and_every_row_has_one_split(place: str) -> None:
    listed = mixed()
    dataset = write(place, listed)
    every = [dataset.rows(split) for split in ("train", "test")]
    np.testing.assert_array_equal(np.sort(np.concatenate(every)), np.arange(len(listed)))
    for split, rows in zip(("train", "test"), every, strict=True):
        these = [listed[row] for row in rows]
        assert all(sample.split == split for sample in these) and (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(dataset.sizes(split), [(s.height, s.width) for s in these])
        np.testing.assert_array_equal(dataset.counts(split), [len(s.points) for s in these])
        assert dataset.texts("name", split) == [s.name for s in these]
        assert dataset.texts("scene", split) == [s.scene for s in these]
        total = {"rows": len(these), "heads": sum(len(s.points) for s in these)}
        assert dataset.index.splits[split] == total


def test_a_sample_is_a_view_and_nothing_is_copied(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), mixed())
    one, again = dataset.sample(5), dataset.sample(5)
    assert isinstance(one.image, memoryview) and one.image.readonly
    assert not one.points.flags.writeable and not one.points.flags.owndata
    assert np.shares_memory(one.points, again.points)
    assert np.shares_memory(np.frombuffer(one.image, np.uint8), np.frombuffer(again.image, np.uint8))


def test_a_view_outlives_its_dataset(tmp_path: Path) -> None:
    sample = write(str(tmp_path), mixed()).sample(3)
    assert hashlib.sha256(sample.image).hexdigest() == sample.sha256


def test_shards_are_uncompressed_arrow_files_that_name_their_schema(tmp_path: Path) -> None:
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


def test_large_images_make_small_batches(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    listed = samples(20)
    sizes = [len(s.image) + len(s.roi or b"") + len(s.depth or b"") for s in listed]
    monkeypatch.setattr(shards, "BYTES_PER_BATCH", sum(sizes[:5]))
    dataset = write(str(tmp_path), listed)
    with pa.ipc.open_file(str(tmp_path / dataset.index.shards[0].path)) as reader:
        lengths = [len(reader.get_batch(number)) for number in range(reader.num_record_batches)]
    assert lengths[0] == 5 and sum(lengths) == 20 and len(lengths) > 2
    assert [content(dataset.sample(row)) for row in range(20)] == [content(sample) for sample in listed]


def test_equal_samples_give_equal_bytes_and_another_sample_another_digest(tmp_path: Path) -> None:
    one, two = write(str(tmp_path / "1"), mixed()), write(str(tmp_path / "2"), mixed())
    assert one.digest == two.digest
    for shard in one.index.shards:
        assert (tmp_path / "1" / shard.path).read_bytes() == (tmp_path / "2" / shard.path).read_bytes()
    assert (tmp_path / "1" / INDEX).read_bytes() == (tmp_path / "2" / INDEX).read_bytes()
    assert write(str(tmp_path / "3"), mixed()[:-1]).digest != one.digest
    assert write(str(tmp_path / "4"), mixed()[::-1]).digest != one.digest


def test_the_index_is_plain_json_and_parses_to_itself(tmp_path: Path) -> None:
    index = write(str(tmp_path), mixed()).index
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["format"] == "crowdray" and content["digest"] == index.digest
    assert {"path", "rows", "bytes", "sha256"} <= content["shards"][0].keys()
    assert Index.from_json(index.to_json(), "here") == index


def test_a_pickled_dataset_is_small_and_reads_the_same(place: str) -> None:
    dataset = write(place, mixed())
    dataset.sample(0)
    packed = pickle.dumps(dataset)
    assert len(packed) < 4000
    assert content(pickle.loads(packed).sample(7)) == content(dataset.sample(7))


def test_a_missing_split_or_row_is_the_users_error(tmp_path: Path) -> None:
    dataset = write(str(tmp_path), mixed())
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        dataset.rows("val")
    for row in (-1, len(dataset)):
        with pytest.raises(UserError, match=f"row {row} is outside"):
            dataset.sample(row)


def test_conversion_publishes_what_the_source_lists(place: str) -> None:
    listed = mixed()
    seen: list[int] = []
    index = conversion.convert(Listed(listed), place, on_slice=lambda result: seen.append(result.number))
    dataset = Dataset.open(place)
    assert dataset.index == index and seen == list(range(len(index.shards)))
    assert [content(dataset.sample(row)) for row in range(len(dataset))] == [content(s) for s in listed]
    names = sorted(uri.rsplit("/", 1)[1] for uri in storage.list_files(place))
    assert names == sorted([INDEX, *(shard.path for shard in index.shards)])


def test_slices_converted_in_any_order_give_the_same_dataset(tmp_path: Path) -> None:
    source = Listed(mixed())
    parts = list(enumerate(conversion.split_into_slices(source.items(), 20)))
    digests = []
    for name, order in (("ahead", parts), ("back", parts[::-1])):
        dest = str(tmp_path / name)
        results = [conversion.convert_slice(source, items, dest, number) for number, items in order]
        digests.append(conversion.publish(dest, source, pickle.loads(pickle.dumps(results))).digest)
    assert digests[0] == digests[1]


def test_a_finished_dataset_is_replaced_only_on_request(place: str) -> None:
    old = conversion.convert(Listed(samples(3)), place)
    with pytest.raises(UserError, match=r"already contains a dataset.*--overwrite"):
        conversion.convert(Listed(samples(4)), place)
    assert Dataset.open(place).index == old
    new = conversion.convert(Listed(samples(4)), place, overwrite=True)
    assert Dataset.open(place).index == new and new.digest != old.digest
    assert len(storage.list_files(place)) == 1 + len(new.shards)


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis\.tex.*another --dest"):
            conversion.convert(Listed(samples(3)), str(tmp_path), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_leftovers_of_a_killed_conversion_are_cleaned_up(place: str) -> None:
    source = Listed(samples(6))
    conversion.convert_slice(source, source.items()[:2], place, 7)
    if storage.is_local(place):
        storage.write_bytes(storage.join(place, f"{storage.PARTIAL}123-shard-00000.arrow"), b"half")
    with pytest.raises(UserError, match="conversion never ended"):
        Dataset.open(place)
    index = conversion.convert(source, place)
    assert len(storage.list_files(place)) == 1 + len(index.shards)


def test_notes_tell_of_repeated_images_and_empty_scenes(tmp_path: Path) -> None:
    index = conversion.convert(Listed([*samples(3), *samples(2, "test")]), str(tmp_path / "made"))
    assert any("train/000 = test/000; train/001 = test/001" in note for note in index.notes)
    assert any(note.startswith("2 images without heads: ") for note in index.notes)


def test_nothing_to_convert_is_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        conversion.convert(Listed([]), str(tmp_path / "made"))
