"""What hears of a training inside Ray's controller: it hands epochs to the driver and stops hopeless repetitions."""

from typing import Any

from ray.exceptions import RayError
from ray.train import UserCallback
from ray.train.v2._internal.exceptions import RayTrainError

from crowdray.cluster.worker import ROWS
from crowdray.training.errors import DivergedError, is_out_of_memory


class ReportCallback(UserCallback):
    """Puts the rows of each epoch into a queue once its checkpoint is safe."""

    def __init__(self, rows: Any) -> None:
        self._rows = rows

    def after_report(self, run_context: Any, metrics: list[dict[str, Any]], checkpoint: Any) -> None:
        """Hand rank 0's rows to the driver."""
        self._rows.put(metrics[0][ROWS])

    def after_exception(self, run_context: Any, worker_exceptions: dict[int, Exception]) -> None:
        """End the run where starting again would come to the same; what is raised here ends it."""
        for error in worker_exceptions.values():
            if not is_worker_loss(error):
                raise error


def is_worker_loss(error: BaseException) -> bool:
    """Whether an error may come from a lost process, machine or connection, after which it is worth starting again.

    Everything else a training would do again: it repeats itself exactly, and a store that refuses it once refuses it
    again; so do a memory that is too small and a compiler that fails, which are RuntimeErrors too. A lost peer shows in
    the others as an error of their collective operations, a RuntimeError.
    """
    lost = isinstance(error, (RuntimeError, OSError, RayError, RayTrainError))
    repeats = isinstance(error, (DivergedError, PermissionError)) or is_out_of_memory(error)
    compiler = "TorchDynamoException" in {kind.__name__ for kind in type(error).__mro__}  # importing it takes seconds
    return lost and not repeats and not compiler
