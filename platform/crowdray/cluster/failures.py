"""Which failures of a distributed run are worth a restart, and what the user reads about the others."""

from ray.exceptions import RayError

from crowdray.cluster.ray_internals import ray_train_error, start_timeout_error
from crowdray.errors import RESUME_HINT, InfeasibleConfigError, JobFailed, UserError
from crowdray.pipeline.run import Run
from crowdray.training.errors import DivergedError, is_out_of_memory


class TrainingStopped(JobFailed):
    """Workers were lost more often than they are restarted, or the cluster was lost."""


def is_worker_loss(error: BaseException) -> bool:
    """Whether an error may come from a lost process, machine or connection, and is worth a restart.

    Training is deterministic, so any other error would repeat: also a rejection by a store, too little memory and a
    failing compiler, although these are RuntimeErrors or OSErrors. The other ranks see a lost peer as a RuntimeError
    of their collective operation.
    """
    lost = isinstance(error, (RuntimeError, OSError, RayError, ray_train_error()))
    repeats = isinstance(error, (DivergedError, PermissionError)) or is_out_of_memory(error)
    compiler = "TorchDynamoException" in {kind.__name__ for kind in type(error).__mro__}  # importing it takes seconds
    return lost and not repeats and not compiler


def translated_error(error: BaseException, run: Run) -> BaseException:
    """Unwrap an error that Ray raised, or describe it in one message for the user."""
    causes: list[BaseException] = [error]
    for cause in causes:  # the list grows during the iteration
        failures = [getattr(cause, "controller_failure", None), *getattr(cause, "worker_failures", {}).values()]
        causes += [failure for failure in failures if isinstance(failure, BaseException)]
    for cause in causes:
        if isinstance(cause, (UserError, DivergedError)):
            return cause
    deepest = causes[-1]
    if isinstance(deepest, PermissionError) and deepest.errno is None:  # raised by an object store
        return UserError(f"cannot write to {run.uri}: {deepest}; renew your credentials, then {RESUME_HINT}")
    if is_out_of_memory(deepest):
        return InfeasibleConfigError(
            f"the run {run.uri} does not fit into memory ({str(deepest).splitlines()[0]}); lower --sampling.batch, "
            "--sampling.crop or --sampling.gpu-cache-gib, or use fewer workers per node"
        )
    if isinstance(deepest, start_timeout_error()):
        return TrainingStopped(
            f"the workers of {run.uri} did not start again, as the cluster is busy or lost nodes: end other jobs, add "
            f"nodes or give fewer --workers, then {RESUME_HINT}"
        )
    if not is_worker_loss(deepest):
        return deepest
    lines = [type(deepest).__name__, *filter(None, map(str.strip, str(deepest).splitlines()))]
    return TrainingStopped(f"the run {run.uri} lost its workers or its cluster ({lines[-1]}); {RESUME_HINT}")
