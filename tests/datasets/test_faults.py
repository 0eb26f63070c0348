"""Each fault of a dataset raises one error with location and fix, and leaves no partial dataset."""

import errno
import json
import os
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from crowdray import storage
from crowdray.data.sample import SCHEMA
from crowdray.data.shards import INDEX, Dataset, Index, ShardInfo
from crowdray.datasets import conversion
from crowdray.datasets.sources import open_source
from crowdray.errors import DataError, UserError

from ..support.builders import jpeg, make_mall, make_shanghaitech


@pytest.fixture
def part(tmp_path: Path) -> Path:
    return make_shanghaitech(tmp_path / "part_B", count=5)


@pytest.fixture
def made(tmp_path: Path, part: Path) -> Path:
    conversion.convert(open_source("shanghaitech", str(part)), str(tmp_path / "made"))
    return tmp_path / "made"


def shard(made: Path) -> Path:
    return next(made.glob("shard-*.arrow"))


def convert(part: Path, dest: Path, **options: Any) -> Any:
    return conversion.convert(open_source("shanghaitech", str(part)), str(dest), **options)


@pytest.mark.parametrize(
    ("keep", "message"), [(0, "truncated.* {size};.*convert"), (-1, "truncated"), (None, "missing")]
)
def test_open_truncated_or_missing_shard_raises(made: Path, keep: int | None, message: str) -> None:
    path = shard(made)
    content = path.read_bytes()
    path.unlink() if keep is None else path.write_bytes(content[:keep])
    with pytest.raises(DataError, match=rf"{path.name} is {message.format(size=len(content))}"):
        Dataset.open(str(made))


def test_sample_of_shard_with_flipped_byte_raises(made: Path) -> None:
    path = shard(made)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    expected = json.loads((made / INDEX).read_text())["shards"][0]["sha256"]
    message = rf"{path.name} is damaged: its sha256 is \w{{64}}.*{expected}; copy it again"
    with pytest.raises(DataError, match=message):
        Dataset.open(str(made)).sample(0)
    with pytest.raises(DataError, match=message):
        open_source("crowdray", str(made)).items()


def rewrite(made: Path, edit: Callable[[list[pa.RecordBatch]], list[pa.RecordBatch]], schema: pa.Schema) -> None:
    """Replace the batches of a dataset's shard, with an index that states the new file's size and hash."""
    path = shard(made)
    batches = edit(pa.ipc.open_file(path.read_bytes()).read_all().to_batches())
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for batch in batches:
            writer.write_batch(batch)
    reseal(made)


def reseal(made: Path, edit: Callable[[Any], None] = lambda info: None) -> None:
    """Edit the index entry of a dataset's shard; its size and hash, and the totals of the index, follow."""
    index = Index.from_json((made / INDEX).read_text(), INDEX)
    content = asdict(index.shards[0]) | {"bytes": shard(made).stat().st_size, "sha256": storage.hash_file(shard(made))}
    edit(content)
    (made / INDEX).write_text(replace(index, shards=(ShardInfo(**content),)).to_json())


def test_sample_of_shard_with_other_columns_raises(made: Path) -> None:
    dataset = Dataset.open(str(made))
    rewrite(made, lambda batches: [], pa.schema([("name", pa.string())]))
    with pytest.raises(DataError, match="does not have the columns"):
        Dataset.open(str(made)).sample(0)
    with pytest.raises(DataError, match="truncated or was replaced"):
        dataset.sample(0)


def test_sample_of_shard_with_a_lost_row_raises(made: Path) -> None:
    rewrite(made, lambda batches: [batch.slice(1) for batch in batches], SCHEMA)
    with pytest.raises(DataError, match=r"does not have the .* rows of its index"):
        Dataset.open(str(made)).sample(0)


@pytest.mark.parametrize(
    ("column", "values"),
    [
        ("image", pa.array([b""] * 5, pa.large_binary())),
        ("height", pa.array([0] * 5, pa.int32())),
        ("name", pa.array([None] * 5, pa.string())),
        ("points", pa.array([[1.0]] * 5, SCHEMA.field("points").type)),
    ],
)
def test_sample_of_shard_with_impossible_values_raises(made: Path, column: str, values: pa.Array) -> None:
    def edit(batches: list[pa.RecordBatch]) -> list[pa.RecordBatch]:
        (batch,) = batches
        columns = [values if name == column else batch.column(name) for name in SCHEMA.names]
        return [pa.RecordBatch.from_arrays(columns, schema=SCHEMA)]

    rewrite(made, edit, SCHEMA)
    with pytest.raises(DataError, match="without an image, a size or whole points"):
        Dataset.open(str(made)).sample(0)


def test_sample_of_shard_with_damaged_footer_raises(made: Path) -> None:
    content = bytearray(shard(made).read_bytes())
    content[-10:-6] = b"\xff\xff\xff\x7f"
    shard(made).write_bytes(content)
    reseal(made)
    with pytest.raises(DataError, match="is damaged"):
        Dataset.open(str(made)).sample(0)


