"""Tables for the terminal."""

import math

from rich import box
from rich.table import Table
from rich.text import Text

from crowdray.evaluation.metrics import GAME_LEVELS, GridMetrics
from crowdray.evaluation.report import Evaluation


def evaluation_table(evaluation: Evaluation, title: str) -> Table:
    """Metrics of a split, its regions of interest and its scenes."""
    table = Table(
        title=Text(title),
        title_justify="left",
        box=box.SIMPLE_HEAVY,
        collapse_padding=True,
        pad_edge=False,
        caption="Heads per image. RMSE is what crowd-counting tables print as MSE; MAE is GAME0.",
        caption_justify="left",
    )
    table.add_column("where")
    for name in ("images", "heads", "MAE", "RMSE", "bias", "NAE", *(f"GAME{n}" for n in GAME_LEVELS if n)):
        table.add_column(name, justify="right", no_wrap=True)
    region = "images" if evaluation.without_roi is None else "ROI"
    table.add_row(region, *_metric_cells(evaluation.overall), style="bold", end_section=True)
    if evaluation.without_roi is not None:
        table.add_row("images", *_metric_cells(evaluation.without_roi), end_section=True)
    for scene, metrics in evaluation.scenes.items():
        table.add_row(Text(scene), *_metric_cells(metrics))
    for area, mae in ((region, evaluation.scene_mae), ("images", evaluation.scene_mae_without_roi)):
        if mae is not None:
            table.add_row(f"mean of scenes, {area}", "", "", f"{mae:.2f}")
    return table


def _metric_cells(metrics: GridMetrics) -> list[str]:
    nae = f"{metrics.nae:.1%}" if math.isfinite(metrics.nae) else "-"
    errors = [f"{metrics.mae:.2f}", f"{metrics.rmse:.2f}", f"{metrics.bias:+.2f}", nae]
    games = [f"{value:.2f}" for level, value in zip(GAME_LEVELS, metrics.game, strict=True) if level]
    return [f"{metrics.images:,}", f"{metrics.heads:,}", *errors, *games]
