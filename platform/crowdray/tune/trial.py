"""What runs inside each trial of a study: a training that tells Ray Tune of its epochs."""

import math
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from crowdray.cluster.callbacks import is_worker_loss
from crowdray.cluster.runtime import Resources
from crowdray.cluster.train import run_training
from crowdray.config import Device, from_json
from crowdray.errors import InfeasibleConfigError, UserError
from crowdray.pipeline.run import Run, open_as_begun
from crowdray.stage_cache.keys import StageKey
from crowdray.stage_cache.session import StageCacheConfig, StageCacheSession
from crowdray.stage_cache.store import StateId
from crowdray.training.checkpoint import EpochMetrics
from crowdray.training.distributed import World, pick_device
from crowdray.training.errors import DivergedError
from crowdray.training.trainer import Trainer
from crowdray.tune.record import StageCost


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a study are told."""

    data: str
    """URI of the dataset."""
    digest: str
    """Its identity."""
    storage: str
    """The study's folder: trials of several workers keep their runs in it."""
    begun: str
    """File there that says what the study is."""
    workers: int
    """Processes that train together in one trial."""
    resources: Resources
    """What the cluster has."""
    device: Device
    """Where the workers of a group train."""
    use_gpu: bool
    """Whether a trial of one worker has a GPU."""
    stage_cache: StageCacheConfig
    """Where trials find and leave their beginnings."""


def run_trial(task: TrialTask, told: Mapping[str, Any]) -> None:
    """Train one trial and report each epoch; a single worker trains in this very process.

    What would happen again is reported and not raised, since Tune would start the trial again.
    """
    try:
        if task.workers == 1:
            _train_here(task, told)
        else:
            _train_group(task, told)
    except InfeasibleConfigError as error:
        tune.report({"failed": str(error), "settings": True})
    except UserError as error:
        tune.report({"mistake": str(error)})
    except Exception as error:
        if is_worker_loss(error):
            raise
        kind = "" if isinstance(error, DivergedError) else f"{type(error).__name__}: "
        tune.report({"failed": f"{kind}{error}"})


def _train_here(task: TrialTask, told: Mapping[str, Any]) -> None:
    config = from_json(told["config"], "the trial")
    torch.set_num_threads(config.numerics.threads)
    dataset = open_as_begun(task.data, task.digest, task.begun)
    device = trial_device(task.use_gpu)
    session = StageCacheSession(
        task.stage_cache, config, dataset, world=World(), device=device, threads=config.numerics.threads
    )
    account = Account(session.chains, 1)
    restored = session.restore()
    training = Trainer(config, dataset, world=World(), device=device, restored=restored)
    account.begin(training.state.progress.history)

    def report(row: EpochMetrics, save: Callable[[Path], None]) -> None:
        session.keep(training, save)
        tune.report(account.after_epoch(training.state.progress.history))

    training.fit(report)
    tune.report(account.at_end(training.state.progress.history))


def trial_device(use_gpu: bool) -> torch.device:
    """Where a trial of one worker trains: a GPU may be visible that it has not got."""
    return pick_device() if use_gpu else torch.device("cpu")


def _train_group(task: TrialTask, told: Mapping[str, Any]) -> None:
    config = from_json(told["config"], "the trial")
    run = Run(config, task.data, task.digest, task.workers, task.storage, told["name"])
    account = Account(told["chains"], task.workers)
    last, found = told["chains"][-1], task.stage_cache.open().find(told["chains"])
    seen: list[EpochMetrics] = []

    def follow(history: Sequence[EpochMetrics]) -> None:
        done = sum(row["stage"] == last.stage for row in history)
        whole = not seen and found == StateId(last.key, last.stage, done)  # and nothing was left to train
        if not seen:
            account.begin(history if whole else history[:-1])
        seen[:] = history
        if not whole:
            tune.report(account.after_epoch(history))

    run_training(run, task.resources, device=task.device, follow=follow, stage_cache=task.stage_cache, study=task.begun)
    tune.report(account.at_end(seen))


class Account:
    """What a trial reports: its new epochs, its best errors, and the worker-seconds of its stages.

    `attempt` tells the reports of a process from those of the one that was lost before it.
    """

    def __init__(self, chains: Sequence[StageKey], workers: int) -> None:
        self._chains = chains
        self._workers = workers
        self._last = time.monotonic()
        self._spent = dict.fromkeys((chain.stage for chain in chains), 0.0)
        self._reused = 0
        self._told = 0
        self._attempt = uuid.uuid4().hex

    def begin(self, history: Sequence[EpochMetrics]) -> None:
        """The training starts after these epochs, which somebody else has trained."""
        self._reused = len(history)

    def after_epoch(self, history: Sequence[EpochMetrics]) -> dict[str, Any]:
        """The report of the newest epoch; the first one brings the whole history."""
        now = time.monotonic()
        self._spent[str(history[-1]["stage"])] += (now - self._last) * self._workers
        self._last = now
        return self._report(history)

    def at_end(self, history: Sequence[EpochMetrics]) -> dict[str, Any]:
        """The report of the end."""
        return self._report(history) | {"finished": True}

    def _report(self, history: Sequence[EpochMetrics]) -> dict[str, Any]:
        told, self._told = self._told, len(history)
        joint = [row for row in history if row["stage"] == "joint"]
        errors = [float(row.get("val/mae", math.inf)) for row in joint]
        curve = [(epoch, min(errors[:epoch])) for epoch, row in enumerate(joint, 1) if row in history[told:]]
        report: dict[str, Any] = {"attempt": self._attempt, "rows": list(history[told:]), "curve": curve}
        report["legs"] = [asdict(leg) for leg in self._legs(history)]
        if errors and math.isfinite(min(errors)):
            best = joint[errors.index(min(errors))]
            report |= {"mae": best["val/mae"], "rmse": best["val/rmse"]}
        return report

    def _legs(self, history: Sequence[EpochMetrics]) -> list[StageCost]:
        legs = []
        for chain in self._chains:
            rows = [row for row in history if row["stage"] == chain.stage]
            reused = [row for row in history[: self._reused] if row["stage"] == chain.stage]
            saved = sum(float(row["seconds"]) for row in reused) * self._workers
            legs.append(StageCost(chain.key, chain.stage, len(rows), len(reused), self._spent[chain.stage], saved))
        return [leg for leg in legs if leg.epochs]
