"""The figures of a training: what the model sees, as in the paper's Figure 6, and how well it counts.

Shape legend: H W image in working pixels, h w output cells, B batch.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
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
_TASKS = {DENSITY: style.BLUE, SEGMENTATION: style.GREEN, DEPTH: style.ORANGE, COUNT: style.PINK}
_ERRORS = {"MAE": style.BLUE, "RMSE": style.SKY}


@dataclass(frozen=True, eq=False)
class _Panel:
    """One field of the overview."""

    title: str
    values: NDArray[Any]
    """(H, W, 3) for the photo, (h, w) cells for a map."""
    cell: int = 1
    """Pixels of a value, along a side."""
    colours: str | None = None
    """Name of the colour map; None for a photo."""
    top: float = 1.0
    """Value of the brightest colour."""
    count: str | None = None
    """What stands in the corner."""
    heads: NDArray[np.float32] | None = None
    """(N, 2) points to mark."""
    outline: NDArray[np.float32] | None = None
    """(h, w) zeros and ones, whose border is drawn."""


def draw_overview(
    counter: Counter,
    pictures: Sequence[DecodedImage],
    path: str | os.PathLike[str],
    *,
    sigma: float,
    threshold: float,
    baseline: Counter | None = None,
) -> None:
    """Draw a row for each picture: photo and heads, true and predicted density, crowd segmentation, depth.

    counter: with all its decoders; those it does not have are left out.
    baseline: another counter, whose density is shown before the first one's.
    sigma, threshold: those of the training's targets.

    Densities of a row share one colour scale; their counts are sums inside the region of interest, whose
    border is drawn. A thin line on the segmentation bounds the true crowd. Writes a PNG, 1600 pixels wide, to
    a path or URI. Raises ValueError without pictures.
    """
    if not pictures:
        raise ValueError("there is no picture to draw an overview of")
    rows = [_panels(counter, picture, sigma, threshold, baseline) for picture in pictures]
    shapes = [float(np.clip(picture.size[0] / picture.size[1], 0.4, 1.2)) for picture in pictures]
    head, foot, gap = 0.26, 0.28, 0.05
    side = (_INCHES - gap * (len(rows[0]) + 1)) / len(rows[0])
    height = head + foot + sum(shape * side + gap for shape in shapes)
    figure = Figure(figsize=(_INCHES, height), dpi=style.DPI, facecolor="white")
    top = height - head
    for number, (picture, panels, shape) in enumerate(zip(pictures, rows, shapes, strict=True)):
        for column, panel in enumerate(panels):
            left, low = gap + column * (side + gap), top - shape * side
            box = (left / _INCHES, low / height, side / _INCHES, shape * side / height)
            _draw_panel(figure.add_axes(box), panel, picture)
            if number == 0:
                middle, over = (left + side / 2) / _INCHES, (top + 0.07) / height
                figure.text(middle, over, panel.title, ha="center", va="bottom", size=8.5, color=style.INK)
        top -= shape * side + gap
    note = "Corners: number of heads. Densities of a row share one colour scale. Bright is far in depth."
    if any(picture.roi is not None for picture in pictures):
        note += " Dashed: region of interest."
    figure.text(0.5, 0.1 / height, note, ha="center", va="bottom", size=6.5, color=style.FAINT)
    style.save_figure(figure, path)


def draw_calibration(counts: Sequence[ImageCount], path: str | os.PathLike[str]) -> None:
    """Draw predicted against true counts, with the line where they are equal and the bias, as a PNG."""
    metrics = summarise(counts)
    truth = np.array([count.truth for count in counts], dtype=np.float64)
    predicted = np.array([count.predicted for count in counts])
    low, high = min(truth.min(), predicted.min()), max(truth.max(), predicted.max())
    room = max(1.0, 0.05 * (high - low))
    ends = np.array([min(low, 0.0) if low < 0.3 * high else low - room, high + room])
    figure = Figure(figsize=(4.6, 4.6), dpi=style.DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    axes.plot(ends, ends, color=style.FAINT, linewidth=1, label="equal")
    bias = f"bias {metrics.bias:+.2f}"
    axes.plot(ends, ends + metrics.bias, "--", color=style.VERMILION, linewidth=1, label=bias)
    size, alpha = (5, 0.35) if len(counts) > 300 else (14, 0.6)
    axes.scatter(truth, predicted, s=size, alpha=alpha, color=style.BLUE, linewidths=0)
    axes.set(xlim=ends, ylim=ends, aspect="equal", xlabel="annotated heads", ylabel="predicted heads")
    title = f"{metrics.images:,} images: MAE {metrics.mae:.2f}, RMSE {metrics.rmse:.2f}"
    axes.set_title(title, size=9, color=style.INK)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    style.style_axes(axes)
    style.save_figure(figure, path)


def draw_density_levels(
    counts: Sequence[ImageCount], baseline_counts: Sequence[ImageCount], path: str | os.PathLike[str]
) -> None:
    """Draw the paper's Figure 4a: ten groups of images by true count, mean counts of truth and models.

    Both sequences hold the same rows, in any order, else ValueError; of fewer than ten each is a group.
    """
    joint, baseline = ({count.row: count for count in given} for given in (counts, baseline_counts))
    if not joint or joint.keys() != baseline.keys():
        raise ValueError(f"the models counted {len(joint)} and {len(baseline)} images; give both the same")
    rows = sorted(joint, key=lambda row: (joint[row].truth, row))
    groups = np.array_split(np.array(rows), min(10, len(rows)))
    place = np.arange(1, len(groups) + 1)
    figure = Figure(figsize=(6.4, 3.6), dpi=style.DPI, layout="constrained", facecolor="white")
    axes = figure.add_subplot()
    truth = [np.mean([joint[row].truth for row in group]) for group in groups]
    axes.bar(place, truth, 0.72, color=style.PAPER, label="ground truth")
    models = (("baseline", baseline, style.ORANGE, "s"), ("joint model", joint, style.BLUE, "o"))
    for name, counted, colour, marker in models:
        means = [np.mean([counted[row].predicted for row in group]) for group in groups]
        label = f"{name} (MAE {summarise(list(counted.values())).mae:.2f})"
        axes.plot(place, means, marker, color=colour, markersize=6, alpha=0.9, label=label)
    axes.set(xlabel="groups of images by true count", ylabel="mean heads of an image", xticks=place)
    axes.legend(frameon=False, fontsize=8, loc="upper left")
    style.style_axes(axes)
    style.save_figure(figure, path)


def draw_history(history: Sequence[Mapping[str, Any]], path: str | os.PathLike[str]) -> None:
    """Draw a training's epochs as a PNG: unweighted losses above, validation errors below, stages marked.

    history: rows with "epoch", "stage", "loss/<task>" and, in stages that are validated, "val/mae" and
    "val/rmse". A ring marks the best epoch of each stage. Raises ValueError without rows.
    """
    if not history:
        raise ValueError("there is no epoch to draw")
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
    for axes in (above, below):
        if axes.lines:
            axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
        style.style_axes(axes)
    style.save_figure(figure, path)


def image_targets(picture: DecodedImage, sigma: float, threshold: float, stride: int) -> Targets:
    """The training's targets of a whole picture, in cells of `stride` pixels; depth, which is not drawn, is 0."""
    points = torch.from_numpy(np.array(picture.points, dtype=np.float32))[None]
    roi = None if picture.roi is None else torch.from_numpy(picture.roi.astype(np.float32))[None, None]
    flat = torch.zeros(1, 1, *picture.size)
    present = torch.ones(points.shape[:2])
    return make_targets(points, present, picture.size, flat, sigma=sigma, threshold=threshold, stride=stride, roi=roi)


