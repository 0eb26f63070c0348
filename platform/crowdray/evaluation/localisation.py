"""Localisation of heads from a density, scored by the rule of NWPU-Crowd.

Shape legend: h w density, N true heads, M predicted heads.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching
from scipy.spatial import KDTree
from torch.nn.functional import max_pool2d

MATCH_RADII = (4.0, 8.0)
"""Largest distances in image pixels between a predicted head and the true one that it is matched with: the small and
the large threshold of datasets that annotate points without sizes (FIDTM, P2PNet)."""


@dataclass(frozen=True, slots=True)
class HeadMatches:
    """Predicted heads of one image that match a true one."""

    predicted: int
    """Number of predicted heads."""
    matched: tuple[int, ...]
    """Number of them that match a true head, for each of MATCH_RADII."""


@dataclass(frozen=True, slots=True)
class Localisation:
    """Scores of all predicted heads of a set of images; nan where they are undefined."""

    radius: float
    """Largest distance of a match in image pixels."""
    precision: float
    """Fraction of the predicted heads that match a true one."""
    recall: float
    """Fraction of the true heads that match a predicted one."""
    f1: float
    """Harmonic mean of both."""


def head_points(density: NDArray[np.floating], cell: int) -> NDArray[np.float64]:
    """Return the likely positions of people: (M, 2) x y in pixels, most certain first.

    They are the highest local maxima of a density (h, w) in neighbourhoods of 3x3 cells, as many as it has heads. Where
    a crowd is so dense that people share a maximum, there are fewer.
    """
    cells = torch.from_numpy(density)[None, None]
    peaks = ((cells == max_pool2d(cells, 3, 1, 1)) & (cells > 0))[0, 0].numpy()
    rows, columns = np.nonzero(peaks)
    best = np.argsort(-density[rows, columns], kind="stable")[: max(0, round(float(density.sum(dtype=np.float64))))]
    return (np.column_stack([columns[best], rows[best]]).astype(np.float64) + 0.5) * cell


def match_heads(predicted: NDArray[np.floating], truth: NDArray[np.floating]) -> HeadMatches:
    """Match predicted heads (M, 2) with true ones (N, 2), each with at most one, as many as possible.

    The number of matches is that of a maximum matching in the bipartite graph of all pairs within a radius, as in the
    evaluation of NWPU-Crowd (Wang et al., TPAMI 2020).
    """
    matched = tuple(_matches(predicted, truth, radius) for radius in MATCH_RADII)
    return HeadMatches(len(predicted), matched)


def summarise_matches(matches: Sequence[HeadMatches], heads: int) -> tuple[Localisation, ...]:
    """Scores for each of MATCH_RADII over all `heads` of a set of images: sums are divided, not scores averaged."""
    predicted = sum(image.predicted for image in matches)
    found = [sum(image.matched[n] for image in matches) for n in range(len(MATCH_RADII))]
    return tuple(
        Localisation(radius, _ratio(matched, predicted), _ratio(matched, heads), _ratio(2 * matched, predicted + heads))
        for radius, matched in zip(MATCH_RADII, found, strict=True)
    )


def _matches(predicted: NDArray[np.floating], truth: NDArray[np.floating], radius: float) -> int:
    if not len(predicted) or not len(truth):
        return 0
    pairs = KDTree(predicted).sparse_distance_matrix(KDTree(truth), radius, output_type="coo_matrix")
    # Pairs at distance 0 are explicit entries, which the conversion keeps.
    graph = csr_array((np.ones(pairs.nnz, dtype=bool), (pairs.row, pairs.col)), shape=pairs.shape)
    return int((maximum_bipartite_matching(graph) >= 0).sum())


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else math.nan
