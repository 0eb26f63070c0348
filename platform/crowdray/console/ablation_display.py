"""Progress of an ablation, and its result as a table."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from rich import box
from rich.console import Console, RenderableType
from rich.table import Table

from crowdray.ablation.verdict import verdicts
from crowdray.console.columns import Column, fitting_table
from crowdray.console.progress import LiveDisplay, duration
from crowdray.console.terminal import one_line, print_line, print_message
from crowdray.errors import escaped

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from crowdray.ablation.publish import AblationOutcome
    from crowdray.ablation.record import AblationRecord
    from crowdray.cluster.ablate import CellStatus
    from crowdray.evaluation.comparison import Comparison
    from crowdray.evaluation.intervals import Interval

LOG_INTERVAL_S = 20.0
"""Seconds between two lines about running cells in a log."""


class AblationDisplay(LiveDisplay):
    """Progress of an ablation: a line per finished cell, and on a terminal a table of the running ones."""

    def __init__(self, console: Console | None = None) -> None:
        super().__init__(console)
        self._cells: Sequence[CellStatus] = ()
        self._states: dict[str, str] = {}
        self._printed_at = 0.0

    def on_cells(self, cells: Sequence[CellStatus]) -> None:
        """Print the cells that ended; a log gets the running ones too, at intervals."""
        self._cells = cells
        for cell in cells:
            if self._states.get(cell.name) in ("training", "counting") and cell.state != self._states[cell.name]:
                self._print(f"{cell.name}: {cell.state}{_error(cell)}")
            self._states[cell.name] = cell.state
        running = self._running()
        if not self._live and running and time.monotonic() - self._printed_at > LOG_INTERVAL_S:
            self._printed_at = time.monotonic()
            print_line("; ".join(f"{cell.name}: {cell.progress or cell.state}{_error(cell)}" for cell in running))

    def __rich__(self) -> RenderableType:
        """Return what the job is doing, and the running cells."""
        states = [cell.state for cell in self._cells]
        counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
        title = f"{self._status}  {duration(time.monotonic() - self._status_since)}{counts and f'  ({counts})'}"
        if not (running := self._running()):
            return one_line(title, "bold")
        columns = [
            Column("cell", [one_line(cell.name) for cell in running], justify="left"),
            Column("stage", [cell.progress or cell.state for cell in running], justify="left"),
            Column("val MAE", ["" if cell.mae is None else f"{cell.mae:.2f}" for cell in running]),
        ]
        return fitting_table(columns, self._console, title=one_line(title, "bold"), title_justify="left")

    def _running(self) -> list[CellStatus]:
        return [cell for cell in self._cells if cell.state in ("training", "counting")]


def _error(cell: CellStatus) -> str:
    return "" if cell.mae is None else f"  val MAE {cell.mae:.2f}"


def show_ablation(outcome: AblationOutcome, console: Console) -> None:
    """Print a row for each arm, what its errors say, and where the results are."""
    record = outcome.record
    console.print(ablation_table(record, console))
    for line in (*verdicts(record), *_notes(record)):
        print_message(console, line)
    fields = {"record": outcome.record_uri, "figures": ", ".join(outcome.figures)}
    fields |= {"ablation": outcome.ablation, "its page": outcome.run_url or ""}
    for name, value in fields.items():
        if value:
            print_message(console, f"{name + ':':<13}{value}")


def ablation_table(record: AblationRecord, console: Console) -> Table:
    """Return a row for each arm: errors, and gains over `none` and over the placebo, with 95% intervals."""
    arms = record.arms
    title = f"{record.dataset}, {record.split} split: {record.name}"
    columns = [Column("arm", [arm.arm for arm in arms], justify="left")]
    for header, values in (
        ("fraction", [f"{arm.fraction:g}" for arm in arms]),
        ("backbone", [escaped(arm.backbone) for arm in arms]),
    ):
        if len(set(values)) > 1:
            columns.append(Column(header, values))
    columns += [
        Column("seeds", [str(len(arm.seeds)) for arm in arms], 20),
        Column("MAE", [f"{arm.errors.mae:.2f}" for arm in arms]),
        Column("95%", [_ends(arm.errors.mae_interval) for arm in arms], 10),
        Column("RMSE", [f"{arm.errors.rmse:.2f}" for arm in arms], 5),
        Column("95%", [_ends(arm.errors.rmse_interval) for arm in arms], 30),
        *_gain_columns("none", [arm.gain for arm in arms], 0),
        *_gain_columns("placebo", [arm.gain_over_placebo for arm in arms], 2),
        Column("time", [duration(arm.seconds) for arm in arms], 15),
    ]
    caption = "Gains in heads of MAE, positive where the arm is better; p: paired t-test over seeds."
    text: dict[str, Any] = {"title": one_line(title), "title_justify": "left", "caption": caption}
    style: dict[str, Any] = {"box": box.SIMPLE_HEAVY, "pad_edge": False, "caption_justify": "left"}
    return fitting_table(columns, console, **text, **style)


def _gain_columns(reference: str, gains: Sequence[Comparison | None], drop: int) -> list[Column]:
    """Columns of the gain over a reference, its interval and p; none where it is not an arm."""
    if not any(gains):
        return []
    values = ["" if gain is None else f"{gain.gain:+.2f}" for gain in gains]
    intervals = ["" if gain is None else _ends(gain.interval, sign="+") for gain in gains]
    p_values = ["" if gain is None or gain.p_value is None else f"{gain.p_value:.2g}" for gain in gains]
    return [
        Column(f"over {reference}", values, drop),
        Column("95%", intervals, drop and drop + 1),
        Column("p", p_values, drop + 7),
    ]


def _ends(interval: Interval, sign: str = "") -> str:
    return f"{interval.low:{sign}.2f} to {interval.high:{sign}.2f}"


def _notes(record: AblationRecord) -> Iterator[str]:
    """Yield what limits the result."""
    if record.split == "validation":
        yield "note: the dataset has no test split; the errors are those of the validation images"
    for number, read in enumerate(record.test_reads):
        if number:
            yield f"note: the test split was read again on {read.time[:10]}: {read.reason}"
    if record.other_reads:
        others = "another ablation" if record.other_reads == 1 else f"{record.other_reads} other ablations"
        yield f"note: {others} in the same folder also read this test split"
