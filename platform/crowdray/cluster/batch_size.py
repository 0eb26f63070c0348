"""Measure the batch size of a run once, in one process with the resources of a worker."""

from collections.abc import Callable
from dataclasses import replace

from crowdray.cluster.runtime import choose_gpu, connect, node_resources, wait_for_workers
from crowdray.config import Device
from crowdray.errors import UserError
from crowdray.pipeline.run import Run
from crowdray.training.errors import DivergedError


def find_batch_size(run: Run, on_status: Callable[[str], None], *, device: Device = "auto") -> Run:
    """Return the run with a measured batch size; a resumed run keeps its recorded batch size.

    Raises:
        UserError: Not one crop fits, the measuring process is killed, or the number of workers may change, and with
            it the batch size that fits.
    """
    identity = run.identity
    if identity.is_elastic:
        raise UserError(
            f"--batch auto needs a fixed number of workers, --workers is {identity.min_workers}:"
            f"{identity.max_workers}: give one number, or --sampling.batch"
        )
    if (batch := run.recorded_batch()) is None:
        on_status("starting Ray to measure the batch size")
        batch = measure_on_cluster(run, device, on_status)
        workers = identity.max_workers
        on_status(f"batch size {batch}: {batch // workers} crops for each of {workers} workers")
    return run.with_config(replace(identity.config, sampling=replace(identity.config.sampling, batch=batch)))


def measure_on_cluster(run: Run, device: Device, on_status: Callable[[str], None]) -> int:
    """Measure the batch size in a process of a Ray cluster, alone on its node."""
    with connect() as resources:
        import ray
        from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

        workers = run.identity.max_workers
        gpus = int(choose_gpu(resources, workers, device))
        wait_for_workers(resources, 1, {"CPU": 1, "GPU": gpus}, on_status)
        measure = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=1)(_measure)
        try:
            batch: int = ray.get(measure.remote(run, bool(gpus)))
        except RayTaskError as error:
            if isinstance(error.cause, (UserError, DivergedError)):
                raise error.cause from error
            raise
        except (OutOfMemoryError, WorkerCrashedError) as error:
            smallest = workers * run.identity.config.optimizer.grad_accumulation_steps
            raise UserError(
                "the process that measures the batch size was killed, probably for its memory: give --sampling.batch "
                f"{smallest} or a multiple of it"
            ) from error
    return batch


def _measure(run: Run, use_gpu: bool) -> int:
    import torch

    from crowdray.cluster.worker import threads_of
    from crowdray.data.shards import Dataset
    from crowdray.training.batch_size_finder import measure_batch_size

    identity, workers = run.identity, run.identity.max_workers
    resources = node_resources()
    workers_on_node = min(workers, int(resources.get("CPU", 1)))
    torch.set_num_threads(threads_of(identity.config, workers_on_node))
    dataset = Dataset.open(identity.data)
    if use_gpu:
        return measure_batch_size(identity.config, dataset, device=torch.device("cuda", 0), workers=workers)
    free = int(resources["memory"] / workers_on_node)
    return measure_batch_size(identity.config, dataset, device=torch.device("cpu"), workers=workers, memory_bytes=free)
