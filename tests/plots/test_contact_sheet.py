"""Dataset figures: heads and maps are aligned, histograms are percentages."""

import io
from typing import Any

import numpy as np
import pytest
import simplejpeg
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import StepPatch
from numpy.typing import NDArray
from PIL import Image

from crowdray import storage
from crowdray.config import TargetConfig
from crowdray.data.sample import Sample, encode_depth, encode_roi, make_sample
from crowdray.datasets.statistics import DatasetStats, ImageStats, image_stats
from crowdray.datasets.validation import ValidationReport, validate
from crowdray.plots import style
from crowdray.plots.contact_sheet import draw_contact_sheet
from crowdray.plots.dataset import draw_histograms

URI = "memory://figures/figure.png"


def read_pixels() -> NDArray[np.uint8]:
    return np.asarray(Image.open(io.BytesIO(storage.read_bytes(URI))).convert("RGB"))


def grey_sample(
    points: Any, size: tuple[int, int] = (90, 120), split: str = "train", roi: bool = False, depth: bool = True
) -> Sample:
    """A grey photo; the left half is the region of interest, depth falls from 1 at the top to 0.25 at the bottom."""
    mask = np.ones(size, dtype=bool) * (np.arange(size[1]) < size[1] // 2)
    return make_sample(
        name="a-name-" * 30,
        split=split,
        scene="",
        image=simplejpeg.encode_jpeg(np.full((*size, 3), 128, np.uint8)),
        points=np.asarray(points, dtype=np.float32).reshape(-1, 2),
        roi=encode_roi(mask) if roi else None,
        depth=encode_depth(np.linspace(1, 0.25, size[0])[:, None] * np.ones(size[1])) if depth else None,
    )


def colour_at(page: NDArray[np.uint8], axes: Axes, x: float, y: float) -> NDArray[np.float64]:
    """Return the colour in [0, 1] of the page at data coordinates of the axes."""
    column, row = axes.transData.transform((x, y))
    colour: NDArray[np.float64] = page[int(page.shape[0] - row), int(column)] / 255
    return colour


def test_save_figure_takes_no_text_for_a_formula_or_a_control_character(drawn: list[Figure]) -> None:
    style.text_figure("market $_$", "cost \x1b[31m", URI)
    assert [text.get_text() for text in drawn[0].texts] == ["market $_$", r"cost \x1b[31m"]


@pytest.mark.parametrize("size", [(90, 120), (120, 90), (600, 3000)])
def test_contact_sheet_heads_and_maps_align_with_photo(size: tuple[int, int], drawn: list[Figure]) -> None:
    height, width = size
    inside = [(0.1 * width, 0.2 * height), (0.4 * width, 0.9 * height)]
    outside = [(0.75 * width, 0.5 * height), (-0.5 * width, 0.6 * height)]
    draw_contact_sheet([grey_sample([*inside, *outside], size, roi=True)], "title", URI)
    page, (photo, depth, crowd) = read_pixels(), drawn[0].axes
    scale = 1 / round(width / np.ptp(photo.get_xlim()))
    for x, y in inside:
        np.testing.assert_allclose(colour_at(page, photo, x * scale, y * scale), to_rgb(style.HEAD_COLOUR), atol=0.02)
        assert colour_at(page, crowd, x * scale, y * scale).min() > 0.5
    x, y = outside[0]
    np.testing.assert_allclose(colour_at(page, photo, x * scale, y * scale), to_rgb(style.VERMILION), atol=0.02)
    assert colour_at(page, crowd, x * scale, y * scale).max() == 0  # excluded from training
    np.testing.assert_allclose(colour_at(page, photo, 1e-3, 0.6 * height * scale), to_rgb(style.VERMILION), atol=0.1)
    plain = colour_at(page, photo, 0.3 * width * scale, 0.5 * height * scale)
    np.testing.assert_allclose(plain, 128 / 255, atol=0.02)
    shaded = colour_at(page, photo, 0.9 * width * scale, 0.2 * height * scale)
    np.testing.assert_allclose(shaded, 0.55 * 128 / 255, atol=0.02)
    shown = np.asarray(depth.images[0].get_array())
    np.testing.assert_allclose(shown[[0, -1], 0], [1, 0.25], atol=0.03)
    boxes = [axes.get_position() for axes in (photo, depth, crowd)]
    for box in boxes:
        shape = box.height * page.shape[0] / (box.width * page.shape[1])
        assert shape == pytest.approx(height / width, rel=0.02)
        assert box.x0 >= 0 and box.x1 <= 1 and box.y0 >= 0


def test_contact_sheet_crowd_equals_segmentation_target(drawn: list[Figure]) -> None:
    sample = grey_sample([(60, 45)])
    draw_contact_sheet([sample], "", URI, target=TargetConfig(sigma=6.0, threshold=0.5))
    crowd = np.asarray(drawn[0].axes[2].images[0].get_array())
    rows, columns = np.mgrid[:90, :120] + 0.5
    far = (columns - 60) ** 2 + (rows - 45) ** 2
    radius = 2 * 6.0**2 * np.log(2)  # where the Gaussian falls to one half
    clear = np.abs(np.sqrt(far) - np.sqrt(radius)) > 0.5
    np.testing.assert_array_equal(crowd[clear] > 0, (far < radius)[clear])


def test_contact_sheet_rows_per_split_and_texts_fit(drawn: list[Figure]) -> None:
    samples = [grey_sample([(5, 5)] * n, depth=n > 0) for n in range(4)]
    samples += [grey_sample([(5, 5)], (200, 90), split="test")]
    draw_contact_sheet(samples, "title", URI)
    page, figure = read_pixels(), drawn[0]
    assert page.shape[1] == 1920 and len(figure.axes) == 3 * 5
    tops = [round(axes.get_position().y1, 6) for axes in figure.axes[::3]]
    assert len(set(tops)) == 3 and tops[0] == tops[1] == tops[2] > tops[3] > tops[4]
    extents = [text.get_window_extent() for text in figure.texts]
    assert all(box.x0 >= 0 and box.x1 <= 1920 and box.y0 >= 0 and box.y1 <= page.shape[0] for box in extents)
    assert not any(a.overlaps(b) for n, a in enumerate(extents) for b in extents[:n])
    counts = [text.get_text() for text in figure.texts if text.get_horizontalalignment() == "right"]
    assert counts == ["0 heads", "1 head", "2 heads", "3 heads", "1 head"]
    assert [len(axes.texts) for axes in figure.axes[1::3]] == [1, 0, 0, 0, 0]  # "no depth" on the first one


def counted(counts: dict[str, list[int]]) -> ValidationReport:
    """Return a report of splits of images with the given counts, heads 10 pixels apart."""
    images: list[ImageStats] = []
    for split, numbers in counts.items():
        made = [grey_sample([(10 * k, 5) for k in range(n)], (20, 20), split=split) for n in numbers]
        images += [image_stats(sample) for sample in made]
    return validate("made", "none", DatasetStats(images))


def bars(axes: Axes) -> list[tuple[NDArray[np.float64], NDArray[np.float64]]]:
    steps = [patch.get_data() for patch in axes.patches if isinstance(patch, StepPatch)]
    return [(values, edges) for values, edges, _ in steps[::2]]


def test_histograms_are_percentages_of_each_split(drawn: list[Figure]) -> None:
    counts = {"train": [12, 13, 13, 40], "test": [20, 22]}
    draw_histograms(counted(counts), URI)
    heads, spacing = drawn[0].axes
    assert heads.get_xscale() == "linear" and read_pixels().shape[1] == 1536
    for (values, edges), numbers in zip(bars(heads), counts.values(), strict=True):
        np.testing.assert_allclose(values, 100 * np.histogram(numbers, edges)[0] / len(numbers))
        assert values.sum() == pytest.approx(100) and (edges % 1 == 0.5).all()
    medians = [line.get_xdata()[0] for line in heads.lines]  # type: ignore[index]
    assert medians == [13, 21]
    for values, edges in bars(spacing):
        assert values.max() == 100 and edges[values.argmax()] <= 10 < edges[values.argmax() + 1]


def test_histograms_wide_counts_use_log_axis(drawn: list[Figure]) -> None:
    draw_histograms(counted({"train": [0, 0, 2, 30, 400]}), URI)
    axes = drawn[0].axes[0]
    legend = axes.get_legend()
    assert axes.get_xscale() == "log" and legend is not None
    assert legend.get_texts()[0].get_text() == "train: median 2, 2 empty"
    assert bars(axes)[0][0].sum() == pytest.approx(60)


def test_plots_missing_data_shows_message(drawn: list[Figure]) -> None:
    draw_contact_sheet([], "nothing", URI)
    draw_histograms(validate("made", "none", DatasetStats()), URI)
    assert [len(figure.axes) for figure in drawn] == [0, 0]
    draw_histograms(counted({"train": [0], "test": [1]}), URI)
    assert drawn[2].axes[1].texts[0].get_text() == "no image has two heads"
