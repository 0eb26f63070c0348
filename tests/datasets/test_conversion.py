"""Conversions that are killed, doubled or fed with bad items: the end is that of the unbroken one, or a clear error."""

import json
import multiprocessing
import os
import re
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from crowdray import storage
from crowdray.data.shards import INDEX, Dataset
from crowdray.datasets import conversion, resume
from crowdray.datasets.quarantine import QUARANTINE, read_quarantine
from crowdray.datasets.resume import SliceResult
from crowdray.datasets.sources import Source, open_source
from crowdray.errors import DataError, UserError
from crowdray.storage import lease as leases

from ..support.builders import heads, jpeg, make_shanghaitech, write_annotation

FORK = multiprocessing.get_context("fork")
SLICES = 4


class _Killed(BaseException):
    """Stands for a kill where all is in one process."""


@pytest.fixture(autouse=True)
def _small_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 3)


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """Eleven images in four slices; IMG_5 is broken, IMG_8 has a head that is nowhere."""
    part = make_shanghaitech(tmp_path / "part_B", count=11)
    (part / "train_data" / "images" / "IMG_5.jpg").write_bytes(jpeg(5)[:200])
    write_annotation(part / "train_data" / "ground_truth" / "GT_IMG_8.mat", np.array([[3.0, 4.0], [np.nan, 1.0]]))
    return part


def opened(part: Path, **options: Any) -> Source:
    return open_source("shanghaitech", str(part), **options)


def content(dest: str) -> dict[str, bytes]:
    return {file.name: storage.read_bytes(storage.join(dest, file.name)) for file in storage.find_files(dest)}


def dying_after(number: int, dead: type[BaseException] = _Killed) -> Callable[[SliceResult], None]:
    def on_slice(result: SliceResult) -> None:
        if result.number + 1 == number:
            raise dead

    return on_slice


def converted(part: Path, dest: str, **options: Any) -> list[int]:
    """Convert to the end; the slices that this took."""
    seen: list[int] = []
    conversion.convert(opened(part), dest, on_slice=lambda result: seen.append(result.number), **options)
    return seen


def test_what_is_stopped_at_any_slice_ends_as_if_it_never_was(part: Path, place: str, tmp_path: Path) -> None:
    unbroken = str(tmp_path / "unbroken")
    assert converted(part, unbroken) == list(range(SLICES))
    for number in range(1, SLICES + 1):
        dest = f"{place}/{number}"
        with pytest.raises(_Killed):
            conversion.convert(opened(part), dest, on_slice=dying_after(number))
        assert not storage.exists(storage.join(dest, INDEX))
        assert converted(part, dest) == list(range(number, SLICES))
        assert content(dest) == content(unbroken)


def test_a_replacement_that_is_stopped_leaves_the_old_dataset_and_goes_on(part: Path, place: str) -> None:
    old = conversion.convert(opened(part, depth="none"), place)
    with pytest.raises(KeyboardInterrupt):
        conversion.convert(opened(part), place, overwrite=True, on_slice=dying_after(2, KeyboardInterrupt))
    Dataset.open(place).verify()
    with pytest.raises(UserError, match="already holds a dataset"):
        conversion.convert(opened(part), place)
    assert Dataset.open(place).index == old
    assert converted(part, place, overwrite=True) == [2, 3]
    assert Dataset.open(place).index.depth_teacher == "points-1"
    assert len(storage.find_files(place)) == SLICES + 2


def _convert_until(part: Path, dest: str, last: int, told: str, events: Any) -> None:
    """Convert, and die before the file-system operation with the number `last`; what is finished is told in a file."""
    count = 0

    def hook(event: str, arguments: tuple[object, ...]) -> None:
        nonlocal count
        changes = event in ("os.rename", "os.remove", "os.rmdir") or (event == "open" and arguments[1])
        path = str(arguments[0]) if changes else ""
        if dest in path and "writer" not in path:  # how often the lease is renewed is up to the clock
            count += 1
            if count == last:
                os.kill(os.getpid(), signal.SIGKILL)

    with open(told, "ab", buffering=0) as file:

        def tell(_: SliceResult) -> None:
            file.write(b".")

        sys.addaudithook(hook)
        conversion.convert(opened(part), dest, on_slice=tell)
    events.put(count)


