"""Publishing a conversion: the samples, their order, overwriting, leftovers, and notes."""

import pickle
from collections.abc import Sequence
from pathlib import Path

import pytest

from crowdray import storage
from crowdray.data.sample import Sample
from crowdray.data.shards import INDEX, Dataset
from crowdray.datasets import conversion
from crowdray.datasets.sources import Item
from crowdray.errors import UserError

from ..support.builders import mixed_samples, sample_fields, samples


class ListSource:
    """A source of samples in memory."""

    name = "list"
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


def test_convert_publishes_the_samples_of_the_source(root_uri: str) -> None:
    originals = mixed_samples()
    seen: list[int] = []
    index = conversion.convert(ListSource(originals), root_uri, on_slice=lambda result: seen.append(result.number))
    dataset = Dataset.open(root_uri)
    assert dataset.index == index and seen == list(range(len(index.shards)))
    assert [sample_fields(dataset.sample(row)) for row in range(len(dataset))] == [sample_fields(s) for s in originals]
    names = sorted(uri.rsplit("/", 1)[1] for uri in storage.list_files(root_uri))
    assert names == sorted([INDEX, *(shard.path for shard in index.shards)])


def test_slices_converted_in_any_order_result_in_the_same_dataset(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(conversion, "ROWS_PER_SHARD", 20)
    source = ListSource(mixed_samples())
    digests = []
    for name, step in (("ahead", 1), ("back", -1)):
        with conversion.open_conversion(source, str(tmp_path / name)) as work:
            for part in work.pending[::step]:
                work.add(pickle.loads(pickle.dumps(work.convert(part))))
            digests.append(work.publish().digest)
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


def test_convert_notes_repeated_images_in_one_line(tmp_path: Path) -> None:
    index = conversion.convert(ListSource([*samples(3), *samples(2, "test")]), str(tmp_path / "made"))
    assert any("train/000 = test/000; train/001 = test/001" in note for note in index.notes)


def test_convert_without_images_raises_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to convert"):
        conversion.convert(ListSource([]), str(tmp_path / "made"))
