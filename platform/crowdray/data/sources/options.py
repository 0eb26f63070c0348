"""Options of a conversion that several sources share, as they are called on the command line."""

from dataclasses import dataclass
from typing import Literal

_ALL = ("annotations", "label", "boxes", "test_fraction")
OWN_DATA: dict[str, tuple[str, ...]] = {
    "csv": (*_ALL, "base"),
    "coco": (*_ALL, "base", "keypoint"),
    "label-studio": _ALL,
    "cvat": (*_ALL, "keypoint"),
    "labelme": _ALL,
}
"""Which formats of people's own data know which of their options."""


@dataclass(frozen=True, kw_only=True)
class OwnDataOptions:
    """How people's own annotations are meant; None leaves the choice to the format."""

    annotations: tuple[str, ...] | None = None
    """own data: annotation files, from --source on; by default the only one there."""
    label: tuple[str, ...] | None = None
    """own data: labels or categories that mark heads; all by default, if there is only one."""
    boxes: Literal["centre"] | None = None
    """own data: take the centre of each box for a head; by default boxes are refused."""
    test_fraction: float | None = None
    """own data: share of the images that are kept for testing, drawn by name (0)."""
    base: float | None = None
    """csv, coco: coordinate of the first pixel's centre: 0.5 is continuous (csv), 0 an index (coco), 1 as MATLAB's."""
    keypoint: str | None = None
    """coco, cvat: the keypoint that is the head (coco: head or nose)."""
