"""Charts of evaluations: plotted values, and SVG for a page."""

import re
from typing import Any

import numpy as np
import pytest
from matplotlib.figure import Figure

from crowdray.evaluation.metrics import ImageCount
from crowdray.evaluation.report import EvaluatedDataset, make_report
from crowdray.plots import style
from crowdray.plots.evaluation import draw_calibration, draw_deciles, draw_errors, draw_matrix
from crowdray.plots.layers import density_layer, points_path
from crowdray.plots.svg import inline_svg

from ..support.evaluations import evaluated_image, evaluated_model, evaluation_report


def counted(bias: float, images: int = 40) -> list[ImageCount]:
    truth = np.random.default_rng(5).permutation(np.arange(100, 100 + images))
    return [ImageCount(row, int(t), float(t + bias), 0.0) for row, t in enumerate(truth)]


def test_deciles_are_group_means_of_each_counter() -> None:
    axes = draw_deciles([counted(1.0), counted(-3.0)[::-1]]).axes[0]
    means = np.arange(100, 140).reshape(10, 4).mean(axis=1)
    bars: Any = axes.patches
    np.testing.assert_allclose([bar.get_height() for bar in bars], means)
    for line, bias in zip(axes.lines, (1.0, -3.0), strict=True):
        np.testing.assert_allclose(np.asarray(line.get_ydata()), means + bias)
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert labels == [f"{low}-{low + 3}" for low in range(100, 140, 4)]


def test_scatter_charts_show_each_image() -> None:
    for figure, shift in ((draw_errors(counted(1.5), style.BLUE), 0), (draw_calibration(counted(1.5), None, "red"), 1)):
        points = np.asarray(figure.axes[0].collections[0].get_offsets())
        np.testing.assert_allclose(points[:, 1] - shift * points[:, 0], 1.5)


def test_matrix_relates_errors_to_the_mean_predictor() -> None:
    truth = [2, 4, 9]
    mean = [evaluated_image(row, heads, 5.0) for row, heads in enumerate(truth)]
    exact = [evaluated_image(row, heads, float(heads)) for row, heads in enumerate(truth)]
    report = evaluation_report({"models:/mean/1": mean, "models:/exact/1": exact})
    assert [result.relative_mae for result in report.results] == [1.0, 0.0]
    texts = [text.get_text() for text in draw_matrix(report).axes[0].texts]
    assert texts == ["2.67", "1.00 x constant", "0.00", "0.00 x constant"]


def test_matrix_marks_the_training_dataset() -> None:
    data = [EvaluatedDataset("/data", name, "e" * 64, "test", 1, 3) for name in ("mall", "other")]
    images = [evaluated_image(0, 3, 2.0), evaluated_image(1, 5, 4.0)]
    report = make_report([evaluated_model()], data, {(0, 0): images, (1, 0): images})
    assert [result.trained_here for result in report.results] == [True, False]
    frames = [patch for patch in draw_matrix(report).axes[0].patches if not patch.get_fill()]
    assert len(frames) == 1


@pytest.mark.parametrize("text", ["market $_$", "<script>", "a & b"])
def test_inline_svg_escapes_texts_and_takes_the_colours_of_the_page(text: str) -> None:
    figure = Figure()
    figure.text(0.5, 0.5, text, color=style.INK)
    svg = inline_svg(figure, "name")
    assert svg.startswith("<svg") and "<script" not in svg
    assert text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;") in svg
    assert "var(--ink)" in svg and style.INK not in svg
    assert all(name.startswith("name-") for name in re.findall(r'\bid="([^"]*)"', svg))


def test_layers_of_nothing_are_empty() -> None:
    assert points_path(np.zeros((0, 2))) == ""
    assert points_path(np.array([[3.4, 5.0]])) == "M3 5h0"
    assert density_layer(np.zeros((4, 5), np.float32), 2, 0.0).startswith("data:image/webp;base64,")
