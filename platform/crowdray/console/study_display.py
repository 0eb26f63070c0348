"""Progress of a study: a line per finished trial, and on a terminal the running ones below."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table

from crowdray.console.columns import Column, fitting_table
from crowdray.console.progress import LiveDisplay, duration
from crowdray.console.terminal import one_line, print_line

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from crowdray.training.state import StepProgress
    from crowdray.tune.record import StudyRecord, TrialRecord

LOG_INTERVAL_S = 20.0
"""Seconds between two lines about running trials in a log."""


class StudyDisplay(LiveDisplay):
    """Progress of a study: a line per finished trial, and on a terminal a table of the running ones."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._record: StudyRecord | None = None
        self._finished: set[int] = set()
        self._counts = ""
        self._printed_at = 0.0

    def on_record(self, record: StudyRecord) -> None:
        """Print newly finished trials; a log gets the running ones too, at intervals."""
        self._record = record
        for trial in record.trials:
            if trial.state != "running" and trial.number not in self._finished:
                self._finished.add(trial.number)
                self._print(f"trial {trial.number}: {_line(trial)}{_best(record)}")
        running = [trial for trial in record.trials if trial.state == "running" and trial.stage_costs]
        if not self._live and running and time.monotonic() - self._printed_at > LOG_INTERVAL_S:
            self._printed_at = time.monotonic()
            print_line("; ".join(f"trial {trial.number}: {_line(trial)}" for trial in running))

    def on_status(self, text: str) -> None:
        """Show what the job is doing now."""
        self._counts = ""
        super().on_status(text)

    def on_step(self, step: StepProgress) -> None:
        """Show the progress of the best trial's evaluation."""
        self._counts = f"  {step.phase} {step.done}/{step.total}"

    def __rich__(self) -> RenderableType:
        """Return what the job is doing, and the running trials."""
        status = f"{self._status}{self._counts}  {duration(time.monotonic() - self._status_since)}"
        running = [trial for trial in self._record.trials if trial.state == "running"] if self._record else []
        if self._record is None or not running:
            return one_line(status, "bold")
        return trial_table(self._record, f"{status}, {len(self._finished)} finished", self._console, running)


def trial_table(
    record: StudyRecord, title: str, console: Console, trials: Sequence[TrialRecord] | None = None
) -> Table:
    """Return a row per trial: sampled values, progress, errors, and worker-seconds spent and saved."""
    best, trials = record.best(), record.trials if trials is None else trials
    caption = "" if best is None else f"best: trial {best.number}, validation MAE {best.mae:.2f}  "
    caption += f"worker-seconds: {record.spent:.0f} spent, {record.saved:.0f} saved"
    marks = ["*" if best is not None and trial.number == best.number else "" for trial in trials]
    columns = [Column("trial", [f"{trial.number}{mark}" for trial, mark in zip(trials, marks, strict=True)])]
    columns += [
        Column(
            _short(name).replace(".", "\n"), [one_line(_value(trial.values.get(name))) for trial in trials], 10 + number
        )
        for number, name in enumerate(record.fields())
    ]
    columns.append(Column("stage", [one_line(_stage(trial)) for trial in trials], justify="left"))
    numbers: dict[str, Callable[[TrialRecord], str]] = {
        "val MAE": lambda trial: "" if trial.mae is None else f"{trial.mae:.2f}",
        "RMSE": lambda trial: "" if trial.rmse is None else f"{trial.rmse:.2f}",
        "spent s": lambda trial: f"{trial.spent:.0f}",
        "saved s": lambda trial: f"{trial.saved:.0f}",
        "reused": lambda trial: str(sum(cost.reused for cost in trial.stage_costs)),
    }
    for drop, (name, cell) in zip((0, 1, 100, 101, 102), numbers.items(), strict=True):
        columns.append(Column(name, [cell(trial) for trial in trials], drop))
    styles = [{"failed": "red", "pruned": "dim", "complete": "", "running": "cyan"}[trial.state] for trial in trials]
    text = {"title": one_line(title, "bold"), "title_justify": "left", "caption": caption, "caption_justify": "left"}
    return fitting_table(columns, console, styles=styles, **text)


def _line(trial: TrialRecord) -> str:
    values = " ".join(f"{_short(name)} {_value(value)}" for name, value in trial.values.items())
    error = "" if trial.mae is None else f"  val MAE {trial.mae:.2f}"
    reused = sum(cost.reused for cost in trial.stage_costs)
    cost = f"{trial.spent:.0f} s spent, {trial.saved:.0f} s saved"
    epochs = "1 epoch" if reused == 1 else f"{reused} epochs"
    return f"{_stage(trial)}{error}  {values}  {epochs} reused, {cost}"


def _best(record: StudyRecord) -> str:
    best = record.best()
    return "" if best is None else f"  best {best.mae:.2f} (trial {best.number})"


def _stage(trial: TrialRecord) -> str:
    if trial.state != "running":
        return trial.reason[:40] if trial.reason else trial.state
    return f"{trial.stage_costs[-1].stage} {trial.stage_costs[-1].epochs}" if trial.stage_costs else "starting"


def _short(name: str) -> str:
    """Return the name of a field without its obvious group: baseline.epochs, depth."""
    return name.removeprefix("stages.").removeprefix("loss.")


def _value(value: object) -> str:
    return "" if value is None else f"{value:.3g}" if isinstance(value, float) else str(value)
