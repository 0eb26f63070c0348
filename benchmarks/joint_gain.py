"""Does the joint stage beat the baseline given the same number of updates? Both start from one baseline
stage.

The rival goes on with the density loss alone, for the joint stage's epochs and the decoders stage's on top.
Prints MAE and RMSE on the test split for each seed, the mean-count predictor, and a paired comparison over
the test images. With --runs JOINT RIVAL it compares two finished runs of jobs/train.py instead, each the folder of
its run.
"""

import argparse
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import wilcoxon

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.config import Config, LossConfig, from_json
from crowdray.data.shards import Dataset
from crowdray.presets import preset
from crowdray.training.checkpoint import EpochMetrics, load_checkpoint
from crowdray.training.distributed import World, pick_device
from crowdray.training.result import TrainingResult, final_result
from crowdray.training.trainer import Trainer

VIDEO_BLOCK = 50
"""Neighbouring frames of a video are no independent trials: the bootstrap draws as many together."""


def rival_of(config: Config) -> Config:
    """The same training without auxiliary tasks, as many updates."""
    stages = config.stages
    joint = dataclasses.replace(stages.joint, epochs=stages.joint.epochs + stages.decoders.epochs)
    return dataclasses.replace(
        config,
        loss=LossConfig(segmentation=0, depth=0, count=0, gradient_share=config.loss.gradient_share),
        stages=dataclasses.replace(stages, joint=joint),
    )


def finish(config: Config, dataset: Dataset, checkpoint: Path | None, report: Callable[..., None]) -> TrainingResult:
    """Train from a checkpoint, or from the start, to the end."""
    restored = load_checkpoint(checkpoint) if checkpoint else None
    training = Trainer(config, dataset, world=World(), device=pick_device(), restored=restored)
    training.fit(report)
    return final_result(training)


def train_both(config: Config, dataset: Dataset) -> tuple[TrainingResult, TrainingResult]:
    """The joint training and its rival, of one seed, from a shared baseline stage."""
    with tempfile.TemporaryDirectory() as folder:

        def keep(row: EpochMetrics, save: Callable[[Path], None]) -> None:
            print(
                f"    {row['stage']:8} {row['epoch']:3} val MAE {row.get('val/mae', float('nan')):.3f}",
                flush=True,
            )
            if row["stage"] == "baseline" and row["epoch"] == config.stages.baseline.epochs:
                save(Path(folder))

        joint = finish(config, dataset, None, keep)
        return joint, finish(rival_of(config), dataset, Path(folder), keep)


def compare(config: Config, joint: TrainingResult, rival: TrainingResult) -> dict[str, Any]:
    """Errors of both, and their paired difference over the test images."""
    ours, theirs = (
        np.array([abs(c.predicted - c.truth) for c in result.stages["joint"].test_counts]) for result in (joint, rival)
    )
    gain = theirs - ours
    rng = np.random.default_rng(0)
    block = VIDEO_BLOCK if config.sampling.validation == "run" else 1
    blocks = np.array_split(gain, max(1, len(gain) // block))
    means = [
        np.concatenate([blocks[k] for k in rng.integers(len(blocks), size=len(blocks))]).mean() for _ in range(5000)
    ]
    assert joint.mean_predictor is not None
    return {
        "mean": joint.mean_predictor.mae,
        "baseline": joint.stages["baseline"].test,
        "rival": rival.stages["joint"].test,
        "joint": joint.stages["joint"].test,
        "gain": gain.mean(),
        "block": block,
        "interval": np.percentile(means, [2.5, 97.5]),
        "p": wilcoxon(theirs, ours).pvalue if gain.any() else 1.0,
    }


def show(found: dict[str, Any]) -> None:
    """Print what `compare` found."""
    print("test MAE/RMSE (RMSE is what tables of the field print as MSE)")
    print(f"  mean-count predictor      {found['mean']:7.3f}")
    for name in ("baseline", "rival", "joint"):
        test = found[name]
        label = {"baseline": "stage 1 alone", "rival": "stage 1, same updates", "joint": "joint"}[name]
        print(f"  {label:25} {test.mae:7.3f} / {test.rmse:.3f}, bias {test.bias:+.3f}")
    ratio = found["mean"] / found["joint"].mae
    low, high = found["interval"]
    print(f"  mean predictor / joint {ratio:.2f} (goal: at least 3)")
    print(
        f"  paired gain of the joint model {found['gain']:+.3f} heads, 95% [{low:+.3f}, {high:+.3f}] "
        f"(bootstrap, {found['block']} images at a time), Wilcoxon p = {found['p']:.2g}"
    )


def finished(run: str) -> tuple[Config, TrainingResult]:
    """Configuration and result of a finished run, from its folder."""
    folder = Path(run)
    place = folder / "trained" / "result.json"
    return (
        from_json((folder / "config.json").read_text(), str(folder / "config.json")),
        TrainingResult.from_json(place.read_text(), str(place)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", nargs=2, metavar=("JOINT", "RIVAL"))
    arguments = parser.parse_args()
    if arguments.runs:
        (config, joint), (_, rival) = map(finished, arguments.runs)
        show(compare(config, joint, rival))
        return
    torch.set_num_threads(arguments.threads)
    dataset = Dataset.open(arguments.data)
    wins = 0
    for seed in json.loads(f"[{arguments.seeds}]"):
        started = time.perf_counter()
        config = dataclasses.replace(preset(arguments.preset), seed=seed)
        found = compare(config, *train_both(config, dataset))
        print(f"seed {seed}", end=", ")
        show(found)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        wins += found["gain"] > 0
    print(f"the joint stage wins in {wins} of {len(json.loads(f'[{arguments.seeds}]'))} seeds")


if __name__ == "__main__":
    main()
