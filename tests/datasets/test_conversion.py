"""Conversions publish the samples of a source; interrupted ones resume, faulty ones raise."""

import multiprocessing
import os
import pickle
import re
import signal
import socket
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crowdray import storage
from crowdray.data.shards import INDEX, Dataset
from crowdray.datasets import conversion, resume
from crowdray.datasets.resume import SliceResult
from crowdray.datasets.sources import Source, open_source
from crowdray.datasets.validation import QUARANTINE, read_quarantine
from crowdray.errors import DataError, UserError
from crowdray.storage import lock as locks

from ..support.builders import (
    heads,
    jpeg,
    make_shanghaitech,
    mixed_samples,
    sample_fields,
    samples,
    write_annotation,
    write_dataset,
)

FORK = multiprocessing.get_context("fork")
SLICES = 4


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 3)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """Eleven images in four slices; IMG_5 is truncated, IMG_8 has a head that is not finite."""
    part = make_shanghaitech(tmp_path / "part_B", count=11)
    (part / "train_data" / "images" / "IMG_5.jpg").write_bytes(jpeg(5)[:200])
    write_annotation(part / "train_data" / "ground_truth" / "GT_IMG_8.mat", np.array([[3.0, 4.0], [np.nan, 1.0]]))
    return part


def open_part(part: Path, **options: Any) -> Source:
    return open_source("shanghaitech", str(part), **options)


def content(dest: str) -> dict[str, bytes]:
    return {file.name: storage.read_bytes(storage.join(dest, file.name)) for file in storage.find_files(dest)}


def convert_some(part: Path, dest: str, number: int, *, overwrite: bool = False) -> None:
    """Convert some slices and stop, as an interrupted conversion does."""
    with conversion.open_conversion(open_part(part), dest, overwrite=overwrite) as work:
        for pending in work.pending[:number]:
            work.add(work.convert(pending))


def convert(part: Path, dest: str, **options: Any) -> list[int]:
    """Convert to the end, and return the slices that were converted."""
    converted: list[int] = []
    conversion.convert(open_part(part), dest, on_slice=lambda result: converted.append(result.number), **options)
    return converted


def test_convert_interrupted_after_any_slice_equals_unbroken(part: Path, root_uri: str, tmp_path: Path) -> None:
    unbroken = str(tmp_path / "unbroken")
    assert convert(part, unbroken) == list(range(SLICES))
    for number in range(1, SLICES + 1):
        dest = f"{root_uri}/{number}"
        convert_some(part, dest, number)
        assert not storage.exists(storage.join(dest, INDEX))
        assert convert(part, dest) == list(range(number, SLICES))
        assert content(dest) == content(unbroken)


def test_convert_interrupted_overwrite_keeps_old_dataset_and_resumes(part: Path, root_uri: str) -> None:
    old = conversion.convert(open_part(part, depth="none"), root_uri)
    convert_some(part, root_uri, 2, overwrite=True)
    Dataset.open(root_uri).counts("train")
    with pytest.raises(UserError, match="already contains a dataset"):
        conversion.convert(open_part(part), root_uri)
    assert Dataset.open(root_uri).index == old
    assert convert(part, root_uri, overwrite=True) == [2, 3]
    assert Dataset.open(root_uri).index.depth_teacher == "points-1"
    assert len(storage.find_files(root_uri)) == SLICES + 2


def _convert_until(part: Path, dest: str, last: int, log: str, events: Any) -> None:
    """Convert, and die before file operation `last`; each finished slice adds a byte to `log`."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.rmdir") or (event == "open" and arguments[1])
        path = str(arguments[0]) if changes else ""
        if dest in path and "writer" not in path:  # the number of heartbeats depends on the clock
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    with open(log, "ab", buffering=0) as file:

        def on_slice(_: SliceResult) -> None:
            file.write(b".")

        sys.addaudithook(hook)
        conversion.convert(open_part(part), dest, on_slice=on_slice)
    events.put(count)


@pytest.mark.slow
def test_convert_killed_at_any_moment_repeats_at_most_the_current_slice(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten moments, distributed over everything that a conversion does to its destination."""
    monkeypatch.setattr(locks, "TIMEOUT_S", 0.5)
    events, repeated = FORK.Queue(), set()

    def start(name: str, last: int) -> tuple[Any, str]:
        process = FORK.Process(
            target=_convert_until, args=(part, str(tmp_path / name), last, str(tmp_path / f"{name}.log"), events)
        )
        process.start()
        process.join()
        return process.exitcode, str(tmp_path / name)

    assert start("unbroken", 0)[0] == 0
    expected, total = content(str(tmp_path / "unbroken")), events.get(timeout=30)
    moments = sorted({round(1 + part * (total - 1) / 9) for part in range(10)})
    for last in moments:
        status, dest = start(f"killed-{last}", last)
        assert status == -signal.SIGKILL
        finished = Path(f"{dest}.log").stat().st_size
        try:
            converted = convert(part, dest)
        except UserError as error:  # it had already published
            assert "already contains a dataset" in str(error) and finished == SLICES
            converted = []
        repeated.add(len(converted))
        assert len(converted) <= SLICES - finished
        assert {name: data for name, data in content(dest).items() if resume.FOLDER not in name} == expected
    assert repeated == set(range(SLICES + 1)), "the moments miss a slice"


