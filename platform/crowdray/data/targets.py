"""Training targets of windows, computed from points on the training device at the output stride.

Shape legend: B batch, N heads (padded), H W window in pixels, stride s, h w output cells: h = ceil(H / s).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_MIN_MASS = 1e-3
"""Lower bound of the kernel mass inside the region of interest by which a head's kernel is divided."""

KERNEL_RADIUS = 6.0
"""Radius of a head's kernel in standard deviations; beyond it, its mass is 0 in float32."""


@dataclass(frozen=True)
class Targets:
    """Target maps of a batch of windows, (B, 1, h, w) float32."""

    density: Tensor
    """Heads per output cell; sums to the number of heads over an image."""
    segmentation: Tensor
    """1 where the density exceeds the threshold, else 0."""
    depth: Tensor
    """Distilled depth: segmentation times raw depth in [0, 1], larger = farther."""


def density_map(
    points: Tensor,
    valid_mask: Tensor,
    size: tuple[int, int],
    *,
    sigma: float,
    stride: int = 1,
    extent: Tensor | None = None,
    roi: Tensor | None = None,
) -> Tensor:
    """Sum of one Gaussian kernel of unit mass per head (Section 3.2), integrated exactly over each output cell.

    A kernel is normalized over the whole image, not over the window, so that a window's map equals that window of the
    image's map.

    Args:
        points: (B, N, 2) x y in window pixels; may lie outside the window.
        valid_mask: (B, N) 1 for a head, 0 for padding.
        size: (H, W) of the window.
        sigma: Standard deviation of the kernel in pixels.
        stride: Pixels per output cell.
        extent: (B, 4) left, top, right, bottom edge of the image in window pixels; None: those of the window.
        roi: (B, 1, h, w) region of interest, 0 or 1; the mass of kernels is normalized to stay inside.

    Returns:
        (B, 1, h, w) float32 in heads per cell; with s > 1, 0 outside the image.
    """
    height, width = size
    if extent is None:
        extent = window_extent(points, size)
    x = torch.minimum(torch.maximum(points[..., 0], extent[:, None, 0]), extent[:, None, 2])
    y = torch.minimum(torch.maximum(points[..., 1], extent[:, None, 1]), extent[:, None, 3])
    along_x = _cell_mass(x, _cell_edges(width, stride, extent[:, 0::2]), sigma)
    along_y = _cell_mass(y, _cell_edges(height, stride, extent[:, 1::2]), sigma)
    mass = _interval_mass(x, extent[:, 0], extent[:, 2], sigma) * _interval_mass(y, extent[:, 1], extent[:, 3], sigma)
    if roi is not None:
        outside = (1 - roi[:, 0]).to(along_x.dtype)
        mass = mass - (torch.bmm(along_y, outside) * along_x).sum(-1)
    weight = valid_mask / mass.clamp_min(_MIN_MASS)
    density = torch.bmm((along_y * weight[..., None]).transpose(1, 2), along_x)[:, None]
    return density if roi is None else density * roi


def peak_density(sigma: float, stride: int = 1) -> float:
    """Density of a cell with a single head at its centre, the unit of the segmentation threshold."""
    half = torch.tensor(stride / 2 / (sigma * 2**0.5))
    return float(torch.erf(half) ** 2)


def make_targets(
    points: Tensor,
    valid_mask: Tensor,
    size: tuple[int, int],
    raw_depth: Tensor,
    *,
    sigma: float,
    threshold: float,
    stride: int = 1,
    extent: Tensor | None = None,
    roi: Tensor | None = None,
) -> Targets:
    """Density, segmentation and distilled depth of a batch of windows.

    Args as in `density_map`, and:
        raw_depth: (B, 1, H, W) in [0, 1].
        threshold: Foreground threshold as a fraction of `peak_density`.
        roi: (B, 1, H, W), in pixels here.
    """
    if roi is not None:
        roi = cell_mask(roi, window_extent(points, size) if extent is None else extent, stride)
    density = density_map(points, valid_mask, size, sigma=sigma, stride=stride, extent=extent, roi=roi)
    segmentation = (density > threshold * peak_density(sigma, stride)).to(density.dtype)
    depth = F.avg_pool2d(raw_depth, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else raw_depth
    return Targets(density, segmentation, segmentation * depth)


def cell_mask(mask: Tensor, extent: Tensor, stride: int) -> Tensor:
    """Reduce a mask (B, 1, H, W) to cells of `stride` x `stride` pixels: 1 if at least half of the pixels are in it.

    Pixels outside the image, whose edges are `extent` (B, 4), do not count. Returns (B, 1, ceil(H / stride),
    ceil(W / stride)), 0 or 1.
    """
    if stride == 1:
        return mask
    height, width = mask.shape[-2:]
    padded = F.pad(mask, (0, -width % stride, 0, -height % stride))
    columns, rows = (
        _cell_edges(padded.shape[-1 - axis], stride, extent[:, axis::2]).diff(dim=-1) / stride for axis in (0, 1)
    )
    inside = (rows[:, :, None] * columns[:, None, :])[:, None]
    return ((F.avg_pool2d(padded, stride) >= inside / 2) & (inside > 0)).to(mask.dtype)


def window_extent(like: Tensor, size: tuple[int, int]) -> Tensor:
    """The edges (B, 4) of images that equal their windows of size (H, W); batch size, dtype and device as `like`."""
    return like.new_tensor([0, 0, size[1], size[0]]).expand(len(like), 4)


def _cell_edges(length: int, stride: int, ends: Tensor) -> Tensor:
    """Cell edges (B, cells + 1) along an axis of `length` pixels, clamped to the image's ends (B, 2)."""
    edges = torch.arange(-(-length // stride) + 1, device=ends.device, dtype=ends.dtype) * stride
    if stride == 1:  # images end between two cells
        return edges[None]
    return torch.minimum(torch.maximum(edges, ends[:, :1]), ends[:, 1:])


def _cell_mass(centre: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Mass of a one-dimensional Gaussian around each centre (B, N) between edges (B or 1, cells + 1): (B, N, cells)."""
    return _normal_cdf(edges[:, None] - centre[..., None], sigma).diff(dim=-1)


def _interval_mass(centre: Tensor, low: Tensor, high: Tensor, sigma: float) -> Tensor:
    return _normal_cdf(high[:, None] - centre, sigma) - _normal_cdf(low[:, None] - centre, sigma)


def _normal_cdf(distance: Tensor, sigma: float) -> Tensor:
    return 0.5 * (1 + torch.erf(distance / (sigma * 2**0.5)))
