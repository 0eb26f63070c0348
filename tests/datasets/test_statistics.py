"""Statistics and validation: defects are reported by name, numbers equal brute force."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from scipy.spatial.distance import cdist

from crowdray.data.decoding import decode_image
from crowdray.data.sample import Sample, decode_depth, decode_roi
from crowdray.datasets import conversion
from crowdray.datasets.sources import Source, open_source
from crowdray.datasets.statistics import (
    DatasetStats,
    compute_stats,
    count_quantiles,
    image_stats,
)
from crowdray.datasets.validation import Distribution, InvalidDatasetError, ValidationReport, validate
from crowdray.errors import UserError

from ..support.builders import HEIGHT, WIDTH, jpeg, make_shanghaitech, samples, write_annotation


def check(source: Source, rows: int = 5) -> ValidationReport:
    stats = [compute_stats(source, items) for items in conversion.split_into_slices(source.items(), rows)]
    return validate(source.name, source.teacher.name, sum(stats, DatasetStats()), source.notes())


def encoded(mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    Image.new(mode, (WIDTH, HEIGHT), 90 if mode == "L" else (1, 2, 3, 4)[: len(mode)]).save(buffer, "JPEG", **options)
    return buffer.getvalue()


@pytest.fixture
def part(tmp_path: Path) -> Path:
    """A part B with one of each defect; by default image n has n - 1 heads."""
    part = make_shanghaitech(tmp_path / "part_B", count=9)
    make_shanghaitech(part, "test", 3)
    train, test = (part / f"{split}_data" for split in ("train", "test"))
    for number in (1, 2, 3):
        (test / "images" / f"IMG_{number}.jpg").write_bytes(jpeg(100 + number))
    (test / "images" / "IMG_2.jpg").write_bytes(jpeg(5))
    images, annotations = train / "images", train / "ground_truth"
    (images / "IMG_3.jpg").write_bytes(jpeg(2))
    (images / "IMG_4.jpg").write_bytes(jpeg(4)[:300])
    write_annotation(annotations / "GT_IMG_6.mat", np.array([[1.0, 2.0], [np.nan, 3.0]]))
    (images / "IMG_7.jpg").write_bytes(encoded("L"))
    unusual = [[-3.0, 5.0], [WIDTH + 0.1, 5.0], [10.0, 10.0], [10.9, 10.9], [10.5, 10.2], [WIDTH, HEIGHT]]
    write_annotation(annotations / "GT_IMG_7.mat", np.array(unusual))
    (images / "IMG_8.jpg").write_bytes(encoded("CMYK"))
    exif = Image.Exif()
    exif[0x0112] = 6
    (images / "IMG_9.jpg").write_bytes(encoded("RGB", exif=exif))
    return part


def test_validate_reports_every_defect(part: Path) -> None:
    report = check(open_source("shanghaitech", str(part), depth="none"))
    train, test = report.splits["train"], report.splits["test"]
    assert (train.images, train.unusable, train.empty, train.heads) == (7, 2, 1, 0 + 1 + 2 + 4 + 6 + 7 + 8)
    assert (test.images, test.unusable, test.empty, test.heads) == (3, 0, 1, 3)
    assert train.counts == Distribution(0, 4, 4, 8) and test.counts == Distribution(0, 1, 1, 2)
    assert train.heights == Distribution(HEIGHT, HEIGHT, HEIGHT, HEIGHT)
    assert train.colours == {"colour": 5, "grey": 1, "CMYK": 1} and test.colours == {"colour": 3}
    assert (train.outside, train.overlapping, train.exif_rotated) == (2, 2, 1)
    assert (train.roi, train.depth, train.with_roi, train.with_depth) == (None, None, 0, 0)
    assert [(image.split, image.name) for image in report.unusable] == [("train", "IMG_4"), ("train", "IMG_6")]
    assert "cannot be decoded" in report.unusable[0].reason and "1 of 2 points" in report.unusable[1].reason
    assert [[f"{i.split}/{i.name}" for i in group] for group in report.duplicates] == [
        ["train/IMG_2", "train/IMG_3"],
        ["train/IMG_5", "test/IMG_2"],
    ]
    unusable, shared = (problem.splitlines() for problem in report.problems)
    assert unusable[0] == "2 images cannot be used:" and unusable[1].startswith("  train/IMG_4: ")
    assert shared[0].startswith("train and test share 1 image, ")
    assert shared[1] == "  train/IMG_5 (4 heads) = test/IMG_2 (1 head)"
    assert report.notes == [
        "1 image repeated within a split: train/IMG_2 (1 head) = train/IMG_3 (2 heads)",
        "2 heads outside the image, in 1 image: train/IMG_7 (2)",
        "2 heads on a pixel that already has one, in 1 image: train/IMG_7 (2)",
        "2 images without heads: train/IMG_1, test/IMG_1",
        "1 image stored in grey, read as RGB: train/IMG_7",
        "1 image stored in CMYK, read as RGB: train/IMG_8",
        "1 image with an EXIF rotation, which training ignores: train/IMG_9",
    ]
    with pytest.raises(
        InvalidDatasetError, match="is not valid: 2 images cannot be used; train and test share 1 image, keep"
    ):
        report.raise_for_problems()


def test_statistics_do_not_depend_on_slices(part: Path) -> None:
    source = open_source("shanghaitech", str(part))
    whole = check(source, 100).as_dict()
    assert json.loads(json.dumps(whole))["valid"] is False
    for rows in (1, 5):
        assert check(source, rows).as_dict() == whole
    a, b, c = (compute_stats(source, items) for items in conversion.split_into_slices(source.items(), 4))
    left, right = (validate("x", "y", sums).as_dict() for sums in ((a + b) + c, a + (b + c)))
    assert left == right and left["splits"] == whole["splits"] and left["images"] == whole["images"]


def test_validate_accepts_a_valid_source_and_an_unusable_split(tmp_path: Path) -> None:
    part = make_shanghaitech(tmp_path / "part_B", count=3)
    check(open_source("shanghaitech", str(part))).raise_for_problems()
    for number in (1, 2, 3):
        (part / "train_data" / "images" / f"IMG_{number}.jpg").write_bytes(b"no image")
    stats = check(open_source("shanghaitech", str(part))).splits["train"]
    assert (stats.images, stats.unusable, stats.heads) == (0, 3, 0)
    assert [stats.counts, stats.heights, stats.widths, stats.spacing, stats.depth] == [None] * 5


def count_outside_roi(sample: Sample) -> int:
    assert sample.roi is not None
    mask = decode_roi(sample.roi)
    return sum(not mask[min(int(y), sample.height - 1), min(int(x), sample.width - 1)] for x, y in sample.points)


def test_image_stats_equal_brute_force() -> None:
    made = samples(40)
    stats = [image_stats(sample) for sample in made]
    for sample, image in zip(made, stats, strict=True):
        assert (image.height, image.width) == decode_image(sample.image).shape[:2]
        assert image.heads == len(sample.points)
        assert image.overlapping == len(sample.points) - len({(int(x), int(y)) for x, y in sample.points})
        if sample.roi is not None and sample.depth is not None:
            assert image.roi == decode_roi(sample.roi).mean() and image.outside_roi == count_outside_roi(sample)
            assert image.depth == (decode_depth(sample.depth).min(), decode_depth(sample.depth).max())
        distances = np.sort(cdist(sample.points, sample.points), axis=1)[:, 1:2]
        assert image.spacing == (pytest.approx(np.median(distances)) if len(sample.points) > 1 else None)
    found = validate("made", "none", DatasetStats(stats)).splits["train"]
    counts = [len(sample.points) for sample in made]
    assert found.counts == Distribution(min(counts), float(np.median(counts)), float(np.mean(counts)), max(counts))
    with_roi = [decode_roi(sample.roi) for sample in made if sample.roi is not None]
    assert found.roi == pytest.approx(np.concatenate([mask.ravel() for mask in with_roi]).mean())
    assert found.spacing is not None
    assert found.spacing.median == np.median([image.spacing for image in stats if image.spacing is not None])


def test_count_quantiles_are_evenly_spaced() -> None:
    stats = [image_stats(sample) for sample in samples(21)]
    counts = sorted(image.heads for image in stats)
    assert [image.heads for image in count_quantiles(stats, 5)] == [counts[rank] for rank in (0, 5, 10, 15, 20)]
    assert len({image.name for image in count_quantiles(stats, 100)}) == 21
    assert count_quantiles([], 3) == []


def test_check_of_converted_dataset_equals_check_of_its_source(tmp_path: Path) -> None:
    part = make_shanghaitech(tmp_path / "part_B", count=5)
    source = open_source("shanghaitech", str(part))
    index = conversion.convert(source, str(tmp_path / "made"))
    made = open_source("crowdray", str(tmp_path / "made"))
    assert check(made).as_dict() == check(source).as_dict()
    again = conversion.convert(made, str(tmp_path / "again"))
    assert again == index
    bare = check(open_source("crowdray", str(tmp_path / "made"), depth="none"))
    assert bare.depth_teacher == "none"
    assert bare.splits["train"].with_depth == 0 < check(source).splits["train"].with_depth
    with pytest.raises(UserError, match="--depth points: a converted dataset keeps its depth"):
        open_source("crowdray", str(tmp_path / "made"), depth="points")
