"""Training targets made from points, on the training device, for the window at hand, at the output stride.

Shape legend: B batch, N heads (padded), H W window in pixels, stride s, h w output cells: h = ceil(H / s).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

_NEGLIGIBLE = 1e-3
"""A head with less of its kernel than this inside the region it must stay in is given no more than 1000 times
it."""


REACH = 6.0
"""Standard deviations from a head beyond which its kernel, in float32, has no mass at all."""


@dataclass(frozen=True)
class Targets:
    """What the four decoders should say about a window. Maps are (B, 1, h, w) float32."""

    density: Tensor
    """Heads per output cell; the sum over an image is its number of heads."""
    segmentation: Tensor
    """1 where the density exceeds the threshold, else 0."""
    depth: Tensor
    """Distilled depth: segmentation times raw depth in [0, 1], larger = farther."""


def density_map(
    points: Tensor,
    present: Tensor,
    size: tuple[int, int],
    *,
    sigma: float,
    stride: int = 1,
    extent: Tensor | None = None,
    roi: Tensor | None = None,
) -> Tensor:
    """Sum of one Gaussian of unit mass for each head (Section 3.2), integrated exactly over each output cell.

    points (B, N, 2) x, y in window pixels, some of them outside the window; present (B, N) 1 for a head, 0
    for padding; size (H, W).
    extent (B, 4): left, top, right, bottom edge of the whole image in window pixels (the window itself when
    None): a head's mass is renormalised over the image, not over the window, so that a window's map is
    exactly a window of the image's map. roi (B, 1, h, w), 1 where heads count: mass that would leave it is
    put back inside. Returns (B, 1, h, w) float32 in heads per cell; cells outside the image are 0 where s > 1.
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
    weight = present / mass.clamp_min(_NEGLIGIBLE)
    density = torch.bmm((along_y * weight[..., None]).transpose(1, 2), along_x)[:, None]
    return density if roi is None else density * roi


def peak_density(sigma: float, stride: int = 1) -> float:
    """Density of the cell whose centre holds one head, alone: the unit of the segmentation threshold."""
    half = torch.tensor(stride / 2 / (sigma * 2**0.5))
    return float(torch.erf(half) ** 2)


def make_targets(
    points: Tensor,
    present: Tensor,
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

    raw_depth (B, 1, H, W) in [0, 1] and roi (B, 1, H, W), both in pixels; threshold is a fraction of one head's peak
    density; the rest as in `density_map`.
    """
    if roi is not None:
        roi = cell_mask(roi, window_extent(points, size) if extent is None else extent, stride)
    density = density_map(points, present, size, sigma=sigma, stride=stride, extent=extent, roi=roi)
    segmentation = (density > threshold * peak_density(sigma, stride)).to(density.dtype)
    depth = F.avg_pool2d(raw_depth, stride, ceil_mode=True, count_include_pad=False) if stride > 1 else raw_depth
    return Targets(density, segmentation, segmentation * depth)


def cell_mask(mask: Tensor, extent: Tensor, stride: int) -> Tensor:
    """Which cells of `stride` x `stride` pixels count: those with at least half of their pixels in a mask (B, 1, H, W).

    Pixels outside the image, whose edges `extent` (B, 4) gives, are no part of a cell. Returns (B, 1, ceil(H / stride),
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


def window_extent(batch: Tensor, size: tuple[int, int]) -> Tensor:
    """The edges (B, 4) of images that are their windows' own size (H, W), as numbers like those of any tensor of the
    batch."""
    return batch.new_tensor([0, 0, size[1], size[0]]).expand(len(batch), 4)


def _cell_edges(length: int, stride: int, ends: Tensor) -> Tensor:
    """Edges of the cells along an axis of so many pixels, kept inside the image's ends (B, 2): (B, cells + 1)."""
    edges = torch.arange(-(-length // stride) + 1, device=ends.device, dtype=ends.dtype) * stride
    if stride == 1:  # an image ends between two cells
        return edges[None]
    return torch.minimum(torch.maximum(edges, ends[:, :1]), ends[:, 1:])


def _cell_mass(centre: Tensor, edges: Tensor, sigma: float) -> Tensor:
    """Mass of a one-dimensional Gaussian around each centre (B, N) between edges (B or 1, cells + 1): (B, N, cells)."""
    return _normal_cdf(edges[:, None] - centre[..., None], sigma).diff(dim=-1)


def _interval_mass(centre: Tensor, low: Tensor, high: Tensor, sigma: float) -> Tensor:
    return _normal_cdf(high[:, None] - centre, sigma) - _normal_cdf(low[:, None] - centre, sigma)


def _normal_cdf(distance: Tensor, sigma: float) -> Tensor:
    return 0.5 * (1 + torch.erf(distance / (sigma * 2**0.5)))
