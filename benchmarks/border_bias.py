"""Is a counter's bias on whole images that on crops? Region by region, for the best weights of a run's stages.

A crop is counted twice: from its window, with the context that training gave it, and cut out alone, as a model trained
without context would see it. Truth is the target density of the region, so that a head at its border counts in parts.
Heads of bias a region, with the standard error of the mean, on training and on validation images.
"""

import argparse
import itertools
import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.shards import Dataset
from crowdray.data.targets import density_map
from crowdray.training.checkpoint import load_checkpoint
from crowdray.training.distributed import World, pick_device
from crowdray.training.trainer import Trainer

RIM = 40


def line(name: str, errors: list[float]) -> str:
    values = np.array(errors)
    return f"    {name:34} {values.mean():+6.2f} +- {values.std() / len(values) ** 0.5:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a run's trained/ folder, or one of its checkpoints")
    parser.add_argument("--data", default="data/mall")
    parser.add_argument("--side", type=int, default=160)
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        print("  name what to look at: benchmarks/border_bias.py runs/NAME/trained --data data/mall")
        return
    checkpoint = load_checkpoint(Path(arguments.checkpoint))
    dataset = Dataset.open(arguments.data)
    training = Trainer(checkpoint.config, dataset, world=World(), device=pick_device(), restored=checkpoint)
    margin = training.state.counter.encoder.receptive_radius // 4 * 4 + 4
    parts = {
        "training": training.train_rows[:: max(1, len(training.train_rows) // 133)],
        "validation": training.validation_rows,
    }
    for stage, (part, rows) in itertools.product(training.state.best_weights, parts.items()):
        counter = training.best_counter(stage)
        errors: dict[str, list[float]] = {}
        for row in rows.tolist():
            picture = training.images[row]
            height, width = picture.size
            top, left = (height - arguments.side) // 8 * 4, (width - arguments.side) // 8 * 4
            box = (slice(top, top + arguments.side), slice(left, left + arguments.side))
            outer = (
                slice(max(0, top - margin), min(height, top + arguments.side + margin)),
                slice(max(0, left - margin), min(width, left + arguments.side + margin)),
            )
            inner = (slice(top - outer[0].start, top - outer[0].start + arguments.side),
                     slice(left - outer[1].start, left - outer[1].start + arguments.side))  # fmt: skip
            image = torch.from_numpy(picture.image).permute(2, 0, 1)[None]
            with torch.inference_mode():
                whole, window, alone = (
                    counter.density(shown)[0, 0].double().numpy()
                    for shown in (image, image[(..., *outer)], image[(..., *box)])
                )
            roi = np.ones(picture.size, bool) if picture.roi is None else picture.roi
            middle = np.zeros(picture.size, bool)
            middle[RIM:-RIM, RIM:-RIM] = True

            points = torch.from_numpy(picture.points.copy())[None]
            mask = torch.from_numpy(roi)[None, None].float()
            sigma = checkpoint.config.target.sigma
            target = density_map(points, torch.ones(points.shape[:2]), picture.size, sigma=sigma, roi=mask)
            truth = target[0, 0].double().numpy()
            for name, value in (
                ("whole image", (whole * roi).sum() - len(picture.points)),
                (f"outer {RIM} pixels", (whole * roi * ~middle).sum() - (truth * ~middle).sum()),
                ("inside of them", (whole * roi * middle).sum() - (truth * middle).sum()),
                ("central crop, from the whole image", (whole * roi)[box].sum() - truth[box].sum()),
                ("central crop, from its window", (window[inner] * roi[box]).sum() - truth[box].sum()),
                ("central crop, cut out alone", (alone * roi[box]).sum() - truth[box].sum()),
            ):
                errors.setdefault(name, []).append(float(value))
        print(f"  {stage}: bias in heads over {len(rows)} {part} images")
        for name, values in errors.items():
            print(line(name, values))


if __name__ == "__main__":
    main()
