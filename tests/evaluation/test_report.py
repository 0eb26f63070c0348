"""Evaluation of whole photos equals plain recomputation, and what a training says of the same weights."""

import io
import json
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch import Tensor

from crowdray.config import ModelConfig
from crowdray.data.image_cache import ImageCache
from crowdray.data.sample import Sample, decode_image, encode_roi, make_sample
from crowdray.data.shards import Dataset, write_index, write_shard
from crowdray.errors import DataError, UserError
from crowdray.evaluation.inference import count_images
from crowdray.evaluation.metrics import GAME_LEVELS, game_error
from crowdray.evaluation.report import (
    EvaluatedImage,
    RegionCount,
    density_stride,
    evaluate_images,
    summarise_images,
)
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter
from crowdray.presets import debug

CPU = torch.device("cpu")


def redness(factor: int) -> ExportedCounter:
    """A counter whose density can be recomputed by hand: mean red of each cell, in units of 100,000."""

    def density(image: Tensor) -> Tensor:
        pooled = F.avg_pool2d(image[:, :1] * 1.0, factor, ceil_mode=True, count_include_pad=False)
        return pooled / 100_000

    return density  # type: ignore[return-value]


def png_sample(number: int, *, heads: int, roi: bool, scene: str) -> Sample:
    """Noise of 30x44 pixels as PNG; the region of interest leaves out the upper 8 rows."""
    rng = np.random.default_rng(number)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (30, 44, 3), dtype=np.uint8)).save(buffer, "PNG")
    mask = np.ones((30, 44), dtype=bool)
    mask[:8] = False
    points = rng.uniform(0, [44, 30], (heads, 2))
    return make_sample(
        name=f"{number}", split="test", scene=scene, image=buffer.getvalue(), points=points,
        roi=encode_roi(mask) if roi else None,
    )  # fmt: skip


