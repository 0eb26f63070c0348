"""Names of metrics in MLflow: one name per number.

Curves are "train/..." and "val/...", by epoch. MLflow shows what starts with "system/" on a page of its own. Names
without a slash are single numbers of the exported counter, and MLflow draws their charts below the curves.
"""

from collections.abc import Iterable, Mapping

EPOCH = "epoch"
"""Key of a row's epoch, which counts over all stages."""
BEST_VAL_MAE = "best_val_mae"
"""Validation MAE of the exported counter, of the best epoch so far, or of a study's best trial."""
BEST_VAL_RMSE = "best_val_rmse"

_CURVES = {
    **{f"val/{error}": f"val/{error}" for error in ("mae", "rmse", "bias")},
    **{f"loss/{task}": f"train/loss_{task}" for task in ("density", "segmentation", "depth", "count")},
    "learning_rate": "train/learning_rate",
    **{name: f"system/{name}" for name in ("images_per_s", "data_wait_fraction", "mfu", "memory_gib")},
    "seconds": "system/epoch_seconds",
}
"""Metrics of an epoch that are logged, the first ones first in MLflow's comparisons; results.csv in the run's folder
has all metrics."""


def metric_rows(history: Iterable[Mapping[str, float | int | str]]) -> list[dict[str, float]]:
    """Return the history of a training run under MLflow's names, with the key "epoch"."""
    return [
        {name: float(row[key]) for key, name in _CURVES.items() if key in row} | {EPOCH: float(row[EPOCH])}
        for row in history
    ]


def exported_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Return metrics of the exported counter under MLflow's names: "val/mae" is best_val_mae, "test/mae" test_mae."""
    names = {key: key.replace("/", "_") for key in metrics}
    return {f"best_{name}" if key.startswith("val/") else name: metrics[key] for key, name in names.items()}
