"""Progress of a job: a live display on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from crowdray.console.terminal import one_line, print_line

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crowdray.training.checkpoint import EpochMetrics
    from crowdray.training.stages import Stage

LOG_INTERVAL_S = 10.0
"""Seconds between two progress lines in a log."""


@contextmanager
def image_progress(total: int, done: int = 0, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` images are done; `done` of them by an earlier run, which the rate leaves out."""
    console = console or Console()
    if not console.is_terminal:
        yield _log_progress(total, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        task = progress.add_task("images", total=total, completed=done)
        yield lambda number: progress.update(task, advance=number)


def _log_progress(total: int, done: int) -> Callable[[int], None]:
    started = printed_at = time.monotonic()
    before = done

    def advance(number: int) -> None:
        nonlocal done, printed_at
        done += number
        now = time.monotonic()
        if done == total or now - printed_at >= LOG_INTERVAL_S:
            printed_at = now
            rate = (done - before) / max(now - started, 1e-9)
            print_line(f"{done}/{total} images, {rate:.0f} per second")

    return advance


class LiveDisplay:
    """Base of displays: a terminal redraws `__rich__`, a log gets lines only."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._status = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:
            self._live.stop()

    def on_status(self, text: str) -> None:
        """Show what the job is doing now."""
        self._status = text
        if not self._live:
            print_line(text)

    def __rich__(self) -> Table:
        """Return the table for a terminal."""
        raise NotImplementedError


class TrainingDisplay(LiveDisplay):
    """Progress of a training run: a table of its stages on a terminal, a line per epoch in a log."""

    def __init__(self, stages: Sequence[Stage], console: Console | None = None) -> None:
        super().__init__(console)
        self._stages = stages
        self._history: Sequence[EpochMetrics] = ()
        self._shown = 0

    def on_history(self, rows: Sequence[EpochMetrics]) -> None:
        """Show the whole history of a run; a log gets only its new epochs."""
        self._history = rows
        self._status = f"training with {_workers(rows[-1])}"
        if not self._live:
            if self._shown == 0 and len(rows) > 1:
                print_line(f"resuming after epoch {len(rows) - 1}")
                self._shown = len(rows) - 1
            for before, row in zip([rows[0], *rows][self._shown :], rows[self._shown :], strict=False):
                if before.get("workers") != row.get("workers"):
                    print_line(f"continuing with {_workers(row)}")
                print_line(self._line(row))
        if any(_is_dead(row) for row in rows[self._shown :]):
            self._console.print(
                "warning: the density map is dead, every validation image counts 0 heads; dead ReLUs do not "
                "recover: start a new run with a lower learning rate or a longer optimizer.warmup",
                style="yellow",
                soft_wrap=True,
            )
        self._shown = len(rows)

    def __rich__(self) -> Table:
        """Return the table for a terminal."""
        table = Table(title=one_line(self._status, "bold"), title_justify="left", caption=self._time_left())
        for name in ("stage", "epoch", "loss", "val MAE", "RMSE", "best", "images/s"):
            table.add_column(name, justify="left" if name in ("stage", "loss") else "right")
        for stage in self._stages:
            rows = self._rows(stage)
            errors = [float(row["val/mae"]) for row in rows if "val/mae" in row]
            last = rows[-1] if rows else {}
            table.add_row(
                stage.name,
                f"{len(rows)}/{stage.schedule.epochs}",
                _losses(last),
                _number(last, "val/mae"),
                _number(last, "val/rmse"),
                f"{min(errors):.2f}" if errors else "",
                _number(last, "images_per_s", "{:.0f}"),
            )
        return table

    def _line(self, row: EpochMetrics) -> str:
        stage = next(stage for stage in self._stages if stage.name == row["stage"])
        done = sum(1 for earlier in self._history[: int(row["epoch"])] if earlier["stage"] == stage.name)
        parts = [f"{stage.name} {done}/{stage.schedule.epochs}", _losses(row)]
        if "val/mae" in row:
            parts.append(f"val MAE {row['val/mae']:.2f} RMSE {row['val/rmse']:.2f}")
        parts.append(_throughput(row))
        return "  ".join([*parts, self._time_left()])

    def _time_left(self) -> str:
        """Estimate the time left from finished epochs; a stage without any counts at the mean of the others."""
        if not self._history:
            return ""
        seconds = {stage.name: [float(row["seconds"]) for row in self._rows(stage)] for stage in self._stages}
        overall = [value for values in seconds.values() for value in values]
        names = [stage.name for stage in self._stages]
        left = 0.0
        for stage in self._stages[names.index(str(self._history[-1]["stage"])) :]:
            left += max(0, stage.schedule.epochs - len(seconds[stage.name])) * fmean(seconds[stage.name] or overall)
        return f"{timedelta(seconds=round(left))} left"

    def _rows(self, stage: Stage) -> list[EpochMetrics]:
        return [row for row in self._history if row["stage"] == stage.name]


def _workers(row: EpochMetrics) -> str:
    number = row.get("workers", 1)
    return "1 worker" if number == 1 else f"{number} workers"


def _is_dead(row: EpochMetrics) -> bool:
    """Whether every count is 0 although images have heads: NAE is 1, and the bias is minus the MAE."""
    return float(row.get("val/nae", 0)) > 0.999 and float(row["val/mae"]) == -float(row["val/bias"])


def _throughput(row: EpochMetrics) -> str:
    """Images per second, fraction of time spent waiting for data, model FLOP utilization and memory."""
    parts = [f"{row['images_per_s']:.1f} images/s", f"{float(row.get('data_wait_fraction', 0)):.1%} waiting for data"]
    if "mfu" in row:
        parts.append(f"{float(row['mfu']):.0%} MFU")
    if "memory_gib" in row:
        parts.append(f"{row['memory_gib']:.1f} GiB")
    return ", ".join(parts)


def _losses(row: EpochMetrics) -> str:
    return " ".join(f"{name.removeprefix('loss/')} {row[name]:.4f}" for name in row if name.startswith("loss/"))


def _number(row: EpochMetrics, key: str, template: str = "{:.2f}") -> str:
    return template.format(row[key]) if key in row else ""
