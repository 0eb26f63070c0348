"""Shards and datasets: lossless, deterministic, in local folders and object stores."""

import hashlib
import json
import pickle
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pyarrow as pa
import pytest

from crowdray import credentials, storage
from crowdray.data import shards
from crowdray.data.sample import SCHEMA
from crowdray.data.shards import INDEX, Dataset, Index
from crowdray.errors import UserError

from ..support.builders import mixed_samples, sample_fields, samples, write_dataset


@pytest.mark.parametrize("rows", [1, 40, 1000])
def test_dataset_returns_the_written_samples_in_order(root_uri: str, rows: int) -> None:
    originals = mixed_samples()[-12:] if rows == 1 else mixed_samples()
    dataset = write_dataset(root_uri, originals, rows)
    assert len(dataset) == len(originals)
    for row, sample in enumerate(originals):
        assert sample_fields(dataset.sample(row)) == sample_fields(sample)


def test_dataset_columns_agree_with_its_rows(root_uri: str) -> None:
    originals = mixed_samples()
    dataset = write_dataset(root_uri, originals)
    rows_by_split = [dataset.rows(split) for split in ("train", "test")]
    np.testing.assert_array_equal(np.sort(np.concatenate(rows_by_split)), np.arange(len(originals)))
    for split, rows in zip(("train", "test"), rows_by_split, strict=True):
        in_split = [originals[row] for row in rows]
        assert all(sample.split == split for sample in in_split) and (np.diff(rows) > 0).all()
        np.testing.assert_array_equal(dataset.sizes(split), [(s.height, s.width) for s in in_split])
        np.testing.assert_array_equal(dataset.counts(split), [len(s.points) for s in in_split])
        assert dataset.strings("name", split) == [s.name for s in in_split]
        assert dataset.strings("scene", split) == [s.scene for s in in_split]
        total = {"rows": len(in_split), "heads": sum(len(s.points) for s in in_split)}
        assert dataset.index.splits[split] == total


def test_sample_is_a_view_of_the_mapped_shard_that_outlives_its_dataset(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path), mixed_samples())
    one, again = dataset.sample(5), dataset.sample(5)
    assert isinstance(one.image, memoryview) and one.image.readonly
    assert not one.points.flags.writeable and not one.points.flags.owndata
    assert np.shares_memory(one.points, again.points)
    assert np.shares_memory(np.frombuffer(one.image, np.uint8), np.frombuffer(again.image, np.uint8))
    del dataset, again
    assert hashlib.sha256(one.image).hexdigest() == one.sha256


def test_shards_are_uncompressed_arrow_files_with_the_schema(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path), mixed_samples())
    tables = []
    for shard in dataset.index.shards:
        path = tmp_path / shard.path
        assert shard.bytes == path.stat().st_size and shard.sha256 == storage.hash_file(path)
        with pa.ipc.open_file(str(path)) as reader:
            assert reader.schema.equals(SCHEMA, check_metadata=True)
            tables.append(reader.read_all())
    names = pa.concat_tables(tables).column("name").to_pylist()
    assert names == [sample.name for sample in mixed_samples()]


def test_record_batches_of_large_images_have_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    originals = samples(20)
    sizes = [len(s.image) + len(s.roi or b"") + len(s.depth or b"") for s in originals]
    monkeypatch.setattr(shards, "BYTES_PER_BATCH", sum(sizes[:5]))
    dataset = write_dataset(str(tmp_path), originals)
    with pa.ipc.open_file(str(tmp_path / dataset.index.shards[0].path)) as reader:
        lengths = [len(reader.get_batch(number)) for number in range(reader.num_record_batches)]
    assert lengths[0] == 5 and sum(lengths) == 20 and len(lengths) > 2
    assert [sample_fields(dataset.sample(row)) for row in range(20)] == [sample_fields(sample) for sample in originals]


def test_write_shard_is_deterministic_and_digest_depends_on_samples(tmp_path: Path) -> None:
    one, two = write_dataset(str(tmp_path / "1"), mixed_samples()), write_dataset(str(tmp_path / "2"), mixed_samples())
    assert one.digest == two.digest
    for shard in one.index.shards:
        assert (tmp_path / "1" / shard.path).read_bytes() == (tmp_path / "2" / shard.path).read_bytes()
    assert (tmp_path / "1" / INDEX).read_bytes() == (tmp_path / "2" / INDEX).read_bytes()
    assert write_dataset(str(tmp_path / "3"), mixed_samples()[:-1]).digest != one.digest
    assert write_dataset(str(tmp_path / "4"), mixed_samples()[::-1]).digest != one.digest


def test_index_json_is_read_back(tmp_path: Path) -> None:
    index = write_dataset(str(tmp_path), mixed_samples()).index
    content = json.loads((tmp_path / INDEX).read_text())
    assert content["format"] == "crowdray" and content["digest"] == index.digest
    assert {"path", "rows", "bytes", "sha256"} <= content["shards"][0].keys()
    assert Index.from_json(index.to_json(), "index.json") == index


def test_pickled_dataset_is_small_and_returns_the_same_samples(root_uri: str) -> None:
    dataset = write_dataset(root_uri, mixed_samples())
    dataset.sample(0)
    packed = pickle.dumps(dataset)
    assert len(packed) < 4000
    assert sample_fields(pickle.loads(packed).sample(7)) == sample_fields(dataset.sample(7))


def test_dataset_with_unknown_split_or_row_raises_user_error(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path), mixed_samples())
    with pytest.raises(UserError, match="no split 'val'; it has train, test"):
        dataset.rows("val")
    for row in (-1, len(dataset)):
        with pytest.raises(UserError, match=f"row {row} is outside"):
            dataset.sample(row)


class _Refusing(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_error(401)

    do_HEAD = do_GET

    def log_message(self, *_: object) -> None:
        """Log nothing."""


def test_open_behind_a_login_raises_with_the_status_and_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(credentials, "hidden", {})
    with HTTPServer(("127.0.0.1", 0), _Refusing) as server:
        Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        with pytest.raises(UserError, match=r"index\.json: 401.*check the address and your credentials") as caught:
            Dataset.open(f"http://user:pass-word@127.0.0.1:{server.server_port}/data")
        server.shutdown()
    assert "pass-word" not in str(caught.value)
