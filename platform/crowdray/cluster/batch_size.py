"""The batch of a run that leaves it to us: measured once, by one process with a worker's share of the cluster."""

from dataclasses import replace

from crowdray.cluster.runtime import choose_gpu, connect
from crowdray.config import Device
from crowdray.console.progress import TrainingDisplay
from crowdray.errors import UserError
from crowdray.pipeline.run import Run
from crowdray.training.errors import DivergedError


def find_batch_size(run: Run, display: TrainingDisplay, *, device: Device = "auto") -> Run:
    """The run with a batch that `measure_batch_size` measured; one that was begun keeps the batch it was begun with.

    Raises UserError where not one window fits, where the process that measures is killed, and where the number of
    workers may change: then so would what fits.
    """
    if run.elastic:
        raise UserError(
            f"--batch auto measures for one number of workers, --workers is {run.fewest}:{run.most}: give one, or "
            "--sampling.batch"
        )
    if (batch := run.batch_there()) is None:
        display.status("starting Ray to measure how many windows fit into memory")
        batch = _measured(run, device)
        display.status(f"a batch has {batch} windows: {batch // run.most} for each of {run.most} workers")
    return replace(run, config=replace(run.config, sampling=replace(run.config.sampling, batch=batch)))


def _measured(run: Run, device: Device) -> int:
    with connect() as resources:
        import ray
        from ray.exceptions import OutOfMemoryError, RayTaskError, WorkerCrashedError

        gpus = int(choose_gpu(resources, run.most, device))
        measure = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=0, max_calls=1)(_measure)
        try:
            batch: int = ray.get(measure.remote(run, bool(gpus)))
        except RayTaskError as error:
            if isinstance(error.cause, (UserError, DivergedError)):
                raise error.cause from error
            raise
        except (OutOfMemoryError, WorkerCrashedError) as error:
            raise UserError(
                "the process that measured how many windows fit was killed, most likely for its memory: give the "
                f"number, --sampling.batch {run.most * run.config.optimizer.grad_accumulation_steps} or a multiple "
                "of it"
            ) from error
    return batch


def _measure(run: Run, use_gpu: bool) -> int:
    """Inside one process of the cluster, alone on its node: what each of the workers that will share it can take."""
    import ray
    import torch

    from crowdray.cluster.worker import threads_of
    from crowdray.data.shards import Dataset
    from crowdray.training.batch_size_finder import measure_batch_size

    node = ray.get_runtime_context().get_node_id()
    there = next(entry["Resources"] for entry in ray.nodes() if entry["NodeID"] == node)  # type: ignore[no-untyped-call]
    workers_here = min(run.most, int(there.get("CPU", 1)))
    torch.set_num_threads(threads_of(run.config, workers_here))
    device, memory_bytes = torch.device("cpu"), int(there["memory"] / workers_here)
    dataset = Dataset.open(run.data, verify=True)
    if use_gpu:
        return measure_batch_size(run.config, dataset, device=torch.device("cuda", 0), workers=run.most)
    return measure_batch_size(run.config, dataset, device=device, workers=run.most, memory_bytes=memory_bytes)
