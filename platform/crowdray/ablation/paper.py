"""Errors that the paper reports for its ablations (Zhao et al., CVPR 2019): MAE and RMSE on test splits.

Its tables name RMSE "MSE".
"""

from dataclasses import dataclass

from crowdray.ablation.arms import ALL, NONE


@dataclass(frozen=True)
class PaperTable:
    """One table of the paper, for one backbone."""

    source: str
    """Its number in the paper."""
    errors: dict[str, tuple[float, float]]
    """MAE and RMSE of each arm."""

    def gain(self, arm: str) -> float | None:
        """MAE of the plain baseline minus that of an arm; None if the paper does not have it."""
        return self.errors[NONE][0] - self.errors[arm][0] if arm in self.errors and arm != NONE else None


def _table(source: str, *errors: tuple[float, float]) -> PaperTable:
    arms = (NONE, "depth", "segmentation", "count", "depth+segmentation", "depth+count", "segmentation+count", ALL)
    return PaperTable(source, dict(zip(arms, errors, strict=True)))


TABLES = {
    ("shanghaitech-b", "cfcn"): _table(
        "Table 2",
        (12.89, 22.3),
        (11.72, 19.76),
        (12.31, 20.66),
        (12.24, 21.49),
        (11.52, 19.78),
        (11.58, 19.73),
        (11.88, 20.42),
        (11.05, 19.66),
    ),
    ("shanghaitech-b", "csrnet"): _table(
        "Table 2",
        (10.6, 16.0),
        (8.73, 13.63),
        (9.20, 14.14),
        (9.11, 14.39),
        (8.28, 13.97),
        (8.32, 13.57),
        (8.51, 13.66),
        (8.11, 13.53),
    ),
    ("mall", "cfcn"): _table(
        "Table 3",
        (3.14, 3.90),
        (2.79, 3.51),
        (2.68, 3.37),
        (2.83, 3.55),
        (2.36, 3.02),
        (2.48, 3.18),
        (2.34, 2.99),
        (2.28, 2.90),
    ),
}
"""Tables 2 and 3, by dataset and backbone."""

FIGURE_5: dict[str, dict[float, float]] = {
    "depth": {0: 12.89, 0.1: 12.9, 0.2: 12.73, 0.4: 12.35, 0.6: 11.72, 0.8: 12.08, 1: 12.85, 10: 18.62},
    "segmentation": {
        0: 12.89,
        0.01: 12.69,
        0.02: 12.43,
        0.04: 12.42,
        0.06: 12.54,
        0.08: 12.67,
        0.1: 12.79,
        1: 13.15,
        5: 23.2,
    },
    "count": {0: 12.89, 1: 12.24, 2: 15.74},
}
"""MAE on ShanghaiTech B by the loss weight of one task, with CFCN. Of the count, the values that its text states."""
