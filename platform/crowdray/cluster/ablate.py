"""Run an ablation on a Ray cluster: train its cells, read the test split once, publish the result."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from typing import Any, Protocol

from crowdray import storage
from crowdray.ablation.protocol import (
    CELL_FILE,
    TESTED_FILE,
    Ablation,
    Cell,
    check_updates,
    planned_updates,
)
from crowdray.ablation.publish import AblationOutcome, publish_ablation
from crowdray.ablation.reads import Read, ReadLog
from crowdray.ablation.schedule import next_cell
from crowdray.cluster.cell import CellProgress, CellTask, count_cell, load_cell, train_cell
from crowdray.cluster.runtime import (
    MAX_RETRIES,
    PACKAGE,
    Resources,
    choose_gpu,
    connect,
    deletion_warning,
    wait_for_workers,
)
from crowdray.config import Device
from crowdray.data.shards import Dataset
from crowdray.errors import RESUME_HINT, JobFailed, UserError
from crowdray.pipeline.publish import open_run
from crowdray.registry.provenance import git_revision
from crowdray.registry.tracking import finish_on_exit
from crowdray.stage_cache.keys import StageKey, code_digest, stage_keys
from crowdray.stage_cache.session import StageCacheConfig
from crowdray.storage.lock import Lock
from crowdray.training.errors import DivergedError
from crowdray.training.stages import build_stages

POLL_S = 0.5
"""Seconds between two looks at the progress of cells."""
SNAPSHOTS = 4
"""Parts of a long stage after each of which its state is stored, so that a killed run resumes within it."""


class AblationFailed(JobFailed):
    """Some cells could not be trained."""


@dataclass(frozen=True)
class CellStatus:
    """Where a cell is."""

    name: str
    state: str = "waiting"
    """waiting, training, trained, counting, done or failed."""
    progress: str = ""
    """Stage and epoch."""
    mae: float | None = None
    """Latest validation MAE."""


class AblationCallback(Protocol):
    """Progress of an ablation, for a display."""

    def on_status(self, text: str, /) -> None:
        """The job starts another step."""
        ...

    def on_cells(self, cells: Sequence[CellStatus], /) -> None:
        """A cell started, progressed or ended."""
        ...


@dataclass(frozen=True)
class Placement:
    """Where the cells of an ablation run."""

    cpus: int
    """CPUs of a cell: its threads."""
    gpus: float
    """GPUs of a cell, where there are any; below 1 for several on one GPU."""
    device: Device
    concurrent: int | None
    """Most cells at once; None for as many as fit."""


def ablate(
    ablation: Ablation,
    callback: AblationCallback,
    *,
    placement: Placement,
    command: str,
    read_again: str,
    results: str,
    tracking_uri: str | None,
    stage_cache: StageCacheConfig,
) -> AblationOutcome:
    """Train all cells that are not finished, read the test split once, and publish the result.

    Args:
        ablation: What to compare.
        callback: Receives the progress.
        placement: Where its cells run.
        command: The command line.
        read_again: Why the test split is read a second time; empty if it is not.
        results: Folder or URI of the record.
        tracking_uri: Where MLflow tracks the ablation; None for nowhere.
        stage_cache: Where cells share the states of their stages.

    Raises:
        UserError: A problem that the user can fix.
        AblationFailed: Cells diverged, or lost their workers repeatedly; the others are finished.
    """
    dataset = Dataset.open(ablation.identity.data)
    check_updates({cell: planned_updates(ablation.config(cell, dataset), dataset) for cell in ablation.cells})
    reads = ReadLog.load(ablation.test_read_file, dataset.digest)
    reads.check([cell.name for cell in ablation.cells], read_again, ablation.uri)
    if warning := deletion_warning(ablation.uri):
        callback.on_status(warning)
    fix = "wait for it, or give another --name"
    with Lock(storage.join(ablation.uri, "driver"), f"the ablation {ablation.uri}", fix, callback.on_status):
        note = f"Ablation of {len(ablation.arms)} arms with seeds {', '.join(map(str, ablation.seeds))}"
        with finish_on_exit(open_run(ablation.identity, dataset.index.name, tracking_uri, note=note)) as tracker:
            driver = _Driver(ablation, dataset, callback, placement, stage_cache)
            driver.run(command, read_again)
            tracker.set_tags({"crowdray.arms": ", ".join(arm.name for arm in ablation.arms)})
            callback.on_status("comparing the arms and drawing figures")
            cells = [load_cell(ablation.folder(cell)) for cell in ablation.cells]
            return publish_ablation(ablation, cells, dataset, command, results, tracker)


@dataclass
class _Driver:
    """The steps of `ablate`, and what they have in common."""

    ablation: Ablation
    dataset: Dataset
    callback: AblationCallback
    placement: Placement
    stage_cache: StageCacheConfig
    status: dict[str, CellStatus] = field(default_factory=dict)
    """Where each cell is, by name."""

    def run(self, command: str, read_again: str) -> None:
        """Train what is left, then read the test split."""
        ablation = self.ablation
        has_test = "test" in self.dataset.index.splits
        untrained, untested = self._without(CELL_FILE), self._without(TESTED_FILE) if has_test else []
        for cell in ablation.cells:
            state = "waiting" if cell in untrained else "trained" if cell in untested else "done"
            self.status[cell.name] = CellStatus(cell.name, state)
        if not untrained and not untested:
            ablation.create_or_verify()
            self.callback.on_status(f"all {len(ablation.cells)} cells of {ablation.uri} are finished")
            return
        code = code_digest()  # results of different code are not comparable
        if storage.exists(ablation.identity_file):  # before Ray starts
            ablation.create_or_verify(code=code)
        with self._connected(code) as (task, options, slots):
            if untrained:
                self.callback.on_status(f"training {len(untrained)} of {len(ablation.cells)} cells, {slots} at once")
                runner = _Runner(task, options, slots, self._update)
                self._raise_failures(
                    runner.run(train_cell, untrained, self._stages(untrained), ("training", "trained"))
                )
            check_updates({cell: load_cell(ablation.folder(cell)).updates for cell in ablation.cells})
            if untested:
                self._record_read(command, read_again)
                self.callback.on_status(f"reading the test split with {len(untested)} cells")
                runner = _Runner(task, options, slots, self._update)
                self._raise_failures(runner.run(count_cell, untested, {}, ("counting", "done")))

    def _without(self, file: str) -> list[Cell]:
        folders = {cell: self.ablation.folder(cell) for cell in self.ablation.cells}
        return [cell for cell, folder in folders.items() if not storage.exists(storage.join(folder, file))]

    @contextmanager
    def _connected(self, code: str) -> Iterator[tuple[CellTask, dict[str, Any], int]]:
        """Connect to Ray; yield what cells have in common, the options of their tasks, and how many run at once."""
        ablation, placement = self.ablation, self.placement
        with connect() as resources:
            import ray
            from ray.util.queue import Queue
            from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

            use_gpu = choose_gpu(resources, 1, placement.device)
            slots = cell_slots(resources, placement, use_gpu)
            ablation.create_or_verify(code=code, device="gpu" if use_gpu else "cpu")
            gpus = placement.gpus if use_gpu else 0
            wait_for_workers(resources, 1, {"CPU": placement.cpus, "GPU": gpus}, self.callback.on_status)
            driver_node = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
            queue: Any = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": driver_node})
            options = {"num_cpus": placement.cpus, "num_gpus": gpus, "max_retries": MAX_RETRIES}
            stage_cache = replace(self.stage_cache, snapshot_epochs=_snapshot_epochs(ablation, self.dataset))
            yield CellTask(ablation, stage_cache, use_gpu, queue), options, slots

    def _stages(self, cells: Sequence[Cell]) -> dict[str, Sequence[StageKey]]:
        """The stages of each cell; their keys only distinguish cells, so that the numerics are left out."""
        configs = {cell.name: self.ablation.config(cell, self.dataset) for cell in cells}
        return {name: stage_keys(config, self.dataset.digest, 1, {}) for name, config in configs.items()}

    def _update(self, status: CellStatus) -> None:
        mae = self.status[status.name].mae if status.mae is None else status.mae
        self.status[status.name] = replace(status, mae=mae)
        self.callback.on_cells([*self.status.values()])

    def _record_read(self, command: str, reason: str) -> None:
        """Record the read of the test split before it happens."""
        ablation, names = self.ablation, [cell.name for cell in self.ablation.cells]
        reads = ReadLog.load(ablation.test_read_file, self.dataset.digest)
        if reads.check(names, reason, ablation.uri):
            now = datetime.now(UTC).isoformat(timespec="seconds")
            read = Read(now, git_revision(PACKAGE), command, tuple(names), reason if reads.reads else "")
            replace(reads, reads=(*reads.reads, read)).save(ablation.test_read_file)

    def _raise_failures(self, failures: Mapping[str, str]) -> None:
        if failures:
            listed = "\n".join(f"  {name}: {reason}" for name, reason in failures.items())
            raise AblationFailed(f"{len(failures)} cells of {self.ablation.uri} failed; the others are kept:\n{listed}")


def cell_slots(resources: Resources, placement: Placement, use_gpu: bool) -> int:
    """How many cells run at once.

    Raises:
        UserError: Not even one fits; it would wait forever.
    """
    if not placement.gpus > 0:
        raise UserError(f"--gpus-per-run is {placement.gpus}; give a number above 0, such as 0.25 for four on one GPU")
    if placement.concurrent is not None and placement.concurrent < 1:
        raise UserError(f"--concurrent is {placement.concurrent}; give at least 1")
    nodes = resources.node_cpus or (resources.cpus,)
    slots = max(sum(cpus // placement.cpus for cpus in group) for group in (nodes, resources.max_node_cpus))
    if slots == 0:
        most = max((*nodes, *resources.max_node_cpus))
        raise UserError(f"--cpus-per-run is {placement.cpus}, and no node has more than {most} CPUs: give at most that")
    if use_gpu:
        slots = min(slots, int(resources.gpus / placement.gpus + 1e-9))
        if slots == 0:
            raise UserError(f"--gpus-per-run is {placement.gpus:g}, and Ray has {resources.gpus} GPUs: give fewer")
    return min(slots, placement.concurrent or slots)


class _Runner:
    """Runs cells as Ray tasks, in the order of the schedule."""

    def __init__(
        self, task: CellTask, options: dict[str, Any], slots: int, on_status: Callable[[CellStatus], None]
    ) -> None:
        self._task, self._options, self._slots, self._on_status = task, options, slots, on_status
        self._running: dict[Any, str] = {}
        """Name of each running cell, by its Ray object."""
        self._finished: dict[str, int] = {}
        """Number of finished stages of each running cell."""

    def run(
        self,
        work: Callable[[CellTask, Cell], None],
        cells: Sequence[Cell],
        stages: Mapping[str, Sequence[StageKey]],
        states: tuple[str, str],
    ) -> dict[str, str]:
        """Run a function for each cell; returns the reasons of those that failed, by name.

        Args:
            stages: Stages of each cell, of which no two running cells train the same one; empty where they train none.
            states: State of a running cell, and of a finished one.
        """
        import ray

        remote: Any = ray.remote(work)
        waiting, failures = {cell.name: cell for cell in cells}, dict[str, str]()
        keys = {name: [stage.key for stage in stages.get(name, ())] for name in waiting}
        while waiting or self._running:
            while len(self._running) < self._slots and (name := next_cell([*waiting], self._finished, keys)):
                started = remote.options(name=name, **self._options).remote(self._task, waiting.pop(name))
                self._running[started], self._finished[name] = name, 0
                self._on_status(CellStatus(name, states[0]))
            ended, _ = ray.wait(list(self._running), timeout=POLL_S)
            for progress in self._progress():
                names = [stage.stage for stage in stages[progress.cell]]
                epochs = stages[progress.cell][number := names.index(progress.stage)].epochs
                self._finished[progress.cell] = number + (progress.epoch >= epochs)
                text = f"{progress.stage} {progress.epoch}/{epochs}"
                self._on_status(CellStatus(progress.cell, states[0], text, progress.mae))
            for reference in ended:
                name = self._running.pop(reference)
                del self._finished[name]
                if reason := _failure(reference):
                    failures[name] = reason
                self._on_status(CellStatus(name, "failed" if reason else states[1]))
        return failures

    def _progress(self) -> list[CellProgress]:
        """Progress of running cells since the last call; messages of a cell precede its end."""
        queue = self._task.queue
        received = queue.get_nowait_batch(size) if (size := queue.qsize()) else []
        return [progress for progress in received if progress.cell in self._finished]


def _failure(reference: Any) -> str:
    """Return why a task failed that others may survive, "" if it did not; raises an error of the whole ablation."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    try:
        ray.get(reference)
    except RayTaskError as error:
        if isinstance(error.cause, DivergedError):
            return str(error.cause)
        raise error.cause if isinstance(error.cause, UserError) else error from None
    except RayError as error:
        return f"its worker was lost {MAX_RETRIES + 1} times ({type(error).__name__}); {RESUME_HINT}"
    return ""


def _snapshot_epochs(ablation: Ablation, dataset: Dataset) -> dict[str, list[int]]:
    """Epochs within long stages after which states are stored; every cell of a fraction has nearly the same lengths."""
    epochs: dict[str, set[int]] = {}
    for cell in ablation.cells:
        for stage in build_stages(ablation.config(cell, dataset)):
            length = stage.schedule.epochs
            parts = range(1, SNAPSHOTS) if length >= 2 * SNAPSHOTS else ()
            epochs.setdefault(stage.name, set()).update(length * part // SNAPSHOTS for part in parts)
    return {name: sorted(found) for name, found in epochs.items()}
