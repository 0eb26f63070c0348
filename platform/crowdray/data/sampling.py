"""Which samples and windows a rank sees in an epoch: pure functions of (seed, epoch, sample), with no state to resume.

Positions are in working pixels, which are those of the downsampled image. A window is the crop of the count decoder and
its context, as the network sees it.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from crowdray.config import SamplingConfig

_ORDER_STREAM, _WINDOW_STREAM, _SCALE_STREAM = 2, 3, 4
"""First entry of the seeds of independent random streams; 1 is that of the validation split."""


@dataclass(frozen=True)
class WindowConfig:
    """How windows are cut and augmented: the parameters of `draw_window`."""

    sampling: SamplingConfig
    margin: int
    """Radius of the receptive field: pixels this close to a cut edge have no loss."""
    stride: int
    """Stride of the encoder; windows and crops are aligned to it."""
    reach: float = math.inf
    """Distance from the window beyond which a head changes no target in it."""

    def window_length(self, length: int) -> int:
        """Length of the window, a multiple of the stride, along an image axis of some length."""
        padded = -(-max(length, self.sampling.crop) // self.stride) * self.stride
        return min(padded, self.sampling.crop + 2 * self.sampling.context)


@dataclass(frozen=True)
class Window:
    """Position and augmentation of one window."""

    top: int
    """First image row."""
    left: int
    """First image column."""
    height: int
    """Number of rows; those beyond the image are padding."""
    width: int
    """Number of columns; those beyond the image are padding."""
    crop_top: int
    """First row of the crop in the window, before the flip, a multiple of the stride."""
    crop_left: int
    """First column of the crop in the window, before the flip, a multiple of the stride."""
    flip: bool
    """Flip the window horizontally."""
    brightness: float
    """Shift, as a fraction of the full range."""
    contrast: float
    """Scale around mid-grey by 1 + this."""
    colour: tuple[float, float, float]
    """Scale red, green and blue by 1 + these."""


def epoch_batches(samples: int, batch: int, *, seed: int, epoch: int, repeats: int = 1) -> list[NDArray[np.int64]]:
    """Global batches of an epoch: a shuffle of the draws 0 .. samples * repeats - 1 without the incomplete last batch.

    Draw d is repeat d % repeats of sample d // repeats. The repeats of a sample are consecutive, so that they share its
    decoding. Batches do not depend on the number of ranks; `rank_slice` divides them. An epoch shorter than one batch
    is one smaller batch.
    """
    order = np.random.default_rng((_ORDER_STREAM, seed, epoch)).permutation(samples)
    order = (order[:, None] * repeats + np.arange(repeats)).reshape(-1)
    count = max(1, len(order) // batch)
    return [order[k * batch : (k + 1) * batch] for k in range(count)]


def rank_slice(batch: Sequence[int] | NDArray[np.int64], rank: int, world: int) -> NDArray[np.int64]:
    """The consecutive draws of a global batch that one rank processes; sizes differ by at most one between ranks."""
    return np.array_split(np.asarray(batch), world)[rank]


def draw_window(
    config: WindowConfig, size: tuple[int, int], *, seed: int, epoch: int, sample: int, repeat: int = 0
) -> Window:
    """The window of a sample in an epoch, from an image of size (H, W).

    The crop's position is uniform over a range that exceeds the image by half a crop on each side, then clamped to the
    image: uniform positions inside it would hardly ever contain the border. `loss_weight` corrects for what remains.
    """
    rng = np.random.default_rng((_WINDOW_STREAM, seed, epoch, sample, repeat))
    (top, height, crop_top), (left, width, crop_left) = (
        _span(config, length, int(rng.integers(_offset_count(config, length)))) for length in size
    )
    changes = config.sampling
    flip = bool(rng.random() < changes.flip)
    limits = (changes.brightness, changes.contrast, changes.colour, changes.colour, changes.colour)
    brightness, contrast, *colour = (rng.uniform(-1, 1, 5) * limits).tolist()
    red, green, blue = colour
    return Window(top, left, height, width, crop_top, crop_left, flip, brightness, contrast, (red, green, blue))


def draw_scale(config: WindowConfig, *, seed: int, epoch: int, batch: int) -> float:
    """The factor by which a global batch is resized: one for all its samples, so that windows have equal sizes."""
    rng = np.random.default_rng((_SCALE_STREAM, seed, epoch, batch))
    return float((1 + config.sampling.scale) ** rng.uniform(-1, 1))


def loss_weight(
    config: WindowConfig, size: tuple[int, int], window: Window
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights (height,) and (width,) of a window's rows and columns, before the flip, in the losses of the maps.

    A pixel's weight is the product of both. It is 0 where the receptive field contains padding or a cut edge, else the
    inverse of the pixel's `coverage`, so that in expectation all pixels of the image count equally. The mean over all
    draws is 1.
    """
    return (
        _span_weight(config, size[0], window.top, window.height),
        _span_weight(config, size[1], window.left, window.width),
    )


@lru_cache(maxsize=256)
def coverage(config: WindowConfig, length: int) -> NDArray[np.float64]:
    """Probability (length,) that a pixel along an image axis has a loss, over all positions of the window."""
    total = np.zeros(length)
    spans = window_spans(config, length)
    for start, extent, _ in spans:
        low, high = _valid_range(config, length, start, extent)
        total[low:high] += 1
    probability: NDArray[np.float64] = total / len(spans)
    return probability


def window_spans(config: WindowConfig, length: int) -> list[tuple[int, int, int]]:
    """All equally likely windows along an image axis: start, length, and start of the crop in the window."""
    return [_span(config, length, offset) for offset in range(_offset_count(config, length))]


def _offset_count(config: WindowConfig, length: int) -> int:
    """Number of equally likely crop offsets along an axis."""
    return length + 1 if length > config.sampling.crop else 1


def _span(config: WindowConfig, length: int, offset: int) -> tuple[int, int, int]:
    """Start and length of the window along an axis, and start of the crop in it, for one of the crop offsets."""
    extent = config.window_length(length)
    crop = min(max(offset - config.sampling.crop // 2, 0), max(length - config.sampling.crop, 0))
    # Windows start on multiples of the stride: otherwise pixels would have other features than in the whole image.
    last = -(-max(length - extent, 0) // config.stride) * config.stride
    start = min(max(crop - config.sampling.context, 0) // config.stride * config.stride, last)
    crop_start = min((crop - start) // config.stride * config.stride, extent - config.sampling.crop)
    return start, extent, crop_start


def _valid_range(config: WindowConfig, length: int, start: int, extent: int) -> tuple[int, int]:
    """First and last + 1 image pixel whose receptive field the window does not cut."""
    margin = min(config.margin, config.sampling.context)
    low = 0 if start == 0 else start + margin
    high = length if start + extent >= length else start + extent - margin
    return low, high


@lru_cache(maxsize=4096)
def _span_weight(config: WindowConfig, length: int, start: int, extent: int) -> NDArray[np.float32]:
    weight = np.zeros(extent, np.float32)
    low, high = _valid_range(config, length, start, extent)
    # extent / length turns a mean over the window's pixels into a mean over the image's.
    weight[low - start : high - start] = extent / length / coverage(config, length)[low:high]
    weight.setflags(write=False)
    return weight
