"""Which samples and which windows a rank sees in an epoch: pure functions of (seed, epoch, sample), with no
state to resume.

All positions are in working pixels, after the configured downsampling. Lengths along one axis: W image, c
crop, m context.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# First words of the seeds of independent random streams.
_VALIDATION, _ORDER, _WINDOW, _SCALE = 1, 2, 3, 4


@dataclass(frozen=True)
class WindowRule:
    """How windows are cut from images: what `draw_window` needs of the configuration and the model."""

    crop: int
    """Side of the count decoder's square."""
    context: int
    """Pixels seen around the crop, where the image has them."""
    margin: int
    """Reach of the receptive field: pixels this close to a cut edge carry no loss."""
    stride: int
    """The encoder's stride; windows and crops keep to it."""
    flip: float = 0.0
    """Probability of a mirror."""
    brightness: float = 0.0
    """Largest shift, as a share of the full range."""
    contrast: float = 0.0
    """Largest relative change."""
    colour: float = 0.0
    """Largest relative change of each colour."""
    scale: float = 0.0
    """Largest relative change of size."""
    reach: float = math.inf
    """Pixels around the window beyond which a head changes no target in it."""

    def window(self, length: int) -> int:
        """Length of the window along an image axis of the given length, a multiple of the stride."""
        whole = -(-max(length, self.crop) // self.stride) * self.stride
        return min(whole, self.crop + 2 * self.context)


@dataclass(frozen=True)
class Window:
    """One training window: what the network sees, and the square in it that the count decoder reads."""

    top: int
    """First image row of the window."""
    left: int
    """First image column of the window."""
    height: int
    """Rows; beyond the image they are padding."""
    width: int
    """Columns; beyond the image they are padding."""
    crop_top: int
    """First row of the crop inside the window, before the mirror, a multiple of the stride."""
    crop_left: int
    """First column of the crop inside the window, likewise."""
    flip: bool
    """Mirror the window horizontally."""
    brightness: float
    """Add this share of the full range."""
    contrast: float
    """Scale around mid-grey by 1 + this."""
    colour: tuple[float, float, float]
    """Scale red, green and blue by 1 + these."""


def split_validation(
    rows: NDArray[np.int64], fraction: float, rule: Literal["random", "run"], seed: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Training and validation rows, each ascending: a share of the rows drawn at random one by one, or as one
    run."""
    rng = np.random.default_rng((_VALIDATION, seed))
    held = round(len(rows) * fraction)
    kept = len(rows) - held
    chosen = rng.permutation(len(rows))[kept:] if rule == "random" else rng.integers(kept + 1) + np.arange(held)
    return np.sort(np.delete(rows, chosen)), np.sort(rows[chosen])


def epoch_batches(samples: int, batch: int, *, seed: int, epoch: int, repeats: int = 1) -> list[NDArray[np.int64]]:
    """Global batches of an epoch: draws 0 .. samples * repeats - 1, shuffled; the incomplete last batch is
    dropped.

    Draw d is repeat d % repeats of sample d // repeats; the repeats of a sample stand together, so that they
    share its decoding. The same for any number of ranks; `rank_share` divides each batch. An epoch shorter
    than one batch is one smaller batch.
    """
    order = np.random.default_rng((_ORDER, seed, epoch)).permutation(samples)
    order = (order[:, None] * repeats + np.arange(repeats)).reshape(-1)
    count = max(1, len(order) // batch)
    return [order[k * batch : (k + 1) * batch] for k in range(count)]


def rank_share(batch: Sequence[int] | NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The part of a global batch that belongs to one rank: a run of it, so that repeats of a sample mostly stay
    together; shares differ by at most one draw."""
    return np.array_split(np.asarray(batch), world)[rank]


def draw_window(
    rule: WindowRule, size: tuple[int, int], *, seed: int, epoch: int, sample: int, repeat: int = 0
) -> Window:
    """The window of a sample in an epoch. size is (H, W) in working pixels.

    The crop's position is uniform over a range that overhangs the image by half a crop on each side, then
    moved inside: plain uniform offsets would hardly ever show the border columns. What inequality remains,
    `coverage` weighs out.
    """
    rng = np.random.default_rng((_WINDOW, seed, epoch, sample, repeat))
    (top, height, crop_top), (left, width, crop_left) = (_draw_span(rule, length, rng) for length in size)
    flip = bool(rng.random() < rule.flip)
    light = rng.uniform(-1, 1, 5) * (rule.brightness, rule.contrast, rule.colour, rule.colour, rule.colour)
    brightness, contrast, *colour = light.tolist()
    red, green, blue = colour
    return Window(top, left, height, width, crop_top, crop_left, flip, brightness, contrast, (red, green, blue))


def draw_scale(rule: WindowRule, *, seed: int, epoch: int, batch: int) -> float:
    """The size at which a global batch is shown, as a factor: one for all its samples, so that their windows
    keep one shape."""
    rng = np.random.default_rng((_SCALE, seed, epoch, batch))
    return float((1 + rule.scale) ** rng.uniform(-1, 1))


def loss_weight(
    rule: WindowRule, size: tuple[int, int], window: Window
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights (height,) of a window's rows and (width,) of its columns before the mirror; the weight of a pixel in the
    map losses is their product.

    0 where padding or a cut edge lies within the receptive field, else the inverse of how often a pixel of
    that row and column is valid, so that in expectation every pixel of the image counts the same. The mean
    over all draws is 1.
    """
    return (
        _span_weight(rule, size[0], window.top, window.height),
        _span_weight(rule, size[1], window.left, window.width),
    )


@lru_cache(maxsize=256)
def coverage(rule: WindowRule, length: int) -> NDArray[np.float64]:
    """How often each pixel along an axis of the given length is valid, (length,) in [0, 1]: exact, over all
    draws."""
    total = np.zeros(length)
    offsets = np.arange(_range(rule, length))
    for offset in offsets:
        start, extent, _ = _place(rule, length, int(offset))
        low, high = _valid(rule, length, start, extent)
        total[low:high] += 1
    covered: NDArray[np.float64] = total / len(offsets)
    return covered


def _range(rule: WindowRule, length: int) -> int:
    """Number of equally likely crop offsets along an axis."""
    return length + 1 if length > rule.crop else 1


def _draw_span(rule: WindowRule, length: int, rng: np.random.Generator) -> tuple[int, int, int]:
    return _place(rule, length, int(rng.integers(_range(rule, length))))


def _place(rule: WindowRule, length: int, offset: int) -> tuple[int, int, int]:
    """Start of the window, its extent, and the crop's start inside it, for one of the equally likely
    offsets."""
    extent = rule.window(length)
    crop = min(max(offset - rule.crop // 2, 0), max(length - rule.crop, 0))
    # Windows start on the encoder's grid: off it, the same pixel would get other features than in the whole
    # image.
    last = -(-max(length - extent, 0) // rule.stride) * rule.stride
    start = min(max(crop - rule.context, 0) // rule.stride * rule.stride, last)
    inside = min((crop - start) // rule.stride * rule.stride, extent - rule.crop)
    return start, extent, inside


def _valid(rule: WindowRule, length: int, start: int, extent: int) -> tuple[int, int]:
    """First and last + 1 image pixel whose receptive field the window does not cut."""
    margin = min(rule.margin, rule.context)
    low = 0 if start == 0 else start + margin
    high = length if start + extent >= length else start + extent - margin
    return low, high


@lru_cache(maxsize=4096)
def _span_weight(rule: WindowRule, length: int, start: int, extent: int) -> NDArray[np.float32]:
    weight = np.zeros(extent, np.float32)
    low, high = _valid(rule, length, start, extent)
    covered = coverage(rule, length)
    # Pixels of the image per pixel of a window: makes the mean over a window's pixels the mean over the
    # image's.
    weight[low - start : high - start] = extent / length / covered[low:high]
    weight.setflags(write=False)
    return weight
