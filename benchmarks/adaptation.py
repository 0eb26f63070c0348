"""Adaptation of a registered counter to few images of another camera, against training from ImageNet's weights.

Both train the preset `adapt` on the same images with the same number of updates, and are evaluated on the same
test images. Prints the test MAE of each number of images and seed, of the counter before adaptation and of the mean
predictor. The default counter is that of `make train`:

    .venv/bin/python benchmarks/adaptation.py --data data/mall
"""

import argparse
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.config import Config, with_init
from crowdray.data.shards import Dataset
from crowdray.data.splits import split_rows
from crowdray.evaluation.metrics import Metrics, summarise
from crowdray.models.initial import InitialWeights
from crowdray.pipeline.warm_start import pin_init, read_init
from crowdray.presets import preset
from crowdray.training.distributed import World, pick_device
from crowdray.training.trainer import Trainer


def configure(options: argparse.Namespace, dataset: Dataset, images: int, seed: int) -> Config:
    """The preset for a number of images, as long as --updates says."""
    config = preset("adapt")
    sampling = replace(config.sampling, images=images, downsample=options.downsample)
    config = replace(config, seed=seed, sampling=sampling)
    windows = len(split_rows(config, dataset, 1)[0]) * sampling.crops_per_image
    epochs = round(options.updates / max(1, windows // sampling.batch))
    baseline = replace(config.stages.baseline, epochs=epochs, anneal_epochs=epochs // 2)
    return replace(config, stages=replace(config.stages, baseline=baseline))


class Comparison:
    """Trains counters on a dataset and evaluates them on the same test images."""

    def __init__(self, dataset: Dataset, test_images: int) -> None:
        self.dataset = dataset
        rows = dataset.rows("test")
        self.rows = rows[:: max(1, len(rows) // test_images)][:test_images]

    def train(self, config: Config, initial: InitialWeights | None) -> tuple[Metrics, Metrics]:
        """Errors before and after training."""
        trainer = Trainer(config, self.dataset, world=World(), device=pick_device(), initial=initial)
        trainer.state.best_weights["start"] = trainer.state.counter.strip().state_dict()
        before = summarise(trainer.evaluate("start", self.rows)) if initial else None
        trainer.fit()
        best = min(trainer.state.progress.best.items(), key=lambda stage: stage[1].mae)[0]
        after = summarise(trainer.evaluate(best, self.rows))
        return before or after, after

    def mean_predictor(self, config: Config) -> float:
        """MAE of predicting the mean count of the training images."""
        counts = dict(zip(self.dataset.rows("train").tolist(), self.dataset.counts("train").tolist(), strict=True))
        truth = dict(zip(self.dataset.rows("test").tolist(), self.dataset.counts("test").tolist(), strict=True))
        mean = np.mean([counts[row] for row in split_rows(config, self.dataset, 1)[0].tolist()])
        return float(np.mean([abs(truth[row] - mean) for row in self.rows.tolist()]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--init", default="models:/crowdray-synthetic@candidate")
    parser.add_argument("--tracking-uri", default="sqlite:///mlflow.db")
    parser.add_argument("--data", default="data/mall")
    parser.add_argument("--images", type=int, nargs="+", default=[10, 50, 200])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--downsample", type=int, default=2, help="Mall's frames of 640x480 become 320x240")
    parser.add_argument("--test-images", type=int, default=300, help="evenly spaced in the test split")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    dataset = Dataset.open(options.data)
    comparison = Comparison(dataset, options.test_images)
    print(f"test MAE on {len(comparison.rows)} images; updates; images: training and validation together", flush=True)
    for images in options.images:
        for seed in options.seeds:
            clock = time.perf_counter()
            config = configure(options, dataset, images, seed)
            with tempfile.TemporaryDirectory() as folder:
                started, file = pin_init(with_init(config, options.init), folder, options.tracking_uri)
                before, adapted = comparison.train(started, read_init(file))
            print(
                f"{images:4} images, seed {seed}: mean predictor {comparison.mean_predictor(config):.2f}, "
                f"not adapted {before.mae:.2f}, adapted {adapted.mae:.2f} (bias {adapted.bias:+.2f})",
                end=", ",
                flush=True,
            )
            other = comparison.train(config, None)[1]
            seconds = time.perf_counter() - clock
            print(f"from ImageNet {other.mae:.2f} (bias {other.bias:+.2f}); {seconds:.0f} s", flush=True)


if __name__ == "__main__":
    main()
