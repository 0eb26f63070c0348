"""Compare a counter's bias on whole images and on crops, by region, for the best weights of each stage of a run.

A crop is counted twice: from its window, with the context used in training, and cut out alone, without context. The
truth is the target density of the region, so a head at its border counts in part. Prints the bias in heads per region
with the standard error of the mean, on training and validation images.
"""

import argparse
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "platform"))
from crowdray.data.image_cache import DecodedImage
from crowdray.data.shards import Dataset
from crowdray.data.targets import density_map
from crowdray.models.counter import Counter
from crowdray.training.checkpoint import load_checkpoint
from crowdray.training.distributed import World, pick_device
from crowdray.training.trainer import Trainer

BORDER = 40
"""Width in pixels of the border region."""


def line(name: str, errors: list[float]) -> str:
    values = np.array(errors)
    return f"    {name:34} {values.mean():+6.2f} +- {values.std() / len(values) ** 0.5:.2f}"


def region_errors(
    counter: Counter, decoded: DecodedImage, sigma: float, side: int, margin: int
) -> Iterator[tuple[str, float]]:
    """Yield the count error, in heads, of each region of one image."""
    height, width = decoded.size
    top, left = (height - side) // 8 * 4, (width - side) // 8 * 4
    box = (slice(top, top + side), slice(left, left + side))
    outer = (
        slice(max(0, top - margin), min(height, top + side + margin)),
        slice(max(0, left - margin), min(width, left + side + margin)),
    )
    inner = tuple(slice(b.start - o.start, b.start - o.start + side) for b, o in zip(box, outer, strict=True))
    image = torch.from_numpy(decoded.image).permute(2, 0, 1)[None]
    with torch.inference_mode():
        whole, window, alone = (
            counter.density(part)[0, 0].double().numpy() for part in (image, image[(..., *outer)], image[(..., *box)])
        )
    roi = np.ones(decoded.size, bool) if decoded.roi is None else decoded.roi
    interior = np.zeros(decoded.size, bool)
    interior[BORDER:-BORDER, BORDER:-BORDER] = True
    points = torch.from_numpy(decoded.points.copy())[None]
    mask = torch.from_numpy(roi)[None, None].float()
    target = density_map(points, torch.ones(points.shape[:2]), decoded.size, sigma=sigma, roi=mask)
    truth = target[0, 0].double().numpy()
    yield "whole image", (whole * roi).sum() - len(decoded.points)
    yield f"outer {BORDER} pixels", (whole * roi * ~interior).sum() - (truth * ~interior).sum()
    yield "interior", (whole * roi * interior).sum() - (truth * interior).sum()
    yield "central crop, from the whole image", (whole * roi)[box].sum() - truth[box].sum()
    yield "central crop, from its window", (window[inner] * roi[box]).sum() - truth[box].sum()
    yield "central crop, cut out alone", (alone * roi[box]).sum() - truth[box].sum()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", nargs="?", help="a run's trained/ folder or one of its checkpoints")
    parser.add_argument("--data", default="data/mall")
    parser.add_argument("--side", type=int, default=160)
    arguments = parser.parse_args()
    if arguments.checkpoint is None:
        print("  usage: benchmarks/border_bias.py runs/NAME/trained --data data/mall")
        return
    checkpoint = load_checkpoint(Path(arguments.checkpoint))
    dataset = Dataset.open(arguments.data)
    trainer = Trainer(checkpoint.config, dataset, world=World(), device=pick_device(), restored=checkpoint)
    margin = trainer.state.counter.encoder.receptive_radius // 4 * 4 + 4
    parts = {
        "training": trainer.train_rows[:: max(1, len(trainer.train_rows) // 133)],
        "validation": trainer.validation_rows,
    }
    for stage, (part, rows) in itertools.product(trainer.state.best_weights, parts.items()):
        counter = trainer.best_counter(stage)
        errors: dict[str, list[float]] = {}
        for row in rows.tolist():
            decoded, sigma = trainer.images[row], checkpoint.config.target.sigma
            for name, error in region_errors(counter, decoded, sigma, arguments.side, margin):
                errors.setdefault(name, []).append(float(error))
        print(f"  {stage}: bias in heads over {len(rows)} {part} images")
        for name, values in errors.items():
            print(line(name, values))


if __name__ == "__main__":
    main()
