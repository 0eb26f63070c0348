"""Depth teachers: how the depth map of a sample is obtained.

Maps are float32, cover the whole image at its size (H, W) or smaller, and larger means farther, on any positive scale:
encode_depth scales each to [0, 1]. The size of a person in pixels is inversely proportional to depth, so the inverse of
a map of sizes is a depth map.
"""

from collections.abc import Callable, Sequence

from crowdray.datasets.depth.analytic import NoDepth, PointSpacingDepth, SourceDepth
from crowdray.datasets.depth.huggingface import HuggingFaceDepth
from crowdray.datasets.depth.onnx import OnnxDepth
from crowdray.datasets.depth.precomputed import PrecomputedDepth
from crowdray.datasets.depth.teacher import DepthTeacher
from crowdray.errors import UserError

TEACHERS: dict[str, Callable[[], DepthTeacher]] = {
    "perspective": lambda: SourceDepth("perspective-1"),
    "points": PointSpacingDepth,
    "own": lambda: SourceDepth("own-1"),
    "none": NoDepth,
}
"""Teachers by name that use what the source knows."""

IMAGE_TEACHERS: dict[str, Callable[[str], DepthTeacher]] = {
    "precomputed": PrecomputedDepth,
    "onnx": OnnxDepth,
    "hf": HuggingFaceDepth,
}
"""Teachers for any source by the word before the colon; each takes the text after it."""


def open_teacher(choice: str, available: Sequence[str]) -> DepthTeacher:
    """Create the depth teacher that `--depth` names.

    Args:
        choice: A name, `auto` for the first of `available`, or KIND:LOCATION[,OPTION...].
        available: Names of the teachers that the source supports, best first.
    """
    kind, _, argument = choice.partition(":")
    if kind in IMAGE_TEACHERS:
        return IMAGE_TEACHERS[kind](argument)
    name = available[0] if choice == "auto" else choice
    if name not in TEACHERS or (name in ("perspective", "own") and name not in available):
        raise UserError(
            f"--depth {choice} is not available for this source; choose one of auto, {', '.join(available)}, or a "
            "teacher for any source: precomputed:URI, onnx:URI, hf:MODEL (docs/depth.md)"
        )
    return TEACHERS[name]()
