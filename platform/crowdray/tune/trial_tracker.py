"""The book of a study: what each trial does, told to whoever looks on and to MLflow."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Self

import optuna
from pydantic import TypeAdapter

from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.pipeline.publish import metric_rows
from crowdray.registry.tracking import Status, Tracker, open_tracker
from crowdray.training.checkpoint import EpochMetrics
from crowdray.tune.record import StageCost, State, StudyRecord, TrialRecord
from crowdray.tune.study import Study, drawn_trials

RECORD = "record"
"""Name under which Optuna keeps the record of an ended trial."""

_STATUS: dict[State, Status] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}

_log = logging.getLogger(__name__)


class TrialTracker:
    """Records of all trials, those of earlier starts of the study too.

    show: told the whole study after each change. Each trial is an MLflow run of its own below the study's, opened again
    under its number after a restart; it ends there before Optuna hears of the end, so that the two agree.
    """

    def __init__(
        self,
        study: Study,
        told: optuna.Study,
        show: Callable[[StudyRecord], None],
        *,
        dataset: str,
        tracking_uri: str | None,
        parent: str | None,
        tags: Mapping[str, str],
    ) -> None:
        self._study, self._show = study, show
        self._dataset, self._tracking_uri, self._parent, self._tags = dataset, tracking_uri, parent, tags
        self._running: dict[int, _Running] = {}
        kept = [trial.user_attrs[RECORD] for trial in drawn_trials(told) if RECORD in trial.user_attrs]
        records = map(TypeAdapter(TrialRecord).validate_python, kept)
        self._records: dict[int, TrialRecord] = {record.number: record for record in records}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """End the MLflow runs of trials that are still under way: whoever takes them up opens them again."""
        for running in list(self._running.values()):  # a thread of Tune's may still write in it
            if running.tracker:
                running.tracker.finish("KILLED")

    @property
    def record(self) -> StudyRecord:
        """The study as it stands."""
        return StudyRecord(self._study.name, tuple(self._records[number] for number in sorted(self._records)))

    def tracker(self, number: int, config: Config) -> Tracker:
        """The MLflow run of a trial."""
        run = self._study.trial(number, config)
        name = f"{self._study.name}/{run.name}"
        tracker = open_tracker(self._tracking_uri, f"crowdray-{self._dataset}", name, run.uri, parent=self._parent)
        tracker.log_config(asdict(config), self._tags)
        tracker.log_dataset(self._dataset, self._study.data, self._study.digest)
        return tracker

    def started(self, number: int, values: Mapping[str, Any], config: Config) -> None:
        """A trial starts, or starts again; what it spent before its driver died counts on."""
        before = self._records.get(number)
        legs = before.legs if before else ()
        self._records[number] = TrialRecord(number, "running", dict(values), None, None, {}, legs)
        self._running[number] = _Running(config, self._tracked(number, config))
        self._show(self.record)

    def heard(self, number: int, report: Mapping[str, Any]) -> dict[str, Any]:
        """A trial reports its new epochs, or once more those that a lost process had reported; gives its record."""
        record, running = self._records[number], self._running[number]
        running.history.update({int(row["epoch"]): row for row in report["rows"]})
        if running.attempt != report["attempt"]:
            running.attempt, running.lost = report["attempt"], record.legs
        self._records[number] = replace(
            record,
            mae=report.get("mae"),
            rmse=report.get("rmse"),
            curve=dict(record.curve) | {int(epoch): float(mae) for epoch, mae in report["curve"]},
            legs=_with_lost([StageCost(**leg) for leg in report["legs"]], running.lost),
        )
        if running.tracker:
            running.tracker.sync_history(running.rows())
        self._show(self.record)
        return asdict(self._records[number])

    def ended(self, number: int, state: State, reason: str) -> dict[str, Any]:
        """A trial ends; gives its record as Optuna keeps it."""
        record = self._records[number] = replace(self._records[number], state=state, reason=reason, ended=time.time())
        running = self._running.pop(number)
        if tracker := running.tracker or self._tracked(number, running.config):
            tracker.sync_history(running.rows())
            errors = {"mae": record.mae, "rmse": record.rmse}
            summary = {f"trial/val/{name}": value for name, value in errors.items() if value is not None}
            costs = {"worker_seconds/spent": record.spent, "worker_seconds/saved": record.saved}
            tracker.log_summary(summary | costs, max(running.history, default=0))
            tracker.set_tags({"crowdray.trial": state} | ({"crowdray.reason": reason} if reason else {}))
            tracker.finish(_STATUS[state])
        self._show(self.record)
        return asdict(record)

    def _tracked(self, number: int, config: Config) -> Tracker | None:
        """A trial's MLflow run; one that cannot be opened costs a warning, and another try at the trial's end."""
        try:
            return self.tracker(number, config)
        except UserError as error:
            _log.warning("trial %d is not tracked: %s", number, error)
            return None


@dataclass
class _Running:
    """A trial under way."""

    config: Config
    tracker: Tracker | None
    history: dict[int, EpochMetrics] = field(default_factory=dict)
    """Rows by epoch."""
    attempt: str = ""
    """The process that reports."""
    lost: tuple[StageCost, ...] = ()
    """What earlier processes had spent."""

    def rows(self) -> list[dict[str, float]]:
        """The history as MLflow takes it."""
        return metric_rows([self.history[epoch] for epoch in sorted(self.history)])


def _with_lost(legs: Sequence[StageCost], lost: Sequence[StageCost]) -> tuple[StageCost, ...]:
    """A trial's stages with what its lost processes spent on them; what they had trained was not saved by others."""
    before, told = {leg.stage: leg for leg in lost}, {leg.stage for leg in legs}
    return (
        *(_joined(leg, before[leg.stage]) if leg.stage in before else leg for leg in legs),
        *(leg for leg in lost if leg.stage not in told),  # not reached again yet
    )


def _joined(leg: StageCost, lost: StageCost) -> StageCost:
    reused, saved = min(leg.reused, lost.reused), min(leg.saved, lost.saved)
    return replace(leg, seconds=leg.seconds + lost.seconds, reused=reused, saved=saved)
