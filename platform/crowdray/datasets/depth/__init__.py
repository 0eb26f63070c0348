"""Depth teachers: where a sample's depth map comes from, behind one seam.

Maps are float32 and span the whole image at its size (H, W) or smaller; larger = farther, on any positive
scale, since encode_depth brings each to [0, 1]. A person's size in pixels is inversely proportional to depth,
so a map of sizes is a depth map turned round.
"""

from collections.abc import Callable, Sequence

from crowdray.datasets.depth.analytic import (
    TYPICAL_SCALE,
    Nothing,
    Own,
    Perspective,
    Points,
    fit_head_scale,
    plane_depth,
)
from crowdray.datasets.depth.huggingface import Hub
from crowdray.datasets.depth.onnx import Onnx
from crowdray.datasets.depth.precomputed import Precomputed
from crowdray.datasets.depth.teacher import DepthTeacher, View
from crowdray.errors import UserError

__all__ = [
    "ANYWHERE",
    "TEACHERS",
    "TYPICAL_SCALE",
    "DepthTeacher",
    "Hub",
    "Nothing",
    "Onnx",
    "Own",
    "Perspective",
    "Points",
    "Precomputed",
    "View",
    "fit_head_scale",
    "open_teacher",
    "plane_depth",
]

TEACHERS: dict[str, Callable[[], DepthTeacher]] = {
    "perspective": Perspective,
    "points": Points,
    "own": Own,
    "none": Nothing,
}
"""Teachers by name that live from what the source knows."""

ANYWHERE: dict[str, Callable[[str], DepthTeacher]] = {"precomputed": Precomputed, "onnx": Onnx, "hf": Hub}
"""Teachers by the word before a colon that need no more than the image; each takes what follows the colon."""


def open_teacher(choice: str, available: Sequence[str]) -> DepthTeacher:
    """The teacher that `--depth` names: `auto` takes the first, and so best, that the source has available.

    Raises UserError for a name that is unknown or that this source cannot serve, and for a file or a folder that cannot
    teach.
    """
    word, _, argument = choice.partition(":")
    if word in ANYWHERE:
        return ANYWHERE[word](argument)
    kind = available[0] if choice == "auto" else choice
    if kind not in TEACHERS or (kind in ("perspective", "own") and kind not in available):
        raise UserError(
            f"--depth {choice} cannot be used here; choose one of auto, {', '.join(available)}, or a teacher for any "
            "source: precomputed:URI, onnx:URI, hf:MODEL (docs/depth.md)"
        )
    return TEACHERS[kind]()
