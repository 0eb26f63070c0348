"""Figures of training runs: plotted values, sizes and labels."""

import io
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from crowdray import storage
from crowdray.data.image_cache import DecodedImage, ImageCache
from crowdray.data.shards import Dataset
from crowdray.evaluation.inference import image_to_tensor
from crowdray.evaluation.metrics import ImageCount
from crowdray.models.build import build_counter
from crowdray.models.counter import Counter
from crowdray.plots.overlay import draw_overlay
from crowdray.plots.training import draw_calibration, draw_density_levels, draw_history, draw_overview
from crowdray.presets import debug

URI = "memory://figures/figure.png"


@pytest.fixture(scope="module")
def counter() -> Counter:
    return build_counter(debug(), density_scale=0.1).eval()  # counts in the hundreds, so that each row is visible


@pytest.fixture(scope="module")
def images(discs: Dataset) -> list[DecodedImage]:
    """An image with region of interest and heads, one without both, one with heads only."""
    store = ImageCache(discs, 1, use_roi=True, cache_bytes=1e9)
    rows = discs.rows("train")
    chosen = [store[int(rows[4])], store[int(rows[9])], store[int(rows[7])]]
    assert [len(p.points) > 0 for p in chosen] == [True, False, True]
    assert [p.roi is None for p in chosen] == [False, True, True]
    return chosen


def open_png() -> Image.Image:
    return Image.open(io.BytesIO(storage.read_bytes(URI)))


def axes_texts(figure: Figure) -> list[str]:
    return [text.get_text() for axes in figure.axes for text in axes.texts]


def test_overview_counts_inside_roi_on_one_scale(
    counter: Counter, images: list[DecodedImage], drawn: list[Figure]
) -> None:
    draw_overview(counter, images, URI, sigma=2.0, threshold=0.3)
    expected = []
    for decoded in images:
        with torch.no_grad():
            density = counter.density(image_to_tensor(decoded.image, torch.device("cpu")))[0, 0].double().numpy()
        inside = density if decoded.roi is None else density[decoded.roi]
        expected += [f"{len(decoded.points)}", f"{inside.sum():.1f}"]
    assert [text for text in axes_texts(drawn[0]) if text != "no heads"] == expected
    assert len(drawn[0].axes) == 5 * len(images)
    for row in range(len(images)):
        truth, predicted = (drawn[0].axes[5 * row + column].images[0] for column in (1, 2))
        assert truth.get_clim() == predicted.get_clim()
    assert open_png().width == 1600


def test_overview_accepts_baseline_and_stripped_counter(
    counter: Counter, images: list[DecodedImage], drawn: list[Figure]
) -> None:
    draw_overview(counter, images[:1], URI, sigma=2.0, threshold=0.3, baseline=counter.strip())
    titles = [axes.get_title() for axes in drawn[0].axes]
    assert titles[:4] == ["Photo and heads", "Ground truth", "Baseline", "Joint model"]
    draw_overview(counter.strip(), images[:1], URI, sigma=2.0, threshold=0.3)
    assert len(drawn[1].axes) == 3


def test_overview_names_files_and_draws_depth_in_the_crowd_alone(
    counter: Counter, images: list[DecodedImage], drawn: list[Figure]
) -> None:
    names = ["a" * 50, "empty.jpg"]
    draw_overview(counter, images[:2], URI, sigma=2.0, threshold=0.3, title="discs, test: run", names=names)
    texts = axes_texts(drawn[0])
    assert "empty.jpg" in texts and any(text.startswith("…aaa") for text in texts)
    crowded, empty = drawn[0].axes[4], drawn[0].axes[9]
    depth = crowded.images[1].get_array()
    assert isinstance(depth, np.ma.MaskedArray) and 0 < depth.count() < depth.size
    assert len(empty.images) == 1 and "no heads" in [text.get_text() for text in empty.texts]
    (scale,) = crowded.child_axes
    assert [text.get_text() for text in scale.texts] == ["near", "far"]


