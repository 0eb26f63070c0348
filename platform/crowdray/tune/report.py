"""The protocol between a trial and its search: what a trial receives, and what it reports."""

import math
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from crowdray.config import Config
from crowdray.stage_cache.keys import StageKey
from crowdray.training.checkpoint import EpochMetrics
from crowdray.tune.record import StageCost

SPEC = "spec"
"""Key of the TrialSpec in the configuration that Ray Tune passes to a trial."""

REPORT = "report"
"""Key of the TrialReport in the results that Ray Tune passes to the search."""

Status = Literal["running", "finished", "failed", "infeasible", "user_error"]


@dataclass(frozen=True)
class TrialSpec:
    """A trial that the search starts."""

    number: int
    """Its number in the study."""
    config: Config
    """What it trains."""
    keys: tuple[StageKey, ...]
    """The keys of its stages."""


@dataclass(frozen=True)
class TrialReport:
    """What a trial reports after each epoch and at its end."""

    status: Status
    """running; finished: trained to its end; failed: this trial alone; infeasible: its configuration cannot be
    trained; user_error: a problem of every trial, which stops the search."""
    message: str = ""
    """Why it failed."""
    attempt: str = ""
    """Identifies the reporting process; another one takes over after a worker loss."""
    rows: tuple[EpochMetrics, ...] = ()
    """Epochs since the last report; in the first report of an attempt all epochs."""
    curve: Mapping[int, float] = field(default_factory=dict)
    """Best validation MAE so far, for each epoch of the joint stage in `rows`; infinite before one is finite."""
    stage_costs: tuple[StageCost, ...] = ()
    """Costs of all stages so far, in this attempt."""
    mae: float | None = None
    """Best finite validation MAE of the joint stage; the latest one if it is annealed."""
    rmse: float | None = None
    """RMSE of the same epoch."""


class TrialReporter:
    """Builds a trial's reports from its history, and measures the worker-seconds of its stages.

    Args:
        annealed: Whether the joint stage is annealed.
    """

    def __init__(self, keys: Sequence[StageKey], workers: int, *, annealed: bool = False) -> None:
        self._keys = keys
        self._annealed = annealed
        self._workers = workers
        self._last = time.monotonic()
        self._spent = dict.fromkeys((key.stage for key in keys), 0.0)
        self._reused = 0
        self._reported = 0
        self._attempt = uuid.uuid4().hex

    def start(self, restored: Sequence[EpochMetrics]) -> None:
        """Training starts after the epochs `restored`, which the stage cache held."""
        self._reused = len(restored)

    def after_epoch(self, history: Sequence[EpochMetrics]) -> TrialReport:
        """Report the newest epoch; the first report contains the whole history."""
        now = time.monotonic()
        self._spent[str(history[-1]["stage"])] += (now - self._last) * self._workers
        self._last = now
        return self._report(history)

    def at_end(self, history: Sequence[EpochMetrics]) -> TrialReport:
        """Report the end of the run."""
        return replace(self._report(history), status="finished")

    def _report(self, history: Sequence[EpochMetrics]) -> TrialReport:
        new, self._reported = tuple(history[self._reported :]), len(history)
        joint = [row for row in history if row["stage"] == "joint"]
        errors = [float(row.get("val/mae", math.inf)) for row in joint]
        report = TrialReport(
            "running",
            attempt=self._attempt,
            rows=new,
            curve={epoch: min(errors[:epoch]) for epoch, row in enumerate(joint, 1) if row in new},
            stage_costs=tuple(self._stage_costs(history)),
        )
        result = errors[-1] if errors and self._annealed else min(errors, default=math.inf)
        if math.isfinite(result):
            best = joint[errors.index(result)]
            report = replace(report, mae=float(best["val/mae"]), rmse=float(best["val/rmse"]))
        return report

    def _stage_costs(self, history: Sequence[EpochMetrics]) -> list[StageCost]:
        costs = []
        for key in self._keys:
            rows = [row for row in history if row["stage"] == key.stage]
            reused = [row for row in history[: self._reused] if row["stage"] == key.stage]
            saved = sum(float(row["seconds"]) for row in reused) * self._workers
            if rows:
                costs.append(StageCost(key.key, key.stage, len(rows), len(reused), self._spent[key.stage], saved))
        return costs
