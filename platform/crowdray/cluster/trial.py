"""What runs inside each trial of a study: a training that tells Ray Tune of its epochs."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from ray import tune

from crowdray.cluster.runs import Run
from crowdray.cluster.runtime import Device, Resources
from crowdray.cluster.train import run_training
from crowdray.config import from_json
from crowdray.data.shards import Dataset
from crowdray.errors import UserError
from crowdray.evaluation.study import Leg
from crowdray.training.loop import DivergedError, Row, Training
from crowdray.training.prefix import Chain
from crowdray.training.sharing import Sharing, Shelf
from crowdray.training.world import World, pick_device


@dataclass(frozen=True)
class TrialTask:
    """What all trials of a study are told."""

    data: str
    """URI of the dataset."""
    digest: str
    """Its identity."""
    storage: str
    """The study's folder: trials of several workers keep their runs in it."""
    workers: int
    """Processes that train together in one trial."""
    resources: Resources
    """What the cluster has."""
    device: Device
    """Where workers train."""
    shelf: Shelf
    """Where trials find and leave their beginnings."""


def run_trial(task: TrialTask, told: Mapping[str, Any]) -> None:
    """Train one trial and report each epoch; a single worker trains in this very process.

    What the user has to mend, and a loss that is no number, are reported and not raised: Tune would only start the
    trial again.
    """
    try:
        if task.workers == 1:
            _train_here(task, told)
        else:
            _train_group(task, told)
    except DivergedError as error:
        tune.report({"failed": str(error)})
    except UserError as error:
        tune.report({"mistake": str(error)})


def _train_here(task: TrialTask, told: Mapping[str, Any]) -> None:
    config = from_json(told["config"], "the trial")
    torch.set_num_threads(config.numerics.threads)
    dataset = Dataset.open(task.data, verify=True)
    device = pick_device()
    sharing = Sharing(task.shelf, config, dataset, world=World(), device=device, threads=config.numerics.threads)
    account = Account(sharing.chains, 1)
    restored = sharing.restore()
    training = Training(config, dataset, world=World(), device=device, restored=restored)
    account.begin(training.progress.history)

    def report(row: Row, save: Callable[[Path], None]) -> None:
        sharing.keep(training, save)
        tune.report(account.after_epoch(training.progress.history))

    training.run(report)
    tune.report(account.at_end(training.progress.history))


def _train_group(task: TrialTask, told: Mapping[str, Any]) -> None:
    config = from_json(told["config"], "the trial")
    run = Run(config, task.data, task.digest, task.workers, task.storage, told["name"])
    account = Account(told["chains"], task.workers)
    seen: list[Row] = []

    def follow(history: Sequence[Row]) -> None:
        if not seen:
            account.begin(history[:-1])
        seen[:] = history
        tune.report(account.after_epoch(history))

    run_training(run, task.resources, device=task.device, follow=follow, shelf=task.shelf, scored=False)
    tune.report(account.at_end(seen))


class Account:
    """What a trial reports: its new epochs, its best errors, and the worker-seconds of its stages."""

    def __init__(self, chains: Sequence[Chain], workers: int) -> None:
        self._chains = chains
        self._workers = workers
        self._last = time.monotonic()
        self._spent = dict.fromkeys((chain.stage for chain in chains), 0.0)
        self._reused = 0
        self._told = 0

    def begin(self, history: Sequence[Row]) -> None:
        """The training starts after these epochs, which somebody else has trained."""
        self._reused = len(history)

    def after_epoch(self, history: Sequence[Row]) -> dict[str, Any]:
        """The report of the newest epoch; the first one brings the whole history."""
        now = time.monotonic()
        self._spent[str(history[-1]["stage"])] += (now - self._last) * self._workers
        self._last = now
        return self._report(history)

    def at_end(self, history: Sequence[Row]) -> dict[str, Any]:
        """The report of the end."""
        return self._report(history) | {"finished": True}

    def _report(self, history: Sequence[Row]) -> dict[str, Any]:
        rows, self._told = list(history[self._told :]), len(history)
        joint = [row for row in history if row["stage"] == "joint"]
        report: dict[str, Any] = {"rows": rows, "legs": [asdict(leg) for leg in self._legs(history)]}
        if joint:
            best = min(joint, key=lambda row: float(row["val/mae"]))
            report |= {"joint_epoch": len(joint), "mae": best["val/mae"], "rmse": best["val/rmse"]}
        return report

    def _legs(self, history: Sequence[Row]) -> list[Leg]:
        legs = []
        for chain in self._chains:
            rows = [row for row in history if row["stage"] == chain.stage]
            reused = [row for row in history[: self._reused] if row["stage"] == chain.stage]
            saved = sum(float(row["seconds"]) for row in reused) * self._workers
            legs.append(Leg(chain.key, chain.stage, len(rows), len(reused), self._spent[chain.stage], saved))
        return [leg for leg in legs if leg.epochs]
