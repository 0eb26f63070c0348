"""Figures of a training run: predicted maps as in the paper's Figure 6, count errors, and learning curves.

Shape legend: H W image in working pixels, h w output cells, N heads.
"""

import os
from collections.abc import Mapping, Sequence
from itertools import groupby
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import Normalize, PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from crowdray.data.image_cache import DecodedImage
from crowdray.data.targets import Targets, make_targets
from crowdray.evaluation.inference import image_to_tensor, roi_cells
from crowdray.evaluation.metrics import ImageCount, summarise
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION, Counter
from crowdray.plots import style

_INCHES = 10.0
"""Width of the overview: 1600 pixels."""
_NAME_LENGTH = 34
"""Longest name of a file that is shown whole."""
_TASKS = {DENSITY: style.BLUE, SEGMENTATION: style.GREEN, DEPTH: style.ORANGE, COUNT: style.PINK}
_ERRORS = {"MAE": style.BLUE, "RMSE": style.SKY}


def draw_overview(
    counter: Counter,
    images: Sequence[DecodedImage],
    path: str | os.PathLike[str],
    *,
    sigma: float,
    threshold: float,
    baseline: Counter | None = None,
    title: str = "",
    names: Sequence[str] = (),
) -> None:
    """Draw a row per image: photo and heads, true and predicted density, crowd segmentation, depth.

    Densities of a row share one colour scale; their counts are sums inside the region of interest. A thin line on the
    segmentation bounds the true crowd. Depth is shown where the crowd is, from the nearest to the farthest there.

    Args:
        counter: Model in evaluation mode whose maps are drawn; panels of missing decoders are omitted.
        images: At least one image.
        path: Path or URI of the PNG.
        sigma: Standard deviation in pixels of the density targets.
        threshold: Threshold of the segmentation targets.
        baseline: Another model whose density is drawn before that of `counter`.
        title: Dataset, split and run.
        names: File of each image.
    """
    shapes = [float(np.clip(decoded.size[0] / decoded.size[1], 0.4, 1.2)) for decoded in images]
    columns = 3 + (baseline is not None) + (SEGMENTATION in counter.decoders) + (DEPTH in counter.decoders)
    height = 0.5 + 0.25 * bool(title) + sum(shapes) * _INCHES / columns
    layout = ConstrainedLayoutEngine(w_pad=0.02, h_pad=0.04, wspace=0, hspace=0)
    figure = Figure(figsize=(_INCHES, height), dpi=style.DPI, layout=layout, facecolor="white")
    grid = figure.subplots(len(images), columns, squeeze=False, height_ratios=shapes)
    for row, decoded in zip(grid, images, strict=True):
        titles = _draw_row(row, counter, decoded, sigma, threshold, baseline)
    for axes, heading in zip(grid[0], titles, strict=True):
        axes.set_title(heading, size=8.5, color=style.INK)
    for axes, name in zip(grid[:, 0], names, strict=False):
        shown = name if len(name) <= _NAME_LENGTH else f"…{name[1 - _NAME_LENGTH :]}"
        style.badge(axes, shown, 6, top=True)
    note = (
        "Numbers: heads inside the dashed region of interest. Densities in a row share one colour scale. "
        "Depth: in the annotated crowd, each row on a scale of its own."
    )
    figure.supxlabel(note, size=6.5, color=style.FAINT)
    figure.suptitle(title, size=9.5, color=style.INK, weight="bold")
    style.save_figure(figure, path)