@pytest.mark.parametrize(
    "edit",
    [
        lambda info: info.update(runs=(("train", 2), ("test", 3)), heads={"train": 10, "test": 5}),
        lambda info: info.update(runs=(("test", 5),), heads={"test": 10}),
        lambda info: info["heads"].update(train=11),
    ],
    ids=["another split of some rows", "another name", "other heads"],
)
def test_sample_of_shard_whose_index_states_other_splits_raises(made: Path, edit: Callable[[Any], None]) -> None:
    reseal(made, edit)
    with pytest.raises(DataError, match="other splits or heads than its index says"):
        Dataset.open(str(made)).sample(0)


@pytest.mark.parametrize("folder", ["empty", "missing"])
def test_open_folder_without_index_raises(tmp_path: Path, folder: str) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"index\.json.*convert\.py with --dest"):
        Dataset.open(str(tmp_path / folder))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"schema_version": 1', '"schema_version": 99', "schema version 99"),
        ('"format": "crowdray"', '"format": "coco"', "format 'coco'"),
        ('"path": "', '"path": "../', "damaged"),
        ('"rows": ', '"rows": 1', "damaged"),
        ('"shards"', '"pieces"', "damaged.*shards"),
        ('"sha256": "', '"sha256": "0', "has digest .*convert"),
        ('"train": 10', '"train": 11', "damaged.*'heads': 11"),
        ('"train": 10', '"trian": 10', "damaged"),
        ('"name": ', '"name": 1, "was": ', "damaged.*name: Input should be a valid string"),
        ('"notes": [', '"notes": [' + "[" * 10_000, "damaged.*recursion limit"),
        ('"bytes": ', '"bytes": ' + "9" * 5_000, "damaged"),
        ('"rows": 5', '"rows": -5', "damaged"),
        ("{", "", "damaged"),
    ],
)
def test_open_invalid_index_raises(made: Path, old: str, new: str, message: str) -> None:
    text = (made / INDEX).read_text()
    assert old in text
    (made / INDEX).write_text(text.replace(old, new))
    with pytest.raises(DataError, match=f"{INDEX}.*{message}"):
        Dataset.open(str(made))


def test_convert_lists_the_first_twenty_unusable_items_and_publishes_nothing(tmp_path: Path) -> None:
    part = make_shanghaitech(tmp_path / "part_B", count=25)
    for image in (part / "train_data" / "images").iterdir():
        image.write_bytes(jpeg(1)[:300])
    with pytest.raises(DataError) as caught:
        convert(part, tmp_path / "made")
    first, *lines, last = str(caught.value).splitlines()
    assert "25 items cannot be used, nothing was published" in first and last.strip() == "and 5 more"
    for number, line in enumerate(lines[:20], 1):
        assert f"{part}/train_data/images/IMG_{number}.jpg: the JPEG image cannot be decoded" in line
    assert len(lines) == 20 and not list((tmp_path / "made").iterdir())


def test_mall_reports_unmatched_frames_and_annotations(tmp_path: Path) -> None:
    root = make_mall(tmp_path / "mall", frames=[1, 2, 4, 5], annotated=4)
    with pytest.raises(DataError) as caught:
        conversion.convert(open_source("mall", str(root)), str(tmp_path / "made"), strict=True)
    message = str(caught.value)
    assert "mall_gt.mat annotates seq_000003, whose image is missing" in message
    assert "seq_000005.jpg has no annotation" in message


def no_space(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_convert_full_disk_while_writing_a_shard(part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Every write to this device fails as on a full disk.
    real = pa.OSFile
    monkeypatch.setattr(pa, "OSFile", lambda path, mode: real("/dev/full", mode))
    with pytest.raises(UserError, match=r"made/shard-00000.*no space left"):
        convert(part, tmp_path / "made")
    assert not list((tmp_path / "made").iterdir())


def test_convert_full_disk_while_writing_the_index(
    part: Path, made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fsync = os.fsync

    def full(file: int) -> None:
        (no_space if INDEX in os.readlink(f"/proc/self/fd/{file}") else fsync)(file)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"index\.json.*no space left"):
        convert(part, tmp_path / "new")
    assert not (tmp_path / "new" / INDEX).exists()
    with pytest.raises(DataError, match="unfinished"):
        Dataset.open(str(tmp_path / "new"))
    with pytest.raises(UserError, match="no space left"):
        convert(part, made, overwrite=True)
    Dataset.open(str(made)).counts("train")
    monkeypatch.undo()
    converted: list[object] = []
    assert convert(part, tmp_path / "new", on_slice=converted.append) == Dataset.open(str(made)).index
    assert converted == [] and len(list((tmp_path / "new").iterdir())) == 2
