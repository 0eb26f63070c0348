"""Joint training against a control run with the density loss alone and as many updates.

Both resume from one baseline stage; the control run trains the epochs of the decoders and joint stages. Prints
MAE and RMSE on the test split for each seed, the mean-count predictor, and a paired comparison over the test
images. --runs compares two finished runs of jobs/train.py instead, given their folders.
"""

import argparse
import dataclasses
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
from crowdray.training.trainer import EpochCallback, Trainer

VIDEO_BLOCK = 50
"""Frames per bootstrap block: neighbouring frames of a video are not independent."""


def control_config(config: Config) -> Config:
    """The same run without auxiliary tasks, with as many updates."""
    stages = config.stages
    joint = dataclasses.replace(stages.joint, epochs=stages.joint.epochs + stages.decoders.epochs)
    return dataclasses.replace(
        config,
        loss=LossConfig(segmentation=0, depth=0, count=0, gradient_share=config.loss.gradient_share),
        stages=dataclasses.replace(stages, joint=joint),
    )


def train(config: Config, dataset: Dataset, checkpoint: Path | None, on_epoch: EpochCallback) -> TrainingResult:
    """Train all stages, from a checkpoint if there is one."""
    restored = load_checkpoint(checkpoint) if checkpoint else None
    trainer = Trainer(config, dataset, world=World(), device=pick_device(), restored=restored)
    trainer.fit(on_epoch)
    return final_result(trainer)


def train_both(config: Config, dataset: Dataset) -> tuple[TrainingResult, TrainingResult]:
    """Train the joint and the control run of one seed from a shared baseline stage."""
    with tempfile.TemporaryDirectory() as folder:

        def on_epoch(metrics: EpochMetrics, save: Callable[[Path], None]) -> None:
            mae = metrics.get("val/mae", float("nan"))
            print(f"    {metrics['stage']:8} {metrics['epoch']:3} val MAE {mae:.3f}", flush=True)
            if metrics["stage"] == "baseline" and metrics["epoch"] == config.stages.baseline.epochs:
                save(Path(folder))

        joint = train(config, dataset, None, on_epoch)
        return joint, train(control_config(config), dataset, Path(folder), on_epoch)


def compare(config: Config, joint: TrainingResult, control: TrainingResult) -> dict[str, Any]:
    """Compute the errors of both runs and their paired difference over the test images."""
    joint_errors, control_errors = (
        np.array([abs(c.predicted - c.truth) for c in result.stages["joint"].test_counts])
        for result in (joint, control)
    )
    gain = control_errors - joint_errors
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
        "control": control.stages["joint"].test,
        "joint": joint.stages["joint"].test,
        "gain": gain.mean(),
        "block": block,
        "interval": np.percentile(means, [2.5, 97.5]),
        "p": wilcoxon(control_errors, joint_errors).pvalue if gain.any() else 1.0,
    }


def show(comparison: dict[str, Any]) -> None:
    """Print the result of `compare`."""
    print("test MAE/RMSE (crowd-counting papers print RMSE as MSE)")
    print(f"  mean-count predictor      {comparison['mean']:7.3f}")
    for name in ("baseline", "control", "joint"):
        test = comparison[name]
        label = {"baseline": "stage 1 alone", "control": "stage 1, same updates", "joint": "joint"}[name]
        print(f"  {label:25} {test.mae:7.3f} / {test.rmse:.3f}, bias {test.bias:+.3f}")
    ratio = comparison["mean"] / comparison["joint"].mae
    low, high = comparison["interval"]
    print(f"  mean predictor / joint {ratio:.2f} (goal: at least 3)")
    print(
        f"  paired gain of the joint model {comparison['gain']:+.3f} heads, 95% [{low:+.3f}, {high:+.3f}] "
        f"(bootstrap, {comparison['block']} images at a time), Wilcoxon p = {comparison['p']:.2g}"
    )


def load_run(folder: Path) -> tuple[Config, TrainingResult]:
    """Load the configuration and result of a finished run from its folder."""
    result = folder / "trained" / "result.json"
    return (
        from_json((folder / "config.json").read_text(), str(folder / "config.json")),
        TrainingResult.from_json(result.read_text(), str(result)),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--preset", default="demo")
    parser.add_argument("--data", default="data/demo")
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--runs", nargs=2, type=Path, metavar=("JOINT", "CONTROL"))
    arguments = parser.parse_args()
    if arguments.runs:
        (config, joint), (_, control) = map(load_run, arguments.runs)
        show(compare(config, joint, control))
        return
    torch.set_num_threads(arguments.threads)
    dataset = Dataset.open(arguments.data)
    wins = 0
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    for seed in seeds:
        started = time.perf_counter()
        config = dataclasses.replace(preset(arguments.preset), seed=seed)
        comparison = compare(config, *train_both(config, dataset))
        print(f"seed {seed}", end=", ")
        show(comparison)
        print(f"  {time.perf_counter() - started:.0f} s", flush=True)
        wins += comparison["gain"] > 0
    print(f"the joint stage wins in {wins} of {len(seeds)} seeds")


if __name__ == "__main__":
    main()
