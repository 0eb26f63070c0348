"""Callbacks inside Ray Train's controller."""

from typing import Any

from ray.train import UserCallback

from crowdray.cluster.failures import is_worker_loss
from crowdray.cluster.worker import ROWS


class ReportCallback(UserCallback):
    """Sends each epoch's rows to the driver, and ends a run that a restart cannot help."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Send rank 0's rows once the epoch's checkpoint is stored."""
        self._rows.put(metrics[0][ROWS])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """Raise an error that would repeat, which ends the run."""
        for error in worker_exceptions.values():
            if not is_worker_loss(error):
                raise error