def test_open_conversion_ignores_results_of_other_conversions(
    part: Path, root_uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pending(**options: Any) -> list[int]:
        with conversion.open_conversion(open_part(part, **options), root_uri) as work:
            return work.pending

    convert_some(part, root_uri, 3)
    assert pending() == [3]
    assert pending(depth="none") == [0, 1, 2, 3]
    with monkeypatch.context() as patch:
        patch.setattr(resume, "code_digest", lambda source: "another version")
        assert pending() == [0, 1, 2, 3]
    result = next(uri for uri in storage.list_files(f"{root_uri}/{resume.FOLDER}") if "slice-00002" in uri)
    storage.write_bytes(result, b'{"number": 2')
    assert pending() == [2, 3]
    (part / "train_data" / "images" / "IMG_6.jpg").write_bytes(jpeg(66))
    assert pending() == [1, 2, 3]
    write_annotation(part / "train_data" / "ground_truth" / "GT_IMG_2.mat", heads(2, 4))
    assert pending() == [0, 1, 2, 3]
    convert_some(part, root_uri, 3)
    for shard in (uri for uri in storage.list_files(root_uri) if "shard-00001" in uri):
        storage.write_bytes(shard, storage.read_bytes(shard)[:-1])
    assert pending() == [1, 3]


def test_second_conversion_is_refused_while_the_first_runs(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(locks, "TIMEOUT_S", 1.0)
    dest = str(tmp_path / "made")
    holder = re.escape(f"{dest} is in use by process {os.getpid()} on {socket.gethostname()} since 20")
    with (
        conversion.open_conversion(open_part(part), dest),
        pytest.raises(UserError, match=rf"{holder}\S+ \S+; wait until it finishes, or choose another --dest"),
    ):
        conversion.convert(open_part(part), dest)


def test_conversion_that_lost_its_lock_does_not_publish(part: Path, root_uri: str) -> None:
    with (
        pytest.raises(UserError, match=r"another one took over .*; wait until it finishes"),
        conversion.open_conversion(open_part(part), root_uri) as work,
    ):
        for number in work.pending:
            work.add(work.convert(number))
        storage.remove(work.lock.uri)
        work.publish()
    assert not storage.exists(f"{root_uri}/{INDEX}")
    assert convert(part, root_uri) == []


def test_convert_lists_unusable_items_in_quarantine(part: Path, root_uri: str) -> None:
    index = conversion.convert(open_part(part), root_uri)
    names = [f"IMG_{n}" for n in range(1, 12) if n not in (5, 8)]
    assert Dataset.open(root_uri).strings("name", "train") == names
    images = part / "train_data" / "images"
    truncated, infinite = read_quarantine(root_uri, index.digest)
    assert truncated.file == str(images / "IMG_5.jpg") and "cannot be decoded" in truncated.reason
    assert infinite.file == str(images / "IMG_8.jpg") and "1 of 2 points are not finite" in infinite.reason
    assert "2 items left out as unusable, see quarantine.json" in index.notes

    (images / "IMG_5.jpg").write_bytes(jpeg(5))
    write_annotation(part / "train_data" / "ground_truth" / "GT_IMG_8.mat", heads(8, 7))
    assert [item.name for item in read_quarantine(root_uri, index.digest)] == ["IMG_5", "IMG_8"]
    fixed = conversion.convert(open_part(part), root_uri, overwrite=True)
    assert read_quarantine(root_uri, fixed.digest) == [] and not storage.exists(f"{root_uri}/{QUARANTINE}")
    assert fixed.splits["train"]["rows"] == 11 and not any("left out" in note for note in fixed.notes)


def test_strict_conversion_publishes_nothing_and_keeps_finished_slices(part: Path, root_uri: str) -> None:
    with pytest.raises(DataError) as caught:
        conversion.convert(open_part(part), root_uri, strict=True)
    lines = str(caught.value).splitlines()
    assert "2 items cannot be used, nothing was published" in lines[0] and "--strict" in lines[0]
    assert "train/IMG_5: " in lines[1] and "train/IMG_8: " in lines[2] and len(lines) == 3
    assert not storage.exists(f"{root_uri}/{INDEX}") and not storage.exists(f"{root_uri}/{QUARANTINE}")
    assert convert(part, root_uri) == []
    assert len(read_quarantine(root_uri, Dataset.open(root_uri).digest)) == 2


def test_convert_refuses_a_split_with_mostly_unusable_items(tmp_path: Path) -> None:
    part = make_shanghaitech(tmp_path / "part_B", count=12)
    make_shanghaitech(part, "test", 4)
    test = part / "test_data" / "images"
    for number in (1, 2):
        (test / f"IMG_{number}.jpg").write_bytes(b"junk")
    assert conversion.convert(open_part(part), str(tmp_path / "half")).splits["test"]["rows"] == 2
    (test / "IMG_3.jpg").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"3 items cannot be used, nothing was published \(3 of 4 in test: --source"):
        conversion.convert(open_part(part), str(tmp_path / "most"))
    assert not (tmp_path / "most" / INDEX).exists()


def test_storage_failure_ends_the_conversion(part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = storage.read_bytes

    def refuse(uri: str) -> bytes:
        if uri.endswith("IMG_7.jpg"):
            raise UserError(f"cannot read {uri}: the server does not answer")
        return read(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", refuse)
        with pytest.raises(UserError, match=r"IMG_7\.jpg: the server does not answer"):
            conversion.convert(open_part(part), str(tmp_path / "made"))
    assert convert(part, str(tmp_path / "made")) == [2, 3]


def test_convert_slice_with_missing_file_saves_no_result(part: Path, tmp_path: Path) -> None:
    source, dest = open_part(part), str(tmp_path / "made")
    items: Sequence[Any] = source.items()[:3]
    missing = part / "train_data" / "images" / "IMG_2.jpg"
    missing.unlink()
    stats = conversion.convert_slice(source, items, dest, 0, "key").stats
    assert stats.missing == [str(missing)] and [item.name for item in stats.unusable] == ["IMG_2"]
    assert not (tmp_path / "made" / resume.FOLDER).exists()


def test_publish_refuses_shards_that_only_a_worker_can_see(part: Path, tmp_path: Path) -> None:
    dest = tmp_path / "made"
    with conversion.open_conversion(open_part(part), str(dest)) as work:
        for number in work.pending:
            work.add(work.convert(number))
        shard = work.results[0].shard
        assert shard is not None
        (dest / shard.path).unlink()
        with pytest.raises(UserError, match=rf"lacks 1 shards .* {shard.path}: with several nodes --dest"):
            work.publish()
    assert not (tmp_path / "made" / INDEX).exists()


def test_convert_publishes_the_samples_of_the_source(root_uri: str) -> None:
    originals = mixed_samples()
    write_dataset(f"{root_uri}-listed", originals)
    seen: list[int] = []
    source = open_source("crowdray", f"{root_uri}-listed")
    index = conversion.convert(source, root_uri, on_slice=lambda result: seen.append(result.number))
    dataset = Dataset.open(root_uri)
    assert dataset.index == index and seen == list(range(len(index.shards)))
    assert [sample_fields(dataset.sample(row)) for row in range(len(dataset))] == [sample_fields(s) for s in originals]
    names = sorted(uri.rsplit("/", 1)[1] for uri in storage.list_files(root_uri))
    assert names == sorted([INDEX, *(shard.path for shard in index.shards)])


def test_slices_converted_in_any_order_result_in_the_same_dataset(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "listed"), mixed_samples())
    source = open_source("crowdray", str(tmp_path / "listed"))
    digests = []
    for name, step in (("ahead", 1), ("back", -1)):
        with conversion.open_conversion(source, str(tmp_path / name)) as work:
            for number in work.pending[::step]:
                work.add(pickle.loads(pickle.dumps(work.convert(number))))
            digests.append(work.publish().digest)
    assert digests[0] == digests[1]


def test_convert_rejects_a_folder_of_other_files(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("precious")
    for overwrite in (False, True):
        with pytest.raises(UserError, match=r"thesis\.tex.*another --dest"):
            conversion.convert(open_source("synthetic", train=1), str(tmp_path), overwrite=overwrite)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_convert_notes_repeated_images_in_one_line(tmp_path: Path) -> None:
    write_dataset(str(tmp_path / "listed"), [*samples(3), *samples(2, "test")])
    index = conversion.convert(open_source("crowdray", str(tmp_path / "listed")), str(tmp_path / "made"))
    assert any("train/000 = test/000; train/001 = test/001" in note for note in index.notes)


def test_convert_without_images_raises_user_error(tmp_path: Path) -> None:
    (tmp_path / "train.txt").touch()
    with pytest.raises(UserError, match="nothing to convert"):
        conversion.convert(open_source("nwpu", str(tmp_path)), str(tmp_path / "made"))
