"""Progress of a job: a live display on a terminal, plain lines in a log."""

from __future__ import annotations

import time
from contextlib import contextmanager
from datetime import timedelta
from statistics import fmean
from typing import TYPE_CHECKING, Self

from rich.console import Console, RenderableType
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from crowdray.console.terminal import one_line, print_line, print_message

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from crowdray.training.checkpoint import EpochMetrics
    from crowdray.training.stages import Stage
    from crowdray.training.state import StepProgress

LOG_INTERVAL_S = 10.0
"""Seconds between two progress lines in a log."""
STEP_LOG_INTERVAL_S = 60.0
"""The same within an epoch."""
_MIN_WIDTH_OF_TIMES = 72
"""Columns of a terminal that shows elapsed and remaining time next to a bar."""


@contextmanager
def image_progress(total: int, done: int = 0, console: Console | None = None) -> Iterator[Callable[[int], None]]:
    """Show how many of `total` images are done; `done` of them by an earlier run, which the rate leaves out."""
    console = console or Console()
    if not console.is_terminal:
        yield _log_progress(total, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, TextColumn("elapsed,"), TimeRemainingColumn(), TextColumn("left"), console=console) as bar:
        task = bar.add_task("images", total=total, completed=done)
        yield lambda number: bar.update(task, advance=number)


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
    """Base of displays: lines that stay, and on a terminal below them `__rich__`, drawn twice a second."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._status = ""
        self._started = self._status_since = time.monotonic()
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._live:
            self._live.transient = kind is None  # a job that fails or is interrupted leaves what it showed
            self._live.stop()

    def on_status(self, text: str) -> None:
        """Show what the job is doing now."""
        self._status, self._status_since = text, time.monotonic()
        self._print(text)

    def _print(self, text: str) -> None:
        if self._live:
            print_message(self._live.console, text)
        else:
            print_line(text)

    def __rich__(self) -> RenderableType:
        """Return what a terminal shows of the work in progress."""
        raise NotImplementedError


class TrainingDisplay(LiveDisplay):
    """Progress of a training run: a line per epoch, and on a terminal a bar within it."""

    def __init__(self, stages: Sequence[Stage], console: Console | None = None) -> None:
        super().__init__(console)
        self._stages = stages
        self._history: Sequence[EpochMetrics] = ()
        self._shown = 0
        self._step: StepProgress | None = None
        self._scoring = False
        self._steps_before = 0
        self._epoch_since = self._printed_at = time.monotonic()

    def on_status(self, text: str) -> None:
        """Show what the job is doing now."""
        self._step = None
        super().on_status(text)

    def on_history(self, rows: Sequence[EpochMetrics]) -> None:
        """Print the new epochs of the whole history of a run."""
        self._history = rows
        self._epoch_since = time.monotonic()
        self._step = None
        self._status, self._status_since = f"training with {_workers(rows[-1])}", self._epoch_since
        if self._shown == 0:
            if len(rows) > 1:
                self._print(f"resuming after epoch {len(rows) - 1}")
                self._shown = len(rows) - 1
            if self._live:
                self._print(_fit(_EPOCH_COLUMNS, self._console.width))
        for before, row in zip([rows[0], *rows][self._shown :], rows[self._shown :], strict=False):
            if before.get("workers") != row.get("workers"):
                self._print(f"continuing with {_workers(row)}")
            self._print(_fit(self._cells(row), self._console.width) if self._live else self._line(row))
        if any(_is_dead(row) for row in rows[self._shown :]):
            self._console.print(
                "warning: the density map is dead, every validation image counts 0 heads; dead ReLUs do not "
                "recover: start a new run with a lower learning rate or a longer optimizer.warmup",
                style="yellow",
                soft_wrap=True,
            )
        self._shown = len(rows)

    def on_step(self, step: StepProgress) -> None:
        """Show the progress within an epoch or an evaluation; a log gets a line of it at intervals."""
        if step.phase == "evaluation" and not self._scoring:
            self._scoring = True  # the line of the last epoch may come later
            self._print("scoring the best weights of each stage on the validation and test images")
        now = time.monotonic()
        if self._step is None and not self._history:  # before it, the workers started
            self._epoch_since, self._steps_before = now, step.done
        self._step = step
        if not self._live and now - max(self._printed_at, self._epoch_since) >= STEP_LOG_INTERVAL_S:
            self._printed_at = now
            unit = "step" if step.phase == "training" else "image"
            print_line(f"{unit} {step.done}/{step.total} of {self._describe(step)}")

    def __rich__(self) -> RenderableType:
        """Return the progress within the epoch: a bar, elapsed and remaining time."""
        now = time.monotonic()
        elapsed, step = duration(now - self._started), self._step
        if step is None:
            return one_line(f"{self._status}  {duration(now - self._status_since)}, elapsed {elapsed}", "bold")
        grid = Table.grid(padding=(0, 1), expand=True)
        for ratio in (None, 1, None):
            grid.add_column(ratio=ratio, no_wrap=True)
        left = "" if step.phase == "evaluation" else self._time_left(step, now - self._epoch_since)
        times = f"  elapsed {elapsed}{left}" if self._console.width >= _MIN_WIDTH_OF_TIMES else ""
        counts = f"{step.done}/{step.total}{times}"
        grid.add_row(one_line(self._describe(step), "bold"), ProgressBar(step.total, step.done), one_line(counts))
        return grid

    def _describe(self, step: StepProgress) -> str:
        if step.phase == "evaluation":
            return f"scoring {step.stage}"
        stage = next(stage for stage in self._stages if stage.name == step.stage)
        validating = " validating" if step.phase == "validation" else ""
        return f"{step.stage} {step.epoch}/{stage.schedule.epochs}{validating}"

    def _cells(self, row: EpochMetrics) -> list[tuple[str, int]]:
        """Values of the columns of an epoch's line, with their widths."""
        stage = next(stage for stage in self._stages if stage.name == row["stage"])
        earlier = [before for before in self._history[: int(row["epoch"])] if before["stage"] == stage.name]
        errors = [float(before["val/mae"]) for before in earlier if "val/mae" in before]
        values = [
            stage.name,
            f"{len(earlier)}/{stage.schedule.epochs}",
            _number(row, "val/mae"),
            _number(row, "val/rmse"),
            f"{min(errors):.2f}" if errors else "",
            _number(row, "images_per_s", "{:.1f}"),
            _losses(row),
        ]
        return [(value, width) for value, (_, width) in zip(values, _EPOCH_COLUMNS, strict=True)]

    def _line(self, row: EpochMetrics) -> str:
        stage = next(stage for stage in self._stages if stage.name == row["stage"])
        done = sum(1 for earlier in self._history[: int(row["epoch"])] if earlier["stage"] == stage.name)
        parts = [f"{stage.name} {done}/{stage.schedule.epochs}", _losses(row)]
        if "val/mae" in row:
            parts.append(f"val MAE {row['val/mae']:.2f} RMSE {row['val/rmse']:.2f}")
        parts.append(_throughput(row))
        return "  ".join([*parts, f"{duration(self._epochs_left(stage.name))} left"])

    def _epochs_left(self, current: str, fraction: float = 0.0) -> float:
        """Estimate the seconds left after a fraction of an epoch of the current stage.

        A stage without finished epochs counts at the mean of the others.
        """
        seconds = {stage.name: [float(row["seconds"]) for row in self._rows(stage)] for stage in self._stages}
        overall = [value for values in seconds.values() for value in values]
        names = [stage.name for stage in self._stages]
        left = -fraction * fmean(seconds[current] or overall)
        for stage in self._stages[names.index(current) :]:
            left += max(0, stage.schedule.epochs - len(seconds[stage.name])) * fmean(seconds[stage.name] or overall)
        return max(0.0, left)

    def _time_left(self, step: StepProgress, elapsed: float) -> str:
        """Describe the time left within an epoch that has taken `elapsed` seconds."""
        fraction = step.done / step.total if step.phase == "training" else 1.0
        if self._history:
            return f", {duration(self._epochs_left(step.stage, fraction))} left"
        seen = (step.done - self._steps_before) / step.total if step.phase == "training" else 1.0
        if not seen or not elapsed:
            return ""
        epochs = sum(stage.schedule.epochs for stage in self._stages)
        return f", about {duration(elapsed / seen * (epochs - fraction))} left"

    def _rows(self, stage: Stage) -> list[EpochMetrics]:
        return [row for row in self._history if row["stage"] == stage.name]


_EPOCH_COLUMNS = [
    ("stage", 9), ("epoch", 7), ("val MAE", 9), ("RMSE", 8), ("best", 8), ("images/s", 10), ("losses", 64)
]  # fmt: skip
"""Columns of the lines of epochs, with their widths; the last ones are left out where they do not fit."""


def _fit(cells: Sequence[tuple[str, int]], width: int) -> str:
    """Return a line of as many cells as fit; all but the first and the last column are right-aligned."""
    line = ""
    for number, (text, size) in enumerate(cells):
        cell = text.ljust(size) if number == 0 else f"  {text}" if number == len(cells) - 1 else text.rjust(size)
        if len(line) + (size if number < len(cells) - 1 else len(cell)) > width:
            break
        line += cell
    return line.rstrip()


def duration(seconds: float) -> str:
    """Return a time as 0:01:02."""
    return str(timedelta(seconds=round(seconds)))


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