def draw_calibration(counts: Sequence[ImageCount], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw predicted against true counts with the identity line and the bias; save a PNG at a path or URI."""
    metrics = summarise(counts)
    truth = np.array([count.truth for count in counts], dtype=np.float64)
    predicted = np.array([count.predicted for count in counts])
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    padding = max(1.0, 0.05 * (high - low))
    ends = np.array([min(low, 0.0) if low < 0.3 * high else low - padding, high + padding])
    figure = Figure(figsize=(4.6, 4.6), dpi=style.DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.plot(ends, ends, color=style.FAINT, linewidth=1, label="equal")
    bias = f"bias {metrics.bias:+.2f}"
    axes.plot(ends, ends + metrics.bias, "--", color=style.VERMILION, linewidth=1, label=bias)
    size, alpha = (5, 0.35) if len(counts) > 300 else (14, 0.6)
    axes.scatter(truth, predicted, s=size, alpha=alpha, color=style.BLUE, linewidths=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="annotated heads", ylabel="predicted heads")
    images = f"{metrics.images:,} images of {_range(truth)} heads: MAE {metrics.mae:.2f}, RMSE {metrics.rmse:.2f}"
    axes.set_title(f"{title}\n{images}".strip(), size=9, color=style.INK)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    style.style_axes(axes)
    style.save_figure(figure, path)


def draw_density_levels(
    counts: Sequence[ImageCount],
    baseline_counts: Sequence[ImageCount],
    path: str | os.PathLike[str],
    title: str = "",
) -> None:
    """Draw the paper's Figure 4a: mean counts of up to ten groups of images by true count; same rows in any order."""
    joint, baseline = ({count.row: count for count in given} for given in (counts, baseline_counts))
    rows = sorted(joint, key=lambda row: (joint[row].truth, row))
    groups = np.array_split(np.array(rows), min(10, len(rows)))
    positions = np.arange(1, len(groups) + 1)
    figure = Figure(figsize=(6.4, 3.6), dpi=style.DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    truth = [np.mean([joint[row].truth for row in group]) for group in groups]
    axes.bar(positions, truth, 0.72, color=style.PAPER, label="ground truth")
    models = (("baseline", baseline, style.ORANGE, "s"), ("joint model", joint, style.BLUE, "o"))
    for name, counted, colour, marker in models:
        means = [np.mean([counted[row].predicted for row in group]) for group in groups]
        label = f"{name} (MAE {summarise(list(counted.values())).mae:.2f})"
        axes.plot(positions, means, marker, color=colour, markersize=6, alpha=0.9, label=label)
    ranges = [_range(np.array([joint[row].truth for row in group])) for group in groups]
    axes.set_xticks(positions, ranges)
    axes.set(xlabel=f"annotated heads, groups of about {len(groups[-1])} images", ylabel="mean heads per image")
    axes.set_title(title, size=9, color=style.INK)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    style.style_axes(axes)
    style.save_figure(figure, path)


def draw_history(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str], title: str = "") -> None:
    """Draw the losses and validation errors of each epoch, with the best epoch of each stage marked.

    A row has "epoch", "stage", "loss/<task>" and, in validated stages, "val/mae" and "val/rmse".
    """
    figure = Figure(figsize=(7.6, 4.6), dpi=style.DPI, layout="constrained", facecolor="white")
    above, below = figure.subplots(2, 1, sharex=True)
    stages = [list(rows) for _, rows in groupby(history, key=lambda row: row["stage"])]
    for task, colour in _TASKS.items():
        _draw_series(above, stages, f"loss/{task}", task, colour)
    for error, colour in _ERRORS.items():
        _draw_series(below, stages, f"val/{error.lower()}", error, colour)
    for number, rows in enumerate(stages):
        _mark_stage(above, below, rows, style.PAPER if number % 2 else "white")
    first, last = history[0]["epoch"] - 0.5, history[-1]["epoch"] + 0.5
    above.set(yscale="log", ylabel="loss, unweighted", xlim=(first, last))
    below.set(xlabel="epoch", ylabel="validation error, heads")
    below.set_ylim(bottom=0)
    below.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.suptitle(title, size=9, color=style.INK)
    for axes in (above, below):
        if axes.lines:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        style.style_axes(axes)
    style.save_figure(figure, path)


def _range(counts: NDArray[Any]) -> str:
    """The lowest and the highest count; a single number where they are equal."""
    low, high = counts.min(), counts.max()
    return f"{low:.0f}" if low == high else f"{low:.0f}-{high:.0f}"


def image_targets(decoded: DecodedImage, sigma: float, threshold: float, stride: int) -> Targets:
    """Return the training targets of a whole image in cells of `stride` pixels, with zero depth."""
    points = torch.from_numpy(np.array(decoded.points, dtype=np.float32))[None]
    roi = None if decoded.roi is None else torch.from_numpy(decoded.roi.astype(np.float32))[None, None]
    depth = torch.zeros(1, 1, *decoded.size)
    valid = torch.ones(points.shape[:2])
    return make_targets(points, valid, decoded.size, depth, sigma=sigma, threshold=threshold, stride=stride, roi=roi)


def _mark_stage(above: Axes, below: Axes, rows: Sequence[Mapping[str, Any]], background: str) -> None:
    """Draw a stage's background and name, and a ring around its best epoch."""
    first, last = rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5
    for axes in (above, below):
        axes.axvspan(first, last, color=background, alpha=0.45, zorder=0, linewidth=0)
    options: dict[str, Any] = {"transform": above.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    above.text((first + last) / 2, 1.02, rows[0]["stage"], size=8, color=style.INK, **options)
    scored = [row for row in rows if "val/mae" in row]
    if scored:
        best = min(scored, key=lambda row: row["val/mae"])
        point = (best["epoch"], best["val/mae"])
        below.plot(*point, "o", markerfacecolor="none", markeredgecolor=style.INK, markersize=7)
        offset: dict[str, Any] = {"xytext": (0, -7), "textcoords": "offset points", "ha": "center", "va": "top"}
        below.annotate(f"{point[1]:.2f}", point, size=7.5, color=style.INK, **offset)


def _draw_series(axes: Axes, stages: Sequence[Sequence[Mapping[str, Any]]], name: str, label: str, colour: str) -> None:
    """Draw one value over the epochs as a line per stage with a single legend entry."""
    for rows in stages:
        pairs = [(row["epoch"], row[name]) for row in rows if name in row]
        if pairs:
            marker = "o" if len(pairs) == 1 else ""
            axes.plot(*zip(*pairs, strict=True), color=colour, linewidth=1.4, marker=marker, markersize=3, label=label)
            label = "_"


def _draw_row(
    row: Sequence[Axes],
    counter: Counter,
    decoded: DecodedImage,
    sigma: float,
    threshold: float,
    baseline: Counter | None,
) -> list[str]:
    """Draw the panels of one image and return their titles."""
    stride = counter.encoder.output_stride
    roi = roi_cells(np.ones(decoded.size, dtype=np.bool_) if decoded.roi is None else decoded.roi, stride)
    targets = image_targets(decoded, sigma, threshold, stride)
    maps = _predict(counter, decoded)
    densities = {"Ground truth": targets.density[0, 0].numpy()}
    if baseline is not None:
        densities["Baseline"] = _predict(baseline, decoded)[DENSITY]
    densities["Density" if baseline is None else "Joint model"] = maps[DENSITY]
    top = max(float((values * roi).max()) for values in densities.values()) or 1.0

    height, width = decoded.size
    photo, *others = row
    photo.imshow(decoded.image, extent=(0, width, height, 0), interpolation="antialiased")
    size = float(np.clip(600 / max(1, len(decoded.points)), 3, 14))
    x, y = decoded.points.T
    photo.scatter(x, y, s=size, color=style.HEAD_COLOUR, edgecolors="black", linewidths=0.4)
    panels = iter(others)
    for title, values in densities.items():
        axes = next(panels)
        style.draw_map(axes, values, style.DENSITY_CMAP, PowerNorm(style.GAMMA, 0, top), stride)
        heads = f"{len(decoded.points)}" if title == "Ground truth" else f"{(values * roi).sum(dtype=np.float64):.1f}"
        style.badge(axes, heads, 9)
    titles = ["Photo and heads", *densities]
    if SEGMENTATION in maps:
        axes = next(panels)
        style.draw_map(axes, maps[SEGMENTATION], style.SEGMENTATION_CMAP, cell=stride)
        style.draw_outline(axes, targets.segmentation[0, 0].numpy(), style.HEAD_COLOUR, 0.6, cell=stride)
        titles.append("Crowd segmentation")
    if DEPTH in maps:
        _draw_depth(next(panels), decoded, maps[DEPTH], targets.segmentation[0, 0].numpy() > 0, stride)
        titles.append("Distilled depth")
    for axes in row:
        if decoded.roi is not None:
            style.draw_roi(axes, decoded.roi)
        axes.set(xlim=(0, width), ylim=(height, 0))
        axes.set_axis_off()
    return titles


def _draw_depth(
    axes: Axes, decoded: DecodedImage, depth: NDArray[np.float32], crowd: NDArray[np.bool_], cell: int
) -> None:
    """Draw the depth of the crowd (h, w) over a dark photo, with a scale from near to far.

    Elsewhere the decoder is trained to return 0, whatever the distance.
    """
    height, width = decoded.size
    grey = decoded.image.mean(axis=2) / 255
    extent = (0, width, height, 0)
    axes.imshow(grey, cmap="gray", vmin=0, vmax=2.5, extent=extent, interpolation="antialiased")
    if not crowd.any():
        axes.text(0.5, 0.5, "no heads", transform=axes.transAxes, ha="center", color="white", size=7.5)
        return
    limits = Normalize(float(depth[crowd].min()), float(depth[crowd].max()))
    shown = np.ma.masked_array(depth, mask=~crowd)
    extent = (0, depth.shape[1] * cell, depth.shape[0] * cell, 0)
    axes.imshow(shown, cmap=style.DEPTH_CMAP, norm=limits, extent=extent, interpolation="nearest")
    scale = axes.inset_axes((0.22, 0.04, 0.4, 0.045))
    scale.imshow(np.linspace(0, 1, 64)[None], cmap=style.DEPTH_CMAP, aspect="auto")
    scale.set_axis_off()
    for x, align, text in ((-0.06, "right", "near"), (1.06, "left", "far")):
        scale.text(x, 0.5, text, transform=scale.transAxes, ha=align, va="center", color="white", size=7.5)


def _predict(counter: Counter, decoded: DecodedImage) -> dict[str, NDArray[np.float32]]:
    """Predict the maps (h, w) of an image: heads per cell, crowd probability, distilled depth."""
    tasks = [task for task in (DENSITY, SEGMENTATION, DEPTH) if task in counter.decoders]
    image = image_to_tensor(decoded.image, next(counter.parameters()).device)
    with torch.inference_mode():
        maps = {task: values[0, 0].float().cpu() for task, values in counter(image, tasks).items()}
    maps[DENSITY] = maps[DENSITY] / counter.density_scale
    if SEGMENTATION in maps:
        maps[SEGMENTATION] = maps[SEGMENTATION].sigmoid()
    return {task: values.numpy() for task, values in maps.items()}
