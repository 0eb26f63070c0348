"""Draw the figures of docs/concepts.md: python docs/make_figures.py (a few seconds, no data needed)."""

import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(1, str(ROOT / "platform"))

from crowdray.data.targets import make_targets  # noqa: E402
from crowdray.plots import style  # noqa: E402
from crowdray.scenes import SceneSpec, render  # noqa: E402

FIGURES = ROOT / "docs" / "figures"
SIGMA, THRESHOLD, STRIDE = 4.0, 0.3, 1
WINDOW, CONTEXT, REACH = (150, 60, 160), 36, 34
"""Left, top and side of the drawn window; pixels of context around its crop; receptive radius of CFCN."""
STAGES = {
    "1 baseline": {"encoder", "density"},
    "2 decoders": {"segmentation", "depth", "count"},
    "3 joint": {"encoder", "density", "segmentation", "depth", "count"},
    "export": {"encoder", "density"},
}
TRIALS = [(20, "a", 4), (20, "a", 8), (20, "b", 8), (40, "c", 8), (40, "c", 4), (60, "d", 8)]
"""Baseline epochs, decoder stage (equal letters: equal keys) and joint epochs of each drawn trial."""


def save(figure: Figure, name: str) -> None:
    """Write a figure with a palette of 256 colors, a third of the size."""
    path = FIGURES / name
    style.save_figure(figure, path)
    Image.open(path).quantize(256).save(path, optimize=True)


def draw_targets() -> None:
    """A rendered photo with its heads, the three maps made from them, and a training window."""
    scene = render(SceneSpec(seed=3, width=400, height=280), 2)
    height, width = scene.image.shape[:2]
    points = torch.from_numpy(scene.points)[None].float()
    depth = torch.from_numpy(scene.depth / scene.depth[scene.roi].max()).clamp(max=1)[None, None].float()
    roi = torch.from_numpy(scene.roi)[None, None].float()
    targets = make_targets(
        points,
        torch.ones(points.shape[:2]),
        (height, width),
        depth,
        sigma=SIGMA,
        threshold=THRESHOLD,
        stride=STRIDE,
        roi=roi,
    )
    panels = {
        f"photo: {len(scene.points)} heads": (scene.image, None),
        f"density: sum {float(targets.density.sum()):.1f}": (targets.density[0, 0], style.DENSITY_CMAP),
        "segmentation": (targets.segmentation[0, 0], style.SEGMENTATION_CMAP),
        "distilled depth": (targets.depth[0, 0], style.DEPTH_CMAP),
    }
    figure = Figure(figsize=(9.6, 2.1), dpi=120, layout="constrained", facecolor="white")
    for axes, (title, (values, cmap)) in zip(figure.subplots(1, 4), panels.items(), strict=True):
        axes.imshow(values, cmap=cmap, extent=(0, width, height, 0))
        axes.set_title(title, size=9)
        axes.set_axis_off()
        if cmap is None:
            axes.scatter(*scene.points.T, s=5, color=style.HEAD_COLOUR, linewidths=0)
    save(figure, "targets.png")

    figure = Figure(figsize=(4.6, 3.2), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    axes.imshow(scene.image)
    axes.set_axis_off()
    left, top, side = WINDOW
    boxes = [
        (0, style.SKY, "window: what the network sees"),
        (CONTEXT, style.ORANGE, "crop: the count decoder's square"),
    ]
    boxes.insert(1, (REACH, style.GREEN, "valid cells: the window does not cut their field"))
    for inset, colour, label in boxes:
        inner = side - 2 * inset
        axes.add_patch(Rectangle((left + inset, top + inset), inner, inner, fill=False, ec=colour, lw=2, label=label))
    figure.legend(loc="outside lower center", frameon=False, fontsize=8)
    save(figure, "window.png")


def draw_stages() -> None:
    """Which modules each stage trains, which are frozen, and what is exported."""
    figure = Figure(figsize=(9.6, 2.4), dpi=120, layout="constrained", facecolor="white")
    for axes, (stage, trained) in zip(figure.subplots(1, 4), STAGES.items(), strict=True):
        axes.set(xlim=(0, 10), ylim=(0, 10))
        axes.set_axis_off()
        axes.set_title(stage, size=10, weight="bold")
        present = STAGES["3 joint"] - (
            {"segmentation", "depth", "count"} if stage in ("1 baseline", "export") else set()
        )
        if stage == "2 decoders":
            present -= {"density"}
        for y, name in zip((7.6, 5.2, 2.8, 0.4), ("density", "segmentation", "depth", "count"), strict=True):
            if name in present:
                axes.annotate("", (5.4, y + 0.9), (4.2, 4.9), arrowprops={"arrowstyle": "->", "color": style.FAINT})
                _box(axes, 5.4, y, 4.5, name, name in trained)
        _box(axes, 0.1, 4.0, 4.1, "encoder", "encoder" in trained)
    save(figure, "stages.png")


def _box(axes: Axes, x: float, y: float, width: float, text: str, trained: bool) -> None:
    look: dict[str, Any] = (
        {"fc": style.SKY, "ec": style.BLUE} if trained else {"fc": "#eef1f4", "ec": style.FAINT, "ls": "--"}
    )
    axes.add_patch(FancyBboxPatch((x, y), width, 1.8, boxstyle="round,pad=0,rounding_size=0.3", **look))
    axes.text(x + width / 2, y + 0.9, text, ha="center", va="center", size=8)


def draw_prefix_caching() -> None:
    """Six trials of a search; hatched stages are taken from the stage cache instead of trained."""
    figure = Figure(figsize=(7.6, 2.7), dpi=120, layout="constrained", facecolor="white")
    axes = figure.subplots()
    colours, longest, seen = (style.BLUE, style.GREEN, style.ORANGE), 0, set()
    for row, (baseline, decoders, joint) in enumerate(TRIALS):
        reused = [min(longest, baseline), 5 if (baseline, decoders) in seen else 0, 0]
        start = 0
        for length, cached, colour in zip((baseline, 5, joint * 2), reused, colours, strict=True):
            for begin, size, hatch in ((start, cached, "////"), (start + cached, length - cached, "")):
                look: dict[str, Any] = {"fc": "white", "hatch": hatch} if hatch else {"fc": colour}
                if size:
                    axes.barh(row, size, left=begin, height=0.6, ec=colour, **look)
            start += length
        longest = max(longest, baseline)
        seen.add((baseline, decoders))
    axes.set(yticks=range(len(TRIALS)), yticklabels=[f"trial {i}" for i in range(len(TRIALS))], xlabel="worker time")
    axes.invert_yaxis()
    for name, colour in zip(("baseline", "decoders", "joint"), colours, strict=True):
        axes.barh(0, 0, color=colour, label=name)
    axes.barh(0, 0, fc="white", ec=style.FAINT, hatch="////", label="from the stage cache")
    figure.legend(loc="outside upper center", ncols=4, frameon=False, fontsize=8)
    style.style_axes(axes)
    save(figure, "prefix-caching.png")


if __name__ == "__main__":
    draw_targets()
    draw_stages()
    draw_prefix_caching()
