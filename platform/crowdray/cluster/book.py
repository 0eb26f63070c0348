"""The book of a study: what each trial does, told to whoever looks on and to MLflow."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Any

import optuna
from pydantic import TypeAdapter

from crowdray.cluster.ship import tracked_rows
from crowdray.cluster.studies import Study, drawn_trials
from crowdray.config import Config
from crowdray.errors import UserError
from crowdray.evaluation.study import Leg, State, StudyRecord, TrialRecord
from crowdray.registry.tracking import Status, Tracker, open_tracker
from crowdray.training.loop import Row

RECORD = "record"
"""Name under which Optuna keeps the record of an ended trial."""

_STATUS: dict[State, Status] = {"complete": "FINISHED", "pruned": "KILLED", "failed": "FAILED"}

_log = logging.getLogger(__name__)


class Book:
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
        self._trackers: dict[int, Tracker] = {}
        self._histories: dict[int, dict[int, Row]] = {}
        adapter = TypeAdapter(TrialRecord)
        ended = [t.user_attrs[RECORD] for t in drawn_trials(told) if t.state.is_finished() and RECORD in t.user_attrs]
        self._records: dict[int, TrialRecord] = {
            record.number: record for record in map(adapter.validate_python, ended)
        }

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
        """A trial starts, or starts again."""
        self._records[number] = TrialRecord(number, "running", dict(values), None, None, {}, ())
        self._histories[number] = {}
        try:
            self._trackers[number] = self.tracker(number, config)
        except UserError as error:  # the study goes on; the run is opened when the study is started again
            _log.warning("trial %d is not tracked: %s", number, error)
        self._show(self.record)

    def heard(self, number: int, report: Mapping[str, Any]) -> None:
        """A trial reports: its new epochs, or once more those that a lost process had reported."""
        record, history = self._records[number], self._histories[number]
        history.update({int(row["epoch"]): row for row in report["rows"]})
        curve = dict(record.curve)
        if "joint_epoch" in report:
            curve[int(report["joint_epoch"])] = float(report["mae"])
        self._records[number] = replace(
            record,
            mae=report.get("mae"),
            rmse=report.get("rmse"),
            curve=curve,
            legs=tuple(Leg(**leg) for leg in report["legs"]),
        )
        if number in self._trackers:
            self._trackers[number].sync_history(tracked_rows([history[epoch] for epoch in sorted(history)]))
        self._show(self.record)

    def ended(self, number: int, state: State, reason: str) -> dict[str, Any]:
        """A trial ends; gives its record as Optuna keeps it."""
        record = self._records[number] = replace(self._records[number], state=state, reason=reason)
        if tracker := self._trackers.pop(number, None):
            errors = {"mae": record.mae, "rmse": record.rmse}
            history = self._histories.pop(number)
            summary = {f"trial/val/{name}": value for name, value in errors.items() if value is not None}
            costs = {"worker_seconds/spent": record.spent, "worker_seconds/saved": record.saved}
            tracker.log_summary(summary | costs, max(history, default=0))
            tracker.set_tags({"crowdray.trial": state} | ({"crowdray.reason": reason} if reason else {}))
            tracker.finish(_STATUS[state])
        self._show(self.record)
        return asdict(record)
