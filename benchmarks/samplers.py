"""TPE against random search: the best validation MAE after equal worker-seconds, seed by seed.

Both search the same space on the same small synthetic scenes, with prefix caching and pruning, and start
with the same two points, the paper's weights and no task. They are compared at the time that the cheaper one spent.
Draws the curves to a PNG.
"""

import argparse
import dataclasses
import math
import sys
import tempfile
from itertools import accumulate
from pathlib import Path

from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "platform"), str(ROOT)]
from benchmarks.tune import base_config, render, search, vary_lengths

from crowdray.config import to_json
from crowdray.plots import style
from crowdray.tune.record import StudyRecord

SAMPLERS = {"tpe": style.BLUE, "random": style.ORANGE}


def best_so_far(record: StudyRecord) -> tuple[list[float], list[float]]:
    """Worker-seconds after each trial, and the best validation MAE of the complete ones by then."""
    spent = list(accumulate(trial.spent for trial in record.by_end()))
    maes = (trial.mae if trial.state == "complete" else None for trial in record.by_end())
    return spent, list(accumulate((math.inf if mae is None else mae for mae in maes), min))


def best_within(record: StudyRecord, seconds: float) -> float:
    """The best validation MAE within a budget of worker-seconds."""
    return min(best for spent, best in zip(*best_so_far(record), strict=True) if spent <= seconds * (1 + 1e-9))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=32)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--divisor", type=int, default=10, help="divisor of the stage lengths")
    parser.add_argument("--images", type=int, default=192)
    parser.add_argument("--figure", type=Path, default=Path("outputs/samplers.png"))
    arguments = parser.parse_args()
    figure = Figure(figsize=(2.6 * len(arguments.seeds), 2.8), dpi=style.DPI, layout="constrained")
    panels = figure.subplots(1, len(arguments.seeds), squeeze=False)[0]
    won = 0
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        render(folder / "data", arguments.images)
        for seed, axes in zip(arguments.seeds, panels, strict=True):
            base = dataclasses.replace(base_config(arguments.divisor), seed=seed)
            (folder / "config.json").write_text(to_json(base))
            vary = vary_lengths(arguments.divisor)
            records = {
                sampler: search(folder, f"{sampler}-{seed}", vary, arguments.trials, "--sampler", sampler)
                for sampler in SAMPLERS
            }
            seconds = min(record.spent for record in records.values())
            best = {sampler: best_within(record, seconds) for sampler, record in records.items()}
            won += best["tpe"] < best["random"]
            print(
                f"seed {seed}, after {seconds:.0f} worker-seconds: tpe {best['tpe']:.3f}, random {best['random']:.3f}",
                flush=True,
            )
            for sampler, record in records.items():
                axes.step(*best_so_far(record), where="post", color=SAMPLERS[sampler], label=sampler)
            axes.axvline(seconds, color=style.FAINT, linewidth=0.8)
            axes.set(title=f"seed {seed}", xlabel="worker-seconds")
            style.style_axes(axes)
    print(f"tpe is lower on {won} of {len(arguments.seeds)} seeds (goal: at least 4 of 5)")
    panels[0].set_ylabel("best validation MAE, heads")
    panels[-1].legend(frameon=False)
    style.save_figure(figure, arguments.figure)
    print(f"curves: {arguments.figure}")


if __name__ == "__main__":
    main()
