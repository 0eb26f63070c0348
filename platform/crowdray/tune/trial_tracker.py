"""Records of all trials of a study, passed to the display and to MLflow."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import optuna
from pydantic import TypeAdapter

from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.pipeline.publish import open_run
from crowdray.registry.metrics import BEST_VAL_MAE, BEST_VAL_RMSE, metric_rows
from crowdray.registry.pages import TRIAL_STATE
from crowdray.registry.tracking import Status, Tracker
from crowdray.training.checkpoint import EpochMetrics
from crowdray.tune.optuna_study import sampled_trials
from crowdray.tune.record import StageCost, State, StudyRecord, TrialRecord
from crowdray.tune.report import TrialReport
from crowdray.tune.study import Study

RECORD = "record"
"""Optuna's user attribute with the record of a trial."""

_STATUS: dict[State, Status] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}

_log = logging.getLogger(__name__)


class TrialTracker:
    """Records of all trials, including those of earlier starts of the study.

    Each trial is an MLflow run below the study's run, reopened under its number after a restart. It ends in MLflow
    before it ends in Optuna, so that a trial that is complete in Optuna is complete in MLflow too.
    """

    def __init__(
        self,
        study: Study,
        trials: optuna.Study,
        on_record: Callable[[StudyRecord], None],
        *,
        dataset: str,
        tracking_uri: str | None,
        parent: str | None,
    ) -> None:
        """Load the records of earlier starts.

        Args:
            study: The study.
            trials: Optuna's record of it.
            on_record: Receives the whole study after each change.
            dataset: Name of the dataset, part of the MLflow experiment's name.
            tracking_uri: Where MLflow tracks the trials; None for nowhere.
            parent: Id of the study's MLflow run.
        """
        self._study, self._on_record = study, on_record
        self._dataset, self._tracking_uri, self._parent = dataset, tracking_uri, parent
        self._running: dict[int, _Running] = {}
        stored = [trial.user_attrs[RECORD] for trial in sampled_trials(trials) if RECORD in trial.user_attrs]
        records = map(TypeAdapter(TrialRecord).validate_python, stored)
        self._records: dict[int, TrialRecord] = {record.number: record for record in records}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the MLflow runs of running trials; a resumed trial reopens its run."""
        for running in list(self._running.values()):  # Tune's thread may still change it
            if running.tracker:
                running.tracker.finish("KILLED")

    @property
    def record(self) -> StudyRecord:
        """The current state of the study."""
        trials = tuple(self._records[number] for number in sorted(self._records))
        return StudyRecord(self._study.identity.name, trials)

    def open_run(self, number: int, config: Config) -> Tracker:
        """Open the MLflow run of a trial."""
        identity = self._study.run_of(number, config).identity
        study = self._study.identity.name
        # MLflow cuts long names off at their end.
        name, note = f"{identity.name} of {study}", f"Trial {number} of the study {study}"
        return open_run(identity, self._dataset, self._tracking_uri, name=name, parent=self._parent, note=note)

    def on_start(self, number: int, values: Mapping[str, Any], config: Config) -> None:
        """A trial starts, or restarts: then it keeps the costs from before its driver died."""
        before = self._records.get(number)
        costs = before.stage_costs if before else ()
        self._records[number] = TrialRecord(number, "running", dict(values), None, None, {}, costs)
        self._running[number] = _Running(config, self._try_open_run(number, config))
        self._on_record(self.record)

    def on_report(self, number: int, report: TrialReport) -> dict[str, Any]:
        """A trial reports new epochs, or after a worker loss some epochs again; returns its record for Optuna."""
        record, running = self._records[number], self._running[number]
        running.history.update({int(row["epoch"]): row for row in report.rows})
        if running.attempt != report.attempt:
            running.attempt, running.lost = report.attempt, record.stage_costs
        self._records[number] = replace(
            record,
            mae=report.mae,
            rmse=report.rmse,
            curve={**record.curve, **report.curve},
            stage_costs=_with_lost(report.stage_costs, running.lost),
        )
        if running.tracker:
            running.tracker.sync_history(running.rows())
        self._on_record(self.record)
        return asdict(self._records[number])

    def on_end(self, number: int, state: State, reason: str) -> dict[str, Any]:
        """A trial ends; returns its record for Optuna."""
        record = self._records[number] = replace(self._records[number], state=state, reason=reason, ended=time.time())
        running = self._running.pop(number)
        if tracker := running.tracker or self._try_open_run(number, running.config):
            tracker.sync_history(running.rows())
            errors = {BEST_VAL_MAE: record.mae, BEST_VAL_RMSE: record.rmse}
            # Step 0: those of the exported counter, at its epoch, replace them if the trial is published.
            tracker.log_summary({name: value for name, value in errors.items() if value is not None}, 0)
            epochs = max(running.history, default=0)
            tracker.log_summary(cost_metrics(record), epochs)
            reason = reason or (f"unpromising after epoch {epochs}" if state == "pruned" else "")
            tracker.set_tags({TRIAL_STATE: state} | ({"crowdray.reason": reason} if reason else {}))
            tracker.finish(_STATUS[state])
        self._on_record(self.record)
        return asdict(record)

    def _try_open_run(self, number: int, config: Config) -> Tracker | None:
        """Open a trial's MLflow run; a failure costs a warning, and a second attempt at the trial's end."""
        try:
            return self.open_run(number, config)
        except UserError as error:
            _log.warning("trial %d is not tracked: %s", number, error)
            return None


def cost_metrics(record: TrialRecord | StudyRecord) -> dict[str, float]:
    """Return what a trial or a study cost, and what the stage cache saved, under MLflow's names."""
    return {"system/worker_seconds": record.spent, "system/worker_seconds_saved": record.saved}


@dataclass
class _Running:
    """A running trial."""

    config: Config
    tracker: Tracker | None
    history: dict[int, EpochMetrics] = field(default_factory=dict)
    """Rows by epoch."""
    attempt: str = ""
    """The reporting process."""
    lost: tuple[StageCost, ...] = ()
    """Costs of earlier attempts."""

    def rows(self) -> list[dict[str, float]]:
        """The history in MLflow's form."""
        return metric_rows([self.history[epoch] for epoch in sorted(self.history)])


def _with_lost(costs: Sequence[StageCost], lost: Sequence[StageCost]) -> tuple[StageCost, ...]:
    """Add the costs of lost attempts; epochs that these had trained themselves do not count as saved."""
    before, stages = {cost.stage: cost for cost in lost}, {cost.stage for cost in costs}
    return (
        *(_sum(cost, before[cost.stage]) if cost.stage in before else cost for cost in costs),
        *(cost for cost in lost if cost.stage not in stages),  # not reached again yet
    )


def _sum(cost: StageCost, lost: StageCost) -> StageCost:
    reused, saved = min(cost.reused, lost.reused), min(cost.saved, lost.saved)
    return replace(cost, seconds=cost.seconds + lost.seconds, reused=reused, saved=saved)
