"""Progress of a study: a live table of its trials on a terminal, a line per finished trial in a log."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

from crowdray.console.progress import LiveDisplay
from crowdray.console.terminal import one_line, print_line

if TYPE_CHECKING:
    from crowdray.tune.record import StudyRecord, TrialRecord

MAX_ROWS = 24
"""Trials in the live table: the latest ones."""
LOG_INTERVAL_S = 20.0
"""Seconds between two lines about running trials in a log."""


class StudyDisplay(LiveDisplay):
    """Display of the trials of a study."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._record: StudyRecord | None = None
        self._finished: set[int] = set()
        self._printed_at = 0.0

    def on_record(self, record: StudyRecord) -> None:
        """Show the state of the study; a log gets newly finished trials, and at intervals the running ones."""
        self._record = record
        if self._live:
            return
        for trial in record.trials:
            if trial.state != "running" and trial.number not in self._finished:
                self._finished.add(trial.number)
                print_line(f"trial {trial.number}: {_line(trial)}{_best(record)}")
        running = [trial for trial in record.trials if trial.state == "running" and trial.stage_costs]
        if running and time.monotonic() - self._printed_at > LOG_INTERVAL_S:
            self._printed_at = time.monotonic()
            print_line("; ".join(f"trial {trial.number}: {_line(trial)}" for trial in running))

    def __rich__(self) -> Table:
        """Return the table for a terminal."""
        if self._record is None:
            return Table(title=one_line(self._status, "bold"), title_justify="left")
        return trial_table(self._record, self._status, MAX_ROWS)


def trial_table(record: StudyRecord, title: str, max_rows: int | None = None) -> Table:
    """Return a row per trial: sampled values, progress, errors, and worker-seconds spent and saved."""
    best = record.best()
    caption = "" if best is None else f"best: trial {best.number}, validation MAE {best.mae:.2f}"
    caption += f"  worker-seconds: {record.spent:.0f} spent, {record.saved:.0f} saved"
    table = Table(title=one_line(title, "bold"), title_justify="left", caption=caption, caption_justify="left")
    table.add_column("trial", justify="right")
    for name in record.fields():
        table.add_column(_short(name).replace(".", "\n"), justify="right")
    table.add_column("stage")
    for name in ("val MAE", "RMSE", "reused", "spent s", "saved s"):
        table.add_column(name, justify="right")
    for trial in record.trials[-max_rows:] if max_rows else record.trials:
        mark = "*" if best is not None and trial.number == best.number else ""
        table.add_row(
            f"{trial.number}{mark}",
            *(one_line(_value(trial.values.get(name))) for name in record.fields()),
            one_line(_stage(trial)),
            *("" if value is None else f"{value:.2f}" for value in (trial.mae, trial.rmse)),
            str(sum(cost.reused for cost in trial.stage_costs)),
            f"{trial.spent:.0f}",
            f"{trial.saved:.0f}",
            style={"failed": "red", "pruned": "dim", "complete": "", "running": "cyan"}[trial.state],
        )
    return table


def _line(trial: TrialRecord) -> str:
    values = " ".join(f"{_short(name)} {_value(value)}" for name, value in trial.values.items())
    error = "" if trial.mae is None else f"  val MAE {trial.mae:.2f}"
    reused = sum(cost.reused for cost in trial.stage_costs)
    cost = f"{trial.spent:.0f} s spent, {trial.saved:.0f} s saved"
    return f"{_stage(trial)}{error}  {values}  {reused} epochs reused, {cost}"


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