def test_a_process_killed_at_any_moment_costs_the_slice_under_way_at_most(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ten moments, spread over all that a conversion does to its destination."""
    monkeypatch.setattr(leases, "LEASE_S", 0.5)
    events, left = FORK.Queue(), set()

    def start(name: str, last: int) -> tuple[Any, str]:
        process = FORK.Process(
            target=_convert_until, args=(part, str(tmp_path / name), last, str(tmp_path / f"{name}.told"), events)
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
        told = Path(f"{dest}.told").stat().st_size
        try:
            redone = converted(part, dest)
        except UserError as error:  # it was at its end
            assert "already holds a dataset" in str(error) and told == SLICES
            redone = []
        left.add(len(redone))
        assert len(redone) <= SLICES - told
        assert content(dest) == expected
    assert left == set(range(SLICES + 1)), "the moments miss a slice"


def test_records_of_other_conversions_are_not_used(part: Path, place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop() -> None:
        with pytest.raises(_Killed):
            conversion.convert(opened(part), place, on_slice=dying_after(3))

    def redone(**options: Any) -> list[int]:
        seen: list[int] = []

        def note(result: SliceResult) -> None:
            seen.append(result.number)
            dying_after(SLICES)(result)

        with pytest.raises(_Killed):
            conversion.convert(opened(part, **options), place, on_slice=note)
        for uri in storage.list_files(f"{place}/{resume.FOLDER}"):
            storage.remove(uri)
        return seen

    stop()
    assert redone() == [3]
    stop()
    assert redone(depth="none") == [0, 1, 2, 3]
    stop()
    (part / "train_data" / "images" / "IMG_6.jpg").write_bytes(jpeg(66))
    assert redone() == [1, 3]
    stop()
    write_annotation(part / "train_data" / "ground_truth" / "GT_IMG_9.mat", heads(9, 4))
    assert 2 in redone()
    stop()
    with monkeypatch.context() as patch:
        patch.setattr(resume, "_code", lambda: ["another version"])
        assert redone() == [0, 1, 2, 3]
    stop()
    for shard in (uri for uri in storage.list_files(place) if "shard-00001" in uri):
        storage.write_bytes(shard, storage.read_bytes(shard)[:-1])
    record = next(uri for uri in storage.list_files(f"{place}/{resume.FOLDER}") if "slice-00002" in uri)
    storage.write_bytes(record, b'{"number": 2')
    assert redone() == [1, 2, 3]


def test_a_result_comes_back_from_its_record(part: Path, tmp_path: Path) -> None:
    source = opened(part)
    results = [
        conversion.convert_slice(source, items, str(tmp_path / "made"), number)
        for number, items in enumerate(conversion.slices(source.items(), 3))
    ]
    assert [len(result.quarantined) for result in results] == [0, 1, 1, 0]
    assert results[0].empty == 1
    assert [SliceResult.from_json(result.to_json()) for result in results] == results


def _convert_slowly(part: Path, dest: str, reached: Any, on: Any) -> None:
    def wait(_: SliceResult) -> None:
        reached.set()
        on.wait(120)

    conversion.convert(opened(part), dest, on_slice=wait)


def test_of_two_conversions_one_is_refused_and_takes_over_when_the_other_dies(
    part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(leases, "LEASE_S", 4.0)
    dest, reached, on = str(tmp_path / "made"), FORK.Event(), FORK.Event()
    first = FORK.Process(target=_convert_slowly, args=(part, dest, reached, on))
    first.start()
    assert reached.wait(60)
    who = re.escape(f"process {first.pid} on {socket.gethostname()} since 20")
    with pytest.raises(UserError, match=rf"{who}\S+ \S+ is converting into {dest}; wait for its end, or choose"):
        conversion.convert(opened(part), dest)
    assert first.is_alive() and first.pid is not None
    os.kill(first.pid, signal.SIGKILL)
    first.join()
    died = time.monotonic()
    waited: list[str] = []
    with conversion.begun(opened(part), dest, tell=waited.append) as work:
        assert time.monotonic() - died < 2 * leases.LEASE_S
        assert list(work.finished) == [0] and len(waited) == 1
        for slice_ in work.waiting:
            work.add(work.convert(slice_))
        work.publish()
    assert len(storage.find_files(dest)) == SLICES + 2


def test_who_lost_the_destination_publishes_nothing_and_cleans_nothing(part: Path, place: str) -> None:
    with (
        pytest.raises(UserError, match=r"another one took .* over"),
        conversion.begun(opened(part), place) as work,
    ):
        for slice_ in work.waiting:
            work.add(work.convert(slice_))
        storage.remove(work.lease.uri)
        partial = f"{place}/{storage.PARTIAL}of-the-other"
        storage.write_bytes(partial, b"half")
        work.publish()
    assert storage.exists(partial) and not storage.exists(f"{place}/{INDEX}")
    assert converted(part, place) == []
    assert not storage.exists(partial)


def test_bad_items_are_left_out_listed_and_told(part: Path, place: str) -> None:
    index = conversion.convert(opened(part), place)
    dataset = Dataset.open(place)
    names = [f"IMG_{n}" for n in range(1, 12) if n not in (5, 8)]
    assert dataset.texts("name", "train") == names
    said = json.loads(storage.read_bytes(f"{place}/{QUARANTINE}"))
    assert said["digest"] == index.digest
    images = part / "train_data" / "images"
    assert [(item["split"], item["name"], item["file"]) for item in said["items"]] == [
        ("train", "IMG_5", str(images / "IMG_5.jpg")),
        ("train", "IMG_8", str(images / "IMG_8.jpg")),
    ]
    for item, reason in zip(said["items"], ("cannot be decoded", "1 of 2 points are not finite"), strict=True):
        assert reason in item["reason"]
    assert "2 items cannot be used and were left out, see quarantine.json" in index.notes

    (images / "IMG_5.jpg").write_bytes(jpeg(5))
    write_annotation(part / "train_data" / "ground_truth" / "GT_IMG_8.mat", heads(8, 7))
    assert [item.name for item in read_quarantine(place, index.digest)] == ["IMG_5", "IMG_8"]
    mended = conversion.convert(opened(part), place, overwrite=True)
    assert read_quarantine(place, mended.digest) == [] and not storage.exists(f"{place}/{QUARANTINE}")
    assert mended.splits["train"]["rows"] == 11 and not any("left out" in note for note in mended.notes)


def test_strict_publishes_nothing_and_what_it_finished_serves_the_next_start(part: Path, place: str) -> None:
    with pytest.raises(DataError) as caught:
        conversion.convert(opened(part), place, strict=True)
    lines = str(caught.value).splitlines()
    assert "2 items cannot be used, nothing was published" in lines[0] and "--strict" in lines[0]
    assert "train/IMG_5: " in lines[1] and "train/IMG_8: " in lines[2] and len(lines) == 3
    assert not storage.exists(f"{place}/{INDEX}") and not storage.exists(f"{place}/{QUARANTINE}")
    assert converted(part, place) == []
    assert len(read_quarantine(place, Dataset.open(place).digest)) == 2


def test_a_split_of_which_most_is_bad_is_no_dataset(tmp_path: Path) -> None:
    part = make_shanghaitech(tmp_path / "part_B", count=12)
    make_shanghaitech(part, "test", 4)
    test = part / "test_data" / "images"
    for number in (1, 2):
        (test / f"IMG_{number}.jpg").write_bytes(b"junk")
    assert conversion.convert(opened(part), str(tmp_path / "half")).splits["test"]["rows"] == 2
    (test / "IMG_3.jpg").write_bytes(b"junk")
    with pytest.raises(DataError, match=r"3 items cannot be used, nothing was published \(of test 3 of 4, so --source"):
        conversion.convert(opened(part), str(tmp_path / "most"))
    assert not (tmp_path / "most" / INDEX).exists()


def test_trouble_with_storage_is_no_bad_item(part: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read = storage.read_bytes

    def refuse(uri: str) -> bytes:
        if uri.endswith("IMG_7.jpg"):
            raise UserError(f"cannot read {uri}: the server does not answer")
        return read(uri)

    with monkeypatch.context() as patch:
        patch.setattr(storage, "read_bytes", refuse)
        with pytest.raises(UserError, match=r"IMG_7\.jpg: the server does not answer"):
            conversion.convert(opened(part), str(tmp_path / "made"))
    assert converted(part, str(tmp_path / "made")) == [2, 3]


def test_what_is_missing_for_a_worker_leaves_no_record(part: Path, tmp_path: Path) -> None:
    source, dest = opened(part), str(tmp_path / "made")
    items: Sequence[Any] = source.items()[:3]
    gone = part / "train_data" / "images" / "IMG_2.jpg"
    gone.unlink()
    result = conversion.convert_slice(source, items, dest, 0, "key")
    assert result.missing == [str(gone)] and [bad.name for bad in result.quarantined] == ["IMG_2"]
    assert not (tmp_path / "made" / resume.FOLDER).exists()


def test_shards_that_only_a_worker_can_see_are_not_published(part: Path, tmp_path: Path) -> None:
    source, dest = opened(part), str(tmp_path / "made")
    result = conversion.convert_slice(source, source.items()[:3], dest, 0)
    assert result.shard is not None
    (tmp_path / "made" / result.shard.path).unlink()
    with pytest.raises(UserError, match=rf"lacks 1 shards .* {result.shard.path}: with several nodes --dest"):
        conversion.publish(dest, source, [result])
    assert not (tmp_path / "made" / INDEX).exists()