def _mark_stage(above: Axes, below: Axes, rows: Sequence[Mapping[str, Any]], ground: str) -> None:
    """A stage's ground and name, and a ring around its best epoch."""
    first, last = rows[0]["epoch"] - 0.5, rows[-1]["epoch"] + 0.5
    for axes in (above, below):
        axes.axvspan(first, last, color=ground, alpha=0.45, zorder=0, linewidth=0)
    place: dict[str, Any] = {"transform": above.get_xaxis_transform(), "ha": "center", "va": "bottom"}
    above.text((first + last) / 2, 1.02, rows[0]["stage"], size=8, color=style.INK, **place)
    scored = [row for row in rows if "val/mae" in row]
    if scored:
        best = min(scored, key=lambda row: row["val/mae"])
        at = (best["epoch"], best["val/mae"])
        below.plot(*at, "o", markerfacecolor="none", markeredgecolor=style.INK, markersize=7)
        offset: dict[str, Any] = {
            "xytext": (0, -7),
            "textcoords": "offset points",
            "ha": "center",
            "va": "top",
        }
        below.annotate(f"{at[1]:.2f}", at, size=7.5, color=style.INK, **offset)


def _draw_series(axes: Axes, stages: Sequence[Sequence[Mapping[str, Any]]], name: str, label: str, colour: str) -> None:
    """One value over the epochs, the line broken where a stage ends; the legend names it once."""
    for rows in stages:
        seen = [(row["epoch"], row[name]) for row in rows if name in row]
        if seen:
            marker = "o" if len(seen) == 1 else ""
            axes.plot(
                *zip(*seen, strict=True),
                color=colour,
                linewidth=1.4,
                marker=marker,
                markersize=3,
                label=label,
            )
            label = "_"


