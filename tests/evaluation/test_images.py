"""Reports: comparison with plain recomputation and with the trainer's counts, scenes, and the table."""

import io
import json
import math
from collections.abc import Callable
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
from crowdray.data.decoding import decode_image
from crowdray.data.image_cache import ImageCache
from crowdray.data.sample import Sample, encode_roi, make_sample
from crowdray.data.shards import Dataset
from crowdray.errors import DataError, UserError
from crowdray.evaluation.images import EvaluatedImage, RegionCount, density_stride, evaluate_images
from crowdray.evaluation.inference import count_images
from crowdray.evaluation.metrics import GAME_LEVELS, game_error
from crowdray.evaluation.summary import summarise_images
from crowdray.models.build import build_counter
from crowdray.models.export import ExportedCounter
from crowdray.presets import debug

from ..support.builders import write_dataset

CPU = torch.device("cpu")


def red_counter(factor: int) -> Callable[[Tensor], Tensor]:
    """A density function: the mean red of each cell, divided by 100,000."""
    return lambda image: F.avg_pool2d(image[:, :1] / 100_000, factor, ceil_mode=True, count_include_pad=False)


def png_sample(number: int, *, heads: int, roi: bool, scene: str) -> Sample:
    """Noise of 30x44 pixels as PNG; the region of interest excludes the upper 8 rows."""
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


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    """Six images of two scenes, of which one has regions of interest; one image without heads."""
    samples = [png_sample(n, heads=n * 5, roi=n % 2 == 0, scene=("east", "west")[n % 2]) for n in range(6)]
    return write_dataset(str(tmp_path_factory.mktemp("mixed")), samples)


def evaluate(dataset: Dataset, factor: int) -> list[EvaluatedImage]:
    return list(evaluate_images(red_counter(factor), dataset, dataset.rows("test")))


@pytest.mark.parametrize("factor", [1, 2])
def test_evaluate_images_equals_plain_recomputation(mixed: Dataset, factor: int) -> None:
    for row, image in enumerate(evaluate(mixed, factor)):
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


def counted_image(row: int, scene: str, predicted: float, unmasked: float, has_roi: bool = True) -> EvaluatedImage:
    """An image of ten heads."""
    inside, whole = (RegionCount(10, count, (abs(count - 10),) * 4) for count in (predicted, unmasked))
    return EvaluatedImage(row, str(row), scene, 1, inside, whole, has_roi)


def test_summarise_images_weights_scenes_equally() -> None:
    # Errors of S1 are 1, 2 and 3, of its whole images 4 more; those of S2 are 6 and 7.
    images = [counted_image(0, "S2", 4.0, 3.0), *(counted_image(n, "S1", 10.0 + n, 14.0 + n) for n in (1, 2, 3))]
    evaluation = summarise_images(images)
    assert (evaluation.scenes["S1"].mae, evaluation.scenes["S2"].mae) == (2.0, 6.0)
    assert (evaluation.scene_mae, evaluation.scene_mae_without_roi) == (4.0, 6.5)
    overall = evaluation.overall
    assert overall is not None
    assert (overall.images, overall.heads, overall.mae, overall.bias, overall.game) == (4, 40, 3.0, 0.0, (3.0,) * 4)
    assert evaluation.without_roi is not None and evaluation.without_roi.mae == 6.25


@pytest.mark.parametrize("scenes", [("one", "one", "one"), ("test/0", "test/1", "test/2")])
def test_summarise_images_with_one_scene_or_a_scene_per_image_lists_no_scenes(scenes: tuple[str, ...]) -> None:
    evaluation = summarise_images([counted_image(n, scene, 2.0, 2.0, False) for n, scene in enumerate(scenes)])
    assert evaluation.scenes == {} and evaluation.scene_mae is None and evaluation.without_roi is None


def test_summarise_images_is_bit_identical_for_any_order(mixed: Dataset) -> None:
    reverse = list(evaluate_images(red_counter(2), mixed, reversed(mixed.rows("test").tolist())))
    assert summarise_images(reverse) == summarise_images(evaluate(mixed, 2))


@pytest.mark.parametrize("factor", [1, 2])
@pytest.mark.parametrize("backbone", ["cfcn", "csrnet"])
def test_evaluate_images_equals_count_images_in_training(discs: Dataset, backbone: str, factor: int) -> None:
    sampling = replace(debug().sampling, context=32)
    config = replace(debug(), sampling=sampling, model=ModelConfig(backbone, "pooled"))
    counter = build_counter(config, density_scale=100.0).eval()
    stride = counter.encoder.output_stride
    rows = discs.rows("test").tolist()
    cache = ImageCache(discs, factor, use_roi=True, cache_bytes=1e9)
    in_training = list(count_images(counter.density, cache, rows, CPU, stride))
    exported = ExportedCounter(counter, factor)
    evaluation = summarise_images(list(evaluate_images(exported, discs, rows, geometry=exported.geometry)))
    assert evaluation.counts() == in_training


@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 9))
def test_density_stride_fits_the_density_of_any_downsampling(height: int, width: int, factor: int) -> None:
    cells = (math.ceil(height / factor), math.ceil(width / factor))
    found = density_stride((height, width), (1, 1, *cells), "image")
    assert (math.ceil(height / found), math.ceil(width / found)) == cells
    if min(height, width) >= factor**2:
        assert found == factor


@pytest.mark.parametrize("shape", [(1, 1, 31, 44), (1, 1, 15, 44), (1, 3, 30, 44), (30, 44), (2, 1, 30, 44)])
def test_evaluate_images_rejects_densities_of_other_shapes(mixed: Dataset, shape: tuple[int, ...]) -> None:
    with pytest.raises(UserError, match="output for 0 of 30x44 pixels"):
        list(evaluate_images(lambda image: torch.zeros(shape), mixed, [0]))


def test_evaluate_images_reports_a_damaged_image(tmp_path: Path) -> None:
    intact = png_sample(3, heads=2, roi=False, scene="one")
    broken = replace(intact, name="street/7", image=bytes(intact.image)[:200])
    dataset = write_dataset(str(tmp_path), [intact, broken])
    with pytest.raises(DataError, match=r"street/7 \(row 1 of .*\): the PNG image cannot be decoded"):
        list(evaluate_images(red_counter(1), dataset, [0, 1]))


def test_evaluation_to_dict_is_valid_json_without_heads(tmp_path: Path) -> None:
    dataset = write_dataset(str(tmp_path), [png_sample(0, heads=0, roi=True, scene="one")])
    evaluation = summarise_images(evaluate(dataset, 1))
    content = json.loads(json.dumps(evaluation.to_dict(split="test"), allow_nan=False))
    assert content["split"] == "test"
    assert content["overall"]["nae"] is None
    assert content["images"][0]["inside"]["truth"] == 0
