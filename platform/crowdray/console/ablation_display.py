"""Progress of an ablation, and its result as a table."""

from __future__ import annotations

import time
from statistics import fmean
from typing import TYPE_CHECKING

from rich.console import Console, RenderableType
from rich.table import Table

from crowdray.console.columns import Column, fitting_table
from crowdray.console.progress import LiveDisplay, duration
from crowdray.console.terminal import one_line, print_line
from crowdray.evaluation.metrics import summarise

if TYPE_CHECKING:
    from collections.abc import Sequence

    from crowdray.ablation.protocol import Ablation
    from crowdray.ablation.result import CellResult
    from crowdray.cluster.ablate import CellStatus

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


def show_ablation(results: Sequence[CellResult], ablation: Ablation, console: Console) -> None:
    """Print a row per arm."""
    table = Table(title=one_line(ablation.uri), title_justify="left")
    for name in ("arm", "fraction", "backbone", "seeds", "MAE", "RMSE", "updates", "s"):
        table.add_column(name, justify="right")
    rows: dict[tuple[str, float, str], list[CellResult]] = {}
    for result in results:
        rows.setdefault((result.arm, result.fraction, result.backbone), []).append(result)
    for (arm, fraction, backbone), cells in rows.items():
        metrics = [summarise(cell.test or cell.validation) for cell in cells]
        errors = [f"{fmean(m.mae for m in metrics):.2f}", f"{fmean(m.rmse for m in metrics):.2f}"]
        seconds = fmean(cell.seconds for cell in cells)
        table.add_row(
            arm, f"{fraction:g}", backbone, str(len(cells)), *errors, f"{cells[0].updates:,}", f"{seconds:.0f}"
        )
    console.print(table)