def dataset_of(place: Path, samples: list[Sample]) -> Dataset:
    write_index(str(place), [write_shard(samples, str(place), 0)], source="made", depth_teacher="none")
    return Dataset.open(str(place))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six images of two scenes, one scene with region of interest; one image without heads."""
    samples = [png_sample(n, heads=n * 5, roi=n % 2 == 0, scene=("east", "west")[n % 2]) for n in range(6)]
    return dataset_of(tmp_path_factory.mktemp("mixed") / "data", samples)


def evaluated(dataset: Dataset, factor: int) -> list[EvaluatedImage]:
    return list(evaluate_images(redness(factor), dataset, dataset.rows("test")))


@pytest.mark.parametrize("factor", [1, 2])
def test_counts_are_those_of_plain_recomputation(mixed: Dataset, factor: int) -> None:
    for row, image in enumerate(evaluated(mixed, factor)):
        sample = mixed.sample(row)
        red = decode_image(sample.image)[..., 0].astype(np.float64)
        cells = red.reshape(30 // factor, factor, 44 // factor, factor).mean(axis=(1, 3)) / 100_000
        inside = sample.points[sample.points[:, 1] >= 8] if sample.roi is not None else sample.points
        below = cells.copy()
        below[: 8 // factor] *= sample.roi is None
        assert (image.downsample, image.has_roi) == (factor, sample.roi is not None)
        assert (image.inside.truth, image.whole.truth) == (len(inside), len(sample.points))
        assert image.whole.predicted == pytest.approx(cells.sum(), rel=1e-6)
        assert image.inside.predicted == pytest.approx(below.sum(), rel=1e-6)
        wanted = [game_error(below, inside / factor, level) for level in GAME_LEVELS]
        assert image.inside.game == pytest.approx(wanted, rel=1e-6)


def test_scores_are_means_over_images_and_scenes(mixed: Dataset) -> None:
    images = evaluated(mixed, 1)
    evaluation = summarise_images(images)
    for score, part in (
        (evaluation.overall, images),
        (evaluation.scenes["east"], [image for image in images if image.scene == "east"]),
        (evaluation.scenes["west"], [image for image in images if image.scene == "west"]),
    ):
        error = np.array([image.inside.predicted - image.inside.truth for image in part])
        assert (score.images, score.heads) == (len(part), sum(image.inside.truth for image in part))
        assert score.mae == pytest.approx(np.abs(error).mean())
        assert score.rmse == pytest.approx(np.sqrt((error**2).mean()))
        assert score.bias == pytest.approx(error.mean())
        assert score.game[0] == pytest.approx(score.mae)
        assert list(score.game) == sorted(score.game)
    whole = [abs(image.whole.predicted - image.whole.truth) for image in images]
    assert evaluation.without_roi is not None
    assert evaluation.without_roi.mae == pytest.approx(np.mean(whole))


def test_the_mean_of_scenes_weighs_each_scene_once() -> None:
    def image(row: int, scene: str, truth: int, predicted: float, unmasked: float) -> EvaluatedImage:
        inside, whole = (RegionCount(truth, said, (abs(said - truth),) * 4) for said in (predicted, unmasked))
        return EvaluatedImage(row, str(row), scene, 1, inside, whole, True)

    # S1 errs by 1, 2 and 3 and its whole images by 4 more, S2 by 6 and 7.
    found = [image(0, "S2", 10, 4.0, 3.0), *(image(n, "S1", 10, 10.0 + n, 14.0 + n) for n in (1, 2, 3))]
    evaluation = summarise_images(found)
    assert (evaluation.scenes["S1"].mae, evaluation.scenes["S2"].mae) == (2.0, 6.0)
    assert (evaluation.scene_mae, evaluation.scene_mae_without_roi) == (4.0, 6.5)
    assert evaluation.overall.mae == 3.0
    content = evaluation.to_dict()
    assert (content["scene_mae"], content["scene_mae_without_roi"]) == (4.0, 6.5)


def test_images_that_are_scenes_of_their_own_are_not_listed() -> None:
    count = RegionCount(1, 2.0, (1.0,) * 4)
    evaluation = summarise_images([EvaluatedImage(n, str(n), f"test/{n}", 1, count, count, False) for n in range(3)])
    assert evaluation.scenes == {} and evaluation.scene_mae is None


def test_the_order_of_evaluation_does_not_matter_to_the_last_bit(mixed: Dataset) -> None:
    backwards = list(evaluate_images(redness(2), mixed, reversed(mixed.rows("test").tolist())))
    assert summarise_images(backwards) == summarise_images(evaluated(mixed, 2))


def test_one_scene_without_roi_gives_one_score(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [png_sample(n, heads=3, roi=False, scene="one") for n in range(2)])
    evaluation = summarise_images(evaluated(dataset, 1))
    assert evaluation.without_roi is None
    assert evaluation.scenes == {}


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("backbone", ["cfcn", "csrnet"])
def test_a_packaged_counter_scores_what_its_training_says(discs: Dataset, backbone: str, factor: int) -> None:
    sampling = replace(debug().sampling, context=32)
    config = replace(debug(), sampling=sampling, model=ModelConfig(backbone, "pooled"))
    counter = build_counter(config, density_scale=100.0).eval()
    stride = counter.encoder.output_stride
    rows = discs.rows("test").tolist()
    store = ImageCache(discs, factor, use_roi=True, cache_bytes=1e9)
    in_training = list(count_images(counter.density, store, rows, CPU, stride))
    shipped = ExportedCounter(counter, factor)
    evaluation = summarise_images(list(evaluate_images(shipped, discs, rows, geometry=shipped.geometry)))
    assert evaluation.counts() == in_training


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
def test_a_density_of_a_share_of_the_photo_fits(height: int, width: int, factor: int) -> None:
    cells = (math.ceil(height / factor), math.ceil(width / factor))
    found = density_stride((height, width), (1, 1, *cells), "it")
    assert (math.ceil(height / found), math.ceil(width / found)) == cells
    if min(height, width) >= factor**2:
        assert found == factor


@pytest.mark.parametrize("shape", [(1, 1, 31, 44), (1, 1, 15, 44), (1, 3, 30, 44), (30, 44), (2, 1, 30, 44)])
def test_a_density_that_fits_no_photo_is_refused(mixed: Dataset, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="output for 0 of 30x44 pixels"):
        list(evaluate_images(lambda image: torch.zeros(shape), mixed, [0]))


def test_a_damaged_photo_is_named(tmp_path: Path) -> None:
    whole = png_sample(3, heads=2, roi=False, scene="one")
    broken = replace(whole, name="street/7", image=bytes(whole.image)[:200])
    dataset = dataset_of(tmp_path / "d", [whole, broken])
    with pytest.raises(DataError, match=r"street/7 \(row 1 of .*\): the image cannot be decoded"):
        list(evaluate_images(redness(1), dataset, [0, 1]))


def test_what_is_written_is_json_also_where_there_are_no_heads(tmp_path: Path) -> None:
    dataset = dataset_of(tmp_path / "d", [png_sample(0, heads=0, roi=True, scene="one")])
    evaluation = summarise_images(evaluated(dataset, 1))
    content = json.loads(json.dumps(evaluation.to_dict(split="test"), allow_nan=False))
    assert content["split"] == "test"
    assert content["overall"]["nae"] is None
    assert content["images"][0]["inside"]["truth"] == 0
