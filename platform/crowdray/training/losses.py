"""The four losses of the paper, their targets and their units.

Shape legend: B windows, h w output cells.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from crowdray.config import Config
from crowdray.data.batch import Batch
from crowdray.data.shards import Dataset
from crowdray.data.targets import Targets, cell_mask, make_targets, peak_density
from crowdray.models.counter import COUNT, DENSITY, DEPTH, SEGMENTATION


@dataclass(frozen=True)
class Scales:
    """Units of the regressed quantities; they bring every target to the order of 1."""

    density: float
    """Factor of densities: the inverse of one head's peak density."""
    count: float
    """Divisor of counts: the mean number of heads in a crop."""


def measure_scales(config: Config, dataset: Dataset, rows: NDArray[np.int64], stride: int) -> Scales:
    """Compute the units for the given rows of the training split and an output stride in pixels."""
    selected = np.isin(dataset.rows("train"), rows)
    sizes = dataset.sizes("train")[selected] / config.sampling.downsample
    crop_fraction = np.minimum(config.sampling.crop**2 / sizes.prod(axis=1), 1)
    mean = float((dataset.counts("train")[selected] * crop_fraction).mean())
    return Scales(density=1 / peak_density(config.target.sigma, stride), count=max(1.0, mean))


BLOCKS = (16, 32, 64)
"""Sides in pixels of the blocks whose counts `LocalCounts` compares."""

_CELL = 8
"""Side in pixels of the cells in whose unit it measures errors, so that its weight means the same for all strides."""


@dataclass(frozen=True)
class LocalCounts:
    """Loss of local counts: the weighted mean, over block sizes, of (sum of errors in a block / block side)^2.

    Independent errors of cells have the same expected loss for every block size, errors of one sign a larger one for
    larger blocks.
    """

    weight: float
    """Weight relative to the squared error of cells."""
    stride: int
    """Pixels per cell of the maps."""
    unit: float
    """Heads per unit of error."""

    @classmethod
    def of(cls, config: Config, stride: int) -> "LocalCounts | None":
        """The configured loss for maps of a stride; None with weight 0."""
        weight, unit = config.loss.local_counts, peak_density(config.target.sigma, max(_CELL, stride))
        return cls(weight, stride, unit) if weight else None

    def loss(self, error: Tensor) -> Tensor:
        """The loss of errors (B, 1, h, w) in heads per cell, a scalar."""
        error, cell = error / self.unit, max(_CELL, self.stride)
        window_area = error[0].numel() * self.stride**2 / cell**2
        losses = [(error.sum((2, 3)).square() / window_area).mean()]
        for block in BLOCKS:
            sums = F.avg_pool2d(error, max(1, block // self.stride), ceil_mode=True, divisor_override=1)
            losses.append((sums / max(1, block // cell)).square().mean())
        return self.weight * torch.stack(losses).mean()


@dataclass(frozen=True)
class MapTargets(Targets):
    """All targets of one batch; maps are (B, 1, h, w) float32."""

    count: Tensor
    """(B,) heads in the crop."""
    weight: Tensor
    """Weight of each cell, with an expected mean of 1."""
    has_depth: Tensor
    """(B,) 1 where depth is known."""


def build_targets(batch: Batch, config: Config, stride: int) -> MapTargets:
    """Build the targets of a batch on its device, in cells of `stride` pixels."""
    size, roi = (batch.roi.shape[-2], batch.roi.shape[-1]), batch.roi.float()
    maps = make_targets(
        batch.points,
        batch.valid_mask,
        size,
        batch.depth,
        sigma=config.target.sigma,
        threshold=config.target.threshold,
        stride=stride,
        extent=batch.extent,
        roi=roi,
    )
    weight = batch.weight
    if stride > 1:  # cells at the ROI's border count or not as a whole, as in evaluation
        weight = F.avg_pool2d(weight, stride) * cell_mask(roi, batch.extent, stride)
    targets = MapTargets(**vars(maps), count=batch.count, weight=weight, has_depth=batch.has_depth)
    return _with_placebo(targets, batch.rows) if config.loss.placebo else targets


def _with_placebo(targets: MapTargets, rows: Tensor) -> MapTargets:
    """Replace the auxiliary targets of each window by those of a window of another image."""
    other = other_images(rows)
    return replace(
        targets,
        segmentation=targets.segmentation[other],
        depth=targets.depth[other],
        has_depth=targets.has_depth[other],
        count=targets.count[other],
    )


def other_images(rows: Tensor) -> Tensor:
    """Pair windows with windows of other images.

    Windows are sorted by image and shifted by the largest number of windows of one image. `split_rows` has checked that
    no image has more than half of the windows.

    Args:
        rows: (B,) dataset row of each window.

    Returns:
        (B,) a permutation of the windows with `rows[result] != rows` everywhere.
    """
    order = rows.argsort(stable=True)
    largest = int(rows.bincount().max())
    return torch.empty_like(order).scatter_(0, order, order.roll(largest))


def task_losses(
    outputs: Mapping[str, Tensor], targets: MapTargets, scales: Scales, local_counts: LocalCounts | None = None
) -> dict[str, Tensor]:
    """Return the unweighted loss of each predicted task, a scalar each.

    Density (eq. 4), with the loss of `local_counts` added, and depth (eq. 2): mean squared error per cell.
    Segmentation (eq. 1): mean binary cross-entropy per cell. Count (eq. 3): squared error in units of `scales.count`.
    Every mean divides by a constant of the batch's shape, never by a data-dependent sum, so that the mean over ranks is
    the loss of the whole batch.
    """
    losses = {}
    if DENSITY in outputs:
        error = outputs[DENSITY] - targets.density * scales.density
        losses[DENSITY] = (error.square() * targets.weight).mean()
        if local_counts:
            losses[DENSITY] = losses[DENSITY] + local_counts.loss(error * targets.weight / scales.density)
    if SEGMENTATION in outputs:
        entropy = F.binary_cross_entropy_with_logits(outputs[SEGMENTATION], targets.segmentation, reduction="none")
        losses[SEGMENTATION] = (entropy * targets.weight).mean()
    if DEPTH in outputs:
        known = targets.has_depth[:, None, None, None]
        losses[DEPTH] = ((outputs[DEPTH] - targets.depth).square() * targets.weight * known).mean()
    if COUNT in outputs:
        losses[COUNT] = (outputs[COUNT] - targets.count / scales.count).square().mean()
    return losses
