"""The tables at the end of a job: what came out, and where everything lies."""

import shlex
from typing import Any

from rich.console import Console
from rich.table import Table

from crowdray import storage
from crowdray.cluster.check import HISTOGRAMS, REPORT, SHEET
from crowdray.console.study_display import trial_table
from crowdray.data.shards import Index
from crowdray.datasets.quarantine import MOST_LISTED, QUARANTINE, read_quarantine
from crowdray.datasets.validation import ValidationReport
from crowdray.evaluation.metrics import Metrics
from crowdray.pipeline.publish import Outcome
from crowdray.plots.dataset import soundness_table
from crowdray.tune.driver import StudyOutcome


def show_dataset(index: Index, dest: str, console: Console) -> None:
    """Splits of a converted dataset, what its conversion found worth telling, and the items that it left out."""
    table = Table(title=f"{index.name}, depth: {index.depth_teacher}", title_justify="left")
    table.add_column("split")
    for name in ("images", "heads", "heads per image"):
        table.add_column(name, justify="right")
    for split, total in index.splits.items():
        rows, heads = total["rows"], total["heads"]
        table.add_row(split, f"{rows:,}", f"{heads:,}", f"{heads / rows:.1f}")
    console.print(table)
    for note in index.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
    left_out = read_quarantine(dest, index.digest)
    for item in left_out[:MOST_LISTED]:
        console.print(f"left out: {item}", markup=False, highlight=False, soft_wrap=True)
    if more := len(left_out[MOST_LISTED:]):
        console.print(f"left out: {more} more, see {storage.join(dest, QUARANTINE)}", markup=False, highlight=False)
    _lines(console, {"dataset": dest, "digest": index.digest[:12]})
    look = f"python jobs/convert.py crowdray --source {shlex.quote(dest)} --check"
    console.print(f"look at it:  {look}", markup=False, highlight=False, soft_wrap=True)
    console.print(f"train on it: python jobs/train.py --preset NAME --data {shlex.quote(dest)}", markup=False)


def show_check(sound: ValidationReport, report: str, console: Console, *, strict: bool = False) -> None:
    """What a look at a source found, its problems loudest, and where the pictures lie.

    strict: whether a problem is then raised as an UnsoundError.
    """
    console.print(soundness_table(sound))
    plain: dict[str, Any] = {"markup": False, "highlight": False, "soft_wrap": True}
    for note in sound.notes:
        console.print(f"note: {note}", **plain)
    for problem in sound.problems:
        console.print(f"PROBLEM: {problem}", style="bold red", **plain)
    if not sound.problems:
        console.print("sound: no image is unusable, no two splits share one", style="green", **plain)
    names = {"pictures": SHEET, "histograms": HISTOGRAMS, "figures": REPORT}
    _lines(console, {what: storage.join(storage.resolve(report), name) for what, name in names.items()})
    if strict:
        sound.require()


def show_outcome(outcome: Outcome, console: Console) -> None:
    """The stages of a training, what was registered, where everything lies, and how to count with it."""
    result = outcome.result
    table = Table(title=f"{outcome.run.rpartition('/')[2]} (* ships)", title_justify="left")
    for name in ("stage", "epochs", "last losses"):
        table.add_column(name, justify="right" if name == "epochs" else "left")
    for name in ("val MAE", "val RMSE", "test MAE", "test RMSE"):
        table.add_column(name, justify="right")
    for name in dict.fromkeys(str(row["stage"]) for row in result.history):
        rows = [row for row in result.history if row["stage"] == name]
        losses = "\n".join(
            f"{key.removeprefix('loss/')} {value:.4g}" for key, value in rows[-1].items() if key.startswith("loss/")
        )
        stage = result.stages.get(name)
        errors = [*_pair(stage.validation), *_pair(stage.test)] if stage else [""] * 4
        mark = "*" if name == result.shipped else ""
        table.add_row(f"{name}{mark}", str(len(rows)), losses, *errors)
    if result.mean_predictor is not None:
        table.add_row(
            f"always {result.mean_count:.1f}", "", "the mean of training", "", "", *_pair(result.mean_predictor)
        )
    console.print(table)
    version = (outcome.registered or "not registered") + (f" ({outcome.alias})" if outcome.alias else "")
    _lines(
        console,
        {
            "registered": version,
            "picture": outcome.figure,
            "model": outcome.model,
            "run": outcome.run,
            "tracked": outcome.run_url or f"run {outcome.run_id} in {outcome.tracking_uri}",
        },
    )
    command = f"python jobs/predict.py --model {shlex.quote(outcome.counter)} --input IMAGE --output predictions"
    console.print(f"count with it: {command}", markup=False, highlight=False, soft_wrap=True)


def show_study(ended: StudyOutcome, console: Console) -> None:
    """The trials of a study, what its stage store saved, its figures, and its best trial shipped."""
    record = ended.record
    console.print(trial_table(record, f"{record.name} (* ships)"))
    _lines(
        console,
        {
            "store": f"{record.spent:.0f} worker-seconds spent, {record.saved:.0f} saved: {record.factor:.2f} times "
            f"fewer than without, {record.bound:.2f} if nothing were ever trained twice",
            "figures": ", ".join(ended.figures),
            "study": ended.study,
        },
    )
    show_outcome(ended.outcome, console)


def _pair(metrics: Metrics | None) -> list[str]:
    return ["", ""] if metrics is None else [f"{metrics.mae:.2f}", f"{metrics.rmse:.2f}"]


def _lines(console: Console, values: dict[str, str]) -> None:
    for name, value in values.items():
        console.print(f"{name + ':':<12}{value}", markup=False, highlight=False, soft_wrap=True)
