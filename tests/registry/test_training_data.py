"""What a counter was trained on: the record in its package, and photos that are unlike it."""

from pathlib import Path

import numpy as np
import pytest
import yaml

from crowdray.data.decoding import decode_image
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.registry.interval import LEVEL, CountInterval
from crowdray.registry.loading import load_counter
from crowdray.registry.packaging import package_counter
from crowdray.registry.training_data import TrainingData, describe_training_data, image_features

from ..support.counters import exported_counter, photo


@pytest.fixture(scope="module")
def record(discs: Dataset) -> TrainingData:
    return describe_training_data(discs, discs.rows("train"))


def test_training_data_describes_the_training_split(record: TrainingData, discs: Dataset) -> None:
    heads = discs.counts("train")
    assert (record.images, record.total_heads, record.rendered) == (24, heads.sum(), False)
    assert (record.heads.min, record.heads.median, record.heads.max) == (0, np.median(heads), 8)
    assert record.sizes == "96x64" and record.pixels.max == 96 * 64
    assert str(record) == f"24 photos of {discs.index.name}, 96x64 pixels, 0 to 8 heads each"


def test_training_data_of_a_subset(discs: Dataset) -> None:
    rows = discs.rows("train")[[3, 7]]
    subset = describe_training_data(discs, rows)
    assert (subset.images, subset.total_heads) == (2, discs.counts("train")[[3, 7]].sum())


def test_training_data_accepts_photos_of_the_same_kind(record: TrainingData, discs: Dataset) -> None:
    for row in discs.rows("test"):
        image = decode_image(discs.sample(int(row)).image)
        assert record.differences(image, 4.0) == []
        assert record.differences(image.transpose(1, 0, 2).copy(), 4.0) == []  # turned


def test_training_data_names_what_differs(record: TrainingData, discs: Dataset) -> None:
    image = decode_image(discs.sample(0).image)
    (large,) = record.differences(np.tile(image, (2, 2, 1)), 20.0)
    (dense,) = record.differences(image, 17.0)
    (dark,) = record.differences(image // 3, 4.0)
    assert large == "it has 192x128 pixels, training images have 96x64"
    assert dense.startswith("it has 2,767 heads per million pixels, training images have 0 to 1,302")
    assert dark.startswith("it looks different from training images, mainly in ")
    assert len(record.differences(np.zeros((5, 3, 3), np.uint8), 4.0)) == 3


def test_image_features_are_those_of_the_pixels() -> None:
    image = np.zeros((64, 64, 3), np.uint8)
    image[:, ::2] = (200, 100, 0)
    brightness, contrast, saturation, cast, fine, _, coarse = image_features(image)
    assert (brightness, contrast, saturation, cast) == pytest.approx((50, 50, 100, 100))
    assert np.exp([fine, coarse]) - 0.1 == pytest.approx([50, 0], abs=1e-4)


def test_interval_covers_its_level_of_new_counts() -> None:
    rng = np.random.default_rng(0)
    truth = rng.integers(1, 500, 3000)
    predicted = truth + rng.normal(0, 0.7 * np.sqrt(truth))
    interval = CountInterval.of(truth[:500], predicted[:500])
    assert interval is not None and interval.images == 500
    inside = [low <= true <= high for true, (low, high) in zip(truth, map(interval.around, predicted), strict=True)]
    assert np.mean(inside[500:]) == pytest.approx(LEVEL, abs=0.02)
    assert interval.around(0)[0] == 0
    assert CountInterval.of(truth[:18], predicted[:18]) is None and CountInterval.of([], []) is None


def test_package_keeps_the_records_and_refuses_damaged_ones(record: TrainingData, tmp_path: Path) -> None:
    interval = CountInterval(1.5, 100)
    folder = tmp_path / "model"
    package_counter(
        exported_counter(),
        photo(1, 64, 96),
        folder,
        config={},
        metrics={},
        tags={},
        training_data=record,
        interval=interval,
    )
    counter = load_counter(str(folder))
    assert counter.training_data == record and counter.interval == interval
    content = yaml.safe_load((folder / "MLmodel").read_text())
    fields = content["metadata"]["crowdray"]
    for damaged in ({"training_data": {"images": 3}}, {"interval": {"scale": float("nan"), "images": 1}}):
        content["metadata"]["crowdray"] = fields | damaged
        (folder / "MLmodel").write_text(yaml.safe_dump(content))
        with pytest.raises(UserError, match="MLmodel does not describe a counter"):
            load_counter(str(folder))
    old = {name: value for name, value in fields.items() if name not in ("training_data", "interval")}
    content["metadata"]["crowdray"] = old
    (folder / "MLmodel").write_text(yaml.safe_dump(content))
    previous = load_counter(str(folder))
    assert previous.training_data is None and previous.interval is None