def _panels(
    counter: Counter, picture: DecodedImage, sigma: float, threshold: float, baseline: Counter | None
) -> list[_Panel]:
    stride = counter.encoder.output_stride
    roi = roi_cells(np.ones(picture.size, dtype=np.bool_) if picture.roi is None else picture.roi, stride)
    targets = image_targets(picture, sigma, threshold, stride)
    maps = _predict(counter, picture)
    predicted = {"Density" if baseline is None else "Joint model": maps[DENSITY]}
    if baseline is not None:
        predicted = {"Baseline": _predict(baseline, picture)[DENSITY]} | predicted
    truth = targets.density[0, 0].numpy()
    top = max(float((values * roi).max()) for values in (truth, *predicted.values())) or 1.0
    panels = [
        _Panel("Photo and heads", picture.image, heads=picture.points),
        _Panel("Ground truth", truth, stride, style.DENSITY_CMAP, top, f"{len(picture.points)}"),
    ]
    for title, values in predicted.items():
        count = f"{(values * roi).sum(dtype=np.float64):.1f}"
        panels.append(_Panel(title, values, stride, style.DENSITY_CMAP, top, count))
    if SEGMENTATION in maps:
        crowd = targets.segmentation[0, 0].numpy()
        panels.append(_Panel("Crowd segmentation", maps[SEGMENTATION], stride, style.SEGMENTATION_CMAP, outline=crowd))
    if DEPTH in maps:
        panels.append(_Panel("Distilled depth", maps[DEPTH], stride, style.DEPTH_CMAP))
    return panels


def _predict(counter: Counter, picture: DecodedImage) -> dict[str, NDArray[np.float32]]:
    """The counter's maps (h, w) of a picture: heads per cell, probability of crowd, distilled depth."""
    tasks = [task for task in (DENSITY, SEGMENTATION, DEPTH) if task in counter.decoders]
    image = image_to_tensor(picture.image, next(counter.parameters()).device)
    trains = counter.training
    counter.eval()
    try:
        with torch.inference_mode():
            maps = {task: values[0, 0].float().cpu() for task, values in counter(image, tasks).items()}
    finally:
        counter.train(trains)
    maps[DENSITY] = maps[DENSITY] / counter.density_scale
    if SEGMENTATION in maps:
        maps[SEGMENTATION] = maps[SEGMENTATION].sigmoid()
    return {task: values.numpy() for task, values in maps.items()}


def _draw_panel(axes: Axes, panel: _Panel, picture: DecodedImage) -> None:
    height, width = picture.size
    extent = (0, width, height, 0)
    if panel.colours is None:
        axes.imshow(panel.values, extent=extent, interpolation="antialiased")
    else:
        norm = PowerNorm(style.GAMMA if panel.colours == style.DENSITY_CMAP else 1.0, 0, panel.top)
        colours = style.fade_to_black(panel.colours)
        rows, columns = (side * panel.cell for side in panel.values.shape)  # cells at the rim may reach beyond it
        covered = (0, columns, rows, 0)
        axes.imshow(panel.values, cmap=colours, norm=norm, extent=covered, interpolation="antialiased")
    if picture.roi is not None:
        style.draw_roi(axes, picture.roi)
    if panel.heads is not None and len(panel.heads):
        x, y = panel.heads.T
        size = float(np.clip(600 / len(panel.heads), 3, 14))
        axes.scatter(x, y, s=size, color=style.HEAD_COLOUR, edgecolors="black", linewidths=0.4)
    if panel.outline is not None:
        style.draw_outline(axes, panel.outline, style.HEAD_COLOUR, 0.6, cell=panel.cell)
    if panel.count is not None:
        style.badge(axes, panel.count, 9)
    axes.set(xlim=(0, width), ylim=(height, 0))
    axes.set_axis_off()
