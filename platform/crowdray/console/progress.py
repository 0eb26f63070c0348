"""What a job shows while it works: a live display on a terminal, plain lines in a log."""

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console
from rich.live import Live
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from crowdray.training.checkpoint import Row
from crowdray.training.stages import Stage

PLAIN_EVERY_S = 10.0
"""Seconds between two lines of a count in a log."""


class Advance(Protocol):
    """Told of each number of new things that are done, and of what is to be said beside it."""

    def __call__(self, number: int, note: str = "") -> None:
        """Count `number` more."""
        ...


@contextmanager
def counting(what: str, total: int, console: Console | None = None, done: int = 0) -> Iterator[Advance]:
    """Show how many of `total` things are done; the block calls what it gets with each number of new ones.

    done: things that an earlier start has done; they are no part of the pace.
    """
    console = console or Console()
    if not console.is_terminal:
        yield _plain_count(what, total, done)
        return
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, TextColumn("{task.fields[said]}"), console=console, transient=True) as progress:
        task, pace = progress.add_task(what, total=total, completed=done, said=""), _pace_since_now()

        def advance(number: int, note: str = "") -> None:
            progress.update(task, advance=number, said=", ".join(filter(None, (pace(number), note))))

        yield advance


def _plain_count(what: str, total: int, done: int) -> Advance:
    told, pace = time.monotonic(), _pace_since_now()

    def advance(number: int, note: str = "") -> None:
        nonlocal done, told
        done += number
        said = pace(number)
        if done == total or time.monotonic() - told >= PLAIN_EVERY_S:
            told = time.monotonic()
            print(", ".join(filter(None, (f"{done}/{total} {what}", said, note))), flush=True)

    return advance


def _pace_since_now() -> Callable[[int], str]:
    done, started = 0, time.monotonic()

    def pace(number: int) -> str:
        nonlocal done
        done += number
        return f"{done / max(time.monotonic() - started, 1e-9):.0f} per second"

    return pace


class LiveDisplay:
    """What a subclass draws as `__rich__`, redrawn on a terminal; in a log only lines are told."""

    def __init__(self, console: Console | None = None) -> None:
        self._console = console or Console()
        self._status = ""
        self._live: Live | None = None

    def __enter__(self) -> Self:
        if self._console.is_terminal:
            self._live = Live(self, console=self._console, refresh_per_second=2, transient=True)
            self._live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._live.stop()

    def status(self, text: str) -> None:
        """Say what is going on now."""
        self._status = text
        if not self._live:
            print(text, file=sys.stdout, flush=True)

    def __rich__(self) -> Table:
        """The table that a terminal shows."""
        raise NotImplementedError


class TrainingDisplay(LiveDisplay):
    """The stages of a training as they pass: a table that is redrawn on a terminal, a line per epoch in a
    log."""

    def __init__(self, stages: Sequence[Stage], console: Console | None = None) -> None:
        super().__init__(console)
        self._stages = stages
        self._history: Sequence[Row] = ()
        self._told = 0

    def history(self, rows: Sequence[Row]) -> None:
        """Show a training's whole history; in a log, what is new of it."""
        self._history = rows
        self._status = f"training with {_workers(rows[-1])}"
        if not self._live:
            if self._told == 0 and len(rows) > 1:
                print(f"going on after epoch {len(rows) - 1}", flush=True)
                self._told = len(rows) - 1
            for before, row in zip([rows[0], *rows][self._told :], rows[self._told :], strict=False):
                if before.get("workers") != row.get("workers"):
                    print(f"going on with {_workers(row)}", flush=True)
                print(self._line(row), flush=True)
        if any(_is_dead(row) for row in rows[self._told :]):
            self._console.print(
                "warning: the density map is dead, every validation image counts 0 heads; dead ReLUs do not "
                "recover: start anew with a lower learning rate or a longer optimizer.warmup",
                style="yellow",
                soft_wrap=True,
            )
        self._told = len(rows)

    def __rich__(self) -> Table:
        """The table that a terminal shows."""
        table = Table(title=self._status, title_justify="left", title_style="bold", caption=self._outlook())
        for name in ("stage", "epoch", "loss", "val MAE", "RMSE", "best", "images/s"):
            table.add_column(name, justify="left" if name in ("stage", "loss") else "right")
        for stage in self._stages:
            rows = [row for row in self._history if row["stage"] == stage.name]
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

    def _line(self, row: Row) -> str:
        stage = next(stage for stage in self._stages if stage.name == row["stage"])
        done = sum(1 for seen in self._history[: int(row["epoch"])] if seen["stage"] == stage.name)
        parts = [f"{stage.name} {done}/{stage.schedule.epochs}", _losses(row)]
        if "val/mae" in row:
            parts.append(f"val MAE {row['val/mae']:.2f} RMSE {row['val/rmse']:.2f}")
        parts.append(_pace(row))
        return "  ".join([*parts, self._outlook()])

    def _outlook(self) -> str:
        """Time left, from the epochs seen: a stage of which nothing is known is taken to go like the
        others."""
        if not self._history:
            return ""
        seen: dict[str, list[float]] = {}
        for row in self._history:
            seen.setdefault(str(row["stage"]), []).append(float(row["seconds"]))
        overall = sum(map(sum, seen.values())) / len(self._history)
        left, reached = 0.0, False
        for stage in self._stages:
            reached = reached or stage.name == self._history[-1]["stage"]
            if reached:
                times = seen.get(stage.name, [])
                pace = sum(times) / len(times) if times else overall
                left += max(0, stage.schedule.epochs - len(times)) * pace
        return f"{timedelta(seconds=round(left))} left"


def _workers(row: Row) -> str:
    number = row.get("workers", 1)
    return "1 worker" if number == 1 else f"{number} workers"


def _is_dead(row: Row) -> bool:
    """Is every count nothing, where there are heads?"""
    return float(row.get("val/nae", 0)) > 0.999 and float(row["val/mae"]) == -float(row["val/bias"])


def _pace(row: Row) -> str:
    """Windows trained per second, what of the time was spent waiting for them, and what of the device was used."""
    share = f"{float(row['mfu']):.0%} of the matrix rate" if "mfu" in row else ""
    parts = [f"{row['images_per_s']:.1f} images/s", f"{float(row.get('data_wait_fraction', 0)):.1%} waiting", share]
    if "memory_gib" in row:
        parts.append(f"{row['memory_gib']:.1f} GiB")
    return ", ".join(filter(None, parts))


def _losses(row: Row) -> str:
    return " ".join(f"{name.removeprefix('loss/')} {row[name]:.4f}" for name in row if name.startswith("loss/"))


def _number(row: Row, key: str, form: str = "{:.2f}") -> str:
    return form.format(row[key]) if key in row else ""