@pytest.mark.parametrize("size", [(30, 40), (480, 640), (700, 2000), (900, 10)])
def test_overlay_count_is_sum_of_density(size: tuple[int, int], drawn: list[Figure]) -> None:
    height, width = size
    rng = np.random.default_rng(0)
    density = rng.random(((height + 1) // 2, (width + 1) // 2), dtype=np.float32) / np.float32(100)
    image = np.full((height, width, 3), 120, np.uint8)
    draw_overlay(image, density, URI)
    assert axes_texts(drawn[0]) == [f"{density.sum(dtype=np.float64):.1f} heads"]
    shown = open_png()
    longest = max(shown.size)
    assert longest == min(max(max(size), 640), 1280)
    scale = longest / max(size)
    assert shown.size == (round(width * scale), round(height * scale))


def test_overlay_empty_density_keeps_photo() -> None:
    image = np.random.default_rng(0).integers(0, 256, (480, 640, 3), dtype=np.uint8)
    draw_overlay(image, np.zeros((240, 320), np.float32), URI)
    shown = np.asarray(open_png())
    np.testing.assert_array_equal(shown[:400], image[:400])


def counted(bias: float, rows: range = range(40)) -> list[ImageCount]:
    rng = np.random.default_rng(5)
    truth = rng.permutation(np.arange(100, 100 + len(rows)))
    return [ImageCount(r, int(t), float(t + bias), 0.0) for r, t in zip(rows, truth, strict=True)]


def test_density_levels_are_group_means_by_true_count(drawn: list[Figure]) -> None:
    joint, baseline = counted(1.0), counted(-3.0)[::-1]
    draw_density_levels(joint, baseline, URI)
    axes = drawn[0].axes[0]
    means = np.arange(100, 140).reshape(10, 4).mean(axis=1)
    np.testing.assert_allclose([bar.get_height() for bar in axes.patches], means)  # type: ignore[attr-defined]
    for line, shift in zip(axes.lines, (-3.0, 1.0), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), means + shift)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"{low}-{low + 3}" for low in range(100, 140, 4)]
    draw_density_levels(joint[:3], joint[:3], URI)
    assert len(drawn[1].axes[0].patches) == 3


def test_calibration_plots_each_image_and_bias(drawn: list[Figure]) -> None:
    draw_calibration(counted(1.5), URI, "discs, test: run")
    axes = drawn[0].axes[0]
    assert axes.get_title() == "discs, test: run\n40 images of 100-139 heads: MAE 1.50, RMSE 1.50"
    points = np.asarray(axes.collections[0].get_offsets())
    np.testing.assert_allclose(points[:, 1] - points[:, 0], 1.5)
    legend = axes.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["equal", "bias +1.50"]
    draw_calibration([ImageCount(0, 0, 0.0, 0.0)], URI)


def history() -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for stage, maes in (("baseline", [5.0, 3.0, 4.0]), ("decoders", [None]), ("joint", [2.5, 2.75])):
        for mae in maes:
            row: dict[str, Any] = {"epoch": len(rows) + 1, "stage": stage}
            row |= {f"loss/{task}": 0.1 for task in (["count"] if mae is None else ["density", "count"])}
            rows.append(row | ({} if mae is None else {"val/mae": mae, "val/rmse": mae * 1.3}))
    return rows


def test_history_breaks_at_stages_and_marks_best_epochs(drawn: list[Figure]) -> None:
    draw_history(history(), URI)
    above, below = drawn[0].axes
    assert [text.get_text() for text in above.texts] == ["baseline", "decoders", "joint"]
    rings = [line for line in below.lines if line.get_markersize() == 7]
    assert [(r.get_xdata()[0], r.get_ydata()[0]) for r in rings] == [(2, 3.0), (5, 2.5)]  # type: ignore[index]
    assert [len(np.asarray(line.get_xdata())) for line in above.lines] == [3, 2, 3, 1, 2]


def test_history_single_epoch_draws() -> None:
    for rows in (history()[:1], history()[3:4]):
        draw_history(rows, URI)
